"""What one training leaves behind, with Lightning's own Trainer and models of a few weights."""

import pytest
import pytorch_lightning as pl
import tiny
import torch
from torch import nn
from torch.utils.data import DataLoader

from compress.running.training import KeepBest, MeanGradient, read_losses
from compress.tasks.kinds import KINDS

ROWS = torch.randn(39, 3, generator=torch.Generator().manual_seed(0))


class Linear(pl.LightningModule):
    """A linear model of ROWS, whose loss is a mean over the texts or over the tokens of a batch."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.layer = nn.Linear(3, 1)
        nn.init.ones_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def training_step(self, batch, _):
        squares = (self.layer(ROWS[batch["input_ids"][:, 0]]) - 2) ** 2
        counted = (
            (batch["labels"][:, 1:] != -100).sum(1, keepdim=True) if self.kind == "lm" else torch.ones_like(squares)
        )
        return (squares * counted).sum() / counted.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def collate(indices):
    ids = torch.tensor(indices)[:, None].expand(-1, 6)
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(torch.arange(6) > 1 + ids % 5, -100),
    }  # 1 to 5 tokens to predict


@pytest.mark.parametrize("kind", ["multiclass", "lm"])
@pytest.mark.parametrize("rows", [39, 8])  # the last window has fewer batches, or the only one has; a batch is smaller
def test_accumulated_batches_train_as_one_batch_of_all_their_examples(kind, rows):
    weights = []
    for size, accumulate in ((4, 4), (16, 1)):
        module = Linear(kind)
        callbacks = [MeanGradient(accumulate, KINDS[kind].count_examples)] if accumulate > 1 else []
        trainer = pl.Trainer(max_epochs=2, accumulate_grad_batches=accumulate, callbacks=callbacks, **tiny.QUIET)
        trainer.fit(module, DataLoader(range(rows), size, collate_fn=collate))
        assert trainer.global_step == 2 * -(-rows // 16)
        weights.append(torch.cat([module.layer.weight.detach()[0], module.layer.bias.detach()]))
    assert torch.allclose(*weights, atol=1e-6) and not torch.allclose(weights[0][:3], torch.ones(3), atol=0.01)


class Scripted(pl.LightningModule):
    """Follows a script of losses and accuracies, one an epoch, and counts the epochs in its weight."""

    losses, accuracies = (3.0, 2.0, 1.0), (0.5, 0.9, 0.7)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch, _):
        self.log("train/epoch_loss", self.losses[self.current_epoch], on_step=False, on_epoch=True)
        return 0 * self.weight.sum()

    def on_train_epoch_start(self):
        self.weight.data += 1

    def validation_step(self, batch, _):
        self.log("validation/loss", self.losses[self.current_epoch] + 10)
        self.log("validation/accuracy", self.accuracies[self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_losses_are_those_of_the_epoch_that_was_kept(tmp_path):
    module = Scripted()
    settings = {"monitor": "validation/accuracy", "mode": "max", "save_weights_only": True, "save_top_k": 2}
    keeper = KeepBest(tmp_path, **settings)
    trainer = pl.Trainer(max_epochs=3, callbacks=[keeper], **{**tiny.QUIET, "enable_checkpointing": True})
    trainer.fit(module, DataLoader(range(2)), DataLoader(range(2)))
    assert module.weight.item() == 2 and keeper.kept == 1
    assert keeper.losses[keeper.kept] == {"train": 2.0, "validation": 12.0}
    assert read_losses(trainer) == {"train": 1.0, "validation": 11.0}  # of the last epoch
    resumed = KeepBest(tmp_path, **settings)
    resumed.load_state_dict(keeper.state_dict())
    assert resumed.losses == keeper.losses
