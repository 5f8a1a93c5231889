"""Failures around the jobs of a run or a sweep: each is one sentence, and no finished work is lost."""

import csv
import json
import os
import signal
import subprocess
from importlib.util import find_spec

import psutil
import pytest
from filelock import FileLock
from small import SMALL
from test_command_line import python
from test_kills import FORK, read_results, run_script, sweep

from compress.errors import explain_error
from compress.reporting.jobs import gather_rows


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
    """Read the rows in the jobs' folders by method."""
    return lambda: {row["method"]: row for row in gather_rows(tmp_path / "sweep")}


@pytest.fixture
def disk(tmp_path):
    """Mount a small disk."""
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
        f"{key} is {tmp_path}, which another run uses. Wait for its end, or set {key} to another folder.\n"
    )


def test_a_folder_that_cannot_be_written_is_reported_before_anything_is_done(disk):
    folder = disk("read-only", "ro")
    done = python("train.py", f"hydra.run.dir={folder}/run", check=False)
    assert done.returncode == 1
    assert done.stderr == (
        f"hydra.run.dir is {folder}/run, which cannot be written (Read-only file system). "
        "Set hydra.run.dir to another folder.\n"
    )


def test_a_job_that_another_process_runs_is_left_alone(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with FileLock(folder / ".job.lock"):
        process = FORK.Process(target=run_script, args=("train.py", [f"hydra.run.dir={folder}"], tmp_path / "log"))
        process.start()
        process.join()
    assert process.exitcode == 1 and not (folder / "result.json").exists()
    assert f"Another process is running this job in {folder}. Wait for its end." in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    "launcher", ["basic", *(pytest.param(name, marks=pytest.mark.slow) for name in ("joblib", "submitit_local"))]
)
def test_a_failed_job_leaves_the_others_running_and_the_table_says_why(start, jobs, tmp_path, launcher):
    plugin = launcher.partition("_")[0]
    if launcher != "basic" and not find_spec(f"hydra_plugins.hydra_{plugin}_launcher"):
        pytest.skip(f"hydra-{plugin}-launcher is not installed")
    words = ["technique=gptq,none", "technique.gptq.bits=5", "baseline.epochs=0"]
    process = start(*words, f"hydra/launcher={launcher}")
    process.join()
    assert process.exitcode == 1
    assert "bits" in jobs()["gptq"]["reason"]
    assert jobs()["none"]["status"] == "completed"
    assert "gptq failed: technique.gptq.bits is 5" in (tmp_path / "sweep" / "results.md").read_text()


def test_a_full_disk_is_reported_and_with_more_space_the_sweep_resumes(start, jobs, disk):
    cache = disk("cache", "size=2m")
    process = start("technique=none", "baseline.epochs=0")
    process.join()
    assert process.exitcode == 1
    assert {row["status"] for row in jobs().values()} == {"failed"}
    assert all(row["reason"].startswith("No space is left on the disk") for row in jobs().values())
    subprocess.run(["mount", "-o", "remount,size=100m", str(cache)], check=True)
    process = start("technique=none", "baseline.epochs=0")
    process.join()
    assert process.exitcode == 0 and {row["status"] for row in jobs().values()} == {"completed"}


def test_a_full_folder_of_results_is_reported(start, jobs, disk, tmp_path):
    disk("sweep", "size=2m")
    process = start("technique=none", "baseline.epochs=0")
    process.join()
    assert process.exitcode == 1 and "No space is left on the disk" in jobs()["none"]["reason"]
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_job_without_memory_is_reported_and_the_others_are_kept(start, jobs, tmp_path):
    process = start("model.config.hidden_size=128,268435456", "technique=none", "baseline.epochs=0")
    process.join()
    assert process.exitcode == 1 and "Traceback" not in (tmp_path / "log").read_text()
    first, second = gather_rows(tmp_path / "sweep")
    assert first["status"] == "completed" and second["reason"].startswith("There is not enough memory. Set a")


@pytest.mark.slow
def test_a_worker_that_is_killed_is_reported_and_the_sweep_resumes(start, jobs, tmp_path):
    if not find_spec("hydra_plugins.hydra_joblib_launcher"):
        pytest.skip("hydra-joblib-launcher is not installed")
    words = ["technique=none,prune", "baseline.epochs=10", "hardware.threads=1"]
    process = start(*words, "hydra/launcher=joblib")
    while process.is_alive() and not list(tmp_path.glob("cache/stages/*.partial/resume/*.ckpt")):
        process.join(0.05)
    children = psutil.Process(process.pid).children()
    workers = [child for child in children if "LokyProcess" in " ".join(child.cmdline())]
    workers[0].kill()
    process.join()
    assert process.exitcode == 1 and {row["status"] for row in jobs().values()} == {"failed"}
    assert all(
        row["reason"].startswith("it left no result; its process was probably killed") for row in jobs().values()
    )
    assert "to resume it" in (tmp_path / "log").read_text()
    process = start(*words)
    process.join()
    assert process.exitcode == 0 and {row["status"] for row in jobs().values()} == {"completed"}
    whole = tmp_path / "whole"
    process = start(*words, f"cache.dir={whole}/cache", f"hydra.sweep.dir={whole}/sweep")
    process.join()
    assert process.exitcode == 0 and read_results(whole) == read_results(tmp_path)


@pytest.mark.slow
def test_a_lost_job_of_a_cluster_is_a_failed_row_and_the_others_are_waited_for(start, tmp_path):
    if not find_spec("submitit"):
        pytest.skip("hydra-submitit-launcher is not installed")
    process = start("technique=none,prune", "baseline.epochs=10", "hydra/launcher=submitit_local", "cache.mode=off")
    while process.is_alive() and not list(tmp_path.glob("sweep/0_*/.compress/cache/stages/*.partial/resume/*.ckpt")):
        process.join(0.05)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "submitit.core._submit" in child.cmdline() and f"{tmp_path}/sweep/0_" in str(child.open_files()):
            child.kill()
    process.join()
    assert process.exitcode == 1
    rows = [(row["method"], row["status"]) for row in gather_rows(tmp_path / "sweep")]
    assert rows == [("none", "failed"), ("none", "completed"), ("prune", "completed")]
    assert "it left no result" in (tmp_path / "sweep" / "results.md").read_text()


@pytest.mark.parametrize(("number", "by"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_stopped_job_says_so_and_the_sweep_leaves_its_table(start, jobs, tmp_path, number, by):
    process = start("technique=none,prune", "baseline.epochs=100")
    while process.is_alive() and not list(tmp_path.glob("cache/stages/*.partial/resume/*.ckpt")):
        process.join(0.05)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 130 and f"stopped by {by}" in jobs()["none"]["reason"]
    assert f"stopped by {by}" in (tmp_path / "sweep" / "results.md").read_text()
    assert "to resume it" in (tmp_path / "log").read_text()


def test_a_rerun_leaves_out_the_jobs_of_another_sweep(start, tmp_path):
    start("technique=none,prune", "seed=0", "baseline.epochs=0").join()
    process = start("technique=prune,none", "seed=0", "baseline.epochs=0")
    process.join()
    assert process.exitcode == 0
    with (tmp_path / "sweep" / "results.csv").open() as table:
        assert [row["method"] for row in csv.DictReader(table)] == ["none", "prune"]


def test_a_rerun_keeps_finished_jobs_and_repeats_changed_ones(start, jobs, tmp_path):
    data = tmp_path / "data"

    def write(word):
        data.mkdir(exist_ok=True)
        lines = (f"{word if i % 3 else 'bad'} {i},{int(i % 3 > 0)}" for i in range(400))
        (data / "train.csv").write_text("text,label\n" + "\n".join(lines))

    def rerun():
        process = start("technique=none", "task=files", f"task.path={data}", "baseline.epochs=0")
        process.join()
        markers = tmp_path.glob("sweep/*/.compress/made.json")
        rows, when = jobs(), {marker.parents[1].name: marker.stat().st_mtime_ns for marker in markers}
        return process.exitcode, {row["status"] for row in rows.values()}, when

    write("good")
    code, statuses, first = rerun()
    assert (code, statuses, len(first)) == (0, {"completed"}, 1)
    assert rerun() == (0, {"completed"}, first)
    (data / "train.csv").rename(data / "away")
    code, statuses, after = rerun()  # the table says that the job failed, and the earlier result is not lost
    assert (code, statuses, after) == (1, {"failed"}, first)
    assert all("earlier run is kept" in row["reason"] for row in jobs().values())
    assert len(list(tmp_path.glob("sweep/*/artifact/compress.json"))) == 1
    write("great")
    code, statuses, again = rerun()
    assert (code, statuses) == (0, {"completed"}) and all(again[job] > first[job] for job in first)


def test_other_errors_are_not_reported_as_a_fault_of_the_disk():
    assert not explain_error(ValueError("no"))
    assert explain_error(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert json.dumps(explain_error(PermissionError(13, "Permission denied", "/x"))).startswith(
        '"/x cannot be written or read'
    )
