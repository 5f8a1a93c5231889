"""Show how far timing without warm-up is off: each process loads the same artifact, times its first texts one by one,
and then the same texts warm.

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


def time_texts(folder: Path, texts: int, tokens: int) -> None:
    """Print the seconds of every text's first pass, and of its second pass after ten passes of warm-up."""
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
    options = parser.parse_args()
    if options.one:
        time_texts(options.artifact, options.texts, options.tokens)
        return
    cold, warm = [], []
    for _ in range(options.processes):
        done = subprocess.run([sys.executable, *sys.argv, "--one"], capture_output=True, text=True, check=True)
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(TIMED))
        times = [float(word) for word in line.removeprefix(TIMED).split()]
        cold.append(times[: options.texts])
        warm.append(times[options.texts :])
    first = median(c[0] / median(w) for c, w in zip(cold, warm, strict=True))
    print(f"the first text takes {first:.1f} times as long as a warm one")
    for name, times_s in (
        (f"mean of {options.texts} texts, cold", [mean(c) for c in cold]),
        (f"median of {options.texts} texts, warm", [median(w) for w in warm]),
    ):
        most = max(a / b for a, b in permutations(times_s, 2))
        print(f"{name}: {1000 * median(times_s):.2f} ms; one process against another up to {most:.2f}x 'faster'")


if __name__ == "__main__":
    main()
