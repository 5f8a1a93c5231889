"""A sweep, and a training of two processes, on a SLURM of two nodes that only these tests use."""

import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import BESIDE
from small import SMALL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_command_line import ROOT

from compress.reporting.jobs import gather_rows

SCRIPTS = Path(os.environ.get("COMPRESS_SLURM", BESIDE / "slurm"))
MISSING = [
    *(program for program in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(program)),
    *(script for script in ("up.sh", "down.sh") if not (SCRIPTS / script).is_file()),
    *(["hydra-submitit-launcher"] if not find_spec("submitit") else []),
]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no SLURM to start here: there is no {', '.join(MISSING)}")
LAUNCHER = ["hardware=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=60"]
SMALL_THERE = [word for word in SMALL if word != "hardware=cpu"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([SCRIPTS / "up.sh", folder, "2"], check=True, capture_output=True)
    env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    yield env
    end = time.monotonic() + 60
    while subprocess.run(["squeue", "-h"], env=env, capture_output=True, check=True).stdout and time.monotonic() < end:
        time.sleep(0.2)  # otherwise the last steps wait for ever for a controller
    subprocess.run([SCRIPTS / "down.sh", folder], check=True, env=env)


def start(cluster, *words):
    command = [sys.executable, "train.py", "-m", *LAUNCHER, *SMALL_THERE, "hardware.accelerator=cpu", *words]
    return subprocess.Popen(command, cwd=ROOT, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def control(cluster, *words):
    return subprocess.run(words, env=cluster, capture_output=True, text=True, check=False).stdout


def until(condition, process):
    """Return the result of ``condition()`` once it is true; fail if the sweep has ended."""
    while not (result := condition()):
        if process.poll() is not None:
            pytest.fail(process.stdout.read())
        time.sleep(0.2)
    return result


@pytest.mark.slow
def test_six_jobs_on_two_nodes_of_which_one_fails_and_one_is_preempted_end_complete(cluster, tmp_path):
    sweep = tmp_path / "sweep"
    process = start(
        cluster,
        "technique=none",
        "baseline.epochs=60,0,1,2,3,-1",
        f"cache.dir={tmp_path}/cache",
        f"hydra.sweep.dir={sweep}",
    )
    # Four jobs run at once. Only the first of them reaches ten steps, and it still has long to go.
    until(lambda: list(tmp_path.glob("cache/stages/*.partial/resume/[1-9][0-9]*-*.ckpt")), process)
    (running,) = re.findall(r"^\S+_0$", control(cluster, "squeue", "-h", "-t", "R", "-o", "%i"), re.M)
    control(cluster, "scancel", "--signal=USR2", running)
    until(lambda: "BeginTime" in control(cluster, "squeue", "-h", "-j", running, "-o", "%r"), process)
    update = ["scontrol", "update", f"jobid={running}", "StartTime=now"]  # instead of a wait of two minutes
    until(lambda: control(cluster, *update) or control(cluster, "squeue", "-h", "-t", "R", "-j", running), process)
    output, _ = process.communicate()
    rows = gather_rows(sweep)
    assert process.returncode == 1, output
    assert [row["status"] for row in rows] == ["completed"] * 5 + ["failed"], output
    assert "baseline.epochs is -1" in rows[-1]["reason"]
    assert "No path found" not in output
    assert not list(tmp_path.rglob("*.partial"))
    assert "resumes after step" in next(sweep.glob("0_*/train.log")).read_text()
    nodes = {
        line for line in control(cluster, "scontrol", "-o", "show", "jobs").split() if line.startswith("NodeList=")
    }
    assert {"NodeList=n1", "NodeList=n2"} <= nodes


def losses(folder):
    """Return the losses on training and on validation text."""
    events = EventAccumulator(str(folder / "tensorboard" / "none")).Reload()
    return [event.value for name in ("train/loss", "validation/loss") for event in events.Scalars(name)]


@pytest.mark.slow
def test_two_nodes_train_like_one_process_with_the_same_batch(cluster, tmp_path):
    words = [
        "technique=none",
        "baseline.epochs=2",
        "+model.config.hidden_dropout_prob=0",
        "+model.config.attention_probs_dropout_prob=0",
        f"cache.dir={tmp_path}/cache",
    ]
    there = ["hydra.launcher.setup=['export MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo']"]
    for nodes in (1, 2):
        output, _ = start(
            cluster, *words, *there, f"hardware.nodes={nodes}", f"hydra.sweep.dir={tmp_path}/{nodes}"
        ).communicate()
        assert "completed" in {row["status"] for row in gather_rows(tmp_path / str(nodes))}, output
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == 4 and two == pytest.approx(one, abs=1e-4)
