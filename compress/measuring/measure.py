"""Measure reloaded artifacts: quality on a split, size on disk, time, memory and energy."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from compress.artifacts.artifact import Artifact, measure_size_bytes
from compress.errors import PostconditionError
from compress.formats.bnb import move_model
from compress.maths.statistics import Interval
from compress.measuring.bench import Bench, list_texts
from compress.measuring.generation import Generation, build_tokenising_call, measure_generation
from compress.measuring.meters import Memory, Work, find_energy_meter, measure_memory, measure_work
from compress.measuring.predictions import NEGATION, Comparison, Predictions, compare_predictions
from compress.models.costs import count_macs
from compress.models.matrices import dequantize_weight
from compress.runtimes.processor import name_processor
from compress.runtimes.runtime import import_runtime
from compress.runtimes.timing import (
    BUSY,
    Batch,
    Latency,
    Spread,
    build_model_call,
    estimate_speedup,
    move_batch,
    summarise_times,
    time_in_turns,
)
from compress.tasks.harness import answer_questions
from compress.tasks.kinds import KINDS, Answers
from compress.tasks.task import Task


@dataclass(frozen=True)
class Measurement:
    """The figures of an artifact, computed by the same code for every artifact.

    Attributes:
        quality: metrics over all ``examples`` of the ``split``, as fractions (except perplexity).
        latency_tokens: mean tokens of the texts that were timed, without padding; ``throughput_tokens`` likewise.
        speedup: factor over the baseline, timed in turns with it on the batches of the latency; None for the baseline.
        speedup_same_runtime: factor over the baseline exported to the same runtime in float32, which is the effect of
            compression alone; None on PyTorch.
        batches: times of every batch size.
        comparison: quality compared with the baseline's; None for the baseline or if the examples differ.
        macs: multiply-accumulates of a text of median length; None if they cannot be counted.
        work: mean cost of a text of the latency.
        tokenizer_ms: median time to tokenize a text.
        others: share of our CPUs that others took during the most disturbed of all timings: other processes, or a
            limit of the operating system on our own.
        measuring_time_s: time of the whole measurement, including every artifact measured with this one.
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
        """Whether other processes took so much of the machine that the times are uncertain."""
        return self.others > BUSY


def measure_artifacts(
    benches: dict[str, Bench], task: Task, latency: Latency, device: torch.device, exported: Artifact | None = None
) -> tuple[dict[str, Measurement], dict[str, Predictions]]:
    """Return the measurements and the predictions of every artifact, by name.

    The first artifact is the baseline that the others are compared with; ``exported`` is the baseline on another
    runtime. If any artifact runs on another runtime than PyTorch, all are measured on the CPU.
    """
    begin = time.perf_counter()
    # 1) Count weights before the first forward pass, and memory in separate processes
    runtimes = {bench.artifact.description.runtime for bench in benches.values()}
    if any(device.type not in import_runtime(name).DEVICES for name in runtimes):
        device = torch.device("cpu")
    counts = {name: count_parameters(bench.artifact.model) for name, bench in benches.items()}
    memory = {
        name: measure_memory(
            bench.folder, task.kind, [batch for batches in bench.batches.values() for batch in batches], device
        )
        for name, bench in benches.items()
        if latency.memory
    }
    # 2) Predict the split, and count operations
    for bench in benches.values():
        move_model(bench.artifact.model, device)
    answers = {name: predict_split(bench, task, device, f"testing {name}") for name, bench in benches.items()}
    macs = {
        name: count_macs(bench.artifact.model, move_batch(bench.texts[len(bench.texts) // 2], device))
        for name, bench in benches.items()
    }
    # 3) Time every batch size in turns
    baseline = next(iter(benches))
    first, last = latency.batch_sizes[0], latency.batch_sizes[-1]
    turns = {}
    for size in latency.batch_sizes:
        calls = {
            name: build_model_call(bench.artifact.model, bench.batches[size], device) for name, bench in benches.items()
        }
        if exported and size == first:
            calls[""] = build_model_call(exported.model, benches[baseline].batches[size], device)
        cycle = len(benches[baseline].batches[size])
        turns[size] = time_in_turns(calls, latency, cycle, label=f"batches of {size}")
    times = {size: turn.blocks for size, turn in turns.items()}
    # 4) Measure energy, tokenizing and generation
    joules = find_energy_meter(device)
    seconds = latency.seconds if joules else latency.block_s
    work = {}
    for name, bench in benches.items():
        call, cycle = build_model_call(bench.artifact.model, bench.batches[first], device), len(bench.batches[first])
        work[name] = measure_work(call, cycle, first, seconds, device, joules)
    reading = {name: build_tokenising_call(bench) for name, bench in benches.items()}
    read = time_in_turns(reading, replace(latency, seconds=latency.block_s), latency.texts, label="tokenizing")
    generations, others = measure_generation(benches, latency, device) if KINDS[task.kind].generates else ({}, 0.0)
    others = max(others, read.others, *(turn.others for turn in turns.values()))
    spreads = {name: {size: summarise_times(times[size][name]) for size in latency.batch_sizes} for name in benches}
    # 5) Collect the figures
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
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else name_processor(),
            threads=torch.get_num_threads(),
            batches=spreads[name],
            comparison=None
            if name == baseline
            else compare_predictions(answers[baseline][1], answers[name][1], task.primary),
            generation=generations.get(name),
            memory=memory.get(name),
            macs=macs[name],
            work=work[name],
            tokenizer_ms=summarise_times(read.blocks[name]).median_ms,
            others=others,
            measuring_time_s=spent,
            split=bench.split,
        )
        for name, bench in benches.items()
    }, {name: predictions for name, (_, predictions) in answers.items()}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of parameters and the number of non-zero parameters.

    Packed weights count as the floats that they represent, so call this before the first forward pass, which may
    convert them.
    """
    each = [(weight.numel(), int(weight.count_nonzero())) for weight in map(dequantize_weight, model.parameters())]
    return sum(number for number, _ in each), sum(nonzero for _, nonzero in each)


def mean_length(batches: list[Batch]) -> float:
    """Return the mean number of tokens of a text, without padding."""
    return float(np.mean([length for batch in batches for length in batch["attention_mask"].sum(1).tolist()]))


@torch.inference_mode()
def predict_split(
    bench: Bench, task: Task, device: torch.device, label: str = "testing"
) -> tuple[dict[str, float], Predictions]:
    """Return the task's metrics over the whole split, and the predictions in the order of the split.

    Raises:
        PostconditionError: an output is not finite. Every metric would count such an answer as a choice.
    """
    kind = KINDS[task.kind]
    if kind.in_harness:
        answers = answer_questions(task, bench.artifact.model, bench.artifact.tokenizer, device, label)
        tokens = np.array([len(ids) for ids in bench.data.tokenised(bench.split)["input_ids"]])
        return keep_predictions(bench, task, answers, tokens)
    outputs, labels, lengths = [], [], []
    for batch in tqdm(bench.batched, desc=label, unit="batch", leave=False, disable=None):
        batch = move_batch(batch, device)
        wanted = batch.pop("labels")
        lengths.append(batch["attention_mask"].sum(1).cpu())
        part, wanted = kind.keep_answers(bench.artifact.model(**batch).logits, wanted)
        outputs.append(part.cpu())
        labels.append(wanted.cpu())
    order = torch.tensor(bench.data.in_order(bench.split)).argsort()
    found, truth = map(torch.cat, (outputs, labels))
    if not kind.numbers_rows:
        found, truth = found[order], truth[order]
    answers = kind.collect_answers(found.numpy(), truth.numpy(), getattr(bench.data.splits, bench.split))
    return keep_predictions(bench, task, answers, torch.cat(lengths)[order].numpy())


def keep_predictions(
    bench: Bench, task: Task, answers: Answers, tokens: np.ndarray
) -> tuple[dict[str, float], Predictions]:
    """Return the task's metrics and the predictions, given the ``tokens`` of each row of the split.

    Raises:
        PostconditionError: an output is not finite.
    """
    kind = KINDS[task.kind]
    examples = len(answers.outputs)
    if broken := int((~np.isfinite(answers.outputs).reshape(examples, -1).all(1)).sum()):
        raise PostconditionError(
            f"The outputs for {broken} of the {examples} examples of the {bench.split} split are not finite."
        )
    if kind.reads_windows:
        tokens = np.bincount(bench.data.tokenised(bench.split)["row"], weights=tokens).astype(int)
    texts = list_texts(bench)
    if answers.rows is not None:
        owners = answers.rows.reshape(examples, -1)
        tokens, texts = tokens[owners].sum(1), [" ".join(texts[row] for row in rows) for rows in owners]
    predictions = Predictions(
        task.kind,
        answers.outputs,
        answers.labels,
        tokens=tokens,
        characters=np.array([len(text) for text in texts] or [0] * examples),
        negated=np.array([bool(NEGATION.search(text)) for text in texts] or [False] * examples),
        names=task.labels or (),
    )
    return {name: predictions.score(name) for name in task.metrics}, predictions
