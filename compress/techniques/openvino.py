"""Export to OpenVINO, in full or lower precision."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
import torch
from pydantic import Field, validate_call
from torch import nn

from compress.errors import UserError
from compress.exporting.agreement import measure_on_validation
from compress.exporting.openvino import (
    ARITHMETIC,
    convert_to_graph,
    find_other_readers,
    keep_integers,
    quantize_graph,
    quantize_weights,
    store_float16,
    to_arrays,
)
from compress.exporting.qdq import describe_limits, find_quantized_layers, quantize_openvino_graph, suspend_quantization
from compress.exporting.stage import Export
from compress.exporting.tracing import is_float32, select_inputs, strip_config
from compress.formats.packed import read_integers
from compress.maths.rounding import Scheme
from compress.models.calibration import Batch, draw_calibration_batches, read_validation_batches
from compress.models.layers import evaluation_mode, unwrap_model
from compress.quiet import silence_exporters
from compress.runtimes.openvino import GRAPH, SETTINGS, Model, use_shared_core
from compress.tasks.kinds import higher_is_better

LIMITS = {
    "fp16": "the weights are turned back into float32 when they are loaded: less to store, no speed there",
    "bf16": "a CPU without bfloat16 arithmetic runs it in float32: less to store, no speed there",
}
THREE = "integers of 3 bits are turned into floats when they are loaded: less to store, no speed there"


class OpenVINO(Export):
    """Export the model in OpenVINO's format, for any number and length of texts, to run without PyTorch.

    Works when the fit ends; the model itself stays as it is, on the CPU in float32. A causal language model gives the
    logits of every position, and keeps keys and values as the state of a request: reset, the request scores texts; not
    reset, it goes on with the tokens after.

    - None, the default: what the chain left. Floats stay float32, arithmetic is in float32, which is not OpenVINO's own
      choice on a CPU that has bfloat16, and weights that ``gptq``, ``awq`` or ``mixed`` have rounded keep their
      integers, scales and zero points, as they do with all that follow but ``fp32``. Integers that meet quantized
      inputs, by ``qat`` or ``w8a8`` with ``dynamic=False``, stay too, and so do the ranges of the inputs.
    - ``fp32``: all as float32.
    - ``fp16``: weights in float16, arithmetic in float32.
    - ``bf16``: weights in float16, arithmetic in bfloat16 where the CPU has it.
    - ``int8``: weights and inputs as integers, products of activations too, by NNCF, with scales found on the first
      ``samples`` examples of the datamodule's ``calibration`` or else of the training loader.
    - ``int8_weights``, ``int4_weights``: weights alone, symmetric around zero, with a scale for every output or every
      ``group_size`` consecutive inputs of one, by NNCF; embeddings have 8 bits in both.

    After a stage that rounded weights ``int8_weights`` rounds what it left in floats; ``int8`` and ``int4_weights`` are
    refused. With ``int*`` the rest runs in bfloat16 where the CPU has it (with ``max_drop`` in float32), and what meets
    integers of weights alone is rounded to 8 bits as it comes, in groups of 32, where OpenVINO multiplies them so.
    Kozlov et al., "Neural Network Compression Framework for Fast Model Inference", 2020, arXiv:2002.08679.

    Args:
        precision: of the graph.
        group_size: inputs that share a scale in ``int4_weights``; -1 for one scale an output.
        samples: training examples (for a language model, blocks of tokens) that ``int8`` calibrates on.
        max_drop: points of the task's metric (of perplexity as it is) by which ``int8`` may be worse than floats on
            the validation split; the layers that cost most stay floats until it is not. None: whatever comes.
        skip: what integers leave in floats: ``embeddings``, ``head`` (all else outside the transformer blocks) and
            patterns of layers' names.
        metrics: of the task, and
        task: which says the one that counts: both for ``max_drop``, and given by the chain.
        source: folder of the artifact that the stage starts from, in which it finds the integers.

    Raises:
        UserError: a pattern fits no layer, no layer is left, groups do not divide one, or settings contradict.

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
        samples: Annotated[int, Field(ge=1)] = 128,
        max_drop: Annotated[float, Field(ge=0)] | None = None,
        skip: tuple[str, ...] = ("head",),
        metrics: Any = None,
        task: Any = None,
        source: Path | None = None,
    ) -> None:
        if max_drop is not None and precision != "int8":
            raise UserError(
                f"{self.key}.max_drop bounds what precision=int8 may cost and precision is {precision or 'null'}: set "
                f"{self.key}.precision=int8, or leave max_drop out."
            )
        super().__init__(precision, skip, source, rounds=("int8", "int4_weights"))
        self.scheme = Scheme(4, group_size)
        self.max_drop = max_drop
        self.metrics, self.task = metrics, task
        # NNCF judges in float32 what it does not quantize, and so it must run.
        judged = {} if max_drop is None else {"INFERENCE_PRECISION_HINT": "f32"}
        self.settings = ARITHMETIC.get(precision or "fp32", judged)
        self.train_samples = samples if precision == "int8" else 1
        self.limits = LIMITS.get(precision or "fp32", "")

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        super().check(skeleton, before)
        for name, layer in self.chosen(skeleton).items() if self.precision == "int4_weights" else ():
            if isinstance(layer, nn.Linear):
                self.scheme.check(self.key, name, layer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        import openvino

        model: Any = unwrap_model(pl_module)
        accuracy = self.accuracy_control(trainer)
        integers = find_quantized_layers(model, self.key, self.precision)
        self.shrinks = self.lowers_precision and self.max_drop is None and is_float32(model)
        kept = {} if integers or not self.source or self.precision == "fp32" else read_integers(self.source)
        if any(one.scheme.bits == 3 for one in kept.values()):
            self.limits = f"{self.limits}; {THREE}".removeprefix("; ")
        self.limits = describe_limits(integers) or self.limits
        model.cpu().float()
        # One at a time, so that no scale is that of padding.
        batches = [
            select_inputs(batch) for batch in draw_calibration_batches(trainer, self.train_samples, batch_size=1)
        ]
        self.folder = TemporaryDirectory()  # there for as long as the stage is
        path = Path(self.folder.name) / GRAPH
        with evaluation_mode(model):
            with silence_exporters(), use_shared_core():
                with suspend_quantization(model, integers):
                    graph = convert_to_graph(model, batches[0])
                quantize_openvino_graph(graph, model, integers)
                left = find_other_readers(graph, self.chosen(model).keys() - kept.keys())
                if self.precision == "int8":
                    graph = quantize_graph(graph, batches, left, accuracy)
                elif self.precision in ("int8_weights", "int4_weights"):
                    graph = quantize_weights(graph, self.precision, self.scheme.group_size, left)
                elif self.lowers_precision:
                    store_float16(graph, kept)
                keep_integers(graph, kept)  # last, as NNCF knows none of three bits
                openvino.save_model(graph, path, compress_to_fp16=False)
            exported = Model(path, self.settings, strip_config(model))
            self.agreement = measure_on_validation(trainer, model, exported)
        if self.lowers_precision or integers or any(one.grid.scale.dtype != torch.float32 for one in kept.values()):
            self.exported = exported

    def accuracy_control(self, trainer: pl.Trainer) -> dict[str, Any]:
        """What NNCF needs to bound the drop: the validation split, and how to judge a graph on it."""
        if self.max_drop is None:
            return {}
        if self.metrics is None or self.task is None or not trainer.enable_validation:
            raise UserError(
                f"{self.key}.max_drop={self.max_drop:g} is told on validation text by the task's metric: give OpenVINO "
                "metrics and task, as a chain does, and `fit` a validation loader."
            )
        import nncf

        def judge(graph: Any, batches: Iterable[Batch]) -> tuple[float, None]:
            scores = self.metrics.clone()
            for batch in batches:
                logits = torch.from_numpy(graph.create_infer_request().infer(to_arrays(batch))[0])
                scores.update(logits, batch["labels"].cpu())
            value = float(scores.compute()[primary])
            return (value if higher_is_better(primary) else -value), None

        primary = self.task.primary
        return {
            "validation_dataset": nncf.Dataset(read_validation_batches(trainer), to_arrays),
            "validation_fn": judge,
            "max_drop": self.max_drop if primary == "perplexity" else self.max_drop / 100,
        }

    def save(self, model: nn.Module, folder: Path) -> None:
        for path in Path(self.folder.name).iterdir():
            shutil.copy(path, folder)
        (folder / SETTINGS).write_text(json.dumps(self.settings))
        strip_config(model).save_pretrained(folder)
