"""Time models in turns, and compute speed-ups with their intervals."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated
from tqdm.auto import tqdm

from compress.maths.statistics import Interval, mean_interval

Batch = dict[str, torch.Tensor]
BUSY = 0.1
"""The share of our CPUs above which others disturb a round."""
PATIENCE = 3
"""The factor of the budget that disturbed rounds may take in total."""
PAUSE_S = 0.04
"""The seconds in which the threads of the call before go idle."""
FEWEST = 4
"""The minimum number of rounds."""


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Latency:
    """The settings of measuring the cost of running an artifact.

    ``texts`` real texts of the test split, from short to long, run in batches of each of ``batch_sizes``; a larger
    batch is filled. The first size gives the latency, the last the throughput. Artifacts take turns in blocks of at
    least ``block_s`` seconds and one round of the batches. A size ends when each artifact has had ``seconds`` and four
    blocks while the machine was quiet, or three times as long. A causal language model gets the same budget again to
    generate ``new_tokens``. ``memory``: whether to measure the peak memory of each artifact in its own process.
    """

    seconds: Annotated[float, Field(gt=0)] = 2.0
    block_s: Annotated[float, Field(gt=0)] = 0.1
    warmup: Annotated[int, Field(ge=1)] = 3
    texts: Annotated[int, Field(ge=1)] = 8
    batch_sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 32)
    new_tokens: Annotated[int, Field(ge=1)] = 16
    memory: bool = True


@dataclass(frozen=True)
class Spread:
    """Times of single calls in milliseconds.

    ``low_ms`` and ``high_ms`` are the 95 % bootstrap interval of the median over resampled blocks.
    """

    median_ms: float
    mean_ms: float
    p95_ms: float
    repeats: int
    sd_ms: float = 0.0
    p99_ms: float = 0.0
    low_ms: float = 0.0
    high_ms: float = 0.0


@dataclass(frozen=True)
class Turns:
    """Milliseconds of single calls, ``{name: blocks}``; ``others`` is the mean of :class:`Others` over the rounds."""

    blocks: dict[str, list[np.ndarray]]
    others: float


def time_in_turns(
    calls: dict[str, Callable[[int], None]], latency: Latency, cycle: int, label: str = "timing"
) -> Turns:
    """Time ``call(i)`` of each name in alternating blocks of whole cycles of ``i``.

    Turns in alternating order spread a disturbance of the machine evenly over all calls. A pause between blocks lets
    the thread pool of a call go idle before the next call is timed. Rounds in which others took more than :data:`BUSY`
    of the CPUs are dropped and repeated, for up to :data:`PATIENCE` times the budget. With too few quiet
    rounds, all rounds count.
    """
    # 1) Warm up
    for call in calls.values():
        begin = time.perf_counter()
        for i in range(max(latency.warmup, cycle)):
            if i < cycle or time.perf_counter() - begin < latency.seconds:
                call(i % cycle)
    # 2) Time rounds until enough quiet ones fill the budget
    rounds: list[dict[str, np.ndarray]] = []
    shares: list[float] = []
    others = Others()
    bar = tqdm(
        total=latency.seconds, desc=label, bar_format="{desc}: {percentage:.0f}%|{bar}|", leave=False, disable=None
    )
    order = list(calls)
    patience, quiet = PATIENCE * latency.seconds * len(calls), rounds
    begin = time.perf_counter()
    while len(quiet) < FEWEST or least_seconds(quiet) < latency.seconds:
        if len(rounds) >= FEWEST and time.perf_counter() - begin > patience:
            break
        rounds.append({name: time_block(calls[name], latency.block_s, cycle) for name in order})
        shares.append(others())
        order.reverse()
        quiet = [blocks for blocks, share in zip(rounds, shares) if share <= BUSY]
        bar.update(min(latency.seconds, least_seconds(quiet)) - bar.n)
    bar.close()
    # 3) Keep the quiet rounds
    kept, counted = (quiet, [share for share in shares if share <= BUSY]) if len(quiet) >= FEWEST else (rounds, shares)
    return Turns({name: [blocks[name] for blocks in kept] for name in calls}, float(np.mean(counted)))


def time_block(call: Callable[[int], None], block_s: float, cycle: int) -> np.ndarray:
    """Return the milliseconds of each call in whole cycles of ``i``, after a pause."""
    time.sleep(PAUSE_S)
    times: list[float] = []
    begin = time.perf_counter()
    while not times or time.perf_counter() - begin < block_s:  # a busy machine may stop us before the first call
        for i in range(cycle):
            start = time.perf_counter()
            call(i)
            times.append(1000 * (time.perf_counter() - start))
    return np.array(times)


def least_seconds(rounds: list[dict[str, np.ndarray]]) -> float:
    """Return the seconds of the call that was timed least."""
    if not rounds:
        return 0.0
    return min((sum(blocks[name].sum() for blocks in rounds) / 1000 for name in rounds[0]), default=0.0)


class Others:
    """A callable that returns the share of our CPUs that others took since its last call.

    Our CPUs are those on which this process may run. Others are other processes, or a limit of the control group
    (of a container, a SLURM job or a service), which stops this process although a CPU is free.
    """

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.last = self.now()

    def now(self) -> tuple[float, float, float, float]:
        """Return the seconds of one of our CPUs, and how many of them were busy, our own, and stopped at a limit."""
        times, own = self.read_cpu_times(), self.process.cpu_times()
        # Linux includes guest time in user time.
        each = [{name: s for name, s in cpu._asdict().items() if not name.startswith("guest")} for cpu in times]
        total = sum(sum(cpu.values()) for cpu in each) / len(each)
        idle = sum(cpu["idle"] + cpu.get("iowait", 0.0) for cpu in each) / len(each)
        return total, total - idle, (own.user + own.system) / len(each), read_throttled_seconds()

    def read_cpu_times(self) -> list[Any]:
        """Return the times of our CPUs since the machine started; of all CPUs if the system does not say."""
        times = psutil.cpu_times(percpu=True)
        own = self.process.cpu_affinity() if hasattr(self.process, "cpu_affinity") else []
        return [times[cpu] for cpu in own if cpu < len(times)] or times

    def __call__(self) -> float:
        before, self.last = self.last, self.now()
        total, busy, own, stopped = (now - then for now, then in zip(self.last, before))
        return min(1.0, max(0.0, busy - own, stopped) / total) if total > 0 else 0.0


def read_throttled_seconds(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the seconds in which Linux has stopped this process's control groups at their limit; 0 elsewhere.

    A limit may be on any group of the hierarchy, and each counts its own.
    """
    try:
        paths = [line.split(":", 2)[1:] for line in groups.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return 0.0
    seconds = 0.0
    for controllers, path in paths:
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers if controllers else root  # version 1 mounts each set of controllers
        folder = top / path.lstrip("/")
        for level in (folder, *folder.parents):
            if not level.is_relative_to(top):
                break
            with contextlib.suppress(OSError):
                counts = dict(line.split() for line in (level / "cpu.stat").read_text().splitlines())
                seconds += int(counts.get("throttled_usec", 0)) / 1e6 + int(counts.get("throttled_time", 0)) / 1e9
    return seconds


def estimate_speedup(baseline: list[np.ndarray], variant: list[np.ndarray]) -> Interval:
    """Return the geometric mean of the ratios of neighbouring blocks' median times, with Student's t interval.

    A value above 1 is faster than the baseline. (With so few blocks, bootstrap intervals would be too narrow.)
    """
    ratios = [float(np.log(np.median(b) / np.median(v))) for b, v in zip(baseline, variant)]
    interval = mean_interval(ratios)
    return Interval(*np.exp([interval.value, interval.low, interval.high]).tolist())


def summarise_times(blocks: list[np.ndarray]) -> Spread:
    from scipy.stats import bootstrap

    times = np.concatenate(blocks)
    order, numbers = times.argsort(), np.arange(len(blocks))
    owners = np.repeat(numbers, [len(block) for block in blocks])[order]
    earlier = (owners[:, None] == numbers).cumsum(0)  # times of each block up to each of the ordered times

    def find_ranked(counts: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """Return the time of a ``rank`` in each row of :func:`medians`, by bisection."""
        low, high = np.zeros_like(rank), np.full_like(rank, len(times) - 1)
        while (low < high).any():
            middle = (low + high) // 2
            enough = (counts * earlier[middle]).sum(1) > rank
            low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
        return times[order[low]]

    def medians(drawn: np.ndarray, axis: int = -1) -> np.ndarray:  # scipy's own loop takes far longer
        rows = drawn.reshape(-1, len(blocks))
        counts = (rows[:, :, None] == numbers).sum(1)  # of each block in each row
        total = counts @ earlier[-1]
        middle = find_ranked(counts, (total - 1) // 2) + find_ranked(counts, total // 2)
        return (middle / 2).reshape(drawn.shape[:-1])

    low = high = float(np.median(times))
    if len(blocks) > 1:
        low, high = bootstrap((np.arange(len(blocks)),), medians, vectorized=True, n_resamples=500, method="percentile",
                              random_state=0).confidence_interval  # fmt: skip
    return Spread(
        median_ms=float(np.median(times)),
        mean_ms=float(times.mean()),
        p95_ms=float(np.percentile(times, 95)),
        repeats=len(times),
        sd_ms=float(times.std(ddof=1)) if len(times) > 1 else 0.0,
        p99_ms=float(np.percentile(times, 99)),
        low_ms=float(low),
        high_ms=float(high),
    )


def build_model_call(model: Any, batches: list[Batch], device: torch.device) -> Callable[[int], None]:
    """Return ``call(i)``, which runs batch ``i`` and waits for the device."""
    batches = [move_batch(batch, device) for batch in batches]

    @torch.inference_mode()
    def call(i: int) -> None:
        model(**batches[i % len(batches)])
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


def move_batch(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device) for key, value in batch.items()}
