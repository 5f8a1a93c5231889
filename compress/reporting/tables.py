"""Format rows as text: distinct names, figures, and the table of a terminal."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

from compress.reporting.rows import Row, is_bound, is_perplexity, is_significant, is_undefined

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
"""The columns that a narrow terminal drops, in this order."""


def format_title(rows: list[Row]) -> str:
    """Return models and tasks, and the examples, device and threads if all rows share them."""
    done = [row for row in rows if row["status"] == "completed"]

    def all_of(key: str, form: str) -> list[str]:
        return [form.format(value) for value in dict.fromkeys(row[key] for row in done)]

    models, tasks = (", ".join(dict.fromkeys(str(row[key]) for row in rows if row[key])) for key in ("model", "task"))
    split = " and ".join(dict.fromkeys(row.get("split", "test") for row in done))
    examples = all_of("examples", f"{{:,}} {split} examples")
    facts = [*examples, *all_of("device", "{}"), *all_of("threads", "{} threads")]
    return f"{models} on {tasks}" + (f": {', '.join(facts)}" if len(facts) == 3 else "")


def build_table(rows: list[Row], width: int | None = None, escape: Callable[[str], str] = str) -> Table:
    """Return the table of the main columns, with settings if rows differ in them.

    In a terminal of ``width`` characters, columns without room are dropped. ``escape`` is applied to names, which may
    hold any characters. The cells are texts without markup.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(format_title(rows), style="table.title"), title_justify="left")
    settings = differing_overrides(rows)
    names = {"method": [row["method"] for row in rows]}
    for key in varying_keys(rows):
        names[key] = [str(row[key]) for row in rows]
    if len(set(settings)) > 1:
        names["settings"] = settings
    names = {name: [escape(cell) for cell in cells] for name, cells in names.items()}
    columns = figure_columns(rows)
    widths = fit_columns(names, columns, width) if width else {}
    for name in names:
        table.add_column(name, overflow="fold", width=widths.get(name))
    for name in columns:
        table.add_column(Text(name if width else name.replace("\n", " ")), justify="right", no_wrap=True)
    for row, *cells in zip(rows, *names.values(), *columns.values()):
        table.add_row(*map(Text, cells), style="red" if row["status"] == "failed" else None)
    return table


def figure_columns(rows: list[Row]) -> dict[str, list[str]]:
    """Return the columns of figures by heading, without empty ones. Parameters are shown only if they differ."""
    done = [row for row in rows if row["status"] == "completed"]
    metrics = ", ".join(dict.fromkeys(row["metric"] for row in done)) or "quality"
    figures = [format_figures(row) if row["status"] == "completed" else {"value": "failed"} for row in rows]
    names = dict.fromkeys(name for row in figures for name in row)
    if len({row["parameters"] for row in done}) < 2:
        names.pop("parameters", None)
    columns = {metrics if name == "value" else name: [row.get(name, "") for row in figures] for name in names}
    return {name: cells for name, cells in columns.items() if any(cells)}


def fit_columns(names: dict[str, list[str]], columns: dict[str, list[str]], width: int) -> dict[str, int]:
    """Drop the ``columns`` without room from the dictionary, and return the widths of the ``names``.

    A name column is as wide as its longest word, up to 24 characters, or up to 10 as a last resort. Remaining space
    is given to the name columns.
    """
    from rich.cells import cell_len

    def size(texts: Iterable[str]) -> int:
        return max(cell_len(line) for text in texts for line in text.split("\n"))

    words = {name: size((name, *(word for cell in cells for word in cell.split()))) for name, cells in names.items()}
    for most, gone in [(24, ""), *((24, name) for name in GIVE_WAY), (10, ""), (10, "faster [95%]")]:
        columns.pop(gone, None)
        widths = {name: min(length, most) for name, length in words.items()}
        taken = [*widths.values(), *(size((name, *cells)) for name, cells in columns.items())]
        spare = width - 1 - sum(length + 3 for length in taken)  # each has a border and two spaces
        if spare >= 0:
            break
    for name, cells in names.items():
        more = max(0, min(spare, size((name, *cells)) - widths[name]))
        widths[name], spare = widths[name] + more, spare - more
    return widths


def format_figures(row: Row) -> dict[str, str]:
    """Return the figures of a completed row as text, by column heading. Comparisons are empty for a baseline."""
    baseline = row["speedup"] is None
    to_teacher = row.get("against_teacher")
    return {
        "value": format_value(row),
        "change": "" if baseline else format_change(row, row["change"]) + "*" * is_significant(row),
        "to teacher": "" if to_teacher is None else format_change(row, to_teacher),
        "parameters": f"{row['parameters']:,}",
        "MB": f"{row['size_mb']:.2f}",
        "smaller": "" if baseline else f"{row['compression_ratio']:.2f}x",
        "ms": f"{row['latency_ms']:.2f}",
        "faster [95%]": format_ratio(row, "speedup"),
        "in its\nruntime [95%]": format_ratio(row, "speedup_same_runtime"),
        "texts/s": format_rate(row["throughput_per_s"]),
        "train s": f"{row['training_time_s']:.1f}",
        "compress s": "" if baseline else f"{row['compression_time_s']:.1f}",
    }


def format_rate(per_second: float) -> str:
    """Return a number of texts per second; a slow model's is below one."""
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"


def format_ratio(row: Row, key: str) -> str:
    """Return the ratio with its interval, or an empty text without a ratio."""
    if row.get(key) is None:
        return ""
    return f"{row[key]:.2f}x [{row[f'{key}_low']:.2f}, {row[f'{key}_high']:.2f}]"


def format_value(row: Row) -> str:
    if is_undefined(row):
        return "undefined"
    return f"{row['value']:.3f}" if is_perplexity(row["metric"]) else f"{row['value']:.4f}"


def format_change(row: Row, change: float) -> str:
    if math.isnan(change):
        return "undefined"
    return f"{change:+.3f}" if is_perplexity(row["metric"]) else f"{100 * change:+.2f} pt"


def format_significance(row: Row, change: str) -> str:
    """Return the change with its interval and its significance."""
    if row.get("p_value") is None:
        return change
    p = float(row.get("p_holm") or row["p_value"])
    low, high = (format_change(row, row[key]).removesuffix(" pt") for key in ("change_low", "change_high"))
    return (
        f"{change.rstrip('*')} [{low}, {high}], {'' if p < 0.05 else 'not '}significant ({format_p(p, is_bound(row))})"
    )


def format_p(p: float, bound: bool) -> str:
    return f"p {'<' if bound else '='} {p:.2g}"


def describe_size_ratio(row: Row) -> str:
    return f"{row['size_mb']:.2f} MB, {row['compression_ratio']:.2f}x smaller"


def describe_speedup(row: Row) -> str:
    return f"{format_ratio(row, 'speedup')} faster"


def join_methods(rows: list[Row]) -> str:
    return ", ".join(dict.fromkeys(row["method"] for row in rows))


def label_rows(rows: list[Row]) -> list[str]:
    """Return a short, distinct name for each row."""
    labels, keys = [], varying_keys(rows)
    for row, settings in zip(rows, differing_overrides(rows)):
        facts = [f"seed={row[key]}" if key == "seed" else str(row[key]) for key in keys]
        labels.append(" ".join(filter(None, (row["method"], *facts, settings))))
    return labels


def varying_keys(rows: list[Row]) -> list[str]:
    """Return the keys among model, task and seed in which rows differ."""
    return [key for key in ("model", "task", "seed") if len({row[key] for row in rows if row["model"]}) > 1]


def differing_overrides(rows: list[Row]) -> list[str]:
    """Return the overrides of each row that not all rows share.

    Baselines, which have no technique settings, count only where there is nothing else. Killed jobs, which have no
    overrides, do not count.
    """
    named = [row for row in rows if row["model"]]
    compared = [set(row["overrides"]) for row in [row for row in named if row["method"] != "none"] or named]
    shared = set.intersection(*compared) if compared else set()
    differing = [[o.lstrip("+") for o in row["overrides"] if o not in shared] for row in rows]
    stages = {".".join(o.partition("=")[0].split(".")[:2]) for overrides in differing for o in overrides}
    only = f"{stages.pop()}." if len(stages) == 1 else "technique."  # the name of a single stage is redundant
    return [" ".join(override.removeprefix(only) for override in overrides) for overrides in differing]


@dataclass(frozen=True)
class Seeds:
    """An experiment with several seeds.

    ``value`` and ``change`` are means of the ``seeds`` whose metric is defined, each of which counts once however many
    rows it has, with Student's t intervals. ``change`` is against the baseline of the same seed, and None for the
    baseline itself.
    """

    label: str
    metric: str
    seeds: int
    value: Any
    change: Any


def summarise_seeds(rows: list[Row]) -> list[Seeds]:
    """Return a summary of each experiment with several seeds."""
    from compress.maths.statistics import mean_interval

    experiments: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row, settings in zip(rows, differing_overrides(rows)):
        if row["status"] == "completed" and not is_undefined(row):
            experiments[row["model"], row["task"], row["metric"], row["method"], settings].append(row)
    summaries = []
    for (model, task, metric, method, settings), group in experiments.items():
        by_seed: dict[int, list[Row]] = defaultdict(list)
        for row in group:
            by_seed[row["seed"]].append(row)
        if len(by_seed) > 1:
            value, change = (
                mean_interval([mean([row[key] for row in same]) for same in by_seed.values()])
                for key in ("value", "change")
            )
            label = " ".join(filter(None, (method, settings, f"({model} on {task})")))
            summaries.append(Seeds(label, metric, len(by_seed), value, None if method == "none" else change))
    return summaries
