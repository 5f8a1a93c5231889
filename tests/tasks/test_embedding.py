"""A model that answers with vectors: what is read, how pairs are compared, what sentence-transformers computes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, BertConfig, BertModel, LlamaConfig, LlamaModel

from compress.artifacts.artifact import Description, load_artifact, write_artifact
from compress.errors import UserError
from compress.maths.vector_losses import contrastive_loss, cosine_loss, pool_tokens
from compress.maths.vectors import FORMS, compare_pairs, measure_bytes, store_vectors
from compress.models.backbone import Backbone
from compress.tasks.embedding import Embedding, Prompts, settle
from compress.tasks.kinds import KINDS
from compress.tasks.splits import Splits, load_splits
from compress.tasks.task import Task
from compress.tasks.tokens import TaskData
from compress.testing import make_embedding
from compress.tiny_models import SHAPE, make_batch, make_tokenizer

KIND = KINDS["embedding"]


def make_task(**settings):
    values = {"name": "t", "kind": "embedding", "metrics": ("spearman",), "primary": "spearman", "labels": ()}
    return Task(**{**values, "columns": {"text": "text", "text_pair": "text_pair", "label": "label"}, **settings})


def make_data(pairs=6, batch_size=4, tokenizer=None):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefgh"), size=rng.integers(1, 7))) for _ in range(2 * pairs)]
    rows = {"text": texts[::2], "text_pair": texts[1::2], "label": rng.random(pairs).tolist()}
    splits = Splits(*(Dataset.from_dict(rows) for _ in range(3)), task=make_task())
    return TaskData(splits, tokenizer or make_tokenizer(), max_length=16, batch_size=batch_size)


# Vectors


def test_tokens_are_pooled_without_padding():
    states = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert pool_tokens(states, mask, "mean").tolist() == [[1, 2], [9, 10]]
    assert pool_tokens(states, mask, "cls").tolist() == [[0, 1], [8, 9]]
    assert pool_tokens(states, mask, "last").tolist() == [[2, 3], [10, 11]]


def test_a_vector_is_stored_in_cheaper_forms():
    vector = np.array([[0.5, -0.25, 0.1] + [0.0] * 61])
    assert store_vectors(vector, "dim32").shape == (1, 32) and store_vectors(vector, "dim128").shape == (1, 64)
    assert store_vectors(vector, "int8")[0, :3].tolist() == [127, -64, 25]
    assert store_vectors(vector, "binary")[0, :3].tolist() == [1, -1, 1]
    assert [measure_bytes(384, form) for form in ("float", "dim64", "int8", "binary")] == [1536, 256, 384, 48]


def test_losses_by_hand():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, 0.0]])
    labels = torch.tensor([[0, 0, 0.5], [0, 1, 0.5], [1, 0, 1.0], [2, 1, 1.0]])  # one pair, and two halves
    assert cosine_loss(vectors, labels).item() == pytest.approx(0.25)
    assert cosine_loss(vectors[2:], labels[2:]) is None
    # A query, its document twice, and another document: the copy does not count as a wrong answer.
    labels = torch.tensor([[0, 0, 7.0], [7, 1, 0], [5, 1, 0], [7, 1, 0]])
    vectors = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert contrastive_loss(vectors, labels).item() == pytest.approx(np.log(2))


def test_predictions_as_labels_have_a_gradient_that_keeps_texts_apart():
    model, batch = make_embedding(), make_batch()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        labels = KIND.choose_labels(model(**inputs).logits, inputs)
    model(**inputs, labels=labels).loss.backward()
    assert model.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0


def test_a_mask_may_be_given_by_position():
    model, batch = make_embedding(), make_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert torch.equal(model(ids, mask).logits, model(input_ids=ids, attention_mask=mask).logits)
    assert not torch.allclose(model(ids).logits, model(ids, mask).logits)


# Settings


@pytest.mark.parametrize("new", [True, False])
def test_settings_come_from_a_folder_of_sentence_transformers(tmp_path, new):
    mode = {"pooling_mode": "cls"} if new else {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    modules = [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]
    about = {"prompts": {"query": "find: ", "passage": "text: "}, "default_prompt_name": None}
    (tmp_path / "1_Pooling").mkdir()
    for name, content in {
        "modules.json": modules,
        "1_Pooling/config.json": mode,
        "config_sentence_transformers.json": about,
    }.items():
        (tmp_path / name).write_text(json.dumps(content))
    config = BertConfig(**SHAPE)
    config._name_or_path = str(tmp_path)
    expected = {"pooling": "cls", "normalise": False, "prompts": {"query": "find: ", "document": "text: "}}
    assert settle(config).items() >= expected.items()
    wanted = Embedding(pooling="mean", normalise=True, prompts=Prompts(query=""))
    assert (
        settle(config, wanted)["prompts"] == {"document": "text: "} and config.sentence_embedding["pooling"] == "mean"
    )


def test_a_decoder_reads_its_last_token_and_an_encoder_the_mean():
    assert settle(LlamaConfig())["pooling"] == "last" and settle(BertConfig())["pooling"] == "mean"


@pytest.mark.parametrize(
    ("modules", "pooling", "sentence"),
    [
        ([{"path": "2_Dense", "type": "x.Dense"}], {}, "lists `Dense`; a transformer in the folder itself, Pooling"),
        ([{"path": "0_Transformer", "type": "x.Transformer"}], {}, "lists a transformer in the folder 0_Transformer"),
        ([{"path": "p", "type": "x.Pooling"}], {"pooling_mode": "max"}, "pools by max; one of mean, cls"),
        ([{"path": "p", "type": "x.Pooling"}], {"pooling_mode": ["mean", "cls"]}, "pools by mean and cls; one of"),
        ([{"path": "p", "type": "x.Pooling"}], {"pooling_mode": "mean", "include_prompt": False}, "without the prompt"),
    ],
)
def test_what_is_not_supported_is_said(tmp_path, modules, pooling, sentence):
    (tmp_path / "p").mkdir()
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "p/config.json").write_text(json.dumps(pooling))
    config = BertConfig()
    config._name_or_path = str(tmp_path)
    with pytest.raises(UserError, match=sentence):
        settle(config)


def test_an_encoder_decoder_is_refused():
    with pytest.raises(UserError, match="an encoder and a decoder, and a vector is read from one stack"):
        Backbone("t5", config={"model_type": "t5"}).configuration(make_task())


def test_a_graph_pools_as_it_was_exported():
    config = BertConfig()
    settle(config)
    settle(config, Embedding(pooling="mean", prompts=Prompts(query="q ")), exported=True)
    with pytest.raises(UserError, match="task.embedding.pooling is cls, and the exported graph was made with mean"):
        settle(config, Embedding(pooling="cls"), exported=True)


def test_prompts_are_put_before_texts(tmp_path):
    tokenizer, model = make_tokenizer(), make_embedding()
    model.config.sentence_embedding |= {"prompts": {"text": "x y "}, "max_length": 20}
    write_artifact(tmp_path, model, tokenizer, Description("embedding", "m", "t"))
    loaded = load_artifact(tmp_path)
    assert loaded.tokenizer.model_max_length == 20
    plain, prompted = (
        make_data(tokenizer=each).tokenised("test")["input_ids"] for each in (tokenizer, loaded.tokenizer)
    )
    assert [ids[2:] for ids in prompted] == list(plain)


# Data


def test_the_texts_of_a_pair_stay_together_and_are_timed_alone():
    data = make_data()
    for batch in [*data.train_dataloader(), *data.test_dataloader()]:
        numbers, places, _ = batch["labels"].T
        assert places.tolist() == [0, 1] * (len(places) // 2) and (numbers[::2] == numbers[1::2]).all()
    (single, *_) = data.texts(2, "test")
    assert single["input_ids"].shape[0] == 1 and "labels" not in single
    assert len(data.words("test")) == 12 and len(data.words("test")[0]) == 1
    (four,) = data.calibration(4, 4)
    assert four["labels"][:, 1].tolist() == [0, 1, 0, 1]


def test_answers_are_cosines_of_pairs_in_any_order():
    rng = np.random.default_rng(0)
    vectors, order = rng.normal(size=(10, 300)), rng.permutation(10)
    labels = np.array([[i // 2, i % 2, i // 2 / 4] for i in range(10)])
    answers = KIND.collect_answers(vectors[order], labels[order], None)
    left, right = vectors[::2], vectors[1::2]
    assert answers.labels.tolist() == [0, 0.25, 0.5, 0.75, 1] and answers.outputs.shape == (5, len(FORMS))
    cosines = (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
    assert answers.outputs[:, 0] == pytest.approx(cosines)
    assert answers.outputs[:, -1] == pytest.approx((np.sign(left) == np.sign(right)).mean(1) * 2 - 1)
    assert labels[order][answers.rows[:, 1], 1].tolist() == [1] * 5
    assert np.abs(compare_pairs(left, right)[:, FORMS.index("int8")] - cosines).max() < 0.01


def test_classes_of_pairs_have_an_average_precision():
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed: pip install -e '.[dev]'")
    rng = np.random.default_rng(0)
    cosines, labels = rng.random((60, len(FORMS))).round(1), rng.integers(0, 2, 60).astype(float)
    drawn = rng.integers(0, 60, 60)
    weights = np.stack([np.ones(60), np.bincount(drawn, minlength=60)], axis=1)
    for name, judge in {"average_precision": sklearn.average_precision_score, "roc_auc": sklearn.roc_auc_score}.items():
        metric = KIND.metrics[f"{name}_int8"]
        column = cosines[:, FORMS.index("int8")]
        expected = [judge(labels, column), judge(labels[drawn], column[drawn])]
        assert metric.score(metric.read(cosines), labels, weights) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "cells", "sentence"),
    [
        ({"columns": {"text": "a"}}, "a\tb\t0.5", "text_pair is null, and task `t` compares the vectors of two texts"),
        ({}, "a\tb\t3", "train.tsv, row 1, column `label`: Task `t` has the score 3 in train; 0 to 1 are expected"),
        ({}, "a\tb\tmuch", "labels that are not numbers"),
        ({"embedding": {"scores": [5, 0]}}, "a\tb\t1", "task.embedding.scores is .5.0, 0.0.; the lowest score"),
    ],
)
def test_bad_pairs_are_refused_in_a_sentence(tmp_path, settings, cells, sentence):
    (tmp_path / "train.tsv").write_text(f"text\ttext_pair\tlabel\n{cells}\n" + "a\tb\t0.5\n" * 20)
    with pytest.raises(UserError, match=sentence):
        holdout = {"validation": 0.2, "test": 0.2}
        load_splits(make_task(path=str(tmp_path), files=[{"train": "train.tsv"}], holdout=holdout, **settings))


# Artifacts

ENCODE = """
import sys
sys.modules["compress"] = None
from sentence_transformers import SentenceTransformer
import numpy as np
for folder in sys.argv[1:]:
    model = SentenceTransformer(folder, device="cpu")
    np.save(f"{folder}/vectors.npy", model.encode(["a b w3", "z"]))
"""


@pytest.mark.slow
def test_sentence_transformers_alone_computes_the_same_vectors(tmp_path):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    torch.manual_seed(0)
    tokenizer, expected = make_tokenizer(), {}
    llama = LlamaConfig(**SHAPE, num_key_value_heads=2, pad_token_id=0)
    for name, base, config in (("bert", BertModel, BertConfig(**SHAPE)), ("llama", LlamaModel, llama)):
        settle(config, Embedding(normalise=name == "bert", prompts=Prompts(text="q " if name == "bert" else None)))
        model = KIND.adapt_class(base)(config).eval()
        (tmp_path / name).mkdir()
        write_artifact(tmp_path / name, model, tokenizer, Description("embedding", "m", "t"))
        loaded = load_artifact(tmp_path / name)
        texts = {"text": ["a b w3", "z"]}
        rows = Dataset.from_dict(KIND.tokenise(texts, loaded.tokenizer, 16))
        with torch.inference_mode():
            expected[name] = loaded.model(**KIND.collate(list(rows), loaded.tokenizer)).logits.numpy()
        assert AutoConfig.from_pretrained(tmp_path / name).architectures == [base.__name__]
    folders = [str(tmp_path / name) for name in expected]
    subprocess.run([sys.executable, "-c", ENCODE, *folders], check=True, capture_output=True)
    for name, vectors in expected.items():
        assert np.load(tmp_path / name / "vectors.npy") == pytest.approx(vectors, abs=1e-5)
