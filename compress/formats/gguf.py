"""Store weights in the blocks of llama.cpp's format: 32 weights of a row share a scale in float16.

The types are those of ggml: in ``Q4_0`` and ``Q8_0`` a weight is an integer times the scale, in ``Q4_1`` the block also
has a lowest value, in float16, which is added.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from compress.maths.rounding import Integers, Scheme

FILE = "model.gguf"
FREQUENCIES = "rope_freqs.weight"
"""Name of the tensor that slows rotary frequencies, which is no parameter of a model."""
BLOCK = 32
HEAD = {"Q4_0": 2, "Q4_1": 4, "Q8_0": 2}
"""Bytes of a block before its integers, by type."""


class Layout(NamedTuple):
    """The form that llama.cpp gives a family of models."""

    name: str
    """Its architecture, which is also the ``model_type`` by which transformers reads the file."""
    interleaves: bool
    """Whether rotary positions turn neighbouring channels of queries and keys, where transformers turns halves."""


LAYOUTS = {
    "llama": Layout("llama", interleaves=True),
    "mistral": Layout("llama", interleaves=True),
    "qwen2": Layout("qwen2", interleaves=False),
    "qwen3": Layout("qwen3", interleaves=False),
}
"""Families by their ``model_type`` in transformers."""


def choose_type(scheme: Scheme) -> str | None:
    """Return the smallest type that holds the integers of a scheme as they are, or None if there is no such type.

    Where every integer minus its zero point fits, the zero points need no place. So they do in 2 and 3 bits in
    ``Q4_0``, and in 5 to 7 bits in ``Q8_0``; those of 4 bits are in the lowest values of ``Q4_1``.
    """
    widest = 2**scheme.bits - 1 if not scheme.symmetric else -scheme.lowest
    if widest <= (8 if scheme.symmetric else 7):
        return "Q4_0"
    if scheme.bits == 4:
        return "Q4_1"
    return "Q8_0" if widest <= 128 else None


def divides(scheme: Scheme, inputs: int) -> bool:
    """Return whether blocks cut the groups of a row of ``inputs`` evenly."""
    return inputs % BLOCK == 0 and scheme.group(inputs) % BLOCK == 0


def pack_integers(weight: Integers) -> np.ndarray:
    """Return the blocks ``[rows, bytes]`` of a layer's ``weight``, of the type that :func:`choose_type` chooses."""
    scheme, integers, grid = weight
    kind = choose_type(scheme)
    rows, inputs = integers.shape
    group = torch.arange(inputs // BLOCK) * BLOCK // scheme.group(inputs)
    scale, zero = grid.scale.float()[:, group], grid.zero.short()[:, group]  # [rows, blocks]
    numbers = integers.short().unflatten(1, (-1, BLOCK))
    heads = [scale]
    if kind == "Q4_1":
        numbers, lowest = numbers - scheme.lowest, (scheme.lowest - zero) * scale
        heads.append(lowest)
    else:
        numbers = numbers - zero[..., None] + (8 if kind == "Q4_0" else 0)
    body = numbers.char().numpy().view(np.uint8)
    if kind != "Q8_0":
        low, high = np.split(body, 2, axis=-1)  # a byte holds a weight of each half of the block
        body = low | high << 4
    halves = [head.half().numpy()[..., None].view(np.uint8) for head in heads]
    return np.concatenate([*halves, body], axis=-1).reshape(rows, -1)


def unpack_integers(blocks: np.ndarray, kind: str) -> Tensor:
    """Return the integers ``[rows, inputs]`` of blocks ``[rows, bytes]``, shifted so that 0 means zero."""
    rows, body = len(blocks), BLOCK if kind == "Q8_0" else BLOCK // 2
    each = blocks.reshape(rows, -1, HEAD[kind] + body)
    numbers = each[..., HEAD[kind] :]
    if kind == "Q8_0":
        return torch.from_numpy(numbers.view(np.int8).astype(np.int16)).flatten(1)
    numbers = np.concatenate([numbers & 15, numbers >> 4], axis=-1).astype(np.int16)
    zero: Any = np.int16(8)
    if kind == "Q4_1":
        scale, lowest = (np.ascontiguousarray(each[..., at : at + 2]).view(np.float16) for at in (0, 2))
        with np.errstate(divide="ignore", invalid="ignore"):
            zero = np.nan_to_num(-lowest.astype(np.float32) / scale.astype(np.float32)).round().astype(np.int16)
    return torch.from_numpy(numbers - zero).flatten(1)
