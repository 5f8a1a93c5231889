"""Run the baseline and every stage: train, check promises, write an artifact."""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from compress.artifacts.artifact import Description, Done, load_artifact, write_artifact
from compress.formats.packed import freeze_weights, list_packed_layers
from compress.models.adapters import Trained
from compress.models.layers import unwrap_model
from compress.models.matrices import find_pruned_layers, measure_matrices
from compress.planning.plan import Plan, Step, check_blocks
from compress.planning.settings import to_plain
from compress.running.promises import capture_state, check_bits, check_folder, check_model, compute_logits
from compress.running.training import HoldZeros, fit_module, list_limits, make_task_data
from compress.tasks.metrics import TaskMetrics
from compress.tasks.splits import Splits
from compress.tasks.task import SPLITS
from compress.technique import Technique, Training
from compress.techniques.finetune import FineTune

log = logging.getLogger(__name__)


def free_memory_after(work: Callable[..., None]) -> Callable[..., None]:
    """Free all memory of ``work`` at its end.

    A Trainer and its model refer to each other, so Python would keep gigabytes until its next garbage collection.
    """

    @functools.wraps(work)
    def wrapper(*args: Any) -> None:
        work(*args)
        gc.collect()

    return wrapper


@free_memory_after
def write_baseline(planned: Plan, splits: Splits, into: Path) -> None:
    """Write the baseline: the model with the task's head, fine-tuned. A follower only trains it."""
    announce_training(planned, planned.training, stage="baseline")
    pl.seed_everything(planned.settings.seed, workers=True, verbose=False)
    texts = [text for name in ("text", "text_pair") if name in splits.train.column_names for text in splits.train[name]]
    model, tokenizer, trained = planned.backbone.build(planned.task, texts)
    training: Training = planned.training
    data = make_task_data(splits, model, tokenizer, training.batch_size, planned.settings)
    if data.max_length < planned.task.max_length:
        log.info(f"  texts are cut to {data.max_length} tokens because the model has no more positions")
    check_blocks(planned, data)
    for note in filter(None, map(data.describe_cut, SPLITS)):
        log.info(f"  {note}")
    seconds, losses, limits, module = 0.0, dict[str, float](), list[str](), None
    if not trained and not training.epochs:
        limits.append("baseline: some weights are random and were not trained, so the quality is meaningless")
    if training.epochs and planned.training.adapter and planned.backbone.path is None:
        limits.append("baseline: its random weights stay as they are, because only an adapter was trained")
    if training.epochs:
        module = FineTune(model, TaskMetrics(planned.task, splits.validation), training, planned.training.adapter)
        module.key = "baseline"
        callbacks: list[pl.Callback] = []
        if pruned := find_pruned_layers(model):
            callbacks.append(HoldZeros(pruned))
            low, high = min(pruned.values()), max(pruned.values())
            zeros = f"{low:.0%} to {high:.0%} zeros in {len(pruned)} layers"
            limits.append(f"baseline: the model was pruned before ({zeros}), and its zeros are kept")
            log.info(f"  {limits[-1].removeprefix('baseline: ')}")
        training, seconds, losses = fit_module(module, callbacks, data, planned, training, into, "baseline")
    if is_follower(planned):
        return
    (into / "tensorboard").mkdir(exist_ok=True)
    done = Done("baseline", to_plain(training), seconds, training.epochs > 0, False, losses, count_trained(module))
    description = Description(
        kind=planned.task.kind,
        model=planned.backbone.name,
        task=planned.task.name,
        limits=tuple(limits),
        history=(done,),
    )
    write_artifact(into, model, tokenizer, description)
    if module:
        write_stage_report(module, into / "report")


@free_memory_after
def apply_stage(planned: Plan, splits: Splits, step: Step, baseline: Path, source: Path, into: Path) -> None:
    """Apply ``step`` to the artifact in ``source``, check its promises and write the new artifact.

    A follower only trains.
    """
    # 1) Load the artifact before the stage, and its data
    announce_training(planned, step.training, stage=step.key, baseline=str(baseline), source=str(source))
    pl.seed_everything(planned.settings.seed, workers=True, verbose=False)
    model, tokenizer, description = load_artifact(source)
    packed = source if description.weights == "packed" else None
    if packed:
        freeze_weights(model, list_packed_layers(packed))
    before = capture_state(model)
    text = step.calibration and step.calibration.rows
    data = make_task_data(splits, model, tokenizer, step.training.batch_size, planned.settings, text)
    scores = TaskMetrics(planned.task, splits.validation)

    # 2) Build the stage, and train
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
    training, seconds, losses = fit_module(module, callbacks, data, planned, step.training, into, step.key)
    if is_follower(planned):
        return
    model = unwrap_model(module)

    # 3) Check the model, and compute logits to compare the saved artifact with
    check_model(step.key, stage, before, model)
    sizes = measure_matrices(model)
    limits = list_limits(planned, step, stage, description, model)

    if (changed := getattr(stage, "tokenizer", tokenizer)) is not tokenizer:  # the stage made its own tokenizer
        tokenizer = changed
        data = make_task_data(splits, model, tokenizer, step.training.batch_size, planned.settings)
    probe = data.texts(4, "validation")
    expected = compute_logits(stage.exported or model, probe)

    # 4) Write the artifact, and check what was written
    settings = {**step.settings, "train": to_plain(training)}
    done = Done(step.name, settings, seconds, step.training.epochs > 0, stage.shrinks, losses, count_trained(module))
    description = replace(
        description,
        runtime=stage.runtime,
        weights=stage.leaves or description.weights,
        limits=limits,
        history=(*description.history, done),
    )
    write_artifact(into, model, tokenizer, description, stage, packed if stage.leaves is None else None)
    write_stage_report(stage, into / "report")
    check_folder(step.key, stage, source, into, expected, compute_logits(load_artifact(into).model, probe))
    if bits := stage.average_bits:
        check_bits(step.key, bits, sizes, into)


def count_trained(module: Any) -> int | None:
    """Return the number of parameters that an adapter trained; None if all were trained or none."""
    trained = getattr(module, "trained", None)
    return trained.count if isinstance(trained, Trained) else None


def write_stage_report(stage: Technique, folder: Path) -> None:
    """Write the stage's own report into ``folder``; without a report there is no folder."""
    folder.mkdir()
    stage.report(folder)
    if not any(folder.iterdir()):
        folder.rmdir()


def is_follower(planned: Plan) -> bool:
    """Return whether another process checks and writes what this one trains."""
    return planned.team is not None and planned.team.rank > 0


def announce_training(planned: Plan, training: Training, **stage: str) -> None:
    """Call the other processes of the team to a stage's training."""
    if planned.team and planned.team.rank == 0 and training.epochs:
        planned.team.share(stage)
