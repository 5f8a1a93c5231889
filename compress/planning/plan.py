"""The whole experiment, checked before anything is loaded or trained."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import os
import sys
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from omegaconf import DictConfig, OmegaConf

from compress.cache.digests import compute_digest, fingerprint_files
from compress.errors import UserError
from compress.models.backbone import Backbone
from compress.planning.chain import Stage, list_choices, list_config_folders, read_stages
from compress.planning.settings import Settings, find_strings, parse_values, read_settings, to_plain
from compress.tasks.kinds import KINDS
from compress.tasks.sources import read_file, split_documents
from compress.tasks.splits import Splits, load_splits
from compress.tasks.splits import hash_rows as content
from compress.tasks.task import Task
from compress.tasks.tokens import TaskData
from compress.technique import Technique, Training


@dataclass(frozen=True)
class Calibration:
    """Text that a stage calibrates on in place of the task's own: how it was asked for, the training text of another
    task or a text file, and its rows once they are read."""

    asked: Any
    source: Task | Path
    rows: Dataset | None = None

    def read(self, seed: int) -> Calibration:
        if isinstance(self.source, Task):
            return replace(self, rows=load_splits(self.source, seed).train.select_columns("text"))
        table = split_documents(read_file(self.source, None, "text"))
        return replace(self, rows=Dataset.from_dict(table))


@dataclass(frozen=True)
class Step:
    """One stage of the chain, ready to be built: ``key`` tells a second ``prune`` (``prune_2``) from the first."""

    key: str
    name: str
    technique: type[Technique]
    arguments: dict[str, Any]
    training: Training
    samples: dict[str, int] = field(default_factory=dict)
    """How many texts it takes of a split."""
    calibration: Calibration | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that was chosen for the stage."""
        text = {"calibration": self.calibration.asked} if self.calibration else {}
        return {"stage": self.name, **self.arguments, **text, "train": to_plain(self.training)}

    @property
    def address(self) -> dict[str, Any]:
        """What decides the result of the stage: its settings, what is in the files that they name, and its source,
        which may be the user's own."""
        source = inspect.getsource(sys.modules[self.technique.__module__])
        used = [*self.technique.packages, *self.technique.versions]
        libraries = {package: version(package) for package in used if importlib.util.find_spec(package)}
        paths = [Path(value).expanduser() for value in find_strings(self.arguments)]
        return {
            **self.settings,
            "class": self.technique.__qualname__,
            "source": compute_digest(source),
            "files": [fingerprint_files(path) for path in paths if os.path.exists(path)],
            "calibration": self.calibration and content(self.calibration.rows),
            "libraries": libraries,
        }

    def read(self, seed: int) -> Step:
        """This step with the text at hand that it calibrates on."""
        return replace(self, calibration=self.calibration.read(seed)) if self.calibration else self

    def build(self, **offered: Any) -> Any:
        """Return the callback or LightningModule, given what its constructor takes of what is ``offered`` and of
        ``training``: a callback finds its model in the Trainer, a module is made with it."""
        takes = inspect.signature(self.technique).parameters
        given = {name: value for name, value in {**offered, "training": self.training}.items() if name in takes}
        stage: Any = self.technique.__new__(self.technique)
        stage.key = f"technique.{self.key}"  # before the constructor, whose errors name it
        parse_values(stage.__init__, self.arguments, stage.key, **given)
        return stage


@dataclass(frozen=True)
class Plan:
    """An experiment whose parts are valid and fit together."""

    method: str
    backbone: Backbone
    task: Task
    training: Training
    steps: tuple[Step, ...]
    settings: Settings
    team: Any = None
    """The processes that train together, a :class:`compress.running.team.Team`."""

    def read(self, splits: Splits, team: Any = None) -> Plan:
        """This plan with the labels of the data, and every step's own calibration text, at hand."""
        steps = tuple(one.read(self.settings.seed) for one in self.steps)
        return replace(self, task=splits.task, steps=steps, team=team)

    def compute_addresses(self, data: str) -> list[Any]:
        """What decides the baseline, how it is trained, and what decides every stage, given the data's fingerprint.
        Files of models are read for it."""
        return [self.address(data), to_plain(self.training), *(step.address for step in self.steps)]

    def address(self, data: str) -> dict[str, Any]:
        """What decides the baseline besides its training, given the fingerprint of the data."""
        task = to_plain(self.task)
        for key in ("path", "hub", "files"):
            del task[key]  # where the data lies decides nothing: its content is in the fingerprint
        hardware = self.settings.hardware
        return {
            "model": {**to_plain(self.backbone), "path": self.backbone.fingerprint(self.task)},
            "task": task,
            "data": data,
            "seed": self.settings.seed,
            "device": hardware.device.type,
            "processes": hardware.processes,
            "precision": hardware.precision,
            "batch_size": hardware.batch_size,
            "threads": torch.get_num_threads(),
        }


def make_plan(cfg: DictConfig) -> Plan:
    """The plan of ``cfg``.

    Raises:
        UserError: a key, type or value is wrong, an extra is missing, stages do not follow on one another, or task,
            model and stages do not fit together.
    """
    known = ("model", "task", "technique", "baseline", "hardware", "cache", "seed", "split")
    if missing := [key for key in known if cfg.get(key) is None]:
        raise UserError(f"`{missing[0]}` is not set: leave it to its default, or see python train.py --cfg job.")
    if unknown := sorted(set(map(str, cfg)) - {*known, "scale"}):
        raise UserError(f"`{unknown[0]}` is set and means nothing here: the settings are {', '.join(known)}.")
    task = parse_values(Task, to_plain(cfg.task), "task")
    backbone = parse_values(Backbone, to_plain(cfg.model), "model")
    steps = tuple(make_step(stage) for stage in read_stages(cfg.technique))
    check_stage_order(cfg.technique.name, steps)
    training = parse_values(Training, to_plain(cfg.baseline), "baseline")
    planned = Plan(cfg.technique.name, backbone, task, training, steps, read_settings(cfg))
    if planned.settings.hardware.runtime:
        raise UserError(
            "hardware.runtime is for artifacts that are there (python evaluate.py artifact=FOLDER "
            "hardware.runtime=...) and a chain runs where its last stage leaves it: leave hardware.runtime out, or end "
            "the chain on `onnx` or `openvino`."
        )
    skeleton = backbone.skeleton(task)
    reads = backbone.path and any("tokenizer" in inspect.signature(one.technique).parameters for one in steps)
    offered = {
        "task": task,
        "baseline_config": copy.deepcopy(skeleton.config),
        "tokenizer": backbone.tokenizer() if reads else None,
    }
    built: list[Any] = []
    for one in steps:
        stage = one.build(model=skeleton, **offered)
        stage.check(skeleton, built)
        skeleton = stage.preview(skeleton)
        if planned.settings.hardware.processes > 1 and one.training.epochs and not stage.together:
            raise UserError(
                f"`{one.key}` trains in one process and hardware asks for {planned.settings.hardware.processes}: set "
                "hardware.devices=1 and hardware.nodes=1."
            )
        built.append(stage)
    wanted = ({split: getattr(stage, f"{split}_samples") for split in ("train", "validation")} for stage in built)
    return replace(planned, steps=tuple(replace(one, samples=samples) for one, samples in zip(steps, wanted)))


def make_step(stage: Stage) -> Step:
    """A stage of the config with its class found and what it imports at hand."""
    arguments = to_plain(stage.node)
    target = arguments.pop("_target_")
    module, _, name = target.rpartition(".")
    try:
        technique = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"Stage `{stage.key}` names the class {target}, which cannot be imported ({error}): correct `_target_` in "
            f"conf/technique/stage/{stage.name}.yaml."
        ) from error
    if not (isinstance(technique, type) and issubclass(technique, Technique)):
        raise UserError(
            f"Stage `{stage.key}` names the class {target}, which is no Technique: inherit "
            "compress.technique.Technique."
        )
    missing = [package for package in technique.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"Stage `{stage.name}` needs {', '.join(missing)}, which is not installed: pip install -e '.[{stage.name}]'"
        )
    training = parse_values(Training, arguments.pop("train", {}), f"technique.{stage.key}.train")
    other = parse_calibration(arguments.pop("calibration", None), f"technique.{stage.key}.calibration")
    return Step(stage.key, stage.name, technique, arguments, training, calibration=other)


def parse_calibration(asked: Any, key: str) -> Calibration | None:
    """What ``key`` names: a text file, or a task of ``conf/task``, alone or with settings such as its ``path``."""
    if asked is None:
        return None
    if isinstance(asked, str) and (file := Path(asked).expanduser()).is_file():
        return Calibration(asked, file)
    settings = dict(asked) if isinstance(asked, dict) else {"task": asked}
    name = str(settings.pop("task", None))
    tasks = list_choices("task")
    if name not in tasks:
        near = get_close_matches(name, tasks, 1)
        raise UserError(
            f"{key} is {asked}, which is neither a text file nor a task{f' (meant: {near[0]}?)' if near else ''}: name "
            f"a file or one of {', '.join(tasks)}, where there is no hub as '{{task: NAME, path: FOLDER}}'."
        )
    task = parse_values(Task, {**read_choice("task", name), **settings}, key)
    return Calibration(asked, task)


def read_choice(group: str, name: str) -> dict[str, Any]:
    """Return the values of ``GROUP/NAME.yaml`` in the first folder of configs that has it, on top of those that its
    defaults list names."""
    files = (folder / group / f"{name}.yaml" for folder in list_config_folders())
    own = to_plain(OmegaConf.load(next(file for file in files if file.is_file())))
    bases = [base for base in own.pop("defaults", []) if base != "_self_"]
    return to_plain(OmegaConf.merge(*(read_choice(group, base) for base in bases), own))


def check_stage_order(method: str, steps: tuple[Step, ...]) -> None:
    """Raise UserError where a stage cannot work on the weights that the one before it leaves."""
    weights, before = "float", None
    for one in steps:
        needs = one.technique.needs
        if weights not in needs:
            last = [s.name for s in steps if s.technique.leaves not in ("float", None)]
            rest = [s.name for s in steps if s.technique.leaves in ("float", None)]
            works = {name: "technique=" + "+".join([*rest, name]) for name in last}
            if setting := one.technique.instead.get(before or ""):
                works[one.name] += f" technique.{one.name}.{setting}"
            raise UserError(
                f"technique={method}: `{one.key}` works on {' or '.join(needs)} weights and `{before}` before it "
                f"leaves {weights} ones: try {' or '.join(works.values())}."
            )
        weights, before = one.technique.leaves or weights, one.key


def check_data(planned: Plan, splits: Splits) -> None:
    """Raise UserError where a stage wants more texts than there are."""
    for one in () if KINDS[planned.task.kind].in_blocks else planned.steps:
        for split, adjective in (("train", "training"), ("validation", "validation")):
            other = one.calibration.rows if one.calibration and split == "train" else None
            asked, texts = one.samples.get(split, 0), len(getattr(splits, split) if other is None else other)
            if asked > texts:
                where = f"task `{planned.task.name}`" if other is None else f"technique.{one.key}.calibration"
                raise UserError(
                    f"technique.{one.key}.samples is {asked} and {where} has {texts} {adjective} "
                    f"texts: set technique.{one.key}.samples={texts} or less."
                )


def check_blocks(planned: Plan, data: TaskData) -> None:
    """Raise UserError where a stage wants more blocks of tokens than its text makes, which the tokenizer tells."""
    for one in planned.steps if KINDS[planned.task.kind].in_blocks else ():
        text = one.calibration and one.calibration.rows
        its = TaskData(data.splits, data.tokenizer, data.max_length, tokens=data.tokens, calibration_text=text)
        its.calibration(one.samples.get("train", 0), batch_size=1)
