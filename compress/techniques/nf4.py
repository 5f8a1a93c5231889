"""Quantization to 4-bit floats in blocks, with bitsandbytes."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pydantic import validate_call
from torch import Tensor, nn

from compress.errors import UserError
from compress.formats.bnb import replace_layers, save_model, select_convertible
from compress.models.layers import unwrap_model
from compress.models.linears import use_linear_layers
from compress.models.matrices import Matrix
from compress.technique import Technique

ROWS = 32
"""Outputs that bitsandbytes' kernel for CPUs with bfloat16 instructions computes at a time."""


class NF4(Technique, pl.Callback):
    """Round the weights of the transformer blocks to one of sixteen values, with a scale for every block of weights. No
    calibration is needed.

    Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, arXiv:2305.14314. The values of ``nf4`` are
    the quantiles of a normal distribution, those of ``fp4`` are 4-bit floats; both are scaled by the largest weight of
    the block. Zero is among them, so a pruned weight stays exactly zero.

    Runs when the fit ends, on the CPU, and leaves bitsandbytes' own layers in the model. The artifact is in
    bitsandbytes' format, which transformers loads on CPUs and GPUs.

    Args:
        quant_type: the sixteen values, ``nf4`` or ``fp4``.
        double_quantization: store the scales as 8-bit floats, with a 32-bit scale for every 256 of them.
        blocksize: consecutive weights of a row that share a scale.
        compute_dtype: dtype of the products; ``auto`` for the dtype of the model's weights. A CPU with bfloat16
            instructions always computes in bfloat16.
        skip: layers in full precision: ``embeddings`` (always), ``head`` (all else outside the transformer blocks) and
            patterns of layer names.

    Raises:
        UserError: a layer's shape does not suit bitsandbytes' kernels, or a pattern matches no layer.

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[NF4(blocksize=32)]).fit(module, loader)
    """

    leaves = "bitsandbytes"  # its layers for CPUs pass no gradient on after they were in eval mode
    packages = ("bitsandbytes", "accelerate")
    shrinks = True
    limits = "weights become floats again at every call: any speed-up on a CPU comes from computing in bfloat16"

    @validate_call
    def __init__(
        self,
        quant_type: Literal["nf4", "fp4"] = "nf4",
        double_quantization: bool = True,
        blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64,
        compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        skip: tuple[str, ...] = ("embeddings", "head"),
    ) -> None:
        self.quant_type = quant_type
        self.double_quantization = double_quantization
        self.blocksize = blocksize
        self.compute_dtype = compute_dtype
        self.skip = skip
        self.keeps_head = "head" in skip
        self.average_bits: dict[str, float] = {}
        self.state: dict[str, Tensor] = {}

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        misfits = {
            re.sub(r"\.\d+\.", ".*.", name): matrix
            for name, matrix in select_convertible(skeleton, self.skip, self.key).items()
            if matrix.inputs % self.blocksize or matrix.rows % ROWS
        }
        if misfits:
            name, matrix = next(iter(misfits.items()))
            raise UserError(
                f"`{name}` has {matrix.rows} outputs and {matrix.inputs} inputs; bitsandbytes' 4-bit "
                f"kernels take multiples of {ROWS} and of {self.key}.blocksize={self.blocksize}. Set another "
                f"blocksize (32 or more), or {self.key}.skip=[{','.join([*self.skip, *misfits])}]."
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = unwrap_model(pl_module).cpu()
        use_linear_layers(model, ["experts"])
        layers = select_convertible(model, self.skip, self.key)
        self.check(model, [])
        own = next(iter(layers.values())).dtype
        self.computed_in = own if self.compute_dtype == "auto" else getattr(torch, self.compute_dtype)
        self.average_bits = {
            name: average_bits(matrix.size, self.blocksize, self.double_quantization) for name, matrix in layers.items()
        }
        settings = (self.quant_type, self.double_quantization, self.blocksize, self.computed_in)
        self.state = replace_layers(model, layers, lambda matrix: make_4bit_layer(matrix, *settings))

    def save(self, model: nn.Module, folder: Path) -> None:
        save_model(
            model,
            self.state,
            self.average_bits,
            folder,
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quantization,
            bnb_4bit_compute_dtype=self.computed_in,
        )


def make_4bit_layer(
    matrix: Matrix, quant_type: str, double_quantization: bool, blocksize: int, compute_dtype: torch.dtype
) -> nn.Linear:
    """Return bitsandbytes' layer with the weights of ``matrix`` in 4 bits, without its bias."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(matrix.inputs, matrix.rows, compute_dtype=compute_dtype, device="meta")
    weight: Any = Params4bit(
        matrix.weight.contiguous(),
        blocksize=blocksize,
        compress_statistics=double_quantization,
        quant_type=quant_type,
        module=layer,
    )
    layer.weight = weight.to("cpu")  # quantizes
    return layer


def average_bits(weights: int, blocksize: int, double_quantization: bool) -> float:
    """Return the stored bits per weight of a layer of ``weights`` weights, scales included."""
    blocks = math.ceil(weights / blocksize)
    scales = 8 * blocks + 32 * math.ceil(blocks / 256) if double_quantization else 32 * blocks
    return 4 + scales / weights
