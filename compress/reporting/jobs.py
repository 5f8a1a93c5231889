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

from compress.reporting.rows import Job, Row, build_failed_row

STAGE = "running"
"""The file that names the current stage of a job."""
CONFIG = ".hydra/config.yaml"
"""The file that Hydra writes when a job begins."""
RESULT = "result.json"
LOST = "it left no result; its process was probably killed (out of memory?)"


def mark_as_reused(job: Path) -> None:
    """Make an earlier result count for this run."""
    start = (job / CONFIG).stat().st_mtime_ns
    os.utime(job / RESULT, ns=(start, start))


def gather_rows(folder: Path, begun: float = 0.0) -> list[Row]:
    """Return the rows of a run, or of a sweep's jobs that began at ``begun`` or later, in order.

    A job without a result counts as failed.
    """
    jobs = find_jobs(folder, begun) or [folder] * (folder / RESULT).is_file()
    return [row for job in jobs for row in read_job_rows(job)]


def read_job_rows(job: Path) -> list[Row]:
    """Return the rows in the folder of a job, even if the folder was moved."""
    if (job / RESULT).is_file():
        rows = json.loads((job / RESULT).read_text())["rows"]
    else:
        hydra = job / ".hydra"
        words: Any = OmegaConf.load(hydra / "overrides.yaml") if (hydra / "overrides.yaml").is_file() else []
        lost = describe_job(OmegaConf.load(hydra / "config.yaml"), words)
        rows = [build_failed_row(replace(lost, method=lost.method or job.name), f"{LOST}. See {job}")]
    return [{**row, "folder": str(job)} for row in rows]


def find_jobs(folder: Path, begun: float = 0.0) -> list[Path]:
    """Return the folders of a sweep's jobs that began at ``begun`` or later, in order."""
    configs = (config for config in folder.glob("*/.hydra/config.yaml") if config.stat().st_mtime >= begun)
    return sorted((config.parents[1] for config in configs), key=job_number)


def describe_job(cfg: Any, overrides: Iterable[str]) -> Job:
    """Return the job of a config and of the overrides that the user typed."""
    columns = ("technique=", "model=", "task=", "seed=", "split=")  # have columns already
    method, model, task = (
        str(OmegaConf.select(cfg, f"{key}.name", default="")) for key in ("technique", "model", "task")
    )
    typed = tuple(override for override in overrides if not override.startswith(columns))
    return Job(method, model, task, cfg.get("seed", 0), typed)


def job_number(folder: Path) -> tuple[int, str]:
    """Return the sort key of a job's folder: folders are named ``0_...``, ``1_...``, ``10_...``."""
    number = folder.name.split("_")[0]
    return (int(number) if number.isdigit() else sys.maxsize, folder.name)
