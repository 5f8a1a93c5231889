"""What a sweep of twelve chains costs with the cache, against the same chains without one and against the sum of the
stages that they are made of, each counted once.

    python benchmarks/shared_stages.py                  # the built-in model and data, some minutes
    python benchmarks/shared_stages.py model=minilm model.path=FOLDER task=sst2 task.path=FOLDER
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHAINS = """none prune gptq w8a8 prune+gptq prune+w8a8 prune+finetune prune+finetune+gptq prune+finetune+w8a8 distill
distill+gptq distill+w8a8""".split()
MADE = re.compile(r"\[compress\.cache\].* -   (\w+): ([\d.]+) s$", re.M)


def sweep(folder: Path, words: list[str], mode: str) -> tuple[float, list[tuple[str, float]]]:
    """Seconds from the command to its end, and the stages that it made with their seconds."""
    places = [f"hydra.sweep.dir={folder / mode}", f"cache.dir={folder / 'cache'}", f"cache.mode={mode}"]
    begin = time.perf_counter()
    command = [sys.executable, "train.py", "-m", f"technique={','.join(CHAINS)}", *places, *words]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - begin
    logs = (log.read_text() for log in (folder / mode).glob("*/train.log"))
    return seconds, [(name, float(made)) for log in logs for name, made in MADE.findall(log)]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        shared, distinct = sweep(Path(folder), sys.argv[1:], "use")
        alone, every = sweep(Path(folder), sys.argv[1:], "off")
    total = sum(seconds for _, seconds in distinct)
    print(f"{len(CHAINS)} chains: {len(distinct)} stages made with the cache, {len(every)} without")
    print(f"with the cache / without: {shared:.1f} s / {alone:.1f} s = {shared / alone:.2f}")
    print(f"with the cache / sum of the distinct stages: {shared:.1f} s / {total:.1f} s = {shared / total:.2f}")


if __name__ == "__main__":
    main()
