"""A run's folder: what the user put there stays, and results are replaced as a whole or not at all."""

import json
import os
import shutil

import pytest

from compress.errors import UserError
from compress.reporting import folder as module
from compress.reporting.folder import NAMES, PAGE, RunFolder
from compress.reporting.jobs import FAILED, RESULT, gather_rows
from compress.reporting.report import record_failure
from compress.reporting.rows import Job

JOB = Job("prune", "tiny", "toy", 0)


def read_folder(folder, private=False):
    """Return the content of all files, by default but for our private ones."""
    files = (file for file in folder.rglob("*") if file.is_file())
    named = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    return {name: content for name, content in named.items() if private or not name.startswith(".compress/")}


def write_results(run, text, names=(RESULT, "results.csv", "artifact", "report", "tensorboard")):
    new = run.begin()
    for name in names:
        if "." in name:
            row = {"method": text, "status": "completed"}
            (new / name).write_text(json.dumps({"rows": [row]}))
        else:
            (new / name).mkdir()
            (new / name / "file").write_text(text)


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.claim()
    return run


@pytest.fixture
def finished(run):
    write_results(run, "old")
    run.commit("first")
    return run


@pytest.mark.parametrize("name", [*NAMES, ".compress", ".lock"])
def test_a_folder_with_a_name_of_ours_that_no_run_wrote_is_refused_and_left_as_it_is(tmp_path, name):
    (tmp_path / name).mkdir() if "." not in name or name == ".compress" else (tmp_path / name).write_text("mine")
    if (tmp_path / name).is_dir():
        (tmp_path / name / "keep").write_text("mine")
    before = read_folder(tmp_path, private=True)
    with pytest.raises(UserError, match=rf"hydra.run.dir is .*, which holds {name} that no run .*Set hydra.run.dir="):
        RunFolder(tmp_path).claim()
    assert read_folder(tmp_path, private=True) == before


def test_other_files_are_no_reason_to_refuse_and_stay(tmp_path):
    for name in ("train.csv", "cache/entry", "data/results.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before, run = read_folder(tmp_path), RunFolder(tmp_path)
    run.claim()
    for text in ("old", "new"):
        write_results(run, text)
        run.commit(text)
    after = read_folder(tmp_path)
    assert {name: after[name] for name in before} == before and after["artifact/file"] == b"new"


def test_a_file_that_the_user_adds_after_a_run_is_refused(finished):
    (finished.path / "results.md").write_text("mine")
    with pytest.raises(UserError, match="holds results.md"):
        finished.claim()


def test_a_file_that_the_user_adds_during_a_run_stays(run):
    write_results(run, "new")
    (run.path / "report").mkdir()
    (run.path / "report" / "mine").write_text("mine")
    with pytest.raises(UserError, match="holds report"):
        run.commit("key")
    record_failure(run, JOB, "refused")
    assert read_folder(run.path) == {"report/mine": b"mine"} and "refused" in (run.path / FAILED).read_text()


def test_a_page_that_is_written_later_belongs_to_the_run(finished):
    finished.register([PAGE])
    (finished.path / PAGE).write_text("page")
    write_results(finished, "new", names=(RESULT, "artifact"))
    finished.commit("second")
    assert {*read_folder(finished.path)} == {RESULT, "artifact/file"}  # no page and table of the results before


def test_a_finished_run_is_one_whose_files_are_there(finished):
    assert finished.is_finished("first") and not finished.is_finished("second")
    assert not finished.is_finished("first", since=finished.marker.stat().st_mtime + 1)
    shutil.rmtree(finished.path / "artifact")
    assert not finished.is_finished("first")


def test_a_failure_leaves_a_finished_result_and_is_reported(finished):
    before = read_folder(finished.path)
    write_results(finished, "half")
    record_failure(finished, JOB, "bits is 5.")
    assert read_folder(finished.path) == before and finished.is_finished("first") and not finished.new.exists()
    (finished.path / ".hydra").mkdir()
    (finished.path / ".hydra" / "config.yaml").touch()
    (row,) = gather_rows(finished.path.parent)
    assert row["status"] == "failed" and row["reason"].startswith("bits is 5. (The result of an earlier run is kept in")
    write_results(finished, "new")
    finished.commit("second")
    assert [row["method"] for row in gather_rows(finished.path.parent)] == ["new"]


def test_a_result_from_before_the_job_began_is_not_that_of_a_killed_rerun(finished):
    (finished.path / ".hydra").mkdir()
    config = finished.path / ".hydra" / "config.yaml"
    config.write_text("{technique: {name: prune}, model: {name: tiny}, task: {name: toy}}")
    os.utime(finished.path / RESULT, (0, 100))
    os.utime(config, (0, 200))
    (row,) = gather_rows(finished.path.parent, begun=150)
    assert row["status"] == "failed" and "killed" in row["reason"] and "earlier run is kept" in row["reason"]
    (row,) = gather_rows(finished.path.parent)  # read later, e.g. from a copy, whose files have other times
    assert row["status"] == "completed"


def test_a_failure_replaces_a_failure(run):
    for reason in ("first", "second"):
        record_failure(run, JOB, reason)
    assert json.loads((run.path / RESULT).read_text())["rows"][0]["reason"] == "second"
    assert {"results.csv", "results.parquet", "results.md"} <= {*read_folder(run.path)}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("survived", range(30))
def test_killed_at_any_moment_of_the_replacement_the_results_are_the_old_or_the_new_ones(
    finished, monkeypatch, survived
):
    """Kill after so many changes of the disk; without ``result.json``, a mixture in between is no result."""
    (finished.path / "mine").write_text("mine")
    old = read_folder(finished.path)
    names = (RESULT, "results.csv", "artifact", "predictions")
    write_results(finished, "new", names)
    changes = 0

    def count(change):
        def counted(*args, **options):
            nonlocal changes
            if changes == survived:
                raise Killed
            changes += 1
            return change(*args, **options)

        return counted

    with monkeypatch.context() as patch:
        for place, name in ((module.os, "replace"), (module, "remove_path"), (module, "write_atomically")):
            patch.setattr(place, name, count(getattr(place, name)))
        try:
            finished.commit("second")
        except Killed:
            pass
        else:
            assert survived > 15
    now = read_folder(finished.path)
    if RESULT in now and b"new" not in now[RESULT]:
        assert now == old
    again = RunFolder(finished.path)
    again.claim()
    after = read_folder(finished.path)
    assert after.pop("mine") == b"mine"
    if again.is_finished("first"):
        assert {**after, "mine": b"mine"} == old
    else:
        assert again.is_finished("second") and {text.count(b"new") for text in after.values()} == {1}
        assert {*after} == {RESULT, "results.csv", "artifact/file", "predictions/file"}
    assert not again.ready.exists() and not again.old.exists()
