"""Training that goes on where it was stopped, to the result that it would have had."""

from __future__ import annotations

import io
import logging
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from compress.cache.digests import compute_checksum
from compress.planning.settings import Hardware

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""That ask a process to stop: Ctrl-C, whoever ends it, and a cluster that wants its machine back."""


NEW = "new.ckpt"
"""A checkpoint until it has its name."""


class Checkpoints(Checkpoint):
    """Saves all that a fit needs to go on: at the end of every epoch but the last, every ``minutes``, and when the
    process is asked to stop, which it then does.

    Besides what Lightning saves (weights, optimizer, schedules, callbacks, progress) that is the state of the random
    number generators of every process. Of several that train together the first decides when, and it alone is asked
    to stop: the others end with it.

    Args:
        folder: where they lie, the last one alone, under its step and the checksum of its content.
        minutes: between two of them within an epoch.
    """

    def __init__(self, folder: Path, minutes: float = 10.0) -> None:
        self.folder = folder
        self.minutes = minutes
        self.seconds = 0.0
        """Of training before this process went on with it."""
        self.begun = self.saved = time.perf_counter()
        self.random: list[dict[str, Any]] = []
        self.asked: tuple[int, Any] | None = None
        self.handlers: dict[int, Any] = {}

    def last(self) -> Path | None:
        """The checkpoint to go on from; one that is not as it was written is removed."""
        (self.folder / NEW).unlink(missing_ok=True)
        for path in self.folder.glob("*.ckpt"):
            if path.stem.partition("-")[2] == compute_checksum(path):
                return path
            log.warning("  the checkpoint of the stopped training is damaged: it starts again")
            path.unlink()
        return None

    def step(self, path: Path) -> int:
        """At which optimizer step a checkpoint was saved."""
        return int(path.stem.partition("-")[0])

    def state_dict(self) -> dict[str, Any]:
        seconds = self.seconds + time.perf_counter() - self.begun
        return {"seconds": seconds, "random": gather_from_all(get_random_state())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds, self.random = state["seconds"], state["random"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.begun = self.saved = time.perf_counter()
        # Before Lightning has its own, which on SIGTERM waits for the other processes where they may not wait for it.
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for number in self.handlers:
            signal.signal(number, self._ask if trainer.is_global_zero else signal.SIG_IGN)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.random:
            set_random_state(self.random[trainer.global_rank])
            if batch_idx == 0:
                torch.empty((), dtype=torch.int64).random_()  # which a DataLoader does when an epoch begins
            self.random = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        batches, each = trainer.num_training_batches, trainer.accumulate_grad_batches
        if batch_idx + 1 == batches or (batch_idx + 1) % each:
            return  # the epoch's end comes, or gradients would be lost
        due = self.asked is not None or time.perf_counter() - self.saved > 60 * self.minutes
        if trainer.world_size > 1:
            due = trainer.global_step % 10 == 0 and trainer.strategy.broadcast(due)
        if due:
            self.save(trainer)
            self._handle_signal()

    def on_validation_batch_end(self, *args: Any) -> None:
        self._handle_signal()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch + 1 < (trainer.max_epochs or 0):
            self.save(trainer)
        self._handle_signal()

    def on_train_end(self, *args: Any) -> None:
        self._handle_signal()

    def save(self, trainer: pl.Trainer) -> None:
        new = self.folder / NEW
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            old = [path for path in self.folder.glob("*.ckpt") if path != new]
            os.replace(new, new.with_stem(f"{trainer.global_step}-{compute_checksum(new)}"))
            for path in old:
                path.unlink()
        self.saved = time.perf_counter()

    def on_exception(self, *args: Any) -> None:
        self._restore_handlers()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        handlers, self.handlers = self.handlers, {}
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:  # Ctrl-C twice: at once
            self._handle_signal()
        self.asked = self.asked or (number, frame)  # a cluster may say it several times

    def _handle_signal(self) -> None:
        """Do with a signal that came what would have been done with it without us."""
        if self.asked:
            (number, frame), self.asked = self.asked, None
            handler = self.handlers.get(number)
            if callable(handler):
                signal.signal(number, signal.SIG_IGN)  # said again, it must not kill the command that requeues
                handler(number, frame)
            elif handler == signal.SIG_DFL:
                signal.signal(number, handler)
                signal.raise_signal(signal.Signals(number))


def gather_from_all(own: Any) -> list[Any]:
    """What every process that trains together has for its ``own``."""
    if not torch.distributed.is_initialized():
        return [own]
    content, every = io.BytesIO(), [b""] * torch.distributed.get_world_size()
    torch.save(own, content)  # as tensors do not travel as objects
    torch.distributed.all_gather_object(every, content.getvalue())
    return [torch.load(io.BytesIO(one), weights_only=True) for one in every]


def get_random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()  # type: ignore[misc]
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"]:
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])


class Whole(TorchCheckpointIO):
    """Writes a checkpoint so that it is there whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        partial = f"{path}.partial"
        with open(partial, "wb") as file:  # so that a full disk is told as such
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


class Restored(Strategy):
    """Restores a checkpoint after ``on_fit_start``, when a stage has given the model the shape that was saved."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True


class RestoredAlone(Restored, SingleDeviceStrategy):
    pass


class RestoredTogether(Restored, DDPStrategy):
    pass


def make_trainer_options(hardware: Hardware, together: bool) -> dict[str, Any]:
    """The Trainer's arguments to work on one device, or on as many as the hardware has."""
    slurm = SLURMEnvironment.detect() and (together or hardware.processes == 1)
    # On SLURM it is the launcher that requeues, not Lightning as well.
    environment = SLURMEnvironment(auto_requeue=False) if slurm else LightningEnvironment()
    cuda = hardware.device.type == "cuda"
    return {
        "accelerator": hardware.device.type,
        "devices": hardware.devices if together else 1,
        "num_nodes": hardware.nodes if together else 1,
        "strategy": RestoredTogether() if together else RestoredAlone(torch.device("cuda", 0) if cuda else "cpu"),
        "plugins": [Whole(), environment],
        "precision": hardware.precision,
        "use_distributed_sampler": False,  # ours knows of the processes
    }
