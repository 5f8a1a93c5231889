"""Compare calibration with plain runs of every text alone, on a tiny model of every architecture of transformers' two
mappings, for classifiers and causal language models: `python benchmarks/calibrate_every_architecture.py`.

An architecture is left out if its config has sizes by unknown names, or if it answers otherwise where a text is padded.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from compress.errors import UserError
from compress.models.calibration import sequential
from compress.models.matrices import select_matrices

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "models")]
from architectures import WORDS  # noqa: E402
from test_oracle import BATCHES, alone, check  # noqa: E402

SIZES = {
    r"vocab_size$": 60,
    r"(max_position_embeddings|n_positions|n_ctx|max_seq_len)$": 64,
    r"(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_decoder_layers)$": 2,
    r"(num_key_value_heads|num_kv_heads)$": 2,
    r"(num_attention_heads|n_heads?|num_heads|attention_heads)$": 4,
    r"(hidden_size|d_model|n_embd|^dim|embedding_size|embed_dim|emb_dim|word_embed_proj_dim)$": 64,
    r"(head_dim|d_kv|head_size)$": 16,
    r"(qk_rope_head_dim|rotary_dim)$": 8,
    r"lora_rank$": 16,
    r"(intermediate_size|ffn_dim|d_ff|d_inner|n_inner|hidden_dim|ffn_hidden_size)$": 64,
    r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts|n_experts)$": 4,
    r"(num_experts_per_tok|moe_top_?k|moe_k|num_experts_per_token)$": 2,
    r"^(n_group|topk_group|first_k_dense_replace)$": 1,
}
"""Sizes of a tiny model, by the names that configs have for them."""


def shrink(model_type):
    """Return a config of a tiny model: the default one with every size that has a known name made small."""
    default = AutoConfig.for_model(model_type).to_dict()
    sizes = {key: value for key, value in WORDS.items() if key in default} | {"decoder_start_token_id": 2}
    for key, value in default.items():
        if type(value) is int or (value is None and key.endswith(("hidden_size", "n_inner"))):
            sizes[key] = next((small for pattern, small in SIZES.items() if re.search(pattern, key)), value)
    return AutoConfig.for_model(model_type, **{key: value for key, value in sizes.items() if key in default})


def make(model_type, auto):
    """Return a tiny random model, or None if its config has sizes by other names, or it does not read text alone."""
    try:
        config = shrink(model_type)
        config.num_labels = 3
        with torch.device("meta"):
            if sum(parameter.numel() for parameter in auto.from_config(config).parameters()) > 3e6:
                return None
        torch.manual_seed(0)
        model = auto.from_config(config).eval()
        model.config.pad_token_id = 0
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
            padded = model(**BATCHES[0]).logits
            texts = [model(**text).logits for text, _ in zip(alone(), padded)]
    except Exception:
        return None
    masks = BATCHES[0]["attention_mask"].bool()
    rows = [row[mask] if row.ndim == 2 else row for row, mask in zip(padded, masks)]
    # A few models answer otherwise where a text is padded. What they compute alone is then not what a batch shows.
    same = all(torch.allclose(row, text[0], atol=1e-3 * text.abs().max()) for row, text in zip(rows, texts))
    return model if same else None


def main() -> None:
    warnings.simplefilter("ignore")
    todo = [(name, AutoModelForSequenceClassification) for name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES]
    todo += [(name, AutoModelForCausalLM) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    counts: Counter[str] = Counter()
    for name, auto in todo:
        outcome, reason = "left out", ""
        if (model := make(name, auto)) is not None:
            try:
                select_matrices(model, ("embeddings", "head"), "technique.gptq")
                check(model, sequential)
                outcome = "whole"
            except UserError as error:
                outcome, reason = "refused", str(error)
            except AssertionError as error:
                outcome, reason = "WRONG", str(error)
        counts[outcome] += 1
        head = "classifier" if auto is AutoModelForSequenceClassification else "language model"
        print(f"{name}, {head}: {outcome} {reason}", flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()
