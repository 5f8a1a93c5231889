"""Run one job: lock its folder, keep an earlier result, report a failure, return the exit status."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from compress.cache.digests import compute_digest, digest_environment
from compress.cache.sources import digest_source
from compress.cache.store import BEGAN
from compress.errors import PostconditionError, UserError, explain_error, iterate_causes
from compress.install import format_command
from compress.planning.chain import TARGET, drop_unused_settings
from compress.planning.settings import read_settings, to_plain
from compress.quiet import silence_libraries
from compress.reporting import report
from compress.reporting.folder import PAGE, RunFolder
from compress.reporting.jobs import RESULT, describe_job, load_rows, mark_as_reused
from compress.reporting.report import record_failure, report_success
from compress.running.experiment import execute_plan, follow_first_process, prepare_experiment
from compress.running.team import gather_team

log = logging.getLogger(__name__)
WORK = "compress.running.experiment"
"""The module whose source, with that of all modules that it imports, decides a job's results."""


def main(cfg: DictConfig) -> int:
    """Run one job and write its results. Return 1, after logging the reason, if it failed.

    A job that an earlier run finished in the same folder with the same config, data, models and code is kept. The
    results of another earlier run stay in the folder until those of this run are complete.
    """
    silence_libraries()
    hydra = HydraConfig.get()
    run = RunFolder(Path(hydra.runtime.output_dir))
    job = describe_job(cfg, hydra.overrides.task)
    with open_dict(cfg):
        search = cfg.pop("search", None)
    lock = FileLock(run.path / ".job.lock", timeout=0)
    owned = done = False

    def work() -> None:
        nonlocal owned, done
        # 1) Lock the folder, and refuse one that holds what no run wrote
        if os.environ.get("SLURM_PROCID", "0") == "0":
            run.check()  # taking the lock writes a file
            try:
                lock.acquire()
            except Timeout:
                raise UserError(f"Another process is running this job in {run.path}. Wait for its end.") from None
            run.claim()
            owned = True
        if search is not None and (hydra.mode == RunMode.RUN or hydra.sweeper._target_ != TARGET):
            command = f"{format_command('train')} -m search=latency ..."
            raise UserError(f"search is set for a single run; it needs a sweep. Type {command}")

        # 2) Run the experiment, unless an earlier run finished it
        request = compute_digest([resolve_config(cfg), digest_environment(), digest_source(WORK)])
        drop_unused_settings(cfg.technique, hydra.overrides.task)
        with gather_team(cfg, read_settings(cfg).hardware, follow_first_process) as team:
            if team and team.rank:
                return follow_first_process(cfg, team)
            planned, splits, addresses = prepare_experiment(cfg, team)
            key, begun = f"{request} {compute_digest([addresses, splits.measured.fingerprint])}", find_start_time(hydra)
            refresh = planned.settings.cache.mode == "refresh"
            if run.is_finished(key, since=begun if refresh else 0.0):
                log.info(f"finished before: {run.path}")
                rows = load_rows(run.path / RESULT, run.path)
                mark_as_reused(run.path)
                run.discard()
            else:
                outcome = execute_plan(cfg, planned, splits, addresses, run, begun)
                rows = report_success(run.new, job, outcome, home=run.path)
                run.commit(key)
        done = True

        # 3) Show the results; a sweep shows one table of all its jobs at the end
        if hydra.mode == RunMode.RUN:
            run.register([PAGE])
            report.publish_report(run.path, rows)
        return None

    def fail(reason: str) -> None:
        if done:
            log.info(f"The results are complete except for the report: {run.path}")
        elif owned:
            record_failure(run, job, reason)

    try:
        return run_guarded(work, fail)
    finally:
        lock.release()


def find_start_time(hydra: Any) -> float:
    """Return when the sweep of this job began, or else this process, in seconds since 1970."""
    sweep = Path(hydra.sweep.dir) / "multirun.yaml"
    return sweep.stat().st_mtime if hydra.mode == RunMode.MULTIRUN and sweep.is_file() else BEGAN


def resolve_config(cfg: DictConfig) -> Any:
    """Return everything that decides a job's result; None if a value is missing, which the job will report."""
    try:
        return {key: to_plain(cfg[key]) for key in cfg if key != "cache"}
    except OmegaConfBaseException:
        return None


def run_guarded(work: Callable[[], None], fail: Callable[[str], None]) -> int:
    """Return 0, or 1 if ``work`` raised; log a sentence for a mistake of the user, a traceback for a bug.

    Raises:
        SystemExit: the process was asked to stop, or the failure could not be written.
    """
    stop: BaseException | None = None
    try:
        with catch_sigterm():
            work()
        return 0
    except (UserError, PostconditionError) as error:
        reason = str(error)
        log_error(reason)
    except Exception as error:
        sentence = explain_error(error)
        reason = sentence or f"{type(error).__name__}: {error}"
        log_error(reason, traceback=not sentence)
    except (KeyboardInterrupt, SystemExit) as error:  # Lightning turns the first into the second
        kinds = tuple(map(type, iterate_causes(error)))
        by = "SIGTERM" if Terminated in kinds else "Ctrl-C" if KeyboardInterrupt in kinds else "a signal"
        reason = f"stopped by {by}; repeat the command with the same folder to resume"
        log_error(reason)
        stop = SystemExit(130) if by != "a signal" else error  # raised by a cluster's handler
    try:
        fail(reason)
    except OSError as error:
        sys.exit(f"The result of the job could not be written. {explain_error(error) or error}")
    if stop:
        raise stop
    return 1


def log_error(reason: str, traceback: bool = False) -> None:
    """Log why the job failed; print it if the user switched logging off (``hydra/job_logging=disabled``)."""
    if log.isEnabledFor(logging.ERROR):
        log.error(reason, exc_info=traceback)
    else:
        print(reason, file=sys.stderr)


class Terminated(KeyboardInterrupt):
    """SIGTERM, if no other handler is set."""


@contextmanager
def catch_sigterm() -> Iterator[None]:
    """End the work on SIGTERM as on Ctrl-C, so that it is reported; keep a cluster's own handler."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
