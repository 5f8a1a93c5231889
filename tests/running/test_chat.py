"""Conversations go through every part of a run."""

import csv
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import compress
from compress.errors import UserError
from compress.measuring.predictions import measure_regressions
from compress.models.writing import read_written
from compress.reporting.report import write_report
from compress.reporting.rows import Job, collect_rows
from compress.tasks.chats import SIMPLE

CHAT = {"model": "tiny_llama", "task": "toy_chat"}


def test_a_chat_is_pruned_quantized_compared_and_reported(carry_out, tmp_path):
    outcome = carry_out("technique=prune+gptq", **CHAT)
    none, both = outcome.measurements.values()
    assert none.examples == 128 and both.size_bytes < 0.6 * none.size_bytes
    before, after = outcome.predictions.values()
    assert before.outputs.shape == (128, 3) and (before.labels > 0).all()  # a conversation each
    assert both.comparison.p_value is not None and both.comparison.change.low <= both.comparison.change.high
    slices = {regression.name for regression in measure_regressions(before, after, "perplexity")}
    assert {"short texts", "with negation", "without negation"} <= slices
    card = (tmp_path / "artifact/README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "apply_chat_template" in card
    rows = collect_rows(tmp_path, Job("prune+gptq", "tiny_llama", "toy_chat", 0), outcome, tmp_path)
    write_report(tmp_path, rows)
    assert "perplexity" in (tmp_path / "report.html").read_text()
    for row in csv.DictReader((tmp_path / "results.csv").open()):
        assert float(row["perplexity"]) > 1 and 0 <= float(row["accuracy"]) <= 1


def test_packed_training_ends_like_training_in_padded_batches(carry_out, tmp_path):
    def weights(packed):
        carry_out("technique=none", f"task.pack={packed}", **CHAT)
        return compress.load(tmp_path / "artifact").model.state_dict()

    padded, packed = weights("false"), weights("true")
    assert any(not torch.equal(padded[name], packed[name]) for name in padded)  # sums in another order
    for name, weight in padded.items():
        assert torch.allclose(weight, packed[name], atol=1e-3), name


def test_a_chat_is_cut_by_the_answers_that_the_model_gives(carry_out):
    settings = ["target_ffn_size=256", "importance=logits", "samples=16"]
    outcome = carry_out("technique=structured", *(f"technique.structured.{value}" for value in settings), **CHAT)
    none, cut = outcome.measurements.values()
    assert cut.parameters < none.parameters


@pytest.fixture
def teacher(carry_out, tmp_path, tmp_path_factory):
    carry_out("technique=none", **CHAT)
    return shutil.copytree(tmp_path / "artifact", tmp_path_factory.mktemp("teacher") / "artifact")


def test_an_artifact_of_a_chat_answers_without_us(teacher):
    tokenizer, model = AutoTokenizer.from_pretrained(teacher), AutoModelForCausalLM.from_pretrained(teacher)
    assert tokenizer.chat_template == SIMPLE
    asked = [{"role": "user", "content": "the soup was tasty ."}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def test_a_student_with_a_tokenizer_of_its_own_learns_from_the_teacher(carry_out, teacher):
    own = ["model.config.vocab_size=300", "task.pack=false", "baseline.epochs=0"]
    distilled = ["technique=distill", *own, f"technique.distill.teacher={teacher}"]
    outcome = carry_out(*distilled, "technique.distill.loss=common", **CHAT)
    start, teaching, student = (outcome.measurements[name] for name in ("none", "teacher", "distill"))
    assert student.quality["perplexity"] < 0.5 * start.quality["perplexity"]
    assert student.comparison and not teaching.comparison  # other tokens are no pairs
    with pytest.raises(UserError, match="another vocabulary: .* set technique.distill.loss=common"):
        carry_out(*distilled, **CHAT)


def test_a_student_is_trained_on_what_its_teacher_wrote_once(carry_out, teacher, cache, monkeypatch):
    settings = [f"teacher={teacher}", "soft_weight=0", "hard_weight=1", "written_tokens=8"]
    chosen = [
        *("technique=distill", "model.config.vocab_size=300", "baseline.epochs=0", "task.limit.train=32"),
        *(f"technique.distill.{setting}" for setting in settings),
    ]
    carry_out(*chosen, **CHAT)
    (file,) = (cache / "teachers").glob("*.jsonl")
    rows = read_written(file)
    assert len(rows) == 32 and all(row["messages"][-1]["role"] == "assistant" for row in rows)
    monkeypatch.setattr("compress.models.writing.Writer._generate", lambda *_: pytest.fail("written again"))
    carry_out(*chosen, "technique.distill.train.learning_rate=2e-3", **CHAT)
