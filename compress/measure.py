"""What a reloaded artifact is worth: quality on the test split, size on disk, time, memory and energy to run."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from compress import bnb, meters
from compress.artifact import Artifact, size_bytes
from compress.data import TaskData
from compress.meters import Memory, Work
from compress.metrics import metrics
from compress.predictions import NEGATION, Comparison, Predictions, compare
from compress.stats import Interval, mean_interval
from compress.tasks import Task
from compress.techniques.finetune import aligned

Batch = dict[str, torch.Tensor]
BUSY = 0.1
"""The share of the CPUs beyond which other processes disturb a round."""
PATIENCE = 3
FEWEST = 4
Step = Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Latency:
    """How the cost of running an artifact is measured.

    Real texts of the test split, from short to long, run in batches of each of ``batch_sizes``: ``texts`` of them in
    all, or one whole batch where that is more. The first size is that of the latency, the last that of the throughput.
    Artifacts take turns in blocks of at least ``block_s`` seconds and one round of the batches, until each has had
    ``seconds`` and four blocks while the machine was quiet, or three times as long. That is the budget of every size,
    and for a causal language model again of the generation of ``new_tokens``. ``memory``: the peak of each artifact in
    a process of its own.
    """

    seconds: Annotated[float, Field(gt=0)] = 2.0
    block_s: Annotated[float, Field(gt=0)] = 0.1
    warmup: Annotated[int, Field(ge=1)] = 3
    texts: Annotated[int, Field(ge=1)] = 8
    batch_sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 32)
    new_tokens: Annotated[int, Field(ge=1)] = 16
    memory: bool = True


@dataclass(frozen=True)
class Bench:
    """An artifact ready to be measured: its folder, a split in its tokens, the single texts to time and the same before
    they were tokens, and the batches to time by their size."""

    folder: Path
    artifact: Artifact
    split: str
    batched: DataLoader
    texts: list[Batch]
    data: TaskData
    words: list[tuple[str, ...]]
    batches: dict[int, list[Batch]]


def bench(folder: Path, loaded: Artifact, data: TaskData, latency: Latency, split: str = "test") -> Bench:
    """An artifact with a split of ``data``, which is in its own tokens."""
    batches = {size: data.texts(max(1, latency.texts // size), split, size) for size in latency.batch_sizes}
    singles, words = data.texts(latency.texts, split), data.words(split, latency.texts)
    return Bench(folder, loaded, split, data.in_batches(split), singles, data, words, batches)


@dataclass(frozen=True)
class Spread:
    """Times of single calls, in milliseconds; ``low_ms`` and ``high_ms`` are the 95 % bootstrap interval of the median,
    blocks drawn whole."""

    median_ms: float
    mean_ms: float
    p95_ms: float
    repeats: int
    sd_ms: float = 0.0
    p99_ms: float = 0.0
    low_ms: float = 0.0
    high_ms: float = 0.0


@dataclass(frozen=True)
class Generation:
    """A causal language model that goes on from a prompt, a token at a time, with what it keeps of the tokens before:
    the time to the first new token, and that of each one after it. Every artifact is fed the text's own tokens."""

    first_token: Spread
    per_token: Spread
    prompt_tokens: int
    new_tokens: int


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
    def disturbed(self) -> bool:
        """Whether others took so much of the machine that the times mean little."""
        return self.others > BUSY


def measure(
    benches: dict[str, Bench], task: Task, latency: Latency, device: torch.device, exported: Artifact | None = None
) -> tuple[dict[str, Measurement], dict[str, Predictions]]:
    """Measure every artifact, and what each answered on its split; the first is the baseline that the others are
    compared with, and ``exported`` is it on another runtime. Runtimes other than PyTorch work on the CPU here, and what
    is compared with them does too."""
    begin = time.perf_counter()
    if any(not bench.artifact.description.runtime.startswith("torch") for bench in benches.values()):
        device = torch.device("cpu")
    counts = {name: count(bench.artifact.model) for name, bench in benches.items()}
    memory = {
        name: meters.memory(
            bench.folder, task.kind, [batch for batches in bench.batches.values() for batch in batches], device
        )
        for name, bench in benches.items()
        if latency.memory
    }
    for bench in benches.values():
        bnb.move(bench.artifact.model, device)
    answers = {name: answer(bench, task, device, f"testing {name}") for name, bench in benches.items()}
    macs = {
        name: meters.macs(bench.artifact.model, to_device(bench.texts[len(bench.texts) // 2], device))
        for name, bench in benches.items()
    }
    baseline = next(iter(benches))
    first, last = latency.batch_sizes[0], latency.batch_sizes[-1]
    turns = {}
    for size in latency.batch_sizes:
        calls = {name: runner(bench.artifact, bench.batches[size], device) for name, bench in benches.items()}
        if exported and size == first:
            calls[""] = runner(exported, benches[baseline].batches[size], device)
        cycle = len(benches[baseline].batches[size])
        turns[size] = take_turns(calls, latency, cycle, label=f"batches of {size}")
    times = {size: one.blocks for size, one in turns.items()}
    joules = meters.energy_meter(device)
    seconds = latency.seconds if joules else latency.block_s
    work = {}
    for name, bench in benches.items():
        call, cycle = runner(bench.artifact, bench.batches[first], device), len(bench.batches[first])
        work[name] = meters.work(call, cycle, first, seconds, device, joules)
    reading = {name: reader(bench) for name, bench in benches.items()}
    read = take_turns(reading, replace(latency, seconds=latency.block_s), latency.texts, label="tokenizing").blocks
    generations = generate(benches, latency, device) if task.kind == "lm" else {}
    spreads = {name: {size: spread(times[size][name]) for size in latency.batch_sizes} for name in benches}
    spent = time.perf_counter() - begin
    return {
        name: Measurement(
            quality=answers[name][0],
            examples=len(answers[name][1].labels),
            size_bytes=size_bytes(bench.folder),
            parameters=counts[name][0],
            nonzeros=counts[name][1],
            latency=spreads[name][first],
            latency_tokens=tokens(bench.batches[first]),
            throughput_per_s=1000 * last / spreads[name][last].median_ms,
            throughput_tokens=tokens(bench.batches[last]),
            speedup=None if name == baseline else speedup(times[first][baseline], times[first][name]),
            speedup_same_runtime=speedup(times[first][""], times[first][name])
            if exported and exported.description.runtime == bench.artifact.description.runtime
            else None,
            runtime=bench.artifact.description.runtime,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            threads=torch.get_num_threads(),
            batches=spreads[name],
            comparison=None if name == baseline else compare(answers[baseline][1], answers[name][1], task.primary),
            generation=generations.get(name),
            memory=memory.get(name),
            macs=macs[name],
            work=work[name],
            tokenizer_ms=spread(read[name]).median_ms,
            others=turns[first].others,
            measuring_time_s=spent,
            split=bench.split,
        )
        for name, bench in benches.items()
    }, {name: predictions for name, (_, predictions) in answers.items()}


def count(model: nn.Module) -> tuple[int, int]:
    """How many parameters the model has, and how many that are not zero; packed ones by what they stand for, which has
    to be read before the first forward pass."""
    each = [(weight.numel(), int(weight.count_nonzero())) for weight in map(bnb.values, model.parameters())]
    return sum(number for number, _ in each), sum(nonzero for _, nonzero in each)


def tokens(batches: list[Batch]) -> float:
    """Of a text on average."""
    return float(np.mean([length for batch in batches for length in batch["attention_mask"].sum(1).tolist()]))


@torch.inference_mode()
def answer(
    bench: Bench, task: Task, device: torch.device, label: str = "testing"
) -> tuple[dict[str, float], Predictions]:
    """The task's metrics over the whole split, and what was answered to each of its examples."""
    scores = metrics(task).to(device)
    outputs, labels, lengths = [], [], []
    for batch in tqdm(bench.batched, desc=label, unit="batch", leave=False, disable=None):
        batch = to_device(batch, device)
        wanted = batch.pop("labels")
        lengths.append(batch["attention_mask"].sum(1).cpu())
        logits, wanted = aligned(bench.artifact.model(**batch).logits.float(), wanted)
        scores.update(logits, wanted)
        if task.kind == "lm":
            logits, wanted = by_block(logits, wanted)
        outputs.append(logits.cpu())
        labels.append(wanted.cpu())
    order = torch.tensor(bench.data.in_order(bench.split)).argsort()
    found = {
        name: torch.cat(parts)[order].numpy()
        for name, parts in (("outputs", outputs), ("labels", labels), ("tokens", lengths))
    }
    examples = len(order)
    quality = {name: float(value) for name, value in scores.compute().items()}
    texts = [] if task.kind == "lm" else [" ".join(row) for row in bench.data.words(bench.split)]
    characters = np.array([len(text) for text in texts] or [0] * examples)
    negated = np.array([bool(NEGATION.search(text)) for text in texts] or [False] * examples)
    return quality, Predictions(task.kind, **found, characters=characters, negated=negated, names=task.labels or ())


def by_block(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of every block the sum of its tokens' losses in nats and how many were predicted right, ``[blocks, 2]``; and how
    many there were to predict."""
    there = labels != -100
    losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none").double().sum(1)
    right = ((logits.argmax(-1) == labels) & there).sum(1)
    return torch.stack([losses, right.double()], dim=1), there.sum(1)


def generate(benches: dict[str, Bench], latency: Latency, device: torch.device) -> dict[str, Generation]:
    """The times of those artifacts that keep the tokens before, in turns."""
    calls, prompt, new = {}, 0, 0
    for name, bench in benches.items():
        text = to_device(bench.texts[len(bench.texts) // 2], device)
        new = min(latency.new_tokens, text["input_ids"].shape[1] // 2)
        prompt = text["input_ids"].shape[1] - new
        if new > 1 and (step := decoder(bench.artifact.model, text)):
            calls[name] = writer(step, text["input_ids"], text["attention_mask"], prompt, device)
    found = take_turns(calls, latency, cycle=new, label="generation").blocks if calls else {}
    split = {name: [block.reshape(-1, new) for block in blocks] for name, blocks in found.items()}
    return {
        name: Generation(
            spread([block[:, 0] for block in blocks]), spread([block[:, 1:].ravel() for block in blocks]), prompt, new
        )
        for name, blocks in split.items()
    }


@torch.inference_mode()
def decoder(model: Any, text: Batch) -> Step | None:
    """``step(ids, mask, past)``: the logits of the tokens ``ids`` after those that ``past`` keeps, and what is to be
    kept then; None where the model keeps nothing."""
    if isinstance(model, nn.Module):
        answered = "past_key_values"

        def step(ids: Tensor, mask: Tensor, past: Any) -> tuple[Tensor, Any]:
            given = model(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True)
            return given.logits, given.past_key_values
    else:
        answered = "past"
        if answered not in inspect.signature(type(model).__call__).parameters:
            return None

        def step(ids: Tensor, mask: Tensor, past: Any) -> tuple[Tensor, Any]:
            given = model(input_ids=ids, attention_mask=mask, past=past)
            return given.logits, getattr(given, answered, None)

    return step if step(text["input_ids"], text["attention_mask"], None)[1] is not None else None


def writer(step: Step, ids: Tensor, mask: Tensor, prompt: int, device: torch.device) -> Callable[[int], None]:
    """A call that reads the prompt when ``i`` is 0, and then one more of the tokens that follow it."""
    past: Any = None

    @torch.inference_mode()
    def call(i: int) -> None:
        nonlocal past
        new = ids[:, prompt + i - 1 : prompt + i] if i else ids[:, :prompt]
        logits, past = step(new, mask[:, : prompt + i], past if i else None)
        logits[:, -1].argmax(-1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


def reader(bench: Bench) -> Callable[[int], None]:
    """A call that makes tokens of text ``i``."""
    tokenizer, length = bench.artifact.tokenizer, bench.data.max_length

    def call(i: int) -> None:
        tokenizer(*bench.words[i], truncation=True, max_length=length)

    return call


@dataclass(frozen=True)
class Turns:
    """Milliseconds of single calls, ``{name: blocks}``, and the share of the machine's CPUs that other processes took
    in the meantime."""

    blocks: dict[str, list[np.ndarray]]
    others: float


def take_turns(calls: dict[str, Callable[[int], None]], latency: Latency, cycle: int, label: str = "timing") -> Turns:
    """Time ``call(i)`` of each name in alternating blocks of whole cycles of ``i``.

    Taking turns, in one order and then in the other, lets a disturbance of the machine fall on all alike, and the pause
    between blocks lets the thread pool of one come to rest before the next is timed. Rounds in which other processes
    took more than a tenth of the CPUs are dropped and made up for, for up to three times the budget; where the machine
    does not come to rest by then, all count.
    """
    for call in calls.values():
        begin = time.perf_counter()
        for i in range(max(latency.warmup, cycle)):
            if i < cycle or time.perf_counter() - begin < latency.seconds:
                call(i % cycle)
    rounds: list[dict[str, np.ndarray]] = []
    shares: list[float] = []
    others = Others()
    bar = tqdm(
        total=latency.seconds, desc=label, bar_format="{desc}: {percentage:.0f}%|{bar}|", leave=False, disable=None
    )
    order = list(calls)
    patience, quiet = PATIENCE * latency.seconds * len(calls), rounds
    begin = time.perf_counter()
    while len(quiet) < FEWEST or least(quiet) < latency.seconds:
        if len(rounds) >= FEWEST and time.perf_counter() - begin > patience:
            break
        rounds.append({name: block(calls[name], latency.block_s, cycle) for name in order})
        shares.append(others())
        order.reverse()
        quiet = [one for one, share in zip(rounds, shares) if share <= BUSY]
        bar.update(min(latency.seconds, least(quiet)) - bar.n)
    bar.close()
    kept, counted = (quiet, [share for share in shares if share <= BUSY]) if len(quiet) >= FEWEST else (rounds, shares)
    return Turns({name: [one[name] for one in kept] for name in calls}, float(np.mean(counted)))


def block(call: Callable[[int], None], block_s: float, cycle: int) -> np.ndarray:
    """Milliseconds of the calls of whole cycles."""
    time.sleep(0.04)
    times: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < block_s:
        for i in range(cycle):
            start = time.perf_counter()
            call(i)
            times.append(1000 * (time.perf_counter() - start))
    return np.array(times)


def least(rounds: list[dict[str, np.ndarray]]) -> float:
    """Seconds that the one had that had fewest."""
    return min((sum(one[name].sum() for one in rounds) / 1000 for name in rounds[0]), default=0.0) if rounds else 0.0


class Others:
    """Called, the share of the machine's CPUs that other processes took since the last call, as the system counts."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.last = self.now()

    def now(self) -> tuple[float, float, float]:
        every, own = psutil.cpu_times()._asdict(), self.process.cpu_times()
        # Linux counts guests among the users as well.
        total = sum(seconds for name, seconds in every.items() if not name.startswith("guest"))
        return total, total - every["idle"] - every.get("iowait", 0.0), own.user + own.system

    def __call__(self) -> float:
        before, self.last = self.last, self.now()
        total, busy, own = (now - then for now, then in zip(self.last, before))
        return max(0.0, busy - own) / total if total > 0 else 0.0


def speedup(baseline: list[np.ndarray], variant: list[np.ndarray]) -> Interval:
    """The geometric mean of the ratios of neighbouring blocks' median times, with Student's t interval: above one is
    faster than the baseline. (A bootstrap of so few blocks is too sure of itself.)"""
    ratios = [float(np.log(np.median(b) / np.median(v))) for b, v in zip(baseline, variant)]
    found = mean_interval(ratios)
    return Interval(*np.exp([found.value, found.low, found.high]).tolist())


def spread(blocks: list[np.ndarray]) -> Spread:
    from scipy.stats import bootstrap

    times = np.concatenate(blocks)

    def median(drawn: np.ndarray) -> float:
        return float(np.median(np.concatenate([blocks[i] for i in drawn])))

    low = high = float(np.median(times))
    if len(blocks) > 1:
        low, high = bootstrap((np.arange(len(blocks)),), median, vectorized=False, n_resamples=500, batch=1,
                              method="percentile", random_state=0).confidence_interval  # fmt: skip
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


def runner(artifact: Artifact, batches: list[Batch], device: torch.device) -> Callable[[int], None]:
    """A call that runs batch ``i`` to its end: a GPU's work is waited for."""
    batches = [to_device(batch, device) for batch in batches]

    @torch.inference_mode()
    def call(i: int) -> None:
        artifact.model(**batches[i % len(batches)])
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device) for key, value in batch.items()}
