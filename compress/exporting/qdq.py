"""Export layers that multiply integers: weights and inputs keep their grids in other runtimes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from compress.errors import UserError
from compress.exporting.weights import (
    Weights,
    find_constants,
    find_factors,
    multiply_by_rows,
)
from compress.formats.onnx import Graph
from compress.formats.packed import Quantized
from compress.maths.rounding import Inputs, Integers, Scheme
from compress.models.matrices import Matrix
from compress.runtimes.openvino import SCALE, find_readers
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
            check_support(key, precision, f"{stage.key}.", stage.scheme, getattr(stage, "dynamic", False))


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


def has_wide_weights(quantized: dict[str, Quantized]) -> bool:
    """Return whether sums of products by the weights of the ``quantized`` layers can saturate without VNNI."""
    return any(how.weight.integers.short().abs().max() > WIDEST for how in quantized.values())


def unsigned_grid(inputs: Inputs | None) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and zero point of the same grid for integers from 0 to 255, which processors multiply fastest."""
    assert inputs is not None and inputs.grid is not None  # `check_support` refuses other layers
    scale, zero = inputs.grid
    return scale.float().numpy().reshape(()), (zero.short() - inputs.scheme.lowest).numpy().astype(np.uint8).reshape(())


def quantize_onnx_graph(
    graph: Graph, layers: Mapping[str, Matrix], quantized: dict[str, Quantized], unsigned: bool
) -> set[str]:
    """Quantize the products by the weights of the ``quantized`` layers, and their inputs, by pairs of
    ``QuantizeLinear`` and ``DequantizeLinear``, which runtimes turn into integer products. Return the names of the
    layers.

    ``unsigned`` shifts the zero of the weights to 128. These products are exact in ONNX Runtime on every processor, but
    no faster than floats.
    """
    from onnx.helper import make_node

    weights, tensors = Weights({name: layers[name] for name in quantized}), graph.tensors
    nodes: list[Any] = []
    stored: dict[str, np.ndarray] = {}
    entered: dict[Any, str] = {}
    done: set[str] = set()
    for node in graph.nodes:
        factors = find_factors(node, graph, tensors) if node.op_type in ("MatMul", "Gemm") else []
        name = weights.find(factors[0], node.name) if factors else None
        if name is None:
            nodes.append(node)
            continue
        how, bias = quantized[name], node.input[2:]
        scale, zero = unsigned_grid(how.inputs)
        grid = node.input[0], scale.item(), zero.item(), bool(bias)
        x, weight, axis = f"{node.name}.input", f"{name}.weight_rounded", f"{node.name}.axis"
        if grid not in entered:  # query, key and value share their input: it is rounded once
            bounds = {f"{x}_scale": scale, f"{x}_zero_point": zero}
            # A Gemm's rows get an axis of texts: ONNX Runtime multiplies two axes in floats, and rounds their bias.
            source = f"{x}_rows" if bias else node.input[0]
            nodes += [make_node("Unsqueeze", [node.input[0], axis], [source], f"{x}_unsqueeze")] if bias else []
            nodes.append(make_node("QuantizeLinear", [source, *bounds], [f"{x}_quantized"], f"{x}_quantize"))
            nodes.append(make_node("DequantizeLinear", [f"{x}_quantized", *bounds], [x], f"{x}_dequantize"))
            stored |= bounds
            entered[grid] = x
        if name not in done:
            parts = store_weight(weight, how.weight, unsigned)
            nodes.append(make_node("DequantizeLinear", list(parts), [weight], f"{weight}_dequantize", axis=1))
            stored |= parts
        done.add(name)
        product, whole = (f"{node.name}.{part}" if bias else node.output[0] for part in ("product", "sum"))
        nodes.append(make_node("MatMul", [entered[grid], weight], [product], node.name))
        if bias:
            nodes.append(make_node("Add", [product, *bias], [whole], f"{node.name}_bias"))
            nodes.append(make_node("Squeeze", [whole, axis], node.output, f"{node.name}_squeeze"))
            stored[axis] = np.array([0])
    graph.replace(nodes, stored)
    return done


def store_weight(name: str, weight: Integers, unsigned: bool) -> dict[str, np.ndarray]:
    """Return the integers ``[inputs, rows]`` of a layer's weight, their scales and their zero points by name; each
    begins with ``name``."""
    lift, kind = (128, np.uint8) if unsigned else (0, np.int8)
    return {
        f"{name}_quantized": (weight.integers.short().numpy().T + lift).astype(kind),
        f"{name}_scale": weight.grid.scale.float().numpy()[:, 0],
        f"{name}_zero_point": (weight.grid.zero.short().numpy()[:, 0] + lift).astype(kind),
    }


def quantize_openvino_graph(graph: Any, layers: Mapping[str, Matrix], quantized: dict[str, Quantized]) -> set[str]:
    """Quantize the products by the weights of the ``quantized`` layers, and their inputs by ``FakeQuantize``. OpenVINO
    turns these into integer products. Return the names of the layers."""
    from openvino import opset13 as ops

    entered: dict[Any, Any] = {}
    done: set[str] = set()
    for dense, name, _ in find_constants(graph, {name: layers[name] for name in quantized}):
        how = quantized[name]
        stored = ops.constant(how.weight.integers.numpy())
        stored.set_friendly_name(dense.get_friendly_name())
        scales = ops.constant(how.grid.scale.float().numpy())
        scales.set_friendly_name(f"{dense.get_friendly_name()}{SCALE}")
        weight = ops.multiply(ops.convert(stored, "f32"), scales)
        scale, zero = unsigned_grid(how.inputs)
        low, high = ((end - zero.item()) * scale.item() for end in (0, 255))
        for product in find_readers(dense):
            x = product.input_value(0)
            key = (x.get_node().get_friendly_name(), x.get_index(), low, high)
            if key not in entered:
                entered[key] = round_inputs(x, low, high)
            multiply_by_rows(product, entered[key].output(0), weight)
        done.add(name)
    return done


def round_inputs(x: Any, low: float, high: float) -> Any:
    """Return the OpenVINO node that rounds ``x`` to one of 256 numbers from ``low`` to ``high``.

    OpenVINO folds the factors of a norm before ``FakeQuantize`` into its range, and takes those of the first channel
    for all if ``x`` is ``[tokens, channels]``, without texts. A third axis between both keeps them apart.
    """
    from openvino import opset13 as ops

    ends = [ops.constant(np.float32(end)) for end in (low, high)]
    if len(x.get_partial_shape()) != 2:
        return ops.fake_quantize(x, *ends, *ends, levels=256)
    first = ops.constant(0)
    return ops.squeeze(ops.fake_quantize(ops.unsqueeze(x, first), *ends, *ends, levels=256), first)
