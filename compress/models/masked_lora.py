"""The layer of peft for a pruned matrix: it trains the weights that are saved, with zeros where weights are pruned."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import Linear
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from compress.maths.low_rank import scale_rows

ADAPTER = "default"
"""peft's name of a model's only adapter."""


class MaskedLinear(Linear):
    """LoRA or DoRA of a pruned matrix.

    MaskLoRA of Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023, arXiv:2312.15230:
    every forward pass multiplies the update ``B A`` by the mask, so that the weights that are trained are those that
    are merged.
    """

    kept: Tensor
    """Where weights are not pruned, in the shape of the stored weight."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        return super().get_delta_weight(adapter) * self.kept  # type: ignore[no-any-return]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer(x)
        # The update is as large as the matrix: it is not kept in memory, but computed again for the backward pass.
        return checkpoint(self._add_update, x, base, use_reentrant=False).to(base.dtype)  # type: ignore[no-any-return]

    def _add_update(self, x: Tensor, base: Tensor) -> Tensor:
        """Return the output of the layer, given that of the layer without its adapter."""
        update = self._view(self.get_delta_weight(ADAPTER))
        added = functional.linear(self.lora_dropout[ADAPTER](x.to(update.dtype)), update)
        if ADAPTER not in self.lora_magnitude_vector:
            return base + added
        layer: Any = self.base_layer
        lengths: Any = self.lora_magnitude_vector[ADAPTER].weight
        factors = scale_rows(self._view(layer.weight) + update, lengths)
        bias = 0 if layer.bias is None else layer.bias
        return factors * (base - bias + added) + bias

    def _view(self, stored: Tensor) -> Tensor:
        """Return a matrix in the module's own shape as ``[rows, inputs]``."""
        return stored.T if self.fan_in_fan_out else stored


def mask_layer(layer: Any, kept: Tensor) -> None:
    """Let a layer of peft, in place, hold the zeros that ``kept`` marks, in the shape of the stored weight."""
    layer.__class__ = MaskedLinear
    layer.register_buffer("kept", kept, persistent=False)
