"""A run's own folder, and what is left of a sweep that did not end.

Importing this module is cheap: Hydra does so before every job.
"""

from __future__ import annotations

import atexit
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from hydra.experimental.callback import Callback

from compress.errors import explain_error
from compress.quiet import silence_logs
from compress.reporting import report
from compress.reporting.curves import write_curves
from compress.reporting.jobs import gather_rows
from compress.reporting.report import publish_report
from compress.reporting.rows import drop_repeated_baselines
from compress.reporting.tables import label_rows
from compress.reporting.tensorboard import write_overlay
from compress.sweeping.live import Lines, name_jobs

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from omegaconf import DictConfig


log = logging.getLogger(__name__)


class SweepReport(Callback):
    """Hydra's callback at the end of a sweep: one table of all its rows, and curves over the numbers that it varied;
    exit status 1 if a job failed."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        silence_logs()  # the jobs, which hush more, may have run elsewhere
        try:
            folder = Path(config.hydra.sweep.dir)
            begun = (folder / "multirun.yaml").stat().st_mtime  # an earlier sweep into the folder is none of this one's
            rows = publish_report(folder, drop_repeated_baselines(gather_rows(folder, begun)))
            if write_curves(folder, rows):
                print(f"  curves: {folder / 'curves'}")
            write_overlay(folder, rows, label_rows(rows))
            print(f"  TensorBoard: tensorboard --logdir {folder / 'tensorboard'}")
        except Exception as error:  # which Hydra would turn into a warning, and the sweep into a success
            reason = explain_error(error)
            (log.error if reason else log.exception)(f"The sweep's report could not be written. {reason or ''}")
            sys.exit(1)
        if any(one["status"] == "failed" for one in rows):
            sys.exit(1)


log = logging.getLogger(__name__)

HELD: list[Any] = []
"""Locks and live lines of this process. Hydra sends its callbacks to other processes, where these cannot go."""


class Folder(Callback):
    """Hydra's callback around a run or a sweep: nobody else writes into its folder meanwhile, and a sweep that ends
    early (Ctrl-C, a job that was killed) leaves a table of what it finished all the same. In a terminal a sweep shows a
    line for every job, and what the jobs say goes to the files in their folders alone."""

    def __init__(self) -> None:
        self.ended = False
        self.lines = False

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._lock_folder(Path(config.hydra.run.dir), "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        self._lock_folder(folder, "hydra.sweep.dir")
        if "submitit" in config.hydra.launcher._target_:
            tolerate_lost_jobs()
        atexit.register(self._report_unfinished, folder)
        if sys.stdout.isatty() and (jobs := name_jobs(config)):
            self.lines = True
            HELD.append(Lines(folder, jobs))

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if self.lines:
            for handler in logging.getLogger().handlers:
                if not isinstance(handler, logging.FileHandler):
                    handler.setLevel(logging.CRITICAL)
            sys.stderr = (Path(config.hydra.runtime.output_dir) / "stderr.log").open("a", buffering=1)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if self.lines:
            sys.stderr.close()
            sys.stderr = sys.__stderr__

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self.ended = True
        close_live_lines()

    def _lock_folder(self, folder: Path, key: str) -> None:
        """Hydra would turn an exception of ours into a warning, and ``SystemExit`` is none."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / ".lock", timeout=0)
            lock.acquire()
            HELD.append(lock)
        except Timeout:
            sys.exit(f"Another run is writing into {folder}: wait for its end, or set {key} to another folder.")
        except OSError as error:
            sys.exit(f"{folder} cannot be written ({error.strerror}): set {key} to a folder that can.")

    def _report_unfinished(self, folder: Path) -> None:
        close_live_lines()
        if not self.ended and any(folder.rglob(".hydra")):  # a job was begun
            rows = drop_repeated_baselines(gather_rows(folder))
            if rows:
                report.publish_report(folder, rows)
            print(f"The sweep did not end: the same command with hydra.sweep.dir={folder} goes on with it.")


def tolerate_lost_jobs() -> None:
    """Have submitit give something for a job that is lost, killed for want of memory or with its machine: its error
    would make Hydra leave the jobs that still run, and the report would miss them."""
    from hydra.core.utils import JobReturn, JobStatus
    from submitit import Job
    from submitit.core.utils import UncompletedJobError

    waited = Job.results

    def results_of(job: Job) -> list[Any]:
        try:
            return waited(job)
        except UncompletedJobError as error:
            log.error(f"Job {job.job_id} is lost: {str(error).splitlines()[0]}")
            return [JobReturn(status=JobStatus.COMPLETED)]  # its row says that it is not

    Job.results = results_of  # type: ignore[assignment,method-assign]


def close_live_lines() -> None:
    """End the live lines, if there are any."""
    for one in [one for one in HELD if isinstance(one, Lines)]:
        HELD.remove(one)
        one.close()
