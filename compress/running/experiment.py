"""Run an experiment: baseline, stage after stage, measurement, report."""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import DictConfig, OmegaConf

from compress.artifacts.artifact import Artifact, load_artifact, read_description
from compress.artifacts.moving import export_artifact, load_exported_artifact, name_export_modules
from compress.cache.events import reveal_events
from compress.cache.files import remove_path, write_atomically
from compress.cache.sources import digest_source
from compress.cache.store import MANIFEST, Cache, prune_cache
from compress.exporting.agreement import read_agreement
from compress.measuring.bench import Bench, build_bench, list_texts
from compress.measuring.measure import measure_artifacts
from compress.measuring.predictions import FILE
from compress.planning.plan import Plan, check_data, make_plan
from compress.planning.settings import Settings
from compress.quiet import silence_libraries
from compress.reporting import jobs
from compress.reporting.card import write_card
from compress.reporting.folder import ARTIFACT, RunFolder
from compress.reporting.rows import Outcome
from compress.running.stages import apply_stage, write_baseline
from compress.running.team import Team
from compress.running.training import make_task_data
from compress.tasks.splits import Splits, load_splits

log = logging.getLogger(__name__)


def run_experiment(cfg: DictConfig, folder: Path) -> Outcome:
    """Run the experiment that ``cfg`` describes; write its artifact and figures to ``folder``.

    Raises:
        UserError: a setting cannot work; raised before anything is loaded or trained.
        PostconditionError: a stage broke one of its promises.
    """
    run = RunFolder(folder, key="folder")
    run.claim()
    outcome = execute_plan(cfg, *prepare_experiment(cfg), run, begun=time.time())
    run.commit()
    return outcome


def prepare_experiment(cfg: DictConfig, team: Team | None = None) -> tuple[Plan, Splits, list[Any]]:
    """Return the checked experiment, its data and the addresses of its stages.

    Args:
        team: the processes that train with this one, which is the first of them.
    """
    planned = make_plan(cfg)
    log.info(f"{planned.backbone.name} on {planned.task.name}: {planned.method}")
    asked = planned.harness if planned.settings.split == "test" else None
    harness = load_splits(asked, planned.settings.seed) if asked else None
    splits = replace(load_splits(planned.task, planned.settings.seed), harness=harness)
    for note in (*splits.notes, *(harness.notes if harness else ())):
        log.info(f"  {note}")
    planned = planned.read(splits, team)
    check_data(planned, splits)
    return planned, splits, planned.compute_addresses(splits.training_fingerprint)


def execute_plan(
    cfg: DictConfig, planned: Plan, splits: Splits, addresses: list[Any], run: RunFolder, begun: float
) -> Outcome:
    """Run the experiment with its cache, and write its artifact and figures to ``run.new``.

    With ``cache.mode=refresh``, entries from before ``begun`` are made again.
    """
    run.begin()
    caching = planned.settings.cache
    if caching.mode == "off":
        caching = replace(caching, dir=str(run.cache))
        planned = replace(planned, settings=replace(planned.settings, cache=caching))
    with Cache(caching.dir, since=begun if caching.mode == "refresh" else 0.0) as cache:
        outcome = run_chain(cfg, planned, splits, addresses, cache, run)
    if caching.mode == "off":
        remove_path(run.cache)
    elif caching.max_gb is not None:
        prune_cache(Path(caching.dir), caching.max_gb)
    return outcome


def run_chain(
    cfg: DictConfig, planned: Plan, splits: Splits, addresses: list[Any], cache: Cache, run: RunFolder
) -> Outcome:
    """Train the baseline, apply stage after stage, and measure the artifact."""
    folder = run.new
    # 1) Train the baseline and apply the stages
    address = addresses[:2]  # the baseline's
    mark_stage = partial(write_atomically, run.path / jobs.STAGE)
    mark_stage("baseline")
    baseline = source = cache.get(address, partial(write_baseline, planned, splits), "baseline")
    entries = {"baseline": baseline}
    for step, step_address in zip(planned.steps, addresses[2:]):
        mark_stage(step.key)
        address.append(step_address)
        source = cache.get(address, partial(apply_stage, planned, splits, step, baseline, source), step.key)
        entries[step.key] = source

    # 2) Copy the artifact, the logs and the stages' reports
    into = folder / ARTIFACT
    shutil.copytree(source, into, ignore=shutil.ignore_patterns("tensorboard", "report", MANIFEST))
    OmegaConf.save(cfg, into / "config.yaml", resolve=True)
    for number, (name, entry) in enumerate(entries.items()):
        shutil.copytree(entry / "tensorboard", folder / "tensorboard" / f"{number}_{name}", dirs_exist_ok=True)
        if (entry / "report").is_dir():
            shutil.copytree(entry / "report", folder / "report" / f"{number}_{name}", dirs_exist_ok=True)
    reveal_events(folder / "tensorboard")

    # 3) Load what is measured: the baseline, teachers, the artifact
    teachers = [step.arguments["teacher"] for step in planned.steps if step.arguments.get("teacher")]
    measured = {
        "none": baseline,
        **{"teacher" if len(teachers) == 1 else f"teacher {i}": Path(teacher) for i, teacher in enumerate(teachers, 1)},
        **({planned.method: into} if planned.steps else {}),
    }
    mark_stage("measuring")
    runtime, graph = read_description(into).runtime, None
    if runtime != "torch":  # before the loaded artifacts take memory
        key = [*addresses[:2], runtime, addresses[-1]["libraries"], digest_source(*name_export_modules(runtime))]
        graph = cache.get(key, partial(export_baseline, planned, splits, baseline, runtime), f"baseline for {runtime}")
    loaded = {name: load_artifact(path, planned.task.kind) for name, path in measured.items()}
    benches = {name: make_split_bench(splits, measured[name], each, planned.settings) for name, each in loaded.items()}
    exported = load_exported_artifact(loaded["none"], runtime, graph) if graph else None

    # 4) Measure, and write the results
    measurements, predictions = measure_artifacts(
        benches,
        splits.measured.task,
        planned.settings.hardware.latency,
        planned.settings.hardware.serving_device,
        exported,
    )
    outcome = Outcome(
        primary=splits.measured.task.primary,
        descriptions={name: each.description for name, each in loaded.items()},
        measurements=measurements,
        baseline=baseline.name,
        predictions=predictions,
        agreements={planned.method: agreement} if (agreement := read_agreement(source / "report")) else {},
        data=splits.measured.fingerprint,
        texts=list_texts(benches["none"]),
    )
    predictions[planned.method].save(into / FILE)
    (into / "measurement.json").write_text(json.dumps(asdict(measurements[planned.method]), indent=2), encoding="utf-8")
    write_card(into, outcome, planned.method)
    return outcome


def export_baseline(planned: Plan, splits: Splits, baseline: Path, runtime: str, into: Path) -> None:
    """Write the baseline for another runtime; a chain that ends on that runtime is compared with it too."""
    loaded = load_artifact(baseline, planned.task.kind)
    data = make_task_data(splits, loaded.model, loaded.tokenizer, splits.task.batch_size, planned.settings)
    (example,) = data.texts(1, "validation")
    export_artifact(loaded, runtime, example, into)


def follow_first_process(cfg: DictConfig, team: Team) -> None:
    """Train with the first process of the ``team`` whenever it trains; that process writes the results."""
    silence_libraries()
    logging.disable(logging.WARNING)
    planned = make_plan(cfg)
    splits = load_splits(planned.task, planned.settings.seed)
    planned = planned.read(splits, team)
    steps = {step.key: step for step in planned.steps}
    while call := team.share(None):
        with TemporaryDirectory() as into:
            if call["stage"] == "baseline":
                write_baseline(planned, splits, Path(into))
            else:
                apply_stage(
                    planned, splits, steps[call["stage"]], Path(call["baseline"]), Path(call["source"]), Path(into)
                )


def make_split_bench(splits: Splits, folder: Path, loaded: Artifact, settings: Settings) -> Bench:
    """Return an artifact with the split that it is measured on, encoded by its own tokenizer."""
    splits = splits.measured
    data = make_task_data(splits, loaded.model, loaded.tokenizer, splits.task.batch_size, settings)
    return build_bench(folder, loaded, data, settings.hardware.latency, settings.split)
