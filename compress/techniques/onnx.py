"""Export to ONNX, in full or lower precision, for ONNX Runtime."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from pydantic import Field, validate_call
from torch import Tensor, nn

from compress import bnb, nbits, packing, qdq
from compress.calibration import Batch, calibration_batches
from compress.errors import UserError
from compress.exchange import (
    Export,
    inputs_of,
    is_float32,
    on_validation_text,
    plain_attention,
    plain_config,
    to_trace,
)
from compress.models import Layer, compressed, evaluating
from compress.nbits import Weight
from compress.packing import Integers
from compress.promises import digest
from compress.quantization import Scheme
from compress.quiet import muted
from compress.runtimes.onnxruntime import PAST, PRESENT, Model
from compress.techniques import trait

KEY = "technique.onnx"
FP16 = "the weights are turned back into float32 when they are loaded: less to store, no speed there"
FLOATS = "4-bit floats become floats again at every call: less to store, slower than floats"
THREE = "an integer of 3 bits takes four there"
UNPACKED = "the integers of the stages before are floats again: precision=null keeps them"
SIZES = {0: "batch", 1: "length"}
LARGEST = 2**31 - 2**20
"""Bytes that a file in ONNX's format holds; the tensors of a larger model lie beside it."""


class Onnx(Export):
    """Export the model as an ONNX graph, for any number and length of texts, that runs without PyTorch.

    Works when the fit ends; the model itself stays as it is, on the CPU in float32 (bitsandbytes' layers become plain
    ones of the same values). The graph is traced with plain attention, which ONNX Runtime's transformer optimizer fuses
    into one operator where it knows the architecture (BERT and its relatives). That of a causal language model gives
    the logits of every position, and takes and gives keys and values of each block as well (``past_key_values.0.key``
    and ``present.0.key``, under Optimum's names): without them it scores texts, with them it decodes token by token.

    - None, the default: what the chain left. Floats stay float32; weights that ``gptq``, ``awq``, ``mixed``, ``int8``
      or ``nf4`` have rounded stay the very numbers that they are, in ONNX Runtime's operators for few bits; integers
      that meet quantized inputs, by ``qat`` or ``w8a8`` with ``dynamic=False``, stay too, and so do the ranges of the
      inputs. (That graph is not fused.)
    - ``fp32``: all as float32. ``fp16``: weights in float16, arithmetic in float32, for which CPUs are made.
    - ``int8_dynamic``: weights as signed integers with a scale for every output, inputs rounded as they come.
    - ``int8_static``: inputs too on scales found beforehand, on the first ``samples`` examples of the datamodule's
      ``calibration`` or else of the training loader. The graph is not fused: ONNX Runtime would run it in floats.
    - ``int4``: weights as integers of 4 bits with a scale for every ``block_size`` inputs, rounded to the nearest;
      those that a stage before has rounded are kept.

    Embeddings are stored by ``int8_*`` and ``int4`` as 8-bit integers with a scale for every token, an output layer
    that is tied to them likewise, and only once. Jacob et al., "Quantization and Training of Neural Networks for
    Efficient Integer-Arithmetic-Only Inference", 2018, arXiv:1712.05877.

    Args:
        precision: of the graph.
        block_size: inputs that share a scale in ``int4``.
        symmetric: integers of ``int4`` around zero, no zero points stored.
        activations: what they are when they meet weights of ``int4`` or kept ones: ``int8``, rounded as they come, for
            which ONNX Runtime is fast, or ``float32``, with which 2 and 8 bits are many times slower than floats.
        samples: training examples (for a language model, blocks of tokens) that ``int8_static`` calibrates on.
        skip: what integers leave in floats: ``embeddings``, ``head`` (all else outside the transformer blocks) and
            patterns of layers' names. Where int8 fuses query, key and value, one of them left leaves all three.
        source: the folder of the artifact that the model was loaded from, for the integers in it.

    Raises:
        UserError: a pattern fits no layer, no layer is left, or a stage before has groups that fit no block.

        pl.Trainer(max_epochs=1, callbacks=[Onnx(precision="int8_dynamic")]).fit(module, loader)
    """

    needs = (*Export.needs, "bitsandbytes")
    leaves = "onnx"
    runtime = "onnxruntime"
    packages = ("onnx", "onnxruntime")
    key = KEY
    rounds = ("int8_dynamic", "int8_static")

    @validate_call
    def __init__(
        self,
        precision: Literal["fp32", "fp16", "int8_dynamic", "int8_static", "int4"] | None = None,
        block_size: Literal[16, 32, 64, 128, 256] = 32,
        symmetric: bool = True,
        activations: Literal["int8", "float32"] = "int8",
        samples: Annotated[int, Field(ge=1)] = 128,
        skip: tuple[str, ...] = ("head",),
        source: Path | None = None,
    ) -> None:
        super().__init__(precision, skip, source)
        self.scheme = Scheme(4, block_size, symmetric)
        self.activations = activations
        self.train_samples = samples if precision == "int8_static" else 1
        self.packed: dict[str, Weight] = {}

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        super().check(skeleton, before)
        for stage in before if self.keeps else ():
            key = f"technique.{type(stage).__module__.rpartition('.')[2]}"
            if trait(stage, "leaves") == "packed":
                for scheme in getattr(stage, "schemes", [getattr(stage, "scheme", Scheme())]):
                    fits("group_size", scheme.group_size, key)
            elif trait(stage, "leaves") == "bitsandbytes":
                fits("blocksize", getattr(stage, "blocksize", -1), key)

    @property
    def keeps(self) -> bool:
        """Whether weights that a stage before has rounded stay what they are."""
        return self.precision in (None, "int4")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = compressed(pl_module)
        self.packed = stored(model, self.source)  # before any forward pass, which rearranges 4-bit floats
        packing.freeze(model, self.packed)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model: Any = compressed(pl_module)
        integers = qdq.layers(model, KEY, self.precision)
        self.shrinks = self.lowers and is_float32(model)
        self.packed |= bnb.take_out(model)  # of a stage of the same fit
        kept = self.packed if self.keeps and not integers else {}
        self.limits = qdq.limits(integers) if integers else limits(self.precision, self.packed, kept)
        nn.Module.float(model.cpu())  # transformers refuses on behalf of layers that bitsandbytes had
        # One at a time, so that no scale is that of padding.
        batches = [inputs_of(batch) for batch in calibration_batches(trainer, self.train_samples, batch_size=1)]
        layers = self.chosen(model) if self.lowers and self.precision != "fp16" else {}
        tables = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Embedding)}
        few = {**{name: model.get_submodule(name) for name in kept}, **(layers if self.precision == "int4" else tables)}
        self.folder = TemporaryDirectory()  # there for as long as the stage is
        traced, path = (Path(self.folder.name) / name for name in ("traced/model.onnx", "model.onnx"))
        traced.parent.mkdir()  # which has the weights of a large one beside it, a file each
        with evaluating(model):
            with muted():
                with qdq.plain(model, integers):
                    past = trace(model, batches[0], traced)
                if integers:
                    graph = Graph(traced)
                    qdq.into_onnx(graph.proto.graph, model, integers)
                elif self.precision == "int8_static":
                    quantize_static(traced, path, layers.values(), [{**batch, **past} for batch in batches])
                    graph = Graph(path)
                else:
                    graph = fused(traced, model.config, embeddings=not tables, whole=len(few) == len(tables))
                if self.precision == "int8_dynamic":
                    quantize_dynamic(graph, path, layers.values())
                    graph = Graph(path)
                if few:
                    lower(graph, few, kept, self.scheme, self.activations)
                store_once(graph)
                if self.precision == "fp16":
                    to_float16(graph)
                if past:
                    begin_with(graph, past)
                graph.write(path)
            exported = Model(path, plain_config(model))
            self.agreement = on_validation_text(trainer, model, exported)
        if self.lowers or kept or integers:
            self.exported = exported

    def save(self, model: nn.Module, folder: Path) -> None:
        for path in Path(self.folder.name).glob("model.onnx*"):
            shutil.copy(path, folder)
        plain_config(model).save_pretrained(folder)


def export(model: Any, example: Batch, folder: Path) -> None:
    """Write the model's graph in float32, as the runtime loads it."""
    with evaluating(model), muted(), TemporaryDirectory() as apart:
        traced = Path(apart) / "model.onnx"
        past = trace(model, example, traced)
        graph = fused(traced, model.config, embeddings=True, whole=True)
        store_once(graph)
        if past:
            begin_with(graph, past)
        graph.write(folder / "model.onnx")
    plain_config(model).save_pretrained(folder)


def fits(setting: str, size: int, key: str) -> None:
    """Raise UserError where ``size`` weights that share a scale are none of ONNX Runtime's blocks, nor made up of
    them."""
    whole = size in (-1, *nbits.BLOCKS) if setting == "blocksize" else size % nbits.BLOCKS[0] == 0 or size == -1
    if not whole:
        sizes = ", ".join(map(str, nbits.BLOCKS))
        raise UserError(
            f"{key}.{setting}={size} cannot be kept: ONNX Runtime gives {sizes} weights a scale. Set "
            f"{key}.{setting}=32, or {KEY}.precision=fp32 to have them as floats again."
        )


def stored(model: nn.Module, source: Path | None) -> dict[str, Weight]:
    """How the stages before have rounded the weights of ``model``, by layer: as the artifact ``source`` holds them, or
    bitsandbytes' own layers, which plain ones replace."""
    found: dict[str, Weight] = dict(bnb.take_out(model))
    if source and packing.packed_layers(source) - set(found):
        found |= packing.integers(source)
    return found


def limits(precision: str | None, packed: dict[str, Weight], kept: dict[str, Weight]) -> str:
    """What the export cannot do for size or speed."""
    limits = {
        UNPACKED: packed and not kept,
        FP16: precision == "fp16",
        FLOATS: any(not isinstance(one, Integers) for one in kept.values()),
        THREE: any(isinstance(one, Integers) and one.scheme.bits == 3 for one in kept.values()),
    }
    return ", and ".join(limit for limit, holds in limits.items() if holds)


@torch.no_grad()
def trace(model: Any, example: Batch, path: Path) -> Batch:
    """Write the graph that PyTorch runs for the ``example``, for batches of any shape. Gives what it takes for the keys
    and values of earlier tokens where there are none; nothing if it takes none."""
    module, inputs, parts = to_trace(model, example)
    past = {f"{PAST}{i // 2}.{('key', 'value')[i % 2]}": part for i, part in enumerate(parts)}
    outputs = {"logits": {0: "batch"} if "ForSequenceClassification" in type(model).__name__ else SIZES}
    outputs |= {name.replace(*PRESENT): {0: "batch", 2: "total"} for name in past}
    axes = {**dict.fromkeys(inputs, SIZES), **{name: {0: "batch", 2: "past"} for name in past}}
    if past:
        axes["attention_mask"] = {0: "batch", 1: "total"}
    with plain_attention(model):
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


class Graph:
    """A graph at ``path`` to be changed. Tensors that lie beside it, those of a large one, stay there until they are
    asked for: the graph and its changes would hold them several times over."""

    def __init__(self, path: Path) -> None:
        import onnx

        self.beside = path.parent
        self.proto = onnx.load(path, load_external_data=False)
        self.large = any(map(onnx.external_data_helper.uses_external_data, self.proto.graph.initializer))
        self.load(2**20)

    @property
    def tensors(self) -> dict[str, Any]:
        return {one.name: one for one in self.proto.graph.initializer}

    @property
    def size(self) -> int:
        """Bytes of the tensors that do not lie beside it."""
        return sum(one.ByteSize() for one in self.proto.graph.initializer)

    def values(self, tensor: Any) -> np.ndarray:
        import onnx

        return onnx.numpy_helper.to_array(tensor, str(self.beside))

    def load(self, most: float) -> None:
        """Take in the tensors of no more than so many numbers that lie beside the graph."""
        import onnx

        for one in self.proto.graph.initializer:
            if onnx.external_data_helper.uses_external_data(one) and math.prod(one.dims) <= most:
                one.CopyFrom(onnx.numpy_helper.from_array(self.values(one), one.name))

    def declare(self, domain: str) -> None:
        """Let its nodes be operators of the ``domain``."""
        import onnx

        if not any(one.domain == domain for one in self.proto.opset_import):
            self.proto.opset_import.append(onnx.helper.make_opsetid(domain, 1))

    def write(self, path: Path) -> None:
        """Write it in place of what is at ``path``, the tensors of a large one beside it."""
        import onnx

        self.load(math.inf)
        beside = path.with_name(f"{path.name}.data")
        beside.unlink(missing_ok=True)  # onnx would append to it
        large = self.size > LARGEST
        onnx.save(self.proto, path, save_as_external_data=large, location=beside.name if large else None)


def fused(source: Path, config: Any, embeddings: bool, whole: bool) -> Graph:
    """The graph with what ONNX Runtime has an operator for: attention, together with its ``whole`` products by query,
    key and value or apart from them, layer norms, GELU, the sum of BERT's ``embeddings``."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_by_fusion

    graph = Graph(source)
    options = FusionOptions("bert")
    options.enable_rotary_embeddings = False  # a table of 131,072 positions, and one row of them for all texts
    options.enable_embed_layer_norm = embeddings
    options.use_multi_head_attention = not whole
    heads, width = config.num_attention_heads, config.hidden_size
    even = width % heads == 0  # what the optimizer's attention takes for granted
    options.enable_attention = even and not graph.large  # it would join weights, which must be there for that
    graph.proto = optimize_by_fusion(
        graph.proto,
        model_type="bert",
        num_heads=heads if even else 0,
        hidden_size=width if even else 0,
        optimization_options=options,
    ).model
    shapes = {name: one.dims for name, one in graph.tensors.items()}
    products = {name: node for node in graph.proto.graph.node for name in node.output}
    for node in graph.proto.graph.node:
        # The optimizer gives every block the config's number of heads, and some may have been cut.
        if node.op_type == "Attention":
            set_heads(node, shapes[node.input[1]][1] // 3 // (width // heads))
        elif node.op_type == "MultiHeadAttention":
            set_heads(node, shapes[products[node.input[0]].input[1]][1] // (width // heads))
    graph.declare(nbits.DOMAIN)
    return graph


def set_heads(attention: Any, heads: int) -> None:
    (attribute,) = (one for one in attention.attribute if one.name == "num_heads")
    attribute.i = heads


def store_once(graph: Graph) -> None:
    """Leave out weights that are others transposed: those of an output layer that is tied to the embeddings."""
    import onnx

    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.INT8)
    matrices = [one for one in graph.tensors.values() if one.data_type in kinds and len(one.dims) == 2]
    seen: dict[tuple[bytes, torch.Size], str] = {}
    for one in matrices:
        name, weight = one.name, torch.from_numpy(graph.values(one).copy())
        if source := seen.get((digest(weight.T), weight.T.shape)):
            graph.proto.graph.initializer.remove(one)
            graph.proto.graph.node.insert(
                0, onnx.helper.make_node("Transpose", [source], [name], f"{name}_tied", perm=[1, 0])
            )
        else:
            seen[digest(weight), weight.shape] = name


def begin_with(graph: Graph, past: Batch) -> None:
    """Let the graph take ``past`` where it is given nothing else."""
    import onnx

    for name, part in past.items():
        graph.proto.graph.initializer.append(onnx.numpy_helper.from_array(part.numpy(), name))


def to_float16(graph: Graph) -> None:
    """Store the weights in float16; they are cast to float32 once, when the graph is loaded."""
    import onnx

    for stored in graph.proto.graph.initializer:
        if stored.data_type == onnx.TensorProto.FLOAT and len(stored.dims) == 2:
            name = stored.name
            half = graph.values(stored).astype(np.float16)
            stored.CopyFrom(onnx.numpy_helper.from_array(half, f"{name}_float16"))
            cast = onnx.helper.make_node("Cast", [stored.name], [name], f"{name}_cast", to=onnx.TensorProto.FLOAT)
            graph.proto.graph.node.insert(0, cast)


def lower(
    graph: Graph, layers: Mapping[str, Layer], kept: Mapping[str, Weight], scheme: Scheme, activations: str
) -> None:
    """Store the ``layers``' weights as integers: as they are ``kept``, or rounded by the ``scheme``, or embeddings and
    what is tied to them in 8 bits. What multiplies by them rounds its inputs to the type of the ``activations``."""
    import onnx

    tensors, proto = graph.tensors, graph.proto.graph
    names = {digest(layer.weight): name for name, layer in layers.items()}
    tables: dict[str, str] = {}
    nodes: list[Any] = []
    for node in proto.node:
        found = [names.get(digest(one)) for one in factors(node, graph, tensors)]
        if len(found) != 1 or found[0] is None:
            nodes.append(node)
            continue
        (name,), weight = found, layers[found[0]].weight.detach()
        if node.op_type == "Gather":
            new, lowered = nbits.look_up(node, nbits.rounded_rows(weight))
            tables[name] = node.input[0]
        else:
            if name in kept:
                rounded = kept[name]
            else:
                tied = isinstance(layers[name], nn.Embedding)
                rounded = nbits.rounded_rows(weight) if tied else nbits.rounded(weight, scheme)
            new, lowered = nbits.multiply(node, rounded, weight.shape[1], activations)
            if name in tables:
                new, lowered = nbits.share(tables[name], new, lowered)
        nodes += new
        tensors |= {key: onnx.numpy_helper.from_array(one, key) for key, one in lowered.items()}
    used = {name for node in nodes for name in node.input}
    left = [one for name, one in tensors.items() if name in used]
    proto.ClearField("node")
    proto.ClearField("initializer")
    proto.node.extend(nodes)
    proto.initializer.extend(left)
    graph.declare(nbits.DOMAIN)


def quantize_dynamic(graph: Graph, path: Path, layers: Iterable[Layer]) -> None:
    """Write the graph with the ``layers``' weights, and their inputs as they come, quantized."""
    import onnx
    from onnxruntime import quantization

    nodes = nodes_of(graph, layers)
    graph.load(math.inf)
    quantization.quantize_dynamic(
        graph.proto,
        path,
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,  # unsigned ones are slower
        nodes_to_quantize=[*nodes, *(f"{name}_MatMul" for name in nodes)],  # what it makes of a Gemm first
        use_external_data_format=graph.size > LARGEST,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # of what fused operators give, which nothing says
    )


def quantize_static(source: Path, target: Path, layers: Iterable[Layer], batches: list[Batch]) -> None:
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
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        nodes_to_quantize=nodes_of(graph, layers),
        use_external_data_format=graph.large or graph.size > LARGEST,
    )


def nodes_of(graph: Graph, layers: Iterable[Layer]) -> list[str]:
    """The names of the graph's nodes that multiply by weights of some of the ``layers`` and no others."""
    chosen, tensors, found = {digest(layer.weight) for layer in layers}, graph.tensors, []
    for node in graph.proto.graph.node:
        weights = factors(node, graph, tensors) if node.op_type != "Gather" else []
        if weights and all(digest(one) in chosen for one in weights):
            found.append(node.name)
    return found


def factors(node: Any, graph: Graph, tensors: dict[str, Any]) -> list[Tensor]:
    """The weights ``[rows, inputs]`` that the node multiplies by, three where it is all of attention, or the table in
    which it looks up rows; none if it does neither."""
    place = {"Gather": 0, "MatMul": 1, "Gemm": 1, "Attention": 1}.get(node.op_type)
    stored = tensors.get(node.input[place]) if place is not None else None
    if stored is None or len(stored.dims) != 2:
        return []
    weight = torch.from_numpy(graph.values(stored).copy())
    if node.op_type == "Gather" or any(one.name == "transB" and one.i for one in node.attribute):
        return [weight]
    return [one.T for one in weight.chunk(3 if node.op_type == "Attention" else 1, dim=1)]
