"""A search over chains: what to try next, which of it training is worth its time for, and what to choose in the end.

It knows chains as the words that a command line sets them by, and learns of each what it costs and what quality it
loses; who runs them is not its business (:mod:`compress.sweeping.sweeper` is).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from compress.errors import UserError
from compress.maths.statistics import pareto_indices
from compress.planning.settings import parse_values

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.trial import FrozenTrial


NONE = "none"
HALVING = 3
"""Of as many trials one goes on to the next round."""
ESTIMATED = 10
"""Proposals in a row that are no new chain, until they are drawn at random: an estimator repeats what it likes."""
PATIENCE = 200
"""And until there is taken to be none."""
OWN = ("recovery", "after")
"""Names of what training adds to a chain."""
Sizes = Mapping[str, int]


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Range:
    """Numbers from ``low`` to ``high``, in steps or not; whole ones where all that is given is whole."""

    low: int | float
    high: int | float
    step: int | float | None = None
    log: bool = False

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise UserError(f"search.settings: a range goes from {self.low:g} to {self.high:g}: exchange low and high.")


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Share:
    """Shares of what the model has: its attention heads, FFN channels or layers."""

    of: Literal["heads", "ffn", "layers"]
    values: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)]


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Settings:
    """What is searched, for what, and for how long.

    Args:
        objective: what is to be small: ``latency_ms``, judged by the speed-up over the baseline, or ``size_mb``.
        max_drop: points of the task's metric (percent of a perplexity) that the chosen chain may lose.
        minutes: after which no trial is started any more.
        trials: that are started.
        jobs: trials at once, as the launcher runs them side by side.
        epochs: of the recovery, round by round; in a round of none chains are tried without it.
        recovers: points beyond ``max_drop`` that training may win back: what loses more without is not trained.
        slots: a chain is a stage of each, in this order; ``none`` is no stage.
        recovery: stages that train, one of which a chain gets after one of its slots.
        settings: of the stages, values to choose from, a :class:`Range` or a :class:`Share`.
    """

    objective: Literal["latency_ms", "size_mb"]
    max_drop: Annotated[float, Field(ge=0)]
    slots: tuple[tuple[str, ...], ...]
    minutes: Annotated[float, Field(gt=0)] | None = None
    trials: Annotated[int, Field(ge=1)] | None = None
    jobs: Annotated[int, Field(ge=1)] = 1
    epochs: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    recovers: Annotated[float, Field(ge=0)] = 0.0
    recovery: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.minutes is None and self.trials is None:
            raise UserError("The search has no budget: set search.minutes=60, search.trials=40 or both.")
        if not self.stages:
            raise UserError("The search has nothing to try: search.slots names no stage, e.g. search.slots=[[gptq]].")
        if list(self.epochs) != sorted(set(self.epochs)):
            raise UserError(f"search.epochs is {list(self.epochs)}: let every round train for longer, e.g. [0, 1, 3].")
        for key, value in self.values.items():
            if not isinstance(value, Range | Share | tuple) or value == ():
                raise UserError(f"search.settings.{key} is {value!r}: give a list, {{low, high}} or {{of, values}}.")

    @property
    def stages(self) -> list[str]:
        """All that slots name."""
        return list(dict.fromkeys(name for slot in self.slots for name in slot if name != NONE))

    @property
    def values(self) -> dict[str, Range | Share | tuple[str, ...]]:
        """What there is to choose from by ``stage.setting``, values as they are typed."""
        return {key: parse_choices(value, f"search.settings.{key}") for key, value in flatten_settings(self.settings)}

    def over(self, minutes: float, trials: int) -> bool:
        """Whether the budget is spent."""
        return (self.minutes or math.inf) <= minutes or (self.trials or math.inf) <= trials

    def round(self, minutes: float, trials: int) -> int:
        """Rounds have the same time each (successive halving, arXiv:1502.07943), or every one a third of the trials
        that the one before it had."""
        rounds, now = len(self.epochs), 0
        if self.minutes:
            now = int(rounds * minutes / self.minutes)
        if self.trials:
            parts = [HALVING**-i for i in range(rounds)]
            ends = [self.trials * sum(parts[: i + 1]) / sum(parts) for i in range(rounds)]
            now = max(now, sum(trials >= end for end in ends))
        return min(rounds - 1, now)


def flatten_settings(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested settings by their dotted names; a range is a leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and not {"low", "of"} & set(value):
            yield from flatten_settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def parse_choices(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return parse_values(Range if "low" in value else Share, dict(value), key)
    return tuple(map(format_value, value)) if isinstance(value, list | tuple) else value


def format_value(value: Any) -> str:
    """A value as a command line has it."""
    plainly = isinstance(value, str) and re.fullmatch(r"[\w./+-]+", value)
    return value if plainly else json.dumps(value)


def suggest_value(trial: Trial, name: str, values: Range | Share | tuple[str, ...], sizes: Sizes) -> str:
    """What Optuna chooses of them, as it is typed."""
    if isinstance(values, Share):
        share = trial.suggest_categorical(name, values.values)
        return str(max(1, round(share * sizes[values.of])))
    if isinstance(values, Range):
        whole = all(isinstance(one, int) for one in (values.low, values.high, values.step or 1))
        suggest: Any = trial.suggest_int if whole else trial.suggest_float
        step = values.step or (1 if whole else None)
        return f"{suggest(name, values.low, values.high, step=step, log=values.log):g}"
    return trial.suggest_categorical(name, values)


def suggest_words(trial: Trial, settings: Settings, sizes: Sizes, epochs: int) -> tuple[str, ...]:
    """The chain that Optuna chooses, recovered for so many epochs, as words of a command line; none where it names no
    stage or one twice."""
    names = [trial.suggest_categorical(f"slot {n}", slot) for n, slot in enumerate(settings.slots, 1)]
    if all(name == NONE for name in names):
        return ()
    train = ""
    if epochs and settings.recovery:
        train = trial.suggest_categorical("recovery", settings.recovery)
        names.insert(trial.suggest_categorical("after", range(1, len(names) + 1)), train)
    chain = [name for name in names if name != NONE]
    if len(set(chain)) < len(chain):
        return ()
    words = [f"technique={'+'.join(chain)}"]
    for key, values in settings.values.items():
        if key.partition(".")[0] in chain:
            words.append(f"technique.{key}={suggest_value(trial, key, values, sizes)}")
    return (*words, *([f"technique.{train}.train.epochs={epochs}"] if train else []))


def name_chain(words: Sequence[str]) -> str:
    """A chain for people: ``structured+openvino structured.target_heads=6``."""
    return " ".join(re.sub(r"^technique[.=]", "", word) for word in words)


@dataclass(frozen=True)
class Result:
    """What a trial found: ``cost`` as a share of the baseline's, ``drop`` in points of the metric, and whether it is
    ``cheaper`` than the baseline by more than chance."""

    cost: float
    drop: float
    cheaper: bool


@dataclass(frozen=True)
class Tried:
    """A chain that was tried, in which job, recovered for how long; ``result`` is None where it failed."""

    job: int
    words: tuple[str, ...]
    epochs: int
    params: dict[str, Any]
    result: Result | None

    def untrained_params(self, recovery: Sequence[str]) -> frozenset:
        """What it is but for its recovery."""
        own = (*OWN, *recovery)
        return frozenset((key, value) for key, value in self.params.items() if key.partition(".")[0] not in own)


class Search:
    """Asks Optuna for chains and tells it what came of them.

    First every stage alone, then whatever the tree-structured Parzen estimator expects to lose little and to cost
    little (arXiv:2304.11127, under a constraint: arXiv:2211.14411), without training. Round by round, what would win
    most for every point that training had to win back is trained, for longer in each.

    Args:
        settings: what is searched.
        sizes: heads, FFN channels and layers of the model.
        wrong: why a chain cannot work, empty where it can.
        seed: of what is drawn.
        file: where all trials are kept, so that a search that was stopped goes on; None to keep none.
        name: by what decides the results; trials under another name are none of this search's.

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
        """Stages that no setting lets work alone, and why."""
        self.first: list[tuple[dict[str, Any], int]] = [
            ({f"slot {n}": name if n == at else NONE for n in range(1, len(settings.slots) + 1)}, settings.epochs[0])
            for at, slot in reversed(list(enumerate(settings.slots, 1)))
            for name in slot
            if name != NONE and all(NONE in other for i, other in enumerate(settings.slots, 1) if i != at)
        ][len(self._ended_trials) :]
        for trial in self.begun:  # by a process that was stopped
            self.study.tell(trial.number, state=self.states.FAIL)
            self.first.insert(0, (trial.params, trial.user_attrs["epochs"]))
        failed = [trial for trial in self._ended_trials if trial.user_attrs["result"] is None]
        again = [
            trial for trial in failed if trial.number not in self._retried_numbers
        ]  # for what failed once may be mended
        self.study.set_user_attr("again", [trial.number for trial in failed])
        self.first = [(trial.params, trial.user_attrs["epochs"]) for trial in again] + self.first

    @property
    def finished_trials(self) -> list[Tried]:
        """Every trial that ended, in the order in which they began, but for those that an earlier process failed in."""
        return [read_trial(trial) for trial in self._ended_trials if trial.number not in self._retried_numbers]

    @property
    def _ended_trials(self) -> list[FrozenTrial]:
        trials = self.study.get_trials(states=(self.states.COMPLETE, self.states.FAIL), deepcopy=False)
        return [trial for trial in trials if "result" in trial.user_attrs]

    @property
    def _retried_numbers(self) -> list[int]:
        """Trials to be tried again."""
        return self.study.user_attrs.get("again", [])

    @property
    def begun(self) -> list[FrozenTrial]:
        """Trials that run."""
        running = self.study.get_trials(states=(self.states.RUNNING,), deepcopy=False)
        return [trial for trial in running if "words" in trial.user_attrs]

    @property
    def seconds(self) -> float:
        """That earlier processes spent on the search."""
        return self.study.user_attrs.get("seconds", 0.0)

    @seconds.setter
    def seconds(self, value: float) -> None:
        self.study.set_user_attr("seconds", value)

    def ask(self, minutes: float) -> Trial | None:
        """The next chain to try after ``minutes``, or None where there is no new one left."""
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
        """A chain with what is ``fixed`` that can work and was not tried."""
        known = {tuple(trial.user_attrs["words"]) for trial in self.begun} | {one.words for one in self.finished_trials}
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
        """What came of a trial; None where it failed."""
        trial.set_user_attr("job", job)
        trial.set_user_attr("result", result and [result.cost, result.drop, result.cheaper])
        if result is None:
            self.study.tell(trial, state=self.states.FAIL)
            return
        may = self.settings.max_drop + (0.0 if trial.user_attrs["epochs"] else self.settings.recovers)
        trial.set_constraint("drop", result.drop - may)
        self.study.tell(trial, [result.cost, result.drop])

    def find_promising(self, now: int) -> Tried | None:
        """What to train in round ``now``: of all that loses too much and would be cheaper than the chosen chain, that
        which wins most for every point that training has to win back."""
        settings = self.settings
        longest: dict[frozenset, Tried] = {}
        for one in self.finished_trials:
            key = one.untrained_params(settings.recovery)
            if key not in longest or one.epochs >= longest[key].epochs:
                longest[key] = one
        limit = best.result.cost if (best := self.chosen()) and best.result else 1.0
        gains = {}
        for key, one in longest.items():
            found = one.result
            if key in self.given_up or not found or one.epochs >= settings.epochs[now] or found.cost >= limit:
                continue
            excess = found.drop - settings.max_drop
            if 0 < excess <= settings.recovers:
                gains[math.log(limit / found.cost) / excess] = one
        return gains[max(gains)] if gains else None

    def find_front(self) -> list[Tried]:
        """Of the chains that lose no more than they may and are cheaper than the baseline those that no other beats in
        both, the cheapest first."""
        able = [
            (one, one.result)
            for one in self.finished_trials
            if one.result and one.result.cheaper and one.result.drop <= self.settings.max_drop + 1e-9
        ]
        best = pareto_indices([found.cost for _, found in able], [-found.drop for _, found in able])
        return [able[i][0] for i in best]

    def chosen(self) -> Tried | None:
        """The cheapest of the front."""
        return next(iter(self.find_front()), None)


def read_trial(trial: FrozenTrial) -> Tried:
    kept = trial.user_attrs
    result = Result(*kept["result"]) if kept["result"] else None
    return Tried(kept["job"], tuple(kept["words"]), kept["epochs"], trial.params, result)
