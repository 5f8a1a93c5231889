"""Trace ONNX graphs, fuse them, and lower their precision by ONNX Runtime's tools and by ours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.exporting.tracing import prepare_trace, strip_config, use_plain_attention
from compress.formats import nbits
from compress.formats.nbits import Weight, build_lookup, build_product, round_rows, round_weight, share_table
from compress.formats.onnx import Graph
from compress.maths.rounding import Scheme
from compress.models.batches import Batch
from compress.models.families import find_conventions
from compress.models.layers import digest_tensor, evaluation_mode
from compress.models.matrices import Matrix
from compress.quiet import silence_exporters
from compress.runtimes.onnxruntime import PAST, PRESENT
from compress.runtimes.processor import Processor


def fuse_graph(source: Path, config: Any, embeddings: bool, whole: bool) -> Graph:
    """Return the graph with ONNX Runtime's fused operators: attention, layer norms, GELU.

    ``embeddings`` fuses the sum of BERT's embeddings too. ``whole`` fuses attention with its products by the weights of
    query, key and value.
    """
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_by_fusion

    graph = Graph(source)
    fusion = find_conventions(config).fusion
    options = FusionOptions(fusion)
    options.enable_rotary_embeddings = False  # it stores 131,072 positions, the same for all texts
    options.enable_embed_layer_norm = embeddings
    options.use_multi_head_attention = not whole
    heads, width = config.num_attention_heads, config.hidden_size
    even = width % heads == 0  # the optimizer's attention assumes so
    options.enable_attention = even and not graph.large  # it joins weights, which must be in memory for that
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


def set_heads(attention: Any, heads: int) -> None:
    (number,) = (attribute for attribute in attention.attribute if attribute.name == "num_heads")
    number.i = heads


def share_transposed(graph: Graph) -> None:
    """Store a matrix once if another is its transpose, as in an output layer that is tied to the embeddings."""
    import onnx

    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.INT8)
    matrices = [tensor for tensor in graph.tensors.values() if tensor.data_type in kinds and len(tensor.dims) == 2]
    seen: dict[tuple[bytes, torch.Size], str] = {}
    for matrix in matrices:
        name, weight = matrix.name, graph.read_tensor(matrix)
        if source := seen.get((digest_tensor(weight.T), weight.T.shape)):
            graph.initializer.remove(matrix)
            graph.nodes.insert(0, onnx.helper.make_node("Transpose", [source], [name], f"{name}_tied", perm=[1, 0]))
        else:
            seen[digest_tensor(weight), weight.shape] = name


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
) -> None:
    """Store the weights of the ``layers`` as integers, and round the inputs of their products to ``activations``.

    A layer of ``kept`` keeps its integers. Embeddings, and layers that are tied to them, are rounded to 8 bits, all
    others by ``scheme``.
    """
    import onnx

    # 1) Replace the nodes that read weights of the layers
    tensors, proto = graph.tensors, graph.proto.graph
    names = {digest_tensor(layer.weight): name for name, layer in layers.items()}
    tables: dict[str, str] = {}
    nodes: list[Any] = []
    for node in proto.node:
        factors = [names.get(digest_tensor(factor)) for factor in find_factors(node, graph, tensors)]
        if len(factors) != 1 or factors[0] is None:
            nodes.append(node)
            continue
        (name,), weight = factors, layers[factors[0]].weight.detach()
        if node.op_type == "Gather":
            new, lowered = build_lookup(node, round_rows(weight))
            tables[name] = node.input[0]
        else:
            if name in kept:
                rounded = kept[name]
            else:
                tied = isinstance(layers[name], nn.Embedding)
                rounded = round_rows(weight) if tied else round_weight(weight, scheme)
            new, lowered = build_product(node, rounded, weight.shape[1], activations)
            if name in tables:
                new, lowered = share_table(tables[name], new, lowered)
        nodes += new
        tensors |= {key: onnx.numpy_helper.from_array(array, key) for key, array in lowered.items()}
    # 2) Remove the tensors that no node reads any more
    used = {name for node in nodes for name in node.input}
    left = [tensor for name, tensor in tensors.items() if name in used]
    proto.ClearField("node")
    proto.ClearField("initializer")
    proto.node.extend(nodes)
    proto.initializer.extend(left)
    graph.declare_domain(nbits.DOMAIN)


def quantize_dynamic(graph: Graph, path: Path, layers: Iterable[Matrix], processor: Processor) -> None:
    """Write the graph with quantized weights of the ``layers``; their inputs are quantized at inference."""
    import onnx
    from onnxruntime import quantization

    nodes = find_nodes(graph, layers)
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


def quantize_static(
    source: Path, target: Path, layers: Iterable[Matrix], batches: list[Batch], processor: Processor
) -> None:
    """Quantize the weights of the ``layers``, and their inputs with scales that cover the inputs of all ``batches``."""
    from onnxruntime import quantization

    graph = Graph(source)

    class Batches(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{name: value.numpy() for name, value in batch.items()} for batch in batches])

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
        nodes_to_quantize=find_nodes(graph, layers),
        use_external_data_format=graph.large or graph.too_large,
    )


def find_nodes(graph: Graph, layers: Iterable[Matrix]) -> list[str]:
    """Return the names of the graph's nodes that multiply only by weights of the ``layers``."""
    chosen, tensors, names = {digest_tensor(layer.weight) for layer in layers}, graph.tensors, []
    for node in graph.nodes:
        weights = find_factors(node, graph, tensors) if node.op_type != "Gather" else []
        if weights and all(digest_tensor(weight) in chosen for weight in weights):
            names.append(node.name)
    return names


def find_factors(node: Any, graph: Graph, tensors: dict[str, Any]) -> list[Tensor]:
    """Return the weights ``[rows, inputs]`` of a product, or the table of a lookup; none for other nodes. A node of
    fused attention has three weights."""
    place = {"Gather": 0, "MatMul": 1, "Gemm": 1, "Attention": 1}.get(node.op_type)
    stored = tensors.get(node.input[place]) if place is not None else None
    if stored is None or len(stored.dims) != 2:
        return []
    weight = graph.read_tensor(stored)
    if node.op_type == "Gather" or any(attribute.name == "transB" and attribute.i for attribute in node.attribute):
        return [weight]
    return [part.T for part in weight.chunk(3 if node.op_type == "Attention" else 1, dim=1)]


SIZES = {0: "batch", 1: "length"}
"""Names of the dimensions of a batch, which may have any size."""


def export(model: Any, example: Batch, folder: Path) -> None:
    """Write the model's graph in float32 to ``folder``, for the runtime to load."""
    with evaluation_mode(model), silence_exporters(), TemporaryDirectory() as apart:
        traced = Path(apart) / "model.onnx"
        past = trace_graph(model, example, traced)
        graph = fuse_graph(traced, model.config, embeddings=True, whole=True)
        share_transposed(graph)
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
    outputs = {"logits": {0: "batch"} if "ForSequenceClassification" in type(model).__name__ else SIZES}
    outputs |= {name.replace(*PRESENT): {0: "batch", 2: "total"} for name in past}
    axes = {**dict.fromkeys(inputs, SIZES), **{name: {0: "batch", 2: "past"} for name in past}}
    if past:
        axes["attention_mask"] = {0: "batch", 1: "total"}
    with use_plain_attention(model):
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
    return {name: part[:1, :, :0] for name, part in past.items()}
