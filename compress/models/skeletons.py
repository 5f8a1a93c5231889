"""Run models on the meta device, whose tensors have shapes and no values."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from compress.models.layers import evaluation_mode
from compress.models.matrices import Matrix
from compress.models.products import Products


class AssumeTrue(TorchDispatchMode):
    """Answer 1 where a model on the meta device asks for the value of a tensor, such as whether no token is padding."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def can_run(skeleton: PreTrainedModel) -> bool:
    """Return whether the shapes of a model on the meta device fit together. A few models cannot run there."""
    ids = torch.zeros(2, 4, dtype=torch.int64, device="meta")
    try:
        with torch.device("meta"), AssumeTrue():
            skeleton.to(torch.bfloat16).eval()(  # type: ignore[arg-type]
                input_ids=ids, attention_mask=torch.ones_like(ids)
            )
    except Exception:
        return False
    return True


@torch.no_grad()
def find_flat_inputs(model: nn.Module, watched: Mapping[str, Matrix]) -> list[str]:
    """Return the names of the matrices whose inputs have texts and tokens in one dimension, ``[tokens, width]``, as far
    as a run of the ``model``, maybe on the meta device, gets."""
    device = next(iter(watched.values())).stored.device
    ids = torch.zeros(2, 4, dtype=torch.int64, device=device)
    flat: dict[str, None] = {}

    def see(matrix: Matrix, x: Tensor) -> None:
        if x.ndim == 2:
            flat[matrix.name] = None

    products = Products(watched.values(), see)
    with evaluation_mode(model), suppress(Exception), torch.device(device), AssumeTrue(), products:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))  # a few models cannot run without values
    return list(flat)
