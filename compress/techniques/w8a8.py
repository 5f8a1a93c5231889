"""Quantization of weights and activations to eight bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from pydantic import Field, validate_call
from torch import Tensor, nn

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
from compress.models.calibration import observe, sequential
from compress.models.families import FAMILIES, find_family, name_family
from compress.models.folding import find_sources, fold_scale
from compress.models.layers import evaluation_mode, find_blocks, unwrap_model
from compress.models.matrices import Matrix
from compress.models.shapes import read_block
from compress.technique import Technique

WEIGHTS = Scheme(bits=8)


class W8A8(Technique, pl.Callback):
    """Round the weights of the transformer blocks to eight bits, with a scale for every row. Round the inputs of their
    layers too, with a scale for every token or a range for every layer, so that a runtime can multiply integers.

    Ranges are those of Wu et al., "Integer Quantization for Deep Learning Inference", 2020, arXiv:2004.09602.
    ``smoothing`` scales large activations down and the weights that multiply them up, so that both are easy to round.
    The scales are folded into the norm or layer before: Xiao et al., "SmoothQuant", 2022, arXiv:2211.10438. A weight
    that is exactly zero stays exactly zero.

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
        known = FAMILIES.get(family)
        if self.smoothing is not None and not (known and known.folds):
            reason = (
                f"the norms of `{family}` feed the residual branch as well, which would be scaled too"
                if known
                else f"the norms of `{family}` are not known"
            )
            raise UserError(
                f"{self.key}.smoothing folds the scales of a layer's inputs into the norm before it, and {reason}. Set "
                f"{self.key}.smoothing=null."
            )
        if self.dynamic and "head" not in self.skip and not (config is not None and is_decoder(config)):
            raise UserError(
                f"{self.key}.dynamic=true needs a scale for every token, and the head of `{family}` reads one vector a "
                f"text, which loaders would scale by the batch. Add `head` to {self.key}.skip, or set "
                f"{self.key}.dynamic=false."
            )
        select_storable(skeleton, self.skip, self.key)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check(unwrap_model(pl_module), [])  # a script without the chain has not checked the model

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = unwrap_model(pl_module).to(trainer.strategy.root_device)
        wanted = select_storable(model, self.skip, self.key)
        batches = list(draw_calibration_batches(trainer, self.train_samples, self.batch_size))
        with evaluation_mode(model):
            if self.smoothing is not None:
                largest: dict[str, Tensor] = {}
                for shared in observe(model, batches, max_magnitudes, wanted, combine=torch.maximum):
                    largest |= dict.fromkeys(shared.matrices, shared.statistic)
                smooth_blocks(model, largest, self.smoothing)
            if self.dynamic:
                self._round_layers(wanted, Inputs(self.inputs))
            else:
                for shared in sequential(model, batches, count_values, wanted):
                    dtype = next(iter(shared.matrices.values())).dtype
                    grid = grid_between(percentile_range(shared.statistic, self.percentile), self.inputs, dtype)
                    self._round_layers(shared.matrices, Inputs(self.inputs, grid))
        self.reached = set(self.quantized)
        self.average_bits = average_bits(self.quantized)
        model.cpu()

    def _round_layers(self, layers: dict[str, Matrix], inputs: Inputs) -> None:
        for name, matrix in layers.items():
            weight = round_to_nearest(matrix.weight, minmax_grid(matrix.weight, WEIGHTS, matrix.dtype), WEIGHTS)
            matrix.weight.copy_(weight.dequantize(matrix.dtype))
            self.quantized[name] = Quantized(weight, inputs)
            self.quantized[name].attach(matrix.module)

    def save(self, model: nn.Module, folder: Path) -> None:
        save_model(model, self.quantized, folder)


def max_magnitudes(x: Tensor) -> Tensor:
    """Return the largest magnitude of every input over the tokens of ``x`` ``[tokens, inputs]``."""
    return x.abs().amax(0)


def smooth_blocks(model: nn.Module, largest: dict[str, Tensor], strength: float) -> None:
    """Scale the inputs of the layers for which the ``largest`` activations, ``[inputs]``, are given. The model computes
    the same function."""
    family, (prefix, stack) = find_family(model), find_blocks(model)
    for index, block in enumerate(stack):
        for place in family.folds:
            before: Any = block.get_submodule(place.before)
            changed = (*place.layers, *([place.before] if isinstance(before, nn.Linear) else []))
            if any(f"{prefix}.{index}.{name}" not in largest for name in changed):
                continue  # a skipped layer would change
            layers: list[Any] = [block.get_submodule(name) for name in place.layers]
            source = find_sources(before, layers[0], read_block(block, family).head_size)
            activation = max_per_source(source, largest[f"{prefix}.{index}.{place.layers[0]}"])
            weight = max_per_source(source, torch.cat([layer.weight.data for layer in layers]).float().abs().amax(0))
            fold_scale(before, layers, smoothing_scale(activation, weight, strength), source)


def max_per_source(source: Tensor, x: Tensor) -> Tensor:
    """Return the largest of ``x`` ``[inputs]`` over the inputs of the same ``source``, ``[channels]``."""
    return torch.zeros(int(source.max()) + 1, device=x.device).scatter_reduce(0, source, x, "amax")


def smoothing_scale(activation: Tensor, weight: Tensor, strength: float) -> Tensor:
    """Return ``activation^strength / weight^(1 - strength)`` of every channel's largest activation and weight. A
    strength of 0.5 makes both equally large. A channel that is always zero, or has only zero weights, gets 1."""
    live = (activation > 0) & (weight > 0)
    return torch.where(live, activation**strength / weight ** (1 - strength), 1.0)
