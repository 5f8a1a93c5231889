"""Describe what compression must know of a family of models, as one record for each family.

Everything else is read from the model, or has the same name in every config of transformers: width, depth, heads. To
add a family, add an entry to ``FAMILIES``; ``tests/models`` then cut its heads and channels, fold random scales into
its blocks and compare the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compress.errors import UserError


@dataclass(frozen=True)
class Fold:
    """Layers of a block that are the only readers of ``before``, so that scales can move from ``before`` to them."""

    before: str
    """Norm or layer whose outputs are divided by the scales."""
    layers: tuple[str, ...]
    """Layers whose inputs are multiplied by the scales."""
    within: str | None = None
    """Module that contains the layers; None for a single layer."""


@dataclass(frozen=True)
class Conventions:
    """Facts about a family other than the names of its layers. The defaults hold for most families, and are assumed
    for a family without a record."""

    ffn_size: str = "intermediate_size"
    """Key of the FFN's width in the config."""
    fusion: str = "bert"
    """Model type by which ONNX Runtime's optimizer fuses the graph."""


@dataclass(frozen=True, kw_only=True)
class Family(Conventions):
    """Names inside a block, and all other facts about a family."""

    query: str
    """Layer of the queries; its parent is the attention module."""
    key: str
    """Layer of the keys."""
    value: str
    """Layer of the values."""
    attention_out: str
    """Layer that reads the outputs of all heads."""
    ffn_in: tuple[str, ...]
    """Layers whose outputs are the FFN's channels; a gated FFN has two."""
    ffn_out: str
    """Layer that reads the FFN's channels."""
    head_size: str
    """Attribute of the attention module that holds a head's dimensions."""
    head_size_in_config: bool = False
    """Whether the config has ``head_dim`` and can therefore describe fewer heads of the same size."""
    folds: tuple[Fold, ...] = ()
    """Places where scales can be folded; none if the outputs of norms also feed the residual branch."""


BERT = Family(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_out="attention.output.dense",
    ffn_in=("intermediate.dense",),
    ffn_out="output.dense",
    head_size="attention_head_size",
)
DISTILBERT = Family(
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_out="attention.out_lin",
    ffn_in=("ffn.lin1",),
    ffn_out="ffn.lin2",
    ffn_size="hidden_dim",
    head_size="attention_head_size",
)
LLAMA = Family(
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_out="self_attn.o_proj",
    ffn_in=("mlp.gate_proj", "mlp.up_proj"),
    ffn_out="mlp.down_proj",
    head_size="head_dim",
    head_size_in_config=True,
    folds=(
        Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), within="self_attn"),
        Fold("self_attn.v_proj", ("self_attn.o_proj",)),
        Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), within="mlp"),
        Fold("mlp.up_proj", ("mlp.down_proj",)),
    ),
)
FAMILIES: dict[str, Family] = {
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "camembert": BERT,
    "electra": BERT,
    "distilbert": DISTILBERT,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
}
"""Records by ``model_type``, the name of an architecture in transformers' configs."""


def name_family(model: Any) -> str:
    """Return the ``model_type`` of a model or config, or the class of anything else."""
    return getattr(getattr(model, "config", model), "model_type", type(model).__name__)


def find_family(model: Any) -> Family:
    """Return the record of a model's or config's family.

    Raises:
        UserError: there is no record.
    """
    name = name_family(model)
    if name not in FAMILIES:
        raise UserError(
            f"The model is a `{name}`; the layers of {', '.join(FAMILIES)} are known. Choose one of these, or "
            "stages that need no names of layers (prune, gptq, drop_layers), or add a record of the family to "
            "compress/models/families.py."
        )
    return FAMILIES[name]


def find_conventions(model: Any) -> Conventions:
    """Return the conventions of a model's or config's family; the defaults if it has no record."""
    return FAMILIES.get(name_family(model), Conventions())
