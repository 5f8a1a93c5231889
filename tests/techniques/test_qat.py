import copy
import json

import architectures
import pytest
import pytorch_lightning as pl
import tiny
import torch
from pydantic import ValidationError
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_w8a8 import logits, reloaded
from torch import nn
from torch.utils.data import DataLoader

from compress.errors import UserError
from compress.maths.rounding import Scheme, minmax_grid, round_to_grid
from compress.models.matrices import find_zeros, matrices, measure_matrices
from compress.running.promises import capture_state, check_bits, check_model
from compress.running.training import HoldZeros, KeepBest
from compress.runtimes.torch import load
from compress.technique import Training
from compress.techniques.finetune import FineTune
from compress.techniques.prune import Prune
from compress.techniques.qat import QAT, FakeQuantization, freeze_rounding


def fit(model, *callbacks, epochs=1, lr=1e-2, batches=None, **settings):
    module = FineTune(model, training=Training(learning_rate=lr))
    tiny.trainer(*callbacks, epochs=epochs, **settings).fit(module, *(batches or [tiny.loader()]))
    return model


def fake(between=None, learnt=True):
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[0.75, -0.2], [0.0, 1.5]])
    limits = None if between is None else nn.Parameter(torch.tensor(between), requires_grad=learnt)
    FakeQuantization(layer.weight, Scheme(4), limits, learnt).insert(layer)
    return layer


def test_a_layer_computes_with_what_its_weights_will_be_rounded_to():
    layer = fake()
    scale = torch.tensor([[2 * 0.75 / 15], [2 * 1.5 / 15]])  # from the widest weight of the row
    rounded = torch.tensor([[7, -2], [0, 7]]) * scale
    assert torch.allclose(layer(torch.eye(2)).T, rounded)
    assert layer.weight[0, 1].item() == pytest.approx(-0.2)  # the weight itself is not rounded
    expected = layer(torch.eye(2)).detach()
    assert freeze_rounding(layer).inputs is None
    assert torch.equal(layer(torch.eye(2)), expected) and torch.equal(layer.weight.T, expected)
    assert not dict(layer.named_children()) and len(list(layer.parameters())) == 1


def test_what_is_rounded_is_not_kept_for_the_gradients():
    kept, x = [], torch.randn(1, 2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        fake(between=[-1.0, 4.0])(x)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr()}


def test_gradients_go_straight_through_and_reach_the_ranges():
    layer = fake(between=[-1.0, 4.0])
    x = torch.tensor([[0.3, 9.0]], requires_grad=True)  # the second is out of range
    layer(x).sum().backward()
    assert x.grad[0, 0] != 0 and x.grad[0, 1] == 0
    # 0.75 and 1.5 are 7.5 steps, exactly the end of the grid; all get the gradient of their rounded inputs
    rounded = layer.fake_quantization.inputs(x).detach()
    assert torch.allclose(layer.weight.grad, rounded.expand(2, 2) * torch.tensor([[0, 1], [1, 0]]))
    ranges = layer.fake_quantization
    assert (ranges.reach.grad != 0).all()
    # A higher end raises the clipped 9, times the weights that read it: -0.2 is two steps of 0.1, 1.5 seven of 0.2.
    assert ranges.between.grad[1].item() == pytest.approx(-0.2 + 1.4, abs=0.02)


def test_a_moving_average_follows_the_batches_of_training_alone():
    layer = fake(between=[-1.0, 1.0], learnt=False)
    x = torch.tensor([[-3.0, 5.0]])
    with torch.no_grad():
        layer(x)
    assert layer.fake_quantization.between.tolist() == [-1, 1]
    layer(x)
    assert layer.fake_quantization.between.tolist() == pytest.approx([-1.02, 1.04])
    layer.weight.data *= 2  # the range follows the weights
    assert torch.allclose(layer.fake_quantization.scale(layer.weight), torch.tensor([[0.2], [0.4]]))


@pytest.mark.parametrize(
    ("build", "how"),
    [
        (tiny.bert, {}),
        (tiny.llama_lm, {}),
        (tiny.roberta, {"ranges": "moving_average"}),
        (tiny.llama, {"bits": 4, "group_size": 16}),
        (tiny.bert, {"bits": 4, "activations": False}),
        (tiny.llama_lm, {"activations": False, "ranges": "moving_average"}),
    ],
)
def test_it_keeps_zeros_and_reloads_to_the_same_logits_with_and_without_us(build, how, tmp_path):
    lm = build is tiny.llama_lm
    model = build()
    tiny.trainer(Prune(sparsity=0.4)).fit(FineTune(model), tiny.loader(lm=lm))
    masks, before = find_zeros(model), capture_state(model)
    stage, hold = QAT(samples=8, **how), HoldZeros()
    fit(model, stage, hold, batches=[tiny.loader(lm=lm)])
    assert all(
        torch.equal(~hold.masks[name], mask) for name, mask in masks.items()
    )  # and no weights that are only rounded to zero
    check_model("qat", stage, before, model)
    for name, layer in matrices(model).items():
        assert (layer.weight[masks[name]] == 0).all()
        groups = layer.weight.unflatten(1, (-1, stage.scheme.group(layer.inputs))).flatten(0, 1)
        assert all(len(group.unique()) <= 2**stage.scheme.bits for group in groups)
    expected = logits(model)
    sizes = measure_matrices(model)
    stage.save(model, tmp_path)
    check_bits("qat", stage.average_bits, sizes, tmp_path)
    for again in reloaded(build, tmp_path):
        assert torch.equal(logits(again), expected)
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert described["format"] == (
        "int-quantized" if stage.scheme.bits == 8 and stage.activations else "pack-quantized"
    )
    assert bool(described["config_groups"]["group_0"]["input_activations"]) == stage.activations


def test_all_trains_and_the_head_stays_in_full_precision():
    model, before = tiny.bert(), dict(tiny.bert().named_parameters())
    stage = QAT(bits=4, samples=8)
    fit(model, stage)
    assert not any(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert "classifier" not in stage.quantized and len(model.classifier.weight.unique()) == 3 * 32


class See(pl.Callback):
    """Record the ranges of the first layer at the start and the end of training."""

    def __init__(self):
        self.ranges = []

    def on_train_start(self, trainer, pl_module):
        ranges = next(iter(matrices(pl_module.model).items()))[1].module.fake_quantization
        self.ranges.append([part.clone() for part in (ranges.reach, ranges.between) if part is not None])

    on_train_end = on_train_start


@pytest.mark.parametrize("ranges", ["learnt", "moving_average"])
def test_training_moves_the_ranges(ranges):
    see, stage = See(), QAT(samples=8, ranges=ranges)
    model = fit(tiny.bert(), stage, see)
    begin, end = see.ranges
    assert len(end) == (2 if ranges == "learnt" else 1)
    assert not any(torch.equal(first, last) for first, last in zip(begin, end))
    query, key, value = (
        getattr(model.bert.encoder.layer[0].attention.self, name) for name in ("query", "key", "value")
    )
    assert query._forward_pre_hooks and not hasattr(query, "fake_quantization")
    first = "bert.encoder.layer.0.attention.self."
    scales = {name: stage.quantized[first + name].inputs.grid.scale.item() for name in ("query", "key", "value")}
    assert len(set(scales.values())) == 1  # they share an input
    assert scales["query"] == pytest.approx((end[-1][1] - end[-1][0]).item() / 255)


class SpoilTheSecondEpoch(pl.Callback):
    def __init__(self):
        self.best = None

    def on_validation_end(self, trainer, pl_module):
        if self.best is None:
            self.best = logits(pl_module.model)
            pl_module.model.train()

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.current_epoch == 1:
            for parameter in pl_module.parameters():
                parameter.data *= 3


@pytest.mark.parametrize("ranges", ["learnt", "moving_average"])
def test_experts_train_and_reload(ranges, tmp_path):
    model = architectures.build("mixtral")
    before = {name: matrix.weight.clone() for name, matrix in matrices(model).items() if matrix.expert is not None}
    plain = copy.deepcopy(model)
    stage = QAT(samples=8, ranges=ranges)
    fit(model, stage, HoldZeros(), batches=[architectures.loader(2)])
    fit(plain, batches=[architectures.loader(2)])
    for name, weight in before.items():
        moved = (matrices(plain)[name].weight - weight).abs().max()
        assert moved > 0 and (matrices(model)[name].weight - weight).abs().max() > moved / 2
    ranges = {layer.inputs.grid.scale.item() for name, layer in stage.quantized.items() if ".experts." in name}
    assert len(ranges) == 2 * architectures.BLOCKS  # one for all experts
    batch = architectures.inputs()
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        stage.save(model, tmp_path)
        assert torch.equal(load(tmp_path, "multiclass")(**batch).logits, expected)


@pytest.mark.parametrize("ranges", ["learnt", "moving_average"])
def test_of_several_epochs_the_best_one_is_left_with_its_ranges(ranges, tmp_path):
    best = KeepBest(tmp_path, monitor="validation/loss", mode="min", save_weights_only=True)
    spoil, loaders = SpoilTheSecondEpoch(), [tiny.loader(), tiny.loader()]
    model = tiny.bert()
    stage = QAT(samples=8, ranges=ranges)
    fit(model, stage, spoil, best, epochs=2, batches=loaders, enable_checkpointing=True, num_sanity_val_steps=0)
    assert "epoch=0" in best.best_model_path
    assert torch.allclose(logits(model), spoil.best, atol=1e-6)


def test_losses_before_and_after_are_logged(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(tiny.bert(), QAT(samples=16), epochs=5, batches=[tiny.loader(), tiny.loader()], logger=logger)
    events = EventAccumulator(str(tmp_path)).Reload()
    for split in ("train", "validation"):
        before, after = events.Scalars(f"qat/{split}_loss")
        assert (before.step, after.step) == (0, 5 * 4) and after.value < before.value


def from_afar(rows, seed):
    """Return a batch whose last token decides the label, so that attention must carry it to the head's token."""
    batch = tiny.batch(rows, seed=seed, padded=False)
    return {**batch, "input_ids": batch["input_ids"].roll(-1, 1)}


@torch.no_grad()
def accuracy(model):
    batch = from_afar(512, seed=100)
    return (model.eval()(**batch).logits.argmax(-1) == batch["labels"]).float().mean().item()


def rounded(model):
    model = copy.deepcopy(model)
    for layer in matrices(model).values():
        weight, scheme = layer.weight.data, Scheme(4)
        weight.copy_(round_to_grid(weight, minmax_grid(weight, scheme, weight.dtype), scheme))
    return model


def test_what_rounding_to_four_bits_loses_training_under_it_recovers():
    train = DataLoader([from_afar(64, seed) for seed in range(16)], batch_size=None)
    torch.manual_seed(0)
    model = fit(tiny.bert(), epochs=12, lr=5e-3, batches=[train])
    for layer in model.bert.encoder.layer:  # the same function, with a few wide weights in every row
        value, out = layer.attention.self.value, layer.attention.output.dense
        value.weight.data[::8] /= 30
        value.bias.data[::8] /= 30
        out.weight.data[:, ::8] *= 30
    assert accuracy(model) > 0.99
    assert accuracy(rounded(model)) < 0.85
    for how in ({}, {"ranges": "moving_average"}, {"activations": False}):
        torch.manual_seed(0)
        trained = fit(copy.deepcopy(model), QAT(bits=4, samples=64, **how), lr=1e-3, batches=[train])
        assert accuracy(trained) > accuracy(rounded(model)) + 0.1
    torch.manual_seed(0)
    alone = fit(copy.deepcopy(model), lr=1e-3, batches=[train])
    assert accuracy(rounded(alone)) < accuracy(trained) - 0.1  # the gain is not from the additional epoch


def test_without_training_it_is_refused():
    with pytest.raises(UserError, match=r"qat.train.epochs is 0; .*Set technique.qat.train.epochs=1 or more"):
        QAT(training=Training(epochs=0))
    with pytest.raises(UserError, match=r"quantizes by training"):
        fit(tiny.bert(), QAT(samples=8), epochs=0)


def test_what_does_not_fit_the_model_is_reported_before_anything_is_loaded():
    with torch.device("meta"):
        skeleton = tiny.bert()
    with pytest.raises(
        UserError, match=r"technique.qat.group_size is 48, which does not divide the 32 inputs of `bert"
    ):
        QAT(bits=4, group_size=48).check(skeleton, [])
    with pytest.raises(UserError, match=r"the pattern `\*mlp\*`, which matches no layer"):
        QAT(skip=("embeddings", "*mlp*")).check(skeleton, [])
    QAT(bits=4, group_size=16).check(skeleton, [])


@pytest.mark.parametrize("wrong", [{"bits": 3}, {"group_size": -2}, {"ranges": "fixed"}, {"samples": 0}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        QAT(**wrong)


def test_what_a_pattern_names_stays_in_full_precision(tmp_path):
    model = tiny.llama()
    stage = QAT(bits=4, samples=8, skip=("embeddings", "head", "*down_proj"))
    fit(model, stage)
    assert not any("down_proj" in name for name in stage.quantized)
    assert len(model.model.layers[0].mlp.down_proj.weight.unique()) > 2000
    expected = logits(model)
    stage.save(model, tmp_path)
    for again in reloaded(tiny.llama, tmp_path):
        assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("ranges", ["learnt", "moving_average"])
def test_it_works_alone_in_a_script_whose_module_is_not_ours(ranges):
    theirs = tiny.Theirs(tiny.bert())
    tiny.trainer(QAT(bits=4, samples=8, ranges=ranges), epochs=1).fit(theirs, tiny.loader())
    assert all(len(row.unique()) <= 16 for layer in matrices(theirs).values() for row in layer.weight)
    assert logits(theirs.model).isfinite().all()
