"""Tiny random models of many architectures: the key of ``ARCHITECTURES`` is the ``model_type``, or that and a variant.

Weights, biases and norms are random, so that nothing is symmetric by chance. Every model has three blocks, 60 tokens
(those of tests/tiny.py) and 64 positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from compress.models.loading import choose_attention

BLOCKS = 3
WORDS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {"hidden_size": 64, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "intermediate_size": 128}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
OPEN = {**GROUPED, "head_dim": 32}  # heads are wider than hidden_size / num_attention_heads
MIXED = ["sliding_attention", "sliding_attention", "full_attention"]
DEBERTA = {
    **SHAPE,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
T5 = {"d_model": 64, "num_layers": BLOCKS, "num_heads": 4, "d_ff": 128, "d_kv": 16, "decoder_start_token_id": 0}


class Architecture(NamedTuple):
    """A model_type with the settings of a tiny model."""

    model_type: str
    config: dict[str, Any]
    decoder: bool
    """Whether it reads left to right and can be a language model; T5 and BART count as encoders here."""


def encoder(model_type: str, positions: int = 64, **config: Any) -> Architecture:
    return Architecture(model_type, {**WORDS, "max_position_embeddings": positions, **config}, decoder=False)


def decoder(model_type: str, **config: Any) -> Architecture:
    return Architecture(model_type, {**WORDS, **config}, decoder=True)


ARCHITECTURES: dict[str, Architecture] = {
    "bert": encoder("bert", **SHAPE),
    "roberta": encoder("roberta", **SHAPE, positions=66),  # positions count from the padding's id
    "xlm-roberta": encoder("xlm-roberta", **SHAPE, positions=66),
    "distilbert": encoder("distilbert", dim=64, n_layers=BLOCKS, n_heads=4, hidden_dim=128),
    "electra": encoder("electra", **SHAPE, embedding_size=32),
    "albert": encoder("albert", **SHAPE, embedding_size=32),
    "mpnet": encoder("mpnet", **SHAPE, positions=66),
    "modernbert": encoder(
        "modernbert", **SHAPE, cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=3, local_attention=8
    ),
    "deberta": encoder(
        "deberta", **SHAPE, relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=16
    ),
    "deberta-v2": encoder("deberta-v2", **DEBERTA),  # as DeBERTa-v3 sets it
    "deberta-v2-conv": encoder("deberta-v2", **DEBERTA, conv_kernel_size=3, conv_act="gelu"),
    "xlnet": Architecture(
        "xlnet", {**WORDS, "d_model": 64, "n_layer": BLOCKS, "n_head": 4, "d_inner": 128}, decoder=False
    ),
    "bart": encoder(
        "bart",
        d_model=64,
        **{f"{stack}_layers": BLOCKS for stack in ("encoder", "decoder")},
        **{f"{stack}_attention_heads": 4 for stack in ("encoder", "decoder")},
        **{f"{stack}_ffn_dim": 128 for stack in ("encoder", "decoder")},
        decoder_start_token_id=2,
    ),
    "t5": Architecture("t5", {**WORDS, **T5}, decoder=False),
    "t5-short": Architecture("t5", {**WORDS, **T5, "num_layers": 2}, decoder=False),  # as many blocks as sub-layers
    "llama": decoder("llama", **GROUPED),
    "mistral": decoder("mistral", **OPEN, sliding_window=8),
    "qwen2": decoder("qwen2", **GROUPED),
    "qwen3": decoder("qwen3", **OPEN),
    "gemma2": decoder("gemma2", **OPEN, sliding_window=8),
    "gemma3_text": decoder("gemma3_text", **OPEN, sliding_window=8, layer_types=MIXED),
    "phi3": decoder("phi3", **GROUPED),
    "granite": decoder("granite", **GROUPED),
    "olmo2": decoder("olmo2", **GROUPED),
    "cohere": decoder("cohere", **GROUPED),
    "starcoder2": decoder("starcoder2", **GROUPED),
    "gpt2": decoder("gpt2", n_embd=64, n_layer=BLOCKS, n_head=4, n_inner=128, n_positions=64),
    "opt": decoder(
        "opt", hidden_size=64, num_hidden_layers=BLOCKS, num_attention_heads=4, ffn_dim=128, word_embed_proj_dim=64,
        max_position_embeddings=64,
    ),
    "gpt_neox": decoder("gpt_neox", **SHAPE, max_position_embeddings=64),
    "bloom": decoder("bloom", hidden_size=64, n_layer=BLOCKS, n_head=4),
    "falcon": decoder("falcon", hidden_size=64, num_hidden_layers=BLOCKS, num_attention_heads=4),
    "gptj": decoder("gptj", n_embd=64, n_layer=BLOCKS, n_head=4, rotary_dim=8, n_positions=64),
    "mixtral": decoder("mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": decoder(
        "qwen3_moe", **OPEN, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1
    ),
}  # fmt: skip
ENCODERS = [name for name, architecture in ARCHITECTURES.items() if not architecture.decoder]
DECODERS = [name for name, architecture in ARCHITECTURES.items() if architecture.decoder]
CLASSIFIERS = [name for name in ARCHITECTURES if name not in ("granite", "cohere")]  # transformers has no such head


def make_config(name: str, lm: bool = False, **changes: Any) -> PretrainedConfig:
    """Return the config of an architecture, with three labels unless it is a language model."""
    model_type, settings, _ = ARCHITECTURES[name]
    return AutoConfig.for_model(model_type, **{**settings, **({} if lm else {"num_labels": 3}), **changes})


def build(name: str, lm: bool = False, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random model in eval mode: a classifier, or with ``lm`` the language model of a decoder.

    ``changes`` are settings of the config. On ``torch.device("meta")`` it is a skeleton.
    """
    torch.manual_seed(seed)
    auto = AutoModelForCausalLM if lm else AutoModelForSequenceClassification
    model = auto.from_config(make_config(name, lm, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters() if model.device.type != "meta" else ():
            if parameter.ndim > 1:
                parameter.mul_(3)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return choose_attention(model)


def batch(seed: int = 0, rows: int = 4, length: int = 16, padded: bool = True, lm: bool = False) -> dict[str, Tensor]:
    """Return random tokens, an attention mask and labels; every text ends in the end-of-text token, as BART needs.

    The first row has no padding, so that the length is the same with and without ``padded``.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, WORDS["vocab_size"], (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        stop = length - 3 * (row % 4) if padded else length
        mask[row, stop:] = 0
        ids[row, stop - 1] = WORDS["eos_token_id"]
    ids = ids.masked_fill(mask == 0, WORDS["pad_token_id"])
    labels = ids.masked_fill(mask == 0, -100) if lm else ids[:, 0] % 3
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def inputs(seed: int = 9, **settings: Any) -> dict[str, Tensor]:
    """Return a batch without its labels."""
    return {key: value for key, value in batch(seed, **settings).items() if key != "labels"}


def loader(batches: int = 3, lm: bool = False) -> DataLoader:
    return DataLoader([batch(seed, lm=lm) for seed in range(batches)], batch_size=None)  # type: ignore[arg-type]
