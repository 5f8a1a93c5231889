"""Distillation, depth pruning and vocabulary pruning on every architecture: they work, or the check says why not."""

import architectures
import pytest
import tiny
import torch
from architectures import ARCHITECTURES, BLOCKS, CLASSIFIERS
from torch.utils.data import DataLoader

from compress.errors import UserError
from compress.models.depth import drop_blocks
from compress.models.families import FAMILIES
from compress.models.layers import find_blocks
from compress.models.loading import choose_attention
from compress.models.students import Student
from compress.models.teachers import cast_teacher
from compress.runtimes import torch as runtime
from compress.technique import Training
from compress.techniques.distill import Distill
from compress.techniques.drop_layers import DropLayers, measure_influences
from compress.techniques.finetune import FineTune
from compress.techniques.prune import Prune
from compress.techniques.prune_vocab import PruneVocab, cut_embeddings
from compress.tiny_models import make_tokenizer

HEADS = {name: name not in CLASSIFIERS for name in ARCHITECTURES}
"""Whether an architecture is tested as a language model: if it has no classifier."""
CASES = [*HEADS.items(), ("llama", True), ("gpt2", True), ("gemma3_text", True), ("qwen3_moe", True)]
TWO_STACKS = ("bart", "t5", "t5-short")
ONE_STACK = [(name, lm) for name, lm in CASES if name not in (*TWO_STACKS, "albert")]
FIXED = {"modernbert": [0]}
"""Blocks that a model cannot do without: ModernBERT's first has no norm before its attention."""
TRAINING = Training(epochs=1, learning_rate=1e-3)


def skeleton(name, lm=False):
    with torch.device("meta"):
        return architectures.build(name, lm)


def fit(module, *callbacks, lm=False, epochs=1):
    tiny.trainer(*callbacks, epochs=epochs).fit(module, architectures.loader(2, lm=lm))


@torch.no_grad()
def logits(model):
    return model.eval()(**architectures.inputs()).logits


def shapes(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def check_reload(model, lm, folder):
    model.save_pretrained(folder)
    expected = logits(model)
    assert torch.isfinite(expected).all()
    assert torch.equal(logits(runtime.load(folder, "lm" if lm else "multiclass")), expected)


@pytest.mark.parametrize(("name", "lm"), CASES)
def test_a_shallower_student_matches_hidden_states_and_reloads_or_is_refused(name, lm, tmp_path):
    pytest.importorskip("textbrewer")
    match = {"layer_T": BLOCKS, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse"}
    settings = {"training": TRAINING, "student": Student(layers=1), "intermediate_matches": (match,)}
    stage = Distill(skeleton(name, lm), **settings)
    if (name, lm) not in ONE_STACK:
        with pytest.raises(UserError, match=r"student.layers needs one stack .* Set .*hidden_size instead, or .*path"):
            stage.check(skeleton(name, lm), [])
        return
    stage.check(skeleton(name, lm), [])
    expected = shapes(stage.preview(skeleton(name, lm)))
    module = Distill(architectures.build(name, lm), teacher=architectures.build(name, lm), **settings)
    fit(module, lm=lm)
    assert module.trainer.callback_metrics["train/hidden_mse_0"] > 0
    assert shapes(module.model) == expected and len(find_blocks(module.model)[1]) == 1
    check_reload(module.model, lm, tmp_path)


@pytest.mark.parametrize(("name", "lm"), CASES)
def test_a_narrower_student_learns_and_reloads(name, lm, tmp_path):
    pytest.importorskip("textbrewer")
    settings = {"training": TRAINING, "student": Student(hidden_size=32)}
    stage = Distill(skeleton(name, lm), **settings)
    stage.check(skeleton(name, lm), [])
    expected = shapes(stage.preview(skeleton(name, lm)))
    teacher = architectures.build(name, lm)
    module = Distill(teacher, teacher=teacher, **settings)
    fit(module, lm=lm)
    assert shapes(module.model) == expected
    inside, whole = (sum(p.numel() for p in find_blocks(m)[1].parameters()) for m in (module.model, teacher))
    assert inside < 0.28 * whole  # width, heads and FFN are halved
    check_reload(module.model, lm, tmp_path)


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "mistral", "llama", "bert", "falcon"])
def test_a_student_of_the_teachers_own_width_has_its_heads(name):
    stage = Distill(skeleton(name), training=TRAINING, student=Student(hidden_size=64))
    assert shapes(stage.preview(skeleton(name))) == shapes(skeleton(name))


@pytest.mark.parametrize("name", TWO_STACKS)
def test_features_of_two_stacks_are_not_matched(name):
    match = {"layer_T": 1, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse"}
    stage = Distill(skeleton(name), training=TRAINING, intermediate_matches=(match,))
    with pytest.raises(UserError, match=r"the student is a `(bart|t5)`, which has an encoder and a decoder, and a mat"):
        stage.check(skeleton(name), [Prune()])


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in TWO_STACKS])
@pytest.mark.parametrize(("feature", "loss"), [("attention", "attention_mse"), ("relation", "minilm")])
def test_attention_and_relations_are_matched_in_known_families_and_refused_in_others(name, feature, loss):
    pytest.importorskip("textbrewer")
    lm = HEADS[name]
    match = {"layer_T": 1, "layer_S": 1, "feature": feature, "loss": loss, "heads": 4}
    settings = {"training": TRAINING, "intermediate_matches": (match,), "soft_weight": 0}
    stage = Distill(skeleton(name, lm), **settings)
    family = FAMILIES.get(ARCHITECTURES[name].model_type)
    together = family and feature == "relation" and (family.layout != "separate" or family.shares_blocks)
    if family is None or together:
        with pytest.raises(UserError, match=rf"distill.intermediate_matches: the feature `{feature}` .* feature=hid"):
            stage.check(skeleton(name, lm), [Prune()])
        return
    stage.check(skeleton(name, lm), [Prune()])
    module = Distill(architectures.build(name, lm, seed=1), teacher=architectures.build(name, lm), **settings)
    fit(module, lm=lm)
    assert module.trainer.callback_metrics[f"train/{loss}_0"] > 0


@pytest.mark.parametrize(("name", "lm"), CASES)
def test_a_model_reloads_without_each_block_that_can_go(name, lm, tmp_path):
    if (name, lm) not in ONE_STACK:
        with pytest.raises(UserError, match=r"`drop_layers` needs one stack of blocks with weights of their own, and"):
            DropLayers().check(skeleton(name, lm), [])
        return
    for block in range(BLOCKS):
        stage = DropLayers(drop=[block])
        if block in FIXED.get(name, ()):
            with pytest.raises(UserError, match=rf"without block {block} the others are not the blocks that"):
                stage.check(skeleton(name, lm), [])
            continue
        stage.check(skeleton(name, lm), [])
        expected = shapes(stage.preview(skeleton(name, lm)))
        if block == 1:  # the first and the last block are those whose loss shows
            continue
        model = architectures.build(name, lm)
        drop_blocks(model, [block])
        assert shapes(model) == expected
        check_reload(model, lm, tmp_path / str(block))


@pytest.mark.parametrize(("name", "lm"), ONE_STACK)
def test_blocks_of_least_influence_go_except_those_that_must_stay(name, lm, tmp_path):
    model = architectures.build(name, lm)
    blocks = list(find_blocks(model)[1])
    if name == "xlnet":
        with pytest.raises(UserError, match=r"hidden states of \[16, 4\] for texts of \[4, 16\].* Set by=spread"):
            measure_influences(model, [architectures.inputs()])
        return
    fit(FineTune(model, training=TRAINING), DropLayers(drop=2, samples=8), lm=lm)
    (left,) = find_blocks(model)[1]
    assert blocks.index(left) in FIXED.get(name, range(BLOCKS))
    check_reload(model, lm, tmp_path)


@pytest.mark.parametrize("by", ["spread", "last"])
def test_positions_leave_out_blocks_that_must_stay(by):
    stage = DropLayers(drop=2, by=by)
    stage.check(skeleton("modernbert"), [])
    assert sorted(stage.choose_blocks(skeleton("modernbert"))) == [1, 2]
    with pytest.raises(UserError, match=r"drop is 3 and the model has 3 blocks; at least one block must stay"):
        DropLayers(drop=3, by=by).check(skeleton("modernbert"), [])


@pytest.mark.parametrize(("layers", "left"), [(1, [0]), (2, [0, 2]), ((0, 1), [0, 1])])
def test_a_student_keeps_the_blocks_that_must_stay(layers, left):
    model = architectures.build("modernbert")
    blocks = [block.mlp.Wi.weight.clone() for block in find_blocks(model)[1]]
    stage = Distill(model, training=TRAINING, student=Student(layers=layers))
    student = stage.preview(model)
    assert [
        next(i for i, w in enumerate(blocks) if torch.equal(w, b.mlp.Wi.weight)) for b in find_blocks(student)[1]
    ] == left
    with pytest.raises(UserError, match=r"student.layers is \(1,\); without block 0 the others are not the blocks"):
        Distill(model, training=TRAINING, student=Student(layers=(1,))).check(model, [])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_teacher_in_bfloat16_is_the_one_that_transformers_loads(name, tmp_path):
    teacher = architectures.build(name, HEADS[name])
    teacher.save_pretrained(tmp_path)
    theirs = choose_attention(type(teacher).from_pretrained(tmp_path, dtype=torch.bfloat16))
    ours = cast_teacher(teacher)
    angles = {key: buffer.dtype for key, buffer in ours.named_buffers() if key.endswith("inv_freq")}
    assert set(angles.values()) <= {torch.float32}
    assert all(parameter.dtype == torch.bfloat16 for parameter in ours.parameters())
    if name not in ("deberta", "xlnet"):  # which transformers loads with weights of two types that do not fit
        assert torch.equal(logits(ours), logits(theirs))
    assert all(parameter.dtype == torch.float32 for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("name", "lm", "tied"), [*((*case, True) for case in CASES), *((name, lm, False) for name, lm in CASES if lm)]
)
@torch.no_grad()
def test_a_model_answers_the_same_after_its_vocabulary_is_cut_and_reloads(name, lm, tied, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<added>"])  # the model's vocabulary is padded beyond it
    model = architectures.build(name, lm, vocab_size=64, tie_word_embeddings=tied)
    batch = architectures.batch(lm=lm)
    ids = batch["input_ids"]
    batch["input_ids"] = torch.where(ids > 4, 32 + 2 * (ids % 10), ids)  # every second word of some, and no letters
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    expected, stage = model(**inputs).logits, PruneVocab(tokenizer=tokenizer)
    tiny.trainer(stage).fit(FineTune(model, training=TRAINING), DataLoader([batch], batch_size=None))
    old, new = tokenizer.get_vocab(), stage.tokenizer.get_vocab()
    kept = sorted(old[token] for token in new)
    assert len(new) == model.config.vocab_size == model.get_input_embeddings().num_embeddings < len(old)
    assert "<added>" in new
    inputs["input_ids"] = torch.searchsorted(torch.tensor(kept), inputs["input_ids"])
    answers = model.eval()(**inputs).logits
    assert torch.allclose(answers, expected[..., kept] if lm else expected, atol=1e-6)
    model.save_pretrained(tmp_path)
    assert torch.equal(runtime.load(tmp_path, "lm" if lm else "multiclass")(**inputs).logits, answers)


@pytest.mark.parametrize("name", ["bart", "t5", "bert", "opt", "llama"])
@torch.no_grad()
def test_the_padding_gets_a_new_id_in_every_module_of_the_embeddings(name):
    model, inputs = architectures.build(name, pad_token_id=59), architectures.inputs()
    inputs["input_ids"] = inputs["input_ids"].clamp(max=30).masked_fill(inputs["attention_mask"] == 0, 59)
    expected = model(**inputs).logits
    cut_embeddings(model, [*range(31), 59])
    inputs["input_ids"] = inputs["input_ids"].clamp(max=31)
    assert model.config.pad_token_id == 31 and torch.equal(model(**inputs).logits, expected)
    words = model.get_input_embeddings().weight
    shared = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.weight is words]
    assert {module.padding_idx for module in shared} <= {31, None}
