"""The story of a run: check the whole chain, fine-tune a baseline, apply stage after stage, measure, report."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch
from datasets import Dataset
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger

from compress import artifact, card, chain, packing, plan, promises, report, resume, together
from compress.artifact import Artifact, Description, Done
from compress.cache import MANIFEST, Cache, digest, environment, prune, remove
from compress.data import TaskData
from compress.errors import PostconditionError, UserError, causes, told
from compress.live import STAGE
from compress.measure import Bench, bench, measure
from compress.metrics import higher_is_better, metrics
from compress.models import compressed, max_length
from compress.plan import Plan, Settings, Step
from compress.predictions import FILE
from compress.quiet import hush
from compress.tasks import Splits
from compress.techniques import Training, trait
from compress.techniques.finetune import FineTune
from compress.techniques.prune import HoldZeros
from compress.together import Team

log = logging.getLogger(__name__)

FINISHED = "finished"
"""The file of a finished job: what it was, so that it is not done again."""


def main(cfg: DictConfig) -> int:
    """Run one job of the command line, write what came of it; 1 where it failed, with the reason told. A job that an
    earlier run into the same folder finished with the same config and code is left as it is."""
    hush()
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    said = ("technique=", "model=", "task=", "seed=")
    job = report.Job(
        method=str(OmegaConf.select(cfg, "technique.name", default="")),
        model=str(OmegaConf.select(cfg, "model.name", default="")),
        task=str(OmegaConf.select(cfg, "task.name", default="")),
        seed=cfg.get("seed", 0),
        overrides=tuple(override for override in hydra.overrides.task if not override.startswith(said)),
    )

    finished, key = folder / FINISHED, digest([resolved(cfg), environment()])
    first = os.environ.get("SLURM_PROCID", "0") == "0"

    def work() -> None:
        chain.leave_out(cfg.technique, hydra.overrides.task)
        with together.gathered(cfg, plan.settings(cfg).hardware, follow) as team:
            if team and team.rank:
                return follow(cfg, team)
            if finished.is_file() and finished.read_text() == key:
                log.info(f"finished before: {folder}")
                rows = json.loads((folder / report.RESULT).read_text())["rows"]
            else:
                for earlier in (FINISHED, report.RESULT, "tensorboard", "report", "predictions"):
                    remove(folder / earlier)
                rows = report.finish(folder, job, run(cfg, folder, team))
                report.write_whole(finished, key)
                remove(folder / STAGE)
        if hydra.mode == RunMode.RUN:  # a sweep shows one table of all its jobs at the end
            report.publish(folder, rows)
        return None

    def fail(reason: str) -> None:
        if first:
            for half in (finished, folder / "artifact"):
                remove(half)
            report.fail(folder, job, reason)

    return guarded(work, fail)


def resolved(cfg: DictConfig) -> Any:
    """What decides the result of a job; None where a value is missing, which the job will tell."""
    try:
        return {key: plan.plain(cfg[key]) for key in cfg if key != "cache"}
    except OmegaConfBaseException:
        return None


def guarded(work: Callable[[], None], fail: Callable[[str], None]) -> int:
    """0, or 1 where ``work`` raised: one sentence for what a user can put right, a traceback for what is our fault.

    Raises:
        SystemExit: the process was asked to stop, or what came of the work could not be written.
    """
    stop: BaseException | None = None
    try:
        with interruptible():
            work()
        return 0
    except (UserError, PostconditionError) as error:
        reason = str(error)
        log.error(reason)
    except Exception as error:
        reason = told(error) or f"{type(error).__name__}: {error}"
        (log.error if told(error) else log.exception)(reason)
    except (KeyboardInterrupt, SystemExit) as error:  # Lightning makes the second of the first
        kinds = tuple(map(type, causes(error)))
        by = "SIGTERM" if Terminated in kinds else "Ctrl-C" if KeyboardInterrupt in kinds else "a signal"
        reason = f"stopped by {by}: the same command into the same folder goes on with it"
        log.error(reason)
        stop = SystemExit(130) if by != "a signal" else error  # that of a cluster's handler
    try:
        fail(reason)
    except OSError as error:
        sys.exit(f"What came of the job could not be written. {told(error) or error}")
    if stop:
        raise stop
    return 1


class Terminated(KeyboardInterrupt):
    """SIGTERM, where nobody else has a use for it."""


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does, so that it is told; a cluster's own handler stays."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run(cfg: DictConfig, folder: Path, team: Team | None = None) -> report.Outcome:
    """Carry out the experiment that ``cfg`` describes; its artifact and figures are written to ``folder``. A ``team``
    trains with this process, its first.

    Raises:
        UserError: something in ``cfg`` cannot work, told before anything is loaded or trained.
        PostconditionError: a stage did not do what it says.
    """
    planned = plan.check(cfg)
    log.info(f"{planned.backbone.name} on {planned.task.name}: {planned.method}")
    splits = planned.task.load(planned.settings.seed)
    for note in splits.notes:
        log.info(f"  {note}")
    planned = planned.read(splits, team)
    plan.check_data(planned, splits)

    kept = planned.settings.cache
    if kept.mode == "off":
        kept = replace(kept, dir=str(folder / "cache"))
        planned = replace(planned, settings=replace(planned.settings, cache=kept))
    with Cache(kept.dir, refresh=kept.mode == "refresh") as cache:
        outcome = carry_out(cfg, planned, splits, cache, folder)
    if kept.mode == "off":
        remove(Path(kept.dir))
    elif kept.max_gb is not None:
        prune(Path(kept.dir), kept.max_gb)
    return outcome


def carry_out(cfg: DictConfig, planned: Plan, splits: Splits, cache: Cache, folder: Path) -> report.Outcome:
    """The baseline, stage after stage, and what the artifact is worth."""
    address = [planned.address(splits.fingerprint), plan.plain(planned.training)]
    running = partial(report.write_whole, folder / STAGE)
    running("baseline")
    baseline = source = cache.get(address, partial(start, planned, splits), "baseline")
    entries = {"baseline": baseline}
    begun = list(address)
    for step in planned.steps:
        running(step.key)
        address.append(step.address)
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
    loaded = {name: artifact.load(path, planned.task.kind) for name, path in measured.items()}
    benches = {name: bench_of(splits, measured[name], one, planned.settings) for name, one in loaded.items()}
    runtime, exported = loaded[planned.method].description.runtime, None
    if runtime != "torch":
        example = benches["none"].texts[0]
        key = [*begun, runtime, planned.steps[-1].address["libraries"]]
        name = f"baseline for {runtime}"
        graph = cache.get(key, lambda to: artifact.export(artifact.load(baseline), runtime, example, to), name)
        exported = artifact.exported(loaded["none"], runtime, graph)
    measurements, predictions = measure(
        benches,
        splits.task,
        planned.settings.hardware.latency,
        planned.settings.hardware.device,
        exported,
    )
    outcome = report.Outcome(
        primary=planned.task.primary,
        descriptions={name: one.description for name, one in loaded.items()},
        measurements=measurements,
        baseline=baseline.name,
        predictions=predictions,
        data=splits.fingerprint,
    )
    predictions[planned.method].save(into / FILE)
    (into / "measurement.json").write_text(json.dumps(asdict(measurements[planned.method]), indent=2))
    card.write(into, outcome, planned.method)
    return outcome


def follow(cfg: DictConfig, team: Team) -> None:
    """Train with the first process of the ``team`` whenever it trains; what comes of it is written by that one."""
    hush()
    logging.disable(logging.WARNING)
    planned = plan.check(cfg)
    splits = planned.task.load(planned.settings.seed)
    planned = planned.read(splits, team)
    steps = {step.key: step for step in planned.steps}
    while call := team.share(None):
        with TemporaryDirectory() as into:
            if call["stage"] == "baseline":
                start(planned, splits, Path(into))
            else:
                apply(planned, splits, steps[call["stage"]], Path(call["baseline"]), Path(call["source"]), Path(into))


def bench_of(splits: Splits, folder: Path, loaded: Artifact, settings: Settings) -> Bench:
    """An artifact with the test split in its own tokens."""
    data = task_data(splits, loaded.model, loaded.tokenizer, splits.task.batch_size, settings)
    return bench(folder, loaded, data, settings.hardware.latency)


def start(planned: Plan, splits: Splits, into: Path) -> None:
    """Write the baseline: the model with the task's head, fine-tuned."""
    call(planned, planned.training, stage="baseline")
    pl.seed_everything(planned.settings.seed, workers=True, verbose=False)
    model, tokenizer, trained = planned.backbone.build(planned.task, splits.train["text"])
    training = planned.training
    data = task_data(splits, model, tokenizer, training.batch_size, planned.settings)
    if data.max_length < planned.task.max_length:
        log.info(f"  texts are cut to the {data.max_length} tokens that the model has positions for")
    plan.check_blocks(planned, data)
    seconds = 0.0
    if training.epochs:
        module = FineTune(model, metrics(planned.task), training)
        seconds = fit(module, [], data, planned, training, into, "baseline")
    (into / "tensorboard").mkdir(exist_ok=True)
    untrained = "baseline: some of its weights are random and were not trained, so its quality means nothing"
    description = Description(
        kind=planned.task.kind,
        model=planned.backbone.name,
        task=planned.task.name,
        limits=() if trained or training.epochs else (untrained,),
        history=(Done("baseline", plan.plain(training), seconds, trained=training.epochs > 0),),
    )
    artifact.write(into, model, tokenizer, description)


def apply(planned: Plan, splits: Splits, step: Step, baseline: Path, source: Path, into: Path) -> None:
    """Write what ``step`` makes of the artifact in ``source``, its promises checked."""
    call(planned, step.training, stage=step.key, baseline=str(baseline), source=str(source))
    pl.seed_everything(planned.settings.seed, workers=True, verbose=False)
    model, tokenizer, description = artifact.load(source)
    packed = source if description.weights == "packed" else None
    if packed:
        packing.freeze(model, packing.packed_layers(packed))
    before = promises.state(model)
    text = step.calibration and step.calibration.rows
    data = task_data(splits, model, tokenizer, step.training.batch_size, planned.settings, text)
    scores = metrics(planned.task)
    with step.told():
        stage = step.build(
            model=model,
            metrics=scores,
            tokenizer=tokenizer,
            task=planned.task,
            baseline=baseline,
            source=source,
            keep_in=Path(planned.settings.cache.dir) / "teachers",
        )
    module = stage if isinstance(stage, pl.LightningModule) else FineTune(model, scores, step.training)
    callbacks = [] if module is stage else [stage]
    if before.zeros and step.training.epochs:
        callbacks.append(HoldZeros())
    with step.told():
        seconds = fit(module, callbacks, data, planned, step.training, into, step.key)
    model = compressed(module)
    promises.check_model(step.key, stage, before, model)

    if (cut := getattr(stage, "tokenizer", tokenizer)) is not tokenizer:  # the stage made one of its own
        tokenizer = cut
        data = task_data(splits, model, tokenizer, step.training.batch_size, planned.settings)
    probe = data.texts(4, "validation")
    expected = promises.logits(trait(stage, "exported") or model, probe)
    done = Done(step.name, step.settings, seconds, step.training.epochs > 0, trait(stage, "shrinks"))
    description = replace(
        description,
        runtime=trait(stage, "runtime"),
        weights=trait(stage, "leaves") or description.weights,
        limits=limits(planned, step, stage, description),
        history=(*description.history, done),
    )
    artifact.write(into, model, tokenizer, description, stage, packed if trait(stage, "leaves") is None else None)
    if hasattr(stage, "report"):
        (into / "report").mkdir()
        stage.report(into / "report")
    promises.check_folder(step.key, stage, source, into, expected, promises.logits(artifact.load(into).model, probe))
    if asked := trait(stage, "average_bits"):
        promises.check_bits(step.key, asked, model, into)


def limits(planned: Plan, step: Step, stage: Any, before: Description) -> tuple[str, ...]:
    """What the artifact cannot do for size or speed: in another runtime, nothing that earlier stages say of a format
    of theirs."""
    formats = {one.name for one in planned.steps if trait(one.technique, "leaves") not in ("float", None)}
    moved = trait(stage, "runtime") != before.runtime
    kept = [one for one in before.limits if not (moved and one.partition(":")[0] in formats)]
    own = trait(stage, "limits")
    return (*kept, *([f"{step.name}: {own}"] if own else []))


def call(planned: Plan, training: Training, **stage: str) -> None:
    """Have the others take part in a stage's training."""
    if planned.team and planned.team.rank == 0 and training.epochs:
        planned.team.share(stage)


class KeepBest(ModelCheckpoint):
    """Of several epochs, end the training with the weights of the one that was best on the validation split; an epoch
    in which a callback still prunes is none to end with. Of the two best, so that the better of those that a checkpoint
    knows is there when the training goes on from it."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if settled(trainer):
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if settled(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if not self.best_model_path:
            return
        best = torch.load(self.best_model_path, map_location=pl_module.device, weights_only=True)
        pl_module.load_state_dict(best["state_dict"])


def settled(trainer: pl.Trainer) -> bool:
    """Whether no callback has anything left to prune."""
    return all(getattr(callback, "settled", True) for callback in trainer.callbacks)  # type: ignore[attr-defined]


class Finite(pl.Callback):
    """Ends a training whose loss is no number any more."""

    resumes = True

    def __init__(self, key: str, training: Training) -> None:
        self.key = key
        self.training = training

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seldom = batch_idx % 10 == 0 or batch_idx + 1 == trainer.num_training_batches  # a GPU has to be waited for
        if seldom and not torch.isfinite(outputs["loss"]):
            raise UserError(
                f"The loss is {outputs['loss'].item()} after {trainer.global_step} steps of training: set "
                f"{self.key}.learning_rate below {self.training.learning_rate:g}, or train in hardware.precision="
                "32-true or bf16-mixed."
            )


class StageBar(TQDMProgressBar):
    """Lightning's progress bar under the stage's name."""

    def __init__(self, name: str) -> None:
        super().__init__(leave=False)
        self.name = name

    def init_train_tqdm(self) -> Any:
        bar = super().init_train_tqdm()
        bar.set_description(self.name)
        return bar


def task_data(
    splits: Splits, model: Any, tokenizer: Any, batch_size: int, settings: Settings, text: Dataset | None = None
) -> TaskData:
    """The splits, and other ``text`` to calibrate on, tokenised for ``model``."""
    length = max_length(model, tokenizer, splits.task.max_length)
    return TaskData(splits, tokenizer, length, batch_size, settings.seed, Path(settings.cache.dir) / "tokens", text)


def fit(
    module: pl.LightningModule,
    callbacks: list[pl.Callback],
    data: TaskData,
    planned: Plan,
    training: Training,
    into: Path,
    name: str,
) -> float:
    """One Trainer run; the seconds that it took, tokenising left out."""
    data.tokenised("train")
    data.tokenised("validation")
    best, logs, hardware = into / "checkpoints", into / "tensorboard", planned.settings.hardware
    checkpoints = resume.Checkpoints(into / "resume")
    resumes = training.epochs > 0 and all(trait(one, "resumes") for one in (module, *callbacks))
    team = planned.team if training.epochs else None
    last = checkpoints.last() if resumes else None
    if team and (shared := team.share(str(last) if last else "")):
        last = Path(shared)
    if last:
        log.info(f"  {name}: goes on after step {checkpoints.step(last):,} of its training")
    else:
        if training.epochs and not resumes and logs.exists():
            log.info(f"  {name}: was stopped, cannot go on within its training and starts again")
        for old in (best, logs):
            remove(old)
    if training.epochs:
        callbacks = [*callbacks, Finite("baseline" if name == "baseline" else f"technique.{name}.train", training)]
    if training.epochs > 1:
        primary = planned.task.primary
        mode = "max" if higher_is_better(primary) else "min"
        callbacks.append(
            KeepBest(best, monitor=f"validation/{primary}", mode=mode, save_weights_only=True, save_top_k=2)
        )
    bar = training.epochs > 0 and sys.stderr.isatty()
    trainer = pl.Trainer(
        max_epochs=training.epochs,
        **resume.where(hardware, together=team is not None),
        accumulate_grad_batches=training.accumulate,
        callbacks=[*callbacks, *([checkpoints] if resumes else []), *([StageBar(name)] if bar else [])],
        logger=TensorBoardLogger(into, name=logs.name, version="", purge_step=checkpoints.step(last) if last else None),
        default_root_dir=into,
        enable_checkpointing=resumes or training.epochs > 1,
        enable_progress_bar=bar,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=min(10, len(data.train_dataloader())),  # of a small task as well
    )
    begin = time.perf_counter()
    with team.training(hardware) if team else nullcontext():
        trainer.fit(module, datamodule=data, ckpt_path=last)
    if not trainer.state.finished or trainer.current_epoch < training.epochs:
        raise KeyboardInterrupt  # which Lightning has taken for an end
    return checkpoints.seconds + time.perf_counter() - begin
