"""What the baseline and every stage do: train, keep what they promise, write an artifact."""

from __future__ import annotations

import functools
import gc
import logging
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from datasets import Dataset
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger

from compress import artifact, packing, plan, promises, resume
from compress.artifact import Description, Done
from compress.batch_size import fitted
from compress.cache import remove
from compress.data import TaskData
from compress.errors import UserError
from compress.metrics import higher_is_better, metrics
from compress.models import compressed, max_length
from compress.plan import Plan, Settings, Step
from compress.tasks import Splits
from compress.techniques import Training, trait
from compress.techniques.finetune import FineTune
from compress.techniques.prune import HoldZeros

log = logging.getLogger(__name__)


def letting_go(work: Callable[..., None]) -> Callable[..., None]:
    """Have all memory of ``work`` given back at its end: a Trainer and its model hold each other, and Python would keep
    gigabytes until it has counted enough objects."""

    @functools.wraps(work)
    def worked(*args: Any) -> None:
        work(*args)
        gc.collect()

    return worked


@letting_go
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
    seconds, losses = 0.0, dict[str, float]()
    if training.epochs:
        module = FineTune(model, metrics(planned.task), training)
        training, seconds, losses = fit(module, [], data, planned, training, into, "baseline")
    (into / "tensorboard").mkdir(exist_ok=True)
    untrained = "baseline: some of its weights are random and were not trained, so its quality means nothing"
    description = Description(
        kind=planned.task.kind,
        model=planned.backbone.name,
        task=planned.task.name,
        limits=() if trained or training.epochs else (untrained,),
        history=(Done("baseline", plan.plain(training), seconds, trained=training.epochs > 0, losses=losses),),
    )
    artifact.write(into, model, tokenizer, description)


@letting_go
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
        training, seconds, losses = fit(module, callbacks, data, planned, step.training, into, step.key)
    model = compressed(module)
    promises.check_model(step.key, stage, before, model)

    if (cut := getattr(stage, "tokenizer", tokenizer)) is not tokenizer:  # the stage made one of its own
        tokenizer = cut
        data = task_data(splits, model, tokenizer, step.training.batch_size, planned.settings)
    probe = data.texts(4, "validation")
    expected = promises.logits(trait(stage, "exported") or model, probe)
    settings = {**step.settings, "train": plan.plain(training)}
    done = Done(step.name, settings, seconds, step.training.epochs > 0, trait(stage, "shrinks"), losses)
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
) -> tuple[Training, float, dict[str, float]]:
    """One Trainer run: the training as it was carried out, in batches that fit into memory, the seconds that it took,
    tokenising left out, and the mean losses of its last epoch."""
    best, logs, hardware = into / "checkpoints", into / "tensorboard", planned.settings.hardware
    data.tokenised("train")
    data.tokenised("validation")
    training = fitted(training, module, callbacks, data, hardware, into)
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
    means = {"train": "train/epoch_loss", "validation": "validation/loss"}
    losses = {split: trainer.callback_metrics[name].item() for split, name in means.items()} if training.epochs else {}
    return training, checkpoints.seconds + time.perf_counter() - begin, losses
