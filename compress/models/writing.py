"""Let a teacher write the texts that a student is trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from compress.tasks.chats import ASSISTANT, Message, encode_chat, render, transcribe
from compress.tasks.tokenizers import pad_left

Row = dict[str, Any]


class Writer:
    """Writes the answers of the assistant, or the continuation of documents, with a teacher.

    Kim and Rush, "Sequence-Level Knowledge Distillation", 2016, arXiv:1606.07947. Answers are the most likely
    continuation, token by token; documents are continued with tokens drawn from the teacher's probabilities, since the
    most likely text of a model without instructions repeats itself.

    Args:
        model: the teacher.
        tokenizer: its tokenizer.
        tokens: number of new tokens of an answer or a document at most.
        max_length: tokens of a whole conversation at most; a longer one ends before the answer that has no room.
        seed: seed of the drawn tokens.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, tokens: int, max_length: int, seed: int = 0
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.tokens, self.max_length, self.seed = tokens, max_length, seed

    def write_rows(self, rows: Dataset, file: Path, batch_size: int) -> Dataset:
        """Return the rows with the teacher's texts in place of the data's.

        Every batch is appended to ``file``, from which a later call goes on: a killed run loses one batch.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            written = read_written(file)
            starts = range(len(written), len(rows), batch_size)
            with file.open("a", encoding="utf-8") as into:
                for start in tqdm(starts, desc="teacher writes", unit="batch", leave=False, disable=None):
                    batch = list(rows.select(range(start, min(start + batch_size, len(rows)))))
                    torch.manual_seed(self.seed + start)
                    made = self._answer(batch) if "messages" in rows.column_names else self._continue(batch)
                    into.write("".join(json.dumps(row) + "\n" for row in made))
                    into.flush()
                    written += made
        return Dataset.from_list(written)

    def _answer(self, rows: list[Row]) -> list[Row]:
        """Return conversations whose answers are the teacher's, each to what was said before it, its own answers
        included. An opening of the assistant, to no question, stays as it is."""
        chats: list[list[Message]] = [[] for _ in rows]
        ended = [False] * len(rows)
        for turn in range(max(len(row["messages"]) for row in rows)):
            asked = []
            for i, row in enumerate(rows):
                if ended[i] or turn >= len(row["messages"]):
                    continue
                message = row["messages"][turn]
                if message["role"] == ASSISTANT and any(before["role"] == "user" for before in chats[i]):
                    asked.append(i)
                else:
                    chats[i].append(message)
            prompts = [self._encode_prompt(chats[i]) for i in asked]
            fitting = [n for n, prompt in enumerate(prompts) if len(prompt) + self.tokens <= self.max_length]
            for n in set(range(len(asked))) - set(fitting):
                ended[asked[n]] = True
            if fitting:
                ends = [self._find_end(rows[asked[n]]["messages"]) for n in fitting]
                answers = self._generate([prompts[n] for n in fitting], sorted(set(ends)), draws=False)
                for n, answer in zip(fitting, answers):
                    words = self.tokenizer.decode(answer, skip_special_tokens=True).strip()
                    chats[asked[n]].append({"role": ASSISTANT, "content": words})
        return [self._close(row, chat) for row, chat in zip(rows, chats)]

    def _close(self, row: Row, chat: list[Message]) -> Row:
        """Return a conversation up to its last answer; the data's own, if the teacher had no room for any."""
        last = max((i for i, message in enumerate(chat) if message["role"] == ASSISTANT), default=-1)
        messages = chat[: last + 1] if last >= 0 else row["messages"]
        return {**row, "messages": messages, "text": transcribe(messages)}

    def _encode_prompt(self, messages: list[Message]) -> list[int]:
        text = render(self.tokenizer, messages, prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _find_end(self, messages: list[Message]) -> int:
        """Return the token that ends a turn of the assistant."""
        encoded = encode_chat(self.tokenizer, messages)
        return encoded.ids[encoded.answers[-1][1] - 1]

    def _continue(self, rows: list[Row]) -> list[Row]:
        """Return documents of the first ``tokens`` tokens of the data's and as many of the teacher's."""
        texts = [row["text"] for row in rows]
        prompts = self.tokenizer(texts, truncation=True, max_length=self.tokens)["input_ids"]
        filled = [i for i, prompt in enumerate(prompts) if prompt]
        end = self.tokenizer.eos_token_id
        answers = self._generate([prompts[i] for i in filled], [] if end is None else [end], draws=True)
        for i, answer in zip(filled, answers):
            texts[i] = self.tokenizer.decode([*prompts[i], *answer], skip_special_tokens=True)
        return [{**row, "text": text} for row, text in zip(rows, texts)]

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], ends: list[int], draws: bool) -> Iterator[list[int]]:
        """Return the new tokens after each prompt, up to the first token of ``ends``."""
        device, filler = next(self.model.parameters()).device, self.tokenizer.pad_token_id or 0
        ids, mask = pad_left(prompts, filler, device)
        answer: Tensor = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=self.tokens,
            do_sample=draws,
            eos_token_id=ends or None,
            pad_token_id=filler,
        )
        for new in answer[:, ids.shape[1] :].tolist():
            stop = next((i for i, token in enumerate(new) if token in ends), len(new))
            yield new[:stop]


def read_written(file: Path) -> list[Row]:
    """Return the rows of a file of JSON lines that a killed process may have left. An unfinished last line is cut
    off."""
    if not file.is_file():
        return []
    content = file.read_text(encoding="utf-8")
    whole = content[: content.rfind("\n") + 1]
    if whole != content:
        file.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]
