"""Read what the jobs of a sweep left in their folders."""

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
"""The file in which a job says at which stage it is."""
CONFIG = ".hydra/config.yaml"
"""That which Hydra writes when a job begins."""


RESULT = "result.json"
LOST = "it left no result, as happens to a process that is killed, for want of memory perhaps"


def mark_as_reused(job: Path) -> None:
    """Let a result that was there before count for this run."""
    start = (job / CONFIG).stat().st_mtime_ns
    os.utime(job / RESULT, ns=(start, start))


def gather_rows(folder: Path, begun: float = 0.0) -> list[Row]:
    """The rows of all jobs of a sweep in their order, of those that began at ``begun`` or later, or of one run; a job
    that left no result, killed perhaps, has failed."""
    found = find_jobs(folder, begun) or [folder] * (folder / RESULT).is_file()
    return [one for job in found for one in read_job_rows(job)]


def read_job_rows(job: Path) -> list[Row]:
    """The rows in the folder of a job, which may have been moved."""
    if (job / RESULT).is_file():
        rows = json.loads((job / RESULT).read_text())["rows"]
    else:
        hydra = job / ".hydra"
        words: Any = OmegaConf.load(hydra / "overrides.yaml") if (hydra / "overrides.yaml").is_file() else []
        lost = describe_job(OmegaConf.load(hydra / "config.yaml"), words)
        rows = [build_failed_row(replace(lost, method=lost.method or job.name), f"{LOST}: see {job}")]
    return [{**one, "folder": str(job)} for one in rows]


def find_jobs(folder: Path, begun: float = 0.0) -> list[Path]:
    """The folders of a sweep's jobs that began at ``begun`` or later, in their order."""
    configs = (config for config in folder.glob("*/.hydra/config.yaml") if config.stat().st_mtime >= begun)
    return sorted((config.parents[1] for config in configs), key=job_number)


def describe_job(cfg: Any, overrides: Iterable[str]) -> Job:
    """The job of a config and of what was typed for it."""
    said = ("technique=", "model=", "task=", "seed=", "split=")  # which have columns of their own
    method, model, task = (
        str(OmegaConf.select(cfg, f"{key}.name", default="")) for key in ("technique", "model", "task")
    )
    typed = tuple(one for one in overrides if not one.startswith(said))
    return Job(method, model, task, cfg.get("seed", 0), typed)


def job_number(folder: Path) -> tuple[int, str]:
    """Jobs in the order of the sweep: their folders are named ``0_...``, ``1_...``, ``10_...``."""
    number = folder.name.split("_")[0]
    return (int(number) if number.isdigit() else sys.maxsize, folder.name)
