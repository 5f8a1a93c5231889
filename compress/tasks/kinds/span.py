"""Extractive question answering: the answer is a part of a text."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import UserError
from compress.maths import scores
from compress.maths.answers import score_answer
from compress.tasks.adapting import adapt_forward
from compress.tasks.kinds.base import Answers, Kind, Metric
from compress.tasks.labels import Columns, LabelError, LabelledTask, Labels, is_blank

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

SHARE = 3
"""A window shares a third of its tokens with the next one, as the 128 of 384 of SQuAD's examples, and a question takes
at most another third."""
LONGEST = 30
"""The largest number of tokens of an answer; that of BERT's own script for SQuAD."""
ROW, START, STOP, NONE, OFFSETS = range(5)
"""Columns of a batch's labels; from OFFSETS on, the first characters of all tokens and then the ends of all tokens."""
OUTSIDE = -1
"""The offset of a token that is not in the context, and the place of no answer."""
BEGIN, END, EXACT, OVERLAP = range(4)
"""Columns of the outputs: the characters of the answer in its context, and its scores."""
QUESTIONS = ("who", "what", "when", "where", "which", "why", "how", "other")


class Span(Kind):
    """A question is answered by a part of its context, or by nothing.

    A long context is read in overlapping windows of ``max_length`` tokens, each with the question before it, and the
    answer is the likeliest part of all windows. If some questions of train have no answer, "none" is an answer: where
    every window gives its first token (the classifier's) more than any part. An example is a question.
    """

    name = "span"
    metrics = MappingProxyType(
        {
            "f1": Metric(scores.mean_value, lambda outputs: outputs[:, OVERLAP]),
            "exact_match": Metric(scores.mean_value, lambda outputs: outputs[:, EXACT], counts_examples=True),
        }
    )
    auto_class = "AutoModelForQuestionAnswering"
    has_own_head = True
    pipeline = "question-answering"
    example = '"Who wrote it?", "Ada wrote it."'
    lines = f"""\
output = model(**tokenizer({example}, return_tensors="pt"))
logits = torch.stack([output.start_logits, output.end_logits], dim=-1)
"""
    reading = f"""\
start, end = logits[0].argmax(0)  # with more care, from tokens of the text alone
answer = tokenizer.decode(tokenizer({example})["input_ids"][start : end + 1])
"""
    num_labels = 2
    probabilities = "positions"
    numbers_rows = True
    reads_windows = True
    slice_prefix = "question"

    # From a data set to labels

    def check_rows(self, table: Mapping[str, list[Any]], split: str) -> None:
        """Raise LabelError unless every answer is where its row says in its context."""
        if "text_pair" not in table:
            raise UserError("task.columns.text_pair is null; a question's context is expected. Set it to a column.")
        for row, (question, context, label) in enumerate(zip(table["text"], table["text_pair"], table["label"])):
            for text, start in () if label is None else read_answers(label, split, row):
                if reason := explain_misplaced(text, start, context):
                    raise LabelError(f"the question `{question[:60]}` {reason}", split, row)

    def read_labels(self, columns: Columns, names: tuple[str, ...] | None, bases: dict[str, int]) -> Labels:
        answers = {
            split: [None if label is None else read_answers(label, split, row) for row, label in enumerate(column)]
            for split, column in columns.items()
        }
        empty = {split: sum(each == [] for each in column) for split, column in answers.items()}
        optional = bool(empty.get("train"))
        notes = [
            f"{split}: {count:,} of {len(answers[split]):,} questions have no answer"
            + ("" if optional else ", and train has none of these, so that models always give an answer")
            for split, count in empty.items()
            if count
        ]
        read = {
            split: [
                None if each is None else
                {
                    "text": [text for text, _ in each],
                    "answer_start": [OUTSIDE if start is None else start for _, start in each],
                    "may_be_empty": optional,
                }
                for each in column
            ]
            for split, column in answers.items()
        }  # fmt: skip
        return Labels(read, names, tuple(notes))

    def is_missing(self, label: Any) -> bool:
        return label is None

    def encode(self, task: LabelledTask, labels: list[Any], split: str) -> list[Any]:
        return labels

    # From texts to batches

    def tokenise(self, rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        """Return the input columns of all windows; of questions with answers also ``row`` and ``labels``."""
        if "text_pair" not in rows:
            return super().tokenise(rows, tokenizer, max_length)
        check_windows(tokenizer, max_length)
        questions = cut_questions(rows["text"], tokenizer, max_length // SHARE)
        contexts = rows["text_pair"]
        encoded = tokenizer(
            questions,
            contexts,
            truncation="only_second",
            max_length=max_length,
            stride=max_length // SHARE,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        columns = dict(encoded)
        offsets, sources = columns.pop("offset_mapping"), columns.pop("overflow_to_sample_mapping")
        if "label" not in rows:
            return columns
        labels = []
        for window, source in enumerate(sources):
            inside = [part == 1 for part in encoded.sequence_ids(window)]
            spans = [
                span if here and span[0] < span[1] else (OUTSIDE,) * 2 for span, here in zip(offsets[window], inside)
            ]
            none = find_first_token(columns["input_ids"][window], tokenizer)
            place = locate_answer(rows["label"][source], contexts[source])
            start, stop = place_answer(place, spans) or (none, none)
            begins, ends = zip(*spans)
            labels.append([rows["row"][source], start, stop, none, *begins, *ends])
        return {**columns, "labels": labels, "row": [rows["row"][source] for source in sources]}

    def collate(self, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        """Return the padded batch; ``labels`` are ``[batch, 4 + 2 tokens]``: the row of the question, the first and the
        last token of the answer, the token that stands for none, and the characters that each token covers."""
        import torch

        own = ("labels", "row")
        batch = super().collate([{key: row[key] for key in row if key not in own} for row in rows], tokenizer)
        if "labels" not in rows[0]:
            return batch
        tokens = batch["input_ids"].shape[1]
        labels = torch.full((len(rows), OFFSETS + 2 * tokens), OUTSIDE)
        for into, row in zip(labels, rows):
            label = torch.tensor(row["labels"])
            length = (len(label) - OFFSETS) // 2
            into[:OFFSETS] = label[:OFFSETS]
            into[OFFSETS : OFFSETS + length] = label[OFFSETS : OFFSETS + length]
            into[OFFSETS + tokens : OFFSETS + tokens + length] = label[OFFSETS + length :]
        return {**batch, "labels": labels}

    def make_labels(self, inputs: dict[str, Tensor]) -> Tensor:
        from torch.nn.functional import one_hot

        return self.choose_labels(one_hot(inputs["input_ids"] % 2).float(), inputs)

    def choose_labels(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        import torch

        if "attention_mask" in inputs:
            logits = logits.masked_fill(inputs["attention_mask"][..., None] == 0, float("-inf"))
        start, stop = logits.argmax(1).unbind(-1)
        nothing = torch.full_like(start, OUTSIDE)
        return torch.stack([nothing, start, stop, nothing], dim=1)

    # From batches to a model's answers, and to scores

    def adapt_class(self, base: Any) -> Any:
        return adapt_span_class(base)

    def keep_answers(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best answer of every window, and the rows of the questions, ``[windows]``.

        An answer is ``[windows, 4]``: its score, the characters in the context where it begins and ends, and the score
        of no answer. Scores are sums of two logits, and NaN if a logit of the context is not finite.
        """
        import torch

        logits, tokens = logits.float(), logits.shape[1]
        begins, ends = labels[:, OFFSETS:].split(tokens, dim=1)
        inside = begins != OUTSIDE
        broken = ~(logits.isfinite().all(-1) | ~inside).all(1)
        lowest = torch.finfo(logits.dtype).min / 4
        start, stop = logits.nan_to_num().masked_fill(~inside[..., None], lowest).unbind(-1)
        best, first, last = torch.full_like(start[:, 0], lowest * 3), labels[:, NONE].clone(), labels[:, NONE].clone()
        for length in range(min(LONGEST, tokens)):
            score, at = (start[:, : tokens - length] + stop[:, length:]).max(1)
            better = score > best
            best, first = best.where(~better, score), first.where(~better, at)
            last = last.where(~better, at + length)
        none = logits.gather(1, labels[:, NONE, None, None].expand(-1, 1, 2)).sum((1, 2))
        begin, end = (places.gather(1, at[:, None])[:, 0].float() for places, at in ((begins, first), (ends, last)))
        answers = torch.stack([best, begin, end, none], dim=1)
        return answers.masked_fill(broken[:, None], float("nan")), labels[:, ROW]

    def collect_answers(self, outputs: np.ndarray, labels: np.ndarray, rows: Dataset | None) -> Answers:
        """Return for every question the answer's place and its two scores, ``[questions, 4]``, and the place of the
        first true answer and the index of the question's word in ``QUESTIONS``, ``[questions, 3]``."""
        assert rows is not None, "answers are scored as text, which the rows of the split have"
        answered = np.unique(labels)
        found, truth = np.full((len(answered), 4), np.nan), np.full((len(answered), 3), OUTSIDE)
        windows = np.split(outputs[labels.argsort(kind="stable")], np.searchsorted(np.sort(labels), answered)[1:])
        asked = rows.select(answered)
        each = zip(asked["text"], asked["text_pair"], asked["label"], windows)
        for i, (question, context, label, parts) in enumerate(each):
            true = label["text"]
            truth[i] = *(locate_answer(label, context) or (OUTSIDE, OUTSIDE)), classify_question(question)
            if not np.isfinite(parts).all():
                continue
            begin, end = choose_answer(parts, context, label["may_be_empty"])
            text = context[begin:end] if begin >= 0 else ""
            found[i] = begin, end, *score_answer(text, true, label["may_be_empty"])
        return Answers(found, truth, answered)

    def predict_labels(self, outputs: np.ndarray) -> np.ndarray:
        return outputs[:, :EXACT]

    def find_correct(self, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return outputs[:, EXACT] == 1  # type: ignore[no-any-return]

    def slice_labels(self, labels: np.ndarray, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Return the questions by their word, and those without an answer."""
        words = {name: labels[:, 2] == i for i, name in enumerate(QUESTIONS)}
        return {**words, "without an answer": labels[:, BEGIN] == OUTSIDE}


# Answers as data sets spell them


def read_answers(label: Any, split: str, row: int) -> list[tuple[str, int | None]]:
    """Return the texts of the true answers and the characters where they begin; an empty list if there is no answer.

    A label is ``{text: [...], answer_start: [...]}`` as on the hub, a list of ``{text, answer_start}`` as in SQuAD's
    files, or a text or a list of texts, whose places are None.

    Raises:
        LabelError: the label has another form.
    """
    if isinstance(label, Mapping) and isinstance(label.get("text"), (list, tuple)):
        starts = label.get("answer_start")
        each = list(zip(label["text"], label["text"] if starts is None else starts))
        answers = [(text, None if starts is None else start) for text, start in each]
        if starts is not None and len(starts) != len(label["text"]):
            answers = [(None, None)]
    elif is_blank(label) or label == [] or label == {}:
        answers = []
    else:
        parts = list(label) if isinstance(label, (list, tuple)) else [label]
        answers = [
            (part.get("text"), part.get("answer_start")) if isinstance(part, Mapping) else (part, None)
            for part in parts
        ]
    for text, start in answers:
        whole = start is None or (isinstance(start, int) and not isinstance(start, bool))
        if not isinstance(text, str) or not text.strip() or not whole:
            raise LabelError(
                f"`{str(label)[:80]}` is no answer; {{text: [...], answer_start: [...]}} or a text is expected, and an "
                "empty list for none. Correct the row, or set task.columns.label to another column.",
                split,
                row,
            )
    return answers  # type: ignore[return-value]


def explain_misplaced(text: str, start: int | None, context: str) -> str:
    """Return the end of a sentence on an answer that is not where it should be in its context; empty if it is."""
    at = context.find(text)
    if at < 0:
        return f"has the answer `{text[:60]}`, which is not in its context. Correct the answer, or remove the row."
    if start is None or (start >= 0 and context.startswith(text, start)):
        return ""
    there = context[max(start, 0) : max(start, 0) + len(text)]
    return (
        f"has the answer `{text[:60]}` with answer_start {start}, where its context has `{there[:60]}`; the answer "
        f"first occurs at {at}. Correct answer_start."
    )


def classify_question(question: str) -> int:
    """Return the index in ``QUESTIONS`` of the first word of the question that asks; of ``other`` if none does."""
    words = question.lower().replace("whom", "who").replace("whose", "who").split()
    return next((QUESTIONS.index(word) for word in words if word in QUESTIONS[:-1]), len(QUESTIONS) - 1)


# Windows of tokens


def check_windows(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Raise UserError if a tokenizer has no offsets, or if windows of ``max_length`` tokens do not go forward."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"`{type(tokenizer).__name__}` is a tokenizer in Python, which does not say where in a context its tokens "
            "are. Set model.path to a folder with a tokenizer.json."
        )
    fewest = SHARE * (tokenizer.num_special_tokens_to_add(pair=True) + 1)
    if max_length < fewest:
        raise UserError(
            f"task.max_length is {max_length}, which leaves no room for a context beside its question. Set "
            f"task.max_length={fewest} or more; 384 is usual."
        )


def cut_questions(questions: list[str], tokenizer: PreTrainedTokenizerBase, most: int) -> list[str]:
    """Return the questions cut to at most ``most`` tokens."""
    offsets = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        text if len(spans) <= most else text[: spans[most - 1][1]]
        for text, spans in zip(questions, offsets["offset_mapping"])
    ]


def find_first_token(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the place of the token that stands for no answer: the classifier's, or else the first."""
    cls = tokenizer.cls_token_id
    return ids.index(cls) if cls in ids else 0


def locate_answer(label: Mapping[str, Any], context: str) -> tuple[int, int] | None:
    """Return the characters where the first true answer begins and ends; None if there is no answer."""
    if not label["text"]:
        return None
    text, begin = label["text"][0], label["answer_start"][0]
    begin = context.find(text) if begin == OUTSIDE else begin
    return begin, begin + len(text)


def place_answer(place: tuple[int, int] | None, spans: list[tuple[int, int]]) -> tuple[int, int] | None:
    """Return the first and the last token of an answer; None if there is none, or a window does not hold all of it."""
    if place is None:
        return None
    begin, end = place
    inside = [i for i, (first, _) in enumerate(spans) if first != OUTSIDE]
    if not inside or spans[inside[0]][0] > begin or spans[inside[-1]][1] < end:
        return None
    covering = [i for i in inside if spans[i][0] < end and spans[i][1] > begin]
    return (covering[0], covering[-1]) if covering else None


def choose_answer(windows: np.ndarray, context: str, may_be_empty: bool) -> tuple[int, int]:
    """Return where the best answer of all windows begins and ends in its context, without spaces around it; twice
    OUTSIDE for no answer."""
    score, begin, end, _ = windows[windows[:, 0].argmax()]
    if begin == OUTSIDE or (may_be_empty and windows[:, 3].min() > score):
        return OUTSIDE, OUTSIDE
    text = context[int(begin) : int(end)]
    return int(begin) + len(text) - len(text.lstrip()), int(end) - len(text) + len(text.rstrip())


# The model's class


@functools.cache
def adapt_span_class(base: Any) -> Any:
    """Return a subclass of a transformers class whose output has ``logits``, ``[batch, tokens, 2]`` of beginnings and
    ends, and a loss if the batch has our labels."""
    from transformers.modeling_outputs import TokenClassifierOutput

    forward = base.forward

    def join_logits(self: Any, *args: Any, labels: Tensor | None = None, **inputs: Any) -> Any:
        import torch

        if labels is not None:
            inputs |= {"start_positions": labels[:, START], "end_positions": labels[:, STOP]}
        output = forward(self, *args, **inputs)
        logits: Any = torch.stack([output.start_logits, output.end_logits], dim=-1)
        return TokenClassifierOutput(
            loss=output.loss,
            logits=logits,
            hidden_states=getattr(output, "hidden_states", None),
            attentions=getattr(output, "attentions", None),
        )

    return adapt_forward(base, join_logits, "span")
