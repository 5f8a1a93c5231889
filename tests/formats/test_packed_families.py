"""Artifacts of packed weights load for architectures whose code knows only layers with a weight."""

import pytest
import tiny
import torch
import transformers
from transformers import AutoConfig

from compress.artifacts.artifact import load_artifact
from compress.runtimes.torch import describe_loading
from compress.tasks.kinds import KINDS
from compress.techniques.finetune import FineTune
from compress.techniques.gptq import GPTQ

SHAPE = {**tiny.SHAPE, "pad_token_id": 0, "max_position_embeddings": 40}
MODERNBERT = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "local_attention": 8}
T5 = {"vocab_size": 60, "d_model": 32, "num_layers": 3, "num_heads": 4, "d_ff": 64, "d_kv": 8, "eos_token_id": 2}
FALCON = {**tiny.SHAPE, "pad_token_id": 0, "num_hidden_layers": 2}
MODELS = {
    ("bert", "multiclass"): SHAPE,
    ("modernbert", "multiclass"): {**SHAPE, **MODERNBERT},
    ("t5", "multiclass"): {**T5, "pad_token_id": 0, "decoder_start_token_id": 0},
    ("llama", "lm"): {**SHAPE, "num_key_value_heads": 2},
    ("falcon", "lm"): FALCON,
}  # fmt: skip
PROBE = {key: value for key, value in tiny.batch(seed=9).items() if key != "labels"}
PROBE["input_ids"][:, 8] = 2  # T5's head reads where a text ends


def quantized(kind, task, folder):
    """A model with packed weights, saved in ``folder``, and its logits before."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **MODELS[kind, task], **({} if task == "lm" else {"num_labels": 3}))
    model = getattr(transformers, KINDS[task].auto_class).from_config(config)
    stage = GPTQ(group_size=32, samples=8)
    batches = [{**batch, "input_ids": batch["input_ids"].clone()} for batch in tiny.loader(lm=task == "lm")]
    for batch in batches:
        batch["input_ids"][:, 6] = 2
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    tiny.trainer(stage).fit(FineTune(model), loader)
    with torch.no_grad():
        expected = model.eval()(**PROBE).logits
    stage.save(model, folder)
    tiny.tokenizer().save_pretrained(folder)
    return expected


@pytest.mark.parametrize(("kind", "task"), MODELS)
def test_every_architecture_reloads_to_the_same_logits(kind, task, tmp_path):
    expected = quantized(kind, task, tmp_path)
    with torch.no_grad():
        found = load_artifact(tmp_path, task).model(**PROBE).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    # What its card says to type works.
    auto = getattr(transformers, KINDS[task].auto_class)
    if describe_loading(tmp_path, task).needs_us:
        with pytest.raises(AttributeError, match="weight"):
            auto.from_pretrained(tmp_path)
    else:
        auto.from_pretrained(tmp_path)
