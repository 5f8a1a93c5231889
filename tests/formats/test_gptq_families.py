"""GPTQ's own format is read back for architectures of other names and other ties."""

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from compress.artifacts.artifact import load_artifact
from compress.errors import UserError
from compress.techniques.finetune import FineTune
from compress.techniques.gptq import GPTQ

SHAPE = {**tiny.SHAPE, "pad_token_id": 0}
GROUPED = {**SHAPE, "num_key_value_heads": 4}
FAMILIES = {
    "llama": {**GROUPED, "tie_word_embeddings": False},
    "llama tied": {**GROUPED, "tie_word_embeddings": True},
    "opt": {**SHAPE, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 40},
    "qwen3": {**GROUPED, "head_dim": 8},
    "phi3": {**GROUPED, "max_position_embeddings": 40},
    "gemma3_text": {**GROUPED, "head_dim": 8},
    "gpt_neox": {**SHAPE, "max_position_embeddings": 40},
    "gpt_neox tied": {**SHAPE, "max_position_embeddings": 40, "tie_word_embeddings": True},
}  # fmt: skip
PROBE = {key: value for key, value in tiny.batch(seed=9).items() if key != "labels"}


def quantized(family, folder):
    """A quantized language model, saved in ``folder``."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.split()[0], **FAMILIES[family]))
    stage = GPTQ(group_size=32, format="gptq", samples=8)
    tiny.trainer(stage).fit(FineTune(model), tiny.loader(lm=True))
    with torch.no_grad():
        expected = model.eval()(**PROBE).logits
    stage.save(model, folder)
    tiny.tokenizer().save_pretrained(folder)
    return expected


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reloads_to_the_same_logits(family, tmp_path):
    expected = quantized(family, tmp_path)
    with torch.no_grad():
        assert torch.equal(load_artifact(tmp_path, "lm").model(**PROBE).logits, expected)


@pytest.mark.parametrize(("family", "head"), [("llama", "lm_head.weight"), ("gpt_neox", "embed_out.weight")])
def test_a_head_that_is_not_tied_and_not_stored_is_missed(family, head, tmp_path):
    quantized(family, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[head]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="holds no weights for lm_head.weight"):
        load_artifact(tmp_path, "lm")
