"""Put the questions of EleutherAI's harness (``lm-eval``, arXiv:2405.14782) to a model, and keep every answer."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import io
import json
import logging
import math
import random
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import UserError, iterate_causes
from compress.hub import offline_if_unreachable
from compress.install import format_install
from compress.tasks.kinds import Answers
from compress.tasks.kinds.harness import AVERAGE, LOWER, number_metric
from compress.tasks.task import Task

SEED = 1234
"""The harness's own seed, which draws the examples of a prompt."""
BEST = "acc_norm"
"""The metric that comes first where a task has it: accuracy of the choice whose likelihood per character is highest."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A metric of a task of the harness: the column ``name`` of the results, read after the ``filter``."""

    name: str
    metric: str
    filter: str


@dataclasses.dataclass(frozen=True)
class Questions:
    """Tasks of the harness, loaded.

    Attributes:
        tasks: the harness's own objects, by name.
        columns: the metrics of every task, the one that counts for the average first.
        notes: what is left out.
    """

    tasks: dict[str, Any]
    columns: dict[str, list[Column]]
    notes: tuple[str, ...]

    @property
    def heads(self) -> tuple[str, ...]:
        """Return the first metric of every task or group."""
        return tuple(dict.fromkeys(columns[0].name for columns in self.columns.values()))


def check_tasks(task: Task) -> None:
    """Raise UserError if the harness is not installed, or does not know a name in ``task.tasks``."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"Task `{task.name}` needs lm-eval, which is not installed. Type {format_install('lm_eval')}")
    if task.path is not None and not Path(task.path).is_dir():
        raise UserError(f"There is no folder {task.path}. Set task.path to a folder with the harness's YAMLs.")
    known = find_manager(task).task_index
    for name in task.tasks:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            meant = f"; did you mean {', '.join(near)}?" if near else f" ({len(known):,} names)."
            raise UserError(
                f"task.tasks names {name}, which the harness does not know{meant} Set task.tasks to its tasks, or "
                "task.path to a folder with YAMLs of your own."
            )


def find_manager(task: Task) -> Any:
    """Return the harness's index of its tasks, or only of those in ``task.path`` if they are all that is asked for:
    the whole index takes some seconds."""
    if task.path is not None:
        own = build_manager(task.path, with_defaults=False)
        if all(name in own.task_index for name in task.tasks):
            return own
    return build_manager(task.path, with_defaults=True)


@functools.cache
def build_manager(path: str | None, with_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    with silence_harness():
        return TaskManager(include_path=path, include_defaults=with_defaults)


@contextlib.contextmanager
def silence_harness() -> Iterator[None]:
    """Hide the harness's warnings and progress bars, and restore the state of the random numbers afterwards."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


def load_questions(task: Task) -> Questions:
    """Return the tasks of the harness with their data, which is read from the hub or from where their YAMLs say.

    Raises:
        UserError: the harness lacks a task, its data cannot be read, or none of its metrics is a mean over examples.
    """
    check_tasks(task)
    manager = find_manager(task)
    tasks, columns, notes = dict[str, Any](), dict[str, list[Column]](), list[str]()
    # 1) Load all names
    with offline_if_unreachable():
        loaded_names = [(name, load_name(manager, name)) for name in task.tasks]
    for name, loaded in loaded_names:
        # 2) Prepare the tasks of a name, which may be a group
        parts = loaded["tasks"]
        grouped = name in loaded.get("groups", {}) and len(parts) > 1
        for part, each in parts.items():
            if part in tasks:
                raise UserError(f"task.tasks asks for {part} twice, the second time by {name}. Remove one of them.")
            refuse_unfit(part, each)
            set_shots(each, task.fewshot)
            tasks[part] = each
        # 3) Name their metrics: of a group, those that all of its tasks have
        own = {part: name_columns(each, name if grouped else part) for part, each in parts.items()}
        shared = set.intersection(*(set(usable) for usable, _ in own.values())) if grouped else None
        for part, (usable, left_out) in own.items():
            kept = [column for column in usable if shared is None or column in shared]
            left_out += [column.metric for column in usable if column not in kept]
            if not kept:
                raise UserError(
                    f"task.tasks names {part}, whose metrics ({', '.join(left_out) or 'none'}) are no means over "
                    "examples, or not shared by its group. Set task.tasks to tasks with accuracies, exact matches or "
                    "perplexities."
                )
            if left_out:
                notes.append(f"{part}: {', '.join(left_out)} left out: no mean over examples, or not its whole group's")
            columns[part] = sorted(kept, key=lambda column: rank_column(column, task.primary))
    return Questions(tasks, columns, tuple(notes))


def load_name(manager: Any, name: str) -> Any:
    """Return what the harness loads for a name.

    Raises:
        UserError: its data cannot be read.
    """
    try:
        with silence_harness():
            return manager.load([name])
    except Exception as error:  # a data set, a script of the task's own: anything may be raised
        causes = list(iterate_causes(error))
        reason = " ".join(str(causes[-1]).split())[:160] or type(causes[-1]).__name__
        if any(isinstance(cause, ConnectionError) for cause in causes):  # raised by datasets for a failed download
            reason = "the hub could not be reached"
        raise UserError(
            f"task.tasks names {name}, whose data cannot be read ({reason}). Set task.path to a folder with a YAML "
            "that reads local files (dataset_path: json, dataset_kwargs: {data_files: {test: FILE}})."
        ) from error


def refuse_unfit(name: str, each: Any) -> None:
    """Raise UserError if a task of the harness runs code that the model wrote, or shows pictures or sounds."""
    if getattr(each, "UNSAFE_CODE", False):
        raise UserError(f"task.tasks names {name}, which runs code that the model writes. Set task.tasks to others.")
    if getattr(each, "MULTIMODAL", False):
        raise UserError(f"task.tasks names {name}, which is not only about text. Set task.tasks to others.")


def set_shots(each: Any, shots: int | None) -> None:
    """Set the number of examples in a prompt as the harness does: a task that says 0 keeps it."""
    own = each.get_config("num_fewshot")
    if own is None or (shots is not None and own != 0):
        each.set_config("num_fewshot", shots or 0)
    each.set_fewshot_seed(SEED)


def name_columns(each: Any, name: str) -> tuple[list[Column], list[str]]:
    """Return the columns of a task, and the names of the metrics that single examples do not give."""
    from lm_eval.api.registry import get_aggregation

    means = {key: [get_aggregation(key)] for key in ("bits_per_byte",)}
    means["perplexity"] = [get_aggregation(key) for key in ("perplexity", "weighted_perplexity")]
    mean = [get_aggregation(key) for key in ("mean", "nanmean")]
    filters = [each.name for each in getattr(each, "_filters", ())] or ["none"]
    columns, left_out = [], []
    better = each.higher_is_better()
    for metric, aggregation in each.aggregation().items():
        ending = next((end for end in LOWER if metric.endswith(end)), None)
        if aggregation not in (means[ending] if ending else mean) or better.get(metric, True) != (ending is None):
            left_out.append(metric)
            continue
        for chosen in filters:
            middle = "" if len(filters) == 1 else f"{chosen}_"
            columns.append(Column(f"{name}_{middle}{metric}", metric, chosen))
    return columns, left_out


def rank_column(column: Column, primary: str) -> tuple[bool, bool, bool]:
    """Return the place of a column among those of its task: the primary first, then where higher is better."""
    return column.name != primary, column.name.endswith(LOWER), column.metric != BEST


def choose_metrics(task: Task, questions: Questions) -> Task:
    """Return the task with its metrics: those that are set, else all. Without another choice the average of several
    tasks is the primary one, or the first of a single task.

    Raises:
        UserError: a metric is set that no task has.
    """
    known = list(dict.fromkeys(column.name for column in chain.from_iterable(questions.columns.values())))
    averaged = [head for head in questions.heads if not head.endswith(LOWER)]
    if len(averaged) > 1:
        known.insert(0, AVERAGE)
    chosen = known if task.metrics == (AVERAGE,) else list(task.metrics)
    primary = task.primary
    if primary == AVERAGE and AVERAGE not in known:
        primary = (averaged or questions.heads)[0]
        chosen = [primary, *(name for name in chosen if name not in (AVERAGE, primary))]
    if wrong := [name for name in chosen if name not in known]:
        raise UserError(
            f"task.metrics is {', '.join(wrong)}, which {', '.join(task.tasks)} do not have. Set task.metrics to some "
            f"of {', '.join(known)}."
        )
    if primary not in chosen:
        chosen = [primary, *chosen]
    return dataclasses.replace(task, metrics=tuple(chosen), primary=primary, labels=questions.heads)


def load_prompts(task: Task) -> tuple[Task, dict[str, list[Any]], tuple[str, ...]]:
    """Return the task with its metrics, the table of its questions in the harness's order, and notes.

    A row's ``text`` is the prompt with the first answer that the model is asked about, and ``question`` a digest of all
    that the harness asks.
    """
    questions = load_questions(task)
    table: dict[str, list[Any]] = {"text": [], "question": []}
    notes = list(questions.notes)
    for name, each in questions.tasks.items():
        with silence_harness():
            each.build_all_requests(limit=task.limit.test)
        asked: dict[int, list[Any]] = {}
        for instance in each.instances:
            asked.setdefault(instance.doc_id, []).append(instance.args)
        for arguments in asked.values():
            table["text"].append("".join(part for part in arguments[0] if isinstance(part, str)))
            content = json.dumps([name, arguments], default=str)
            table["question"].append(hashlib.blake2b(content.encode(), digest_size=16).hexdigest())
        notes.append(f"{name}: {len(asked):,} of {len(each.eval_docs):,} questions")
    return choose_metrics(task, questions), table, tuple(notes)


def answer_questions(task: Task, model: Any, tokenizer: Any, device: Any, label: str = "") -> Answers:
    """Return a model's answers to the questions of :func:`load_prompts`, in the same order.

    The arrays are those of :class:`compress.tasks.kinds.harness.Harness`.
    """
    from lm_eval.evaluator import evaluate

    from compress.tasks.answering import HarnessModel

    questions = load_questions(task)
    asked = HarnessModel(model, tokenizer, task.batch_size, device, label)
    with silence_harness():
        results = evaluate(asked, {"tasks": questions.tasks}, limit=task.limit.test, bootstrap_iters=0)
    parts = [read_samples(results["samples"][name], columns) for name, columns in questions.columns.items()]
    width = max(labels.shape[1] for _, labels in parts) - 1
    outputs = [np.pad(values, [(0, 0), (0, 1 + 2 * width - values.shape[1])]) for values, _ in parts]
    labels = [np.pad(numbers, [(0, 0), (0, 1 + width - numbers.shape[1])]) for _, numbers in parts]
    return Answers(np.concatenate(outputs), np.concatenate(labels))


def read_samples(samples: list[dict[str, Any]], columns: list[Column]) -> tuple[np.ndarray, np.ndarray]:
    """Return the outputs and labels of one task from the harness's samples, one for each question and filter."""
    rows = {number: i for i, number in enumerate(dict.fromkeys(sample["doc_id"] for sample in samples))}
    outputs = np.zeros((len(rows), 1 + 2 * len(columns)))
    labels = np.zeros((len(rows), 1 + len(columns)), np.int64)
    labels[:, 1:] = [number_metric(column.name) for column in columns]
    for sample in samples:
        i = rows[sample["doc_id"]]
        if sample["filter"] == columns[0].filter:
            outputs[i, 0] = number_answer(sample["filtered_resps"])
            labels[i, 0] = zlib.crc32(f"{sample['doc_hash']} {sample['prompt_hash']}".encode())
        for at, column in enumerate(columns):
            if column.filter == sample["filter"] and column.metric in sample:
                outputs[i, 1 + 2 * at : 3 + 2 * at] = split_value(sample[column.metric])
    return outputs, labels


def split_value(value: Any) -> tuple[float, float]:
    """Return the two numbers of a metric of one example: a value and 1, or a log-likelihood and its number of words or
    bytes. An undefined value does not count."""
    total, weight = value if isinstance(value, tuple | list) else (value, 1)
    return (0.0, 0.0) if math.isnan(float(total)) else (float(total), float(weight))


def number_answer(responses: list[Any]) -> float:
    """Return a number that names an answer: the most likely choice, whether the continuation is the most likely, or a
    checksum of a written text."""
    first = responses[0]
    if isinstance(first, tuple | list) and len(responses) > 1 and len(first) == 2:
        return float(np.argmax([likelihood for likelihood, _ in responses]))
    if isinstance(first, tuple | list) and len(first) == 2:
        return float(bool(first[1]))
    return 0.0 if isinstance(first, float) else float(zlib.crc32(str(first).encode()))
