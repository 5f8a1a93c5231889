"""Quantization of weights and activations to eight bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytorch_lightning as pl
from pydantic import Field, validate_call
from torch import nn

from compress.errors import UserError
from compress.formats.packed import Quantized, average_bits, save_model, select_storable
from compress.maths.rounding import (
    Inputs,
    Scheme,
    count_values,
    grid_between,
    minmax_grid,
    percentile_range,
    round_to_nearest,
)
from compress.models.backbone import is_decoder
from compress.models.batches import draw_calibration_batches
from compress.models.calibration import Shared, join_experts, sequential
from compress.models.families import find_conventions, name_family
from compress.models.folding import smooth_model
from compress.models.layers import evaluation_mode, unwrap_model
from compress.models.linears import copy_with_linear_layers, use_linear_layers
from compress.models.matrices import Matrix
from compress.models.skeletons import find_flat_inputs
from compress.technique import Technique

WEIGHTS = Scheme(bits=8)


class W8A8(Technique, pl.Callback):
    """Round the weights of the transformer blocks to eight bits, with a scale for every row. Round the inputs of their
    layers too, with a scale for every token or a range for every layer, so that a runtime can multiply integers.

    Ranges are those of Wu et al., "Integer Quantization for Deep Learning Inference", 2020, arXiv:2004.09602.
    ``smoothing`` scales large activations down and the weights that multiply them up, so that both are easy to round.
    The scales are folded into the norm or layer before: Xiao et al., "SmoothQuant", 2022, arXiv:2211.10438. A weight
    that is exactly zero stays exactly zero. The experts of a block share a range, which also suits an expert that no
    text of the calibration was routed to.

    Runs when the fit ends, on the first ``samples`` examples of the datamodule's ``calibration``, or of the training
    loader if there is none; scales for every token without smoothing need no examples. Afterwards the model computes
    with quantized activations, in memory and after loading. The artifact is in the compressed-tensors format, which
    transformers and vLLM load.

    Args:
        dynamic: a scale for every token, computed at inference; false: a range for every layer, from calibration.
        symmetric: ranges around zero, which every runtime supports; false: from the lowest to the highest value, with
            a zero point, for which ``dynamic`` must be false.
        percentile: percentage of the values in calibration that a layer's range covers at either end; 100 for all.
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
        smoothing: Annotated[float, Field(ge=0, le=1)] | None = None,
        samples: Annotated[int, Field(ge=0)] = 128,
        batch_size: Annotated[int, Field(ge=1)] = 8,
        skip: tuple[str, ...] = ("embeddings", "head"),
    ) -> None:
        self.dynamic = dynamic
        self.inputs = Scheme(bits=8, symmetric=symmetric)
        self.percentile = percentile
        self.smoothing = smoothing
        self.samples = samples
        self.batch_size = batch_size
        self.skip = skip
        self.train_samples = 0 if dynamic and smoothing is None else samples
        self.keeps_head = "head" in skip
        self.quantized: dict[str, Quantized] = {}
        self.average_bits: dict[str, float] = {}
        if dynamic and not symmetric:
            raise UserError(
                f"{self.key}.symmetric=false needs a zero point for every layer and {self.key}.dynamic=true has only a "
                f"scale for every token. Set {self.key}.dynamic=false, or {self.key}.symmetric=true."
            )
        if not samples and not (dynamic and smoothing is None):
            calibrated = "smoothing" if dynamic else "dynamic=false"
            raise UserError(
                f"{self.key}.samples is 0; {self.key}.{calibrated} needs calibration. Set {self.key}.samples=128."
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
            if self.dynamic:
                self._round_layers(wanted, Inputs(self.inputs))
            else:
                experts = []  # of which each is rounded at once, and all inputs when every range is known
                for shared in sequential(model, batches, count_values, wanted):
                    self._round_layers(shared.matrices, self._find_range(shared))
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

    def _round_layers(self, layers: dict[str, Matrix], inputs: Inputs) -> None:
        for name, matrix in layers.items():
            weight = round_to_nearest(matrix.weight, minmax_grid(matrix.weight, WEIGHTS, matrix.dtype), WEIGHTS)
            matrix.weight.copy_(weight.dequantize(matrix.dtype))
            self.quantized[name] = Quantized(weight, inputs)
            if matrix.expert is None:
                self.quantized[name].attach(matrix.module)

    def save(self, model: nn.Module, folder: Path) -> None:
        save_model(model, self.quantized, folder)
