"""Rotation of the hidden states, after which weights and activations have fewer outliers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytorch_lightning as pl
from pydantic import Field, validate_call
from torch import nn

from compress.errors import PostconditionError, UserError
from compress.maths.rotations import has_hadamard, make_rotation
from compress.models.families import name_family
from compress.models.layers import unwrap_model
from compress.models.matrices import find_pruned_layers
from compress.models.probes import CLOSE, can_trace, in_single_precision, measure_change, run_probe
from compress.models.rotation import (
    check_norms,
    find_stream,
    is_tied,
    read_width,
    rotate_heads,
    rotate_stream,
    untie,
)
from compress.technique import Technique
from compress.techniques.prune import Prune


class Rotate(Technique, pl.Callback):
    """Multiply the hidden states of a decoder by an orthogonal matrix, folded into the weights: the model computes the
    same function, and large values are spread over all channels, so that a quantizer after it loses less.

    Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024, arXiv:2404.00456; Liu et al.,
    "SpinQuant", 2024, arXiv:2405.16406. The residual stream is rotated (R1 there), and with ``heads`` the values of
    every attention head (R2); both cost nothing at inference. The gains of the norms move into the matrices after them
    first. An output layer that shares the weights of the embeddings gets its own, since the last gains move into it
    alone. That the logits stay the same is proven on random tokens in 32 bits; what 16-bit weights lose is their own
    rounding. Zeros of a pruned model are filled in.

    Runs when the fit ends and needs no text. The artifact is a plain model of the same architecture.

    Args:
        rotation: ``hadamard`` (entries of one magnitude, with random signs) or ``random``.
        heads: rotate the values of every head too.
        seed: seed of the rotation; results differ a little between seeds.

    Raises:
        UserError: hidden states cannot be rotated (norms that subtract the mean, or whose outputs are added to the
            hidden states), a stage before it prunes, or no Hadamard matrix has the model's width.
        PostconditionError: the logits changed.

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[Rotate()]).fit(module, loader)
    """

    keeps_zeros = False
    limits = "nothing is smaller or faster by itself; a quantizer after it loses less"

    @validate_call
    def __init__(
        self,
        rotation: Literal["hadamard", "random"] = "hadamard",
        heads: bool = True,
        seed: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        self.rotation = rotation
        self.heads = heads
        self.seed = seed

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        if pruning := next((stage for stage in before if isinstance(stage, Prune)), None):
            ours, theirs = (stage.key.removeprefix("technique.") for stage in (self, pruning))
            raise UserError(
                f"`{ours}` fills in the zeros of `{theirs}` before it: a rotated weight is a sum of many. Set "
                "technique=rotate+prune."
            )
        check_norms(skeleton)
        width = read_width(skeleton)
        if self.rotation == "hadamard" and not has_hadamard(width):
            raise UserError(
                f"{self.key}.rotation is hadamard, and no Hadamard matrix of the width of `{name_family(skeleton)}`, "
                f"{width}, is known. Set {self.key}.rotation=random."
            )
        if can_trace(skeleton):
            find_stream(skeleton)

    def preview(self, skeleton: nn.Module) -> nn.Module:
        if is_tied(skeleton):
            untie(skeleton)
        return skeleton

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model: Any = unwrap_model(pl_module).to(trainer.strategy.root_device)
        self.check(model, [])  # a script without the chain has not checked the model
        limits = []
        if pruned := find_pruned_layers(model):
            limits.append(f"the zeros of {len(pruned)} pruned layers were filled in")
        if is_tied(model):
            untie(model)
            limits.append("the output layer no longer shares the weights of the embeddings")
        with in_single_precision(model):
            expected, stream = run_probe(model), find_stream(model)
            rotate_stream(stream, make_rotation(stream.width, self.rotation, self.seed))
            change = measure_change(expected, run_probe(model))
            rotated = 0
            if self.heads and change <= CLOSE:
                rotated = rotate_heads(model, stream, self.rotation, self.seed + 1)
                change = measure_change(expected, run_probe(model))
        if not change <= CLOSE:  # written so that NaN fails
            raise PostconditionError(
                f"`rotate` should leave the logits of `{name_family(model)}` as they are and changed them by "
                f"{change:.1e} of the largest; at most {CLOSE:.0e} is rounding."
            )
        if self.heads and not rotated:
            raise UserError(
                f"{self.key}.heads is true, and no matrix of `{name_family(model)}` was found whose outputs are values "
                f"that attention only averages. Set {self.key}.heads=false, or {self.key}.rotation=random for heads of "
                "any size."
            )
        self.limits = "; ".join([*limits, Rotate.limits])
        model.cpu()
