"""hardware.batch_size=auto, on a machine with memory for only so many texts."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from hydra import compose, initialize_config_dir
from small import SMALL
from test_conf import CONF

from compress.errors import UserError
from compress.planning.plan import make_plan
from compress.running import batch_size
from compress.running.batch_size import estimate_capacity, find_largest_batch
from compress.running.experiment import run_experiment
from compress.tasks.splits import load_splits
from compress.technique import Adapter, Training
from compress.techniques.distill import Distill
from compress.techniques.finetune import FineTune

ROOM = 5


@pytest.fixture
def narrow(monkeypatch):
    """Run out of memory with more than ``ROOM`` texts in a batch."""
    for stage in (FineTune, Distill):
        train = stage.training_step

        def step(self, batch, i, train=train):
            if len(batch["input_ids"]) > ROOM:
                raise RuntimeError("CUDA out of memory.")
            return train(self, batch, i)

        monkeypatch.setattr(stage, "training_step", step)


def config(*words):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*SMALL, *words])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from compress.running.training import make_task_data

    planned = make_plan(config(f"cache.dir={tmp_path_factory.mktemp('cache')}"))
    splits = load_splits(planned.task, 0)
    model, tokenizer, _ = planned.backbone.build(planned.task, splits.train["text"])
    return model, make_task_data(splits, model, tokenizer, 16, planned.settings), planned.settings.hardware


def test_the_largest_batch_that_fits_divides_the_requested_batch_and_leaves_the_model_unchanged(data, narrow):
    model, texts, hardware = data
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    drawn = torch.get_rng_state()
    assert find_largest_batch(16, FineTune(model), [], texts, hardware) == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn) and texts.batch_size == 16
    assert find_largest_batch(3, FineTune(model), [], texts, hardware) == 3


def test_on_a_cpu_free_memory_is_the_bound_before_anything_is_tried(data, monkeypatch):
    model, texts, hardware = data
    longest = texts.collate([texts.tokenised("train")[texts.in_order("train")[0]]])
    longest.pop("token_type_ids", None)
    free = 3 * sum(p.nbytes for p in model.parameters())
    assert estimate_capacity(model, longest, 0) == 1
    few, many = estimate_capacity(model, longest, free + 10**8), estimate_capacity(model, longest, free + 10**9)
    assert many == pytest.approx(10 * few, rel=0.1)
    per_text = 10**8 / few
    monkeypatch.setattr(
        batch_size.psutil, "virtual_memory", lambda: SimpleNamespace(available=int(free + 9.5 * per_text))
    )
    assert find_largest_batch(64, FineTune(model), [], texts, hardware) == 8


def test_what_an_adapter_leaves_out_needs_no_gradients(data, monkeypatch):
    model, texts, hardware = data
    free = int(0.9 * 3 * sum(p.nbytes for p in model.parameters()))
    monkeypatch.setattr(batch_size.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert find_largest_batch(16, FineTune(model), [], texts, hardware) == 1
    assert find_largest_batch(16, FineTune(model, adapter=Adapter("perp")), [], texts, hardware) > 1
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_text_that_does_not_fit_is_reported(data, monkeypatch):
    monkeypatch.setattr("test_batch_size.ROOM", 0)
    model, texts, hardware = data

    def step(self, batch, i):
        raise RuntimeError("CUDA out of memory.")

    monkeypatch.setattr(FineTune, "training_step", step)
    with pytest.raises(UserError, match="Not even one of the longest texts fits.* Set task.max_length"):
        find_largest_batch(2, FineTune(model), [], texts, hardware)


def test_a_chain_trains_with_batches_that_fit_and_its_history_records_them(narrow, tmp_path):
    cfg = config("technique=prune+distill", "hardware.batch_size=auto", "baseline.batch_size=8",
                 "baseline.accumulate=2", f"cache.dir={tmp_path}/cache")  # fmt: skip
    run_experiment(cfg, tmp_path)
    history = json.loads((tmp_path / "artifact" / "compress.json").read_text())["history"]
    trainings = [stage["settings"].get("train", stage["settings"]) for stage in history]
    assert [(training["batch_size"], training["accumulate"]) for training in trainings] == [(4, 4), (8, 2), (4, 4)]


def test_a_resumed_training_keeps_its_batch(data, tmp_path):
    _, texts, hardware = data
    (tmp_path / "resume").mkdir()
    (tmp_path / "resume" / batch_size.KEPT).write_text("2")
    auto = SimpleNamespace(batch_size="auto", device=hardware.device)
    training = batch_size.fit_batch_size(
        Training(epochs=1, batch_size=8), FineTune(tiny.bert()), [], texts, auto, tmp_path
    )
    assert (training.batch_size, training.accumulate, texts.batch_size) == (2, 4, 2)


def test_several_processes_are_refused():
    with pytest.raises(UserError, match=r"tries batches in one process, and hardware asks for 2"):
        make_plan(config("hardware.batch_size=auto", "hardware.devices=2"))
