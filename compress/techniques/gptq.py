"""Weight-only quantization with error compensation; pruned zeros stay."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import pytorch_lightning as pl
import torch
from pydantic import Field, validate_call
from torch import Tensor, nn

from compress.formats.gptq import SCALE, save_model
from compress.formats.packed import Quantized
from compress.formats.stage import WeightOnly
from compress.maths.gptq import gptq
from compress.maths.hessian import output_error, second_moment
from compress.maths.rounding import Integers, Scheme, minmax_grid, round_to_nearest
from compress.models.batches import Batch, draw_calibration_batches
from compress.models.calibration import sequential
from compress.models.layers import evaluation_mode, unwrap_model
from compress.models.matrices import Matrix


class GPTQ(WeightOnly):
    """Round the weights of the transformer blocks to a few bits, column by column. The columns still to come compensate
    the error of each column, weighted by the inputs in calibration.

    Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023,
    arXiv:2210.17323. A weight that is exactly zero stays exactly zero. The compensation that it would have received is
    compensated too, as in the joint pass of Frantar and Alistarh, "SparseGPT", 2023, arXiv:2301.00774.

    Blocks are quantized in order, and within a block the sets of layers that share an input. Every layer is calibrated
    on the outputs of the quantized layers before it; the activations of one block are in memory.

    Runs when the fit ends, on the first ``samples`` examples of the datamodule's ``calibration``, or of the training
    loader if there is none. The artifact is in the compressed-tensors format, which transformers and vLLM load. A
    language model can be saved in GPTQ's own format instead, for GPTQModel, and for transformers with GPTQModel
    installed.

    Args:
        bits: bits of each integer.
        group_size: consecutive inputs that share a scale; -1 for one scale a row.
        symmetric: integers around zero, without stored zero points.
        act_order: round the columns of large inputs first. Groups are still of consecutive inputs, so the order costs
            nothing at inference; their scales are fitted before the first column is rounded.
        damping: fraction of the Hessian's mean diagonal added to it; ten times more until it is positive definite.
        samples: training examples (for a language model, blocks of tokens) to calibrate on.
        batch_size: examples in a batch.
        format: ``compressed-tensors`` or ``gptq``, which stores scales in float16.
        skip: layers in full precision: ``embeddings`` (always), ``head`` (all else outside the transformer blocks) and
            patterns of layer names.

    Raises:
        UserError: groups do not divide a layer, a pattern matches no layer, or the format cannot store the settings.

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[GPTQ(bits=4, group_size=32)]).fit(module, loader)
    """

    @validate_call
    def __init__(
        self,
        bits: Literal[2, 3, 4, 8] = 4,
        group_size: Annotated[int, Field(ge=-1)] = 128,
        symmetric: bool = True,
        act_order: bool = True,
        damping: Annotated[float, Field(gt=0)] = 0.01,
        samples: Annotated[int, Field(ge=1)] = 128,
        batch_size: Annotated[int, Field(ge=1)] = 8,
        format: Literal["compressed-tensors", "gptq"] = "compressed-tensors",
        skip: tuple[str, ...] = ("embeddings", "head"),
    ) -> None:
        super().__init__(Scheme(bits, group_size, symmetric), samples, batch_size, skip, format)
        self.act_order = act_order
        self.damping = damping
        self.outcomes: dict[str, Outcome] = {}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = unwrap_model(pl_module).to(trainer.strategy.root_device)
        self.check(model, [])  # a script without the chain has not checked the model
        layers = self.select(model)
        batches = list(draw_calibration_batches(trainer, self.samples, self.batch_size))
        scale = SCALE if self.format == "gptq" else None
        schemes = dict.fromkeys(layers, self.scheme)
        self.outcomes = quantize_layers(model, layers, batches, schemes, self.damping, self.act_order, scale)
        self.keep({name: outcome.quantized for name, outcome in self.outcomes.items()})
        model.cpu()

    def save(self, model: nn.Module, folder: Path) -> None:
        if self.format == "gptq":
            save_model(model, self.quantized, folder, damp_percent=self.damping)
        else:
            super().save(model, folder)

    def report(self, folder: Path) -> None:
        """Write ``errors.csv``: the error of every layer's outputs, beside that of rounding to nearest."""
        write_errors(self.outcomes, folder / "errors.csv")


class Outcome(NamedTuple):
    """A quantized layer, and the squared error of its outputs on the calibration text: of these weights, and of weights
    rounded to nearest."""

    quantized: Quantized
    error: float
    nearest: float


def quantize_layers(
    model: nn.Module,
    layers: dict[str, Matrix],
    batches: list[Batch],
    schemes: dict[str, Scheme],
    damping: float,
    act_order: bool,
    scale: torch.dtype | None = None,
) -> dict[str, Outcome]:
    """Quantize the ``layers`` by their ``schemes`` in place, calibrated on ``batches``.

    Scales have the dtype ``scale``, by default that of the weights. Where compensation does not pay, as for an expert
    that no text was routed to, the weights are rounded to nearest.
    """
    outcomes = {}
    with evaluation_mode(model):
        for matrices, moment in sequential(model, batches, second_moment, layers):
            weights = [matrix.weight for matrix in matrices.values()]
            rounded = gptq(weights, moment, [schemes[name] for name in matrices], damping, act_order, scale)
            for name, weight, ours in zip(matrices, weights, rounded):
                outcomes[name] = write_better(weight, ours, moment)
    return outcomes


def write_better(weight: Tensor, ours: Integers, moment: Tensor) -> Outcome:
    """Write the better of ``ours`` and the integers nearest to ``weight`` ``[rows, inputs]`` into it, by the error of
    the outputs on inputs of the second ``moment`` ``[inputs, inputs]``. Return the better in the CPU's memory."""
    grid = minmax_grid(weight, ours.scheme, ours.grid.scale.dtype)
    both = ours, round_to_nearest(weight, grid, ours.scheme)
    errors = [output_error(rounded.dequantize(torch.float32) - weight, moment) for rounded in both]
    better = both[errors[1] < errors[0]]
    weight.copy_(better.dequantize(weight.dtype))
    return Outcome(Quantized(better.cpu()), min(errors), errors[1])


def write_errors(outcomes: dict[str, Outcome], path: Path) -> None:
    """Write the errors of all layers to a CSV file: what compensation gained over rounding to nearest."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "bits", "squared_error", "squared_error_of_nearest", "gain"])
        for name, (quantized, error, nearest) in outcomes.items():
            writer.writerow([name, quantized.scheme.bits, error, nearest, 1 - error / nearest if nearest else 0.0])
