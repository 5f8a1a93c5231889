"""EleutherAI's harness asks our artifacts its questions, and every answer is kept."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from hydra import compose, initialize_config_dir

from compress.artifacts.artifact import Artifact, Description
from compress.artifacts.moving import move_artifact
from compress.errors import UserError
from compress.install import CONF
from compress.measuring.predictions import Predictions, compare_predictions, compare_tasks, find_worst_slice
from compress.planning.plan import make_plan
from compress.planning.settings import to_plain
from compress.running.evaluate import evaluate_artifact
from compress.tasks import harness
from compress.tasks.harness import answer_questions
from compress.tasks.kinds import KINDS, higher_is_better
from compress.tasks.splits import load_splits
from compress.tasks.task import Task

lm_eval = pytest.importorskip("lm_eval")

TASKS = {
    "letters": "output_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: [a, b c d, w1]\n"
    "doc_to_target: '{{label}}'\nmetric_list:\n- {metric: acc, aggregation: mean, higher_is_better: true}\n"
    "- {metric: acc_norm, aggregation: mean, higher_is_better: true}\n",
    "last_word": "output_type: loglikelihood\ndoc_to_text: '{{text}}'\ndoc_to_target: ' {{word}}'\nmetric_list:\n"
    "- {metric: perplexity, aggregation: perplexity, higher_is_better: false}\n"
    "- {metric: acc, aggregation: mean, higher_is_better: true}\n",
    "documents": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list:\n"
    "- {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}\n"
    "- {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}\n",
    "writing": "output_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{word}}'\n"
    "generation_kwargs: {until: ['w7', 'w9 w9'], max_gen_toks: 6}\nmetric_list:\n"
    "- {metric: exact_match, aggregation: mean, higher_is_better: true}\n",
    "translated": "output_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{word}}'\nmetric_list:\n"
    "- {metric: bleu, aggregation: bleu, higher_is_better: true}\n",
    "elsewhere": "output_type: loglikelihood\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of tasks in the harness's own form, with their data."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"text": " ".join(f"w{(3 * i + j * j) % 29}" for j in range(3 + i % 5)), "word": f"w{i % 29}", "label": i % 3}
        for i in range(24)
    ]
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, lines in TASKS.items():
        files = folder / "nowhere.jsonl" if name == "elsewhere" else data
        source = f"{{data_files: {{test: {files}}}, cache_dir: {folder / 'cache'}}}"
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {source}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + lines)
    (folder / "group.yaml").write_text("group: both\ntask: [letters, last_word]\n")
    return folder


@pytest.fixture(scope="module")
def reader():
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "[SEP]"
    return tokenizer


def ask(folder, *tasks, **settings):
    values = {"metrics": ("average",), "primary": "average", "batch_size": 4, **settings}
    return Task(name="lm_eval", kind="lm_eval", tasks=tasks, path=str(folder), **values)


def score(task, answers):
    return {name: KINDS["lm_eval"].metrics[name].compute(answers.outputs, answers.labels) for name in task.metrics}


def test_every_form_of_question_gets_the_answers_of_the_harnesss_own_model(folder, reader):
    from lm_eval.models.huggingface import HFLM

    names = ["letters", "last_word", "documents", "writing"]
    task = load_splits(ask(folder, *names, fewshot=1, limit={"test": 20})).task
    model = tiny.llama_lm()
    model.config.max_position_embeddings = 16  # prompts are cut, and documents read in windows
    answers = answer_questions(task, model, reader, torch.device("cpu"))
    theirs = HFLM(pretrained=model, tokenizer=reader, batch_size=4)
    results = lm_eval.simple_evaluate(
        model=theirs, tasks=names, task_manager=harness.find_manager(task), num_fewshot=1, limit=20, bootstrap_iters=0
    )
    expected = {f"{name}_{key.partition(',')[0]}": value for name, columns in results["results"].items()
                for key, value in columns.items() if key.endswith(",none") and "_stderr" not in key}  # fmt: skip
    got = score(task, answers)
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-5) and len(expected) == 7
    heads = ("letters_acc_norm", "last_word_acc", "writing_exact_match")
    assert got["average"] == pytest.approx(np.mean([expected[name] for name in heads]))
    likelihoods = [sample["perplexity"] for sample in results["samples"]["last_word"]]
    assert answers.outputs[20:40, 3] == pytest.approx(likelihoods, abs=1e-4)
    written = [sample["filtered_resps"] for sample in results["samples"]["writing"]]
    assert list(answers.outputs[60:, 0]) == list(map(harness.number_answer, written))
    assert len(set(answers.outputs[60:, 0])) > 3


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_exported_model_answers_as_the_model_in_pytorch(folder, reader, runtime, tmp_path):
    task = load_splits(ask(folder, "letters", "writing", "documents")).task
    model = tiny.llama_lm()
    expected = answer_questions(task, model, reader, torch.device("cpu"))
    ours = Artifact(model, reader, Description("lm", "tiny", "lm_eval"))
    batch = {key: tensor for key, tensor in tiny.batch().items() if key != "labels"}
    moved = move_artifact(ours, runtime, batch, tmp_path)
    answers = answer_questions(task, moved.model, reader, torch.device("cpu"))
    assert score(task, answers) == pytest.approx(score(task, expected), rel=1e-3)
    assert np.array_equal(answers.outputs[:, 0], expected.outputs[:, 0])
    assert np.array_equal(answers.labels, expected.labels)


def test_a_group_is_one_column_and_metrics_of_whole_splits_are_left_out(folder):
    splits = load_splits(ask(folder, "both", limit={"test": 5}))
    assert (splits.task.metrics, splits.task.primary, len(splits.test)) == (("both_acc",), "both_acc", 10)
    with pytest.raises(UserError, match=r"whose metrics \(bleu\) are no means over examples"):
        load_splits(ask(folder, "translated"))
    with pytest.raises(UserError, match=r"task\.tasks asks for letters twice, the second time by both"):
        load_splits(ask(folder, "letters", "both"))
    with pytest.raises(UserError, match=r"task\.metrics is letters_f1, which letters do not have.*letters_acc_norm, "):
        load_splits(ask(folder, "letters", metrics=["letters_f1"], primary="letters_f1"))
    only = load_splits(ask(folder, "letters", "documents", metrics=["letters_acc"], primary="letters_acc")).task
    assert only.metrics == ("letters_acc",) and only.labels == ("letters_acc", "documents_word_perplexity")


def predictions(task, right):
    """Predictions on two tasks of ten questions with accuracies, of which the first ``right`` are correct."""
    outputs = np.array([[0.0, float(i % 10 < right), 1.0] for i in range(20)])
    heads = [harness.number_metric(head) for head in task.labels]
    labels = np.array([[i, heads[i // 10]] for i in range(20)])
    size = np.ones(20, int)
    return Predictions("lm_eval", outputs, labels, size, size, size > 1, names=task.labels)


def test_answers_are_compared_question_by_question(folder):
    task = load_splits(ask(folder, "letters", "last_word")).task
    before, after = predictions(task, right=9), predictions(task, right=2)
    change = compare_predictions(before, after, "average")
    assert change.change.value == pytest.approx(-0.7) and change.p_value < 0.001
    worst = find_worst_slice(before, after, "average")
    assert worst.change == pytest.approx(-0.7) and worst.p_value < 0.05
    columns = compare_tasks(before, after)
    assert list(columns) == ["letters_acc_norm", "last_word_acc"]
    assert [each.change.value for each in columns.values()] == pytest.approx([-0.7, -0.7])
    assert columns["last_word_acc"].p_value == pytest.approx(2 * 2 * 0.5**7)  # McNemar's, twice for two tasks (Holm)
    one = dataclasses.replace(after, labels=np.where([False, True], after.labels[0], after.labels))
    paired = dataclasses.replace(before, labels=one.labels)
    assert compare_predictions(paired, one, "letters_acc_norm").p_value == pytest.approx(2 * 0.5**14)
    assert compare_tasks(dataclasses.replace(paired, names=("a",)), dataclasses.replace(one, names=("a",))) == {}
    assert higher_is_better("average") and not higher_is_better("last_word_perplexity")


def test_a_run_measures_its_baseline_and_its_variant_by_the_harness(carry_out, folder, reader, tmp_path, cache):
    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(f"w{i % 29} follows w{(i - 1) % 29} and comes before w{(i + 1) % 29}" for i in range(400))
    )
    own = ["task.tasks=[letters,last_word]", f"task.path={folder}", f"task.text={text}"]
    outcome = carry_out("technique=gptq", *own, model="tiny_llama", task="lm_eval")
    none, packed = outcome.measurements.values()
    columns = ("average", "letters_acc", "letters_acc_norm", "last_word_acc", "last_word_perplexity")
    assert outcome.primary == "average" and set(none.quality) == set(columns) and none.examples == 48
    assert packed.comparison.churn is not None and packed.generation and packed.size_bytes < none.size_bytes
    assert outcome.descriptions["gptq"].kind == "lm"
    kept = Predictions.load(tmp_path / "artifact" / "predictions.npz")
    assert kept.score("average") == packed.quality["average"] and kept.characters.all()

    # Measured again, beside a model with another vocabulary
    tiny.llama_lm().save_pretrained(tmp_path / "other")
    reader.save_pretrained(tmp_path / "other")
    words = [f"artifact={tmp_path / 'artifact'}", f"baseline={tmp_path / 'other'}", f"cache.dir={cache}"]
    small = ["hardware=cpu", "hardware.latency.seconds=0.05", "hardware.latency.memory=false"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate", [*words, *small, "hardware.latency.batch_sizes=[1]"])
    _, row = evaluate_artifact(cfg, tmp_path / "again")
    assert row["average"] == packed.quality["average"] and row["metric"] == "average" and row["p_value"] <= 1
    changes = [row["letters_acc_norm_change"], row["last_word_acc_change"]]
    assert row["change"] == pytest.approx(np.mean(changes)) and row["last_word_acc_p_holm"] <= 1


def test_an_encoder_is_not_asked(folder, tmp_path, monkeypatch):
    tiny.bert().save_pretrained(tmp_path / "encoder")
    monkeypatch.setattr("compress.running.evaluate.load_artifact", None)  # nothing is loaded
    words = [f"artifact={tmp_path / 'encoder'}", "task=lm_eval", "task.tasks=letters", f"task.path={folder}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate", words)
    with pytest.raises(UserError, match=r"encoder is an encoder \(`bert`\); task `lm_eval` needs one that"):
        evaluate_artifact(cfg, tmp_path)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["task.tasks=[letter]"], r"task\.tasks names letter, which the harness does not know; did you mean letters"),
        (["task.tasks=[]"], r"task\.tasks is empty, and task `lm_eval` is lm_eval"),
        (["task.path=nowhere"], r"There is no folder nowhere\. Set task\.path"),
        (["model=tiny"], r"`bert` is an encoder"),
        (["technique=gptq"], r"technique\.gptq needs text to learn from, .* Set task\.text"),
        (["baseline.epochs=1"], r"baseline\.epochs needs text to learn from"),
        (["split=validation"], r"split=validation needs text to learn from"),
        (["task.text=toy"], r"task\.text is toy, whose kind is multiclass; text to continue is expected"),
        (["task.text=nothing"], r"task\.text is nothing, which is neither a text file nor a task"),
    ],
)
def test_what_cannot_work_is_one_sentence_before_anything_is_loaded(folder, words, sentence, monkeypatch):
    own = harness.build_manager(str(folder), with_defaults=False)
    monkeypatch.setattr(harness, "build_manager", lambda path, with_defaults: own)  # the whole index takes seconds
    chosen = ["task=lm_eval", "model=tiny_llama", "task.tasks=[letters]", f"task.path={folder}", *words]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", chosen)
    with pytest.raises(UserError, match=sentence):
        make_plan(cfg)


def test_data_that_cannot_be_reached_and_a_missing_harness_are_one_sentence(folder, monkeypatch):
    with pytest.raises(UserError, match=r"task\.tasks names elsewhere, whose data cannot be read \(.*nowhere\.jsonl"):
        load_splits(ask(folder, "elsewhere"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"Task `lm_eval` needs lm-eval, which is not installed\. Type pip install .*lm_eval"
    ):
        load_splits(ask(folder, "letters"))


def test_the_config_as_shipped_asks_several_tasks():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        task = Task(**to_plain(compose("train", ["task=lm_eval"]).task))
    assert len(task.tasks) > 1 and task.primary == "average" and task.epochs == 0


@pytest.mark.slow
def test_lambada_has_the_figures_that_the_harness_prints(shared_models, shared_data, tmp_path):
    model, data = shared_models("llama-7m"), shared_data("lambada") / "lambada_test.jsonl"
    (tmp_path / "lambada.yaml").write_text(
        f"task: lambada\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "output_type: loglikelihood\ndoc_to_text: \"{{text.split(' ')[:-1]|join(' ')}}\"\n"
        "doc_to_target: \"{{' '+text.split(' ')[-1]}}\"\n"
    )
    words = f"--tasks lambada --include_path {tmp_path} --limit 100 --device cpu --output_path {tmp_path / 'theirs'}"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model}", *words.split()]
    subprocess.run(command, check=True, capture_output=True)
    (theirs,) = (tmp_path / "theirs").rglob("results*.json")
    figures = json.loads(theirs.read_text())["results"]["lambada"]
    chosen = ["task=lm_eval", "task.tasks=lambada", f"task.path={tmp_path}", "task.limit.test=100", f"artifact={model}"]
    quick = ["hardware=cpu", "hardware.latency.seconds=0.05", "hardware.latency.memory=false", f"cache.dir={tmp_path}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate", [*chosen, *quick, "hardware.latency.batch_sizes=[1]"])
    (row,) = evaluate_artifact(cfg, tmp_path / "ours")
    assert row["lambada_acc"] == figures["acc,none"]
    assert row["lambada_perplexity"] == pytest.approx(figures["perplexity,none"], rel=1e-4)
