"""Weight-only quantization that protects the channels of large activations; pruned zeros stay."""

from __future__ import annotations

from math import inf, isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
import torch
from pydantic import Field, validate_call
from torch import Tensor, nn

from compress.errors import UserError
from compress.formats.stage import WeightOnly
from compress.maths.hessian import row_errors, second_moment
from compress.maths.rounding import Scheme, fit_grid, minmax_grid, round_to_grid, round_to_nearest
from compress.maths.scales import mean_per_source, raise_smallest
from compress.models.batches import draw_calibration_batches
from compress.models.calibration import Section, sequential
from compress.models.families import find_conventions, name_family
from compress.models.folding import Fold, find_folds
from compress.models.layers import evaluation_mode, unwrap_model
from compress.techniques.gptq import Outcome, write_better, write_errors

MOST_ROWS = 128
"""Rows of the matrices that share an input, on which scales are compared: their errors rank the scales as all would."""


class AWQ(WeightOnly):
    """Round the weights of the transformer blocks to a few bits. The inputs of each layer are scaled first, so that the
    channels of large activations lose least. The widest weights of a group are clipped if that reduces the error.

    Lin et al., "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration", 2023,
    arXiv:2306.00978. The scales are folded into the operation before, a norm or a layer, so the model computes the same
    function at no extra cost. Where that is possible is proven: random scales there must leave the outputs of the block
    as they are. Other layers keep their inputs. A weight that is exactly zero stays exactly zero.

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
        UserError: scales can be folded nowhere in the model, groups do not divide a layer, or a pattern matches no
            layer.

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[AWQ(bits=4, group_size=32)]).fit(module, loader)
    """

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
        super().__init__(Scheme(bits, group_size, symmetric), samples, batch_size, skip)
        self.grid = grid
        self.clip = clip
        self.outcomes: dict[str, Outcome] = {}

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        if not find_conventions(skeleton).folds:
            raise UserError(describe_unfoldable(skeleton))
        super().check(skeleton, before)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check(unwrap_model(pl_module), [])  # before training: a script without the chain has not checked

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = unwrap_model(pl_module).to(trainer.strategy.root_device)
        wanted = self.select(model)
        batches = list(draw_calibration_batches(trainer, self.samples, self.batch_size))
        outcomes: dict[str, int] = {}
        scaled: set[str] = set()

        def prepare(section: Section) -> None:
            folds = find_folds(section, outcomes)
            scaled.update(name for fold in folds for name in fold.after)
            if not scaled:
                raise UserError(describe_unfoldable(model))
            rescale_section(section, folds, self.scheme, self.grid)

        with evaluation_mode(model):
            for shared in sequential(model, batches, second_moment, wanted, prepare):
                for name, matrix in shared.matrices.items():
                    weight = matrix.weight
                    points = self.grid if self.clip else 1
                    grid = fit_grid(weight, self.scheme, weight.dtype, shared.statistic, points)
                    clipped = round_to_nearest(weight, grid, self.scheme)
                    self.outcomes[name] = write_better(weight, clipped, shared.statistic)
        self.keep({name: outcome.quantized for name, outcome in self.outcomes.items()})
        self.limits = f"{len(scaled & wanted.keys())} of {len(wanted)} matrices have scaled inputs; {AWQ.limits}"
        model.cpu()

    def report(self, folder: Path) -> None:
        """Write ``errors.csv``: the error of every scaled layer's outputs, beside that without clipping."""
        write_errors(self.outcomes, folder / "errors.csv")


def describe_unfoldable(model: nn.Module) -> str:
    return (
        f"`awq` moves the scales of a layer's inputs into the norm or layer before it, and no place of `"
        f"{name_family(model)}` allows that: something else reads the same outputs. Set technique=gptq."
    )


@torch.no_grad()
def rescale_section(section: Section, folds: list[Fold], scheme: Scheme, points: int) -> None:
    """Scale the inputs of the section's matrices by the scales that lose least in rounding. Until the weights are
    rounded, the section computes the same function."""
    blocks: dict[str, list[Fold]] = {}
    for fold in folds:  # the moments of a block are in memory, also where the section is a whole model
        blocks.setdefault(section.name or find_block(fold.before.name), []).append(fold)
    for inside in blocks.values():
        moments: dict[str, Tensor] = {}
        for shared in section.observe(second_moment, {name for fold in inside for name in fold.after}):
            moments |= dict.fromkeys(shared.matrices, shared.statistic)
        for fold in inside:
            fold.apply(search_scales(fold, moments, scheme, points))


def find_block(name: str) -> str:
    """Return the part of a module's name that ends in the first number, which is that of its block."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdecimal()), 0)
    return ".".join(parts[: number + 1])


def search_scales(fold: Fold, moments: dict[str, Tensor], scheme: Scheme, points: int) -> Tensor:
    """Return the scales, ``[channels]``, at which the rounded matrices of a fold have the least error of their outputs,
    on inputs of the second ``moments`` ``[inputs, inputs]`` of the matrices that are rounded (equation 4 of the paper).

    Candidates are ``points`` ratios, with and without the weights' own magnitude. All scales at 1 come first, and win a
    tie. Of many rows, some show which scales are best.
    """
    matrices = {name: matrix.weight for name, matrix in fold.after.items() if name in moments}
    power = torch.stack([moments[name].diagonal() for name in matrices]).sum(0)
    own = mean_per_source(fold.source, relative_magnitude(list(matrices.values()), scheme))
    activation = mean_per_source(fold.source, power.sqrt())
    candidates = [
        channel_scales(activation, weight, ratio)
        for weight in (torch.ones_like(own), own)
        for ratio in torch.linspace(0, 1, points).tolist()
    ]

    share = MOST_ROWS / sum(map(len, matrices.values()))
    some = {name: take_rows(weight, share) for name, weight in matrices.items()}

    def lost(weight: Tensor, scale: Tensor) -> Tensor:
        scaled = weight.float() * scale
        return round_to_grid(scaled, minmax_grid(scaled, scheme, weight.dtype), scheme) / scale - weight.float()

    errors = torch.zeros(len(candidates))
    for name, weight in some.items():
        every = torch.cat([lost(weight, scale[fold.source]) for scale in candidates])  # one product for all
        errors += row_errors(every, moments[name]).view(len(candidates), -1).sum(1).cpu()
    losses = errors.tolist()
    return candidates[min(range(len(losses)), key=lambda i: losses[i] if isfinite(losses[i]) else inf)]


def take_rows(weight: Tensor, share: float) -> Tensor:
    """Return a ``share`` of the rows of ``weight`` ``[rows, inputs]``, at even distances, and at least one row."""
    count = max(round(share * len(weight)), 1)
    return weight if count >= len(weight) else weight[torch.arange(count) * len(weight) // count]


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
    scale = raise_smallest(activation) ** ratio / raise_smallest(weight) ** (1 - ratio)
    if live.any():
        scale = scale / (scale[live].max() * scale[live].min()).sqrt()
    return torch.where(live, scale, 1.0)
