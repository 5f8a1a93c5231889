"""What can go wrong with a run or a sweep around the jobs themselves: a sentence each, and nothing finished is lost."""

import csv
import json
import subprocess
from importlib.util import find_spec

import psutil
import pytest
from filelock import FileLock
from test_command_line import python
from test_kills import FORK, found, sweep
from test_run import SMALL

from compress import results
from compress.errors import told


@pytest.fixture
def start(tmp_path):
    def start(*words):
        words = [*SMALL, f"cache.dir={tmp_path}/cache", f"hydra.sweep.dir={tmp_path}/sweep", *words]
        process = FORK.Process(target=sweep, args=(words, tmp_path / "log"))
        process.start()
        return process

    return start


@pytest.fixture
def jobs(tmp_path):
    """The rows of the sweep's table by method, as they lie in the jobs' folders."""
    return lambda: {row["method"]: row for row in results.gather(tmp_path / "sweep")}


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own."""
    mounted = []

    def disk(name, options):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a tmpfs is not allowed here")
        mounted.append(folder)
        return folder

    yield disk
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(("flags", "key"), [([], "hydra.run.dir"), (["-m"], "hydra.sweep.dir")])
def test_two_runs_into_one_folder_at_once_are_refused(tmp_path, flags, key):
    with FileLock(tmp_path / ".lock"):
        done = python("train.py", *flags, f"{key}={tmp_path}", check=False)
    assert done.returncode == 1 and not (tmp_path / "results.csv").exists()
    assert done.stderr == (
        f"Another run is writing into {tmp_path}: wait for its end, or set {key} to another folder.\n"
    )


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_done(disk):
    folder = disk("read-only", "ro")
    done = python("train.py", f"hydra.run.dir={folder}/run", check=False)
    assert done.returncode == 1
    expected = f"{folder}/run cannot be written (Read-only file system): set hydra.run.dir to a folder that can.\n"
    assert done.stderr == expected


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_failed_job_leaves_the_others_running_and_the_table_says_why(start, jobs, tmp_path, launcher):
    if launcher != "basic" and not find_spec(f"hydra_plugins.hydra_{launcher}_launcher"):
        pytest.skip(f"hydra-{launcher}-launcher is not installed")
    process = start("technique=gptq,none", "++technique.gptq.bits=5", f"hydra/launcher={launcher}")
    process.join()
    assert process.exitcode == 1
    assert "bits" in jobs()["gptq"]["reason"]
    assert "has no stage `gptq`" in jobs()["none"]["reason"]
    assert "gptq failed: technique.gptq.bits is 5" in (tmp_path / "sweep" / "results.md").read_text()


def test_a_full_disk_is_told_and_with_more_space_the_sweep_goes_on(start, jobs, disk):
    cache = disk("cache", "size=2m")
    process = start("technique=none,prune")
    process.join()
    assert process.exitcode == 1
    assert {row["status"] for row in jobs().values()} == {"failed"}
    assert all(row["reason"].startswith("No space is left on the disk") for row in jobs().values())
    subprocess.run(["mount", "-o", "remount,size=100m", str(cache)], check=True)
    process = start("technique=none,prune")
    process.join()
    assert process.exitcode == 0 and {row["status"] for row in jobs().values()} == {"completed"}


def test_a_full_folder_of_results_is_told(start, jobs, disk, tmp_path):
    disk("sweep", "size=2m")
    process = start("technique=none")
    process.join()
    assert process.exitcode == 1 and "No space is left on the disk" in jobs()["none"]["reason"]
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_job_without_memory_is_told_and_the_others_are_kept(start, jobs, tmp_path):
    process = start("model.config.hidden_size=128,268435456", "technique=none")
    process.join()
    assert process.exitcode == 1 and "Traceback" not in (tmp_path / "log").read_text()
    first, second = results.gather(tmp_path / "sweep")
    assert first["status"] == "completed" and second["reason"].startswith("There is not enough memory: choose")


def test_a_worker_that_is_killed_as_for_want_of_memory_is_told_and_the_sweep_goes_on(start, jobs, tmp_path):
    if not find_spec("hydra_plugins.hydra_joblib_launcher"):
        pytest.skip("hydra-joblib-launcher is not installed")
    words = ["technique=none,prune", "baseline.epochs=10", "hardware.threads=1"]
    process = start(*words, "hydra/launcher=joblib")
    while process.is_alive() and not list(tmp_path.glob("cache/stages/*.partial/resume/*.ckpt")):
        process.join(0.05)
    workers = [one for one in psutil.Process(process.pid).children() if "LokyProcess" in " ".join(one.cmdline())]
    workers[0].kill()
    process.join()
    assert process.exitcode == 1 and {row["status"] for row in jobs().values()} == {"failed"}
    assert all(row["reason"].startswith("it left no result, as happens to a process") for row in jobs().values())
    assert "goes on with it" in (tmp_path / "log").read_text()
    process = start(*words)
    process.join()
    assert process.exitcode == 0 and {row["status"] for row in jobs().values()} == {"completed"}
    whole = tmp_path / "whole"
    process = start(*words, f"cache.dir={whole}/cache", f"hydra.sweep.dir={whole}/sweep")
    process.join()
    assert process.exitcode == 0 and found(whole) == found(tmp_path)


def test_a_stopped_job_says_so_and_the_sweep_leaves_its_table(start, jobs, tmp_path):
    process = start("technique=none,prune", "baseline.epochs=100")
    while process.is_alive() and not list(tmp_path.glob("cache/stages/*.partial/resume/*.ckpt")):
        process.join(0.05)
    process.terminate()
    process.join()
    assert process.exitcode == 130 and "stopped by SIGTERM" in jobs()["none"]["reason"]
    assert "stopped by SIGTERM" in (tmp_path / "sweep" / "results.md").read_text()
    assert "goes on with it" in (tmp_path / "log").read_text()


def test_a_rerun_redoes_what_changed_and_leaves_out_the_jobs_of_another_sweep(start, jobs, tmp_path):
    start("technique=none,prune", "seed=0").join()
    first = {job.name: job.stat().st_mtime for job in (tmp_path / "sweep").glob("*/finished")}
    assert first
    process = start("technique=prune,none", "seed=0")
    process.join()
    assert process.exitcode == 0
    with (tmp_path / "sweep" / "results.csv").open() as table:
        assert [row["method"] for row in csv.DictReader(table)] == ["none", "prune"]


def test_what_is_no_fault_of_the_disk_is_not_told_as_one():
    assert not told(ValueError("no"))
    assert told(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert json.dumps(told(PermissionError(13, "Permission denied", "/x"))).startswith('"/x cannot be written or read')
