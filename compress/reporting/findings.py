"""State what a table of results shows: notes, recommendations and the Markdown report."""

from __future__ import annotations

import io
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from compress.reporting.rows import Row, group_rows, is_faster, is_near_baseline, is_significant, is_smaller
from compress.reporting.tables import (
    build_table,
    describe_size_ratio,
    describe_speedup,
    format_figures,
    format_significance,
    format_title,
    join_methods,
    label_rows,
)

if TYPE_CHECKING:
    pass


CONCLUSIONS = "search.txt"
"""What a search has chosen, a line each."""


def format_markdown(rows: list[Row], concluded: list[str]) -> str:
    """The table as Markdown, and under it what to conclude and how to read it."""
    from rich import box
    from rich.console import Console

    drawn = build_table(rows)
    drawn.box, drawn.title, drawn.caption = box.MARKDOWN, None, None
    text = io.StringIO()
    Console(file=text, width=1000).print(drawn)
    lines = [f"# {format_title(rows)}", "", *(line.strip() for line in text.getvalue().strip().splitlines()), ""]
    lines += [f"- {note}" for note in (*concluded, *list_notes(rows))]
    return "\n".join(lines) + "\n"


def list_notes(rows: list[Row]) -> list[str]:
    """What the table alone does not say, each thing once."""
    done = [one for one in rows if one["status"] == "completed"]
    every = group_rows(rows)
    timed = [
        f"{f'{model} on {task}: ' if len(every) > 1 else ''}ms: one text, on average of "
        f"{describe_lengths(group, 'latency')}; texts/s: batches of texts of {describe_lengths(group, 'throughput')}; "
        "faster: in turns with the baseline in one job"
        for (model, task, _), group in every.items()
    ]
    timed += [
        "in its runtime: faster than the baseline exported to the same runtime in float32"
        for one in done
        if one.get("speedup_same_runtime")
    ]
    if disturbed := [one for one in done if one.get("disturbed")]:
        most = max(one["others_cpu"] for one in disturbed)
        timed.append(
            f"{join_methods(disturbed)}: others took up to {most:.0%} of the CPUs in the meantime, so that its times "
            "are unsure"
        )
    tested = sum(one.get("p_holm") is not None for one in rows)
    if any(is_significant(one) for one in rows):
        several = f", corrected for {tested} comparisons (Holm)" if tested > 1 else ""
        timed.append(f"*: p < 0.05 on the same examples{several}")
    elif tested:
        timed.append("no change of quality is significant (p < 0.05 on the same examples, corrected by Holm)")
    if losing := [one for one in done if one.get("worst_slice")]:
        one = min(losing, key=lambda one: one["worst_slice_change"])
        p = one["worst_slice_p_holm"]
        timed.append(
            f"the part of the test split that lost most: {one['worst_slice']}, {100 * one['worst_slice_change']:+.1f} "
            f"points by {one['method']}"
            + (f" ({'' if p < 0.05 else 'not '}significant among its parts)" if p is not None else "")
        )
    chains = [one for one in done if one["speedup"] is not None] or done
    shares = [one["measuring_time_s"] / one["run_time_s"] for one in chains if one.get("run_time_s")]
    if any(shares):
        timed.append(
            f"measuring took up to {max(shares):.0%} of the time of a run that finds nothing in the cache; its budget "
            "is hardware.latency"
        )
    nothing: dict[str, list[Row]] = defaultdict(list)
    for one in done:
        kept = [said for what in ("size", "speed", "memory") if (said := one.get(f"effect_{what}") or "")[:3] == "no "]
        zeros = "dense zeros: " if one["effect"].startswith("dense") else ""
        if kept:
            nothing[zeros + ", ".join(kept)].append(one)
    timed += [f"{join_methods(same)}: {said}" for said, same in nothing.items()]
    found = [part for one in rows for part in one.get("limits", "").split(" | ") if part]
    lost = [f"{one['method']} failed: {one['reason']}" for one in rows if one["status"] == "failed"]
    return [*dict.fromkeys(timed), *dict.fromkeys(found), *lost]


def describe_lengths(rows: list[Row], what: str) -> str:
    """Tokens of the texts that were timed, and which rows read these as more or fewer of them."""
    found: dict[str, list[Row]] = defaultdict(list)
    for one in rows:
        found[f"{one[f'{what}_tokens']:.0f}"].append(one)
    first, *others = found
    return "".join([f"{first} tokens", *(f" ({number} by {join_methods(found[number])})" for number in others)])


def read_conclusions(folder: Path, rows: list[Row]) -> list[str]:
    """What a search has chosen by other figures than these, which then choose nothing; else what they recommend."""
    said = folder / CONCLUSIONS
    return said.read_text().splitlines() if said.is_file() else recommend_rows(rows)


def recommend_rows(rows: list[Row]) -> list[str]:
    """The smallest and the fastest row whose quality is within a point of its baseline's (a hundredth of a
    perplexity), for each model and task."""
    found = []
    for (model, task, metric), group in group_rows(rows).items():
        if len(group) < 2:
            continue
        named = {id(one): label for one, label in zip(group, label_rows(group))}
        where = f" ({model} on {task})" if len(group_rows(rows)) > 1 else ""
        near = [one for one in group if one["method"] != "none" and is_near_baseline(one)]
        smaller = [one for one in near if is_smaller(one)]
        faster = [one for one in near if is_faster(one)]
        margin = "1 % of the baseline" if metric == "perplexity" else "1 point of the baseline"
        for word, able, key in (
            ("smallest", smaller, lambda one: -one["compression_ratio"]),
            ("fastest", faster, lambda one: -one["speedup"]),
        ):
            if not able:
                found.append(f"{word} within {margin}{where}: none is {'smaller' if word == 'smallest' else 'faster'}")
                continue
            best = min(able, key=key)
            gain = describe_size_ratio(best) if word == "smallest" else describe_speedup(best)
            change = format_significance(best, format_figures(best)["change"])
            found.append(f"{word} within {margin}{where}: {named[id(best)]}, {gain}, {metric} {change}")
    return found
