"""The story of a run: check the whole chain, fine-tune a baseline, apply stage after stage, measure, report."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger

from compress import artifact, card, plan, promises, report
from compress.artifact import Artifact, Description, Done
from compress.cache import Cache, fingerprint
from compress.data import TaskData
from compress.errors import PostconditionError, UserError
from compress.measure import measure
from compress.metrics import higher_is_better, metrics
from compress.models import max_length
from compress.plan import Hardware, Plan, Step
from compress.quiet import hush
from compress.tasks import Splits
from compress.techniques import Training, trait
from compress.techniques.finetune import FineTune
from compress.techniques.prune import HoldZeros

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> int:
    """Run one job of the command line, write what came of it; 1 where it failed, with the reason told."""
    hush()
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    said = ("technique=", "model=", "task=", "seed=", "experiment=")
    job = report.Job(
        method=cfg.technique.name,
        model=cfg.model.name,
        task=cfg.task.name,
        seed=cfg.seed,
        overrides=tuple(override for override in hydra.overrides.task if not override.startswith(said)),
    )

    def work() -> None:
        rows = report.finish(folder, job, run(cfg, folder))
        if hydra.mode == RunMode.RUN:  # a sweep shows one table of all its jobs at the end
            report.show(rows, folder)

    return guarded(work, lambda reason: report.fail(folder, job, reason))


def guarded(work: Callable[[], None], fail: Callable[[str], None]) -> int:
    """0, or 1 where ``work`` raised: one sentence for what a user can put right, a traceback for what is our fault."""
    try:
        work()
        return 0
    except (UserError, PostconditionError) as error:
        reason = str(error)
        log.error(reason)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        log.exception(reason)
    fail(reason)
    return 1


def run(cfg: DictConfig, folder: Path) -> report.Outcome:
    """Carry out the experiment that ``cfg`` describes; its artifact and figures are written to ``folder``.

    Raises:
        UserError: something in ``cfg`` cannot work, told before anything is loaded or trained.
        PostconditionError: a stage did not do what it says.
    """
    planned = plan.check(cfg)
    log.info(f"{planned.backbone.name} on {planned.task.name}: {planned.method}")
    splits = planned.task.load(cfg.seed)
    for note in splits.notes:
        log.info(f"  {note}")
    planned = replace(planned, task=splits.task)

    cache = Cache(cfg.cache.dir)
    steps: list[Any] = [planned.address(fingerprint(planned.backbone.path), splits.fingerprint), planned.training]
    entries = [cache.get(steps, partial(start, planned, splits), "baseline")]
    for step in planned.steps:
        steps.append(step.address)
        entries.append(cache.get(steps, partial(apply, planned, splits, step, entries[-1]), step.key))

    into = folder / "artifact"
    shutil.copytree(entries[-1], into, ignore=shutil.ignore_patterns("tensorboard"), dirs_exist_ok=True)
    for number, (entry, name) in enumerate(zip(entries, ["baseline", *(step.key for step in planned.steps)])):
        shutil.copytree(entry / "tensorboard", folder / "tensorboard" / f"{number}_{name}", dirs_exist_ok=True)
    OmegaConf.save(cfg, into / "config.yaml", resolve=True)

    rows = {"none": artifact.load(entries[0])}
    if planned.steps:
        rows[planned.method] = artifact.load(into)
    measurements = measure(
        {name: (entries[0] if name == "none" else into, loaded) for name, loaded in rows.items()},
        *bench(splits, rows["none"], planned.hardware, cfg.seed, cache.folder),
    )
    outcome = report.Outcome(
        primary=planned.task.primary,
        descriptions={name: loaded.description for name, loaded in rows.items()},
        measurements=measurements,
    )
    card.write(into, outcome, planned.method)
    return outcome


def bench(splits: Splits, loaded: Artifact, machine: Hardware, seed: int, tokens: Path) -> tuple:
    """What :func:`measure` needs besides artifacts: metrics, the test split, texts to time, how, and where."""
    task = splits.task
    data = task_data(splits, loaded.model, loaded.tokenizer, task.batch_size, seed, tokens)
    return metrics(task), data.test_dataloader(), data.texts(machine.latency.texts), machine.latency, machine.device


def start(planned: Plan, splits: Splits, into: Path) -> None:
    """Write the baseline: the model with the task's head, fine-tuned."""
    model, tokenizer = planned.backbone.build(planned.task, splits.train["text"])
    training = planned.training
    data = task_data(splits, model, tokenizer, training.batch_size, planned.seed, into.parent)
    seconds = 0.0
    if training.epochs:
        seconds = fit(FineTune(model, metrics(planned.task), training), [], data, planned, training, into, "baseline")
    (into / "tensorboard").mkdir(exist_ok=True)
    done = Done("baseline", plan.plain(training), seconds, trained=training.epochs > 0)
    description = Description(
        kind=planned.task.kind, model=planned.backbone.name, task=planned.task.name, history=(done,)
    )
    artifact.write(into, model, tokenizer, description, stage=None)


def apply(planned: Plan, splits: Splits, step: Step, source: Path, into: Path) -> None:
    """Write what ``step`` makes of the artifact in ``source``, its promises checked."""
    model, tokenizer, description = artifact.load(source)
    before = promises.state(model)
    data = task_data(splits, model, tokenizer, step.training.batch_size, planned.seed, into.parent)
    stage = step.build(model, metrics(planned.task))
    if isinstance(stage, pl.LightningModule):
        module, callbacks = stage, []
    else:
        module, callbacks = FineTune(model, metrics(planned.task), step.training), [stage]
    if before.zeros and step.training.epochs:
        callbacks.append(HoldZeros())
    seconds = fit(module, callbacks, data, planned, step.training, into, step.key)
    promises.check_model(step.key, stage, before, model)

    probe = data.texts(4)
    expected = promises.logits(model, probe)
    done = Done(step.name, step.settings, seconds, trained=step.training.epochs > 0)
    limits = trait(stage, "limits")
    artifact.write(
        into,
        model,
        tokenizer,
        replace(
            description,
            runtime=trait(stage, "runtime"),
            weights=trait(stage, "leaves"),
            limits=(*description.limits, f"{step.name}: {limits}") if limits else description.limits,
            history=(*description.history, done),
        ),
        stage,
    )
    promises.check_folder(step.key, stage, source, into, expected, promises.logits(artifact.load(into).model, probe))


class StageBar(TQDMProgressBar):
    """Lightning's progress bar under the stage's name."""

    def __init__(self, name: str) -> None:
        super().__init__(leave=False)
        self.name = name

    def init_train_tqdm(self) -> Any:
        bar = super().init_train_tqdm()
        bar.set_description(self.name)
        return bar


def task_data(splits: Splits, model: Any, tokenizer: Any, batch_size: int, seed: int, tokens: Path) -> TaskData:
    """The splits tokenised for ``model``; tokens are kept in the folder ``tokens``."""
    length = max_length(model, tokenizer, splits.task.max_length)
    return TaskData(splits, tokenizer, length, batch_size, seed, tokens)


def fit(
    module: pl.LightningModule,
    callbacks: list[pl.Callback],
    data: TaskData,
    planned: Plan,
    training: Training,
    into: Path,
    name: str,
) -> float:
    """One Trainer run; seconds. Of several epochs the best on the validation split is kept."""
    pl.seed_everything(planned.seed, workers=True, verbose=False)
    bar = training.epochs > 0 and sys.stderr.isatty()
    best = None
    if training.epochs > 1:
        primary = planned.task.primary
        best = ModelCheckpoint(
            into / "checkpoints",
            monitor=f"validation/{primary}",
            mode="max" if higher_is_better(primary) else "min",
            save_weights_only=True,
        )
    trainer = pl.Trainer(
        max_epochs=training.epochs,
        accelerator=planned.hardware.device.type,
        devices=1,
        precision=planned.hardware.precision,  # type: ignore[arg-type]
        callbacks=[*callbacks, *filter(None, [best]), *([StageBar(name)] if bar else [])],
        logger=TensorBoardLogger(into, name="tensorboard", version=""),
        default_root_dir=into,
        enable_checkpointing=best is not None,
        enable_progress_bar=bar,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
    )
    begin = time.perf_counter()
    trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - begin
    if trainer.interrupted:
        raise KeyboardInterrupt
    if best is not None:
        module.load_state_dict(torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"])
        shutil.rmtree(into / "checkpoints")
    return seconds
