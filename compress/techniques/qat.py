"""Quantization-aware training."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
import torch
from pydantic import Field, validate_call
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compress.errors import UserError
from compress.formats.packed import Quantized, average_bits, save_model
from compress.maths.rounding import (
    Grid,
    Inputs,
    Scheme,
    count_values,
    fake_quantize,
    grid_between,
    minmax_grid,
    percentile_range,
    round_to_grid,
    straight_through_round,
)
from compress.models.calibration import calibrate_layers, draw_calibration_batches, read_validation_batches
from compress.models.layers import evaluation_mode, find_quantizable, unwrap_model
from compress.tasks.metrics import evaluate_metric
from compress.technique import Technique, Training

INPUTS = Scheme(bits=8, symmetric=False)


class QAT(Technique, pl.Callback):
    """Train the weights of the transformer blocks under the rounding that they are to have, and leave them rounded.

    The forward pass computes with rounded weights, and inputs of eight bits, and gradients go straight through the
    rounding. With ``ranges=moving_average`` that of the weights is what they are at every step, and that of a layer's
    inputs a moving average: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2017, arXiv:1712.05877. With ``ranges=learnt`` both are trained with the rest:
    Esser et al., "Learned Step Size Quantization", 2019, arXiv:1902.08153; those of inputs at both ends, as in Bhalgat
    et al., "LSQ+", 2020, arXiv:2004.09576. Norms, biases, embeddings and the head train as well and stay floats. A
    weight that is exactly zero is rounded to zero; that training leaves it there is the business of
    :class:`~compress.running.training.HoldZeros`.

    Logs ``qat/train_loss`` and, where there is a validation loader, ``qat/validation_loss``: quantized before training
    (at step 0) and after. Afterwards the model computes with quantized activations, in memory as when it is loaded.
    Saved in the compressed-tensors format, which transformers loads.

    Args:
        bits: of each weight.
        group_size: consecutive inputs of a row that share a scale; -1 for one scale a row.
        activations: whether the inputs of the layers are quantized, to eight bits.
        ranges: ``learnt`` or ``moving_average``.
        samples: training examples (for a language model, blocks of tokens) that the first ranges are taken from, and on
            which the losses are.
        batch_size: of them run at a time.
        skip: what stays in full precision: ``embeddings`` (always), ``head`` (all else outside the transformer blocks)
            and patterns of layers' names.
        training: how the fit trains, as far as it is known.

    Raises:
        UserError: nothing is trained, groups do not divide a layer, or a pattern fits none.

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[QAT(bits=4, group_size=32)]).fit(module, loader)
    """

    leaves = "integer"
    resumes = True
    packages = ("compressed_tensors",)
    shrinks = True
    limits = (
        "PyTorch multiplies floats that stand for the integers: less to store, no speed there; int8 exports, and vLLM "
        "where weights and activations both have eight bits, multiply integers"
    )

    @validate_call
    def __init__(
        self,
        bits: Literal[4, 8] = 8,
        group_size: Annotated[int, Field(ge=-1)] = -1,
        activations: bool = True,
        ranges: Literal["learnt", "moving_average"] = "learnt",
        samples: Annotated[int, Field(ge=1)] = 128,
        batch_size: Annotated[int, Field(ge=1)] = 8,
        skip: tuple[str, ...] = ("embeddings", "head"),
        training: Training | None = None,
    ) -> None:
        self.scheme = Scheme(bits, group_size)
        self.activations = activations
        if not activations:
            self.leaves = "packed"  # integers that stand for floats, as those of gptq
        self.learnt = ranges == "learnt"
        self.samples = self.train_samples = samples
        self.batch_size = batch_size
        self.skip = skip
        self.quantized: dict[str, Quantized] = {}
        self.average_bits: dict[str, float] = {}
        self._check_training(training.epochs if training else None)

    def _check_training(self, epochs: int | None) -> None:
        if epochs == 0:
            raise UserError(
                f"`qat` quantizes by training and {self.key}.train.epochs is 0: set it to 1 or more, or take a stage "
                "that does not train (technique=w8a8, technique=gptq)."
            )

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        for name, linear in find_quantizable(skeleton, self.skip, self.key).items():
            self.scheme.check(self.key, name, linear)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = unwrap_model(pl_module)
        self._check_training(trainer.max_epochs)
        self.check(model, [])
        layers = find_quantizable(model, self.skip, self.key)
        batches = list(draw_calibration_batches(trainer, self.samples, self.batch_size, labels=True))
        between: dict[str, nn.Parameter] = {}
        with evaluation_mode(model):
            for shared, counts in calibrate_layers(model, batches, count_values, layers) if self.activations else ():
                # One range for what is one tensor, as exports and vLLM's joint layers have it.
                between |= dict.fromkeys(shared, nn.Parameter(percentile_range(counts, 100), requires_grad=self.learnt))
        for name, linear in layers.items():
            FakeQuantization(linear.weight, self.scheme, between.get(name), self.learnt).insert(linear)
        if self.learnt:
            trainer.strategy.setup_optimizers(trainer)  # which do not have the ranges yet
        self._log_losses(trainer, model)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = unwrap_model(pl_module).to(trainer.strategy.root_device)
        for name, linear in find_quantizable(model, self.skip, self.key).items():
            self.quantized[name] = freeze_rounding(linear)
        self.average_bits = average_bits(model, self.quantized)
        self._log_losses(trainer, model)
        model.cpu()

    def save(self, model: nn.Module, folder: Path) -> None:
        save_model(model, self.quantized, folder)

    def _log_losses(self, trainer: pl.Trainer, model: nn.Module) -> None:
        batches = {"train": list(draw_calibration_batches(trainer, self.samples, self.batch_size, labels=True))}
        if trainer.enable_validation:
            device = trainer.strategy.root_device
            every = read_validation_batches(trainer)
            batches["validation"] = [{key: value.to(device) for key, value in batch.items()} for batch in every]
        with evaluation_mode(model):
            losses = {
                f"qat/{split}_loss": evaluate_metric(model, some, None, "loss") for split, some in batches.items()
            }
        for logger in trainer.loggers:
            logger.log_metrics(losses, trainer.global_step)


class FakeQuantization(nn.Module):
    """What a layer's weights and inputs will be rounded to, computed from what they are while they train.

    ``reach``, of every group of weights the value that its grid reaches to on either side, and ``between``, the lowest
    and the highest value of the inputs ``[2]``, are in the units of what they limit. That an optimizer moves them by
    as much as weights serves for the scaled gradient that LSQ gives to steps, which are finer by the number of levels.
    """

    def __init__(self, weight: Tensor, scheme: Scheme, between: nn.Parameter | None, learnt: bool) -> None:
        super().__init__()
        self.scheme = scheme
        self.between = between
        self.levels = 2**scheme.bits - 1
        scale = minmax_grid(weight.detach(), scheme, torch.float32).scale
        self.groups = scale.shape[1]
        # Flat, and so without the weight decay that optimizers spare biases and norms.
        self.reach = nn.Parameter((scale * self.levels / 2).flatten()) if learnt else None

    def insert(self, layer: nn.Linear) -> None:
        """From now on the layer computes with rounded weights and inputs; its ``weight`` is still the one to train."""
        layer.fake_quantization = self
        layer.forward = MethodType(quantized_forward, layer)  # type: ignore[method-assign]

    def weights(self, weight: Tensor) -> Tensor:
        scale = self.scale(weight)[:, :, None]
        groups = weight.unflatten(1, (self.groups, -1))
        return fake_quantize(groups, scale, 0, self.scheme.lowest, self.scheme.highest).flatten(1)

    def scale(self, weight: Tensor) -> Tensor:
        """Of every group, ``[rows, groups]``."""
        if self.reach is None:
            return minmax_grid(weight.detach(), self.scheme, torch.float32).scale
        tiny = torch.finfo(torch.float32).tiny
        return 2 * self.reach.abs().clamp(min=tiny).view(-1, self.groups) / self.levels

    def observe_range(self, x: Tensor) -> None:
        """Have a moving average of the ends of what enters, where ranges are not learnt."""
        if self.between is not None and not self.between.requires_grad and torch.is_grad_enabled():
            self.between.lerp_(torch.stack(x.detach().float().aminmax()), 0.01)

    def inputs(self, x: Tensor) -> Tensor:
        if self.between is None:
            return x
        low, high = self.between[0].clamp(max=0), self.between[1].clamp(min=0)
        scale = ((high - low) / (INPUTS.highest - INPUTS.lowest)).clamp(min=torch.finfo(torch.float32).tiny)
        zero = straight_through_round(INPUTS.lowest - low / scale)
        return fake_quantize(x, scale, zero, INPUTS.lowest, INPUTS.highest)


def quantized_forward(layer: Any, x: Tensor) -> Tensor:
    """The layer's answer; what is rounded on the way is rounded again for the gradients, for it would take several
    times the memory of what entered to keep it."""
    layer.fake_quantization.observe_range(x)
    return checkpoint(rounded_linear, layer, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


def rounded_linear(layer: Any, x: Tensor) -> Tensor:
    fake = layer.fake_quantization
    return nn.functional.linear(fake.inputs(x), fake.weights(layer.weight), layer.bias)


@torch.no_grad()
def freeze_rounding(layer: Any) -> Quantized:
    """Round the layer's weights for good and have it quantize its inputs, as they were while it trained."""
    fake, weight = layer.fake_quantization, layer.weight
    scale = fake.scale(weight).to(weight.dtype)
    grid = Grid(scale.clone(), torch.zeros_like(scale, dtype=torch.int8))
    weight.copy_(round_to_grid(weight, grid, fake.scheme))
    del layer.fake_quantization, layer.forward
    if fake.between is None:
        return Quantized(fake.scheme, grid)
    found = Quantized(fake.scheme, grid, Inputs(INPUTS, grid_between(fake.between, INPUTS, weight.dtype)))
    found.attach(layer)
    return found
