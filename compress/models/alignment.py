"""Align a text's tokens of two tokenizers, so that two models can be compared where both have read the same characters.

A place is where a model predicts its next token. Places of two models are aligned if the text before them is the same:
in a conversation within one answer of the assistant, elsewhere within a block of text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from compress.tasks.chats import Encoded, encode_chat, shorten_chat
from compress.tasks.tokens import Batch

Places = list[tuple[int, int]]


class Aligned(NamedTuple):
    """A batch for the teacher, and the aligned places: the row, the student's and the teacher's token before each."""

    batch: Batch
    rows: Tensor
    ours: Tensor
    theirs: Tensor


class Aligner:
    """Give the teacher the texts of the student's batches in its own tokens.

    Args:
        tokenizer: the student's tokenizer.
        teacher: the teacher's tokenizer.
        rows: the student's tokens of the training split.
        texts: the same rows before tokenising; conversations have a column ``messages``.
        max_length: tokens that the teacher reads at most.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        rows: Dataset,
        texts: Dataset,
        max_length: int,
    ) -> None:
        self.tokenizer, self.teacher, self.max_length = tokenizer, teacher, max_length
        self.words = spell_tokens(tokenizer)
        self.their_words = spell_tokens(teacher)
        self.messages = texts["messages"] if "messages" in texts.column_names else None
        self.numbers = {tuple(ids): row for row, ids in enumerate(rows["input_ids"])} if self.messages else {}

    def __call__(self, batch: Batch) -> Aligned:
        """Return the batch for the teacher and the aligned places, on the CPU."""
        ids, places = [], []
        mask = batch["attention_mask"].bool().cpu()
        for row, tokens in enumerate(batch["input_ids"].cpu()):
            found, pairs = self._align_row(tokens[mask[row]].tolist())
            ids.append({"input_ids": found, "attention_mask": [1] * len(found)})
            places += [(row, *pair) for pair in pairs]
        padded = self.teacher.pad(ids, padding_side="right", return_tensors="pt")
        columns = torch.tensor(places, dtype=torch.long).reshape(-1, 3).unbind(1)
        return Aligned({name: padded[name] for name in ("input_ids", "attention_mask")}, *columns)

    def map_vocabularies(self) -> tuple[Tensor, Tensor]:
        """Return the events of :func:`map_tokens` for the student's tokens and the teacher's."""
        ends = [(self.tokenizer.eos_token_id, self.teacher.eos_token_id)]
        if self.messages:
            both = (encode_chat(each, self.messages[0]) for each in (self.tokenizer, self.teacher))
            ours, theirs = (encoded.ids[encoded.answers[-1][1] - 1] for encoded in both)
            special = not (self.words[ours] or self.their_words[theirs])
            ends = [(ours, theirs)] if special else []
        return map_tokens(self.words, self.their_words, [pair for pair in ends if None not in pair])

    def _align_row(self, ids: list[int]) -> tuple[list[int], Places]:
        if self.messages is None:
            return self._align_text(ids)
        messages = self.messages[self.numbers[tuple(ids)]]
        ours = shorten_chat(encode_chat(self.tokenizer, messages), len(ids))
        theirs = shorten_chat(encode_chat(self.teacher, messages), self.max_length)
        return theirs.ids, align_answers(self._spell(ours, self.words), self._spell(theirs, self.their_words))

    def _align_text(self, ids: list[int]) -> tuple[list[int], Places]:
        own = [self.words[i] for i in ids]
        text = b"".join(own).decode(errors="ignore")
        found = self.teacher(text, truncation=True, max_length=self.max_length)["input_ids"]
        # The last token predicts nothing here, and before the first there is no text.
        other = [self.their_words[i] for i in found]
        pairs = [(i - 1, j - 1) for i, j in align_ends(own, other) if i and j]
        return found or [self.teacher.pad_token_id or 0], pairs

    @staticmethod
    def _spell(encoded: Encoded, words: Sequence[bytes]) -> list[tuple[int, list[bytes]]]:
        return [(start, [words[i] for i in encoded.ids[start:stop]]) for start, stop in encoded.answers]


def align_answers(ours: list[tuple[int, list[bytes]]], theirs: list[tuple[int, list[bytes]]]) -> Places:
    """Return the aligned places of two models' answers, each its first token's place and its tokens as bytes."""
    return [
        (start + i - 1, other + j - 1)
        for (start, own), (other, words) in zip(ours, theirs)
        for i, j in align_ends(own, words)
        if start + i and other + j
    ]


def align_ends(ours: Sequence[bytes], theirs: Sequence[bytes]) -> Places:
    """Return the numbers of tokens after which both have spelt the same text, the last token left out; (0, 0) first.

    A space at the beginning does not count: some tokenizers add one.

        align_ends([b"ab", b"c", b""], [b" a", b"b", b"c", b""]) == [(0, 0), (1, 2), (2, 3)]
    """
    texts = [b"".join(tokens).lstrip(b" ") for tokens in (ours, theirs)]
    same = min(map(len, texts))
    if texts[0][:same] != texts[1][:same]:
        return [(0, 0)]  # a tokenizer changes the text, so that ends say nothing
    mine, other = find_ends(ours), find_ends(theirs)
    return [(mine[end], other[end]) for end in mine if end in other]


def find_ends(tokens: Sequence[bytes]) -> dict[int, int]:
    """Return after how many tokens the text has each of its lengths in bytes, without a space at its beginning."""
    ends, text = {0: 0}, b""
    for count, token in enumerate(tokens[:-1], start=1):
        text += token
        ends.setdefault(len(text.lstrip(b" ")), count)
    return ends


def spell_tokens(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """Return the bytes that each token adds to a text; none for special tokens."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    bytewise = "ByteLevel" in json.dumps([rules["decoder"], rules["pre_tokenizer"]])
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    special = {place for place, token in tokenizer.added_tokens_decoder.items() if token.special}
    words = []
    for place, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        words.append(b"" if place in special or token is None else spell_token(token, letters if bytewise else None))
    return words


def spell_token(token: str, letters: dict[str, int] | None) -> bytes:
    """Return a token's bytes: those that its ``letters`` stand for, or else its text with ``▁`` for a space."""
    if letters is not None:
        return bytes(letters[x] for x in token) if all(x in letters for x in token) else token.encode()
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def map_tokens(
    ours: Sequence[bytes], theirs: Sequence[bytes], ends: Sequence[tuple[int, int]] = ()
) -> tuple[Tensor, Tensor]:
    """Return the event that each token of two vocabularies is, counted from 0: its longest beginning that is a token of
    both, or the last event if it has none.

    A token of one vocabulary may be several of the other; what both say of the text is how it begins.

    Args:
        ours: bytes of one vocabulary's tokens, b"" for special ones.
        theirs: of the other's.
        ends: pairs of special tokens with one meaning, such as the end of a turn.
    """
    common = {word: event for event, word in enumerate(sorted({*ours} & {*theirs} - {b""}))}
    rest = len(common) + len(ends)

    def find_event(word: bytes) -> int:
        beginnings = (word[:length] for length in range(len(word), 0, -1))
        return next((common[part] for part in beginnings if part in common), rest)

    sides = []
    for side, words in enumerate((ours, theirs)):
        events = torch.tensor([find_event(word) for word in words])
        for number, pair in enumerate(ends):
            events[pair[side]] = len(common) + number
        sides.append(events)
    return sides[0], sides[1]
