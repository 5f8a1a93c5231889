"""Stream training batches through a model block by block, with the activations of one block in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial, reduce
from itertools import chain, groupby
from typing import Any, NamedTuple
from unittest.mock import patch

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from compress.errors import UserError
from compress.models.layers import find_blocks

Batch = dict[str, Tensor]
Forwards = Sequence[Callable[[], Tensor]]
"""Runs of a block, one for every calibration batch."""


def draw_calibration_batches(
    trainer: pl.Trainer, samples: int, batch_size: int, labels: bool = False
) -> Iterator[Batch]:
    """Yield batches of ``samples`` training examples on the Trainer's device: from the datamodule's ``calibration``,
    or without it the first batches of the training loader."""
    calibration = getattr(getattr(trainer, "datamodule", None), "calibration", None)
    if calibration is None:
        trainer.fit_loop.setup_data()  # does nothing if the data is set up
    loader = calibration(samples, batch_size) if calibration else trainer.train_dataloader
    device = trainer.strategy.root_device
    seen = 0
    for batch in loader:
        if seen >= samples:
            return
        seen += len(batch["input_ids"])
        yield {key: value.to(device) for key, value in batch.items() if labels or key != "labels"}


class Call(NamedTuple):
    """The arguments of a block's call, without the hidden states ``[batch, tokens, width]``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def replay(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return the block's hidden states ``[batch, tokens, width]`` for the states ``hidden``."""
        output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def calibrate_layers(
    model: nn.Module,
    batches: list[Batch],
    statistic: Callable[[Tensor], Tensor],
    wanted: Container[str] | None = None,
    prepare: Callable[[str, nn.Module, Forwards, list[Tensor | None]], None] | None = None,
    combine: Callable[[Tensor, Tensor], Tensor] = Tensor.add_,
) -> Iterator[tuple[dict[str, nn.Linear], Tensor]]:
    """Stream calibration batches through the blocks and yield ``(layers, total)`` for every set of Linear layers that
    share an input, in the order in which they run.

    Layers are given by name: all layers of the blocks, or the ``wanted`` ones, in or outside of the blocks. ``total``
    sums ``statistic(x)`` over the batches, or reduces it with ``combine``; ``x`` is ``[tokens, inputs]`` in float32
    without padding. The caller may change the layers before it takes the next set, and later layers see the change.
    Only the activations between two blocks are kept. ``prepare(name, block, forwards, masks)`` may change a whole block
    before its first layers are yielded; ``masks`` are the attention masks of the batches.
    """
    # 1) Run the model once and capture how it calls its blocks
    prefix, stack = find_blocks(model)
    hidden, calls = capture_calls(model, stack, batches)
    masks = [batch.get("attention_mask") for batch in batches]

    # 2) Replay the calls block by block
    for index, block in enumerate(tqdm(stack, desc="calibrating", unit="block", leave=False, disable=None)):
        forwards: Forwards = [partial(call[index].replay, block, state) for call, state in zip(calls, hidden)]
        if prepare is not None:
            prepare(f"{prefix}.{index}", block, forwards, masks)
        for layers in group_by_input(block, forwards[0]):
            named = {f"{prefix}.{index}.{name}": layer for name, layer in layers.items()}
            if chosen := {name: layer for name, layer in named.items() if wanted is None or name in wanted}:
                yield chosen, combine_over_inputs(next(iter(chosen.values())), forwards, masks, statistic, combine)
        hidden = [forward() for forward in forwards]

    # 3) Run the whole model for wanted layers outside of the blocks
    for name, module in model.named_modules() if wanted is not None else ():
        if isinstance(module, nn.Linear) and name in wanted and not name.startswith(f"{prefix}."):
            forwards = [partial(model, **batch) for batch in batches]
            yield {name: module}, combine_over_inputs(module, forwards, masks, statistic, combine)


def capture_calls(
    model: nn.Module, stack: nn.ModuleList, batches: list[Batch]
) -> tuple[list[Tensor], list[list[Call]]]:
    """Return the hidden states that enter the first block, by batch, and the call of every block, by batch and block.

    Blocks share the masks and position embeddings of a call, which take memory once. For speed, blocks that return
    only hidden states are skipped after the first batch: they return their input.
    """
    hidden: list[Tensor] = []
    calls: list[list[Call]] = []
    in_tuples: dict[nn.Module, bool] = {}  # whether a block that returns only hidden states wraps them in a tuple

    def keep(block: nn.Module, args: tuple, kwargs: dict) -> None:
        rest = dict(kwargs)
        state = args[0] if args else rest.pop("hidden_states")
        if not calls[-1]:
            hidden.append(state)
        calls[-1].append(Call(args[1:], rest))
        if block is stack[-1]:
            raise Seen

    def note_output(block: nn.Module, _: tuple, output: Any) -> None:
        if isinstance(output, Tensor) or len(output) == 1:
            in_tuples[block] = isinstance(output, tuple)

    hooks = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in stack]
    hooks += [block.register_forward_hook(note_output) for block in stack]
    try:
        for batch in batches:
            calls.append([])
            with ExitStack() as passed, suppress(Seen):
                for block, in_tuple in in_tuples.items():
                    passed.enter_context(patch.object(block, "forward", partial(return_states, in_tuple)))
                model(**batch, **({"use_cache": False} if getattr(model.config, "use_cache", False) else {}))
    finally:
        for hook in hooks:
            hook.remove()
    return hidden, calls


def return_states(in_tuple: bool, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
    """Return the hidden states unchanged, as a block's output."""
    return (hidden_states,) if in_tuple else hidden_states


class Seen(Exception):
    """Raised inside a block after the wanted input was recorded, to skip the rest of the forward pass."""


def record_inputs(module: nn.Module, forwards: Forwards) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """Yield the positional and keyword arguments of each call of ``module`` by the ``forwards``."""
    seen: list[tuple[tuple, dict[str, Any]]] = []

    def stop(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise Seen

    for forward in forwards:
        hook = module.register_forward_pre_hook(stop, with_kwargs=True)
        with suppress(Seen):
            forward()
        hook.remove()
        yield seen.pop()


def combine_over_inputs(
    layer: nn.Linear,
    forwards: Forwards,
    masks: list[Tensor | None],
    statistic: Callable[[Tensor], Tensor],
    combine: Callable[[Tensor, Tensor], Tensor] = Tensor.add_,
) -> Tensor:
    """Return the sum, or another reduction by ``combine``, of ``statistic`` over the inputs of ``layer`` in all
    ``forwards``, without padding."""
    statistics = (
        statistic(select_tokens(args[0], mask).float())
        for (args, _), mask in zip(record_inputs(layer, forwards), masks)
    )
    return reduce(combine, statistics)


def select_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``x`` ``[batch, tokens, width]`` as ``[tokens, width]``, without padding."""
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask.bool()]
    return x.reshape(-1, x.shape[-1])


def group_by_input(block: nn.Module, forward: Callable[[], Tensor]) -> list[dict[str, nn.Linear]]:
    """Return the block's Linear layers in the order in which ``forward()`` runs them, grouped by their input tensor
    (query, key and value; gate and up)."""
    calls: list[tuple[str, nn.Linear, Tensor]] = []  # tensors that are held cannot share an address
    hooks = [
        module.register_forward_pre_hook(lambda layer, args, name=name: calls.append((name, layer, args[0])))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    forward()
    for hook in hooks:
        hook.remove()
    sets = groupby(calls, key=lambda call: (call[2].data_ptr(), call[2].shape))
    return [{name: layer for name, layer, _ in members} for _, members in sets]


def read_validation_batches(trainer: pl.Trainer) -> list[Batch]:
    """Return the whole validation split from the Trainer's own loaders.

    Raises:
        UserError: the Trainer has no validation data.
    """
    if not trainer.enable_validation:
        raise UserError(
            "`sensitivity` measures on validation data and the Trainer has none. Pass `fit` a validation loader, and "
            "define `validation_step` in the module."
        )
    trainer.fit_loop.epoch_loop.val_loop.setup_data()  # does nothing if the data is set up
    loaders: Any = trainer.val_dataloaders
    return list(chain.from_iterable(loaders if isinstance(loaders, (list, tuple)) else [loaders]))


def spread_evenly(batches: list[Batch], samples: int) -> list[Batch]:
    """Return batches of exactly ``samples`` examples, picked at even distances because a loader may be sorted, for
    example by length."""
    sizes = [len(batch["input_ids"]) for batch in batches]
    count, parts = len(batches), math.ceil(samples / max(sizes))
    while sum(sizes[i] for i in middle_indices(count, parts)) < samples:
        parts += 1
    picked: list[Batch] = []
    for i in middle_indices(count, parts):
        picked.append({key: value[:samples] for key, value in batches[i].items()})
        samples -= len(picked[-1]["input_ids"])
    return [batch for batch in picked if len(batch["input_ids"])]


def middle_indices(count: int, parts: int) -> list[int]:
    """Return the middles of ``parts`` equal parts of ``range(count)``."""
    return [(2 * i + 1) * count // (2 * parts) for i in range(parts)]
