"""Let the units that stay take over what removed units add to a block's output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.maths.hessian import second_moment
from compress.maths.units import Masks
from compress.models.batches import Batch
from compress.models.blocks import read_blocks, select_blocks
from compress.models.calibration import observe
from compress.models.matrices import Matrix, matrices

DAMPING = 1e-3
"""Fraction of the mean square of the inputs that is added to their squares."""


def add_constant(x: Tensor) -> Tensor:
    """Return the second moment of the inputs ``[tokens, inputs]`` and a last input that is 1, for the bias."""
    return second_moment(torch.cat([x, torch.ones_like(x[:, :1])], 1))


@torch.no_grad()
def compensate_removal(model: Any, batches: list[Batch], masks: dict[str, Masks]) -> None:
    """Change the weights that read the units which ``masks`` keep (and the bias, where there is one) so that on
    ``batches`` the outputs come as close as possible to those with all units, in the sum of squares.

    This is the closed form of removing structures with second-order updates of the others, for all of a block at once:
    Kurtic et al., "ZipLM", 2023, arXiv:2302.04089. The removed units still have to be removed.
    """
    known = {id(matrix.stored): matrix for matrix in matrices(model).values()}
    blocks = read_blocks(model)
    readers: dict[str, tuple[Matrix, Tensor]] = {}
    for part, kept in masks.items():
        for block, mask in zip(select_blocks(blocks, part), kept):
            ((reader, _),) = block.find_readers(part)
            if not mask.all():
                matrix = known[id(reader.stored)]
                readers[matrix.name] = (matrix, mask.cpu().repeat_interleave(matrix.inputs // len(mask)))
    wanted = {name: matrix for name, (matrix, _) in readers.items()}
    for shared in observe(model, batches, add_constant, wanted):
        for name in shared.matrices:
            matrix, inputs = readers[name]
            fit_kept(matrix, inputs.to(shared.statistic.device), shared.statistic)


def fit_kept(matrix: Matrix, kept: Tensor, moment: Tensor) -> None:
    """Replace the weights of the ``kept`` inputs, and the bias, by the least-squares fit of the outputs.

    ``moment`` ``[inputs + 1, inputs + 1]`` is the second moment of the inputs and of a constant 1.
    """
    bias = matrix.bias
    used = torch.cat([kept, kept.new_tensor([bias is not None])])
    joined = torch.cat([matrix.weight, torch.zeros_like(matrix.weight[:, :1])], 1).double()
    moment = moment.double()
    square = moment[used][:, used]
    square.diagonal().add_(DAMPING * square.diagonal().mean())
    # What the removed inputs add, as a combination of the used ones.
    lost = joined[:, ~used] @ moment[~used][:, used]
    change = torch.linalg.solve(square, lost.T).T.to(matrix.dtype)
    before = matrix.weight[:, kept]
    matrix.weight[:, kept] = before + change[:, : int(kept.sum())].masked_fill(before == 0, 0)  # pruned weights stay
    if bias is not None:
        bias += change[:, -1]
