import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from datasets import Dataset
from pydantic import ValidationError
from test_prune import fit
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)

from compress.errors import UserError
from compress.models.backbone import limit_length, set_pad_token, train_tokenizer
from compress.tasks.tokens import TaskData
from compress.technique import Training
from compress.techniques.finetune import FineTune
from compress.techniques.prune_vocab import PruneVocab, cut_tokenizer, find_kept_tokens, find_merged_tokens

ROOT = Path(__file__).parents[2]
LINES = [
    line
    for file in ("README.md", "compress/running/experiment.py", "compress/tasks/toy.py")
    for line in (ROOT / file).open()
]
SHORT = [line for line in LINES if len(line) < 40][:40]  # truncation would cut a word, and keep half of its tokens
SIZE = 400
BYTE = re.compile("<0x..>|.", re.DOTALL)  # a character represents a byte in a byte-level BPE


def specials(bos, pad, eos, unk, mask):
    return {"bos_token": bos, "pad_token": pad, "eos_token": eos, "unk_token": unk, "mask_token": mask}


NAMES = specials("<s>", "<pad>", "</s>", "<unk>", "<mask>")
SETTINGS = {"special_tokens": list(NAMES.values()), "vocab_size": SIZE, "show_progress": False}


def wordpiece():
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        LINES, trainers.WordPieceTrainer(**{**SETTINGS, "special_tokens": [*names.values(), "[MASK]"]})
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=40, mask_token="[MASK]", **names)


def byte_level():
    return train_tokenizer(LINES, RobertaConfig(vocab_size=SIZE, max_position_embeddings=40))


def byte_fallback():
    bytewise = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(**{**SETTINGS, "special_tokens": [*NAMES.values(), *bytewise], "vocab_size": 700})
    tokenizer.train_from_iterator(LINES, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][: len(NAMES)]  # bytes are not special tokens
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=40, **NAMES)


def whole_words():
    """Return a tokenizer that, like Llama 3's, does not merge a word that is a token."""
    tokenizer = byte_level()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["ignore_merges"] = True
    content["model"]["vocab"]["Ġsparsity"] = len(content["model"]["vocab"])  # no merges lead to it
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    return tokenizer


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(LINES, trainers.UnigramTrainer(**SETTINGS, unk_token="<unk>"))
    around = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.post_processor = processors.Sequence([around])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=40, **NAMES)


def theirs(name, source):
    """Return a tokenizer of a class that transformers rebuilds from vocabulary and merges."""
    content = json.loads(source.backend_tokenizer.to_str())["model"]
    vocab = {**content["vocab"]} if isinstance(content["vocab"], dict) else list(map(tuple, content["vocab"]))
    if name is BertTokenizer:
        return BertTokenizer(vocab=vocab)
    if isinstance(vocab, list):
        return name(vocab=vocab)
    return name(
        vocab=vocab, merges=list(map(tuple, content["merges"])), **{k: v for k, v in NAMES.items() if v in vocab}
    )


ALL = (wordpiece, byte_level, byte_fallback, whole_words, unigram)
EVERY = [*ALL, "bert", "roberta", "llama", "xlm_roberta"]


@pytest.fixture(scope="module")
def made():
    """Return a cache of tokenizers, each trained once."""
    return {
        **{build: build() for build in ALL},
        "bert": theirs(BertTokenizer, wordpiece()),
        "roberta": theirs(RobertaTokenizer, byte_level()),
        "llama": theirs(LlamaTokenizer, byte_fallback()),
        "xlm_roberta": theirs(XLMRobertaTokenizer, unigram()),
    }


def noise(count=300, seed=0):
    """Return misspelt pieces of LINES, with characters that no tokenizer here has seen."""
    rng = random.Random(seed)
    words = " ".join(LINES).split()
    for _ in range(count):
        text = " ".join(rng.choices(words, k=rng.randint(1, 4)))
        for _ in range(rng.randint(0, 3)):
            at = rng.randrange(len(text) + 1)
            text = (
                text[:at]
                + rng.choice(["", " ", "é", "☃", "x", "th", "\n", "👩‍🚀", text[:3]])
                + text[at + rng.randint(0, 2) :]
            )
        yield text


def cut(tokenizer, texts):
    wanted = {token for text in texts for token in tokenizer.tokenize(text)}
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = find_kept_tokens(content, wanted, tokenizer.all_special_tokens)
    return cut_tokenizer(tokenizer, content, [t for t in sorted(tokenizer.vocab, key=tokenizer.vocab.get) if t in kept])


def keeps_texts(tokenizer, smaller, texts):
    """Return the number of texts whose tokens all stay. Check that these texts have the same tokens and that the others
    have no unknown tokens."""
    same, unknown = 0, tokenizer.unk_token
    for text in texts:
        before, after = tokenizer.tokenize(text), smaller.tokenize(text)
        if set(before) <= smaller.vocab.keys():
            assert after == before, text
            same += 1
        assert after.count(unknown) <= before.count(unknown), text
    return same


def test_the_way_to_a_token_worked_by_hand():
    ranks = {("l", "o"): 0, ("lo", "w"): 1, ("o", "w"): 2, ("low", "e"): 3, ("e", "r"): 4, ("low", "er"): 5}
    assert find_merged_tokens("lower", ranks) == {
        "lo",
        "low",
        "lowe",
    }  # `lowe` is merged before `er`, so `lower` is never made
    del ranks["low", "e"]
    assert find_merged_tokens("lower", ranks) == {"lo", "low", "er", "lower"}
    assert find_merged_tokens("l", ranks) == set()


def test_what_survives_worked_by_hand():
    vocab = {"<unk>": 0, "</s>": 1, "<0x0A>": 2, "a": 3, "b": 4, "c": 5, "ab": 6, "bc": 7, "abc": 8, "ca": 9}
    content = {
        "added_tokens": [{"content": "</s>"}],
        "model": {"type": "BPE", "unk_token": "<unk>", "vocab": vocab, "merges": [["a", "b"], ["b", "c"], ["ab", "c"]]},
    }
    always = {"<unk>", "</s>", "<0x0A>", "a", "b", "c"}
    assert find_kept_tokens(content, set()) == always
    assert find_kept_tokens(content, {"abc"}) == always | {"abc", "ab"}


def test_a_unigram_keeps_what_unknown_characters_are_priced_by():
    pieces = [["<unk>", 0.0], ["a", -1.0], ["ab", -2.0], ["dear", -30.0], ["cheap", -3.0]]
    content = {"added_tokens": [], "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces}}
    assert find_kept_tokens(content, {"ab"}) == {"<unk>", "a", "ab", "dear"}


@pytest.mark.parametrize("kind", EVERY)
def test_texts_whose_tokens_stay_keep_them(made, kind):
    tokenizer = made[kind]
    smaller = cut(tokenizer, LINES[::2])
    assert keeps_texts(tokenizer, smaller, LINES[::2]) == len(LINES[::2])
    smallest = cut(tokenizer, random.Random(0).sample(LINES, 8))
    assert sorted(smallest.vocab.values()) == list(range(len(smallest))) and len(smallest) < 0.95 * len(tokenizer)
    texts = [*LINES, *noise()]
    assert 20 < keeps_texts(tokenizer, smallest, texts) < len(texts)
    assert {*tokenizer.all_special_tokens, *filter(BYTE.fullmatch, tokenizer.vocab)} <= smallest.vocab.keys()


@pytest.mark.parametrize("kind", EVERY)
def test_tokens_keep_their_order_and_special_tokens_around_a_text_get_their_new_ids(made, kind):
    tokenizer = made[kind]
    smaller = cut(tokenizer, LINES[:20])
    kept = sorted(smaller.vocab, key=smaller.vocab.get)
    assert kept == sorted(kept, key=tokenizer.vocab.get)
    for pair in (None, LINES[1]):
        before, after = tokenizer(LINES[0], pair), smaller(LINES[0], pair)
        assert after.tokens() == before.tokens() == smaller.convert_ids_to_tokens(after["input_ids"])
        assert smaller.decode(after["input_ids"]) == tokenizer.decode(before["input_ids"])


def test_ids_in_the_rules_of_a_tokenizer_follow_their_tokens():
    pieces = [("a", -1.0), ("b", -2.0), ("ab", -0.5), ("ba", -9.0), ("<unk>", 0.0), ("</s>", 0.0), ("<pad>", 0.0)]
    late = Tokenizer(models.Unigram(pieces, unk_id=4))
    late.add_special_tokens(["</s>", "<pad>"])
    late.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 5)])
    late.enable_padding(pad_id=6, pad_token="<pad>", length=6)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=late, eos_token="</s>", pad_token="<pad>")
    kept = ["a", "b", "ba", "<unk>", "</s>", "<pad>"]
    smaller = cut_tokenizer(tokenizer, json.loads(tokenizer.backend_tokenizer.to_str()), kept)
    assert smaller.vocab == {token: index for index, token in enumerate(kept)}
    assert smaller.backend_tokenizer.encode("abx").ids == [0, 1, 3, 4, 5, 5]


@pytest.mark.parametrize("kind", EVERY)
def test_it_reloads_without_us(made, kind, tmp_path):
    smaller = cut(made[kind], LINES[:20])
    smaller.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*LINES, *noise(50)]
    assert type(again) is type(smaller) and again(texts)["input_ids"] == smaller(texts)["input_ids"]
    assert again.pad_token_id == smaller.pad_token_id and again.model_max_length == smaller.model_max_length


def test_padding_and_truncation_that_a_tokenizer_came_with_stay(made):
    tokenizer = made[wordpiece]
    tokenizer(LINES[:3], padding="max_length", truncation=True, max_length=12)
    before = tokenizer(LINES[:3], padding="max_length", truncation=True, max_length=12)["input_ids"]
    after = cut(tokenizer, LINES[:3])
    again = after(LINES[:3], padding="max_length", truncation=True, max_length=12)["input_ids"]
    assert [after.convert_ids_to_tokens(ids) for ids in again] == [
        tokenizer.convert_ids_to_tokens(ids) for ids in before
    ]


def test_tokenizers_of_real_models_keep_the_texts_whose_tokens_stay(shared_models):
    for name in ("minilm-l6", "stories260K", "llama-7m"):
        tokenizer = AutoTokenizer.from_pretrained(shared_models(name))
        smaller = cut(tokenizer, LINES[::2])
        assert sorted(smaller.vocab.values()) == list(range(len(smaller))) and len(smaller) < len(tokenizer)
        assert keeps_texts(tokenizer, smaller, [*LINES, *noise()]) > len(LINES[::2])
    folder = shared_models("tokenizers")
    merges = [tuple(line.split()) for line in (folder / "gpt2-vocab.bpe").read_text().splitlines()[1:]]
    vocab = json.loads((folder / "roberta-base-vocab.json").read_text())
    tokenizer = RobertaTokenizer(vocab=vocab, merges=merges)
    smaller = cut(tokenizer, LINES[::2])
    assert keeps_texts(tokenizer, smaller, [*LINES, *noise()]) > len(LINES[::2]) and len(smaller) < 0.2 * len(tokenizer)


# The model


def classifier(build, tokenizer):
    """Return a model with more embeddings than tokens."""
    config = build().config
    config.update({"vocab_size": len(tokenizer) + 5, "pad_token_id": tokenizer.pad_token_id})
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    set_pad_token(model, tokenizer)
    return model


def language_model(tied, tokenizer, bias=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        **{**tiny.SHAPE, "vocab_size": len(tokenizer)}, num_key_value_heads=2, tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=[tokenizer.eos_token_id, tokenizer.unk_token_id],
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(len(tokenizer)))
    set_pad_token(model, tokenizer)
    return model


def loader(tokenizer, texts, batch_size=4):
    def collate(rows):
        batch = tokenizer(rows, padding=True, truncation=True, max_length=40, return_tensors="pt")
        return {**batch, "labels": torch.zeros(len(rows), dtype=torch.long)}

    return DataLoader(texts, batch_size, collate_fn=collate)


def prune(model, stage, data, epochs=0):
    module = FineTune(model, training=Training(learning_rate=1e-2))
    tiny.trainer(stage, epochs=epochs).fit(module, data)
    return model.eval()


@torch.no_grad()
def logits(model, tokenizer, text):
    return model(**tokenizer(text, return_tensors="pt")).logits


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        *((tiny.bert, kind) for kind in (wordpiece, unigram)),
        *((tiny.roberta, kind) for kind in ("xlm_roberta", byte_level)),
        (tiny.llama, byte_fallback),
    ],
)
def test_a_classifier_gives_the_same_logits_and_reloads_without_us(made, build, kind, tmp_path):
    tokenizer = made[kind]
    model = classifier(build, tokenizer)
    texts = SHORT
    expected = [logits(model, tokenizer, text) for text in texts]
    stage = PruneVocab(tokenizer=tokenizer)
    prune(model, stage, loader(tokenizer, texts))
    assert stage.tokenizer is not tokenizer
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == len(stage.tokenizer)
    model.save_pretrained(tmp_path)
    stage.tokenizer.save_pretrained(tmp_path)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    again = AutoTokenizer.from_pretrained(tmp_path)
    set_pad_token(reloaded, again)
    for text, before in zip(texts, expected):
        assert torch.equal(logits(model, stage.tokenizer, text), before)
        assert torch.allclose(logits(reloaded, again, text), before, atol=1e-6)
    assert limit_length(reloaded, again, 100) == limit_length(model, tokenizer, 100)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_gives_the_tokens_that_stay_the_same_logits(made, tied, bias, tmp_path):
    tokenizer = made["llama"]
    model = language_model(tied, tokenizer, bias)
    texts = SHORT
    expected = [logits(model, tokenizer, text) for text in texts]
    stage = PruneVocab(tokenizer=tokenizer)
    prune(model, stage, loader(tokenizer, texts))
    smaller = stage.tokenizer
    old = [tokenizer.vocab[token] for token in sorted(smaller.vocab, key=smaller.vocab.get)]
    for text, before in zip(texts, expected):
        assert torch.allclose(logits(model, smaller, text), before[..., old], atol=1e-6)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.lm_head.out_features == len(smaller) == model.config.vocab_size
    if bias:
        return  # Llama's config has no such setting
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(logits(reloaded, smaller, texts[0]), logits(model, smaller, texts[0]), atol=1e-6)


def test_the_tokens_that_configs_name_get_their_new_ids(made):
    tokenizer = made[whole_words]
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2))
    last = tokenizer.vocab["Ġsparsity"]
    model.config.eos_token_id = model.generation_config.eos_token_id = [last, 2]
    model.config.bos_token_id = 50256  # of another vocabulary
    model.config.pad_token_id = tokenizer.pad_token_id
    stage = PruneVocab(tokenizer=tokenizer)
    prune(model, stage, loader(tokenizer, ["a"]))
    ids = [stage.tokenizer.vocab["Ġsparsity"], 2]
    assert ids[0] < last and model.config.eos_token_id == model.generation_config.eos_token_id == ids
    assert model.config.bos_token_id is None and model.config.pad_token_id == stage.tokenizer.pad_token_id


def test_the_row_that_is_padding_moves_with_its_token(made):
    tokenizer = made[whole_words]
    model = classifier(tiny.llama, tokenizer)
    embeddings = model.get_input_embeddings()
    embeddings.padding_idx = model.config.pad_token_id = tokenizer.vocab["Ġsparsity"]
    stage = PruneVocab(tokenizer=tokenizer)
    prune(model, stage, loader(tokenizer, ["a"]))
    assert model.get_input_embeddings().padding_idx == stage.tokenizer.vocab["Ġsparsity"]


def test_a_model_that_counts_positions_from_a_padding_id_that_would_change_is_refused(made):
    tokenizer = made[whole_words]
    last = tokenizer.vocab["Ġsparsity"]
    model = RobertaForSequenceClassification(
        RobertaConfig(
            **{**tiny.SHAPE, "vocab_size": len(tokenizer)}, max_position_embeddings=last + 40, pad_token_id=last
        )
    )
    with pytest.raises(UserError, match=f"`roberta` counts positions from .* change from {last} to"):
        prune(model, PruneVocab(tokenizer=tokenizer), loader(tokenizer, ["a"]))


# Kept tokens


def tokens_of(stage, model, tokenizer, texts=("the sparsity",), **kwargs):
    prune(model, stage, loader(tokenizer, list(texts)), **kwargs)
    return set(stage.tokenizer.vocab)


def test_rare_tokens_go_and_kept_texts_stay(made, tmp_path):
    tokenizer = made[wordpiece]
    file = tmp_path / "keep.txt"
    file.write_bytes("\ufeffmemory\r\n\u2028cached\n".encode())
    assert len(tokenizer.tokenize("the model artifact memory cached")) < 12

    def left(**settings):
        stage = PruneVocab(tokenizer=tokenizer, **settings)
        return tokens_of(stage, classifier(tiny.bert, tokenizer), tokenizer, ["the the model", "the task"])

    twice, once = left(min_count=2), left()
    assert "the" in twice and not {"model", "task"} & twice and {"the", "model", "task"} <= once
    more = left(min_count=2, keep=["the model"], keep_file=str(file))
    assert more - twice == {*tokenizer.tokenize("model memory cached")} - twice and "model" in more


def test_a_file_of_kept_texts_is_utf_8_with_a_text_a_line(made, tmp_path):
    (tmp_path / "keep.txt").write_bytes("\ufeffé one\u2028two\n\n three\x0cfour\r\n".encode())
    assert PruneVocab(keep=["a"], keep_file=tmp_path / "keep.txt").keep == ["a", "é one\u2028two", " three\x0cfour"]
    (tmp_path / "keep.txt").write_bytes(b"\xe9")
    with pytest.raises(UserError, match="keep.txt could not be read as text .line 1 is not UTF-8 but perhaps CP1252"):
        PruneVocab(keep_file=tmp_path / "keep.txt")


def test_the_rows_of_a_datamodule_are_read_and_no_other_split(made):
    tokenizer = made[wordpiece]
    model = classifier(tiny.bert, tokenizer)

    def split(text):
        return Dataset.from_dict({"text": [text], "label": [0]})

    task = SimpleNamespace(kind="multiclass", name="none", rows=None, stride=None)
    splits = SimpleNamespace(train=split("the model"), validation=split("task"), test=split("task"), task=task)
    data = TaskData(splits, tokenizer, max_length=16)
    stage = PruneVocab(tokenizer=tokenizer)
    prune(model, stage, data)
    assert {"the", "model"} <= stage.tokenizer.vocab.keys() and "task" not in stage.tokenizer.vocab


def test_what_was_trained_before_is_what_is_cut(made):
    tokenizer = made[wordpiece]
    trained, untrained = classifier(tiny.bert, tokenizer), classifier(tiny.bert, tokenizer)
    stage = PruneVocab(tokenizer=tokenizer)
    assert tokens_of(stage, trained, tokenizer, LINES[:8], epochs=1) == tokens_of(
        PruneVocab(tokenizer=tokenizer), untrained, tokenizer, LINES[:8]
    )
    index = stage.tokenizer.vocab[stage.tokenizer.tokenize(LINES[0])[0]]
    assert not torch.equal(trained.get_input_embeddings().weight[index], untrained.get_input_embeddings().weight[index])


def test_where_every_token_is_used_nothing_changes(made):
    tokenizer = made[wordpiece]
    model, first = classifier(tiny.bert, tokenizer), PruneVocab(tokenizer=tokenizer)
    prune(model, first, loader(tokenizer, LINES[:9]))
    second, before = PruneVocab(tokenizer=first.tokenizer), model.get_input_embeddings().weight.clone()
    prune(model, second, loader(first.tokenizer, LINES[:9]))
    assert second.tokenizer is first.tokenizer and torch.equal(model.get_input_embeddings().weight, before)


# Failures


def test_training_in_the_same_stage_is_refused():
    with pytest.raises(UserError, match=r"set technique=prune_vocab\+finetune"):
        PruneVocab(training=Training(epochs=1))


def test_without_a_tokenizer_it_says_what_is_missing():
    with pytest.raises(UserError, match=r"Pass the model's: PruneVocab\(tokenizer=...\)"):
        fit(tiny.bert(), PruneVocab())


def test_a_token_without_an_embedding_is_reported(made):
    tokenizer = made[wordpiece]
    model = tiny.bert()
    model.resize_token_embeddings(len(tokenizer) - 2, mean_resizing=False)
    last = max(tokenizer.vocab, key=tokenizer.vocab.get)
    with pytest.raises(UserError, match=r"and the model .* embeddings\. .*resize_token_embeddings"):
        prune(model, PruneVocab(tokenizer=tokenizer, keep=[last.removeprefix("##"), *LINES]), loader(tokenizer, ["a"]))


def test_tokenizers_that_cannot_be_cut_exactly_are_refused():
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(UserError, match="this tokenizer is WordLevel. Remove the stage"):
        PruneVocab(tokenizer=PreTrainedTokenizerFast(tokenizer_object=words))
    marked = Tokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    with pytest.raises(UserError, match="this tokenizer is BPE with such marks"):
        PruneVocab(tokenizer=PreTrainedTokenizerFast(tokenizer_object=marked))
    with pytest.raises(UserError, match="cuts fast tokenizers and `SimpleNamespace` is none"):
        PruneVocab(tokenizer=SimpleNamespace(is_fast=False))


@pytest.mark.parametrize("wrong", [{"min_count": 0}, {"keep": "word"}, {"keep_file": "no/such/file.txt"}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        PruneVocab(**wrong)
