"""Language modelling: a text is continued."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from compress.maths import scores
from compress.tasks.chats import render
from compress.tasks.kinds.base import Answers, Format, Kind, Metric
from compress.tasks.labels import LabelledTask

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class LanguageModel(Kind):
    """A text is continued; an example is a block of tokens."""

    name = "lm"
    metrics = MappingProxyType(
        {
            "perplexity": Metric(scores.perplexity, higher_is_better=False),
            "word_perplexity": Metric(scores.word_perplexity, higher_is_better=False),
            "accuracy": Metric(scores.token_accuracy),
        }
    )
    auto_class = "AutoModelForCausalLM"
    pipeline = "text-generation"
    num_labels = 0
    probabilities = "softmax"
    in_blocks = True
    txt: Format = "text"
    labelled = False
    generates = True

    def encode(self, task: LabelledTask, labels: list[Any], split: str) -> list[Any]:
        return labels  # none: a block of tokens is its own labels

    def tokenise(self, rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        if "messages" in rows and tokenizer.chat_template:  # conversations to calibrate on
            texts = [render(tokenizer, messages) for messages in rows["messages"]]
            return {"input_ids": tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]}
        return {"input_ids": tokenizer(rows["text"], verbose=False)["input_ids"]}

    def collate_labels(self, labels: list[Any] | None, batch: dict[str, Tensor]) -> Tensor:
        encoded = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, seen in enumerate(labels or ()):
            encoded[row, :seen] = -100  # tokens that an earlier block scores
        return encoded

    def make_labels(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.collate_labels(None, inputs)

    def count_examples(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["labels"][:, 1:] != -100).sum()

    def choose_labels(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        labels = inputs["input_ids"].clone()
        labels[:, 1:] = logits[:, :-1].argmax(-1)  # position t predicts token t + 1
        if "labels" in inputs and inputs["labels"].shape == labels.shape:
            return labels.masked_fill(inputs["labels"] == -100, -100)
        return labels.masked_fill(inputs["attention_mask"] == 0, -100) if "attention_mask" in inputs else labels

    def keep_answers(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return two arrays: ``[blocks, 3]`` with the sum of the tokens' losses in nats, the number of correctly
        predicted tokens and the number of tokens that no earlier block has, and ``[blocks]`` with the number of tokens
        to predict. Position t predicts token t + 1."""
        import torch
        from torch.nn.functional import cross_entropy

        own = (labels != -100).sum(1).to(torch.float32)
        logits, labels = logits[:, :-1], labels[:, 1:]
        predicted = labels != -100  # in a conversation far fewer than all tokens, whose copies would take gigabytes
        chosen, wanted = logits[predicted].float(), labels[predicted]
        losses, right = torch.zeros(2, *labels.shape, device=logits.device)
        losses[predicted] = cross_entropy(chosen, wanted, reduction="none")
        right[predicted] = (chosen.argmax(-1) == wanted).float()
        return torch.stack([losses.sum(1), right.sum(1), own], dim=1), predicted.sum(1)

    def collect_answers(self, outputs: np.ndarray, labels: np.ndarray, rows: Dataset | None) -> Answers:
        """Replace the number of tokens that no earlier block has by the number of words that the predicted tokens of a
        block are: on average, a split's words divided by its tokens. Without ``rows`` a token counts as a word."""
        words, tokens = 1, 1.0
        if rows is not None and "text" in rows.column_names:
            words, tokens = sum(len(text.split()) for text in rows["text"]), outputs[:, 2].sum()
        outputs = outputs.copy()
        outputs[:, 2] = labels * (words / tokens)
        return Answers(outputs, labels)
