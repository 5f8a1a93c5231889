"""Compress and measure from a notebook or a script, with the checks and the errors of the command line."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig

from compress.artifacts.artifact import Artifact, load_artifact, save_tokenizer
from compress.cache.files import expand_path
from compress.errors import UserError
from compress.install import CONF, format_command
from compress.planning.advice import explain_hydra_error
from compress.planning.settings import read_settings
from compress.planning.words import quote_value
from compress.quiet import silence_libraries
from compress.reporting.folder import ARTIFACT, PAGE, RunFolder
from compress.reporting.jobs import describe_job
from compress.reporting.report import report_success, write_report, write_result
from compress.reporting.rows import Row

if TYPE_CHECKING:
    from pandas import DataFrame
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG_KEYS = ("baseline", "cache", "hardware", "seed", "split")
"""The settings of a run that belong to no group of choices and no stage."""


@dataclass(frozen=True)
class Report:
    """The report of a result: a notebook shows it as its table and notes, ``path`` is the whole page."""

    path: Path

    def __str__(self) -> str:
        return (self.path.parent / "results.md").read_text(encoding="utf-8")

    _repr_markdown_ = __str__


@dataclass(frozen=True)
class Result:
    """The outcome of :func:`compress` or :func:`measure`.

    ``rows`` are those of ``results.csv``: the baseline first, then the variant. ``folder`` holds all files.
    """

    folder: Path
    rows: list[Row]
    artifact: Path
    """The folder of the compressed model."""

    @property
    def table(self) -> DataFrame:
        """The rows as a pandas table, with the columns of ``results.csv``."""
        import pandas

        return pandas.DataFrame(self.rows)

    @property
    def report(self) -> Report:
        return Report(self.folder / "report.html")

    @cached_property
    def loaded(self) -> Artifact:
        """The model, its tokenizer and its description, loaded at first use."""
        return load_artifact(self.artifact)

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.loaded.tokenizer


def compress(
    model: str | Path | Mapping[str, Any] | PreTrainedModel,
    technique: str = "none",
    task: str | Mapping[str, Any] = "toy",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output: str | Path | None = None,
    **settings: Any,
) -> Result:
    """Fine-tune a baseline, apply the stages of ``technique`` in order, save the artifact and measure both.

    Args:
        model: a choice of the group ``model``, a Hugging Face id or folder, a mapping of settings
            (``{"model": "bert", "path": FOLDER}``), or a transformers model in memory with its ``tokenizer``.
        technique: stages joined with ``+``.
        task: a choice of the group ``task``, or a mapping of settings (``{"task": "sst2", "path": FOLDER}``).
        tokenizer: of a model in memory.
        output: a new or empty folder for the artifact and the report; ``multirun/DATE/TIME`` by default.
        settings: of a stage by its key (``prune={"sparsity": 0.5}``, ``prune_2=...``), and ``baseline``, ``hardware``,
            ``cache``, ``seed`` and ``split`` as in ``conf/train.yaml``.

    Raises:
        UserError: a setting cannot work; raised before anything is loaded or trained.
        PostconditionError: a stage broke one of its promises.

    Example:
        >>> result = compress("bert", "prune+gptq", task="sst2", prune={"sparsity": 0.5})  # doctest: +SKIP
        >>> result.table[["method", "size_mb", "accuracy"]]  # doctest: +SKIP
    """
    from compress.running.experiment import execute_plan, prepare_experiment

    silence_libraries()
    with choose_model(model, tokenizer) as words:
        words += [f"technique={technique}", *choose_group("task", task), *set_values(technique, settings)]
        cfg = compose_config("train", words)
        if (processes := read_settings(cfg).hardware.processes) > 1:
            raise UserError(
                f"hardware asks for {processes} processes; from Python one process trains. Set hardware.devices=1 and "
                f"hardware.nodes=1, or type {format_command('train')}."
            )
        run = RunFolder(choose_output_folder(output), key="output")
        prepared = prepare_experiment(cfg)
        run.claim()
        outcome = execute_plan(cfg, *prepared, run, begun=time.time())
    rows = report_success(run.new, describe_job(cfg, words), outcome, home=run.path)
    run.commit()
    run.register([PAGE])
    return Result(run.path, write_report(run.path, rows), run.path / ARTIFACT)


def measure(
    artifact: str | Path,
    *,
    baseline: str | Path | None = None,
    task: str | Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    **settings: Any,
) -> Result:
    """Measure an artifact, or any Hugging Face folder, on a task's test split.

    Args:
        artifact: the folder to measure.
        baseline: the folder to compare it with, timed in turns with it.
        task: as of :func:`compress`; the artifact's own by default, which a mapping without ``task`` changes
            (``{"path": FOLDER}``).
        output: a new or empty folder for the report; ``multirun/DATE/TIME`` by default.
        settings: ``hardware``, ``seed`` and ``split`` as in ``conf/evaluate.yaml``.

    Raises:
        UserError: there is no such folder, or its model does not fit the task.

    Example:
        >>> measure("multirun/DATE/TIME/artifact", baseline="bert-folder").report  # doctest: +SKIP
    """
    from compress.running.evaluate import evaluate_artifact

    silence_libraries()
    words = [f"artifact={quote_value(str(artifact))}", f"baseline={quote_value(baseline and str(baseline))}"]
    words += choose_group("task", task) if task else []
    cfg = compose_config("evaluate", [*words, *set_values("", settings)])
    run = RunFolder(choose_output_folder(output), key="output")
    rows = evaluate_artifact(cfg, run.new, home=run.path)
    run.claim()
    write_result(run.new, rows)
    run.commit()
    run.register([PAGE])
    return Result(run.path, write_report(run.path, rows), Path(artifact))


@contextmanager
def choose_model(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[list[str]]:
    """Yield the words that choose a model; one in memory is in a folder meanwhile.

    Raises:
        UserError: a model in memory comes without its tokenizer.
    """
    if isinstance(model, str | Path | Mapping):
        known = isinstance(model, str) and (CONF / "model" / f"{model}.yaml").is_file()
        choice: Any = model if known or isinstance(model, Mapping) else {"model": "pretrained", "path": str(model)}
        yield choose_group("model", choice)
        return
    if tokenizer is None:
        raise UserError(f"model is a {type(model).__name__} in memory; its tokenizer is needed too. Set tokenizer=...")
    with TemporaryDirectory() as folder:
        save_model(model, folder)
        save_tokenizer(tokenizer, Path(folder))
        yield choose_group("model", {"model": "pretrained", "path": folder, "name": type(model).__name__})


def save_model(model: PreTrainedModel, folder: str) -> None:
    """Write a model in memory to ``folder``, without those settings of its generation config that cannot be saved."""
    from compress.models.loading import repair_generation

    own = getattr(model, "generation_config", None)
    repair_generation(model)
    try:
        model.save_pretrained(folder)
    finally:
        if own is not None:
            model.generation_config = own


def choose_group(group: str, choice: str | Mapping[str, Any]) -> list[str]:
    """Return the words for a choice of a group: its name, or a mapping with the name under the group's own key.

    >>> choose_group("task", {"task": "sst2", "path": "data/sst2"})
    ['task=sst2', "task.path='data/sst2'"]
    """
    if isinstance(choice, str):
        return [f"{group}={choice}"]
    values = dict(choice)
    name = values.pop(group, None)
    added = "" if name else "+"  # beside what the artifact says of its own task
    return [*([f"{group}={name}"] if name else []), *(added + word for word in flatten_words(group, values))]


def set_values(technique: str, settings: Mapping[str, Any]) -> list[str]:
    """Return the words for keyword arguments: a key of ``CONFIG_KEYS``, or else that of a stage."""
    words = []
    for key, value in settings.items():
        path = key if key in CONFIG_KEYS else f"technique.{key}"
        if path != key and not technique:
            raise UserError(f"{key} is no setting of a measurement; expected {', '.join(CONFIG_KEYS)}.")
        words += flatten_words(path, value)
    return words


def flatten_words(key: str, value: Any) -> list[str]:
    """Return a word for every leaf of nested mappings.

    >>> flatten_words("hardware", {"threads": 2, "latency": {"seconds": 0.5}})
    ['hardware.threads=2', 'hardware.latency.seconds=0.5']
    """
    nested = isinstance(value, Mapping) and all(re.fullmatch(r"[A-Za-z_]\w*", str(name)) for name in value)
    if not nested:
        return [f"{key}={quote_value(value)}"]
    return [word for name, inner in value.items() for word in flatten_words(f"{key}.{name}", inner)]


def compose_config(name: str, words: list[str]) -> DictConfig:
    """Return the config ``name`` with the words of a command line.

    Raises:
        UserError: a word sets or chooses what there is not.
    """
    from compress.planning import chain  # noqa: F401  registers `technique=a+b`

    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose(name, words)
    except HydraException as error:
        raise UserError(explain_hydra_error(error)) from error


def choose_output_folder(output: str | Path | None) -> Path:
    """Return the path of a new or empty folder.

    Raises:
        UserError: ``output`` holds something, or is a file.
    """
    folder = expand_path(output or f"multirun/{datetime.now():%Y-%m-%d/%H-%M-%S-%f}")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"output is {folder}, which is not empty; a new or empty folder is expected. Set output=...")
    return folder
