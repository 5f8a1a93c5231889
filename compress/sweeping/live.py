"""Show a line for every job of a running sweep, read from files in the jobs' folders, wherever the jobs run.

Importing this module is cheap, because Hydra imports it before every job.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from compress.planning.chain import expand_jobs, read_chain_name
from compress.planning.words import list_words
from compress.reporting.escaping import make_printable
from compress.reporting.jobs import CONFIG, STAGE, find_jobs, find_result, job_number

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Group


@dataclass(frozen=True)
class State:
    """The state of a job: ``queued``, ``running``, ``done`` or ``failed``.

    ``what`` is the stage that runs, or the reason of a failure; ``seconds`` is the time that the job has run.
    """

    name: str
    state: str
    what: str = ""
    seconds: float = 0.0


def name_jobs(config: DictConfig) -> list[str]:
    """Return what distinguishes each job of a sweep; nothing if the sweeper chooses jobs during the sweep."""
    sweeper = config.hydra.sweeper
    if not sweeper._target_.endswith(".ChainSweeper"):
        return []
    words = [
        *(f"{key}={value}" for key, value in (sweeper.params or {}).items()),
        *list_words(config.hydra.overrides.task),
    ]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    jobs = expand_jobs(parser.parse_overrides(words), read_chain_name(config))
    shared = set.intersection(*map(set, jobs))
    return [" ".join(w.removeprefix("technique=") for w in job if w not in shared) or "the job" for job in jobs]


def read_job_states(folder: Path, jobs: list[str], begun: float) -> list[State]:
    """Return the states of the jobs of the sweep in ``folder`` that began at ``begun``, in seconds since 1970."""
    folders = {job_number(job)[0]: job for job in find_jobs(folder, begun)}
    return [
        read_job_state(name, folders[number]) if number in folders else State(name, "queued")
        for number, name in enumerate(jobs)
    ]


def read_job_state(name: str, job: Path) -> State:
    """Return the state of the job in the folder ``job``."""
    start, end = (job / CONFIG).stat().st_mtime, 0.0
    with suppress(FileNotFoundError):
        result = find_result(job)
        rows, end = json.loads(result.read_text(encoding="utf-8"))["rows"], result.stat().st_mtime
    if end < start:  # the result is of an earlier run
        stage = "starting"
        with suppress(FileNotFoundError):
            stage = (job / STAGE).read_text(encoding="utf-8")
        return State(name, "running", stage, time.time() - start)
    failed = [row["reason"] for row in rows if row["status"] != "completed"]
    return State(name, "failed" if failed else "done", failed[0] if failed else "", end - start)


def summarise_states(states: list[State]) -> str:
    """Return how many jobs have ended, and the time left if each remaining job takes as long as they did."""
    ended = [job for job in states if job.state in ("done", "failed")]
    text = f"{len(ended)} of {len(states)} jobs"
    done = [job.seconds for job in ended if job.state == "done" and job.seconds]  # not those of an earlier run
    running = [job.seconds for job in states if job.state == "running"]
    if done and len(ended) < len(states):
        each = sum(done) / len(done)
        work = each * (len(states) - len(ended)) - sum(min(each, seconds) for seconds in running)
        text += f", about {work / max(1, len(running)):.0f} s left"
    return text


def draw_states(states: list[State]) -> Group:
    """Return a line for every job, and a summary, for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    lines = Table.grid(padding=(0, 2))
    colours = {"queued": "dim", "running": "", "done": "green", "failed": "red"}
    for job in states:
        seconds = f"{job.seconds:.0f} s" if job.seconds else ""
        name, what = Text(make_printable(job.name)), Text(make_printable(job.what))
        lines.add_row(name, job.state, seconds, what, style=colours[job.state])
    return Group(lines, summarise_states(states))


class Lines:
    """Draws the jobs' lines in the terminal until it is closed."""

    def __init__(self, folder: Path, jobs: list[str]) -> None:
        from rich.live import Live

        self.folder, self.jobs, self.begun = folder, jobs, time.time()
        self.over = threading.Event()
        self.live = Live(self._render_lines(), auto_refresh=False)
        self.thread = threading.Thread(target=self._refresh_lines, daemon=True)
        self.live.start()
        self.thread.start()

    def _render_lines(self) -> Group:
        return draw_states(read_job_states(self.folder, self.jobs, self.begun))

    def _refresh_lines(self) -> None:
        while not self.over.wait(0.5):
            self.live.update(self._render_lines(), refresh=True)

    def close(self) -> None:
        self.over.set()
        self.thread.join()
        self.live.update(self._render_lines(), refresh=True)
        self.live.stop()
