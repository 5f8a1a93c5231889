"""Run calibration text through a model and reduce the inputs of its matrices, by one of two schedules.

:func:`observe` runs the model once and changes nothing. :func:`sequential` yields the matrices in the order in which
they run, each once, and its caller may change them before it takes the next. Both count every call of a matrix: of
layers that blocks share or call twice, of experts, of both stacks of an encoder-decoder. Padding never counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from compress.errors import UserError
from compress.models.batches import Batch
from compress.models.layers import find_stacks, is_inside
from compress.models.matrices import Matrix, matrices
from compress.models.placement import BLOCK_DEVICE, move_tensors, place_block
from compress.models.products import Products, Trace, separate_experts
from compress.models.replay import Seen, capture_calls, is_chain, run_from, run_model

Statistic = Callable[[Tensor], Tensor]
"""A function of inputs ``[tokens, inputs]`` in float32, without padding, such as their second moment."""
Combine = Callable[[Tensor, Tensor], Tensor]
"""A function that reduces the statistics of two batches to one."""


class Shared(NamedTuple):
    """Matrices that always get the same inputs (query, key and value; gate and up) by name, and a statistic of these
    inputs."""

    matrices: dict[str, Matrix]
    statistic: Tensor


@torch.no_grad()
def observe(
    model: nn.Module,
    batches: list[Batch],
    statistic: Statistic,
    wanted: Mapping[str, Matrix] | None = None,
    combine: Combine = Tensor.add_,
) -> list[Shared]:
    """Return ``statistic`` of the inputs of every matrix, summed over ``batches`` or reduced by ``combine``.

    The model runs once on every batch and does not change. The matrices are those of the blocks, or the ``wanted``
    ones.

    Raises:
        UserError: the model never multiplies by a wanted matrix.
    """
    watched = dict(matrices(model) if wanted is None else wanted)
    with separate_experts(model):
        return view_model(model, prepare_batches(model, batches, watched), watched).observe(statistic, combine=combine)


@torch.no_grad()
def sequential(
    model: nn.Module,
    batches: list[Batch],
    statistic: Statistic,
    wanted: Mapping[str, Matrix] | None = None,
    prepare: Callable[[Section], None] | None = None,
    combine: Combine = Tensor.add_,
) -> Iterator[Shared]:
    """Yield ``statistic`` of the inputs of every matrix, each exactly once, in the order in which they run.

    The caller may change the matrices that it got before it takes the next: later ones are calibrated on what the
    changed ones compute. The matrices are those of the blocks, or the ``wanted`` ones, in or outside of the blocks.
    ``prepare(section)`` may change a whole section before its first matrices are yielded.

    Where each block's output is the next one's input and no matrix is used by two blocks, blocks run one by one, with
    the activations of one block in memory. Everything else takes a pass of the whole model for every set of matrices.

    Raises:
        UserError: the model never multiplies by a wanted matrix.
    """
    for section in split_sections(model, batches, matrices(model) if wanted is None else wanted):
        yield from section.calibrate(statistic, prepare, combine)


@torch.no_grad()
def split_sections(
    model: nn.Module, batches: list[Batch], wanted: Mapping[str, Matrix], floats: bool = False
) -> Iterator[Section]:
    """Yield the sections that :func:`sequential` calibrates; a block runs on what the blocks before it compute by then.
    With ``floats`` a block also has its run in the unchanged model, which takes a second pass.

    Raises:
        UserError: the model never multiplies by a wanted matrix.
    """
    left = dict(wanted)
    with separate_experts(model):
        batches = prepare_batches(model, batches, left)
        for prefix, stack in find_stacks(model).items():
            inside = {name: matrix for name, matrix in left.items() if is_inside(name, [prefix])}
            if inside and not is_chain(model, stack, take_rows(batches[0]), inside):
                break
            yield from replay_blocks(model, prefix, stack, batches, inside, floats) if inside else ()
            left = {name: matrix for name, matrix in left.items() if name not in inside}
        if left:
            yield view_model(model, batches, left)


@dataclass
class Section:
    """A part of a model that runs by itself: a block, or the whole model."""

    name: str
    """Name of the block; empty for the whole model."""
    module: nn.Module
    watched: dict[str, Matrix]
    """Its wanted matrices, by name."""
    forwards: Sequence[Callable[[], Any]]
    """Runs of the section, one for every calibration batch."""
    masks: Sequence[Tensor | None]
    """Attention masks ``[batch, tokens]`` of the batches."""
    finishes: Sequence[Callable[[], Any]]
    """Runs of the model from the section on, one for every calibration batch; each returns the model's output."""
    probe: Callable[[], Any] | None = None
    """A cheaper run that makes the same products."""
    unchanged: Unchanged | None = None
    """The section in the unchanged model, if it is a block and its caller needs this."""
    waves: list[list[dict[str, Matrix]]] = field(init=False)
    """The matrices in the order in which they run: groups that share inputs, in lists of independent groups."""

    def __post_init__(self) -> None:
        trace = Trace(self.probe or self.forwards[0], self.watched)
        self.waves = trace.group()
        self.calls = {name: len(numbers) for name, numbers in trace.inputs.items()}

    def calibrate(
        self, statistic: Statistic, prepare: Callable[[Section], None] | None, combine: Combine
    ) -> Iterator[Shared]:
        """Yield the statistic of every group in order; the caller may change the group's matrices."""
        if prepare is not None:
            prepare(self)
        for wave in self.waves:
            yield from self.reduce(wave, statistic, combine)

    def observe(
        self, statistic: Statistic, names: Collection[str] | None = None, combine: Combine = Tensor.add_
    ) -> list[Shared]:
        """Return the statistic of all groups, or of those of the matrices ``names``, in one pass."""
        chosen = [
            {name: matrix for name, matrix in members.items() if names is None or name in names}
            for wave in self.waves
            for members in wave
        ]
        return self.reduce([members for members in chosen if members], statistic, combine)

    def reduce(self, groups: list[dict[str, Matrix]], statistic: Statistic, combine: Combine) -> list[Shared]:
        """Return the statistic of every group over all batches. A run ends when its last product is seen."""
        first = {next(iter(members)): place for place, members in enumerate(groups)}
        watched = {name: groups[place][name] for name, place in first.items()}
        totals: dict[int, Tensor] = {}
        routed = any(matrix.expert is not None for matrix in watched.values())
        products = math.inf if routed else sum(self.calls[name] for name in watched)

        for forward, mask in zip(self.forwards, self.masks):
            seen = 0

            def see(matrix: Matrix, x: Tensor, mask: Tensor | None = mask) -> None:
                nonlocal seen
                place, seen = first[matrix.name], seen + 1
                if (tokens := select_tokens(x, mask).float()).numel():
                    value = statistic(tokens)
                    totals[place] = combine(totals[place], value) if place in totals else value
                if seen == products:
                    raise Seen

            with suppress(Seen), Products(watched.values(), see):
                forward()
        for name, place in first.items():
            if place not in totals:  # an expert that no text was routed to: as if its inputs were zero
                totals[place] = statistic(torch.zeros(1, watched[name].inputs, device=watched[name].stored.device))
        return [Shared(members, totals[place]) for place, members in enumerate(groups)]


class Unchanged(NamedTuple):
    """Runs of a block in the unchanged model and their outputs ``[batch, tokens, width]``, by calibration batch."""

    forwards: Sequence[Callable[[], Tensor]]
    outputs: list[Tensor]


def join_experts(found: list[Shared]) -> list[Shared]:
    """Return the statistics, with those of the experts of one parameter summed: an expert that no text was routed to
    then has that of the others."""
    joined: dict[int, Shared] = {}
    for shared in found:
        first = next(iter(shared.matrices.values()))
        key = id(shared.statistic) if first.expert is None else id(first.stored)
        members, statistic = joined.get(key, ({}, 0))
        joined[key] = Shared(members | shared.matrices, statistic + shared.statistic)
    return list(joined.values())


def view_model(model: nn.Module, batches: list[Batch], watched: dict[str, Matrix]) -> Section:
    """Return the whole model as a section."""
    forwards = [partial(run_model, model, batch) for batch in batches]
    masks = [batch.get("attention_mask") for batch in batches]
    return Section("", model, watched, forwards, masks, forwards, partial(run_model, model, take_rows(batches[0])))


def take_rows(batch: Batch) -> Batch:
    """Return the first texts of a batch: two, or one where two would make the batch as long as its texts."""
    count = 1 if batch["input_ids"].shape[1] == 2 else 2
    return {key: value[:count] for key, value in batch.items()}


def prepare_batches(model: nn.Module, batches: list[Batch], watched: Mapping[str, Matrix]) -> list[Batch]:
    """Return the batches; where the inputs of a matrix do not show what is padding, every text by itself without it.
    (Experts get the tokens that are routed to them, and a few models flatten or transpose their inputs.)

    Raises:
        UserError: the model never multiplies by a matrix.
    """
    probe = take_rows(batches[0])
    trace = Trace(partial(run_model, model, probe), watched, probe.get("attention_mask"))
    if missing := trace.uncalled:
        others = f" and {len(missing) - 1} other matrices" if len(missing) > 1 else ""
        raise UserError(
            f"The model reads a text without a product with `{missing[0]}`{others}, so nothing is known of the inputs. "
            "Add a pattern of these names to the stage's `skip`."
        )
    if trace.aligned:
        return batches
    return [strip_padding(batch, row) for batch in batches for row in range(len(batch["input_ids"]))]


def strip_padding(batch: Batch, row: int) -> Batch:
    """Return one text of a batch without padding."""
    text = {key: value[row : row + 1] for key, value in batch.items()}
    if "attention_mask" not in text:
        return text
    kept = text["attention_mask"][0].bool()
    return {key: value[:, kept] if value.shape[1:] == kept.shape else value for key, value in text.items()}


def replay_blocks(
    model: nn.Module,
    prefix: str,
    stack: nn.ModuleList,
    batches: list[Batch],
    watched: dict[str, Matrix],
    floats: bool = False,
) -> Iterator[Section]:
    """Yield the blocks in order as sections, each on the outputs of the block before it as the caller left it, and with
    ``floats`` also on those of the unchanged block. Each is on the device of :func:`run_blocks_on` until the next is
    taken; what runs the whole model runs where the model is."""
    device = BLOCK_DEVICE.get()
    hidden, calls, in_tuples = move_tensors(capture_calls(model, stack, batches), device, {})
    unchanged = Unchanged([], hidden) if floats else None
    masks = [batch.get("attention_mask") for batch in batches]
    for index, block in enumerate(tqdm(stack, desc="calibrating", unit="block", leave=False, disable=None)):
        name = f"{prefix}.{index}"
        with place_block(block, device):
            forwards = [partial(call[index].replay, block, state) for call, state in zip(calls, hidden)]
            if unchanged:
                before = [partial(call[index].replay, block, state) for call, state in zip(calls, unchanged.outputs)]
                unchanged = Unchanged(before, [forward() for forward in before])
            if inside := {key: matrix for key, matrix in watched.items() if is_inside(key, [name])}:
                starts = zip(batches, hidden)
                finishes = [partial(run_from, model, batch, block, state, in_tuples) for batch, state in starts]
                yield Section(name, block, inside, forwards, masks, finishes, unchanged=unchanged)
            if index < len(stack) - 1:
                hidden = [forward() for forward in forwards]


def select_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``x`` ``[batch, tokens, width]`` as ``[tokens, width]``, without padding."""
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask.bool()]
    return x.reshape(-1, x.shape[-1])
