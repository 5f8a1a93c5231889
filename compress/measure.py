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
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from tqdm.auto import tqdm

from compress import bnb
from compress.artifact import Artifact, size_bytes
from compress.techniques.finetune import aligned

Batch = dict[str, torch.Tensor]


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Latency:
    """How latency and throughput are measured.

    ``texts`` texts of the test split, from short to long, run one at a time for the latency; the one of median length,
    ``throughput_batch_size`` times, runs for the throughput. Artifacts take turns in blocks of at least ``block_s``
    seconds and one round of the texts, until each has had ``seconds`` and three blocks.
    """

    seconds: Annotated[float, Field(gt=0)] = 2.0
    block_s: Annotated[float, Field(gt=0)] = 0.25
    warmup: Annotated[int, Field(ge=1)] = 3
    texts: Annotated[int, Field(ge=1)] = 8
    throughput_batch_size: Annotated[int, Field(ge=1)] = 32


@dataclass(frozen=True)
class Bench:
    """An artifact ready to be measured: its folder, the test split in its tokens, and texts to time, one a batch."""

    folder: Path
    artifact: Artifact
    test: DataLoader
    texts: list[Batch]


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
    times faster than the baseline one text runs, timed in turns with it; None where there was no baseline. On another
    runtime than PyTorch ``speedup_same_runtime`` is the same against the baseline exported to it in float32: what
    compression alone is worth there. The tokens are those of the texts that were timed: on average for the latency,
    each for the throughput.
    """

    quality: dict[str, float]
    examples: int
    size_bytes: int
    parameters: int
    nonzeros: int
    latency: Spread
    latency_tokens: float
    throughput_per_s: float
    throughput_tokens: int
    speedup: Interval | None
    speedup_same_runtime: Interval | None
    runtime: str
    device: str
    threads: int


def measure(
    benches: dict[str, Bench],
    metrics: MetricCollection,
    latency: Latency,
    device: torch.device,
    exported: Artifact | None = None,
) -> dict[str, Measurement]:
    """Measure every artifact; the first is the baseline that the others are timed against, and ``exported`` is it on
    another runtime. Runtimes other than PyTorch work on the CPU here, and what is compared with them does too."""
    if any(not bench.artifact.description.runtime.startswith("torch") for bench in benches.values()):
        device = torch.device("cpu")
    counts = {name: count(bench.artifact.model) for name, bench in benches.items()}
    singles, batches = {}, {}
    for name, bench in benches.items():
        bnb.move(bench.artifact.model, device)
        texts = [to_device(text, device) for text in bench.texts]
        singles[name] = texts
        batches[name] = repeat(texts[len(texts) // 2], latency.throughput_batch_size)
    qualities = {name: quality(b.artifact, metrics, b.test, device, f"testing {name}") for name, b in benches.items()}
    one = {name: runner(bench.artifact, singles[name], device) for name, bench in benches.items()}
    many = {name: runner(bench.artifact, [batches[name]], device) for name, bench in benches.items()}
    baseline = next(iter(benches))
    if exported:
        one[""] = runner(exported, singles[baseline], device)
    alone = take_turns(one, latency, cycle=len(next(iter(singles.values()))), label="latency")
    together = take_turns(many, latency, cycle=1, label="throughput")
    return {
        name: Measurement(
            quality=qualities[name],
            examples=len(bench.test.dataset),  # type: ignore[arg-type]
            size_bytes=size_bytes(bench.folder),
            parameters=counts[name][0],
            nonzeros=counts[name][1],
            latency=spread(alone[name]),
            latency_tokens=float(np.mean([text["input_ids"].shape[1] for text in singles[name]])),
            throughput_per_s=1000 * latency.throughput_batch_size / spread(together[name]).median_ms,
            throughput_tokens=batches[name]["input_ids"].shape[1],
            speedup=None if name == baseline else speedup(alone[baseline], alone[name]),
            speedup_same_runtime=speedup(alone[""], alone[name])
            if exported and exported.description.runtime == bench.artifact.description.runtime
            else None,
            runtime=bench.artifact.description.runtime,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            threads=torch.get_num_threads(),
        )
        for name, bench in benches.items()
    }


def count(model: nn.Module) -> tuple[int, int]:
    """How many parameters the model has, and how many that are not zero; packed ones by what they stand for, which has
    to be read before the first forward pass."""
    each = [(weight.numel(), int(weight.count_nonzero())) for weight in map(bnb.values, model.parameters())]
    return sum(number for number, _ in each), sum(nonzero for _, nonzero in each)


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


def take_turns(
    calls: dict[str, Callable[[int], None]], latency: Latency, cycle: int, label: str = "timing"
) -> dict[str, list[np.ndarray]]:
    """Time ``call(i)`` of each name in alternating blocks of whole cycles of ``i``; milliseconds, ``{name: blocks}``.

    Taking turns lets a disturbance of the machine fall on all alike, and the pause between blocks lets the thread pool
    of one come to rest before the next is timed.
    """
    for call in calls.values():
        begin = time.perf_counter()
        for i in range(max(latency.warmup, cycle)):
            if i < cycle or time.perf_counter() - begin < latency.seconds:
                call(i)
    blocks: dict[str, list[np.ndarray]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    bar = tqdm(
        total=latency.seconds, desc=label, bar_format="{desc}: {percentage:.0f}%|{bar}|", leave=False, disable=None
    )
    while min(spent.values()) < latency.seconds or min(map(len, blocks.values())) < 3:
        for name, call in calls.items():
            time.sleep(0.04)
            times: list[float] = []
            begin = time.perf_counter()
            while time.perf_counter() - begin < latency.block_s:
                for i in range(cycle):
                    start = time.perf_counter()
                    call(i)
                    times.append(1000 * (time.perf_counter() - start))
            blocks[name].append(np.array(times))
            spent[name] += sum(times) / 1000
        bar.update(min(latency.seconds, *spent.values()) - bar.n)
    bar.close()
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


def repeat(text: Batch, batch_size: int) -> Batch:
    """One text ``batch_size`` times: a batch in which every token is real."""
    return {key: value.expand(batch_size, -1).contiguous() for key, value in text.items()}


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device) for key, value in batch.items()}
