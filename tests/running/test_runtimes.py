"""A runtime is one module of `compress.runtimes`, and nothing else in the tree knows it."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from test_report import OUTCOME

import compress
from compress.artifacts.artifact import Artifact, Description, Done
from compress.artifacts.moving import move_artifact
from compress.errors import UserError
from compress.measuring.effects import describe_effects
from compress.planning.settings import Hardware
from compress.reporting.card import write_card
from compress.runtimes.runtime import import_runtime, iterate_runtimes
from compress.techniques.gguf import GGUF
from compress.techniques.onnx import Onnx
from compress.techniques.openvino import OpenVINO

OURS = ["llama_cpp", "onnxruntime", "openvino", "torch", "torch_compile"]
THEIRS = """
from compress.runtimes.runtime import Loading

STAGE = "onnx"
EXTRA = "onnx"
DEVICES = ("cpu",)
PACKAGES = ()
LIBRARY = "abacus"
WEIGHTS = ("model.onnx",)


def load(folder, kind):
    return folder / "model.onnx"


def describe_loading(folder, kind):
    return Loading("logits = abacus(%r)" % kind, ("It clicks.",))
"""


@pytest.fixture
def abacus(tmp_path, monkeypatch):
    (tmp_path / "abacus.py").write_text(THEIRS)
    monkeypatch.setattr("compress.runtimes.__path__", [*compress.runtimes.__path__, str(tmp_path)])
    yield "abacus"
    sys.modules.pop("compress.runtimes.abacus", None)


def describe(runtime):
    done = tuple(Done(name, {}, 0.0, False) for name in ("baseline", "onnx"))
    return Description("multiclass", "tiny", "toy", runtime, history=done)


def test_its_module_makes_a_runtime_of_it(abacus, tmp_path):
    assert Hardware(runtime=abacus).runtime == abacus
    moved = move_artifact(Artifact(tiny.bert(), None, describe("torch")), abacus, tiny.batch(), tmp_path)
    assert moved.model == tmp_path / "model.onnx" and moved.model.is_file() and moved.description.runtime == abacus


def test_its_module_says_how_a_script_loads_its_artifacts(abacus, tmp_path):
    there = replace(OUTCOME, descriptions={**OUTCOME.descriptions, "prune": describe(abacus)})
    write_card(tmp_path, there, "prune")
    card = (tmp_path / "README.md").read_text()
    assert "## Load it without `compress`\n\nIt clicks.\n\n```python\nlogits = abacus('multiclass')```" in card
    assert "library_name: abacus" in card


def test_its_module_may_explain_speed(abacus):
    found = describe_effects(describe(abacus), OUTCOME.measurements["prune"], OUTCOME.measurements["none"])
    assert found["speed"] == "1.50x faster"


def test_a_name_of_no_module_is_refused():
    assert list(iterate_runtimes()) == OURS
    with pytest.raises(UserError, match=r"hardware.runtime is 'decoder'; input should be 'llama_cpp', "):
        Hardware(runtime="decoder")


@pytest.mark.parametrize("name", OURS[:3])
def test_its_text_is_read_without_its_library(name, tmp_path):
    script = (
        "import sys; from pathlib import Path; from compress.runtimes.runtime import import_runtime\n"
        f"print(import_runtime({name!r}).describe_loading(Path(), 'multiclass').code)\n"
        f"sys.exit(not {{{name!r}, 'pytorch_lightning'}}.isdisjoint(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and f"import {name}" in done.stdout


@pytest.mark.parametrize("stage", [GGUF, Onnx, OpenVINO])
def test_a_stage_and_its_runtime_name_each_other(stage):
    assert stage.__module__.rpartition(".")[2] == import_runtime(stage.runtime).STAGE


def test_no_module_asks_for_a_runtime_by_its_name():
    asked = re.compile(rf'runtime\w*(\[\w+\])? (==|!=|in) [("{{\[]+({"|".join(OURS[:3])})"|runtime.startswith')
    assert not [path for path in Path(compress.__file__).parent.rglob("*.py") if asked.search(path.read_text())]
