"""Structured pruning: attention heads, FFN channels and experts."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
from pydantic import Field, validate_call

from compress.errors import UserError
from compress.exporting.budget import Budget, BudgetSearch
from compress.exporting.latency import LatencyTable
from compress.maths.units import Masks, Scores, mask_important, units_left
from compress.models.batches import Batch, draw_calibration_batches
from compress.models.blocks import Block, read_blocks, select_blocks
from compress.models.compensation import compensate_removal
from compress.models.families import find_family, name_family
from compress.models.importance import label_with_predictions, score_by_activation, score_by_fisher, score_by_gradient
from compress.models.layers import evaluation_mode, unwrap_model
from compress.models.proofs import prove_units
from compress.models.shapes import record_shapes, remove_units, shape_blocks
from compress.models.targets import (
    Rows,
    check_parts,
    check_shared_heads,
    check_target,
    format_mean,
    parse_masks,
    preview_sizes,
)
from compress.models.textpruner import find_masks, require_textpruner
from compress.technique import Technique
from compress.techniques.prune import Prune

log = logging.getLogger(__name__)
EXPERT_MULTIPLE = 8
"""Number that the channels of experts must be a multiple of: transformers multiplies by all experts at once, for which
PyTorch needs rows of whole 16 bytes."""


class Structured(Technique, pl.Callback):
    """Remove the least important attention heads, FFN channels and experts, so that the model gets smaller and faster
    on any runtime. The epochs of the same fit retrain the other units.

    Units are scored when the fit starts, on the first ``samples`` examples of the datamodule's ``calibration``, or of
    the training loader if there is none:

    - ``loss``: the first-order change of the task's loss without the unit, |sum of w dL/dw| over the weights that read
      it (Michel et al., "Are Sixteen Heads Really Better than One?", 2019, arXiv:1905.10650).
    - ``logits``: the same without labels, for the cross-entropy to the model's own predictions. (TextPruner compares
      with a copy of the model in half precision. Before the first cut, rounding alone would give a gradient.)
    - ``fisher``: the second-order change, half the mean over texts of the squared change to first order (Kwon et al.,
      2022, arXiv:2204.09656).
    - ``activation``: the norm of the unit's activations times the absolute weights that read them, without a gradient.
      This is Wanda-sp, standardised within a layer so that layers compare; both are from An et al., "Fluctuation-based
      Adaptive Structured Pruning for Large Language Models", 2023, arXiv:2312.11983.

    TextPruner (Yang, Cui and Chen, 2022, arXiv:2203.15996) scores encoders by ``loss`` and ``logits`` if all their
    blocks have the number of heads in the config. Query heads of a decoder that share a key and value head (Ainslie et
    al., "GQA", 2023, arXiv:2305.13245) are removed together. An expert scores like one large unit. The experts of a
    block keep the same number of channels, each its own most important ones, and the router stays as it is.

    Of an encoder-decoder, the attention to the encoder counts as a block of its own, without an FFN. The blocks of a
    stack of T5 share the biases of their heads, and those of MPNet too: they lose the same heads, those with the lowest
    scores over all blocks.

    Which layers belong to a unit is written down for every family, and proven before anything is removed: the first
    block without a unit must compute what it computes while nothing reads this unit.

    With ``target`` the model is cut to a budget, and every block keeps what costs the least loss: an integer program
    weighs the scores of all heads and channels against what each costs. For a latency, the model is timed with
    different numbers of heads and channels on the runtime that will serve it, in floats, and what was chosen is
    measured again until it fits. The table of times is kept for other budgets, and written beside the weights.

    Args:
        target_heads: query heads of a block afterwards, on average; null keeps them all.
        target_ffn_size: channels of the FFN of a block, or of each of its experts, afterwards, on average; null keeps
            them all.
        target_experts: experts of every block afterwards; null keeps them all.
        target: a budget in place of the numbers above, see :class:`compress.exporting.budget.Budget`:
            ``{latency: 0.5, for: onnxruntime}``, ``{size_mb: 8}``, ``{parameters: 0.4}`` or ``{macs: 0.25}``.
        iterations: number of cuts, each with new scores.
        importance: the score of a unit.
        even_heads: the same number of heads in every block; false: the least important heads of all blocks are
            removed, and every block keeps at least one.
        even_ffn: the same for FFN channels.
        ffn_multiple_of: a number that FFN sizes must be a multiple of.
        order: ``head-first`` or ``ffn-first`` to split every cut in two, each with new scores; null: both at once.
        head_mask: ``[blocks, heads]`` of 1 (keep) and 0 (remove), or a json or pt file of them; it replaces a target.
            An encoder's rows come first; a decoder's block then has two, the second for the attention to the encoder.
        ffn_mask: ``[blocks, channels]``, likewise, with a row for every FFN. A row holds for all experts of a block.
        compensate: fit the weights that read the units which stay, and their bias, to what the block computed before.
        samples: training examples (for a language model, blocks of tokens) to score on.
        batch_size: examples in a batch.
        keep_in: folder for the tables of times; None: each is measured again.

    Raises:
        UserError: the targets or masks do not fit the model, or would remove nothing.

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[Structured(target_heads=2, target_ffn_size=32)]).fit(module, loader)
    """

    files = ("head_mask", "ffn_mask")
    versions = ("textpruner",)
    timed = ("target.latency", "target.latency_ms")
    keeps_zeros = False  # layers get another shape
    shrinks = True

    @validate_call
    def __init__(
        self,
        target_heads: Annotated[int, Field(ge=1)] | None = None,
        target_ffn_size: Annotated[int, Field(ge=1)] | None = None,
        target_experts: Annotated[int, Field(ge=1)] | None = None,
        target: Budget | None = None,
        iterations: Annotated[int, Field(ge=1)] = 1,
        importance: Literal["loss", "logits", "fisher", "activation"] = "loss",
        even_heads: bool = True,
        even_ffn: bool = True,
        ffn_multiple_of: Annotated[int, Field(ge=1)] = 1,
        order: Literal["head-first", "ffn-first"] | None = None,
        head_mask: Rows | str | None = None,
        ffn_mask: Rows | str | None = None,
        compensate: bool = False,
        samples: Annotated[int, Field(ge=1)] = 256,
        batch_size: Annotated[int, Field(ge=1)] = 16,
        keep_in: Path | None = None,
    ) -> None:
        self.target_heads = target_heads
        self.target_ffn_size = target_ffn_size
        self.target_experts = target_experts
        self.target = target
        self.resumes = target is None or not target.timed  # other times would choose other units
        self.iterations = iterations
        self.importance = importance
        self.even_heads = even_heads
        self.even_ffn = even_ffn
        self.ffn_multiple_of = ffn_multiple_of
        self.order = order
        self.head_mask = head_mask
        self.ffn_mask = ffn_mask
        self.compensate = compensate
        self.samples = samples
        self.batch_size = batch_size
        self.keep_in = keep_in
        self.table: LatencyTable | None = None
        self.masked = head_mask is not None or ffn_mask is not None
        self.train_samples = samples if compensate or not self.masked else 0
        sizes = any(size is not None for size in (target_heads, target_ffn_size, target_experts))
        ways = {"sizes": sizes, "masks": self.masked, "a budget": target is not None}
        if sum(ways.values()) != 1:
            found = " and ".join(way for way, used in ways.items() if used) or "nothing to remove"
            raise UserError(
                f"{self.key} has {found}. Set one of them: sizes by {self.key}.target_heads, target_ffn_size and "
                "target_experts, masks by head_mask and ffn_mask, or a budget by target."
            )

    def check(self, skeleton: Any, before: list[Any]) -> None:
        each = read_blocks(skeleton)
        check_parts(self.key, self.parts, each, name_family(skeleton), self.even_heads)
        for setting, used in (("compensate", self.compensate), ("importance", self.importance == "fisher")):
            if used and each[0].experts:
                raise UserError(
                    f"{self.key}.{setting} is {getattr(self, setting)}, which is for blocks with one FFN, and those of "
                    f"`{name_family(skeleton)}` have experts. Remove {self.key}.{setting}."
                )
        if any(isinstance(stage, Prune) and stage.pattern for stage in before):
            raise UserError(
                "`structured` removes columns, which breaks up the groups of the earlier `prune`'s N:M pattern. Set "
                "technique=structured+prune."
            )
        if self.masked:
            if all(mask.all() for masks in self.read_masks(each).values() for mask in masks):
                raise UserError(f"The masks of {self.key} keep everything. Set 0 for the units to remove.")
            return
        self.check_scores(skeleton)
        if self.target:
            self.target.check(f"{self.key}.target", skeleton, self.ffn_multiple_of)
            return
        heads, ffn, experts = (count_sizes(each, part) for part in ("heads", "ffn", "experts"))
        group, multiple = each[0].group_size, self.find_multiple(each)
        of = "what products of experts need" if experts else f"{self.key}.ffn_multiple_of"
        shared = "a group of heads that share a key and value head"
        check_target(f"{self.key}.target_heads", self.target_heads, heads, self.even_heads, group, shared)
        check_target(f"{self.key}.target_ffn_size", self.target_ffn_size, ffn, self.even_ffn, multiple, of)
        check_target(f"{self.key}.target_experts", self.target_experts, experts, True, 1, "an expert")
        chosen = getattr(skeleton.config, "num_experts_per_tok", 0)
        if self.target_experts is not None and self.target_experts < chosen:
            raise UserError(
                f"{self.key}.target_experts={self.target_experts} is less than the {chosen} experts that every token "
                f"is sent to. Set {self.key}.target_experts to {chosen} or more."
            )
        if self.count_goals(each) == count_units(each):
            raise UserError(
                f"{self.key} keeps the {format_mean(heads)} heads and {format_mean(ffn)} FFN channels that a block has "
                f"already{f', and its {experts[0]} experts' if experts else ''}. Set lower targets, or remove the "
                "stage."
            )

    def check_scores(self, skeleton: Any) -> None:
        """Raise UserError if units of such a model cannot be scored."""
        if self.importance == "logits" and getattr(skeleton.config, "num_labels", 0) == 1:
            raise UserError(
                f"{self.key}.importance is logits, which compares the probabilities of labels, and this model predicts "
                f"one number. Set {self.key}.importance=loss or activation."
            )
        if self.target and self.order:
            raise UserError(f"{self.key}.order is for sizes, and {self.key}.target has no order. Set it to null.")
        if self.target and self.importance == "activation":
            raise UserError(
                f"{self.key}.importance is activation, which ranks units of a block and does not compare heads with "
                f"channels, as {self.key}.target does. Set {self.key}.importance=fisher."
            )
        if self.by_textpruner(skeleton):
            require_textpruner()

    @property
    def parts(self) -> list[str]:
        """What is removed: ``groups`` of heads, ``ffn`` channels, ``experts``."""
        given = {
            "groups": (self.target_heads, self.head_mask, self.target),
            "ffn": (self.target_ffn_size, self.ffn_mask, self.target),
            "experts": (self.target_experts,),
        }
        return [part for part, settings in given.items() if any(setting is not None for setting in settings)]

    def preview(self, skeleton: Any) -> Any:
        each = read_blocks(skeleton)
        if self.masked:
            remove_units(skeleton, **self.read_masks(each))
        elif self.target:
            shape_blocks(skeleton, *self.target.preview_sizes(each, self.ffn_multiple_of))
        else:
            heads, ffn, experts = (count_sizes(each, part) for part in ("heads", "ffn", "experts"))
            shape_blocks(
                skeleton,
                preview_sizes(heads, self.target_heads, self.even_heads, each[0].group_size),
                preview_sizes(ffn, self.target_ffn_size, self.even_ffn, self.find_multiple(each)),
                preview_sizes(experts, self.target_experts, True, 1),
            )
        record_shapes(skeleton)
        return skeleton

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model: Any = unwrap_model(pl_module)
        self.check(model, [])
        prove_units(model, self.parts)
        goals = None if self.target else self.count_goals(read_blocks(model))
        # 1) Draw the texts to score on
        batches: list[Batch] = []
        if self.train_samples:
            labels = self.importance != "activation"
            batches = list(draw_calibration_batches(trainer, self.samples, self.batch_size, labels))
        if self.importance in ("loss", "fisher") and not self.masked and "labels" not in batches[0]:
            raise UserError(
                f"{self.key}.importance is {self.importance}, which needs labels, and the training batches have none. "
                f"Set {self.key}.importance=logits or activation."
            )
        # 2) Score and remove
        with evaluation_mode(model):
            if self.importance == "logits":
                batches = [label_with_predictions(model, batch) for batch in batches]
            if self.masked:
                self.remove(model, batches, self.read_masks(read_blocks(model)))
            elif self.target:
                self.fit_budget(self.target, model, batches)
            elif self.by_textpruner(model):
                self.remove(model, batches, self.textpruner_masks(model, batches))
            else:
                self.cut_in_turns(model, batches)
        # 3) Check what is left
        left = count_units(read_blocks(model))
        if goals and left != goals:
            raise RuntimeError(f"{left} head groups, FFN channels and experts are left; {goals} are expected")
        record_shapes(model)

    def remove(self, model: Any, batches: list[Batch], masks: dict[str, Masks]) -> None:
        """Remove the units that the masks leave out, and let the others take over for them."""
        if self.compensate:
            compensate_removal(model, batches, masks)
        remove_units(model, **masks)

    def fit_budget(self, target: Budget, model: Any, batches: list[Batch]) -> None:
        """Remove the units that cost the least loss until the model is within the budget, turn by turn."""
        search = BudgetSearch(target, f"{self.key}.target", model, batches, self.ffn_multiple_of)
        search.measure(model, self.keep_in)
        for turn in range(1, self.iterations + 1):
            self.remove(model, batches, search.choose(model, self.score(model, batches), turn / self.iterations))
        log.info(f"  {self.key.rpartition('.')[2]}: {search.check_result(model)}")
        self.table = search.table

    def score(self, model: Any, batches: list[Batch]) -> dict[str, Scores]:
        """Return the scores of all units."""
        if self.importance == "activation":
            return score_by_activation(model, batches)
        return (score_by_fisher if self.importance == "fisher" else score_by_gradient)(model, batches)

    def report(self, folder: Path) -> None:
        if self.table:
            self.table.write(folder / "latency_table.csv")

    def find_multiple(self, each: list[Block]) -> int:
        """Return the number that FFN sizes must be a multiple of."""
        return math.lcm(self.ffn_multiple_of, EXPERT_MULTIPLE if each[0].experts else 1)

    def count_goals(self, each: list[Block]) -> dict[str, int]:
        """Return the numbers of head groups, FFN channels and experts that all blocks together should keep."""
        goals = count_units(each)
        if self.masked:
            return goals | {part: sum(int(row.sum()) for row in rows) for part, rows in self.read_masks(each).items()}
        targets = {"groups": self.target_heads, "ffn": self.target_ffn_size, "experts": self.target_experts}
        size = {"groups": each[0].group_size}
        return goals | {
            part: len(select_blocks(each, part)) * target // size.get(part, 1)
            for part, target in targets.items()
            if target is not None
        }

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
            check_shared_heads(f"{self.key}.head_mask", each, masks["groups"])
        if self.ffn_mask is not None:
            masks["ffn"] = parse_masks(self.ffn_mask, f"{self.key}.ffn_mask", count_sizes(each, "ffn"))
            if each[0].experts and (odd := [n for n in map(int, map(sum, masks["ffn"])) if n % EXPERT_MULTIPLE]):
                raise UserError(
                    f"{self.key}.ffn_mask keeps {odd[0]} channels of an expert; products of experts need a multiple "
                    f"of {EXPERT_MULTIPLE}. Keep a multiple of {EXPERT_MULTIPLE} in every row."
                )
        return masks

    def by_textpruner(self, model: Any) -> bool:
        """Return whether TextPruner scores the model. It reads the number of heads of every block from the config,
        which is wrong after an earlier cut."""
        known = find_family(model).textpruner
        scored = self.importance in ("loss", "logits") and not self.target
        return known and scored and not hasattr(model.config, "compress")

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
        blocks = read_blocks(model)
        multiple = self.find_multiple(blocks)
        rules = {"groups": (self.even_heads, 1), "ffn": (self.even_ffn, multiple), "experts": (True, 1)}
        for turn in self.plan_turns(blocks):
            scores = self.score(model, batches)
            masks = {part: mask_important(scores[part], left, *rules[part]) for part, left in turn.items()}
            self.remove(model, batches, masks)

    def plan_turns(self, each: list[Block]) -> list[dict[str, int]]:
        """Return the numbers of units after every cut, the removal spread evenly over the steps."""
        now, goals = count_units(each), self.count_goals(each)
        unit = self.find_multiple(each) * (len(select_blocks(each, "ffn")) if self.even_ffn else 1)
        turns: list[dict[str, int]] = []
        for step in range(1, self.iterations + 1):
            left = {part: units_left(step, self.iterations, now[part], goals[part]) for part in self.parts}
            if "ffn" in left:
                left["ffn"] -= left["ffn"] % unit
            heads, rest = ({part: n for part, n in left.items() if (part == "groups") is own} for own in (True, False))
            halves = {"head-first": [heads, rest], "ffn-first": [rest, heads]}
            turns += filter(None, halves.get(self.order or "", [left]))
        return turns


def count_units(each: list[Block]) -> dict[str, int]:
    """Return the numbers of head groups, FFN channels and experts of all blocks together."""
    return {part: sum(count_sizes(each, part)) for part in ("groups", "ffn", "experts")}


def count_sizes(each: list[Block], part: str) -> list[int]:
    """Return the numbers of units of the blocks that have such units."""
    return [block.count(part) for block in select_blocks(each, part)]
