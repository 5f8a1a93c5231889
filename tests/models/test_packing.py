"""Texts that share a line of tokens do not see each other."""

import pytest
import torch
from architectures import DECODERS, build
from transformers import MambaConfig, MambaForCausalLM

from compress.models.packing import keeps_boundaries
from compress.tasks.kinds import KINDS

ROWS = [
    {"input_ids": list(range(first, first + length)), "attention_mask": [1] * length, "labels": labels}
    for first, length in ((7, 9), (20, 5), (30, 12), (50, 3))
    for labels in [[-100] * (length - 2) + [first + length - 2, first + length - 1]]
]


ALONE = {"opt", "bloom", "falcon"}
"""Decoders that count positions or mask in a way of their own, so that conversations are padded."""


class Padding:
    pad_token_id = 0


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_answers_packed_texts_as_if_each_was_alone(name):
    model = build(name, lm=True)
    if not keeps_boundaries(model):
        assert name in ALONE
        return
    assert name not in ALONE
    padded, packed = KINDS["chat"].collate(ROWS, Padding), KINDS["chat"].pack(ROWS, Padding, 16)
    assert packed["input_ids"].shape == (2, 15)
    losses = []
    for batch in (padded, packed):
        model.zero_grad()
        losses.append(model(**batch).loss)
        losses[-1].backward()
        losses.append(model.get_input_embeddings().weight.grad.clone())
    assert torch.allclose(losses[0], losses[2], rtol=1e-4)
    assert torch.allclose(losses[1], losses[3], atol=1e-4 * losses[1].abs().max().item())


def test_a_model_that_carries_a_state_from_token_to_token_is_found():
    config = MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=4)
    assert not keeps_boundaries(MambaForCausalLM(config).eval())


def test_a_proof_leaves_the_mode_and_the_cache_setting_of_the_model():
    model = build("llama", lm=True).train()
    assert keeps_boundaries(model) and model.training and model.config.use_cache
