"""Rotate the hidden states of a decoder: the weights change, what the model computes does not.

The residual stream is the sum that every block reads through a norm and adds to. Norms without their gains commute with
rotations, so gains move into the matrices that read them, and everything that writes or reads the stream is rotated. No
list of architectures says what does: a run shows which norms read the stream, which matrices read these norms, and what
the stream is the sum of. Afterwards the model's logits prove it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.maths.rotations import has_hadamard, make_rotation, rotate_columns, rotate_rows
from compress.models.backbone import find_token_table
from compress.models.families import name_family
from compress.models.folding import find_head_sizes, match_rows
from compress.models.layers import find_stacks, is_inside
from compress.models.matrices import Matrix
from compress.models.origins import Origins, find_readers
from compress.models.probes import CLOSE, find_norms, measure_change, run_probe, trace_model


@dataclass(frozen=True)
class Stream:
    """The residual stream of a model: what writes it, and the norms and matrices that read it, by name."""

    width: int
    embeddings: dict[str, nn.Embedding]
    writers: dict[str, Matrix]
    norms: dict[str, nn.Module]
    readers: dict[str, dict[str, Matrix]]
    """The matrices that read the outputs of each norm."""
    feeds: dict[str, set[str]] = field(default_factory=dict)
    """Names of the norms and matrices that feed every matrix."""


@dataclass(frozen=True)
class Values:
    """The values of attention heads: ``rows`` of a matrix, in runs of ``size``, that one matrix reads head by head."""

    before: Matrix
    after: Matrix
    rows: Tensor
    size: int


# What reads and writes the stream


def find_stream(model: Any) -> Stream:
    """Return the residual stream of a model, maybe on the meta device, as a run shows it.

    Raises:
        UserError: it cannot be rotated.
    """
    width, modules = read_width(model), dict(model.named_modules())
    norms, found = find_norms(modules), find_readers(modules)
    trace = Origins(found.values())
    inputs, _ = trace_model(model, trace, norms)

    # 1) Find what the stream is the sum of
    embeddings = {name: module for name, module in modules.items() if isinstance(module, nn.Embedding)}
    reading = {name: norms[name] for name, origins in inputs.items() if origins & embeddings.keys()}
    written = set().union(*(inputs[name] for name in reading))
    if after := sorted(written & norms.keys()):
        refuse(model, f"it adds the outputs of the norm `{after[0]}` to the hidden states, whose gains cannot move")
    if direct := [name for name, origins in trace.feeds.items() if origins & embeddings.keys()]:
        refuse(model, f"`{direct[0]}` reads the hidden states without a norm before it")
    if not reading:
        refuse(model, "no norm reads its hidden states")
    writers = {name: matrix for name, matrix in found.items() if name in written and matrix.rows == width}

    # 2) Find the readers of each norm
    readers: dict[str, dict[str, Matrix]] = {name: {} for name in reading}
    for name, origins in trace.feeds.items():
        if not (norm := origins & reading.keys()):
            continue
        if len(origins) > 1:
            refuse(model, f"`{name}` reads the norm `{min(norm)}` and something else")
        readers[min(norm)][name] = found[name]
    if unread := [name for name, matrices in readers.items() if not matrices]:
        refuse(model, f"no matrix reads the norm `{unread[0]}`, so hidden states are its answer")
    readers = {name: complete_experts(matrices, found) for name, matrices in readers.items()}
    used = {name: table for name, table in embeddings.items() if name in written}
    return Stream(width, used, complete_experts(writers, found), reading, readers, trace.feeds)


def check_norms(model: Any) -> None:
    """Raise UserError if the model has two stacks of blocks, or norms that do not commute with rotations."""
    width = read_width(model)
    if len(find_stacks(model)) > 1:
        refuse(model, "it has two stacks of blocks, an encoder and a decoder")
    for name, norm in find_norms(dict(model.named_modules())).items():
        if norm.weight.numel() == width and not is_equivariant(norm):  # type: ignore[union-attr,operator]
            refuse(model, f"the norm `{name}` subtracts their mean or adds a bias to them")


def read_width(model: Any) -> int:
    """Return the width of the hidden states.

    Raises:
        UserError: the model has no table of tokens.
    """
    table = find_token_table(model)
    if table is None:
        refuse(model, "it has no table of tokens")
    return table.shape[1]


def refuse(model: Any, reason: str) -> NoReturn:
    raise UserError(
        f"The hidden states of `{name_family(model)}` cannot be rotated: {reason}. Choose a decoder such as Llama, "
        "Mistral, Qwen or Phi, or leave `rotate` out."
    )


def is_equivariant(norm: nn.Module) -> bool:
    """Return whether a norm with the same gain for every channel commutes with rotations."""
    if getattr(norm, "bias", None) is not None:
        return False
    plain: Any = copy.deepcopy(norm).to_empty(device="cpu").float()
    with torch.no_grad(), torch.device("cpu"):
        plain.weight.fill_(0.5)
        width = plain.weight.numel()
        direction = nn.functional.normalize(torch.linspace(1, 2, width), dim=0)

        def reflect(x: Tensor) -> Tensor:  # a rotation that costs no matrix
            return x - 2 * (x @ direction)[:, None] * direction

        x = torch.linspace(-1, 3, width)[None]
        return torch.allclose(plain(reflect(x)), reflect(plain(x)), rtol=0, atol=1e-3)


def find_offset(norm: Any) -> float:
    """Return the number that a norm adds to its weight: 1 for Gemma's, 0 for others."""
    plain = copy.deepcopy(norm)
    with torch.no_grad():
        plain.weight.zero_()
        return float(plain(torch.ones_like(plain.weight)[None]).any())


def complete_experts(matrices: dict[str, Matrix], found: dict[str, Matrix]) -> dict[str, Matrix]:
    """Return the matrices, and the other experts that are stored with one of them."""
    stored = {id(matrix.stored) for matrix in matrices.values() if matrix.expert is not None}
    return matrices | {name: matrix for name, matrix in found.items() if id(matrix.stored) in stored}


# Rotation


def is_tied(model: Any) -> bool:
    """Return whether the output layer has the weights of the embeddings."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head is not None and head.weight is model.get_input_embeddings().weight


def untie(model: Any) -> None:
    """Give the output layer weights of its own, and say so in the config."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


@torch.no_grad()
def rotate_stream(stream: Stream, rotation: Tensor) -> None:
    """Multiply the residual stream by ``rotation`` ``[width, width]``, and leave the gains of its norms at 1."""
    for name, norm in stream.norms.items():
        module: Any = norm
        offset = find_offset(module)
        gain = module.weight.double() + offset
        for matrix in stream.readers[name].values():
            turned = rotate_columns(matrix.weight.double() * gain, rotation)
            matrix.weight.copy_(turned)
        module.weight.fill_(1 - offset)
    for table in stream.embeddings.values():
        table.weight.copy_(rotate_columns(table.weight, rotation))
    for matrix in stream.writers.values():
        matrix.weight.copy_(rotate_rows(matrix.weight, rotation))
        if matrix.bias is not None:
            matrix.bias.copy_(rotate_rows(matrix.bias, rotation))


@torch.no_grad()
def rotate_values(values: Values, rotation: Tensor) -> None:
    """Multiply the values of every head by ``rotation`` ``[size, size]``, and undo it where they are read."""
    weight, bias = values.before.weight, values.before.bias
    weight[values.rows] = rotate_rows(weight[values.rows], rotation)
    if bias is not None:
        bias[values.rows] = rotate_rows(bias[values.rows], rotation)
    values.after.weight.copy_(rotate_columns(values.after.weight, rotation))


def rotate_heads(model: Any, stream: Stream, kind: str, seed: int) -> int:
    """Rotate the values of all heads. They are what a matrix of the first block computes whose rotation leaves the
    logits as they are; return how many blocks have such values, 0 if no matrix has."""
    expected = run_probe(model)
    for proposal in propose_values(model, stream):
        first, *rest = proposal
        if kind == "hadamard" and not has_hadamard(first.size):
            continue
        parts = [first.before.weight, first.after.weight]
        parts += [] if first.before.bias is None else [first.before.bias.detach()]
        stored = [part.clone() for part in parts]
        rotation = make_rotation(first.size, kind, seed)
        rotate_values(first, rotation)
        if measure_change(expected, run_probe(model)) <= CLOSE:
            for values in rest:
                rotate_values(values, rotation)
            return len(proposal)
        for part, before in zip(parts, stored):
            part.copy_(before)
    return 0


def propose_values(model: Any, stream: Stream) -> Iterator[list[Values]]:
    """Yield what the values of the blocks may be, the first block's first: every way in which a matrix may feed one
    that writes the stream, in runs of the size of a head."""
    ((prefix, stack),) = find_stacks(model).items()
    found, sizes = find_readers(dict(model.named_modules())), find_head_sizes(model)
    for after in (name for name in stream.writers if is_inside(name, [f"{prefix}.0"])):
        for before in sorted(stream.feeds.get(after, set()) & found.keys()):
            for size in sizes:
                for number in range(len(match_rows(found[before].rows, found[after].inputs, [size]))):
                    values = list(match_blocks(found, prefix, len(stack), (before, after), size, number))
                    if values and found[after].expert is None:
                        yield values


def match_blocks(
    found: dict[str, Matrix], prefix: str, blocks: int, names: tuple[str, str], size: int, number: int
) -> Iterator[Values]:
    """Yield the same values in every block that has them."""
    for block in range(blocks):
        before, after = (found.get(name.replace(f"{prefix}.0.", f"{prefix}.{block}.", 1)) for name in names)
        if before is None or after is None or after.inputs % size:
            continue
        ways = match_rows(before.rows, after.inputs, [size])
        if number < len(ways) and len(ways[number][0]) % size == 0:
            yield Values(before, after, ways[number][0].to(before.stored.device), size)
