"""The contract of a stage: what the chain asks of it, and what it assumes where the stage says nothing.

A stage is a :class:`Technique` and a Lightning ``Callback`` (pruning, quantization, export) or ``LightningModule``
(fine-tuning, distillation): ``class GPTQ(Technique, pl.Callback)``. It is one module, of the same name as its YAML in
``conf/technique/stage``, and its constructor is the schema of that YAML. Nothing is registered anywhere.
:func:`compress.testing.check_technique` tests the contract.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


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


METHODS = ("check", "preview", "save", "report")


class Technique:
    """The base class of every stage. A stage sets the attributes that differ from the defaults: in its class, or in its
    constructor where the settings decide."""

    key: str = "technique"
    """The setting that configures it, which its errors name: ``technique.prune_2`` of the second `prune` of a chain,
    from before its constructor runs; outside a chain ``technique.`` and the name of its module."""
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

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.key = f"technique.{cls.__module__.rpartition('.')[2]}"
        refuse_unknown_attributes(cls)

    def check(self, skeleton: Any, before: list[Any]) -> None:
        """Raise UserError where the stage does not fit the model, as its shapes alone say, or the stages before."""

    def preview(self, skeleton: Any) -> Any:
        """Return the skeleton in the shapes that the stage will leave, as far as they are known beforehand: the stages
        after it are checked against them."""
        return skeleton

    def save(self, model: Any, folder: Path) -> None:
        """Write the weights: as floats, or in the format of a stage that has its own."""
        model.save_pretrained(folder)

    def report(self, folder: Path) -> None:
        """Write what the stage found beside the weights, for people."""


def refuse_unknown_attributes(technique: type) -> None:
    """Raise TypeError where a class sets an attribute that the contract lacks, or a method whose name is nearly one of
    its own: misspelt, a promise would not be checked and a method never be called."""
    known = {name for base in technique.__mro__[1:] for name in (*vars(base), *inspect.get_annotations(base))}
    for name in {**vars(technique), **inspect.get_annotations(technique)}:
        if name.startswith("_") or name in known:
            continue
        value = vars(technique).get(name)
        method = callable(value) or hasattr(value, "__get__")
        near = get_close_matches(name, METHODS if method else inspect.get_annotations(Technique), 1, 0.8)
        if near or not method:
            meant = f"did you mean {near[0]}?" if near else "set it in the constructor, or outside of the class."
            kind = "method" if method else "attribute"
            raise TypeError(f"{technique.__name__}.{name} is no {kind} of a technique; {meant}")
