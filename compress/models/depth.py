"""Remove whole transformer blocks, and prove that the shallower model is the one that its config describes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from compress.errors import UserError
from compress.models.families import name_family
from compress.models.layers import find_blocks
from compress.models.loading import build_skeleton
from compress.models.shapes import build_cut_class

INDEX = ("layer_idx", "layer_id")
"""Attributes by which a block knows its place: that of its keys and values in a cache."""
INVALID = (ValueError, TypeError, KeyError, IndexError, RuntimeError, AssertionError, StrictDataclassError)
"""Errors of configs and classes that cannot be built."""


def check_depth(model: nn.Module, what: str, instead: str) -> None:
    """Raise UserError if the model is not one stack of blocks, each with its own weights.

    ``what`` names the setting or stage that removes blocks, ``instead`` is the advice.
    """
    total = len(find_blocks(model)[1])
    for config in collect_configs(model):
        name, passes = config.model_type, config.num_hidden_layers
        if config.is_encoder_decoder:
            reason = f"`{name}` has two, an encoder and a decoder"
        elif passes > total:
            reason = f"the {passes} passes of `{name}` share {total}, so that fewer passes would save no weight"
        elif passes < total:
            reason = f"`{name}` has {total} and its config counts {passes}"
        else:
            continue
        raise UserError(f"{what} needs one stack of blocks with weights of their own, and {reason}. {instead}")


def drop_blocks(model: nn.Module, dropped: Iterable[int]) -> None:
    """Remove blocks from the model, and their entries from the lists in its configs."""
    _, stack = find_blocks(model)
    total, removed = len(stack), set(dropped)
    for index in sorted(removed, reverse=True):
        del stack[index]
    for index, block in enumerate(stack):
        for module in block.modules():
            for name in INDEX:
                if getattr(module, name, None) is not None:
                    vars(module)[name] = index

    def keep_rest(value: Any) -> Any:
        if isinstance(value, list) and len(value) == total:
            return [entry for index, entry in enumerate(value) if index not in removed]
        return value

    for config in collect_configs(model):
        lists = {key: keep_rest(getattr(config, key)) for key in find_block_lists(config)}
        config.num_hidden_layers = len(stack)
        for key, value in lists.items():
            setattr(config, key, value)
        if isinstance(own := getattr(config, "compress", None), dict):
            config.compress = {key: keep_rest(value) for key, value in own.items()}


def find_block_lists(config: PretrainedConfig) -> list[str]:
    """Return the keys of the lists that have an entry for every block: those that have one entry more by default
    where a model has one block more. (DeBERTa's list of kinds of attention may be as long as its stack.)"""
    content, count = config.to_dict(), config.num_hidden_layers
    keys = [key for key, value in vars(config).items() if isinstance(value, list) and len(value) == count]
    if not keys:
        return []
    depth = (config.attribute_map or {}).get("num_hidden_layers", "num_hidden_layers")
    rest = {key: value for key, value in content.items() if key not in keys}
    try:
        longer = type(config).from_dict({**rest, depth: count + 1})
    except INVALID:
        return keys  # the proof of the whole decides
    return [key for key in keys if len(getattr(longer, key, None) or ()) == count + 1]


def collect_configs(model: nn.Module) -> list[PretrainedConfig]:
    """Return the distinct configs of a model's modules; mostly they share one."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in configs if isinstance(config, PretrainedConfig)}.values())


def select_removable(model: nn.Module, order: Sequence[int], count: int) -> list[int]:
    """Return the first ``count`` blocks of ``order`` that can be removed together; fewer if there are no more.

    Where blocks differ, some cannot go: ModernBERT's first block has no norm, and the class gives none to whichever
    block is the first.
    """
    if is_removable(model, order[:count]):
        return list(order[:count])
    chosen: list[int] = []
    for index in order:
        if len(chosen) < count and is_removable(model, [*chosen, index]):
            chosen.append(index)
    return chosen


def is_removable(model: nn.Module, dropped: Iterable[int]) -> bool:
    """Return whether the class builds the model without these blocks from the config without their entries."""
    if not isinstance(model, PreTrainedModel):
        return True  # no config describes it
    try:
        cut = make_skeleton(model, model.config)
        drop_blocks(cut, dropped)
        stored = type(cut.config).from_dict(json.loads(cut.config.to_json_string(use_diff=False)))
        rebuilt = make_skeleton(model, stored)
    except INVALID:
        return False
    return describe(cut) == describe(rebuilt)


def make_skeleton(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """Return a model of the class of ``model`` for ``config``, on the meta device."""
    base: Any = build_cut_class(type(model)) if hasattr(config, "compress") else type(model)
    return build_skeleton(lambda: base._from_config(copy.deepcopy(config)))  # type: ignore[no-any-return]


def describe(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the shape of every stored tensor, and the class and the plain settings of every module in the blocks."""
    settings = {
        name: (type(module).__qualname__, {k: v for k, v in vars(module).items() if isinstance(v, str | int | float)})
        for name, module in find_blocks(model)[1].named_modules()
    }
    return {name: tensor.shape for name, tensor in model.state_dict().items()}, settings


def explain_fixed(model: nn.Module, dropped: Iterable[int]) -> str:
    """Return why the model cannot do without some of these blocks, as the first part of an error message."""
    fixed = [index for index in dropped if not is_removable(model, [index])]
    which = f"block {fixed[0]}" if fixed else "these blocks"
    return (
        f"without {which} the others are not the blocks that the config of `{name_family(model)}` describes, so the "
        "saved model would load as another one"
    )
