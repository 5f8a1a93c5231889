"""Run the commands and check the promises of the README and CONTRIBUTING.md."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from test_conf import hydra, jobs  # noqa: F401
from test_kills import FORK, run_script

from compress.models import families
from compress.planning.settings import parse_values, to_plain
from compress.runtimes import onnxruntime
from compress.runtimes.runtime import Runtime
from compress.tasks.kinds import classes
from compress.tasks.task import Task
from compress.testing import check_technique

LATER = "technique.prune_2.sparsity=0.5"
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
QUICK = (
    "hardware=cpu task.limit.train=128 task.limit.validation=32 task.limit.test=64 baseline.epochs=1 "
    "hardware.latency.seconds=0.01 hardware.latency.block_s=0.002 hardware.latency.memory=false"
).split()


def line_after(mark):
    """Return the single line of the code block under a mark."""
    (line,) = re.findall(rf"<!-- {mark} -->\n```bash\n(.+)\n```", README)
    return line


def run(script, *words, folder):
    """Run a command of the README, with its results in ``folder``, and return its exit status and what it prints."""
    words = [*words, f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}"]
    process = FORK.Process(target=run_script, args=(script, words, folder.with_suffix(".log")))
    process.start()
    process.join()
    return process.exitcode, folder.with_suffix(".log").read_text()


def rows(folder):
    with (folder / "results.csv").open() as file:
        return {row["method"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_the_main_job(tmp_path):
    *setup, command = line_after("main job").split(" && ")
    assert setup[-1].startswith("pip install -e")
    _, *words = shlex.split(command)
    words += [f"cache.dir={tmp_path / 'cache'}", f"hydra.sweep.dir={tmp_path}"]
    words += ["hardware.latency.seconds=0.2", "hardware.latency.block_s=0.02"]  # beside other tests it takes minutes
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = rows(tmp_path)
    assert list(table) == ["none", "prune", "gptq", "prune+gptq"]
    accuracy = {method: float(row["accuracy"]) for method, row in table.items()}
    assert accuracy["none"] > 0.85  # four classes, the most common a third
    assert accuracy["prune+gptq"] > accuracy["none"] - 0.03
    assert float(table["prune+gptq"]["size_mb"]) < 0.5 * float(table["none"]["size_mb"])
    assert float(table["prune"]["size_mb"]) == pytest.approx(float(table["none"]["size_mb"]), rel=0.01)
    assert "tiny on toy: 2,000 test examples, " in done.stdout
    for noise in ("Warning", "warn(", "Traceback", "it/s"):
        assert noise not in done.stdout + done.stderr


def test_the_test_command_runs_these_tests():
    *setup, command = line_after("test command").split(" && ")
    assert command == 'OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile -m "not slow"'
    assert "pip install -e '.[dev]'" in setup


def test_a_failed_job_leaves_the_others_running_and_is_reported(tmp_path):
    chains = "technique=gptq+prune,none"
    status, said = run("train.py", "-m", chains, *QUICK, f"cache.dir={tmp_path / 'cache'}", folder=tmp_path / "run")
    assert status == 1
    table = rows(tmp_path / "run")
    assert table["gptq+prune"]["status"] == "failed" and "Set technique=prune+gptq" in table["gptq+prune"]["reason"]
    assert table["none"]["status"] == "completed"
    assert "Traceback" not in said and "gptq+prune failed: " in said.replace("\n", " ")


def test_a_users_mistake_is_one_sentence_and_exit_status_1(tmp_path):
    status, said = run("train.py", "technique=prune", "technique.prune.sparsity=2", folder=tmp_path / "run")
    assert status == 1 and "Traceback" not in said
    assert "technique.prune.sparsity is 2; input should be less than 1." in said


def test_a_run_then_its_artifact_again(tmp_path):
    cached = f"cache.dir={tmp_path / 'cache'}"
    status, said = run("train.py", "-m", "technique=prune+prune", *QUICK, LATER, cached, folder=tmp_path / "run")
    assert status == 0, said
    (artifact,) = (tmp_path / "run").glob("*/artifact")
    status, said = run(
        "evaluate.py",
        f"artifact={artifact}",  # a path from the sweep's folder, without quotation marks
        f"cache.dir={tmp_path / 'cache'}",
        *(word for word in QUICK if word.startswith("hardware.latency")),
        folder=tmp_path / "again",
    )
    assert status == 0, said
    method = "prune+prune"
    assert rows(tmp_path / "again")[method]["accuracy"] == rows(tmp_path / "run")[method]["accuracy"]


def test_contributing_names_every_package():
    packages = {path.parent.name for path in (ROOT / "compress").glob("*/__init__.py")}
    (named,) = re.findall(r"^compress/\n(.+?)^train\.py", CONTRIBUTING, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"^  (\w+)/", named, re.MULTILINE)) == packages


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 120
    for link in re.findall(r"\]\((?!http)([^)#]+)\)|(?:src|srcset)=\"([^\"]+)\"", README):
        assert (ROOT / "".join(link)).is_file(), link


def block_with(language, text):
    """Return the code block of CONTRIBUTING.md that contains a text."""
    blocks = re.findall(rf"```{language}\n(.+?)```", CONTRIBUTING, re.DOTALL)
    (block,) = (block for block in blocks if text in block)
    return block


def test_the_stage_of_contributing_keeps_the_contract():
    names = {"__name__": "compress.techniques.clip"}
    exec(block_with("python", "class Clip"), names)
    config = OmegaConf.to_container(OmegaConf.create(block_with("yaml", "technique=clip")))
    assert config["_target_"] == f"{names['__name__']}.Clip"
    check_technique(names["Clip"], config=config)


def test_the_family_of_contributing_has_the_fields_of_a_record(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", {})
    exec(block_with("python", "FAMILIES["), vars(families))
    assert families.FAMILIES["starcoder2"].ffn_out == "mlp.c_proj"


def test_the_task_of_contributing_is_valid(tmp_path):
    text = block_with("yaml", "task=imdb")
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "imdb.yaml").write_text(text)
    words = [word for word in text.splitlines()[0].split() if "=" in word]
    (config,) = jobs("train", [*words, f"hydra.searchpath=[file://{tmp_path}]"])
    assert parse_values(Task, to_plain(config.task), "task").num_labels == 2


def test_the_kind_of_contributing_works():
    names = {**vars(classes), "np": np, "Task": Task}
    exec(block_with("python", "class Stars"), names)
    stars = names["Stars"]()
    assert stars.encode(None, ["**", "****"], "train") == [2.0, 4.0]
    assert stars.metrics["mean_error"].compute(np.array([[1.0], [2.0]]), np.array([2.0, 4.0])) == 1.5


def test_the_runtime_of_contributing_has_what_a_runtime_has():
    names = dict(vars(onnxruntime))
    for name in (*Runtime.__annotations__, "load", "describe_loading"):
        del names[name]
    exec(block_with("python", "def describe_loading"), names)
    assert names.keys() >= Runtime.__annotations__.keys() and callable(names["load"])
    assert "InferenceSession" in names["describe_loading"](Path(), "lm").code
