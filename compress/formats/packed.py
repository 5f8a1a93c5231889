"""Quantized layers on disk, in the compressed-tensors format that transformers and vLLM load."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.maths.rounding import Grid, Inputs, Scheme
from compress.quiet import hide_progress_bars

ABOUT = ("weight_shape", "weight_format", "quant_map", "quant_state")
"""Parts of the names of tensors that describe a layer and are the same for every number of weights."""


PARTS = r"\.(weight.*|SCB|qweight|qzeros|scales|g_idx)$"
"""How the names of a layer's tensors end; those of LLM.int8 and of GPTQ are their own."""


class Quantized(NamedTuple):
    """What a layer's weights, which are already on the grid, are stored as, and how its inputs are quantized, where
    they are."""

    scheme: Scheme
    grid: Grid
    inputs: Inputs | None = None

    @property
    def kind(self) -> tuple[Scheme, Scheme | None, bool]:
        """What it may have in common with other layers: the schemes of weights and inputs, and whether every token has
        a grid of its own."""
        return self.scheme, self.inputs and self.inputs.scheme, self.inputs is not None and self.inputs.grid is None

    def attach(self, layer: Any) -> None:
        """From now on the layer computes with quantized inputs, and says how."""
        assert self.inputs is not None
        self.inputs.attach(layer)
        layer.quantized = self


class Integers(NamedTuple):
    """A layer's weights as they are stored, ``(integers - zero) * scale``: the integers ``[rows, inputs]`` from
    ``scheme.lowest`` to ``scheme.highest``."""

    scheme: Scheme
    integers: Tensor
    grid: Grid


def save_model(model: nn.Module, layers: dict[str, Quantized], folder: Path) -> None:
    """Write ``model`` to ``folder``, its ``layers`` as packed integers. The model is packed as well and of no use
    afterwards."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kinds = list(dict.fromkeys(layer.kind for layer in layers.values()))
    groups = {
        f"group_{i}": quantization_scheme(
            *kind,
            # One kind for all is said of the class, as every reader understands it.
            targets=["Linear"] if len(kinds) == 1 else [name for name, one in layers.items() if one.kind == kind],
        )
        for i, kind in enumerate(kinds)
    }
    ignore = [name for name in linears if name not in layers]
    with hide_progress_bars():
        apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=ignore))
    for name, (scheme, grid, inputs) in layers.items():
        layer = model.get_submodule(name)
        layer.weight.data = layer.weight.data.float()  # which its integers are told from: in 16 bits not all are
        layer.weight_scale.data.copy_(grid.scale)
        if not scheme.symmetric:
            layer.weight_zero_point.data.copy_(grid.zero)
        if inputs and inputs.grid:
            layer.input_scale.data.copy_(inputs.grid.scale)
            layer.input_zero_point.data.copy_(inputs.grid.zero)
    with hide_progress_bars():
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(folder)
    compressor.update_config(str(folder))


def quantization_scheme(scheme: Scheme, inputs: Scheme | None, dynamic: bool, targets: list[str]) -> Any:
    """compressed-tensors' own description of how weights, and inputs, are quantized."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = {"strategy": "channel"} if scheme.group_size == -1 else {"group_size": scheme.group_size}
    weights = QuantizationArgs(num_bits=scheme.bits, symmetric=scheme.symmetric, **strategy)
    if inputs is None:
        return QuantizationScheme(targets=targets, weights=weights)
    activations = QuantizationArgs(
        num_bits=inputs.bits,
        symmetric=inputs.symmetric,
        dynamic=dynamic,
        strategy="token" if dynamic else "tensor",
    )
    # Integers of fewer bits would lie in a byte each.
    how = "int-quantized" if scheme.bits == 8 else "pack-quantized"
    return QuantizationScheme(targets=targets, weights=weights, input_activations=activations, format=how)


def describe_layer(layer: Any) -> Quantized | None:
    """How a layer that compressed-tensors has loaded, with quantized inputs, computes; None where that is in another
    way than ours."""
    weights, activations = layer.quantization_scheme.weights, layer.quantization_scheme.input_activations
    ours = activations and weights and weights.type == activations.type == "int" and weights.symmetric
    if not ours or layer.quantization_scheme.output_activations:
        return None
    scale = layer.weight_scale.data.clone()
    inputs = Scheme(activations.num_bits, symmetric=activations.symmetric)
    between = None
    if not activations.dynamic:
        zero = getattr(layer, "input_zero_point", torch.zeros(1, dtype=torch.int8))
        between = Grid(layer.input_scale.data.clone(), zero.data.clone())
    return Quantized(
        Scheme(weights.num_bits, weights.group_size or -1, weights.symmetric),
        Grid(scale, torch.zeros_like(scale, dtype=torch.int8)),
        Inputs(inputs, between),
    )


def average_bits(model: nn.Module, layers: dict[str, Quantized]) -> dict[str, float]:
    """Bits that every weight of each layer should take, scales and zero points counted."""
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in layers}
    return {name: layers[name].scheme.average_bits(one.in_features, one.weight.dtype) for name, one in linears.items()}


def list_packed_layers(folder: Path) -> set[str]:
    """The layers whose weights ``folder`` holds as integers."""
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  (it is no dict)
                name, weight, _ = key.replace(".qweight", ".weight").partition(".weight")
                if weight and not file.get_tensor(key).is_floating_point():
                    found.add(name)
    return found


def read_integers(folder: Path) -> dict[str, Integers]:
    """The packed weights that ``folder`` holds, by layer; none where all are floats."""
    config = json.loads((folder / "config.json").read_text())
    if config.get("quantization_config", {}).get("quant_method") != "compressed-tensors":
        return {}
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationConfig

    groups = QuantizationConfig(**config["quantization_config"]).config_groups
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    found = {}
    for key in tensors:
        name, packed, _ = key.partition(".weight_packed")
        if not packed:
            continue
        how = next(one.weights for one in groups.values() if {name, "Linear"} & set(one.targets))
        scheme = Scheme(how.num_bits, how.group_size or -1, how.symmetric)
        shape, scale = torch.Size(tensors[f"{name}.weight_shape"].tolist()), tensors[f"{name}.weight_scale"]
        zero = torch.zeros_like(scale, dtype=torch.int8)
        if not scheme.symmetric:
            zero = unpack_from_int32(tensors[f"{name}.weight_zero_point"], scheme.bits, scale.shape, packed_dim=0)
        found[name] = Integers(scheme, unpack_from_int32(tensors[key], scheme.bits, shape), Grid(scale, zero))
    return found


def freeze_weights(model: nn.Module, layers: Iterable[str]) -> None:
    """Leave the weights of ``layers`` out of training."""
    for name in layers:
        model.get_submodule(name).weight.requires_grad_(False)


def save_with_packed(model: nn.Module, source: Path, folder: Path) -> None:
    """Write to ``folder`` the packed weights that ``source`` holds, and all else as it is in ``model``."""
    packed, now = list_packed_layers(source), model.state_dict()
    for name in ("config.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, folder)
    for path in source.glob("*.safetensors*"):  # an index of several files stays true
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
            continue
        tensors = load_file(path)
        changed = {key: now[key] for key in tensors if key in now and key.partition(".weight")[0] not in packed}
        save_file({**tensors, **changed}, folder / path.name, metadata={"format": "pt"})


def count_stored_bits(folder: Path, layers: Iterable[str]) -> dict[str, int]:
    """Bits that the weights of ``layers`` take on disk, scales and zero points counted; biases are not."""
    found = dict.fromkeys(layers, 0)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  (it is no dict)
                name = re.sub(PARTS, "", key)
                if name in found and not any(word in key for word in ABOUT):
                    tensor = file.get_tensor(key)
                    found[name] += tensor.numel() * tensor.element_size() * 8
    return found
