"""Test the measurement: compare an artifact with itself, and with itself made slower or worse by a known amount.

    python train.py
    python benchmarks/measurement.py multirun/2026-01-31/12-00-00/artifact [--repeats 20] [--seconds 2]

Against itself 95 of 100 intervals of the speed-up should contain 1, and no change of quality should be significant. A
planted slowdown of 3 % and a planted loss of 1 point of accuracy should be found.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir

import compress.planning.chain  # noqa: F401  the configs' resolvers
from compress.artifacts.artifact import load_artifact
from compress.measuring.bench import Bench
from compress.measuring.measure import Measurement, measure_artifacts, predict_split
from compress.planning.settings import parse_values, read_settings
from compress.quiet import silence_libraries
from compress.running.evaluate import read_task
from compress.running.experiment import make_split_bench
from compress.tasks.splits import load_splits
from compress.tasks.task import Task

SLOWDOWN, LOSS = 0.03, 0.01
CONF = Path(__file__).parents[1] / "conf"


class Changed:
    """A model whose calls are changed."""

    def __init__(self, model: Any, call: Callable[..., Any]) -> None:
        self.model, self.call = model, call

    def __call__(self, **batch: Any) -> Any:
        return self.call(self.model, **batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def slower(model: Any, **batch: Any) -> Any:
    """Answer, then stay busy for a known share of the time that the model took."""
    begin = time.perf_counter()
    answer = model(**batch)
    end = time.perf_counter()
    while time.perf_counter() < end + SLOWDOWN * (end - begin):
        pass
    return answer


def worse(bench: Bench, task: Task, device: Any) -> Callable[..., Any]:
    """Return a call that answers ``LOSS`` of the test split wrongly: it shifts the logits of some correct answers."""
    _, before = predict_split(bench, task, device)
    assert before.correct_examples is not None
    count = round(LOSS * len(before.labels))
    rows = bench.data.tokenised("test")
    spoilt: set[tuple[int, ...]] = set()
    for i in np.random.default_rng(0).permutation(np.flatnonzero(before.correct_examples)):
        if len(spoilt) < count:
            spoilt.add(tuple(rows[int(i)]["input_ids"]))

    def call(model: Any, **batch: Any) -> Any:
        logits = model(**batch).logits.clone()
        for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"])):
            if tuple(ids[mask.bool()].tolist()) in spoilt:
                logits[row] = logits[row].roll(1)
        return SimpleNamespace(logits=logits)

    return call


def report(what: str, measurements: list[Measurement]) -> None:
    speeds = [measurement.speedup for measurement in measurements if measurement.speedup]
    half = np.median([(speed.high - speed.low) / 2 for speed in speeds])
    covered, below = sum(speed.low <= 1 <= speed.high for speed in speeds), sum(speed.high < 1 for speed in speeds)
    changes = [measurement.comparison for measurement in measurements if measurement.comparison]
    significant = sum(change.p_value is not None and change.p_value < 0.05 for change in changes)
    points = 100 * np.mean([change.change.value for change in changes])
    print(
        f"{what}: speed-up {np.mean([speed.value for speed in speeds]):.4f} on average, half-width {half:.4f}; of "
        f"{len(measurements)} intervals {covered} contain 1 and {below} are below it; quality {points:+.2f} points on "
        f"average, significant in {significant}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    silence_libraries()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate", [f"artifact={options.artifact}", f"hardware.latency.seconds={options.seconds}"])
    settings = read_settings(cfg)
    latency, device = settings.hardware.latency, settings.hardware.device
    latency = replace(latency, batch_sizes=latency.batch_sizes[:1], memory=False)
    task = parse_values(Task, read_task(cfg), "task")
    splits = load_splits(task, settings.seed)

    def ready() -> Bench:
        return make_split_bench(splits, options.artifact, load_artifact(options.artifact, task.kind), settings)

    baseline, itself = ready(), ready()
    planted = {
        "against itself": None,
        f"{SLOWDOWN:.0%} slower": slower,
        f"{100 * LOSS:.0f} point worse": worse(itself, splits.task, device),
    }
    for what, call in planted.items():
        model = itself.artifact.model
        variant = replace(itself, artifact=itself.artifact._replace(model=Changed(model, call) if call else model))
        measurements = []
        for number in range(options.repeats):
            measured, *_ = measure_artifacts({"baseline": baseline, "variant": variant}, splits.task, latency, device)
            measurements.append(measured["variant"])
            print(f"  {what}, {number + 1}: {measured['variant'].speedup}", flush=True)
        report(what, measurements)


if __name__ == "__main__":
    main()
