"""Models are built for a task, from weights or at random; mistakes are refused."""

import dataclasses
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from compress.errors import UserError
from compress.models.backbone import Backbone, has_task_labels, is_decoder, limit_length, set_pad_token, train_tokenizer
from compress.models.layers import find_blocks
from compress.models.matrices import find_pruned_layers, find_zeros, matrices
from compress.models.students import load_student
from compress.tasks.task import Task

TEXTS = ["the soup was very good .", "the room was not bad at all", "a film, slow; but fine!"] * 20
CLASSES = Task(name="t", kind="multiclass", metrics=("accuracy",), primary="accuracy", labels=("no", "maybe", "yes"))
EMOTIONS = Task(name="t", kind="multilabel", metrics=("f1_micro",), primary="f1_micro", labels=("joy", "fear"))
SCORES = Task(name="t", kind="regression", metrics=("pearson",), primary="pearson", labels=())
TEXT = Task(name="t", kind="lm", metrics=("perplexity",), primary="perplexity", labels=())
SMALL = {**tiny.SHAPE, "vocab_size": 400, "max_position_embeddings": 64}
BERT = Backbone(name="small", config={"model_type": "bert", **SMALL})
LLAMA = Backbone(name="small", config={"model_type": "llama", **SMALL, "num_key_value_heads": 2})


@pytest.mark.parametrize("backbone", [BERT, LLAMA])
@pytest.mark.parametrize("task", [CLASSES, EMOTIONS, SCORES])
def test_encoders_and_decoders_get_the_head_of_the_task(backbone, task):
    model, tokenizer, trained = backbone.build(task, TEXTS)
    batch = tokenizer(["good", "bad soup"], padding=True, return_tensors="pt")
    labels = {"multiclass": torch.tensor([0, 2]), "multilabel": torch.ones(2, 2), "regression": torch.ones(2)}
    output = model(**batch, labels=labels[task.kind])
    assert output.logits.shape == (2, task.num_labels) and output.loss.isfinite() and not trained
    assert list(model.config.id2label.values())[: len(task.labels)] == list(task.labels) or not task.labels


SIZES = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
PAIRS = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4},
    "bart": {**SIZES, **HEADS},
}


@pytest.mark.parametrize("kind", PAIRS)
def test_a_classifier_of_an_encoder_and_a_decoder_reads_the_end_of_the_text(kind):
    backbone = Backbone(name="small", config={"model_type": kind, "vocab_size": 400, **PAIRS[kind]})
    model, tokenizer, _ = backbone.build(CLASSES, TEXTS)
    batch = tokenizer(["good", "the room was not bad at all"], padding=True, return_tensors="pt")
    assert batch["input_ids"][1, -1] == model.config.eos_token_id
    with torch.inference_mode():
        together = model.eval()(**batch).logits
        alone = model(**tokenizer("good", return_tensors="pt")).logits
    assert together.shape == (2, 3) and torch.allclose(together[:1], alone, atol=1e-5)


def test_a_decoder_gets_a_language_modelling_head():
    model, tokenizer, _ = LLAMA.build(TEXT, TEXTS)
    batch = tokenizer("the soup", return_tensors="pt")
    assert model(**batch).logits.shape == (1, batch["input_ids"].shape[1], 400)


@pytest.mark.parametrize("kind", ["modernbert", "opt"])
def test_a_small_vocabulary_has_the_special_tokens_of_its_own_tokenizer(kind):
    sizes = {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": tiny.SHAPE["hidden_size"]}
    backbone = Backbone(name="small", config={"model_type": kind, **sizes})  # ModernBERT's own pad token is 50283
    assert len(backbone.skeleton(CLASSES).get_input_embeddings().weight) == 400
    model, tokenizer, _ = backbone.build(CLASSES, TEXTS)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        assert getattr(model.config, key, None) == getattr(tokenizer, key)


def test_an_encoder_is_refused_for_language_modelling():
    with pytest.raises(UserError, match="`bert` is an encoder. Choose a decoder"):
        BERT.skeleton(TEXT)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra", "llama", "mistral", "qwen2", "gpt2"])
def test_which_architectures_read_left_to_right(kind):
    assert is_decoder(AutoConfig.for_model(kind)) == (kind in ("llama", "mistral", "qwen2", "gpt2"))


def test_a_decoders_head_reads_the_last_token_that_is_no_padding():
    model, tokenizer, _ = LLAMA.build(CLASSES, TEXTS)
    texts = ["good", "the room was not bad at all", "slow; but fine!"]
    with torch.inference_mode():
        together = model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_tokenizer_without_a_pad_token_pads_with_the_end_token():
    model, tokenizer, _ = LLAMA.build(CLASSES, TEXTS)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    set_pad_token(model, bare)
    assert bare.pad_token == "</s>" and bare.padding_side == "right"
    assert model.config.pad_token_id == bare.convert_tokens_to_ids("</s>")
    assert bare.pad_token_id not in bare("a good text")["input_ids"]


@pytest.mark.parametrize("backbone", [BERT, LLAMA])
def test_a_trained_tokenizer_gives_the_text_back(backbone):
    tokenizer = train_tokenizer(TEXTS, backbone.configuration(CLASSES))
    ids = tokenizer("the room was not bad")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "the room was not bad"
    assert len(tokenizer) <= 400


def test_a_skeleton_takes_no_memory():
    assert all(p.device.type == "meta" for p in BERT.skeleton(CLASSES).parameters())


def test_without_weights_and_architecture_there_is_nothing_to_build():
    with pytest.raises(UserError, match=r"Set model.path .* or model.config"):
        Backbone(name="mine")


@pytest.mark.parametrize("names", [["NO", "Maybe", "yes"], ["LABEL_0", "LABEL_1", "LABEL_2"]])
def test_labels_are_the_same_in_another_case_or_without_names(names):
    assert has_task_labels(AutoConfig.for_model("bert", id2label=dict(enumerate(names))), CLASSES)
    turned = [names[1], names[0], names[2]]
    assert not has_task_labels(AutoConfig.for_model("bert", id2label=dict(enumerate(turned))), CLASSES)


def test_the_name_of_a_single_number_does_not_matter():
    score = {"id2label": {0: "score"}, "label2id": {"score": 0}, "problem_type": "regression"}
    assert has_task_labels(AutoConfig.for_model("bert", **score), SCORES)
    assert not has_task_labels(AutoConfig.for_model("bert", num_labels=2), SCORES)


def test_a_saved_head_is_recognised_by_its_labels(tmp_path):
    model, tokenizer, _ = BERT.build(CLASSES, TEXTS)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    saved = Backbone(name="saved", path=str(tmp_path))
    again, _, trained = saved.build(CLASSES, [])
    assert trained and torch.equal(again.classifier.weight, model.classifier.weight)
    turned = dataclasses.replace(CLASSES, labels=("yes", "maybe", "no"))
    assert not saved.build(turned, [])[2] and not has_task_labels(model.config, turned)
    other, _, trained = saved.build(EMOTIONS, [])  # of another size: a new head on the old body
    assert not trained and other.num_labels == 2
    assert torch.equal(next(iter(matrices(other).items()))[1].weight, next(iter(matrices(model).items()))[1].weight)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    model, tokenizer, _ = BERT.build(CLASSES, TEXTS)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = {f"other.{name}": tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="holds no weights for .* tensors of the transformer blocks"):
        Backbone(name="saved", path=str(tmp_path)).build(CLASSES, [])
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="could not be loaded"):
        Backbone(name="saved", path=str(tmp_path)).build(CLASSES, [])


@pytest.mark.parametrize("wrong", [{"model_type": "foo"}, {"model_type": "bert", **SMALL, "hidden_size": 33}])
def test_an_impossible_architecture_is_refused(wrong):
    with pytest.raises(UserError, match="model.config"):
        Backbone(name="mine", config=wrong).skeleton(CLASSES)


def test_a_missing_folder_or_hub_is_reported_with_the_setting(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"Model `bert`: `nobody/nothing` is neither a local folder .* Set model.path"):
        Backbone(name="bert", path="nobody/nothing").skeleton(CLASSES)
    with pytest.raises(UserError, match=r"holds no config.json. Set model.path"):
        Backbone(name="bert", path=str(tmp_path)).skeleton(CLASSES)


def test_roberta_counts_its_positions_from_its_pad_token():
    tokenizer = train_tokenizer(TEXTS, BERT.configuration(CLASSES))
    assert limit_length(tiny.bert(), tokenizer, 512) == 40
    assert limit_length(tiny.roberta(), tokenizer, 512) == 40
    assert limit_length(tiny.bert(), tokenizer, 16) == 16


@pytest.mark.parametrize("build", tiny.ALL)
def test_the_layers_to_compress_are_those_inside_the_blocks(build):
    model = build()
    prefix, stack = find_blocks(model)
    names = matrices(model)
    assert len(stack) == 2 and len(names) == 2 * (7 if "Llama" in type(model).__name__ else 6)
    assert all(model.get_submodule(name) is layer.module and name.startswith(prefix) for name, layer in names.items())
    assert not find_zeros(model)


def test_a_module_without_blocks_is_refused():
    with pytest.raises(UserError, match="`Linear` has no list of transformer blocks"):
        find_blocks(torch.nn.Linear(2, 2))


def test_real_weights_load_with_a_new_head(shared_models):
    model, _, trained = Backbone(name="minilm", path=str(shared_models("minilm-l6"))).build(CLASSES, [])
    assert not trained  # the head is new
    assert model.config.num_hidden_layers == 6 and model.num_labels == 3
    assert sum(p.numel() for p in model.bert.encoder.parameters()) == pytest.approx(10.65e6, rel=1e-3)


def test_real_decoder_weights_give_their_published_loss(shared_models, shared_data):
    model, tokenizer, trained = Backbone(name="stories", path=str(shared_models("stories260K"))).build(TEXT, [])
    assert trained
    text = (shared_data("tinystories-sample") / "tinystories.txt").read_text()
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    blocks_of_256 = ids[0, : len(ids[0]) // 256 * 256].view(-1, 256)
    with torch.inference_mode():
        assert model.eval()(input_ids=blocks_of_256, labels=blocks_of_256).loss.item() == pytest.approx(1.73, abs=0.15)


@pytest.mark.parametrize(
    "stored",
    [
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "fp8"},
    ],
)
def test_a_model_that_is_quantized_already_starts_no_chain(tmp_path, stored):
    config = AutoConfig.for_model(**BERT.config)
    config.quantization_config = stored
    config.save_pretrained(tmp_path)
    method = stored["quant_method"]
    with pytest.raises(
        UserError, match=rf"model.path is {tmp_path}, whose .* already \({method}\).* artifact={tmp_path} "
    ):
        Backbone(name="b", path=str(tmp_path)).skeleton(CLASSES)
    with pytest.raises(UserError, match=rf"distill.student.path is {tmp_path}, whose weights are quantized already"):
        load_student(str(tmp_path), tiny.bert(), "technique.distill.student.path", weights=False)


def test_a_pruned_layer_has_many_zeros_but_not_zeros_alone():
    model = tiny.bert()
    (first, one), (second, other), (_, chance) = list(matrices(model).items())[:3]
    with torch.no_grad():
        one.weight[: len(one.weight) // 2] = 0
        other.weight.zero_()
        chance.weight[0, 0] = 0
    assert find_pruned_layers(model) == {first: 0.5}


AFTER_PADDING = {
    "roberta": {},
    "xlm-roberta": {},
    "camembert": {},
    "mpnet": {},
    "longformer": {"attention_window": [4, 4]},
    "data2vec-text": {},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "ibert": {},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 8},
    "esm": {"mask_token_id": 4},
    "bert": {},
    "albert": {"embedding_size": 16},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}


@pytest.mark.parametrize("kind", AFTER_PADDING)
def test_a_text_of_the_longest_length_has_positions_and_a_longer_one_has_none(kind):
    shape = {**tiny.SHAPE, "max_position_embeddings": 40, "pad_token_id": 1}
    config = AutoConfig.for_model(kind, **{**shape, **AFTER_PADDING[kind]})
    model, tokenizer = AutoModel.from_config(config).eval(), SimpleNamespace(model_max_length=10**30)
    length = limit_length(model, tokenizer, 512)
    assert length == (40 if kind in ("bert", "albert", "opt") else 38)
    assert limit_length(SimpleNamespace(config=config), tokenizer, 512) == length  # an exported model's
    ids = torch.full((1, length + 1), 7)
    with torch.inference_mode():
        model(input_ids=ids[:, 1:], attention_mask=torch.ones_like(ids[:, 1:]))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
