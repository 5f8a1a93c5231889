from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import tiny
import torch
from datasets import Dataset
from test_prune import fit as one_shot
from transformers import BatchEncoding, BertConfig, BertForSequenceClassification

from compress.errors import UserError
from compress.models.batches import iterate_texts
from compress.models.matrices import find_zeros, matrices
from compress.models.objectives import compare_logits
from compress.models.students import (
    Student,
    build_student,
    check_same_labels,
    check_same_vocabulary,
    load_student,
    narrow_config,
    space_layers,
)
from compress.models.teachers import KeptLogits, round_teacher
from compress.running.training import HoldZeros
from compress.tasks.task import Task
from compress.technique import Training
from compress.techniques.distill import Distill
from compress.techniques.prune import Prune
from compress.techniques.prune_vocab import PruneVocab

pytest.importorskip("textbrewer", reason="pip install -e '.[distill]'")

CHAT = Task(name="t", kind="chat", metrics=("perplexity",), primary="perplexity", pack=True)
FAST = Training(epochs=1, learning_rate=1e-2)
KEY = "technique.distill.student"
HIDDEN = {"layer_T": 2, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse"}


class Losses(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, *args):
        self.seen.append({k: v.item() for k, v in trainer.callback_metrics.items()})


def distil(module, *callbacks, epochs=1, lm=False):
    losses = Losses()
    tiny.trainer(losses, *callbacks, epochs=epochs).fit(module, tiny.loader(8, lm=lm))
    return losses.seen


def shallow(**changes):
    torch.manual_seed(1)
    return BertForSequenceClassification(
        BertConfig(**{**tiny.SHAPE, "num_hidden_layers": 1, "num_labels": 3, **changes})
    )


@pytest.mark.parametrize("loss", ["ce", "kl", "mse", "reverse_kl", "js"])
def test_a_student_learns_its_teachers_answers_with_every_loss(loss):
    teacher = tiny.bert()
    module = Distill(shallow(), teacher=teacher, loss=loss, training=FAST, temperature=1.0)
    batch = {key: value for key, value in tiny.batch().items() if key != "labels"}

    def distance():
        with torch.no_grad():
            return (module.model.eval()(**batch).logits.softmax(-1) - teacher(**batch).logits.softmax(-1)).abs().max()

    before = distance()
    distil(module, epochs=6)
    assert distance() < before


def test_the_teacher_is_not_trained_and_not_part_of_the_module():
    teacher, untouched = tiny.bert(), tiny.bert()
    module = Distill(shallow(), teacher=teacher, training=FAST)
    distil(module)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), untouched.parameters()))
    assert not any("teacher" in name for name in module.state_dict())


def test_a_language_model_is_distilled_by_token():
    teacher, student = tiny.llama_lm(), build_student(tiny.llama_lm(), Student(layers=1), KEY)
    seen = distil(Distill(student, teacher=teacher, loss="kl", temperature=1.0, training=FAST), epochs=8, lm=True)
    assert seen[-1]["train/soft"] < 0.5 * seen[0]["train/soft"]


@pytest.mark.parametrize(
    "match",
    [
        HIDDEN,
        {**HIDDEN, "loss": "cos"},
        {**HIDDEN, "loss": "pkd"},
        {**HIDDEN, "layer_T": (1, 2), "layer_S": (0, 1), "loss": "fsp"},
        {**HIDDEN, "layer_T": (1, 2), "layer_S": (0, 1), "loss": "mmd"},
        {"layer_T": 1, "layer_S": 0, "feature": "attention", "loss": "attention_mse"},
        {"layer_T": 1, "layer_S": 0, "feature": "attention", "loss": "attention_ce"},
        {"layer_T": 1, "layer_S": 0, "feature": "relation", "loss": "minilm", "heads": 4},
    ],
)
def test_intermediate_features_come_closer(match):
    module = Distill(shallow(), teacher=tiny.bert(), soft_weight=0, intermediate_matches=(match,), training=FAST)
    seen = distil(module, epochs=4)
    assert seen[-1][f"train/{match['loss']}_0"] < seen[0][f"train/{match['loss']}_0"]


def test_a_projection_is_learnt_where_widths_differ():
    match = {**HIDDEN, "proj": ("linear", 16, 32)}
    module = Distill(shallow(hidden_size=16), teacher=tiny.bert(), intermediate_matches=(match,), training=FAST)
    module.configure_model()
    before = module.projections[0].weight.clone()
    distil(module)
    assert not torch.equal(module.projections[0].weight, before)
    assert "projections" not in "".join(module.model.state_dict())


def test_a_recovered_model_keeps_its_zeros():
    model = one_shot(tiny.bert(), Prune(sparsity=0.5))
    mask = find_zeros(model)
    distil(Distill(model, teacher=tiny.bert(), hard_weight=0.5, training=FAST), HoldZeros())
    assert all((model.get_submodule(name).weight[zero] == 0).all() for name, zero in mask.items())


def test_weights_follow_their_schedules():
    module = Distill(
        shallow(), teacher=tiny.bert(), hard_weight=1.0, soft_schedule="linear_decay", hard_schedule="linear_growth",
        training=FAST,
    )  # fmt: skip
    seen = distil(module)
    first, last = seen[1], seen[-1]
    for logged, progress in ((first, 1 / 8), (last, 7 / 8)):
        expected = (1 - progress) * logged["train/soft"] + progress * logged["train/hard"]
        assert logged["train/loss"] == pytest.approx(expected, rel=1e-4)


def test_a_student_is_cut_from_evenly_spaced_layers_of_the_teacher():
    assert space_layers(3, 6, KEY) == [0, 2, 5] and space_layers(1, 6, KEY) == [5]
    assert space_layers(6, 6, KEY) == list(range(6))
    model = tiny.llama()
    student = build_student(model, Student(layers=(1,)), KEY)
    assert student.config.num_hidden_layers == 1 and model.config.num_hidden_layers == 2
    taken, origin = matrices(student), matrices(model)
    assert all(
        torch.equal(layer.weight, origin[name.replace("layers.0", "layers.1")].weight) for name, layer in taken.items()
    )


def test_a_narrower_student_keeps_the_width_of_a_head():
    config = narrow_config(tiny.llama().config, 16, KEY)
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (16, 2, 1)
    assert config.intermediate_size == 32
    student = build_student(tiny.bert(), Student(hidden_size=16), KEY)
    assert student(**tiny.batch()).logits.shape == (4, 3)
    with pytest.raises(
        UserError, match="hidden_size is 20 and heads keep their size; for 32 dimensions .*=4. Set a multiple of 8"
    ):
        narrow_config(tiny.bert().config, 20, KEY)
    with pytest.raises(UserError, match="Set a multiple of 16"):
        narrow_config(tiny.llama().config, 24, KEY)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kept_logits": "all", "masking": 0.1}, "needs the teacher at every step"),
        ({"soft_weight": 0}, "the teacher teaches nothing"),
        ({"temperature_schedule": ("flsw", 1)}, r"\[flsw,1,2\]"),
        ({"loss": "common"}, "loss is common, which needs a model that writes text, and the task is multiclass"),
        ({"written_tokens": 4}, "written_tokens is 4, which needs a model that writes text"),
        ({"intermediate_matches": [{**HIDDEN, "loss": "minilm"}]}, "`hidden` has no loss `minilm`"),
        ({"intermediate_matches": [{**HIDDEN, "proj": ["linear", 3]}]}, "the student's width and the teacher's"),
    ],
)
def test_settings_that_contradict_are_reported(wrong, message):
    with pytest.raises(UserError, match=message):
        Distill(tiny.bert(), training=FAST, **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"written_tokens": 4}, "hard_weight is 0, so the student would not learn the teacher's words. Set .*=1"),
        ({"loss": "uld"}, "says how sure the teacher is and not of which token, .* Set .*hard_weight=1"),
        ({"loss": "common", "kept_logits": "all"}, "kept_logits is all, which needs the same tokens"),
        ({"loss": "common", "masking": 0.1}, "masking is 0.1, which needs the same tokens"),
        ({"loss": "common", "intermediate_matches": [HIDDEN]}, "intermediate_matches is .*the same tokens"),
        ({"loss": "common", "task": CHAT}, "loss is common, .*task.pack is true. Set task.pack=false"),
        ({"kept_logits": "all", "task": CHAT}, "kept_logits is all, .*task.pack is true. Set task.pack=false"),
    ],
)
def test_settings_of_decoders_that_contradict_are_reported(wrong, message):
    with pytest.raises(UserError, match=message):
        Distill(tiny.llama_lm(), training=FAST, **wrong)


def test_a_teacher_with_another_tokenizer_is_refused_before_it_is_loaded(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path)
    tiny.llama_lm().config.save_pretrained(tmp_path)
    ours = tiny.tokenizer()
    ours.add_tokens(["longer"])
    settings = {"training": FAST, "teacher": str(tmp_path), "tokenizer": ours}
    with pytest.raises(UserError, match="another vocabulary: .* Decoders: set technique.distill.loss=common"):
        Distill(tiny.llama_lm(), **settings).check(tiny.llama_lm(), [])
    Distill(tiny.llama_lm(), **settings, loss="common").check(tiny.llama_lm(), [])
    words = {"soft_weight": 0, "hard_weight": 1, "written_tokens": 4}
    Distill(tiny.llama_lm(), **settings, **words).check(tiny.llama_lm(), [])


@pytest.mark.parametrize(
    ("settings", "before", "message"),
    [
        ({"student": Student(layers=3)}, [], "layers is 3 and the model has 2"),
        ({"student": Student(layers=(0, 5))}, [], "names the block 5"),
        ({"training": Training()}, [], "epochs is 0, so nothing is distilled"),
        ({"extra_text": "nowhere.txt"}, [], "extra_text is nowhere.txt, which is no file"),
        ({"intermediate_matches": [{**HIDDEN, "layer_T": 3}]}, [], "layer_T is 3 and the last `hidden`.*is 2"),
        ({"intermediate_matches": [{**HIDDEN, "layer_T": (1, 2)}]}, [], "`hidden_mse` takes one layer"),
        ({"student": Student(hidden_size=16), "intermediate_matches": [HIDDEN]}, [], r"proj=\[linear,16,32\]"),
        ({}, [PruneVocab()], r"Set technique=distill\+prune_vocab to distil first"),
    ],
)
def test_what_does_not_fit_is_reported_before_anything_is_loaded(settings, before, message):
    with pytest.raises(UserError, match=message):
        Distill(tiny.bert(), **{"training": FAST, **settings}).check(tiny.bert(), before)


def test_extra_text_is_utf_8_with_a_text_a_line_and_checked_before_anything_is_loaded(tmp_path):
    file = tmp_path / "extra.txt"
    stage = Distill(tiny.bert(), training=FAST, extra_text=file)
    for content, message in ((b"\n \n", "extra.txt, which holds no text"), (b"ok\ncaf\xe9", "line 2 is not UTF-8")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            stage.check(tiny.bert(), [])
    file.write_bytes("\ufeffone\u2028two\r\n\n three \x0c\n\x00\n".encode())
    stage.check(tiny.bert(), [])

    def tokenizer(texts, **_):
        return {"input_ids": [[len(text)] * (text != "\x00") for text in texts]}  # a text without tokens

    tokenizer.pad = lambda rows, **_: BatchEncoding({"input_ids": torch.tensor([row["input_ids"] for row in rows])})
    data = SimpleNamespace(tokenizer=tokenizer, max_length=8, batch_size=4, seed=0)
    batch = next(iterate_texts(stage.extra_text, data, stage.device, "extra_text"))
    assert sorted(batch["input_ids"].flatten().tolist()) == [len("three"), len("one\u2028two")]


def test_the_first_stage_without_a_student_distils_into_half_of_the_layers():
    stage = Distill(tiny.bert(), training=FAST)
    stage.check(tiny.bert(), [])
    assert stage.preview(tiny.bert()).config.num_hidden_layers == 1
    stage.check(tiny.bert(), [Prune()])
    assert stage.preview(tiny.bert()).config.num_hidden_layers == 2


def test_a_teacher_of_other_labels_is_refused():
    with pytest.raises(UserError, match="a model for the labels LABEL_0, LABEL_1 and the student's are"):
        distil(Distill(shallow(), teacher=tiny.bert(num_labels=2), training=FAST))


def test_another_vocabulary_is_explained():
    with pytest.raises(UserError, match=r"of its 3 tokens 1 have the id .*which has 2"):
        check_same_vocabulary({"a": 0, "b": 1}, {"a": 0, "c": 1, "b": 2}, f"{KEY}.path")


def test_a_student_without_an_embedding_for_a_token_of_every_text_is_refused(tmp_path):
    tokenizer, student = tiny.tokenizer(), tiny.bert()
    student.resize_token_embeddings(max(tokenizer("a")["input_ids"]))
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"{KEY}.path is .*, whose tokenizer adds token .* Set {KEY}.path to a folder"):
        load_student(str(tmp_path), tiny.bert(), f"{KEY}.path", tokenizer)


def test_labels_in_another_case_and_without_names_are_the_same_labels():
    def config(*names, problem_type=None):
        labels = {"id2label": dict(enumerate(names))} if names else {"num_labels": 2}
        return BertConfig(**labels, problem_type=problem_type)

    ours = config("negative", "positive")
    for theirs in (config("NEGATIVE", "Positive"), config("LABEL_0", "LABEL_1"), config()):
        check_same_labels(theirs, ours, KEY)
        check_same_labels(ours, theirs, KEY)
    check_same_labels(config("score"), config("LABEL_0"), KEY)
    check_same_labels(config("score"), config("grade"), KEY)
    for wrong in (config("positive", "negative"), config("negative"), config("LABEL_0", "LABEL_1", "LABEL_2")):
        with pytest.raises(
            UserError, match="a model for the labels .* Choose a teacher that was trained for this task"
        ):
            check_same_labels(wrong, ours, KEY)


def padded(model, rows):
    """Return a language model with ``rows`` embeddings, of which the last are of no token."""
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@pytest.mark.parametrize(("student", "teacher"), [(60, 64), (64, 60)])
@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_vocabularies_of_one_tokenizer_may_be_padded_to_different_sizes(student, teacher, loss):
    settings = {"loss": loss, "training": FAST, "temperature": 1.0, "teacher_dtype": "float32"}
    module = Distill(padded(tiny.llama_lm(), student), teacher=padded(tiny.llama_lm(), teacher), **settings)
    seen = distil(module, lm=True)
    # The first 60 rows are the same, so the first answers are too; what lies beyond them does not count.
    assert seen[0]["train/soft"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("k", [None, 3])
def test_kept_logits_of_a_padded_vocabulary_are_compared_over_the_common_tokens(k, tmp_path):
    teacher, student = padded(tiny.llama_lm(), 64), tiny.llama_lm()
    rows = Dataset.from_list([{"input_ids": tiny.batch(seed=seed)["input_ids"][0].tolist()} for seed in range(3)])

    def collate(rows):
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    kept = KeptLogits(tmp_path / "kept", rows, k)
    kept.fill(lambda batch: teacher(**batch).logits.detach(), collate, 2)
    batch = collate(list(rows))
    module = Distill(student, teacher=teacher, loss="kl", training=FAST)
    loss = compare_logits(module, student(**batch).logits, kept(batch), batch["attention_mask"])
    assert kept(batch).shape[-1] == 64 and torch.isfinite(loss)
    assert loss.item() == pytest.approx(0, abs=1e-3) if k is None else loss > 0


class Answers(torch.nn.Module):
    """A model that answers with its weights: in bfloat16, with their first eight digits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self):
        return self


@pytest.mark.parametrize(
    ("probabilities", "logits", "rounds"),
    [
        ("softmax", [[1.0, 3.0]], True),
        ("softmax", [[1.0, 1.001]], False),  # the two become the same
        ("softmax", [[100.3, 100.6]], False),
        ("sigmoid", [[1.0, -3.0]], True),
        ("sigmoid", [[1000.0, -3.0]], True),  # far from any change
        ("sigmoid", [[2.508, 2.508]], True),
        (None, [[20.05], [24.9]], False),  # the first becomes 20.0: 2 % of the deviation of 2.4
        (None, [[0.737], [100.0]], True),
        (None, [[100.3], [100.6]], False),
        (None, [[1.0], [1.0]], False),
    ],
)
def test_a_rounded_teacher_is_compared_as_its_task_needs(probabilities, logits, rounds):
    teacher = Answers(logits)
    assert (round_teacher(teacher, {}, probabilities) is not teacher) == rounds


def test_the_teacher_runs_in_bfloat16_only_where_it_answers_the_same():
    batch = {key: value for key, value in tiny.batch().items() if key != "labels"}
    decided = tiny.bert()
    decided.classifier.bias.data = torch.tensor([0.0, 5.0, -5.0])
    assert round_teacher(decided, batch).dtype == torch.bfloat16 and decided.dtype == torch.float32
    torn = tiny.bert()
    torn.classifier.weight.data *= 1000
    assert round_teacher(torn, batch) is torn
