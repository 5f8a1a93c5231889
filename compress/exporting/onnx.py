"""ONNX graphs fused, and brought into lower precision by ONNX Runtime's tools and by ours."""

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
from compress.models.calibration import Batch
from compress.models.families import find_conventions
from compress.models.layers import Layer, digest_tensor, evaluation_mode
from compress.quiet import silence_exporters
from compress.runtimes.onnxruntime import PAST, PRESENT
from compress.runtimes.processor import Processor


def fuse_graph(source: Path, config: Any, embeddings: bool, whole: bool) -> Graph:
    """The graph with what ONNX Runtime has an operator for: attention, together with its ``whole`` products by query,
    key and value or apart from them, layer norms, GELU, the sum of BERT's ``embeddings``."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_by_fusion

    graph = Graph(source)
    fusion = find_conventions(config).fusion
    options = FusionOptions(fusion)
    options.enable_rotary_embeddings = False  # a table of 131,072 positions, and one row of them for all texts
    options.enable_embed_layer_norm = embeddings
    options.use_multi_head_attention = not whole
    heads, width = config.num_attention_heads, config.hidden_size
    even = width % heads == 0  # what the optimizer's attention takes for granted
    options.enable_attention = even and not graph.large  # it would join weights, which must be there for that
    graph.proto = optimize_by_fusion(
        graph.proto,
        model_type=fusion,
        num_heads=heads if even else 0,
        hidden_size=width if even else 0,
        optimization_options=options,
    ).model
    shapes = {name: one.dims for name, one in graph.tensors.items()}
    products = {name: node for node in graph.nodes for name in node.output}
    for node in graph.nodes:
        # The optimizer gives every block the config's number of heads, and some may have been cut.
        if node.op_type == "Attention":
            set_heads(node, shapes[node.input[1]][1] // 3 // (width // heads))
        elif node.op_type == "MultiHeadAttention":
            set_heads(node, shapes[products[node.input[0]].input[1]][1] // (width // heads))
    graph.declare_domain(nbits.DOMAIN)
    return graph


def set_heads(attention: Any, heads: int) -> None:
    (attribute,) = (one for one in attention.attribute if one.name == "num_heads")
    attribute.i = heads


def share_transposed(graph: Graph) -> None:
    """Leave out weights that are others transposed: those of an output layer that is tied to the embeddings."""
    import onnx

    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.INT8)
    matrices = [one for one in graph.tensors.values() if one.data_type in kinds and len(one.dims) == 2]
    seen: dict[tuple[bytes, torch.Size], str] = {}
    for one in matrices:
        name, weight = one.name, graph.read_tensor(one)
        if source := seen.get((digest_tensor(weight.T), weight.T.shape)):
            graph.initializer.remove(one)
            graph.nodes.insert(0, onnx.helper.make_node("Transpose", [source], [name], f"{name}_tied", perm=[1, 0]))
        else:
            seen[digest_tensor(weight), weight.shape] = name


def set_default_past(graph: Graph, past: Batch) -> None:
    """Let the graph take ``past`` where it is given nothing else."""
    import onnx

    for name, part in past.items():
        graph.initializer.append(onnx.numpy_helper.from_array(part.numpy(), name))


def store_float16(graph: Graph) -> None:
    """Store the weights in float16; they are cast to float32 once, when the graph is loaded."""
    import onnx

    for stored in graph.initializer:
        if stored.data_type == onnx.TensorProto.FLOAT and len(stored.dims) == 2:
            name = stored.name
            half = graph.values(stored).astype(np.float16)
            stored.CopyFrom(onnx.numpy_helper.from_array(half, f"{name}_float16"))
            cast = onnx.helper.make_node("Cast", [stored.name], [name], f"{name}_cast", to=onnx.TensorProto.FLOAT)
            graph.nodes.insert(0, cast)


def lower_weights(
    graph: Graph, layers: Mapping[str, Layer], kept: Mapping[str, Weight], scheme: Scheme, activations: str
) -> None:
    """Store the ``layers``' weights as integers: as they are ``kept``, or rounded by the ``scheme``, or embeddings and
    what is tied to them in 8 bits. What multiplies by them rounds its inputs to the type of the ``activations``."""
    import onnx

    tensors, proto = graph.tensors, graph.proto.graph
    names = {digest_tensor(layer.weight): name for name, layer in layers.items()}
    tables: dict[str, str] = {}
    nodes: list[Any] = []
    for node in proto.node:
        found = [names.get(digest_tensor(one)) for one in find_factors(node, graph, tensors)]
        if len(found) != 1 or found[0] is None:
            nodes.append(node)
            continue
        (name,), weight = found, layers[found[0]].weight.detach()
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
        tensors |= {key: onnx.numpy_helper.from_array(one, key) for key, one in lowered.items()}
    used = {name for node in nodes for name in node.input}
    left = [one for name, one in tensors.items() if name in used]
    proto.ClearField("node")
    proto.ClearField("initializer")
    proto.node.extend(nodes)
    proto.initializer.extend(left)
    graph.declare_domain(nbits.DOMAIN)


def quantize_dynamic(graph: Graph, path: Path, layers: Iterable[Layer], processor: Processor) -> None:
    """Write the graph with the ``layers``' weights, and their inputs as they come, quantized."""
    import onnx
    from onnxruntime import quantization

    nodes = find_nodes(graph, layers)
    graph.load(math.inf)
    quantization.quantize_dynamic(
        graph.proto,
        path,
        per_channel=True,
        reduce_range=processor == "any",  # weights of 7 bits
        weight_type=quantization.QuantType.QInt8,  # unsigned ones are slower
        nodes_to_quantize=[*nodes, *(f"{name}_MatMul" for name in nodes)],  # what it makes of a Gemm first
        use_external_data_format=graph.too_large,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # of what fused operators give, which nothing says
    )


def quantize_static(
    source: Path, target: Path, layers: Iterable[Layer], batches: list[Batch], processor: Processor
) -> None:
    """Quantize the ``layers``' weights, and their inputs on scales that hold those of all ``batches``."""
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


def find_nodes(graph: Graph, layers: Iterable[Layer]) -> list[str]:
    """The names of the graph's nodes that multiply by weights of some of the ``layers`` and no others."""
    chosen, tensors, found = {digest_tensor(layer.weight) for layer in layers}, graph.tensors, []
    for node in graph.nodes:
        weights = find_factors(node, graph, tensors) if node.op_type != "Gather" else []
        if weights and all(digest_tensor(one) in chosen for one in weights):
            found.append(node.name)
    return found


def find_factors(node: Any, graph: Graph, tensors: dict[str, Any]) -> list[Tensor]:
    """The weights ``[rows, inputs]`` that the node multiplies by, three where it is all of attention, or the table in
    which it looks up rows; none if it does neither."""
    place = {"Gather": 0, "MatMul": 1, "Gemm": 1, "Attention": 1}.get(node.op_type)
    stored = tensors.get(node.input[place]) if place is not None else None
    if stored is None or len(stored.dims) != 2:
        return []
    weight = graph.read_tensor(stored)
    if node.op_type == "Gather" or any(one.name == "transB" and one.i for one in node.attribute):
        return [weight]
    return [one.T for one in weight.chunk(3 if node.op_type == "Attention" else 1, dim=1)]


SIZES = {0: "batch", 1: "length"}


def export(model: Any, example: Batch, folder: Path) -> None:
    """Write the model's graph in float32, as the runtime loads it."""
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
    """Write the graph that PyTorch runs for the ``example``, for batches of any shape. Gives what it takes for the keys
    and values of earlier tokens where there are none; nothing if it takes none."""
    module, inputs, parts = prepare_trace(model, example)
    past = {f"{PAST}{i // 2}.{('key', 'value')[i % 2]}": part for i, part in enumerate(parts)}
    outputs = {"logits": {0: "batch"} if "ForSequenceClassification" in type(model).__name__ else SIZES}
    outputs |= {name.replace(*PRESENT): {0: "batch", 2: "total"} for name in past}
    axes = {**dict.fromkeys(inputs, SIZES), **{name: {0: "batch", 2: "past"} for name in past}}
    if past:
        axes["attention_mask"] = {0: "batch", 1: "total"}
    with use_plain_attention(model):
        torch.onnx.export(
            module.eval(),  # in whose mode the exporter leaves the model
            (*inputs.values(), *past.values()),
            str(path),  # of any other kind PyTorch asks that it be small
            input_names=[*inputs, *past],
            output_names=list(outputs),
            dynamic_axes={**axes, **outputs},
            opset_version=17,
            dynamo=False,  # the other exporter's graph is not fused
        )
    return {name: part[:1, :, :0] for name, part in past.items()}
