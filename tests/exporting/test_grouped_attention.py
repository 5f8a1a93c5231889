"""Attention that is written for a graph computes what the model's own does."""

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compress.exporting.tracing import GROUPED

PROBE = {key: value for key, value in tiny.batch(seed=9).items() if key != "labels"}


@pytest.mark.parametrize("cap", [None, 0.5])
def test_capped_scores_are_capped_in_the_graph_too(cap):
    torch.manual_seed(0)
    shape = {**tiny.SHAPE, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.5, "pad_token_id": 0}
    config = AutoConfig.for_model("gemma2", attn_logit_softcapping=cap, **shape)
    model, logits = AutoModelForCausalLM.from_config(config).eval(), {}
    for attention in ("eager", GROUPED, "sdpa"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            logits[attention] = model(**PROBE).logits
    assert torch.allclose(logits[GROUPED], logits["eager"], atol=1e-4)
    assert torch.allclose(logits["sdpa"], logits["eager"], atol=1e-4) == (cap is None)  # which knows no cap
