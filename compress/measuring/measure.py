"""What a reloaded artifact is worth: quality on the test split, size on disk, time, memory and energy to run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from compress.artifacts.artifact import Artifact, measure_size_bytes
from compress.formats.bnb import move_model
from compress.maths.statistics import Interval
from compress.measuring.bench import Bench
from compress.measuring.generation import Generation, build_tokenising_call, measure_generation
from compress.measuring.meters import Memory, Work, count_macs, find_energy_meter, measure_memory, measure_work
from compress.measuring.predictions import NEGATION, Comparison, Predictions, compare_predictions
from compress.measuring.timing import (
    BUSY,
    Batch,
    Spread,
    build_model_call,
    estimate_speedup,
    move_batch,
    summarise_times,
    time_in_turns,
)
from compress.models.layers import dequantize_weight
from compress.planning.settings import Latency
from compress.tasks.kinds import KINDS
from compress.tasks.task import Task


@dataclass(frozen=True)
class Measurement:
    """One artifact's figures; the same code makes them for every artifact.

    ``quality`` holds fractions (perplexity apart) over all ``examples`` of the ``split``. ``speedup`` is how many
    times faster than the baseline the batches of the latency run, timed in turns with it, and ``comparison`` is of the
    quality; both are None where there was no baseline, the latter also where the examples differ. On another runtime
    than PyTorch ``speedup_same_runtime`` is the speed-up over the baseline exported to it in float32: what compression
    alone is worth there. The tokens are those of the texts that were timed, on average, padding left out. ``batches``
    has the times of every batch size, ``tokenizer_ms`` is the median time to make tokens of one text, ``macs`` are of
    one text of median length, None where they cannot be told, and ``work`` is of one text of the latency on average.
    ``others`` is the share of the machine's CPUs that other processes took while the latency was timed, and
    ``measuring_time_s`` is of the whole measurement, everything that it was compared with counted.
    """

    quality: dict[str, float]
    examples: int
    size_bytes: int
    parameters: int
    nonzeros: int
    latency: Spread
    latency_tokens: float
    throughput_per_s: float
    throughput_tokens: float
    speedup: Interval | None
    speedup_same_runtime: Interval | None
    runtime: str
    device: str
    threads: int
    batches: dict[int, Spread] = field(default_factory=dict)
    comparison: Comparison | None = None
    generation: Generation | None = None
    memory: Memory | None = None
    macs: int | None = None
    work: Work | None = None
    tokenizer_ms: float | None = None
    others: float = 0.0
    measuring_time_s: float = 0.0
    split: str = "test"

    @property
    def is_disturbed(self) -> bool:
        """Whether others took so much of the machine that the times mean little."""
        return self.others > BUSY


def measure_artifacts(
    benches: dict[str, Bench], task: Task, latency: Latency, device: torch.device, exported: Artifact | None = None
) -> tuple[dict[str, Measurement], dict[str, Predictions]]:
    """Measure every artifact, and what each answered on its split; the first is the baseline that the others are
    compared with, and ``exported`` is it on another runtime. Runtimes other than PyTorch work on the CPU here, and what
    is compared with them does too."""
    begin = time.perf_counter()
    if any(not bench.artifact.description.runtime.startswith("torch") for bench in benches.values()):
        device = torch.device("cpu")
    counts = {name: count_parameters(bench.artifact.model) for name, bench in benches.items()}
    memory = {
        name: measure_memory(
            bench.folder, task.kind, [batch for batches in bench.batches.values() for batch in batches], device
        )
        for name, bench in benches.items()
        if latency.memory
    }
    for bench in benches.values():
        move_model(bench.artifact.model, device)
    answers = {name: predict_split(bench, task, device, f"testing {name}") for name, bench in benches.items()}
    macs = {
        name: count_macs(bench.artifact.model, move_batch(bench.texts[len(bench.texts) // 2], device))
        for name, bench in benches.items()
    }
    baseline = next(iter(benches))
    first, last = latency.batch_sizes[0], latency.batch_sizes[-1]
    turns = {}
    for size in latency.batch_sizes:
        calls = {name: build_model_call(bench.artifact, bench.batches[size], device) for name, bench in benches.items()}
        if exported and size == first:
            calls[""] = build_model_call(exported, benches[baseline].batches[size], device)
        cycle = len(benches[baseline].batches[size])
        turns[size] = time_in_turns(calls, latency, cycle, label=f"batches of {size}")
    times = {size: one.blocks for size, one in turns.items()}
    joules = find_energy_meter(device)
    seconds = latency.seconds if joules else latency.block_s
    work = {}
    for name, bench in benches.items():
        call, cycle = build_model_call(bench.artifact, bench.batches[first], device), len(bench.batches[first])
        work[name] = measure_work(call, cycle, first, seconds, device, joules)
    reading = {name: build_tokenising_call(bench) for name, bench in benches.items()}
    read = time_in_turns(reading, replace(latency, seconds=latency.block_s), latency.texts, label="tokenizing").blocks
    generations = measure_generation(benches, latency, device) if KINDS[task.kind].generates else {}
    spreads = {name: {size: summarise_times(times[size][name]) for size in latency.batch_sizes} for name in benches}
    spent = time.perf_counter() - begin
    return {
        name: Measurement(
            quality=answers[name][0],
            examples=len(answers[name][1].labels),
            size_bytes=measure_size_bytes(bench.folder),
            parameters=counts[name][0],
            nonzeros=counts[name][1],
            latency=spreads[name][first],
            latency_tokens=mean_length(bench.batches[first]),
            throughput_per_s=1000 * last / spreads[name][last].median_ms,
            throughput_tokens=mean_length(bench.batches[last]),
            speedup=None if name == baseline else estimate_speedup(times[first][baseline], times[first][name]),
            speedup_same_runtime=estimate_speedup(times[first][""], times[first][name])
            if exported and exported.description.runtime == bench.artifact.description.runtime
            else None,
            runtime=bench.artifact.description.runtime,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            threads=torch.get_num_threads(),
            batches=spreads[name],
            comparison=None
            if name == baseline
            else compare_predictions(answers[baseline][1], answers[name][1], task.primary),
            generation=generations.get(name),
            memory=memory.get(name),
            macs=macs[name],
            work=work[name],
            tokenizer_ms=summarise_times(read[name]).median_ms,
            others=turns[first].others,
            measuring_time_s=spent,
            split=bench.split,
        )
        for name, bench in benches.items()
    }, {name: predictions for name, (_, predictions) in answers.items()}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters the model has, and how many that are not zero; packed ones by what they stand for, which has
    to be read before the first forward pass."""
    each = [(weight.numel(), int(weight.count_nonzero())) for weight in map(dequantize_weight, model.parameters())]
    return sum(number for number, _ in each), sum(nonzero for _, nonzero in each)


def mean_length(batches: list[Batch]) -> float:
    """Of a text on average."""
    return float(np.mean([length for batch in batches for length in batch["attention_mask"].sum(1).tolist()]))


@torch.inference_mode()
def predict_split(
    bench: Bench, task: Task, device: torch.device, label: str = "testing"
) -> tuple[dict[str, float], Predictions]:
    """The task's metrics over the whole split, and what was answered to each of its examples."""
    kind = KINDS[task.kind]
    outputs, labels, lengths = [], [], []
    for batch in tqdm(bench.batched, desc=label, unit="batch", leave=False, disable=None):
        batch = move_batch(batch, device)
        wanted = batch.pop("labels")
        lengths.append(batch["attention_mask"].sum(1).cpu())
        answers, wanted = kind.keep_answers(bench.artifact.model(**batch).logits, wanted)
        outputs.append(answers.cpu())
        labels.append(wanted.cpu())
    order = torch.tensor(bench.data.in_order(bench.split)).argsort()
    found = {
        name: torch.cat(parts)[order].numpy()
        for name, parts in (("outputs", outputs), ("labels", labels), ("tokens", lengths))
    }
    examples = len(order)
    texts = [] if kind.in_blocks else [" ".join(row) for row in bench.data.words(bench.split)]
    characters = np.array([len(text) for text in texts] or [0] * examples)
    negated = np.array([bool(NEGATION.search(text)) for text in texts] or [False] * examples)
    names = task.labels or ()
    predictions = Predictions(task.kind, **found, characters=characters, negated=negated, names=names)
    return {name: predictions.score(name) for name in task.metrics}, predictions
