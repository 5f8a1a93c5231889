"""A line for every job of a running sweep, read from what the jobs leave in their folders, wherever they run.

Importing this module is cheap: Hydra does so before every job.
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
from compress.reporting import jobs as jobs_reporting
from compress.reporting.jobs import CONFIG, STAGE, find_jobs, job_number

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Group


@dataclass(frozen=True)
class State:
    """Where a job stands: ``queued``, ``running``, ``done`` or ``failed``; at which stage it runs or why it failed; and
    for how long it has run."""

    name: str
    state: str
    what: str = ""
    seconds: float = 0.0


def name_jobs(config: DictConfig) -> list[str]:
    """What tells the jobs of a sweep apart, in their order; none where a sweeper makes them up as it goes."""
    sweeper = config.hydra.sweeper
    if not sweeper._target_.endswith(".ChainSweeper"):
        return []
    words = [*(f"{key}={value}" for key, value in (sweeper.params or {}).items()), *config.hydra.overrides.task]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    jobs = expand_jobs(parser.parse_overrides(words), read_chain_name(config))
    shared = set.intersection(*map(set, jobs))
    return [" ".join(w.removeprefix("technique=") for w in job if w not in shared) or "the job" for job in jobs]


def read_job_states(folder: Path, jobs: list[str], begun: float) -> list[State]:
    """Where the jobs of the sweep in ``folder`` stand that began at ``begun``, in seconds since 1970."""
    there = {job_number(job)[0]: job for job in find_jobs(folder, begun)}
    return [
        read_job_state(name, there[number]) if number in there else State(name, "queued")
        for number, name in enumerate(jobs)
    ]


def read_job_state(name: str, job: Path) -> State:
    start, end = (job / CONFIG).stat().st_mtime, 0.0
    with suppress(FileNotFoundError):
        rows, end = (
            json.loads((job / jobs_reporting.RESULT).read_text())["rows"],
            (job / jobs_reporting.RESULT).stat().st_mtime,
        )
    if end < start:  # what is there is of an earlier run
        at = "starting"
        with suppress(FileNotFoundError):
            at = (job / STAGE).read_text()
        return State(name, "running", at, time.time() - start)
    failed = [row["reason"] for row in rows if row["status"] != "completed"]
    return State(name, "failed" if failed else "done", failed[0] if failed else "", end - start)


def summarise_states(found: list[State]) -> str:
    """How many jobs are done, and about how long the rest takes if it takes as long as those."""
    over = [one for one in found if one.state in ("done", "failed")]
    text = f"{len(over)} of {len(found)} jobs"
    done = [one.seconds for one in over if one.state == "done" and one.seconds]  # and not before
    running = [one.seconds for one in found if one.state == "running"]
    if done and len(over) < len(found):
        each = sum(done) / len(done)
        work = each * (len(found) - len(over)) - sum(min(each, seconds) for seconds in running)
        text += f", about {work / max(1, len(running)):.0f} s left"
    return text


def draw_states(found: list[State]) -> Group:
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    lines = Table.grid(padding=(0, 2))
    colours = {"queued": "dim", "running": "", "done": "green", "failed": "red"}
    for one in found:
        seconds = f"{one.seconds:.0f} s" if one.seconds else ""
        lines.add_row(escape(one.name), one.state, seconds, escape(one.what), style=colours[one.state])
    return Group(lines, summarise_states(found))


class Lines:
    """Draws the lines in the terminal until it is closed."""

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
