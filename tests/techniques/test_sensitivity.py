import math
import random
from types import SimpleNamespace

import pytest
import tiny
import torch
from pydantic import ValidationError
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from compress.errors import UserError
from compress.maths.allocation import Point, allocate_sparsity, read_points, write_points
from compress.models.batches import spread_evenly
from compress.models.layers import evaluation_mode
from compress.models.matrices import Matrix, matrices
from compress.tasks.metrics import TaskMetrics
from compress.techniques.finetune import FineTune
from compress.techniques.sensitivity import Sensitivity, draw_layer_drops, prune_each

ACCURACY = SimpleNamespace(kind="multiclass", num_labels=3, metrics=("accuracy",), primary="accuracy")
PERPLEXITY = SimpleNamespace(kind="lm", num_labels=0, metrics=("perplexity",), primary="perplexity")


def fit(module, *callbacks, validation=None, epochs=0, logger=False):
    tiny.trainer(*callbacks, epochs=epochs, logger=logger, num_sanity_val_steps=0).fit(
        module, tiny.loader(), validation
    )


def points(layer, weights, drops):
    return [Point(layer, weights, sparsity, 1 - drop, drop) for sparsity, drop in drops.items()]


@pytest.mark.parametrize("build", tiny.ALL)
def test_every_layer_is_measured_at_every_sparsity_and_put_back_bit_for_bit(build):
    lm = build is tiny.llama_lm
    task = PERPLEXITY if lm else ACCURACY
    model, untouched = build(), build()
    stage = Sensitivity(sparsities=[0.9, 0.5], samples=8, metrics=TaskMetrics(task), task=task)
    fit(FineTune(model), stage, validation=tiny.loader(lm=lm))
    asked = [(name, linear.weight.numel(), s) for name, linear in matrices(model).items() for s in (0.5, 0.9)]
    assert [(point.layer, point.weights, point.sparsity) for point in stage.points] == asked
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in untouched.state_dict().items())


def loud():
    """Return a model whose answers depend on its blocks, as those of a trained model do."""
    model = tiny.bert()
    for linear in matrices(model).values():
        linear.weight.data *= 8
    return model


def test_a_point_is_the_model_with_that_layer_alone_pruned():
    model, by_hand, batch = loud(), loud(), tiny.batch(rows=40)
    name, layer = list(matrices(by_hand).items())[2]
    loss, accuracy = {}, {}
    for sparsity in (0.0, 0.9):
        weight = layer.weight.data
        weight.view(-1)[weight.abs().flatten().argsort()[: round(sparsity * weight.numel())]] = 0
        output = by_hand(**batch)
        loss[sparsity] = output.loss.item()
        accuracy[sparsity] = (output.logits.argmax(-1) == batch["labels"]).float().mean().item()
    for given, metric, value, drop in (
        ({}, "loss", loss[0.9], loss[0.9] - loss[0.0]),
        (
            {"metrics": TaskMetrics(ACCURACY), "task": ACCURACY},
            "accuracy",
            accuracy[0.9],
            accuracy[0.0] - accuracy[0.9],
        ),
    ):
        stage = Sensitivity(sparsities=[0.9], samples=40, **given)
        fit(FineTune(model), stage, validation=DataLoader([batch], batch_size=None))
        assert stage.metric == metric and stage.points[2].layer == name and drop
        assert stage.points[2].value == pytest.approx(value) and stage.points[2].drop == pytest.approx(drop)


@pytest.mark.parametrize(("higher", "drop"), [(True, 0.25), (False, -0.25)])
def test_a_drop_is_positive_where_worse(higher, drop):
    values = iter([0.75, 0.5])
    (point,) = prune_each(
        {"a": Matrix("a", torch.nn.Linear(2, 2))}, [0.5], lambda: next(values), higher, "technique.sensitivity"
    )
    assert (point.value, point.drop) == (0.5, drop)


def test_a_value_that_is_no_number_is_an_infinite_drop_and_refused_for_the_unpruned_model():
    values = iter([0.75, math.nan])
    (point,) = prune_each(
        {"a": Matrix("a", torch.nn.Linear(2, 2))}, [0.5], lambda: next(values), True, "technique.sensitivity"
    )
    assert point.drop == math.inf
    with pytest.raises(UserError, match="measured nan on the unpruned model"):
        list(prune_each({}, [0.5], lambda: math.nan, True, "technique.sensitivity"))


def test_a_layer_is_put_back_even_where_measuring_fails():
    layer = torch.nn.Linear(4, 4)
    layer.weight.data[0, 0] = -0.0
    before = layer.weight.data.clone()
    values = iter([1.0])  # and then StopIteration
    with pytest.raises(RuntimeError):
        list(prune_each({"a": Matrix("a", layer)}, [0.5], lambda: next(values), True, "technique.sensitivity"))
    assert torch.equal(layer.weight.data.view(torch.int32), before.view(torch.int32))


def test_every_module_gets_its_own_mode_back():
    model = tiny.bert().train()
    model.bert.embeddings.eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert model.training and model.bert.encoder.training and not model.bert.embeddings.training


def test_exactly_so_many_examples_spread_over_a_sorted_loader():
    batches = [{"input_ids": torch.full((size, 2), n)} for n, size in enumerate([4, 4, 4, 4, 4, 4, 4, 1])]
    picked = spread_evenly(batches, 10)
    assert [batch["input_ids"][0, 0].item() for batch in picked] == [1, 4, 6]
    assert [len(batch["input_ids"]) for batch in picked] == [4, 4, 2]
    assert sum(len(batch["input_ids"]) for batch in spread_evenly(batches, 29)) == 29


def test_more_examples_than_there_are_is_reported_with_how_many_there_are():
    with pytest.raises(UserError, match=r"samples is 17 and there are 16 validation examples. Set .*samples=16"):
        fit(FineTune(tiny.bert()), Sensitivity(samples=17), validation=tiny.loader())


def test_without_validation_data_it_says_what_to_give():
    with pytest.raises(UserError, match=r"the Trainer has none\. Pass `fit` a validation loader"):
        fit(FineTune(tiny.bert()), Sensitivity(samples=4))


def test_it_works_alone_in_a_script_whose_module_is_not_ours_on_what_was_trained():
    class Theirs(tiny.Theirs):
        def validation_step(self, batch, _):
            pass

    stage, module = Sensitivity(sparsities=[0.9], samples=16), Theirs(tiny.bert())
    fit(module, stage, validation=tiny.loader(), epochs=1)
    again = Sensitivity(sparsities=[0.9], samples=16)
    fit(module, again, validation=tiny.loader())
    assert stage.points == again.points and len(stage.points) == 12
    untrained = Sensitivity(sparsities=[0.9], samples=16)
    fit(Theirs(tiny.bert()), untrained, validation=tiny.loader())
    assert stage.points != untrained.points


@pytest.mark.parametrize("wrong", [{"sparsities": []}, {"sparsities": [1.0]}, {"sparsities": [0.0]}, {"samples": 0}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        Sensitivity(**wrong)


def test_a_repeated_sparsity_is_refused():
    with pytest.raises(UserError, match=r"sparsities is \[0.5, 0.7, 0.5\] and repeats a value"):
        Sensitivity(sparsities=[0.5, 0.7, 0.5])


def test_the_csv_holds_the_points_exactly(tmp_path):
    some = [*points("a.0", 12, {0.3: 1 / 3, 0.5: -0.0}), Point("a.1", 7, 0.9, math.nan, math.inf)]
    write_points(tmp_path / "s.csv", some, "accuracy")
    assert (tmp_path / "s.csv").read_text().splitlines()[0] == "layer,weights,sparsity,metric,value,drop"
    assert repr(read_points(tmp_path / "s.csv")) == repr(some)  # nan is no equal of itself


@pytest.mark.parametrize(("layers", "strips"), [(1, 1), (36, 1), (154, 4)])
def test_the_heat_map_has_a_cell_with_its_drop_for_every_point(layers, strips):
    some = [point for n in range(layers) for point in points(f"layer.{n}.dense", 1, {0.3: 0.0, 0.5: n / 1000})]
    *maps, bar = draw_layer_drops(some, "accuracy").axes
    assert len(maps) == strips and sum(len(axis.texts) for axis in maps) == 2 * layers
    named = [label.get_text() for axis in maps for label in axis.get_yticklabels()]
    assert named == (["dense"] if layers == 1 else [f"{n}.dense" for n in range(layers)])
    assert bar.get_ylabel() == "drop of accuracy"


def test_the_heat_map_shows_an_infinite_rise():
    *_, bar = draw_layer_drops(points("a", 1, {0.5: 0.1, 0.9: math.inf}), "perplexity").axes
    assert bar.get_ylabel() == "rise of perplexity"


def test_csv_and_picture_for_people_and_tensorboard(tmp_path):
    stage = Sensitivity(sparsities=[0.5], samples=4)
    logger = TensorBoardLogger(tmp_path, name="tensorboard", version="")
    fit(FineTune(tiny.bert()), stage, validation=tiny.loader(), logger=logger)
    stage.report(tmp_path)
    assert read_points(tmp_path / "sensitivity.csv") == stage.points
    assert (tmp_path / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["images"] == ["sensitivity"]


TWO = points("a", 100, {0.5: 0.1, 0.9: 0.5}) + points("b", 300, {0.5: 0.2, 0.9: 1.0})


@pytest.mark.parametrize(
    ("sparsity", "a", "b"),
    [
        (0.3125, 0.5, 0.25),  # both lose 0.1: (100 * 0.5 + 300 * 0.25) / 400
        (0.525, 0.6, 0.5),  # both lose 0.2
        (0.75, 0.9, 0.7),  # b loses 0.6, more than a does as far as it was measured
        (0.9, 0.9, 0.9),
    ],
)
def test_two_layers_worked_by_hand(sparsity, a, b):
    assert allocate_sparsity(TWO, sparsity) == pytest.approx({"a": a, "b": b})


@pytest.mark.parametrize(
    ("sparsity", "free", "dear"),
    [
        (0.2, 0.4, 0.0),  # `free` loses nothing up to 0.5
        (0.375, 0.6, 0.15),  # both lose 0.1
        (0.55, 0.7, 0.4),  # 0.2 is lost by `dear` at 0.3 and still at 0.5: half of the way
    ],
)
def test_what_costs_nothing_goes_first_and_a_drop_never_falls_again(sparsity, free, dear):
    level = points("free", 1, {0.3: -0.1, 0.5: 0.0, 0.9: 0.4})
    falling = points("dear", 1, {0.3: 0.2, 0.5: 0.1, 0.9: 0.4})
    assert allocate_sparsity(level + falling, sparsity) == pytest.approx({"free": free, "dear": dear})


@pytest.mark.parametrize("seed", range(20))
def test_the_mean_over_all_weights_is_the_sparsity_asked_for(seed):
    chance = random.Random(seed)
    weights = {f"layer.{n}": chance.randint(1, 10**6) for n in range(30)}
    steps = [0.0, 0.01, -0.01, 0.1, 0.3]  # ties, plateaus and gains among them
    some = [
        p for name, n in weights.items() for p in points(name, n, {s: chance.choice(steps) for s in (0.3, 0.6, 0.9)})
    ]
    for sparsity in (0.001, 0.3, 0.5, chance.uniform(0, 0.9), 0.9):
        shares = allocate_sparsity(some, sparsity)
        mean = sum(weights[name] * share for name, share in shares.items()) / sum(weights.values())
        assert mean == pytest.approx(sparsity, abs=1e-12)
        assert all(0 <= share <= 0.9 + 1e-12 for share in shares.values())


def test_more_than_was_measured_is_refused():
    with pytest.raises(UserError, match=r"sparsity of 0.95 is requested .* measured up to 0.9. Set a lower sparsity"):
        allocate_sparsity(TWO, 0.95)


def test_no_layer_is_pruned_where_the_metric_broke():
    broken = [*points("a", 100, {0.5: 0.1, 0.7: math.inf, 0.9: 0.1}), *points("b", 100, {0.5: 0.2, 0.7: 0.3, 0.9: 0.4})]
    assert allocate_sparsity(broken, 0.7) == pytest.approx({"a": 0.5, "b": 0.9})
    with pytest.raises(UserError, match=r"measured up to 0.7"):
        allocate_sparsity(broken, 0.8)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_the_largest_sparsity_measured_can_be_asked_for_whatever_the_rounding(sparsity):
    sizes = {f"layer{i}": 1000 * i + 7 for i in range(1, 12)}
    points = [Point(name, size, sparsity, 0.5, 0.1) for name, size in sizes.items()]
    assert allocate_sparsity(points, sparsity) == pytest.approx(dict.fromkeys(sizes, sparsity))
