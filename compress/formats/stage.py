"""The base class of the stages that round weights to integers of a few bits."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytorch_lightning as pl
from torch import nn

from compress.formats import gptq, packed
from compress.formats.packed import Quantized
from compress.maths.rounding import Scheme
from compress.models.matrices import Matrix, count_inputs
from compress.technique import Technique


class WeightOnly(Technique, pl.Callback):
    """A stage that stores weights as integers with scales for groups, and leaves the inputs of layers as they are.

    Args:
        scheme: how weights are rounded.
        samples: training examples to calibrate on.
        batch_size: examples in a batch.
        skip: layers in full precision.
        format: ``compressed-tensors`` or ``gptq``.
    """

    leaves = "packed"
    packages = ("compressed_tensors",)
    shrinks = True
    limits = "weights are decompressed to floats when transformers loads them: less to store, no speed there"

    def __init__(
        self,
        scheme: Scheme,
        samples: int,
        batch_size: int,
        skip: tuple[str, ...],
        format: str = "compressed-tensors",
    ) -> None:
        self.scheme = scheme
        self.samples = self.train_samples = samples
        self.batch_size = batch_size
        self.format = format
        self.skip = skip
        self.keeps_head = "head" in skip
        self.quantized: dict[str, Quantized] = {}
        self.average_bits: dict[str, float] = {}

    @property
    def storage(self) -> ModuleType:
        """The module that writes the format."""
        return gptq if self.format == "gptq" else packed

    def select(self, model: nn.Module) -> dict[str, Matrix]:
        """Return the matrices that the stage quantizes, by name."""
        return self.storage.select_storable(model, self.skip, self.key)  # type: ignore[no-any-return]

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        layers = self.select(skeleton)
        self.scheme.check(self.key, count_inputs(layers))
        if self.format == "gptq":
            gptq.check_format(self.key, skeleton, layers, self.scheme, self.skip)

    def keep(self, quantized: dict[str, Quantized]) -> None:
        """Keep the quantized layers, to be saved."""
        self.quantized = quantized
        self.average_bits = self.storage.average_bits(quantized)

    def save(self, model: nn.Module, folder: Path) -> None:
        self.storage.save_model(model, self.quantized, folder)
