"""Export layers that multiply integers: weights and inputs keep their grids in other runtimes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from compress.errors import UserError
from compress.formats.packed import Quantized
from compress.maths.rounding import Inputs, Scheme
from compress.runtimes.processor import WIDEST

WIDER = "4-bit integers are stored in 8 bits"
FLOAT_SPEED = (
    "8-bit integers are multiplied exactly on every processor, but no faster than floats; processor=vnni is faster "
    "with VNNI"
)


def check_stages(key: str, precision: str | None, before: list[Any]) -> None:
    """Raise UserError if the export ``key`` cannot keep the integers and input ranges of a stage ``before``."""
    for stage in before:
        if stage.leaves == "integer":
            scheme, dynamic = getattr(stage, "scheme", Scheme(8)), getattr(stage, "dynamic", False)
            check_support(key, precision, f"{stage.key}.", scheme, dynamic)


def check_support(key: str, precision: str | None, stage: str, scheme: Scheme, dynamic: bool) -> None:
    """Raise UserError if the export ``key`` cannot keep integers of this ``scheme``; ``stage`` begins their keys."""
    if precision is not None:
        raise UserError(
            f"{key}.precision is {precision}, which would discard the integers and ranges of an earlier stage. Set "
            f"{key}.precision=null to keep them, or remove that stage."
        )
    if dynamic:
        raise UserError(
            f"{stage}dynamic is true, a range for every token; `{key.rpartition('.')[2]}` can keep a range for every "
            f"layer. Set {stage}dynamic=false, or replace that stage by `onnx` with precision=int8_dynamic, a range "
            "for every batch."
        )
    if scheme.group_size != -1:
        raise UserError(
            f"{stage}group_size is {scheme.group_size}; `{key.rpartition('.')[2]}` multiplies integers with one scale "
            f"a row. Set {stage}group_size=-1."
        )


def find_quantized_layers(model: nn.Module, key: str, precision: str | None) -> dict[str, Quantized]:
    """Return the layers with quantized inputs, by name; none if all inputs are floats.

    Raises:
        UserError: the export ``key`` cannot keep their integers.
    """
    layers: dict[str, Quantized] = {
        name: module.quantized
        for name, module in model.named_modules()
        if isinstance(getattr(module, "quantized", None), Quantized)
    }
    for layer in layers.values():
        check_support(key, precision, "", layer.scheme, layer.inputs is not None and layer.inputs.grid is None)
    return layers


@contextmanager
def suspend_quantization(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Stop rounding the inputs of the layers, so that the traced graph has plain products there."""
    modules = [model.get_submodule(name) for name in names]
    before = [(vars(module).pop("forward", None), dict(module._forward_pre_hooks)) for module in modules]
    for module in modules:
        module._forward_pre_hooks.clear()
    try:
        yield
    finally:
        for module, (forward, hooks) in zip(modules, before):
            module._forward_pre_hooks.update(hooks)
            if forward is not None:
                module.forward = forward  # type: ignore[method-assign]


def describe_limits(layers: dict[str, Quantized], wide: bool) -> str:
    """Return what an export of the quantized ``layers`` does not do for size or speed. ``wide`` is the result of
    :func:`has_wide_weights`."""
    limits = {WIDER: any(layer.scheme.bits < 8 for layer in layers.values()), FLOAT_SPEED: wide}
    return ", and ".join(limit for limit, holds in limits.items() if holds)


def has_wide_weights(model: nn.Module, layers: dict[str, Quantized]) -> bool:
    """Return whether sums of products by the weights of the ``layers`` can saturate without VNNI."""
    return any(abs(weight_integers(model.get_submodule(name), layer)).max() > WIDEST for name, layer in layers.items())


def weight_integers(module: Any, layer: Quantized) -> np.ndarray:
    """Return the integers ``[rows, inputs]`` of the module's weight, which is already on the layer's grid."""
    return (module.weight.detach().float() / layer.grid.scale.float()).round().short().numpy()


def unsigned_grid(inputs: Inputs | None) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and zero point of the same grid for integers from 0 to 255, which processors multiply fastest."""
    assert inputs is not None and inputs.grid is not None  # `check_support` refuses other layers
    scale, zero = inputs.grid
    return scale.float().numpy().reshape(()), (zero.short() - inputs.scheme.lowest).numpy().astype(np.uint8).reshape(())


def quantize_onnx_graph(graph: Any, model: nn.Module, layers: dict[str, Quantized], unsigned: bool) -> None:
    """Quantize the products by the weights of the ``layers``, and their inputs, by pairs of ``QuantizeLinear`` and
    ``DequantizeLinear``. Runtimes turn these pairs into integer products.

    ``unsigned`` shifts the zero of the weights to 128. These products are exact in ONNX Runtime on every processor, but
    no faster than floats.
    """
    from onnx import numpy_helper
    from onnx.helper import make_node

    # 1) Replace each product by an integer product
    lift, kind = (128, np.uint8) if unsigned else (0, np.int8)
    nodes: list[Any] = []
    stored: dict[str, np.ndarray] = {}
    entered: dict[Any, str] = {}
    done = set()
    for node in graph.node:
        name = find_layer(node, layers)
        if name is None:
            nodes.append(node)
            continue
        layer, (scale, zero) = layers[name], unsigned_grid(layers[name].inputs)
        grid = node.input[0], scale.item(), zero.item()
        if grid not in entered:  # query, key and value share their input: it is rounded once
            x = entered[grid] = f"{name}.input"
            how = {f"{x}_scale": scale, f"{x}_zero_point": zero}
            nodes.append(make_node("QuantizeLinear", [node.input[0], *how], [f"{x}_quantized"], f"{x}_quantize"))
            nodes.append(make_node("DequantizeLinear", [f"{x}_quantized", *how], [x], f"{x}_dequantize"))
            stored |= how
        weight = f"{name}.weight"
        how = {
            f"{weight}_quantized": (weight_integers(model.get_submodule(name), layer).T + lift).astype(kind),
            f"{weight}_scale": layer.grid.scale.float().numpy()[:, 0],
            f"{weight}_zero_point": (layer.grid.zero.short().numpy()[:, 0] + lift).astype(kind),
        }
        if name not in done:
            nodes.append(make_node("DequantizeLinear", list(how), [weight], f"{weight}_dequantize", axis=1))
        stored |= how
        done.add(name)
        bias = node.input[2:]  # of a Gemm, whose rows are texts
        product = f"{node.output[0]}_product" if bias else node.output[0]
        nodes.append(make_node("MatMul", [entered[grid], weight], [product], node.name))
        if bias:
            nodes.append(make_node("Add", [product, *bias], node.output, f"{node.name}_bias"))
    assert done == layers.keys(), f"no product of the graph is by {layers.keys() - done}"
    # 2) Remove the tensors that no node reads any more
    used = {name for node in nodes for name in node.input}
    others = [tensor for tensor in graph.initializer if tensor.name in used]
    for part in ("node", "initializer"):
        graph.ClearField(part)
    graph.node.extend(nodes)
    graph.initializer.extend([*others, *(numpy_helper.from_array(array, name) for name, array in stored.items())])


def find_layer(node: Any, names: Iterable[str]) -> str | None:
    """Return the layer whose product the node computes, from the node's name: PyTorch puts the module's path in it."""
    path, _, operation = node.name.replace("/", ".").removeprefix(".model.").rpartition(".")
    return path if path in names and re.fullmatch(r"(MatMul|Gemm)(_\d+)?", operation) else None


def quantize_openvino_graph(graph: Any, model: nn.Module, layers: dict[str, Quantized]) -> None:
    """Quantize the products by the weights of the ``layers``, and their inputs by ``FakeQuantize``. OpenVINO turns
    these into integer products."""
    from openvino import opset13 as ops

    constants = {node.get_friendly_name(): node for node in graph.get_ops() if node.get_type_name() == "Constant"}
    entered: dict[Any, Any] = {}
    for name, layer in layers.items():
        dense = constants[f"self.model.{name}.weight"]
        stored = ops.constant(weight_integers(model.get_submodule(name), layer).astype(np.int8))
        stored.set_friendly_name(dense.get_friendly_name())
        scales = ops.constant(layer.grid.scale.float().numpy())
        scales.set_friendly_name(f"{dense.get_friendly_name()}/fq_weights_1/scale")
        weight = ops.multiply(ops.convert(stored, "f32"), scales)
        scale, zero = unsigned_grid(layer.inputs)
        low, high = ((end - zero.item()) * scale.item() for end in (0, 255))
        for reader in dense.output(0).get_target_inputs():
            x = reader.get_node().input_value(0)
            key = (x.get_node().get_friendly_name(), x.get_index(), low, high)
            if key not in entered:
                ends = [ops.constant(np.float32(end)) for end in (low, high)]
                entered[key] = ops.fake_quantize(x, *ends, *ends, levels=256)
            reader.get_node().input(0).replace_source_output(entered[key].output(0))
            reader.replace_source_output(weight.output(0))
