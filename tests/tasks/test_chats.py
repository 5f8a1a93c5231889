"""Conversations are read as data sets write them, and only the assistant's words are learnt."""

import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from compress.errors import UserError
from compress.tasks import toy_chat
from compress.tasks.chats import SIMPLE, ChatError, choose_template, cut_chat, encode_chat
from compress.tasks.kinds import KINDS
from compress.tasks.splits import load_splits
from compress.tasks.task import Task
from compress.tasks.tokens import TaskData

VOCABULARY = [
    *("<unk>", "<s>", "</s>", "<pad>", "<|turn|>", "<|end|>", ":", "system", "user", "assistant", "be", "brief"),
    *(f"w{i}" for i in range(20)),
    "default",
]
USER, ANSWER = {"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4 w5"}
CHAT = [USER, ANSWER, {"role": "user", "content": " w3"}, {"role": "assistant", "content": "w3 "}]
SYSTEM = {"role": "system", "content": "be brief"}
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|turn|> system default <|end|>\n{% endif %}"
    "<|turn|> {{ message['role'] }} {{ message['content'] }} <|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|> assistant {% endif %}"
)
TAGGED = (
    "{% for message in messages %}<|turn|> {{ message['role'] }} {% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }} <|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }} <|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|> assistant {% endif %}"
)
STRICT = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "<|turn|> {{ message['role'] }} {{ message['content'] }} <|end|>{% endfor %}"
)
HIDING = (
    "{% for m in messages if m['role'] != 'system' %}<|turn|> {{ m['role'] }} {{ m['content'] }} <|end|>{% endfor %}"
)
CHANGING = "{{ messages | length }} " + CHATML


@pytest.fixture(scope="module")
def made():
    rules = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    made = PreTrainedTokenizerFast(tokenizer_object=rules, **tokens)
    made.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|end|>"]})
    return made


def learnt(tokenizer, messages, max_length=1000):
    ids, labels, _ = cut_chat(encode_chat(tokenizer, messages), max_length)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    return tokenizer.convert_ids_to_tokens([label for label in labels if label != -100])


@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|end|>"), (TAGGED, "<|end|>"), (SIMPLE, "</s>"), (STRICT, "<|end|>")]
)
@pytest.mark.parametrize("system", [False, True])
def test_the_labels_are_the_assistants_words_and_the_end_of_its_turns(made, template, end, system):
    made.chat_template = template
    messages = [SYSTEM, *CHAT] if system and template != STRICT else CHAT
    assert learnt(made, messages) == ["w3", "w4", "w5", end, "w3", end]


def test_an_opening_of_the_assistant_is_learnt_though_nothing_was_asked(made):
    made.chat_template = CHATML
    assert learnt(made, [ANSWER, *CHAT]) == ["w3", "w4", "w5", "<|end|>"] * 2 + ["w3", "<|end|>"]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (STRICT, [USER, USER, ANSWER], r"refuses the conversation \(Roles must alternate user/assistant\); its roles"),
        (HIDING, [SYSTEM, *CHAT], "leaves out or changes the words of a turn of role `system`"),
        (CHANGING, CHAT, "renders the 2 first turns otherwise when others follow"),
        (
            "{% for m in messages %}{% generation %}{% endgeneration %}w1 w2 w3 w4 w5{% endfor %}",
            CHAT[:2],
            "marks nothing",
        ),
    ],
)
def test_a_conversation_that_a_template_cannot_show_is_refused(made, template, messages, message):
    made.chat_template = template
    with pytest.raises(ChatError, match=message):
        encode_chat(made, messages)


@pytest.mark.parametrize(
    ("length", "ids", "answers", "cut"),
    [(28, 28, 6, False), (27, 27, 6, False), (26, 17, 4, True), (17, 17, 4, True), (16, 16, 4, True), (3, 3, 3, True)],
)
def test_a_long_conversation_keeps_whole_turns(made, length, ids, answers, cut):
    made.chat_template = CHATML.replace("\n", " <pad>")  # the last token of a turn, which nobody has to write
    kept, labels, lost = cut_chat(encode_chat(made, CHAT), length)
    assert (len(kept), sum(label != -100 for label in labels), lost) == (ids, answers, cut)


def read(folder, rows, **settings):
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = [{split: f"{split}.jsonl" for split in ("train", "validation", "test")}]
    return load_splits(
        Task(
            name="t", kind="chat", metrics=["perplexity"], primary="perplexity", path=str(folder), files=files,
            **{"columns": {"text": "messages"}, **settings},
        )
    )  # fmt: skip


SHAREGPT = {"role": "from", "content": "value", "roles": {"human": "user", "gpt": "assistant"}}


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"messages": [USER, ANSWER]}, {}),
        ({"messages": [USER, ANSWER, USER]}, {}),  # nobody answers the last turn
        ({"messages": json.dumps([USER, ANSWER])}, {}),
        ({"messages": [{**USER, "content": [{"type": "text", "text": "w1 w2"}]}, ANSWER]}, {}),
        ({"q": "w1 w2", "a": "w3 w4 w5"}, {"columns": {"text": "q", "label": "a"}}),
        (
            {"turns": [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3 w4 w5"}]},
            {"columns": {"text": "turns"}, "messages": SHAREGPT},
        ),
    ],
)
def test_conversations_are_read_in_the_forms_that_data_sets_have(tmp_path, row, settings):
    splits = read(tmp_path, [row], **settings)
    assert splits.train[0] == {
        "text": "user: w1 w2\nassistant: w3 w4 w5", "messages": [USER, ANSWER], "origin": "train.jsonl, row 1"
    }  # fmt: skip


def test_neighbours_are_joined_and_a_system_turn_is_added_if_that_is_set(tmp_path):
    splits = read(tmp_path, [{"messages": [USER, USER, ANSWER]}], messages={"merge": True, "system": "be brief"})
    assert splits.train[0]["messages"] == [SYSTEM, {"role": "user", "content": "w1 w2\nw1 w2"}, ANSWER]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (
            [{"role": "narrator", "content": "w1"}],
            "the role `narrator` of message 1 is none of system, user, assistant",
        ),
        ([USER], "the conversation has no turn of the assistant, only user"),
        ([], "the conversation has no turn of the assistant, only no turn"),
        ([{"from": "user", "value": "w1"}], "message 1 has the keys from, value; `role` and `content` are expected"),
        ([{"role": "user", "content": {"a": 1}}], "message 1 holds `{'a': 1}`, which is no text"),
        ("w1 w2", "`w1 w2` is a text without an answer; messages are expected"),
        (3, "`3` is no list of messages"),
    ],
)
def test_a_bad_row_is_named_with_its_file(tmp_path, cell, message):
    with pytest.raises(UserError, match=f"^train.jsonl, row 2: {message}"):
        read(tmp_path, [{"messages": [USER, ANSWER]}, {"messages": cell}])


def test_a_row_that_the_models_template_refuses_is_named_with_its_file(tmp_path, made):
    made.chat_template = STRICT
    splits = read(tmp_path, [{"messages": CHAT}, {"messages": [USER, USER, ANSWER]}])
    with pytest.raises(
        UserError, match=r"^train.jsonl, row 2: the chat template refuses the conversation \(Roles must"
    ):
        KINDS["chat"].check_encoding(splits.train, made)


def test_a_tokenizer_without_a_template_needs_one(made):
    made.chat_template = None
    with pytest.raises(UserError, match="tokenizer has no chat template, .* Set task.template=simple"):
        choose_template(made, None)
    choose_template(made, "simple")
    assert made.chat_template == SIMPLE
    with pytest.raises(UserError, match="is written in Python"):
        choose_template(SimpleNamespace(is_fast=False), None)


@pytest.fixture
def data(tmp_path, made):
    made.chat_template = CHATML
    rows = [[SYSTEM, *CHAT[:2]], CHAT, [USER, {"role": "assistant", "content": "w7"}], [SYSTEM, *CHAT]]
    return TaskData(read(tmp_path, [{"messages": row} for row in rows * 3]), made, max_length=64, batch_size=4)


def test_a_batch_counts_the_assistants_tokens_only(data):
    batch = data.collate([data.tokenised("train")[i] for i in range(4)])
    kind = data.kind
    assert kind.count_examples(batch) == 4 + 6 + 2 + 6
    places = kind.mask_answers(batch, batch["labels"])
    assert torch.equal(places[:, :-1].bool(), batch["labels"][:, 1:] != -100)
    # A model that is sure of every token has a perplexity of 1, whatever it answers elsewhere.
    logits = torch.nn.functional.one_hot(batch["input_ids"].roll(-1, 1), len(VOCABULARY)) * 100.0
    logits[~places.bool()] = 0
    outputs, tokens = kind.keep_answers(logits, batch["labels"])
    assert tokens.tolist() == [4, 6, 2, 6] and outputs[:, 1].tolist() == [4, 6, 2, 6]
    assert torch.allclose(outputs[:, 0], torch.zeros(4), atol=1e-4)


def test_packed_conversations_have_positions_of_their_own(data):
    data.packs = True
    batches = list(data.train_dataloader())
    assert sum(data.kind.count_examples(batch).item() for batch in batches) == 3 * (4 + 6 + 2 + 6)
    for batch in batches:
        assert "attention_mask" not in batch and batch["input_ids"].shape[1] <= 64
        assert (batch["position_ids"] == 0).sum(1).min() > 1  # several begin in a line


def test_conversations_calibrate_a_language_model_in_their_template(tmp_path, data, made):
    lm = Task(name="l", kind="lm", metrics=["perplexity"], primary="perplexity", labels=())
    splits = data.splits
    own = TaskData(
        type(splits)(splits.train, splits.validation, splits.test, lm), made, 16, calibration_text=splits.train
    )
    (batch,) = own.calibration(2, 2)
    assert (batch["input_ids"] == made.convert_tokens_to_ids("<|turn|>")).any()


def test_the_toy_conversations_are_the_same_every_time_and_in_one_split():
    tables = toy_chat.generate_splits()
    assert tables == toy_chat.generate_splits()
    rows = [str(row) for table in tables.values() for row in table["messages"]]
    assert len(set(rows)) == len(rows) == sum(toy_chat.SIZES.values())
    chat = next(row for row in tables["train"]["messages"] if row[-2]["content"] == toy_chat.QUESTION)
    assert chat[-1]["role"] == "assistant" and any(
        chat[-1]["content"].count(m["content"].split()[1]) for m in chat[:-2]
    )


@pytest.mark.slow
def test_the_labels_of_a_real_tokenizer_are_the_supporters_words(shared_models, shared_data, tmp_path):
    gguf = shared_models("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(gguf, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    esconv = {"role": "speaker", "content": "text", "roles": {"usr": "user", "sys": "assistant"}, "merge": True}
    splits = load_splits(
        Task(
            name="t", kind="chat", metrics=["perplexity"], primary="perplexity", path=str(shared_data("esconv")),
            files=[{"train": "esc-valid.jsonl", "test": "esc-test.jsonl"}], columns={"text": "dialog"},
            messages=esconv, holdout={"validation": 0.1},
        )
    )  # fmt: skip
    for messages in splits.train["messages"]:
        _, labels, _ = cut_chat(encode_chat(tokenizer, messages), 4096)
        expected = "".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant")
        assert tokenizer.decode([label for label in labels if label != -100]) == expected
