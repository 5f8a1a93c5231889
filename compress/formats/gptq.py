"""Store quantized layers in GPTQ's own format, which GPTQModel, transformers with GPTQModel, vLLM and SGLang load."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.errors import UserError
from compress.formats.packed import Quantized
from compress.maths.rounding import Integers, Scheme
from compress.models.layers import detect_task_kind
from compress.models.loading import choose_attention
from compress.models.matrices import Matrix, select_quantizable
from compress.quiet import hide_progress_bars
from compress.tasks.kinds import KINDS

SCALE = torch.float16
WORD = 32
GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)


def select_storable(model: nn.Module, skip: tuple[str, ...], key: str) -> dict[str, Matrix]:
    """Return the matrices that the stage ``key`` quantizes, by name: those that the setting ``key.skip`` does not
    exclude.

    Raises:
        UserError: ``skip`` does not fit the model, or the format cannot store a matrix.
    """
    return select_quantizable(model, skip, key, (nn.Linear, Conv1D), "GPTQ's format", experts=False)


def check_format(
    key: str, model: nn.Module, layers: Mapping[str, Matrix], scheme: Scheme, skip: tuple[str, ...]
) -> None:
    """Raise UserError if the format or its readers cannot represent the layers or the settings of the stage ``key``."""
    instead = f"Set {key}.format=compressed-tensors."
    if not KINDS[detect_task_kind(model)].generates:
        raise UserError(
            f"{key}.format is gptq, whose readers know language models only, without a classification head. {instead}"
        )
    if hasattr(model.config, "compress"):
        raise UserError(f"{key}.format is gptq, which cannot store shapes that a plain config cannot say. {instead}")
    if set(skip) != {"embeddings", "head"}:
        raise UserError(
            f"{key}.skip is {list(skip)}; {key}.format=gptq stores all layers of the blocks and no others. Set "
            f"{key}.skip=[embeddings,head], or {instead.removeprefix('Set ')}"
        )
    if scheme.group_size not in GROUPS:
        raise UserError(
            f"{key}.group_size is {scheme.group_size}; readers of {key}.format=gptq know "
            f"{', '.join(map(str, GROUPS))}. Set one of these, or {instead.removeprefix('Set ')}"
        )
    for name, layer in layers.items():
        if layer.inputs % WORD or layer.rows % WORD:
            raise UserError(
                f"{key}.format is gptq, which packs {WORD} numbers together, and `{name}` is {layer.rows} by "
                f"{layer.inputs}. {instead}"
            )


def pack_words(integers: Tensor, bits: int) -> Tensor:
    """Return integers from 0 to ``2**bits - 1``, ``[n, columns]``, as words of 32 bits, ``[n * bits / 32, columns]``:
    the bits of a column in sequence, the lowest first."""
    n, columns = integers.shape
    each = (integers.numpy().astype(np.uint8)[:, None] >> np.arange(bits, dtype=np.uint8)[:, None]) & 1
    packed = np.packbits(each.reshape(n * bits, columns), axis=0, bitorder="little")  # [bytes, columns]
    words = np.ascontiguousarray(packed.reshape(-1, 4, columns).transpose(0, 2, 1)).view("<i4")
    return torch.from_numpy(words[..., 0].astype(np.int32))


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Return the integers ``[n, columns]`` that :func:`pack_words` packed."""
    columns = words.shape[1]
    packed = np.ascontiguousarray(words.numpy().astype("<i4")[..., None]).view(np.uint8)  # [words, columns, 4]
    each = np.unpackbits(packed.transpose(0, 2, 1).reshape(-1, columns), axis=0, bitorder="little")
    weights = np.left_shift(1, np.arange(bits, dtype=np.int32), dtype=np.int32)[:, None]
    return torch.from_numpy((each.reshape(-1, bits, columns) * weights).sum(1).astype(np.int32))


def pack_layer(weight: Integers) -> dict[str, Tensor]:
    """Return the tensors of a layer's ``weight``.

    Integers start at 0 and are packed along the inputs, zero points along the rows. The first version of the format
    stores zero points minus one.
    """
    scheme, integers, grid = weight
    group = torch.arange(integers.shape[1]) // scheme.group(integers.shape[1])
    zeros = grid.zero.int() - scheme.lowest
    return {
        "qweight": pack_words(integers.T.int() - scheme.lowest, scheme.bits),
        "qzeros": pack_words((zeros - int(scheme.symmetric)) % 2**scheme.bits, scheme.bits).T.contiguous(),
        "scales": grid.scale.to(SCALE).T.contiguous(),
        "g_idx": group.int(),
    }


def unpack_layer(tensors: dict[str, Tensor], bits: int, first: bool) -> Tensor:
    """Return the weight ``[rows, inputs]`` of a layer's tensors, in the ``first`` or second version of the format."""
    group = tensors["g_idx"].long()
    zeros = unpack_words(tensors["qzeros"].T.contiguous(), bits) + int(first)  # [rows, groups]
    integers = unpack_words(tensors["qweight"], bits).T - zeros[:, group]
    return (integers.to(SCALE) * tensors["scales"].T[:, group]).float()


class Layer(nn.Module):
    """The stored tensors in place of a layer."""

    def __init__(self, weight: Integers, bias: Any) -> None:
        super().__init__()
        for name, tensor in pack_layer(weight).items():
            self.register_buffer(name, tensor)
        if bias is not None:
            self.bias = bias


def save_model(model: Any, layers: dict[str, Quantized], folder: Path, **settings: Any) -> None:
    """Write ``model`` to ``folder`` with its ``layers`` packed; ``settings`` are added to the config for readers. The
    model cannot be used afterwards."""
    for name, layer in layers.items():
        model.set_submodule(name, Layer(layer.weight, model.get_submodule(name).bias))
    scheme = next(iter(layers.values())).scheme
    model.config.quantization_config = {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": False,  # groups hold consecutive inputs, in whatever order they were rounded
        "lm_head": False,
        "pack_dtype": "int32",
        # The first version stores zero points minus one, and readers disagree on what a stored zero point of 0 becomes.
        "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
        **settings,
    }
    with hide_progress_bars():
        model.save_pretrained(folder)


def load_model(auto: Any, config: Any, folder: Path) -> Any:
    """Return the model of the class ``auto`` in ``folder`` as floats with PyTorch's own operators; those of GPTQModel
    need float16 and a GPU.

    Raises:
        UserError: ``folder`` lacks some of its weights.
    """
    floats = copy.deepcopy(config)
    packed = vars(floats).pop("quantization_config")
    architecture = auto._model_mapping[type(config)]
    state = load_floats(folder, packed)
    with torch.device("meta"):
        modules = architecture(copy.deepcopy(floats)).named_modules()
    for name in (name for name, module in modules if isinstance(module, Conv1D)):
        state |= {key: value.T for key, value in state.items() if f".{name}.weight".endswith(f".{key}")}
    with hide_progress_bars():
        model, info = architecture.from_pretrained(
            None, config=floats, state_dict=state, dtype=config.dtype, output_loading_info=True
        )
    if lacking := sorted(info["missing_keys"]):
        raise UserError(f"{folder} holds no weights for {', '.join(lacking[:4])}. Name another folder.")
    model.config.quantization_config = packed
    return choose_attention(model)


def load_floats(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors in ``folder`` of a model with this quantization ``config``, all weights as floats."""
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    first = config.get("checkpoint_format", config.get("format", "gptq")) == "gptq"
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        parts = {part: tensors.pop(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
        tensors[f"{name}.weight"] = unpack_layer(parts, config["bits"], first)
    return tensors


def average_bits(layers: dict[str, Quantized]) -> dict[str, float]:
    """Return the bits that a weight of each layer should take: its own, its share of the group's scale and zero point,
    and of an index for every input."""
    shapes = {name: layer.weight.integers.shape for name, layer in layers.items()}
    return {
        name: layer.scheme.bits + (16 + layer.scheme.bits) / layer.scheme.group(shapes[name][1]) + 32 / shapes[name][0]
        for name, layer in layers.items()
    }
