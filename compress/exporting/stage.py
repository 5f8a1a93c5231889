"""The base class of the stages that export a model to another runtime."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import nn

from compress.errors import UserError
from compress.exporting.agreement import AGREEMENT, Agreement
from compress.exporting.qdq import check_stages
from compress.exporting.tracing import check_traceable
from compress.models.matrices import Matrix, select_matrices
from compress.runtimes.processor import Processor, require_exact_sums
from compress.technique import Technique


class Export(Technique, pl.Callback):
    """A stage that exports a graph for a runtime without PyTorch.

    Args:
        rounds: precisions that round weights; an earlier stage must not have rounded them.
    """

    needs: tuple[str, ...] = ("float", "packed", "integer")
    changes = False

    def __init__(
        self,
        precision: str | None,
        skip: tuple[str, ...],
        source: Path | None,
        rounds: tuple[str, ...],
        processor: Processor,
    ) -> None:
        self.precision = precision
        self.processor = processor
        self.rounds = rounds
        self.skip = skip
        self.source = source
        self.limits = ""
        self.shrinks = False
        self.exported: Any = None
        self.agreement: Agreement | None = None

    @property
    def lowers_precision(self) -> bool:
        """True if the stage makes floats less precise."""
        return self.precision not in (None, "fp32")

    @property
    def rounds_weights(self) -> bool:
        """True if the stage writes the weights of layers as integers."""
        return self.precision is not None and self.precision.startswith("int")

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        if self.processor == "vnni":
            require_exact_sums(f"{self.key}.processor=vnni", f"{self.key}.processor")
        check_readable(self.key, before)
        check_stages(self.key, self.precision, before)
        if self.precision in self.rounds:
            check_rounding(f"{self.key}.precision", self.precision, before)
        check_traceable(self.key, skeleton)
        if self.rounds_weights or {*self.skip} - {"embeddings", "head"}:
            self.chosen(skeleton)

    def chosen(self, model: nn.Module) -> dict[str, Matrix]:
        """Return the layers that ``skip`` does not exclude from rounding."""
        return select_matrices(model, self.skip, self.key)

    def report(self, folder: Path) -> None:
        if self.agreement is not None:
            (folder / AGREEMENT).write_text(json.dumps(asdict(self.agreement), indent=2), encoding="utf-8")


def check_rounding(setting: str, precision: str, before: list[Any]) -> None:
    """Raise UserError if a stage ``before`` has already rounded the weights that ``precision`` would round."""
    if any(stage.leaves in ("packed", "bitsandbytes") for stage in before):
        raise UserError(
            f"{setting} is {precision}, which would quantize weights that an earlier stage already quantized. Set "
            f"{setting}=null, or remove that stage."
        )


def check_readable(key: str, before: list[Any]) -> None:
    """Raise UserError if a stage ``before`` saves integers in a format that the export ``key`` does not read."""
    for stage in before:
        if getattr(stage, "format", "compressed-tensors") != "compressed-tensors":
            raise UserError(
                f"{stage.key}.format is {stage.format}, which `{key.rpartition('.')[2]}` does not read. Set "
                f"{stage.key}.format=compressed-tensors."
            )
