"""Layers that multiply integers, on their way to other runtimes: weights and inputs keep the grids that they have."""

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

WIDER = "integers of 4 bits take eight there"
FLOAT_SPEED = (
    "integers of 8 bits are multiplied exactly on every processor and no faster than floats: processor=vnni makes "
    "them faster where there is VNNI"
)


def check_stages(key: str, precision: str | None, before: list[Any]) -> None:
    """Raise UserError where the export ``key`` cannot keep what a stage ``before`` computes in integers."""
    for stage in before:
        if stage.leaves == "integer":
            scheme, dynamic = getattr(stage, "scheme", Scheme(8)), getattr(stage, "dynamic", False)
            check_support(key, precision, f"{stage.key}.", scheme, dynamic)


def check_support(key: str, precision: str | None, stage: str, scheme: Scheme, dynamic: bool) -> None:
    if precision is not None:
        raise UserError(
            f"{key}.precision={precision} would give up the integers and ranges that a stage before has found: set "
            f"{key}.precision=null to keep them, or leave that stage out."
        )
    if dynamic:
        raise UserError(
            f"`{key.rpartition('.')[2]}` can keep a range for every layer and {stage}dynamic=true gives every token "
            f"its own: set {stage}dynamic=false, or leave that stage out and set {key}.precision=int8_dynamic, where "
            "every batch has its own."
        )
    if scheme.group_size != -1:
        raise UserError(
            f"`{key.rpartition('.')[2]}` multiplies integers that share a scale along a row and "
            f"{stage}group_size={scheme.group_size} gives a row several: set {stage}group_size=-1."
        )


def find_quantized_layers(model: nn.Module, key: str, precision: str | None) -> dict[str, Quantized]:
    """How the layers whose inputs are quantized compute, by name; none where all inputs are floats.

    Raises:
        UserError: the export ``key`` cannot keep that.
    """
    found: dict[str, Quantized] = {
        name: module.quantized
        for name, module in model.named_modules()
        if isinstance(getattr(module, "quantized", None), Quantized)
    }
    for one in found.values():
        check_support(key, precision, "", one.scheme, one.inputs is not None and one.inputs.grid is None)
    return found


@contextmanager
def suspend_quantization(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """With inputs of the layers left as they are, so that the graph that is traced has nothing but products there."""
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


def describe_limits(found: dict[str, Quantized], wide: bool) -> str:
    """What an export of the layers ``found`` cannot do for size or speed; with ``wide`` their products are those of
    :func:`has_wide_weights`."""
    limits = {WIDER: any(one.scheme.bits < 8 for one in found.values()), FLOAT_SPEED: wide}
    return ", and ".join(limit for limit, holds in limits.items() if holds)


def has_wide_weights(model: nn.Module, found: dict[str, Quantized]) -> bool:
    """Return whether sums of products by the weights of the layers ``found`` can saturate without VNNI."""
    return any(abs(weight_integers(model.get_submodule(name), layer)).max() > WIDEST for name, layer in found.items())


def weight_integers(module: Any, layer: Quantized) -> np.ndarray:
    """What stands for the module's weight, which is on the layer's grid already, ``[rows, inputs]``."""
    return (module.weight.detach().float() / layer.grid.scale.float()).round().short().numpy()


def unsigned_grid(inputs: Inputs | None) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of the same grid as integers from 0 on, for which processors multiply fastest."""
    assert inputs is not None and inputs.grid is not None  # or it would have been refused
    scale, zero = inputs.grid
    return scale.float().numpy().reshape(()), (zero.short() - inputs.scheme.lowest).numpy().astype(np.uint8).reshape(())


def quantize_onnx_graph(graph: Any, model: nn.Module, found: dict[str, Quantized], unsigned: bool) -> None:
    """Quantize the graph's products by the weights of the layers ``found``, and what enters them, between
    ``QuantizeLinear`` and ``DequantizeLinear``: runtimes make integer products of that. Those by ``unsigned`` weights,
    the same ones with their zero at 128, are exact in ONNX Runtime on every processor, and no faster than floats."""
    from onnx import numpy_helper
    from onnx.helper import make_node

    lift, kind = (128, np.uint8) if unsigned else (0, np.int8)
    nodes: list[Any] = []
    stored: dict[str, np.ndarray] = {}
    entered: dict[Any, str] = {}
    done = set()
    for node in graph.node:
        name = find_layer(node, found)
        if name is None:
            nodes.append(node)
            continue
        layer, (scale, zero) = found[name], unsigned_grid(found[name].inputs)
        grid = node.input[0], scale.item(), zero.item()
        if grid not in entered:  # what enters query, key and value is rounded once
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
        bias = node.input[2:]  # of a Gemm, where a row is a text
        product = f"{node.output[0]}_product" if bias else node.output[0]
        nodes.append(make_node("MatMul", [entered[grid], weight], [product], node.name))
        if bias:
            nodes.append(make_node("Add", [product, *bias], node.output, f"{node.name}_bias"))
    assert done == found.keys(), f"no product of the graph is by {found.keys() - done}"
    used = {name for node in nodes for name in node.input}
    others = [one for one in graph.initializer if one.name in used]
    for part in ("node", "initializer"):
        graph.ClearField(part)
    graph.node.extend(nodes)
    graph.initializer.extend([*others, *(numpy_helper.from_array(one, name) for name, one in stored.items())])


def find_layer(node: Any, names: Iterable[str]) -> str | None:
    """The layer whose product the node is, which PyTorch names by the path of the module."""
    path, _, operation = node.name.replace("/", ".").removeprefix(".model.").rpartition(".")
    return path if path in names and re.fullmatch(r"(MatMul|Gemm)(_\d+)?", operation) else None


def quantize_openvino_graph(graph: Any, model: nn.Module, found: dict[str, Quantized]) -> None:
    """Quantize the graph's products by the weights of the layers ``found``, and what enters them, by ``FakeQuantize``,
    of which OpenVINO makes integer products."""
    from openvino import opset13 as ops

    constants = {node.get_friendly_name(): node for node in graph.get_ops() if node.get_type_name() == "Constant"}
    entered: dict[Any, Any] = {}
    for name, layer in found.items():
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
