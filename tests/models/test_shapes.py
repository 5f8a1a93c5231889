"""Models with fewer heads and narrower FFNs save, load and export like any other."""

import json
from dataclasses import replace

import architectures
import pytest
import tiny
import torch
from architectures import ARCHITECTURES
from test_prune import fit
from transformers import AutoConfig, AutoModelForSequenceClassification, RobertaConfig

from compress.errors import UserError
from compress.models.backbone import Backbone, find_auto_class
from compress.models.blocks import read_blocks, select_blocks
from compress.models.families import BART
from compress.models.families import FAMILIES as RECORDS
from compress.models.proofs import prove_units
from compress.models.shapes import record_shapes, remove_units, shape_blocks
from compress.runtimes import torch as runtime
from compress.tasks.task import Task
from compress.techniques.gptq import GPTQ

INPUTS = {key: value for key, value in tiny.batch().items() if key != "labels"}
TASK = Task(name="t", kind="multiclass", metrics=("accuracy",), primary="accuracy", labels=("no", "maybe", "yes"))
FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "llama", "mistral", "qwen2")
PLAIN = [name for name in FAMILIES if RECORDS[name].head_size_in_config]
KNOWN = [name for name, architecture in ARCHITECTURES.items() if architecture.model_type in RECORDS]
LMS = ("granite", "cohere")  # transformers has no classifier of them


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


def cut_some(name, even):
    """Return a random model of an architecture with fewer units in the first block, or in all; and the model in full
    shape in which nothing reads these units, and as it was."""
    cut, unread, whole = (architectures.build(name, lm=name in LMS) for _ in range(3))
    parts = {}
    for part in ("groups", "ffn"):
        totals = [block.count(part) for block in select_blocks(read_blocks(cut), part)]
        if part == "ffn" or read_blocks(cut)[0].family.cuts_heads:
            some = even or (part == "groups" and read_blocks(cut)[0].family.equal_heads)
            period = 4 if read_blocks(cut)[0].experts else 3  # experts keep a multiple of 8
            masks = [
                torch.arange(total) % period != (1 if some or index == 0 else -1) for index, total in enumerate(totals)
            ]
            parts[part] = masks
            for block, kept in zip(select_blocks(read_blocks(unread), part), masks):
                for matrix, index in block.find_readers(part):
                    matrix.weight[:, index[~kept].flatten()] = 0
    remove_units(cut, **parts)
    record_shapes(cut)
    return cut, unread, whole


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("even", [True, False])
def test_every_known_architecture_is_cut_as_if_nothing_read_the_units_and_reloads(name, even, tmp_path):
    cut, unread, whole = cut_some(name, even)
    answers = [answer(model) for model in (cut, unread, whole)]
    scale = answers[2].abs().max()
    assert torch.allclose(answers[0], answers[1], atol=1e-5 * scale)
    assert not torch.allclose(answers[0], answers[2], atol=1e-3 * scale)
    cut.save_pretrained(tmp_path)
    loaded = runtime.load(tmp_path, "lm" if name in LMS else "multiclass")
    cut.set_attn_implementation(loaded.config._attn_implementation)  # the loaded Gemma 2 caps its attention scores
    assert type(loaded) is type(cut) and torch.equal(answer(loaded), answer(cut))


@torch.no_grad()
def answer(model):
    return model(**architectures.inputs()).logits


@pytest.mark.parametrize("name", KNOWN)
def test_the_record_of_every_known_architecture_is_proven_and_the_model_stays_as_it_is(name):
    model = architectures.build(name, lm=name in LMS)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first = read_blocks(model)[0]
    for part in ("groups", "ffn", "experts"):
        if part == "groups" and not first.family.cuts_heads:
            with pytest.raises(UserError, match=r"The heads of this `\w+` cannot be removed: without some"):
                prove_units(model, [part])
        elif getattr(first, part):
            prove_units(model, [part])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "wrong", "part"),
    [
        ("phi3", {"layout": "by_group"}, "groups"),
        ("gpt_neox", {"layout": "stacked"}, "groups"),
        ("bert", {"key": "attention.self.query"}, "groups"),
        ("llama", {"ffn_in": ("mlp.gate_proj", "mlp.gate_proj")}, "ffn"),
        ("gpt2", {"ffn_in": ()}, "ffn"),
        ("mixtral", {"router": "self_attn.q_proj"}, "experts"),
        ("bart", {"decoder": (BART.decoder[0], replace(BART.decoder[1], key="self_attn.k_proj"))}, "groups"),
        ("t5", {"head_biases": None}, "groups"),
        ("mpnet", {"head_biases": None}, "groups"),
    ],
)
def test_a_wrong_record_is_refused(name, wrong, part, monkeypatch):
    model = architectures.build(name)
    monkeypatch.setitem(RECORDS, name, replace(RECORDS[name], **wrong))
    with pytest.raises(UserError, match="cannot be removed: without some, its first block computes something else"):
        prove_units(model, [part])


@pytest.mark.parametrize("name", ["bert", "llama", "gemma3_text", "gpt2", "mixtral"])
def test_records_are_proven_in_half_precision_as_well(name):
    model = architectures.build(name).bfloat16()
    prove_units(model, ["groups", "experts" if name == "mixtral" else "ffn"])


def test_query_heads_that_all_share_one_key_head_are_cut_one_by_one(tmp_path):
    model = architectures.build("llama", num_key_value_heads=1)
    layer = read_blocks(model)[0].attention_out.weight
    expected = layer[:, 16:].clone()
    remove_units(model, groups=[torch.tensor([0, 1, 1, 1]).bool()] * 3)
    assert torch.equal(layer, expected) and read_blocks(model)[0].key.out_features == 16
    record_shapes(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(runtime.load(tmp_path, "multiclass")), answer(model))


@pytest.mark.parametrize("grouped", [{"num_kv_heads": 2, "new_decoder_architecture": True}, {"multi_query": False}])
def test_every_layout_of_falcon_is_proven_and_cut(grouped, tmp_path):
    model = architectures.build("falcon", **grouped)
    groups = 2 if "num_kv_heads" in grouped else 4
    assert read_blocks(model)[0].groups == groups
    prove_units(model, ["groups", "ffn"])
    shape_blocks(model, heads=[4 - 4 // groups] * 3)
    record_shapes(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(runtime.load(tmp_path, "multiclass")), answer(model))


def test_a_gated_t5_is_proven_and_cut_in_both_stacks(tmp_path):
    model = architectures.build("t5", feed_forward_proj="gated-gelu")
    prove_units(model, ["groups", "ffn"])
    shape_blocks(model, heads=[3] * 9, ffn=[40] * 6)
    record_shapes(model)
    assert not hasattr(model.config, "compress") and (model.config.num_heads, model.config.d_ff) == (3, 40)
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(AutoModelForSequenceClassification.from_pretrained(tmp_path)), answer(model))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_removed_with_their_rows_of_the_router(name, tmp_path):
    model = architectures.build(name)
    old = [block.expert_outs[3].weight.clone() for block in read_blocks(model)]
    remove_units(model, experts=[torch.tensor([1, 0, 1, 1]).bool()] * 3)
    record_shapes(model)
    assert [block.experts for block in read_blocks(model)] == [3, 3, 3]
    assert all(torch.equal(block.expert_outs[2].weight, weight) for block, weight in zip(read_blocks(model), old))
    assert not hasattr(model.config, "compress")
    model.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(answer(plain), answer(model))


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_neox", "modernbert"])
def test_what_is_one_layer_has_no_layer_of_queries(name):
    block = read_blocks(architectures.build(name))[0]
    with pytest.raises(UserError, match="computes queries, keys and values at once"):
        block.query  # noqa: B018


def test_other_families_are_refused():
    with pytest.raises(UserError, match=r"is a `bloom`; the layers of bert, .* falcon, bart, t5 are known"):
        read_blocks(architectures.build("bloom"))
    with pytest.raises(UserError, match="is a `Linear`"):
        read_blocks(torch.nn.Linear(2, 2))


def test_a_block_without_a_layer_of_the_record_is_refused():
    mixed = architectures.build("qwen3_moe", mlp_only_layers=[1])
    with pytest.raises(UserError, match=r"Block 1 of `model.layers` has no layer `mlp.experts`, which every block"):
        read_blocks(mixed)


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
