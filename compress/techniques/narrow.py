"""Width pruning: remove dimensions of the hidden states."""

from __future__ import annotations

import copy
from typing import Annotated, Any

import pytorch_lightning as pl
from pydantic import Field, validate_call

from compress.errors import UserError
from compress.models.batches import draw_calibration_batches
from compress.models.families import name_family
from compress.models.layers import evaluation_mode, unwrap_model
from compress.models.narrowing import fit_readers, record_width, score_dimensions
from compress.models.probes import can_trace
from compress.models.width import cut_spaces, cut_width, find_spaces, prove_spaces, refuse
from compress.technique import Technique
from compress.techniques.prune import Prune

MULTIPLE = 8
"""Number that a width which is given as a share is rounded down to a multiple of."""


class Narrow(Technique, pl.Callback):
    """Remove the least important dimensions of the hidden states, so that embeddings, norms and every matrix that reads
    or writes these states get smaller. Heads keep their size, and FFNs their channels.

    Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation" (Minitron), 2024,
    arXiv:2407.14679. A dimension scores the mean magnitude over all tokens of what a norm leaves of it, as a share of
    that of all dimensions, summed over the norms. The dimensions with the highest scores stay, the same everywhere, in
    their order. Dimensions inside the head that are as many, such as those of BERT's pooler, are cut to as many, by the
    mean magnitude of what is read of them.

    Which Parameters have these dimensions is seen in a run, and proven: permuting the dimensions in all of them leaves
    the logits as they are. The cut happens once, when the fit starts; the epochs of that fit retrain the model.

    Args:
        hidden_size: dimensions afterwards; below 1 a share of those before, rounded down to a multiple of 8.
        compensate: fit the matrices that read the hidden states to what they computed before, by least squares. Both
            models that it was measured on lose far less with it.
        samples: training examples (for a language model, blocks of tokens) to score and fit on.
        batch_size: examples in a batch.

    Raises:
        UserError: the model is no wider, or its hidden states cannot be made narrower.

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[Narrow(hidden_size=24)]).fit(module, loader)
    """

    resumes = True
    keeps_zeros = False  # layers get another shape
    shrinks = True

    @validate_call
    def __init__(
        self,
        hidden_size: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] = 0.75,
        compensate: bool = False,
        samples: Annotated[int, Field(ge=1)] = 256,
        batch_size: Annotated[int, Field(ge=1)] = 16,
    ) -> None:
        self.hidden_size = hidden_size
        self.compensate = compensate
        self.samples = samples
        self.train_samples = samples
        self.batch_size = batch_size

    def check(self, skeleton: Any, before: list[Any]) -> None:
        if any(isinstance(stage, Prune) and stage.pattern for stage in before):
            raise UserError(
                f"`{self.key.rpartition('.')[2]}` removes columns, which breaks up the groups of the earlier `prune`'s "
                "N:M pattern. Put `prune` after it."
            )
        width = find_spaces(skeleton)[0].size
        if not 0 < self.choose_width(width) < width:
            raise UserError(
                f"{self.key}.hidden_size is {self.hidden_size} and the hidden states of `{name_family(skeleton)}` have "
                f"{width} dimensions. Set {self.key}.hidden_size to a number from 1 to {width - 1}."
            )
        if skeleton.device.type == "meta":
            narrower = copy.deepcopy(skeleton)
            cut_width(narrower, self.choose_width(width))
            if not can_trace(narrower):
                refuse(skeleton, "with fewer of them the shapes of its layers do not fit together")

    def choose_width(self, width: int) -> int:
        """Return the dimensions to keep of ``width``."""
        if self.hidden_size >= 1:
            return int(self.hidden_size)
        return int(self.hidden_size * width) // MULTIPLE * MULTIPLE

    def preview(self, skeleton: Any) -> Any:
        cut_width(skeleton, self.choose_width(find_spaces(skeleton)[0].size))
        record_width(skeleton)
        return skeleton

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model: Any = unwrap_model(pl_module)
        self.check(model, [])
        # 1) Find what has the dimensions, and prove it
        spaces = find_spaces(model)
        prove_spaces(model, spaces)
        # 2) Choose the dimensions and remove the others
        batches = list(draw_calibration_batches(trainer, self.samples, self.batch_size))
        with evaluation_mode(model):
            left = self.choose_width(spaces[0].size)
            scores = [score_dimensions(model, space, batches) for space in spaces]
            kept = [score.topk(left).indices.sort().values.to(model.device) for score in scores]
            if self.compensate:
                fit_readers(model, spaces[0], kept[0], batches)
            cut_spaces(model, spaces, kept)
        # 3) Say so in the config
        record_width(model)
