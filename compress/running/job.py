"""The story of a run: check the whole chain, fine-tune a baseline, apply stage after stage, measure, report."""

from __future__ import annotations

import json
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
from compress.cache.files import flush_folder, remove_path, write_atomically
from compress.cache.store import BEGAN
from compress.errors import PostconditionError, UserError, explain_error, iterate_causes
from compress.install import format_command
from compress.planning.chain import TARGET, drop_unused_settings
from compress.planning.settings import read_settings, to_plain
from compress.quiet import silence_libraries
from compress.reporting import jobs, report
from compress.reporting.jobs import describe_job, mark_as_reused
from compress.reporting.report import report_failure, report_success
from compress.running.experiment import execute_plan, follow_first_process, prepare_experiment
from compress.running.team import gather_team

log = logging.getLogger(__name__)

FINISHED = "finished"
"""The file of a finished job: what was asked for and what it was made of, so that it is not done again."""


def main(cfg: DictConfig) -> int:
    """Run one job of the command line, write what came of it; 1 where it failed, with the reason told. A job that an
    earlier run into the same folder finished with the same config, data, models and code is left as it is."""
    silence_libraries()
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    job = describe_job(cfg, hydra.overrides.task)

    with open_dict(cfg):
        search = cfg.pop("search", None)
    finished, asked = folder / FINISHED, compute_digest([resolve_config(cfg), digest_environment()])
    lock = FileLock(folder / ".job.lock", timeout=0)
    done = finished.is_file() and finished.read_text().startswith(asked)  # and stays until it has to be done again
    mine = os.environ.get("SLURM_PROCID", "0") == "0"

    def work() -> None:
        nonlocal done, mine
        if search is not None and (hydra.mode == RunMode.RUN or hydra.sweeper._target_ != TARGET):
            command = f"{format_command('train')} -m search=latency ..."
            raise UserError(f"A search tries many chains, a job each: {command}")
        if mine:
            try:
                lock.acquire()
            except Timeout:
                mine = False
                raise UserError(f"Another process is at work on this job: wait for its end ({folder}).") from None
        drop_unused_settings(cfg.technique, hydra.overrides.task)
        with gather_team(cfg, read_settings(cfg).hardware, follow_first_process) as team:
            if team and team.rank:
                return follow_first_process(cfg, team)
            planned, splits, addresses = prepare_experiment(cfg, team)
            key = f"{asked} {compute_digest(addresses)}"
            if finished.is_file() and finished.read_text() == key:
                log.info(f"finished before: {folder}")
                rows = json.loads((folder / jobs.RESULT).read_text())["rows"]
                mark_as_reused(folder)
            else:
                done = False
                for earlier in (FINISHED, jobs.RESULT, "tensorboard", "report", "predictions"):
                    remove_path(folder / earlier)
                rows = report_success(
                    folder, job, execute_plan(cfg, planned, splits, addresses, folder, find_start_time(hydra))
                )
                flush_folder(folder)
                write_atomically(finished, key)
                done = True
                remove_path(folder / jobs.STAGE)
        if hydra.mode == RunMode.RUN:  # a sweep shows one table of all its jobs at the end
            report.publish_report(folder, rows)
        return None

    def fail(reason: str) -> None:
        if done:
            log.info(f"What the job found before is kept: {folder}")
        elif mine:
            for half in (finished, folder / "artifact"):
                remove_path(half)
            report_failure(folder, job, reason)

    try:
        return run_guarded(work, fail)
    finally:
        lock.release()


def find_start_time(hydra: Any) -> float:
    """When the sweep of this job began, or else this process, in seconds since 1970."""
    sweep = Path(hydra.sweep.dir) / "multirun.yaml"
    return sweep.stat().st_mtime if hydra.mode == RunMode.MULTIRUN and sweep.is_file() else BEGAN


def resolve_config(cfg: DictConfig) -> Any:
    """What decides the result of a job; None where a value is missing, which the job will tell."""
    try:
        return {key: to_plain(cfg[key]) for key in cfg if key != "cache"}
    except OmegaConfBaseException:
        return None


def run_guarded(work: Callable[[], None], fail: Callable[[str], None]) -> int:
    """0, or 1 where ``work`` raised: one sentence for what a user can put right, a traceback for what is our fault.

    Raises:
        SystemExit: the process was asked to stop, or what came of the work could not be written.
    """
    stop: BaseException | None = None
    try:
        with catch_sigterm():
            work()
        return 0
    except (UserError, PostconditionError) as error:
        reason = str(error)
        log.error(reason)
    except Exception as error:
        sentence = explain_error(error)
        reason = sentence or f"{type(error).__name__}: {error}"
        (log.error if sentence else log.exception)(reason)
    except (KeyboardInterrupt, SystemExit) as error:  # Lightning makes the second of the first
        kinds = tuple(map(type, iterate_causes(error)))
        by = "SIGTERM" if Terminated in kinds else "Ctrl-C" if KeyboardInterrupt in kinds else "a signal"
        reason = f"stopped by {by}: the same command into the same folder goes on with it"
        log.error(reason)
        stop = SystemExit(130) if by != "a signal" else error  # that of a cluster's handler
    try:
        fail(reason)
    except OSError as error:
        sys.exit(f"What came of the job could not be written. {explain_error(error) or error}")
    if stop:
        raise stop
    return 1


class Terminated(KeyboardInterrupt):
    """SIGTERM, where nobody else has a use for it."""


@contextmanager
def catch_sigterm() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does, so that it is told; a cluster's own handler stays."""

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
