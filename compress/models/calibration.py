"""Training batches streamed through a model block by block, the activations of one block in memory."""

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
    """``samples`` training examples on the Trainer's device: the datamodule's own ``calibration``, or else the first of
    the training loader, in the batches that it has."""
    calibration = getattr(getattr(trainer, "datamodule", None), "calibration", None)
    if calibration is None:
        trainer.fit_loop.setup_data()  # nothing where it is set up already
    loader = calibration(samples, batch_size) if calibration else trainer.train_dataloader
    device = trainer.strategy.root_device
    seen = 0
    for batch in loader:
        if seen >= samples:
            return
        seen += len(batch["input_ids"])
        yield {key: value.to(device) for key, value in batch.items() if labels or key != "labels"}


class Call(NamedTuple):
    """How a model calls one of its blocks, apart from the hidden states ``[batch, tokens, width]``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def replay(self, block: nn.Module, hidden: Tensor) -> Tensor:
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
    """Stream calibration batches through the blocks; yield ``(layers, total)`` for every set of Linear layers, by
    name, that share an input, in the order in which they run: all of the blocks, or those ``wanted``, which may stand
    outside of the blocks too.

    ``total`` is the sum over the batches of ``statistic(x)``, or what else ``combine`` makes of them, where ``x`` is
    ``[tokens, inputs]`` in float32, padding left out. Layers may be changed before the next set is asked for: what
    follows sees the changed ones. Only the activations between two blocks are kept. ``prepare(name, block, forwards,
    masks)`` may change a block as a whole before its first layers are yielded; the masks are those of the batches'
    padding.
    """
    prefix, stack = find_blocks(model)
    hidden, calls = capture_calls(model, stack, batches)
    masks = [batch.get("attention_mask") for batch in batches]
    for index, block in enumerate(tqdm(stack, desc="calibrating", unit="block", leave=False, disable=None)):
        forwards: Forwards = [partial(call[index].replay, block, state) for call, state in zip(calls, hidden)]
        if prepare is not None:
            prepare(f"{prefix}.{index}", block, forwards, masks)
        for layers in group_by_input(block, forwards[0]):
            named = {f"{prefix}.{index}.{name}": layer for name, layer in layers.items()}
            if chosen := {name: layer for name, layer in named.items() if wanted is None or name in wanted}:
                yield chosen, combine_over_inputs(next(iter(chosen.values())), forwards, masks, statistic, combine)
        hidden = [forward() for forward in forwards]
    for name, module in model.named_modules() if wanted is not None else ():
        if isinstance(module, nn.Linear) and name in wanted and not name.startswith(f"{prefix}."):
            forwards = [partial(model, **batch) for batch in batches]
            yield {name: module}, combine_over_inputs(module, forwards, masks, statistic, combine)


def capture_calls(
    model: nn.Module, stack: nn.ModuleList, batches: list[Batch]
) -> tuple[list[Tensor], list[list[Call]]]:
    """The hidden states that enter the first block, by batch, and how every block is called, by batch and block. The
    masks and position embeddings of a call are shared between blocks: they cost their memory once. After the first
    batch, blocks that give nothing but hidden states give back those that they get instead, for speed."""
    hidden: list[Tensor] = []
    calls: list[list[Call]] = []
    in_tuples: dict[nn.Module, bool] = {}  # of blocks that give hidden states and nothing else

    def keep(block: nn.Module, args: tuple, kwargs: dict) -> None:
        rest = dict(kwargs)
        state = args[0] if args else rest.pop("hidden_states")
        if not calls[-1]:
            hidden.append(state)
        calls[-1].append(Call(args[1:], rest))
        if block is stack[-1]:
            raise Seen

    def watch(block: nn.Module, _: tuple, output: Any) -> None:
        if isinstance(output, Tensor) or len(output) == 1:
            in_tuples[block] = isinstance(output, tuple)

    hooks = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in stack]
    hooks += [block.register_forward_hook(watch) for block in stack]
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
    return (hidden_states,) if in_tuple else hidden_states


class Seen(Exception):
    """Raised inside a block when the wanted input has been seen, to spare the rest of its forward pass."""


def record_inputs(module: nn.Module, forwards: Forwards) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """The arguments, positional and by name, with which each of the ``forwards`` calls ``module``."""
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
    """The sum of ``statistic`` over the inputs of ``layer`` in all ``forwards``, padding left out, or what else
    ``combine`` makes of them."""
    found = (
        statistic(select_tokens(args[0], mask).float())
        for (args, _), mask in zip(record_inputs(layer, forwards), masks)
    )
    return reduce(combine, found)


def select_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` ``[batch, tokens, width]`` as ``[tokens, width]``, without those of padding."""
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask.bool()]
    return x.reshape(-1, x.shape[-1])


def group_by_input(block: nn.Module, forward: Callable[[], Tensor]) -> list[dict[str, nn.Linear]]:
    """The block's Linear layers in the order in which ``forward()`` runs them, those that get one and the same tensor
    (query, key and value; gate and up) together."""
    calls: list[tuple[str, nn.Linear, Tensor]] = []  # holding the tensors keeps their addresses apart
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
    """The whole validation split as the Trainer's own loaders give it.

    Raises:
        UserError: the Trainer has none.
    """
    if not trainer.enable_validation:
        raise UserError(
            "`sensitivity` measures on validation data and the Trainer has none: give `fit` a validation loader, and "
            "the module a `validation_step`."
        )
    trainer.fit_loop.epoch_loop.val_loop.setup_data()  # nothing where it is set up already
    loaders: Any = trainer.val_dataloaders
    return list(chain.from_iterable(loaders if isinstance(loaders, (list, tuple)) else [loaders]))


def spread_evenly(batches: list[Batch], samples: int) -> list[Batch]:
    """Return batches of exactly ``samples`` of the examples, picked at even distances: a loader may be sorted, by
    length say."""
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
    """The middles of so many equal parts of ``range(count)``."""
    return [(2 * i + 1) * count // (2 * parts) for i in range(parts)]
