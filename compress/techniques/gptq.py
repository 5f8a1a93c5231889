"""Weight-only quantization with error compensation, pruned zeros kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
import torch
from pydantic import Field, validate_call
from torch import Tensor, nn

from compress import gptq_format, packing
from compress.calibration import Batch, calibrate, calibration_batches
from compress.hessian import inverse_factor, second_moment
from compress.models import compressed, evaluating, quantizable
from compress.packing import Quantized
from compress.quantization import Grid, Scheme, fitted_grid, minmax_grid, to_grid

KEY = "technique.gptq"


class GPTQ(pl.Callback):
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

        pl.Trainer(max_epochs=1, callbacks=[GPTQ(bits=4)]).fit(module, loader)
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
        layers = quantizable(skeleton, self.skip, KEY)
        for name, linear in layers.items():
            self.scheme.check(KEY, name, linear)
        if self.format == "gptq":
            gptq_format.check(KEY, skeleton, layers, self.scheme, self.skip)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = compressed(pl_module).to(trainer.strategy.root_device)
        self.check(model, [])  # which a script of one's own has not done
        schemes = dict.fromkeys(quantizable(model, self.skip, KEY), self.scheme)
        batches = list(calibration_batches(trainer, self.samples, self.batch_size))
        own = self.format == "gptq"
        scale = gptq_format.SCALE if own else None
        self.quantized = quantize(model, batches, schemes, self.damping, self.act_order, scale)
        self.average_bits = (gptq_format if own else packing).average_bits(model, self.quantized)
        model.cpu()

    def save(self, model: nn.Module, folder: Path) -> None:
        if self.format == "gptq":
            gptq_format.save(model, self.quantized, folder, damp_percent=self.damping)
        else:
            packing.save(model, self.quantized, folder)


def quantize(
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
    with evaluating(model):
        for layers, hessian in calibrate(model, batches, second_moment, schemes):
            for name, linear in layers.items():
                weight, grid = gptq(linear.weight.data, hessian, schemes[name], damping, act_order, scale=scale)
                linear.weight.data.copy_(weight)
                quantized[name] = Quantized(schemes[name], grid)
    return quantized


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    damping: float = 0.01,
    act_order: bool = False,
    lazy: int = 128,
    scale: torch.dtype | None = None,
) -> tuple[Tensor, Grid]:
    """Quantize ``weight`` ``[rows, inputs]`` so that its outputs on inputs of second moment ``hessian``
    ``[inputs, inputs]`` change least; exact zeros stay.

    Returns the quantized weight as floats of the weight's dtype, each exactly ``(integer - zero) * scale``, and its
    grid. A group's scale is that of its weights when the first of them is rounded; with ``act_order``, where the first
    comes early, that of the weights as they are given. ``lazy`` columns are compensated at a time before the rest is,
    which changes the cost and not the result.
    """
    dtype, columns = scale or weight.dtype, weight.shape[1]
    size = scheme.group(columns)
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(columns)
    factor = inverse_factor(hessian[order][:, order], damping)
    importance = hessian.diagonal()
    grid = fitted_grid(weight, scheme, dtype, importance) if act_order else minmax_grid(weight, scheme, dtype)
    left = weight.float().T[order].contiguous()  # [inputs, rows]: a column of the weight lies together
    keep = left != 0
    quantized = torch.zeros_like(left)
    for start in range(0, columns, lazy):
        stop = min(start + lazy, columns)
        errors = torch.zeros(stop - start, left.shape[1], device=weight.device)
        for j in range(start, stop):
            group = int(order[j]) // size
            if not act_order and j % size == 0:
                # Columns of the group beyond this lazy block still wait for its errors: none where size divides lazy.
                members = left[j : j + size].clone()
                ahead = slice(max(stop, j), min(j + size, columns))
                members[ahead.start - j :] -= factor[start:j, ahead].T @ errors[: j - start]
                found = fitted_grid((members * keep[j : j + size]).T, scheme, dtype, importance[j : j + size])
                grid.scale[:, group], grid.zero[:, group] = found.scale[:, 0], found.zero[:, 0]
            of_group = Grid(grid.scale[:, group, None], grid.zero[:, group, None])
            quantized[j] = to_grid(left[j, :, None], of_group, scheme)[:, 0] * keep[j]
            errors[j - start] = (left[j] - quantized[j]) / factor[j, j]
            left[j:stop].addr_(factor[j, j:stop], errors[j - start], alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return quantized[order.argsort()].T.to(weight.dtype).contiguous(), grid
