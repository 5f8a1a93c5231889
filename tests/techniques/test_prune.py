from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import tiny
import torch
from pydantic import ValidationError
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from compress.errors import UserError
from compress.maths.sparsity import mask_rows, mask_tensor, wanda_score
from compress.models.matrices import find_zeros, matrices, measure_sparsity
from compress.running.training import HoldZeros, KeepBest
from compress.technique import Training
from compress.techniques.finetune import FineTune
from compress.techniques.prune import Prune
from compress.techniques.sensitivity import Sensitivity
from compress.techniques.structured import Structured


def fit(model, *callbacks, epochs=0):
    tiny.trainer(*callbacks, epochs=epochs).fit(FineTune(model, training=Training(learning_rate=1e-2)), tiny.loader())
    return model


def sparsity(model):
    return measure_sparsity(linear.weight for linear in matrices(model).values())


@pytest.mark.parametrize("build", tiny.ALL)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_sparsity_asked_for_is_measured(build, scope):
    model = build()
    fit(model, Prune(sparsity=0.3, scope=scope))
    assert sparsity(model) == pytest.approx(0.3, abs=1e-3)
    each = [measure_sparsity([linear.weight]) for linear in matrices(model).values()]
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
    mask = find_zeros(model)
    fit(model, HoldZeros(), epochs=2)
    assert all((model.get_submodule(name).weight[zero] == 0).all() for name, zero in mask.items())


def test_without_holding_training_fills_the_zeros_in():
    model = fit(tiny.bert(), Prune(sparsity=0.5))
    fit(model, epochs=1)
    assert sparsity(model) < 0.01


def test_pruning_again_keeps_what_was_pruned():
    model = fit(tiny.bert(), Prune(sparsity=0.3))
    mask = find_zeros(model)
    fit(model, Prune(sparsity=0.6))
    assert sparsity(model) == pytest.approx(0.6, abs=1e-3)
    assert all((model.get_submodule(name).weight[zero] == 0).all() for name, zero in mask.items())


def test_pruning_to_less_than_there_is_raises():
    model = fit(tiny.bert(), Prune(sparsity=0.5))
    with pytest.raises(UserError, match=r"sparsity of 0.5 and the model's is 0.5"):
        fit(model, Prune(sparsity=0.5))


def test_pruning_to_less_is_reported_before_anything_is_loaded():
    with pytest.raises(UserError, match=r"sparsity of 0.5 follows technique.prune.sparsity of 0.5"):
        Prune(sparsity=0.5).check(tiny.bert(), [Prune(sparsity=0.5)])
    Prune(sparsity=0.6).check(tiny.bert(), [Prune(sparsity=0.5)])


def test_what_a_chain_prunes_again_is_judged_only_where_it_is_known():
    for before, after in (
        (Prune(sparsity=0.5), Prune(sparsity=0.2, ratios={"*attention*": 0.8})),
        (Prune(sparsity=0.5, ratios={"*": 0.1}), Prune(sparsity=0.4)),
    ):
        after.check(tiny.bert(), [before])
    Prune(sparsity=0.5).check(tiny.bert(), [Prune(sparsity=0.5), Structured(target_heads=2)])
    with pytest.raises(UserError, match="nothing left to prune"):
        Prune(pattern="2:4").check(tiny.bert(), [Prune(pattern="2:4")])


def test_more_than_sensitivity_will_measure_is_reported_before_it_does():
    with pytest.raises(UserError, match=r"measures up to 0.5. Set a lower sparsity, or .*sparsities=\[...,0.6\]"):
        Prune(sparsity=0.6, ratios="sensitivity").check(tiny.bert(), [Sensitivity(sparsities=(0.5,))])
    with pytest.raises(UserError, match="Leave embeddings and head in technique.prune.skip"):
        Prune(ratios="sensitivity", skip=()).check(tiny.bert(), [Sensitivity()])


def test_of_a_student_and_a_deeper_teacher_the_student_is_pruned():
    class Distil(FineTune):
        def __init__(self):
            super().__init__(tiny.bert())
            self.teacher = BertForSequenceClassification(BertConfig(**{**tiny.SHAPE, "num_hidden_layers": 4}))

    module = Distil()
    tiny.trainer(Prune(sparsity=0.5)).fit(module, tiny.loader())
    assert sparsity(module.model) == pytest.approx(0.5, abs=1e-3) and not find_zeros(module.teacher)


@pytest.mark.parametrize("wrong", [{"sparsity": 1.0}, {"sparsity": -0.1}, {"sparsity": "half"}, {"scope": "block"}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        Prune(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pattern": "4:4"}, r"pattern is 4:4; a pattern keeps some weights of every group"),
        ({"pattern": "0:4"}, r"and prunes some"),
        ({"pattern": 124}, r"pattern is 124; a text such as '2:4' is expected"),
        ({"pattern": "2:4", "scope": "row"}, r"always prunes in groups, which contradicts technique.prune.scope=row"),
        ({"criterion": "wanda", "scope": "global"}, r"`wanda` ranks weights by row or layer"),
        ({"criterion": "movement"}, r"learns its scores during training.*schedule=gradual"),
        ({"ratios": {"*": 0.3}, "scope": "global"}, r"contradicts technique.prune.scope=global"),
        ({"schedule": "gradual", "begin": 0.8}, r"begin=0.8 is not before technique.prune.end=0.7"),
        ({"schedule": "gradual", "training": Training(epochs=0)}, r"train.epochs is 0"),
    ],
)
def test_settings_that_contradict_are_reported(wrong, message):
    with pytest.raises(UserError, match=message):
        Prune(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pattern": "2:5"}, r"the 32 inputs of `bert.encoder.layer.0.attention.self.query` are no multiple of 5"),
        ({"skip": ["embeddings", "head", "*mlp*"]}, r"the pattern `\*mlp\*`, which matches no layer"),
        ({"skip": ["*"]}, r"leaves no layer to work on"),
        ({"ratios": {"*mlp*": 0.3}}, r"the pattern `\*mlp\*`, which matches no layer"),
        ({"ratios": "sensitivity"}, r"technique=sensitivity\+prune"),
        ({"ratios": "nowhere.csv"}, r"nowhere.csv, which is no file"),
        ({"criterion": "wanda", "skip": ["embeddings"]}, r"`bert.pooler.dense` is outside"),
    ],
)
def test_what_does_not_fit_the_model_is_reported_before_anything_is_loaded(wrong, message):
    with pytest.raises(UserError, match=message):
        Prune(**wrong).check(tiny.bert(), [])


@pytest.mark.parametrize("build", tiny.ALL)
@pytest.mark.parametrize("criterion", ["magnitude", "random", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", [None, "2:4", "4:8", "1:4"])
def test_every_criterion_meets_sparsity_and_pattern(build, criterion, pattern):
    model = build()
    fit(model, Prune(sparsity=0.5, pattern=pattern, criterion=criterion, samples=8, batch_size=4))
    left, group = map(int, (pattern or "1:2").split(":"))
    assert sparsity(model) == pytest.approx(1 - left / group, abs=1e-3)
    for linear in matrices(model).values() if pattern else ():
        assert ((linear.weight != 0).reshape(len(linear.weight), -1, group).sum(-1) == left).all()


def test_rows_are_pruned_alike_by_scope_row():
    model = fit(tiny.bert(), Prune(sparsity=0.5, scope="row"))
    assert all(((linear.weight == 0).sum(1) == linear.inputs // 2).all() for linear in matrices(model).values())


def test_wanda_prunes_as_its_scores_on_the_inputs_of_the_pruned_blocks_before_say():
    model, dense = tiny.llama(), tiny.llama()
    fit(model, Prune(sparsity=0.5, criterion="wanda", samples=16))
    name, first = next(iter(matrices(dense).items()))
    inputs = []
    first.module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    norms = torch.zeros(first.inputs)
    with torch.no_grad():
        for batch in tiny.loader():
            dense(**batch)
            norms += inputs[-1][batch["attention_mask"].bool()].square().sum(0)
    mask = mask_rows(wanda_score(first.weight, norms), 0.5)
    assert torch.equal(model.get_submodule(name).weight == 0, mask)


def test_patterns_give_layers_their_own_sparsity_and_skip_others():
    ratios = {"*attention.self*": 0.75, "*intermediate*": 0.25}
    model = fit(tiny.bert(), Prune(sparsity=0.5, ratios=ratios, skip=("embeddings", "head", "bert.encoder.layer.1*")))
    shares = {name: measure_sparsity([linear.weight]) for name, linear in matrices(model).items()}
    assert shares.pop("bert.encoder.layer.0.attention.self.query") == 0.75
    assert shares.pop("bert.encoder.layer.0.intermediate.dense") == 0.25
    assert shares.pop("bert.encoder.layer.0.output.dense") == 0.5
    assert not any(share for name, share in shares.items() if "layer.1" in name)


def test_embeddings_and_head_are_pruned_when_they_are_not_skipped():
    model = fit(tiny.bert(), Prune(sparsity=0.5, scope="layer", skip=()))
    for name in ("classifier", "bert.pooler.dense", "bert.embeddings.word_embeddings"):
        assert measure_sparsity([model.get_submodule(name).weight]) == pytest.approx(0.5, abs=0.02)
    mask = find_zeros(model)
    fit(model, HoldZeros(), epochs=1)
    assert {"classifier", "bert.embeddings.word_embeddings"} <= set(mask)
    assert all((model.get_submodule(name).weight[zero] == 0).all() for name, zero in mask.items())


def test_an_output_layer_tied_to_the_embeddings_is_skipped_with_them():
    config = LlamaConfig(**tiny.SHAPE, num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=True)
    model = fit(LlamaForCausalLM(config), Prune(sparsity=0.5, skip=("embeddings",)))
    assert not (model.lm_head.weight[1:] == 0).any()


class Record(pl.Callback):
    """Record the sparsity after every training step."""

    def __init__(self):
        self.shares = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.shares.append(sparsity(pl_module.model))


@pytest.mark.parametrize("criterion", ["magnitude", "movement", "random", "wanda"])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_gradual_pruning_follows_the_cubic_schedule(criterion, pattern):
    record = Record()
    prune = Prune(sparsity=0.5, pattern=pattern, criterion=criterion, schedule="gradual", end=0.75, every=2, samples=4)
    fit(tiny.bert(), prune, record, epochs=3)
    assert len(record.shares) == 12 and record.shares == sorted(record.shares)
    assert record.shares[0] == 0 and record.shares[8:] == pytest.approx([0.5] * 4, abs=1e-3) and prune.settled
    if not pattern:
        assert record.shares[4] == pytest.approx(0.5 * (1 - (1 - 4 / 8) ** 3), abs=1e-3)


def test_iterative_pruning_goes_in_equal_rounds_with_training_between():
    record = Record()
    fit(tiny.bert(), Prune(sparsity=0.6, schedule="iterative", rounds=3), record, epochs=3)
    assert record.shares == pytest.approx([0.2] * 4 + [0.4] * 4 + [0.6] * 4, abs=1e-3)


def test_movement_prunes_what_training_moves_towards_zero_and_magnitude_does_not():
    # The loss of this one layer pulls large weights to zero and small weights away from zero.
    class Pull(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = tiny.bert()
            self.layer = self.model.bert.encoder.layer[0].intermediate.dense
            torch.manual_seed(0)
            self.layer.weight.data = torch.where(torch.rand(64, 32) < 0.5, 1.0, 0.1)
            self.large = self.layer.weight.detach() == 1

        def training_step(self, batch, _):
            weight = self.layer.weight
            return torch.where(self.large, weight, -weight).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    def pruned(criterion):
        module = Pull()
        share = module.large.float().mean().item()
        stage = Prune(
            sparsity=share, criterion=criterion, scope="layer", schedule="gradual", every=1, end=1.0,
            skip=("embeddings", "head", "*layer.1*", "*attention*", "*layer.0.output*"),
        )  # fmt: skip
        tiny.trainer(stage, epochs=5).fit(module, tiny.loader())
        return (module.layer.weight == 0), module.large

    zero, large = pruned("movement")
    assert torch.equal(zero, large)
    zero, large = pruned("magnitude")
    assert torch.equal(zero, ~large) or (zero & ~large).sum() > 0.9 * (~large).sum()


def test_movement_lets_a_weight_come_back_with_the_value_that_it_had():
    stage = Prune(sparsity=0.5, criterion="movement", schedule="gradual")
    model = tiny.bert()
    layer = model.bert.encoder.layer[0].intermediate.dense
    stage.layers, stage.dense = {"it": layer}, {"it": layer.weight.detach().clone()}
    size = layer.weight.numel()
    stage.movement = {"it": torch.linspace(-1, 1, size)[torch.randperm(size)].view_as(layer.weight)}
    with torch.no_grad():
        for _ in range(2):
            stage._apply_mask("it", mask_tensor(stage.movement["it"], 0.5))
            stage.masks = {"it": layer.weight != 0}
            stage.movement["it"].neg_()
    assert torch.equal(layer.weight != 0, stage.movement["it"] < 0)
    assert torch.equal(layer.weight[layer.weight != 0], stage.dense["it"][layer.weight != 0])


def test_movement_keeps_what_training_made_of_the_weights_that_stay():
    def moved(criterion):
        model, before = tiny.bert(), tiny.bert()
        fit(model, Prune(sparsity=0.5, criterion=criterion, schedule="gradual", end=1.0, every=1), epochs=3)
        pairs = [(linear.weight, before.get_submodule(name).weight) for name, linear in matrices(model).items()]
        return sum(((new - old) * (new != 0)).square().sum().item() for new, old in pairs)

    assert moved("movement") > 0.5 * moved("magnitude")


def test_movement_refuses_scaled_gradients():
    with pytest.raises(UserError, match="precision 16-mixed scales them"):
        trainer = SimpleNamespace(precision="16-mixed")
        Prune(criterion="movement", schedule="gradual").on_fit_start(trainer, FineTune(tiny.bert()))


def test_a_training_that_ends_before_its_schedule_fails():
    stage = Prune(sparsity=0.5, schedule="gradual")
    with pytest.raises(UserError, match="has 0 steps"):
        fit(tiny.bert(), stage)


@pytest.mark.parametrize("schedule", ["gradual", "iterative"])
def test_the_epoch_that_a_training_ends_with_is_a_pruned_one(schedule, tmp_path):
    stage = Prune(sparsity=0.5, schedule=schedule, rounds=4, end=0.9, every=1)
    best = KeepBest(tmp_path, monitor="validation/loss", mode="min", save_weights_only=True)
    module = FineTune(tiny.bert(), training=Training(learning_rate=1e-2))
    tiny.trainer(stage, best, epochs=4, enable_checkpointing=True).fit(module, tiny.loader(), tiny.loader())
    assert best.best_model_path and sparsity(module.model) == pytest.approx(0.5, abs=1e-3)


def test_it_works_alone_in_a_script_whose_module_is_not_ours():
    theirs = tiny.Theirs(tiny.bert(), name="net")
    tiny.trainer(Prune(sparsity=0.5), epochs=1).fit(theirs, tiny.loader())
    assert sparsity(theirs) == pytest.approx(0.5, abs=1e-3)
