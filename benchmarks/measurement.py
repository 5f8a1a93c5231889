"""Whether the measurement can be believed: an artifact against itself, and against itself with something planted.

    python train.py
    python benchmarks/measurement.py multirun/2026-01-31/12-00-00/artifact [--repeats 20] [--seconds 2]

Against itself 95 of 100 intervals of the speed-up should hold 1, and no change of quality should be significant; a
slowdown of 3 % and a loss of 1 point of accuracy, planted, should be found.
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
    """A model with something planted into its calls."""

    def __init__(self, model: Any, call: Callable[..., Any]) -> None:
        self.model, self.call = model, call

    def __call__(self, **batch: Any) -> Any:
        return self.call(self.model, **batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def slower(model: Any, **batch: Any) -> Any:
    """Busy for a little longer than the model is."""
    begin = time.perf_counter()
    answered = model(**batch)
    end = time.perf_counter()
    while time.perf_counter() < end + SLOWDOWN * (end - begin):
        pass
    return answered


def worse(bench: Bench, task: Task, device: Any) -> Callable[..., Any]:
    """Wrong about a hundredth of the test split that the model is right about: right logits in the wrong places."""
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


def tell(what: str, found: list[Measurement]) -> None:
    speeds = [one.speedup for one in found if one.speedup]
    half = np.median([(one.high - one.low) / 2 for one in speeds])
    covered, below = sum(one.low <= 1 <= one.high for one in speeds), sum(one.high < 1 for one in speeds)
    changes = [one.comparison for one in found if one.comparison]
    significant = sum(one.p_value < 0.05 for one in changes)
    points = 100 * np.mean([one.change.value for one in changes])
    print(
        f"{what}: speed-up {np.mean([one.value for one in speeds]):.4f} on average, half-width {half:.4f}; of "
        f"{len(found)} intervals {covered} hold 1 and {below} lie below it; quality {points:+.2f} points on average, "
        f"significant in {significant}"
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
        found = []
        for number in range(options.repeats):
            one = measure_artifacts({"baseline": baseline, "variant": variant}, splits.task, latency, device)[0][
                "variant"
            ]
            found.append(one)
            print(f"  {what}, {number + 1}: {one.speedup}", flush=True)
        tell(what, found)


if __name__ == "__main__":
    main()
