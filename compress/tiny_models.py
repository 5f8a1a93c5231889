"""Build models of a few thousand random weights, a loader of random tokens, and a LightningModule of another author."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

Batch = dict[str, Tensor]
SHAPE: Any = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


def make_bert(num_labels: int = 3) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(**{**SHAPE, "max_position_embeddings": 40, "num_labels": num_labels})
    ).eval()


def make_roberta(num_labels: int = 3) -> RobertaForSequenceClassification:
    torch.manual_seed(0)
    config = RobertaConfig(**{**SHAPE, "max_position_embeddings": 42, "num_labels": num_labels})
    return RobertaForSequenceClassification(config).eval()


def make_llama(num_labels: int = 3) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SHAPE, "num_key_value_heads": 2, "num_labels": num_labels, "pad_token_id": 0})
    return LlamaForSequenceClassification(config).eval()


def make_llama_lm() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, pad_token_id=0)).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a WordPiece tokenizer of the models' 60 tokens: special ones, letters and words."""
    words = [*"abcdefghijklmnopqrstuvwxyz", *(f"w{i}" for i in range(29))]
    vocab = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in special.items()}
    )


def make_batch(rows: int = 4, length: int = 10, padded: bool = True, seed: int = 0, lm: bool = False) -> Batch:
    """Return random tokens with an attention mask and labels. A text's first token decides its label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(rows):
            mask[row, length - row % 3 :] = 0
        ids = ids.masked_fill(mask == 0, 0)
    labels = ids.masked_fill(mask == 0, -100) if lm else ids[:, 0] % 3
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def make_loader(batches: int = 4, lm: bool = False) -> DataLoader:
    return DataLoader([make_batch(seed=seed, lm=lm) for seed in range(batches)], batch_size=None)  # type: ignore


def make_trainer(*callbacks: pl.Callback, epochs: int = 0, **settings: Any) -> pl.Trainer:
    """Return a Trainer on the CPU that prints and writes nothing."""
    return pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**QUIET, **settings})


class Theirs(pl.LightningModule):
    """A LightningModule of another author, with its network under any name."""

    def __init__(self, network: nn.Module, name: str = "model") -> None:
        super().__init__()
        self.name = name
        setattr(self, name, network)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        return getattr(self, self.name)(**batch).loss  # type: ignore[no-any-return]

    def validation_step(self, batch: Batch, _: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)
