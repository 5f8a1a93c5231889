"""Structured pruning: attention heads and FFN channels."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
import torch
from pydantic import Field, validate_call
from torch import Tensor, nn

from compress.cache.files import expand_path
from compress.errors import UserError
from compress.maths.sparsity import squared_norms
from compress.maths.units import (
    Masks,
    Scores,
    activation_score,
    mask_important,
    standardise_score,
    taylor_score,
    units_left,
)
from compress.models.backbone import is_decoder
from compress.models.batches import Batch, draw_calibration_batches
from compress.models.calibration import observe
from compress.models.layers import detect_task_kind, evaluation_mode, unwrap_model
from compress.models.loading import join_lines
from compress.models.shapes import Block, read_blocks, record_shapes, remove_units, shape_blocks
from compress.models.textpruner import find_masks, require_textpruner
from compress.tasks.kinds import KINDS
from compress.technique import Technique
from compress.techniques.prune import Prune

Rows = list[list[Literal[0, 1]]]


class Structured(Technique, pl.Callback):
    """Remove the least important attention heads and FFN channels, so that the model gets smaller and faster on any
    runtime. The epochs of the same fit retrain the other units.

    Units are scored when the fit starts, on the first ``samples`` examples of the datamodule's ``calibration``, or of
    the training loader if there is none:

    - ``loss``: the first-order change of the task's loss without the unit, |sum of w dL/dw| over the weights that read
      it (Michel et al., "Are Sixteen Heads Really Better than One?", 2019, arXiv:1905.10650).
    - ``logits``: the same without labels, for the cross-entropy to the model's own predictions. (TextPruner compares
      with a copy of the model in half precision. Before the first cut, rounding alone would give a gradient.)
    - ``activation``: the norm of the unit's activations times the absolute weights that read them, without a gradient.
      This is Wanda-sp, standardised within a layer so that layers compare; both are from An et al., "Fluctuation-based
      Adaptive Structured Pruning for Large Language Models", 2023, arXiv:2312.11983.

    TextPruner (Yang, Cui and Chen, 2022, arXiv:2203.15996) scores encoders by ``loss`` and ``logits`` if all their
    blocks have the number of heads in the config. Query heads of a decoder that share a key and value head (Ainslie et
    al., "GQA", 2023, arXiv:2305.13245) are removed together.

    Args:
        target_heads: query heads of a block afterwards, on average; null keeps them all.
        target_ffn_size: FFN channels of a block afterwards, on average; null keeps them all.
        iterations: number of cuts, each with new scores.
        importance: the score of a unit.
        even_heads: the same number of heads in every block; false: the least important heads of all blocks are
            removed, and every block keeps at least one.
        even_ffn: the same for FFN channels.
        ffn_multiple_of: a number that FFN sizes must be a multiple of.
        order: ``head-first`` or ``ffn-first`` to split every cut in two, each with new scores; null: both at once.
        head_mask: ``[blocks, heads]`` of 1 (keep) and 0 (remove), or a json or pt file of them; it replaces a target.
        ffn_mask: ``[blocks, channels]``, likewise.
        samples: training examples (for a language model, blocks of tokens) to score on.
        batch_size: examples in a batch.

    Raises:
        UserError: the targets or masks do not fit the model, or would remove nothing.

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[Structured(target_heads=2, target_ffn_size=32)]).fit(module, loader)
    """

    resumes = True
    files = ("head_mask", "ffn_mask")
    versions = ("textpruner",)
    keeps_zeros = False  # layers get another shape
    shrinks = True

    @validate_call
    def __init__(
        self,
        target_heads: Annotated[int, Field(ge=1)] | None = None,
        target_ffn_size: Annotated[int, Field(ge=1)] | None = None,
        iterations: Annotated[int, Field(ge=1)] = 1,
        importance: Literal["loss", "logits", "activation"] = "loss",
        even_heads: bool = True,
        even_ffn: bool = True,
        ffn_multiple_of: Annotated[int, Field(ge=1)] = 1,
        order: Literal["head-first", "ffn-first"] | None = None,
        head_mask: Rows | str | None = None,
        ffn_mask: Rows | str | None = None,
        samples: Annotated[int, Field(ge=1)] = 256,
        batch_size: Annotated[int, Field(ge=1)] = 16,
    ) -> None:
        self.target_heads = target_heads
        self.target_ffn_size = target_ffn_size
        self.iterations = iterations
        self.importance = importance
        self.even_heads = even_heads
        self.even_ffn = even_ffn
        self.ffn_multiple_of = ffn_multiple_of
        self.order = order
        self.head_mask = head_mask
        self.ffn_mask = ffn_mask
        self.samples = samples
        self.batch_size = batch_size
        self.masked = head_mask is not None or ffn_mask is not None
        self.train_samples = 0 if self.masked else samples
        targets = target_heads is not None or target_ffn_size is not None
        if self.masked == targets:
            raise UserError(
                f"{self.key} has {'both targets and masks' if targets else 'nothing to remove'}. Set either "
                f"{self.key}.target_heads, target_ffn_size or both, or head_mask, ffn_mask or both."
            )

    def check(self, skeleton: Any, before: list[Any]) -> None:
        each = read_blocks(skeleton)
        if self.masked:
            if all(mask.all() for masks in self.read_masks(each).values() for mask in masks):
                raise UserError(f"The masks of {self.key} keep everything. Set 0 for the units to remove.")
            return
        heads, ffn, group = [block.heads for block in each], [block.ffn for block in each], each[0].group_size
        shared, multiple = "a group of heads that share a key and value head", f"{self.key}.ffn_multiple_of"
        check_target(f"{self.key}.target_heads", self.target_heads, heads, self.even_heads, group, shared)
        check_target(
            f"{self.key}.target_ffn_size", self.target_ffn_size, ffn, self.even_ffn, self.ffn_multiple_of, multiple
        )
        if self.count_goals(each) == (sum(block.groups for block in each), sum(ffn)):
            raise UserError(
                f"{self.key} keeps the {format_mean(heads)} heads and {format_mean(ffn)} FFN channels that a block has "
                "already. Set lower targets, or remove the stage."
            )
        if self.importance == "logits" and skeleton.config.num_labels == 1:
            raise UserError(
                f"{self.key}.importance is logits, which compares the probabilities of labels, and this model predicts "
                f"one number. Set {self.key}.importance=loss or activation."
            )
        if self.by_textpruner(skeleton):
            require_textpruner()
        if any(isinstance(stage, Prune) and stage.pattern for stage in before):
            raise UserError(
                "`structured` removes columns, which breaks up the groups of the earlier `prune`'s N:M pattern. Set "
                "technique=structured+prune."
            )

    def preview(self, skeleton: Any) -> Any:
        each = read_blocks(skeleton)
        if self.masked:
            remove_units(skeleton, **self.read_masks(each))
        else:
            heads, ffn = [block.heads for block in each], [block.ffn for block in each]
            shape_blocks(
                skeleton,
                preview_sizes(heads, self.target_heads, self.even_heads, each[0].group_size),
                preview_sizes(ffn, self.target_ffn_size, self.even_ffn, self.ffn_multiple_of),
            )
        record_shapes(skeleton)
        return skeleton

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model: Any = unwrap_model(pl_module)
        self.check(model, [])
        goals = self.count_goals(read_blocks(model))
        if self.masked:
            remove_units(model, **self.read_masks(read_blocks(model)))
        else:
            batches = list(draw_calibration_batches(trainer, self.samples, self.batch_size, self.importance == "loss"))
            if self.importance == "loss" and "labels" not in batches[0]:
                raise UserError(
                    f"{self.key}.importance is loss, which needs labels, and the training batches have none. Set "
                    f"{self.key}.importance=logits or activation."
                )
            with evaluation_mode(model):
                if self.importance == "logits":
                    batches = [label_with_predictions(model, batch) for batch in batches]
                if self.by_textpruner(model):
                    remove_units(model, **self.textpruner_masks(model, batches))
                else:
                    self.cut_in_turns(model, batches)
        record_shapes(model)
        left = sum(block.groups for block in read_blocks(model)), sum(block.ffn for block in read_blocks(model))
        if left != goals:
            raise RuntimeError(f"{left} head groups and FFN channels are left; {goals} are expected")

    def count_goals(self, each: list[Block]) -> tuple[int, int]:
        """Return the numbers of head groups and FFN channels that all blocks together should keep."""
        if self.masked:
            masks = self.read_masks(each)
            groups, ffn = (sum(int(mask.sum()) for mask in masks.get(part, ())) for part in ("groups", "ffn"))
        else:
            groups = len(each) * (self.target_heads or 0) // each[0].group_size
            ffn = len(each) * (self.target_ffn_size or 0)
        return groups or sum(block.groups for block in each), ffn or sum(block.ffn for block in each)

    def read_masks(self, each: list[Block]) -> dict[str, Masks]:
        """Return the user's masks in the form of :func:`compress.models.shapes.remove_units`."""
        masks = {}
        if self.head_mask is not None:
            rows = parse_masks(self.head_mask, f"{self.key}.head_mask", [block.heads for block in each])
            grouped = [row.view(block.groups, -1) for row, block in zip(rows, each)]
            if any((group != group[:, :1]).any() for group in grouped):
                raise UserError(
                    f"{self.key}.head_mask splits a group of {each[0].group_size} heads that share a key and "
                    "value head. Set the same value for all heads of a group."
                )
            masks["groups"] = [group[:, 0] for group in grouped]
        if self.ffn_mask is not None:
            masks["ffn"] = parse_masks(self.ffn_mask, f"{self.key}.ffn_mask", [block.ffn for block in each])
        return masks

    def by_textpruner(self, model: Any) -> bool:
        """Return True if TextPruner scores the model. It reads the number of heads of every block from the config,
        which is wrong after an earlier cut."""
        config = model.config
        return self.importance != "activation" and not is_decoder(config) and not hasattr(config, "compress")

    def textpruner_masks(self, model: Any, batches: list[Batch]) -> dict[str, Masks]:
        first = read_blocks(model)[0]
        groups, ffn = find_masks(
            model,
            batches,
            mask_important,
            target_num_of_heads=self.target_heads or first.heads,
            target_ffn_size=self.target_ffn_size or first.ffn,
            head_even_masking=self.even_heads,
            ffn_even_masking=self.even_ffn,
            n_iters=self.iterations,
            multiple_of=self.ffn_multiple_of,
            pruning_order=self.order,
        )
        return {"groups": groups, "ffn": ffn}

    def cut_in_turns(self, model: Any, batches: list[Batch]) -> None:
        """Score the units and remove the least important ones, turn by turn."""
        rules = {"groups": (self.even_heads, 1), "ffn": (self.even_ffn, self.ffn_multiple_of)}
        for turn in self.plan_turns(read_blocks(model)):
            scores = (
                score_by_activation(model, batches)
                if self.importance == "activation"
                else score_by_gradient(model, batches)
            )
            remove_units(
                model, **{part: mask_important(scores[part], left, *rules[part]) for part, left in turn.items()}
            )

    def plan_turns(self, each: list[Block]) -> list[dict[str, int]]:
        """Return the numbers of head groups and FFN channels after every cut, the removal spread evenly over the
        steps."""
        groups, ffn = self.count_goals(each)
        turns: list[dict[str, int]] = []
        for step in range(1, self.iterations + 1):
            heads = {"groups": units_left(step, self.iterations, sum(block.groups for block in each), groups)}
            channels = {"ffn": units_left(step, self.iterations, sum(block.ffn for block in each), ffn)}
            heads, channels = heads if self.target_heads else {}, channels if self.target_ffn_size else {}
            halves = {"head-first": [heads, channels], "ffn-first": [channels, heads]}
            turns += filter(None, halves.get(self.order or "", [heads | channels]))
        return turns


def check_target(key: str, target: int | None, now: list[int], even: bool, unit: int, multiple: str) -> None:
    """Raise UserError if blocks of ``now`` heads or channels cannot be reduced to the ``target`` in multiples of
    ``unit``. ``key`` is the setting of the target, ``multiple`` describes the unit."""
    if target is None:
        return
    total = target * len(now)
    if total > sum(now) or (even and target > min(now)):
        raise UserError(
            f"{key}={target} is more than the {min(now) if even else format_mean(now)} that a block has. Set a lower "
            "target."
        )
    if any(number % unit for number in ([target] if even else [total, *now])) or total < unit * len(now):
        raise UserError(
            f"{key}={target} cannot be reached from {format_mean(now)} a block in multiples of {unit}, the size of "
            f"{multiple}. Set {key} to a multiple of {unit}."
        )


def preview_sizes(now: list[int], target: int | None, even: bool, unit: int) -> list[int] | None:
    """Return possible sizes of the blocks afterwards. If the sizes may differ, two blocks get a ``unit`` more and less
    than the others, so that later stages cannot rely on equal sizes."""
    if target is None:
        return None
    if even:
        return [target] * len(now)
    each, more = divmod(target * len(now) // unit, len(now))
    sizes = [unit * (each + (i < more)) for i in range(len(now))]
    if sizes[0] < now[0] and sizes[-1] > unit:
        sizes[0], sizes[-1] = sizes[0] + unit, sizes[-1] - unit
    return sizes


def format_sizes(sizes: list[int]) -> str:
    """Return ``12, 12, 10``, or ``3 times 12`` for equal sizes."""
    return f"{len(sizes)} times {sizes[0]}" if len(set(sizes)) == 1 else ", ".join(map(str, sizes)) or "no"


def format_mean(sizes: list[int]) -> str:
    return f"{sum(sizes) / len(sizes):g}"


def parse_masks(given: Rows | str, key: str, sizes: list[int]) -> Masks:
    """Return the rows of a user's mask, or of the json or pt file that it names, one row for each of ``sizes``."""
    if isinstance(given, str):
        path = expand_path(given)
        if not path.is_file() or path.suffix not in (".json", ".pt"):
            raise UserError(f"{key}={given} is no json or pt file. Set {key} to a file with rows of 0 and 1.")
        try:
            given = (
                json.loads(path.read_text(encoding="utf-8"))
                if path.suffix == ".json"
                else torch.load(path, weights_only=True)
            )
        except Exception as error:  # a damaged file can raise anything
            raise UserError(f"{key}: {path} cannot be read ({join_lines(error)[:120]}).") from error
    try:
        rows = [torch.as_tensor(row, device="cpu") for row in given]
    except (TypeError, ValueError) as error:
        raise UserError(f"{key} is no list of rows. Set a row of 0 and 1 for every block.") from error
    lengths = [row.numel() for row in rows]
    if lengths != sizes:
        raise UserError(
            f"{key} has rows of {format_sizes(lengths)} values and the model blocks of {format_sizes(sizes)}. Set a "
            "row for every block, with a 1 or 0 for each of its heads or channels."
        )
    if any(((row != 0) & (row != 1)).any() or not row.any() for row in rows):
        raise UserError(f"{key} has a row of zeros, or values that are not 0 or 1. Keep at least one unit of a block.")
    return [row.bool() for row in rows]


def score_by_gradient(model: Any, batches: list[Batch]) -> dict[str, Scores]:
    """Return the scores of all units from the gradients of the loss on ``batches``. Only one weight's gradient is in
    memory at a time."""
    each = read_blocks(model)
    units = {block.attention_out.weight: block.groups for block in each}
    units |= {block.ffn_out.weight: block.ffn for block in each}
    scores = {weight: torch.zeros(count, device=weight.device) for weight, count in units.items()}

    def add(weight: Tensor) -> None:
        scores[weight] += taylor_score(weight.detach(), weight.grad, units[weight])  # type: ignore[arg-type,index]
        weight.grad = None

    learned = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in learned:
        parameter.requires_grad_(parameter in units)
    hooks = [weight.register_post_accumulate_grad_hook(add) for weight in units]
    for batch in batches:
        model(**batch).loss.backward()
    for hook in hooks:
        hook.remove()
    for parameter, required in learned.items():
        parameter.requires_grad_(required)
    return {
        "groups": [scores[block.attention_out.weight] for block in each],
        "ffn": [scores[block.ffn_out.weight] for block in each],
    }


def score_by_activation(model: Any, batches: list[Batch]) -> dict[str, Scores]:
    """Return the scores of all units from their activations on ``batches``."""
    norms = {
        matrix.module: shared.statistic.sqrt()
        for shared in observe(model, batches, squared_norms)
        for matrix in shared.matrices.values()
    }

    def score(layer: nn.Linear, units: int) -> Tensor:
        return standardise_score(activation_score(layer.weight.detach(), norms[layer], units))

    return {
        "groups": [score(block.attention_out, block.groups) for block in read_blocks(model)],
        "ffn": [score(block.ffn_out, block.ffn) for block in read_blocks(model)],
    }


@torch.no_grad()
def label_with_predictions(model: Any, batch: Batch) -> Batch:
    """Return the batch with the model's predictions as labels. (The cross-entropy to the whole distribution has no
    gradient as long as the model is unchanged.)"""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    kind = KINDS[detect_task_kind(model)]
    return {**inputs, "labels": kind.choose_labels(model(**inputs).logits, inputs)}
