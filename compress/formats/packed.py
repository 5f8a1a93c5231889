"""Store quantized layers in the compressed-tensors format, which transformers and vLLM load."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.maths.rounding import Grid, Inputs, Integers, Scheme, round_to_nearest
from compress.models.linears import use_linear_layers
from compress.models.matrices import Matrix, select_quantizable
from compress.quiet import hide_progress_bars

ABOUT = ("weight_shape", "weight_format", "quant_map", "quant_state")
"""Parts of the names of tensors that describe a layer and whose size does not depend on the weights."""


PARTS = r"\.(weight.*|SCB|qweight|qzeros|scales|g_idx)$"
"""Endings of the names of a layer's tensors; LLM.int8 and GPTQ have their own."""


class Quantized(NamedTuple):
    """The stored weights of a layer, and the quantization of its inputs, if any."""

    weight: Integers
    inputs: Inputs | None = None

    @property
    def scheme(self) -> Scheme:
        return self.weight.scheme

    @property
    def grid(self) -> Grid:
        return self.weight.grid

    @property
    def kind(self) -> tuple[Scheme, Scheme | None, bool]:
        """The part that layers can share: schemes of weights and inputs, and whether every token has a grid."""
        return self.scheme, self.inputs and self.inputs.scheme, self.inputs is not None and self.inputs.grid is None

    def attach(self, layer: Any) -> None:
        """Make the layer compute with quantized inputs and record how in ``layer.quantized``."""
        assert self.inputs is not None
        self.inputs.attach(layer)
        layer.quantized = self


def select_storable(model: nn.Module, skip: Sequence[str], key: str) -> dict[str, Matrix]:
    """Return the matrices that the stage ``key`` quantizes, by name: those that the setting ``key.skip`` does not
    exclude.

    Raises:
        UserError: ``skip`` does not fit the model, or the format cannot store a matrix.
    """
    return select_quantizable(model, skip, key, (nn.Linear, Conv1D), "the compressed-tensors format", experts=True)


def save_model(model: nn.Module, layers: dict[str, Quantized], folder: Path) -> None:
    """Write ``model`` to ``folder`` with its ``layers`` as packed integers. The model is packed too and cannot be used
    afterwards."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    use_linear_layers(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kinds = list(dict.fromkeys(layer.kind for layer in layers.values()))
    # A single kind is given for the class Linear, which every reader understands, if all layers are of just this class:
    # readers look for the layers to leave out among those of the same class.
    together = len(kinds) == 1 and all(type(model.get_submodule(name)) is nn.Linear for name in layers)
    groups = {
        f"group_{i}": quantization_scheme(
            *kind,
            targets=["Linear"] if together else [name for name, layer in layers.items() if layer.kind == kind],
        )
        for i, kind in enumerate(kinds)
    }
    ignore = [name for name in linears if name not in layers]
    with hide_progress_bars():
        apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=ignore))
    for name, (weight, inputs) in layers.items():
        layer = model.get_submodule(name)
        grid = Grid(weight.grid.scale.float(), weight.grid.zero)
        # The library divides by the scale again. In 32 bits it finds the same integers, in 16 bits it would not.
        layer.weight.data = weight._replace(grid=grid).dequantize(torch.float32)
        layer.weight_scale.data.copy_(grid.scale)
        if not weight.scheme.symmetric:
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
    """Return compressed-tensors' description of how weights and inputs are quantized."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = {"strategy": "channel"} if scheme.group_size == -1 else {"group_size": scheme.group_size}
    weights = QuantizationArgs(num_bits=scheme.bits, symmetric=scheme.symmetric, **strategy)
    if inputs is None:  # the library would infer the format, and for a class derived from Linear infer `dense`
        return QuantizationScheme(targets=targets, weights=weights, format="pack-quantized")
    activations = QuantizationArgs(
        num_bits=inputs.bits,
        symmetric=inputs.symmetric,
        dynamic=dynamic,
        strategy="token" if dynamic else "tensor",
    )
    # `int-quantized` would take a whole byte for integers of fewer bits.
    format = "int-quantized" if scheme.bits == 8 else "pack-quantized"
    return QuantizationScheme(targets=targets, weights=weights, input_activations=activations, format=format)


def describe_layer(layer: Any) -> Quantized | None:
    """Return how a layer with quantized inputs computes that compressed-tensors loaded, or None if it differs from
    ours."""
    weights, activations = layer.quantization_scheme.weights, layer.quantization_scheme.input_activations
    ours = activations and weights and weights.type == activations.type == "int" and weights.symmetric
    if not ours or layer.quantization_scheme.output_activations:
        return None
    scale = layer.weight_scale.data.clone()
    grid = Grid(scale, torch.zeros_like(scale, dtype=torch.int8))
    scheme = Scheme(weights.num_bits, weights.group_size or -1, weights.symmetric)
    inputs = Scheme(activations.num_bits, symmetric=activations.symmetric)
    input_grid = None
    if not activations.dynamic:
        zero = getattr(layer, "input_zero_point", torch.zeros(1, dtype=torch.int8))
        input_grid = Grid(layer.input_scale.data.clone(), zero.data.clone())
    return Quantized(round_to_nearest(layer.weight.detach(), grid, scheme), Inputs(inputs, input_grid))


def average_bits(layers: dict[str, Quantized]) -> dict[str, float]:
    """Return the bits that a weight of each layer should take, scales and zero points counted."""
    return {
        name: layer.scheme.average_bits(layer.weight.integers.shape[1], layer.grid.scale.dtype)
        for name, layer in layers.items()
    }


def list_packed_layers(folder: Path) -> set[str]:
    """Return the layers whose weights are integers in ``folder``."""
    packed = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  (not a dict)
                name, weight, _ = key.replace(".qweight", ".weight").partition(".weight")
                if weight and not file.get_tensor(key).is_floating_point():
                    packed.add(name)
    return packed


def read_integers(folder: Path) -> dict[str, Integers]:
    """Return the packed weights in ``folder`` by layer; none if all are floats."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config", {}).get("quant_method") != "compressed-tensors":
        return {}
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationConfig

    groups = QuantizationConfig(**config["quantization_config"]).config_groups
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    weights = {}
    for key in tensors:
        name, packed, _ = key.partition(".weight_packed")
        if not packed:
            continue
        stored = next(group.weights for group in groups.values() if {name, "Linear"} & set(group.targets))
        scheme = Scheme(stored.num_bits, stored.group_size or -1, stored.symmetric)
        shape, scale = torch.Size(tensors[f"{name}.weight_shape"].tolist()), tensors[f"{name}.weight_scale"]
        zero = torch.zeros_like(scale, dtype=torch.int8)
        if not scheme.symmetric:
            zero = unpack_from_int32(tensors[f"{name}.weight_zero_point"], scheme.bits, scale.shape, packed_dim=0)
        weights[name] = Integers(scheme, unpack_from_int32(tensors[key], scheme.bits, shape), Grid(scale, zero))
    return weights


def freeze_weights(model: nn.Module, layers: Iterable[str]) -> None:
    """Exclude the weights of ``layers`` from training."""
    for name in layers:
        model.get_submodule(name).weight.requires_grad_(False)


def save_with_packed(model: nn.Module, source: Path, folder: Path) -> None:
    """Write the packed weights of ``source`` to ``folder``, and everything else from ``model``."""
    packed, state = list_packed_layers(source), model.state_dict()
    for name in ("config.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, folder)
    for path in source.glob("*.safetensors*"):  # an index of several files stays valid
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
            continue
        tensors = load_file(path)
        changed = {key: state[key] for key in tensors if key in state and key.partition(".weight")[0] not in packed}
        save_file({**tensors, **changed}, folder / path.name, metadata={"format": "pt"})


def count_stored_bits(folder: Path, layers: Iterable[str]) -> dict[str, int]:
    """Return the bits that the weights of ``layers`` take on disk, with scales and zero points and without biases."""
    bits = dict.fromkeys(layers, 0)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  (not a dict)
                name = re.sub(PARTS, "", key)
                if name in bits and not any(word in key for word in ABOUT):
                    tensor = file.get_tensor(key)
                    bits[name] += tensor.numel() * tensor.element_size() * 8
    return bits
