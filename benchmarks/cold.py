"""What timing without warm-up says of a model against itself: processes that each load the artifact, time their first
texts one by one, and then the same texts warm.

    python train.py
    python benchmarks/cold.py multirun/2026-01-31/12-00-00/artifact [--processes 10] [--texts 20] [--tokens 32]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from itertools import permutations
from pathlib import Path
from statistics import mean, median

TIMED = "times: "


def one(folder: Path, texts: int, tokens: int) -> None:
    """Print the seconds of every text's first pass, and of its second after ten more for warmth."""
    import torch

    from compress.artifacts.artifact import load_artifact

    model = load_artifact(folder).model.eval()
    batches = [{"input_ids": torch.randint(100, 1000, (1, tokens))} for _ in range(texts)]

    def seconds(batch: dict[str, torch.Tensor]) -> float:
        begin = time.perf_counter()
        model(**batch)
        return time.perf_counter() - begin

    with torch.inference_mode():
        cold = [seconds(batch) for batch in batches]
        for batch in 10 * batches[:1]:
            seconds(batch)
        warm = [seconds(batch) for batch in batches]
    print(TIMED, *cold, *warm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        one(asked.artifact, asked.texts, asked.tokens)
        return
    cold, warm = [], []
    for _ in range(asked.processes):
        done = subprocess.run([sys.executable, *sys.argv, "--one"], capture_output=True, text=True, check=True)
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(TIMED))
        times = [float(word) for word in line.removeprefix(TIMED).split()]
        cold.append(times[: asked.texts])
        warm.append(times[asked.texts :])
    print(
        f"the first text takes {median(c[0] / median(w) for c, w in zip(cold, warm, strict=True)):.1f} times a warm one"
    )
    for name, times_s in (
        (f"mean of {asked.texts} texts, cold", [mean(c) for c in cold]),
        (f"median of {asked.texts} texts, warm", [median(w) for w in warm]),
    ):
        most = max(a / b for a, b in permutations(times_s, 2))
        print(f"{name}: {1000 * median(times_s):.2f} ms; one process against another up to {most:.2f}x 'faster'")


if __name__ == "__main__":
    main()
