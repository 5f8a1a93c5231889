import copy
from functools import partial

import architectures
import pytest
import tiny
import torch
from architectures import build
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from pydantic import ValidationError
from test_conf import CONF
from test_structured import fit
from test_testing import SETTINGS, TRAINED, read_config

from compress.errors import UserError
from compress.models.costs import count_macs, count_parameters
from compress.models.narrowing import fit_readers, record_width, score_dimensions
from compress.models.width import cut_width, find_spaces
from compress.planning.plan import make_plan
from compress.technique import Training
from compress.techniques.narrow import Narrow
from compress.techniques.structured import Structured
from compress.testing import Case, check_promises

DEAD = [1, 5, 6, 13, 20, 21, 30, 31]
ALIVE = [dimension for dimension in range(32) if dimension not in DEAD]


@torch.no_grad()
def answer(model):
    return model.eval()(**architectures.inputs()).logits


def llama_with(fill):
    """Return a language model with ``fill(others)`` of eight other dimensions in eight of its hidden states."""
    model = tiny.llama_lm()
    (space,) = find_spaces(model)
    norms = {id(norm) for norm in space.norms.values()}
    for axis in space.axes:
        if id(axis.module) not in norms and axis.dim == (axis.module is model.model.embed_tokens):  # what is written
            states = axis.stored.data.mul_(10).movedim(axis.dim, 0)
            states[DEAD] = fill(states[ALIVE[:8]])
    for norm in space.norms.values():
        norm.variance_epsilon = 1e-12
    return model


@pytest.mark.parametrize("compensate", [True, False])
def test_dimensions_without_activations_are_removed_and_nothing_changes(compensate):
    model = llama_with(torch.zeros_like)
    expected = answer(model)
    before = model.model.embed_tokens.weight.detach().clone()
    fit(model, Narrow(hidden_size=24, compensate=compensate, samples=8), lm=True)
    assert torch.equal(model.model.embed_tokens.weight, before[:, ALIVE])  # the same dimensions, in their order
    for norm in find_spaces(model)[0].norms.values():
        norm.weight.data *= (32 / 24) ** 0.5  # the mean square that it divides by is of fewer dimensions
    assert torch.allclose(answer(model), expected, atol=1e-4 * expected.abs().max())


def test_scores_are_mean_magnitudes_of_what_norms_leave_over_all_tokens_but_padding():
    model = tiny.bert()
    stream, head = find_spaces(model)
    batch = architectures.inputs(length=10)
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
        pooled = model.bert(**batch).pooler_output
    kept = [state[batch["attention_mask"].bool()].abs().mean(0) for state in states]
    assert len(stream.norms) == 1 + 2 * 2
    last = score_dimensions(model, replace_norms(stream, "bert.encoder.layer.1.output.LayerNorm"), [batch])
    assert torch.allclose(last, (kept[-1] / kept[-1].sum()).double(), atol=1e-6)
    assert torch.allclose(score_dimensions(model, stream, [batch]).sum(), torch.tensor(5.0).double())
    inner = pooled.abs().mean(0)
    assert torch.allclose(score_dimensions(model, head, [batch]), (inner / inner.sum()).double(), atol=1e-6)


def replace_norms(space, name):
    return type(space)(space.axes, {name: space.norms[name]}, space.readers, space.in_answer)


def test_compensation_lets_what_stays_take_over_for_what_goes():
    expected = answer(llama_with(partial(torch.mul, other=0.5)))
    errors = {}
    for compensate in (True, False):
        model = llama_with(partial(torch.mul, other=0.5))
        fit(model, Narrow(hidden_size=24, compensate=compensate, samples=16), lm=True)
        errors[compensate] = (answer(model) - expected).square().mean()
    assert errors[True] < 0.3 * errors[False]


def test_a_shared_table_is_not_fitted():
    model = build("gpt2", lm=True)
    (space,) = find_spaces(model)
    before = copy.deepcopy(model.state_dict())
    fit_readers(model, space, torch.arange(32), [architectures.inputs()])
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == {"c_attn", "c_fc"}


def test_what_a_model_costs_shrinks_with_its_width():
    model, text = tiny.bert(), {"input_ids": torch.ones(1, 8, dtype=torch.long)}
    before = count_parameters(model), count_macs(model, text)
    cut_width(model, 16)
    after = count_parameters(model), count_macs(model, text)
    assert after[0].groups[0] < 0.6 * before[0].groups[0] and after[0].ffn[0] < 0.6 * before[0].ffn[0]
    assert after[0].total < 0.55 * before[0].total and after[1] < 0.6 * before[1]


def test_the_skeleton_shows_the_shapes_that_will_be_left():
    for make in (tiny.bert, tiny.llama_lm, partial(build, "modernbert")):
        with torch.device("meta"):
            skeleton = make()
        stage = Narrow(hidden_size=0.6, samples=8)
        stage.check(skeleton, [])
        assert stage.preview(skeleton).get_input_embeddings().weight.device.type == "meta"
        model = fit(make(), stage, lm=make is tiny.llama_lm)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        assert {name: tensor.shape for name, tensor in skeleton.state_dict().items()} == shapes
        assert getattr(skeleton.config, "compress", {}) == getattr(model.config, "compress", {})


def narrow_bert():
    model = tiny.bert()
    cut_width(model, 24)
    record_width(model)
    assert model.config.compress == {"width": 24}
    return model


AFTER = [
    *("structured", "drop_layers", "narrow", "prune", "distill"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("gptq", "int8", "prune_vocab", "onnx", "openvino")),
]


@pytest.mark.parametrize("name", AFTER)
def test_later_stages_keep_their_promises_on_a_narrower_model(name):
    settings = {**SETTINGS, "gptq": {"group_size": 8}, "narrow": {"hidden_size": 16}}.get(name, {})
    training = Training(epochs=1, learning_rate=1e-2) if name in TRAINED else Training()
    technique = get_class(read_config(name)["_target_"])
    check_promises(Case(technique, settings, training, models=(narrow_bert,)))


def test_after_structured_heads_that_fill_the_width_a_bert_is_plain():
    model = fit(tiny.bert(), Structured(target_heads=3, importance="activation"), Narrow(hidden_size=24, samples=8))
    assert not hasattr(model.config, "compress")
    assert (model.config.hidden_size, model.config.num_attention_heads) == (24, 3)


def test_epochs_of_the_same_fit_train_what_is_left():
    once = fit(tiny.bert(), Narrow(hidden_size=16, samples=8))
    trained = fit(tiny.bert(), Narrow(hidden_size=16, samples=8), epochs=1)
    still = [name for name, weight in trained.named_parameters() if torch.equal(weight, once.get_parameter(name))]
    assert not still


def plan(*words):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return make_plan(compose("train", ["task=toy", "model=tiny", *words]))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["technique=narrow", "technique.narrow.hidden_size=4096"], r"is 4096 and the hidden states of `\w+` have \d+"),
        (["technique=narrow", "technique.narrow.hidden_size=0.01"], r"hidden_size is 0.01 and .* a number from 1 to"),
        (
            ["technique=narrow+narrow", "technique.narrow.hidden_size=32", "technique.narrow_2.hidden_size=32"],
            "narrow_2.hidden_size is 32 and .* have 32 dimensions",
        ),
        (["technique=prune+narrow", 'technique.prune.pattern="2:4"'], "`narrow` removes columns, which breaks up"),
    ],
)
def test_what_cannot_be_cut_is_refused_from_the_shapes_alone(words, sentence):
    with pytest.raises(UserError, match=sentence):
        plan(*words)


@pytest.mark.parametrize("wrong", [{"hidden_size": 0}, {"hidden_size": 1.5}, {"samples": 0}, {"hidden_size": "half"}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        Narrow(**wrong)
