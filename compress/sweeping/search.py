"""Search over chains: propose the next chain, select the chains worth training, and choose one in the end.

A chain is represented by the words of a command line that set it, and a trial by its cost and its loss of quality.
:mod:`compress.sweeping.sweeper` runs the trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.maths.statistics import pareto_indices
from compress.sweeping.space import NONE, Settings, Sizes, suggest_words

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.trial import FrozenTrial


ESTIMATED = 10
"""Proposals without a new chain before chains are drawn at random: an estimator repeats its favourites."""
PATIENCE = 200
"""Proposals without a new chain before the space counts as used up."""
OWN = ("recovery", "after")
"""Parameters that training adds to a chain."""


@dataclass(frozen=True)
class Result:
    """The result of a trial: ``cost`` as a share of the baseline's, and ``drop`` in points of the metric.

    ``cheaper`` is true if the cost is below the baseline's by more than chance.
    """

    cost: float
    drop: float
    cheaper: bool


@dataclass(frozen=True)
class Tried:
    """A chain that was tried, its job and its epochs of recovery; ``result`` is None if it failed."""

    job: int
    words: tuple[str, ...]
    epochs: int
    params: dict[str, Any]
    result: Result | None

    def untrained_params(self, recovery: Sequence[str]) -> frozenset:
        """Return the parameters of the chain without its recovery."""
        own = (*OWN, *recovery)
        return frozenset((key, value) for key, value in self.params.items() if key.partition(".")[0] not in own)


class Search:
    """Asks Optuna for chains and reports their results to it.

    First, every stage is tried alone. Then a tree-structured Parzen estimator proposes chains that should cost little
    and lose little (arXiv:2304.11127, with a constraint: arXiv:2211.14411). Each later round trains chains that would
    save most for every point that training must win back, for longer than the round before.

    Args:
        settings: search space and budget.
        sizes: numbers of heads, FFN channels and layers of the model.
        wrong: returns why a chain cannot work, empty if it can.
        seed: seed of the samplers.
        file: file of all trials, from which a stopped search resumes; None to keep no trials.
        name: digest of everything that decides the results; trials under another name do not count.

        search = Search(settings, sizes, wrong)
        search.tell(search.ask(minutes=0.0), Result(cost=0.5, drop=0.2, cheaper=True))
    """

    def __init__(
        self,
        settings: Settings,
        sizes: Sizes,
        wrong: Callable[[tuple[str, ...]], str],
        seed: int = 0,
        file: Path | None = None,
        name: str = "search",
    ) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.settings, self.sizes, self.wrong = settings, sizes, wrong
        self.states = optuna.trial.TrialState
        self.study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(file))) if file else None,
            study_name=name,
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )
        seed += len(self.study.trials)
        self.samplers = optuna.samplers.TPESampler(seed=seed), optuna.samplers.RandomSampler(seed=seed)
        self.rejected: dict[tuple[str, ...], str] = {}
        self.given_up: set[frozenset] = set()
        self.left_out: dict[str, str] = {}
        """Stages that work alone with no setting, and why."""
        self.first: list[tuple[dict[str, Any], int]] = [
            ({f"slot {n}": name if n == at else NONE for n in range(1, len(settings.slots) + 1)}, settings.epochs[0])
            for at, slot in reversed(list(enumerate(settings.slots, 1)))
            for name in slot
            if name != NONE and all(NONE in other for i, other in enumerate(settings.slots, 1) if i != at)
        ][len(self._ended_trials) :]
        for trial in self.begun:  # left by a process that was stopped
            self.study.tell(trial.number, state=self.states.FAIL)
            self.first.insert(0, (trial.params, trial.user_attrs["epochs"]))
        failed = [trial for trial in self._ended_trials if trial.user_attrs["result"] is None]
        # The cause of a first failure may have been fixed.
        again = [trial for trial in failed if trial.number not in self._retried_numbers]
        self.study.set_user_attr("again", [trial.number for trial in failed])
        self.first = [(trial.params, trial.user_attrs["epochs"]) for trial in again] + self.first

    @property
    def finished_trials(self) -> list[Tried]:
        """Trials that ended, in the order in which they began, without failures that are tried again."""
        return [read_trial(trial) for trial in self._ended_trials if trial.number not in self._retried_numbers]

    @property
    def _ended_trials(self) -> list[FrozenTrial]:
        trials = self.study.get_trials(states=(self.states.COMPLETE, self.states.FAIL), deepcopy=False)
        return [trial for trial in trials if "result" in trial.user_attrs]

    @property
    def _retried_numbers(self) -> list[int]:
        """Numbers of failed trials that are tried again."""
        return self.study.user_attrs.get("again", [])

    @property
    def begun(self) -> list[FrozenTrial]:
        """Trials that are running."""
        running = self.study.get_trials(states=(self.states.RUNNING,), deepcopy=False)
        return [trial for trial in running if "words" in trial.user_attrs]

    @property
    def seconds(self) -> float:
        """Time that earlier processes spent on the search."""
        return self.study.user_attrs.get("seconds", 0.0)

    @seconds.setter
    def seconds(self, value: float) -> None:
        self.study.set_user_attr("seconds", value)

    def ask(self, minutes: float) -> Trial | None:
        """Return the next chain to try after ``minutes``, or None if no new chain is left."""
        now = self.settings.round(minutes, len(self.finished_trials) + len(self.begun))
        while self.first:
            fixed, epochs = self.first.pop(0)
            if trial := self._propose_trial(fixed, epochs):
                return trial
            alone = "+".join(str(name) for key, name in fixed.items() if key.startswith("slot ") and name != NONE)
            if reasons := [reason for words, reason in self.rejected.items() if words[0] == f"technique={alone}"]:
                self.left_out[alone] = reasons[0]
        while now and (best := self.find_promising(now)):
            own = {} if best.epochs == 0 else {key: value for key, value in best.params.items() if key in OWN}
            if trial := self._propose_trial(
                {**dict(best.untrained_params(self.settings.recovery)), **own}, self.settings.epochs[now]
            ):
                return trial
            self.given_up.add(best.untrained_params(self.settings.recovery))
        return self._propose_trial({}, self.settings.epochs[0])

    def _propose_trial(self, fixed: dict[str, Any], epochs: int) -> Trial | None:
        """Return a new chain with the ``fixed`` parameters that can work, or None."""
        known = {tuple(trial.user_attrs["words"]) for trial in self.begun}
        known |= {tried.words for tried in self.finished_trials}
        for again in range(PATIENCE):
            self.study.sampler = self.samplers[again >= ESTIMATED]
            if fixed:
                self.study.enqueue_trial(fixed)
            trial = self.study.ask()
            words = suggest_words(trial, self.settings, self.sizes, epochs)
            if words and words not in known:
                if words not in self.rejected:
                    self.rejected[words] = self.wrong(words)
                if not self.rejected[words]:
                    del self.rejected[words]
                    trial.set_user_attr("words", words)
                    trial.set_user_attr("epochs", epochs)
                    return trial
            self.study.tell(trial, state=self.states.FAIL)
        return None

    def tell(self, trial: Trial, result: Result | None, job: int = 0) -> None:
        """Report the result of a trial; None if it failed."""
        trial.set_user_attr("job", job)
        trial.set_user_attr("result", result and [result.cost, result.drop, result.cheaper])
        if result is None:
            self.study.tell(trial, state=self.states.FAIL)
            return
        allowed = self.settings.max_drop + (0.0 if trial.user_attrs["epochs"] else self.settings.recovers)
        trial.set_constraint("drop", result.drop - allowed)
        self.study.tell(trial, [result.cost, result.drop])

    def find_promising(self, now: int) -> Tried | None:
        """Return the chain to train in round ``now``, or None.

        Candidates lose too much, but would be cheaper than the chosen chain. The best candidate saves most for every
        point that training must win back.
        """
        settings = self.settings
        longest: dict[frozenset, Tried] = {}
        for tried in self.finished_trials:
            key = tried.untrained_params(settings.recovery)
            if key not in longest or tried.epochs >= longest[key].epochs:
                longest[key] = tried
        limit = best.result.cost if (best := self.chosen()) and best.result else 1.0
        gains = {}
        for key, tried in longest.items():
            result = tried.result
            if key in self.given_up or not result or tried.epochs >= settings.epochs[now] or result.cost >= limit:
                continue
            excess = result.drop - settings.max_drop
            if 0 < excess <= settings.recovers:
                gains[math.log(limit / result.cost) / excess] = tried
        return gains[max(gains)] if gains else None

    def find_front(self) -> list[Tried]:
        """Return the Pareto front of cost and drop, the cheapest chain first.

        Its chains lose no more than ``max_drop`` and are cheaper than the baseline.
        """
        candidates = [
            (tried, tried.result)
            for tried in self.finished_trials
            if tried.result and tried.result.cheaper and tried.result.drop <= self.settings.max_drop + 1e-9
        ]
        best = pareto_indices([result.cost for _, result in candidates], [-result.drop for _, result in candidates])
        return [candidates[i][0] for i in best]

    def chosen(self) -> Tried | None:
        """Return the cheapest chain of the front, or None."""
        return next(iter(self.find_front()), None)


def read_trial(trial: FrozenTrial) -> Tried:
    """Return a trial as Optuna stores it."""
    stored = trial.user_attrs
    result = Result(*stored["result"]) if stored["result"] else None
    return Tried(stored["job"], tuple(stored["words"]), stored["epochs"], trial.params, result)
