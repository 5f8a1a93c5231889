"""A family of models is one record, and no other module knows its name."""

import re
from dataclasses import replace
from pathlib import Path

import architectures
import pytest
import tiny
import torch
from test_prune import fit
from test_shapes import logits
from transformers import AutoConfig, AutoModelForSequenceClassification

import compress
from compress.errors import UserError
from compress.models.blocks import read_blocks
from compress.models.families import FAMILIES, LLAMA, find_family
from compress.models.students import narrow_config
from compress.runtimes import torch as runtime
from compress.sweeping.sweeper import read_sizes
from compress.techniques.awq import AWQ
from compress.techniques.structured import Structured
from compress.techniques.w8a8 import W8A8

NEW = {
    "seed_oss": LLAMA,  # with biases of queries, keys and values
    "stablelm": LLAMA,  # with norms that have biases
}


def build(name, **shape):
    torch.manual_seed(0)
    shape = {**tiny.SHAPE, "num_key_value_heads": 2, "head_dim": 8, "num_labels": 3, "pad_token_id": 0, **shape}
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(name, **shape)).eval()


@pytest.fixture(params=NEW)
def name(request, monkeypatch):
    """Return an unknown family, after adding its record."""
    assert request.param not in FAMILIES
    with pytest.raises(UserError, match=f"The model is a `{request.param}`; .* are known. Choose"):
        find_family(build(request.param))
    monkeypatch.setitem(FAMILIES, request.param, NEW[request.param])
    return request.param


def test_its_heads_and_channels_are_cut_as_if_they_were_zero(name, tmp_path):
    model, whole = build(name), build(name)
    fit(model, Structured(head_mask=[[1, 1, 0, 0], [1] * 4], ffn_mask=[[1] * 40 + [0] * 24, [1] * 64]))
    block = read_blocks(whole)[0]
    block.attention_out.weight.data[:, 16:] = 0
    block.ffn_out.weight.data[:, 40:] = 0
    assert torch.allclose(logits(model.eval()), logits(whole), atol=1e-6)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(runtime.load(tmp_path, "multiclass")), logits(model))


def test_stages_that_fold_scales_take_it(name):
    fit(build(name), AWQ(bits=8, group_size=8, samples=4, grid=2), W8A8(smoothing=0.5, samples=4))


def test_its_sizes_are_found_under_the_keys_of_its_config(name, monkeypatch):
    model = build(name, width=48)
    monkeypatch.setitem(FAMILIES, name, replace(NEW[name], ffn_size="width"))
    assert read_sizes(model) == {"heads": 4, "ffn": 48, "layers": 2}
    assert narrow_config(model.config, 16, "technique.distill.student").width == 24


def test_the_ffn_of_a_config_that_leaves_its_width_open_is_four_times_as_wide_as_the_model():
    assert read_sizes(architectures.build("gptj")) == {"heads": 4, "ffn": 256, "layers": 3}


def test_no_module_asks_for_a_family_by_its_name():
    comparison = re.compile(r"model_type\b.*(==|!=|\bin [(\[{])")
    assert not [path for path in Path(compress.__file__).parent.rglob("*.py") if comparison.search(path.read_text())]
