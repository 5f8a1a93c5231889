"""Find the heads and FFN channels of a model that cost the least loss within a budget of latency, size or work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from compress.cache.digests import compute_digest, digest_environment
from compress.errors import UserError
from compress.exporting.latency import LatencyTable, ShapeTimer
from compress.exporting.tracing import select_inputs
from compress.maths.budgets import choose_levels, spread_levels
from compress.maths.units import Masks, Scores, mask_top
from compress.models.batches import Batch, middle_indices
from compress.models.blocks import Block, read_blocks
from compress.models.calibration import strip_padding
from compress.models.costs import Costs, count_parameters, count_unit_macs
from compress.models.families import name_family
from compress.runtimes.processor import describe_machine
from compress.runtimes.runtime import import_runtime, require_packages

LEVELS = 48
"""Number of FFN sizes of a block to choose from."""
TIMED = 10
"""Number of sizes of heads, and of FFNs, that are timed; those between are interpolated."""
NEAR = 0.02
"""How close the measured latency has to come to the budget before the search ends, as a fraction of it."""
FAR = 1.05
"""The largest measured latency that is accepted, as a multiple of the budget."""
TEXTS = 8
"""Number of texts, from short to long, that are timed."""
TURNS = 5
"""Number of shapes that are measured to come that close."""
Amount = Annotated[float, Field(gt=0)] | None


@validated(frozen=True, config=ConfigDict(extra="forbid", populate_by_name=True))
class Budget:
    """What a model may cost afterwards: one of the amounts. Below 1, all but ``size_mb`` and ``latency_ms`` are shares
    of what the model costs before.

    Args:
        latency: median time of a text alone, as a share.
        latency_ms: the same in milliseconds.
        size_mb: megabytes of the weights, as this stage saves them.
        parameters: parameters of the whole model.
        macs: multiply-accumulates of a text of median length.
        runtime: what runs the model on the CPU, for the latency. Its setting is ``for``.
    """

    latency: Annotated[float, Field(gt=0, lt=1)] | None = None
    latency_ms: Amount = None
    size_mb: Amount = None
    parameters: Amount = None
    macs: Amount = None
    runtime: Annotated[Literal["torch", "onnxruntime", "openvino"], Field(alias="for")] = "torch"

    @property
    def given(self) -> dict[str, float]:
        """The amounts that are set, by name."""
        amounts = {name: getattr(self, name) for name in ("latency", "latency_ms", "size_mb", "parameters", "macs")}
        return {name: amount for name, amount in amounts.items() if amount is not None}

    @property
    def timed(self) -> bool:
        return bool({"latency", "latency_ms"} & self.given.keys())

    def check(self, key: str, skeleton: Any, multiple_of: int) -> None:
        """Raise UserError if there is not one amount, or if the model cannot reach it or is within it already."""
        if len(self.given) != 1:
            found = ", ".join(self.given) or "nothing"
            raise UserError(
                f"{key} sets {found}; exactly one of latency, latency_ms, size_mb, parameters and macs is expected. "
                f"Set {key}={{latency: 0.5}}."
            )
        target = import_runtime(self.runtime)
        if self.timed and target.STAGE:
            require_packages(target.STAGE, f"{key}.for={self.runtime}", target.PACKAGES)
        blocks = read_blocks(skeleton)
        if any(block.experts or not block.ffn or block.family.equal_heads for block in blocks):
            raise UserError(
                f"{key} chooses the heads and FFN channels of every block by itself, and `{name_family(skeleton)}` has "
                "experts, blocks without an FFN, or heads that all blocks share. Set target_heads, target_ffn_size or "
                "target_experts."
            )
        if (least := min(block.ffn for block in blocks)) < multiple_of:
            raise UserError(
                f"{key.rpartition('.')[0]}.ffn_multiple_of is {multiple_of}, and a block has {least} FFN channels. Set "
                f"it to {least} or less."
            )
        ((name, _),) = self.given.items()
        if name in ("parameters", "size_mb"):
            costs = self.count_costs(skeleton, [])
            removable = sum(
                heads * (block.groups - 1) + ffn * max(block.ffn - 1, 0)
                for block, heads, ffn in zip(blocks, costs.groups, costs.ffn)
            )
            check_amount(f"{key}.{name}", self.to_amount(costs.total), costs.total, costs.total - removable)

    def preview_sizes(self, blocks: list[Block], multiple_of: int) -> tuple[list[int], list[int]]:
        """Return heads and FFN channels that the blocks may have afterwards: half of what they have, but not all
        equal, so that later stages cannot rely on equal sizes."""
        heads = [block.group_size * max(1, block.groups // 2 - index % 2) for index, block in enumerate(blocks)]
        channels = [
            multiple_of * max(1, block.ffn // multiple_of // 2 - index % 2) for index, block in enumerate(blocks)
        ]
        return heads, channels

    def to_amount(self, total: float) -> float:
        """Return the budget in the unit of ``total``, which is what the model costs now."""
        ((name, amount),) = self.given.items()
        return amount * total if amount < 1 and name in ("latency", "parameters", "macs") else amount

    def count_costs(self, model: Any, texts: list[Batch]) -> Costs:
        """Return what the model and its units cost, in the unit of the budget."""
        if "macs" in self.given:
            return count_unit_macs(model, texts[len(texts) // 2])
        costs = count_parameters(model)
        if "parameters" in self.given:
            return costs
        mb = next(model.parameters()).element_size() / 1e6
        return Costs(
            costs.total * mb, tuple(mb * cost for cost in costs.groups), tuple(mb * cost for cost in costs.ffn)
        )


@dataclass(frozen=True)
class Slot:
    """The units of one part of a block, ``groups`` of heads or ``ffn`` channels: how many may stay (``levels``), and
    the sum of the scores of those that then go (``losses``)."""

    part: str
    block: int
    levels: list[int]
    losses: list[float]


def list_slots(scores: dict[str, Scores], multiple_of: int) -> list[Slot]:
    """Return the parts of all blocks, in which the units with the lowest scores go first. FFNs keep multiples of
    ``multiple_of``."""
    slots = []
    for part, each in scores.items():
        for block, score in enumerate(each):
            count = len(score)
            levels = list(range(1, count + 1)) if part == "groups" else spread_levels(count, LEVELS, multiple_of)
            lost = torch.cat([score.new_zeros(1), score.sort().values.cumsum(0)])
            slots.append(Slot(part, block, levels, [float(lost[count - level]) for level in levels]))
    return slots


def choose_masks(
    scores: dict[str, Scores], slots: list[Slot], savings: list[list[float]], least: float
) -> dict[str, Masks]:
    """Return the masks of the units that stay: the levels of the ``slots`` that lose least and save ``least`` or more.

    Raises:
        ValueError: no choice saves enough.
    """
    costs = [[-saved for saved in levels] for levels in savings]
    chosen = choose_levels([slot.losses for slot in slots], costs, -least)
    masks: dict[str, Masks] = {part: [] for part in scores}
    for slot, level in zip(slots, chosen):
        masks[slot.part].append(mask_top(scores[slot.part][slot.block], slot.levels[level]))
    return masks


class BudgetSearch:
    """Finds what a model keeps within a budget.

    Args:
        budget: the budget.
        key: its setting, for error messages.
        model: the model as it is.
        batches: text to measure on.
        multiple_of: number that FFN sizes must be a multiple of.
    """

    def __init__(self, budget: Budget, key: str, model: Any, batches: list[Batch], multiple_of: int) -> None:
        ((self.name, _),) = budget.given.items()
        self.budget, self.key, self.multiple_of = budget, f"{key}.{self.name}", multiple_of
        texts = [strip_padding(batch, row) for batch in batches for row in range(len(batch["input_ids"]))]
        texts.sort(key=lambda text: text["input_ids"].shape[1])
        self.texts = [select_inputs(texts[i], model) for i in middle_indices(len(texts), min(TEXTS, len(texts)))]
        self.group = read_blocks(model)[0].group_size
        self.timer: ShapeTimer | None = None
        self.table: LatencyTable | None = None
        self.start = self.now = 0.0 if budget.timed else budget.count_costs(model, self.texts).total

    def measure(self, model: Any, keep_in: Path | None) -> None:
        """Time the model in other shapes, if the budget is a latency and the folder ``keep_in`` has no times of it."""
        if not self.budget.timed:
            return
        self.timer = ShapeTimer(model, self.texts, self.budget.runtime)
        kept = keep_in and keep_in / f"latency-{self.digest(model)}.csv"
        if kept and kept.is_file():
            self.table = LatencyTable.read(kept, self.timer.sizes)
        else:
            heads, ffn = (max(sizes) for sizes in self.timer.sizes.values())
            self.table = self.timer.measure_table(
                [self.group * level for level in spread_levels(heads // self.group, TIMED)],
                spread_levels(ffn, TIMED, self.multiple_of),
            )
        if kept and not kept.is_file():
            kept.parent.mkdir(parents=True, exist_ok=True)
            self.table.write(kept)
        self.start = self.now = self.table.whole_ms

    def digest(self, model: Any) -> str:
        """Return the address of the times: all that they depend on."""
        lengths = [text["input_ids"].shape[1] for text in self.texts]
        shapes = model.config.to_dict(), self.multiple_of
        return compute_digest([shapes, lengths, self.budget.runtime, describe_machine(), digest_environment()])

    def choose(self, model: Any, scores: dict[str, Scores], progress: float = 1.0) -> dict[str, Masks]:
        """Return the masks with which the model has gone the share ``progress`` of its way to the budget.

        Raises:
            UserError: the model has too much with the fewest units, or little enough already.
        """
        goal = self.start - progress * (self.start - self.budget.to_amount(self.start))
        scores = {part: scores[part] for part in ("groups", "ffn")}
        if self.now <= goal and self.now < self.start:  # the turn before went further than it had to
            return {part: [torch.ones_like(score, dtype=torch.bool) for score in each] for part, each in scores.items()}
        slots = list_slots(scores, self.multiple_of)
        if self.table and self.timer:
            return self.fit_latency(self.timer, self.table, scores, slots, goal, last=progress == 1)
        costs = self.budget.count_costs(model, self.texts)
        units = {"groups": costs.groups, "ffn": costs.ffn}
        savings = [
            [(slot.levels[-1] - level) * units[slot.part][slot.block] for level in slot.levels] for slot in slots
        ]
        check_amount(self.key, goal, costs.total, costs.total - sum(map(max, savings)))
        self.now = goal
        return choose_masks(scores, slots, savings, costs.total - goal)

    def fit_latency(
        self,
        timer: ShapeTimer,
        table: LatencyTable,
        scores: dict[str, Scores],
        slots: list[Slot],
        goal: float,
        last: bool,
    ) -> dict[str, Masks]:
        """Return the masks with which the model takes ``goal`` milliseconds. Where the sum over the table differs from
        what is then measured, the next choice aims lower or higher.

        Raises:
            UserError: nothing that was chosen comes close to the goal of the ``last`` turn.
        """
        savings = [
            table.estimate_savings("heads", [level * self.group for level in slot.levels])
            if slot.part == "groups"
            else table.estimate_savings("ffn", slot.levels)
            for slot in slots
        ]
        least = 1.0001 * (self.now - sum(map(max, savings)))
        check_amount(f"{self.key} in ms", goal, self.now, least)
        aim, found = goal, []
        for _ in range(TURNS):
            masks = choose_masks(scores, slots, savings, self.now - max(aim, least))
            left = {part: [int(mask.sum()) for mask in each] for part, each in masks.items()}
            share = timer.compare(heads=[self.group * count for count in left["groups"]], ffn=left["ffn"])
            found.append((masks, share * table.whole_ms))
            if abs(found[-1][1] - goal) <= NEAR * goal:
                break
            aim *= goal / found[-1][1]
        masks, self.now = min(found, key=lambda each: (each[1] > FAR * goal, abs(each[1] - goal)))
        if last and self.now > FAR * goal:
            raise UserError(
                f"{self.key} asks for {goal:.4g} ms, and the closest of {len(found)} shapes takes {self.now:.4g} ms. "
                "Set a higher value, or run it while the machine has nothing else to do."
            )
        return masks

    def check_result(self, model: Any) -> str:
        """Return a sentence on what the model costs now.

        Raises:
            RuntimeError: it is more than the budget, and not a matter of timing.
        """
        goal = self.budget.to_amount(self.start)
        if not self.budget.timed:
            self.now = self.budget.count_costs(model, self.texts).total
            if self.now > 1.0001 * goal:
                raise RuntimeError(f"the model has {self.now:g} {self.name}; {goal:g} at most are expected")
        unit = "ms" if self.budget.timed else self.name
        where = f" in {self.budget.runtime}" if self.budget.timed else ""
        share = self.now / self.start
        return f"{self.now:.4g} {unit}{where}, {share:.3g} of what it was (budget {goal / self.start:.3g})"


def check_amount(key: str, amount: float, now: float, least: float) -> None:
    """Raise UserError if a budget is above what the model costs ``now``, or below the ``least`` that it can cost."""
    if amount >= now:
        raise UserError(f"{key} is {amount:.4g}, and the model is at {now:.4g} already. Set a lower value.")
    if amount < least:
        raise UserError(
            f"{key} is {amount:.4g}, and with the fewest heads and FFN channels the model is still at {least:.4g}. Set "
            "a higher value, or remove blocks first (technique=drop_layers+structured)."
        )
