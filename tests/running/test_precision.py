"""Models train in 16 bits and reload to the same logits; a Trainer that does not train changes no precision."""

import pytest
import pytorch_lightning as pl
import tiny
import torch

from compress.planning.settings import Hardware
from compress.running.resume import make_trainer_options
from compress.runtimes.torch import load

PROBE = {key: value for key, value in tiny.batch(seed=9).items() if key != "labels"}


def fit(model, trains):
    options = make_trainer_options(Hardware(accelerator="cpu", precision="bf16-true"), together=False, trains=trains)
    trainer = pl.Trainer(max_epochs=int(trains), **{**tiny.QUIET, **options})
    trainer.fit(tiny.Theirs(model), tiny.loader(lm=True))
    return trainer


def test_a_model_that_is_trained_in_16_bits_keeps_exact_positions_and_reloads(tmp_path):
    model = tiny.llama_lm()
    frequencies = model.model.rotary_emb.inv_freq.clone()
    assert not torch.equal(frequencies.bfloat16().float(), frequencies)  # 16 bits would change them
    trainer = fit(model, trains=True)
    assert str(trainer.precision) == "bf16-true" and model.dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path, "lm")(**PROBE).logits, model.eval()(**PROBE).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trainer_that_does_not_train_leaves_a_model_in_its_own_precision(dtype):
    model = tiny.llama_lm().to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit(model, trains=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.dtype == dtype
