"""The stages of a chain, one module each, of the same name as its YAML in ``conf/technique/stage``.

A stage is a Lightning ``Callback`` (pruning, quantization, export) or a ``LightningModule`` (fine-tuning,
distillation). Its constructor is the schema of its YAML. It tells the chain about itself in class attributes, each with
the default of :class:`Technique`; a stage sets the ones in which it differs. Nothing is registered anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Protocol

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Training:
    """How a stage's Trainer trains. No epochs: the stage works in one shot."""

    epochs: Annotated[int, Field(ge=0)] = 0
    batch_size: Annotated[int, Field(ge=1)] = 32
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.06
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Batches whose gradients make one step."""


class Technique(Protocol):
    """What the chain asks of a stage, and what it assumes where the stage says nothing."""

    needs: tuple[str, ...] = ("float",)
    """The kinds of weights that it works on: ``float``; ``packed`` integers that stand for floats; ``integer``, which
    meet quantized activations, and ``bitsandbytes``' own: nothing is trained beside these two."""
    leaves: str | None = "float"
    """The kind of weights that it leaves to the next stage; None: that which it got."""
    runtime: str = "torch"
    """The module in ``compress.runtimes`` that runs the artifact."""
    packages: tuple[str, ...] = ()
    """What it imports beyond the base install; its extra has the stage's name."""
    versions: tuple[str, ...] = ()
    """What it imports where that is installed: its result depends on their versions too."""
    instead: Mapping[str, str] = MappingProxyType({})
    """The setting of its own that does what a stage does whose weights it cannot work on."""
    changes: bool = True
    """Promised and checked: some weight differs afterwards."""
    keeps_zeros: bool = True
    """Promised and checked: a pruned weight stays exactly zero. (Training after a removal of weights keeps the others'
    zeros all the same.)"""
    keeps_head: bool = False
    """Promised and checked: everything outside the transformer blocks stays as it is, bit for bit."""
    shrinks: bool = False
    """Promised and checked: fewer bytes on disk."""
    tolerance: float = 1e-4
    """Promised and checked: the saved artifact's logits differ by no more than this share of the largest, which leaves
    room for sums in another order and for nothing else."""
    exported: Any = None
    """What the saved artifact's logits are compared with in place of the model's: an export in lower precision."""
    train_samples: int = 0
    """How many training examples it calibrates on."""
    validation_samples: int = 0
    """How many validation examples it measures on."""
    limits: str = ""
    """What it cannot do for size or speed, for the report."""
    resumes: bool = False
    """Whether its training, stopped and gone on with, ends as if it had not been: what ``on_fit_start`` does it does
    the same way again, and what changes afterwards is in the weights or in its ``state_dict``."""
    together: bool = False
    """Whether it can train in several processes: its parameters are those that the model had before ``on_fit_start``,
    and what it does to them beside the optimizer it does in all processes alike."""
    average_bits: Mapping[str, float] = MappingProxyType({})
    """Promised and checked, once the stage is done: the bits that a weight of each layer takes on disk, scales and zero
    points counted."""

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        """Raise UserError where the stage does not fit the model, told from its shapes alone, or the stages before."""

    def preview(self, skeleton: nn.Module) -> nn.Module:
        """The skeleton in the shapes that the stage will leave, as far as they are known beforehand: the stages after
        it are checked against them."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the weights in the stage's own format; without this method they are saved as floats."""

    def report(self, folder: Path) -> None:
        """Write what the stage found out beside the weights, for people."""


def trait(stage: object, name: str):
    """The stage's own value of a :class:`Technique` attribute, or the default."""
    return getattr(stage, name, getattr(Technique, name))
