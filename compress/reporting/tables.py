"""Rows as text: names that tell them apart, their figures, and the table that a person compares them in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.reporting.rows import Row, is_significant

if TYPE_CHECKING:
    from rich.table import Table


GIVE_WAY = (
    "train s",
    "compress s",
    "texts/s",
    "parameters",
    "ms",
    "in its\nruntime [95%]",
    "smaller",
    "to teacher",
    "MB",
)
"""The columns that a narrow terminal does without, the first of them first."""


def format_title(rows: list[Row]) -> str:
    """What all rows have in common: models, tasks, and on what they were measured."""
    done = [one for one in rows if one["status"] == "completed"]

    def all_of(key: str, form: str) -> list[str]:
        return [form.format(value) for value in dict.fromkeys(one[key] for one in done)]

    models, tasks = (", ".join(dict.fromkeys(str(one[key]) for one in rows if one[key])) for key in ("model", "task"))
    split = " and ".join(dict.fromkeys(one.get("split", "test") for one in done))
    examples = all_of("examples", f"{{:,}} {split} examples")
    facts = [*examples, *all_of("device", "{}"), *all_of("threads", "{} threads")]
    return f"{models} on {tasks}" + (f": {', '.join(facts)}" if len(facts) == 3 else "")


def build_table(rows: list[Row], width: int | None = None) -> Table:
    """The columns a person compares; settings show where they differ between rows. A terminal of ``width`` characters
    gets those that it has room for."""
    from rich.markup import escape
    from rich.table import Table

    drawn = Table(title=format_title(rows), title_justify="left")
    told = differing_overrides(rows)
    names = {"method": [one["method"] for one in rows]}
    for key in varying_keys(rows):
        names[key] = [str(one[key]) for one in rows]
    if len(set(told)) > 1:
        names["settings"] = told
    columns = figure_columns(rows)
    widths = fit_columns(names, columns, width) if width else {}
    for name in names:
        drawn.add_column(name, overflow="fold", width=widths.get(name))
    for name in columns:
        drawn.add_column(escape(name if width else name.replace("\n", " ")), justify="right", no_wrap=True)
    for one, *cells in zip(rows, *names.values(), *columns.values()):
        drawn.add_row(*map(escape, cells), style="red" if one["status"] == "failed" else None)
    return drawn


def figure_columns(rows: list[Row]) -> dict[str, list[str]]:
    """The columns of figures by their headings, those that say something: the parameters where they differ."""
    done = [one for one in rows if one["status"] == "completed"]
    metrics = ", ".join(dict.fromkeys(one["metric"] for one in done)) or "quality"
    drawn = [format_figures(one) if one["status"] == "completed" else {"value": "failed"} for one in rows]
    names = dict.fromkeys(name for one in drawn for name in one)
    if len({one["parameters"] for one in done}) < 2:
        names.pop("parameters", None)
    found = {metrics if name == "value" else name: [one.get(name, "") for one in drawn] for name in names}
    return {name: cells for name, cells in found.items() if any(cells)}


def fit_columns(names: dict[str, list[str]], columns: dict[str, list[str]], width: int) -> dict[str, int]:
    """Leave out the ``columns`` that a terminal has no room for, and say how wide those of the ``names`` may be: as
    wide as their longest word, up to 24 characters, or 10 where nothing else helps, and wider where there is room."""

    def size(texts: Iterable[str]) -> int:
        return max(len(line) for text in texts for line in text.split("\n"))

    words = {name: size((name, *(word for cell in cells for word in cell.split()))) for name, cells in names.items()}
    for most, gone in [(24, ""), *((24, name) for name in GIVE_WAY), (10, ""), (10, "faster [95%]")]:
        columns.pop(gone, None)
        widths = {name: min(length, most) for name, length in words.items()}
        taken = [*widths.values(), *(size((name, *cells)) for name, cells in columns.items())]
        spare = width - 1 - sum(length + 3 for length in taken)  # a line and two spaces each
        if spare >= 0:
            break
    for name, cells in names.items():
        more = max(0, min(spare, size((name, *cells)) - widths[name]))
        widths[name], spare = widths[name] + more, spare - more
    return widths


def format_figures(one: Row) -> dict[str, str]:
    """The figures of a completed row as text, by the heading of their column; a baseline is compared with nothing."""
    perplexity, baseline = one["metric"] == "perplexity", one["speedup"] is None
    to_teacher = one.get("against_teacher")
    return {
        "value": f"{one['value']:.3f}" if perplexity else f"{one['value']:.4f}",
        "change": "" if baseline else format_change(one, one["change"]) + "*" * is_significant(one),
        "to teacher": "" if to_teacher is None else format_change(one, to_teacher),
        "parameters": f"{one['parameters']:,}",
        "MB": f"{one['size_mb']:.2f}",
        "smaller": "" if baseline else f"{one['compression_ratio']:.2f}x",
        "ms": f"{one['latency_ms']:.2f}",
        "faster [95%]": format_ratio(one, "speedup"),
        "in its\nruntime [95%]": format_ratio(one, "speedup_same_runtime"),
        "texts/s": f"{one['throughput_per_s']:,.0f}",
        "train s": f"{one['training_time_s']:.1f}",
        "compress s": "" if baseline else f"{one['compression_time_s']:.1f}",
    }


def format_ratio(one: Row, key: str) -> str:
    """A ratio with its interval; empty where there is none."""
    if one.get(key) is None:
        return ""
    return f"{one[key]:.2f}x [{one[f'{key}_low']:.2f}, {one[f'{key}_high']:.2f}]"


def format_change(one: Row, change: float) -> str:
    return f"{change:+.3f}" if one["metric"] == "perplexity" else f"{100 * change:+.2f} pt"


def format_significance(one: Row, change: str) -> str:
    """The change with its interval, and whether it may be chance."""
    if one.get("p_value") is None:
        return change
    p = one.get("p_holm", one["p_value"])
    low, high = (format_change(one, one[key]).removesuffix(" pt") for key in ("change_low", "change_high"))
    return f"{change.rstrip('*')} [{low}, {high}], {'' if p < 0.05 else 'not '}significant (p = {p:.2g})"


def describe_size_ratio(one: Row) -> str:
    return f"{one['size_mb']:.2f} MB, {one['compression_ratio']:.2f}x smaller"


def describe_speedup(one: Row) -> str:
    return f"{format_ratio(one, 'speedup')} faster"


def join_methods(rows: list[Row]) -> str:
    return ", ".join(dict.fromkeys(one["method"] for one in rows))


def label_rows(rows: list[Row]) -> list[str]:
    """A short name of each row that tells it from all others."""
    found, keys = [], varying_keys(rows)
    for one, settings in zip(rows, differing_overrides(rows)):
        facts = [f"seed={one[key]}" if key == "seed" else str(one[key]) for key in keys]
        found.append(" ".join(filter(None, (one["method"], *facts, settings))))
    return found


def varying_keys(rows: list[Row]) -> list[str]:
    """What else than the method and its settings tells rows apart."""
    return [key for key in ("model", "task", "seed") if len({one[key] for one in rows if one["model"]}) > 1]


def differing_overrides(rows: list[Row]) -> list[str]:
    """Of each row's overrides those that not all rows share; a baseline knows no settings of techniques, and a job that
    was killed none at all."""
    compared = [set(one["overrides"].split()) for one in rows if one["method"] != "none" and one["model"]]
    shared = set.intersection(*compared) if compared else set()
    told = [[o.lstrip("+") for o in one["overrides"].split() if o not in shared] for one in rows]
    stages = {".".join(o.partition("=")[0].split(".")[:2]) for overrides in told for o in overrides}
    only = f"{stages.pop()}." if len(stages) == 1 else "technique."  # of one stage its name says nothing
    return [" ".join(override.removeprefix(only) for override in overrides) for overrides in told]


@dataclass(frozen=True)
class Seeds:
    """One experiment with several seeds: its value, and its change against the baseline of each seed (None of the
    baseline itself), as a mean with Student's t interval."""

    label: str
    metric: str
    seeds: int
    value: Any
    change: Any


def summarise_seeds(rows: list[Row]) -> list[Seeds]:
    """The experiments of which there are several seeds."""
    from compress.maths.statistics import mean_interval

    same: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for one, settings in zip(rows, differing_overrides(rows)):
        if one["status"] == "completed":
            same[one["model"], one["task"], one["metric"], one["method"], settings].append(one)
    found = []
    for (model, task, metric, method, settings), group in same.items():
        if len({one["seed"] for one in group}) > 1:
            change = None if method == "none" else mean_interval([one["change"] for one in group])
            value = mean_interval([one["value"] for one in group])
            label = " ".join(filter(None, (method, settings, f"({model} on {task})")))
            found.append(Seeds(label, metric, len(group), value, change))
    return found
