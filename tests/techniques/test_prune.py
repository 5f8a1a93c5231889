import pytest
import pytorch_lightning as pl
import tiny
import torch
from pydantic import ValidationError
from transformers import BertConfig, BertForSequenceClassification

from compress.errors import UserError
from compress.models import linears, zeros
from compress.techniques import Training
from compress.techniques.finetune import FineTune
from compress.techniques.prune import HoldZeros, Prune, kth_smallest, measured_sparsity, smallest

WEIGHT = torch.tensor([[0.1, -0.9, 0.3, 0.7], [-0.2, 0.8, -0.4, 0.6]])


def fit(model, *callbacks, epochs=0):
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    trainer.fit(FineTune(model, training=Training(learning_rate=1e-2)), tiny.loader())
    return model


def sparsity(model):
    return measured_sparsity(linear.weight for _, linear in linears(model))


def test_the_smallest_half_of_a_matrix_worked_by_hand():
    pruned = smallest({"w": WEIGHT.abs()}, 0.5)["w"]
    assert pruned.tolist() == [[True, False, True, False], [True, False, True, False]]


def test_layers_are_ranked_together():
    pruned = smallest({"small": torch.tensor([1.0, 2.0]), "large": torch.tensor([10.0, 20.0])}, 0.5)
    assert pruned["small"].all() and not pruned["large"].any()


def test_ties_are_pruned_to_the_count_asked_for():
    assert smallest({"w": torch.ones(10)}, 0.3)["w"].sum() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_threshold_is_that_of_a_sort(dtype):
    scores = [torch.randn(50, 7).abs().to(dtype), torch.rand(31).to(dtype), torch.zeros(3, dtype=dtype)]
    ordered = torch.cat([score.flatten().float() for score in scores]).sort().values
    for k in (1, 3, 4, 100, len(ordered)):
        assert kth_smallest(scores, k) == ordered[k - 1]


@pytest.mark.parametrize("build", tiny.ALL)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_sparsity_asked_for_is_measured(build, scope):
    model = build()
    fit(model, Prune(sparsity=0.3, scope=scope))
    assert sparsity(model) == pytest.approx(0.3, abs=1e-3)
    each = [measured_sparsity([linear.weight]) for _, linear in linears(model)]
    assert (max(each) - min(each) < 0.01) == (scope == "layer")


def test_head_and_embeddings_are_left_alone():
    model, untouched = tiny.bert(), tiny.bert()
    fit(model, Prune(sparsity=0.9))
    for name in ("classifier", "bert.pooler.dense", "bert.embeddings.word_embeddings"):
        assert torch.equal(model.get_submodule(name).weight, untouched.get_submodule(name).weight)


def test_zeros_are_held_while_the_same_fit_trains():
    model, before = tiny.bert(), tiny.bert()
    fit(model, Prune(sparsity=0.5), epochs=2)
    assert sparsity(model) == pytest.approx(0.5, abs=1e-3)
    assert not torch.equal(model.classifier.weight, before.classifier.weight)


def test_zeros_are_held_through_a_later_fit():
    model = fit(tiny.bert(), Prune(sparsity=0.5))
    mask = zeros(model)
    fit(model, HoldZeros(), epochs=2)
    assert all((model.get_submodule(name).weight[zero] == 0).all() for name, zero in mask.items())


def test_without_holding_training_fills_the_zeros_in():
    model = fit(tiny.bert(), Prune(sparsity=0.5))
    fit(model, epochs=1)
    assert sparsity(model) < 0.01


def test_pruning_again_keeps_what_was_pruned():
    model = fit(tiny.bert(), Prune(sparsity=0.3))
    mask = zeros(model)
    fit(model, Prune(sparsity=0.6))
    assert sparsity(model) == pytest.approx(0.6, abs=1e-3)
    assert all((model.get_submodule(name).weight[zero] == 0).all() for name, zero in mask.items())


def test_pruning_to_less_than_there_is_raises():
    model = fit(tiny.bert(), Prune(sparsity=0.5))
    with pytest.raises(UserError, match=r"sparsity of 0.5 and the model's is 0.5"):
        fit(model, Prune(sparsity=0.5))


def test_pruning_to_less_is_told_before_anything_is_loaded():
    with pytest.raises(UserError, match=r"sparsity of 0.5 follows one to 0.5"):
        Prune(sparsity=0.5).check(tiny.bert(), [Prune(sparsity=0.5)])
    Prune(sparsity=0.6).check(tiny.bert(), [Prune(sparsity=0.5)])


def test_of_a_student_and_a_deeper_teacher_the_student_is_pruned():
    class Distil(FineTune):
        def __init__(self):
            super().__init__(tiny.bert())
            self.teacher = BertForSequenceClassification(BertConfig(**{**tiny.SHAPE, "num_hidden_layers": 4}))

    module = Distil()
    pl.Trainer(max_epochs=0, callbacks=[Prune(sparsity=0.5)], logger=False, enable_checkpointing=False).fit(
        module, tiny.loader()
    )
    assert sparsity(module.model) == pytest.approx(0.5, abs=1e-3) and not zeros(module.teacher)


@pytest.mark.parametrize("wrong", [{"sparsity": 1.0}, {"sparsity": 0}, {"sparsity": "half"}, {"scope": "row"}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        Prune(**wrong)


def test_it_works_alone_in_a_script_whose_module_is_not_ours():
    class Theirs(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = tiny.bert()

        def training_step(self, batch, _):
            return self.net(**batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    theirs = Theirs()
    pl.Trainer(
        max_epochs=1,
        callbacks=[Prune(sparsity=0.5)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
    ).fit(theirs, tiny.loader())
    assert sparsity(theirs) == pytest.approx(0.5, abs=1e-3)
