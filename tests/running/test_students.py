"""Chains that distil, from their config to the student."""

import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import compress
from compress.models.matrices import dequantize_weight, matrices, measure_sparsity
from compress.models.teachers import KeptLogits

DISTIL = "technique.distill."


def test_a_first_distill_leaves_half_of_the_layers_and_every_loss_in_tensorboard(carry_out, tmp_path):
    outcome = carry_out(
        "technique=distill", f"{DISTIL}hard_weight=0.5", f"{DISTIL}train.epochs=2", model="tiny_llama", task="toy_lm"
    )
    none, student = outcome.measurements.values()
    assert student.parameters < none.parameters and student.size_bytes < none.size_bytes
    events = EventAccumulator(str(tmp_path / "tensorboard" / "1_distill")).Reload()
    assert {"train/loss", "train/soft", "train/hard", "validation/loss"} <= set(events.Tags()["scalars"])
    train, validation = (
        [scalar.value for scalar in events.Scalars(name)] for name in ("train/epoch_loss", "validation/loss")
    )
    kept = outcome.descriptions["distill"].losses  # of the epoch that was best on validation
    assert any(kept == pytest.approx({"train": a, "validation": b}) for a, b in zip(train, validation))


@pytest.mark.parametrize("chain", ["prune+distill", "structured+distill+gptq"])
def test_distill_recovers_what_the_stages_before_left(carry_out, tmp_path, chain):
    settings = {
        "prune": ["technique.prune.sparsity=0.5"],
        "structured": ["technique.structured.target_ffn_size=128", "technique.structured.importance=activation"],
    }
    carry_out(f"technique={chain}", *(word for name in chain.split("+") for word in settings.get(name, ())))
    model = compress.load(tmp_path / "artifact").model
    if "prune" in chain:
        assert measure_sparsity(linear.weight for linear in matrices(model).values()) >= 0.499


@pytest.mark.parametrize("chain", ["distill+int8", "distill+prune+nf4"])
def test_a_student_is_compressed_further(carry_out, tmp_path, chain):
    none, student = carry_out(f"technique={chain}").measurements.values()
    loaded = compress.load(tmp_path / "artifact")
    assert loaded.description.method == chain and loaded.description.weights == "bitsandbytes"
    assert student.parameters < none.parameters and student.size_bytes < 0.5 * none.size_bytes
    sparsity = measure_sparsity(dequantize_weight(linear.weight) for linear in matrices(loaded.model).values())
    assert (sparsity >= 0.2) == ("prune" in chain)


@pytest.mark.parametrize(("model", "task", "kept"), [("tiny", "toy", "all"), ("tiny_llama", "toy_lm", "2048")])
@pytest.mark.slow
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
