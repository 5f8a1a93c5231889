"""Prove what is assumed of a model: that a change of its weights leaves what it computes as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compress.errors import UserError
from compress.models.calibration import Seen, run_model
from compress.models.families import name_family
from compress.models.layers import evaluation_mode, find_blocks
from compress.models.products import flatten_tensors, locate, separate_experts
from compress.models.shapes import Block, Part, cut_experts, cut_heads, cut_part, read_blocks, see_matrix

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
    """Prove that the record of the model's family names everything that belongs to a unit of ``parts`` (``groups``,
    ``ffn``, ``experts``): the first block without some units computes what it computes while nothing reads them. The
    model is not changed.

    Raises:
        UserError: it computes something else.
    """
    block = read_blocks(model)[0]
    for part in parts:
        with evaluation_mode(model), separate_experts(model):
            whole = run_first_block(model)
            with unread_units(block, part):
                expected = run_first_block(model)
            try:
                with removed_units(model, block, part):
                    outputs = run_first_block(model)
                same = is_close(whole, expected, outputs)
            except (RuntimeError, ValueError, IndexError, AttributeError, TypeError):  # shapes that do not fit
                same = False
        if not same:
            what = {"groups": "heads", "ffn": "FFN channels", "experts": "experts"}[part]
            raise UserError(
                f"The {what} of this `{name_family(model)}` cannot be removed: without some, its first block computes "
                "something else than the block in which nothing reads them. Choose another model, or technique=prune."
            )


def is_close(whole: Tensor, unread: Tensor, removed: Tensor) -> bool:
    """Return whether the outputs without units differ from those that leave the units unread by rounding alone, or by a
    small share of what the units contribute to the ``whole`` outputs."""
    change, effect = ((x.float() - unread.float()).norm() for x in (removed, whole))
    return bool(change <= 0.02 * effect + 4 * torch.finfo(unread.dtype).eps * unread.float().norm())


def count_removed(block: Block, part: str) -> tuple[int, int]:
    """Return how many of how many units the proof removes: one expert, as a text needs several, or half of the rest."""
    total = {"groups": block.groups, "ffn": block.ffn, "experts": block.experts}[part]
    return 1 if part == "experts" else total // 2, total


def run_first_block(model: nn.Module) -> Tensor:
    """Return the hidden states that the first block computes for a few tokens."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: tuple, output: Any) -> None:
        seen.append(next(flatten_tensors(output)))
        raise Seen

    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.arange(16, device=embeddings.weight.device).view(2, 8) % len(embeddings.weight)
    hook = find_blocks(model)[1][0].register_forward_hook(keep)
    try:
        with suppress(Seen):
            run_model(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    finally:
        hook.remove()
    return seen[0]


@contextmanager
def unread_units(block: Block, part: str) -> Iterator[None]:
    """Let nothing read the first units of a block: the columns of the layer after them are zero, or the router never
    chooses the expert."""
    if part == "experts":
        with Unchosen(block.get(block.family.router or "").weight):
            yield
        return
    layer, _, index = find_reader(block, part)
    count, _ = count_removed(block, part)
    weight = see_matrix(layer).weight
    columns = index[:count].flatten().to(weight.device)
    before = weight[:, columns].clone()
    weight[:, columns] = 0
    try:
        yield
    finally:
        weight[:, columns] = before


def find_reader(block: Block, part: str) -> Part:
    """Return the layer whose inputs are the units of ``part``."""
    return next(p for p in (block.head_parts if part == "groups" else block.ffn_parts) if p[1] == 1)


@contextmanager
def removed_units(model: nn.Module, block: Block, part: str) -> Iterator[None]:
    """Put a copy without its first units in the place of the model's first block."""
    _, stack = find_blocks(model)
    shorter = replace(block, module=copy.deepcopy(block.module))
    count, total = count_removed(block, part)
    kept = torch.arange(total, device="cpu") >= count
    if part == "groups":
        cut_heads(shorter, kept)
    elif part == "experts":
        cut_experts(shorter, kept)
    else:
        for each in shorter.ffn_parts:
            cut_part(each, kept)
    stack[0] = shorter.module
    try:
        yield
    finally:
        stack[0] = block.module


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
