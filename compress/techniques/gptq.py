"""Weight-only quantization with error compensation, pruned zeros kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pytorch_lightning as pl
import torch
from pydantic import Field, validate_call
from torch import Tensor, nn
from tqdm.auto import tqdm

from compress.errors import UserError
from compress.models import blocks, compressed, linears
from compress.quiet import without_bars

Batch = dict[str, Tensor]


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
        device = trainer.strategy.root_device
        model.to(device).eval()
        for name, layers, hessian in calibrate(model, list(self._batches(trainer, device))):
            for layer, linear in layers.items():
                weight, grid = gptq(
                    linear.weight.data, hessian, self.bits, self.group_size, self.symmetric, self.damping
                )
                linear.weight.data.copy_(weight)
                self.grids[f"{name}.{layer}"] = grid
        model.cpu()

    def _batches(self, trainer: pl.Trainer, device: torch.device) -> Iterator[Batch]:
        calibration = getattr(getattr(trainer, "datamodule", None), "calibration", None)
        loader = calibration(self.samples, self.batch_size) if calibration else trainer.train_dataloader
        seen = 0
        for batch in loader:
            if seen >= self.samples:
                return
            seen += len(batch["input_ids"])
            yield {key: value.to(device) for key, value in batch.items() if key != "labels"}

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


class Call(NamedTuple):
    """How a model calls one of its blocks, apart from the hidden states ``[batch, tokens, width]``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def replay(self, block: nn.Module, hidden: Tensor) -> Tensor:
        output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def calibrate(model: nn.Module, batches: list[Batch]) -> Iterator[tuple[str, dict[str, nn.Linear], Tensor]]:
    """Stream calibration batches through the blocks; yield ``(block, layers, hessian)`` for every set of Linear layers
    that share an input, in the order in which they run.

    ``hessian`` is the sum of ``x x^T`` over the tokens that are not padding, ``[inputs, inputs]`` in float32. Layers
    may be changed before the next set is asked for: what follows sees the changed ones. Only the activations between
    two blocks are kept.
    """
    prefix, stack = blocks(model)
    hidden, calls = capture(model, stack, batches)
    masks = [batch.get("attention_mask") for batch in batches]
    for index, block in enumerate(tqdm(stack, desc="calibrating", unit="block", leave=False, disable=None)):
        forwards = [partial(call[index].replay, block, state) for call, state in zip(calls, hidden)]
        for layers in sharing_inputs(block, forwards[0]):
            yield f"{prefix}.{index}", layers, second_moment(next(iter(layers.values())), forwards, masks)
        hidden = [forward() for forward in forwards]


def capture(model: nn.Module, stack: nn.ModuleList, batches: list[Batch]) -> tuple[list[Tensor], list[list[Call]]]:
    """The hidden states that enter the first block, by batch, and how every block is called, by batch and block. The
    masks and position embeddings of a call are shared between blocks: they cost their memory once."""
    hidden: list[Tensor] = []
    calls: list[list[Call]] = []

    def keep(_: nn.Module, args: tuple, kwargs: dict) -> None:
        rest = dict(kwargs)
        state = args[0] if args else rest.pop("hidden_states")
        if not calls[-1]:
            hidden.append(state)
        calls[-1].append(Call(args[1:], rest))

    hooks = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in stack]
    try:
        for batch in batches:
            calls.append([])
            model(**batch, **({"use_cache": False} if getattr(model.config, "use_cache", False) else {}))
    finally:
        for hook in hooks:
            hook.remove()
    return hidden, calls


class Seen(Exception):
    """Raised inside a block when the wanted input has been seen, to spare the rest of its forward pass."""


def second_moment(layer: nn.Linear, forwards: Sequence[Callable[[], Tensor]], masks: list[Tensor | None]) -> Tensor:
    """The sum of ``x x^T`` over the inputs of ``layer`` in all ``forwards``, padding left out."""
    total = torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device)
    remaining = iter(masks)

    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x, mask = args[0], next(remaining)
        if mask is not None and x.shape[:-1] == mask.shape:
            x = x[mask.bool()]
        x = x.reshape(-1, x.shape[-1]).float()
        total.addmm_(x.T, x)
        raise Seen

    hook = layer.register_forward_pre_hook(add)
    for forward in forwards:
        with suppress(Seen):
            forward()
    hook.remove()
    return total


def sharing_inputs(block: nn.Module, forward: Callable[[], Tensor]) -> list[dict[str, nn.Linear]]:
    """The block's Linear layers in the order in which ``forward()`` runs them, those that get one and the same tensor
    (query, key and value; gate and up) together."""
    calls: list[tuple[str, nn.Linear, Tensor]] = []  # holding the tensors keeps their addresses apart
    hooks = [
        module.register_forward_pre_hook(lambda layer, args, name=name: calls.append((name, layer, args[0])))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    forward()
    for hook in hooks:
        hook.remove()
    sets = groupby(calls, key=lambda call: (call[2].data_ptr(), call[2].shape))
    return [{name: layer for name, layer, _ in members} for _, members in sets]


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


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse: row j holds how an error in column j is best spread
    over the columns after it."""
    mean = hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    while damping <= 100:
        damped = hessian + damping * mean * torch.eye(len(hessian), device=hessian.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and upper.isfinite().all():
                return upper
        damping *= 10
    raise UserError(
        "`gptq` could not invert the Hessian of its calibration inputs at any damping: they hold NaN or infinity, so "
        "the model that was to be quantized is broken already."
    )


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
