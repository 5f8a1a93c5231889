"""Turn a model into a function of tensors that the exporters of ONNX and OpenVINO can trace."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from compress.models.batches import Batch
from compress.models.layers import detect_task_kind
from compress.tasks.kinds import KINDS

GROUPED = "grouped"  # our name for :func:`grouped_attention` in transformers


class Logits(nn.Module):
    """The model as a function from the tensors ``names``, in this order, to its logits."""

    def __init__(self, model: Any, names: Iterable[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)
        self.options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs)), **self.options).logits


class Cached(nn.Module):
    """A causal language model as a function from the tensors ``names``, in this order, and each block's past keys and
    values, to its logits and the keys and values of all tokens."""

    def __init__(self, model: Any, names: Iterable[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        past, cache = inputs[len(self.names) :], DynamicCache()
        for keys, values in zip(past[::2], past[1::2]):
            layer = DynamicLayer()  # filled by hand, because a new layer starts with a tensor without dimensions
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            layer.dtype, layer.device = keys.dtype, keys.device
            cache.layers.append(layer)
        answer = self.model(**dict(zip(self.names, inputs)), past_key_values=cache, use_cache=True)
        return answer.logits, *flatten_cache(answer.past_key_values)


def flatten_cache(cache: Any) -> list[Tensor]:
    """Return the keys and the values of every block in turn, ``[batch, heads, tokens, width]``."""
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


def prepare_trace(model: Any, example: Batch) -> tuple[nn.Module, Batch, list[Tensor]]:
    """Return the module to trace, its inputs, and past keys and values.

    A decoder is traced on the second half of the ``example`` with the first half as its cache; the mask covers both.
    """
    example = vary_shape(example)
    if not (KINDS[detect_task_kind(model)].generates and model.can_generate()):
        return Logits(model, example), example, []
    half = example["input_ids"].shape[1] // 2
    first = {name: value[:, :half] for name, value in example.items()}
    past = flatten_cache(model(**first, past_key_values=DynamicCache(), use_cache=True).past_key_values)
    second = {name: value if name == "attention_mask" else value[:, half:] for name, value in example.items()}
    return Cached(model, example), second, past


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **__: Any,
) -> tuple[Tensor, None]:
    """Compute transformers' eager attention without copying keys and values for every head of a group.

    ``query`` is ``[batch, heads, new tokens, width]``; ``key`` and ``value`` are ``[batch, groups, tokens, width]``.
    """
    texts, _, new, _ = query.shape
    groups, width = int(key.shape[1]), int(key.shape[3])  # the same for all texts, so constants of the graph
    heads = query.reshape(texts, groups, -1, new, width)
    scores = heads @ key.unsqueeze(2).transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if attention_mask is not None:
        scores = scores + attention_mask.unsqueeze(2)
    output = scores.softmax(-1) @ value.unsqueeze(2)
    return output.reshape(texts, -1, new, width).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


@contextmanager
def use_plain_attention(model: Any) -> Iterator[None]:
    """Write attention as plain matrix products, and restore the model's own attention afterwards."""
    before = model.config._attn_implementation
    grouped = any(getattr(module, "num_key_value_groups", 1) > 1 for module in model.modules())
    model.set_attn_implementation(GROUPED if grouped else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def select_inputs(batch: Batch) -> Batch:
    """Return the tensors of the batch that a model reads, on the CPU."""
    return {key: value.cpu() for key, value in batch.items() if key != "labels"}


def vary_shape(example: Batch) -> Batch:
    """Return two rows of the example with some padding, so that no trace assumes a batch of 1 or a full mask."""
    twice = {name: value[:1].repeat(2, 1) for name, value in example.items()}
    if "attention_mask" in twice:
        twice["attention_mask"][1, -1] = 0
    return twice


def is_float32(model: Any) -> bool:
    """Return whether the model has plain float32 weights, which a lower precision makes smaller."""
    return model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")


def strip_config(model: Any) -> PretrainedConfig:
    """Return the model's config without the entries on its weights in PyTorch."""
    config = copy.deepcopy(model.config)
    for name in ("quantization_config", "compress"):
        if hasattr(config, name):
            delattr(config, name)
    return config
