"""Losses of knowledge distillation: how far a student is from its teacher.

Where TextBrewer has a loss, it is TextBrewer's (Yang et al., "TextBrewer: An Open-Source Knowledge Distillation
Toolkit", 2020, arXiv:2002.12620). Every loss is a scalar. The gradient flows to the student only, and padding never
counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import UserError

SOFT = ("ce", "kl", "mse", "reverse_kl", "js")
"""Losses of :func:`soft_loss`."""
ACROSS = ("uld", "common")
"""Losses between models with different vocabularies: :func:`universal_loss` and :func:`common_loss`."""
PAIRS = ("fsp", "gram", "mmd", "nst")
"""Losses of :func:`match_loss` on two hidden states of each model."""
MATCH = (
    *("attention_mse", "attention_mse_sum", "attention_ce", "attention_ce_mean"),
    *("hidden_mse", "cos", "pkd", *PAIRS, "minilm"),
)
"""Losses of :func:`match_loss`."""
PROJECTIONS = ("linear", "relu", "tanh")
TEMPERATURES: dict[str, tuple[str, ...]] = {"constant": (), "flsw": ("beta", "gamma"), "cwsm": ("beta",)}
"""Schedules of :func:`logit_temperature` and their arguments."""
WEIGHTS = ("linear_decay", "linear_growth")
"""Schedules of :func:`loss_weight`."""


def soft_loss(
    name: str,
    student: Tensor,
    teacher: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None = None,
    probabilities: Literal["softmax", "sigmoid", "positions"] | None = "softmax",
    beta: float = 0.5,
) -> Tensor:
    """Return the loss of the student's logits against the teacher's, both divided by the temperature T.

    ``ce`` is the cross-entropy of the teacher's probabilities (TextBrewer's), ``kl`` subtracts the teacher's entropy,
    ``reverse_kl`` KL(student || teacher) (Gu et al., "MiniLLM", 2024, arXiv:2306.08543), ``js`` the generalized
    Jensen-Shannon divergence (Agarwal et al., "On-Policy Distillation of Language Models", 2024, arXiv:2306.13649).
    These four are multiplied by T^2, which keeps the size of gradients at every T (Hinton et al., "Distilling the
    Knowledge in a Neural Network", 2015, arXiv:1503.02531). ``mse`` is TextBrewer's squared error of logits / T, mean
    over labels, which is 1/T^2 of the error of the logits.

    Args:
        name: one of ``SOFT``.
        student: logits ``[batch, labels]`` or ``[batch, tokens, vocabulary]``.
        teacher: logits of the same shape.
        temperature: a number, or one per example ``[batch]`` or per token ``[batch, tokens]``.
        mask: ``[batch, tokens]``, nonzero where a token counts; the loss is the mean over these tokens, 0 for none.
        probabilities: the function from logits to probabilities: ``softmax``; ``sigmoid`` for every label, with the
            mean over labels and examples; ``positions`` for the softmax over the tokens of every text, with a
            temperature for each text or for all; None for a regression, which only ``mse`` supports.
        beta: weight of ``js``, between 0 (js / beta becomes ``kl``) and 1 (js / (1 - beta) becomes ``reverse_kl``).

    Raises:
        UserError: the loss needs probabilities and there are none, or ``beta`` is not inside (0, 1).

    Example:
        >>> logits = torch.tensor([[1.0, 2.0]])
        >>> soft_loss("kl", logits, logits, temperature=4.0).item()
        0.0
    """
    if probabilities is None and name != "mse":
        raise UserError(f"loss is {name}, which compares probabilities; a regression has none. Set loss=mse.")
    if name == "js" and not 0 < beta < 1:
        raise UserError(
            f"beta is {beta:g}; `js` takes a number between 0 and 1. Set loss=kl or loss=reverse_kl for its limits."
        )
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(wide), teacher.detach().to(wide)
    if probabilities == "positions" and name != "mse":
        student, teacher, mask = gather_positions(student, mask), gather_positions(teacher, mask), None
    if probabilities == "sigmoid" and name != "mse":
        # The softmax of a logit and a zero is the logit's sigmoid: every label is a choice between two classes.
        student, teacher = (torch.stack((x, torch.zeros_like(x)), dim=-1) for x in (student, teacher))
    shape = student.shape[:-1]
    t = torch.as_tensor(temperature, dtype=student.dtype, device=student.device)
    t = t.reshape(t.shape + (1,) * (len(shape) - t.dim())).expand(shape)
    if mask is None:
        student, teacher, t = student.flatten(0, -2), teacher.flatten(0, -2), t.flatten()
    else:
        keep = mask.bool()
        student, teacher, t = student[keep], teacher[keep], t[keep]
    if len(t) == 0:
        return student.sum()
    if name in ("ce", "mse"):
        from textbrewer.presets import KD_LOSS_MAP

        # TextBrewer returns a mean; every element is needed because each has its own T^2.
        losses = torch.vmap(KD_LOSS_MAP[name])(student, teacher, t)
    else:
        losses = divergence(name, (student / t[:, None]).log_softmax(-1), (teacher / t[:, None]).log_softmax(-1), beta)
    return (losses if name == "mse" else losses * t.square()).mean()


IMPOSSIBLE = -1e30
"""A logit without probability, whatever the temperature, that leaves sums finite."""


def gather_positions(logits: Tensor, mask: Tensor | None, padding: float = IMPOSSIBLE) -> Tensor:
    """Return logits ``[batch, tokens, choices]`` in float32 or more as ``[batch, choices, tokens]``, so that every
    choice is one of the tokens, with ``padding`` where ``mask`` is zero."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask is not None:
        logits = logits.masked_fill(~mask.bool()[..., None], padding)
    return logits.transpose(1, 2)


def divergence(name: str, student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return ``kl``, ``reverse_kl`` or ``js`` of log-probabilities, over the last dimension."""
    if name == "kl":
        return kl_divergence(teacher, student)
    if name == "reverse_kl":
        return kl_divergence(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * kl_divergence(teacher, mixture) + (1 - beta) * kl_divergence(student, mixture)


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) of log-probabilities, over the last dimension."""
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def universal_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the Wasserstein distance of two sets of probabilities whose tokens are not the same: the sum of the
    differences of the sorted probabilities, mean over places (Boizard et al., "Towards Cross-Tokenizer Distillation",
    2024, arXiv:2402.12030). It knows how sure the teacher is, but not of which token.

    Args:
        student: logits ``[places, vocabulary]``.
        teacher: logits ``[places, other vocabulary]`` at the same places of the text.
        temperature: divisor of both.
    """
    ranked = [
        (logits.float() / temperature).softmax(-1).sort(-1, descending=True).values
        for logits in (student, teacher.detach())
    ]
    width = max(part.shape[-1] for part in ranked)
    ours, theirs = (F.pad(part, (0, width - part.shape[-1])) for part in ranked)
    return (ours - theirs).abs().sum(-1).sum() / max(1, len(student))


def common_loss(student: Tensor, target: Tensor, events: Tensor, temperature: float) -> Tensor:
    """Return KL(target || student) over events, each the sum of some tokens, times the square of the temperature, mean
    over places.

    Args:
        student: logits ``[places, vocabulary]``.
        target: probabilities ``[places, events]`` at this temperature.
        events: the event of every token of the student, ``[vocabulary]``; logits beyond it are of no token.
        temperature: divisor of the logits.
    """
    ours = sum_events((student[..., : len(events)].float() / temperature).softmax(-1), events, target.shape[-1])
    p, q = (x.clamp(min=torch.finfo(x.dtype).tiny).log() for x in (target.detach(), ours))
    return kl_divergence(p, q).sum() * temperature**2 / max(1, len(student))


def sum_events(probabilities: Tensor, events: Tensor, count: int) -> Tensor:
    """Return the probabilities ``[places, count]`` of events from those of tokens ``[places, tokens]``."""
    return probabilities.new_zeros(len(probabilities), count).index_add(-1, events, probabilities)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the ``k`` largest log-probabilities at temperature 1 and their indices, each ``[..., k]``, to store in
    place of the logits of a large vocabulary."""
    values, indices = logits.float().log_softmax(-1).topk(k)
    return values, indices


def expand_topk(values: Tensor, indices: Tensor, vocabulary: int) -> Tensor:
    """Return logits ``[..., vocabulary]`` from the stored :func:`top_k` of a teacher, in any precision.

    The remaining probability is spread evenly over the other tokens: an approximation, exact if all were stored.
    """
    values = values.float()
    # In half precision the values may sum to more than one; the other tokens must keep a probability above zero.
    left = (1 - values.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(values.dtype).eps)
    rest = (left / max(vocabulary - values.shape[-1], 1)).log()
    return rest.expand(*rest.shape[:-1], vocabulary).scatter(-1, indices.long(), values)


def match_loss(name: str, student: Any, teacher: Any, mask: Tensor, heads: int = 12) -> Tensor:
    """Return the loss of a layer of the student against one of the teacher, by TextBrewer's name, or ``minilm``.

    Args:
        name: one of ``MATCH``.
        student: what the loss compares:
            ``attention_*``: attention probabilities ``[batch, heads, tokens, tokens]``, as transformers returns them
            without dropout. TextBrewer's cross-entropies take scores and are given the logarithms of the
            probabilities;
            ``hidden_mse``, ``cos``, ``pkd``: hidden states ``[batch, tokens, width]``, ``pkd`` at the first token;
            ``fsp`` (or ``gram``), ``mmd`` (or ``nst``): two such states;
            ``minilm``: query, key and value, each ``[batch, tokens, width]``; the sum of their :func:`relation_loss`.
        teacher: the same of the teacher. Widths may differ for ``mmd``, ``nst`` and ``minilm``, numbers of heads for
            ``attention_mse_sum`` and ``attention_ce_mean``.
        mask: ``[batch, tokens]``, nonzero where a token is not padding.
        heads: number of relation heads of ``minilm``.
    """
    if name == "minilm":
        return torch.stack([relation_loss(s, t, heads, mask) for s, t in zip(student, teacher, strict=True)]).sum()
    from textbrewer.presets import MATCH_LOSS_MAP

    if name in PAIRS:
        student, teacher = [x.float() for x in student], [x.detach().float() for x in teacher]
    else:
        student, teacher = student.float(), teacher.detach().float()
    if name in ("attention_ce", "attention_ce_mean"):
        student, teacher = attention_scores(student, mask), attention_scores(teacher, mask)
    elif name == "pkd":
        # TextBrewer takes position 0, which is padding if texts are padded on the left.
        first = torch.arange(len(mask), device=mask.device), mask.long().argmax(1)
        student, teacher = student[first], teacher[first]
    elif name in ("mmd", "nst"):
        # TextBrewer divides by the width, but by the padded length if a mask is given, so that padding would count.
        student[0], teacher[0] = (x * (x.shape[1] / x.shape[2]) for x in (student[0], teacher[0]))
    return MATCH_LOSS_MAP[name](student, teacher, mask)


def attention_scores(probabilities: Tensor, mask: Tensor) -> Tensor:
    """Return attention scores whose softmax is ``probabilities``, with none on padding."""
    real = probabilities * mask[:, None, None, :].to(probabilities)
    return real.clamp(min=torch.finfo(real.dtype).tiny).log()


def relation_loss(student: Tensor, teacher: Tensor, heads: int, mask: Tensor) -> Tensor:
    """Return the KL divergence of the relations between tokens, teacher to student: the softmax of
    ``A A^T / sqrt(width of a head)`` over tokens that are not padding, mean over heads and these tokens.

    Wang et al., "MiniLM", 2020, arXiv:2002.10957, relates values; "MiniLMv2", 2021, arXiv:2012.15828, also queries and
    keys, with any number of relation heads.

    Args:
        student: queries, keys or values ``[batch, tokens, width]``.
        teacher: the same of the teacher, of any width.
        heads: number of relation heads, independent of the models' attention heads.
        mask: ``[batch, tokens]``, nonzero where a token is not padding.

    Raises:
        UserError: ``heads`` does not divide a width.
    """
    p, q = token_relations(teacher.detach(), heads, mask), token_relations(student, heads, mask)
    rows = mask.bool()[:, None].expand(-1, heads, -1)
    return kl_divergence(p, q)[rows].sum() / rows.sum().clamp(min=1)


def token_relations(states: Tensor, heads: int, mask: Tensor) -> Tensor:
    """Return the log-probabilities of the relations between tokens, ``[batch, heads, tokens, tokens]``."""
    width = states.shape[-1]
    if width % heads:
        raise UserError(
            f"heads is {heads}, which does not divide the width {width}. Set a divisor of both widths for `minilm`."
        )
    split = states.float().unflatten(-1, (heads, -1)).transpose(1, 2)
    products = split @ split.transpose(-1, -2) / math.sqrt(width // heads)
    padding = ~mask.bool()[:, None, None, :]
    return products.masked_fill(padding, torch.finfo(products.dtype).min).log_softmax(-1)


def build_projection(proj: Sequence[Any]) -> nn.Module:
    """Return TextBrewer's untrained layer from the student's width to the teacher's: ``["linear", 384, 768]``, or with
    ``relu`` or ``tanh`` after it."""
    from textbrewer.presets import PROJ_MAP

    name, student, teacher = proj
    return PROJ_MAP[name](student, teacher)


def logit_temperature(
    name: str,
    base: float,
    arguments: Sequence[float],
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
) -> float | Tensor:
    """Return the temperature of these logits: ``base``, or TextBrewer's ``flsw`` and ``cwsm`` around it, a number per
    example ``[batch]`` or token ``[batch, tokens]`` (Wen et al., "Preparing Lessons", 2019, arXiv:1911.07471).

    Where ``mask`` is zero the temperature is ``base`` and the logits do not affect the others.

    Raises:
        UserError: the arguments are not those of ``TEMPERATURES``, or lead to a temperature of zero or below.
    """
    if len(arguments) != len(TEMPERATURES[name]):
        expected = ", ".join(TEMPERATURES[name]) or "no argument"
        raise UserError(f"The temperature schedule `{name}` has the arguments {list(arguments)}; it takes {expected}.")
    if name == "constant":
        return base
    from textbrewer.presets import TEMPERATURE_SCHEDULER

    shape = student.shape[:-1]
    keep = torch.ones(shape, dtype=torch.bool, device=student.device) if mask is None else mask.bool()
    temperatures = torch.full(shape, float(base), device=student.device)
    schedule = TEMPERATURE_SCHEDULER[(name, *arguments)]
    temperatures[keep] = schedule(student[keep].float(), teacher[keep].float(), base)
    if (lowest := temperatures.min()) <= 0:
        raise UserError(
            f"The temperature schedule `{name}` with beta={arguments[0]:g} reached {lowest:.2g}; a temperature above 0 "
            f"is expected. Set a lower beta, or a temperature above {base:g}."
        )
    return temperatures


def loss_weight(name: str | None, progress: float) -> float:
    """Return the weight of a loss at ``progress`` (a fraction of training): TextBrewer's ``linear_decay`` from 1 to 0
    or ``linear_growth`` from 0 to 1; 1 without a schedule."""
    if name is None:
        return 1.0
    from textbrewer.presets import WEIGHT_SCHEDULER

    return WEIGHT_SCHEDULER[name](progress)
