"""The mathematics of knowledge distillation: what a student loses where it differs from its teacher.

Losses that TextBrewer has are TextBrewer's (Yang et al., "TextBrewer: An Open-Source Knowledge Distillation Toolkit",
2020, arXiv:2002.12620). Every loss is a scalar, the gradient flows to the student alone, and padding never counts.
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
PAIRS = ("fsp", "gram", "mmd", "nst")
"""Losses of :func:`match_loss` on two hidden states of each model."""
MATCH = (
    *("attention_mse", "attention_mse_sum", "attention_ce", "attention_ce_mean"),
    *("hidden_mse", "cos", "pkd", *PAIRS, "minilm"),
)
"""Losses of :func:`match_loss`."""
PROJECTIONS = ("linear", "relu", "tanh")
TEMPERATURES: dict[str, tuple[str, ...]] = {"constant": (), "flsw": ("beta", "gamma"), "cwsm": ("beta",)}
"""Schedules of :func:`temperature`, and the arguments that each takes."""
WEIGHTS = ("linear_decay", "linear_growth")
"""Schedules of :func:`weight`."""


def soft_loss(
    name: str,
    student: Tensor,
    teacher: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None = None,
    probabilities: Literal["softmax", "sigmoid"] | None = "softmax",
    beta: float = 0.5,
) -> Tensor:
    """The student's logits against the teacher's, both divided by the temperature T.

    ``ce`` is the cross-entropy of the teacher's probabilities (TextBrewer's), ``kl`` that less the teacher's entropy,
    ``reverse_kl`` KL(student || teacher) (Gu et al., "MiniLLM", 2024, arXiv:2306.08543), ``js`` the generalized
    Jensen-Shannon divergence (Agarwal et al., "On-Policy Distillation of Language Models", 2024, arXiv:2306.13649).
    These four are multiplied by T^2, so that gradients stay as large at every T (Hinton et al., "Distilling the
    Knowledge in a Neural Network", 2015, arXiv:1503.02531). ``mse`` is TextBrewer's squared error of logits / T, mean
    over labels, and so 1/T^2 of that of the logits: it is at its own scale at T = 1.

    Args:
        name: one of ``SOFT``.
        student: logits ``[batch, labels]`` or ``[batch, tokens, vocabulary]``.
        teacher: logits of the same shape.
        temperature: a number, or one per example ``[batch]`` or per token ``[batch, tokens]``.
        mask: ``[batch, tokens]``, nonzero where a token counts; the loss is the mean over those, 0 if there is none.
        probabilities: the function that makes them of logits: ``softmax``, or ``sigmoid`` of every label, where the
            loss is the mean over labels and examples; None for a regression, to which only ``mse`` applies.
        beta: of ``js``, between 0 (js / beta becomes ``kl``) and 1 (js / (1 - beta) becomes ``reverse_kl``).

    Raises:
        UserError: there are no probabilities for this loss, or ``beta`` is not inside (0, 1).

        soft_loss("kl", student(**batch).logits, teacher(**batch).logits, temperature=4.0)
    """
    if probabilities is None and name != "mse":
        raise UserError(f"`{name}` compares probabilities and a regression has none: use `mse`.")
    if name == "js" and not 0 < beta < 1:
        raise UserError(
            f"`js` got beta={beta:g}: give a number between 0 and 1; the limits there are `kl` and `reverse_kl`."
        )
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(wide), teacher.detach().to(wide)
    if probabilities == "sigmoid" and name != "mse":
        # The softmax of a logit beside a zero is its sigmoid, so every label is a choice between two classes.
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

        # TextBrewer gives out a mean; each element is needed where each has its own T^2.
        losses = torch.vmap(KD_LOSS_MAP[name])(student, teacher, t)
    else:
        losses = divergence(name, (student / t[:, None]).log_softmax(-1), (teacher / t[:, None]).log_softmax(-1), beta)
    return (losses if name == "mse" else losses * t.square()).mean()


def divergence(name: str, student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """``kl``, ``reverse_kl`` or ``js`` of log-probabilities, over the last dimension."""
    if name == "kl":
        return kl_divergence(teacher, student)
    if name == "reverse_kl":
        return kl_divergence(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * kl_divergence(teacher, mixture) + (1 - beta) * kl_divergence(student, mixture)


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities, over the last dimension."""
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest log-probabilities at temperature 1 and their indices, each ``[..., k]``: what is worth keeping
    of a teacher with a large vocabulary."""
    values, indices = logits.float().log_softmax(-1).topk(k)
    return values, indices


def expand_topk(values: Tensor, indices: Tensor, vocabulary: int) -> Tensor:
    """Logits ``[..., vocabulary]`` of a teacher of whom :func:`top_k` was kept, in any precision.

    What probability is left is spread evenly over the other tokens, so that they form a distribution: an approximation,
    and exact where all were kept.
    """
    values = values.float()
    # In half precision the values may sum up to more than one; no other token's probability may become zero for it.
    left = (1 - values.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(values.dtype).eps)
    rest = (left / max(vocabulary - values.shape[-1], 1)).log()
    return rest.expand(*rest.shape[:-1], vocabulary).scatter(-1, indices.long(), values)


def match_loss(name: str, student: Any, teacher: Any, mask: Tensor, heads: int = 12) -> Tensor:
    """A layer of the student against one of the teacher's, by TextBrewer's name of the loss, or ``minilm``.

    Args:
        name: one of ``MATCH``.
        student: what the loss compares:
            ``attention_*``: attention probabilities ``[batch, heads, tokens, tokens]``, as transformers gives them out
            without dropout. TextBrewer's cross-entropies take scores and get the probabilities' logarithms, which
            ``attention_ce_mean`` averages over heads, as it would scores;
            ``hidden_mse``, ``cos``, ``pkd``: hidden states ``[batch, tokens, width]``, ``pkd`` at the first token;
            ``fsp`` (or ``gram``), ``mmd`` (or ``nst``): two such states;
            ``minilm``: query, key and value, each ``[batch, tokens, width]``; the sum of their :func:`relation_loss`.
        teacher: the same of the teacher; widths may differ for ``mmd``, ``nst`` and ``minilm``, the number of heads for
            ``attention_mse_sum`` and ``attention_ce_mean``.
        mask: ``[batch, tokens]``, nonzero where a token is no padding.
        heads: relation heads of ``minilm``.

        match_loss("hidden_mse", student.hidden_states[3], teacher.hidden_states[6], batch["attention_mask"])
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
        # TextBrewer takes position 0, which is padding where texts are padded on the left.
        first = torch.arange(len(mask), device=mask.device), mask.long().argmax(1)
        student, teacher = student[first], teacher[first]
    elif name in ("mmd", "nst"):
        # TextBrewer divides by the width, but given a mask by the padded length, so that padding would count.
        student[0], teacher[0] = (x * (x.shape[1] / x.shape[2]) for x in (student[0], teacher[0]))
    return MATCH_LOSS_MAP[name](student, teacher, mask)


def attention_scores(probabilities: Tensor, mask: Tensor) -> Tensor:
    """Attention scores of which a softmax gives ``probabilities`` back, none of it on padding."""
    real = probabilities * mask[:, None, None, :].to(probabilities)
    return real.clamp(min=torch.finfo(real.dtype).tiny).log()


def relation_loss(student: Tensor, teacher: Tensor, heads: int, mask: Tensor) -> Tensor:
    """KL of the teacher's relations among tokens to the student's: the softmax of ``A A^T / sqrt(width of a head)``
    over the tokens that are no padding, mean over heads and those tokens.

    Wang et al., "MiniLM", 2020, arXiv:2002.10957, of values; "MiniLMv2", 2021, arXiv:2012.15828, also of queries and
    keys, and with as many relation heads as one likes.

    Args:
        student: queries, keys or values ``[batch, tokens, width]``.
        teacher: the same of the teacher, of any width.
        heads: to cut both widths into, whatever number of attention heads the models have.
        mask: ``[batch, tokens]``, nonzero where a token is no padding.

    Raises:
        UserError: the heads do not divide a width.
    """
    p, q = token_relations(teacher.detach(), heads, mask), token_relations(student, heads, mask)
    rows = mask.bool()[:, None].expand(-1, heads, -1)
    return kl_divergence(p, q)[rows].sum() / rows.sum().clamp(min=1)


def token_relations(states: Tensor, heads: int, mask: Tensor) -> Tensor:
    """The logarithms of how much every token relates to every other, ``[batch, heads, tokens, tokens]``."""
    width = states.shape[-1]
    if width % heads:
        raise UserError(f"`minilm` cannot cut a width of {width} into {heads} heads: give a divisor of both widths.")
    split = states.float().unflatten(-1, (heads, -1)).transpose(1, 2)
    products = split @ split.transpose(-1, -2) / math.sqrt(width // heads)
    padding = ~mask.bool()[:, None, None, :]
    return products.masked_fill(padding, torch.finfo(products.dtype).min).log_softmax(-1)


def build_projection(proj: Sequence[Any]) -> nn.Module:
    """TextBrewer's layer from the student's width to the teacher's, untrained: ``["linear", 384, 768]``, or ``relu`` or
    ``tanh`` after it."""
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
    """The temperature of these logits: ``base``, or by TextBrewer's ``flsw`` and ``cwsm`` around it one per example
    ``[batch]`` or token ``[batch, tokens]`` (Wen et al., "Preparing Lessons", 2019, arXiv:1911.07471).

    Where ``mask`` is zero the temperature is ``base``, and the logits have no part in the others'.

    Raises:
        UserError: the arguments are not those of ``TEMPERATURES``, or push a temperature to zero or below.
    """
    if len(arguments) != len(TEMPERATURES[name]):
        expected = ", ".join(TEMPERATURES[name]) or "no argument"
        raise UserError(f"The temperature schedule `{name}` got {list(arguments)}: it takes {expected}.")
    if name == "constant":
        return base
    from textbrewer.presets import TEMPERATURE_SCHEDULER

    shape = student.shape[:-1]
    keep = torch.ones(shape, dtype=torch.bool, device=student.device) if mask is None else mask.bool()
    found = torch.full(shape, float(base), device=student.device)
    schedule = TEMPERATURE_SCHEDULER[(name, *arguments)]
    found[keep] = schedule(student[keep].float(), teacher[keep].float(), base)
    if (lowest := found.min()) <= 0:
        raise UserError(
            f"The temperature schedule `{name}` with beta={arguments[0]:g} went down to {lowest:.2g}: lower beta, or "
            f"raise the temperature from {base:g}."
        )
    return found


def loss_weight(name: str, progress: float) -> float:
    """A loss's weight when ``progress`` (a fraction) of training is done: TextBrewer's ``linear_decay`` from 1 to 0 or
    ``linear_growth`` from 0 to 1."""
    from textbrewer.presets import WEIGHT_SCHEDULER

    return WEIGHT_SCHEDULER[name](progress)
