"""The whole experiment, checked before anything is loaded or trained."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError
from torch import nn

from compress import chain
from compress.cache import digest
from compress.errors import UserError
from compress.measure import Latency
from compress.models import Backbone
from compress.tasks import Task
from compress.techniques import Training, trait

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """One stage of the chain, ready to be built: ``key`` tells a second ``prune`` (``prune_2``) from the first."""

    key: str
    name: str
    technique: type
    arguments: dict[str, Any]
    training: Training

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that was chosen for the stage."""
        return {"stage": self.name, **self.arguments, "train": plain(self.training)}

    @property
    def address(self) -> dict[str, Any]:
        """What decides the result of the stage: its settings, and its source, which may be the user's own."""
        source = inspect.getsource(sys.modules[self.technique.__module__])
        return {**self.settings, "class": self.technique.__qualname__, "source": digest(source)}

    def build(self, model: nn.Module, metrics: Any) -> Any:
        """The callback or LightningModule; only a module takes the model, its metrics and how it is trained."""
        takes = inspect.signature(self.technique).parameters
        offered = {"model": model, "metrics": metrics, "training": self.training}
        given = {name: value for name, value in offered.items() if name in takes}
        return parse(self.technique, self.arguments, f"technique.{self.key}", **given)


@dataclass(frozen=True)
class Hardware:
    """Where and how fast to work, and how that is timed."""

    device: torch.device
    precision: str
    latency: Latency


@dataclass(frozen=True)
class Plan:
    """An experiment whose parts are valid and fit together."""

    method: str
    backbone: Backbone
    task: Task
    training: Training
    steps: tuple[Step, ...]
    seed: int
    hardware: Hardware

    def address(self, weights: str | None, data: str) -> dict[str, Any]:
        """What decides the baseline besides its training, given the fingerprints of weights and data."""
        task = plain(self.task)
        for key in ("path", "hub", "files"):
            del task[key]  # where the data lies decides nothing: its content is in the fingerprint
        return {
            "model": {**plain(self.backbone), "path": weights},
            "task": task,
            "data": data,
            "seed": self.seed,
            "device": self.hardware.device.type,
            "precision": self.hardware.precision,
        }


def check(cfg: DictConfig) -> Plan:
    """The plan of ``cfg``.

    Raises:
        UserError: a key, type or value is wrong, an extra is missing, stages do not follow on one another, or task,
            model and stages do not fit together.
    """
    task = parse(Task, plain(cfg.task), "task")
    backbone = parse(Backbone, plain(cfg.model), "model")
    steps = tuple(step(stage) for stage in chain.stages(cfg.technique))
    follow(cfg.technique.name, steps)
    planned = Plan(
        method=cfg.technique.name,
        backbone=backbone,
        task=task,
        training=parse(Training, plain(cfg.baseline), "baseline"),
        steps=steps,
        seed=cfg.seed,
        hardware=hardware(cfg.hardware),
    )
    skeleton = backbone.skeleton(replace(task, labels=("0", "1")) if task.labels is None else task)
    for one in steps:
        stage = one.build(skeleton, None)
        if hasattr(stage, "check"):
            stage.check(skeleton)
    return planned


def step(stage: chain.Stage) -> Step:
    """A stage of the config with its class found and what it imports at hand."""
    arguments = plain(stage.node)
    target = arguments.pop("_target_")
    module, _, name = target.rpartition(".")
    try:
        technique = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"Stage `{stage.key}` names the class {target}, which cannot be imported ({error}): correct `_target_` in "
            f"conf/technique/stage/{stage.name}.yaml."
        ) from error
    missing = [package for package in trait(technique, "packages") if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"Stage `{stage.name}` needs {', '.join(missing)}, which is not installed: pip install -e '.[{stage.name}]'"
        )
    training = parse(Training, arguments.pop("train", {}), f"technique.{stage.key}.train")
    return Step(stage.key, stage.name, technique, arguments, training)


def follow(method: str, steps: tuple[Step, ...]) -> None:
    """Raise UserError where a stage cannot work on the weights that the one before it leaves."""
    weights, before = "float", None
    for one in steps:
        needs = trait(one.technique, "needs")
        if needs != weights:
            order = sorted(steps, key=lambda s: trait(s.technique, "leaves") != "float")
            works = "+".join(s.name for s in order if trait(s.technique, "leaves") == "float" or s is order[-1])
            raise UserError(
                f"technique={method}: `{one.key}` works on {needs} weights and `{before}` before it leaves {weights} "
                f"ones, which nothing can change any more: try technique={works}."
            )
        weights, before = trait(one.technique, "leaves"), one.key


def hardware(cfg: DictConfig) -> Hardware:
    """The machine as ``cfg`` wants it used; sets the number of CPU threads."""
    if cfg.accelerator not in ("auto", "cpu", "gpu"):
        raise UserError(f"hardware.accelerator is {cfg.accelerator}: set it to auto, cpu or gpu.")
    if cfg.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("hardware.accelerator is gpu and PyTorch sees no CUDA GPU here: set hardware=cpu or auto.")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device = torch.device("cuda" if cfg.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    return Hardware(device, cfg.precision, parse(Latency, plain(cfg.latency), "hardware.latency"))


def parse(schema: type[T], values: dict[str, Any], key: str, **given: Any) -> T:
    """``schema(**values, **given)``; what its constructor does not take is told by its config key."""
    try:
        return schema(**values, **given)
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(str(part) for part in (key, *wrong["loc"]))
        if wrong["type"] in ("unexpected_keyword_argument", "unexpected_keyword_arguments"):
            raise UserError(
                f"{where} is no setting of `{key}`: it has {', '.join(inspect.signature(schema).parameters)}."
            ) from None
        reason = wrong["msg"][:1].lower() + wrong["msg"][1:]
        raise UserError(f"{where} is {wrong.get('input')!r}: {reason}.") from None
    except TypeError as error:
        raise UserError(f"{key}: {error}: it has {', '.join(inspect.signature(schema).parameters)}.") from None


def plain(node: Any) -> dict[str, Any]:
    """A config node or dataclass as plain containers, interpolations resolved."""
    if isinstance(node, DictConfig):
        return OmegaConf.to_container(node, resolve=True)  # type: ignore[return-value]
    return asdict(node)
