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
from compress.exporting.agreement import measure_on_validation, require_kept
from compress.exporting.onnx import (
    fuse_graph,
    lower_weights,
    quantize_dynamic,
    quantize_static,
    set_default_past,
    share_equal,
    store_float16,
    trace_graph,
)
from compress.exporting.qdq import (
    describe_limits,
    find_quantized_layers,
    has_wide_weights,
    quantize_onnx_graph,
    suspend_quantization,
)
from compress.exporting.stage import Export
from compress.exporting.tracing import is_float32, select_inputs, strip_config, vary_padding
from compress.exporting.weights import require_all
from compress.formats import nbits
from compress.formats.bnb import extract_weights
from compress.formats.nbits import Weight
from compress.formats.onnx import Graph
from compress.formats.packed import Integers, freeze_weights, list_packed_layers, read_integers
from compress.maths.rounding import Scheme
from compress.models.batches import draw_calibration_batches
from compress.models.layers import evaluation_mode, unwrap_model
from compress.models.matrices import find_all_matrices
from compress.quiet import silence_exporters
from compress.runtimes.onnxruntime import Model
from compress.runtimes.processor import Processor

FP16 = "the weights are converted to float32 when they are loaded: less to store, no speed there"
FLOATS = "4-bit floats are converted to float32 at every call: less to store, slower than floats"
THREE = "3-bit integers are stored in 4 bits"
UNPACKED = "the integers of earlier stages are converted to floats; precision=null keeps them"


class Onnx(Export):
    """Export the model as an ONNX graph that runs without PyTorch, for any number and length of texts.

    Runs when the fit ends. The model itself stays unchanged, on the CPU in float32; bitsandbytes' layers become plain
    layers of the same values. The graph is traced with plain attention. ONNX Runtime's transformer optimizer fuses the
    attention into one operator if it knows the architecture (BERT and its relatives). The graph of a causal language
    model returns the logits of every position. It also takes and returns keys and values of each block, under Optimum's
    names (``past_key_values.0.key``, ``present.0.key``): without them it scores texts, with them it decodes token by
    token.

    - None, the default: the precision of the chain's model. Floats stay float32. Weights that ``gptq``, ``awq``,
      ``mixed``, ``int8`` or ``nf4`` have rounded keep their exact values, in ONNX Runtime's operators for few bits.
      Integers with quantized inputs, from ``qat`` or ``w8a8`` with ``dynamic=False``, stay too, with the ranges of the
      inputs. (Such a graph is not fused.)
    - ``fp32``: everything in float32. ``fp16``: weights in float16, arithmetic in float32, which CPUs compute fast.
    - ``int8_dynamic``: weights as signed integers with a scale for every output, inputs rounded at inference. With
      ``processor=any`` the weights of ``int8_*`` have 7 bits, whose products are summed exactly on every processor.
    - ``int8_static``: inputs as integers too, with scales from the first ``samples`` examples of the datamodule's
      ``calibration``, or of the training loader if there is none. The graph is not fused: ONNX Runtime would run fused
      operators in floats.
    - ``int4``: weights as integers of 4 bits with a scale for every ``block_size`` inputs, rounded to nearest; weights
      that an earlier stage has rounded are kept.

    ``int8_*`` and ``int4`` store embeddings as 8-bit integers with a scale for every token. An output layer that is
    tied to them is stored with them, once. Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018, arXiv:1712.05877.

    Args:
        precision: precision of the graph.
        block_size: inputs that share a scale in ``int4``.
        symmetric: integers of ``int4`` around zero, without stored zero points.
        activations: type of the inputs of ``int4`` or kept weights: ``int8``, rounded at inference, which is fast in
            ONNX Runtime, or ``float32``, with which 2 and 8 bits are many times slower than floats.
        processor: ``any``, if sums of 8-bit products must be exact on every processor; or ``vnni``, if exact sums on
            processors with VNNI (or Arm's dot products) suffice. Weights of ``int8_*`` have 7 or 8 bits. Wider integers
            of ``qat`` and ``w8a8`` are kept, but are as slow as floats with ``any``.
        samples: training examples (for a language model, blocks of tokens) that ``int8_static`` calibrates on.
        skip: layers that stay floats: ``embeddings``, ``head`` (all else outside the transformer blocks) and patterns
            of layer names. If int8 fuses query, key and value, skipping one of them skips all three.
        source: folder of the artifact that the model was loaded from, for its integers.

    Raises:
        UserError: a pattern matches no layer, no layer is left, or an earlier stage has groups that fit no block.

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
        processor: Processor = "any",
        samples: Annotated[int, Field(ge=1)] = 128,
        skip: tuple[str, ...] = ("head",),
        source: Path | None = None,
    ) -> None:
        super().__init__(precision, skip, source, ("int8_dynamic", "int8_static"), processor)
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
        """True if weights that an earlier stage has rounded are kept."""
        return self.precision in (None, "int4")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = unwrap_model(pl_module)
        # Before any forward pass, which rearranges 4-bit floats.
        self.packed = collect_rounded_weights(model, self.source)
        freeze_weights(model, self.packed)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # 1) Find out which integers are kept
        model: Any = unwrap_model(pl_module)
        integers = find_quantized_layers(model, self.key, self.precision)
        self.shrinks = self.lowers_precision and is_float32(model)
        self.packed |= extract_weights(model)  # from another stage of the same fit
        kept = self.packed if self.keeps and not integers else {}
        wide = self.processor == "any" and has_wide_weights(integers)
        limits = describe_precision_limits(self.precision, self.packed, kept)
        self.limits = describe_limits(integers, wide) if integers else limits
        # 2) Choose calibration batches and the layers to lower
        nn.Module.float(model.cpu())  # transformers' own float() still refuses models that had bitsandbytes layers
        # One text at a time, so that padding decides no scale.
        batches = [
            select_inputs(batch, model) for batch in draw_calibration_batches(trainer, self.train_samples, batch_size=1)
        ]
        every = find_all_matrices(model, embeddings=True, head=True)
        layers = self.chosen(model) if self.rounds_weights else {}
        tables = {name: layer for name, layer in layers.items() if layer.is_embedding}
        # With processor=any an output layer keeps the 8 bits of the embeddings that it is tied to, in MatMulNBits.
        factors = {name: layer for name, layer in layers.items() if name not in tables or self.processor != "any"}
        few = {**{name: every[name] for name in kept}, **(layers if self.precision == "int4" else tables)}
        lowered: set[str] = set()
        # 3) Trace the graph and lower its precision
        self.folder = TemporaryDirectory()  # exists as long as the stage
        traced, path = (Path(self.folder.name) / name for name in ("traced/model.onnx", "model.onnx"))
        traced.parent.mkdir()  # a large model's weights are stored beside it, in a file each
        with evaluation_mode(model):
            with silence_exporters():
                with suspend_quantization(model, integers):
                    past = trace_graph(model, batches[0], traced)
                if integers:
                    graph = Graph(traced)
                    lowered = quantize_onnx_graph(graph, every, integers, unsigned=wide)
                elif self.precision == "int8_static":
                    examples = [{**batch, **past} for batch in batches]
                    lowered = quantize_static(traced, path, factors, examples, self.processor)
                    graph = Graph(path)
                else:
                    proofs = [{**batch, **past} for batch in vary_padding(batches[0], left=bool(past))]
                    whole = len(few) == len(tables)
                    feeds = Graph(traced).select_feeds(proofs)
                    graph = fuse_graph(traced, model.config, embeddings=not tables, whole=whole, feeds=feeds)
                if self.precision == "int8_dynamic":
                    lowered = quantize_dynamic(graph, path, factors, self.processor)
                    graph = Graph(path)
                if few:
                    lowered |= lower_weights(graph, few, kept, self.scheme, self.activations)
                require_all(self.key, (*layers, *kept, *integers), lowered, every)
                share_equal(graph)
                if self.precision == "fp16":
                    store_float16(graph)
                if past:
                    set_default_past(graph, past)
                graph.write(path)
            # 4) Compare the graph with the model
            exported = Model(path, strip_config(model))
            self.agreement = measure_on_validation(trainer, model, exported)
            if integers or (kept and self.precision is None and self.activations == "float32"):
                require_kept(self.key, trainer, model, exported, integers)
        if self.lowers_precision or kept or integers:
            self.exported = exported

    def save(self, model: nn.Module, folder: Path) -> None:
        for path in Path(self.folder.name).glob("model.onnx*"):
            shutil.copy(path, folder)
        strip_config(model).save_pretrained(folder)


def check_block_size(key: str, stage: str, setting: str, size: int) -> None:
    """Raise UserError if ``size``, the number of weights that share a scale by ``setting`` of an earlier ``stage``, is
    neither a block size of ONNX Runtime nor made of blocks."""
    whole = size in (-1, *nbits.BLOCKS) if setting == "blocksize" else size % nbits.BLOCKS[0] == 0 or size == -1
    if not whole:
        sizes = ", ".join(map(str, nbits.BLOCKS))
        raise UserError(
            f"{stage}.{setting} is {size}; ONNX Runtime can keep {sizes} weights a scale. Set {stage}.{setting}=32, or "
            f"{key}.precision=fp32 to export floats."
        )


def collect_rounded_weights(model: nn.Module, source: Path | None) -> dict[str, Weight]:
    """Return the rounded weights of earlier stages by layer, from bitsandbytes' layers and the artifact ``source``.
    Plain layers replace bitsandbytes' layers in ``model``."""
    weights: dict[str, Weight] = dict(extract_weights(model))
    if source and list_packed_layers(source) - set(weights):
        weights |= read_integers(source)
    return weights


def describe_precision_limits(precision: str | None, packed: dict[str, Weight], kept: dict[str, Weight]) -> str:
    """Return what the export does not do for size or speed."""
    limits = {
        UNPACKED: packed and not kept,
        FP16: precision == "fp16",
        FLOATS: any(not isinstance(weight, Integers) for weight in kept.values()),
        THREE: any(isinstance(weight, Integers) and weight.scheme.bits == 3 for weight in kept.values()),
    }
    return ", and ".join(limit for limit, holds in limits.items() if holds)
