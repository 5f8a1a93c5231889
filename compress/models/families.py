"""Describe what compression must know of a family of models, as one record for each family.

Everything else is read from the model, has the same name in every config of transformers (width, depth, heads), or is
proven: where scales can be folded (:mod:`compress.models.folding`), and that a record is right
(:func:`compress.models.proofs.prove_units`). To add a family, add an entry to ``FAMILIES`` and to
tests/architectures.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from compress.errors import UserError


@dataclass(frozen=True)
class Conventions:
    """Facts about a family other than the names of its layers. The defaults hold for most families, and are assumed
    for a family without a record."""

    ffn_size: str = "intermediate_size"
    """Key of the FFN's width in the config."""
    fusion: str = "bert"
    """Model type by which ONNX Runtime's optimizer fuses the graph."""
    folds: bool = True
    """Whether there may be a place where scales can be folded; a proof decides where. False saves the search."""


@dataclass(frozen=True, kw_only=True)
class Family(Conventions):
    """Names inside a block, and all other facts about a family."""

    query: str
    """Layer of the queries; its parent is the attention module."""
    key: str
    """Layer of the keys."""
    value: str
    """Layer of the values."""
    layout: Literal["separate", "stacked", "by_group"] = "separate"
    """Rows of a layer that is query, key and value at once: all queries, then all keys, then all values; or by the
    group of query heads that share a key and value head."""
    attention_out: str
    """Layer that reads the outputs of all heads."""
    ffn_in: tuple[str, ...] = ()
    """Patterns of the names of layers whose outputs are the FFN's channels; a gated FFN has two, or one of twice the
    rows."""
    ffn_out: str | None = None
    """Layer that reads the FFN's channels; None where every block has experts, or where the FFN is in another record
    of the block."""
    experts: str | None = None
    """List of experts, each with FFN channels of its own."""
    router: str | None = None
    """Layer with a row for every expert, which chooses among them."""
    experts_count: str | None = None
    """Key of the number of experts in the config."""
    head_size: str
    """Attribute of the attention module that holds a head's dimensions."""
    head_size_in_config: bool = False
    """Whether the config has ``head_dim`` and can therefore describe fewer heads of the same size."""
    heads_count: str = "num_attention_heads"
    """Key of the number of heads in the config."""
    cuts_heads: bool = True
    """Whether heads can be removed: not where a norm spans all heads."""
    equal_heads: bool = False
    """Whether all blocks of a stack must have the same number of heads, because they share a bias with a place for
    each."""
    head_biases: str | None = None
    """Embedding with a column for every head, which all blocks of a stack read, so that they must keep the same heads;
    its name in the module that holds the stack."""
    decoder: tuple[Family, ...] = ()
    """Records of a decoder's block, beside that of the encoder's: one for self attention and FFN, one for the attention
    to the encoder."""
    shares_blocks: bool = False
    """Whether several passes use the same block."""
    reads_config: bool = False
    """Whether the attention reads its number of heads from the config at every call."""
    textpruner: bool = False
    """Whether TextPruner scores the family."""


def fuse(layer: str, layout: Literal["stacked", "by_group"]) -> dict[str, Any]:
    """Return the fields of a record for one ``layer`` that is query, key and value at once."""
    return {"query": layer, "key": layer, "value": layer, "layout": layout}


BERT = Family(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_out="attention.output.dense",
    ffn_in=("intermediate.dense",),
    ffn_out="output.dense",
    head_size="attention_head_size",
    textpruner=True,
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
    textpruner=True,
)
ALBERT = Family(
    query="albert_layers.0.attention.query",
    key="albert_layers.0.attention.key",
    value="albert_layers.0.attention.value",
    attention_out="albert_layers.0.attention.dense",
    shares_blocks=True,
    ffn_in=("albert_layers.0.ffn",),
    ffn_out="albert_layers.0.ffn_output",
    head_size="attention_head_size",
)
MPNET = Family(
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    attention_out="attention.attn.o",
    ffn_in=("intermediate.dense",),
    ffn_out="output.dense",
    head_size="attention_head_size",
    equal_heads=True,
    head_biases="relative_attention_bias",
)
MODERNBERT = Family(
    **fuse("attn.Wqkv", "stacked"),
    attention_out="attn.Wo",
    ffn_in=("mlp.Wi",),
    ffn_out="mlp.Wo",
    head_size="head_dim",
)
DEBERTA = replace(
    BERT,
    query="attention.self.query_proj",
    key="attention.self.key_proj",
    value="attention.self.value_proj",
    textpruner=False,
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
)
PHI3 = replace(
    LLAMA,
    **fuse("self_attn.qkv_proj", "stacked"),
    ffn_in=("mlp.gate_up_proj",),
    reads_config=True,
)
STARCODER2 = replace(LLAMA, ffn_in=("mlp.c_fc",), ffn_out="mlp.c_proj")
MIXTRAL = replace(
    LLAMA, ffn_in=(), ffn_out=None, experts="mlp.experts", router="mlp.gate", experts_count="num_local_experts"
)
QWEN3_MOE = replace(MIXTRAL, experts_count="num_experts", ffn_size="moe_intermediate_size")
GPT2 = Family(
    **fuse("attn.c_attn", "stacked"),
    attention_out="attn.c_proj",
    ffn_in=("mlp.c_fc",),
    ffn_out="mlp.c_proj",
    ffn_size="n_inner",
    head_size="head_dim",
)
GPTJ = replace(
    GPT2,
    query="attn.q_proj",
    key="attn.k_proj",
    value="attn.v_proj",
    layout="separate",
    attention_out="attn.out_proj",
    ffn_in=("mlp.fc_in",),
    ffn_out="mlp.fc_out",
)
OPT = replace(
    LLAMA,
    attention_out="self_attn.out_proj",
    ffn_in=("fc1",),
    ffn_out="fc2",
    ffn_size="ffn_dim",
    head_size_in_config=False,
)
NEOX = Family(
    **fuse("attention.query_key_value", "by_group"),
    attention_out="attention.dense",
    ffn_in=("mlp.dense_h_to_4h",),
    ffn_out="mlp.dense_4h_to_h",
    head_size="head_size",
)
FALCON = replace(
    NEOX,
    **fuse("self_attention.query_key_value", "by_group"),
    attention_out="self_attention.dense",
    ffn_size="ffn_hidden_size",
    head_size="head_dim",
)
BART_CROSS = Family(
    query="encoder_attn.q_proj",
    key="encoder_attn.k_proj",
    value="encoder_attn.v_proj",
    attention_out="encoder_attn.out_proj",
    head_size="head_dim",
    heads_count="decoder_attention_heads",
)
BART_DECODER = replace(OPT, ffn_size="decoder_ffn_dim", heads_count="decoder_attention_heads")
BART = replace(
    OPT, ffn_size="encoder_ffn_dim", heads_count="encoder_attention_heads", decoder=(BART_DECODER, BART_CROSS)
)
T5_CROSS = Family(
    query="layer.1.EncDecAttention.q",
    key="layer.1.EncDecAttention.k",
    value="layer.1.EncDecAttention.v",
    attention_out="layer.1.EncDecAttention.o",
    head_size="key_value_proj_dim",
    head_size_in_config=True,
    equal_heads=True,
)
T5_DECODER = replace(
    T5_CROSS,
    query="layer.0.SelfAttention.q",
    key="layer.0.SelfAttention.k",
    value="layer.0.SelfAttention.v",
    attention_out="layer.0.SelfAttention.o",
    ffn_in=("layer.2.DenseReluDense.wi*",),
    ffn_out="layer.2.DenseReluDense.wo",
    ffn_size="d_ff",
    head_biases="block.0.layer.0.SelfAttention.relative_attention_bias",
)
T5 = replace(
    T5_DECODER,
    ffn_in=("layer.1.DenseReluDense.wi*",),
    ffn_out="layer.1.DenseReluDense.wo",
    decoder=(T5_DECODER, T5_CROSS),
)
FAMILIES: dict[str, Family] = {
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "camembert": BERT,
    "electra": BERT,
    "distilbert": DISTILBERT,
    "albert": ALBERT,
    "mpnet": MPNET,
    "modernbert": MODERNBERT,
    "deberta-v2": DEBERTA,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "granite": LLAMA,
    "olmo2": replace(LLAMA, cuts_heads=False),  # norms over the dimensions of all heads
    "phi3": PHI3,
    "starcoder2": STARCODER2,
    "cohere": LLAMA,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
    "gpt2": GPT2,
    "gptj": GPTJ,
    "opt": OPT,
    "gpt_neox": NEOX,
    "falcon": FALCON,
    "bart": BART,
    "t5": T5,
}
"""Records by ``model_type``, the name of an architecture in transformers' configs."""
CONVENTIONS: dict[str, Conventions] = {
    "xlnet": Conventions(folds=False, ffn_size="d_inner"),
    "deberta": Conventions(folds=False),  # biases of the values are apart from their rows
}
"""Conventions of families whose blocks have no record."""


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
    name = name_family(model)
    return FAMILIES.get(name) or CONVENTIONS.get(name, Conventions())


def shares_one_key_head(config: Any) -> bool:
    """Return whether all query heads of a model share one key and value head, as its config says."""
    if getattr(config, "new_decoder_architecture", False):  # of Falcon, whose `multi_query` is then without meaning
        return False
    return getattr(config, "num_key_value_heads", None) == 1 or bool(getattr(config, "multi_query", False))
