"""Run processes that train together, a device each.

The first process does everything else alone, and calls the others when a training begins.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed
import torch.multiprocessing
from omegaconf import DictConfig
from pytorch_lightning.plugins.environments import SLURMEnvironment
from torch.distributed import PrefixStore, TCPStore

from compress.errors import UserError
from compress.planning.settings import Hardware

PATIENCE = timedelta(days=7)
"""Time to wait for the first process, which may work alone for long."""
FAILED = "failed"
"""Key under which another process reports its error."""


class Team:
    """The processes that train together, as one of them sees them, and the store through which they communicate.

    Args:
        rank: rank of this process.
        size: number of processes.
        address: host of the first process.
        port: port of the store on that host.
        alive: returns False if this process can see that another process has ended.
    """

    def __init__(self, rank: int, size: int, address: str, port: int, alive: Callable[[], bool] = lambda: True) -> None:
        self.rank = rank
        self.size = size
        self.alive = alive
        self.said = 0
        self.store = TCPStore(address, port, size, is_master=rank == 0, timeout=timedelta(minutes=10))
        self.store.set_timeout(PATIENCE)

    def share(self, value: Any) -> Any:
        """Return the first process's value in every process."""
        self.said += 1
        key = str(self.said)
        if self.rank == 0:
            self.store.set(key, json.dumps(value))
            return value
        try:
            return json.loads(self.store.get(key))
        except RuntimeError:  # the first process has ended
            return None

    def end(self) -> None:
        """Announce the end to the other processes, and wait for their answers."""
        if self.rank:
            self.store.set(f"{self.rank} knows", "")
            return
        self.share(None)
        with suppress(RuntimeError):  # they have ended
            self.store.wait([f"{rank} knows" for rank in range(1, self.size)], timedelta(seconds=30))

    @contextmanager
    def take_part(self) -> Iterator[Team]:
        """Yield the team until the work ends; report an error to the first process."""
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
        """Form a process group for one training. Metrics would use it elsewhere too, so it ends with the training.

        Raises:
            UserError: another process has failed or ended.
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
        except RuntimeError:  # e.g. a lost connection
            if self.rank == 0:
                self._check_failures()
            raise
        finally:
            torch.distributed.destroy_process_group()

    def _wait_for_keys(self, keys: list[str]) -> None:
        """Wait until every key is set; raise if another process fails first."""
        while True:
            self._check_failures()
            with suppress(RuntimeError):  # not set within a second
                return self.store.wait(keys, timedelta(seconds=1))

    def _check_failures(self) -> None:
        if self.store.check([FAILED]):
            raise UserError(f"A process that trains with this one has failed: {self.store.get(FAILED).decode()}")
        if not self.alive():
            raise UserError("A process that trains with this one has ended (out of memory?).")


@contextmanager
def gather_team(cfg: DictConfig, hardware: Hardware, follow: Any) -> Iterator[Team | None]:
    """Yield the processes that ``hardware`` asks for, None for a single process.

    On SLURM the cluster has started them; elsewhere they start on this machine and run ``follow(cfg, team)``.
    """
    size = hardware.processes
    if size == 1:
        yield None
        return
    if SLURMEnvironment.detect():
        slurm = SLURMEnvironment(auto_requeue=False)
        if slurm.world_size() != size:
            raise UserError(
                f"hardware.devices is {hardware.devices} and hardware.nodes is {hardware.nodes}, but SLURM started "
                f"{slurm.world_size()} processes; expected {size}. Set hardware=slurm, which starts as many."
            )
        with Team(slurm.global_rank(), size, slurm.main_address, slurm.main_port).take_part() as team:
            yield team
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Spawned, because a forked process cannot use the GPU.
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
    """Run one of the other processes on this machine."""
    set_rank_variables(index + 1, size)
    with Team(index + 1, size, "127.0.0.1", port).take_part() as team:
        follow(cfg, team)


def set_rank_variables(rank: int, size: int) -> None:
    """Set the variables by which Lightning recognises a process that is already started."""
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(size))
