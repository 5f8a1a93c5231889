"""Score attention heads and FFN channels, and choose the most important."""

from __future__ import annotations

import torch
from torch import Tensor

Scores = list[Tensor]  # a tensor a block: a number for every unit; for channels of experts, [experts, channels]
Masks = list[Tensor]  # the same shapes; True is kept


def units_left(step: int, steps: int, now: int, goal: int) -> int:
    """Return how many of ``now`` units are left after a step, counted from 1, on the way to ``goal``."""
    each, more = divmod(now - goal, steps)
    return now - each * step - min(step, more)


def mask_important(scores: Scores, total: int, even: bool, multiple_of: int = 1) -> Masks:
    """Return masks of the ``total`` units with the highest scores: the same number in every block where ``even``, else
    any number in multiples of ``multiple_of``, at least one multiple a block. The units of a block are ranked, then
    bundled, as TextPruner does. Every expert of a block keeps the same number of channels, and these count once."""
    if even:
        return [mask_top(score, min(total // len(scores), score.shape[-1])) for score in scores]
    ranked = [score.float().sort(descending=True).values for score in scores]
    bundles = [score.view(-1, score.shape[-1]).sum(0).view(-1, multiple_of).sum(1) for score in ranked]
    for sums in bundles:
        sums[0] = torch.inf
    owner = torch.cat([torch.full(sums.shape, i) for i, sums in enumerate(bundles)])
    kept = owner[torch.cat(bundles).topk(total // multiple_of).indices.cpu()]
    return [mask_top(score, multiple_of * int((kept == i).sum())) for i, score in enumerate(scores)]


def mask_top(score: Tensor, count: int) -> Tensor:
    """Return the mask of the ``count`` highest scores, in every row if there are rows."""
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, score.topk(count).indices, True)


def taylor_score(weight: Tensor, gradient: Tensor, units: int) -> Tensor:
    """Return the first-order change of the loss if a unit's inputs are removed from the layer that reads them.

    ``weight`` and ``gradient`` are ``[outputs, inputs]``; the inputs of a unit are adjacent.
    """
    return (weight * gradient).float().sum(0).view(units, -1).sum(1).abs()


def activation_score(weight: Tensor, norms: Tensor, units: int) -> Tensor:
    """Return the sum of ``|w| * norm`` over the weights ``[outputs, inputs]`` that read a unit."""
    return (weight.abs().float().sum(0) * norms).view(units, -1).sum(1)


def standardise_score(score: Tensor) -> Tensor:
    """Return the score shifted and scaled to mean 0 and variance 1."""
    return (score - score.mean()) / score.std(unbiased=False).clamp(min=torch.finfo(score.dtype).tiny)
