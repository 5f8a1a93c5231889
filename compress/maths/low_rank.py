"""Weights that a product of two small matrices changes: LoRA and DoRA."""

from __future__ import annotations

import torch
from torch import Tensor


def scale_rows(changed: Tensor, lengths: Tensor) -> Tensor:
    """Return the factors that give the rows of ``changed``, ``[rows, inputs]``, these ``lengths``.

    As in DoRA (Liu et al., 2024, arXiv:2402.09353, section 4.3), no gradient passes through the rows' own lengths. A
    row of zeros stays a row of zeros.
    """
    tiny = torch.finfo(changed.dtype).tiny
    return lengths / torch.linalg.vector_norm(changed.detach(), dim=1).clamp_min(tiny)


def add_update(weight: Tensor, update: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Return ``weight + update``, ``[rows, inputs]``; with ``lengths`` its rows have these lengths.

    Without ``lengths`` it is LoRA's weight (Hu et al., 2021, arXiv:2106.09685), with them DoRA's. A weight that is zero
    stays exactly zero where its update is zero.

    >>> add_update(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]]), torch.tensor([10.0]))
    tensor([[6., 8.]])
    """
    changed = weight + update
    return changed if lengths is None else changed * scale_rows(changed, lengths)[:, None]
