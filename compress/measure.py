"""What a reloaded artifact is worth: quality on the test split, size on disk, time to run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from tqdm.auto import tqdm

from compress.artifact import Artifact, size_bytes
from compress.techniques.finetune import aligned

Batch = dict[str, torch.Tensor]


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Latency:
    """How latency and throughput are measured.

    ``texts`` texts of the validation split, as long as they are, run one at a time for the latency; the same texts,
    repeated to ``throughput_batch_size``, run together for the throughput. Artifacts take turns in blocks of
    ``block_s`` seconds until each has had ``seconds``.
    """

    seconds: Annotated[float, Field(gt=0)] = 2.0
    block_s: Annotated[float, Field(gt=0)] = 0.25
    warmup: Annotated[int, Field(ge=1)] = 3
    texts: Annotated[int, Field(ge=1)] = 8
    throughput_batch_size: Annotated[int, Field(ge=1)] = 32


@dataclass(frozen=True)
class Spread:
    """Times of single calls, in milliseconds."""

    median_ms: float
    mean_ms: float
    p95_ms: float
    repeats: int


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measurement:
    """One artifact's figures; the same code makes them for every artifact.

    ``quality`` holds fractions (perplexity apart) over all ``examples`` of the test split. ``speedup`` is how many
    times faster than the baseline one text runs, timed in turns with it; None where there was no baseline.
    """

    quality: dict[str, float]
    examples: int
    size_bytes: int
    parameters: int
    nonzeros: int
    latency: Spread
    throughput_per_s: float
    speedup: Interval | None
    device: str
    threads: int


def measure(
    artifacts: dict[str, tuple[Path, Artifact]],
    metrics: MetricCollection,
    test: DataLoader,
    timed_texts: list[Batch],
    timing: Latency,
    device: torch.device,
) -> dict[str, Measurement]:
    """Measure every artifact; the first is the baseline that the others are timed against.

    ``timed_texts`` are tokenised texts of batch size one.
    """
    for _, artifact in artifacts.values():
        artifact.model.to(device)
    qualities = {
        name: quality(artifact, metrics, test, device, f"testing {name}") for name, (_, artifact) in artifacts.items()
    }
    singles = [to_device(text, device) for text in timed_texts]
    together = to_device(stack(timed_texts, timing.throughput_batch_size), device)
    alone = take_turns({n: runner(a, singles, device) for n, (_, a) in artifacts.items()}, timing, len(singles))
    batched = take_turns({n: runner(a, [together], device) for n, (_, a) in artifacts.items()}, timing, 1)
    baseline = next(iter(artifacts))
    return {
        name: Measurement(
            quality=qualities[name],
            examples=len(test.dataset),  # type: ignore[arg-type]
            size_bytes=size_bytes(folder),
            parameters=sum(p.numel() for p in artifact.model.parameters()),
            nonzeros=sum(int(p.count_nonzero()) for p in artifact.model.parameters()),
            latency=spread(alone[name]),
            throughput_per_s=1000 * timing.throughput_batch_size / float(np.median(np.concatenate(batched[name]))),
            speedup=None if name == baseline else speedup(alone[baseline], alone[name]),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            threads=torch.get_num_threads(),
        )
        for name, (folder, artifact) in artifacts.items()
    }


@torch.inference_mode()
def quality(
    artifact: Artifact, metrics: MetricCollection, loader: DataLoader, device: torch.device, label: str = "testing"
) -> dict[str, float]:
    """The metrics over all of ``loader``."""
    metrics = metrics.clone().to(device)
    for batch in tqdm(loader, desc=label, unit="batch", leave=False, disable=None):
        batch = to_device(batch, device)
        labels = batch.pop("labels")
        metrics.update(*aligned(artifact.model(**batch).logits, labels))
    return {name: float(value) for name, value in metrics.compute().items()}


def take_turns(calls: dict[str, Callable[[int], None]], timing: Latency, cycle: int) -> dict[str, list[np.ndarray]]:
    """Time ``call(i)`` of each name in alternating blocks of whole cycles of ``i``; milliseconds, ``{name: blocks}``.

    Taking turns lets a disturbance of the machine fall on all alike, and the pause between blocks lets the thread pool
    of one come to rest before the next is timed.
    """
    for call in calls.values():
        for i in range(max(timing.warmup, cycle)):
            call(i)
    blocks: dict[str, list[np.ndarray]] = {name: [] for name in calls}
    while len(blocks[next(iter(calls))]) < max(4, timing.seconds / timing.block_s):
        for name, call in calls.items():
            time.sleep(0.04)
            times: list[float] = []
            begin = time.perf_counter()
            while time.perf_counter() - begin < timing.block_s:
                for i in range(cycle):
                    start = time.perf_counter()
                    call(i)
                    times.append(1000 * (time.perf_counter() - start))
            blocks[name].append(np.array(times))
    return blocks


def speedup(baseline: list[np.ndarray], variant: list[np.ndarray]) -> Interval:
    """The median ratio of neighbouring blocks' median times: above one is faster than the baseline."""
    from scipy.stats import bootstrap

    ratios = np.array([np.median(b) / np.median(v) for b, v in zip(baseline, variant)])
    found = bootstrap((ratios,), np.median, n_resamples=2000, method="percentile", random_state=0).confidence_interval
    return Interval(float(np.median(ratios)), float(found.low), float(found.high))


def spread(blocks: list[np.ndarray]) -> Spread:
    times = np.concatenate(blocks)
    return Spread(float(np.median(times)), float(times.mean()), float(np.percentile(times, 95)), len(times))


def runner(artifact: Artifact, batches: list[Batch], device: torch.device) -> Callable[[int], None]:
    """A call that runs batch ``i`` to its end: a GPU's work is waited for."""

    @torch.inference_mode()
    def call(i: int) -> None:
        artifact.model(**batches[i % len(batches)])
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


def stack(texts: list[Batch], batch_size: int) -> Batch:
    """One batch of ``batch_size`` texts, the given ones repeated and cut to the length of the shortest: every token in
    it is real."""
    length = min(text["input_ids"].shape[1] for text in texts)
    rows = [texts[i % len(texts)] for i in range(batch_size)]
    return {key: torch.cat([row[key][:, :length] for row in rows]) for key in texts[0]}


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device) for key, value in batch.items()}
