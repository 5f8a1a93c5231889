"""Run transformer blocks by themselves: capture their calls, replay them, and run a model from a block on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from compress.models.matrices import Matrix
from compress.models.placement import place_block
from compress.models.products import Products, flatten_tensors

if TYPE_CHECKING:  # it imports Lightning, which a program that only loads an artifact does without
    from compress.models.batches import Batch


class Seen(Exception):
    """Raised after the last wanted product, to skip the rest of a forward pass."""


def run_model(model: nn.Module, batch: Batch) -> Any:
    """Return the model's output without a cache of keys and values."""
    return model(**batch, **({"use_cache": False} if getattr(model.config, "use_cache", False) else {}))


class Call(NamedTuple):
    """The arguments of a block's call, without the hidden states ``[batch, tokens, width]``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def replay(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return the block's hidden states ``[batch, tokens, width]`` for the states ``hidden``."""
        output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


def capture_calls(
    model: nn.Module, stack: nn.ModuleList, batches: list[Batch]
) -> tuple[list[Tensor], list[list[Call]], dict[nn.Module, bool]]:
    """Return the hidden states that enter the first block, by batch, the call of every block, by batch and block, and
    the blocks that return only hidden states, in order: whether they return them in a tuple.

    Blocks share the masks and position embeddings of a call, which take memory once. For speed, blocks that return
    only hidden states are skipped after the first batch: they return their input.
    """
    hidden: list[Tensor] = []
    calls: list[list[Call]] = []
    in_tuples: dict[nn.Module, bool] = {}

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
            with skip_blocks(in_tuples), suppress(Seen):
                run_model(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return hidden, calls, in_tuples


def is_chain(model: nn.Module, stack: nn.ModuleList, batch: Batch, watched: Mapping[str, Matrix]) -> bool:
    """Return whether the blocks of ``stack`` can run one by one: each is called once, with the output of the one before
    it and nothing else that blocks compute, and multiplies by matrices that no other part of the model uses."""
    places = {block: place for place, block in enumerate(stack)}
    entered: list[tuple[int, Any, list[Tensor]]] = []  # place, hidden states, all other tensors
    left: list[Any] = []
    users: dict[str, set[int | None]] = {}
    running: list[int] = []

    def enter(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        state = args[0] if args else rest.pop("hidden_states", None)
        entered.append((places[block], state, list(flatten_tensors([*args[1:], rest]))))
        running.append(places[block])

    def leave(block: nn.Module, args: tuple, output: Any) -> None:
        left.append(output)
        running.pop()

    def see(matrix: Matrix, _: Tensor) -> None:
        users.setdefault(matrix.name, set()).add(running[-1] if running else None)

    hooks = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in stack]
    hooks += [block.register_forward_hook(leave) for block in stack]
    try:
        with Products(watched.values(), see):
            run_model(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    computed = {id(tensor) for output in left for tensor in flatten_tensors(output)}
    states = [output[0] if isinstance(output, tuple) else output for output in left]
    return (
        [place for place, _, _ in entered] == list(range(len(stack)))
        and all(isinstance(state, Tensor) for state in [*states, *(state for _, state, _ in entered)])
        and all(torch.equal(state, before) for (_, state, _), before in zip(entered[1:], states))
        and not any(id(tensor) in computed for _, _, rest in entered for tensor in rest)
        and all(len(blocks) == 1 and None not in blocks for blocks in users.values())
    )


def run_from(
    model: nn.Module, batch: Batch, block: nn.Module, state: Tensor, in_tuples: Mapping[nn.Module, bool]
) -> Any:
    """Return the model's output on a batch whose hidden states before ``block`` are ``state``. Blocks before it are
    skipped, those of ``in_tuples``, which return only hidden states. The block runs on the batch's device."""
    device = batch["input_ids"].device
    state = state.to(device)

    def put(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})

    hook = block.register_forward_pre_hook(put, with_kwargs=True)
    before = takewhile(lambda other: other is not block, in_tuples)
    try:
        with place_block(block, device), skip_blocks({other: in_tuples[other] for other in before}):
            return run_model(model, batch)
    finally:
        hook.remove()


@contextmanager
def skip_blocks(in_tuples: Mapping[nn.Module, bool]) -> Iterator[None]:
    """Let blocks return their input. A block returns it in a tuple if ``in_tuples`` says so."""
    with ExitStack() as passed:
        for block, in_tuple in in_tuples.items():
            passed.enter_context(patch.object(block, "forward", partial(return_states, in_tuple)))
        yield


def return_states(in_tuple: bool, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
    """Return the hidden states unchanged, as a block's output."""
    return (hidden_states,) if in_tuple else hidden_states
