"""Plan a whole experiment and check it before anything is loaded or trained."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from datasets import Dataset
from omegaconf import DictConfig, OmegaConf

from compress.cache.digests import fingerprint_files, read_versions
from compress.cache.files import expand_path
from compress.cache.sources import digest_source
from compress.errors import UserError
from compress.install import format_command, format_install
from compress.models.adapters import check_adapter, list_packages
from compress.models.backbone import Backbone, check_added_tokens
from compress.planning.chain import Stage, list_choices, list_config_folders, read_stages
from compress.planning.settings import Settings, parse_values, read_settings, to_plain
from compress.runtimes.processor import describe_machine
from compress.tasks.harness import check_tasks
from compress.tasks.kinds import KINDS, Kind
from compress.tasks.reading import read_documents
from compress.tasks.splits import Splits, load_splits
from compress.tasks.splits import hash_rows as content
from compress.tasks.task import SPLITS, Task
from compress.tasks.tokens import TaskData
from compress.technique import Baseline, Technique, Training


@dataclass(frozen=True)
class Calibration:
    """Text that a stage calibrates on instead of the task's own."""

    asked: Any
    """Value of the setting, as the user typed it."""
    source: Task | Path
    """Another task, whose training text is used, or a text file."""
    rows: Dataset | None = None
    """The text; None until it is read."""

    def read(self, seed: int) -> Calibration:
        """Return this calibration with its rows."""
        if isinstance(self.source, Task):
            rows = load_splits(self.source, seed).train
            kept = [name for name in ("text", "messages", "origin") if name in rows.column_names]
            return replace(self, rows=rows.select_columns(kept))
        return replace(self, rows=Dataset.from_dict({"text": read_documents(self.source)}))


@dataclass(frozen=True)
class Step:
    """One stage of the chain, ready to be built; the ``key`` of a second ``prune`` is ``prune_2``."""

    key: str
    name: str
    technique: type[Technique]
    arguments: dict[str, Any]
    training: Training
    samples: dict[str, int] = field(default_factory=dict)
    """Number of texts that the stage takes of each split."""
    calibration: Calibration | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Return all settings of the stage."""
        text = {"calibration": self.calibration.asked} if self.calibration else {}
        return {"stage": self.name, **self.arguments, **text, "train": to_plain(self.training)}

    @property
    def address(self) -> dict[str, Any]:
        """Return everything that decides the stage's result: its settings, the content of the files that they name,
        its source code (which may be the user's own) with all that it imports, and the versions of its libraries."""
        return self.compute_address()

    def compute_address(self, known: Path | None = None) -> dict[str, Any]:
        """Return the :attr:`address`; the folder ``known`` keeps the checksums of files."""
        used = [*self.technique.packages, *self.technique.versions, *list_packages(self.arguments.get("adapter"))]
        named = (OmegaConf.select(OmegaConf.create(self.arguments), setting) for setting in self.technique.files)
        paths = [expand_path(value) for value in named if isinstance(value, str)]
        return {
            **self.settings,
            "class": self.technique.__qualname__,
            "source": digest_source(self.technique.__module__, f"compress.runtimes.{self.technique.runtime}"),
            "files": [fingerprint_files(path, known) for path in paths if path.exists()],
            "calibration": self.calibration and content(self.calibration.rows),
            "libraries": read_versions(used),
            **(describe_machine() if any(map(self.is_set, self.technique.timed)) else {}),
        }

    def is_set(self, setting: str) -> bool:
        """Return whether a setting of the stage, such as ``target.latency``, is not null."""
        return OmegaConf.select(OmegaConf.create(self.arguments), setting) is not None

    def read(self, seed: int) -> Step:
        """Return this step with the rows of its calibration text."""
        return replace(self, calibration=self.calibration.read(seed)) if self.calibration else self

    def build(self, **offered: Any) -> Any:
        """Return the callback or LightningModule. Its constructor gets those of the values ``offered`` and of
        ``training`` that it has parameters for: a module takes its model, a callback finds it in the Trainer."""
        parameters = inspect.signature(self.technique).parameters
        accepted = {name: value for name, value in {**offered, "training": self.training}.items() if name in parameters}
        stage: Any = self.technique.__new__(self.technique)
        stage.key = f"technique.{self.key}"  # set before the constructor, whose errors name it
        parse_values(stage.__init__, self.arguments, stage.key, **accepted)
        return stage


@dataclass(frozen=True)
class Plan:
    """An experiment whose parts are valid and fit together."""

    method: str
    backbone: Backbone
    task: Task
    training: Baseline
    steps: tuple[Step, ...]
    settings: Settings
    harness: Task | None = None
    """The questions of EleutherAI's harness that artifacts are measured on; ``task`` is then the text beside them."""
    team: Any = None
    """Processes that train together, a :class:`compress.running.team.Team`."""

    def read(self, splits: Splits, team: Any = None) -> Plan:
        """Return this plan with the labels of the data and every step's calibration text."""
        steps = tuple(step.read(self.settings.seed) for step in self.steps)
        return replace(self, task=splits.task, steps=steps, team=team)

    def compute_addresses(self, data: str) -> list[Any]:
        """Return the address of the baseline, its training and the address of every stage, for the fingerprint of the
        rows that training sees. This reads the files of models that no job with this cache has read before."""
        caching = self.settings.cache
        known = Path(caching.dir) / "checksums" if caching.mode != "off" else None
        steps = (step.compute_address(known) for step in self.steps)
        training = to_plain(self.training)
        libraries = read_versions(list_packages(training["adapter"]))
        return [self.address(data, known), {**training, "libraries": libraries}, *steps]

    def address(self, data: str, known: Path | None = None) -> dict[str, Any]:
        """Return everything that decides the baseline except its training, for the fingerprint of the rows that
        training sees; the folder ``known`` keeps the checksums of files.

        What only measuring reads is left out, and so is what changes no more than the order of sums: the number of
        threads and the processor, which are recorded with the entry.
        """
        task = {key: value for key, value in to_plain(self.task).items() if key not in NOT_TRAINED_WITH}
        model = to_plain(self.backbone)
        del model["learning_rate"], model["from_scratch"]  # a default of the training's, and a check
        hardware = self.settings.hardware
        return {
            "model": {**model, "path": self.backbone.fingerprint(self.task, known)},
            "task": task,
            "data": data,
            "seed": self.settings.seed,
            "device": hardware.device.type,
            "processes": hardware.processes,
            "precision": hardware.precision,
            "batch_size": hardware.batch_size,
            "source": digest_source(*TRAINING),
        }


TRAINING = ("compress.running.stages", "compress.runtimes.torch")
"""Modules whose source, with that of all modules that they import, decides what a training leaves."""
NOT_TRAINED_WITH = (
    *("path", "hub", "files", "generate", "rows", "columns", "holdout", "limit"),  # the fingerprint covers the content
    *("epochs", "batch_size"),  # defaults of the training's settings, and for measuring
    "metrics",  # the primary one selects the epoch
    *("tasks", "fewshot", "text"),  # of the harness, which only measures
)
"""Settings of a task that no training depends on, given the fingerprint of its rows."""


def make_plan(cfg: DictConfig) -> Plan:
    """Return the plan of ``cfg``.

    Raises:
        UserError: a key, type or value is wrong, an extra is missing, the order of stages is impossible, or task, model
            and stages do not fit together.
    """
    # 1) Read the settings
    known = ("model", "task", "technique", "baseline", "hardware", "cache", "seed", "split")
    if missing := [key for key in known if cfg.get(key) is None]:
        raise UserError(
            f"`{missing[0]}` is not set. Leave it at its default, which {format_command('train')} --cfg job prints."
        )
    if unknown := sorted(set(map(str, cfg)) - {*known, "scale"}):
        raise UserError(f"`{unknown[0]}` is no setting; expected one of {', '.join(known)}. Remove it.")
    task, harness = choose_text(parse_values(Task, to_plain(cfg.task), "task"))
    backbone = parse_values(Backbone, to_plain(cfg.model), "model")
    steps = tuple(make_step(stage) for stage in read_stages(cfg.technique))
    check_stage_order(cfg.technique.name, steps)
    training = parse_values(Baseline, to_plain(cfg.baseline), "baseline")
    planned = Plan(cfg.technique.name, backbone, task, training, steps, read_settings(cfg), harness)
    if planned.settings.hardware.runtime:
        raise UserError(
            f"hardware.runtime is set, which only an evaluation can use ({format_command('evaluate')} artifact=FOLDER "
            "hardware.runtime=...). Remove hardware.runtime, or end the chain on `onnx` or `openvino`."
        )

    check_dtype(planned)

    # 2) Check every stage on the shapes that the stages before it leave
    skeleton = backbone.skeleton(task)
    check_adapter(training.adapter, skeleton, "baseline.adapter", training.epochs)
    tokenizer = backbone.tokenizer() if backbone.path else None
    if tokenizer:
        KINDS[task.kind].set_template(tokenizer, task.template)
        check_added_tokens(tokenizer, skeleton, backbone.path)
    offered = {
        "task": task,
        "baseline_config": copy.deepcopy(skeleton.config),
        "tokenizer": tokenizer,
    }
    built: list[Any] = []
    for step in steps:
        stage = step.build(model=skeleton, **offered)
        stage.check(skeleton, built)
        skeleton = stage.preview(skeleton)
        if planned.settings.hardware.processes > 1 and step.training.epochs and not stage.together:
            raise UserError(
                f"`{step.key}` trains in one process and hardware asks for {planned.settings.hardware.processes}. Set "
                "hardware.devices=1 and hardware.nodes=1."
            )
        built.append(stage)

    if harness and harness.text is None:
        refuse_without_text(planned, built)

    # 3) Note how many texts every stage needs
    needed = ({split: getattr(stage, f"{split}_samples") for split in ("train", "validation")} for stage in built)
    return replace(planned, steps=tuple(replace(step, samples=samples) for step, samples in zip(steps, needed)))


def make_step(stage: Stage) -> Step:
    """Return the step of a stage of the config.

    Raises:
        UserError: its class cannot be imported or is no Technique, or a package is not installed.
    """
    arguments = to_plain(stage.node)
    target = arguments.pop("_target_")
    module, _, name = target.rpartition(".")
    try:
        technique = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"Stage `{stage.key}` names the class {target}, which cannot be imported ({error}). Correct `_target_` in "
            f"conf/technique/stage/{stage.name}.yaml."
        ) from error
    if not (isinstance(technique, type) and issubclass(technique, Technique)):
        raise UserError(
            f"Stage `{stage.key}` names the class {target}, which is no Technique. Inherit "
            "compress.technique.Technique."
        )
    missing = [package for package in technique.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"Stage `{stage.name}` needs {', '.join(missing)}, which is not installed. Type "
            f"{format_install(stage.name)}"
        )
    training = parse_values(Training, arguments.pop("train", {}), f"technique.{stage.key}.train")
    calibration = parse_calibration(arguments.pop("calibration", None), f"technique.{stage.key}.calibration")
    return Step(stage.key, stage.name, technique, arguments, training, calibration=calibration)


def parse_calibration(value: Any, key: str) -> Calibration | None:
    """Return the calibration text that ``value``, the setting ``key``, names: a text file, or a task of ``conf/task``,
    alone or with settings such as its ``path``."""
    if value is None:
        return None
    if isinstance(value, str) and (file := expand_path(value)).is_file():
        return Calibration(value, file)
    settings = dict(value) if isinstance(value, dict) else {"task": value}
    name = str(settings.pop("task", None))
    tasks = list_choices("task")
    if name not in tasks:
        near = get_close_matches(name, tasks, 1)
        raise UserError(
            f"{key} is {value}, which is neither a text file nor a task"
            f"{f' (did you mean `{near[0]}`?)' if near else ''}. Set a file or one of {', '.join(tasks)}; without a "
            "hub set '{task: NAME, path: FOLDER}'."
        )
    task = parse_values(Task, {**read_choice("task", name), **settings}, key)
    return Calibration(value, task)


def choose_text(task: Task) -> tuple[Task, Task | None]:
    """Return the task whose text stages calibrate and train on, and the task of the harness that ``task`` is, if it is
    one. Without ``task.text``, the text is generated and only serves to check what stages promise.

    Raises:
        UserError: the harness does not know one of its tasks, or ``task.text`` is no task of kind ``lm``.
    """
    if not KINDS[task.kind].in_harness:
        return task, None
    check_tasks(task)
    source = parse_calibration("toy_lm" if task.text is None else task.text, "task.text").source
    if isinstance(source, Path):
        shares = {"validation": 0.1, "test": 0.1}
        metrics = {"metrics": ("perplexity", "accuracy"), "primary": "perplexity"}
        source = parse_values(Task, {"name": "", "kind": "lm", "path": str(source), "holdout": shares, **metrics}, "")
    if not KINDS[source.kind].in_blocks:
        raise UserError(
            f"task.text is {source.name}, whose kind is {source.kind}; text to continue is expected. Set task.text to "
            "a text file or a task of kind lm (task.text=wikitext)."
        )
    return replace(source, name=task.name, epochs=task.epochs), task


def refuse_without_text(planned: Plan, built: list[Any]) -> None:
    """Raise UserError if something trains, calibrates or compares on text that the harness's task does not have."""
    needs = {"split=validation": planned.settings.split == "validation", "baseline.epochs": planned.training.epochs}
    for step, stage in zip(planned.steps, built):
        calibrates = stage.train_samples > 1 and step.calibration is None  # an export reads one text, for its shape
        needs[f"technique.{step.key}"] = calibrates or step.training.epochs or stage.validation_samples
    if asking := [key for key, needed in needs.items() if needed]:
        raise UserError(
            f"{asking[0]} needs text to learn from, and task `{planned.task.name}` only has questions. Set task.text "
            "to a text file or a task, e.g. task.text=wikitext or task.text='{task: wikitext, path: FOLDER}'."
        )


def read_choice(group: str, name: str) -> dict[str, Any]:
    """Return the values of ``GROUP/NAME.yaml`` from the first config folder that has it, merged over the files of its
    defaults list."""
    files = (folder / group / f"{name}.yaml" for folder in list_config_folders())
    own = to_plain(OmegaConf.load(next(file for file in files if file.is_file())))
    bases = [base for base in own.pop("defaults", []) if base != "_self_"]
    return to_plain(OmegaConf.merge(*(read_choice(group, base) for base in bases), own))


def check_stage_order(method: str, steps: tuple[Step, ...]) -> None:
    """Raise UserError if a stage cannot work on the weights that the stage before it leaves."""
    weights, before = "float", None
    for step in steps:
        needs = step.technique.needs
        if weights not in needs:
            last = [other.name for other in steps if other.technique.leaves not in ("float", None)]
            rest = [other.name for other in steps if other.technique.leaves in ("float", None)]
            works = {name: "technique=" + "+".join([*rest, name]) for name in last}
            if setting := step.technique.instead.get(before or ""):
                works[step.name] += f" technique.{step.name}.{setting}"
            raise UserError(
                f"technique is {method}; `{step.key}` works on {' or '.join(needs)} weights and `{before}` before it "
                f"leaves {weights} weights. Set {' or '.join(works.values())}."
            )
        weights, before = step.technique.leaves or weights, step.key


def check_dtype(planned: Plan) -> None:
    """Raise UserError if float16 weights are to be trained: they become NaN, because the smallest numbers of the
    optimizer are zero in float16."""
    trained = {"baseline": planned.training, **{f"technique.{step.key}.train": step.training for step in planned.steps}}
    key = next((key for key, training in trained.items() if training.epochs), None)
    if planned.backbone.dtype == "float16" and key:
        raise UserError(
            f"model.dtype is float16 and {key}.epochs is {trained[key].epochs}; training needs float32 or bfloat16 "
            f"weights. Set model.dtype=bfloat16 or float32, or {key}.epochs=0."
        )


def check_data(planned: Plan, splits: Splits) -> None:
    """Raise UserError if a model's own tokenizer cannot encode the data, or a stage needs more texts than there are."""
    kind = KINDS[planned.task.kind]
    trained = {"baseline": planned.training, **{f"technique.{s.key}.train": s.training for s in planned.steps}}
    for key, training in trained.items():
        if training.epochs:
            kind.check_training(planned.task.name, splits.train, splits.validation, key, training.epochs)
    if planned.backbone.path and type(kind).check_encoding is not Kind.check_encoding:
        tokenizer = planned.backbone.tokenizer()
        kind.set_template(tokenizer, planned.task.template)
        for split in SPLITS:
            kind.check_encoding(getattr(splits, split), tokenizer)
    for step in () if kind.in_blocks else planned.steps:
        for split, adjective in (("train", "training"), ("validation", "validation")):
            rows = step.calibration.rows if step.calibration and split == "train" else None
            samples, texts = step.samples.get(split, 0), len(getattr(splits, split) if rows is None else rows)
            if samples > texts:
                where = f"task `{planned.task.name}`" if rows is None else f"technique.{step.key}.calibration"
                raise UserError(
                    f"technique.{step.key}.samples is {samples} and {where} has {texts} {adjective} "
                    f"texts. Set technique.{step.key}.samples={texts} or less."
                )


def check_blocks(planned: Plan, data: TaskData) -> None:
    """Raise UserError if a stage needs more blocks of tokens than the tokenizer makes of its text."""
    for step in planned.steps if KINDS[planned.task.kind].in_blocks else ():
        text = step.calibration and step.calibration.rows
        own = TaskData(data.splits, data.tokenizer, data.max_length, tokens=data.tokens, calibration_text=text)
        own.calibration(step.samples.get("train", 0), batch_size=1)
