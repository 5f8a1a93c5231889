"""The contract of a stage: misspelt promises are refused, and errors name the stage's own setting."""

import pytest
import pytorch_lightning as pl
import tiny
from test_plan import check

from compress.errors import UserError
from compress.models.matrices import matrices
from compress.planning.plan import Step
from compress.technique import Technique, Training
from compress.techniques.finetune import FineTune
from compress.techniques.gptq import GPTQ
from compress.techniques.prune import Prune


def test_outside_a_chain_the_key_is_that_of_the_module():
    assert Prune.key == "technique.prune" and FineTune.key == "technique.finetune"
    assert GPTQ(group_size=-1).key == "technique.gptq"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"keep_zeros": True}, "Own.keep_zeros is no attribute of a technique; did you mean keeps_zeros?"),
        ({"__annotations__": {"shrink": bool}}, "Own.shrink is no attribute of a technique; did you mean shrinks?"),
        ({"momentum": 0.9}, "Own.momentum is no attribute of a technique; set it in the constructor"),
        ({"reports": lambda self, folder: None}, "Own.reports is no method of a technique; did you mean report?"),
    ],
)
@pytest.mark.parametrize("base", [pl.Callback, pl.LightningModule])
def test_a_promise_or_a_method_that_is_misspelt_is_refused(base, content, sentence):
    with pytest.raises(TypeError) as error:
        type("Own", (Technique, base), content)
    assert str(error.value).startswith(sentence)


def test_what_is_lightnings_or_ones_own_is_accepted():
    class Own(Technique, pl.LightningModule):
        strict_loading = False
        automatic_optimization = False
        _momentum = 0.9

        @property
        def momentum(self):
            return self._momentum

        def scores(self):
            return []

    assert Own().momentum == 0.9


def test_a_class_that_is_no_technique_is_refused():
    with pytest.raises(UserError, match=r"`gptq` names the class pathlib.Path, which is no Technique. Inherit"):
        check("technique=gptq", "technique.gptq._target_=pathlib.Path")


class Fails(Technique, pl.Callback):
    def __init__(self, where: str) -> None:
        self.where = where
        self._fail("constructor")

    def _fail(self, where):
        if where == self.where:
            raise UserError(f"{self.key}.where is {where}.")

    def check(self, skeleton, before):
        self._fail("check")

    def on_fit_start(self, trainer, pl_module):
        self._fail("fit")


@pytest.mark.parametrize("where", ["constructor", "check", "fit"])
def test_an_error_names_the_key_of_the_second_stage_of_a_name(where):
    with pytest.raises(UserError, match=f"technique.fails_2.where is {where}"):
        stage = Step("fails_2", "fails", Fails, {"where": where}, Training()).build()
        stage.check(tiny.bert(), [])
        tiny.trainer(stage).fit(FineTune(tiny.bert()), tiny.loader())


def build(**settings):
    return Step("prune_2", "prune", Prune, settings, Training()).build(model=tiny.bert())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"sparsity": 2}, "technique.prune_2.sparsity is 2; "),
        ({"sparsty": 0.5}, "prune_2.sparsty is no setting of `technique.prune_2`; expected one of sparsity, "),
        ({"pattern": "4:4"}, "technique.prune_2.pattern is 4:4"),
        ({"criterion": "wanda", "scope": "global"}, "Set technique.prune_2.scope=row"),
        ({"skip": ["*mlp*"]}, "technique.prune_2.skip"),
        ({"ratios": {"*mlp*": 0.3}}, "technique.prune_2.ratios"),
        ({"sparsity": 0.0}, "technique.prune_2.sparsity is 0"),
        ({"sparsity": 0.4}, "technique.prune_2 has a target sparsity of 0.4 and the model's is 0.5 already"),
    ],
)
def test_whatever_prune_raises_names_its_key(settings, sentence):
    model = tiny.bert()
    for linear in matrices(model).values():
        linear.weight.data[:, ::2] = 0
    with pytest.raises(UserError) as error:
        stage = build(**settings)
        stage.check(model, [])
        tiny.trainer(stage).fit(FineTune(model), tiny.loader())
    assert sentence in str(error.value)


def test_a_technique_without_methods_saves_floats_and_reports_nothing(tmp_path):
    class Plain(Technique, pl.Callback):
        pass

    stage, model = Plain(), tiny.bert()
    stage.check(model, [])
    assert stage.preview(model) is model
    stage.save(model, tmp_path)
    stage.report(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
