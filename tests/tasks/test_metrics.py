"""Our metrics against scikit-learn, scipy and sums worked by hand."""

import math

import pytest
import torch

from compress.tasks.kinds import METRICS, higher_is_better
from compress.tasks.metrics import SCORES, build_metrics
from compress.tasks.task import Task

sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed: pip install -e '.[dev]'")


def task(kind, names=None, labels=("a", "b", "c", "d")):
    names = names or METRICS[kind]
    return Task(name="t", kind=kind, metrics=names, primary=names[0], labels=labels)


def scores(one, logits, labels, batches=3):
    collection = build_metrics(one)
    for part, answers in zip(logits.chunk(batches), labels.chunk(batches)):
        collection.update(part, answers)
    return {name: float(value) for name, value in collection.compute().items()}


def test_multiclass():
    torch.manual_seed(0)
    logits, labels = torch.randn(200, 4), torch.randint(0, 4, (200,))
    logits[torch.arange(200), labels] += 1
    guess = logits.argmax(-1)
    assert scores(task("multiclass"), logits, labels) == pytest.approx(
        {
            "accuracy": sklearn.accuracy_score(labels, guess),
            "f1_macro": sklearn.f1_score(labels, guess, average="macro"),
            "f1_micro": sklearn.f1_score(labels, guess, average="micro"),
            "matthews": sklearn.matthews_corrcoef(labels, guess),
            "roc_auc": sklearn.roc_auc_score(labels, logits.softmax(-1), multi_class="ovr"),
        },
        abs=1e-5,
    )


def test_multilabel_says_yes_from_a_probability_of_one_half():
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (200, 4)).float()
    logits = torch.randn(200, 4) + labels
    guess = logits > 0
    assert scores(task("multilabel"), logits, labels) == pytest.approx(
        {
            "subset_accuracy": sklearn.accuracy_score(labels, guess),
            "f1_macro": sklearn.f1_score(labels, guess, average="macro"),
            "f1_micro": sklearn.f1_score(labels, guess, average="micro"),
            "roc_auc": sklearn.roc_auc_score(labels, logits.sigmoid(), average="macro"),
        },
        abs=1e-5,
    )


def test_logits_between_0_and_1_are_not_taken_for_probabilities():
    one = task("multilabel", ("subset_accuracy",), ("a", "b"))
    assert scores(one, torch.tensor([[0.2, 0.3]]), torch.tensor([[1.0, 1.0]]), 1) == {"subset_accuracy": 1.0}


def test_regression():
    from scipy import stats

    torch.manual_seed(0)
    labels = torch.rand(100) * 5
    logits = labels[:, None] + torch.randn(100, 1)
    assert scores(task("regression", labels=()), logits, labels) == pytest.approx(
        {
            "pearson": stats.pearsonr(logits[:, 0], labels).statistic,
            "spearman": stats.spearmanr(logits[:, 0], labels).statistic,
        },
        abs=1e-5,
    )


def test_lm_leaves_out_what_is_not_to_be_predicted():
    logits = torch.zeros(2, 3, 5)
    logits[0, 0, 1] = 100
    labels = torch.tensor([[1, 2, -100], [3, -100, -100]])  # one sure and right, two of five alike and wrong
    result = scores(task("lm", labels=()), logits, labels, batches=1)
    assert result == pytest.approx({"perplexity": math.exp(2 * math.log(5) / 3), "accuracy": 1 / 3})


def test_perplexity_of_an_impossible_token_is_finite_and_half_precision_is_as_good():
    one = task("lm", ("perplexity",), ())
    logits = torch.tensor([[[60.0, -60.0]] * 10])
    labels = torch.tensor([[1] + [0] * 9])
    assert scores(one, logits, labels, 1)["perplexity"] == pytest.approx(math.exp(12), rel=1e-3)
    assert scores(one, torch.zeros(2, 3, 7).bfloat16(), torch.ones(2, 3, dtype=int), 1)["perplexity"] == pytest.approx(
        7
    )


def test_only_perplexity_is_better_when_lower():
    assert [name for names in METRICS.values() for name in names if not higher_is_better(name)] == ["perplexity"]


def test_a_label_that_no_text_has_is_left_out_of_roc_auc():
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])  # nobody has the third
    logits = torch.where(labels == 1, 2.0, -2.0)
    one = task("multilabel", ("roc_auc",), ("a", "b", "c"))
    assert scores(one, logits, labels, batches=1)["roc_auc"] == 1.0


@pytest.mark.parametrize("kind", ["multiclass", "multilabel", "regression"])
def test_the_metrics_of_arrays_are_the_same(kind):
    torch.manual_seed(0)
    logits = torch.randn(200, {"regression": 1}.get(kind, 5))
    labels = {
        "multiclass": torch.randint(0, 4, (200,)),  # the fifth is never there
        "multilabel": torch.randint(0, 2, (200, 5)).float(),
        "regression": logits[:, 0] + torch.randn(200),
    }[kind]
    names = [name for name in METRICS[kind] if (kind, name) != ("multiclass", "roc_auc")]
    one = task(kind, names, labels=("a", "b", "c", "d", "e"))
    found = {name: SCORES[kind][name](logits.numpy(), labels.numpy()) for name in names}
    assert found == pytest.approx(scores(one, logits, labels), abs=1e-5)
    assert SCORES[kind].keys() == set(METRICS[kind])


def test_the_area_under_the_curve_of_arrays_is_scikit_learns():
    torch.manual_seed(0)
    logits, labels = torch.randn(200, 4), torch.randint(0, 4, (200,))
    expected = sklearn.roc_auc_score(labels, logits.softmax(-1), multi_class="ovr")
    assert SCORES["multiclass"]["roc_auc"](logits.numpy(), labels.numpy()) == pytest.approx(expected, abs=1e-6)
