"""Write a run's results into its folder as a whole, and touch nothing there that no run wrote.

Everything is built in ``.compress/new`` inside the folder and moved to its place when it is complete. Importing this
module is cheap, because Hydra imports it before every job.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.cache.files import flush_folder, remove_path, write_atomically
from compress.errors import UserError
from compress.reporting.jobs import FAILED, PRIVATE, RESULT, STAGE

ARTIFACT, PREDICTIONS, PAGE = "artifact", "predictions", "report.html"
TABLES = ("results.csv", "results.parquet", "results.md")
SWEEP = (*TABLES, PAGE, "tensorboard", "curves", "trials", "study.log", "search.txt")
"""Names that a sweep writes beside its jobs' folders."""
NAMES = (RESULT, ARTIFACT, "report", PREDICTIONS, "comparison.md", *SWEEP)
"""Names that a run or a sweep writes into its folder."""
LOCKS = (".lock", ".job.lock")
"""Names of our locks, which are empty files; taking a lock empties the file."""


@dataclass(frozen=True)
class State:
    """The content of a folder's marker.

    ``made`` are the names in the folder that runs wrote. ``finished`` is the key of the finished run whose results they
    are, None for a failed run; ``files`` are those that such a run cannot do without.
    """

    made: tuple[str, ...] = ()
    finished: str | None = None
    files: tuple[str, ...] = field(default=())


class RunFolder:
    """The folder of a run, a job or a sweep, and the private folder ``.compress`` in it, whose marker names our files.

    A run is finished, failed or stopped without harm to the results of the run before it: these are replaced when the
    new ones are complete. If the process is killed during the replacement, the next :meth:`claim` completes it.

        run = RunFolder(folder); run.claim()
        write_everything(run.begin()); run.commit("key")

    Args:
        path: the folder.
        key: the setting that names it, for errors.
    """

    def __init__(self, path: Path, key: str = "hydra.run.dir") -> None:
        self.path, self.key = Path(path), key
        self.private = self.path / PRIVATE
        self.marker = self.private / "made.json"
        self.new, self.ready, self.old = (self.private / name for name in ("new", "ready", "old"))
        self.cache = self.private / "cache"
        """Place of a cache that belongs to this run alone."""

    @property
    def state(self) -> State:
        return self._read(self.marker) if self.marker.is_file() else State()

    def check(self) -> None:
        """Raise UserError if the folder holds a file or folder of our names that no run wrote. Nothing is written."""
        foreign = self._find_foreign()
        if foreign:
            raise UserError(
                f"{self.key} is {self.path}, which holds {', '.join(foreign)} that no run of compress wrote, and a run "
                f"would replace; a new or empty folder is expected, or that of an earlier run. Set {self.key}=... to "
                "another folder."
            )

    def claim(self) -> None:
        """Mark the folder as a run's, and complete a replacement that was interrupted. The caller holds its lock.

        Raises:
            UserError: it holds a file or folder of our names that no run wrote.
        """
        self.check()
        self.private.mkdir(parents=True, exist_ok=True)
        if not self.marker.is_file():
            self._write(State())
        self.settle()

    def register(self, names: Iterable[str]) -> None:
        """Note that names in the folder are ours, before they are written outside :meth:`begin` and :meth:`commit`.

        Raises:
            UserError: such a file or folder exists, and no run wrote it.
        """
        self.check()
        state = self.state
        if new := set(names) - {*state.made}:
            self._write(State((*state.made, *sorted(new)), state.finished, state.files))

    def begin(self) -> Path:
        """Return a new, empty folder for the results, on the same file system."""
        remove_path(self.new)
        self.new.mkdir(parents=True)
        return self.new

    def commit(self, finished: str | None = None) -> None:
        """Replace the results of an earlier run by those in :attr:`new`, which are a finished run's with that key.

        Raises:
            UserError: somebody else has put a file or folder of our names into the folder meanwhile.
        """
        self.check()
        needed = (RESULT, ARTIFACT, PREDICTIONS)
        files = (file for name in needed for file in (self.new / name, *(self.new / name).rglob("*")) if file.is_file())
        names = sorted(path.name for path in self.new.iterdir())
        state = State(tuple(names), finished, tuple(sorted(str(file.relative_to(self.new)) for file in files)))
        self._write(state, self.new / self.marker.name)
        flush_folder(self.new)
        os.replace(self.new, self.ready)  # from here on, the new results count
        self.settle()

    def settle(self) -> bool:
        """Complete the replacement that :meth:`commit` began. Return whether there was one to complete.

        Without ``result.json`` a job counts as unfinished, so it leaves first and arrives last.
        """
        if not self.ready.is_dir():
            remove_path(self.old)
            return False
        before, after = self.state, self._read(self.ready / self.marker.name)
        both = sorted({*before.made, *after.made}, key=lambda name: (name != RESULT, name))
        self._write(State(tuple(both)))
        self.old.mkdir(exist_ok=True)
        for name in both:
            arrived = name in after.made and not os.path.lexists(self.ready / name)
            if not arrived and os.path.lexists(self.path / name):
                remove_path(self.old / name)
                os.replace(self.path / name, self.old / name)
        for name in reversed(both):
            if os.path.lexists(self.ready / name):
                os.replace(self.ready / name, self.path / name)
        self._write(after)
        for rest in (self.path / FAILED, self.path / STAGE, self.old, self.ready):
            remove_path(rest)
        return True

    def is_finished(self, key: str, since: float = 0.0) -> bool:
        """Return whether the results of the finished run with that key are there, written at ``since`` or later."""
        state = self.state
        return (
            state.finished == key
            and self.marker.stat().st_mtime >= since
            and all((self.path / file).is_file() for file in state.files)
        )

    def discard(self) -> None:
        """Remove results that were not completed."""
        remove_path(self.new)
        remove_path(self.path / STAGE)

    def holds_foreign(self) -> bool:
        """Return whether the folder holds a file or folder of our names that no run wrote."""
        return bool(self._find_foreign())

    def _find_foreign(self) -> list[str]:
        made = {*self.state.made}
        if self.ready.is_dir():
            made |= {*self._read(self.ready / self.marker.name).made}
        foreign = [name for name in NAMES if name not in made and os.path.lexists(self.path / name)]
        if os.path.lexists(self.private) and not self.marker.is_file() and not self._is_new():
            foreign.append(PRIVATE)
        return foreign + [name for name in LOCKS if (self.path / name).is_file() and (self.path / name).stat().st_size]

    def _is_new(self) -> bool:
        """Return whether a run was stopped before it wrote its marker."""
        return self.private.is_dir() and {path.name for path in self.private.iterdir()} <= {self.new.name}

    def _read(self, file: Path) -> State:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return State(tuple(content["made"]), content["finished"], tuple(content["files"]))

    def _write(self, state: State, file: Path | None = None) -> None:
        content = {"made": state.made, "finished": state.finished, "files": state.files}
        write_atomically(file or self.marker, json.dumps(content, indent=2))
