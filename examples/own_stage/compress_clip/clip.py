"""Clip the outliers of each layer."""

from typing import Annotated

import pytorch_lightning as pl
import torch
from pydantic import Field, validate_call

from compress.models.layers import unwrap_model
from compress.models.matrices import matrices
from compress.technique import Technique


def clip_outliers(weight: torch.Tensor, deviations: float) -> None:
    """Limit a weight, in place, to a multiple of its standard deviation on either side of zero."""
    limit = deviations * weight.std().item()
    weight.clamp_(-limit, limit)


class Clip(Technique, pl.Callback):
    """Clip the weights of the transformer blocks to a multiple of their layer's standard deviation.

    Args:
        deviations: largest weight, in standard deviations of its layer.

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[Clip(deviations=2.0)]).fit(module, loader)
    """

    keeps_head = True  # a promise, checked after the stage

    @validate_call
    def __init__(self, deviations: Annotated[float, Field(gt=0)] = 3.0) -> None:
        self.deviations = deviations

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for matrix in matrices(unwrap_model(pl_module)).values():
            clip_outliers(matrix.weight, self.deviations)
