"""Quantization of weights and activations to eight or four bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
from pydantic import Field, validate_call
from torch import nn

from compress.errors import UserError
from compress.formats.packed import Quantized, average_bits, save_model, select_storable
from compress.maths.rounding import (
    Inputs,
    Integers,
    Scheme,
    count_values,
    grid_between,
    minmax_grid,
    percentile_range,
    round_to_nearest,
)
from compress.models.backbone import is_decoder
from compress.models.batches import Batch, draw_calibration_batches
from compress.models.calibration import Shared, join_experts, sequential
from compress.models.families import find_conventions, name_family
from compress.models.folding import smooth_model
from compress.models.layers import evaluation_mode, unwrap_model
from compress.models.linears import copy_with_linear_layers, use_linear_layers
from compress.models.matrices import Matrix, count_inputs
from compress.models.skeletons import find_flat_inputs
from compress.technique import Technique
from compress.techniques.gptq import quantize_layers

OTHER_BITS = (
    "PyTorch multiplies floats in place of the integers: less to store, no speed there; vLLM multiplies integers only "
    "of 8 bits with a scale for every row"
)


class W8A8(Technique, pl.Callback):
    """Round the weights of the transformer blocks to eight or four bits, with a scale for every row or group. Round the
    inputs of their layers too, with a scale for every token or a range for every layer, so that a runtime can multiply
    integers.

    Ranges are those of Wu et al., "Integer Quantization for Deep Learning Inference", 2020, arXiv:2004.09602.
    ``smoothing`` scales large activations down and the weights that multiply them up, so that both are easy to round.
    The scales are folded into the norm or layer before: Xiao et al., "SmoothQuant", 2022, arXiv:2211.10438. A weight
    that is exactly zero stays exactly zero. The experts of a block share a range, which also suits an expert that no
    text of the calibration was routed to. Four bits lose much where a few activations are large; `rotate` before this
    stage spreads these, and with ``rounding=gptq`` weights compensate for each other's errors.

    Runs when the fit ends, on the first ``samples`` examples of the datamodule's ``calibration``, or of the training
    loader if there is none; scales for every token, without smoothing and GPTQ, need no examples. Afterwards the model
    computes with quantized activations, in memory and after loading. The artifact is in the compressed-tensors format,
    which transformers and vLLM load.

    Args:
        dynamic: a scale for every token, computed at inference; false: a range for every layer, from calibration.
        symmetric: ranges around zero, which every runtime supports; false: from the lowest to the highest value, with
            a zero point, for which ``dynamic`` must be false.
        percentile: percentage of the values in calibration that a layer's range covers at either end; 100 for all.
        weight_bits: bits of each weight.
        activation_bits: bits of the inputs; four need ``dynamic``.
        group_size: consecutive inputs of a row whose weights share a scale; -1 for one scale a row.
        rounding: ``nearest``, or ``gptq``, by :class:`compress.techniques.gptq.GPTQ` with its defaults.
        smoothing: share of the difficulty that moves to the weights, 0 to 1; null: no smoothing.
        samples: training examples (for a language model, blocks of tokens) to calibrate on.
        batch_size: examples in a batch.
        skip: layers in full precision: ``embeddings`` (always), ``head`` (all else outside the transformer blocks) and
            patterns of layer names.

    Raises:
        UserError: the model does not support smoothing, a pattern matches no layer, or settings contradict.

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[W8A8(dynamic=False)]).fit(module, loader)
    """

    leaves = "integer"
    packages = ("compressed_tensors",)
    shrinks = True
    limits = (
        "PyTorch multiplies floats in place of the integers: less to store, no speed there; vLLM, and int8 exports, "
        "multiply integers"
    )

    @validate_call
    def __init__(
        self,
        dynamic: bool = True,
        symmetric: bool = True,
        percentile: Annotated[float, Field(gt=50, le=100)] = 99.999,
        weight_bits: Literal[4, 8] = 8,
        activation_bits: Literal[4, 8] = 8,
        group_size: Annotated[int, Field(ge=-1)] = -1,
        rounding: Literal["nearest", "gptq"] = "nearest",
        smoothing: Annotated[float, Field(ge=0, le=1)] | None = None,
        samples: Annotated[int, Field(ge=0)] = 128,
        batch_size: Annotated[int, Field(ge=1)] = 8,
        skip: tuple[str, ...] = ("embeddings", "head"),
    ) -> None:
        self.dynamic = dynamic
        self.scheme = Scheme(weight_bits, group_size)
        self.inputs = Scheme(activation_bits, symmetric=symmetric)
        self.rounding = rounding
        self.percentile = percentile
        self.smoothing = smoothing
        self.samples = samples
        self.batch_size = batch_size
        self.skip = skip
        compensated, smoothed = rounding == "gptq", smoothing is not None
        if (weight_bits, activation_bits, group_size) != (8, 8, -1):
            self.limits = OTHER_BITS
        calibrated = {"smoothing": smoothed, "rounding=gptq": compensated, "dynamic=false": not dynamic}
        self.train_samples = samples if any(calibrated.values()) else 0
        self.keeps_head = "head" in skip
        self.quantized: dict[str, Quantized] = {}
        self.average_bits: dict[str, float] = {}
        if dynamic and not symmetric:
            raise UserError(
                f"{self.key}.symmetric=false needs a zero point for every layer and {self.key}.dynamic=true has only a "
                f"scale for every token. Set {self.key}.dynamic=false, or {self.key}.symmetric=true."
            )
        if activation_bits == 4 and not dynamic:
            raise UserError(
                f"{self.key}.activation_bits is 4, for which one range for all tokens is too coarse. Set "
                f"{self.key}.dynamic=true, or {self.key}.activation_bits=8."
            )
        if not samples and (needed := [setting for setting, asked in calibrated.items() if asked]):
            raise UserError(
                f"{self.key}.samples is 0; {self.key}.{needed[-1]} needs calibration. Set {self.key}.samples=128."
            )

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        config: Any = getattr(skeleton, "config", None)
        family = name_family(skeleton)
        if self.smoothing is not None and not find_conventions(skeleton).folds:
            raise UserError(self.describe_unfoldable(skeleton))
        if self.dynamic and "head" not in self.skip and not (config is not None and is_decoder(config)):
            raise UserError(
                f"{self.key}.dynamic=true needs a scale for every token, and the head of `{family}` reads one vector a "
                f"text, which loaders would scale by the batch. Add `head` to {self.key}.skip, or set "
                f"{self.key}.dynamic=false."
            )
        skeleton = copy_with_linear_layers(skeleton)
        wanted = select_storable(skeleton, self.skip, self.key)
        self.scheme.check(self.key, count_inputs(wanted))
        if self.dynamic and (flat := find_flat_inputs(skeleton, wanted)):
            raise UserError(
                f"{self.key}.dynamic=true needs a scale for every token, and `{flat[0]}` of `{family}` reads texts and "
                f"tokens in one dimension, which loaders would scale by the batch. Set {self.key}.dynamic=false."
            )

    def describe_unfoldable(self, model: nn.Module) -> str:
        return (
            f"{self.key}.smoothing moves the scales of a layer's inputs into the norm or layer before it, and no place "
            f"of `{name_family(model)}` allows that: something else reads the same outputs. Set "
            f"{self.key}.smoothing=null."
        )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = unwrap_model(pl_module)
        use_linear_layers(model, ["Conv1D"])
        self.check(model, [])  # a script without the chain has not checked the model

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = unwrap_model(pl_module).to(trainer.strategy.root_device)
        wanted = select_storable(model, self.skip, self.key)
        batches = list(draw_calibration_batches(trainer, self.train_samples, self.batch_size))
        with evaluation_mode(model):
            if self.smoothing is not None and not smooth_model(model, batches, wanted, self.smoothing):
                raise UserError(self.describe_unfoldable(model))
            weights = self._round_weights(model, wanted, batches)
            if self.dynamic:
                self._round_inputs(wanted, weights, Inputs(self.inputs))
            else:
                experts = []  # whose ranges are joined when all are known
                for shared in sequential(model, batches, count_values, wanted):
                    self._round_inputs(shared.matrices, weights, self._find_range(shared))
                    experts += [shared] if any(m.expert is not None for m in shared.matrices.values()) else []
                for shared in join_experts(experts):
                    inputs = self._find_range(shared)
                    self.quantized |= {name: self.quantized[name]._replace(inputs=inputs) for name in shared.matrices}
        use_linear_layers(model)
        for name in (name for name, matrix in wanted.items() if matrix.expert is not None):
            self.quantized[name].attach(model.get_submodule(name))
        self.average_bits = average_bits(self.quantized)
        model.cpu()

    def _find_range(self, shared: Shared) -> Inputs:
        dtype = next(iter(shared.matrices.values())).dtype
        ends = percentile_range(shared.statistic, self.percentile)
        return Inputs(self.inputs, grid_between(ends, self.inputs, dtype))

    def _round_weights(self, model: nn.Module, layers: dict[str, Matrix], batches: list[Batch]) -> dict[str, Integers]:
        """Round the weights of the layers and return the integers."""
        if self.rounding == "gptq":
            schemes = dict.fromkeys(layers, self.scheme)
            outcomes = quantize_layers(model, layers, batches, schemes, damping=0.01, act_order=True)
            return {name: outcome.quantized.weight for name, outcome in outcomes.items()}
        integers = {}
        for name, matrix in layers.items():
            grid = minmax_grid(matrix.weight, self.scheme, matrix.dtype)
            integers[name] = round_to_nearest(matrix.weight, grid, self.scheme)
            matrix.weight.copy_(integers[name].dequantize(matrix.dtype))
        return integers

    def _round_inputs(self, layers: dict[str, Matrix], weights: dict[str, Integers], inputs: Inputs) -> None:
        """Make the layers, with these rounded weights, round their inputs; those of experts become layers later."""
        for name, matrix in layers.items():
            self.quantized[name] = Quantized(weights[name], inputs)
            if matrix.expert is None:
                self.quantized[name].attach(matrix.module)

    def save(self, model: nn.Module, folder: Path) -> None:
        save_model(model, self.quantized, folder)
