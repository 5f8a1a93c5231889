"""The schedules of calibration against plain runs of every text alone, for all architectures of transformers."""

import re
import warnings

import pytest
import torch
from architectures import ARCHITECTURES, WORDS, batch, build
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from compress.errors import UserError
from compress.maths.hessian import second_moment
from compress.models.calibration import observe, sequential
from compress.models.matrices import matrices, select_matrices
from compress.models.products import Products, separate_experts

BATCHES = [{key: value for key, value in batch(seed).items() if key != "labels"} for seed in range(3)]
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


@torch.no_grad()
def alone():
    """Yield every text of the batches by itself, without padding."""
    for rows in BATCHES:
        for ids, mask in zip(rows["input_ids"], rows["attention_mask"]):
            yield {"input_ids": ids[None, mask.bool()], "attention_mask": mask[None, mask.bool()]}


@torch.no_grad()
def plain_moments(model):
    """Return the second moment of every matrix's inputs, all its calls counted, from runs of the whole model."""
    totals = {}

    def see(matrix, x):
        x = x.reshape(-1, x.shape[-1]).float()
        totals[matrix.name] = totals.get(matrix.name, 0) + x.T @ x

    with separate_experts(model), Products(matrices(model).values(), see):
        for text in alone():
            model(**text)
    return totals


def check(model, schedule):
    truth, seen = plain_moments(model), []
    for shared in schedule(model, BATCHES, second_moment):
        for name in shared.matrices:
            seen.append(name)
            expected = truth.get(name, torch.zeros_like(shared.statistic))  # an expert that no text was routed to
            assert torch.allclose(shared.statistic, expected, rtol=1e-3, atol=1e-4 * expected.abs().max()), name
    assert sorted(seen) == sorted(matrices(model))


@pytest.mark.parametrize("schedule", [observe, sequential])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_matrix_is_calibrated_once_on_what_the_model_alone_would_give_it(name, schedule):
    check(build(name, lm=ARCHITECTURES[name].decoder), schedule)


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


@pytest.mark.slow
def test_every_architecture_of_transformers_is_calibrated_whole_or_refused():
    warnings.simplefilter("ignore")
    todo = dict.fromkeys(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, AutoModelForSequenceClassification)
    todo |= dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM)
    whole, refused, wrong = [], {}, {}
    for name, auto in todo.items():
        if (model := make(name, auto)) is None:
            continue
        try:
            select_matrices(model, ("embeddings", "head"), "technique.gptq")
            check(model, sequential)
            whole.append(name)
        except UserError as error:
            refused[name] = str(error)
        except AssertionError as error:
            wrong[name] = str(error)
    print(f"{len(whole)} whole, {len(refused)} refused of {len(todo)}: {', '.join(refused)}")
    assert not wrong
    assert len(whole) > 80 and len(refused) < 0.2 * len(whole)
