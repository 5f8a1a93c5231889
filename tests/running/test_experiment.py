"""A run from its config to its artifact, on the built-in model and data."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from small import SMALL
from test_conf import CONF
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import compress
from compress.artifacts.artifact import measure_size_bytes
from compress.errors import PostconditionError, UserError
from compress.maths.allocation import allocate_sparsity, read_points
from compress.measuring.predictions import Predictions
from compress.models.matrices import dequantize_weight, find_zeros, matrices, measure_sparsity
from compress.planning.settings import parse_values, to_plain
from compress.running import experiment
from compress.running.promises import capture_state, check_model
from compress.tasks.splits import load_splits
from compress.tasks.task import Task
from compress.techniques.gptq import GPTQ
from compress.techniques.prune import Prune


@pytest.mark.parametrize(("model", "task"), [("tiny", "toy"), ("tiny_llama", "toy_lm")])
def test_prune_then_gptq_on_every_kind_of_model_and_head(carry_out, tmp_path, model, task):
    outcome = carry_out("technique=prune+gptq", model=model, task=task)
    none, both = outcome.measurements.values()
    assert list(outcome.measurements) == ["none", "prune+gptq"]
    assert both.size_bytes < 0.6 * none.size_bytes and both.parameters == none.parameters
    assert both.nonzeros < none.nonzeros and both.speedup.low <= both.speedup.value <= both.speedup.high
    loaded = compress.load(tmp_path / "artifact")
    assert loaded.description.method == "prune+gptq" and loaded.description.weights == "packed"
    sparsity = measure_sparsity(linear.weight for linear in matrices(loaded.model).values())
    assert sparsity == pytest.approx(0.2, abs=0.08) and sparsity >= 0.2  # more weights round to zero


def test_calibration_on_other_text_changes_the_rounded_weights(carry_out, tmp_path):
    (tmp_path / "other.txt").write_text("\n".join(f"a text of number {i}" for i in range(32)))

    def integers(*settings):
        carry_out("technique=gptq", *settings)
        return load_file(tmp_path / "artifact" / "model.safetensors")

    own, other = integers(), integers(f"technique.gptq.calibration={tmp_path / 'other.txt'}")
    assert any(not torch.equal(own[name], other[name]) for name in own)
    assert torch.equal(own["classifier.weight"], other["classifier.weight"])


def test_blocks_to_calibrate_on_are_counted_before_anything_is_trained(carry_out, monkeypatch):
    monkeypatch.setattr("compress.running.stages.fit_module", lambda *args: pytest.fail("trained"))
    with pytest.raises(UserError, match=r"asks for 9999 blocks and the text of task `toy_lm` has \d+\. .*\(samples="):
        carry_out("technique=awq", "technique.awq.samples=9999", "seed=9", model="tiny_llama", task="toy_lm")


@pytest.mark.parametrize(("stage", "settings"), [("w8a8", ["dynamic=false", "samples=16"]), ("qat", ["samples=16"])])
def test_prune_then_weights_and_activations_of_eight_bits(carry_out, tmp_path, stage, settings):
    outcome = carry_out(f"technique=prune+{stage}", *(f"technique.{stage}.{setting}" for setting in settings))
    none, both = outcome.measurements.values()
    assert both.size_bytes < 0.7 * none.size_bytes and both.parameters == none.parameters
    loaded = compress.load(tmp_path / "artifact")
    assert measure_sparsity(linear.weight for linear in matrices(loaded.model).values()) >= 0.2
    assert loaded.description.weights == "integer"


@pytest.mark.parametrize(("technique", "task"), [("prune+nf4", "toy_lm"), ("int8", "toy")])
def test_bitsandbytes_on_encoder_and_decoder(carry_out, tmp_path, technique, task):
    outcome = carry_out(f"technique={technique}", model="tiny_llama" if task == "toy_lm" else "tiny", task=task)
    none, packed = outcome.measurements.values()
    assert packed.size_bytes < 0.7 * none.size_bytes and packed.parameters == none.parameters
    loaded = compress.load(tmp_path / "artifact")
    assert loaded.description.weights == "bitsandbytes" and loaded.model.device.type == "cpu"
    assert "pip install bitsandbytes accelerate" in (tmp_path / "artifact" / "README.md").read_text()
    weights = [dequantize_weight(linear.weight) for linear in matrices(loaded.model).values()]
    sparsity = measure_sparsity(weights)
    assert sparsity >= 0.2 if "prune" in technique else sparsity < 0.2
    assert packed.nonzeros == none.nonzeros - sum(int((weight == 0).sum()) for weight in weights)


def test_the_metrics_are_scikit_learns_for_the_predictions_stored_with_the_artifact(carry_out, tmp_path):
    sklearn = pytest.importorskip("sklearn.metrics")
    outcome = carry_out("technique=prune", "technique.prune.sparsity=0.5", "task.metrics=[accuracy,f1_macro,matthews]")
    kept = Predictions.load(tmp_path / "artifact" / "predictions.npz")
    guess = kept.outputs.argmax(1)
    assert outcome.measurements["prune"].quality == pytest.approx(
        {
            "accuracy": sklearn.accuracy_score(kept.labels, guess),
            "f1_macro": sklearn.f1_score(kept.labels, guess, average="macro"),
            "matthews": sklearn.matthews_corrcoef(kept.labels, guess),
        },
        abs=1e-5,
    )
    # The order is the split's, not that of the batches.
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["task=toy", *SMALL])
    test = load_splits(parse_values(Task, to_plain(cfg.task), "task")).test
    assert kept.labels.tolist() == test["label"] and kept.characters.tolist() == list(map(len, test["text"]))
    assert outcome.measurements["prune"].comparison.change.value == pytest.approx(
        outcome.measurements["prune"].quality["accuracy"] - outcome.measurements["none"].quality["accuracy"]
    )


def test_a_causal_model_is_timed_as_it_writes_and_its_blocks_are_kept(carry_out, tmp_path):
    outcome = carry_out("technique=prune", "hardware.latency.new_tokens=4", model="tiny_llama", task="toy_lm")
    pruned = outcome.measurements["prune"]
    assert pruned.generation.new_tokens == 4 and pruned.generation.first_token.median_ms > 0
    assert pruned.generation.per_token.repeats == 3 * pruned.generation.first_token.repeats
    kept = Predictions.load(tmp_path / "artifact" / "predictions.npz")
    assert kept.score("perplexity") == pytest.approx(pruned.quality["perplexity"], rel=1e-5)
    assert kept.outputs.shape == (pruned.examples, 3) and pruned.macs > 0 and pruned.tokenizer_ms > 0
    assert set(pruned.batches) == {1, 4} and pruned.measuring_time_s > 0


def test_a_chain_starts_from_the_baseline_of_the_cache(carry_out, cache, monkeypatch):
    first = carry_out("technique=prune")
    monkeypatch.setattr(experiment, "write_baseline", lambda *args: pytest.fail("trained the baseline again"))
    again = carry_out("technique=prune+prune", "technique.prune_2.sparsity=0.5")
    assert again.measurements["none"].quality == first.measurements["none"].quality
    assert again.descriptions["prune+prune"].history[:2] == first.descriptions["prune"].history


def test_without_a_cache_a_job_keeps_no_stages(carry_out, tmp_path):
    carry_out("technique=none", "baseline.epochs=0", "cache.mode=off")
    assert (tmp_path / "artifact" / "compress.json").is_file() and not (tmp_path / "cache").exists()


def test_the_seed_decides_every_weight(carry_out, tmp_path):
    def weights(cache, seed):
        cached = f"cache.dir={tmp_path / cache}"
        carry_out("technique=prune", "technique.prune.train.epochs=1", f"seed={seed}", cached)
        state = compress.load(tmp_path / "artifact").model.state_dict()
        return {name: tensor.clone() for name, tensor in state.items()}  # the file under the tensors is overwritten

    first, again, other = weights("one", 0), weights("two", 0), weights("one", 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_of_several_epochs_the_best_on_validation_is_kept_with_its_zeros(carry_out, tmp_path):
    carry_out("technique=prune", "technique.prune.sparsity=0.5", "technique.prune.train.epochs=3")
    model = compress.load(tmp_path / "artifact").model
    assert measure_sparsity(linear.weight for linear in matrices(model).values()) == pytest.approx(0.5, abs=1e-3)


def test_an_untrained_baseline_says_so(carry_out):
    outcome = carry_out("technique=none", "baseline.epochs=0")
    assert list(outcome.measurements) == ["none"]
    assert "random and were not trained" in outcome.descriptions["none"].limits[0]


def test_zeros_survive_every_later_stage(carry_out, tmp_path):
    carry_out("technique=finetune+prune+finetune+gptq", "technique.prune.sparsity=0.5")
    model = compress.load(tmp_path / "artifact").model
    assert measure_sparsity(linear.weight for linear in matrices(model).values()) >= 0.499


@pytest.mark.parametrize(
    "settings",
    [
        ["criterion=sparsegpt", "samples=16", "pattern=2:4"],
        ["criterion=movement", "schedule=gradual", "train.epochs=2"],
    ],
)
def test_prune_in_other_ways_keeps_its_zeros_through_gptq(carry_out, tmp_path, settings):
    carry_out("technique=prune+gptq", *(f"technique.prune.{setting}" for setting in ("sparsity=0.5", *settings)))
    model = compress.load(tmp_path / "artifact").model
    assert measure_sparsity(linear.weight for linear in matrices(model).values()) >= 0.499


def test_beside_packed_weights_the_rest_is_trained(carry_out, tmp_path):
    def tensors(technique):
        carry_out(f"technique={technique}", model="tiny_llama", task="toy_lm")
        return load_file(tmp_path / "artifact" / "model.safetensors")

    before, after = tensors("prune+gptq"), tensors("prune+gptq+distill")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and any("norm" in name for name in changed)
    assert not any("proj" in name for name in changed)
    assert compress.load(tmp_path / "artifact").description.weights == "packed"


def test_a_shallower_model_is_a_smaller_one(carry_out, tmp_path):
    outcome = carry_out("technique=drop_layers", "technique.drop_layers.drop=2")
    none, shallow = outcome.measurements.values()
    assert shallow.size_bytes < none.size_bytes and shallow.parameters < none.parameters
    assert compress.load(tmp_path / "artifact").model.config.num_hidden_layers == 1


def test_a_smaller_vocabulary_then_gptq(carry_out, tmp_path):
    outcome = carry_out("technique=prune_vocab+gptq", model="tiny_llama", task="toy_lm")
    none, both = outcome.measurements.values()
    assert both.size_bytes < 0.6 * none.size_bytes and both.parameters < none.parameters
    loaded = compress.load(tmp_path / "artifact")
    assert loaded.model.config.vocab_size == len(loaded.tokenizer) < 2000
    assert "does not compare across vocabularies" in loaded.description.limits[0]
    folder = tmp_path / "artifact"
    assert len(AutoTokenizer.from_pretrained(folder)) == len(loaded.tokenizer)


def test_a_vocabulary_is_cut_once(carry_out):
    with pytest.raises(UserError, match="`prune_vocab_2` changed nothing"):
        carry_out("technique=prune_vocab+prune_vocab")


def test_an_artifact_loads_without_us_and_says_what_it_is(carry_out, tmp_path):
    carry_out("technique=prune")
    folder = tmp_path / "artifact"
    model, tokenizer, description = compress.load(folder)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = AutoTokenizer.from_pretrained(folder)("the soup was not very tasty .", return_tensors="pt")
    with torch.inference_mode():
        assert torch.equal(theirs(**batch).logits, model(**batch).logits)
    assert theirs.config.id2label == {0: "awful", 1: "bad", 2: "good", 3: "great"}
    assert json.loads((folder / "compress.json").read_text())["history"][1]["settings"]["sparsity"] == 0.2
    card = (folder / "README.md").read_text()
    assert "# tiny on toy: prune" in card and "from_pretrained" in card and "dense runtime" in card
    measurement = json.loads((folder / "measurement.json").read_text())
    assert measurement["size_bytes"] == (folder / "model.safetensors").stat().st_size
    state = load_file(folder / "model.safetensors")
    assert measurement["parameters"] == sum(weights.numel() for weights in state.values())
    assert measurement["nonzeros"] == sum(int((weights != 0).sum()) for weights in state.values())
    assert (folder / "config.yaml").is_file() and not (folder / "tensorboard").exists()
    assert measure_size_bytes(folder) == (folder / "model.safetensors").stat().st_size
    assert {path.name for path in (tmp_path / "tensorboard").iterdir()} >= {"0_baseline", "1_prune"}


def test_labels_found_in_the_users_own_files(carry_out, tmp_path):
    rows = ["review,stars"] + [f"a {word} meal {i},{word}" for i in range(40) for word in ("good", "bad", "odd")]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    own = ["task.columns.text=review", "task.columns.label=stars", f"task.path={tmp_path}", "technique=prune"]
    outcome = carry_out(*own, task="files")
    assert compress.load(tmp_path / "artifact").model.config.id2label == {0: "bad", 1: "good", 2: "odd"}
    assert outcome.measurements["prune"].examples == 12


def test_prune_uses_the_ratios_of_sensitivity_and_the_report_is_stored_with_the_job(carry_out, tmp_path):
    carry_out(
        "technique=sensitivity+prune",
        "technique.sensitivity.samples=64",
        "technique.sensitivity.sparsities=[0.5,0.9]",
        "technique.prune.sparsity=0.6",
        "technique.prune.ratios=sensitivity",
    )
    (tmp_path / "report" / "1_sensitivity" / "sensitivity.png").stat()
    points = read_points(tmp_path / "report" / "1_sensitivity" / "sensitivity.csv")
    assert {point.sparsity for point in points} == {0.5, 0.9}
    assert all(point.value + point.drop == pytest.approx(points[0].value + points[0].drop) for point in points)
    assert not (tmp_path / "artifact" / "report").exists()
    sparsities = {
        name: measure_sparsity([linear.weight])
        for name, linear in matrices(compress.load(tmp_path / "artifact").model).items()
    }
    assert sparsities == pytest.approx(allocate_sparsity(points, 0.6), abs=1e-3) and len(set(sparsities.values())) > 1


def test_too_many_validation_texts_are_reported_before_anything_is_trained(carry_out, monkeypatch):
    monkeypatch.setattr(experiment, "write_baseline", lambda *args: pytest.fail("trained"))
    with pytest.raises(UserError, match=r"samples is 65 and task `toy` has 64 validation texts\. Set .*samples=64"):
        carry_out("technique=sensitivity", "technique.sensitivity.samples=65")


class Idle(Prune):
    def on_fit_start(self, trainer, pl_module):
        pass

    def on_fit_end(self, trainer, pl_module):
        pass


class FillsIn(Idle):
    def on_fit_start(self, trainer, pl_module):
        for linear in matrices(pl_module).values():
            linear.weight.data += 0.01


class Loses(Prune):
    def save(self, model, folder):
        next(iter(matrices(model).items()))[1].weight.data.neg_()
        model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("technique", "error", "sentence"),
    [
        (Idle, UserError, "`prune_2` changed nothing"),
        (FillsIn, PostconditionError, "`prune_2` filled in .* pruned weights of"),
        (Loses, PostconditionError, "the artifact of `prune_2` reloads to other logits"),
    ],
)
def test_a_stage_that_breaks_its_promise_fails(carry_out, technique, error, sentence):
    target = f"technique.prune_2._target_={__name__}.{technique.__name__}"
    with pytest.raises(error, match=sentence):
        carry_out("technique=prune+prune", target, "technique.prune_2.sparsity=0.5")


def test_quantization_must_leave_the_head_alone(carry_out):
    import tiny

    model = tiny.bert()
    before = capture_state(model)
    model.classifier.weight.data += 1
    with pytest.raises(PostconditionError, match=r"blocks alone and changed classifier.weight"):
        check_model("gptq", GPTQ(), before, model)
    assert not find_zeros(model)
