"""A run from its config to its artifact, on the built-in model and data."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_conf import CONF
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import compress
from compress.artifacts.artifact import measure_size_bytes
from compress.errors import PostconditionError, UserError
from compress.maths.allocation import allocate_sparsity, read_points
from compress.measuring.predictions import Predictions
from compress.models.layers import dequantize_weight, find_linears, find_zeros, measure_sparsity
from compress.models.teachers import KeptLogits
from compress.planning.settings import parse_values, to_plain
from compress.reporting.rows import Job, collect_rows
from compress.running import experiment
from compress.running.promises import capture_state, check_model
from compress.tasks.splits import load_splits
from compress.tasks.task import Task
from compress.techniques.gptq import GPTQ
from compress.techniques.onnx import Onnx
from compress.techniques.prune import Prune

SMALL = [
    "hardware=cpu",
    "task.limit.train=256",
    "task.limit.validation=64",
    "task.limit.test=128",
    "baseline.epochs=1",
    "hardware.latency.seconds=0.05",
    "hardware.latency.block_s=0.01",
    "hardware.latency.batch_sizes=[1,4]",
    "hardware.latency.memory=false",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def carry_out(cache, tmp_path):
    def carry_out(*overrides, model="tiny", task="toy"):
        chosen = [f"model={model}", f"task={task}", f"cache.dir={cache}", *SMALL, *overrides]
        if "gptq" in overrides[0]:
            chosen.append("technique.gptq.samples=16")
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", chosen)
        return experiment.run_experiment(cfg, tmp_path)

    return carry_out


@pytest.mark.parametrize(("model", "task"), [("tiny", "toy"), ("tiny_llama", "toy"), ("tiny_llama", "toy_lm")])
def test_prune_then_gptq_on_every_kind_of_model_and_head(carry_out, tmp_path, model, task):
    outcome = carry_out("technique=prune+gptq", model=model, task=task)
    none, both = outcome.measurements.values()
    assert list(outcome.measurements) == ["none", "prune+gptq"]
    assert both.size_bytes < 0.6 * none.size_bytes and both.parameters == none.parameters
    assert both.nonzeros < none.nonzeros and both.speedup.low <= both.speedup.value <= both.speedup.high
    loaded = compress.load(tmp_path / "artifact")
    assert loaded.description.method == "prune+gptq" and loaded.description.weights == "packed"
    sparsity = measure_sparsity(linear.weight for _, linear in find_linears(loaded.model))
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
    assert measure_sparsity(linear.weight for _, linear in find_linears(loaded.model)) >= 0.2
    assert loaded.description.weights == "integer"


@pytest.mark.parametrize("stage", ["onnx", "openvino"])
def test_integers_of_quantization_aware_training_run_on_other_runtimes(carry_out, tmp_path, stage):
    outcome = carry_out(f"technique=prune+qat+{stage}", "technique.qat.samples=16")
    none, exported = outcome.measurements.values()
    assert exported.size_bytes < 0.7 * none.size_bytes and exported.parameters == none.parameters
    assert exported.nonzeros < 0.95 * none.nonzeros
    agreement = json.loads((tmp_path / f"report/3_{stage}/agreement.json").read_text())
    # A sum in another order may round an input to a neighbouring integer, and change a close decision.
    assert agreement["label_agreement"] >= 0.98
    assert agreement["max_logit_difference"] < 0.05 * agreement["largest_logit"]


@pytest.mark.parametrize(("technique", "task"), [("prune+nf4", "toy"), ("prune+nf4", "toy_lm"), ("int8", "toy")])
def test_bitsandbytes_on_encoder_and_decoder(carry_out, tmp_path, technique, task):
    outcome = carry_out(f"technique={technique}", model="tiny_llama" if task == "toy_lm" else "tiny", task=task)
    none, packed = outcome.measurements.values()
    assert packed.size_bytes < 0.7 * none.size_bytes and packed.parameters == none.parameters
    loaded = compress.load(tmp_path / "artifact")
    assert loaded.description.weights == "bitsandbytes" and loaded.model.device.type == "cpu"
    assert "pip install bitsandbytes accelerate" in (tmp_path / "artifact" / "README.md").read_text()
    weights = [dequantize_weight(linear.weight) for _, linear in find_linears(loaded.model)]
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
    assert kept.outputs.shape == (pruned.examples, 2) and pruned.macs > 0 and pruned.tokenizer_ms > 0
    assert set(pruned.batches) == {1, 4} and pruned.measuring_time_s > 0


def test_a_chain_starts_from_the_baseline_of_the_cache(carry_out, cache, monkeypatch):
    first = carry_out("technique=prune")
    monkeypatch.setattr(experiment, "write_baseline", lambda *args: pytest.fail("trained the baseline again"))
    again = carry_out("technique=prune+prune", "technique.prune_2.sparsity=0.5")
    assert again.measurements["none"].quality == first.measurements["none"].quality
    assert again.descriptions["prune+prune"].history[:2] == first.descriptions["prune"].history


def test_without_a_cache_a_job_keeps_no_stages(carry_out, tmp_path):
    carry_out("technique=prune", "cache.mode=off")
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
    assert measure_sparsity(linear.weight for _, linear in find_linears(model)) == pytest.approx(0.5, abs=1e-3)


def test_an_untrained_baseline_says_so(carry_out):
    outcome = carry_out("technique=none", "baseline.epochs=0")
    assert "random and were not trained" in outcome.descriptions["none"].limits[0]


@pytest.mark.parametrize("chain", ["prune+finetune", "finetune+prune+finetune+gptq"])
def test_zeros_survive_every_later_stage(carry_out, tmp_path, chain):
    carry_out(f"technique={chain}", "technique.prune.sparsity=0.5")
    model = compress.load(tmp_path / "artifact").model
    assert measure_sparsity(linear.weight for _, linear in find_linears(model)) >= 0.499


@pytest.mark.parametrize(
    "settings",
    [
        ["criterion=wanda", "samples=16"],
        ["criterion=sparsegpt", "samples=16", "pattern=2:4"],
        ["criterion=movement", "schedule=gradual", "train.epochs=2"],
        ["schedule=iterative", "train.epochs=1"],
    ],
)
def test_prune_in_other_ways_keeps_its_zeros_through_gptq(carry_out, tmp_path, settings):
    carry_out("technique=prune+gptq", *(f"technique.prune.{setting}" for setting in ("sparsity=0.5", *settings)))
    model = compress.load(tmp_path / "artifact").model
    assert measure_sparsity(linear.weight for _, linear in find_linears(model)) >= 0.499


DISTIL = "technique.distill."


@pytest.mark.parametrize(("model", "task"), [("tiny", "toy"), ("tiny_llama", "toy_lm")])
def test_a_first_distill_leaves_half_of_the_layers_and_every_loss_in_tensorboard(carry_out, tmp_path, model, task):
    outcome = carry_out(
        "technique=distill", f"{DISTIL}hard_weight=0.5", f"{DISTIL}train.epochs=3", model=model, task=task
    )
    none, student = outcome.measurements.values()
    assert student.parameters < none.parameters and student.size_bytes < none.size_bytes
    events = EventAccumulator(str(tmp_path / "tensorboard" / "1_distill")).Reload()
    assert {"train/loss", "train/soft", "train/hard", "validation/loss"} <= set(events.Tags()["scalars"])
    last = {
        "train": events.Scalars("train/epoch_loss")[-1].value,
        "validation": events.Scalars("validation/loss")[-1].value,
    }
    assert outcome.descriptions["distill"].losses == pytest.approx(last)


@pytest.mark.parametrize("chain", ["prune+distill", "structured+distill+gptq", "drop_layers+distill", "distill+prune"])
def test_distill_recovers_what_the_stages_before_left(carry_out, tmp_path, chain):
    settings = {
        "prune": ["technique.prune.sparsity=0.5"],
        "structured": ["technique.structured.target_ffn_size=128", "technique.structured.importance=activation"],
    }
    carry_out(f"technique={chain}", *(word for name in chain.split("+") for word in settings.get(name, ())))
    model = compress.load(tmp_path / "artifact").model
    if "prune" in chain:
        assert measure_sparsity(linear.weight for _, linear in find_linears(model)) >= 0.499


@pytest.mark.parametrize("chain", ["distill+int8", "distill+nf4", "distill+prune+nf4", "distill+prune+int8"])
def test_a_student_is_compressed_further(carry_out, tmp_path, chain):
    none, student = carry_out(f"technique={chain}").measurements.values()
    loaded = compress.load(tmp_path / "artifact")
    assert loaded.description.method == chain and loaded.description.weights == "bitsandbytes"
    assert student.parameters < none.parameters and student.size_bytes < 0.5 * none.size_bytes
    sparsity = measure_sparsity(dequantize_weight(linear.weight) for _, linear in find_linears(loaded.model))
    assert (sparsity >= 0.2) == ("prune" in chain)


@pytest.mark.parametrize(("chain", "task"), [("prune+gptq+distill", "toy"), ("gptq+finetune", "toy_lm")])
def test_beside_packed_weights_the_rest_is_trained(carry_out, tmp_path, chain, task):
    def tensors(technique):
        carry_out(f"technique={technique}", model="tiny_llama", task=task)
        return load_file(tmp_path / "artifact" / "model.safetensors")

    before, after = tensors(chain.rpartition("+")[0]), tensors(chain)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and any("norm" in name for name in changed)
    assert not any("proj" in name for name in changed)
    assert compress.load(tmp_path / "artifact").description.weights == "packed"


@pytest.mark.parametrize(("model", "task", "kept"), [("tiny", "toy", "all"), ("tiny_llama", "toy_lm", "2048")])
def test_kept_logits_train_like_live_ones_and_are_kept_for_the_next_student(
    carry_out, tmp_path, cache, monkeypatch, model, task, kept
):
    def weights(*overrides):
        carry_out("technique=distill", f"{DISTIL}train.epochs=2", f"{DISTIL}temperature=1.0", *overrides,
                  model=model, task=task)  # fmt: skip
        return torch.cat([p.flatten() for p in compress.load(tmp_path / "artifact").model.parameters()])

    live, kept_ones = weights(), weights(f"{DISTIL}kept_logits={kept}")
    other = weights("seed=1")
    assert (kept_ones - live).norm() < 0.05 * (other - live).norm()
    monkeypatch.setattr(KeptLogits, "_write", lambda *args: pytest.fail("asked the teacher again"))
    weights(f"{DISTIL}kept_logits={kept}", f"{DISTIL}student.layers=[0]")


def test_extra_text_and_masking_take_part(carry_out, tmp_path):
    (tmp_path / "extra.txt").write_text("the film was fine\nnobody came\n" * 8)
    carry_out(
        "technique=distill",
        f"{DISTIL}extra_text={tmp_path / 'extra.txt'}",
        f"{DISTIL}masking=0.2",
        f"{DISTIL}train.epochs=3",
    )
    tags = EventAccumulator(str(tmp_path / "tensorboard" / "1_distill")).Reload().Tags()["scalars"]
    assert "train/extra_soft" in tags


def test_another_teacher_than_the_baseline_is_measured_beside_it(carry_out, tmp_path):
    teacher = tmp_path / "teacher"
    carry_out("technique=none", "baseline.epochs=2")
    shutil.move(tmp_path / "artifact", teacher)
    outcome = carry_out("technique=distill", f"{DISTIL}teacher={teacher}", f"{DISTIL}student.layers=1")
    assert list(outcome.measurements) == ["none", "teacher", "distill"]


@pytest.mark.parametrize("by", ["influence", "last"])
def test_a_shallower_model_is_a_smaller_one(carry_out, tmp_path, by):
    outcome = carry_out("technique=drop_layers", "technique.drop_layers.drop=2", f"technique.drop_layers.by={by}")
    none, shallow = outcome.measurements.values()
    assert shallow.size_bytes < none.size_bytes and shallow.parameters < none.parameters
    assert compress.load(tmp_path / "artifact").model.config.num_hidden_layers == 1


@pytest.mark.parametrize(("model", "task"), [("tiny", "toy"), ("tiny_llama", "toy_lm")])
def test_a_smaller_vocabulary_then_gptq(carry_out, tmp_path, model, task):
    outcome = carry_out("technique=prune_vocab+gptq", model=model, task=task)
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


WITHOUT_US = "import sys; sys.modules['compress'] = None\n{lines}\nprint(logits.tolist())"


def without_us(folder):
    """Return the logits of the code in the artifact's card, run without `compress`."""
    (lines,) = re.findall(r"```python\n(.+?)```", (folder / "README.md").read_text(), re.DOTALL)
    script = WITHOUT_US.format(lines=lines)
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout))


@pytest.mark.parametrize(("stage", "lower"), [("onnx", "int8_dynamic"), ("openvino", "int8_weights")])
@pytest.mark.parametrize(
    ("chain", "model", "task", "precision"),
    [("prune+", "tiny", "toy", "fp32"), ("gptq+", "tiny", "toy", "fp32"), ("", "tiny_llama", "toy_lm", None)],
)
def test_an_export_loads_without_us_and_without_a_model_in_pytorch(
    carry_out, tmp_path, stage, lower, chain, model, task, precision
):
    lower = precision or lower
    if stage == "openvino" and chain == "gptq+":
        lower = "null"
    outcome = carry_out(f"technique={chain}{stage}", f"technique.{stage}.precision={lower}", model=model, task=task)
    none, exported = outcome.measurements.values()
    assert exported.speedup.low > 0 and exported.parameters == none.parameters
    assert exported.speedup_same_runtime.low > 0 and none.speedup_same_runtime is None
    assert exported.quality == pytest.approx(none.quality, rel=0.2)
    if lower != "fp32":
        assert exported.size_bytes < 0.8 * none.size_bytes
    loaded = compress.load(tmp_path / "artifact")
    assert loaded.description.weights == stage
    expected = loaded.model(**loaded.tokenizer("A text.", return_tensors="pt")).logits
    assert torch.allclose(without_us(tmp_path / "artifact"), expected, atol=1e-6)
    agreement = json.loads(next((tmp_path / "report").glob(f"*_{stage}/agreement.json")).read_text())
    assert agreement["label_agreement"] > 0.9


CHAINS = {
    "none": [],
    "prune": [],
    "structured": ["target_heads=2", "target_ffn_size=64", "iterations=2"],
    "drop_layers": ["drop=1"],
    "distill": [],
    "qat": ["samples=16"],
    "gptq": [],
    "awq": ["samples=16"],
}


@pytest.mark.parametrize("stage", ["onnx", "openvino"])
@pytest.mark.parametrize("model", ["tiny", "tiny_llama"])
@pytest.mark.parametrize("chain", CHAINS)
def test_an_export_answers_like_the_classifier_of_any_chain(carry_out, tmp_path, chain, model, stage):
    words = [f"technique.{chain}.{setting}" for setting in CHAINS[chain]]
    if (chain, model) == ("awq", "tiny"):
        with pytest.raises(UserError, match="awq"):
            carry_out(f"technique={chain}+{stage}", *words, model=model)
        return
    method = stage if chain == "none" else f"{chain}+{stage}"
    outcome = carry_out(f"technique={method}", *words, model=model)
    (agreement,) = outcome.agreements.values()
    rounded = chain in ("qat", "gptq", "awq")  # inputs are rounded too: by qat, and by ONNX Runtime's kernels
    assert agreement.label_agreement >= (0.98 if rounded else 1)
    assert agreement.max_logit_difference < (0.05 if rounded else 1e-3) * agreement.largest_logit
    row = collect_rows(tmp_path, Job(method, model, "toy", 0), outcome)[-1]
    assert row["label_agreement"] == agreement.label_agreement
    assert row["max_logit_difference"] == agreement.max_logit_difference


def test_a_quantized_model_stays_as_small_in_onnx_and_its_format_is_no_limit_there(carry_out):
    *_, packed = carry_out("technique=prune+gptq").measurements.values()
    outcome = carry_out("technique=prune+gptq+onnx")
    *_, exported = outcome.measurements.values()
    assert exported.size_bytes < 1.15 * packed.size_bytes and exported.parameters == packed.parameters
    assert exported.nonzeros == packed.nonzeros
    *_, description = outcome.descriptions.values()
    assert [limit.partition(":")[0] for limit in description.limits] == ["prune"]


class Drifts(Onnx):
    def save(self, model, folder):
        super().save(model, folder)
        shutil.copy(Path(self.folder.name) / "traced/model.onnx", folder / "model.onnx")


def test_an_export_in_lower_precision_must_reload_to_the_exported_model(carry_out):
    target = f"technique.onnx._target_={__name__}.Drifts"
    with pytest.raises(PostconditionError, match="the artifact of `onnx` reloads to other logits"):
        carry_out("technique=onnx", target, "technique.onnx.precision=int8_dynamic")
    carry_out("technique=onnx", target)  # in full precision it must agree with the model


def test_without_a_stage_the_baseline_is_measured_alone(carry_out):
    assert list(carry_out("technique=none").measurements) == ["none"]


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
        for name, linear in find_linears(compress.load(tmp_path / "artifact").model)
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
        for _, linear in find_linears(pl_module):
            linear.weight.data += 0.01


class Boasts(Prune):
    shrinks = True


class Loses(Prune):
    def save(self, model, folder):
        next(find_linears(model))[1].weight.data.neg_()
        model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("technique", "error", "sentence"),
    [
        (Idle, UserError, "`prune_2` changed nothing"),
        (FillsIn, PostconditionError, "`prune_2` filled in .* pruned weights of"),
        (Boasts, PostconditionError, "`prune_2` should make the model smaller"),
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
