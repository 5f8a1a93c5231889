"""A teacher writes the training texts, and goes on where a killed run stopped."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from test_alignment import trained

from compress.models.writing import Writer, read_written

ASKED = {"role": "user", "content": "is the soup good ?"}
GREETING = {"role": "assistant", "content": "yes"}
ANSWERED = {"role": "assistant", "content": "the soup"}


class Teacher(torch.nn.Module):
    """A model that continues every prompt with the same text."""

    def __init__(self, tokenizer, text):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.new = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id, 7]
        self.prompts = []

    def generate(self, input_ids, attention_mask, max_new_tokens, eos_token_id, **_):
        self.prompts += [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask)]
        new = torch.tensor([self.new[:max_new_tokens]] * len(input_ids))
        return torch.cat([input_ids, new], 1)


@pytest.fixture
def tokenizer():
    return trained(300)


def chats(*rows):
    return Dataset.from_list([{"text": "", "messages": list(row), "origin": ""} for row in rows])


def test_answers_are_the_teachers_to_its_own_conversation(tokenizer, tmp_path):
    teacher = Teacher(tokenizer, " yes , good")
    rows = chats([GREETING, ASKED, ANSWERED, ASKED, ANSWERED], [ASKED, ANSWERED])
    written = Writer(teacher, tokenizer, 20, 200).write_rows(rows, tmp_path / "w.jsonl", 2)
    answer = {"role": "assistant", "content": "yes , good"}
    assert written["messages"][:] == [[GREETING, ASKED, answer, ASKED, answer], [ASKED, answer]]
    assert written[1]["text"] == "user: is the soup good ?\nassistant: yes , good"
    longest = tokenizer.decode(max(teacher.prompts, key=len))
    assert "assistant: yes , good</s>" in longest and longest.endswith("assistant:")  # its own answer, then the next


def test_a_conversation_ends_where_an_answer_has_no_room(tokenizer, tmp_path):
    rows = chats([ASKED, ANSWERED, ASKED, ANSWERED])
    short = len(tokenizer.apply_chat_template([ASKED], add_generation_prompt=True)["input_ids"]) + 12
    teacher = Teacher(tokenizer, " good")
    written = Writer(teacher, tokenizer, 10, short).write_rows(rows, tmp_path / "w.jsonl", 2)
    assert written["messages"][0] == [ASKED, {"role": "assistant", "content": "good"}]
    kept = Writer(teacher, tokenizer, 10, 11).write_rows(rows, tmp_path / "v.jsonl", 2)
    assert kept["messages"][0] == rows["messages"][0]  # no room for any answer


def test_a_killed_run_goes_on_after_its_last_whole_row(tokenizer, tmp_path):
    file, rows = tmp_path / "w.jsonl", chats(*([ASKED, ANSWERED] for _ in range(5)))
    whole = Writer(Teacher(tokenizer, " good"), tokenizer, 20, 200).write_rows(rows, tmp_path / "whole.jsonl", 2)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines()
    file.write_text("\n".join(lines[:2]) + "\n" + lines[2][:9])
    assert len(read_written(file)) == 2
    teacher = Teacher(tokenizer, " good")
    again = Writer(teacher, tokenizer, 20, 200).write_rows(rows, file, 2)
    assert again.to_list() == whole.to_list() and len(teacher.prompts) == 3
    assert [json.loads(line) for line in file.read_text().splitlines()] == whole.to_list()


def test_documents_are_continued(tokenizer, tmp_path):
    rows = Dataset.from_dict({"text": ["the soup is good . yes , the soup is good", ""]})
    written = Writer(Teacher(tokenizer, " yes"), tokenizer, 4, 200).write_rows(rows, tmp_path / "w.jsonl", 2)
    assert written["text"][0].endswith(" yes") and "the soup" in written["text"][0]
    assert SimpleNamespace(**written[1]).text.strip() in ("", "yes")
