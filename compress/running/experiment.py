"""Run an experiment: baseline, stage after stage, measurement, report."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import DictConfig, OmegaConf

from compress.artifacts import artifact, moving
from compress.artifacts.artifact import Artifact
from compress.cache import files
from compress.cache.files import remove
from compress.cache.store import BEGAN, MANIFEST, Cache, prune
from compress.exporting.agreement import agreed
from compress.measuring.bench import Bench, bench
from compress.measuring.measure import measure
from compress.measuring.predictions import FILE
from compress.planning import plan
from compress.planning.plan import Plan
from compress.planning.settings import Settings
from compress.quiet import hush
from compress.reporting import card, jobs
from compress.reporting.rows import Outcome
from compress.running.stages import apply, start
from compress.running.team import Team
from compress.running.training import task_data
from compress.tasks.splits import Splits, load_splits

log = logging.getLogger(__name__)


def run(cfg: DictConfig, folder: Path) -> Outcome:
    """Carry out the experiment that ``cfg`` describes; its artifact and figures are written to ``folder``.

    Raises:
        UserError: something in ``cfg`` cannot work, told before anything is loaded or trained.
        PostconditionError: a stage did not do what it says.
    """
    return carry_out(cfg, *prepared(cfg), folder)


def prepared(cfg: DictConfig, team: Team | None = None) -> tuple[Plan, Splits, list[Any]]:
    """The experiment, checked, its data, and the addresses of its stages. A ``team`` trains with this process, its
    first."""
    planned = plan.check(cfg)
    log.info(f"{planned.backbone.name} on {planned.task.name}: {planned.method}")
    splits = load_splits(planned.task, planned.settings.seed)
    for note in splits.notes:
        log.info(f"  {note}")
    planned = planned.read(splits, team)
    plan.check_data(planned, splits)
    return planned, splits, planned.addresses(splits.fingerprint)


def carry_out(
    cfg: DictConfig, planned: Plan, splits: Splits, addresses: list[Any], folder: Path, begun: float = BEGAN
) -> Outcome:
    """The experiment with the cache that it asks for: to refresh it is to take nothing from before ``begun``."""
    kept = planned.settings.cache
    if kept.mode == "off":
        kept = replace(kept, dir=str(folder / "cache"))
        planned = replace(planned, settings=replace(planned.settings, cache=kept))
    with Cache(kept.dir, since=begun if kept.mode == "refresh" else 0.0) as cache:
        outcome = through(cfg, planned, splits, addresses, cache, folder)
    if kept.mode == "off":
        remove(Path(kept.dir))
    elif kept.max_gb is not None:
        prune(Path(kept.dir), kept.max_gb)
    return outcome


def through(
    cfg: DictConfig, planned: Plan, splits: Splits, addresses: list[Any], cache: Cache, folder: Path
) -> Outcome:
    """The baseline, stage after stage, and what the artifact is worth."""
    address = addresses[:2]  # of the baseline
    running = partial(files.write_whole, folder / jobs.STAGE)
    running("baseline")
    baseline = source = cache.get(address, partial(start, planned, splits), "baseline")
    entries = {"baseline": baseline}
    for step, own in zip(planned.steps, addresses[2:]):
        running(step.key)
        address.append(own)
        source = cache.get(address, partial(apply, planned, splits, step, baseline, source), step.key)
        entries[step.key] = source

    into = folder / "artifact"
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(source, into, ignore=shutil.ignore_patterns("tensorboard", "report", MANIFEST))
    OmegaConf.save(cfg, into / "config.yaml", resolve=True)
    for number, (name, entry) in enumerate(entries.items()):
        shutil.copytree(entry / "tensorboard", folder / "tensorboard" / f"{number}_{name}", dirs_exist_ok=True)
        if (entry / "report").is_dir():
            shutil.copytree(entry / "report", folder / "report" / f"{number}_{name}", dirs_exist_ok=True)

    teachers = [step.arguments["teacher"] for step in planned.steps if step.arguments.get("teacher")]
    measured = {
        "none": baseline,
        **{"teacher" if len(teachers) == 1 else f"teacher {i}": Path(one) for i, one in enumerate(teachers, 1)},
        **({planned.method: into} if planned.steps else {}),
    }
    running("measuring")
    runtime, graph = artifact.describe(into).runtime, None
    if runtime != "torch":  # before what is measured takes memory
        key = [*addresses[:2], runtime, addresses[-1]["libraries"]]
        graph = cache.get(key, partial(export, planned, splits, baseline, runtime), f"baseline for {runtime}")
    loaded = {name: artifact.load(path, planned.task.kind) for name, path in measured.items()}
    benches = {name: bench_of(splits, measured[name], one, planned.settings) for name, one in loaded.items()}
    exported = moving.exported(loaded["none"], runtime, graph) if graph else None
    measurements, predictions = measure(
        benches,
        splits.task,
        planned.settings.hardware.latency,
        planned.settings.hardware.device,
        exported,
    )
    outcome = Outcome(
        primary=planned.task.primary,
        descriptions={name: one.description for name, one in loaded.items()},
        measurements=measurements,
        baseline=baseline.name,
        predictions=predictions,
        agreements={planned.method: agreement} if (agreement := agreed(source / "report")) else {},
        data=splits.fingerprint,
    )
    predictions[planned.method].save(into / FILE)
    (into / "measurement.json").write_text(json.dumps(asdict(measurements[planned.method]), indent=2))
    card.write(into, outcome, planned.method)
    return outcome


def export(planned: Plan, splits: Splits, baseline: Path, runtime: str, into: Path) -> None:
    """The baseline as another runtime runs it, what a chain that ends there is compared with besides."""
    loaded = artifact.load(baseline, planned.task.kind)
    example = bench_of(splits, baseline, loaded, planned.settings).texts[0]
    moving.export(loaded, runtime, example, into)


def follow(cfg: DictConfig, team: Team) -> None:
    """Train with the first process of the ``team`` whenever it trains; what comes of it is written by that one."""
    hush()
    logging.disable(logging.WARNING)
    planned = plan.check(cfg)
    splits = load_splits(planned.task, planned.settings.seed)
    planned = planned.read(splits, team)
    steps = {step.key: step for step in planned.steps}
    while call := team.share(None):
        with TemporaryDirectory() as into:
            if call["stage"] == "baseline":
                start(planned, splits, Path(into))
            else:
                apply(planned, splits, steps[call["stage"]], Path(call["baseline"]), Path(call["source"]), Path(into))


def bench_of(splits: Splits, folder: Path, loaded: Artifact, settings: Settings) -> Bench:
    """An artifact with the split that it is measured on in its own tokens."""
    data = task_data(splits, loaded.model, loaded.tokenizer, splits.task.batch_size, settings)
    return bench(folder, loaded, data, settings.hardware.latency, settings.split)
