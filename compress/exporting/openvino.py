"""Build OpenVINO graphs: convert, quantize, and keep the integers of earlier stages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.exporting.tracing import prepare_trace, select_inputs, strip_config, write_experts
from compress.exporting.weights import find_constants, multiply_by_rows
from compress.formats.packed import Integers
from compress.models.batches import Batch
from compress.models.layers import evaluation_mode
from compress.models.matrices import Matrix
from compress.quiet import silence_exporters
from compress.runtimes.openvino import GRAPH, SCALE, SETTINGS, ZERO, find_readers
from compress.runtimes.processor import Processor

ARITHMETIC = {
    # By default OpenVINO rounds the inputs of integer weights, and keys and values, to 8 bits.
    name: {"INFERENCE_PRECISION_HINT": kind, "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": kind}
    for name, kind in (("fp32", "f32"), ("fp16", "f32"), ("bf16", "bf16"))
}
"""OpenVINO's settings for the arithmetic of each precision; the others use its defaults."""
FLOAT_PRODUCTS = {"LP_TRANSFORMS_MODE": "NO"}
"""Settings that multiply quantized values as floats, so that no sum of 8-bit products saturates."""


def export(model: Any, example: Batch, folder: Path) -> None:
    """Write the model's graph in float32 to ``folder``, for the runtime to load."""
    import openvino

    with evaluation_mode(model), silence_exporters():
        graph = convert_to_graph(model, select_inputs(example, model))
        openvino.save_model(graph, folder / GRAPH, compress_to_fp16=False)
    (folder / SETTINGS).write_text(json.dumps(ARITHMETIC["fp32"]), encoding="utf-8")
    strip_config(model).save_pretrained(folder)


@torch.no_grad()
def convert_to_graph(model: Any, example: Batch) -> Any:
    """Return the graph of the model, traced on the ``example``, for batches of any shape."""
    import openvino
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    module, inputs, past = prepare_trace(model, example)
    with write_experts(model):
        # The graph is compared with the model later; PyTorch's own check would trace it a second time.
        unchecked = {"check_trace": False}
        traced = TorchScriptPythonDecoder(
            module.eval(), example_input=(*inputs.values(), *past), trace_kwargs=unchecked
        )
        graph = openvino.convert_model(traced)
    before, after = ([f"{when}.{i}" for i in range(len(past))] for when in ("before", "after"))
    for name, port in zip((*inputs, *before, "logits", *after), (*graph.inputs, *graph.outputs)):
        port.get_tensor().set_names({name})
    if past:
        make_stateful(graph, dict(zip(before, after)), [part.shape for part in past])
    unmask_padding(graph)
    return graph.clone()  # without nodes that no output depends on, which NNCF stumbles over


def make_stateful(graph: Any, names: dict[str, str], shapes: list[torch.Size]) -> None:
    """Turn the inputs and outputs in ``names`` into a state, which starts empty, for any number of texts."""
    from openvino import PartialShape
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    for name, shape in zip(names, shapes):
        graph.input(name).get_node().set_partial_shape(PartialShape([-1, shape[1], -1, shape[3]]))
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, names)
    texts = ops.gather(ops.shape_of(graph.input("input_ids").get_node(), output_type="i64"), [0], 0)
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            shape = node.get_output_partial_shape(0)
            rest = ops.constant(np.array([shape[1].get_length(), 0, shape[3].get_length()]))
            node.set_arguments([ops.broadcast(ops.constant(np.float32(0)), ops.concat([texts, rest], 0))])
    graph.validate_nodes_and_infer_types()


def unmask_padding(graph: Any) -> None:
    """Let padding attend to everything where it has nothing to attend to: before a text, or further from it than a
    window of attention is wide. OpenVINO would compute nan for it, and then for the text."""
    from openvino import opset13 as ops

    masks: dict[tuple[str, int], Any] = {}  # usually one for all blocks
    for node in graph.get_ops():
        if node.get_type_name() != "ScaledDotProductAttention" or node.get_input_size() < 4:
            continue
        mask = node.input_value(3)
        if mask.get_element_type().is_real():  # added to the scores, and finite
            continue
        source = mask.get_node().get_name(), mask.get_index()
        if source not in masks:
            nothing = ops.logical_not(ops.reduce_logical_or(mask, ops.constant(-1), True))
            masks[source] = ops.logical_or(mask, nothing)
        node.input(3).replace_source_output(masks[source].output(0))
    graph.validate_nodes_and_infer_types()


def keep_integers(graph: Any, kept: dict[str, Integers], layers: Mapping[str, Matrix]) -> set[str]:
    """Replace the float weights of the layers ``kept`` by their integers, in the pattern that OpenVINO multiplies
    without converting all of them to floats, and return their names. It converts integers of 3 bits when it loads
    them."""
    done = set()
    for dense, name, _ in find_constants(graph, {name: layers[name] for name in kept}):
        weight = build_weight(kept[name], dense.get_friendly_name())
        for product in find_readers(dense):
            multiply_by_rows(product, product.input_value(0), weight)
        done.add(name)
    return done


def build_weight(weight: Integers, name: str) -> Any:
    """Return the node that computes a weight ``[rows, inputs]`` from its integers, stored as ``name``."""
    from openvino import Type
    from openvino import opset13 as ops

    scheme, integers, grid = weight
    shape = integers.shape
    signed = scheme.symmetric and scheme.bits in (4, 8)  # OpenVINO's other integers are unsigned
    lift, to = (0, np.int8) if signed else (-scheme.lowest, np.uint8)
    kind = getattr(Type, f"{'i' if signed else 'u'}{scheme.bits}")
    scale, zero = grid.scale, grid.zero[:1, :1] if scheme.symmetric else grid.zero
    if grouped := scale.shape[1] > 1:
        integers, scale, zero = integers.unflatten(1, (scale.shape[1], -1)), scale[..., None], zero[..., None]

    def stored(values: Tensor, ends: str = "") -> Any:
        constant = ops.constant((values.short() + lift).numpy().astype(to), dtype=kind)
        constant.set_friendly_name(f"{name}{ends}")
        return ops.convert(constant, "f32")

    node = stored(integers)
    if not signed:
        node = ops.subtract(node, stored(zero, ZERO))
    scales = ops.constant(scale.float().numpy())
    scales.set_friendly_name(f"{name}{SCALE}")
    node = ops.multiply(node, scales)
    return ops.reshape(node, ops.constant(np.array(shape)), False) if grouped else node


def find_other_readers(graph: Any, layers: Mapping[str, Matrix]) -> tuple[list[str], set[str]]:
    """Return the names of the graph's products and lookups whose weight does not belong to the ``layers``, and the
    names of the layers whose weights are in the graph."""
    chosen = find_constants(graph, layers)
    names = {node.get_friendly_name() for node, _, _ in chosen}
    constants = [node for node in graph.get_ops() if node.get_type_name() == "Constant"]
    others = [node for node in constants if node.get_element_type().is_real() and node.get_friendly_name() not in names]
    readers = [reader for node in others for reader in find_readers(node)]
    return (
        [reader.get_friendly_name() for reader in readers if reader.get_type_name() in ("MatMul", "Gather")],
        {layer for _, layer, _ in chosen},
    )


def find_activation_products(graph: Any) -> list[str]:
    """Return the names of the graph's nodes that multiply activations by each other."""
    names = []
    for node in graph.get_ops():
        sources = [node.input_value(i).get_node().get_type_name() for i in range(node.get_input_size())]
        if node.get_type_name() == "ScaledDotProductAttention" or (
            node.get_type_name() == "MatMul" and "Constant" not in sources
        ):
            names.append(node.get_friendly_name())
    return names


def find_tied_products(graph: Any) -> dict[str, str]:
    """Return the names of the graph's nodes that multiply by a table, with the name of the node that looks up its
    rows."""
    names: dict[str, str] = {}
    for node in graph.get_ops():
        if node.get_type_name() == "Gather":
            readers = find_readers(node.input_value(0).get_node())
            products = [reader for reader in readers if reader.get_type_name() == "MatMul"]
            names |= {product.get_friendly_name(): node.get_friendly_name() for product in products}
    return names


def quantize_graph(
    graph: Any, batches: list[Batch], left: list[str], processor: Processor, accuracy: dict[str, Any]
) -> Any:
    """Quantize weights and activations, with scales for the activations from the ``batches``.

    The nodes ``left`` stay floats, and so do more nodes if ``accuracy``, NNCF's arguments, limits the drop. With
    ``processor=any`` weights have 7 bits. Products of activations, and by embeddings that the output layer shares,
    cannot have 7 bits: their inputs stay floats.
    """
    import nncf

    tied = find_tied_products(graph) if processor == "any" else {}
    left = [*left, *(find_activation_products(graph) if processor == "any" else ()), *tied]
    overflow = nncf.OverflowFix.ENABLE if processor == "any" else nncf.OverflowFix.DISABLE
    advanced = nncf.AdvancedQuantizationParameters(overflow_fix=overflow)
    quantize, name = nncf.quantize, "advanced_parameters"
    if accuracy:
        quantize, name = nncf.quantize_with_accuracy_control, "advanced_quantization_parameters"
    quantized = quantize(
        graph,
        nncf.Dataset([to_arrays(batch) for batch in batches]),
        subset_size=len(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        ignored_scope=nncf.IgnoredScope(names=left),
        **{name: advanced},
        **accuracy,
    )
    nodes = {node.get_friendly_name(): node for node in quantized.get_ops()}
    # Multiply by the integers of the table in place of a copy in floats, unless NNCF has measured the drop with floats.
    for product, lookup in tied.items() if not accuracy else ():
        nodes[product].input(1).replace_source_output(nodes[lookup].input_value(0))
    return quantized


def to_arrays(batch: Batch) -> dict[str, np.ndarray]:
    """Return the inputs of a graph for OpenVINO."""
    return {name: value.numpy() for name, value in batch.items()}


def quantize_weights(graph: Any, precision: str, group_size: int, left: list[str]) -> Any:
    """Quantize weights only; the nodes ``left`` keep their floats."""
    import nncf

    four = {"group_size": group_size, "backup_mode": nncf.BackupMode.INT8_SYM} if precision == "int4_weights" else {}
    mode = nncf.CompressWeightsMode.INT4_SYM if four else nncf.CompressWeightsMode.INT8_SYM
    return nncf.compress_weights(graph, mode=mode, ignored_scope=nncf.IgnoredScope(names=left), **four)


def store_float16(graph: Any, but: Mapping[str, Matrix]) -> None:
    """Store the weights in float16, except those of the layers ``but``. (OpenVINO's own function would also round the
    angles of positions, which need more digits.)"""
    import openvino

    left = {node.get_friendly_name() for node, _, _ in find_constants(graph, but)}
    for stored in graph.get_ops():
        if stored.get_type_name() != "Constant" or stored.get_friendly_name() in left:
            continue
        if stored.get_element_type().is_real() and len(stored.shape) == 2:
            half = openvino.opset13.constant(stored.data.astype(np.float16))
            readers = stored.output(0).get_target_inputs()
            whole = openvino.opset13.convert(half, "f32")
            for reader in readers:
                reader.replace_source_output(whole.output(0))
