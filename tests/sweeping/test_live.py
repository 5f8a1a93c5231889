"""The lines for the jobs of a running sweep."""

import io
import json
import os

import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console
from test_conf import CONF

import compress.sweeping.sweeper  # noqa: F401  registers the sweeper of the jobs
from compress.reporting.jobs import STAGE, mark_as_reused
from compress.sweeping.live import draw_states, name_jobs, read_job_states, summarise_states

SETTINGS = ("seed=1 technique.prune.sparsity=0.2", "seed=2 technique.prune.sparsity=0.2")


@pytest.fixture
def job(tmp_path):
    def job(number, begun, stage=None, ended=None, reason=""):
        folder = tmp_path / f"{number}_x"
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra" / "config.yaml").touch()
        os.utime(folder / ".hydra" / "config.yaml", (begun, begun))
        if stage:
            (folder / STAGE).parent.mkdir()
            (folder / STAGE).write_text(stage)
        if ended:
            row = {"status": "failed" if reason else "completed", "reason": reason}
            (folder / "result.json").write_text(json.dumps({"rows": [row]}))
            os.utime(folder / "result.json", (ended, ended))

    return job


def test_jobs_are_named_by_the_values_that_vary():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["model=tiny"], return_hydra_config=True)
        config.hydra.overrides.task = ["technique=none,prune", "seed=1,2", "task=toy", "technique.prune.sparsity=0.2"]
        assert name_jobs(config) == ["none seed=1", "none seed=2", *(f"prune {each}" for each in SETTINGS)]
        config.hydra.overrides.task = ["search=glob(*)"]
        assert name_jobs(config) == ["search=latency", "search=size"]


def test_every_job_is_queued_running_done_or_failed(job, tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 130.0)
    job(0, begun=100, ended=110)
    job(1, begun=110, ended=130, reason="no [space] left")
    job(2, begun=124, stage="gptq")
    job(3, begun=50, ended=60)  # of an earlier sweep
    job(4, begun=128, ended=70, reason="of an earlier run")
    job(5, begun=128, ended=70)
    mark_as_reused(tmp_path / "5_x")
    states = read_job_states(tmp_path, ["none", "prune", "gptq", "awq", "int8", "nf4"], begun=100)
    assert [(job.state, job.what, job.seconds) for job in states] == [
        ("done", "", 10),
        ("failed", "no [space] left", 20),
        ("running", "gptq", 6),
        ("queued", "", 0),
        ("running", "starting", 2),
        ("done", "", 0),
    ]
    assert summarise_states(states) == "3 of 6 jobs, about 11 s left"
    console = Console(width=80, file=io.StringIO())
    console.print(draw_states(states))
    assert "prune  failed   20 s  no [space] left" in console.file.getvalue()
