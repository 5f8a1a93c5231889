"""Conversations: a model answers as the assistant of a chat."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from compress.errors import UserError
from compress.tasks.chats import (
    ChatError,
    Encoded,
    Message,
    choose_template,
    cut_chat,
    encode_chat,
    read_conversations,
)
from compress.tasks.kinds.base import Format
from compress.tasks.kinds.language import LanguageModel

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from compress.tasks.formats import Table
    from compress.tasks.sources import Columns, Messages, Rows


class Chat(LanguageModel):
    """The assistant's turns of a conversation are predicted; an example is a conversation.

    Loss and metrics are of the assistant's words and of the token that ends its turn, in the chat template of the
    model's tokenizer.
    """

    name = "chat"
    metrics = MappingProxyType({k: v for k, v in LanguageModel.metrics.items() if k != "word_perplexity"})
    in_blocks = False
    txt: Format = "jsonl"
    cuts = "lose their last turns, to have at most"

    @property
    def unit(self) -> str:
        return "conversations"

    def read_rows(self, rows: Rows, columns: Columns, messages: Messages) -> Table:
        return read_conversations(rows, columns, messages)

    def check_encoding(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
        for batch in rows.iter(1000):
            encode_rows(batch, tokenizer)  # type: ignore[arg-type]

    def set_template(self, tokenizer: PreTrainedTokenizerBase, template: str | None, new: bool = False) -> None:
        choose_template(tokenizer, "simple" if new and template is None else template)

    def tokenise(self, rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list]:
        if "messages" not in rows:  # text to calibrate on
            ids = tokenizer(rows["text"], truncation=True, max_length=max_length)["input_ids"]
            cut = [(row, row, False) for row in ids if row]
        else:
            cut = [cut_chat(encoded, max_length) for encoded in encode_rows(rows, tokenizer)]
        return {
            "input_ids": [ids for ids, *_ in cut],
            "attention_mask": [[1] * len(ids) for ids, *_ in cut],
            "labels": [labels for _, labels, _ in cut],
            "cut": [lost for *_, lost in cut],
        }

    def count_cut(self, rows: Dataset, texts: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
        return sum(rows["cut"])

    def collate(self, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        def pad(name: str, filler: int) -> Tensor:
            return pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=filler)

        filler = int(tokenizer.pad_token_id or 0)
        return {"input_ids": pad("input_ids", filler), "attention_mask": pad("attention_mask", 0),
                "labels": pad("labels", -100)}  # fmt: skip

    def pack(self, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
        """Return the conversations in lines of at most ``max_length`` tokens, without an attention mask.

        Positions begin again with every conversation, by which transformers keeps their attention apart as long as
        there is no cache. (:func:`compress.models.packing.keeps_boundaries` tries a model.) Where a line is padded,
        positions stay 0.
        """
        import torch

        # 1) Fill the lines, from the longest conversation to the shortest, each into the first line with room
        lines: list[list[dict[str, Any]]] = []
        for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
            sizes = (sum(len(other["input_ids"]) for other in line) for line in lines)
            room = (i for i, size in enumerate(sizes) if size + len(row["input_ids"]) <= max_length)
            if (place := next(room, None)) is None:
                lines.append([row])
            else:
                lines[place].append(row)
        # 2) Write them
        width = max(sum(len(row["input_ids"]) for row in line) for line in lines)
        ids = torch.full((len(lines), width), int(tokenizer.pad_token_id or 0))
        positions, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, line in enumerate(lines):
            at = 0
            for row in line:
                stop = at + len(row["input_ids"])
                ids[i, at:stop], labels[i, at:stop] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
                labels[i, at] = -100  # the conversation before it does not predict its first token
                positions[i, at:stop] = torch.arange(stop - at)
                at = stop
        return {"input_ids": ids, "position_ids": positions, "labels": labels, "use_cache": False}

    def find_tokens(self, batch: dict[str, Any]) -> Tensor:
        if "attention_mask" in batch:
            return super().find_tokens(batch)
        positions = batch["position_ids"]  # a conversation begins at 0 and goes on at 1
        return ((positions > 0) | (positions.roll(-1, 1) == 1)).long()

    def describe_outputs(self, config: dict[str, Any]) -> tuple[str, ...]:
        return (
            "Its texts are conversations in the chat template of its tokenizer: "
            "`tokenizer.apply_chat_template(messages, add_generation_prompt=True)`.",
        )

    def mask_answers(self, inputs: dict[str, Tensor], labels: Tensor | None) -> Tensor:
        if labels is None:
            return super().mask_answers(inputs, labels)
        places = (labels != -100).roll(-1, 1).long()
        places[:, -1] = 0  # position t predicts token t + 1
        return places


def encode_rows(rows: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Return the conversations of ``rows`` as tokens.

    Raises:
        UserError: the template cannot render one of them; the message names its file and row.
    """

    def encode(messages: list[Message], origin: str) -> Encoded:
        try:
            return encode_chat(tokenizer, messages)
        except ChatError as error:
            raise UserError(f"{origin}: {error}") from error

    return [encode(messages, origin) for messages, origin in zip(rows["messages"], rows["origin"])]
