"""Make a model narrower: remove dimensions of its hidden states from everything that reads or writes them.

No list of architectures says what does. A run shows what feeds every norm and matrix; what is added up, normalised or
read together has the same dimensions. That nothing is missing is proven: a permutation of these dimensions, in all
Parameters at once, leaves the logits as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.errors import UserError
from compress.models.families import name_family
from compress.models.layers import find_stacks, is_inside
from compress.models.matrices import Matrix, is_expert_list, read_matrices
from compress.models.origins import Origins, find_readers
from compress.models.probes import CLOSE, find_norms, in_single_precision, measure_change, run_probe, trace_model

COUNTS: dict[tuple[type[nn.Module], int], str] = {
    (nn.Linear, 0): "out_features",
    (nn.Linear, 1): "in_features",
    (Conv1D, 0): "nx",
    (Conv1D, 1): "nf",
    (nn.Embedding, 1): "embedding_dim",
}
"""Attributes of modules with the size of a dimension of their weight."""
Node = tuple[str, str]
"""A name, with ``out`` for what it computes or stores and ``in`` for what it reads."""


@dataclass(frozen=True)
class Axis:
    """The dimension ``dim`` of a module's Parameter."""

    module: nn.Module
    parameter: str
    dim: int

    @property
    def stored(self) -> nn.Parameter:
        return getattr(self.module, self.parameter)  # type: ignore[no-any-return]

    @property
    def size(self) -> int:
        return self.stored.shape[self.dim]


@dataclass(frozen=True)
class Space:
    """Dimensions that several Parameters share: those of the hidden states, or those inside the head."""

    axes: list[Axis]
    norms: dict[str, nn.Module]
    """Norms that compute over the dimensions, by name."""
    readers: dict[str, Matrix]
    """Matrices that read the dimensions, by name."""
    in_answer: bool
    """Whether the model's answer has these dimensions."""

    @property
    def size(self) -> int:
        return self.axes[0].size


# What has the same dimensions


def find_spaces(model: Any) -> list[Space]:
    """Return what has the dimensions of a model's hidden states, and after it what has those inside the head, such as
    of BERT's pooler, as far as they are as many. The model may be on the meta device.

    Raises:
        UserError: a run does not show it.
    """
    stacks, modules = list(find_stacks(model)), dict(model.named_modules())
    if len(stacks) > 1:
        refuse(model, "it has two stacks of blocks, an encoder and a decoder")
    norms, found = find_norms(modules), find_readers(modules)
    groups, answer = group_nodes(model, norms, found)

    # 1) Follow the embeddings of tokens into the blocks: a matrix may widen them first
    table = model.get_input_embeddings().weight
    start = {(name, "out") for name, module in modules.items() if getattr(module, "weight", None) is table}
    stream = next(group for group in groups if group & start)
    while not any(is_inside(name, stacks) for name, _ in stream):
        after = {(name, "out") for name, side in stream if side == "in"}
        if not (wider := [group for group in groups if group & after]):
            refuse(model, "no block reads its embeddings")
        stream = wider[0]

    # 2) Collect what belongs to each space
    def describe(group: set[Node]) -> Space:
        return Space(
            [axis for node in sorted(group) for axis in list_axes(node, modules, found)],
            {name: norms[name] for name, _ in sorted(group) if name in norms},
            {name: found[name] for name, side in sorted(group) if side == "in"},
            bool(group & answer),
        )

    space = describe(stream)
    widths = {axis.size for axis in space.axes}
    if len(widths) > 1:
        refuse(model, f"what is added up has {' and '.join(map(str, sorted(widths)))} dimensions")
    outside = [
        describe(group)
        for group in groups
        if not any(is_inside(name, stacks) or isinstance(modules.get(name), nn.Embedding) for name, _ in group)
        and {side for _, side in group} == {"in", "out"}
    ]
    return [space, *(head for head in outside if {axis.size for axis in head.axes} == widths)]


def group_nodes(model: Any, norms: dict[str, nn.Module], found: dict[str, Matrix]) -> tuple[list[set[Node]], set[Node]]:
    """Return the sets of what has the same dimensions, as a run shows them, and what the model's answer is made of.

    Raises:
        UserError: the run does not reach its end.
    """
    # 1) Run
    trace = Origins(found.values())
    owned = {id(parameter) for norm in norms.values() for parameter in norm.parameters()}
    owned |= {id(getattr(matrix.module, name)) for matrix in found.values() for name in list_names(matrix)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in owned:
            trace.mark(parameter, {name.removesuffix(".weight")})
    try:
        with skip_experts(model, trace):
            inputs, answer = trace_model(model, trace, norms)
    except Exception:  # whatever a model's code raises
        refuse(model, "a run on its shapes alone, without values, does not reach its end")

    # 2) Join what feeds the same norm or matrix, and what is stored together
    parents: dict[Node, Node] = {}

    def find(node: Node) -> Node:
        while (parent := parents.setdefault(node, node)) != node:
            node = parent
        return node

    def join(*nodes: Node) -> None:
        first, *rest = map(find, nodes)
        parents.update({other: first for other in rest if other != first})

    for name, origins in inputs.items():
        join((name, "out"), *((origin, "out") for origin in origins))
    for name, origins in trace.feeds.items():
        join((name, "in"), *((origin, "out") for origin in origins))
    modules = dict(model.named_modules())
    places: dict[tuple[int, int], Node] = {}
    for node in list(parents):
        for axis in list_axes(node, modules, found):
            join(places.setdefault((id(axis.stored), axis.dim), node), node)
    groups: dict[Node, set[Node]] = defaultdict(set)
    for node in parents:
        groups[find(node)].add(node)
    return list(groups.values()), {(name, "out") for name in answer}


@contextmanager
def skip_experts(model: nn.Module, trace: Origins) -> Iterator[None]:
    """Let lists of experts show what they read and write, and compute nothing: which of them multiply depends on
    values."""
    lists = {name: module for name, module in model.named_modules() if is_expert_list(module)}

    def skip(states: Tensor, *_: Any, name: str) -> Tensor:
        found = read_matrices(name, lists[name])
        output, last = torch.empty_like(states), [matrix for matrix in found if matrix.parameter == "down_proj"]
        for matrix in found:
            if matrix not in last:
                trace.feeds.setdefault(matrix.name, set()).update(trace.find(states))
        trace.mark(output, {matrix.name for matrix in last})
        return output

    for name, module in lists.items():
        vars(module)["forward"] = partial(skip, name=name)
    try:
        yield
    finally:
        for module in lists.values():
            del vars(module)["forward"]


def list_names(matrix: Matrix) -> list[str]:
    """Return the names of the Parameters of a matrix: its weights and, where it has one, its bias."""
    bias = "bias" if matrix.expert is None else f"{matrix.parameter}_bias"
    return [matrix.parameter, *([] if matrix.bias is None else [bias])]


def list_axes(node: Node, modules: dict[str, nn.Module], found: dict[str, Matrix]) -> list[Axis]:
    """Return the dimensions of Parameters that a node stands for."""
    name, side = node
    if name in found:
        matrix, first = found[name], int(found[name].expert is not None)
        weight, *bias = list_names(matrix)
        if side == "in":
            return [Axis(matrix.module, weight, first + (not matrix.transposed))]
        return [Axis(matrix.module, weight, first + matrix.transposed), *(Axis(matrix.module, b, first) for b in bias)]
    if name in modules:
        return [Axis(modules[name], key, part.ndim - 1) for key, part in modules[name].named_parameters(recurse=False)]
    owner, _, key = name.rpartition(".")
    return [Axis(modules[owner], key, getattr(modules[owner], key).ndim - 1)]


def refuse(model: Any, reason: str) -> NoReturn:
    raise UserError(
        f"The hidden states of `{name_family(model)}` cannot be made narrower: {reason}. Choose another model, or "
        "technique=structured or drop_layers, which leave the width as it is."
    )


# Cut


@torch.no_grad()
def select_dimensions(space: Space, kept: Tensor) -> None:
    """Keep the dimensions ``kept`` (their numbers) of a space, in that order. The Parameters stay the same objects, so
    that an existing optimizer can continue to train them."""
    done: set[tuple[int, int]] = set()
    for axis in space.axes:
        parameter, module = axis.stored, axis.module
        if (id(parameter), axis.dim) not in done:
            parameter.data = parameter.data.index_select(axis.dim, kept.to(parameter.device))
            parameter.grad = None
        done.add((id(parameter), axis.dim))
        for (kind, dim), name in COUNTS.items():
            if isinstance(module, kind) and (axis.parameter, axis.dim) == ("weight", dim):
                setattr(module, name, len(kept))
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = (len(kept),)
        if hasattr(module, "hidden_dim"):
            vars(module)["hidden_dim"] = len(kept)  # of routers and experts


def cut_spaces(model: nn.Module, spaces: list[Space], kept: list[Tensor]) -> None:
    """Keep the dimensions ``kept`` of each of a model's spaces."""
    before, after = spaces[0].size, len(kept[0])
    for space, left in zip(spaces, kept, strict=True):
        select_dimensions(space, left)
    for module in model.modules():
        if getattr(module, "hidden_size", None) == before:
            vars(module)["hidden_size"] = after


def cut_width(model: Any, width: int) -> None:
    """Keep the first ``width`` dimensions of a model's hidden states."""
    spaces = find_spaces(model)
    cut_spaces(model, spaces, [torch.arange(width, device="cpu")] * len(spaces))


@torch.no_grad()
def prove_spaces(model: Any, spaces: list[Space]) -> None:
    """Prove that each space names everything with its dimensions: the model computes the same if they are permuted, and
    an answer with these dimensions is permuted. The model is not changed.

    Raises:
        UserError: it computes something else.
    """
    with in_single_precision(model):
        expected = run_probe(model)
        for space in spaces:
            generator = torch.Generator().manual_seed(0)
            order = torch.randperm(space.size, generator=generator, device="cpu")
            stored = [(axis.stored, axis.stored.data) for axis in space.axes]
            try:
                select_dimensions(space, order)
                logits = run_probe(model)
            finally:
                for parameter, data in reversed(stored):
                    parameter.data = data
            change = measure_change(expected[..., order] if space.in_answer else expected, logits)
            if not change <= CLOSE:  # written so that NaN fails
                refuse(
                    model,
                    "something else has their dimensions than a run shows, because permuting them changes the logits "
                    f"by {change:.1e} of the largest",
                )
