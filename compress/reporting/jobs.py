"""Read the results from the folders of a sweep's jobs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from compress.planning.words import list_words
from compress.reporting.rows import Job, Row, build_failed_row

PRIVATE = ".compress"
"""The folder in a job's folder with what only the program reads."""
STAGE = f"{PRIVATE}/running"
"""The file that names the current stage of a job."""
FAILED = f"{PRIVATE}/failed.json"
"""The rows of a job that failed and left the result of an earlier run in its place."""
HYDRA = ".hydra"
"""The folder of the files that Hydra writes when a job begins."""
CONFIG = f"{HYDRA}/config.yaml"
RESULT = "result.json"
LOST = "it left no result; its process was probably killed (out of memory?)"


def mark_as_reused(job: Path) -> None:
    """Make an earlier result count for this run."""
    start = (job / CONFIG).stat().st_mtime_ns
    os.utime(job / RESULT, ns=(start, start))
    (job / FAILED).unlink(missing_ok=True)


def find_result(job: Path) -> Path:
    """Return the file with the rows of the job's last run, which need not exist."""
    return job / FAILED if (job / FAILED).is_file() else job / RESULT


def gather_rows(folder: Path, begun: float = 0.0) -> list[Row]:
    """Return the rows of a run, or of a sweep's jobs that began at ``begun`` or later, in order.

    A job without a result counts as failed, and so does a sweep's job that failed but whose earlier run did not.
    """
    if jobs := find_jobs(folder, begun):
        return [row for job in jobs for row in read_job_rows(job, begun)]
    return load_rows(folder / RESULT, folder) if (folder / RESULT).is_file() else []


def load_rows(file: Path, job: Path) -> list[Row]:
    """Return the rows in a file of results, with the folder that the job has now."""
    return [{**row, "folder": str(job)} for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]


def read_job_rows(job: Path, begun: float = 0.0) -> list[Row]:
    """Return the rows in the folder of a job, even if the folder was moved.

    Args:
        begun: start of the sweep that asks, in seconds since 1970: a result from before the job's start is not its own.
    """
    file = find_result(job)
    if file.is_file() and not (begun and file.stat().st_mtime_ns < (job / CONFIG).stat().st_mtime_ns):
        return load_rows(file, job)
    lost = describe_job(OmegaConf.load(job / CONFIG), read_overrides(job))
    kept = " (The result of an earlier run is kept there.)" if (job / RESULT).is_file() else ""
    row = build_failed_row(replace(lost, method=lost.method or job.name), f"{LOST}. See {job}{kept}")
    return [{**row, "folder": str(job)}]


def read_overrides(job: Path) -> list[str]:
    """Return the overrides of a job as they were typed, without those of Hydra."""
    file = job / HYDRA / "overrides.yaml"
    words: Any = OmegaConf.load(file) if file.is_file() else []
    return list_words(words)


def find_jobs(folder: Path, begun: float = 0.0) -> list[Path]:
    """Return the folders of a sweep's jobs that began at ``begun`` or later, in order."""
    configs = (config for config in folder.glob(f"*/{CONFIG}") if config.stat().st_mtime >= begun)
    return sorted((config.parents[1] for config in configs), key=job_number)


def describe_job(cfg: Any, overrides: Iterable[str]) -> Job:
    """Return the job of a config and of the overrides that the user typed."""
    columns = ("technique=", "model=", "task=", "seed=", "split=")  # have columns already
    method, model, task = (_read_value(cfg, f"{key}.name") for key in ("technique", "model", "task"))
    typed = tuple(override for override in list_words(overrides) if not override.startswith(columns))
    return Job(str(method), str(model), str(task), read_seed(cfg), typed)


def read_seed(cfg: Any) -> Any:
    """Return the seed of a config: a number, or the text of what is none, which the job refuses."""
    seed = _read_value(cfg, "seed", 0)
    return seed if isinstance(seed, int) else str(seed)


def _read_value(cfg: Any, key: str, default: Any = "") -> Any:
    """Return the value of ``key``, or the default if it is missing or refers to nothing."""
    return OmegaConf.select(cfg, key, default=default, throw_on_resolution_failure=False)


def job_number(folder: Path) -> tuple[int, str]:
    """Return the sort key of a job's folder: folders are named ``0_...``, ``1_...``, ``10_...``."""
    number = folder.name.split("_")[0]
    return (int(number) if number.isdigit() else sys.maxsize, folder.name)
