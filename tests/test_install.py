"""A wheel in a new environment, away from the checkout: its commands, and the configs inside it."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from small import SMALL

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Install the wheel in an environment that reads its dependencies from this one, but not the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    place = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(place, check=True, capture_output=True, text=True).stdout.strip())
    (site / "shared.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "env" / "bin"


@pytest.fixture
def run(installed, tmp_path):
    def run(*words, status=0):
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [installed / "compress", *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert status is None or done.returncode == status, done.stderr
        return done

    return run


def test_a_run_its_evaluation_its_report_and_its_cache(run, tmp_path):
    run("train", "technique=prune+gptq", *SMALL, "technique.gptq.samples=16", "hydra.run.dir=first")
    assert (tmp_path / "first" / "results.csv").is_file()
    command = re.search(r"compress train [^<]*technique=prune\+gptq", (tmp_path / "first" / "report.html").read_text())
    assert command, "the report says how the run is repeated"
    short = [word for word in SMALL if word.startswith("hardware")]
    run("evaluate", "artifact=first/artifact", *short, "hydra.run.dir=again")
    assert "prune+gptq" in (tmp_path / "again" / "results.md").read_text()
    assert "prune+gptq" in run("report", "first", "--method", "none", "prune+gptq").stdout
    assert "prune+gptq" in run("compare", "first", "first").stdout
    assert " entries of " in run("cache", "report").stdout
    assert run("cache", "prune", "--max-gb", "0").stdout.startswith("removed ")


def test_the_commands_name_themselves(run):
    assert "train" in run("--help").stdout and run("--version").stdout.startswith("compress 0.")
    for command in ("train", "evaluate"):
        shown = run(command, "--help").stdout
        assert f"compress {command} " in shown and "python " not in shown
    assert "invalid choice: 'nothing'" in run("nothing", status=2).stderr


def test_a_mistake_names_what_is_typed_here(run):
    done = run("train", "search=latency", *SMALL, status=1)
    assert "compress train -m search=latency" in done.stdout + done.stderr


@pytest.mark.parametrize("command", [["report"], ["compare"], ["cache", "report"], ["cache", "prune"]])
def test_every_option_that_help_lists_is_taken(run, command):
    shown = run(*command, "--help").stdout
    options = dict(re.findall(r"^  (--[\w-]+)( [A-Z]+)?", shown, re.MULTILINE))
    folders = {"report": ["nowhere"], "compare": ["nowhere", "nowhere"]}.get(command[0], [])
    for option, value in options.items():
        values = [] if not value else ["nowhere"] if option == "--dir" else ["1"]
        done = run(*command, *folders, option, *values, status=None)
        assert "unrecognized arguments" not in done.stderr
