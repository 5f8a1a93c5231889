"""Measure an artifact again, or any Hugging Face folder, with the code that measures every run."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from compress import artifact, plan, report
from compress.errors import UserError
from compress.measure import measure
from compress.metrics import metrics
from compress.models import same_labels
from compress.quiet import hush
from compress.run import bench, guarded
from compress.tasks import Task


def main(cfg: DictConfig) -> int:
    """Measure what the command line names, write and show its figures; 1 where that failed, with the reason told."""
    hush()
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)

    def work() -> None:
        rows = evaluate(cfg)
        report.conclude(folder, rows)
        if hydra.mode == RunMode.RUN:
            report.show(rows, folder)

    def fail(reason: str) -> None:
        name = str(OmegaConf.select(cfg, "artifact", default="", throw_on_missing=False))
        report.conclude(folder, [report.failed(report.Job(name, "", "", cfg.seed), reason)])

    return guarded(work, fail)


def evaluate(cfg: DictConfig) -> list[report.Row]:
    """A row for ``cfg.artifact``, after one for ``cfg.baseline`` where that is given.

    Raises:
        UserError: there is no such folder, or its model is not one for the task.
    """
    if OmegaConf.is_missing(cfg, "artifact"):
        raise UserError("No artifact is named: type artifact=FOLDER, the `artifact` folder of a run.")
    artifact.describe(cfg.artifact, kind="")  # a folder that is not there is told first
    settings = plan.settings(cfg)
    task = plan.parse(Task, task_of(cfg), "task")
    folders = [Path(folder) for folder in (cfg.baseline, cfg.artifact) if folder]
    loaded = {folder: artifact.load(folder, task.kind) for folder in folders}
    splits = task.load(settings.seed)
    for folder, one in loaded.items():
        fits(folder, one, splits.task)
    vocabularies = {json.dumps(one.tokenizer.get_vocab(), sort_keys=True) for one in loaded.values()}
    if task.kind == "lm" and len(vocabularies) > 1:
        raise UserError("Perplexities over different vocabularies cannot be compared: leave baseline out.")
    names = {
        folder: one.description.method if one.description.history else folder.name for folder, one in loaded.items()
    }
    if len(set(names.values())) < len(folders):
        names = {folder: str(folder) for folder in folders}
    benches = {names[folder]: bench(splits, folder, one, settings) for folder, one in loaded.items()}
    hardware = settings.hardware
    with ExitStack() as stack:
        for name, ready in benches.items() if hardware.runtime else ():
            graph = Path(stack.enter_context(TemporaryDirectory()))
            moved = artifact.move(ready.artifact, str(hardware.runtime), ready.texts[0], graph)
            benches[name] = replace(ready, artifact=moved)
        measurements = measure(benches, metrics(splits.task), hardware.latency, hardware.device)
    descriptions = {names[folder]: one.description for folder, one in loaded.items()}
    outcome = report.Outcome(task.primary, descriptions, measurements)
    model = loaded[folders[-1]].description.model
    return [report.row(report.Job(name, model, task.name, settings.seed), name, outcome) for name in measurements]


def task_of(cfg: DictConfig) -> dict:
    """The artifact's own task, with what the command line sets of it (``+task.path=...``), or the one it names."""
    own = Path(cfg.artifact) / "config.yaml"
    given = cfg.get("task") or {}
    if "name" not in given and own.is_file():
        given = OmegaConf.merge(OmegaConf.load(own).task, given)
    if "name" not in given:
        raise UserError(f"{cfg.artifact} says nothing of its task: name one as well (task=sst2).")
    return plan.plain(OmegaConf.create(given))


def fits(folder: Path, loaded: artifact.Artifact, task: Task) -> None:
    """Raise UserError where the model's head is not one for the task."""
    if task.kind == "lm":
        return
    config = loaded.model.config
    if config.num_labels != task.num_labels:
        raise UserError(
            f"The model in {folder} tells {config.num_labels} labels apart and task `{task.name}` has "
            f"{task.num_labels}: name the task that it was trained for (task=...)."
        )
    if not same_labels(config, task):
        raise UserError(
            f"The model in {folder} calls its labels {', '.join(config.id2label.values())} and task `{task.name}` has "
            f"{', '.join(task.labels or ())}, in this order: name the task that it was trained for (task=...)."
        )
