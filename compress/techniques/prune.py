"""Unstructured magnitude pruning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
import torch
from pydantic import Field, validate_call
from torch import Tensor, nn

from compress.errors import UserError
from compress.models import compressed, linears


class Prune(pl.Callback):
    """Set the smallest weights of the transformer blocks to zero, and keep them zero while training goes on.

    Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015, arXiv:1506.02626.

    Weights are pruned when the fit starts, once; epochs of that fit retrain what is left.

    Args:
        sparsity: fraction of the weights that are zero afterwards, counted over all pruned layers.
        scope: ``global`` ranks the weights of all layers together, ``layer`` prunes every layer by the same fraction.

    Raises:
        UserError: the model is that sparse already, so that nothing would change.

        pl.Trainer(max_epochs=1, callbacks=[Prune(sparsity=0.5)]).fit(module, loader)
    """

    limits = "pruned weights are stored and multiplied as zeros: no size, no speed on a dense runtime"

    @validate_call
    def __init__(
        self, sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.2, scope: Literal["global", "layer"] = "global"
    ) -> None:
        self.sparsity = sparsity
        self.scope = scope
        self.masks: dict[str, Tensor] = {}

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        linears(skeleton)
        for stage in before:
            if isinstance(stage, Prune) and stage.sparsity >= self.sparsity:
                raise UserError(
                    f"A `prune` to a sparsity of {self.sparsity:g} follows one to {stage.sparsity:g} and has nothing "
                    "left to prune: ask the later one for more (technique.prune_2.sparsity=0.5)."
                )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = compressed(pl_module)
        weights = {name: linear.weight for name, linear in linears(model)}
        before = measured_sparsity(weights.values())
        if before >= self.sparsity:
            raise UserError(
                f"`prune` was asked for a sparsity of {self.sparsity:g} and the model's is {before:.4g} already: "
                "ask for more with technique.prune.sparsity, or leave the stage out."
            )
        scores = {name: weight.detach().abs() for name, weight in weights.items()}
        if self.scope == "global":
            masks = smallest(scores, self.sparsity)
        else:
            masks = {name: smallest({name: score}, self.sparsity)[name] for name, score in scores.items()}
        self.masks = {name: ~pruned for name, pruned in masks.items()}
        hold(model, self.masks)
        after, count = measured_sparsity(weights.values()), sum(weight.numel() for weight in weights.values())
        if abs(after - self.sparsity) * count > len(weights) + 1:  # each layer may round by one weight
            raise RuntimeError(f"asked for a sparsity of {self.sparsity}, measured {after}")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        hold(compressed(pl_module), self.masks)


class HoldZeros(pl.Callback):
    """Keep the weights that are zero when the fit starts at zero through all of it: a later stage must not fill in
    what an earlier one pruned."""

    def __init__(self) -> None:
        self.masks: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.masks = {name: linear.weight.detach() != 0 for name, linear in linears(compressed(pl_module))}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        hold(compressed(pl_module), self.masks)


@torch.no_grad()
def hold(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Multiply the weights by their masks (1 keeps, 0 prunes) in place."""
    for name, mask in masks.items():
        model.get_submodule(name).weight.mul_(mask)


def measured_sparsity(weights: Iterable[Tensor]) -> float:
    """Fraction of exact zeros."""
    counts = [(int((weight == 0).sum()), weight.numel()) for weight in weights]
    return sum(zero for zero, _ in counts) / sum(size for _, size in counts)


def smallest(scores: dict[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """Masks (True: among the smallest) that cover ``round(fraction * n)`` of all n scores exactly.

    Ties at the threshold go to the first in order. Scores are non-negative and are never gathered in one tensor, so a
    model of any size costs the memory of its largest layer.
    """
    rank = round(fraction * sum(score.numel() for score in scores.values()))
    if rank == 0:
        return {name: torch.zeros_like(score, dtype=torch.bool) for name, score in scores.items()}
    threshold = kth_smallest(list(scores.values()), rank)
    masks = {name: score.float() < threshold for name, score in scores.items()}
    missing = rank - sum(int(mask.sum()) for mask in masks.values())
    for name, score in scores.items():
        ties = (score.float() == threshold).flatten().nonzero()[:missing, 0]
        masks[name].view(-1)[ties] = True
        missing -= len(ties)
    return masks


def kth_smallest(scores: list[Tensor], k: int) -> float:
    """The k-th smallest (from 1) of non-negative values spread over tensors, by two histograms over their float32 bits:
    the bits of non-negative floats are ordered as the floats are."""
    low, rest = 0, k
    for shift in (16, 0):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for score in scores:
            bits = score.float().contiguous().view(torch.int32).flatten()
            if shift == 0:
                bits = bits[(bits >> 16) == low >> 16]
            counts += torch.bincount((bits >> shift) & 0xFFFF, minlength=1 << 16).cpu()
        below = counts.cumsum(0)
        bucket = int(torch.searchsorted(below, rest))
        rest -= int(below[bucket] - counts[bucket])
        low |= bucket << shift
    return torch.tensor(low, dtype=torch.int32).view(torch.float32).item()
