"""What a distillation compares: whether its settings fit together, and the loss between logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compress.errors import UserError
from compress.maths import losses
from compress.maths.vector_losses import VECTORS
from compress.models.backbone import limit_length


def check_objective(stage: Any) -> None:
    """Raise UserError if settings of a :class:`compress.techniques.distill.Distill` contradict each other."""
    stage.student.check_settings(f"{stage.key}.student")
    for match in stage.matches:
        match.check_settings(f"{stage.key}.intermediate_matches")
    if not stage.across and stage.loss not in (fitting := stage.kind.distillation_losses):
        why = "compares vectors, and the model answers with none"
        if stage.loss not in VECTORS:
            what = "an embedding" if "vectors" in fitting else "a regression"
            why = f"compares probabilities, and {what} has none"
        raise UserError(f"{stage.key}.loss is {stage.loss}, which {why}. Set {stage.key}.loss={fitting[0]}.")
    schedule, *arguments = stage.temperature_schedule or ("constant",)
    if len(arguments) != len(losses.TEMPERATURES.get(schedule, ("",))):
        raise UserError(
            f"{stage.key}.temperature_schedule is {list(stage.temperature_schedule or ())}. Set it to null, "
            "[flsw,1,2] (beta, gamma) or [cwsm,1] (beta)."
        )
    check_decoders(stage)
    if not (stage.soft_weight or stage.matches or stage.written_tokens):
        raise UserError(
            f"{stage.key}.soft_weight is 0 and no features are matched, so the teacher teaches nothing. Set "
            f"{stage.key}.soft_weight=1, or {stage.key}.intermediate_matches."
        )
    if isinstance(stage.kept_logits, int) and stage.kind.probabilities == "positions":
        raise UserError(
            f"{stage.key}.kept_logits is {stage.kept_logits}, the number of logits of a vocabulary, and a task of kind "
            f"{stage.kind.name} chooses among tokens. Set {stage.key}.kept_logits=all."
        )
    if stage.kept_logits and (stage.matches or stage.masking):
        other = "intermediate_matches" if stage.matches else "masking"
        raise UserError(
            f"{stage.key}.kept_logits stores the teacher's logits on the unchanged training text, and "
            f"{stage.key}.{other} needs the teacher at every step. Remove one of them."
        )


def check_decoders(stage: Any) -> None:
    """Raise UserError if settings for models that write text contradict each other."""
    for name, value in (("loss", stage.across and stage.loss), ("written_tokens", stage.written_tokens)):
        if value and not stage.kind.generates:
            raise UserError(
                f"{stage.key}.{name} is {value}, which needs a model that writes text, and the task is "
                f"{stage.kind.name}. Set {stage.key}.{name}=null."
            )
    if stage.written_tokens and not stage.hard_weight:
        raise UserError(
            f"{stage.key}.written_tokens is {stage.written_tokens} and {stage.key}.hard_weight is 0, so the student "
            f"would not learn the teacher's words. Set {stage.key}.hard_weight=1 (and soft_weight=0 for the words "
            "alone)."
        )
    if stage.loss == "uld" and stage.soft_weight and not stage.hard_weight:
        raise UserError(
            f"{stage.key}.loss is uld, which says how sure the teacher is and not of which token, and "
            f"{stage.key}.hard_weight is 0. Set {stage.key}.hard_weight=1, or {stage.key}.loss=common."
        )
    used = {
        "kept_logits": stage.kept_logits,
        "intermediate_matches": list(stage.matches),
        "masking": stage.masking,
        "temperature_schedule": stage.temperature_schedule,
        "extra_text": stage.extra_text,
    }
    if stage.across and (other := next((name for name, value in used.items() if value), None)):
        raise UserError(
            f"{stage.key}.loss is {stage.loss}, for a teacher with other tokens, and {stage.key}.{other} is "
            f"{used[other]}, which needs the same tokens. Remove one of them."
        )
    if stage.packs and (stage.across or stage.kept_logits):
        name, value = ("loss", stage.loss) if stage.across else ("kept_logits", stage.kept_logits)
        raise UserError(
            f"{stage.key}.{name} is {value}, which looks up every conversation by itself, and task.pack is true. "
            "Set task.pack=false."
        )


def check_lengths(models: dict[str, Any], data: Any) -> None:
    """Raise UserError if the texts of a datamodule are longer than the inputs of one of the ``models``, by name."""
    for name, model in models.items():
        if (positions := limit_length(model, data.tokenizer, data.max_length)) < data.max_length:
            raise UserError(
                f"The {name} reads {positions} tokens and the task's texts have up to {data.max_length}. Set "
                f"task.max_length={positions}."
            )


def compare_logits(stage: Any, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return the loss of a :class:`compress.techniques.distill.Distill` between the logits, of texts or of the tokens
    that the ``mask`` marks.

    Two models of one tokenizer may have padded their vocabularies to other sizes; no token is in the padding.
    """
    tokens = mask if teacher.ndim == 3 else None
    if tokens is not None:
        common = min(student.shape[-1], teacher.shape[-1])
        student, teacher = student[..., :common], teacher[..., :common]
    schedule, *arguments = stage.temperature_schedule or ("constant",)
    mine, theirs, counted = student, teacher, tokens
    if stage.kind.probabilities == "positions" and stage.loss != "mse":
        mine, theirs = (losses.gather_positions(x, tokens, padding=0.0) for x in (student, teacher))
        counted = None
    tau = losses.logit_temperature(schedule, stage.temperature, arguments, mine, theirs, counted)
    return losses.soft_loss(stage.loss, student, teacher, tau, tokens, stage.kind.probabilities, stage.beta)
