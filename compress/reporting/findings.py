"""State what a table of results shows: notes, recommendations and the Markdown report."""

from __future__ import annotations

import io
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from compress.reporting.escaping import escape_markdown, make_printable, make_rows_printable
from compress.reporting.rows import (
    Row,
    group_rows,
    is_faster,
    is_near_baseline,
    is_perplexity,
    is_significant,
    is_smaller,
    is_undefined,
)
from compress.reporting.tables import (
    build_table,
    describe_size_ratio,
    describe_speedup,
    format_change,
    format_figures,
    format_significance,
    format_title,
    join_methods,
    label_rows,
)

if TYPE_CHECKING:
    pass


CONCLUSIONS = "search.txt"
"""The file of a search's conclusions, a line each."""


def format_markdown(rows: list[Row], concluded: list[str]) -> str:
    """Return the table as Markdown, followed by the conclusions and the notes."""
    from rich import box
    from rich.console import Console

    rows = make_rows_printable(rows)
    drawn = build_table(rows, escape=escape_markdown)
    drawn.box, drawn.title, drawn.caption = box.MARKDOWN, None, None
    text = io.StringIO()
    # A line of any length holds a row. By default rich writes to a notebook's cell.
    Console(file=text, width=1_000_000, force_jupyter=False).print(drawn)
    table = [line.strip() for line in text.getvalue().strip().split("\n")]
    lines = [f"# {escape_markdown(format_title(rows))}", "", *table, ""]
    lines += [f"- {escape_markdown(note)}" for note in (*concluded, *list_notes(rows))]
    return "\n".join(lines) + "\n"


def list_notes(rows: list[Row]) -> list[str]:
    """Return the notes that explain the table, each once."""
    # 1) Explain the times
    done = [row for row in rows if row["status"] == "completed"]
    groups = group_rows(rows)
    notes = [
        f"{f'{model} on {task}: ' if len(groups) > 1 else ''}ms: one text of "
        f"{describe_lengths(group, 'latency')} on average; texts/s: batches of texts of "
        f"{describe_lengths(group, 'throughput')} on average; faster: timed in turns with the baseline in the same job"
        for (model, task, _), group in groups.items()
    ]
    notes += [
        "in its runtime: faster than the baseline exported to the same runtime in float32"
        for row in done
        if row.get("speedup_same_runtime")
    ]
    if slow := [row for row in done if (row.get("speedup_same_runtime_high") or 1.0) < 1]:
        notes.append(
            f"{join_methods(slow)}: slower on this processor than the baseline in float32 in the same runtime; "
            "precision=fp32, or fewer operations (structured, drop_layers), is faster"
        )
    devices = group_by_device(done)
    if len(devices) > 1:
        listed = "; ".join(f"{device}: {join_methods(group)}" for device, group in devices.items())
        notes.append(f"measured on several devices, so factors compare and times do not ({listed})")
    if disturbed := [row for row in done if row.get("disturbed")]:
        most = max(row["others_cpu"] for row in disturbed)
        notes.append(
            f"{join_methods(disturbed)}: other processes, or a limit on this one, took up to {most:.0%} of the CPUs "
            "during timing, so the times are uncertain"
        )
    # 2) Explain the quality
    tested = sum(row.get("p_holm") is not None for row in rows)
    if undefined := [row for row in done if is_undefined(row)]:
        metrics, splits = (", ".join(dict.fromkeys(row[key] for row in undefined)) for key in ("metric", "split"))
        notes.append(
            f"{metrics} of {join_methods(undefined)} is undefined on the {splits} split (all labels or all answers are "
            "the same), so its change is not tested"
        )
    if any(is_significant(row) for row in rows):
        several = f", corrected for {tested} comparisons (Holm)" if tested > 1 else ""
        notes.append(f"*: p < 0.05 on the same examples{several}")
    elif tested:
        notes.append("no change in quality is significant (p < 0.05 on the same examples, corrected by Holm)")
    if losing := [row for row in done if row.get("worst_slice")]:
        row = max(losing, key=lambda row: abs(row["worst_slice_change"]))
        p = row["worst_slice_p_holm"]
        notes.append(
            f"worst slice of the test split: {row['worst_slice']}, {100 * row['worst_slice_change']:+.1f} points with "
            f"{row['method']}"
            + (f" ({'' if p < 0.05 else 'not '}significant among its slices)" if p is not None else "")
        )
    notes += [f"{row['method']}: {changes}" for row in done if (changes := format_task_changes(row))]
    chains = [row for row in done if row["speedup"] is not None] or done
    shares = [row["measuring_time_s"] / row["run_time_s"] for row in chains if row.get("run_time_s")]
    if any(shares):
        notes.append(
            f"measuring took up to {max(shares):.0%} of the time of a run with an empty cache; hardware.latency sets "
            "its budget"
        )
    # 3) List techniques without a gain, limits and failures
    unchanged: dict[str, list[Row]] = defaultdict(list)
    for row in done:
        effects = [row.get(f"effect_{quantity}") or "" for quantity in ("size", "speed", "memory")]
        without_gain = [effect for effect in effects if effect.startswith("no ")]
        zeros = "dense zeros: " if row["effect"].startswith("dense") else ""
        if without_gain:
            unchanged[zeros + ", ".join(without_gain)].append(row)
    notes += [f"{join_methods(group)}: {effects}" for effects, group in unchanged.items()]
    limits = [part for row in rows for part in row.get("limits", "").split(" | ") if part]
    failures = [f"{row['method']} failed: {row['reason']}" for row in rows if row["status"] == "failed"]
    return [*dict.fromkeys(notes), *dict.fromkeys(limits), *failures]


def format_task_changes(row: Row) -> str:
    """Return the change of every task that was asked beside others, with stars; empty without such tasks."""
    tasks = [key for key in row if f"{key}_change_low" in row]
    changes = (
        f"{task} {format_change({'metric': task}, row[f'{task}_change'])}"
        + "*" * ((row[f"{task}_p_holm"] if row[f"{task}_p_holm"] is not None else 1.0) < 0.05)
        for task in tasks
    )
    return ", ".join(changes) + " (*: p < 0.05, corrected for its tasks)" * bool(tasks)


def group_by_device(rows: list[Row]) -> dict[str, list[Row]]:
    """Return the rows by the processor or card on which they were measured, and its threads."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[f"{row['device']}, {row['threads']} threads"].append(row)
    return groups


def describe_lengths(rows: list[Row], what: str) -> str:
    """Return the number of tokens of the timed texts, and the rows whose tokenizers give another number."""
    by_length: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_length[f"{row[f'{what}_tokens']:.0f}"].append(row)
    first, *others = by_length
    return "".join([f"{first} tokens", *(f" ({number} with {join_methods(by_length[number])})" for number in others)])


def read_conclusions(folder: Path, rows: list[Row]) -> list[str]:
    """Return the conclusions of a search if the folder has them, else the recommendations from ``rows``."""
    path = folder / CONCLUSIONS
    if not path.is_file():
        return recommend_rows(rows)
    return [make_printable(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def recommend_rows(rows: list[Row]) -> list[str]:
    """Name the smallest and the fastest row within a point of the baseline's quality, for each model and task.

    For perplexity the margin is 1 % of the baseline.
    """
    lines = []
    for (model, task, metric), group in group_rows(rows).items():
        if len(group) < 2:
            continue
        named = {id(row): label for row, label in zip(group, label_rows(group))}
        where = f" ({model} on {task})" if len(group_rows(rows)) > 1 else ""
        near = [row for row in group if row["method"] != "none" and is_near_baseline(row)]
        smaller = [row for row in near if is_smaller(row)]
        faster = [row for row in near if is_faster(row)]
        margin = "1 % of the baseline" if is_perplexity(metric) else "1 point of the baseline"
        for word, candidates, key in (
            ("smallest", smaller, lambda row: -row["compression_ratio"]),
            ("fastest", faster, lambda row: -row["speedup"]),
        ):
            if not candidates:
                lines.append(f"{word} within {margin}{where}: none is {'smaller' if word == 'smallest' else 'faster'}")
                continue
            best = min(candidates, key=key)
            gain = describe_size_ratio(best) if word == "smallest" else describe_speedup(best)
            change = format_significance(best, format_figures(best)["change"])
            lines.append(f"{word} within {margin}{where}: {named[id(best)]}, {gain}, {metric} {change}")
    return lines
