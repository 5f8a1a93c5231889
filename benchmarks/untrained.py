"""Apply stages, or llm-compressor, to a model without training it."""

from __future__ import annotations

from collections.abc import Iterable
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerFast

Batch = dict[str, torch.Tensor]


class Untrained(pl.LightningModule):
    """A LightningModule for a model that is not trained."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        return self.model(**batch, labels=batch["input_ids"]).loss

    def configure_optimizers(self) -> None:
        return None


def carry_out(model: PreTrainedModel, calibration: Iterable[Batch], *stages: pl.Callback) -> PreTrainedModel:
    """Apply the ``stages``, which calibrate on the batches, and return the model."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=0, callbacks=list(stages), enable_model_summary=False, **quiet)
    module = Untrained(model)
    trainer.fit(module, DataLoader(list(calibration), batch_size=None))
    return module.model.eval()


def run_llm_compressor(model: PreTrainedModel, batches: list[Batch], modifier: Any) -> PreTrainedModel:
    """Apply a ``modifier`` of llm-compressor, which calibrates on the batches, and return the model."""
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache._pin_intermediate = staticmethod(lambda value: value)  # pins memory even without a GPU
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({})))  # required, but not used
    with TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        model.name_or_path = model.config.name_or_path = folder  # where it looks for the model's other files
        oneshot(
            model=model,
            processor=tokenizer,
            dataset=DataLoader(batches, batch_size=None),
            recipe=modifier,
            num_calibration_samples=sum(len(batch["input_ids"]) for batch in batches),
            max_seq_length=batches[0]["input_ids"].shape[1],
        )
    return model.eval()
