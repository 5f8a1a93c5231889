"""Depth pruning: remove whole transformer blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
import torch
from pydantic import Field, validate_call
from torch import Tensor, nn

from compress.errors import UserError
from compress.models.batches import Batch, draw_calibration_batches
from compress.models.depth import check_depth, drop_blocks, explain_fixed, is_removable, select_removable
from compress.models.families import name_family
from compress.models.layers import evaluation_mode, find_blocks, unwrap_model
from compress.technique import Technique


class DropLayers(Technique, pl.Callback):
    """Remove whole transformer blocks: those that change their input least, or those at given positions.

    Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024, arXiv:2403.03853
    (``influence``); Sajjad et al., "On the Effect of Dropping Layers of Pre-trained Transformer Models", 2020,
    arXiv:2004.03844 (by position).

    Blocks are removed once, when the fit starts; the epochs of that fit retrain the others. The others keep their
    order, and ``from_pretrained`` loads them as a shallower model of the same architecture. A block whose removal
    would break this is never chosen, such as ModernBERT's first, the only one without a norm.

    Args:
        drop: number of blocks to remove, or the list of their indices (from 0; -1 is the last).
        by: choice of the blocks if ``drop`` is a number: ``influence`` those that turn the hidden state least on
            training text, ``spread`` at even distances (for half of them every second block), ``last`` those next to
            the head.
        samples: training examples (for a language model, blocks of tokens) to measure the influence on.
        batch_size: examples in a batch.

    Raises:
        UserError: no block would be left, the list names a block twice, an index out of range or a block that must
            stay, or the model is not one stack of blocks with weights of their own.

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[DropLayers(drop=1)]).fit(module, loader)
    """

    resumes = True
    keeps_zeros = False  # the zeros of the other blocks stay, under new names
    shrinks = True

    @validate_call
    def __init__(
        self,
        drop: int | list[int] = 1,
        by: Literal["influence", "spread", "last"] = "influence",
        samples: Annotated[int, Field(ge=1)] = 128,
        batch_size: Annotated[int, Field(ge=1)] = 8,
    ) -> None:
        if not drop or (isinstance(drop, int) and drop < 0):
            raise UserError(
                f"{self.key}.drop is {drop}; a number of blocks above 0 or a list of them is expected. Set "
                f"{self.key}.drop=1, or [1,3], or [-1] for the last."
            )
        self.drop = drop
        self.by = by
        self.samples = samples
        self.train_samples = samples if isinstance(drop, int) and by == "influence" else 0
        self.batch_size = batch_size

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        check_depth(
            skeleton,
            "`drop_layers`",
            "Choose another model, or a narrower student: technique=distill technique.distill.student.hidden_size=...",
        )
        self.choose_blocks(skeleton)

    def preview(self, skeleton: nn.Module) -> nn.Module:
        drop_blocks(skeleton, self.choose_blocks(skeleton))
        return skeleton

    def choose_blocks(self, model: nn.Module, influence: Tensor | None = None) -> list[int]:
        """Return the indices of the blocks to remove. Where ``influence`` (``[blocks]``) decides and is not yet
        measured, they only have the right number.

        Raises:
            UserError: there are no such blocks, or the model could not be loaded without them.
        """
        total = len(find_blocks(model)[1])
        if not isinstance(self.drop, int):
            indices = resolve_indices(total, self.drop, self.key)
            if not is_removable(model, indices):
                raise UserError(
                    f"{self.key}.drop is {self.drop}; {explain_fixed(model, indices)}. Name others, or set "
                    f"{self.key}.drop={len(indices)}, which chooses among those that can go."
                )
            return indices
        first = pick_positions(total, self.drop, "spread" if self.by == "spread" else "last", self.key)
        if influence is not None:
            first = influence.argsort(stable=True).tolist()
        order = [*first, *(index for index in reversed(range(total)) if index not in first)]
        chosen = select_removable(model, order, self.drop)
        if len(chosen) < self.drop:
            raise UserError(
                f"{self.key}.drop is {self.drop} and {len(chosen)} of {total} blocks can go; "
                f"{explain_fixed(model, order)}. "
                + (f"Set {self.key}.drop to {len(chosen)} or less." if chosen else "Choose another model.")
            )
        return chosen

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = unwrap_model(pl_module)
        self.check(model, [])
        influence = None
        if isinstance(self.drop, int) and self.by == "influence":
            influence = measure_influences(model, draw_calibration_batches(trainer, self.samples, self.batch_size))
        drop_blocks(model, self.choose_blocks(model, influence))
        trainer.strategy.setup_optimizers(trainer)  # the old ones held the weights of all blocks


def pick_positions(total: int, count: int, by: Literal["spread", "last"], key: str) -> list[int]:
    """Return the indices of ``count`` of ``total`` blocks: the last blocks, or the last of every ``total / count``.

    Raises:
        UserError: no block would be left.
    """
    if count >= total:
        raise UserError(
            f"{key}.drop is {count} and the model has {total} blocks; at least one block must stay. Set "
            f"{key}.drop to {total - 1} or less."
        )
    if by == "last":
        return list(range(total - count, total))
    return [(i + 1) * total // count - 1 for i in range(count)]


def resolve_indices(total: int, indices: list[int], key: str) -> list[int]:
    """Return ``indices`` counted from the start.

    Raises:
        UserError: an index is out of range or repeated, or no block would be left.
    """
    if outside := [index for index in indices if not -total <= index < total]:
        raise UserError(
            f"{key}.drop names block {outside[0]} and the model has {total} blocks. Choose from 0 to "
            f"{total - 1}, or -{total} to -1 from the end."
        )
    resolved = [index % total for index in indices]
    if twice := [index for index in resolved if resolved.count(index) > 1]:
        raise UserError(f"{key}.drop is {indices} and names block {twice[0]} twice. Name it once.")
    if len(resolved) == total:
        raise UserError(f"{key}.drop names all {total} blocks of the model. Leave at least one of them out.")
    return resolved


@torch.no_grad()
def measure_influences(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Return the Block Influence of every block over all tokens of ``batches`` except padding, ``[blocks]``.

    Raises:
        UserError: hidden states are not ``[batch, tokens, width]``, as XLNet's.
    """
    _, stack = find_blocks(model)
    totals = torch.zeros(len(stack), dtype=torch.float64)
    mask: Tensor | None = None

    def add(index: int, args: tuple, kwargs: dict, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        if mask is not None and before.shape[:2] != mask.shape:
            raise UserError(
                f"The blocks of `{name_family(model)}` take hidden states of {list(before.shape[:2])} for texts of "
                f"{list(mask.shape)}, and influence is measured where texts come first. Set by=spread or by=last."
            )
        totals[index] += block_influence(before, after, mask).double().sum().cpu()

    hooks = [
        block.register_forward_hook(lambda _, *call, index=index: add(index, *call), with_kwargs=True)
        for index, block in enumerate(stack)
    ]
    tokens = 0
    try:
        with evaluation_mode(model):
            for batch in batches:
                mask = batch.get("attention_mask")
                tokens += batch["input_ids"].numel() if mask is None else int(mask.sum())
                model(**batch, **({"use_cache": False} if getattr(model.config, "use_cache", False) else {}))
    finally:
        for hook in hooks:
            hook.remove()
    return totals / tokens


def block_influence(before: Tensor, after: Tensor, mask: Tensor | None) -> Tensor:
    """Return 1 minus the cosine between the hidden states (``[batch, tokens, width]``) before and after a block, for
    every token that ``mask`` (``[batch, tokens]``) keeps, ``[kept]``. Its mean over a text is the Block Influence."""
    turned = 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)
    return turned.flatten() if mask is None else turned[mask.bool()]
