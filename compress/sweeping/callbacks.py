"""Hydra's callbacks: lock a run's folder, and report a sweep, even if it did not end.

Importing this module is cheap, because Hydra imports it before every job.
"""

from __future__ import annotations

import atexit
import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from compress.errors import UserError, explain_error
from compress.install import format_command
from compress.planning.words import quote_value
from compress.quiet import silence_logs
from compress.reporting import report
from compress.reporting.curves import write_curves
from compress.reporting.folder import SWEEP, RunFolder
from compress.reporting.jobs import HYDRA, gather_rows
from compress.reporting.report import publish_report
from compress.reporting.rows import drop_repeated_baselines
from compress.reporting.tensorboard import write_overlay
from compress.sweeping.live import Lines, name_jobs

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from omegaconf import DictConfig


log = logging.getLogger(__name__)


class SweepReport(Callback):
    """Reports a finished sweep: one table of all its rows, and curves over the numbers that it varied.

    The exit status is 1 if a job failed.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        silence_logs()  # jobs silence more libraries, but may have run elsewhere
        try:
            folder = Path(config.hydra.sweep.dir)
            begun = (folder / "multirun.yaml").stat().st_mtime  # older jobs are another sweep's
            rows = publish_report(folder, drop_repeated_baselines(gather_rows(folder, begun)))
            if not rows:
                sys.exit(f"The sweep left no result in {folder}. Set hydra.sweep.subdir to a folder inside it.")
            if write_curves(folder, rows):
                print(f"  curves: {folder / 'curves'}")
            write_overlay(folder, rows)
            print(f"  TensorBoard: tensorboard --logdir {folder / 'tensorboard'}")
        except Exception as error:  # Hydra would log a warning, and the sweep would succeed
            reason = explain_error(error)
            (log.error if reason else log.exception)(f"The sweep's report could not be written. {reason or ''}")
            sys.exit(1)
        if any(row["status"] == "failed" for row in rows):
            sys.exit(1)


HELD: list[Any] = []
"""Locks and live lines of this process. Hydra pickles its callbacks, which therefore cannot hold them."""


class Folder(Callback):
    """Locks the folder of a run or a sweep, and reports a sweep that ends early (Ctrl-C, a killed job).

    In a terminal, a sweep shows a line for every job; the jobs' output goes only to files in their folders.
    """

    def __init__(self) -> None:
        self.ended = False
        self.lines = False

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        check_hydra_settings(config)
        self._lock_folder(config, "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        check_hydra_settings(config)
        sweep: Any = OmegaConf.to_container(config.hydra.sweep)
        if "${" not in sweep["subdir"]:
            refuse_job_folder(sweep["subdir"])
        folder = self._lock_folder(config, "hydra.sweep.dir", SWEEP)
        if "submitit" in config.hydra.launcher._target_:
            tolerate_lost_jobs()
        atexit.register(self._report_unfinished, folder)
        if sys.stdout.isatty() and (jobs := name_jobs(config)):
            self.lines = True
            HELD.append(Lines(folder, jobs))

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN and len(Path(config.hydra.sweep.subdir).parts) != 1:
            refuse_job_folder(config.hydra.sweep.subdir)
        if self.lines:
            for handler in logging.getLogger().handlers:
                if not isinstance(handler, logging.FileHandler):
                    handler.setLevel(logging.CRITICAL)
            sys.stderr = (Path(config.hydra.runtime.output_dir) / "stderr.log").open("a", buffering=1, encoding="utf-8")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if self.lines:
            sys.stderr.close()
            sys.stderr = sys.__stderr__

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self.ended = True
        close_live_lines()

    def _lock_folder(self, config: DictConfig, key: str, names: tuple[str, ...] = ()) -> Path:
        """Lock the folder that ``key`` names, to write ``names`` there, or exit. Hydra would turn an exception into a
        warning, but not ``SystemExit``."""
        try:
            folder = Path(OmegaConf.select(config, key))
        except OmegaConfBaseException as error:
            sys.exit(explain_error(error) or str(error))
        run = RunFolder(folder, key)
        try:
            run.check()
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / ".lock", timeout=0)
            lock.acquire()
            HELD.append(lock)
            if names:
                run.claim()
                run.register(names)
            return folder
        except UserError as error:
            sys.exit(str(error))
        except Timeout:
            sys.exit(f"{key} is {folder}, which another run uses. Wait for its end, or set {key} to another folder.")
        except OSError as error:
            sys.exit(f"{key} is {folder}, which cannot be written ({error.strerror}). Set {key} to another folder.")

    def _report_unfinished(self, folder: Path) -> None:
        close_live_lines()
        if not self.ended and any(folder.rglob(HYDRA)):  # a job has begun
            rows = drop_repeated_baselines(gather_rows(folder))
            if rows:
                report.publish_report(folder, rows)
            word = shlex.quote(f"resume={folder}")
            print(f"The sweep did not end. Type `{format_command('train')} {word}` to resume it.")


def check_hydra_settings(config: DictConfig) -> None:
    """Exit if Hydra is set to hide what the report reads, or to move the paths that the user typed."""
    if config.hydra.output_subdir != HYDRA:
        sys.exit(
            f"hydra.output_subdir is {quote_value(config.hydra.output_subdir)}; the report reads {HYDRA}. "
            "Remove hydra.output_subdir."
        )
    if config.hydra.job.chdir:
        sys.exit(
            "hydra.job.chdir is true; paths are those of the folder where the command is typed. Remove hydra.job.chdir."
        )


def refuse_job_folder(subdir: str) -> None:
    """Exit because the report would not find the job in ``subdir``, or not every job."""
    sys.exit(
        f"hydra.sweep.subdir is {subdir}; expected a folder for each job, directly in hydra.sweep.dir. "
        "Set 'hydra.sweep.subdir=${hydra.job.num}', or remove it."
    )


def tolerate_lost_jobs() -> None:
    """Make submitit return a result for a lost job, killed by the system or with its machine.

    Submitit's error would make Hydra leave the jobs that still run, and the report would miss them.
    """
    from hydra.core.utils import JobReturn, JobStatus
    from submitit import Job
    from submitit.core.utils import UncompletedJobError

    wait_for_results = Job.results

    def results_of(job: Job) -> list[Any]:
        try:
            return wait_for_results(job)
        except UncompletedJobError as error:
            log.error(f"Job {job.job_id} is lost: {str(error).splitlines()[0]}")
            return [JobReturn(status=JobStatus.COMPLETED)]  # its row says that it failed

    Job.results = results_of  # type: ignore[assignment,method-assign]


def close_live_lines() -> None:
    """End the live lines, if there are any."""
    for lines in [held for held in HELD if isinstance(held, Lines)]:
        HELD.remove(lines)
        lines.close()
