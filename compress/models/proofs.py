"""Prove what is assumed of a model: that a change of its weights leaves what it computes as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compress.errors import UserError
from compress.models.blocks import Block, read_blocks, select_blocks
from compress.models.families import Family, name_family
from compress.models.layers import evaluation_mode
from compress.models.products import flatten_tensors, locate, separate_experts
from compress.models.replay import Seen, run_model
from compress.models.shapes import CUTS, cut_head_biases

TOLERANCE = 1e-5
"""Largest relative change of an output that counts as none."""


def is_same(expected: Sequence[Tensor], outputs: Sequence[Tensor], rounded: bool) -> bool:
    """Return whether outputs ``[..., width]`` are as ``expected``, channel by channel, up to the rounding of their
    dtype if weights were ``rounded``.

    A few channels of a language model are a thousand times as large as the others, and would hide changes of these.
    """
    for old, new in zip(expected, outputs, strict=True):
        tolerance = max(TOLERANCE, 10 * torch.finfo(old.dtype).eps if rounded else 0)
        change, size = ((x.float().abs().flatten(0, -2).amax(0)) for x in (new.float() - old.float(), old))
        if not (change <= tolerance * size).all():
            return False
    return True


@torch.no_grad()
def collect_outputs(run: Callable[[], Any]) -> list[Tensor]:
    """Return the floats that ``run`` returns, nested in any way."""
    return [tensor for tensor in flatten_tensors(run()) if tensor.is_floating_point()]


@torch.no_grad()
def prove_units(model: nn.Module, parts: Sequence[str]) -> None:
    """Prove that the records of the model's family name everything that belongs to a unit of ``parts`` (``groups``,
    ``ffn``, ``experts``): the first block of every record without some units computes what it computes while nothing
    reads them. Where blocks share the biases of heads, all of them lose some together. The model is not changed.

    Raises:
        UserError: it computes something else.
    """
    for part in parts:
        for blocks in find_samples(read_blocks(model), part):
            with evaluation_mode(model), separate_experts(model):
                if not can_remove(model, blocks, part):
                    what = {"groups": "heads", "ffn": "FFN channels", "experts": "experts"}[part]
                    raise UserError(
                        f"The {what} of this `{name_family(model)}` cannot be removed: without some, its first block "
                        "computes something else than the block in which nothing reads them. Choose another model, or "
                        "technique=prune."
                    )


def find_samples(blocks: list[Block], part: str) -> list[list[Block]]:
    """Return for every record the blocks to try: the first, or all that share the biases of its heads."""
    first: dict[Family, Block] = {}
    for block in select_blocks(blocks, part):
        first.setdefault(block.family, block)
    return [
        [other for other in blocks if other.biases is block.biases]
        if part == "groups" and block.biases is not None
        else [block]
        for block in first.values()
    ]


def can_remove(model: nn.Module, blocks: list[Block], part: str) -> bool:
    """Return whether the last of ``blocks`` computes without the first units of all of them what it computes while
    nothing reads these."""
    last = blocks[-1].module
    whole = run_until(model, last)
    with unread_units(blocks, part):
        expected = run_until(model, last)
    try:
        with removed_units(blocks, part):
            outputs = run_until(model, last)
    except (RuntimeError, ValueError, IndexError, AttributeError, TypeError):  # shapes that do not fit
        return False
    return is_close(whole, expected, outputs)


def is_close(whole: Tensor, unread: Tensor, removed: Tensor) -> bool:
    """Return whether the outputs without units differ from those that leave the units unread by rounding alone, or by a
    small share of what the units contribute to the ``whole`` outputs."""
    change, effect = ((x.float() - unread.float()).norm() for x in (removed, whole))
    return bool(change <= 0.02 * effect + 4 * torch.finfo(unread.dtype).eps * unread.float().norm())


def count_removed(block: Block, part: str) -> int:
    """Return how many units the proof removes: one expert, as a text needs several, or half of the others."""
    return 1 if part == "experts" else block.count(part) // 2


def run_until(model: nn.Module, block: nn.Module) -> Tensor:
    """Return the hidden states that a block computes for a few tokens."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: tuple, output: Any) -> None:
        seen.append(next(flatten_tensors(output)))
        raise Seen

    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.arange(16, device=embeddings.weight.device).view(2, 8) % len(embeddings.weight)
    hook = block.register_forward_hook(keep)
    try:
        with suppress(Seen):
            run_model(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    finally:
        hook.remove()
    return seen[0]


@contextmanager
def unread_units(blocks: list[Block], part: str) -> Iterator[None]:
    """Let nothing read the first units of ``blocks``: the columns of the matrices after them are zero, or the router
    never chooses the expert."""
    if part == "experts":
        with Unchosen(blocks[0].get(blocks[0].family.router or "").weight):
            yield
        return
    before = []
    for block in blocks:
        for matrix, index in block.find_readers(part):
            weight = matrix.weight
            columns = index[: count_removed(block, part)].flatten().to(weight.device)
            before.append((weight, columns, weight[:, columns].clone()))
            weight[:, columns] = 0
    try:
        yield
    finally:
        for weight, columns, values in before:
            weight[:, columns] = values


@contextmanager
def removed_units(blocks: list[Block], part: str) -> Iterator[None]:
    """Remove the first units of ``blocks``, and put them back."""
    masks = [torch.arange(block.count(part), device="cpu") >= count_removed(block, part) for block in blocks]
    modules = [module for block in blocks for module in [*block.module.modules(), block.biases] if module is not None]
    settings = [(module, dict(vars(module))) for module in modules]
    tensors = [(tensor, tensor.data, tensor.grad) for module in modules for tensor in module.parameters(recurse=False)]
    try:
        if part == "groups":
            cut_head_biases(blocks, masks)
        for block, kept in zip(blocks, masks):
            CUTS[part](block, kept)
        yield
    finally:
        for module, values in settings:
            vars(module).clear()
            vars(module).update(values)
        for tensor, data, gradient in tensors:
            tensor.data, tensor.grad = data, gradient


class Unchosen(TorchFunctionMode):
    """While the mode is entered, the router of a ``weight`` ``[experts, inputs]`` never chooses the first expert."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.place = locate(weight)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **kwargs or {})
        if func is nn.functional.linear and locate(args[1]) == self.place:
            output[..., 0] = torch.finfo(output.dtype).min
        return output
