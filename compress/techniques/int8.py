"""Quantization of weights and activations to 8-bit integers, except outliers, with bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytorch_lightning as pl
from pydantic import Field, validate_call
from torch import Tensor, nn

from compress.formats.bnb import replace_layers, save_model, select_convertible
from compress.models.layers import unwrap_model
from compress.models.linears import use_linear_layers
from compress.models.matrices import Matrix
from compress.technique import Technique


class Int8(Technique, pl.Callback):
    """Round weights to 8-bit integers with a scale a row. At inference activations are rounded to integers with a scale
    a token, and multiplied as integers (LLM.int8). No calibration is needed.

    Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", 2022, arXiv:2208.07339.
    Input channels in which an activation of the batch reaches ``threshold`` are multiplied as floats, so the answer to
    a text can depend slightly on the other texts of its batch. A pruned weight stays exactly zero.

    Runs when the fit ends, on the CPU, and leaves bitsandbytes' own layers in the model. The artifact is in
    bitsandbytes' format, which transformers loads on CPUs and GPUs.

    Args:
        threshold: the absolute value at which an activation becomes an outlier; 0 for no outliers.
        skip: layers in full precision: ``embeddings`` (always), ``head`` (all else outside the transformer blocks) and
            patterns of layer names.

    Raises:
        UserError: a pattern matches no layer.

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[Int8()]).fit(module, loader)
    """

    leaves = "bitsandbytes"
    packages = ("bitsandbytes", "accelerate")
    shrinks = True
    limits = "activations are rounded at every call: less to store, on a CPU often slower than floats"

    @validate_call
    def __init__(
        self, threshold: Annotated[float, Field(ge=0)] = 6.0, skip: tuple[str, ...] = ("embeddings", "head")
    ) -> None:
        self.threshold = threshold
        self.skip = skip
        self.keeps_head = "head" in skip
        self.average_bits: dict[str, float] = {}
        self.state: dict[str, Tensor] = {}

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        select_convertible(skeleton, self.skip, self.key)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = unwrap_model(pl_module).cpu()
        use_linear_layers(model, ["experts"])
        layers = select_convertible(model, self.skip, self.key)
        self.average_bits = {name: 8 + 32 / matrix.inputs for name, matrix in layers.items()}
        self.state = replace_layers(model, layers, lambda matrix: make_8bit_layer(matrix, self.threshold))

    def save(self, model: nn.Module, folder: Path) -> None:
        save_model(model, self.state, self.average_bits, folder, load_in_8bit=True, llm_int8_threshold=self.threshold)


def make_8bit_layer(matrix: Matrix, threshold: float) -> nn.Linear:
    """Return bitsandbytes' layer with the weights of ``matrix`` in 8 bits, without its bias."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    layer = Linear8bitLt(matrix.inputs, matrix.rows, has_fp16_weights=False, threshold=threshold, device="meta")
    weight: Any = Int8Params(matrix.weight.contiguous(), requires_grad=False)
    layer.weight = weight.to("cpu")  # quantizes
    return layer
