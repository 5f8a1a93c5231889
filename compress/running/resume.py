"""Resume a stopped training, with the same result as an uninterrupted one."""

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
from pytorch_lightning.plugins import HalfPrecision
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import nn

from compress.cache.digests import compute_checksum
from compress.models.layers import keep_unstored_buffers
from compress.planning.settings import Hardware

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""Signals that ask a process to stop: Ctrl-C, a request to end, a cluster that reclaims its machine."""
NEW = "new.ckpt"
"""Name of a checkpoint until it is complete."""


class Checkpoints(Checkpoint):
    """Saves everything that a training needs to resume.

    It saves at the end of every epoch but the last, every ``minutes``, and before the process stops on request.
    Besides Lightning's content (weights, optimizer, schedules, callbacks, progress), a checkpoint holds the random
    state of every process. Of processes that train together, the first decides when to save, and it alone is asked
    to stop: the others end with it.

    Args:
        folder: folder of the last checkpoint, which is named by its step and the checksum of its content.
        minutes: time between two checkpoints within an epoch.
    """

    def __init__(self, folder: Path, minutes: float = 10.0) -> None:
        self.folder = folder
        self.minutes = minutes
        self.seconds = 0.0
        """Training time before this process resumed it."""
        self.begun = self.saved = time.perf_counter()
        self.random: list[dict[str, Any]] = []
        self.asked: tuple[int, Any] | None = None
        self.handlers: dict[int, Any] = {}

    def last(self) -> Path | None:
        """Return the checkpoint to resume from; remove a damaged checkpoint."""
        (self.folder / NEW).unlink(missing_ok=True)
        for path in self.folder.glob("*.ckpt"):
            if path.stem.partition("-")[2] == compute_checksum(path):
                return path
            log.warning("  the checkpoint of the stopped training is damaged; the training starts again")
            path.unlink()
        return None

    def step(self, path: Path) -> int:
        """Return the optimizer step of a checkpoint."""
        return int(path.stem.partition("-")[0])

    def state_dict(self) -> dict[str, Any]:
        seconds = self.seconds + time.perf_counter() - self.begun
        return {"seconds": seconds, "random": gather_from_all(get_random_state())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds, self.random = state["seconds"], state["random"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.begun = self.saved = time.perf_counter()
        # Before Lightning sets its own, which on SIGTERM waits for processes that may not wait for this one.
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
                torch.empty((), dtype=torch.int64).random_()  # as a DataLoader does when an epoch begins
            self.random = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        batches, each = trainer.num_training_batches, trainer.accumulate_grad_batches
        if batch_idx + 1 == batches or (batch_idx + 1) % each:
            return  # the epoch ends now, or accumulated gradients would be lost
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
        """Write a checkpoint in place of the last one."""
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
        if self.asked and number == signal.SIGINT:  # a second Ctrl-C stops at once
            self._handle_signal()
        self.asked = self.asked or (number, frame)  # a cluster may repeat its signal

    def _handle_signal(self) -> None:
        """Pass a postponed signal to the handler that was set before ours."""
        if self.asked:
            (number, frame), self.asked = self.asked, None
            handler = self.handlers.get(number)
            if callable(handler):
                signal.signal(number, signal.SIG_IGN)  # repeated, it must not kill the command that requeues the job
                handler(number, frame)
            elif handler == signal.SIG_DFL:
                signal.signal(number, handler)
                signal.raise_signal(signal.Signals(number))


def gather_from_all(own: Any) -> list[Any]:
    """Return the value ``own`` of every process that trains together."""
    if not torch.distributed.is_initialized():
        return [own]
    content, contents = io.BytesIO(), [b""] * torch.distributed.get_world_size()
    torch.save(own, content)  # tensors cannot be gathered as objects
    torch.distributed.all_gather_object(contents, content.getvalue())
    return [torch.load(io.BytesIO(each), weights_only=True) for each in contents]


def get_random_state() -> dict[str, Any]:
    """Return the state of every random number generator of this process."""
    kind, keys, *rest = np.random.get_state()  # type: ignore[misc]
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore a state that :func:`get_random_state` returned."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"]:
        torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])


class Whole(TorchCheckpointIO):
    """Writes a checkpoint completely or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        partial = f"{path}.partial"
        with open(partial, "wb") as file:  # so that a full disk is reported as such
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


class Restored(Strategy):
    """Restores a checkpoint after ``on_fit_start``, once a stage has given the model its saved shape."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True


class RestoredAlone(Restored, SingleDeviceStrategy):
    pass


class RestoredTogether(Restored, DDPStrategy):
    pass


class Half(HalfPrecision):
    """Trains in 16 bits, except for the buffers that a model loaded in 16 bits would have in 32."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        with keep_unstored_buffers(module):
            return super().convert_module(module)


def make_trainer_options(hardware: Hardware, together: bool, trains: bool = True) -> dict[str, Any]:
    """Return the Trainer's arguments for one device, or for all devices of the hardware. A Trainer that does not train
    leaves the model in its own precision, and with ``hardware.offload`` in the CPU's memory."""
    slurm = SLURMEnvironment.detect() and (together or hardware.processes == 1)
    # On SLURM the launcher requeues, so Lightning must not.
    environment = SLURMEnvironment(auto_requeue=False) if slurm else LightningEnvironment()
    device = torch.device("cpu") if hardware.offload and not trains else hardware.device
    precision = hardware.precision if trains else "32-true"
    half = precision == "bf16-true"
    return {
        "accelerator": device.type,
        "devices": hardware.devices if together else 1,
        "num_nodes": hardware.nodes if together else 1,
        "strategy": RestoredTogether()
        if together
        else RestoredAlone(torch.device("cuda", 0) if device.type == "cuda" else "cpu"),
        "plugins": [Whole(), environment, *([Half("bf16-true")] if half else [])],
        "precision": None if half else precision,
        "use_distributed_sampler": False,  # our data loader already splits the batches
    }
