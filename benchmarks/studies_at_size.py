"""Run every row of the studies at full size: build the models from their configs with random weights, take one step of
each training on texts of full length, measure once. Print the seconds and the peak memory of every row.

    python benchmarks/studies_at_size.py                        # all of them
    python benchmarks/studies_at_size.py bert_semeval beyond
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from hydra import initialize_config_dir
from omegaconf import DictConfig

from compress.planning.chain import read_stages

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from test_studies import CONF, STUDIES, generated, rows, shortened  # noqa: E402

MOST = 24.0  # GiB


def work(config: DictConfig, folder: Path) -> None:
    from compress.running.experiment import run_experiment
    from compress.tasks import splits

    splits.read_tables = generated(words=200)
    run_experiment(config, folder)


def watched(process: multiprocessing.process.BaseProcess, before: float) -> float:
    """Wait for a process and return its peak GiB: of the GPU, minus what was in use before, or without a GPU of the
    machine's memory."""
    most = 0.0
    while process.is_alive():
        most = max(most, in_use(process.pid) - before)
        process.join(0.05)
    return most


def in_use(pid: int | None) -> float:
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30
    try:
        return psutil.Process(pid).memory_info().rss / 2**30
    except psutil.NoSuchProcess:
        return 0.0


def main() -> None:
    spawn, failures = multiprocessing.get_context("spawn"), 0
    print("| experiment | row | GiB | s |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for experiment in sys.argv[1:] or STUDIES:
            fixed = [f"experiment={experiment}", "model.path=null", f"cache.dir={folder}/cache", "cache.max_gb=30"]
            with initialize_config_dir(str(CONF), version_base="1.3"):
                configs = rows(*fixed)
            for config in map(shortened, configs):
                config.hardware.latency.batch_sizes, config.hardware.latency.texts = [1], 1
                config.task.limit.test = 4
                for stage in read_stages(config.technique):
                    for key, value in {"samples": 4, "grid": 2}.items():  # AWQ would try 40 scales
                        if key in stage.node:
                            stage.node[key] = value
                before = in_use(None) if torch.cuda.is_available() else 0.0
                begin = time.perf_counter()
                process = spawn.Process(target=work, args=(config, Path(folder)))
                process.start()
                most = watched(process, before)
                failed = process.exitcode != 0 or most > MOST
                failures += failed
                cut = config.technique.get("structured", {})
                sizes = [str(cut[key]) for key in ("target_heads", "target_ffn_size") if cut.get(key)]
                row = " ".join([config.technique.name, *sizes])
                seconds = time.perf_counter() - begin
                print(f"| {experiment} | {row} | {most:.1f} | {seconds:.0f} |{' failed' * failed}", flush=True)
    sys.exit(f"{failures} rows failed or took more than {MOST:g} GiB" if failures else 0)


if __name__ == "__main__":
    main()
