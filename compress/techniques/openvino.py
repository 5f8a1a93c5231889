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
from torch import Tensor, nn

from compress import packing, qdq
from compress.calibration import Batch, calibration_batches
from compress.errors import UserError
from compress.exchange import (
    Export,
    inputs_of,
    is_float32,
    on_validation_text,
    plain_config,
    to_trace,
)
from compress.metrics import higher_is_better
from compress.models import compressed, evaluating
from compress.packing import Integers
from compress.quantization import Scheme
from compress.quiet import muted
from compress.runtimes.openvino import GRAPH, SCALE, SETTINGS, ZERO, Model, on_one_core
from compress.techniques.finetune import aligned
from compress.techniques.sensitivity import validation_batches

KEY = "technique.openvino"
ARITHMETIC = {
    # Left to itself OpenVINO rounds what meets weights that are integers, and keys and values, to 8 bits.
    name: {"INFERENCE_PRECISION_HINT": kind, "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": kind}
    for name, kind in (("fp32", "f32"), ("fp16", "f32"), ("bf16", "bf16"))
}
"""How OpenVINO computes with a graph; with the other precisions as it thinks best."""
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

        pl.Trainer(max_epochs=1, callbacks=[OpenVINO(precision="int8")]).fit(module, loader)
    """

    leaves = "openvino"
    runtime = "openvino"
    packages = ("openvino", "nncf")
    key = KEY
    rounds = ("int8", "int4_weights")
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
                f"{KEY}.max_drop bounds what precision=int8 may cost and precision is {precision or 'null'}: set "
                f"{KEY}.precision=int8, or leave max_drop out."
            )
        super().__init__(precision, skip, source)
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
                self.scheme.check(KEY, name, layer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        import openvino

        model: Any = compressed(pl_module)
        accuracy = self.accuracy(trainer)
        integers = qdq.layers(model, KEY, self.precision)
        self.shrinks = self.lowers and self.max_drop is None and is_float32(model)
        kept = {} if integers or not self.source or self.precision == "fp32" else packing.integers(self.source)
        if any(one.scheme.bits == 3 for one in kept.values()):
            self.limits = f"{self.limits}; {THREE}".removeprefix("; ")
        self.limits = qdq.limits(integers) or self.limits
        model.cpu().float()
        # One at a time, so that no scale is that of padding.
        batches = [inputs_of(batch) for batch in calibration_batches(trainer, self.train_samples, batch_size=1)]
        self.folder = TemporaryDirectory()  # there for as long as the stage is
        path = Path(self.folder.name) / GRAPH
        with evaluating(model):
            with muted(), on_one_core():
                with qdq.plain(model, integers):
                    graph = convert(model, batches[0])
                qdq.into_openvino(graph, model, integers)
                left = readers_of_others(graph, self.chosen(model).keys() - kept.keys())
                if self.precision == "int8":
                    graph = quantize(graph, batches, left, accuracy)
                elif self.precision in ("int8_weights", "int4_weights"):
                    graph = quantize_weights(graph, self.precision, self.scheme.group_size, left)
                elif self.lowers:
                    halve(graph, kept)
                keep_integers(graph, kept)  # last, as NNCF knows none of three bits
                openvino.save_model(graph, path, compress_to_fp16=False)
            exported = Model(path, self.settings, plain_config(model))
            self.agreement = on_validation_text(trainer, model, exported)
        if self.lowers or integers or any(one.grid.scale.dtype != torch.float32 for one in kept.values()):
            self.exported = exported

    def accuracy(self, trainer: pl.Trainer) -> dict[str, Any]:
        """What NNCF needs to bound the drop: the validation split, and how to judge a graph on it."""
        if self.max_drop is None:
            return {}
        if self.metrics is None or self.task is None or not trainer.enable_validation:
            raise UserError(
                f"{KEY}.max_drop={self.max_drop:g} is told on validation text by the task's metric: give OpenVINO "
                "metrics and task, as a chain does, and `fit` a validation loader."
            )
        import nncf

        def judge(graph: Any, batches: Iterable[Batch]) -> tuple[float, None]:
            scores = self.metrics.clone()
            for batch in batches:
                logits = torch.from_numpy(graph.create_infer_request().infer(arrays(batch))[0])
                scores.update(*aligned(logits, batch["labels"].cpu()))
            value = float(scores.compute()[primary])
            return (value if higher_is_better(primary) else -value), None

        primary = self.task.primary
        return {
            "validation_dataset": nncf.Dataset(validation_batches(trainer), arrays),
            "validation_fn": judge,
            "max_drop": self.max_drop if primary == "perplexity" else self.max_drop / 100,
        }

    def save(self, model: nn.Module, folder: Path) -> None:
        for path in Path(self.folder.name).iterdir():
            shutil.copy(path, folder)
        (folder / SETTINGS).write_text(json.dumps(self.settings))
        plain_config(model).save_pretrained(folder)


def export(model: Any, example: Batch, folder: Path) -> None:
    """Write the model's graph in float32, as the runtime loads it."""
    import openvino

    with evaluating(model), muted():
        openvino.save_model(convert(model, example), folder / GRAPH, compress_to_fp16=False)
    (folder / SETTINGS).write_text(json.dumps(ARITHMETIC["fp32"]))
    plain_config(model).save_pretrained(folder)


@torch.no_grad()
def convert(model: Any, example: Batch) -> Any:
    """The graph of what PyTorch runs for the ``example``, for batches of any shape."""
    import openvino

    module, inputs, past = to_trace(model, example)
    graph = openvino.convert_model(module.eval(), example_input=(*inputs.values(), *past))
    before, after = ([f"{when}.{i}" for i in range(len(past))] for when in ("before", "after"))
    for name, port in zip((*inputs, *before, "logits", *after), (*graph.inputs, *graph.outputs)):
        port.get_tensor().set_names({name})
    if past:
        keep_state(graph, dict(zip(before, after)), [one.shape for one in past])
    return graph


def keep_state(graph: Any, names: dict[str, str], shapes: list[torch.Size]) -> None:
    """Make inputs and outputs of the same ``names`` a state, that is empty to begin with, for as many texts as come."""
    from openvino import PartialShape
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    for name, shape in zip(names, shapes):
        graph.input(name).get_node().set_partial_shape(PartialShape([-1, shape[1], -1, shape[3]]))
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, names)
    texts = ops.gather(ops.shape_of(graph.input("input_ids").get_node(), output_type="i64"), [0], 0)
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            shape = node.get_output_partial_shape(0)
            rest = ops.constant(np.array([shape[1].get_length(), 0, shape[3].get_length()]))
            node.set_arguments([ops.broadcast(ops.constant(np.float32(0)), ops.concat([texts, rest], 0))])
        if node.get_type_name() == "ScaledDotProductAttention":
            seen_by_all(node)
    graph.validate_nodes_and_infer_types()


def seen_by_all(attention: Any) -> None:
    """Let a token of padding before a text, which may attend to nothing, attend to everything: OpenVINO would give it
    no number, and later tokens with it."""
    from openvino import opset13 as ops

    mask = attention.input_value(3)
    nothing = ops.logical_not(ops.reduce_logical_or(mask, ops.constant(-1), True))
    attention.input(3).replace_source_output(ops.logical_or(mask, nothing).output(0))


def keep_integers(graph: Any, layers: dict[str, Integers]) -> None:
    """Put the integers of the ``layers`` in the place of the floats that they stand for, in the pattern from which
    OpenVINO multiplies without making floats of them all; of three bits it makes floats when it loads them."""
    from openvino import Type
    from openvino import opset13 as ops

    constants = {node.get_friendly_name(): node for node in graph.get_ops() if node.get_type_name() == "Constant"}
    for name, (scheme, integers, grid) in layers.items():
        dense = constants[constant_of(name)]
        signed = scheme.symmetric and scheme.bits in (4, 8)  # there are no others with a sign
        lift, to = (0, np.int8) if signed else (-scheme.lowest, np.uint8)
        kind = getattr(Type, f"{'i' if signed else 'u'}{scheme.bits}")
        scale, zero = grid.scale, grid.zero[:1, :1] if scheme.symmetric else grid.zero
        if grouped := scale.shape[1] > 1:
            integers, scale, zero = integers.unflatten(1, (scale.shape[1], -1)), scale[..., None], zero[..., None]

        def stored(values: Tensor, ends: str = "") -> Any:
            constant = ops.constant((values.short() + lift).numpy().astype(to), dtype=kind)  # noqa: B023
            constant.set_friendly_name(f"{dense.get_friendly_name()}{ends}")  # noqa: B023
            return ops.convert(constant, "f32")

        readers = dense.output(0).get_target_inputs()
        weight = stored(integers)
        if not signed:
            weight = ops.subtract(weight, stored(zero, ZERO))
        scales = ops.constant(scale.float().numpy())
        scales.set_friendly_name(f"{dense.get_friendly_name()}{SCALE}")
        weight = ops.multiply(weight, scales)
        if grouped:
            weight = ops.reshape(weight, ops.constant(np.array(dense.shape)), False)
        for reader in readers:
            reader.replace_source_output(weight.output(0))


def readers_of_others(graph: Any, layers: Iterable[str]) -> list[str]:
    """The names of the graph's nodes that multiply by, or look up, what is not the weight of one of the ``layers``."""
    chosen = {constant_of(name) for name in layers}
    constants = [one for one in graph.get_ops() if one.get_type_name() == "Constant"]
    others = [one for one in constants if one.get_element_type().is_real() and one.get_friendly_name() not in chosen]
    readers = [port.get_node() for one in others for port in one.output(0).get_target_inputs()]
    return [one.get_friendly_name() for one in readers if one.get_type_name() in ("MatMul", "Gather")]


def quantize(graph: Any, batches: list[Batch], left: list[str], accuracy: dict[str, Any]) -> Any:
    """Quantize weights and activations, on scales of the activations that the ``batches`` give, but for the nodes
    that are ``left`` as they are, and those that ``accuracy`` asks for, if anything."""
    import nncf

    return (nncf.quantize_with_accuracy_control if accuracy else nncf.quantize)(
        graph,
        nncf.Dataset([arrays(batch) for batch in batches]),
        subset_size=len(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        ignored_scope=nncf.IgnoredScope(names=left),
        **accuracy,
    )


def arrays(batch: Batch) -> dict[str, np.ndarray]:
    """What a graph reads of the batch."""
    return {name: value.numpy() for name, value in inputs_of(batch).items()}


def quantize_weights(graph: Any, precision: str, group_size: int, left: list[str]) -> Any:
    """Quantize weights alone, but for those of the nodes that are ``left`` as they are."""
    import nncf

    four = {"group_size": group_size, "backup_mode": nncf.BackupMode.INT8_SYM} if precision == "int4_weights" else {}
    mode = nncf.CompressWeightsMode.INT4_SYM if four else nncf.CompressWeightsMode.INT8_SYM
    return nncf.compress_weights(graph, mode=mode, ignored_scope=nncf.IgnoredScope(names=left), **four)


def halve(graph: Any, but: Iterable[str]) -> None:
    """Store the weights in float16, ``but`` those of some layers. (OpenVINO's own way takes the angles of positions
    too, which need more digits.)"""
    import openvino

    left = {constant_of(name) for name in but}
    for stored in graph.get_ops():
        if stored.get_type_name() != "Constant" or stored.get_friendly_name() in left:
            continue
        if stored.get_element_type().is_real() and len(stored.shape) == 2:
            half = openvino.opset13.constant(stored.data.astype(np.float16))
            readers = stored.output(0).get_target_inputs()
            whole = openvino.opset13.convert(half, "f32")
            for reader in readers:
                reader.replace_source_output(whole.output(0))


def constant_of(layer: str) -> str:
    """What OpenVINO calls the weight of the layer."""
    return f"self.model.{layer}.weight"
