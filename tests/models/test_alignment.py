"""Tokens of two tokenizers are compared where both have read the same characters."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress.maths.losses import common_loss, universal_loss
from compress.models.alignment import Aligner, align_ends, find_common_words, find_event, spell_token, spell_tokens
from compress.models.backbone import train_tokenizer
from compress.tasks.chats import SIMPLE, cut_chat, encode_chat

CHAT = [{"role": "user", "content": "is the soup good ?"}, {"role": "assistant", "content": "yes , the soup is good ."}]


def trained(size, text="is the soup good ? yes , the soup is good . user: assistant:"):
    tokenizer = train_tokenizer([text] * 3, LlamaConfig(vocab_size=size))
    tokenizer.chat_template = SIMPLE
    return tokenizer


def align(ours, theirs):
    """Return the aligner of two tokenizers for text."""
    return Aligner(ours, theirs, Dataset.from_dict({"input_ids": [[1]]}), Dataset.from_dict({"text": [""]}), 100)


def spaced():
    """Return a tokenizer that marks spaces, as Llama's does, and has a byte token."""
    words = ["<unk>", "<0x2C>", "▁is", "▁the", "▁soup", "▁good", "▁?", "▁yes", "▁", ".", "▁so", "up"]
    rules = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    rules.pre_tokenizer, rules.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=rules, unk_token="<unk>")


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([b"ab", b"c", b""], [b" a", b"b", b"c", b""], [(1, 2, b""), (2, 3, b"")]),
        ([b"abc", b""], [b"a", b"bc", b""], [(0, 0, b""), (1, 2, b"")]),
        ([b"a", b"b", b"cd", b""], [b"abc", b"d", b""], [(0, 0, b""), (1, 0, b"a"), (2, 0, b"ab"), (3, 2, b"")]),
        ([b"a", b"b", b""], [b" ab", b""], [(1, 0, b" a"), (2, 1, b"")]),
        ([b"a", b"b"], [b"a", b"b"], [(0, 0, b""), (1, 1, b"")]),  # after the last token nothing is predicted
        ([b"a", b"b", b"c"], [b"a", b"b"], [(0, 0, b""), (1, 1, b""), (2, 1, b"b")]),  # one was cut
        ([b"A", b"b", b""], [b"a", b"b", b""], []),  # one writes in lower case
        ([b"\xc3", b"\xa9", b""], [b"\xc3\xa9", b""], [(0, 0, b""), (1, 0, b"\xc3"), (2, 1, b"")]),
    ],
)
def test_places_are_aligned_by_the_bytes_before_them(ours, theirs, expected):
    assert align_ends(ours, theirs) == expected


def test_tokens_are_spelt_as_bytes():
    words = spell_tokens(spaced())
    assert words[1:4] == [b",", b" is", b" the"] and words[0] == b""
    assert spell_token("Ġé", None) != spell_token("Ã©", {"Ã": 0xC3, "©": 0xA9}) == "é".encode()
    made = trained(300)
    ids = made("the soup is good")["input_ids"]
    spelt = spell_tokens(made)
    assert b"".join(spelt[i] for i in ids) == b" the soup is good"


def test_a_token_is_its_longest_beginning_that_both_vocabularies_have():
    common = find_common_words([b"", b"a", b"b", b"ab", b"abc", b"q"], [b"ab", b"", b"z", b"a", b"abd"])
    assert common == {b"a": 0, b"ab": 1}
    assert [find_event(word, common, 9) for word in (b"a", b"ab", b"abc", b"ac", b"q", b"")] == [0, 1, 1, 0, 9, 9]


def test_inside_a_token_of_the_teacher_its_other_tokens_say_how_the_word_goes_on():
    aligner = align(trained(263), trained(300))
    probabilities = torch.full((2, len(aligner.their_events)), 1e-9)
    for word, probability in ((b" soup", 0.3), (b" is", 0.1), (b" the", 0.6)):
        probabilities[:, aligner.their_words.index(word)] = probability
    inside, before = aligner.expect_events(probabilities, [b" s", b""])
    assert inside[find_event(b"oup", aligner.common, -1)].item() == pytest.approx(1.0, abs=1e-4)
    assert before[find_event(b" the", aligner.common, -1)].item() >= 0.6 and before.sum().item() == pytest.approx(1)


def test_every_place_of_a_conversation_has_read_the_same_answer():
    ours, theirs = trained(263), trained(300)
    texts = Dataset.from_list([{"text": "", "messages": CHAT}] * 2)
    ids, labels, _ = cut_chat(encode_chat(ours, CHAT), 200)
    aligner = Aligner(ours, theirs, Dataset.from_dict({"input_ids": [ids] * 2}), texts, 200)
    batch = {"input_ids": torch.tensor([ids, ids]), "attention_mask": torch.ones(2, len(ids), dtype=torch.long)}
    aligned = aligner(batch)
    assert aligned.batch["input_ids"].shape[1] < len(ids)  # a larger vocabulary has longer tokens
    assert len(aligned.rows) and set(aligned.rows.tolist()) == {0, 1}
    for row, place, other, ahead in zip(*aligned[1:]):
        read = ours.decode(ids[: place + 1]), theirs.decode(aligned.batch["input_ids"][row, : other + 1])
        assert read[0] == read[1] + ahead.decode()
        assert labels[place + 1] != -100
    assert len(aligned.rows) == sum(label != -100 for label in labels) * 2  # every token of the answers
    assert 0 < len(aligned.select_same().rows) < len(aligned.rows)
    end = aligner.events[ours.eos_token_id]
    assert end == aligner.their_events[theirs.eos_token_id] and (aligner.events == end).sum() == 1


def test_blocks_of_text_are_aligned_too():
    ours, theirs = trained(263), trained(300)
    ids = ours("yes , the soup is good . is the soup good ?")["input_ids"]
    aligner = align(ours, theirs)
    batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    aligned = aligner(batch).select_same()
    assert len(aligned.ours) > 5
    for place, other in zip(aligned.ours, aligned.theirs):
        assert ours.decode(ids[: place + 1]) == theirs.decode(aligned.batch["input_ids"][0, : other + 1])


def test_a_model_compared_with_itself_in_other_tokens_of_one_text_has_no_distance():
    """The logits of one model at aligned places are the same rows, so that the losses vanish."""
    tokenizer = trained(263)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=263, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).eval()
    ids = tokenizer("yes , the soup is good .")["input_ids"]
    aligner = align(tokenizer, tokenizer)
    batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    aligned = aligner(batch)
    assert aligned.ahead == [b""] * len(aligned.ours)
    ours = model(**batch).logits[aligned.rows, aligned.ours]
    theirs = model(**aligned.batch).logits[aligned.rows, aligned.theirs]
    target = aligner.expect_events(theirs.softmax(-1), aligned.ahead)
    assert common_loss(ours, target, aligner.events, 1.0).item() == pytest.approx(0, abs=1e-5)
    assert universal_loss(ours, theirs, 1.0).item() == pytest.approx(0, abs=1e-5)
