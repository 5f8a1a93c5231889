r"""Time a sweep of twelve chains, the BERT rows of docs/studies.md, with the cache. It is compared with the same chains
without a cache, and with the sum of its distinct stages, each made once, and of its measurements, one a chain.

    python benchmarks/shared_stages.py                  # the built-in model and data, some minutes
    python benchmarks/shared_stages.py model=minilm model.path=FOLDER task=sst2 task.path=FOLDER \
        task.epochs=1 task.limit.train=4000
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compress.reporting.jobs import gather_rows

ROOT = Path(__file__).parents[1]
CHAINS = """none nf4 int8 distill distill+prune distill+nf4 distill+int8 prune prune+nf4 prune+int8 distill+prune+nf4
distill+prune+int8""".split()
MADE = re.compile(r"\[compress\.cache\].* -   \w+: ([\d.]+) s$", re.M)


def sweep(folder: Path, words: list[str], mode: str) -> tuple[float, list[float], float]:
    """Return the seconds of the whole command, of each stage that it made, and of its measurements."""
    places = [f"hydra.sweep.dir={folder / mode}", f"cache.dir={folder / 'cache'}", f"cache.mode={mode}"]
    begin = time.perf_counter()
    command = [sys.executable, "train.py", "-m", f"technique={','.join(CHAINS)}", *places, *words]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - begin
    logs = (log.read_text() for log in (folder / mode).glob("*/train.log"))
    measured = {row["folder"]: row["measuring_time_s"] for row in gather_rows(folder / mode)}
    return seconds, [float(made) for log in logs for made in MADE.findall(log)], sum(measured.values())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        shared, distinct, measured = sweep(Path(folder), sys.argv[1:], "use")
        alone, repeated, _ = sweep(Path(folder), sys.argv[1:], "off")
    total = sum(distinct) + measured
    print(f"{len(CHAINS)} chains: {len(distinct)} stages made with the cache, {len(repeated)} without")
    print(f"distinct stages {sum(distinct):.1f} s, measurements {measured:.1f} s, together {total:.1f} s")
    print(f"with the cache / without: {shared:.1f} s / {alone:.1f} s = {shared / alone:.2f}")
    print(f"with the cache / together: {shared:.1f} s / {total:.1f} s = {shared / total:.2f}")


if __name__ == "__main__":
    main()
