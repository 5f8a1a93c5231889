"""Measure the other costs of running an artifact: peak memory in a separate process, multiplications, processor time
and energy."""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from compress.artifacts.artifact import load_artifact, read_description
from compress.formats.bnb import move_model
from compress.quiet import silence_libraries

log = logging.getLogger(__name__)

RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Memory:
    """Memory of a process that loads an artifact and runs every timed batch once.

    ``peak_bytes`` is the peak resident memory and ``libraries_bytes`` the peak before loading. ``gpu_bytes`` is the
    peak that PyTorch allocated on a GPU, None without a GPU.
    """

    peak_bytes: int
    libraries_bytes: int
    gpu_bytes: int | None = None

    @property
    def model_bytes(self) -> int:
        """Memory that loading and running the model added to the libraries'."""
        return self.peak_bytes - self.libraries_bytes


def measure_memory(folder: Path, kind: str, batches: list[dict[str, Tensor]], device: torch.device) -> Memory | None:
    """Return the memory of a process that starts with the libraries alone. Log and return None if it was killed."""
    # A fork server that has imported only the libraries starts such a process in milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    answer, child = context.Pipe(duplex=False)
    arrays = [{key: value.numpy(force=True) for key, value in batch.items()} for batch in batches]
    process = context.Process(
        target=report_memory, args=(child, folder, kind, arrays, str(device), torch.get_num_threads())
    )
    with hide_main_module():
        process.start()
    child.close()
    try:
        return answer.recv()
    except EOFError:
        log.warning(f"  the memory of {folder} is not measured: its process ended with exit code {process.exitcode}")
        return None
    finally:
        process.join()


@contextlib.contextmanager
def hide_main_module() -> Iterator[None]:
    """Hide the program's main module from a process that starts, which would run a script without
    ``if __name__ == "__main__"`` once more."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@torch.inference_mode()
def report_memory(
    answer: Connection, folder: Path, kind: str, arrays: list[dict[str, np.ndarray]], device: str, threads: int
) -> None:
    """Load the artifact, run the batches and send the memory to ``answer``: the body of the separate process."""
    silence_libraries()
    torch.set_num_threads(threads)
    with contextlib.suppress(ImportError):
        importlib.import_module(read_description(folder, kind).runtime)
    gpu = torch.device(device).type == "cuda"
    if gpu:
        torch.zeros(1, device=device)  # allocates the driver's share
        torch.cuda.reset_peak_memory_stats(device)
    libraries = read_peak_bytes()
    model = load_artifact(folder, kind).model
    move_model(model, torch.device(device))
    for batch in arrays:
        model(**{key: torch.from_numpy(array).to(device) for key, array in batch.items()})
    answer.send(Memory(read_peak_bytes(), libraries, torch.cuda.max_memory_allocated(device) if gpu else None))


def read_peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def find_energy_meter(device: torch.device, rapl: Path = RAPL) -> Callable[[], float] | None:
    """Return a counter of the joules used by the GPU, or by all packages of the CPU; None if no counter is readable."""
    if device.type == "cuda":
        try:
            import pynvml

            pynvml.nvmlInit()
            gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
        except Exception:  # not installed, no driver, or a GPU without the counter
            return None
        return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3
    packages = [folder for folder in rapl.glob("intel-rapl:*") if folder.name.count(":") == 1]
    try:
        last = {folder: int((folder / "energy_uj").read_text(encoding="utf-8")) for folder in packages}
        ranges = {folder: int((folder / "max_energy_range_uj").read_text(encoding="utf-8")) for folder in packages}
    except (OSError, ValueError):  # only root may read them
        return None
    total = 0

    def read() -> float:
        nonlocal total
        for folder in packages:
            now = int((folder / "energy_uj").read_text(encoding="utf-8"))
            total += (now - last[folder]) % (ranges[folder] + 1)  # the counter wraps to 0
            last[folder] = now
        return total / 1e6

    return read if packages else None


@dataclass(frozen=True)
class Work:
    """Mean cost of a text.

    ``cpu_ms`` is the time of the process summed over all cores, ``gpu_ms`` the time between CUDA events around a call
    (None without a GPU). ``energy_j`` includes everything that the machine did meanwhile (None without a counter).
    """

    cpu_ms: float
    gpu_ms: float | None
    energy_j: float | None


def measure_work(
    call: Callable[[int], None],
    cycle: int,
    texts: int,
    seconds: float,
    device: torch.device,
    joules: Callable[[], float] | None,
) -> Work:
    """Measure ``call(i)``, which runs ``texts`` texts and waits for the device.

    Whole cycles of ``i`` are repeated for at least ``seconds``.
    """
    gpu_ms: list[float] = []
    begin, cpu, used, calls = time.perf_counter(), time.process_time(), joules() if joules else 0.0, 0
    while not calls or time.perf_counter() - begin < seconds:
        for i in range(cycle):
            if device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call(i)
                end.record()
                end.synchronize()
                gpu_ms.append(start.elapsed_time(end))
            else:
                call(i)
        calls += cycle
    return Work(
        cpu_ms=1000 * (time.process_time() - cpu) / (calls * texts),
        gpu_ms=sum(gpu_ms) / (calls * texts) if gpu_ms else None,
        energy_j=(joules() - used) / (calls * texts) if joules else None,
    )
