"""Find the budgets that a sweep set, which the page's plot shows as lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from compress.errors import UserError
from compress.install import CONF
from compress.planning.recorded import SWEEP, read_record
from compress.reporting.curves import parse_number
from compress.reporting.folder import ARTIFACT
from compress.reporting.rows import group_rows, is_perplexity

if TYPE_CHECKING:
    from compress.reporting.rows import Row


@dataclass(frozen=True)
class BudgetLine:
    """A line across the plot of a model on a task: at ``value`` of the ``axis``, a metric or a column's key."""

    axis: str
    value: float
    label: str
    model: str
    task: str


def find_budget_lines(folder: Path, rows: list[Row]) -> list[BudgetLine]:
    """Return the lines of the search that wrote ``folder``, and of stages that compressed to a budget."""
    lines: list[BudgetLine] = []
    drop = read_max_drop(folder)
    for (model, task, metric), group in group_rows(rows).items():
        baseline = next((row for row in group if row["method"] == "none"), None)
        if baseline is None:
            continue
        if drop is not None:
            better = not is_perplexity(metric)
            value = baseline["value"] - drop / 100 if better else baseline["value"] * (1 + drop / 100)
            lines.append(BudgetLine(metric, value, f"search.max_drop={drop:g}", model, task))
            if better:
                lines.append(BudgetLine("change", -drop, f"search.max_drop={drop:g}", model, task))
        for row in group:
            lines += find_stage_budget(row, baseline)
    return list(dict.fromkeys(lines))


def read_max_drop(folder: Path) -> float | None:
    """Return the largest loss that a search allowed, in points or percent; None if the folder is no search's."""
    try:
        words = read_record(folder / SWEEP)["overrides"]["task"]
    except UserError:  # a run's, or damaged: a report is written all the same
        return None
    typed = dict(word.partition("=")[::2] for word in words)
    if not typed.get("search") or typed["search"] == "null":
        return None
    return parse_number(typed["search.max_drop"]) if "search.max_drop" in typed else find_default_drop(typed["search"])


def find_default_drop(search: str) -> float | None:
    """Return the largest loss of a choice of the group ``search``, or of the choice that it starts from."""
    file = CONF / "search" / f"{search}.yaml"
    chosen: Any = OmegaConf.load(file) if file.is_file() else {}
    if (drop := OmegaConf.select(OmegaConf.create(chosen), "search.max_drop")) is not None:
        return float(drop)
    bases = [base for base in chosen.get("defaults", []) if isinstance(base, str) and base != "_self_"]
    return next((drop for base in bases if (drop := find_default_drop(base)) is not None), None)


def find_stage_budget(row: Row, baseline: Row) -> list[BudgetLine]:
    """Return the line of a first stage with ``target``, whose shares are of the baseline."""
    file = Path(row.get("folder") or ".") / ARTIFACT / "compress.json"
    if row["method"] == "none" or not row.get("folder") or not file.is_file():
        return []
    history = json.loads(file.read_text(encoding="utf-8"))["history"]
    target: Any = history[1]["settings"].get("target") if len(history) > 1 else None
    if not isinstance(target, dict):
        return []
    runtime = target.get("for", target.get("runtime", "torch"))
    name, amount = next(((name, amount) for name, amount in target.items() if isinstance(amount, int | float)), ("", 0))
    share = amount < 1
    places = {
        "size_mb": ("size_mb", amount),
        "latency_ms": ("latency_ms", amount),
        "latency": ("speedup" if runtime == "torch" else "speedup_same_runtime", 1 / amount if amount else 0),
        "parameters": ("parameters", amount * (baseline["parameters"] if share else 1)),
        "macs": ("mmacs", amount * ((baseline.get("macs") or 0) if share else 1) / 1e6),
    }
    if name not in places:
        return []
    axis, value = places[name]
    return [BudgetLine(axis, value, f"{history[1]['name']}.target.{name}={amount:g}", row["model"], row["task"])]
