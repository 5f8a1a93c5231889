"""Find the transformer blocks of a model, and the model in a module."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from compress.errors import UserError
from compress.tasks.kinds import KINDS


def find_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of transformer blocks, by name: every ``ModuleList`` with weights in it that is in no other
    list. A model has one, an encoder-decoder has two.

    Raises:
        UserError: the model has none.
    """
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in stacks):
            continue
        if any(parameter.ndim > 1 for parameter in module.parameters()):
            stacks[name] = module
    if not stacks:
        raise UserError(
            f"`{type(model).__name__}` has no list of transformer blocks; a torch.nn.ModuleList is expected. Choose a "
            "model of the Hugging Face library, or a module of the same shape."
        )
    return stacks


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the transformer blocks; of several stacks, the longest.

    Raises:
        UserError: the model has none.
    """
    return max(find_stacks(model).items(), key=lambda item: len(item[1]))


def is_inside(name: str, prefixes: Iterable[str]) -> bool:
    """Return whether the module or tensor ``name`` is inside one of the modules ``prefixes``."""
    return any(name.startswith(f"{prefix}.") for prefix in prefixes)


def detect_task_kind(model: nn.Module) -> str:
    """Return the kind of task that the model's head is for, as its class or its config says: ``multiclass`` if they say
    nothing."""
    if named := getattr(model, "task_kind", None):
        return str(named)
    heads = {kind.auto_class.removeprefix("AutoModel"): kind.name for kind in KINDS.values() if kind.has_own_head}
    if own := next((name for head, name in heads.items() if type(model).__name__.endswith(head)), None):
        return own
    generates = getattr(model, "get_output_embeddings", lambda: None)() is not None
    problem = None if generates else getattr(model.config, "problem_type", None)
    if not generates and problem is None:
        return "multiclass"  # the models of other kinds name theirs
    others = (kind for kind in KINDS.values() if not kind.has_own_head)
    fitting = (kind.name for kind in others if (kind.generates, kind.problem_type) == (generates, problem))
    return next(fitting, "multiclass")


@contextmanager
def keep_unstored_buffers(module: nn.Module) -> Iterator[None]:
    """Keep the precision of buffers that no checkpoint holds while a module is cast: a model that is loaded in 16 bits
    has them in 32, and the frequencies of rotary positions need it."""
    kept = [
        (owner, name, buffer)
        for owner in module.modules()
        for name in owner._non_persistent_buffers_set
        if (buffer := owner._buffers.get(name)) is not None
    ]
    yield
    for owner, name, buffer in kept:
        owner._buffers[name] = buffer.to(owner._buffers[name].device)  # type: ignore[union-attr]


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


@contextmanager
def limit_gradients(model: nn.Module, wanted: Mapping[Any, Any] | None = None) -> Iterator[None]:
    """Let only the parameters that are keys of ``wanted`` have gradients, and restore all settings afterwards."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(parameter in (wanted or {}))
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def unwrap_model(module: nn.Module) -> nn.Module:
    """Return the model that a callback works on: a LightningModule's ``model``, or the whole module.

    Raises:
        UserError: as :func:`refuse_reparametrized`.
    """
    model = getattr(module, "model", module)
    found = model if isinstance(model, nn.Module) else module
    refuse_reparametrized(found)
    return found


def refuse_reparametrized(model: nn.Module) -> None:
    """Raise UserError if a layer computes its weight again in every forward pass, which would undo what a stage did."""
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear | nn.Embedding):
            continue
        if hasattr(layer, "weight_mask"):
            call = "torch.nn.utils.prune.remove(layer, 'weight')"
        elif is_parametrized(layer, "weight"):
            call = "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
        elif hasattr(layer, "weight_g"):
            call = "torch.nn.utils.remove_weight_norm(layer)"
        elif hasattr(layer, "weight_orig"):
            call = "torch.nn.utils.remove_spectral_norm(layer)"
        else:
            continue
        raise UserError(f"`{name}` computes its weight in each forward pass; stages change plain weights. Call {call}.")


def digest_tensor(tensor: Tensor) -> bytes:
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(content.data, digest_size=16).digest()
