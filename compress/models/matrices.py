"""See a model as the matrices that it multiplies with, whatever modules store them, and the zeros in them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.errors import UserError
from compress.models.layers import find_stacks, is_inside

LEAST_SHARE = 0.9
"""Least share of the blocks' weights that must be matrices, for a stage that compresses matrices."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight that inputs are multiplied with, seen as ``[rows, inputs]``: that of a ``Linear``, of GPT-2's ``Conv1D``
    (stored ``[inputs, rows]``), of one expert (a part of a parameter ``[experts, rows, inputs]``), or of an embedding
    (a row for every token)."""

    name: str
    """The module's name; an expert's number stands before the name of its parameter: ``mlp.experts.3.down_proj``."""
    module: nn.Module
    parameter: str = "weight"
    transposed: bool = False
    expert: int | None = None

    @property
    def stored(self) -> Tensor:
        """The module's parameter, in the module's own shape."""
        return getattr(self.module, self.parameter)  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:
        """The weights ``[rows, inputs]``: a view of the parameter, so what is written to it the model computes with.

        Those of bitsandbytes are dequantized, and cannot be written to.
        """
        return self._view(dequantize_weight(self.stored).detach())

    @property
    def grad(self) -> Tensor | None:
        """The gradient of the last backward pass ``[rows, inputs]``, if there is one."""
        return None if self.stored.grad is None else self._view(self.stored.grad)

    def _view(self, tensor: Tensor) -> Tensor:
        part = tensor if self.expert is None else tensor[self.expert]
        return part.T if self.transposed else part

    @property
    def bias(self) -> Tensor | None:
        """The numbers ``[rows]`` that are added to the outputs, if the module has them."""
        bias = getattr(self.module, "bias" if self.expert is None else f"{self.parameter}_bias", None)
        return bias if bias is None or self.expert is None else bias[self.expert]

    @property
    def shape(self) -> torch.Size:
        """The shape ``[rows, inputs]``, without the weights of a packed layer being read."""
        if self.expert is None and isinstance(self.module, nn.Linear):
            return torch.Size((self.module.out_features, self.module.in_features))
        return self._view(self.stored).shape

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def inputs(self) -> int:
        return self.shape[1]

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape.numel()

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    @property
    def is_embedding(self) -> bool:
        return isinstance(self.module, nn.Embedding)


def dequantize_weight(weight: Tensor) -> Tensor:
    """Return a weight as floats; bitsandbytes packs 4-bit weights two to a byte, in another shape.

    Raises:
        ValueError: a forward pass has rearranged the weight for the CPU, in an order that cannot be read.
    """
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError("4-bit weights can be read only before the first forward pass. Load the model again.")
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)


def matrices(model: nn.Module) -> dict[str, Matrix]:
    """Return the matrices inside the transformer blocks by name, each once, however many blocks share it.

    Embeddings, the pooler and the head are outside the blocks, and keep full precision by default.
    """
    found: dict[int, list[Matrix]] = {}
    for prefix, stack in find_stacks(model).items():
        for name, module in stack.named_modules(prefix=prefix):
            for matrix in read_matrices(name, module):
                found.setdefault(id(matrix.stored), []).append(matrix)
    # A parameter of several modules belongs to the first; the matrices of experts share a parameter and a module.
    return {matrix.name: matrix for shared in found.values() for matrix in shared if matrix.module is shared[0].module}


def read_matrices(name: str, module: nn.Module) -> list[Matrix]:
    """Return the matrices that ``module`` itself holds: one, or those of its experts, or none."""
    if isinstance(module, nn.Linear):
        return [Matrix(name, module)]
    if isinstance(module, Conv1D):
        return [Matrix(name, module, transposed=True)]
    if not is_expert_list(module):
        return []
    return [
        Matrix(f"{name}.{expert}.{parameter}", module, parameter, bool(module.is_transposed), expert)
        for parameter, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3
        for expert in range(len(weight))
    ]


def is_expert_list(module: nn.Module) -> bool:
    """Return whether the module holds the weights of several experts as transformers stores them, ``[experts, rows,
    inputs]`` or with ``is_transposed`` ``[experts, inputs, rows]``."""
    weights = module.named_parameters(recurse=False)
    return hasattr(module, "is_transposed") and any(weight.ndim == 3 for _, weight in weights)


def count_block_weights(model: nn.Module) -> int:
    """Return the number of weights of the transformer blocks that could multiply inputs: those of everything except
    embeddings, norms and biases."""
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return sum(
        sum(matrix.size for matrix in read_matrices("", module)) if isinstance(module, nn.Linear) else weight.numel()
        for stack in find_stacks(model).values()
        for module in stack.modules()
        for weight in module.parameters(recurse=False)
        if weight.ndim > 1 and id(weight) not in looked_up
    )


def find_all_matrices(model: nn.Module, embeddings: bool, head: bool) -> dict[str, Matrix]:
    """Return the matrices that compression may change, by name: those of the blocks, with the ``embeddings`` and those
    outside the blocks (pooler and ``head``) on request. An output layer that is tied to the embeddings counts as
    embeddings."""
    inside = matrices(model)
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    prefixes = tuple(find_stacks(model))
    found: dict[str, Matrix] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            found |= {name: Matrix(name, module)} if embeddings else {}
        elif is_inside(name, prefixes):
            found |= {matrix.name: matrix for matrix in read_matrices(name, module) if matrix.name in inside}
        elif head:
            found |= {m.name: m for m in read_matrices(name, module) if id(m.stored) not in tied}
    return found


def measure_matrices(model: nn.Module) -> dict[str, int]:
    """Return the number of weights of every matrix, in or outside of the blocks, by name."""
    return {name: matrix.size for name, matrix in find_all_matrices(model, embeddings=True, head=True).items()}


def count_inputs(found: Mapping[str, Matrix]) -> dict[str, int]:
    """Return the number of inputs of every matrix, by name."""
    return {name: matrix.inputs for name, matrix in found.items()}


def measure_share(model: nn.Module, names: Collection[str]) -> float:
    """Return the share of the blocks' weights that the matrices ``names`` are."""
    return sum(m.size for name, m in matrices(model).items() if name in names) / max(count_block_weights(model), 1)


def select_matrices(model: nn.Module, skip: Sequence[str], key: str) -> dict[str, Matrix]:
    """Return the matrices that ``skip``, the setting ``key.skip``, does not exclude, by name.

    ``skip`` holds ``embeddings``, ``head`` (every matrix outside the transformer blocks) and patterns of names.

    Raises:
        UserError: a pattern matches no matrix, no matrix is left, or less than :data:`LEAST_SHARE` of the blocks'
            weights are matrices.
    """
    name = type(model).__name__
    if (share := measure_share(model, matrices(model))) < LEAST_SHARE:
        raise UserError(
            f"`{key.rpartition('.')[2]}` compresses matrices, and only {share:.0%} of the weights in the blocks of "
            f"`{name}` are: at least {LEAST_SHARE:.0%} are expected. Choose another model, or stages that need no "
            "matrices (finetune, distill, onnx and openvino with precision=null)."
        )
    patterns = [word for word in skip if word not in ("embeddings", "head")]
    found = find_all_matrices(model, embeddings="embeddings" not in skip, head="head" not in skip)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise UserError(describe_unmatched(f"{key}.skip", pattern, found))
    kept = {name: matrix for name, matrix in found.items() if not any(fnmatchcase(name, p) for p in patterns)}
    if not kept:
        raise UserError(f"{key}.skip is {list(skip)}, which leaves no layer to work on. Skip fewer layers.")
    return kept


def select_quantizable(
    model: nn.Module, skip: Sequence[str], key: str, modules: tuple[type[nn.Module], ...], format: str, experts: bool
) -> dict[str, Matrix]:
    """Return the matrices to quantize, by name: those that the setting ``key.skip`` does not exclude. The file format
    named ``format`` can store those of the ``modules`` and, if so, those of ``experts``.

    Raises:
        UserError: ``skip`` does not exclude the embeddings, or the format cannot store a matrix.
    """
    if "embeddings" not in skip:
        raise UserError(f"{key}.skip is {list(skip)}; embeddings stay floats here. Add `embeddings` to {key}.skip.")
    found = {name: m for name, m in select_matrices(model, skip, key).items() if not m.is_embedding}
    for name, matrix in found.items():
        if not (isinstance(matrix.module, modules) or (experts and matrix.expert is not None)):
            expected = " and ".join(module.__name__ for module in modules)
            raise UserError(
                f"`{key.rpartition('.')[2]}` stores weights in {format}, which knows those of {expected} layers, and "
                f"`{name}` is in a {type(matrix.module).__name__}. Set technique=prune, onnx or openvino, or "
                f"{key}.skip to leave such layers out."
            )
    return found


def describe_unmatched(key: str, pattern: str, names: Iterable[str]) -> str:
    return f"{key} has the pattern `{pattern}`, which matches no layer; a layer is named like `{next(iter(names))}`."


def match_ratios(ratios: dict[str, float], layers: Iterable[str], otherwise: float, key: str) -> dict[str, float]:
    """Return the sparsity of every layer: that of the first pattern that matches its name, or ``otherwise``.

    Raises:
        UserError: a pattern matches no layer.
    """
    for pattern in ratios:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise UserError(describe_unmatched(key, pattern, layers))
    return {
        name: next((value for pattern, value in ratios.items() if fnmatchcase(name, pattern)), otherwise)
        for name in layers
    }


def find_zeros(model: nn.Module, trainable: bool = False) -> dict[str, Tensor]:
    """Return the zeros of every pruned matrix (bool, ``[rows, inputs]``), or of the ``trainable`` ones. An exact zero
    *is* the mask, and nothing else is stored. The embedding of padding is zero by itself and does not count."""
    zeros = {}
    for name, matrix in find_all_matrices(model, embeddings=True, head=True).items():
        if trainable and not matrix.stored.requires_grad:
            continue
        mask = matrix.weight == 0
        if (padding := getattr(matrix.module, "padding_idx", None)) is not None:
            mask[padding] = False
        if mask.any():
            zeros[name] = mask
    return zeros


def find_pruned_layers(model: nn.Module, least: float = 0.05) -> dict[str, float]:
    """Return the share of zeros of each matrix with at least that share, by name.

    A rounded weight may be zero by chance, and a matrix of zeros alone was initialised so rather than pruned.
    """
    shares = {name: mask.float().mean().item() for name, mask in find_zeros(model).items()}
    return {name: share for name, share in shares.items() if least <= share < 1}


@torch.no_grad()
def apply_masks(layers: Mapping[str, Matrix], masks: dict[str, Tensor]) -> None:
    """Multiply the weights of matrices by their masks ``[rows, inputs]`` (1 keeps, 0 prunes) in place."""
    for name, mask in masks.items():
        layers[name].weight.mul_(mask)


def measure_sparsity(weights: Iterable[Tensor]) -> float:
    """Return the fraction of exact zeros."""
    counts = [(int((weight == 0).sum()), weight.numel()) for weight in weights]
    return sum(zero for zero, _ in counts) / sum(size for _, size in counts)
