"""Choose the weights to prune: scores of importance, masks, and the schedule by which training applies them.

A score has the shape of its weight; the lowest values are pruned. A mask is True where a weight is pruned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from compress.errors import UserError
from compress.maths.hessian import Factor, Sweep, factorize

SCOPES = {
    "magnitude": ("global", "layer", "row"),
    "random": ("global", "layer", "row"),
    "movement": ("layer", "row", "global"),
    "wanda": ("row", "layer"),
    "sparsegpt": ("layer",),
}
"""Scopes over which a criterion ranks weights; the first is the one of its paper."""

PAIRWISE = 16
"""Scores of a group that are ranked by comparing all pairs, which is faster than sorting if they are few."""


def magnitude_score(weight: Tensor) -> Tensor:
    """Return ``|w|``: Han et al., 2015, arXiv:1506.02626."""
    return weight.detach().abs()


def wanda_score(weight: Tensor, squared_norms: Tensor) -> Tensor:
    """Return ``|w| ||x||_2``: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2024,
    arXiv:2306.11695; ``squared_norms`` are those of the inputs, ``[inputs]``."""
    return weight.detach().float().abs() * squared_norms.sqrt()


def squared_norms(x: Tensor) -> Tensor:
    """Return the squared norm of every input over the tokens of ``x`` ``[tokens, inputs]``."""
    return x.square().sum(0)


def random_score(weight: Tensor, seed: int) -> Tensor:
    """Return a number from (0, 1] for every weight, the control of all criteria; 0 where a weight is zero."""
    generator = torch.Generator().manual_seed(seed)
    return (1 - torch.rand(weight.shape, generator=generator)).to(weight.device).masked_fill(weight == 0, 0)


def mask_model(scores: dict[str, Callable[[], Tensor]], fraction: float) -> Iterator[tuple[str, Tensor]]:
    """Yield masks of exactly the lowest ``round(fraction * n)`` of all n scores, ranked over all tensors together.

    Ties at the threshold go to the first in order. Scores are computed when needed and not kept, so that a model of any
    size costs the memory of its largest layer.
    """
    sizes = {name: score().numel() for name, score in scores.items()}
    rank = round(fraction * sum(sizes.values()))
    if rank == 0:
        yield from ((name, torch.zeros_like(score(), dtype=torch.bool)) for name, score in scores.items())
        return
    threshold, below = kth_smallest(lambda: (score() for score in scores.values()), rank)
    ties_left = rank - below
    for name, make in scores.items():
        score = make().float().contiguous()
        mask = score < threshold
        ties = (score == threshold).flatten().nonzero()[:ties_left, 0]
        mask.view(-1)[ties] = True
        ties_left -= len(ties)
        yield name, mask


def mask_tensor(score: Tensor, fraction: float) -> Tensor:
    """Return the mask of the lowest ``round(fraction * n)`` of one tensor's n scores."""
    return dict(mask_model({"": lambda: score}, fraction))[""]


def mask_rows(score: Tensor, fraction: float) -> Tensor:
    """Return the mask of the lowest ``fraction`` of every row of ``[rows, inputs]``; ties in order. Where that is no
    whole number, rows round up and down in turn, so that the total is right."""
    rows, inputs = score.shape
    counts = (torch.arange(rows + 1, dtype=torch.float64) * fraction * inputs).round().diff().int()
    score, mask = score.float(), torch.zeros_like(score, dtype=torch.bool)
    for count in counts.unique().tolist():
        members = (counts == count).nonzero()[:, 0].to(score.device)
        if count:
            mask[members] = mask_lowest(score[members], count)
    return mask


def mask_lowest(score: Tensor, count: int) -> Tensor:
    """Return the mask of the ``count`` lowest, at least 1, of every row of ``[rows, inputs]``; ties in order."""
    threshold = score.kthvalue(count, dim=-1, keepdim=True).values
    mask = score <= threshold
    if (mask.sum(-1) > count).any():
        below, ties = score < threshold, score == threshold
        mask = below | (ties & (ties.cumsum(-1) <= count - below.sum(-1, keepdim=True)))
    return mask


def mask_groups(score: Tensor, pruned: int, group: int) -> Tensor:
    """Return the mask of the ``pruned`` lowest of every ``group`` consecutive inputs of ``[rows, inputs]``: N:M
    sparsity, which keeps N = group - pruned weights of M = group. Mishra et al., 2021, arXiv:2104.08378."""
    return (rank_scores(score.reshape(len(score), -1, group)) < pruned).reshape(score.shape)


def rank_scores(score: Tensor, dim: int = -1) -> Tensor:
    """Return the rank of every score within a dimension, from 0; ties in order."""
    members = score.unbind(dim)
    if len(members) > PAIRWISE:
        return score.argsort(dim=dim, stable=True).argsort(dim=dim, stable=True)
    ranks = [torch.full_like(members[0], i, dtype=torch.uint8) for i in range(len(members))]
    for i, earlier in enumerate(members):
        for j in range(i + 1, len(members)):
            overtakes = (members[j] < earlier).view(torch.uint8)
            ranks[i] += overtakes
            ranks[j] -= overtakes
    return torch.stack(ranks, dim=dim)


def kth_smallest(scores: Callable[[], Iterable[Tensor]], k: int) -> tuple[float, int]:
    """Return the k-th smallest (from 1) of the values in the tensors of ``scores()``, and how many values are smaller.

    Two histograms over the upper and the lower half of the float32 bits find it in constant memory.
    """
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
        bucket_index = int(torch.searchsorted(upto, rest))
        rest -= int(upto[bucket_index] - counts[bucket_index])
        if lower:
            threshold = (high << 16) | bucket_index
        else:
            high = bucket_index - (1 << 15)
    bits = torch.tensor(threshold, dtype=torch.int32)
    value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32).item()
    return value, k - rest


@torch.no_grad()
def sparsegpt(
    weights: Sequence[Tensor],
    hessian: Tensor,
    goals: Sequence[float | tuple[int, int]],
    damping: float = 0.01,
    block: int = 128,
) -> list[Tensor]:
    """Prune each of ``weights`` ``[rows, inputs]``, layers with one input, and return them with the remaining weights
    updated, so that the outputs on inputs of second moment ``hessian`` ``[inputs, inputs]`` change least; exact zeros
    stay.

    Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023,
    arXiv:2301.00774. A layer's goal is its sparsity, or a pattern (pruned, group). In every ``block`` of inputs that
    fraction of the layer, or in every group that many, with the lowest ``w^2 / [H^-1]_jj`` are chosen. Later columns
    compensate the error of each column. The groups of a pattern are visited from large inputs to small ones, as GPTQ
    visits columns: the paper keeps their order, and leaves a tenth more error. The Hessian is factorized once for each
    pattern.

    Raises:
        UserError: no damping makes the Hessian positive definite.
    """
    segments = [goal[1] if isinstance(goal, tuple) else block for goal in goals]
    updated: dict[int, Tensor] = {}
    for segment in dict.fromkeys(segments):
        members = [i for i, other in enumerate(segments) if other == segment]
        rows = [len(weights[i]) for i in members]
        order = order_groups(hessian, segment) if isinstance(goals[members[0]], tuple) else None
        factor = factorize(hessian if order is None else hessian[order][:, order], damping)
        joined = torch.cat([weights[i] for i in members])
        pruned = prune_columns(joined, factor, rows, [goals[i] for i in members], segment, order)
        updated |= {i: part.to(weights[i].dtype) for i, part in zip(members, pruned.split(rows))}
    return [updated[i] for i in range(len(weights))]


def order_groups(hessian: Tensor, group: int) -> Tensor:
    """Return the indices ``[inputs]`` of groups of consecutive inputs, those with the largest inputs first."""
    sizes = hessian.diagonal().view(-1, group).sum(1)
    members = torch.arange(len(hessian), device=hessian.device).view(-1, group)
    return members[sizes.argsort(descending=True, stable=True)].flatten()


def prune_columns(
    weight: Tensor,
    factor: Factor,
    rows: list[int],
    goals: list[float | tuple[int, int]],
    segment: int,
    order: Tensor | None,
) -> Tensor:
    """Return ``weight`` ``[sum of rows, inputs]`` in floats, with each layer's ``rows`` pruned to its goal. Columns are
    visited in ``order``, that of ``factor``."""
    original = weight.float().T.contiguous()  # [inputs, rows]: a column is contiguous
    if order is not None:
        original = original[order]
    result = torch.empty_like(original)
    kept = original.ne(0).float()
    sparse = not kept.all()

    def prepare(start: int, stop: int, continuation: Tensor) -> None:
        score = continuation.square() * factor.diagonal[start:stop, None]
        if sparse:
            score.masked_fill_(original[start:stop] == 0, -1)
        by_layer = zip(kept[start:stop].split(rows, 1), score.split(rows, 1), goals)
        for keep, score, goal in by_layer:
            if isinstance(goal, tuple):
                keep *= rank_scores(score, 0) >= goal[0]  # the segment is the group
            else:
                size = score.shape[1]
                due = round(goal * size * stop) - round(goal * size * start)
                keep *= ~mask_tensor(score.T, due / score.numel()).T

    def choose(j: int, column: Tensor) -> Tensor:
        return torch.mul(column, kept[j], out=result[j])  # many times as fast as `where`

    Sweep(original, factor, segment, prepare, choose).run()
    result.add_(0)  # no zero is negative
    return (result if order is None else result[order.argsort()]).T


def gradual_schedule(steps: int, begin: float = 0.0, end: float = 1.0, every: int = 1) -> dict[int, float]:
    """Return the share of the final sparsity at each pruning step: the cubic schedule of Zhu and Gupta, "To prune, or
    not to prune", 2017, arXiv:1710.01878, every ``every`` steps from ``begin`` to ``end`` (fractions of ``steps``)."""
    first, last = round(begin * steps), max(round(end * steps) - 1, 0)
    times = [*range(first, last, every), last]
    return {t: 1 - (1 - (t - first) / max(last - first, 1)) ** 3 if t < last else 1.0 for t in times}


def iterative_schedule(steps: int, rounds: int) -> dict[int, float]:
    """Return the share of the final sparsity at each pruning step: ``rounds`` equal parts, with training after each."""
    return {i * steps // rounds: (i + 1) / rounds for i in range(rounds)}


def parse_pattern(pattern: str | int | None, key: str) -> tuple[int, int] | None:
    """Return ``"2:4"``, the setting ``key``, as (pruned, group).

    Raises:
        UserError: it is no pattern, or keeps all or none of a group.
    """
    if pattern is None:
        return None
    if not re.fullmatch(r"\d+:\d+", str(pattern)):
        raise UserError(
            f"{key} is {pattern}; a text such as '2:4' is expected. Keep the quotation marks in YAML, which reads 2:4 "
            "as a number."
        )
    left, group = map(int, str(pattern).split(":"))
    if not 0 < left < group <= 128:
        raise UserError(
            f"{key} is {pattern}; a pattern keeps some weights of every group of at most 128 and prunes some. Set "
            f"{key}='2:4', for example."
        )
    return group - left, group
