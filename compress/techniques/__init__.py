"""The stages of a chain, one module each, of the same name as its YAML in ``conf/technique/stage``.

A stage is a Lightning ``Callback`` (pruning, quantization, export) or a ``LightningModule`` (fine-tuning,
distillation). Its constructor is the schema of its YAML. It tells the chain about itself in class attributes, each with
the default of :class:`Technique`; a stage sets the ones in which it differs. Nothing is registered anywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn

Weights = Literal["float", "packed"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Training:
    """How a stage's Trainer trains. No epochs: the stage works in one shot."""

    epochs: Annotated[int, Field(ge=0)] = 0
    batch_size: Annotated[int, Field(ge=1)] = 32
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.06
    weight_decay: Annotated[float, Field(ge=0)] = 0.01


class Technique(Protocol):
    """What the chain asks of a stage, and what it assumes where the stage says nothing."""

    needs: Weights = "float"
    """The weights that it works on."""
    leaves: Weights = "float"
    """The weights that it leaves to the next stage."""
    runtime: str = "torch"
    """The module in ``compress.runtimes`` that runs the artifact."""
    packages: tuple[str, ...] = ()
    """What it imports beyond the base install; its extra has the stage's name."""
    shrinks: bool = False
    """Whether fewer bytes on disk are promised: then more are an error."""
    limits: str = ""
    """What it cannot do for size or speed, for the report."""

    def check(self, skeleton: nn.Module) -> None:
        """Raise UserError where the stage does not fit the model, told from its shapes alone."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the weights in the stage's own format; without this method they are saved as floats."""


def trait(stage: object, name: str):
    """The stage's own value of a :class:`Technique` attribute, or the default."""
    return getattr(stage, name, getattr(Technique, name))
