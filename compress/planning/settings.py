"""Read and validate the settings that all parts of a run share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import asdict, field, is_dataclass
from typing import Annotated, Any, Literal, TypeVar

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as validated

from compress.errors import UserError
from compress.runtimes.runtime import check_runtime


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Latency:
    """How the cost of running an artifact is measured.

    Real texts of the test split, from short to long, run in batches of each of ``batch_sizes``: ``texts`` of them in
    all, or one whole batch where that is more. The first size is that of the latency, the last that of the throughput.
    Artifacts take turns in blocks of at least ``block_s`` seconds and one round of the batches, until each has had
    ``seconds`` and four blocks while the machine was quiet, or three times as long. That is the budget of every size,
    and for a causal language model again of the generation of ``new_tokens``. ``memory``: the peak of each artifact in
    a process of its own.
    """

    seconds: Annotated[float, Field(gt=0)] = 2.0
    block_s: Annotated[float, Field(gt=0)] = 0.1
    warmup: Annotated[int, Field(ge=1)] = 3
    texts: Annotated[int, Field(ge=1)] = 8
    batch_sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 32)
    new_tokens: Annotated[int, Field(ge=1)] = 16
    memory: bool = True


T = TypeVar("T")


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Hardware:
    """Where to work, in which precision to train, and how to time."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: Annotated[int, Field(ge=1)] = 1
    nodes: Annotated[int, Field(ge=1)] = 1
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true"] = "auto"
    """Of training; ``auto`` becomes ``bf16-mixed`` on a GPU and ``32-true`` on a CPU."""
    batch_size: Literal["auto"] | None = None
    """``auto``: trainings take batches that fit into memory and accumulate gradients to the batch they ask for."""
    threads: Annotated[int, Field(ge=1)] | None = None
    runtime: str | None = None
    """The module of ``compress.runtimes`` that is to run artifacts; None: that which each was exported for."""
    latency: Latency = field(default_factory=Latency)

    def __post_init__(self) -> None:
        if self.runtime:
            check_runtime(self.runtime, "hardware.runtime")
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise UserError("hardware.accelerator is gpu and PyTorch sees no CUDA GPU here: set hardware=cpu or auto.")
        if self.precision == "auto":
            object.__setattr__(self, "precision", "bf16-mixed" if self.device.type == "cuda" else "32-true")
        if self.precision == "16-mixed" and self.device.type == "cpu":
            raise UserError(
                "hardware.precision is 16-mixed, for which a CPU has no arithmetic: set hardware.precision=bf16-mixed "
                "or 32-true."
            )
        if self.batch_size and self.processes > 1:
            raise UserError(
                f"hardware.batch_size=auto tries batches in one process and hardware asks for {self.processes}: set "
                "hardware.devices=1 and hardware.nodes=1, or the batch_size of each training."
            )
        if self.device.type == "cuda" and self.devices > torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise UserError(
                f"hardware.devices is {self.devices} and PyTorch sees {found} GPUs: ask for {found} or fewer."
            )

    @property
    def processes(self) -> int:
        """How many train together, a device each."""
        return self.devices * self.nodes

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.accelerator != "cpu" and torch.cuda.is_available() else "cpu")


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Kept:
    """Where finished stages and tokens are kept: for everybody (``use``), made anew (``refresh``), or for this job
    alone and until it ends (``off``). Beyond ``max_gb`` the least recently used go at the end of a job."""

    dir: str
    mode: Literal["use", "refresh", "off"] = "use"
    max_gb: Annotated[float, Field(ge=0)] | None = None


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Settings:
    """What training and evaluation have in common."""

    hardware: Hardware
    cache: Kept
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    split: Literal["test", "validation"] = "test"
    """What the finished artifact is measured on."""


def read_settings(cfg: DictConfig) -> Settings:
    """The settings of ``cfg`` that are no part of an experiment; sets the number of CPU threads."""
    found = parse_values(
        Settings, {key: to_plain(cfg[key]) for key in ("hardware", "cache", "seed", "split") if key in cfg}, ""
    )
    if found.hardware.threads:
        torch.set_num_threads(found.hardware.threads)
    return found


def parse_values(schema: Callable[..., T], values: Any, key: str, **given: Any) -> T:
    """``schema(**values, **given)``; what its constructor does not take is told by its config key."""
    if not isinstance(values, dict):
        raise UserError(f"{key} is {values!r} and should hold settings: leave it out to have the defaults.")
    try:
        return schema(**values, **given)
    except ValidationError as error:
        wrong = max(error.errors(), key=lambda one: len(one["loc"]))  # of a union the kind that was meant
        kinds = ("str", "int", "float", "bool")  # which pydantic names where a value may be of several
        path = [part for part in map(str, (key, *wrong["loc"])) if part and part not in kinds and "[" not in part]
        where = ".".join(path)
        if wrong["type"] in ("unexpected_keyword_argument", "unexpected_keyword_arguments"):
            names = f": it has {', '.join(inspect.signature(schema).parameters)}" if len(path) == 2 else ""
            raise UserError(f"{where} is no setting of `{'.'.join(path[:-1])}`{names}.") from None
        reason = wrong["msg"][:1].lower() + wrong["msg"][1:]
        raise UserError(f"{where} is {wrong.get('input')!r}: {reason}.") from None
    except TypeError as error:
        raise UserError(f"{key}: {error}: it has {', '.join(inspect.signature(schema).parameters)}.") from None


def find_strings(value: Any) -> Iterator[str]:
    """All strings in containers of containers."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from find_strings(one)


def to_plain(node: Any) -> Any:
    """A config node or dataclass as plain containers, interpolations resolved; anything else as it is."""
    if isinstance(node, (DictConfig, ListConfig)):
        return OmegaConf.to_container(node, resolve=True)
    return asdict(node) if is_dataclass(node) and not isinstance(node, type) else node
