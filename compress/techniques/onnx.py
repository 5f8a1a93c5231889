"""Export to ONNX, in full or lower precision, for ONNX Runtime."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
from pydantic import Field, validate_call
from torch import nn

from compress.errors import UserError
from compress.exporting.agreement import measure_on_validation
from compress.exporting.onnx import (
    fuse_graph,
    lower_weights,
    quantize_dynamic,
    quantize_static,
    set_default_past,
    share_transposed,
    store_float16,
    trace_graph,
)
from compress.exporting.qdq import describe_limits, find_quantized_layers, quantize_onnx_graph, suspend_quantization
from compress.exporting.stage import Export
from compress.exporting.tracing import is_float32, select_inputs, strip_config
from compress.formats import nbits
from compress.formats.bnb import extract_weights
from compress.formats.nbits import Weight
from compress.formats.onnx import Graph
from compress.formats.packed import Integers, freeze_weights, list_packed_layers, read_integers
from compress.maths.rounding import Scheme
from compress.models.calibration import draw_calibration_batches
from compress.models.layers import evaluation_mode, unwrap_model
from compress.quiet import silence_exporters
from compress.runtimes.onnxruntime import Model

FP16 = "the weights are turned back into float32 when they are loaded: less to store, no speed there"
FLOATS = "4-bit floats become floats again at every call: less to store, slower than floats"
THREE = "an integer of 3 bits takes four there"
UNPACKED = "the integers of the stages before are floats again: precision=null keeps them"


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

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[Onnx(precision="int8_dynamic")]).fit(module, loader)
    """

    needs = (*Export.needs, "bitsandbytes")
    leaves = "onnx"
    runtime = "onnxruntime"
    packages = ("onnx", "onnxruntime")

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
        super().__init__(precision, skip, source, rounds=("int8_dynamic", "int8_static"))
        self.scheme = Scheme(4, block_size, symmetric)
        self.activations = activations
        self.train_samples = samples if precision == "int8_static" else 1
        self.packed: dict[str, Weight] = {}

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        super().check(skeleton, before)
        for stage in before if self.keeps else ():
            if stage.leaves == "packed":
                for scheme in getattr(stage, "schemes", [getattr(stage, "scheme", Scheme())]):
                    check_block_size(self.key, stage.key, "group_size", scheme.group_size)
            elif stage.leaves == "bitsandbytes":
                check_block_size(self.key, stage.key, "blocksize", getattr(stage, "blocksize", -1))

    @property
    def keeps(self) -> bool:
        """Whether weights that a stage before has rounded stay what they are."""
        return self.precision in (None, "int4")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = unwrap_model(pl_module)
        self.packed = collect_rounded_weights(
            model, self.source
        )  # before any forward pass, which rearranges 4-bit floats
        freeze_weights(model, self.packed)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model: Any = unwrap_model(pl_module)
        integers = find_quantized_layers(model, self.key, self.precision)
        self.shrinks = self.lowers_precision and is_float32(model)
        self.packed |= extract_weights(model)  # of a stage of the same fit
        kept = self.packed if self.keeps and not integers else {}
        self.limits = (
            describe_limits(integers) if integers else describe_precision_limits(self.precision, self.packed, kept)
        )
        nn.Module.float(model.cpu())  # transformers refuses on behalf of layers that bitsandbytes had
        # One at a time, so that no scale is that of padding.
        batches = [
            select_inputs(batch) for batch in draw_calibration_batches(trainer, self.train_samples, batch_size=1)
        ]
        layers = self.chosen(model) if self.lowers_precision and self.precision != "fp16" else {}
        tables = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Embedding)}
        few = {**{name: model.get_submodule(name) for name in kept}, **(layers if self.precision == "int4" else tables)}
        self.folder = TemporaryDirectory()  # there for as long as the stage is
        traced, path = (Path(self.folder.name) / name for name in ("traced/model.onnx", "model.onnx"))
        traced.parent.mkdir()  # which has the weights of a large one beside it, a file each
        with evaluation_mode(model):
            with silence_exporters():
                with suspend_quantization(model, integers):
                    past = trace_graph(model, batches[0], traced)
                if integers:
                    graph = Graph(traced)
                    quantize_onnx_graph(graph.proto.graph, model, integers)
                elif self.precision == "int8_static":
                    quantize_static(traced, path, layers.values(), [{**batch, **past} for batch in batches])
                    graph = Graph(path)
                else:
                    graph = fuse_graph(traced, model.config, embeddings=not tables, whole=len(few) == len(tables))
                if self.precision == "int8_dynamic":
                    quantize_dynamic(graph, path, layers.values())
                    graph = Graph(path)
                if few:
                    lower_weights(graph, few, kept, self.scheme, self.activations)
                share_transposed(graph)
                if self.precision == "fp16":
                    store_float16(graph)
                if past:
                    set_default_past(graph, past)
                graph.write(path)
            exported = Model(path, strip_config(model))
            self.agreement = measure_on_validation(trainer, model, exported)
        if self.lowers_precision or kept or integers:
            self.exported = exported

    def save(self, model: nn.Module, folder: Path) -> None:
        for path in Path(self.folder.name).glob("model.onnx*"):
            shutil.copy(path, folder)
        strip_config(model).save_pretrained(folder)


def check_block_size(key: str, stage: str, setting: str, size: int) -> None:
    """Raise UserError where ``size`` weights that share a scale, the ``setting`` of the ``stage`` before, are none of
    ONNX Runtime's blocks, nor made up of them."""
    whole = size in (-1, *nbits.BLOCKS) if setting == "blocksize" else size % nbits.BLOCKS[0] == 0 or size == -1
    if not whole:
        sizes = ", ".join(map(str, nbits.BLOCKS))
        raise UserError(
            f"{stage}.{setting}={size} cannot be kept: ONNX Runtime gives {sizes} weights a scale. Set "
            f"{stage}.{setting}=32, or {key}.precision=fp32 to have them as floats again."
        )


def collect_rounded_weights(model: nn.Module, source: Path | None) -> dict[str, Weight]:
    """How the stages before have rounded the weights of ``model``, by layer: as the artifact ``source`` holds them, or
    bitsandbytes' own layers, which plain ones replace."""
    found: dict[str, Weight] = dict(extract_weights(model))
    if source and list_packed_layers(source) - set(found):
        found |= read_integers(source)
    return found


def describe_precision_limits(precision: str | None, packed: dict[str, Weight], kept: dict[str, Weight]) -> str:
    """What the export cannot do for size or speed."""
    limits = {
        UNPACKED: packed and not kept,
        FP16: precision == "fp16",
        FLOATS: any(not isinstance(one, Integers) for one in kept.values()),
        THREE: any(isinstance(one, Integers) and one.scheme.bits == 3 for one in kept.values()),
    }
    return ", and ".join(limit for limit, holds in limits.items() if holds)
