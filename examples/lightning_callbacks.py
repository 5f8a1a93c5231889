"""Stages as callbacks of a Lightning script of your own: `python examples/lightning_callbacks.py`."""

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, BertConfig

from compress.techniques.gptq import GPTQ
from compress.techniques.prune import Prune


class Classifier(pl.LightningModule):
    """Anybody's module: it holds a transformers model."""

    def __init__(self) -> None:
        super().__init__()
        shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        self.model = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=100, **shape))

    def training_step(self, batch, _):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def make_example() -> dict[str, torch.Tensor]:
    """Return a text of 12 tokens, whose label is the parity of the first."""
    tokens = torch.randint(5, 100, (12,))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[0] % 2}


loader = DataLoader([make_example() for _ in range(256)], batch_size=32)
module = Classifier()
prune = Prune(sparsity=0.5, schedule="gradual", every=2)  # raises the sparsity while the module trains
quantize = GPTQ(bits=4, group_size=32, samples=64)  # rounds when the fit ends, on texts of the loader
trainer = pl.Trainer(
    max_epochs=2,
    accelerator="cpu",
    callbacks=[prune, quantize],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, loader)

weights = torch.cat(
    [layer.weight.flatten() for layer in module.model.bert.encoder.modules() if hasattr(layer, "weight")]
)
print(f"{(weights == 0).float().mean():.0%} zeros")
quantize.save(module.model, "quantized")  # compressed-tensors, which transformers opens
reloaded = AutoModelForSequenceClassification.from_pretrained("quantized")
batch = next(iter(loader))
difference = (reloaded(**batch).logits - module.model.eval()(**batch).logits).abs().max().item()
print(f"the reloaded logits differ by {difference:.0e}")
