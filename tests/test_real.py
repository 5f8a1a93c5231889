"""Test what compression costs with real weights on real data."""

import pytest

import compress
from compress.models.matrices import find_zeros, matrices

pytestmark = pytest.mark.slow
FULL_TEST = ["task.limit.test=null", "task.limit.validation=200"]


def test_minilm_on_sst2_keeps_its_accuracy_through_prune_and_gptq(
    carry_out,
    shared_models,
    shared_data,
    tmp_path,
):
    outcome = carry_out(
        "technique=prune+gptq",
        f"model.path={shared_models('minilm-l6')}",
        f"task.path={shared_data('glue-sst2')}",
        *FULL_TEST,
        "task.limit.train=4000",
        "technique.gptq.samples=128",
        model="minilm",
        task="sst2",
    )
    none, both = outcome.measurements.values()
    assert none.examples == 872 and none.quality["accuracy"] > 0.8  # one epoch of 4,000 texts
    assert both.quality["accuracy"] > none.quality["accuracy"] - 0.02
    assert both.size_bytes < 0.65 * none.size_bytes
    model = compress.load(tmp_path / "artifact").model
    zeros = sum(int(zero.sum()) for zero in find_zeros(model).values())
    assert zeros >= 0.2 * sum(linear.weight.numel() for linear in matrices(model).values())


def test_stories260k_on_tinystories(carry_out, shared_models, shared_data):
    outcome = carry_out(
        "technique=prune+gptq",
        "technique.gptq.group_size=-1",
        f"model.path={shared_models('stories260K')}",
        f"task.path={shared_data('tinystories-sample')}",
        *FULL_TEST,
        "task.limit.train=null",
        "baseline.epochs=0",
        "technique.gptq.samples=64",
        model="llama",
        task="tinystories",
    )
    none, both = (m.quality["perplexity"] for m in outcome.measurements.values())
    assert 4 < none < 7 and none < both < 1.25 * none


def test_criteria_order_as_their_papers_say_on_stories260k(carry_out, shared_models, shared_data):
    def perplexity(criterion):
        outcome = carry_out(
            "technique=prune",
            "technique.prune.sparsity=0.5",
            f"technique.prune.criterion={criterion}",
            f"model.path={shared_models('stories260K')}",
            f"task.path={shared_data('tinystories-sample')}",
            *FULL_TEST,
            "task.limit.train=null",
            "baseline.epochs=0",
            model="llama",
            task="tinystories",
        )
        return outcome.measurements["prune"].quality["perplexity"]

    by = {criterion: perplexity(criterion) for criterion in ("sparsegpt", "wanda", "magnitude", "random")}
    assert by["sparsegpt"] <= by["wanda"] < 0.5 * by["magnitude"] < 0.05 * by["random"]


def test_a_dense_baseline_recovers_what_pruning_lost_better_than_the_text_alone(
    carry_out,
    shared_models,
    shared_data,
):
    def perplexity(chain):
        outcome = carry_out(
            f"technique={chain}",
            "technique.prune.sparsity=0.5",
            "technique.prune.criterion=wanda",
            f"model.path={shared_models('stories260K')}",
            f"task.path={shared_data('tinystories-sample')}",
            *FULL_TEST,
            "task.limit.train=null",
            "baseline.epochs=3",
            "baseline.learning_rate=1e-3",
            model="llama",
            task="tinystories",
        )
        return outcome.measurements[chain].quality["perplexity"]

    pruned, trained, distilled = (perplexity(chain) for chain in ("prune", "prune+finetune", "prune+distill"))
    assert distilled < 0.995 * trained and trained < 0.5 * pruned


def test_minilm_recovers_on_sst2(carry_out, shared_models, shared_data):
    settings = ("target_heads=6", "target_ffn_size=768", "iterations=4", "train.epochs=1")
    outcome = carry_out(
        "technique=structured",
        *(f"technique.structured.{setting}" for setting in settings),
        f"model.path={shared_models('minilm-l6')}",
        f"task.path={shared_data('glue-sst2')}",
        *FULL_TEST,
        "task.limit.train=4000",
        model="minilm",
        task="sst2",
    )
    none, cut = outcome.measurements.values()
    assert cut.quality["accuracy"] > none.quality["accuracy"] - 0.02
    assert cut.size_bytes <= 0.78 * none.size_bytes


@pytest.mark.parametrize("epochs", [6])
def test_a_small_llama_learns_strategies_and_keeps_them(carry_out, shared_data, epochs):
    outcome = carry_out(
        "technique=prune+gptq",
        f"task.path={shared_data('esconv')}",
        *FULL_TEST,
        "task.limit.train=null",
        f"baseline.epochs={epochs}",
        model="tiny_llama",
        task="augesc",
    )
    none, both = (m.quality["accuracy"] for m in outcome.measurements.values())
    assert none > 0.28  # always answering the most common of the eight strategies: 0.205
    assert both > none - 0.02


@pytest.mark.parametrize(
    ("task", "data", "primary", "figure"),
    [("stsb_embedding", "glue-stsb", "spearman", 0.867), ("retrieval", "xquad", "ndcg_10", 0.944)],
)
def test_minilm_as_it_is_has_its_published_quality(carry_out, shared_models, shared_data, task, data, primary, figure):
    words = [f"model.path={shared_models('minilm-l6')}", f"task.path={shared_data(data)}", "baseline.epochs=0"]
    words += ["task.rows=questions"] if task == "retrieval" else []
    outcome = carry_out("technique=none", *words, *FULL_TEST, "task.limit.train=null", model="minilm", task=task)
    (measured,) = outcome.measurements.values()
    assert measured.examples == (1187 if task == "retrieval" else 1500)  # three are asked twice
    assert measured.quality[primary] == pytest.approx(figure, abs=0.001)
    assert measured.quality[f"{primary}_int8"] == pytest.approx(figure, abs=0.002)
    assert measured.quality[f"{primary}_dim64"] < measured.quality[f"{primary}_dim128"] < measured.quality[primary]


def test_a_narrower_minilm_compares_sentences_as_well(carry_out, shared_models, shared_data, tmp_path):
    outcome = carry_out(
        "technique=narrow",
        f"model.path={shared_models('minilm-l6')}",
        f"task.path={shared_data('glue-stsb')}",
        "task.limit.train=500",
        "task.limit.test=500",
        "baseline.epochs=0",
        "technique.narrow.hidden_size=320",
        model="minilm",
        task="stsb_embedding",
    )
    none, narrow = outcome.measurements.values()
    assert narrow.quality["spearman"] > none.quality["spearman"] - 0.02
    assert narrow.size_bytes < 0.84 * none.size_bytes
    model = compress.load(tmp_path / "artifact").model
    assert model.config.compress == {"width": 320} and model.get_input_embeddings().weight.shape[1] == 320
