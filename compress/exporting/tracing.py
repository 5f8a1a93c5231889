"""Turn a model into a function of tensors that the exporters of ONNX and OpenVINO can trace."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.integrations.moe import ExpertsInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from compress.errors import UserError
from compress.models.batches import Batch
from compress.models.layers import detect_task_kind
from compress.models.linears import build_linear, compute_experts
from compress.models.matrices import is_expert_list
from compress.tasks.kinds import KINDS

GROUPED = "grouped"  # our name for :func:`grouped_attention` in transformers
SPLIT = "split"  # our name for :func:`split_experts` in transformers
NEAR = 1e-4  # largest difference of two computations of the same logits, as a fraction of the largest


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
    values, to its logits and the keys and values of all tokens.

    Positions are counted from a text's first real token, as `generate` of transformers counts them.
    """

    def __init__(self, model: Any, names: Iterable[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)
        self.counts = "attention_mask" in names and "position_ids" in inspect.signature(model.forward).parameters

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        past, cache = inputs[len(self.names) :], DynamicCache()
        for keys, values in zip(past[::2], past[1::2]):
            layer = DynamicLayer()  # filled by hand, because a new layer starts with a tensor without dimensions
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            layer.dtype, layer.device = keys.dtype, keys.device
            cache.layers.append(layer)
        named = dict(zip(self.names, inputs))
        if self.counts:
            positions = (named["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            named["position_ids"] = positions[:, past[0].shape[2] :]
        answer = self.model(**named, past_key_values=cache, use_cache=True)
        return answer.logits, *flatten_cache(answer.past_key_values)


def flatten_cache(cache: Any) -> list[Tensor]:
    """Return the keys and the values of every block in turn, ``[batch, heads, tokens, width]``."""
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


def prepare_trace(model: Any, example: Batch) -> tuple[nn.Module, Batch, list[Tensor]]:
    """Return the module to trace, its inputs, and past keys and values.

    A decoder is traced on the second half of the ``example`` with the first half as its cache; the mask covers both.
    """
    example = vary_shape(example)
    if not decodes(model):
        return Logits(model, example), example, []
    half = example["input_ids"].shape[1] // 2
    first = {name: value[:, :half] for name, value in example.items()}
    past = flatten_cache(model(**first, past_key_values=DynamicCache(), use_cache=True).past_key_values)
    second = {name: value if name == "attention_mask" else value[:, half:] for name, value in example.items()}
    return Cached(model, example), second, past


def decodes(model: Any) -> bool:
    """Return whether the graph of the model takes and returns keys and values."""
    return KINDS[detect_task_kind(model)].generates and model.can_generate()


def check_traceable(key: str, skeleton: nn.Module) -> None:
    """Raise UserError if the export ``key`` cannot turn such a model into a graph.

    Keys and values are the only state that a graph keeps, and it has no loops.
    """
    reason = ""
    if getattr(skeleton, "_is_stateful", False) and decodes(skeleton):
        reason = "keeps a state of its own between tokens, and a graph keeps keys and values only"
    elif any(map(loops_over_experts, {type(module): module for module in skeleton.modules()}.values())):
        reason = "loops over the experts that a text needs, and a graph has no loops"
    if reason:
        raise UserError(
            f"`{type(skeleton).__name__}` {reason}. Remove `{key.rpartition('.')[2]}` from the chain, or set "
            "model.path to another model."
        )


def loops_over_experts(module: nn.Module) -> bool:
    """Return whether the module's code loops over experts, and transformers cannot replace this loop."""
    try:
        code = inspect.getsource(inspect.unwrap(type(module).forward))
    except (OSError, TypeError):  # a class without a file
        return False
    return "for expert" in code and ".nonzero()" in code and not is_expert_list(module)


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
    ``softcap`` bounds the scores by a tanh, as in Gemma 2.
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


def split_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute each expert on the tokens that chose it, by plain products of the layers that :func:`write_experts`
    made."""
    return compute_experts(self, zip(self.entering, self.leaving), hidden_states, top_k_index, top_k_weights)


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
ExpertsInterface.register(SPLIT, split_experts)


@contextmanager
def use_plain_operators(model: Any, example: Batch) -> Iterator[None]:
    """Write attention and experts as plain matrix products, and restore the model's own afterwards.

    Heads that share keys are computed in groups where the ``example`` proves that the model's answers are the same.
    """
    attention = model.config._attn_implementation
    with write_experts(model):
        model.set_attn_implementation("eager")
        try:
            if any(getattr(module, "num_key_value_groups", 1) > 1 for module in model.modules()):
                expected = model(**example).logits
                model.set_attn_implementation(GROUPED)
                if not torch.allclose(model(**example).logits, expected, atol=NEAR * expected.abs().max().item()):
                    model.set_attn_implementation("eager")
            yield
        finally:
            model.set_attn_implementation(attention)


@contextmanager
def write_experts(model: Any) -> Iterator[None]:
    """Give every list of experts a Linear layer for each expert's weights, which stay where they are."""
    lists = [module for module in model.modules() if is_expert_list(module)]
    before = model.config._experts_implementation
    for experts in lists:
        names = "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"
        experts.entering, experts.leaving = (split_layers(experts, name) for name in names)
    if lists:
        model.set_experts_implementation(SPLIT)
    try:
        yield
    finally:
        if lists:
            model.set_experts_implementation(before)
        for experts in lists:
            del experts.entering, experts.leaving


def split_layers(experts: Any, name: str) -> nn.ModuleList:
    """Return a layer for every expert, with its part of the parameter ``name`` and of the biases."""
    stacked, bias = getattr(experts, name), getattr(experts, f"{name}_bias", None)
    layers = nn.ModuleList()
    for expert, part in enumerate(stacked.detach()):
        weight = nn.Parameter(part.T if experts.is_transposed else part, requires_grad=False)
        added = None if bias is None else nn.Parameter(bias.detach()[expert], requires_grad=False)
        layers.append(build_linear(weight, added))
    return layers


def select_inputs(batch: Batch, model: Any) -> Batch:
    """Return the tensors of the batch that the ``model`` reads, on the CPU: a tokenizer may give more."""
    names = inspect.signature(model.forward).parameters
    read = names if "input_ids" in names else batch  # a wrapper around a model takes any names
    return {name: value.cpu() for name, value in batch.items() if name in read and name != "labels"}


def vary_shape(example: Batch) -> Batch:
    """Return two rows of the example with some padding, so that no trace assumes a batch of 1 or a full mask."""
    twice = {name: value[:1].repeat(2, 1) for name, value in example.items()}
    if "attention_mask" in twice:
        twice["attention_mask"][1, -1] = 0
    return twice


def vary_padding(example: Batch, left: bool) -> list[Batch]:
    """Return batches of the example's tokens in other orders, with padding on the right, and with ``left`` also on the
    left, that show whether two graphs compute the same."""
    rows, mask = example["input_ids"][:1], example.get("attention_mask")
    length = rows.shape[1]
    varied = {name: torch.cat([value[:1].roll(i, 1) for i in range(3)]) for name, value in example.items()}
    if mask is None:
        return [varied]
    batches = [varied]
    for first, last in ((0, length - length // 3), *(((length // 3, length),) if left else ())):
        real = torch.zeros_like(varied["attention_mask"])
        real[:2, first:last], real[2] = 1, 1
        batches.append({**varied, "attention_mask": real})
    return batches


def is_float32(model: Any) -> bool:
    """Return whether the model has plain float32 weights, which a lower precision makes smaller."""
    return model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")


def strip_config(model: Any) -> PretrainedConfig:
    """Return the model's config without the entries on its weights in PyTorch. The width of the hidden states, which is
    that of an embedding, stays."""
    config = copy.deepcopy(model.config)
    width = getattr(config, "compress", {}).get("width")
    for name in ("quantization_config", "compress"):
        if hasattr(config, name):
            delattr(config, name)
    if width is not None:
        config.compress = {"width": width}
    return config
