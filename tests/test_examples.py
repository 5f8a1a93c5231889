"""Run the scripts of examples/ in an empty folder, and the tests of the package there."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).parents[1] / "examples"
OWN = EXAMPLES / "own_stage"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Return a function that runs a script in an empty folder and returns its names."""
    monkeypatch.chdir(tmp_path)
    return lambda name: runpy.run_path(str(EXAMPLES / name))


def test_the_callbacks_of_a_lightning_script(run):
    names = run("lightning_callbacks.py")
    assert 0.4 < (names["weights"] == 0).float().mean() < 0.6
    assert names["difference"] < 1e-4


@pytest.mark.slow
def test_a_classifier_of_ones_own(run):
    names = run("own_classifier.py")
    assert names["answer"] == "positive"
    assert list(names["result"].table["method"]) == ["none", "onnx"]


@pytest.mark.slow
def test_an_embedding_model_for_search(run):
    names = run("search_embeddings.py")
    assert sorted(names["ranking"]) == sorted(names["documents"])
    none, onnx = names["result"].table["size_mb"]
    assert onnx < 0.5 * none


@pytest.fixture
def own(monkeypatch):
    monkeypatch.syspath_prepend(str(OWN))
    yield runpy.run_path(str(OWN / "test_clip.py"))
    for name in [name for name in sys.modules if name.startswith("compress_clip")]:
        del sys.modules[name]


def test_the_package_of_a_stage_passes_its_tests(own):
    tests = [test for name, test in own.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_the_commands_of_a_stage_of_another_package_compose():
    readme, config = (OWN / "README.md").read_text(), (OWN / "conf/technique/stage/clip.yaml").read_text()
    folder = ["--config-dir", "examples/own_stage/conf"]
    assert "python train.py " + " ".join(folder) in readme and "python train.py " + " ".join(folder) in config
    words = ["technique=clip+gptq", "technique.clip.deviations=2.0", "--cfg", "job"]  # which imports no torch
    done = subprocess.run(
        [sys.executable, "train.py", *folder, *words], cwd=EXAMPLES.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["technique"]["clip"] == {
        "_target_": "compress_clip.clip.Clip",
        "deviations": 2.0,
    }
