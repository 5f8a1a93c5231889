"""Export to OpenVINO, in full or lower precision."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Annotated, Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from pydantic import Field, validate_call
from torch import nn

from compress.errors import UserError
from compress.exporting.agreement import measure_on_validation, require_kept
from compress.exporting.openvino import (
    ARITHMETIC,
    FLOAT_PRODUCTS,
    convert_to_graph,
    find_other_readers,
    keep_integers,
    quantize_graph,
    quantize_weights,
    store_float16,
    to_arrays,
)
from compress.exporting.qdq import (
    describe_limits,
    find_quantized_layers,
    has_wide_weights,
    quantize_openvino_graph,
    suspend_quantization,
)
from compress.exporting.stage import Export
from compress.exporting.tracing import is_float32, select_inputs, strip_config
from compress.exporting.weights import require_all
from compress.formats.packed import read_integers
from compress.maths.rounding import Scheme
from compress.models.batches import Batch, draw_calibration_batches, read_validation_batches
from compress.models.layers import evaluation_mode, unwrap_model
from compress.models.matrices import count_inputs, find_all_matrices
from compress.quiet import silence_exporters
from compress.runtimes.openvino import GRAPH, SETTINGS, Model, use_shared_core
from compress.runtimes.processor import Processor
from compress.tasks.kinds import higher_is_better

LIMITS = {
    "fp16": "the weights are converted to float32 when they are loaded: less to store, no speed there",
    "bf16": "a CPU without bfloat16 arithmetic runs it in float32: less to store, no speed there",
}
THREE = "integers of 3 bits are converted to floats when they are loaded: less to store, no speed there"


class OpenVINO(Export):
    """Export the model in OpenVINO's format, which runs without PyTorch, for any number and length of texts.

    Runs when the fit ends. The model itself stays unchanged, on the CPU in float32. A causal language model returns the
    logits of every position, and keeps keys and values as the state of a request. After a reset the request scores
    texts; without a reset it continues with the next tokens.

    - None, the default: the precision of the chain's model. Floats stay float32, and arithmetic is in float32, even on
      a CPU with bfloat16, where OpenVINO's own default is bfloat16. Weights that ``gptq``, ``awq`` or ``mixed`` have
      rounded keep their integers, scales and zero points; so they do in all other precisions except ``fp32``. Integers
      with quantized inputs, from ``qat`` or ``w8a8`` with ``dynamic=False``, stay too, with the ranges of the inputs.
    - ``fp32``: everything in float32.
    - ``fp16``: weights in float16, arithmetic in float32.
    - ``bf16``: weights in float16, arithmetic in bfloat16 if the CPU has it.
    - ``int8``: weights and inputs as integers by NNCF, with scales from the first ``samples`` examples of the
      datamodule's ``calibration``, or of the training loader if there is none. With ``processor=any`` weights have 7
      bits; with ``vnni`` they have 8, and products of activations are integers too.
    - ``int8_weights``, ``int4_weights``: weights only, by NNCF, symmetric around zero, with a scale for every output or
      for every ``group_size`` consecutive inputs of an output; embeddings have 8 bits in both.

    After a stage that rounded weights, ``int8_weights`` rounds the layers that are still floats; ``int8`` and
    ``int4_weights`` are refused. With ``int*`` everything else runs in bfloat16 if the CPU has it (with ``max_drop`` in
    float32). If OpenVINO multiplies the weights as integers, it rounds their inputs to 8 bits at inference, in groups
    of 32. Kozlov et al., "Neural Network Compression Framework for Fast Model Inference", 2020, arXiv:2002.08679.

    Args:
        precision: precision of the graph.
        group_size: inputs that share a scale in ``int4_weights``; -1 for one scale an output.
        processor: ``any``, if sums of 8-bit products must be exact on every processor; or ``vnni``, if exact sums on
            processors with VNNI (or Arm's dot products) suffice. With ``any``, integers of ``qat`` and ``w8a8`` wider
            than 7 bits are multiplied in floats.
        samples: training examples (for a language model, blocks of tokens) that ``int8`` calibrates on.
        max_drop: largest drop of the task's metric on the validation split by ``int8``, in points (perplexity in its
            own units); the layers that cost most stay floats until the drop is within it. None: no bound.
        skip: layers that stay floats: ``embeddings``, ``head`` (all else outside the transformer blocks) and patterns
            of layer names.
        metrics: metrics of the task, for ``max_drop``; the chain passes them.
        task: the task, which names the primary metric, for ``max_drop``; the chain passes it.
        source: folder of the artifact that the stage starts from, for its integers.

    Raises:
        UserError: a pattern matches no layer, no layer is left, groups do not divide a layer, or settings contradict.

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[OpenVINO(precision="fp16")]).fit(module, loader)
    """

    leaves = "openvino"
    runtime = "openvino"
    packages = ("openvino", "nncf")
    instead = MappingProxyType({"nf4": "precision=int4_weights", "int8": "precision=int8_weights"})

    @validate_call
    def __init__(
        self,
        precision: Literal["fp32", "fp16", "bf16", "int8", "int8_weights", "int4_weights"] | None = None,
        group_size: Annotated[int, Field(ge=-1)] = 128,
        processor: Processor = "any",
        samples: Annotated[int, Field(ge=1)] = 128,
        max_drop: Annotated[float, Field(ge=0)] | None = None,
        skip: tuple[str, ...] = ("head",),
        metrics: Any = None,
        task: Any = None,
        source: Path | None = None,
    ) -> None:
        if max_drop is not None and precision != "int8":
            raise UserError(
                f"{self.key}.max_drop limits the drop of precision=int8, but precision is {precision or 'null'}. Set "
                f"{self.key}.precision=int8, or {self.key}.max_drop=null."
            )
        super().__init__(precision, skip, source, ("int8", "int4_weights"), processor)
        self.scheme = Scheme(4, group_size)
        self.max_drop = max_drop
        self.metrics, self.task = metrics, task
        # NNCF measures the drop with the other layers in float32, so they must run in float32.
        judged = {} if max_drop is None else {"INFERENCE_PRECISION_HINT": "f32"}
        self.settings = ARITHMETIC.get(precision or "fp32", judged)
        self.train_samples = samples if precision == "int8" else 1
        self.limits = LIMITS.get(precision or "fp32", "")

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        super().check(skeleton, before)
        if self.precision == "int4_weights":
            chosen = self.chosen(skeleton)
            self.scheme.check(self.key, count_inputs({name: m for name, m in chosen.items() if not m.is_embedding}))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        import openvino

        # 1) Find out which integers are kept
        model: Any = unwrap_model(pl_module)
        accuracy = self.accuracy_control(trainer, model)
        integers = find_quantized_layers(model, self.key, self.precision)
        self.shrinks = self.lowers_precision and self.max_drop is None and is_float32(model)
        kept = {} if integers or not self.source or self.precision == "fp32" else read_integers(self.source)
        if any(weight.scheme.bits == 3 for weight in kept.values()):
            self.limits = f"{self.limits}; {THREE}".removeprefix("; ")
        wide = self.processor == "any" and has_wide_weights(integers)
        if wide:
            self.settings = {**self.settings, **FLOAT_PRODUCTS}
        self.limits = describe_limits(integers, wide) or self.limits
        # 2) Draw calibration batches
        model.cpu().float()
        # One text at a time, so that padding decides no scale.
        batches = [
            select_inputs(batch, model) for batch in draw_calibration_batches(trainer, self.train_samples, batch_size=1)
        ]
        # 3) Convert the model and lower the precision of the graph
        self.folder = TemporaryDirectory()  # exists as long as the stage
        path, every = Path(self.folder.name) / GRAPH, find_all_matrices(model, embeddings=True, head=True)
        with evaluation_mode(model):
            with silence_exporters(), use_shared_core():
                with suspend_quantization(model, integers):
                    graph = convert_to_graph(model, batches[0])
                lowered = quantize_openvino_graph(graph, every, integers)
                layers = self.chosen(model) if self.rounds_weights else {}
                left, found = find_other_readers(graph, {k: v for k, v in layers.items() if k not in kept})
                if self.precision == "int8":
                    graph = quantize_graph(graph, batches, left, self.processor, accuracy)
                elif self.precision in ("int8_weights", "int4_weights"):
                    graph = quantize_weights(graph, self.precision, self.scheme.group_size, left)
                elif self.lowers_precision:
                    store_float16(graph, {name: every[name] for name in kept})
                lowered |= keep_integers(graph, kept, every)  # last, because NNCF has no integers of three bits
                require_all(self.key, (*layers, *kept, *integers), lowered | found, every)
                openvino.save_model(graph, path, compress_to_fp16=False)
            # 4) Compare the graph with the model
            exported = Model(path, self.settings, strip_config(model))
            self.agreement = measure_on_validation(trainer, model, exported)
            rounded = any(weight.grid.scale.dtype != torch.float32 for weight in kept.values())  # weights, by the model
            if integers or (kept and self.precision is None and not rounded):
                require_kept(self.key, trainer, model, exported, integers)
        if self.lowers_precision or integers or rounded:
            self.exported = exported

    def accuracy_control(self, trainer: pl.Trainer, model: Any) -> dict[str, Any]:
        """Return NNCF's arguments to limit the drop: the validation split and a function that measures a graph."""
        if self.max_drop is None:
            return {}
        if self.metrics is None or self.task is None or not trainer.enable_validation:
            raise UserError(
                f"{self.key}.max_drop is {self.max_drop:g}; it needs the metric on validation text. Pass metrics and "
                "task to OpenVINO, and a validation loader to `fit`."
            )
        import nncf

        def read(batch: Batch) -> dict[str, np.ndarray]:
            return to_arrays(select_inputs(batch, model))

        def judge(graph: Any, batches: Iterable[Batch]) -> tuple[float, None]:
            scores = self.metrics.clone()
            for batch in batches:
                logits = torch.from_numpy(graph.create_infer_request().infer(read(batch))[0])
                scores.update(logits, batch["labels"].cpu())
            value = float(scores.compute()[primary])
            return (value if higher_is_better(primary) else -value), None

        primary = self.task.primary
        return {
            "validation_dataset": nncf.Dataset(read_validation_batches(trainer), read),
            "validation_fn": judge,
            "max_drop": self.max_drop if primary.endswith("perplexity") else self.max_drop / 100,
        }

    def save(self, model: nn.Module, folder: Path) -> None:
        for path in Path(self.folder.name).iterdir():
            shutil.copy(path, folder)
        (folder / SETTINGS).write_text(json.dumps(self.settings), encoding="utf-8")
        strip_config(model).save_pretrained(folder)
