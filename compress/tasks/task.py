"""Describe a task: a data set in three splits, its labels, and the metrics that judge a model."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from compress.errors import UserError
from compress.tasks.embedding import Embedding
from compress.tasks.kinds import KINDS, Kind
from compress.tasks.sources import STRICT, Columns, Hub, Layout, Messages

SPLITS = ("train", "validation", "test")


def check_label_name(name: Any) -> Any:
    """Return ``name``; raise pydantic's error if it is a boolean."""
    if isinstance(name, bool):
        reason = "Unquoted yes, no, on, off, true and false are booleans in YAML. Set the name in quotation marks"
        raise PydanticCustomError("label", reason)  # type: ignore[misc]
    return name


def make_list(value: Any) -> Any:
    """Return a single name as a list."""
    return [value] if isinstance(value, str) else value


LabelName = Annotated[str, BeforeValidator(check_label_name)]
Share = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | None
Rows = Annotated[int, Field(ge=1)] | None


def check_kind(name: str) -> str:
    """Return ``name``; raise pydantic's error if it names no kind of task."""
    if name not in KINDS:
        raise PydanticCustomError("kind", f"Input should be one of {', '.join(KINDS)}")  # type: ignore[misc]
    return name


@dataclass(frozen=True, config=STRICT)
class Holdout:
    """The part of train, a fraction or a number of rows, that becomes a split that the data set lacks."""

    validation: Share = None
    test: Share = None


@dataclass(frozen=True, config=STRICT)
class Limit:
    """The largest number of rows to use of each split."""

    train: Rows = None
    validation: Rows = None
    test: Rows = None


@dataclass(frozen=True, config=STRICT)
class Task:
    """A task with the values of its YAML: ``Task(**yaml)``.

    Its rows are generated (``generate``), read from a local folder (``path``, in one of the layouts of ``files``) or
    from the Hugging Face ``hub``. ``rows`` is the form of the data: a plain table, dialogues of utterances,
    WikiText's articles, SQuAD's, or ``joined``: a language model's text in one, with two line breaks between its rows,
    as papers measure on WikiText. ``labels`` are the names of the labels in the order of their indices; null finds
    them in train.

    For conversations, ``messages`` describes the data, ``template`` replaces the tokenizer's chat template (``simple``
    or the text of a Jinja template), and ``pack`` trains on several conversations in a line of ``max_length`` tokens,
    which do not see each other.

        load_splits(Task(**read_choice("task", "toy")), seed=0).test[0]
    """

    name: str
    kind: Annotated[str, AfterValidator(check_kind)]
    metrics: tuple[str, ...]
    primary: str
    labels: tuple[LabelName, ...] | None = None
    generate: Literal["toy", "toy_chat", "toy_embedding", "toy_span", "toy_tokens"] | None = None
    hub: Hub | None = None
    path: str | None = None
    files: tuple[Layout, ...] = ()
    rows: Literal["table", "dialogues", "articles", "collection", "questions", "squad", "joined"] = "table"
    columns: Columns = Columns()
    embedding: Embedding = Embedding()
    candidates: Annotated[int, Field(ge=2)] | None = None
    """For a reranker, the number of documents that a first stage, BM25, finds for each query."""
    messages: Messages = Messages()
    template: str | None = None
    pack: bool = False
    holdout: Holdout = Holdout()
    limit: Limit = Limit()
    max_length: Annotated[int, Field(ge=2)] = 128
    stride: Annotated[int, Field(ge=1)] | None = None
    """For a language model, the tokens of validation and test that a block scores after those of the block before it,
    which it reads as context. None: blocks do not overlap."""
    epochs: Annotated[int, Field(ge=0)] = 3
    batch_size: Annotated[int, Field(ge=1)] = 32
    tasks: Annotated[tuple[str, ...], BeforeValidator(make_list)] = ()
    """Tasks and groups of EleutherAI's harness, for the kind ``lm_eval``."""
    fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples in a prompt of the harness; None: as each of its tasks says."""
    text: Any = None
    """Text that stages calibrate and train on, where the task has none: a text file, or a task of ``conf/task``, alone
    or with settings such as its ``path``."""

    def __post_init__(self) -> None:
        kind = KINDS[self.kind]
        if kind.in_harness != bool(self.tasks):
            raise UserError(
                f"task.tasks is {', '.join(self.tasks) or 'empty'}, and task `{self.name}` is {self.kind}. Set "
                "task=lm_eval task.tasks=[hellaswag,piqa] or other tasks of the harness."
            )
        wrong = [name for name in self.metrics if name not in kind.metrics]
        if wrong or not self.metrics:
            raise UserError(
                f"task.metrics is {', '.join(wrong) or 'empty'}, and task `{self.name}` is {self.kind}. Set "
                f"task.metrics to some of {', '.join(kind.metrics)}."
            )
        if self.primary not in self.metrics:
            raise UserError(
                f"task.primary is {self.primary}, which task `{self.name}` does not measure. Set "
                f"task.primary to one of {', '.join(self.metrics)}."
            )
        kind.check(self)
        if not kind.in_blocks and (self.stride or self.rows == "joined"):
            setting, value = ("stride", self.stride) if self.stride else ("rows", "joined")
            raise UserError(
                f"task.{setting} is {value}, and task `{self.name}` is {self.kind}, whose texts are not cut into "
                f"blocks. Leave task.{setting} at its default."
            )
        if self.stride and self.stride > self.max_length:
            raise UserError(
                f"task.stride is {self.stride}, and a block has {self.max_length} tokens, so some would not be scored. "
                f"Set task.stride={self.max_length} or less."
            )
        if self.pack and type(kind).pack is Kind.pack:
            raise UserError(
                f"task.pack is true and task `{self.name}` is {self.kind}, whose rows are not packed. Set "
                "task.pack=false."
            )
        fewest = 2 if kind.num_labels is None else 0
        if self.labels is not None and len(set(self.labels)) < max(len(self.labels), fewest):
            raise UserError(
                f"Task `{self.name}` has the labels {', '.join(self.labels) or 'none'}. Set task.labels to the name of "
                "each label, once."
            )
        if kind.flag_columns and self.labels is None and self.columns.label is None:
            raise UserError(
                f"Task `{self.name}` names neither its labels nor their column. Set task.labels to the names of the "
                "0/1 columns, or task.columns.label to a column of lists."
            )
        for splits in (self.hub, *self.files):
            named = [name for split in SPLITS if (name := getattr(splits, split, None))]
            if any(count > 1 for count in Counter(map(str, named)).values()):
                raise UserError(
                    f"Task `{self.name}` uses one set of rows for two of its splits ({', '.join(map(str, named))}). "
                    "Set different rows for each, or null and task.holdout."
                )

    @property
    def num_labels(self) -> int:
        """Return the number of a model's outputs for a text; 0 for ``lm``, where it is the vocabulary's size."""
        fixed = KINDS[self.kind].num_labels
        if fixed is not None:
            return fixed
        if self.labels is None:
            raise UserError(
                f"Task `{self.name}` finds its labels in its training data, which is not read yet. Use "
                "`load_splits(task).task`, or set task.labels."
            )
        return len(self.labels)
