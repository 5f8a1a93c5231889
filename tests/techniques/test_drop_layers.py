import pytest
import pytorch_lightning as pl
import tiny
import torch
from pydantic import ValidationError
from test_prune import fit
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from compress.errors import UserError
from compress.maths.hessian import second_moment
from compress.models.calibration import sequential
from compress.models.depth import drop_blocks
from compress.models.layers import find_blocks
from compress.models.matrices import find_zeros
from compress.running.training import HoldZeros
from compress.techniques.drop_layers import (
    DropLayers,
    block_influence,
    measure_influences,
    pick_positions,
    resolve_indices,
)
from compress.techniques.prune import Prune

BLOCKS = 4
# What a block adds to its input, by architecture: zero, it is the identity where its norms come first (Llama).
ADDED = ("self_attn.o_proj", "mlp.down_proj")


@pytest.fixture(autouse=True)
def deeper(monkeypatch):
    monkeypatch.setitem(tiny.SHAPE, "num_hidden_layers", BLOCKS)


def distilbert():
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=60, dim=32, n_layers=BLOCKS, n_heads=4, hidden_dim=64, max_position_embeddings=40, num_labels=3
    )
    return DistilBertForSequenceClassification(config).eval()


def inputs(seed=9):
    return {key: value for key, value in tiny.batch(seed=seed).items() if key != "labels"}


@torch.no_grad()
def logits(model):
    return model.eval()(**inputs()).logits


def without_effect(model, *indices):
    for index in indices:
        for name in ADDED:
            torch.nn.init.zeros_(find_blocks(model)[1][index].get_submodule(name).weight)
    return model


def order(model, original):
    """Return the indices of the model's blocks in the original."""
    names = [first.data_ptr() for first in (next(block.parameters()) for block in original)]
    return [names.index(next(block.parameters()).data_ptr()) for block in find_blocks(model)[1]]


def test_the_influence_of_a_block_worked_by_hand():
    before = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [3.0, 4.0], [1.0, 1.0]]])
    after = torch.tensor([[[2.0, 0.0], [0.0, 5.0], [-3.0, -4.0], [9.0, -7.0]]])  # longer, at right angles, turned round
    assert block_influence(before, after, torch.tensor([[1, 1, 1, 0]])).tolist() == pytest.approx([0, 1, 2])
    assert len(block_influence(before, after, None)) == 4


@pytest.mark.parametrize(
    ("total", "count", "by", "expected"),
    [
        (6, 2, "last", [4, 5]),
        (12, 6, "spread", [1, 3, 5, 7, 9, 11]),
        (12, 3, "spread", [3, 7, 11]),
        (5, 2, "spread", [1, 4]),
        (4, 3, "spread", [0, 1, 3]),
    ],
)
def test_positions_worked_by_hand(total, count, by, expected):
    assert pick_positions(total, count, by, "technique.drop_layers") == expected


def test_listed_blocks_are_counted_from_either_end():
    assert resolve_indices(6, [-1, 0, 2], "technique.drop_layers") == [5, 0, 2]


def test_influences_are_the_mean_over_tokens_that_are_no_padding():
    model = tiny.llama()
    batches = [inputs(1), {**inputs(2), "input_ids": inputs(2)["input_ids"].flip(1)}]
    padded = {key: torch.nn.functional.pad(value, (0, 5)) for key, value in batches[0].items()}
    assert torch.allclose(
        measure_influences(model, batches), measure_influences(model, [padded, batches[1]]), atol=1e-6
    )
    each, tokens = (
        [measure_influences(model, [batch]) for batch in batches],
        [int(batch["attention_mask"].sum()) for batch in batches],
    )
    expected = sum(value * count for value, count in zip(each, tokens)) / sum(tokens)
    assert torch.allclose(measure_influences(model, batches), expected)


@pytest.mark.parametrize("indices", [[0], [2], [1, 3]])
def test_blocks_that_do_nothing_go_first_and_are_not_missed(indices):
    model = without_effect(tiny.llama(), *indices)
    expected, original = logits(model), list(find_blocks(model)[1])
    fit(model, DropLayers(drop=len(indices), samples=8))
    assert order(model, original) == [index for index in range(BLOCKS) if index not in indices]
    assert torch.allclose(logits(model), expected, atol=1e-6)


@pytest.mark.parametrize("build", [*tiny.ALL, distilbert])
@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"drop": 1}, None),
        ({"drop": 2, "by": "spread"}, [0, 2]),
        ({"drop": 3, "by": "last"}, [0]),
        ({"drop": [-1, 1]}, [0, 2]),
    ],
)
def test_what_is_left_keeps_its_order_and_reloads_to_the_same_logits_without_us(build, settings, left, tmp_path):
    model = build()
    original = list(find_blocks(model)[1])
    fit(model, DropLayers(**settings, samples=8))
    count = settings["drop"] if isinstance(settings["drop"], int) else len(settings["drop"])
    kept = order(model, original)
    assert len(kept) == BLOCKS - count and kept == sorted(kept) and left in (None, kept)
    assert model.config.num_hidden_layers == BLOCKS - count
    model.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if build is tiny.llama_lm else AutoModelForSequenceClassification
    assert torch.equal(logits(auto.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("build", [*tiny.ALL, distilbert])
def test_the_skeleton_shows_the_shapes_that_will_be_left(build):
    model = build()
    with torch.device("meta"):
        skeleton = build()
    stage = DropLayers(drop=2, samples=8)
    stage.check(skeleton, [])
    stage.preview(skeleton)
    fit(model, stage)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in skeleton.state_dict().items()} == shapes


def test_text_is_continued_the_same_with_and_without_a_cache():
    model = tiny.llama_lm()
    fit(model, DropLayers(drop=[0, 2]))
    ids = inputs()["input_ids"][:1, :5]

    def continued(use_cache):
        return model.eval().generate(ids, max_new_tokens=12, do_sample=False, use_cache=use_cache, eos_token_id=None)

    assert continued(True).tolist() == continued(False).tolist()
    assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1]


def test_what_a_config_says_of_every_block_goes_with_the_block(tmp_path):
    config = Qwen2Config(
        **tiny.SHAPE, num_key_value_heads=2, use_sliding_window=True, max_window_layers=2, sliding_window=4,
        eos_token_id=[1, 2, 3, 4],
    )  # fmt: skip
    config.compress = {"heads": [4, 3, 2, 1], "of": "something else"}
    model = Qwen2ForCausalLM(config).eval()
    assert config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    drop_blocks(model, [1])
    assert config.layer_types == ["full_attention"] + ["sliding_attention"] * 2
    assert config.compress == {"heads": [4, 2, 1], "of": "something else"}
    assert config.eos_token_id == [1, 2, 3, 4]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_epochs_of_the_same_fit_train_what_is_left():
    def loss(model):
        with torch.no_grad():
            return sum(model.eval()(**tiny.batch(seed=seed)).loss.item() for seed in range(4))

    def cut(epochs):
        torch.manual_seed(0)
        return fit(tiny.bert(), DropLayers(drop=2, by="last"), epochs=epochs)

    once, retrained = cut(0), cut(10)
    assert loss(retrained) < 0.8 * loss(once)
    still = [name for name, weight in retrained.named_parameters() if torch.equal(weight, once.get_parameter(name))]
    assert not still


def test_the_optimizer_lets_go_of_the_dropped_blocks():
    held = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            held.extend(weight for group in trainer.optimizers[0].param_groups for weight in group["params"])

    model = fit(tiny.bert(), DropLayers(drop=[0]), Look(), epochs=1)
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))


def test_zeros_of_the_blocks_that_stay_are_held_through_retraining():
    model = fit(tiny.bert(), Prune(sparsity=0.5))
    drop = DropLayers(drop=[0])
    fit(model, drop, HoldZeros(), epochs=1)
    prefix = find_blocks(model)[0]
    assert {name.removeprefix(prefix).split(".")[1] for name in find_zeros(model)} == {"0", "1", "2"}


def test_measuring_leaves_the_model_training_where_it_was():
    model = tiny.llama().train()
    measure_influences(model, [inputs()])
    assert model.training and not any(block._forward_hooks for block in find_blocks(model)[1])


def test_later_stages_find_their_way_through_the_blocks_that_are_left():
    model = fit(tiny.llama(), DropLayers(drop=[1]))
    names = [name for layers, _ in sequential(model, [inputs()], second_moment) for name in layers]
    assert {name.split(".")[2] for name in names} == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("drop", "sentence"),
    [
        (4, r"drop is 4 and the model has 4 blocks; at least one block must stay. Set .*drop to 3 or less"),
        ([0, 4], r"names block 4 and the model has 4 blocks. Choose from 0 to 3, or -4 to -1"),
        ([-5], r"names block -5"),
        ([3, -1], r"is \[3, -1\] and names block 3 twice"),
        ([0, 1, 2, 3], r"names all 4 blocks"),
    ],
)
def test_what_cannot_be_dropped_is_reported_from_the_shapes_alone(drop, sentence):
    with torch.device("meta"):
        skeleton = tiny.bert()
    with pytest.raises(UserError, match=sentence):
        DropLayers(drop=drop).check(skeleton, [])


def test_a_second_drop_is_checked_against_what_the_first_one_leaves():
    with torch.device("meta"):
        skeleton = tiny.bert()
    DropLayers(drop=3).preview(skeleton)
    with pytest.raises(UserError, match="the model has 1 blocks"):
        DropLayers(drop=1).check(skeleton, [])


def test_blocks_that_share_weights_cannot_be_dropped():
    model = AlbertForSequenceClassification(AlbertConfig(**tiny.SHAPE, embedding_size=16))
    with pytest.raises(UserError, match="the 4 passes of `albert` share 1, so that fewer passes would save no weight"):
        DropLayers().check(model, [])


@pytest.mark.parametrize("wrong", [0, -1, []])
def test_nothing_to_drop_is_refused(wrong):
    with pytest.raises(UserError, match=r"a number of blocks above 0 or a list of them is expected"):
        DropLayers(drop=wrong)


@pytest.mark.parametrize("wrong", [{"drop": "two"}, {"by": "first"}, {"samples": 0}, {"batch_size": 0}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        DropLayers(**wrong)


def test_it_works_alone_in_a_script_whose_module_is_not_ours():
    theirs = tiny.Theirs(tiny.bert())
    tiny.trainer(DropLayers(drop=1, samples=8), epochs=1).fit(theirs, tiny.loader())
    assert len(find_blocks(theirs.model)[1]) == BLOCKS - 1
