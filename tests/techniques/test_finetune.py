"""Fine-tuning, of all parameters and by an adapter."""

import csv
from types import SimpleNamespace
from unittest import SkipTest

import pytest
import pytorch_lightning as pl
import tiny
import torch

from compress.errors import UserError
from compress.models.matrices import apply_masks, find_all_matrices, find_zeros, matrices
from compress.running.training import HoldZeros
from compress.technique import Adapter, Training
from compress.techniques.distill import Distill
from compress.techniques.finetune import FineTune
from compress.testing import HEADS, Case, check_promises, check_resuming

FAST = Training(epochs=1, learning_rate=1e-2)
SETTINGS = {
    "lora": {"adapter": {"kind": "lora", "rank": 4, "dropout": 0.1}},
    "dora": {"adapter": {"kind": "dora", "rank": 4}},
    "perp": {"adapter": {"kind": "perp"}},
}


@pytest.fixture(autouse=True)
def peft():
    pytest.importorskip("peft", reason="pip install -e '.[peft]'")


@pytest.mark.parametrize("check", [check_promises, check_resuming], ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", SETTINGS)
def test_an_adapter_keeps_the_contract_of_a_stage(kind, check):
    check(Case(FineTune, SETTINGS[kind], FAST))


@pytest.mark.parametrize("kind", ["lora", "perp"])
def test_an_adapter_keeps_the_contract_on_models_that_answer_at_every_token(kind):
    check_promises(Case(FineTune, SETTINGS[kind], FAST, models=HEADS))


@pytest.mark.parametrize("kind", ["lora", "perp"])
def test_an_adapter_distils(kind):
    try:
        check_promises(Case(Distill, SETTINGS[kind], FAST))
    except SkipTest as missing:
        pytest.skip(str(missing))


class Look(pl.Callback):
    """Note what the optimizer holds, and what a checkpoint would."""

    def on_train_end(self, trainer, module):
        state = trainer.optimizers[0].state
        self.optimized = {name for name, parameter in module.model.named_parameters() if parameter in state}
        checkpoint = {"state_dict": module.state_dict()}
        module.on_save_checkpoint(checkpoint)
        self.stored = {name.removeprefix("model.") for name in checkpoint["state_dict"]}
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_optimizer_and_checkpoints_hold_what_is_trained(kind):
    look, model = Look(), tiny.bert()
    buffers = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
    module = FineTune(model, training=FAST, adapter=SETTINGS[kind]["adapter"])
    tiny.trainer(look, epochs=1).fit(module, tiny.loader())
    head = {name for name in model.state_dict() if name.startswith(("classifier", "bert.pooler"))}
    own = {n for n, p in model.named_parameters() if p.ndim == 1} if kind == "perp" else set()
    assert {name for name in look.optimized if "lora" not in name} == head | own
    assert any("lora" in name for name in look.optimized) == (kind != "perp")
    assert look.stored == look.optimized | buffers


def test_zeros_of_the_head_are_held_too():
    model = tiny.bert()
    found = find_all_matrices(model, embeddings=True, head=True)
    apply_masks(found, {name: torch.rand(m.shape) < 0.5 for name, m in found.items() if not m.is_embedding})
    zeros, before = find_zeros(model), {name: m.weight.clone() for name, m in found.items()}
    assert {"classifier", "bert.pooler.dense"} <= zeros.keys() and len(zeros) > len(matrices(model))
    module = FineTune(model, training=FAST, adapter=Adapter("lora", rank=4))
    tiny.trainer(HoldZeros(), epochs=2).fit(module, tiny.loader())
    assert all(torch.equal(mask, zeros[name]) for name, mask in find_zeros(model).items())
    assert all(not torch.equal(before[name], found[name].weight) for name in zeros)


def test_a_second_fit_adds_the_adapter_again():
    module = FineTune(tiny.bert(), training=FAST, adapter=Adapter("lora", rank=4))
    for _ in range(2):
        tiny.trainer(epochs=1).fit(module, tiny.loader())
    assert module.adaptation is None and not any("lora" in name for name, _ in module.named_parameters())


def test_its_report_says_how_much_was_trained(tmp_path):
    module = FineTune(tiny.bert(), training=FAST, adapter=Adapter("lora", rank=4))
    module.report(tmp_path)
    assert not list(tmp_path.iterdir())
    tiny.trainer(epochs=1).fit(module, tiny.loader())
    module.report(tmp_path)
    (row,) = csv.DictReader((tmp_path / "adapter.csv").open())
    products = sum(4 * (matrix.rows + matrix.inputs) for matrix in matrices(module.model).values())
    head = 32 * 32 + 32 + 32 * 3 + 3
    parameters = sum(parameter.numel() for parameter in module.model.parameters())
    assert row["kind"] == "lora" and int(row["trained_parameters"]) == products + head
    assert int(row["parameters"]) == parameters and float(row["share"]) == pytest.approx((products + head) / parameters)


def test_integers_are_not_merged_into():
    packed = SimpleNamespace(leaves="packed", key="technique.gptq")
    lora, perp = (FineTune(tiny.bert(), training=FAST, adapter=SETTINGS[kind]["adapter"]) for kind in ("lora", "perp"))
    sentence = r"finetune.adapter is lora, .* `gptq` .* leaves integers. Set .*perp}, or move `finetune` before `gptq`"
    with pytest.raises(UserError, match=sentence):
        lora.check(lora.model, [packed])
    perp.check(perp.model, [packed])
