"""Weight-only quantization with error compensation; pruned zeros stay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
import torch
from pydantic import Field, validate_call
from torch import nn

from compress.formats import gptq as gptq_format
from compress.formats import packed
from compress.formats.gptq import check_format, save_model
from compress.formats.packed import Quantized
from compress.maths.gptq import gptq
from compress.maths.hessian import second_moment
from compress.maths.rounding import Scheme
from compress.models.calibration import Batch, calibrate_layers, draw_calibration_batches
from compress.models.layers import evaluation_mode, find_quantizable, unwrap_model
from compress.technique import Technique


class GPTQ(Technique, pl.Callback):
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

    leaves = "packed"
    packages = ("compressed_tensors",)
    shrinks = True
    limits = "weights are decompressed to floats when transformers loads them: less to store, no speed there"

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
        self.scheme = Scheme(bits, group_size, symmetric)
        self.act_order = act_order
        self.damping = damping
        self.samples = samples
        self.batch_size = batch_size
        self.format = format
        self.skip = skip
        self.train_samples = samples
        self.keeps_head = "head" in skip
        self.quantized: dict[str, Quantized] = {}
        self.average_bits: dict[str, float] = {}

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        layers = find_quantizable(skeleton, self.skip, self.key)
        for name, linear in layers.items():
            self.scheme.check(self.key, name, linear)
        if self.format == "gptq":
            check_format(self.key, skeleton, layers, self.scheme, self.skip)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = unwrap_model(pl_module).to(trainer.strategy.root_device)
        self.check(model, [])  # a script without the chain has not checked the model
        schemes = dict.fromkeys(find_quantizable(model, self.skip, self.key), self.scheme)
        batches = list(draw_calibration_batches(trainer, self.samples, self.batch_size))
        own = self.format == "gptq"
        scale = gptq_format.SCALE if own else None
        self.quantized = quantize_layers(model, batches, schemes, self.damping, self.act_order, scale)
        self.average_bits = (gptq_format if own else packed).average_bits(model, self.quantized)
        model.cpu()

    def save(self, model: nn.Module, folder: Path) -> None:
        if self.format == "gptq":
            save_model(model, self.quantized, folder, damp_percent=self.damping)
        else:
            packed.save_model(model, self.quantized, folder)


def quantize_layers(
    model: nn.Module,
    batches: list[Batch],
    schemes: dict[str, Scheme],
    damping: float,
    act_order: bool,
    scale: torch.dtype | None = None,
) -> dict[str, Quantized]:
    """Quantize the layers that ``schemes`` names in place, calibrated on ``batches``. Scales have the dtype ``scale``,
    by default that of the weights."""
    quantized = {}
    with evaluation_mode(model):
        for layers, hessian in calibrate_layers(model, batches, second_moment, schemes):
            for name, linear in layers.items():
                weight, grid = gptq(linear.weight.data, hessian, schemes[name], damping, act_order, scale=scale)
                linear.weight.data.copy_(weight)
                quantized[name] = Quantized(schemes[name], grid)
    return quantized
