"""Every stage of conf/ passes the suite for stages of other authors. A new YAML needs no edit here if its defaults suit
tiny models."""

from unittest import SkipTest

import pytest
import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import OmegaConf
from test_conf import CONF

from compress import testing
from compress.models.layers import unwrap_model
from compress.models.matrices import matrices
from compress.technique import Technique, Training
from compress.testing import CHECKS, HEADS, MODELS, Case, check_promises, check_technique

NAMES = sorted(path.stem for path in (CONF / "technique/stage").glob("[!_]*.yaml") if path.stem != "none")
SETTINGS = {
    "autoround": {"group_size": 16, "iterations": 4},
    "awq": {"group_size": 16, "grid": 3},
    "gguf": {"runtime": "torch", "vocabulary": False},
    "gptq": {"group_size": 16},
    "mixed": {"group_size": 16, "measured": 4, "average_bits": 5},
    "nf4": {"blocksize": 32},
    "prune": {"sparsity": 0.6},
    "prune_vocab": {"min_count": 4},
    "sensitivity": {"sparsities": [0.5], "samples": 4},
    "structured": {"target_ffn_size": 32, "importance": "activation"},
}
TRAINED = ("distill", "finetune", "prune", "qat")


def read_config(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("train", [f"technique={name}"]).technique[name], resolve=False)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_a_stage_keeps_its_contract(name, check):
    config = read_config(name)
    training = Training(epochs=1, learning_rate=1e-2) if name in TRAINED else Training()
    models = MODELS[:1] if name in ("onnx", "openvino") else MODELS  # each graph takes seconds
    check(Case(get_class(config["_target_"]), SETTINGS.get(name, {}), training, config, models))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gguf"])  # it writes language models
def test_a_stage_keeps_its_promises_on_models_that_answer_at_every_token(name):
    config = read_config(name)
    training = Training(epochs=1, learning_rate=1e-2) if name in TRAINED else Training()
    check_promises(Case(get_class(config["_target_"]), SETTINGS.get(name, {}), training, models=HEADS))


class Halve(Technique, pl.Callback):
    """Halve every weight of the blocks.

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[Halve()]).fit(module, loader)
    """

    keeps_head = True

    def __init__(self, factor: float = 0.5) -> None:
        self.factor = factor

    def on_fit_end(self, trainer, pl_module):
        for linear in matrices(unwrap_model(pl_module)).values():
            linear.weight.data *= self.factor


def test_a_strangers_stage_passes():
    check_technique(Halve, config={"factor": 0.5})


class Idle(Halve):
    """Do nothing."""

    def on_fit_end(self, trainer, pl_module):
        pass


class Fills(Halve):
    def on_fit_end(self, trainer, pl_module):
        for linear in matrices(unwrap_model(pl_module)).values():
            linear.weight.data += 1


class Wanders(Halve):
    def on_fit_end(self, trainer, pl_module):
        for name, weight in unwrap_model(pl_module).named_parameters():
            weight.data *= 2 if "classifier.weight" in name else 1


class Loses(Halve):
    def save(self, model, folder):
        next(iter(matrices(model).items()))[1].weight.data.neg_()
        model.save_pretrained(folder)


class Boasts(Halve):
    shrinks = True


class Forgets(Halve):
    resumes = True

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__(factor)
        self.steps = 0

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps += 1
        next(iter(matrices(unwrap_model(pl_module)).items()))[1].weight.data *= 1 + self.steps / 100


class OnlyOurs(Halve):
    def on_fit_end(self, trainer, pl_module):
        assert pl_module.training_settings.epochs == 0
        super().on_fit_end(trainer, pl_module)


class Mute(Halve):
    __doc__ = None


class Stale(Halve):
    """Halve.

    Example:
        >>> Stale(faktor=0.5)
    """


@pytest.mark.parametrize(
    ("technique", "check", "sentence"),
    [
        (Idle, testing.check_promises, "Idle on make_bert: `technique.test_testing` changed nothing"),
        (Fills, testing.check_promises, "filled in .* pruned weights of"),
        (Wanders, testing.check_promises, "the transformer blocks alone and changed classifier.weight"),
        (Loses, testing.check_promises, "reloads to other logits"),
        (Boasts, testing.check_promises, "should make the model smaller"),
        (Forgets, testing.check_resuming, "Forgets.resumes is True, and .* differs"),
        (OnlyOurs, testing.check_other_modules, "OnlyOurs fails in another author's module: .*training_settings"),
        (Mute, testing.check_example, "Mute has no example in its docstring"),
        (Stale, testing.check_example, "unexpected keyword argument 'faktor'"),
    ],
)
def test_a_broken_promise_is_reported(technique, check, sentence):
    with pytest.raises(AssertionError, match=sentence):
        check(Case(technique, training=Training(epochs=int(technique is Forgets), learning_rate=1e-2)))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({}, "The YAML of Halve lacks factor, which its constructor takes"),
        ({"factor": 0.25}, "factor is 0.25 in the YAML of Halve and 0.5 in its constructor"),
        ({"factor": "${seed}", "other": 1}, "has other, which its constructor does not take"),
    ],
)
def test_a_yaml_that_differs_from_the_constructor_is_reported(config, sentence):
    with pytest.raises(AssertionError, match=sentence):
        testing.check_config(Case(Halve, config=config))


def test_without_its_packages_it_is_skipped(monkeypatch):
    monkeypatch.setattr(Halve, "packages", ("no_such_package",))
    with pytest.raises(SkipTest, match="Halve needs no_such_package"):
        Case(Halve)
