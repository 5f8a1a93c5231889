"""Trace ONNX graphs, fuse them, and lower their precision by ONNX Runtime's tools and by ours."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from compress.errors import UserError
from compress.exporting.tracing import (
    NEAR,
    prepare_trace,
    select_inputs,
    strip_config,
    use_plain_operators,
    vary_padding,
)
from compress.exporting.weights import Weights, digest_weight, find_factors
from compress.formats import nbits
from compress.formats.nbits import Weight, build_lookup, build_product, round_rows, round_weight, share_table
from compress.formats.onnx import Graph, inline_copies, rename_read
from compress.maths.rounding import Scheme
from compress.models.batches import Batch
from compress.models.families import find_conventions
from compress.models.layers import evaluation_mode
from compress.models.loading import join_lines
from compress.models.matrices import Matrix
from compress.quiet import silence_exporters
from compress.runtimes.onnxruntime import BESIDE, PAST, PRESENT
from compress.runtimes.processor import Processor

Feeds = list[dict[str, np.ndarray]]


def fuse_graph(source: Path, config: Any, embeddings: bool, whole: bool, feeds: Feeds) -> Graph:
    """Return the graph with ONNX Runtime's fused operators: attention, layer norms, GELU.

    The optimizer recognizes patterns of nodes, and takes those of a family that it does not know for others. So the
    fused graph must answer the ``feeds`` as the graph at ``source`` does: otherwise attention stays unfused, or all.

    ``embeddings`` fuses the sum of BERT's embeddings too. ``whole`` fuses attention with its products by the weights of
    query, key and value.
    """
    expected = run_graph(source, feeds)
    fused = source.with_name("fused.onnx")
    for attention in (True, False):
        # A library that fails on an unknown pattern has fused nothing.
        with contextlib.suppress(Exception):
            apply_fusions(source, config, embeddings, whole, attention).write(fused)
            if all(map(agree, run_graph(fused, feeds), expected)):
                return Graph(fused)
    return Graph(source)


def run_graph(path: Path, feeds: Feeds) -> list[np.ndarray]:
    """Return the logits for each of the ``feeds``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [session.run(["logits"], feed)[0] for feed in feeds]


def agree(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool(abs(ours - theirs).max() <= NEAR * abs(theirs).max())


def apply_fusions(source: Path, config: Any, embeddings: bool, whole: bool, attention: bool) -> Graph:
    """Return the graph at ``source`` with all patterns fused that the optimizer finds."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_by_fusion

    graph = Graph(source)
    fusion = find_conventions(config).fusion
    options = FusionOptions(fusion)
    options.enable_rotary_embeddings = False  # it stores 131,072 positions, the same for all texts
    options.enable_embed_layer_norm = embeddings
    # Joined weights would be stored beside those that blocks share.
    readers = Counter(node.input[1] for node in graph.nodes if node.op_type == "MatMul")
    repeated = any(readers[tensor.name] > 1 for tensor in graph.initializer)
    options.use_multi_head_attention = repeated or not whole
    heads, width = getattr(config, "num_attention_heads", 0), getattr(config, "hidden_size", 0)
    even = bool(heads) and width % heads == 0  # the optimizer's attention assumes so
    options.enable_attention = attention and even and not graph.large  # it joins weights, which needs them in memory
    with keep_inferred_shapes():
        graph.proto = optimize_by_fusion(
            graph.proto,
            model_type=fusion,
            num_heads=heads if even else 0,
            hidden_size=width if even else 0,
            optimization_options=options,
        ).model
    shapes = {name: tensor.dims for name, tensor in graph.tensors.items()}
    products = {name: node for node in graph.nodes for name in node.output}
    for node in graph.nodes:
        # The optimizer gives every block the config's number of heads, but a block may have fewer after pruning.
        if node.op_type == "Attention":
            set_heads(node, shapes[node.input[1]][1] // 3 // (width // heads))
        elif node.op_type == "MultiHeadAttention":
            set_heads(node, shapes[products[node.input[0]].input[1]][1] // (width // heads))
    graph.declare_domain(nbits.DOMAIN)
    return graph


@contextlib.contextmanager
def keep_inferred_shapes() -> Iterator[None]:
    """Make ONNX Runtime's optimizer infer the shapes of a graph again only after a fusion has added a tensor.

    It infers them before most patterns, which takes more time than all fusions. A fusion never gives the name of a
    tensor to a tensor of another shape.
    """
    from onnxruntime.transformers.onnx_model import OnnxModel

    infer = OnnxModel.infer_runtime_shape

    def infer_new(optimizer: Any, axes: Mapping[str, int] | None = None, update: bool = False) -> Any:
        shapes = optimizer.shape_infer_helper
        names = (name for node in optimizer.model.graph.node for name in node.output)
        if shapes and shapes.all_shapes_inferred_ and all(name in shapes.known_vi_ for name in names):
            return shapes
        return infer(optimizer, update=update)  # without sizes for axes, whose names are not those of our graphs

    OnnxModel.infer_runtime_shape = infer_new
    try:
        yield
    finally:
        OnnxModel.infer_runtime_shape = infer


def set_heads(attention: Any, heads: int) -> None:
    (number,) = (attribute for attribute in attention.attribute if attribute.name == "num_heads")
    number.i = heads


def share_equal(graph: Graph) -> None:
    """Store a tensor once if another is equal to it, as the weights of blocks that a model repeats, or if another is
    its transpose, as an output layer that is tied to the embeddings."""
    import onnx

    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    seen: dict[Any, str] = {}
    same: dict[str, str] = {}
    for tensor in list(graph.initializer):
        name, most = tensor.name, max(tensor.dims, default=1)
        if tensor.data_type not in kinds or most == 1 or name.endswith(BESIDE):
            continue
        values = graph.read_tensor(tensor)
        key = (tensor.data_type, *digest_weight(values))
        if source := seen.get(key):
            same[name] = source
        elif values.ndim == 2 and (source := seen.get((tensor.data_type, *digest_weight(values.T)))):
            graph.nodes.insert(0, onnx.helper.make_node("Transpose", [source], [name], f"{name}_tied", perm=[1, 0]))
        else:
            seen[key] = name
            continue
        graph.initializer.remove(tensor)
    rename_read(graph.proto.graph, same)
    graph.remove_unread()


def set_default_past(graph: Graph, past: Batch) -> None:
    """Make ``past`` the default of the graph's inputs for keys and values."""
    import onnx

    for name, part in past.items():
        graph.initializer.append(onnx.numpy_helper.from_array(part.numpy(), name))


def store_float16(graph: Graph) -> None:
    """Store the weights in float16. The runtime casts them to float32 once, when it loads the graph."""
    import onnx

    for stored in graph.initializer:
        if stored.data_type == onnx.TensorProto.FLOAT and len(stored.dims) == 2:
            name = stored.name
            half = graph.values(stored).astype(np.float16)
            stored.CopyFrom(onnx.numpy_helper.from_array(half, f"{name}_float16"))
            cast = onnx.helper.make_node("Cast", [stored.name], [name], f"{name}_cast", to=onnx.TensorProto.FLOAT)
            graph.nodes.insert(0, cast)


def lower_weights(
    graph: Graph, layers: Mapping[str, Matrix], kept: Mapping[str, Weight], scheme: Scheme, activations: str
) -> set[str]:
    """Store the weights of the ``layers`` as integers, round the inputs of their products to ``activations``, and
    return the names of the layers.

    A layer of ``kept`` keeps its integers. Embeddings, and layers that are tied to them, are rounded to 8 bits, all
    others by ``scheme``.
    """
    tensors, weights = graph.tensors, Weights(layers)
    tables: dict[str, str] = {}
    stored: dict[str, np.ndarray] = {}
    rounded: dict[str, Weight] = dict(kept)
    nodes: list[Any] = []
    found: set[str] = set()
    for node in graph.nodes:
        names = [weights.find(factor, node.name) for factor in find_factors(node, graph, tensors)]
        if len(names) != 1 or (name := names[0]) is None:
            nodes.append(node)
            continue
        weight = layers[name].weight.detach()
        found.add(name)
        if node.op_type == "Gather":
            new, lowered = build_lookup(node, round_rows(weight))
            tables[name] = node.input[0]
        else:
            if name not in rounded:
                rounded[name] = round_rows(weight) if layers[name].is_embedding else round_weight(weight, scheme)
            new, lowered = build_product(node, rounded[name], weight.shape[1], activations)
            if name in tables:
                new, lowered = share_table(tables[name], new, lowered)
        nodes += new
        stored |= lowered
    graph.replace(nodes, stored)
    graph.declare_domain(nbits.DOMAIN)
    return found


def quantize_dynamic(graph: Graph, path: Path, layers: Mapping[str, Matrix], processor: Processor) -> set[str]:
    """Write the graph with quantized weights of the ``layers``; their inputs are quantized at inference. Return the
    names of the layers."""
    import onnx
    from onnxruntime import quantization

    nodes, found = find_products(graph, layers)
    graph.load(math.inf)
    quantization.quantize_dynamic(
        graph.proto,
        path,
        per_channel=True,
        reduce_range=processor == "any",  # weights of 7 bits
        weight_type=quantization.QuantType.QInt8,  # unsigned weights are slower
        nodes_to_quantize=[*nodes, *(f"{name}_MatMul" for name in nodes)],  # the MatMul that a Gemm becomes
        use_external_data_format=graph.too_large,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # outputs of fused operators have none
    )
    return found


def quantize_static(
    source: Path, target: Path, layers: Mapping[str, Matrix], batches: list[Batch], processor: Processor
) -> set[str]:
    """Quantize the weights of the ``layers``, and their inputs with scales that cover the inputs of all ``batches``.
    Return the names of the layers."""
    from onnxruntime import quantization

    graph = Graph(source)
    nodes, found = find_products(graph, layers)

    class Batches(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(graph.select_feeds(batches))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    quantization.quantize_static(
        source,
        target,
        Batches(),
        per_channel=True,
        reduce_range=processor == "any",  # weights of 7 bits
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        nodes_to_quantize=nodes,
        use_external_data_format=graph.large or graph.too_large,
    )
    return found


def find_products(graph: Graph, layers: Mapping[str, Matrix]) -> tuple[list[str], set[str]]:
    """Return the names of the graph's nodes that multiply only by weights of the ``layers``, and the names of all
    layers that nodes multiply by: a node of fused attention stays in floats if one of its three weights does."""
    weights, tensors = Weights(layers), graph.tensors
    nodes: list[str] = []
    found: set[str] = set()
    for node in graph.nodes:
        factors = find_factors(node, graph, tensors) if node.op_type != "Gather" else []
        names = [name for factor in factors if (name := weights.find(factor, node.name))]
        found.update(names)
        if factors and len(names) == len(factors):
            nodes.append(node.name)
    return nodes, found


SIZES = {0: "batch", 1: "length"}
"""Names of the dimensions of a batch, which may have any size."""


def export(model: Any, example: Batch, folder: Path) -> None:
    """Write the model's graph in float32 to ``folder``, for the runtime to load."""
    example = select_inputs(example, model)
    with evaluation_mode(model), silence_exporters(), TemporaryDirectory() as apart:
        traced = Path(apart) / "model.onnx"
        past = trace_graph(model, example, traced)
        feeds = Graph(traced).select_feeds([{**batch, **past} for batch in vary_padding(example, bool(past))])
        graph = fuse_graph(traced, model.config, embeddings=True, whole=True, feeds=feeds)
        share_equal(graph)
        if past:
            set_default_past(graph, past)
        graph.write(folder / "model.onnx")
    strip_config(model).save_pretrained(folder)


@torch.no_grad()
def trace_graph(model: Any, example: Batch, path: Path) -> Batch:
    """Trace the model on the ``example`` and write its graph, for batches of any shape. Return the empty keys and
    values with which a decoder starts; nothing for other models."""
    module, inputs, parts = prepare_trace(model, example)
    past = {f"{PAST}{i // 2}.{('key', 'value')[i % 2]}": part for i, part in enumerate(parts)}
    by_token = model(**example).logits.ndim == 3
    outputs = {"logits": SIZES if by_token else {0: "batch"}}
    outputs |= {name.replace(*PRESENT): {0: "batch", 2: "total"} for name in past}
    axes = {**dict.fromkeys(inputs, SIZES), **{name: {0: "batch", 2: "past"} for name in past}}
    if past and "attention_mask" in inputs:
        axes["attention_mask"] = {0: "batch", 1: "total"}
    with use_plain_operators(model, example):
        try:
            torch.onnx.export(
                module.eval(),  # the exporter leaves the model in the mode of this module
                (*inputs.values(), *past.values()),
                str(path),  # not a file object, which takes only small graphs
                input_names=[*inputs, *past],
                output_names=list(outputs),
                dynamic_axes={**axes, **outputs},
                opset_version=17,
                dynamo=False,  # the other exporter's graph is not fused
            )
        except (torch.onnx.errors.OnnxExporterError, AssertionError) as error:  # as for Cohere's rotary positions
            raise UserError(
                f"PyTorch's exporter cannot write a `{model.config.model_type}` as an ONNX graph "
                f"({join_lines(error)[:160]}). Set technique=openvino."
            ) from error
    inline_copies(path)
    return {name: part[:1, :, :0] for name, part in past.items()}
