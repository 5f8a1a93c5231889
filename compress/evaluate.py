"""Measure an artifact again, or any Hugging Face folder, with the code that measures every run."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from compress import artifact, plan, report
from compress.errors import UserError
from compress.measure import measure
from compress.quiet import hush
from compress.run import bench, guarded
from compress.tasks import Task


def main(cfg: DictConfig) -> int:
    """Measure what the command line names, write and show its figures; 1 where that failed, with the reason told."""
    hush()
    folder = Path(HydraConfig.get().runtime.output_dir)
    return guarded(lambda: report.publish(folder, evaluate(cfg)), lambda reason: None)


def evaluate(cfg: DictConfig) -> list[report.Row]:
    """A row for ``cfg.artifact``, after one for ``cfg.baseline`` where that is given.

    Raises:
        UserError: there is no such folder, or its model is not one for the task.
    """
    if OmegaConf.is_missing(cfg, "artifact"):
        raise UserError("No artifact is named: type artifact=FOLDER, the `artifact` folder of a run.")
    task = plan.parse(Task, task_of(cfg), "task")
    machine = plan.hardware(cfg.hardware)
    folders = [Path(folder) for folder in (cfg.baseline, cfg.artifact) if folder]
    loaded = {folder: artifact.load(folder, task.kind) for folder in folders}
    splits = task.load(cfg.seed)
    for folder, one in loaded.items():
        fits(folder, one, splits.task)
    names = {
        folder: one.description.method if one.description.history else folder.name for folder, one in loaded.items()
    }
    if len(set(names.values())) < len(folders):
        names = {folder: str(folder) for folder in folders}
    measurements = measure(
        {names[folder]: (folder, one) for folder, one in loaded.items()},
        *bench(splits, loaded[folders[0]], machine, cfg.seed, Path(cfg.cache.dir)),
    )
    outcome = report.Outcome(
        primary=task.primary,
        descriptions={names[folder]: one.description for folder, one in loaded.items()},
        measurements=measurements,
    )
    model = loaded[folders[-1]].description.model
    return [report.row(report.Job(name, model, task.name, cfg.seed), name, outcome) for name in measurements]


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
    labels = getattr(loaded.model.config, "num_labels", task.num_labels)
    if task.kind != "lm" and labels != task.num_labels:
        raise UserError(
            f"The model in {folder} tells {labels} labels apart and task `{task.name}` has {task.num_labels}: name the "
            "task that it was trained for (task=...)."
        )
