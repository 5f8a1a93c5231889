"""Which weights to prune: scores of their importance, the masks that follow, and when training applies them.

Scores are tensors of the weight's shape; the lowest are pruned. Masks are True where a weight is pruned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from compress.errors import UserError
from compress.maths.hessian import inverse_factor

SCOPES = {
    "magnitude": ("global", "layer", "row"),
    "random": ("global", "layer", "row"),
    "movement": ("layer", "row", "global"),
    "wanda": ("row", "layer"),
    "sparsegpt": ("layer",),
}
"""Over what a criterion can rank weights; the first is what its paper does."""


def magnitude_score(weight: Tensor) -> Tensor:
    """``|w|``: Han et al., 2015, arXiv:1506.02626."""
    return weight.detach().abs()


def wanda_score(weight: Tensor, squared_norms: Tensor) -> Tensor:
    """``|w| ||x||_2``: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2024,
    arXiv:2306.11695; ``squared_norms`` of the inputs, ``[inputs]``."""
    return weight.detach().float().abs() * squared_norms.sqrt()


def squared_norms(x: Tensor) -> Tensor:
    """Of every input over the tokens of ``x`` ``[tokens, inputs]``."""
    return x.square().sum(0)


def random_score(weight: Tensor, seed: int) -> Tensor:
    """A number from (0, 1] for every weight, the control of every criterion; 0 where the weight is zero already."""
    generator = torch.Generator().manual_seed(seed)
    return (1 - torch.rand(weight.shape, generator=generator)).to(weight.device).masked_fill(weight == 0, 0)


def mask_model(scores: dict[str, Callable[[], Tensor]], fraction: float) -> Iterator[tuple[str, Tensor]]:
    """Masks that cover the lowest ``round(fraction * n)`` of all n scores exactly, ranked over all tensors together.

    Ties at the threshold go to the first in order. Every tensor of scores is made when it is needed and again when it
    is needed again, so that a model of any size costs the memory of its largest layer.
    """
    sizes = {name: score().numel() for name, score in scores.items()}
    rank = round(fraction * sum(sizes.values()))
    if rank == 0:
        yield from ((name, torch.zeros_like(score(), dtype=torch.bool)) for name, score in scores.items())
        return
    threshold, below = kth_smallest(lambda: (score() for score in scores.values()), rank)
    ties_left = rank - below
    for name, make in scores.items():
        score = make().float()
        mask = score < threshold
        ties = (score == threshold).flatten().nonzero()[:ties_left, 0]
        mask.view(-1)[ties] = True
        ties_left -= len(ties)
        yield name, mask


def mask_tensor(score: Tensor, fraction: float) -> Tensor:
    """The mask of the lowest ``round(fraction * n)`` of one tensor's n scores."""
    return dict(mask_model({"": lambda: score}, fraction))[""]


def mask_rows(score: Tensor, fraction: float) -> Tensor:
    """The mask of the lowest ``fraction`` of every row of ``[rows, inputs]``; where that is no whole number, the rows
    take turns in rounding, so that the total is right."""
    rows, inputs = score.shape
    ends = (torch.arange(rows + 1, dtype=torch.float64, device=score.device) * fraction * inputs).round()
    return rank_scores(score) < ends.diff()[:, None]


def mask_groups(score: Tensor, pruned: int, group: int) -> Tensor:
    """The mask of the ``pruned`` lowest of every ``group`` consecutive inputs of ``[rows, inputs]``: N:M sparsity, with
    N = group - pruned weights left of M = group. Mishra et al., 2021, arXiv:2104.08378."""
    return (rank_scores(score.reshape(len(score), -1, group)) < pruned).reshape(score.shape)


def rank_scores(score: Tensor) -> Tensor:
    """The place of every score among those of its last dimension, from 0; ties in order."""
    return score.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)


def kth_smallest(scores: Callable[[], Iterable[Tensor]], k: int) -> tuple[float, int]:
    """The k-th smallest (from 1) of the values that ``scores()`` gives out in any number of tensors, and how many are
    smaller, by two histograms over the upper and the lower half of their float32 bits."""
    high, rest = 0, k
    threshold = 0
    for lower in (False, True):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for score in scores():
            bits = score.float().contiguous().view(torch.int32).flatten()
            ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats, negative ones too
            if lower:
                ordered = ordered[(ordered >> 16) == high]
            bucket = (ordered & 0xFFFF) if lower else (ordered >> 16) + (1 << 15)
            counts += torch.bincount(bucket, minlength=1 << 16).cpu()
        upto = counts.cumsum(0)
        found = int(torch.searchsorted(upto, rest))
        rest -= int(upto[found] - counts[found])
        if lower:
            threshold = (high << 16) | found
        else:
            high = found - (1 << 15)
    bits = torch.tensor(threshold, dtype=torch.int32)
    value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32).item()
    return value, k - rest


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
    damping: float = 0.01,
    block: int = 128,
) -> Tensor:
    """Prune ``weight`` ``[rows, inputs]`` and update what is left, so that its outputs on inputs of second moment
    ``hessian`` ``[inputs, inputs]`` change least; exact zeros stay.

    Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023,
    arXiv:2301.00774. Every ``block`` inputs the same ``sparsity`` of lowest ``w^2 / [H^-1]_jj`` is chosen, or with a
    ``pattern`` (pruned, group) that many of every group; the error of each column is made up for by those after it.
    """
    left, pruned_before = weight.float().clone(), weight == 0
    factor = inverse_factor(hessian, damping)
    spread = factor.diagonal().square()
    rows, inputs = weight.shape
    if pattern is not None:
        block -= block % pattern[1]  # no group lies across two blocks
    result = torch.zeros_like(left)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        inside = slice(start, stop)
        done, due = round(sparsity * rows * start), round(sparsity * rows * stop)
        if pattern is None:
            score = (left[:, inside].square() / spread[inside]).masked_fill(pruned_before[:, inside], -1)
            mask = mask_tensor(score, (due - done) / score.numel())
        else:
            mask = torch.zeros(rows, stop - start, dtype=torch.bool, device=weight.device)
        errors = torch.zeros(rows, stop - start, device=weight.device)
        for j in range(start, stop):
            if pattern is not None and j % pattern[1] == 0:
                group = slice(j, j + pattern[1])
                score = (left[:, group].square() / spread[group]).masked_fill(pruned_before[:, group], -1)
                mask[:, j - start : j - start + pattern[1]] = mask_groups(score, *pattern)
            column = left[:, j]
            kept = column.masked_fill(mask[:, j - start] | pruned_before[:, j], 0)
            error = (column - kept) / factor[j, j]
            left[:, j:stop] -= error[:, None] * factor[None, j, j:stop]
            result[:, j], errors[:, j - start] = kept, error
        left[:, stop:] -= errors @ factor[inside, stop:]
    return result.to(weight.dtype)


def gradual_schedule(steps: int, begin: float = 0.0, end: float = 1.0, every: int = 1) -> dict[int, float]:
    """When to prune, and how much of the way to the final sparsity to go: the cubic schedule of Zhu and Gupta, "To
    prune, or not to prune", 2017, arXiv:1710.01878, from ``begin`` to ``end`` (fractions of ``steps``), ``every`` so
    many."""
    first, last = round(begin * steps), max(round(end * steps) - 1, 0)
    times = [*range(first, last, every), last]
    return {t: 1 - (1 - (t - first) / max(last - first, 1)) ** 3 if t < last else 1.0 for t in times}


def iterative_schedule(steps: int, rounds: int) -> dict[int, float]:
    """When to prune, and how much of the way to go: in ``rounds`` equal steps, training in between and after."""
    return {i * steps // rounds: (i + 1) / rounds for i in range(rounds)}


def parse_pattern(pattern: str | int | None, key: str) -> tuple[int, int] | None:
    """Return ``"2:4"``, the setting ``key``, as (pruned, group).

    Raises:
        UserError: it is no pattern, or leaves all of a group, or nothing.
    """
    if pattern is None:
        return None
    if not re.fullmatch(r"\d+:\d+", str(pattern)):
        raise UserError(
            f"{key} is {pattern}, which should read like '2:4' (in YAML with its quotation marks, or "
            "it is a number of base 60)."
        )
    left, group = map(int, str(pattern).split(":"))
    if not 0 < left < group <= 128:
        raise UserError(
            f"{key} is {pattern}, which should leave some weights of every group (at most 128) and "
            "prune some: set it to 2:4 or 4:8, say."
        )
    return group - left, group
