"""Every model that somebody brings is loaded, can be saved again, and computes what its config says."""

import json
import logging

import pytest
import tiny
import torch
from datasets import Dataset
from hydra import compose, initialize_config_dir
from test_backbone import CLASSES, TEXT
from test_conf import CONF
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from compress.artifacts.artifact import Description, load_artifact, write_artifact
from compress.errors import UserError
from compress.models.backbone import Backbone
from compress.models.loading import keep_savable
from compress.planning.plan import make_plan
from compress.runtimes.torch import describe_loading, load
from compress.tasks.kinds import KINDS
from compress.tasks.splits import Splits
from compress.tasks.tokens import TaskData

LLAMA = {"model_type": "llama", **tiny.SHAPE, "num_key_value_heads": 2, "pad_token_id": 0}
PROBE = {key: value for key, value in tiny.batch(seed=9, padded=False).items() if key != "labels"}


def saved(folder, **config):
    """A random language model with a tokenizer in ``folder``."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**LLAMA, **config})).eval()
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_model_is_saved_without_the_generation_settings_that_have_no_effect(tmp_path, caplog):
    saved(tmp_path)
    edit(tmp_path / "generation_config.json", temperature=0.6, top_p=0.9, do_sample=False, max_length=64)
    with caplog.at_level(logging.WARNING, logger="compress"):
        model, *_ = Backbone(name="m", path=str(tmp_path)).build(TEXT, [])
    assert "sets temperature, top_p, which has no effect" in caplog.text
    model.save_pretrained(tmp_path / "again")
    kept = GenerationConfig.from_pretrained(tmp_path / "again")
    assert (kept.max_length, kept.do_sample, kept.temperature) == (64, False, None)


def test_generation_settings_that_have_an_effect_are_kept():
    config = GenerationConfig(temperature=0.6, do_sample=True, num_beams=3, length_penalty=2.0, num_return_sequences=2)
    kept, dropped = keep_savable(config)
    assert not dropped and kept.to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize("cap", [None, 0.5])
def test_attention_scores_are_capped_if_the_config_says_so(cap, tmp_path):
    shape = {"model_type": "gemma2", "head_dim": 8, "attn_logit_softcapping": cap, "initializer_range": 0.5}
    model = saved(tmp_path, **shape)
    model.set_attn_implementation("eager")
    backbone = Backbone(name="m", path=str(tmp_path))
    with torch.no_grad():
        expected = model(**PROBE).logits
        assert torch.allclose(backbone.build(TEXT, [])[0].eval()(**PROBE).logits, expected, atol=1e-5)
        assert torch.allclose(load(tmp_path, "lm")(**PROBE).logits, expected, atol=1e-5)
    code = describe_loading(tmp_path, "lm").code
    assert ('attn_implementation="eager"' in code) == bool(cap)
    answers = {}
    exec(code.replace('"."', repr(str(tmp_path))).replace("A text.", "w1 w2"), answers)
    ids = answers["tokenizer"]("w1 w2", return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(answers["logits"], model(**ids).logits, atol=1e-5)
    random = Backbone(name="m", config={**LLAMA, **shape, "vocab_size": 400})
    chosen = random.build(TEXT, ["w1 w2 w3"])[0].config._attn_implementation
    assert (chosen == "eager") == bool(cap)


def add_tokens(folder, **tokens):
    """Add tokens to the tokenizer in ``folder`` and leave the model's embeddings as they are."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(tokens) if "pad_token" in tokens else tokenizer.add_tokens(**tokens)
    tokenizer.save_pretrained(folder)
    return tokenizer


def plan(folder, *words):
    chosen = ["model=pretrained", f"model.path={folder}", "task=toy_lm", "cache.mode=off", *words]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return make_plan(compose("train", chosen))


def test_a_pad_token_without_an_embedding_is_refused_before_anything_is_loaded(tmp_path):
    saved(tmp_path)
    plan(tmp_path)
    add_tokens(tmp_path, pad_token="[NEW]")
    (tmp_path / "model.safetensors").unlink()
    sentence = rf"model.path is {tmp_path}, whose tokenizer adds token 60, '\[NEW\]'; .* tokens 0 to 59. Set model.path"
    with pytest.raises(UserError, match=sentence):
        plan(tmp_path)


def test_a_token_without_an_embedding_is_refused_where_a_text_has_it(tmp_path):
    saved(tmp_path)
    tokenizer = add_tokens(tmp_path, new_tokens=["zzz"])
    plan(tmp_path)  # no text may ever have it
    rows = Dataset.from_dict({"text": ["w1 w2 w3"] * 4 + ["w1 zzz"]})
    splits = Splits(train=rows, validation=rows.select(range(4)), test=rows, task=TEXT)
    data = TaskData(splits, tokenizer, 16, known_tokens=60)
    assert len(data.tokenised("validation"))
    with pytest.raises(UserError, match="Task `t` has a text in train with token 60, 'zzz'; the model has embeddings"):
        data.tokenised("train")
    other = TaskData(splits, tokenizer, 16, calibration_text=rows, known_tokens=60)
    with pytest.raises(UserError, match="a text in the calibration text with token 60, 'zzz'"):
        other.calibration(1, 1)


WIDE = {**tiny.SHAPE, "pad_token_id": 0, "max_position_embeddings": 40, "vocab_size": 400}
STORED = {
    "bert": ({"model_type": "bert", **WIDE}, CLASSES),
    "deberta-v2": ({"model_type": "deberta-v2", **WIDE, "relative_attention": True, "type_vocab_size": 0}, CLASSES),
    "modernbert": ({"model_type": "modernbert", **WIDE, "local_attention": 8}, CLASSES),
    "tied llama": ({**LLAMA, **WIDE, "tie_word_embeddings": True}, TEXT),
    "llama": ({**LLAMA, **WIDE, "tie_word_embeddings": False}, TEXT),
    "biased qwen2": ({**LLAMA, **WIDE, "model_type": "qwen2"}, TEXT),
    "qwen3": ({**LLAMA, **WIDE, "model_type": "qwen3", "head_dim": 16}, CLASSES),
    "gemma3": ({**LLAMA, **WIDE, "model_type": "gemma3_text", "head_dim": 16}, TEXT),
    "phi3": ({**LLAMA, **WIDE, "model_type": "phi3"}, TEXT),
    "gpt2": ({"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 400}, TEXT),
    "opt": ({**WIDE, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32}, TEXT),
    "gpt_neox": ({**WIDE, "model_type": "gpt_neox"}, TEXT),
    "mixtral": ({**LLAMA, **WIDE, "model_type": "mixtral", "num_local_experts": 2}, TEXT),
}


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, ("float32", "bfloat16", "float16")[place % 3]) for place, name in enumerate(STORED)]
)
def test_a_checkpoint_in_several_files_is_built_saved_and_reloaded(name, dtype, tmp_path):
    config, task = STORED[name]
    made, tokenizer, _ = Backbone(name="m", config=config, dtype=dtype).build(task, ["a few words to learn from"] * 9)
    tokenizer.add_tokens(["<extra>"])
    made.resize_token_embeddings(len(tokenizer))
    made.eval().save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "theirs")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    model, tokenizer, trained = Backbone(name="m", path=str(tmp_path / "theirs"), dtype=dtype).build(task, [])
    assert trained and model.dtype == getattr(torch, dtype)
    write_artifact(tmp_path / "ours", model, tokenizer, Description(KINDS[task.kind].name, "m", task.name))
    again, tokenizer, _ = load_artifact(tmp_path / "ours")
    batch = tokenizer(["a few <extra> words", "<extra> to"], padding=True, return_tensors="pt")
    assert len(tokenizer) - 1 in batch["input_ids"]
    with torch.inference_mode():
        expected = made(**batch).logits
        assert torch.equal(model.eval()(**batch).logits, expected) and torch.equal(again(**batch).logits, expected)
