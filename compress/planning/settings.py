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
from compress.runtimes.timing import Latency

T = TypeVar("T")


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Hardware:
    """The devices to work on, the precision of training, and the settings of timing."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: Annotated[int, Field(ge=1)] = 1
    nodes: Annotated[int, Field(ge=1)] = 1
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true"] = "auto"
    """Precision of training; ``auto`` becomes ``bf16-mixed`` on a GPU and ``32-true`` on a CPU."""
    batch_size: Literal["auto"] | None = None
    """``auto``: training uses batches that fit into memory and accumulates gradients to the batch size that is set."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of everything that the process does; None: PyTorch's choice. A baseline or stage in the cache serves
    any number of them: like the processor, it changes a training only by the order of sums. Both are recorded."""
    offload: bool = False
    """Whether a stage that does not train keeps the model in the CPU's memory and moves one block at a time to the GPU,
    for models that do not fit there. They are measured on the CPU then."""
    runtime: str | None = None
    """Module of ``compress.runtimes`` that runs artifacts; None: the runtime that each was exported for."""
    latency: Latency = field(default_factory=Latency)

    def __post_init__(self) -> None:
        if self.runtime:
            check_runtime(self.runtime, "hardware.runtime")
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise UserError("hardware.accelerator is gpu and PyTorch sees no CUDA GPU here. Set hardware=cpu or auto.")
        if self.offload and self.device.type == "cpu":
            raise UserError(
                "hardware.offload is true, which moves blocks to a CUDA GPU, and everything is on the CPU here. Set "
                "hardware.offload=false."
            )
        if self.precision == "auto":
            object.__setattr__(self, "precision", "bf16-mixed" if self.device.type == "cuda" else "32-true")
        if self.precision == "16-mixed" and self.device.type == "cpu":
            raise UserError(
                "hardware.precision is 16-mixed, for which a CPU has no arithmetic. Set hardware.precision=bf16-mixed "
                "or 32-true."
            )
        if self.batch_size and self.processes > 1:
            raise UserError(
                f"hardware.batch_size is auto, which tries batches in one process, and hardware asks for "
                f"{self.processes}. Set hardware.devices=1 and hardware.nodes=1, or the batch_size of each training."
            )
        if self.device.type == "cuda" and self.devices > torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise UserError(f"hardware.devices is {self.devices} and PyTorch sees {count} GPUs. Set {count} or fewer.")

    @property
    def processes(self) -> int:
        """Return the number of processes that train together, each with one device."""
        return self.devices * self.nodes

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.accelerator != "cpu" and torch.cuda.is_available() else "cpu")

    @property
    def serving_device(self) -> torch.device:
        """Return the device on which artifacts are measured."""
        return torch.device("cpu") if self.offload else self.device


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Kept:
    """The cache of finished stages and tokens in the folder ``dir``.

    It is shared by all jobs (``use``), rewritten by this job (``refresh``), or private to this job and removed at its
    end (``off``). If it exceeds ``max_gb``, the least recently used entries are removed at the end of a job.
    """

    dir: Annotated[str, Field(min_length=1)]
    mode: Literal["use", "refresh", "off"] = "use"
    max_gb: Annotated[float, Field(ge=0)] | None = None


@validated(frozen=True, config=ConfigDict(extra="forbid"))
class Settings:
    """The settings that training and evaluation share."""

    hardware: Hardware
    cache: Kept
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    split: Literal["test", "validation"] = "test"
    """Split on which the finished artifact is measured."""


def read_settings(cfg: DictConfig) -> Settings:
    """Return the settings of ``cfg`` that all parts of a run share, and set the number of CPU threads."""
    settings = parse_values(
        Settings, {key: to_plain(cfg[key]) for key in ("hardware", "cache", "seed", "split") if key in cfg}, ""
    )
    if settings.hardware.threads:
        torch.set_num_threads(settings.hardware.threads)
    return settings


def parse_values(schema: Callable[..., T], values: Any, key: str, **given: Any) -> T:
    """Return ``schema(**values, **given)``.

    Raises:
        UserError: the constructor does not accept a value; the error names its config key.
    """
    if not isinstance(values, dict):
        raise UserError(f"{key} is {values!r}; a group of settings is expected. Leave it out for the defaults.")
    try:
        return schema(**values, **given)
    except ValidationError as error:
        wrong = max(error.errors(), key=lambda part: len(part["loc"]))  # of a union, the type that was meant
        kinds = ("str", "int", "float", "bool")  # pydantic adds these to the path of a value with several types
        path = [part for part in map(str, (key, *wrong["loc"])) if part and part not in kinds and "[" not in part]
        where = ".".join(path)
        if wrong["type"] in ("unexpected_keyword_argument", "unexpected_keyword_arguments"):
            names = f"; expected one of {', '.join(inspect.signature(schema).parameters)}" if len(path) == 2 else ""
            raise UserError(f"{where} is no setting of `{'.'.join(path[:-1])}`{names}.") from None
        if wrong["type"] == "missing":
            raise UserError(f"{where} is not set; a value is expected. Set {where}=VALUE.") from None
        reason, value = wrong["msg"][:1].lower() + wrong["msg"][1:], wrong.get("input")
        if wrong["type"] == "dataclass_type":
            reason = "a group of settings is expected, {key: value}"
        sweep = f" For a sweep type -m {where}={','.join(map(str, value))}" if isinstance(value, list) and value else ""
        raise UserError(f"{where} is {value!r}; {reason}.{sweep}") from None
    except TypeError as error:
        raise UserError(f"{key}: {error}; expected {', '.join(inspect.signature(schema).parameters)}.") from None


def find_strings(value: Any) -> Iterator[str]:
    """Yield all strings in nested containers."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from find_strings(item)


def to_plain(node: Any) -> Any:
    """Return a config node or dataclass as plain containers with interpolations resolved; return other values as
    they are."""
    if isinstance(node, (DictConfig, ListConfig)):
        return OmegaConf.to_container(node, resolve=True)
    return asdict(node) if is_dataclass(node) and not isinstance(node, type) else node
