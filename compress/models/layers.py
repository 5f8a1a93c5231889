"""Find the layers that compression may change, and the zeros in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.tasks.kinds import KINDS


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


Layer = nn.Linear | nn.Embedding


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the transformer blocks: the longest ``ModuleList`` of the model.

    Raises:
        UserError: the model has no ``ModuleList``.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UserError(
            f"`{type(model).__name__}` has no list of transformer blocks; a torch.nn.ModuleList is expected. Choose a "
            "model of the Hugging Face library, or a module of the same shape."
        )
    return max(lists, key=lambda item: len(item[1]))


def find_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Return the layers that compression works on: every ``Linear`` inside a transformer block.

    Embeddings, the pooler and the head are outside the blocks and keep full precision.

    Raises:
        UserError: the blocks hold no ``Linear``.
    """
    prefix, stack = find_blocks(model)
    linears = [(f"{prefix}.{name}", module) for name, module in stack.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise UserError(
            f"The blocks of `{type(model).__name__}` hold no torch.nn.Linear, the layers that compression works on "
            "(GPT-2's are Conv1D). Choose another model."
        )
    return iter(linears)


def detect_task_kind(model: nn.Module) -> str:
    """Return the kind of task that the model's head is for, as its config says: ``multiclass`` if it says nothing."""
    generates = getattr(model, "get_output_embeddings", lambda: None)() is not None
    problem = None if generates else getattr(model.config, "problem_type", None)
    fitting = (kind.name for kind in KINDS.values() if (kind.generates, kind.problem_type) == (generates, problem))
    return next(fitting, "multiclass")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, and every module back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def unwrap_model(module: nn.Module) -> nn.Module:
    """Return the model that a callback works on: a LightningModule's ``model``, or the whole module."""
    model = getattr(module, "model", module)
    return model if isinstance(model, nn.Module) else module


def find_prunable(model: nn.Module, embeddings: bool, head: bool) -> dict[str, Layer]:
    """Return the layers whose weights can be pruned, by name: those of :func:`find_linears`, with the ``embeddings``
    and the Linear layers outside the blocks (pooler and ``head``) on request. An output layer that is tied to the
    embeddings counts as embeddings."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    tied = {id(module.weight) for _, module in layers if isinstance(module, nn.Embedding)}
    inside = dict(find_linears(model))

    def wanted(name: str, module: nn.Module) -> bool:
        if isinstance(module, nn.Embedding):
            return embeddings
        return name in inside or (head and id(module.weight) not in tied)

    return {name: module for name, module in layers if wanted(name, module)}


def select_layers(model: nn.Module, skip: Sequence[str], key: str) -> dict[str, Layer]:
    """Return the layers that ``skip``, the setting ``key``, does not exclude, by name.

    ``skip`` holds ``embeddings``, ``head`` (every Linear outside the transformer blocks) and patterns of names.

    Raises:
        UserError: a pattern matches no layer, or no layer is left.
    """
    patterns = [word for word in skip if word not in ("embeddings", "head")]
    layers = find_prunable(model, embeddings="embeddings" not in skip, head="head" not in skip)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise UserError(describe_unmatched(key, pattern, layers))
    kept = {name: layer for name, layer in layers.items() if not any(fnmatchcase(name, p) for p in patterns)}
    if not kept:
        raise UserError(f"{key} is {list(skip)}, which leaves no layer to work on. Skip fewer layers.")
    return kept


def find_quantizable(model: nn.Module, skip: Sequence[str], key: str) -> dict[str, nn.Linear]:
    """Return the Linear layers to quantize, by name: those that the setting ``key.skip`` does not exclude.

    Raises:
        UserError: ``skip`` does not exclude the embeddings.
    """
    if "embeddings" not in skip:
        raise UserError(f"{key}.skip is {list(skip)}; embeddings stay floats here. Add `embeddings` to {key}.skip.")
    return {
        name: layer for name, layer in select_layers(model, skip, f"{key}.skip").items() if isinstance(layer, nn.Linear)
    }


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


def find_zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the zeros of every pruned layer (bool, in the weight's shape). An exact zero *is* the mask, and
    nothing else is stored. The embedding of padding is zero by itself and does not count."""
    masks = {
        name: dequantize_weight(layer.weight) == 0
        for name, layer in find_prunable(model, embeddings=True, head=True).items()
    }
    for name, mask in masks.items():
        if (padding := getattr(model.get_submodule(name), "padding_idx", None)) is not None:
            mask[padding] = False
    return {name: mask for name, mask in masks.items() if mask.any()}


def find_pruned_layers(model: nn.Module, least: float = 0.05) -> dict[str, float]:
    """Return the share of zeros of each layer with at least that share, by name.

    A rounded weight may be zero by chance, and a layer of zeros alone was initialised so rather than pruned.
    """
    shares = {name: mask.float().mean().item() for name, mask in find_zeros(model).items()}
    return {name: share for name, share in shares.items() if least <= share < 1}


def digest_tensor(tensor: Tensor) -> bytes:
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(content.data, digest_size=16).digest()


@torch.no_grad()
def apply_masks(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Multiply the weights by their masks (1 keeps, 0 prunes) in place."""
    for name, mask in masks.items():
        model.get_submodule(name).weight.mul_(mask)


def measure_sparsity(weights: Iterable[Tensor]) -> float:
    """Return the fraction of exact zeros."""
    counts = [(int((weight == 0).sum()), weight.numel()) for weight in weights]
    return sum(zero for zero, _ in counts) / sum(size for _, size in counts)
