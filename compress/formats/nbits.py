"""Write weights of few bits into ONNX Runtime's operators, and read them back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.maths.rounding import Grid, Integers, Scheme, minmax_grid, round_to_integers

BLOCKS = (16, 32, 64, 128, 256)
"""Numbers of consecutive inputs that may share a scale in these operators."""
WORDS = (2, 4, 8)
"""Bits of an integer in MatMulNBits."""
OPERATORS = ("MatMulNBits", "MatMulBnb4")
DOMAIN = "com.microsoft"
INT8_ACTIVATIONS = 4
"""The ``accuracy_level`` at which MatMulNBits rounds activations to 8 bits."""


class Floats(NamedTuple):
    """bitsandbytes' 4-bit floats, row after row: indices into the values of the ``kind`` (nf4 or fp4), two to a byte,
    and a scale for every ``blocksize`` of them."""

    packed: Tensor
    scale: Tensor
    blocksize: int
    kind: str


Weight = Integers | Floats


def word_size(scheme: Scheme) -> int:
    """Return the bits in which MatMulNBits stores the integers of ``scheme``."""
    return next(bits for bits in WORDS if bits >= scheme.bits)


def block_size(scheme: Scheme, inputs: int) -> int | None:
    """Return the largest block of MatMulNBits that divides the groups of ``scheme``, or None if none does. Where a row
    of ``inputs`` shares one scale, return the block that takes the fewest bytes."""
    if scheme.group(inputs) == inputs:
        return min(BLOCKS, key=lambda size: (math.ceil(inputs / size) * (size * word_size(scheme) + 32), -size))
    return max((size for size in BLOCKS if scheme.group_size % size == 0), default=None)


def round_weight(weight: Tensor, scheme: Scheme) -> Integers:
    """Return ``weight`` ``[rows, inputs]`` rounded to the nearest integers; the last group may be smaller."""
    filled = F.pad(weight.float(), (0, -weight.shape[1] % scheme.group(weight.shape[1])))
    grid = minmax_grid(filled, scheme, torch.float32)
    return Integers(scheme, round_to_integers(filled, grid, scheme)[:, : weight.shape[1]].char(), grid)


def round_rows(weight: Tensor) -> Integers:
    """Return ``weight`` in 8 bits with a scale a row, rounded as ONNX Runtime's quantizer rounds a layer."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    grid = Grid(scale.masked_fill(scale == 0, 1), torch.zeros_like(scale, dtype=torch.int8))
    return Integers(Scheme(8), round_to_integers(weight, grid, Scheme(8)).char(), grid)


def pack_bytes(numbers: Tensor, bits: int) -> Tensor:
    """Return numbers from 0 to ``2**bits - 1`` packed into bytes along the last dimension, low bits first."""
    each = 8 // bits
    parts = F.pad(numbers.to(torch.uint8), (0, -numbers.shape[-1] % each)).unflatten(-1, (-1, each))
    return sum(parts[..., i] << bits * i for i in range(each))  # type: ignore[return-value]


def unpack_bytes(packed: Tensor, bits: int) -> Tensor:
    """Return the numbers packed into the bytes along the last dimension."""
    return torch.stack([packed >> bits * i & 2**bits - 1 for i in range(8 // bits)], -1).flatten(-2)


def build_product(node: Any, weight: Weight, inputs: int, activations: str) -> tuple[list[Any], dict[str, np.ndarray]]:
    """Return nodes and tensors that multiply by ``weight``, rows of ``inputs``, for a MatMul or Gemm."""
    from onnx import helper

    name, source, into = node.name, node.input[1], list(node.output)
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else None
    if bias:
        into = [f"{name}_product"]
    settings: dict[str, Any]
    if isinstance(weight, Integers):
        kind, settings, tensors = integer_product(weight, inputs)
        settings["accuracy_level"] = INT8_ACTIVATIONS if activations == "int8" else 0
    else:
        kind, settings, tensors = float_product(weight, inputs)
    tensors = {f"{source}_{part}": tensor for part, tensor in tensors.items()}
    nodes = [
        helper.make_node(kind, [node.input[0], *tensors], into, name, domain=DOMAIN, **settings),
        *([helper.make_node("Add", [*into, bias], list(node.output), f"{name}_bias")] if bias else []),
    ]
    return nodes, {key: tensor.numpy() for key, tensor in tensors.items()}


def integer_product(weight: Integers, inputs: int) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Return MatMulNBits with ``weight``: its name, attributes and tensors. The blocks of a group repeat its scale."""
    scheme, numbers, grid = weight
    bits, size = word_size(scheme), block_size(scheme, inputs)
    assert size is not None
    blocks = math.ceil(inputs / size)
    group = torch.arange(blocks) * size // scheme.group(inputs)
    above = 2 ** (bits - 1)  # the operator subtracts it again where there are no zero points
    filled = F.pad(numbers.to(torch.int16) + above, (0, blocks * size - inputs)).unflatten(1, (blocks, size))
    tensors = {"weight": pack_bytes(filled, bits), "scale": grid.scale.float()[:, group].contiguous()}
    if not scheme.symmetric:
        tensors["zero_point"] = pack_bytes(grid.zero[:, group].to(torch.int16) + above, bits)
    return "MatMulNBits", {"K": inputs, "N": len(numbers), "bits": bits, "block_size": size}, tensors


def float_product(weight: Floats, inputs: int) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Return MatMulBnb4 with ``weight``: its name, attributes and tensors."""
    rows = weight.packed.numel() * 2 // inputs
    settings = {"K": inputs, "N": rows, "block_size": weight.blocksize, "quant_type": int(weight.kind == "nf4")}
    return "MatMulBnb4", settings, {"weight": weight.packed.flatten(), "scale": weight.scale.float()}


def build_lookup(node: Any, rows: Integers) -> tuple[list[Any], dict[str, np.ndarray]]:
    """Return nodes and tensors that look up ``rows``, each with a scale, in place of a Gather."""
    from onnx import TensorProto, helper

    table, indices = node.input
    name = node.name
    nodes = [
        helper.make_node("Gather", [f"{table}_quantized", indices], [f"{name}_integers"], name),
        helper.make_node("Cast", [f"{name}_integers"], [f"{name}_cast"], f"{name}_cast", to=TensorProto.FLOAT),
        helper.make_node("Gather", [f"{table}_scale", indices], [f"{name}_scales"], f"{name}_scales"),
        helper.make_node("Mul", [f"{name}_cast", f"{name}_scales"], list(node.output), f"{name}_mul"),
    ]
    return nodes, {f"{table}_quantized": rows.integers.numpy(), f"{table}_scale": rows.grid.scale.numpy()}


def share_table(
    table: str, nodes: list[Any], tensors: dict[str, np.ndarray]
) -> tuple[list[Any], dict[str, np.ndarray]]:
    """Return ``nodes`` and ``tensors`` that multiply by the rows of ``table`` without a stored copy of them: the graph
    computes it when it is loaded. Where rows were padded, the copy stays."""
    from onnx import TensorProto, helper

    blocks = nodes[0].input[1]
    rows, count, size = tensors[blocks].shape
    if count * size != next(one.i for one in nodes[0].attribute if one.name == "K"):
        return nodes, tensors
    above, shape = f"{blocks}_above", f"{blocks}_shape"
    steps = [
        helper.make_node("Cast", [f"{table}_quantized"], [f"{blocks}_wide"], to=TensorProto.INT32),
        helper.make_node("Add", [f"{blocks}_wide", above], [f"{blocks}_shifted"]),
        helper.make_node("Cast", [f"{blocks}_shifted"], [f"{blocks}_bytes"], to=TensorProto.UINT8),
        helper.make_node("Reshape", [f"{blocks}_bytes", shape], [blocks]),
    ]
    others = {name: one for name, one in tensors.items() if name != blocks}
    return [*steps, *nodes], {**others, above: np.array(128, np.int32), shape: np.array([rows, count, size])}


def read_integers(node: Any, values: Callable[[str], Tensor]) -> Tensor:
    """Return the stored integers ``[rows, inputs]`` of a MatMulNBits or MatMulBnb4, shifted so that 0 means zero;
    ``values`` returns a tensor by its name."""
    has = {one.name: one.i for one in node.attribute}
    rows, inputs = has["N"], has["K"]
    packed = values(node.input[1])
    if node.op_type == "MatMulBnb4":
        indices = unpack_bytes(packed, 4).view(rows, inputs).short()
        return indices - 7 if has["quant_type"] else indices % 8  # the index of zero in nf4; fp4 has two
    bits, size = has["bits"], has["block_size"]
    numbers = unpack_bytes(packed, bits).short()
    zero = torch.tensor(2 ** (bits - 1))
    if len(node.input) > 3:
        blocks = math.ceil(inputs / size)
        zero = unpack_bytes(values(node.input[3]).view(rows, -1), bits)[:, :blocks, None].short()
    return (numbers - zero).flatten(1)[:, :inputs]
