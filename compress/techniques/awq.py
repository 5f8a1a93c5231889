"""Weight-only quantization that protects the channels of large activations; pruned zeros stay."""

from __future__ import annotations

from collections.abc import Callable, Container
from pathlib import Path
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
import torch
from pydantic import Field, validate_call
from torch import Tensor, nn

from compress.errors import UserError
from compress.formats.packed import Quantized, average_bits, save_model
from compress.maths.hessian import second_moment
from compress.maths.rounding import Scheme, minmax_grid, round_to_grid
from compress.models.batches import draw_calibration_batches
from compress.models.calibration import select_tokens
from compress.models.families import FAMILIES, Family, find_family, name_family
from compress.models.folding import find_sources, fold_scale
from compress.models.layers import evaluation_mode, unwrap_model
from compress.models.shapes import read_block
from compress.technique import Technique


class AWQ(Technique, pl.Callback):
    """Round the weights of the transformer blocks to a few bits. The inputs of each layer are scaled first, so that the
    channels of large activations lose least. The widest weights of a group are clipped if that reduces the error.

    Lin et al., "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration", 2023,
    arXiv:2306.00978. The scales are folded into the operation before, a norm or a layer, so the model computes the same
    function at no extra cost. A weight that is exactly zero stays exactly zero.

    Blocks are quantized in order, each calibrated on the outputs of the quantized blocks before it; the activations of
    one block are in memory. A layer that ``skip`` names stays unchanged, bit for bit, so no scales are folded into it.

    Runs when the fit ends, on the first ``samples`` examples of the datamodule's ``calibration``, or of the training
    loader if there is none. The artifact is in the compressed-tensors format, which transformers and vLLM load.

    Args:
        bits: bits of each integer.
        group_size: consecutive inputs that share a scale; -1 for one scale a row.
        symmetric: integers around zero, without stored zero points.
        grid: points of each search: for the scales of the layers that share an input, and for the clipping of a group.
        clip: clip the widest weights.
        samples: training examples (for a language model, blocks of tokens) to calibrate on.
        batch_size: examples in a batch.
        skip: layers in full precision: ``embeddings`` (always), ``head`` (all else outside the transformer blocks) and
            patterns of layer names.

    Raises:
        UserError: the scales cannot be folded into the model, groups do not divide a layer, or a pattern matches no
            layer.

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[AWQ(bits=4, group_size=32)]).fit(module, loader)
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
        symmetric: bool = False,
        grid: Annotated[int, Field(ge=2)] = 20,
        clip: bool = True,
        samples: Annotated[int, Field(ge=1)] = 128,
        batch_size: Annotated[int, Field(ge=1)] = 8,
        skip: tuple[str, ...] = ("embeddings", "head"),
    ) -> None:
        self.scheme = Scheme(bits, group_size, symmetric)
        self.grid = grid
        self.clip = clip
        self.samples = samples
        self.batch_size = batch_size
        self.skip = skip
        self.train_samples = samples
        self.keeps_head = "head" in skip
        self.quantized: dict[str, Quantized] = {}
        self.average_bits: dict[str, float] = {}

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        name = name_family(skeleton)
        if name not in FAMILIES:
            known = ", ".join(other for other, family in FAMILIES.items() if family.folds)
            raise UserError(f"`awq` knows where to fold scales in {known} and not in `{name}`. Set technique=gptq.")
        if not FAMILIES[name].folds:
            raise UserError(
                f"`awq` folds the scales of a layer's inputs into the norm before it, and the norms of `{name}` feed "
                "the residual branch as well, which would be scaled too. Set technique=gptq."
            )
        for name, linear in find_quantizable(skeleton, self.skip, self.key).items():
            self.scheme.check(self.key, name, linear)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check(unwrap_model(pl_module), [])  # before training: a script without the chain has not checked

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = unwrap_model(pl_module).to(trainer.strategy.root_device)
        wanted = find_quantizable(model, self.skip, self.key)
        batches = list(draw_calibration_batches(trainer, self.samples, self.batch_size))

        def prepare(name: str, block: nn.Module, forwards: Forwards, masks: list[Tensor | None]) -> None:
            names = {layer.removeprefix(f"{name}.") for layer in wanted}
            rescale_block(block, find_family(model), forwards, masks, self.scheme, self.grid, names)

        with evaluation_mode(model):
            for layers, moment in calibrate_layers(model, batches, second_moment, wanted, prepare=prepare):
                for name, linear in layers.items():
                    weight = linear.weight.data
                    shrink = search_clipping(weight, moment, self.scheme, self.grid) if self.clip else 1.0
                    grid = minmax_grid(weight, self.scheme, weight.dtype, shrink)
                    weight.copy_(round_to_grid(weight, grid, self.scheme))
                    self.quantized[name] = Quantized(self.scheme, grid)
        self.average_bits = average_bits(model, self.quantized)
        model.cpu()

    def save(self, model: nn.Module, folder: Path) -> None:
        save_model(model, self.quantized, folder)


@torch.no_grad()
def rescale_block(
    block: nn.Module,
    family: Family,
    forwards: Forwards,
    masks: list[Tensor | None],
    scheme: Scheme,
    points: int,
    wanted: Container[str],
) -> None:
    """Scale the inputs of the block's layers by the scales that lose least in rounding, measured on its ``forwards``.
    Until the weights are rounded, the block computes the same function. Layers that are not ``wanted`` stay
    unchanged."""
    for place in family.folds:
        before = block.get_submodule(place.before)
        layers: list[Any] = [block.get_submodule(name) for name in place.layers]
        changed = place.layers + ((place.before,) if isinstance(before, nn.Linear) else ())
        if any(name not in wanted for name in changed):
            continue
        source = find_sources(before, layers[0], read_block(block, family).head_size)
        if place.within is None:
            (layer,) = layers
            error = moment_error(layer.weight, combine_over_inputs(layer, forwards, masks, second_moment))
        else:
            error = output_error(block.get_submodule(place.within), layers, forwards, masks)
        activation = combine_over_inputs(layers[0], forwards, masks, sum_magnitudes)
        scale = search_scales([layer.weight for layer in layers], activation, source, scheme, points, error)
        fold_scale(before, layers, scale, source)


def moment_error(weight: Tensor, moment: Tensor) -> Callable[[list[Tensor]], Tensor]:
    """Return a function that computes the squared error of a layer's outputs at another weight, from the second moment
    of its inputs."""

    def error(others: list[Tensor]) -> Tensor:
        lost = others[0].float() - weight.float()
        return ((lost @ moment) * lost).sum()

    return error


def output_error(
    module: nn.Module, layers: list[nn.Linear], forwards: Forwards, masks: list[Tensor | None]
) -> Callable[[list[Tensor]], Tensor]:
    """Return a function that computes the squared error of the outputs of ``module``, except padding, at other weights
    of the ``layers`` inside it."""
    calls = list(record_inputs(module, forwards))
    weights = [layer.weight.data for layer in layers]

    def outputs(i: int) -> Tensor:
        args, kwargs = calls[i]
        output = module(*args, **kwargs)
        return select_tokens(output[0] if isinstance(output, tuple) else output, masks[i]).float()

    expected = [outputs(i) for i in range(len(calls))]

    def error(others: list[Tensor]) -> Tensor:
        for layer, other in zip(layers, others):
            layer.weight.data = other
        try:
            return torch.stack([(outputs(i) - expected[i]).pow(2).sum() for i in range(len(calls))]).sum()
        finally:
            for layer, weight in zip(layers, weights):
                layer.weight.data = weight

    return error


def sum_magnitudes(x: Tensor) -> Tensor:
    """Return the sum of absolute activations ``[tokens, inputs]`` of every channel, ``[inputs]``."""
    return x.abs().sum(0)


def search_scales(
    weights: list[Tensor],
    activation: Tensor,
    source: Tensor,
    scheme: Scheme,
    points: int,
    error: Callable[[list[Tensor]], Tensor],
) -> Tensor:
    """Return the scales, ``[channels]``, at which the rounded ``weights`` have the least ``error``. Candidates are
    ``points`` ratios, with and without the weights' own magnitude. All scales at 1 come first, and win a tie."""
    own = mean_per_source(source, relative_magnitude(weights, scheme))
    activation = mean_per_source(source, activation)
    candidates = [
        channel_scales(activation, weight, ratio)
        for weight in (torch.ones_like(own), own)
        for ratio in torch.linspace(0, 1, points).tolist()
    ]

    def rounded(weight: Tensor, scale: Tensor) -> Tensor:
        scaled = weight.float() * scale
        return (round_to_grid(scaled, minmax_grid(scaled, scheme, weight.dtype), scheme) / scale).to(weight.dtype)

    errors = [error([rounded(weight, scale[source]) for weight in weights]) for scale in candidates]
    return candidates[int(torch.stack(errors).nan_to_num(torch.inf).argmin())]


def mean_per_source(source: Tensor, x: Tensor) -> Tensor:
    """Return the mean of ``x`` ``[inputs]`` over the inputs of the same ``source``, ``[channels]``."""
    total = torch.zeros(int(source.max()) + 1, device=x.device).index_add_(0, source, x)
    return total / source.bincount()


def relative_magnitude(weights: list[Tensor], scheme: Scheme) -> Tensor:
    """Return the mean magnitude of each input's weights, as fractions of the largest weight of their group,
    ``[inputs]``."""
    groups = torch.cat(weights).float().abs().unflatten(1, (-1, scheme.group(weights[0].shape[1])))
    largest = groups.amax(2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (groups / largest).flatten(1).mean(0)


def channel_scales(activation: Tensor, weight: Tensor, ratio: float) -> Tensor:
    """Return ``activation^ratio / weight^(1 - ratio)`` of every channel, centred at 1. A channel that is always zero,
    or has only zero weights, gets 1."""
    live = (activation > 0) & (weight > 0)
    scale = torch.where(live, activation, 1.0) ** ratio / torch.where(live, weight, 1.0) ** (1 - ratio)
    if live.any():
        scale = scale / (scale[live].max() * scale[live].min()).sqrt()
    return torch.where(live, scale, 1.0)


@torch.no_grad()
def search_clipping(weight: Tensor, moment: Tensor, scheme: Scheme, points: int) -> Tensor:
    """Return the range of every group's grid, as a fraction of its widest weight, ``[rows, groups]``. Of ``points``
    fractions from 1 to 0.5, the best one changes the group's contribution to the outputs least, on inputs of second
    ``moment`` ``[inputs, inputs]``."""
    size = scheme.group(weight.shape[1])
    within = moment.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def error(shrink: float) -> Tensor:
        grid = minmax_grid(weight, scheme, weight.dtype, shrink)
        lost = (round_to_grid(weight, grid, scheme) - weight.float()).unflatten(1, (-1, size)).transpose(0, 1)
        return ((lost @ within) * lost).sum(2).T

    shares = torch.linspace(1, 0.5, points, device=weight.device)
    return shares[torch.stack([error(share) for share in shares.tolist()]).argmin(0)]
