"""Weight-only quantization with error compensation, pruned zeros kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pytorch_lightning as pl
import torch
from pydantic import Field, validate_call
from torch import Tensor, nn

from compress.calibration import calibrate, calibration_batches
from compress.errors import UserError
from compress.hessian import inverse_factor, second_moment
from compress.models import compressed, linears
from compress.quiet import without_bars


class Grid(NamedTuple):
    """The values that a quantized weight can take: ``(integer - zero) * scale``; both ``[rows, groups]``."""

    scale: Tensor
    zero: Tensor


class GPTQ(pl.Callback):
    """Round the weights of the transformer blocks to a few bits, column by column, each column's error made up for by
    the columns still to come, as the inputs seen in calibration weigh it.

    Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023,
    arXiv:2210.17323. A weight that is exactly zero stays exactly zero and what compensation would have put there is
    made up for too, the joint pass of Frantar and Alistarh, "SparseGPT", 2023, arXiv:2301.00774.

    Blocks are quantized in order, and within a block the layers that share an input, every one calibrated on what the
    quantized layers before it give out. Works when the fit ends, on the first ``samples`` examples of the datamodule's
    ``calibration`` or else of the training loader. The head, embeddings and everything outside the blocks stay as
    they are. Saved in the compressed-tensors format, which transformers and vLLM load.

    Args:
        bits: of each integer.
        group_size: consecutive inputs that share a scale; -1 for one scale a row.
        symmetric: integers around zero, no zero points stored.
        damping: fraction of the Hessian's mean diagonal added to it; ten times more where it is not yet positive.
        samples: training examples (for a language model, blocks of tokens) to calibrate on.
        batch_size: of them run at a time.

        pl.Trainer(max_epochs=1, callbacks=[GPTQ(bits=4)]).fit(module, loader)
    """

    leaves = "packed"
    packages = ("compressed_tensors",)
    keeps_head = True
    shrinks = True
    limits = "weights are decompressed to floats when transformers loads them: less to store, no speed there"

    @validate_call
    def __init__(
        self,
        bits: Literal[2, 3, 4, 8] = 4,
        group_size: Annotated[int, Field(ge=-1)] = 128,
        symmetric: bool = True,
        damping: Annotated[float, Field(gt=0)] = 0.01,
        samples: Annotated[int, Field(ge=1)] = 128,
        batch_size: Annotated[int, Field(ge=1)] = 8,
    ) -> None:
        if group_size == 0:
            raise UserError("technique.gptq.group_size is 0: give a number of inputs (128), or -1 for one scale a row.")
        self.bits = bits
        self.group_size = group_size
        self.symmetric = symmetric
        self.damping = damping
        self.samples = samples
        self.batch_size = batch_size
        self.train_samples = samples
        self.grids: dict[str, Grid] = {}

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        for name, linear in linears(skeleton):
            if self.group_size != -1 and linear.in_features % self.group_size:
                raise UserError(
                    f"technique.gptq.group_size={self.group_size} does not divide the {linear.in_features} inputs of "
                    f"`{name}`: set a divisor of every layer's inputs, or technique.gptq.group_size=-1 for one scale "
                    "a row."
                )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = compressed(pl_module)
        model.to(trainer.strategy.root_device).eval()
        batches = list(calibration_batches(trainer, self.samples, self.batch_size))
        for layers, hessian in calibrate(model, batches, second_moment):
            for name, linear in layers.items():
                weight, grid = gptq(
                    linear.weight.data, hessian, self.bits, self.group_size, self.symmetric, self.damping
                )
                linear.weight.data.copy_(weight)
                self.grids[name] = grid
        model.cpu()

    def save(self, model: nn.Module, folder: Path) -> None:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            apply_quantization_config,
        )

        strategy = {"strategy": "channel"} if self.group_size == -1 else {"group_size": self.group_size}
        scheme = QuantizationScheme(
            targets=["Linear"], weights=QuantizationArgs(num_bits=self.bits, symmetric=self.symmetric, **strategy)
        )
        every = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        ignore = [name for name in every if name not in self.grids]
        with without_bars():
            apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=ignore))
        for name, grid in self.grids.items():
            layer = model.get_submodule(name)
            layer.weight_scale.data.copy_(grid.scale)
            if not self.symmetric:
                layer.weight_zero_point.data.copy_(grid.zero)
        with without_bars():
            compressor = ModelCompressor.from_pretrained_model(model)
            compressor.compress_model(model)
            model.save_pretrained(folder)
        compressor.update_config(str(folder))


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int = 4,
    group_size: int = -1,
    symmetric: bool = True,
    damping: float = 0.01,
    lazy: int = 128,
) -> tuple[Tensor, Grid]:
    """Quantize ``weight`` ``[rows, inputs]`` so that its outputs on inputs of second moment ``hessian``
    ``[inputs, inputs]`` change least; exact zeros stay.

    Returns the quantized weight as floats of the weight's dtype, each exactly ``(integer - zero) * scale``, and its
    grid. ``lazy`` columns are compensated at a time before the rest is, which changes the cost and not the result.
    """
    dtype, keep = weight.dtype, weight != 0
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    left, quantized = weight.float().clone(), torch.zeros_like(weight, dtype=torch.float32)
    factor = inverse_factor(hessian, damping)
    scales, zeros = [], []
    for start in range(0, columns, lazy):
        stop = min(start + lazy, columns)
        errors = torch.zeros(rows, stop - start, device=weight.device)
        for j in range(start, stop):
            if j % size == 0:
                # Columns of the group beyond this lazy block still wait for its errors: none where size divides lazy.
                group = left[:, j : j + size].clone()
                ahead = slice(max(stop, j), min(j + size, columns))
                group[:, ahead.start - j :] -= errors[:, : j - start] @ factor[start:j, ahead]
                grid = minmax_grid(group * keep[:, j : j + size], bits, symmetric, dtype)
                scales.append(grid.scale)
                zeros.append(grid.zero)
            column = left[:, j]
            rounded = to_grid(column[:, None], grid, bits, symmetric)[:, 0] * keep[:, j]
            quantized[:, j] = rounded
            error = (column - rounded) / factor[j, j]
            left[:, j:stop] -= error[:, None] * factor[None, j, j:stop]
            errors[:, j - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return quantized.to(dtype), Grid(torch.cat(scales, 1), torch.cat(zeros, 1))


def minmax_grid(weight: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Grid:
    """The grid of one group ``[rows, group]`` that reaches from its smallest to its largest value, zero among them;
    the scale as it is stored, in ``dtype``."""
    levels = 2**bits - 1
    if symmetric:
        scale = 2 * weight.abs().amax(1, keepdim=True) / levels
    else:
        low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
        scale = (high - low) / levels
    scale = torch.where(scale == 0, 1.0, scale).to(dtype)  # a row of zeros: any scale holds it
    lowest = -(2 ** (bits - 1))
    zero = (
        torch.zeros_like(scale, dtype=torch.int8)
        if symmetric
        else (lowest - low / scale.float()).round().to(torch.int8)
    )
    return Grid(scale, zero)


def to_grid(values: Tensor, grid: Grid, bits: int, symmetric: bool) -> Tensor:
    """The nearest values of the grid, as a checkpoint's reader computes them: in the dtype of the scale."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    integers = (values / grid.scale.float() + grid.zero).round().clamp(lowest, highest)
    return ((integers - grid.zero).to(grid.scale.dtype) * grid.scale).float()
