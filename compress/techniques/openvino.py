"""Export to OpenVINO, in full or lower precision."""

from __future__ import annotations

import json
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
    plain_config,
    round_once,
)
from compress.models import compressed, evaluating, select
from compress.quantization import Scheme
from compress.quiet import muted
from compress.runtimes.openvino import GRAPH, SETTINGS, Model

KEY = "technique.openvino"
LIMITS = {
    "fp16": "the weights are turned back into float32 when they are loaded: less to store, no speed there",
    "bf16": "a CPU without bfloat16 arithmetic runs it in float32: less to store, no speed there",
}


class OpenVINO(pl.Callback):
    """Export the model in OpenVINO's format, for any number and length of texts, to run without PyTorch.

    Works when the fit ends; the model itself stays as it is, on the CPU in float32. A causal language model gives the
    logits of every position, without a cache.

    - ``fp32``: arithmetic in float32, which is not OpenVINO's own choice on a CPU that has bfloat16.
    - ``fp16``: weights in float16, arithmetic in float32.
    - ``bf16``: weights in float16, arithmetic in bfloat16 where the CPU has it.
    - ``int8``: weights and inputs as integers, products of activations too, by NNCF, with scales found on the first
      ``samples`` examples of the datamodule's ``calibration`` or else of the training loader.
    - ``int8_weights``, ``int4_weights``: weights alone, symmetric around zero, with a scale for every output or every
      ``group_size`` consecutive inputs of one, by NNCF.

    What is not quantized runs in bfloat16 where the CPU has it. Kozlov et al., "Neural Network Compression Framework
    for Fast Model Inference", 2020, arXiv:2002.08679.

    Args:
        precision: of the graph.
        group_size: inputs that share a scale in ``int4_weights``; -1 for one scale an output.
        samples: training examples (for a language model, blocks of tokens) that ``int8`` calibrates on.
        skip: what integers leave in floats: ``embeddings``, ``head`` (all else outside the transformer blocks) and
            patterns of layers' names.
        hint: what OpenVINO shares out the threads for.

    Raises:
        UserError: a pattern fits no layer, no layer is left, or groups do not divide one.

        pl.Trainer(max_epochs=1, callbacks=[OpenVINO(precision="int8")]).fit(module, loader)
    """

    needs = ("float", "packed")
    leaves = "openvino"
    runtime = "openvino"
    packages = ("openvino", "nncf")
    changes = False

    @validate_call
    def __init__(
        self,
        precision: Literal["fp32", "fp16", "bf16", "int8", "int8_weights", "int4_weights"] = "fp32",
        group_size: Annotated[int, Field(ge=-1)] = 128,
        samples: Annotated[int, Field(ge=1)] = 128,
        skip: tuple[str, ...] = ("embeddings", "head"),
        hint: Literal["latency", "throughput"] = "latency",
    ) -> None:
        self.precision = precision
        self.scheme = Scheme(4, group_size)
        self.skip = skip
        self.settings = {"PERFORMANCE_HINT": hint.upper()}
        if precision in ("fp32", "fp16"):
            self.settings["INFERENCE_PRECISION_HINT"] = "f32"
        if precision == "bf16":
            self.settings["INFERENCE_PRECISION_HINT"] = "bf16"
        self.train_samples = samples if precision == "int8" else 1
        self.limits = LIMITS.get(precision, "")
        self.shrinks = False
        self.exported: Model | None = None
        self.agreement: Agreement | None = None

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        round_once(KEY, self.precision, before)
        layers = select(skeleton, self.skip, f"{KEY}.skip")
        for name, layer in layers.items() if self.precision == "int4_weights" else ():
            if isinstance(layer, nn.Linear):
                self.scheme.check(KEY, name, layer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        import openvino

        model: Any = compressed(pl_module)
        self.shrinks = self.precision != "fp32" and is_float32(model)
        model.cpu().float()
        # One at a time, so that no scale is that of padding.
        batches = [inputs_of(batch) for batch in calibration_batches(trainer, self.train_samples, batch_size=1)]
        self.folder = TemporaryDirectory()  # there for as long as the stage is
        path = Path(self.folder.name) / GRAPH
        with evaluating(model):
            with muted():
                graph = convert(model, batches[0])
                left = readers_of_others(graph, select(model, self.skip, f"{KEY}.skip"))
                if self.precision == "int8":
                    graph = quantize(graph, batches, left)
                elif self.precision.endswith("_weights"):
                    graph = quantize_weights(graph, self.precision, self.scheme.group_size, left)
                elif self.precision != "fp32":
                    halve(graph)
                openvino.save_model(graph, path, compress_to_fp16=False)
            exported = Model(path, self.settings, plain_config(model))
            self.agreement = on_validation_text(trainer, model, exported)
        if self.precision != "fp32":
            self.exported = exported

    def save(self, model: nn.Module, folder: Path) -> None:
        for path in Path(self.folder.name).iterdir():
            shutil.copy(path, folder)
        (folder / SETTINGS).write_text(json.dumps(self.settings))
        plain_config(model).save_pretrained(folder)

    def report(self, folder: Path) -> None:
        if self.agreement is not None:
            self.agreement.write(folder)


@torch.no_grad()
def convert(model: Any, example: Batch) -> Any:
    """The graph of what PyTorch runs for the ``example``, for batches of any shape."""
    import openvino

    example = any_shape(example)
    graph = openvino.convert_model(Logits(model, example).eval(), example_input=tuple(example.values()))
    for name, port in zip((*example, "logits"), (*graph.inputs, *graph.outputs)):
        port.get_tensor().set_names({name})
    return graph


def readers_of_others(graph: Any, layers: Iterable[str]) -> list[str]:
    """The names of the graph's nodes that multiply by, or look up, what is not the weight of one of the ``layers``."""
    chosen = {f"self.model.{name}.weight" for name in layers}
    constants = [one for one in graph.get_ops() if one.get_type_name() == "Constant"]
    others = [one for one in constants if one.get_element_type().is_real() and one.get_friendly_name() not in chosen]
    readers = [port.get_node() for one in others for port in one.output(0).get_target_inputs()]
    return [one.get_friendly_name() for one in readers if one.get_type_name() in ("MatMul", "Gather")]


def quantize(graph: Any, batches: list[Batch], left: list[str]) -> Any:
    """Quantize weights and activations, on scales of the activations that the ``batches`` give, but for the nodes
    that are ``left`` as they are."""
    import nncf

    return nncf.quantize(
        graph,
        nncf.Dataset([{name: value.numpy() for name, value in batch.items()} for batch in batches]),
        subset_size=len(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        ignored_scope=nncf.IgnoredScope(names=left),
    )


def quantize_weights(graph: Any, precision: str, group_size: int, left: list[str]) -> Any:
    """Quantize weights alone, but for those of the nodes that are ``left`` as they are."""
    import nncf

    four = {"group_size": group_size, "backup_mode": nncf.BackupMode.INT8_SYM} if precision == "int4_weights" else {}
    mode = nncf.CompressWeightsMode.INT4_SYM if four else nncf.CompressWeightsMode.INT8_SYM
    return nncf.compress_weights(graph, mode=mode, ignored_scope=nncf.IgnoredScope(names=left), **four)


def halve(graph: Any) -> None:
    """Store the weights in float16. (OpenVINO's own way takes the angles of positions too, which need more digits.)"""
    import openvino

    for stored in graph.get_ops():
        if stored.get_type_name() == "Constant" and stored.get_element_type().is_real() and len(stored.shape) == 2:
            half = openvino.opset13.constant(stored.data.astype(np.float16))
            readers = stored.output(0).get_target_inputs()
            whole = openvino.opset13.convert(half, "f32")
            for reader in readers:
                reader.replace_source_output(whole.output(0))
