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
from compress.formats.packed import Quantized, average_bits, save_model, select_storable
from compress.maths.rounding import (
    Grid,
    Inputs,
    Scheme,
    count_values,
    fake_quantize,
    grid_between,
    minmax_grid,
    percentile_range,
    round_to_nearest,
    straight_through_round,
)
from compress.models.batches import draw_calibration_batches, read_validation_batches
from compress.models.calibration import join_experts, observe
from compress.models.layers import evaluation_mode, unwrap_model
from compress.models.linears import use_linear_layers
from compress.models.matrices import count_inputs
from compress.tasks.metrics import evaluate_metric
from compress.technique import Technique, Training

INPUTS = Scheme(bits=8, symmetric=False)


class QAT(Technique, pl.Callback):
    """Train the transformer blocks with rounded weights, and leave the weights rounded.

    The forward pass uses rounded weights and inputs of eight bits; gradients pass straight through the rounding. With
    ``ranges=moving_average`` the range of the weights is their range at every step, and the range of a layer's inputs
    is a moving average: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2017, arXiv:1712.05877. With ``ranges=learnt`` both are trained too: Esser et
    al., "Learned Step Size Quantization", 2019, arXiv:1902.08153. Both ends of an input range are trained, as in
    Bhalgat et al., "LSQ+", 2020, arXiv:2004.09576. Norms, biases, embeddings and the head also train and stay floats. A
    weight that is exactly zero is rounded to zero; :class:`~compress.running.training.HoldZeros` holds it there during
    training.

    Logs ``qat/train_loss`` and, with a validation loader, ``qat/validation_loss`` of the quantized model: at step 0 and
    after training. Afterwards the model computes with quantized activations, in memory and after loading. The artifact
    is in the compressed-tensors format, which transformers loads.

    Args:
        bits: bits of each weight.
        group_size: consecutive inputs of a row that share a scale; -1 for one scale a row.
        activations: quantize the inputs of the layers to eight bits.
        ranges: ``learnt`` or ``moving_average``.
        samples: training examples (for a language model, blocks of tokens) for the initial ranges and for the logged
            losses.
        batch_size: examples in a batch.
        skip: layers in full precision: ``embeddings`` (always), ``head`` (all else outside the transformer blocks) and
            patterns of layer names.
        training: settings of the fit, if known.

    Raises:
        UserError: no epochs are set, groups do not divide a layer, or a pattern matches no layer.

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[QAT(bits=4, group_size=32)]).fit(module, loader)
    """

    leaves = "integer"
    resumes = True
    packages = ("compressed_tensors",)
    shrinks = True
    limits = (
        "PyTorch multiplies floats in place of the integers: less to store, no speed there; int8 exports, and vLLM "
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
            self.leaves = "packed"  # dequantized to floats, as those of gptq
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
                f"{self.key}.train.epochs is 0; `qat` quantizes by training. Set {self.key}.train.epochs=1 or more, or "
                "a technique that does not train (technique=w8a8, technique=gptq)."
            )

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        self.scheme.check(self.key, count_inputs(select_storable(skeleton, self.skip, self.key)))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = unwrap_model(pl_module)
        self._check_training(trainer.max_epochs)
        self.check(model, [])
        layers = select_storable(model, self.skip, self.key)
        batches = list(draw_calibration_batches(trainer, self.samples, self.batch_size, labels=True))
        between: dict[str, nn.Parameter] = {}
        with evaluation_mode(model):
            found = observe(model, batches, count_values, layers) if self.activations else []
            for shared in join_experts(found):
                # Layers with the same input share its range, as exports and vLLM's fused layers require.
                ends = percentile_range(shared.statistic, 100)
                between |= dict.fromkeys(shared.matrices, nn.Parameter(ends, requires_grad=self.learnt))
        parameters = set(model.parameters())
        use_linear_layers(model)
        layers = select_storable(model, self.skip, self.key)
        for name, matrix in layers.items():
            fake = FakeQuantization(matrix.weight, self.scheme, between.get(name), self.learnt)
            fake.insert(matrix.module)
        if not parameters.issuperset(model.parameters()):
            trainer.strategy.setup_optimizers(trainer)  # the old ones train neither ranges nor the layers of experts
        self._log_losses(trainer, model)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = unwrap_model(pl_module).to(trainer.strategy.root_device)
        for name, matrix in select_storable(model, self.skip, self.key).items():
            self.quantized[name] = freeze_rounding(matrix.module)
        self.average_bits = average_bits(self.quantized)
        self._log_losses(trainer, model)
        model.cpu()

    def save(self, model: nn.Module, folder: Path) -> None:
        save_model(model, self.quantized, folder)

    def _log_losses(self, trainer: pl.Trainer, model: nn.Module) -> None:
        batches = {"train": list(draw_calibration_batches(trainer, self.samples, self.batch_size, labels=True))}
        if trainer.enable_validation:
            device = trainer.strategy.root_device
            read = read_validation_batches(trainer)
            batches["validation"] = [{key: value.to(device) for key, value in batch.items()} for batch in read]
        with evaluation_mode(model):
            losses = {
                f"qat/{split}_loss": evaluate_metric(model, rows, None, "loss") for split, rows in batches.items()
            }
        for logger in trainer.loggers:
            logger.log_metrics(losses, trainer.global_step)


class FakeQuantization(nn.Module):
    """Round a layer's weights and inputs in the forward pass while the layer trains.

    ``reach`` is the end of the grid of every group of weights, on either side of zero. ``between`` holds the lowest and
    the highest value of the inputs, ``[2]``. Both have the units of the values that they limit, so an optimizer moves
    them by as much as weights. LSQ trains step sizes, smaller by the number of levels, and scales their gradients
    instead.
    """

    def __init__(self, weight: Tensor, scheme: Scheme, between: nn.Parameter | None, learnt: bool) -> None:
        super().__init__()
        self.scheme = scheme
        self.between = between
        self.levels = 2**scheme.bits - 1
        scale = minmax_grid(weight.detach(), scheme, torch.float32).scale
        self.groups = scale.shape[1]
        # Flat, because one-dimensional parameters get no weight decay.
        self.reach = nn.Parameter((scale * self.levels / 2).flatten()) if learnt else None

    def insert(self, layer: Any) -> None:
        """Make the layer compute with rounded weights and inputs. Its ``weight`` still trains."""
        layer.fake_quantization = self
        layer.forward = MethodType(quantized_forward, layer)

    def weights(self, weight: Tensor) -> Tensor:
        scale = self.scale(weight)[:, :, None]
        groups = weight.unflatten(1, (self.groups, -1))
        return fake_quantize(groups, scale, 0, self.scheme.lowest, self.scheme.highest).flatten(1)

    def scale(self, weight: Tensor) -> Tensor:
        """Return the scale of every group, ``[rows, groups]``."""
        if self.reach is None:
            return minmax_grid(weight.detach(), self.scheme, torch.float32).scale
        tiny = torch.finfo(torch.float32).tiny
        return 2 * self.reach.abs().clamp(min=tiny).view(-1, self.groups) / self.levels

    def observe_range(self, x: Tensor) -> None:
        """Update the moving average of the lowest and highest input, if ranges are not learnt."""
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
    """Return the layer's output. The rounding is recomputed for the gradients, because keeping it would take several
    times the memory of the input."""
    layer.fake_quantization.observe_range(x)
    return checkpoint(rounded_linear, layer, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


def rounded_linear(layer: Any, x: Tensor) -> Tensor:
    fake = layer.fake_quantization
    return nn.functional.linear(fake.inputs(x), fake.weights(layer.weight), layer.bias)


@torch.no_grad()
def freeze_rounding(layer: Any) -> Quantized:
    """Round the layer's weights permanently, and make it quantize its inputs as during training."""
    fake, weight = layer.fake_quantization, layer.weight
    scale = fake.scale(weight).to(weight.dtype)
    grid = Grid(scale.clone(), torch.zeros_like(scale, dtype=torch.int8))
    rounded = round_to_nearest(weight, grid, fake.scheme)
    weight.copy_(rounded.dequantize(weight.dtype))
    del layer.fake_quantization, layer.forward
    if fake.between is None:
        return Quantized(rounded)
    quantized = Quantized(rounded, Inputs(INPUTS, grid_between(fake.between, INPUTS, weight.dtype)))
    quantized.attach(layer)
    return quantized
