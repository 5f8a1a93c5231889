"""The contract of a stage: the attributes and methods that the chain reads, and their defaults.

A stage is a :class:`Technique` and a Lightning ``Callback`` (pruning, quantization, export) or ``LightningModule``
(fine-tuning, distillation): ``class GPTQ(Technique, pl.Callback)``. It is one module, of the same name as its YAML in
``conf/technique/stage``, and its constructor is the schema of that YAML. Nothing is registered anywhere.
:func:`compress.testing.check_technique` tests the contract.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Training:
    """The settings of a stage's Trainer. With 0 epochs the stage works in one shot."""

    epochs: Annotated[int, Field(ge=0)] = 0
    batch_size: Annotated[int, Field(ge=1)] = 32
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.06
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Batches whose gradients are summed for one optimizer step."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Adapter:
    """The settings of a training of few parameters in place of all.

    ``lora`` (Hu et al., 2021, arXiv:2106.09685) and ``dora`` (Liu et al., 2024, arXiv:2402.09353) add a product of two
    small matrices to every matrix, which peft trains and which is merged at the end. ``perp`` (Zimmer et al., 2023,
    arXiv:2312.15230) trains norms and biases. All train a classifier's head too.
    """

    kind: Literal["lora", "dora", "perp"]
    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    """The product is multiplied by ``alpha / rank``."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of an input of the product to be dropped."""
    targets: Literal["all", "attention"] | tuple[str, ...] = "all"
    """Matrices of the transformer blocks that get a product: ``all``, those of ``attention``, or patterns of names."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Baseline(Training):
    """The settings of the baseline's training."""

    adapter: Adapter | None = None
    """Trained in place of all parameters, and merged at the end; None: all parameters are trained."""


METHODS = ("check", "preview", "save", "report")


class Technique:
    """The base class of every stage. A stage sets the attributes that differ from the defaults, in its class or, where
    its settings decide, in its constructor."""

    key: str = "technique"
    """The setting that configures the stage, for its error messages: ``technique.prune_2`` for the second `prune` of a
    chain, set before the constructor runs; outside a chain ``technique.`` and the name of its module."""
    needs: tuple[str, ...] = ("float",)
    """Weight kinds that the stage accepts: ``float``; ``packed`` (dequantized to float to run); ``integer``
    (activations quantized too); ``bitsandbytes``. Nothing can be trained with the last two."""
    leaves: str | None = "float"
    """The weight kind that the stage leaves to the next one; None: the kind that it received."""
    runtime: str = "torch"
    """The module in ``compress.runtimes`` that runs the artifact."""
    packages: tuple[str, ...] = ()
    """Required packages beyond the base install; their extra has the stage's name."""
    versions: tuple[str, ...] = ()
    """Optional packages that the stage uses if installed; its result depends on their versions too."""
    files: tuple[str, ...] = ()
    """Settings that name a file or a folder that the stage reads, such as ``teacher`` or ``student.path``; its result
    depends on what is in them. Another value of such a setting, such as ``uniform``, is no file and just a value."""
    timed: tuple[str, ...] = ()
    """Settings that make the result depend on the speed of this machine if they are set; its address then names the
    processor and its threads."""
    instead: Mapping[str, str] = MappingProxyType({})
    """Settings of this stage that replace an earlier stage whose weights it does not accept, by that stage's name."""
    changes: bool = True
    """Promised and checked: some weight differs afterwards."""
    keeps_zeros: bool = True
    """Promised and checked: a pruned weight stays exactly zero. (After a stage that removes weights, training still
    holds the zeros of the others.)"""
    keeps_head: bool = False
    """Promised and checked: everything outside the transformer blocks stays unchanged, bit for bit."""
    shrinks: bool = False
    """Promised and checked: fewer bytes on disk."""
    tolerance: float = 1e-4
    """Promised and checked: the saved artifact's logits differ by at most this fraction of the largest logit. The
    default allows sums in another order and nothing else."""
    exported: Any = None
    """The model whose logits the saved artifact is compared with, if not the trained one: an export in lower
    precision."""
    train_samples: int = 0
    """Training examples that the stage calibrates on."""
    validation_samples: int = 0
    """Validation examples that the stage measures on."""
    limits: str = ""
    """What the stage does not do for size or speed, for the report."""
    resumes: bool = False
    """True if a resumed run ends like an uninterrupted one: ``on_fit_start`` must be deterministic, and later state
    must be in the weights or in ``state_dict``."""
    together: bool = False
    """True if the stage can train in several processes: its parameters are those of the model before ``on_fit_start``,
    and it changes them outside the optimizer alike in all processes."""
    reached: Collection[str] = ()
    """Names of the matrices that the stage compressed, where they are not those of ``average_bits``. If they are not
    all weights of the blocks, the report says what share they are."""
    average_bits: Mapping[str, float] = MappingProxyType({})
    """Promised and checked after the stage: the bits that a weight of each layer takes on disk, scales and zero points
    included."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.key = f"technique.{cls.__module__.rpartition('.')[2]}"
        refuse_unknown_attributes(cls)

    def check(self, skeleton: Any, before: list[Any]) -> None:
        """Raise UserError if the stage does not fit the shapes of the model or the stages before it."""

    def preview(self, skeleton: Any) -> Any:
        """Return the skeleton in the shapes that the stage will leave, as far as they are known. Later stages are
        checked against them."""
        return skeleton

    def save(self, model: Any, folder: Path) -> None:
        """Write the weights: as floats, or in the stage's own format."""
        model.save_pretrained(folder)

    def report(self, folder: Path) -> None:
        """Write the stage's findings for people, beside the weights."""


def refuse_unknown_attributes(technique: type) -> None:
    """Raise TypeError if a class sets an attribute that the contract lacks, or a method whose name is close to one of
    the contract's. A misspelt promise would not be checked, a misspelt method never called."""
    known = {name for base in technique.__mro__[1:] for name in (*vars(base), *inspect.get_annotations(base))}
    for name in {**vars(technique), **inspect.get_annotations(technique)}:
        if name.startswith("_") or name in known:
            continue
        value = vars(technique).get(name)
        method = callable(value) or hasattr(value, "__get__")
        near = get_close_matches(name, METHODS if method else inspect.get_annotations(Technique), 1, 0.8)
        if near or not method:
            meant = f"did you mean {near[0]}?" if near else "set it in the constructor, or outside the class."
            kind = "method" if method else "attribute"
            raise TypeError(f"{technique.__name__}.{name} is no {kind} of a technique; {meant}")
