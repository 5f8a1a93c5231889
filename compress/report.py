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
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import OmegaConf

from compress import board, curves, errors

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.table import Table

    from compress.artifact import Description
    from compress.measure import Measurement
    from compress.predictions import Predictions

log = logging.getLogger(__name__)

RESULT = "result.json"
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
LOST = "it left no result, as happens to a process that is killed, for want of memory perhaps"
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What was asked for on the command line."""

    method: str
    model: str
    task: str
    seed: int
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of it by method: the baseline first, then what is compared with it, if anything is.

    ``baseline`` is the address of the baseline: rows of one address are measurements of one artifact. ``data`` is the
    fingerprint of the task's splits.
    """

    primary: str
    descriptions: dict[str, Description]
    measurements: dict[str, Measurement]
    baseline: str = ""
    predictions: dict[str, Predictions] = field(default_factory=dict)
    data: str = ""


class SweepReport(Callback):
    """Hydra's callback at the end of a sweep: one table of all its rows, and curves over the numbers that it varied;
    exit status 1 if a job failed."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            folder = Path(config.hydra.sweep.dir)
            begun = (folder / "multirun.yaml").stat().st_mtime  # an earlier sweep into the folder is none of this one's
            rows = without_repeated_baselines(gather(folder, begun))
            publish(folder, rows)
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


def gather(folder: Path, begun: float = 0.0) -> list[Row]:
    """The rows of all jobs of a sweep in their order, of those that began at ``begun`` or later, or of one run; a job
    that left no result, killed perhaps, has failed."""
    configs = (config for config in folder.glob("*/.hydra/config.yaml") if config.stat().st_mtime >= begun)
    jobs = sorted((config.parents[1] for config in configs), key=job_number)
    rows: list[Row] = []
    for job in jobs or [folder] * (folder / RESULT).is_file():
        if (job / RESULT).is_file():
            found = json.loads((job / RESULT).read_text())["rows"]
        else:
            hydra = job / ".hydra"
            words: Any = OmegaConf.load(hydra / "overrides.yaml") if (hydra / "overrides.yaml").is_file() else []
            lost = asked(OmegaConf.load(hydra / "config.yaml"), words)
            found = [failed(replace(lost, method=lost.method or job.name), f"{LOST}: see {job}")]
        rows += [{**one, "folder": str(job)} for one in found]  # which may have been moved
    return rows


def asked(cfg: Any, overrides: Iterable[str]) -> Job:
    """The job of a config and of what was typed for it."""
    said = ("technique=", "model=", "task=", "seed=", "split=")  # which have columns of their own
    method, model, task = (
        str(OmegaConf.select(cfg, f"{key}.name", default="")) for key in ("technique", "model", "task")
    )
    typed = tuple(one for one in overrides if not one.startswith(said))
    return Job(method, model, task, cfg.get("seed", 0), typed)


def job_number(folder: Path) -> tuple[int, str]:
    """Jobs in the order of the sweep: their folders are named ``0_...``, ``1_...``, ``10_...``."""
    number = folder.name.split("_")[0]
    return (int(number) if number.isdigit() else sys.maxsize, folder.name)


def finish(folder: Path, job: Job, outcome: Outcome) -> list[Row]:
    """Write a completed job's results."""
    rows = rows_of(folder, job, outcome)
    conclude(folder, rows)
    board.write(folder / "tensorboard", rows[-1])
    return rows


def rows_of(folder: Path, job: Job, outcome: Outcome) -> list[Row]:
    """A row for everything that was measured, its predictions kept in ``folder``."""
    rows = []
    for number, method in enumerate(outcome.measurements):
        one = {**row(job, method, outcome), "folder": str(folder)}
        if method in outcome.predictions:
            one["predictions"] = f"predictions/{number}.npz"
            outcome.predictions[method].save(folder / one["predictions"])
        rows.append(one)
    return rows


def fail(folder: Path, job: Job, reason: str) -> None:
    """Write that a job failed, and why."""
    rows = [failed(job, reason)]
    conclude(folder, rows)
    board.write(folder / "tensorboard", rows[-1])


def failed(job: Job, reason: str) -> Row:
    return {**asdict(job), "overrides": " ".join(job.overrides), "status": "failed", "reason": reason}


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


def publish(folder: Path, rows: list[Row]) -> None:
    """Write the tables and the report of ``rows`` and show them."""
    show(record(folder, rows), folder)


def record(folder: Path, rows: list[Row]) -> list[Row]:
    """Write the tables and the report of ``rows``; the rows with what is known of them together."""
    from compress import html

    rows = corrected(rows)
    write(folder, rows)
    html.write(folder, rows)
    return rows


def corrected(rows: list[Row]) -> list[Row]:
    """The rows with ``p_holm``, their p-values corrected for being tested together."""
    from compress.stats import holm

    tested = [i for i, one in enumerate(rows) if one.get("p_value") is not None]
    fair = dict(zip(tested, holm([rows[i]["p_value"] for i in tested])))
    return [{**one, "p_holm": fair[i]} if i in fair else one for i, one in enumerate(rows)]


def row(job: Job, method: str, outcome: Outcome) -> Row:
    """One line of ``results.csv``. Times are seconds or milliseconds as named, sizes and memory are 10^6 bytes, quality
    is in fractions (perplexity apart); ``change`` is the primary metric less the baseline's."""
    from compress.effects import effects, zeros_alone
    from compress.predictions import worst

    description, measured = outcome.descriptions[method], outcome.measurements[method]
    baseline = next(iter(outcome.measurements.values()))
    compared = measured is not baseline
    quality, change = measured.quality, measured.comparison
    did = effects(description, measured, baseline) if compared else {}
    zeros = "dense zeros: " if compared and zeros_alone(description, measured, baseline) else ""
    writing, memory = measured.generation, measured.memory
    teachers = [
        one.quality[outcome.primary] for name, one in outcome.measurements.items() if name.startswith("teacher")
    ]
    taught = compared and not method.startswith("teacher") and teachers
    answered, before = outcome.predictions.get(method), next(iter(outcome.predictions.values()), None)
    lost = worst(before, answered, outcome.primary) if compared and before and answered else None
    return {
        "method": method,
        "size_mb": measured.size_bytes / 1e6,
        "latency_ms": measured.latency.median_ms,
        "accuracy": quality.get("accuracy", quality.get("subset_accuracy")),
        "training_time_s": description.training_time_s,
        "model": job.model,
        "task": job.task,
        "seed": job.seed,
        "overrides": " ".join(job.overrides),
        "status": "completed",
        "reason": "",
        "metric": outcome.primary,
        "value": quality[outcome.primary],
        "change": quality[outcome.primary] - baseline.quality[outcome.primary],
        "change_low": change.change.low if change else None,
        "change_high": change.change.high if change else None,
        "p_value": change.p_value if change else None,
        "churn": change.churn if change else None,
        "against_teacher": quality[outcome.primary] - teachers[0] if taught else None,
        "worst_slice": lost.name if lost else None,
        "worst_slice_change": lost.change if lost else None,
        "worst_slice_p_holm": lost.p_value if lost else None,
        **quality,
        "compression_ratio": baseline.size_bytes / measured.size_bytes,
        **interval("speedup", measured.speedup),
        **interval("speedup_same_runtime", measured.speedup_same_runtime),
        "effect": zeros + ", ".join(did.values()),
        **{f"effect_{name}": said for name, said in did.items()},
        "others_cpu": measured.others,
        "disturbed": measured.disturbed,
        "latency_low_ms": measured.latency.low_ms,
        "latency_high_ms": measured.latency.high_ms,
        "latency_mean_ms": measured.latency.mean_ms,
        "latency_sd_ms": measured.latency.sd_ms,
        "latency_p95_ms": measured.latency.p95_ms,
        "latency_p99_ms": measured.latency.p99_ms,
        **{f"batch_{size}_ms": spread.median_ms for size, spread in measured.batches.items()},
        "throughput_per_s": measured.throughput_per_s,
        "first_token_ms": writing.first_token.median_ms if writing else None,
        "per_token_ms": writing.per_token.median_ms if writing else None,
        "per_token_p95_ms": writing.per_token.p95_ms if writing else None,
        "prompt_tokens": writing.prompt_tokens if writing else None,
        "tokenizer_ms": measured.tokenizer_ms,
        "peak_memory_mb": memory.peak_bytes / 1e6 if memory else None,
        "model_memory_mb": memory.model_bytes / 1e6 if memory else None,
        "gpu_memory_mb": memory.gpu_bytes / 1e6 if memory and memory.gpu_bytes else None,
        "macs": measured.macs,
        "energy_j": measured.energy_j,
        "parameters": measured.parameters,
        "nonzeros": measured.nonzeros,
        "latency_tokens": measured.latency_tokens,
        "throughput_tokens": measured.throughput_tokens,
        "compression_time_s": description.compression_time_s,
        "measuring_time_s": measured.measuring_time_s,
        "run_time_s": measured.measuring_time_s + sum(done.seconds for done in description.history),
        "examples": measured.examples,
        "split": measured.split,
        "runtime": measured.runtime,
        "device": measured.device,
        "threads": measured.threads,
        "limits": " | ".join(description.limits),
        "baseline": outcome.baseline,
        "data": outcome.data,
    }


def interval(name: str, one: Any) -> dict[str, float | None]:
    """An interval as three columns."""
    parts = {"": "value", "_low": "low", "_high": "high"}
    return {f"{name}{end}": getattr(one, part) if one else None for end, part in parts.items()}


def without_repeated_baselines(rows: list[Row]) -> list[Row]:
    """Every job measures its baseline; of each the first measurement is kept."""
    seen: set[str] = set()
    kept: list[Row] = []
    for one in rows:
        again = one.get("baseline") in seen
        if one["method"] == "none" and one.get("baseline"):
            if again:
                continue
            seen.add(one["baseline"])
            settings = one["overrides"].split()
            one = {**one, "overrides": " ".join(o for o in settings if not o.lstrip("+").startswith("technique."))}
        kept.append(one)
    return kept


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


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


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


def title(rows: list[Row]) -> str:
    """What all rows have in common: models, tasks, and on what they were measured."""
    done = [one for one in rows if one["status"] == "completed"]

    def all_of(key: str, form: str) -> list[str]:
        return [form.format(value) for value in dict.fromkeys(one[key] for one in done)]

    models, tasks = (", ".join(dict.fromkeys(str(one[key]) for one in rows if one[key])) for key in ("model", "task"))
    split = " and ".join(dict.fromkeys(one.get("split", "test") for one in done))
    examples = all_of("examples", f"{{:,}} {split} examples")
    facts = [*examples, *all_of("device", "{}"), *all_of("threads", "{} threads")]
    return f"{models} on {tasks}" + (f": {', '.join(facts)}" if len(facts) == 3 else "")


def notes(rows: list[Row]) -> list[str]:
    """What the table alone does not say, each thing once."""
    done = [one for one in rows if one["status"] == "completed"]
    timed = [
        f"ms: one text, {one['latency_tokens']:.0f} tokens on average; texts/s: batches of texts of "
        f"{one['throughput_tokens']:.0f} tokens; faster: in turns with the baseline in one job"
        for one in done
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
        timed.append(f"*: p < 0.05 on the same examples, corrected for {tested} comparisons (Holm)")
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
    shares = [one["measuring_time_s"] / one["run_time_s"] for one in done if one.get("run_time_s")]
    if any(shares):
        timed.append(
            f"measuring took up to {max(shares):.0%} of the time of a run that finds nothing in the cache; its budget "
            "is hardware.latency"
        )
    nothing: dict[str, list[Row]] = defaultdict(list)
    for one in done:
        kept = [said for what in ("size", "speed", "memory") if (said := one.get(f"effect_{what}") or "")[:3] == "no "]
        zeros = "dense zeros: " if one["effect"].startswith("dense") else ""
        nothing[zeros + ", ".join(kept)].append(one)
    timed += [f"{together(same)}: {said}" for said, same in nothing.items() if said]
    found = [part for one in rows for part in one.get("limits", "").split(" | ") if part]
    lost = [f"{one['method']} failed: {one['reason']}" for one in rows if one["status"] == "failed"]
    return [*dict.fromkeys(timed), *dict.fromkeys(found), *lost]


def together(rows: list[Row]) -> str:
    return ", ".join(dict.fromkeys(one["method"] for one in rows))


def significant(one: Row) -> bool:
    """Whether the quality differs from the baseline's by more than chance, of all rows that were tested together."""
    return (one.get("p_holm") if one.get("p_holm") is not None else 1.0) < 0.05


def groups(rows: list[Row]) -> dict[tuple[str, ...], list[Row]]:
    """The completed rows that can be compared: of one model, task and metric."""
    found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for one in rows:
        if one["status"] == "completed":
            found[one["model"], one["task"], one["metric"]].append(one)
    return dict(found)


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
            told = drawn_figures(best)
            figure = (
                f"{told['MB']} MB, {told['smaller']} smaller"
                if word == "smallest"
                else f"{told['faster [95%]']} faster"
            )
            change = significance(best, told["change"])
            found.append(f"{word} within {margin}{where}: {named[id(best)]}, {figure}, {metric} {change}")
    return found


def is_smaller(one: Row) -> bool:
    return bool(one["compression_ratio"] > 1.005)


def is_faster(one: Row) -> bool:
    """Beyond chance."""
    return one["speedup_low"] is not None and one["speedup_low"] > 1


def is_near(one: Row) -> bool:
    return drop(one) <= 1 + 1e-7


def drop(one: Row) -> float:
    """What is lost of the baseline's quality: points, of a perplexity percent."""
    perplexity = one["metric"] == "perplexity"
    return float(100 * (one["change"] / (one["value"] - one["change"]) if perplexity else -one["change"]))


def significance(one: Row, change: str) -> str:
    """The change with its interval, and whether it may be chance."""
    if one.get("p_value") is None:
        return change
    p = one.get("p_holm", one["p_value"])
    low, high = (amount(one, one[key]).removesuffix(" pt") for key in ("change_low", "change_high"))
    return f"{change.rstrip('*')} [{low}, {high}], {'' if p < 0.05 else 'not '}significant (p = {p:.2g})"


def amount(one: Row, change: float) -> str:
    return f"{change:+.3f}" if one["metric"] == "perplexity" else f"{100 * change:+.2f} pt"


def varying(rows: list[Row]) -> list[str]:
    """What else than the method and its settings tells rows apart."""
    return [key for key in ("model", "task", "seed") if len({one[key] for one in rows if one["model"]}) > 1]


def labels(rows: list[Row]) -> list[str]:
    """A short name of each row that tells it from all others."""
    found = []
    for one, settings in zip(rows, apart(rows)):
        facts = [f"seed={one[key]}" if key == "seed" else str(one[key]) for key in varying(rows)]
        found.append(" ".join(filter(None, (one["method"], *facts, settings))))
    return found


@dataclass(frozen=True)
class Seeds:
    """One experiment with several seeds: its value, and its change against the baseline of each seed (None of the
    baseline itself), as a mean with Student's t interval."""

    label: str
    metric: str
    seeds: int
    value: Any
    change: Any


def over_seeds(rows: list[Row]) -> list[Seeds]:
    """The experiments of which there are several seeds."""
    from compress.stats import mean_interval

    same: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for one, settings in zip(rows, apart(rows)):
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


def table(rows: list[Row], width: int | None = None) -> Table:
    """The columns a person compares; settings show where they differ between rows. A terminal of ``width`` characters
    gets those that it has room for."""
    from rich.markup import escape
    from rich.table import Table

    drawn = Table(title=title(rows), title_justify="left")
    told = apart(rows)
    names = {"method": [one["method"] for one in rows]}
    for key in varying(rows):
        names[key] = [str(one[key]) for one in rows]
    if len(set(told)) > 1:
        names["settings"] = told
    columns = figures(rows)
    widths = fit(names, columns, width) if width else {}
    for name in names:
        drawn.add_column(name, overflow="fold", width=widths.get(name))
    for name in columns:
        drawn.add_column(escape(name if width else name.replace("\n", " ")), justify="right", no_wrap=True)
    for one, *cells in zip(rows, *names.values(), *columns.values()):
        drawn.add_row(*map(escape, cells), style="red" if one["status"] == "failed" else None)
    return drawn


def figures(rows: list[Row]) -> dict[str, list[str]]:
    """The columns of figures by their headings, those that say something: the parameters where they differ."""
    done = [one for one in rows if one["status"] == "completed"]
    metrics = ", ".join(dict.fromkeys(one["metric"] for one in done)) or "quality"
    drawn = [drawn_figures(one) if one["status"] == "completed" else {"value": "failed"} for one in rows]
    names = dict.fromkeys(name for one in drawn for name in one)
    if len({one["parameters"] for one in done}) < 2:
        names.pop("parameters", None)
    found = {metrics if name == "value" else name: [one.get(name, "") for one in drawn] for name in names}
    return {name: cells for name, cells in found.items() if any(cells)}


def fit(names: dict[str, list[str]], columns: dict[str, list[str]], width: int) -> dict[str, int]:
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


def apart(rows: list[Row]) -> list[str]:
    """Of each row's overrides those that not all rows share; a baseline knows no settings of techniques, and a job that
    was killed none at all."""
    compared = [set(one["overrides"].split()) for one in rows if one["method"] != "none" and one["model"]]
    shared = set.intersection(*compared) if compared else set()
    told = [[o.lstrip("+") for o in one["overrides"].split() if o not in shared] for one in rows]
    stages = {".".join(o.partition("=")[0].split(".")[:2]) for overrides in told for o in overrides}
    only = f"{stages.pop()}." if len(stages) == 1 else "technique."  # of one stage its name says nothing
    return [" ".join(override.removeprefix(only) for override in overrides) for overrides in told]


def drawn_figures(one: Row) -> dict[str, str]:
    """The figures of a completed row as text, by the heading of their column; a baseline is compared with nothing."""
    perplexity, baseline = one["metric"] == "perplexity", one["speedup"] is None
    to_teacher = one.get("against_teacher")
    return {
        "value": f"{one['value']:.3f}" if perplexity else f"{one['value']:.4f}",
        "change": "" if baseline else amount(one, one["change"]) + "*" * significant(one),
        "to teacher": "" if to_teacher is None else amount(one, to_teacher),
        "parameters": f"{one['parameters']:,}",
        "MB": f"{one['size_mb']:.2f}",
        "smaller": "" if baseline else f"{one['compression_ratio']:.2f}x",
        "ms": f"{one['latency_ms']:.2f}",
        "faster [95%]": ratio(one, "speedup"),
        "in its\nruntime [95%]": ratio(one, "speedup_same_runtime"),
        "texts/s": f"{one['throughput_per_s']:,.0f}",
        "train s": f"{one['training_time_s']:.1f}",
        "compress s": "" if baseline else f"{one['compression_time_s']:.1f}",
    }


def ratio(one: Row, key: str) -> str:
    """A ratio with its interval; empty where there is none."""
    if one.get(key) is None:
        return ""
    return f"{one[key]:.2f}x [{one[f'{key}_low']:.2f}, {one[f'{key}_high']:.2f}]"
