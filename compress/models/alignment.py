"""Align a text's tokens of two tokenizers, so that two models can be compared where both have read the same characters.

A place is where a model predicts its next token. For each of the student's places, the teacher's is the last at which
it has read no more of the text: in a conversation of one answer of the assistant, elsewhere of a block of text. If the
student has read some characters more, it is inside a token of the teacher.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import islice, takewhile
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from compress.maths.losses import common_loss, sum_events, universal_loss
from compress.tasks.chats import Encoded, encode_chat, shorten_chat
from compress.tasks.tokens import Batch

Places = list[tuple[int, int, bytes]]


class Aligned(NamedTuple):
    """A batch for the teacher, and the aligned places: the row, the student's and the teacher's token before each, and
    the bytes that the student has read more."""

    batch: Batch
    rows: Tensor
    ours: Tensor
    theirs: Tensor
    ahead: list[bytes]

    def select_same(self) -> Aligned:
        """Return the places at which both have read the same."""
        same = torch.tensor([not part for part in self.ahead], dtype=torch.bool)
        rows, ours, theirs = (places[same] for places in (self.rows, self.ours, self.theirs))
        return Aligned(self.batch, rows, ours, theirs, [part for part in self.ahead if not part])


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
        self.spelt = sorted((word, place) for place, word in enumerate(self.their_words) if word)
        self.parts: dict[bytes, tuple[Tensor, Tensor]] = {}
        self.common = find_common_words(self.words, self.their_words)
        ends = self._find_ends()
        self.count = len(self.common) + len(ends) + 1
        """Number of events; the last is of all tokens without a common beginning."""
        self.events, self.their_events = (
            torch.tensor([find_event(word, self.common, self.count - 1) for word in words])
            for words in (self.words, self.their_words)
        )
        for number, (ours, theirs) in enumerate(ends, start=len(self.common)):
            self.events[ours] = self.their_events[theirs] = number

    def __call__(self, batch: Batch) -> Aligned:
        """Return the batch for the teacher and the aligned places, on the CPU."""
        ids, places = [], []
        mask = batch["attention_mask"].bool().cpu()
        for row, tokens in enumerate(batch["input_ids"].cpu()):
            found, pairs = self._align_row(tokens[mask[row]].tolist())
            ids.append({"input_ids": found, "attention_mask": [1] * len(found)})
            places += [(row, *pair) for pair in pairs]
        padded = self.teacher.pad(ids, padding_side="right", return_tensors="pt")
        rows, ours, theirs = torch.tensor([place[:3] for place in places], dtype=torch.long).reshape(-1, 3).unbind(1)
        ahead = [place[3] for place in places]
        return Aligned({name: padded[name] for name in ("input_ids", "attention_mask")}, rows, ours, theirs, ahead)

    def compare(self, student: Tensor, inputs: Batch, ask: Callable[[Batch], Any], loss: str, tau: float) -> Tensor:
        """Return the loss between the ``student``'s logits on the ``inputs`` and those that the teacher is asked for,
        at the temperature ``tau``: ``uld`` where both models have read the same, ``common`` everywhere."""
        aligned = self(inputs)
        if loss == "uld":
            aligned = aligned.select_same()
        theirs, ours = ask(aligned.batch).logits[aligned.rows, aligned.theirs], student[aligned.rows, aligned.ours]
        if loss == "uld":
            return universal_loss(ours, theirs, tau)
        probabilities = (theirs[:, : len(self.their_events)].float() / tau).softmax(-1)
        target = self.expect_events(probabilities, aligned.ahead)
        return common_loss(ours, target, self.events.to(student.device), tau)

    def _find_ends(self) -> list[tuple[int, int]]:
        """Return the tokens of both vocabularies that end an answer or a text, if each has one."""
        if not self.messages:
            pair = (self.tokenizer.eos_token_id, self.teacher.eos_token_id)
            return [] if None in pair else [pair]
        both = (encode_chat(each, self.messages[0]) for each in (self.tokenizer, self.teacher))
        ours, theirs = (encoded.ids[encoded.answers[-1][1] - 1] for encoded in both)
        return [] if self.words[ours] or self.their_words[theirs] else [(ours, theirs)]

    def expect_events(self, probabilities: Tensor, ahead: list[bytes]) -> Tensor:
        """Return the probabilities ``[places, events]`` of events after the student's
        places, from the teacher's ``[places, vocabulary]``: those of its tokens that begin with the bytes ``ahead``,
        for what follows these bytes."""
        expected = probabilities.new_zeros(len(probabilities), self.count)
        for part in set(ahead):
            rows = torch.tensor([i for i, other in enumerate(ahead) if other == part], device=probabilities.device)
            ids, events = (each.to(probabilities.device) for each in self._continue_part(part))
            expected[rows] = sum_events(probabilities[rows][:, ids], events, self.count)
        return expected / expected.sum(-1, keepdim=True).clamp(min=torch.finfo(expected.dtype).tiny)

    def _continue_part(self, part: bytes) -> tuple[Tensor, Tensor]:
        """Return the teacher's tokens that begin with ``part``, and the event of what follows it in each."""
        if part not in self.parts:
            if not part:
                self.parts[part] = torch.arange(len(self.their_events)), self.their_events
            else:
                first = bisect_left(self.spelt, (part, -1))
                after = takewhile(lambda entry: entry[0].startswith(part), islice(self.spelt, first, None))
                size, rest = len(part), self.count - 1
                longer = [(i, find_event(word[size:], self.common, rest)) for word, i in after if len(word) > size]
                ids, events = torch.tensor(longer, dtype=torch.long).reshape(-1, 2).unbind(1)
                self.parts[part] = ids, events
        return self.parts[part]

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
        pairs = [(i - 1, j - 1, ahead) for i, j, ahead in align_ends(own, other) if i and j]
        return found or [self.teacher.pad_token_id or 0], pairs

    @staticmethod
    def _spell(encoded: Encoded, words: Sequence[bytes]) -> list[tuple[int, list[bytes]]]:
        return [(start, [words[i] for i in encoded.ids[start:stop]]) for start, stop in encoded.answers]


def align_answers(ours: list[tuple[int, list[bytes]]], theirs: list[tuple[int, list[bytes]]]) -> Places:
    """Return the aligned places of two models' answers, each its first token's place and its tokens as bytes."""
    return [
        (start + i - 1, other + j - 1, ahead)
        for (start, own), (other, words) in zip(ours, theirs)
        for i, j, ahead in align_ends(own, words)
        if start + i and other + j
    ]


def align_ends(ours: Sequence[bytes], theirs: Sequence[bytes]) -> Places:
    """Return after how many tokens each has spelt the same text, or the student as little more as it must have, and the
    bytes that it has spelt more. The last token, after which nothing is predicted, is left out.

    Some tokenizers add a space at the beginning. Where only one does, it does not count, and the first tokens are not
    compared.

        align_ends([b"ab", b"c", b""], [b" a", b"b", b"c", b""]) == [(1, 2, b""), (2, 3, b"")]
        align_ends([b"a", b"bc", b""], [b"abc", b""]) == [(0, 0, b""), (1, 0, b"a"), (2, 1, b"")]
    """
    text, other = (b"".join(tokens) for tokens in (ours, theirs))
    spaces, start = len(text) - len(text.lstrip(b" ")), len(other) - len(other.lstrip(b" "))
    alike = spaces == start
    if alike:
        spaces = start = 0
    same = min(len(text) - spaces, len(other) - start)
    if text[spaces : spaces + same] != other[start : start + same]:
        return []  # a tokenizer changes the text, so that ends say nothing
    ends = find_ends(theirs, start)
    read = sorted(ends)
    places: Places = []
    for end, count in find_ends(ours, spaces).items():
        if end <= same and (end or alike):
            last = read[bisect_right(read, end) - 1]
            ahead = other[last + start if last else 0 : end + start] if last < end else b""
            places.append((count, ends[last], ahead))
    return places


def find_ends(tokens: Sequence[bytes], spaces: int) -> dict[int, int]:
    """Return after how many tokens the text has each of its lengths in bytes, without so many spaces before it."""
    ends, length = {0: 0}, -spaces
    for count, token in enumerate(tokens[:-1], start=1):
        length += len(token)
        if length > 0:
            ends.setdefault(length, count)
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


def find_common_words(ours: Sequence[bytes], theirs: Sequence[bytes]) -> dict[bytes, int]:
    """Return the tokens of both vocabularies as bytes, with the number of each."""
    return {word: number for number, word in enumerate(sorted({*ours} & {*theirs} - {b""}))}


def find_event(word: bytes, common: Mapping[bytes, int], rest: int) -> int:
    """Return the number of the longest beginning of a word that is in both vocabularies, or ``rest``. A token of one
    vocabulary may be several of the other; what both say of the text is how it begins."""
    beginnings = (word[:length] for length in range(len(word), 0, -1))
    return next((common[part] for part in beginnings if part in common), rest)
