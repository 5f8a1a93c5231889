"""The largest batch that training has the memory for, found by trying."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BatchSizeFinder
from torch import Tensor
from torch.utils.data import DataLoader

from compress.cache.files import write_atomically
from compress.errors import UserError
from compress.models.layers import unwrap_model
from compress.planning.settings import Hardware
from compress.running.resume import get_random_state, make_trainer_options, set_random_state
from compress.tasks.tokens import Batch, TaskData
from compress.technique import Training

log = logging.getLogger(__name__)

KEPT = "batch_size"


def fit_batch_size(
    training: Training,
    module: pl.LightningModule,
    callbacks: list[pl.Callback],
    data: TaskData,
    hardware: Hardware,
    into: Path,
) -> Training:
    """The training with batches that fit into memory, and their gradients accumulated to the batch that it asks for;
    as it is where ``hardware.batch_size`` is not ``auto``. Training that goes on keeps the size that it began with."""
    if hardware.batch_size != "auto" or not training.epochs:
        return training
    asked = training.batch_size * training.accumulate
    kept = into / "resume" / KEPT
    if kept.is_file():
        size = int(kept.read_text())
    else:
        size = find_largest_batch(asked, module, callbacks, data, hardware)
        kept.parent.mkdir(exist_ok=True)
        write_atomically(kept, str(size))
    log.info(f"  batches of {size} texts fit into memory; of {asked // size} a step, {asked} texts")
    data.batch_size = size
    return replace(training, batch_size=size, accumulate=asked // size)


def find_largest_batch(
    asked: int, module: pl.LightningModule, callbacks: list[pl.Callback], data: TaskData, hardware: Hardware
) -> int:
    """The largest divisor of ``asked`` so many of the longest texts of which are trained on without running out of
    memory; nothing that is given is changed.

    Raises:
        UserError: not even one fits.
    """
    before = get_random_state()
    module, callbacks = copy.deepcopy((module, callbacks))
    unwrap_model(module).train()  # dropout keeps masks
    longest = Longest(
        data.splits, data.tokenizer, data.max_length, asked, data.seed, data.tokens, data.calibration_text
    )
    most = asked
    if hardware.device.type == "cpu":  # which ends a process that asks for too much, and tells it nothing
        most = min(asked, estimate_capacity(unwrap_model(module), longest.text(), psutil.virtual_memory().available))
    finder = Finder(most)
    longest.batch_size, longest.rows = most, 2 * most
    with TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=1,
            **make_trainer_options(hardware, together=False),
            callbacks=[*callbacks, finder],
            logger=False,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, datamodule=longest)
    set_random_state(before)
    fits = min(most, finder.optimal_batch_size or 1)
    return max(size for size in range(1, fits + 1) if asked % size == 0)


def estimate_capacity(model: torch.nn.Module, text: Batch, free_bytes: int) -> int:
    """How many texts like this one may be trained on at once, at least one: by what a forward pass keeps for the
    backward one, in half of the memory that gradients and the optimizer's moments leave free."""
    seen: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**text)  # noqa: F841  what it keeps lives as long as this does
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return max(1, int((free_bytes - 3 * trained) / 2 / max(1, sum(seen.values()))))


class Longest(TaskData):
    """The longest texts of the training split, the same ones again where there are too few."""

    rows = 2

    def text(self) -> Batch:
        """The longest one alone."""
        return self.collate([self.tokenised("train")[self.in_order("train")[0]]])

    def train_dataloader(self) -> DataLoader:
        if self.batch_size < 1:
            raise UserError(
                "Not even one of the longest texts fits into memory for training: set task.max_length lower, "
                "hardware.precision=bf16-mixed, or choose a smaller model."
            )
        order = self.in_order("train")
        picked = [order[i % len(order)] for i in range(self.rows)]
        return DataLoader(self.tokenised("train").select(picked), self.batch_size, collate_fn=self.collate)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        return self.train_dataloader()

    def state_dict(self) -> dict[str, int]:
        return {}


class Finder(BatchSizeFinder):
    """Lightning's, which begins with the ``most`` that is asked for, is done where that fits, and halves it where it
    does not; two steps each, as the optimizer takes its memory at the end of the first."""

    def __init__(self, most: int) -> None:
        super().__init__(mode="power", steps_per_trial=2, init_val=most, max_val=most + 1)
        self._early_exit = True  # as Lightning's Tuner does: nothing is trained afterwards

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.on_fit_start()  # a teacher takes memory too
        super().on_fit_start(trainer, pl_module)
