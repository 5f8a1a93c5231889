"""Models with fewer heads and narrower FFNs save, load and export like any other."""

import json

import pytest
import tiny
import torch
from test_prune import fit
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, RobertaConfig

from compress.errors import UserError
from compress.models.backbone import Backbone, find_auto_class
from compress.models.families import FAMILIES
from compress.models.shapes import read_blocks, record_shapes, remove_units, shape_blocks
from compress.runtimes import torch as runtime
from compress.tasks.task import Task
from compress.techniques.gptq import GPTQ

INPUTS = {key: value for key, value in tiny.batch().items() if key != "labels"}
TASK = Task(name="t", kind="multiclass", metrics=("accuracy",), primary="accuracy", labels=("no", "maybe", "yes"))
PLAIN = [name for name, record in FAMILIES.items() if record.head_size_in_config]


def family(name):
    """Return a random classifier of two blocks with 4 heads (in 2 groups, if the family has groups) and 64 FFN
    channels."""
    torch.manual_seed(0)
    shape = {**tiny.SHAPE, "max_position_embeddings": 42, "num_labels": 3, "pad_token_id": 0}
    if name in PLAIN:
        shape["num_key_value_heads"] = 2
    if name == "distilbert":
        shape["hidden_dim"] = shape.pop("intermediate_size")
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(name, **shape)).eval()


def uneven(model):
    """Cut the model to 3 or 2 of the 4 heads of the first block, and to 32 and 48 of 64 channels."""
    first, second = ([1, 0], [1, 1]) if read_blocks(model)[0].groups == 2 else ([1, 0, 1, 1], [1, 1, 1, 1])
    ffn = [torch.arange(64) % 2 == 0, torch.arange(64) % 4 > 0]
    remove_units(model, [torch.tensor(first).bool(), torch.tensor(second).bool()], ffn)
    record_shapes(model)
    return model


@torch.no_grad()
def logits(model):
    return model(**INPUTS).logits


def zeroed(model):
    """Set the weights that :func:`uneven` removes to zero, in a model of full shape."""
    groups = read_blocks(model)[0].groups
    head = slice(16, 32) if groups == 2 else slice(8, 16)
    for block, removed in zip(read_blocks(model), (torch.arange(64) % 2 > 0, torch.arange(64) % 4 == 0)):
        block.ffn_out.weight.data[:, removed] = 0
    read_blocks(model)[0].attention_out.weight.data[:, head] = 0
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_cut_away_counts_as_zero(name):
    assert torch.allclose(logits(uneven(family(name))), logits(zeroed(family(name))), atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_uneven_model_reloads_bit_for_bit_as_a_plain_model_of_its_class(name, tmp_path):
    model = uneven(family(name))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["compress"] == {"heads": [2 if name in PLAIN else 3, 4], "ffn": [32, 48]}
    assert config["architectures"] == [type(model).__name__]
    loaded = runtime.load(tmp_path, "multiclass")
    assert type(loaded) is type(model) and torch.equal(logits(loaded), logits(model))
    assert [(block.query.out_features, block.ffn_out.in_features) for block in read_blocks(loaded)] == [
        (8 * heads, ffn) for heads, ffn in zip(config["compress"]["heads"], (32, 48))
    ]
    with pytest.raises(RuntimeError, match="mismatch"):  # transformers alone refuses it and never loads it silently
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert torch.equal(logits(runtime.load(again, "multiclass")), logits(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_uneven_model_can_be_quantized_and_reloaded(name, tmp_path):
    model, stage = uneven(family(name)), GPTQ(group_size=8, samples=8)
    fit(model, stage)
    expected = logits(model.eval())
    stage.save(model, tmp_path)
    loaded = runtime.load(tmp_path, "multiclass")
    assert torch.allclose(logits(loaded), expected, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_uneven_model_is_exported(name):
    model = uneven(family(name))
    model.config.use_cache = False
    exported = torch.export.export(model, (), INPUTS).module()
    assert torch.allclose(logits(exported), logits(model), atol=1e-6)


def test_a_language_model_is_cut_and_reloaded_and_generates(tmp_path):
    model = tiny.llama_lm()
    shape_blocks(model, heads=[2, 4], ffn=[40, 64])
    record_shapes(model)
    model.save_pretrained(tmp_path)
    loaded = runtime.load(tmp_path, "lm")
    assert torch.equal(logits(loaded), logits(model))
    cached, again = (loaded.generate(INPUTS["input_ids"][:1], max_new_tokens=5, use_cache=use) for use in (True, False))
    assert torch.equal(cached, again)


@pytest.mark.parametrize("name", FAMILIES)
def test_even_ffns_are_written_to_the_plain_config(name, tmp_path):
    model = family(name)
    shape_blocks(model, ffn=[40, 40])
    record_shapes(model)
    model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "compress")
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("name", PLAIN)
def test_even_heads_are_written_to_the_plain_config_if_it_has_their_size(name, tmp_path):
    model = family(name)
    shape_blocks(model, heads=[2, 2])
    record_shapes(model)
    model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "compress") and model.config.num_key_value_heads == 1
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path)), logits(model))


def test_heads_that_llamas_config_refuses_are_written_to_the_extra_entry(tmp_path):
    config = AutoConfig.for_model("llama", **tiny.SHAPE, num_labels=3, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    shape_blocks(model, heads=[3, 3])
    record_shapes(model)
    assert model.config.compress == {"heads": [3, 3]} and model.config.num_attention_heads == 4
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(runtime.load(tmp_path, "multiclass")), logits(model))


def test_a_second_cut_that_levels_the_blocks_needs_no_entry_any_more():
    model = uneven(family("llama"))
    shape_blocks(model, heads=[2, 2], ffn=[32, 32])
    record_shapes(model)
    assert not hasattr(model.config, "compress") and model.config.intermediate_size == 32


def test_a_cut_model_is_a_model_to_start_from(tmp_path):
    model = uneven(tiny.bert())
    model.save_pretrained(tmp_path)
    backbone = Backbone(name="mine", path=str(tmp_path))
    assert [block.heads for block in read_blocks(backbone.skeleton(TASK))] == [3, 4]
    config = backbone.configuration(TASK)
    again = find_auto_class("multiclass", config).from_pretrained(tmp_path, config=config)
    assert torch.equal(logits(again), logits(model))


def test_other_families_are_refused():
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    with pytest.raises(UserError, match=r"is a `gpt2`; the layers of bert, .* qwen2 are known"):
        read_blocks(gpt2)
    with pytest.raises(UserError, match="is a `Linear`"):
        read_blocks(torch.nn.Linear(2, 2))


# Counts of RoBERTa-large with a head for two labels by TextPruner's `summary`: parameters, and the ids of the 514
# positions, a buffer that transformers no longer saves.
COUNTS = {
    (16, 4096): 355_362_308,
    (10, 4096): 317_585_924,
    (8, 4096): 304_993_796,
    (6, 4096): 292_401_668,
    (4, 4096): 279_809_540,
    (12, 2048): 229_465_604,
    (12, 1024): 179_109_380,
    (12, 512): 153_931_268,
}


def masks(average, of, even):
    """Return masks for 24 blocks that keep ``average`` units, or by turns a third more and a third fewer."""
    sizes = [average + (0 if even else average // 3) * (-1) ** i for i in range(24)]
    return [torch.randperm(of, generator=torch.Generator().manual_seed(i)) < size for i, size in enumerate(sizes)]


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize(("heads", "ffn"), COUNTS)
def test_roberta_large_has_textpruners_number_of_parameters(heads, ffn, even):
    config = RobertaConfig(
        vocab_size=50265,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=514,
        type_vocab_size=1,
    )
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    remove_units(model, masks(heads, 16, even or heads == 16), masks(ffn, 4096, even or ffn == 4096))
    assert sum(parameter.numel() for parameter in model.parameters()) + 514 == COUNTS[heads, ffn]
