"""The notebook API: the same figures, checks and errors as on the command line."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from small import SMALL
from test_kills import FORK, run_script
from transformers import GenerationConfig

import compress
from compress.api import choose_model
from compress.planning.words import quote_value

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "baseline": {"epochs": 1},
    "hardware": {
        "accelerator": "cpu",
        "latency": {"seconds": 0.01, "block_s": 0.002, "batch_sizes": [1, 4], "memory": False},
    },
}
TOY = {"task": "toy", "limit": {"train": 256, "validation": 64, "test": 128}}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    settings = {**SETTINGS, "cache": {"dir": str(folder / "cache")}}
    return compress.compress("tiny", "prune", TOY, prune={"sparsity": 0.5}, output=folder / "run", **settings)


def test_a_result_has_table_artifact_model_and_report(result):
    assert list(result.table["method"]) == ["none", "prune"]
    assert result.table["nonzeros"][1] < result.table["nonzeros"][0]
    assert type(result.model).__name__ == "BertForSequenceClassification"
    assert (result.artifact / "config.yaml").is_file() and result.report.path.is_file()
    assert "| prune" in result.report._repr_markdown_() == str(result.report)
    assert (result.folder / "results.csv").is_file()


def test_the_command_line_finds_the_same(result, tmp_path):
    words = [*SMALL, f"cache.dir={result.folder.parent}/cache", "technique=prune", "technique.prune.sparsity=0.5"]
    words.append(f"hydra.run.dir={tmp_path / 'run'}")
    process = FORK.Process(target=run_script, args=("train.py", words, tmp_path / "log"))
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    again = compress.measure(tmp_path / "run" / "artifact", hardware=SETTINGS["hardware"], output=tmp_path / "again")
    for column in ("accuracy", "value", "size_mb", "nonzeros"):
        assert again.table[column][0] == pytest.approx(result.table[column][1])


def test_a_measurement_beside_a_baseline(result, tmp_path):
    baseline = shutil.copytree(result.artifact, tmp_path / "baseline")
    measured = compress.measure(
        result.artifact, baseline=baseline, hardware=SETTINGS["hardware"], output=tmp_path / "measured"
    )
    assert len(measured.rows) == 2 and measured.rows[1]["speedup"] > 0


def test_a_model_in_memory(result, tmp_path):
    model, tokenizer = result.model, result.tokenizer
    with pytest.raises(compress.UserError, match=r"its tokenizer is needed too\. Set tokenizer="):
        compress.compress(model)
    settings = {**SETTINGS, "baseline": {"epochs": 0}, "cache": {"dir": str(tmp_path / "cache")}}
    (row,) = compress.compress(model, "none", TOY, tokenizer=tokenizer, output=tmp_path / "run", **settings).rows
    assert row["nonzeros"] == result.rows[1]["nonzeros"] and row["accuracy"] == result.rows[1]["accuracy"]


@pytest.mark.parametrize(
    ("technique", "settings", "sentence"),
    [
        ("prune", {"prune": {"sparsty": 0.5}}, r"did you mean `technique\.prune\.sparsity`"),
        ("prune", {"gptq": {"bits": 4}}, "the chain `prune` has no stage `gptq`"),
        ("prunne", {}, "did you mean `prune`"),
        ("prune", {"task": "sst3"}, "did you mean `task=sst2`"),
        ("prune", {"hardware": {"devices": 2}}, "devices|one process"),
        ("gptq", {"gptq": {"group_size": 7}}, r"technique\.gptq\.group_size"),
    ],
)
def test_a_mistake_is_one_sentence(technique, settings, sentence, tmp_path):
    with pytest.raises(compress.UserError, match=sentence):
        compress.compress("tiny", technique, output=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_files_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(compress.UserError, match="is not empty"):
        compress.measure(tmp_path, task="toy", output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_stages_are_found_at_first_use():
    code = "import sys, compress; print(dir(compress)); assert not {'torch', 'hydra'} & set(sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'GPTQ'" in shown
    assert compress.GPTQ.__module__ == "compress.techniques.gptq"
    with pytest.raises(AttributeError, match="no attribute 'Prunne'"):
        compress.Prunne  # noqa: B018


@pytest.mark.parametrize("value", [None, True, 3, 0.5, 1e-5, "a b", "it's", [1, "x"], {"*attention*": 0.3}, "${x}"])
def test_a_value_is_quoted_as_hydra_reads_it(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert OverridesParser.create().parse_override(f"key={quote_value(value)}").value() == value


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    report, table, *_, mistake = [cell for cell in notebook.cells if cell.cell_type == "code"][1:]
    assert "| prune+gptq" in report.outputs[0]["data"]["text/markdown"]
    assert "size_mb" in table.outputs[0]["data"]["text/html"]
    assert "did you mean `technique.prune.sparsity`" in mistake.outputs[0]["text"]


def test_a_model_in_memory_is_given_with_a_generation_config_that_cannot_be_saved():
    model, tokenizer = tiny.llama_lm(), tiny.tokenizer()
    model.generation_config.temperature = 0.6
    own = model.generation_config
    with choose_model(model, tokenizer) as words:
        path = next(word for word in words if word.startswith("model.path=")).removeprefix("model.path=")
        assert GenerationConfig.from_pretrained(path.strip("'\"")).temperature != 0.6
    assert model.generation_config is own and own.temperature == 0.6
