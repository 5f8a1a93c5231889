"""Models of a few thousand random weights, a loader of random tokens, a quiet Trainer, and a module not of ours."""

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

SHAPE = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def bert(num_labels=3):
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SHAPE, max_position_embeddings=40, num_labels=num_labels)).eval()


def roberta(num_labels=3):
    torch.manual_seed(0)
    config = RobertaConfig(**SHAPE, max_position_embeddings=42, num_labels=num_labels)
    return RobertaForSequenceClassification(config).eval()


def llama(num_labels=3):
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_key_value_heads=2, num_labels=num_labels, pad_token_id=0)
    return LlamaForSequenceClassification(config).eval()


def llama_lm():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, pad_token_id=0)).eval()


ALL = (bert, roberta, llama, llama_lm)


def batch(rows=4, length=10, padded=True, seed=0, lm=False):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(rows):
            mask[row, length - row % 3 :] = 0
        ids = ids.masked_fill(mask == 0, 0)
    labels = ids.masked_fill(mask == 0, -100) if lm else ids[:, 0] % 3
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loader(batches=4, lm=False):
    return DataLoader([batch(seed=seed, lm=lm) for seed in range(batches)], batch_size=None)


def trainer(*callbacks, epochs=0, **settings):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    return pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**quiet, **settings})


class Theirs(pl.LightningModule):
    """As anybody writes one, with its network under any name."""

    def __init__(self, network, name="model"):
        super().__init__()
        self.name = name
        setattr(self, name, network)

    def training_step(self, batch, _):
        return getattr(self, self.name)(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
