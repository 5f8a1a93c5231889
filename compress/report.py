"""What came of a run or a sweep: ``results.csv``, ``.parquet`` and ``.md``, and the terminal's table; ``html.py`` draws
``report.html`` and ``board.py`` writes for TensorBoard.

Importing this module is cheap: Hydra does so before every job.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import os
import platform
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

from compress import board, curves, errors
from compress.quiet import hush_logs
from compress.results import (
    RESULT,
    Job,
    Outcome,
    Row,
    corrected,
    failed,
    gather,
    groups,
    is_faster,
    is_near,
    is_smaller,
    rows_of,
    significant,
    without_repeated_baselines,
    write_whole,
)
from compress.tables import drawn_figures, faster_by, labels, significance, smaller_by, table, title, together

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

CONCLUSIONS = "search.txt"
"""What a search has chosen, a line each."""
FIRST = (
    "method",
    "size_mb",
    "latency_ms",
    "accuracy",
    "training_time_s",
    "model",
    "task",
    "seed",
    "overrides",
    "status",
)
LIBRARIES = (
    "torch",
    "transformers",
    "pytorch-lightning",
    "torchmetrics",
    "tokenizers",
    "compressed-tensors",
    "bitsandbytes",
    "onnxruntime",
    "openvino",
    "nncf",
)


class SweepReport(Callback):
    """Hydra's callback at the end of a sweep: one table of all its rows, and curves over the numbers that it varied;
    exit status 1 if a job failed."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        hush_logs()  # the jobs, which hush more, may have run elsewhere
        try:
            folder = Path(config.hydra.sweep.dir)
            begun = (folder / "multirun.yaml").stat().st_mtime  # an earlier sweep into the folder is none of this one's
            rows = publish(folder, without_repeated_baselines(gather(folder, begun)))
            if curves.write(folder, rows):
                print(f"  curves: {folder / 'curves'}")
            board.overlay(folder, rows, labels(rows))
            print(f"  TensorBoard: tensorboard --logdir {folder / 'tensorboard'}")
        except Exception as error:  # which Hydra would turn into a warning, and the sweep into a success
            reason = errors.told(error)
            (log.error if reason else log.exception)(f"The sweep's report could not be written. {reason or ''}")
            sys.exit(1)
        if any(one["status"] == "failed" for one in rows):
            sys.exit(1)


def finish(folder: Path, job: Job, outcome: Outcome) -> list[Row]:
    """Write a completed job's results."""
    rows = rows_of(folder, job, outcome)
    conclude(folder, rows)
    board.write(folder / "tensorboard", rows[-1])
    return rows


def fail(folder: Path, job: Job, reason: str) -> None:
    """Write that a job failed, and why."""
    rows = [failed(job, reason)]
    conclude(folder, rows)
    board.write(folder / "tensorboard", rows[-1])


def conclude(folder: Path, rows: list[Row]) -> None:
    """Write a job's rows, for the sweep's report to find and for people."""
    write_whole(folder / RESULT, json.dumps({"rows": rows, "environment": environment()}, indent=2))
    write(folder, rows)


def environment() -> dict[str, str]:
    """Where the figures come from."""
    from importlib.metadata import PackageNotFoundError, version

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    found = {
        "system": platform.platform(),
        "cpu": f"{next(named, platform.processor())}, {os.cpu_count()} logical cores",
        "python": platform.python_version(),
    }
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def publish(folder: Path, rows: list[Row]) -> list[Row]:
    """Write the tables and the report of ``rows`` and show them; the rows with what is known of them together."""
    rows = record(folder, rows)
    show(rows, folder)
    return rows


def record(folder: Path, rows: list[Row]) -> list[Row]:
    """Write the tables and the report of ``rows``; the rows with what is known of them together."""
    from compress import html

    rows = corrected(rows)
    write(folder, rows)
    html.write(folder, rows)
    return rows


def write(folder: Path, rows: list[Row]) -> None:
    """Write ``results.csv``, ``results.parquet`` and ``results.md``."""
    import pandas

    text = io.StringIO()
    columns = list(dict.fromkeys((*FIRST, *(name for one in rows for name in one))))
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(folder / "results.csv", text.getvalue())
    pandas.DataFrame(rows, columns=columns).to_parquet(folder / "results.parquet")
    write_whole(folder / "results.md", markdown(rows, conclusions(folder, rows)))


def markdown(rows: list[Row], concluded: list[str]) -> str:
    """The table as Markdown, and under it what to conclude and how to read it."""
    from rich import box
    from rich.console import Console

    drawn = table(rows)
    drawn.box, drawn.title, drawn.caption = box.MARKDOWN, None, None
    text = io.StringIO()
    Console(file=text, width=1000).print(drawn)
    lines = [f"# {title(rows)}", "", *(line.strip() for line in text.getvalue().strip().splitlines()), ""]
    lines += [f"- {note}" for note in (*concluded, *notes(rows))]
    return "\n".join(lines) + "\n"


def show(rows: list[Row], folder: Path) -> None:
    """Draw the table in the terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    console.print()
    console.print(table(rows, console.width))
    for line in conclusions(folder, rows):
        console.print(f"  {line}", markup=False)
    for note in notes(rows):
        console.print(f"  {note}", style="dim")
    console.print(f"  results: {folder}", soft_wrap=True)


def notes(rows: list[Row]) -> list[str]:
    """What the table alone does not say, each thing once."""
    done = [one for one in rows if one["status"] == "completed"]
    every = groups(rows)
    timed = [
        f"{f'{model} on {task}: ' if len(every) > 1 else ''}ms: one text, on average of {lengths(group, 'latency')}; "
        f"texts/s: batches of texts of {lengths(group, 'throughput')}; faster: in turns with the baseline in one job"
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
            f"{together(disturbed)}: others took up to {most:.0%} of the CPUs in the meantime, so that its times are "
            "unsure"
        )
    tested = sum(one.get("p_holm") is not None for one in rows)
    if any(significant(one) for one in rows):
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
    timed += [f"{together(same)}: {said}" for said, same in nothing.items()]
    found = [part for one in rows for part in one.get("limits", "").split(" | ") if part]
    lost = [f"{one['method']} failed: {one['reason']}" for one in rows if one["status"] == "failed"]
    return [*dict.fromkeys(timed), *dict.fromkeys(found), *lost]


def lengths(rows: list[Row], what: str) -> str:
    """Tokens of the texts that were timed, and which rows read these as more or fewer of them."""
    found: dict[str, list[Row]] = defaultdict(list)
    for one in rows:
        found[f"{one[f'{what}_tokens']:.0f}"].append(one)
    first, *others = found
    return "".join([f"{first} tokens", *(f" ({number} by {together(found[number])})" for number in others)])


def conclusions(folder: Path, rows: list[Row]) -> list[str]:
    """What a search has chosen by other figures than these, which then choose nothing; else what they recommend."""
    said = folder / CONCLUSIONS
    return said.read_text().splitlines() if said.is_file() else recommendations(rows)


def recommendations(rows: list[Row]) -> list[str]:
    """The smallest and the fastest row whose quality is within a point of its baseline's (a hundredth of a
    perplexity), for each model and task."""
    found = []
    for (model, task, metric), group in groups(rows).items():
        if len(group) < 2:
            continue
        named = {id(one): label for one, label in zip(group, labels(group))}
        where = f" ({model} on {task})" if len(groups(rows)) > 1 else ""
        near = [one for one in group if one["method"] != "none" and is_near(one)]
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
            gain = smaller_by(best) if word == "smallest" else faster_by(best)
            change = significance(best, drawn_figures(best)["change"])
            found.append(f"{word} within {margin}{where}: {named[id(best)]}, {gain}, {metric} {change}")
    return found
