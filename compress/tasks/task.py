"""What is learned: a data set in three splits, its labels, and the numbers that judge a model on it."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from compress.errors import UserError
from compress.tasks.kinds import KINDS
from compress.tasks.sources import STRICT, Columns, Hub, Layout

SPLITS = ("train", "validation", "test")
Share = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | None
Rows = Annotated[int, Field(ge=1)] | None


def check_kind(name: str) -> str:
    if name not in KINDS:
        raise PydanticCustomError("kind", f"Input should be one of {', '.join(KINDS)}")  # type: ignore[misc]
    return name


@dataclass(frozen=True, config=STRICT)
class Holdout:
    """How much of train, as a fraction or in rows, becomes a split that the data set does not have."""

    validation: Share = None
    test: Share = None


@dataclass(frozen=True, config=STRICT)
class Limit:
    """The most rows to use of each split."""

    train: Rows = None
    validation: Rows = None
    test: Rows = None


@dataclass(frozen=True, config=STRICT)
class Task:
    """A task as its YAML tells it: ``Task(**yaml)``.

    Its rows are generated (``generate``), read from a local folder (``path``, in one of the layouts of ``files``) or
    from the Hugging Face ``hub``. ``rows`` says what a row is where a table does not: an utterance of a dialogue, or an
    article of WikiText. ``labels`` are the names of the labels in the order of their indices; null finds them in train.

        load_splits(Task(**read_choice("task", "toy")), seed=0).test[0]
    """

    name: str
    kind: Annotated[str, AfterValidator(check_kind)]
    metrics: tuple[str, ...]
    primary: str
    labels: tuple[str, ...] | None = None
    generate: Literal["toy"] | None = None
    hub: Hub | None = None
    path: str | None = None
    files: tuple[Layout, ...] = ()
    rows: Literal["table", "dialogues", "articles"] = "table"
    columns: Columns = Columns()
    holdout: Holdout = Holdout()
    limit: Limit = Limit()
    max_length: Annotated[int, Field(ge=2)] = 128
    epochs: Annotated[int, Field(ge=0)] = 3
    batch_size: Annotated[int, Field(ge=1)] = 32

    def __post_init__(self) -> None:
        kind = KINDS[self.kind]
        wrong = [name for name in self.metrics if name not in kind.metrics]
        if wrong or not self.metrics:
            raise UserError(
                f"Task `{self.name}` is {self.kind} and asks for the metrics {', '.join(wrong) or 'none'}: set "
                f"task.metrics to some of {', '.join(kind.metrics)}."
            )
        if self.primary not in self.metrics:
            raise UserError(
                f"Task `{self.name}` has the primary metric {self.primary}, which it does not measure: set "
                f"task.primary to one of {', '.join(self.metrics)}."
            )
        fewest = 2 if kind.num_labels is None else 0
        if self.labels is not None and len(set(self.labels)) < max(len(self.labels), fewest):
            raise UserError(
                f"Task `{self.name}` has the labels {', '.join(self.labels) or 'none'}: set task.labels to the name of "
                "each label, once."
            )
        if kind.flag_columns and self.labels is None and self.columns.label is None:
            raise UserError(
                f"Task `{self.name}` names neither its labels nor their column: set task.labels to the names of the "
                "0/1 columns, or task.columns.label to a column of lists."
            )
        for splits in (self.hub, *self.files):
            named = [name for split in SPLITS if (name := getattr(splits, split, None))]
            if any(count > 1 for count in Counter(map(str, named)).values()):
                raise UserError(
                    f"Task `{self.name}` uses one set of rows for two of its splits ({', '.join(map(str, named))}): "
                    "give each its own, or null and task.holdout."
                )

    @property
    def num_labels(self) -> int:
        """Return how many numbers a model gives for a text; 0 for ``lm``, where the vocabulary decides."""
        fixed = KINDS[self.kind].num_labels
        if fixed is not None:
            return fixed
        if self.labels is None:
            raise UserError(
                f"Task `{self.name}` finds its labels in its training data: read it first (`load_splits(task).task`), "
                "or set task.labels."
            )
        return len(self.labels)
