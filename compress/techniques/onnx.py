"""Export to ONNX, in full or lower precision, for ONNX Runtime."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from pydantic import Field, validate_call
from torch import nn

from compress.calibration import Batch, calibration_batches
from compress.exchange import (
    Agreement,
    Logits,
    any_shape,
    inputs_of,
    is_float32,
    on_validation_text,
    plain_attention,
    plain_config,
    round_once,
)
from compress.models import Layer, compressed, evaluating, select
from compress.promises import digest
from compress.quiet import muted
from compress.runtimes.onnxruntime import Model

KEY = "technique.onnx"
LIMITS = {"fp16": "the weights are turned back into float32 when they are loaded: less to store, no speed there"}
LARGEST = 2**31 - 2**20
"""Bytes that a file in ONNX's format holds; the tensors of a larger model lie beside it."""


class Onnx(pl.Callback):
    """Export the model as an ONNX graph, for any number and length of texts, that runs without PyTorch.

    Works when the fit ends; the model itself stays as it is, on the CPU in float32. A causal language model gives the
    logits of every position, without a cache. The graph is traced with plain attention, which ONNX Runtime's
    transformer optimizer fuses into one operator where it knows the architecture (BERT and its relatives).

    - ``fp16``: weights in float16, arithmetic in float32, for which CPUs are made.
    - ``int8_dynamic``: weights as signed integers with a scale for every output, inputs rounded as they come.
    - ``int8_static``: inputs too on scales found beforehand, on the first ``samples`` examples of the datamodule's
      ``calibration`` or else of the training loader. The graph is not fused: ONNX Runtime would run it in floats.

    Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018,
    arXiv:1712.05877.

    Args:
        precision: of the graph.
        samples: training examples (for a language model, blocks of tokens) that ``int8_static`` calibrates on.
        skip: what int8 leaves in floats: ``embeddings``, ``head`` (all else outside the transformer blocks) and
            patterns of layers' names. Where query, key and value are fused, one of them left leaves all three.

    Raises:
        UserError: a pattern fits no layer, or no layer is left.

        pl.Trainer(max_epochs=1, callbacks=[Onnx(precision="int8_dynamic")]).fit(module, loader)
    """

    needs = ("float", "packed")
    leaves = "onnx"
    runtime = "onnxruntime"
    packages = ("onnx", "onnxruntime")
    changes = False

    @validate_call
    def __init__(
        self,
        precision: Literal["fp32", "fp16", "int8_dynamic", "int8_static"] = "fp32",
        samples: Annotated[int, Field(ge=1)] = 128,
        skip: tuple[str, ...] = ("embeddings", "head"),
    ) -> None:
        self.precision = precision
        self.skip = skip
        self.train_samples = samples if precision == "int8_static" else 1
        self.limits = LIMITS.get(precision, "")
        self.shrinks = False
        self.exported: Model | None = None
        self.agreement: Agreement | None = None

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        round_once(KEY, self.precision, before)
        select(skeleton, self.skip, f"{KEY}.skip")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model: Any = compressed(pl_module)
        self.shrinks = self.precision != "fp32" and is_float32(model)
        model.cpu().float()
        # One at a time, so that no scale is that of padding.
        batches = [inputs_of(batch) for batch in calibration_batches(trainer, self.train_samples, batch_size=1)]
        layers = select(model, self.skip, f"{KEY}.skip").values()
        self.folder = TemporaryDirectory()  # there for as long as the stage is
        traced, path = (Path(self.folder.name) / name for name in ("traced.onnx", "model.onnx"))
        with evaluating(model):
            with muted():
                trace(model, batches[0], traced)
                if self.precision == "int8_static":
                    quantize_static(traced, path, layers, batches)
                else:
                    fuse(traced, path, model.config, embeddings="embeddings" in self.skip)
                if self.precision == "int8_dynamic":
                    quantize_dynamic(path, layers)
                store_once(path)
                if self.precision == "fp16":
                    to_float16(path)
            exported = Model(path, plain_config(model))
            self.agreement = on_validation_text(trainer, model, exported)
        if self.precision != "fp32":
            self.exported = exported

    def save(self, model: nn.Module, folder: Path) -> None:
        for path in Path(self.folder.name).glob("model.onnx*"):
            shutil.copy(path, folder)
        plain_config(model).save_pretrained(folder)

    def report(self, folder: Path) -> None:
        if self.agreement is not None:
            self.agreement.write(folder)


def trace(model: Any, example: Batch, path: Path) -> None:
    """Write the graph that PyTorch runs for the ``example``, for batches of any shape."""
    example = any_shape(example)
    sizes = {0: "batch", 1: "length"}
    with plain_attention(model), torch.no_grad():
        torch.onnx.export(
            Logits(model, example).eval(),  # in whose mode the exporter leaves the model
            tuple(example.values()),
            path,
            input_names=list(example),
            output_names=["logits"],
            dynamic_axes={**dict.fromkeys(example, sizes), "logits": sizes if is_per_token(model) else {0: "batch"}},
            opset_version=17,
            dynamo=False,  # the other exporter's graph is not fused
        )


def is_per_token(model: Any) -> bool:
    """Whether there are logits for every token, not one row of them for a text."""
    return "ForSequenceClassification" not in type(model).__name__


def fuse(source: Path, target: Path, config: Any, embeddings: bool = True) -> None:
    """Fuse what ONNX Runtime has an operator for: attention, layer norms, GELU, the sum of BERT's ``embeddings``."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("bert")
    options.enable_rotary_embeddings = False  # a table of 131,072 positions, and one row of them for all texts
    options.enable_embed_layer_norm = embeddings
    heads, width = config.num_attention_heads, config.hidden_size
    even = width % heads == 0  # what the optimizer's attention takes for granted
    options.enable_attention = even
    optimizer = optimize_model(
        str(source),
        model_type="bert",
        num_heads=heads if even else 0,
        hidden_size=width if even else 0,
        opt_level=0,
        optimization_options=options,
    )
    graph = optimizer.model.graph
    shapes = {one.name: one.dims for one in graph.initializer}
    for node in graph.node:
        if node.op_type == "Attention":
            # The optimizer gives every block the config's number of heads, and some may have been cut.
            (attribute,) = (one for one in node.attribute if one.name == "num_heads")
            attribute.i = shapes[node.input[1]][1] // 3 // (width // heads)
    optimizer.save_model_to_file(str(target), use_external_data_format=is_large(source))


def store_once(path: Path) -> None:
    """Leave out weights that are others transposed: those of an output layer that is tied to the embeddings."""
    import onnx

    model = onnx.load(path)
    stored = [one for one in model.graph.initializer if one.data_type == onnx.TensorProto.FLOAT and len(one.dims) == 2]
    seen: dict[tuple[bytes, torch.Size], str] = {}
    for one in stored:
        name, weight = one.name, torch.from_numpy(onnx.numpy_helper.to_array(one).copy())
        if source := seen.get((digest(weight.T), weight.T.shape)):
            model.graph.initializer.remove(one)
            model.graph.node.insert(
                0, onnx.helper.make_node("Transpose", [source], [name], f"{name}_tied", perm=[1, 0])
            )
        else:
            seen[digest(weight), weight.shape] = name
    write(model, path)


def to_float16(path: Path) -> None:
    """Store the weights in float16; they are cast to float32 once, when the graph is loaded."""
    import onnx

    model = onnx.load(path)
    for stored in model.graph.initializer:
        if stored.data_type == onnx.TensorProto.FLOAT and len(stored.dims) == 2:
            name = stored.name
            half = onnx.numpy_helper.to_array(stored).astype(np.float16)
            stored.CopyFrom(onnx.numpy_helper.from_array(half, f"{name}_float16"))
            cast = onnx.helper.make_node("Cast", [stored.name], [name], f"{name}_cast", to=onnx.TensorProto.FLOAT)
            model.graph.node.insert(0, cast)
    write(model, path)


def quantize_dynamic(path: Path, layers: Iterable[Layer]) -> None:
    """Quantize the ``layers``' weights, and their inputs as they come."""
    import onnx
    from onnxruntime import quantization

    model = onnx.load(path)
    nodes = nodes_of(model, layers)
    quantization.quantize_dynamic(
        model,
        path,
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,  # unsigned ones are slower
        nodes_to_quantize=[*nodes, *(f"{name}_MatMul" for name in nodes)],  # what it makes of a Gemm first
        use_external_data_format=is_large(path),
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # of what fused operators give, which nothing says
    )


def quantize_static(source: Path, target: Path, layers: Iterable[Layer], batches: list[Batch]) -> None:
    """Quantize the ``layers``' weights, and their inputs on scales that hold those of all ``batches``."""
    import onnx
    from onnxruntime import quantization

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
        nodes_to_quantize=nodes_of(onnx.load(source), layers),
        use_external_data_format=is_large(source),
    )


def nodes_of(model: Any, layers: Iterable[Layer]) -> list[str]:
    """The names of the graph's nodes with the weights of some of the ``layers`` and no others, transposed or not."""
    import onnx

    weights = {digest(one) for layer in layers for one in (layer.weight, layer.weight.T)}
    stored = {one.name: one for one in model.graph.initializer}

    def parts(node: Any) -> list[np.ndarray]:
        if node.op_type == "Attention":
            return np.split(onnx.numpy_helper.to_array(stored[node.input[1]]), 3, axis=1)
        if node.op_type in ("MatMul", "Gemm", "Gather"):
            found = [onnx.numpy_helper.to_array(stored[name]) for name in node.input if name in stored]
            return [one for one in found if one.ndim == 2]
        return []

    def chosen(arrays: list[np.ndarray]) -> bool:
        return bool(arrays) and all(digest(torch.from_numpy(one.copy())) in weights for one in arrays)

    return [node.name for node in model.graph.node if chosen(parts(node))]


def write(model: Any, path: Path) -> None:
    """Write the graph in place of what is at ``path``, the tensors of a large one beside it."""
    import onnx

    beside = path.with_name(f"{path.name}.data")
    beside.unlink(missing_ok=True)  # onnx would append to it
    large = model.ByteSize() > LARGEST
    onnx.save(model, path, save_as_external_data=large, location=beside.name if large else None)


def is_large(path: Path) -> bool:
    return sum(one.stat().st_size for one in path.parent.iterdir()) > LARGEST
