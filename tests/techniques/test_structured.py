import json
from dataclasses import replace

import architectures
import pytest
import pytorch_lightning as pl
import tiny
import torch
from pydantic import ValidationError
from small import SMALL
from test_shapes import FAMILIES, INPUTS, KNOWN, LMS, PLAIN, RECORDS, family, logits, uneven

import compress
from compress.errors import UserError
from compress.maths.units import activation_score, mask_important, standardise_score, taylor_score, units_left
from compress.models import textpruner as textpruning
from compress.models.blocks import read_blocks, select_blocks
from compress.models.importance import label_with_predictions, score_by_gradient
from compress.models.matrices import find_zeros, matrices
from compress.models.shapes import record_shapes, remove_units, shape_blocks
from compress.running.training import HoldZeros
from compress.runtimes.torch import load
from compress.technique import Training
from compress.techniques.finetune import FineTune
from compress.techniques.gptq import GPTQ
from compress.techniques.prune import Prune
from compress.techniques.structured import Structured

ENCODERS = [name for name in FAMILIES if name not in PLAIN]
WEIGHT = torch.tensor([[1.0, -2.0, 3.0, 0.5], [0.0, 1.0, -1.0, 2.0]])


def fit(model, *stages, epochs=0, lm=False):
    tiny.trainer(*stages, epochs=epochs).fit(FineTune(model, training=Training(learning_rate=1e-2)), tiny.loader(lm=lm))
    return model.eval()


def sizes(model):
    return [block.heads for block in read_blocks(model)], [block.ffn for block in read_blocks(model)]


@pytest.fixture
def textpruner():
    return pytest.importorskip("textpruner", reason="pip install --no-deps textpruner")


# Scores and masks


def test_the_first_order_score_worked_by_hand():
    gradient = torch.tensor([[2.0, 1.0, 0.0, 4.0], [5.0, -1.0, 1.0, 0.5]])
    # Inputs 0 and 1: 1*2 + 0*5 - 2*1 - 1*1 = -1. Inputs 2 and 3: 0 - 1*1 + 0.5*4 + 2*0.5 = 2.
    assert taylor_score(WEIGHT, gradient, units=2).tolist() == [1.0, 2.0]
    assert taylor_score(WEIGHT, gradient, units=4).tolist() == [2.0, 3.0, 1.0, 3.0]


def test_the_first_order_score_is_the_loss_without_the_unit_where_the_loss_is_linear():
    weight = WEIGHT.clone().requires_grad_()
    inputs, outer = torch.randn(5, 4), torch.randn(5, 2)
    loss = (inputs @ weight.T * outer).sum()
    loss.backward()
    scores = taylor_score(weight.detach(), weight.grad, units=2)
    for unit in range(2):
        without = inputs.clone()
        without[:, 2 * unit : 2 * unit + 2] = 0
        assert ((without @ WEIGHT.T * outer).sum() - loss).abs().item() == pytest.approx(scores[unit].item(), rel=1e-4)


def test_the_score_of_activations_worked_by_hand():
    # Absolute weights of the four inputs: 1, 3, 4, 2.5.
    assert activation_score(WEIGHT, torch.tensor([2.0, 1.0, 0.0, 2.0]), units=2).tolist() == [5.0, 5.0]
    assert standardise_score(torch.tensor([1.0, 3.0])).tolist() == [-1.0, 1.0]
    assert standardise_score(torch.tensor([2.0])).tolist() == [0.0]


SCORES = [torch.tensor([0.9, 0.1, 0.5, 0.8]), torch.tensor([0.2, 0.3, 0.4, 0.05])]


def kept(masks):
    return [mask.nonzero().flatten().tolist() for mask in masks]


def test_the_most_important_of_every_block_or_of_all():
    assert kept(mask_important(SCORES, 4, even=True)) == [[0, 3], [1, 2]]
    assert kept(mask_important(SCORES, 5, even=False)) == [[0, 2, 3], [1, 2]]


def test_a_block_keeps_one_of_its_own():
    assert kept(mask_important(SCORES, 3, even=False)) == [[0, 3], [2]]
    assert kept(mask_important([SCORES[0], SCORES[1] / 100], 4, even=False)) == [[0, 2, 3], [2]]


def test_blocks_keep_multiples():
    assert kept(mask_important(SCORES, 6, even=False, multiple_of=2)) == [[0, 1, 2, 3], [1, 2]]


def test_every_expert_keeps_as_many_channels_worked_by_hand():
    experts = [torch.tensor([[5.0, 1.0, 2.0, 4.0], [0.1, 0.4, 0.3, 0.2]]), torch.tensor([[1.0, 0.9, 0.8, 3.0]] * 2)]
    two, one = mask_important(experts, 4, even=True), mask_important(experts, 3, even=False)
    assert two[0].tolist() == [[True, False, False, True], [False, True, True, False]]
    assert one[0].sum(1).tolist() == [2, 2] and one[1].tolist() == [[False, False, False, True]] * 2


@pytest.mark.parametrize(("even", "total", "multiple_of"), [(True, 36, 1), (False, 37, 1), (False, 40, 8)])
def test_the_ranking_is_textpruners(textpruner, even, total, multiple_of):
    from textpruner.pruners.utils import generate_mask

    torch.manual_seed(0)
    scores = torch.rand(4, 16)
    theirs = generate_mask(scores, total, even, multiple_of=multiple_of)
    assert torch.equal(torch.stack(mask_important(list(scores), total, even, multiple_of)), theirs.bool())


def test_of_a_block_that_would_lose_all_textpruner_keeps_one_too_many(textpruner):
    from textpruner.pruners.utils import generate_mask

    scores = [SCORES[0], SCORES[1] / 100]
    assert generate_mask(torch.stack(scores), 3).sum() == 4
    assert sum(mask.sum() for mask in mask_important(scores, 3, even=False)) == 3


def test_removal_is_spread_over_the_steps():
    assert [units_left(step, 3, now=16, goal=5) for step in (1, 2, 3)] == [12, 8, 5]


# Scores of models


def test_our_first_order_scores_are_textpruners(textpruner, tmp_path):
    from textpruner.configurations import GeneralConfig, TransformerPruningConfig
    from textpruner.pruners.transformer_pruner import TransformerPruner

    batches = [tiny.batch(seed=seed) for seed in range(3)]
    model = tiny.bert()
    ours = score_by_gradient(model, batches)
    settings = TransformerPruningConfig(ffn_even_masking=False)  # True adds the weights before the FFN's activation
    pruner = TransformerPruner(model, settings, GeneralConfig(use_device="cpu", output_dir=str(tmp_path)))
    for part, theirs in zip(("groups", "ffn"), pruner.get_importance_score(batches)):
        examples = sum(len(batch["labels"]) for batch in batches)
        assert torch.allclose(torch.stack(ours[part]) / examples, theirs, rtol=1e-4, atol=1e-9)


def test_scoring_leaves_no_gradient_and_what_is_trained_as_it_was():
    model = tiny.llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    score_by_gradient(model, [tiny.batch()])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]


def test_the_models_own_labels():
    batch = tiny.batch()
    predicted = label_with_predictions(tiny.bert(), batch)
    assert torch.equal(predicted["labels"], logits(tiny.bert()).argmax(-1))
    several = tiny.bert()
    several.config.problem_type = "multi_label_classification"
    assert torch.equal(label_with_predictions(several, batch)["labels"], (logits(several) > 0).float())
    model = tiny.llama_lm()
    labels = label_with_predictions(model, batch)["labels"]
    assert torch.equal(labels[0, 1:], logits(model)[0, :-1].argmax(-1))  # the first row has no padding
    assert (labels[batch["attention_mask"] == 0] == -100).all()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("importance", "even"), [("loss", False), ("logits", True), ("activation", False)])
def test_units_that_do_nothing_are_the_ones_removed(textpruner, name, importance, even):
    model = family(name)
    group = read_blocks(model)[0].group_size
    for block in read_blocks(model):
        block.attention_out.weight.data[:, 8 * group : 16 * group] = 0
        block.ffn_out.weight.data[:, 5:29] = 0
    before = logits(model)
    stage = Structured(4 - group, 40, importance=importance, even_heads=even, even_ffn=even, samples=8)
    fit(model, stage)
    assert sizes(model) == ([4 - group] * 2, [40, 40])
    assert torch.allclose(logits(model), before, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("order", "even"), [(None, True), ("head-first", False), ("ffn-first", True)])
def test_in_several_steps_the_targets_are_met(textpruner, name, order, even):
    model = family(name)
    fit(model, Structured(2, 24, iterations=3, order=order, even_heads=even, even_ffn=even, ffn_multiple_of=8))
    heads, ffn = sizes(model)
    assert sum(heads) == 4 and sum(ffn) == 48 and all(size % 8 == 0 for size in ffn)
    assert logits(model).isfinite().all() and (not even or (heads, ffn) == ([2, 2], [24, 24]))


@pytest.mark.parametrize(("targets", "order"), [({"target_heads": 2}, None), ({"target_ffn_size": 20}, "head-first")])
@pytest.mark.parametrize("build", tiny.ALL)
def test_heads_or_ffns_alone(textpruner, build, targets, order):
    model = fit(build(), Structured(**targets, order=order, iterations=2), lm=build is tiny.llama_lm)
    wanted = {"target_heads": 4, "target_ffn_size": 64, **targets}
    assert sizes(model) == ([wanted["target_heads"]] * 2, [wanted["target_ffn_size"]] * 2)


@pytest.mark.parametrize(("order", "turns"), [(None, 3), ("head-first", 6), ("ffn-first", 6)])
def test_every_step_removes_as_much(order, turns, monkeypatch):
    seen = []

    def cut(model, **kept):
        remove_units(model, **kept)
        seen.append(sum(sizes(model)[1]))

    monkeypatch.setattr("compress.techniques.structured.remove_units", cut)
    fit(tiny.llama(), Structured(2, 24, iterations=3, order=order))
    assert len(seen) == turns and sorted({128, *seen}) == [48, 74, 100, 128]  # 27, 27 and 26, in two even blocks


def test_steps_score_what_the_steps_before_left():
    def cut(**settings):
        model = tiny.llama()
        for linear in matrices(model).values():
            linear.weight.data *= 10  # a removal then changes the importance of the others
        return logits(fit(model, Structured(target_ffn_size=8, **settings)))

    assert not torch.equal(cut(), cut(iterations=6))


def test_a_model_that_was_cut_before_is_cut_again(textpruner):
    model = fit(tiny.bert(), Structured(target_heads=3, target_ffn_size=40, even_heads=False, even_ffn=False))
    fit(model, Structured(target_heads=2, even_heads=False))  # heads alone: FFNs stay as uneven as they are
    assert sum(sizes(model)[0]) == 4 and sum(sizes(model)[1]) == 80


CUT = [name for name in KNOWN if name not in LMS]


def train(model, stage):
    tiny.trainer(stage).fit(tiny.Theirs(model), architectures.loader(2))
    return model.eval()


@pytest.mark.parametrize("name", CUT)
def test_every_known_architecture_is_scored_and_cut_and_reloads(name, tmp_path):
    model = architectures.build(name)
    first = read_blocks(model)[0]
    heads = first.heads - first.group_size if first.family.cuts_heads else None
    wanted = {"target_heads": heads, "target_ffn_size": first.ffn // 2, "target_experts": first.experts and 3}
    wanted = {key: value for key, value in wanted.items() if value}
    importance = "activation" if first.family.textpruner else "loss"
    train(model, Structured(**wanted, importance=importance, iterations=2, samples=8))
    for key, part in (("target_heads", "heads"), ("target_ffn_size", "ffn"), ("target_experts", "experts")):
        for block in select_blocks(read_blocks(model), part) if key in wanted else ():
            assert block.count(part) == wanted[key]
    model.save_pretrained(tmp_path)
    again = load(tmp_path, "multiclass")
    model.set_attn_implementation(again.config._attn_implementation)  # the loaded Gemma 2 caps its attention scores
    with torch.no_grad():
        assert torch.equal(again(**architectures.inputs()).logits, model(**architectures.inputs()).logits)


@pytest.mark.parametrize("importance", ["loss", "activation"])
def test_experts_that_do_nothing_are_the_ones_removed(importance):
    model = architectures.build("mixtral")
    kept = []
    for number, block in enumerate(read_blocks(model)):
        block.expert_outs[number].weight.zero_()
        kept.append([expert.weight.clone() for i, expert in enumerate(block.expert_outs) if i != number])
    train(model, Structured(target_experts=3, importance=importance, samples=8))
    for block, expected in zip(read_blocks(model), kept):
        assert all(torch.equal(expert.weight, weight) for expert, weight in zip(block.expert_outs, expected))


@pytest.mark.parametrize("importance", ["loss", "activation"])
def test_every_expert_keeps_its_own_channels_and_the_router_stays(importance):
    model = architectures.build("mixtral")
    blocks = read_blocks(model)
    routers = [block.get("mlp.gate").weight.clone() for block in blocks]
    for block in blocks:
        for number, expert in enumerate(block.expert_outs):
            expert.weight[:, 32 * number : 32 * number + 32] = 0
    answers = architectures.inputs()
    before = model(**answers).logits.detach()
    train(model, Structured(target_ffn_size=96, importance=importance, iterations=3, samples=8))
    assert [block.ffn for block in blocks] == [96] * 3
    assert torch.allclose(model(**answers).logits, before, atol=1e-5)
    assert all(torch.equal(block.get("mlp.gate").weight, router) for block, router in zip(blocks, routers))


@pytest.mark.parametrize(("name", "importance"), [("t5", "fisher"), ("t5", "loss"), ("mpnet", "activation")])
def test_heads_with_shared_biases_are_removed_together(name, importance):
    model = architectures.build(name)
    shared = [block for block in read_blocks(model) if block.biases is not None]
    outs = [block.attention_out.weight.clone() for block in shared]
    columns = [block.biases.weight.clone() for block in shared]
    train(model, Structured(target_heads=2, importance=importance, samples=8))
    for block, out, column in zip(shared, outs, columns):
        heads = [h for h in range(4) if any((column[:, h] == kept).all() for kept in block.biases.weight.T)]
        assert len(heads) == 2 and block.biases.weight.shape[1] == 2
        assert torch.equal(block.attention_out.weight, out.view(64, 4, 16)[:, heads].flatten(1))


def test_masks_for_experts_and_for_shared_biases():
    mixtral, t5 = architectures.build("mixtral"), architectures.build("t5")
    Structured(ffn_mask=[[1, 0] * 64] * 3).check(mixtral, [])
    with pytest.raises(UserError, match="ffn_mask keeps 127 channels of an expert; .* Keep a multiple of 8"):
        Structured(ffn_mask=[[1] * 127 + [0]] * 3).check(mixtral, [])
    rows = [[1, 1, 0, 0]] * 3 + [[0, 1, 1, 1], [1, 1, 0, 0]] + [[0, 1, 1, 1], [0, 0, 1, 1]] * 2
    Structured(head_mask=rows).check(t5, [])  # those of the attention to the encoder differ
    with pytest.raises(UserError, match="head_mask has different rows .* Keep the same heads in each"):
        Structured(head_mask=[[0, 0, 1, 1], *rows[1:]]).check(t5, [])
    with pytest.raises(UserError, match="Keep the same number of heads in each"):
        Structured(head_mask=[*rows[:-1], [1, 1, 1, 0]]).check(t5, [])
    train(t5, Structured(head_mask=rows))
    assert [block.heads for block in read_blocks(t5)] == [2, 2, 2, 3, 2, 3, 2, 3, 2]


def test_cut_experts_are_quantized_and_reload(tmp_path):
    model = architectures.build("mixtral")
    shape_blocks(model, ffn=[96, 64, 128])
    record_shapes(model)
    stage = GPTQ(group_size=8, samples=8)
    train(model, stage)
    with torch.no_grad():
        expected = model(**architectures.inputs()).logits
        stage.save(model, tmp_path)
        assert torch.allclose(load(tmp_path, "multiclass")(**architectures.inputs()).logits, expected, atol=1e-5)


def test_a_wrong_record_is_refused_before_anything_is_removed(monkeypatch):
    model = architectures.build("gpt_neox")
    monkeypatch.setitem(RECORDS, "gpt_neox", replace(RECORDS["gpt_neox"], layout="stacked"))
    with pytest.raises(UserError, match="heads of this `gpt_neox` cannot be removed"):
        train(model, Structured(target_heads=2))
    assert read_blocks(model)[0].heads == 4


# Training afterwards


@pytest.mark.parametrize("build", [tiny.bert, tiny.llama])
def test_retraining_trains_what_is_left(textpruner, build):
    model, cut = build(), build()
    before = dict(model.named_parameters())
    fit(cut, Structured(2, 20))
    fit(model, Structured(2, 20), epochs=5)
    assert sizes(model) == sizes(cut)
    assert dict(model.named_parameters()).keys() == before.keys()
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
    for (name, ours), (_, untrained) in zip(matrices(model).items(), matrices(cut).items()):
        assert not torch.equal(ours.weight, untrained.weight), name
    with torch.no_grad():
        losses = [sum(network(**tiny.batch(seed=seed)).loss for seed in range(4)).item() for network in (cut, model)]
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize("build", [tiny.bert, tiny.llama])
def test_pruned_weights_stay_zero_through_the_cut_and_the_training(textpruner, build):
    model = fit(build(), Prune(sparsity=0.5))
    full = {id(block.ffn_out): (block.ffn_out.weight == 0).sum().item() for block in read_blocks(model)}
    fit(model, Structured(2, 20), HoldZeros(), epochs=1)
    for block in read_blocks(model):
        left = (block.ffn_out.weight == 0).sum().item()
        assert 0.2 * block.ffn_out.weight.numel() < left < full[id(block.ffn_out)]
    assert set(find_zeros(model)) >= set(matrices(model))


def test_it_works_alone_in_a_script_whose_module_is_not_ours(textpruner):
    theirs = tiny.Theirs(tiny.bert())
    tiny.trainer(Structured(2, 20), epochs=1).fit(theirs, tiny.loader())
    assert sizes(theirs.model) == ([2, 2], [20, 20])


# Masks


@pytest.mark.parametrize("form", ["list", "json", "pt"])
def test_given_masks_are_what_is_kept(form, tmp_path):
    heads, ffn = [[1, 0, 1, 1], [0, 0, 0, 1]], [[i % 2 for i in range(64)], [int(i < 5) for i in range(64)]]
    model, weight = tiny.bert(), read_blocks(tiny.bert())[1].ffn_out.weight
    if form != "list":
        for name, rows in (("heads", heads), ("ffn", ffn)):
            if form == "pt":
                torch.save(torch.tensor(rows).float(), tmp_path / f"{name}.pt")  # TextPruner's format
            else:
                (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        heads, ffn = (str(tmp_path / f"{name}.{form}") for name in ("heads", "ffn"))
    fit(model, Structured(head_mask=heads, ffn_mask=ffn))
    assert sizes(model) == ([3, 1], [32, 5])
    assert torch.equal(read_blocks(model)[1].ffn_out.weight, weight[:, :5])


@pytest.mark.parametrize(
    ("masks", "sentence"),
    [
        ({"head_mask": [[1, 1, 1, 0]]}, "rows of 1 times 4 values and the model blocks of 2 times 4"),
        ({"head_mask": [[1, 1, 0], [1, 1, 0, 1]]}, "rows of 3, 4 values"),
        ({"head_mask": []}, "rows of no values"),
        ({"head_mask": [[1, 1, 1, 0], [0, 0, 0, 0]]}, "head_mask has a row of zeros"),
        ({"ffn_mask": [[1] * 64] * 2}, "keep everything"),
        ({"ffn_mask": "nowhere.pt"}, "ffn_mask=nowhere.pt is no json or pt file"),
        ({"head_mask": [[1, 1, 1, 0]] * 2, "target_heads": 2}, "has sizes and masks"),
    ],
)
def test_masks_that_do_not_fit_are_reported(masks, sentence):
    with pytest.raises(UserError, match=sentence):
        Structured(**masks).check(tiny.bert(), [])


def test_a_mask_leaves_groups_whole():
    Structured(head_mask=[[1, 1, 0, 0]] * 2).check(tiny.llama(), [])
    with pytest.raises(UserError, match="splits a group of 2 heads"):
        Structured(head_mask=[[1, 0, 0, 0]] * 2).check(tiny.llama(), [])


# Errors before anything is loaded


@pytest.mark.parametrize(
    ("build", "settings", "sentence"),
    [
        (tiny.bert, {"target_heads": 5}, "target_heads=5 is more than the 4 that a block has"),
        (tiny.bert, {"target_ffn_size": 65, "even_ffn": False}, "target_ffn_size=65 is more than the 64"),
        (tiny.bert, {"target_heads": 4}, "keeps the 4 heads and 64 FFN channels that a block has already"),
        (tiny.llama, {"target_heads": 3}, "target_heads=3 cannot be reached .* multiples of 2, the size of a group"),
        (tiny.bert, {"target_ffn_size": 20, "ffn_multiple_of": 16}, "multiples of 16, the size of .*ffn_multiple_of"),
        (tiny.bert, {"target_ffn_size": 24, "ffn_multiple_of": 24, "even_ffn": False}, "cannot be reached from 64"),
        (tiny.bert, {"target_ffn_size": 8, "ffn_multiple_of": 16, "even_ffn": False}, "cannot be reached from 64"),
        (lambda: tiny.bert(num_labels=1), {"target_heads": 2, "importance": "logits"}, "predicts one number"),
        (lambda: torch.nn.Linear(2, 2), {"target_heads": 2}, "The model is a `Linear`"),
        (lambda: architectures.build("bloom"), {"target_heads": 2}, "The model is a `bloom`; .* are known"),
        (
            lambda: architectures.build("t5"),
            {"target_heads": 2, "even_heads": False},
            "even_heads is false, and the blocks of `t5` share biases .* Set technique.structured.even_heads=true",
        ),
        (lambda: architectures.build("mpnet"), {"target_heads": 2, "even_heads": False}, "the blocks of `mpnet` share"),
        (lambda: architectures.build("olmo2"), {"target_heads": 2}, "cannot remove heads of `olmo2`: a norm spans"),
        (tiny.bert, {"target_experts": 2}, "the blocks of `bert` have no experts"),
        (
            lambda: architectures.build("mixtral"),
            {"target_ffn_size": 60},
            "target_ffn_size=60 cannot be reached from 128 .* multiples of 8, the size of what products of experts",
        ),
        (
            lambda: architectures.build("mixtral"),
            {"target_experts": 1},
            "target_experts=1 is less than the 2 experts that every token is sent to",
        ),
        (lambda: architectures.build("mixtral"), {"target_experts": 4}, "has already, and its 4 experts. Set lower"),
    ],
)
def test_targets_that_do_not_fit_are_reported_from_the_shapes_alone(build, settings, sentence):
    with torch.device("meta"):
        skeleton = build()
    with pytest.raises(UserError, match=sentence):
        Structured(**settings).check(skeleton, [])


def test_an_even_target_must_suit_the_narrowest_block(textpruner):
    model = uneven(tiny.bert())  # 3 and 4 heads, 32 and 48 channels
    with pytest.raises(UserError, match="target_ffn_size=40 is more than the 32 that a block has"):
        Structured(target_ffn_size=40).check(model, [])
    with pytest.raises(UserError, match="keeps the 3.5 heads and 40 FFN channels"):
        Structured(target_ffn_size=40, even_ffn=False).check(model, [])
    Structured(target_ffn_size=39, even_ffn=False).check(model, [])


def test_nothing_asked_and_values_out_of_range_are_refused():
    with pytest.raises(
        UserError, match=r"nothing to remove\. Set one of them: sizes by technique.structured.target_heads"
    ):
        Structured()
    for wrong in ({"target_heads": 0}, {"iterations": 0}, {"importance": "luck"}, {"head_mask": [[2]]}):
        with pytest.raises(ValidationError):
            Structured(**wrong)


def test_without_textpruner_an_encoder_needs_other_scores(monkeypatch):
    monkeypatch.setattr(textpruning.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps textpruner"):
        Structured(2).check(tiny.bert(), [])
    Structured(2, importance="activation").check(tiny.bert(), [])
    Structured(2).check(tiny.llama(), [])
    Structured(head_mask=[[1, 1, 1, 0]] * 2).check(tiny.bert(), [])


def test_the_loss_needs_labels():
    class Unlabelled(FineTune):
        def train_dataloader(self):
            return [INPUTS]

    trainer = pl.Trainer(max_epochs=0, callbacks=[Structured(2)], logger=False, enable_checkpointing=False)
    with pytest.raises(UserError, match="needs labels, and the training batches have none"):
        trainer.fit(Unlabelled(tiny.llama()))


@pytest.mark.parametrize("build", tiny.ALL)
def test_later_stages_are_checked_against_the_new_shapes(textpruner, build):
    def preview(**settings):
        with torch.device("meta"):
            skeleton = build()
        Structured(**settings).preview(skeleton)
        return skeleton

    skeleton = preview(target_heads=2, target_ffn_size=24)
    assert sizes(skeleton) == ([2, 2], [24, 24])
    GPTQ(group_size=8).check(skeleton, [])
    with pytest.raises(UserError, match="group_size is 32, which does not divide the 16 inputs"):
        GPTQ(group_size=32).check(skeleton, [])
    with pytest.raises(UserError, match="keeps the 2 heads and 24 FFN"):
        Structured(2, 24).check(skeleton, [])
    GPTQ(group_size=16).check(preview(target_ffn_size=32, even_ffn=False, ffn_multiple_of=16), [])
    with pytest.raises(UserError, match="does not divide the 40 inputs"):
        GPTQ(group_size=16).check(preview(target_ffn_size=32, even_ffn=False, ffn_multiple_of=8), [])
    assert sizes(preview(head_mask=[[1, 1, 0, 0], [1, 1, 1, 1]])) == ([2, 4], [64, 64])


# A run


@pytest.mark.parametrize(("model", "even"), [("tiny", False), ("tiny_llama", True)])
def test_a_run_leaves_an_artifact_that_says_how_to_load_it(textpruner, tmp_path, model, even):
    from hydra import compose, initialize_config_dir
    from test_conf import CONF

    from compress.running.experiment import run_experiment

    chosen = [
        "technique=structured+gptq",
        "technique.structured.target_heads=2",
        "technique.structured.target_ffn_size=128",
        f"technique.structured.even_ffn={even}",
        "technique.structured.ffn_multiple_of=32",
        "technique.structured.samples=32",
        "technique.structured.train.epochs=1",
        "technique.gptq.group_size=32",
        "technique.gptq.samples=16",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*SMALL, f"model={model}", f"cache.dir={tmp_path / 'cache'}", *chosen])
    outcome = run_experiment(cfg, tmp_path)
    none, both = outcome.measurements.values()
    assert both.parameters < none.parameters and both.size_bytes < 0.6 * none.size_bytes
    loaded = compress.load(tmp_path / "artifact").model
    assert sum(sizes(loaded)[0]) == 6 and sum(sizes(loaded)[1]) == 3 * 128
    card = (tmp_path / "artifact" / "README.md").read_text()
    assert ("compress.load(" in card) == (not even) and ("from_pretrained(" in card) == even


def test_a_mask_file_that_cannot_be_read_is_reported(tmp_path):
    (tmp_path / "mask.json").write_text("[[1, 0")
    with pytest.raises(UserError, match="cannot be read"):
        Structured(head_mask=str(tmp_path / "mask.json")).check(tiny.bert(), [])


def test_a_pattern_of_groups_is_not_broken_up():
    with pytest.raises(UserError, match=r"technique=structured\+prune"):
        Structured(target_heads=2, importance="activation").check(tiny.bert(), [Prune(pattern="2:4")])


def test_blocks_that_will_differ_are_no_reason_to_refuse_a_second_cut():
    skeleton = Structured(target_ffn_size=32, even_ffn=False).preview(tiny.bert())
    assert sum(block.ffn for block in read_blocks(skeleton)) == 64
    Structured(target_ffn_size=16, importance="activation").check(skeleton, [])
