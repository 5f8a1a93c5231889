"""`evaluate.py` measures the artifact of a run again, and models made elsewhere."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from small import SMALL
from test_conf import CONF
from test_report import OUTCOME, WORSE

from compress.artifacts.artifact import Artifact, Description, Done, load_artifact
from compress.artifacts.moving import move_artifact
from compress.errors import UserError
from compress.exporting.tracing import select_inputs
from compress.planning.settings import parse_values, to_plain
from compress.reporting.compare import describe_changes
from compress.reporting.jobs import gather_rows
from compress.reporting.report import report_success
from compress.reporting.rows import Job
from compress.running.evaluate import (
    check_labels,
    choose_rows,
    evaluate_artifact,
    name_artifacts,
    read_own_config,
    read_task,
)
from compress.tasks.task import Task


@pytest.fixture
def measure_again(cache, tmp_path):
    def measure_again(*overrides):
        small = [o for o in SMALL if o.startswith("hardware")]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return evaluate_artifact(
                compose("evaluate", [f"cache.dir={cache}", *small, *overrides]), tmp_path / "again"
            )

    return measure_again


def test_an_artifact_measured_again_has_the_same_figures(carry_out, measure_again, tmp_path):
    outcome = carry_out("technique=prune+gptq")
    config = tmp_path / "artifact" / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 3"))
    (row,) = measure_again(f"artifact={tmp_path / 'artifact'}")
    assert row["seed"] == 3  # which drew its validation split
    first = outcome.measurements["prune+gptq"]
    assert row["method"] == "prune+gptq" and row["value"] == first.quality["accuracy"]
    assert row["size_mb"] * 1e6 == first.size_bytes and row["examples"] == first.examples
    assert row["speedup"] is None


def test_an_artifact_is_measured_on_the_configured_runtime(carry_out, measure_again, tmp_path):
    first = carry_out("technique=none").measurements["none"]
    (row,) = measure_again(f"artifact={tmp_path / 'artifact'}", "hardware.runtime=openvino")
    assert row["runtime"] == "openvino" and row["value"] == first.quality["accuracy"]
    assert (row["size_mb"] * 1e6, row["parameters"]) == (first.size_bytes, first.parameters)


def test_an_artifact_names_its_task_and_nothing_of_this_machine(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("task: {name: files, path: data}\n")
    typed = OmegaConf.create({"artifact": str(tmp_path), "task": {"path": "moved"}})
    assert read_task(typed, read_own_config(tmp_path)) == {"name": "files", "path": "moved"}
    config.write_text("- a")
    with pytest.raises(UserError, match=r"config\.yaml is no config of a run \(TypeError\)\. Remove it"):
        read_own_config(tmp_path)
    config.unlink()
    assert read_own_config(tmp_path) == {}


def loaded(runtime="torch", weights="float"):
    done = tuple(Done(name, {}, 0.0, False) for name in ("baseline", "stage"))
    description = Description("multiclass", "tiny", "toy", runtime, weights, history=done)
    return Artifact(tiny.bert(), None, description)


@pytest.mark.parametrize("runtime", ["torch_compile", "onnxruntime", "openvino"])
def test_a_float_model_answers_alike_on_every_runtime(runtime, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="eager"))  # needs no C++ compiler
    ours = loaded()
    batch = select_inputs(tiny.batch(), ours.model)
    expected = ours.model(**batch).logits
    moved = move_artifact(ours, runtime, batch, tmp_path)
    with torch.inference_mode():
        assert torch.allclose(moved.model(**batch).logits, expected, atol=1e-5)
    assert moved.description.runtime == runtime and ours.description.runtime == "torch"


@pytest.mark.parametrize(
    ("there", "sentence"),
    [
        ({"weights": "packed"}, r"weights of `stage` are packed\. End the chain on `openvino`"),
        (
            {"runtime": "onnxruntime", "weights": "onnx"},
            r"artifact of `stage` was exported for onnxruntime",
        ),
    ],
)
def test_what_cannot_run_there_is_refused(there, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        move_artifact(loaded(**there), "openvino", tiny.batch(), tmp_path)


def test_two_artifacts_are_compared(carry_out, measure_again, tmp_path, cache):
    carry_out("technique=prune")
    (tmp_path / "artifact").rename(tmp_path / "pruned")
    carry_out("technique=none")
    rows = measure_again(f"artifact={tmp_path / 'pruned'}", f"baseline={tmp_path / 'artifact'}")
    assert [row["method"] for row in rows] == ["none", "prune"] and rows[1]["speedup"] > 0
    # An artifact against itself measures the measurement.
    first, again = measure_again(f"artifact={tmp_path / 'artifact'}", f"baseline={tmp_path / 'artifact'}")
    assert (first["method"], again["method"]) == ("none", "none (again)") and again["speedup"] > 0
    assert (again["change"], again["p_value"], first["speedup"]) == (0.0, 1.0, None)


def test_artifacts_have_distinct_names():
    prune, plain = loaded(), loaded()._replace(description=Description("multiclass", "tiny", "toy"))
    a, b = Path("runs/a/artifact"), Path("runs/b/artifact")
    assert name_artifacts([a], [prune]) == ["stage"] and name_artifacts([a, b], [plain, prune]) == ["artifact", "stage"]
    assert name_artifacts([a, b], [prune, prune]) == ["runs/a/artifact", "runs/b/artifact"]
    assert name_artifacts([a, a], [plain, plain]) == ["artifact", "artifact (again)"]


def test_a_plain_hugging_face_folder_needs_a_task(carry_out, measure_again, tmp_path):
    carry_out("technique=none")
    folder = tmp_path / "artifact"
    for name in ("compress.json", "config.yaml"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"does not name its own\. Set task=sst2"):
        measure_again(f"artifact={folder}")
    (row,) = measure_again(f"artifact={folder}", "task=toy", "task.limit.test=100")
    assert row["method"] == "artifact" and row["examples"] == 100
    with pytest.raises(UserError, match="has 4 labels; task `augesc` has 8"):
        check_labels(folder, load_artifact(folder, "multiclass"), task_named("augesc"))


def test_every_artifact_reads_the_text_with_its_own_tokenizer(carry_out, measure_again, tmp_path):
    alone = {}
    for name, count in (("few", 64), ("many", 256)):
        carry_out("technique=none", f"task.limit.train={count}", f"cache.dir={tmp_path / 'cache'}")
        (tmp_path / "artifact").rename(tmp_path / name)
        (row,) = measure_again(f"artifact={tmp_path / name}")
        alone[name] = row["value"]
    rows = measure_again(f"artifact={tmp_path / 'many'}", f"baseline={tmp_path / 'few'}")
    assert [row["value"] for row in rows] == [alone["few"], alone["many"]]


def test_labels_in_another_order_are_refused(carry_out, measure_again, tmp_path):
    carry_out("technique=none")
    with pytest.raises(UserError, match=r"has the labels awful, bad, good, great; task `toy` has great, good"):
        measure_again(f"artifact={tmp_path / 'artifact'}", "task=toy", "task.labels=[great,good,bad,awful]")


def test_a_head_without_weights_is_refused(measure_again, shared_models):
    with pytest.raises(UserError, match="holds no weights for classifier.bias.* would be random"):
        measure_again(f"artifact={shared_models('minilm-l6')}", "task=toy")


def task_named(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return parse_values(Task, to_plain(compose("train", [f"task={name}"]).task), "task")


def test_a_missing_artifact_is_reported(measure_again, tmp_path):
    with pytest.raises(UserError, match="artifact is not set; expected .* Set artifact=FOLDER"):
        measure_again()
    with pytest.raises(UserError, match="There is no folder nowhere"):
        measure_again("artifact=nowhere")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        measure_again(f"artifact={tmp_path}", "task=toy")


def test_real_weights_are_measured_by_their_folder(measure_again, shared_models, shared_data):
    folder, data = shared_models("stories260K"), shared_data("tinystories-sample")
    (row,) = measure_again(f"artifact={folder}", "task=tinystories", f"task.path={data}")
    assert row["metric"] == "perplexity" and 4 < row["value"] < 7
    assert row["parameters"] == 260_032


def choose(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return choose_rows(compose("evaluate", list(overrides)))


@pytest.fixture
def sweeps(tmp_path):
    """Two sweeps with the same baseline: `first` prunes at two sparsities, `second` predicts worse."""
    for name, job, outcome in (
        ("first/0_a", "technique.prune.sparsity=0.2", OUTCOME),
        ("first/1_b", "technique.prune.sparsity=0.5", OUTCOME),
        ("second/0_a", "technique.prune.sparsity=0.2", WORSE),
    ):
        folder = tmp_path / name
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra/config.yaml").touch()
        report_success(folder, Job("prune", "tiny", "toy", 0, (job,)), replace(outcome, baseline="a"))
    return tmp_path / "first", tmp_path / "second"


def test_several_sweeps_or_a_part_of_one_become_a_report(sweeps):
    first, second = sweeps
    rows = choose(f"report=[{first},{second}]")
    assert [row["method"] for row in rows] == ["none", "prune", "prune", "prune"]
    pruned = choose(f"report={first}", "where.method=prune")
    assert [row["overrides"] for row in pruned] == [[f"technique.prune.sparsity={share}"] for share in (0.2, 0.5)]
    with pytest.raises(UserError, match=r"where selects none of the 4 rows; where.model can be tiny\."):
        choose(f"report={first}", "where.model=[bert,llama]")
    with pytest.raises(UserError, match="holds no results; expected the folder of a run or a sweep"):
        choose(f"report={first.parent}")


def test_what_changed_between_two_sweeps_is_tested_on_the_same_examples(sweeps):
    first, second = (gather_rows(folder) for folder in sweeps)
    line, alone = describe_changes(first, second)
    assert line.startswith("prune: accuracy 0.8800 -> 0.8000 (-8.00 pt [")
    assert "significant, p = 0.00" in line and "not significant" not in line
    assert "1.00 -> 2.00 MB; 1.50 -> 1.20x of the baseline's speed, beyond both intervals" in line
    assert alone.startswith("only in the first: tiny toy accuracy prune 0 technique.prune.sparsity=0.5")
    assert (
        "(+0.00 pt [+0.00 pt, +0.00 pt], not significant, p = 1); same size; same speed"
        in describe_changes(first, first)[0]
    )
    with pytest.raises(UserError, match="no experiment in common"):
        describe_changes(first, [{**row, "task": "sst2"} for row in [*second, {**second[1], "seed": 1}]])
