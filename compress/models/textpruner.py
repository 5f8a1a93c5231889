"""Run TextPruner on current encoders to find masks of the heads and FFN channels to keep.

Yang, Cui and Chen, "TextPruner: A Model Pruning Toolkit for Pre-Trained Language Models", 2022, arXiv:2203.15996.
TextPruner scores and iterates with weights zeroed in place. ``compress.models.shapes`` cuts the model, because
TextPruner's own cut calls ``prune_heads``, which transformers 5 removed.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.models.families import find_family
from compress.models.layers import find_blocks
from compress.quiet import hide_progress_bars

Ranking = Callable[[list[Tensor], int, bool, int], list[Tensor]]


def require_textpruner() -> None:
    """Raise UserError if TextPruner is not installed."""
    if importlib.util.find_spec("textpruner") is None:
        raise UserError(
            "`structured` scores an encoder with TextPruner, which is not installed. Type pip install --no-deps "
            "textpruner (without --no-deps pip looks for a numpy before 1.22), or set "
            "technique.structured.importance=activation."
        )


def find_masks(
    model: Any, batches: list[dict[str, Tensor]], ranking: Ranking, **settings: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Return TextPruner's masks of the heads and FFN channels to keep (True), by layer; the model is not changed.

    ``settings`` are those of its ``TransformerPruningConfig``. ``ranking`` turns scores into masks and replaces
    TextPruner's own function, which adds a unit to the requested number for every layer that would lose all units.
    """
    logging.getLogger("textpruner").setLevel(logging.ERROR)  # silences notes on sentencepiece and on saving
    import textpruner
    from textpruner.model_map import MODEL_MAP
    from textpruner.pruners import transformer_pruner

    def generate_mask(scores: Tensor, total: int, even: bool, multiple_of: int = 1) -> Tensor:
        return torch.stack(ranking(list(scores), total, even, multiple_of)).to(scores)

    config, width = model.config, getattr(model.config, find_family(model).ffn_size)
    MODEL_MAP.setdefault(config.model_type, {"structure": describe_structure(model)})
    with (
        tempfile.TemporaryDirectory() as folder,  # TextPruner writes its scores to files
        patch.object(transformer_pruner, "generate_mask", generate_mask),
        patch.object(config, "intermediate_size", width, create=True),  # DistilBERT's has another name
        restore_parameters(model),
        hide_progress_bars(),
    ):
        pruner = transformer_pruner.TransformerPruner(
            model,
            textpruner.TransformerPruningConfig(pruning_method="iterative", **settings),
            textpruner.GeneralConfig(use_device=str(model.device), output_dir=folder),
        )
        pruner.prune(batches, keep_shape=True, save_model=False)
    return [row.bool().cpu() for row in pruner.head_mask], [row.bool().cpu() for row in pruner.ffn_mask]


def describe_structure(model: nn.Module) -> type:
    """Return a description of the model's family for TextPruner, which knows few families."""
    from textpruner.model_utils.model_structure import ModelStructure

    family = find_family(model)
    stack = find_blocks(model)[0].removeprefix(f"{model.base_model_prefix}.")

    class Structure(ModelStructure):
        ENCODER_PREFIX = stack.replace(".", r"\.") + r"\.[0-9]+\."
        LAYER_PATTERNS = {  # noqa: RUF012
            "query": family.query,
            "key": family.key,
            "value": family.value,
            "att_dense": family.attention_out,
            "interm_dense": family.ffn_in[0],
            "output_dense": family.ffn_out,
        }

    return Structure


@contextmanager
def restore_parameters(model: nn.Module) -> Iterator[None]:
    """Restore the model's original Parameter objects afterwards. TextPruner replaces Parameters that it zeroes, and an
    optimizer would keep the old ones."""
    before = [(module, dict(module._parameters)) for module in model.modules()]
    try:
        yield
    finally:
        for module, parameters in before:
            module._parameters.update(parameters)
