"""Processes that train together, a device each. The first of them does everything else alone, and tells the others
when a training begins."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from omegaconf import DictConfig
from pytorch_lightning.plugins.environments import SLURMEnvironment
from torch.distributed import PrefixStore, TCPStore

from compress.errors import UserError
from compress.planning.settings import Hardware

PATIENCE = timedelta(days=7)
"""With the first process, which may be at work alone for long."""
FAILED = "failed"
"""What another process says when it ends with an error."""


class Team:
    """What a process knows of the others: which of them it is, and the store through which they speak.

    Args:
        rank: of this process.
        size: how many they are.
        address: of the first one.
        port: there.
        alive: whether the others still run, as far as this process can see.
    """

    def __init__(self, rank: int, size: int, address: str, port: int, alive: Callable[[], bool] = lambda: True) -> None:
        self.rank = rank
        self.size = size
        self.alive = alive
        self.said = 0
        self.store = TCPStore(address, port, size, is_master=rank == 0, timeout=timedelta(minutes=10))
        self.store.set_timeout(PATIENCE)

    def share(self, value: Any) -> Any:
        """The first process's value, for all."""
        self.said += 1
        key = str(self.said)
        if self.rank == 0:
            self.store.set(key, json.dumps(value))
            return value
        try:
            return json.loads(self.store.get(key))
        except RuntimeError:  # it has ended
            return None

    def end(self) -> None:
        """Tell the others that nothing more comes, and wait until they know."""
        if self.rank:
            self.store.set(f"{self.rank} knows", "")
            return
        self.share(None)
        with suppress(RuntimeError):  # they are lost
            self.store.wait([f"{rank} knows" for rank in range(1, self.size)], timedelta(seconds=30))

    @contextmanager
    def take_part(self) -> Iterator[Team]:
        """Take part until all is over; the first process is told of an error."""
        try:
            yield self
        except Exception as error:
            if self.rank:
                self.store.set(FAILED, str(error) if isinstance(error, UserError) else repr(error))
            raise
        finally:
            self.end()

    @contextmanager
    def training(self, hardware: Hardware) -> Iterator[None]:
        """Together they are a process group, which metrics would take part in elsewhere as well.

        Raises:
            UserError: one of the others has failed, or is gone.
        """
        self.said += 1
        name = f"training {self.said}"
        if self.rank:
            self.store.set(f"{name}: {self.rank}", "")
        else:
            self._wait_for_keys([f"{name}: {rank}" for rank in range(1, self.size)])
        backend = "nccl" if hardware.device.type == "cuda" else "gloo"
        store = PrefixStore(name, self.store)
        torch.distributed.init_process_group(backend, store=store, rank=self.rank, world_size=self.size)
        try:
            yield
        except RuntimeError:  # a connection was lost, for one
            if self.rank == 0:
                self._check_failures()
            raise
        finally:
            torch.distributed.destroy_process_group()

    def _wait_for_keys(self, keys: list[str]) -> None:
        """Until all are said, or somebody who had to say one fails."""
        while True:
            self._check_failures()
            with suppress(RuntimeError):  # not within a second
                return self.store.wait(keys, timedelta(seconds=1))

    def _check_failures(self) -> None:
        if self.store.check([FAILED]):
            raise UserError(f"A process that trains with this one has failed: {self.store.get(FAILED).decode()}")
        if not self.alive():
            raise UserError("A process that trains with this one has ended, for want of memory perhaps.")


@contextmanager
def gather_team(cfg: DictConfig, hardware: Hardware, follow: Any) -> Iterator[Team | None]:
    """The processes that ``hardware`` asks for, none where that is one: those that a cluster started, or new ones on
    this machine, which run ``follow(cfg, team)``."""
    size = hardware.processes
    if size == 1:
        yield None
        return
    if SLURMEnvironment.detect():
        there = SLURMEnvironment(auto_requeue=False)
        if there.world_size() != size:
            raise UserError(
                f"hardware.devices={hardware.devices} and hardware.nodes={hardware.nodes} make {size} processes and "
                f"SLURM started {there.world_size()}: start as many (hardware=slurm does)."
            )
        with Team(there.global_rank(), size, there.main_address, there.main_port).take_part() as team:
            yield team
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Spawned, as a forked process cannot use the GPU.
    others = torch.multiprocessing.start_processes(
        run_member, (cfg, follow, size, port), nprocs=size - 1, join=False, start_method="spawn"
    )
    set_rank_variables(0, size)

    def alive() -> bool:
        return all(process.is_alive() for process in others.processes)

    try:
        with Team(0, size, "127.0.0.1", port, alive).take_part() as team:
            yield team
    finally:
        for process in others.processes:
            process.join(5)
            process.kill()


def run_member(index: int, cfg: DictConfig, follow: Any, size: int, port: int) -> None:
    """One of the processes on this machine, but the first."""
    set_rank_variables(index + 1, size)
    with Team(index + 1, size, "127.0.0.1", port).take_part() as team:
        follow(cfg, team)


def set_rank_variables(rank: int, size: int) -> None:
    """Lightning takes it for one that is started already."""
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(size))
