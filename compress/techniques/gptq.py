"""Weight-only quantization with error compensation, pruned zeros kept."""

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
    """Round the weights of the transformer blocks to a few bits, column by column, each column's error made up for by
    the columns still to come, as the inputs seen in calibration weigh it.

    Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023,
    arXiv:2210.17323. A weight that is exactly zero stays exactly zero and what compensation would have put there is
    made up for too, the joint pass of Frantar and Alistarh, "SparseGPT", 2023, arXiv:2301.00774.

    Blocks are quantized in order, and within a block the layers that share an input, every one calibrated on what the
    quantized layers before it give out; the activations of one block are in memory. Works when the fit ends, on the
    first ``samples`` examples of the datamodule's ``calibration`` or else of the training loader. Saved in the
    compressed-tensors format, which transformers and vLLM load, or, a language model, in GPTQ's own, which GPTQModel
    loads too, and transformers with its help.

    Args:
        bits: of each integer.
        group_size: consecutive inputs that share a scale; -1 for one scale a row.
        symmetric: integers around zero, no zero points stored.
        act_order: columns of large inputs first. The groups stay those of consecutive inputs, so that the order costs
            nothing where the model runs, and have their scales before the first column is rounded.
        damping: fraction of the Hessian's mean diagonal added to it; ten times more where it is not yet positive.
        samples: training examples (for a language model, blocks of tokens) to calibrate on.
        batch_size: of them run at a time.
        format: ``compressed-tensors`` or ``gptq``, whose scales are in float16.
        skip: what stays in full precision: ``embeddings`` (always), ``head`` (all else outside the transformer blocks)
            and patterns of layers' names.

    Raises:
        UserError: groups do not divide a layer, a pattern fits none, or the format has no place for what is asked.

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
        self.check(model, [])  # which a script of one's own has not done
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
    """Quantize the layers that ``schemes`` names in place, calibrated on ``batches``; scales are stored in the dtype
    ``scale`` or else that of the weights."""
    quantized = {}
    with evaluation_mode(model):
        for layers, hessian in calibrate_layers(model, batches, second_moment, schemes):
            for name, linear in layers.items():
                weight, grid = gptq(linear.weight.data, hessian, schemes[name], damping, act_order, scale=scale)
                linear.weight.data.copy_(weight)
                quantized[name] = Quantized(schemes[name], grid)
    return quantized
