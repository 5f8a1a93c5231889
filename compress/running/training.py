"""Train: one Lightning Trainer run, its callbacks, and its data."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from datasets import Dataset
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn

from compress.artifacts.artifact import Description
from compress.cache.events import hide_events
from compress.cache.files import remove_path
from compress.errors import UserError
from compress.models.backbone import count_tokens, limit_length
from compress.models.layers import is_inside, unwrap_model
from compress.models.matrices import Matrix, apply_masks, find_all_matrices, find_zeros, measure_share
from compress.models.packing import keeps_boundaries
from compress.models.placement import run_blocks_on
from compress.planning.plan import Plan, Step
from compress.planning.settings import Settings
from compress.running.batch_size import fit_batch_size
from compress.running.resume import Checkpoints, make_trainer_options
from compress.tasks.kinds import KINDS, higher_is_better
from compress.tasks.splits import Splits
from compress.tasks.tokens import TaskData
from compress.technique import Technique, Training

log = logging.getLogger(__name__)
WHOLE = 0.999
"""Share of the blocks' weights from which a stage has compressed all of them; routers of experts are the rest."""


def list_limits(planned: Plan, step: Step, stage: Technique, before: Description, model: nn.Module) -> tuple[str, ...]:
    """Return what the artifact cannot do for size or speed, and what share of the ``model`` the stage left out.

    On a new runtime, the limits of earlier stages' weight formats no longer apply.
    """
    formats = {other.name for other in planned.steps if other.technique.leaves not in ("float", None)}
    moved = stage.runtime != before.runtime
    kept = [limit for limit in before.limits if not (moved and limit.partition(":")[0] in formats)]
    own = [stage.limits] if stage.limits else []
    reached = stage.average_bits or stage.reached
    if reached and (share := measure_share(model, reached)) < WHOLE:
        own.append(f"{share:.1%} of the weights in the blocks are compressed, the others are as they were")
    return (*kept, *(f"{step.name}: {limit}" for limit in own))


class KeepBest(ModelCheckpoint):
    """Ends a training of several epochs with the weights of the best epoch on the validation split.

    Epochs in which a callback still prunes do not count. Two epochs are kept, so that a resumed run still finds the
    best epoch that its checkpoint refers to.

    Attributes:
        losses: mean losses of every epoch by split.
        kept: the epoch whose weights the training ended with; None before its end, and if no epoch counted.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: dict[int, dict[str, float]] = {}
        self.kept: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "losses": self.losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.losses = state_dict["losses"]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if has_finished_pruning(trainer):
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.losses[trainer.current_epoch] = read_losses(trainer)
        if has_finished_pruning(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if not self.best_model_path:
            return
        best = torch.load(self.best_model_path, map_location=pl_module.device, weights_only=True)
        pl_module.on_load_checkpoint(best)
        pl_module.load_state_dict(best["state_dict"])
        self.kept = best["epoch"]


def read_losses(trainer: pl.Trainer) -> dict[str, float]:
    """Return the mean losses of the last epoch by split."""
    means = {"train": "train/epoch_loss", "validation": "validation/loss"}
    values = trainer.callback_metrics
    return {split: values[name].item() for split, name in means.items() if name in values}


def has_finished_pruning(trainer: pl.Trainer) -> bool:
    """Return whether no callback has anything left to prune."""
    return all(getattr(callback, "settled", True) for callback in trainer.callbacks)  # type: ignore[attr-defined]


class Finite(pl.Callback):
    """Ends a training whose loss is not finite."""

    resumes = True

    def __init__(self, key: str, training: Training) -> None:
        self.key = key
        self.training = training

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seldom = batch_idx % 10 == 0 or batch_idx + 1 == trainer.num_training_batches  # the check waits for a GPU
        if seldom and not torch.isfinite(outputs["loss"]):
            raise UserError(
                f"The loss is {outputs['loss'].item()} after {trainer.global_step} steps of training. Set "
                f"{self.key}.learning_rate below {self.training.learning_rate:g}, or hardware.precision=32-true or "
                "bf16-mixed."
            )


class MeanGradient(pl.Callback):
    """Makes the gradient of accumulated batches that of one batch of all their examples (tokens, for a language model).

    Lightning divides by the configured number of batches, although fewer are left at the end of an epoch, and gives a
    smaller batch the weight of a full one.

    Args:
        accumulate: the number of batches that Lightning divides by.
        count: function that counts the examples of a batch.
    """

    def __init__(self, accumulate: int, count: Callable[[dict[str, Tensor]], int | Tensor]) -> None:
        self.accumulate = accumulate
        self.count = count
        self.examples: list[int | Tensor] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        self.examples.append(self.count(batch))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        share = self.examples[-1] / self.examples[0]
        loss.register_hook(lambda gradient: gradient * share)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        weights = torch.as_tensor(sum(self.examples) / self.examples[0], device=pl_module.device)
        self.examples.clear()
        # The gradients are means over the processes that train together, so the weights must be too.
        scale = self.accumulate / trainer.strategy.reduce(weights, reduce_op="mean")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad *= scale


class StageBar(TQDMProgressBar):
    """Lightning's progress bar with the stage's name."""

    def __init__(self, name: str) -> None:
        super().__init__(leave=False)
        self.name = name

    def init_train_tqdm(self) -> Any:
        bar = super().init_train_tqdm()
        bar.set_description(self.name)
        return bar


def make_task_data(
    splits: Splits, model: Any, tokenizer: Any, batch_size: int, settings: Settings, text: Dataset | None = None
) -> TaskData:
    """Return the splits, and other ``text`` to calibrate on, tokenised for ``model``."""
    length = limit_length(model, tokenizer, splits.task.max_length)
    tokens, known, task = Path(settings.cache.dir) / "tokens", count_tokens(model), splits.task
    KINDS[task.kind].set_template(tokenizer, task.template)
    packs = task.pack and isinstance(model, nn.Module) and keeps_boundaries(model)
    if task.pack and not packs:
        log.info(f"  `{type(model).__name__}` does not keep packed conversations apart, so they are padded")
    return TaskData(splits, tokenizer, length, batch_size, settings.seed, tokens, text, known, packs)


def fit_module(
    module: pl.LightningModule,
    callbacks: list[pl.Callback],
    data: TaskData,
    planned: Plan,
    training: Training,
    into: Path,
    name: str,
) -> tuple[Training, float, dict[str, float]]:
    """Run one training. Return its settings with batches that fit into memory, its seconds, and its losses.

    The seconds are without tokenisation. The losses are the means of the epoch that was kept, for each split.
    """
    # 1) Tokenise, and choose the batch size
    best, logs, hardware = into / "checkpoints", into / "tensorboard", planned.settings.hardware
    data.tokenised("train")
    data.tokenised("validation")
    training = fit_batch_size(training, module, callbacks, data, hardware, into)

    # 2) Find the checkpoint to resume from
    checkpoints = Checkpoints(into / "resume")
    stages: list[Any] = [module, *callbacks]
    resumes = training.epochs > 0 and all(each.resumes for each in stages)
    team = planned.team if training.epochs else None
    last = checkpoints.last() if resumes else None
    if team and (shared := team.share(str(last) if last else "")):
        last = Path(shared)
    if last:
        log.info(f"  {name}: resumes after step {checkpoints.step(last):,} of its training")
    else:
        if training.epochs and not resumes and logs.exists():
            log.info(f"  {name}: its training was stopped, cannot be resumed and starts again")
        for old in (best, logs):
            remove_path(old)
    logs.mkdir(parents=True, exist_ok=True)

    # 3) Train
    if training.epochs:
        callbacks = [*callbacks, Finite("baseline" if name == "baseline" else f"technique.{name}.train", training)]
    if training.accumulate > 1:
        callbacks.insert(0, MeanGradient(training.accumulate, data.kind.count_examples))
    monitored = f"validation/{planned.task.primary}"
    mode = "max" if higher_is_better(planned.task.primary) else "min"
    keeper = KeepBest(best, monitor=monitored, mode=mode, save_weights_only=True, save_top_k=2)
    if training.epochs > 1:
        callbacks.append(keeper)
    bar = training.epochs > 0 and sys.stderr.isatty()
    trainer = pl.Trainer(
        max_epochs=training.epochs,
        **make_trainer_options(hardware, together=team is not None, trains=training.epochs > 0),
        accumulate_grad_batches=training.accumulate,
        callbacks=[*callbacks, *([checkpoints] if resumes else []), *([StageBar(name)] if bar else [])],
        logger=TensorBoardLogger(
            into,
            name=logs.name,
            version="",
            default_hp_metric=False,
            purge_step=checkpoints.step(last) if last else None,
        ),
        default_root_dir=into,
        enable_checkpointing=resumes or training.epochs > 1,
        enable_progress_bar=bar,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=min(10, len(data.train_dataloader())),  # small tasks too
    )
    begin = time.perf_counter()
    try:
        blocks = hardware.device if hardware.offload and not training.epochs else None
        with team.training(hardware) if team else nullcontext(), run_blocks_on(blocks):
            trainer.fit(module, datamodule=data, ckpt_path=last)
    finally:
        hide_events(logs)  # the cache is below multirun/, and every job has a copy of them
    if not trainer.state.finished or trainer.current_epoch < training.epochs:
        raise KeyboardInterrupt  # Lightning has ended normally
    losses = read_losses(trainer) if training.epochs else {}
    if keeper.kept is not None:
        losses = keeper.losses[keeper.kept]
    return training, checkpoints.seconds + time.perf_counter() - begin, losses


class HoldZeros(pl.Callback):
    """Keeps weights at zero that are zero when the training starts: no stage may fill in pruned weights. An adapter
    does the same for the matrices that it changes.

    Args:
        layers: names of the layers whose zeros are kept; by default all.
    """

    resumes = True

    def __init__(self, layers: Collection[str] | None = None) -> None:
        self.layers = layers
        self.matrices: dict[str, Matrix] = {}
        self.masks: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = unwrap_model(pl_module)
        self.matrices = find_all_matrices(model, embeddings=True, head=True)
        adaptation = getattr(pl_module, "adaptation", None)
        own = adaptation.adapted if adaptation else ()
        self.masks = {
            name: ~zero
            for name, zero in find_zeros(model, trainable=True).items()
            if (self.layers is None or name in self.layers) and not is_inside(name, own)
        }

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        apply_masks(self.matrices, self.masks)
