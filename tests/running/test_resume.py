"""A training that was stopped, at the end of an epoch or within it, ends like an uninterrupted one."""

import os
import signal
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import tiny
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_tokens import splits, tokenizer  # noqa: F401  (a fixture)

from compress.cache.events import reveal_events
from compress.errors import UserError
from compress.planning.settings import Hardware
from compress.running import resume
from compress.running.training import Finite, HoldZeros, KeepBest, fit_module
from compress.tasks.metrics import TaskMetrics
from compress.tasks.tokens import TaskData
from compress.technique import Adapter, Technique, Training
from compress.techniques.distill import Distill
from compress.techniques.drop_layers import DropLayers
from compress.techniques.finetune import FineTune
from compress.techniques.prune import Prune
from compress.techniques.qat import QAT

EPOCHS, BATCHES = 3, 5
CALLBACKS = {
    "nothing": list,
    "one_shot": lambda: [Prune(sparsity=0.5), HoldZeros()],
    "gradual": lambda: [Prune(sparsity=0.5, schedule="gradual", every=2)],
    "movement": lambda: [Prune(sparsity=0.5, criterion="movement", schedule="gradual", every=2)],
    "drop_layers": lambda: [DropLayers(drop=1, samples=8)],
    "learnt": lambda: [QAT(samples=8)],
    "moving_average": lambda: [QAT(samples=8, ranges="moving_average")],
}
ADAPTERS = {"lora": Adapter("lora", rank=4, dropout=0.1), "perp": Adapter("perp")}


@pytest.fixture
def fit(tokenizer, tmp_path):  # noqa: F811
    def fit(kind, folder="stopped", learning_rate=1e-2):
        pl.seed_everything(0, verbose=False)
        task = splits().task
        training = Training(epochs=EPOCHS, batch_size=8, learning_rate=learning_rate)
        scores = TaskMetrics(task)
        if kind == "distill":
            module = Distill(tiny.bert(2), scores, training, teacher=tiny.bert(2), teacher_dtype="float32")
        else:
            module = FineTune(tiny.bert(2), scores, training, ADAPTERS.get(kind))
        planned = SimpleNamespace(task=task, team=None, settings=SimpleNamespace(hardware=Hardware(accelerator="cpu")))
        data = TaskData(splits(), tokenizer, max_length=16, batch_size=8)
        callbacks = CALLBACKS.get(kind, list)()
        fit_module(module, callbacks, data, planned, training, tmp_path / folder, "stage")
        return module.model.state_dict()

    return fit


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("kind", "minutes"),
    [
        *(pytest.param(kind, 0, id=f"{kind} within an epoch") for kind in (*CALLBACKS, *ADAPTERS, "distill")),
        *(pytest.param(kind, 10, id=f"{kind} at an epoch's end") for kind in ("nothing", "gradual", "lora")),
    ],
)
def test_it_ends_bit_equal_to_an_uninterrupted_training(fit, monkeypatch, kind, minutes):
    if kind == "lora":
        pytest.importorskip("peft", reason="pip install -e '.[peft]'")
    whole = fit(kind, "whole")
    save = resume.Checkpoints.save

    def die(self, trainer):
        save(self, trainer)
        if trainer.global_step > BATCHES + 1:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(resume.Checkpoints, "save", die)
        patch.setattr(resume.Checkpoints.__init__, "__defaults__", (minutes,))
        with pytest.raises(Killed):
            fit(kind)
    steps = []
    monkeypatch.setattr(Finite, "on_train_batch_end", lambda self, trainer, *_: steps.append(trainer.global_step))
    again = fit(kind)
    assert len(steps) == (BATCHES if minutes else 2 * BATCHES - 2)
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_process_that_is_asked_to_stop_saves_first_and_then_obeys_its_own_handler(fit, monkeypatch, tmp_path, number):
    whole, heard = fit("nothing", "whole"), []

    def ask(self, trainer, *_):
        if trainer.global_step == 7:
            os.kill(os.getpid(), number)

    def stop(number, frame):
        heard.append(number)
        raise Killed

    before = signal.signal(number, stop)
    with monkeypatch.context() as patch:
        patch.setattr(Finite, "on_train_batch_end", ask)
        with pytest.raises(Killed):
            fit("nothing")
    assert heard == [number] and signal.signal(number, before) == stop
    (last,) = (tmp_path / "stopped" / "resume").glob("*.ckpt")
    assert last.name.startswith("7-")
    again = fit("nothing")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    logs = tmp_path / "stopped" / "tensorboard"
    assert not list(logs.rglob("*tfevents*"))  # `tensorboard --logdir multirun` leaves the cache out
    reveal_events(logs)
    events = EventAccumulator(str(logs)).Reload()
    assert [event.step for event in events.Scalars("validation/loss")] == [4, 9, 14]
    assert "hp_metric" not in events.Tags()["scalars"]  # a second session of the job in HParams


@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end"])
def test_a_process_that_is_asked_to_stop_when_training_has_ended_does_so(fit, monkeypatch, hook):
    def stop(number, frame):
        raise Killed

    before = signal.signal(signal.SIGTERM, stop)
    with monkeypatch.context() as patch:
        patch.setattr(Finite, hook, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Killed):
            fit("nothing")
    assert signal.signal(signal.SIGTERM, before) == stop


def test_a_truncated_checkpoint_is_reported_and_training_starts_again(fit, monkeypatch, tmp_path, caplog):
    whole = fit("nothing", "whole")
    with monkeypatch.context() as patch:
        patch.setattr(KeepBest, "on_train_end", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            fit("nothing")
    (last,) = (tmp_path / "stopped" / "resume").glob("*.ckpt")
    last.write_bytes(last.read_bytes()[:1000])
    again = fit("nothing")
    assert "checkpoint of the stopped training is damaged; the training starts again" in caplog.text
    assert all(torch.equal(whole[name], again[name]) for name in whole)


class Counts(Technique, pl.Callback):
    """Keeps no state to resume from."""

    def __init__(self):
        self.count = 0


def test_a_stage_that_cannot_resume_starts_again_and_says_so(fit, monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO", "compress")
    monkeypatch.setitem(CALLBACKS, "nothing", lambda: [Counts()])
    (tmp_path / "stopped" / "tensorboard").mkdir(parents=True)  # left by the stopped training
    fit("nothing")
    assert "its training was stopped, cannot be resumed and starts again" in caplog.text
    assert not (tmp_path / "stopped" / "resume").exists()


def test_a_loss_that_is_not_finite_ends_the_training(fit):
    with pytest.raises(
        UserError, match=r"loss is nan after \d+ steps.*technique.stage.train.learning_rate below 1e\+30"
    ):
        fit("nothing", learning_rate=1e30)
