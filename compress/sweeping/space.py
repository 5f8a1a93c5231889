"""The space of a search: its settings, the values of every setting, and a chain as words of a command line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from compress.errors import UserError
from compress.planning.settings import parse_values
from compress.planning.words import quote_value

if TYPE_CHECKING:
    from optuna import Trial


NONE = "none"
HALVING = 3
"""Factor by which a round has fewer trials than the round before."""
Sizes = Mapping[str, int]


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Range:
    """Numbers from ``low`` to ``high``, in steps of ``step`` if it is set; integers if all of these are integers."""

    low: int | float
    high: int | float
    step: int | float | None = None
    log: bool = False

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise UserError(
                f"search.settings has a range from {self.low:g} to {self.high:g}; low must not exceed high."
            )


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Share:
    """Shares of the model's attention heads, FFN channels or layers."""

    of: Literal["heads", "ffn", "layers"]
    values: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)]


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Settings:
    """What is searched, for which objective, and for how long.

    Args:
        objective: quantity to minimise: ``latency_ms``, judged by the speed-up over the baseline, or ``size_mb``.
        max_drop: points of the task's metric (percent of a perplexity) that the chosen chain may lose.
        minutes: time after which no trial starts.
        trials: number of trials.
        jobs: trials at once, as many as the launcher runs side by side.
        epochs: epochs of the recovery, round by round; 0 for a round without recovery.
        recovers: points beyond ``max_drop`` that training may win back; chains that lose more are not trained.
        slots: a chain takes a stage from each slot, in this order; ``none`` is no stage.
        recovery: stages that train; a chain gets one of them after one of its slots.
        settings: choices for the stages' settings: a list of values, a :class:`Range` or a :class:`Share`.
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
            raise UserError("The search has no budget. Set search.minutes=60, search.trials=40 or both.")
        if not self.stages:
            raise UserError("search.slots names no stage; at least one is expected. Set search.slots=[[gptq]].")
        if list(self.epochs) != sorted(set(self.epochs)):
            raise UserError(
                f"search.epochs is {list(self.epochs)}; every round must train for longer. Set search.epochs=[0,1,3]."
            )
        for key, value in self.values.items():
            if not isinstance(value, Range | Share | tuple) or value == ():
                raise UserError(
                    f"search.settings.{key} is {value!r}; expected a list, {{low, high}} or {{of, values}}. "
                    f"Set search.settings.{key}=[VALUE, ...]."
                )

    @property
    def stages(self) -> list[str]:
        """All stages that the slots name."""
        return list(dict.fromkeys(name for slot in self.slots for name in slot if name != NONE))

    @property
    def values(self) -> dict[str, Range | Share | tuple[str, ...]]:
        """The choices for each ``stage.setting``, with values as they are typed."""
        return {key: parse_choices(value, f"search.settings.{key}") for key, value in flatten_settings(self.settings)}

    def over(self, minutes: float, trials: int) -> bool:
        """Return whether the budget is spent."""
        return (self.minutes or math.inf) <= minutes or (self.trials or math.inf) <= trials

    def round(self, minutes: float, trials: int) -> int:
        """Return the number of the current round.

        Every round has the same time, or a third of the trials of the round before (successive halving,
        arXiv:1502.07943).
        """
        rounds, now = len(self.epochs), 0
        if self.minutes:
            now = int(rounds * minutes / self.minutes)
        if self.trials:
            parts = [HALVING**-i for i in range(rounds)]
            ends = [self.trials * sum(parts[: i + 1]) / sum(parts) for i in range(rounds)]
            now = max(now, sum(trials >= end for end in ends))
        return min(rounds - 1, now)


def flatten_settings(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested settings with their dotted names; a range is a leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and not {"low", "of"} & set(value):
            yield from flatten_settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def parse_choices(value: Any, key: str) -> Any:
    """Return the choices for a setting, with the values of a list as they are typed."""
    if isinstance(value, Mapping):
        return parse_values(Range if "low" in value else Share, dict(value), key)
    return tuple(map(format_value, value)) if isinstance(value, list | tuple) else value


def format_value(value: Any) -> str:
    """Return a value as it is typed on a command line."""
    plainly = isinstance(value, str) and re.fullmatch(r"[\w./+-]+", value, re.ASCII)
    return value if plainly else quote_value(value)


def suggest_value(trial: Trial, name: str, values: Range | Share | tuple[str, ...], sizes: Sizes) -> str:
    """Return the value that Optuna chooses, as it is typed."""
    if isinstance(values, Share):
        share = trial.suggest_categorical(name, values.values)
        return str(max(1, round(share * sizes[values.of])))
    if isinstance(values, Range):
        whole = all(isinstance(number, int) for number in (values.low, values.high, values.step or 1))
        suggest: Any = trial.suggest_int if whole else trial.suggest_float
        step = values.step or (1 if whole else None)
        return f"{suggest(name, values.low, values.high, step=step, log=values.log):g}"
    return trial.suggest_categorical(name, values)


def suggest_words(trial: Trial, settings: Settings, sizes: Sizes, epochs: int) -> tuple[str, ...]:
    """Return the chain that Optuna chooses, with ``epochs`` of recovery, as words of a command line.

    There are no words if the chain has no stage or has a stage twice.
    """
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
    """Return a readable name: ``structured+openvino structured.target_heads=6``."""
    return " ".join(re.sub(r"^technique[.=]", "", word) for word in words)
