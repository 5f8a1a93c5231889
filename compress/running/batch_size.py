"""Find the largest training batch that fits into memory, by trying."""

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
from compress.techniques.finetune import FineTune

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
    """Return the training with batches that fit into memory and gradients accumulated to the configured batch.

    Unless ``hardware.batch_size`` is ``auto``, the training is unchanged. A resumed training keeps its batch size.
    """
    if hardware.batch_size != "auto" or not training.epochs:
        return training
    requested = training.batch_size * training.accumulate
    file = into / "resume" / KEPT
    if file.is_file():
        size = int(file.read_text(encoding="utf-8"))
    else:
        size = find_largest_batch(requested, module, callbacks, data, hardware)
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, str(size))
    log.info(f"  batches of {size} texts fit into memory; {requested // size} a step, {requested} texts")
    data.batch_size = size
    return replace(training, batch_size=size, accumulate=requested // size)


def find_largest_batch(
    requested: int, module: pl.LightningModule, callbacks: list[pl.Callback], data: TaskData, hardware: Hardware
) -> int:
    """Return the largest divisor of ``requested`` for which a step on the longest texts fits into memory.

    The arguments are not modified.

    Raises:
        UserError: not even one text fits.
    """
    before = get_random_state()
    module, callbacks = copy.deepcopy((module, callbacks))
    if type(module) is FineTune and module.adapter:
        module.add_adapter()  # what is frozen has neither gradients nor moments
    unwrap_model(module).train()  # dropout keeps its masks in memory
    longest = Longest(
        data.splits, data.tokenizer, data.max_length, requested, data.seed, data.tokens, data.calibration_text
    )
    most = requested
    if hardware.device.type == "cpu":  # the system kills a process that runs out of memory
        most = min(
            requested, estimate_capacity(unwrap_model(module), longest.text(), psutil.virtual_memory().available)
        )
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
    return max(size for size in range(1, fits + 1) if requested % size == 0)


def estimate_capacity(model: torch.nn.Module, text: Batch, free_bytes: int) -> int:
    """Return how many texts like ``text`` one training step can take, at least 1.

    The tensors that a forward pass saves for the backward pass must fit into half of the memory that gradients and
    the optimizer's moments leave free.
    """
    saved_bytes: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**text)  # noqa: F841  keeps saved tensors alive
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return max(1, int((free_bytes - 3 * trained) / 2 / max(1, sum(saved_bytes.values()))))


class Longest(TaskData):
    """The longest texts of the training split, repeated if there are too few."""

    rows = 2

    def text(self) -> Batch:
        """Return the longest text alone, as a batch."""
        return self.collate([self.tokenised("train")[self.in_order("train")[0]]])

    def train_dataloader(self) -> DataLoader:
        if self.batch_size < 1:
            raise UserError(
                "Not even one of the longest texts fits into memory for training. Set task.max_length lower, "
                "hardware.precision=bf16-mixed, or a smaller model."
            )
        order = self.in_order("train")
        picked = [order[i % len(order)] for i in range(self.rows)]
        return DataLoader(self.tokenised("train").select(picked), self.batch_size, collate_fn=self.collate)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        return self.train_dataloader()

    def state_dict(self) -> dict[str, int]:
        return {}


class Finder(BatchSizeFinder):
    """Lightning's finder, which starts with ``most`` texts, ends if they fit, and halves them if not.

    A trial takes two steps, because the optimizer takes its memory at the end of the first.
    """

    def __init__(self, most: int) -> None:
        super().__init__(mode="power", steps_per_trial=2, init_val=most, max_val=most + 1)
        self._early_exit = True  # as Lightning's Tuner does: nothing is trained afterwards

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.on_fit_start()  # a teacher takes memory too
        super().on_fit_start(trainer, pl_module)
