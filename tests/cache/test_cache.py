import multiprocessing
import os
import signal
import time

import pytest

from compress.cache import store
from compress.cache.__main__ import main
from compress.cache.digests import fingerprint_files
from compress.cache.store import Cache, list_entries, prune_cache
from compress.errors import UserError


def made(folder, size=3):
    (folder / "made").write_bytes(b"x" * size)


@pytest.fixture
def calls():
    return []


@pytest.fixture
def make(calls):
    def make(folder):
        calls.append(folder)
        made(folder)

    return make


def test_an_entry_is_made_once_and_found_again(tmp_path, make, calls):
    first = Cache(tmp_path).get({"seed": 0}, make, "baseline")
    again = Cache(tmp_path).get({"seed": 0}, make, "baseline")
    other = Cache(tmp_path).get({"seed": 1}, make, "baseline")
    assert first == again != other and len(calls) == 2 and (first / "made").is_file()


def test_an_interrupted_entry_keeps_only_its_training(tmp_path):
    def broken(folder):
        (folder / "half").write_text("")
        (folder / "resume").mkdir()
        (folder / "resume" / "3.ckpt").write_text("")
        raise KeyboardInterrupt

    def resume(folder):
        assert sorted(path.name for path in folder.rglob("*")) == ["3.ckpt", "resume"]
        (folder / "whole").write_text("")

    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path).get("key", broken, "baseline")
    entry = Cache(tmp_path).get("key", resume, "baseline")
    assert sorted(file.name for file in entry.iterdir()) == ["manifest.json", "whole"]


def test_an_entry_that_would_fail_again_leaves_nothing(tmp_path):
    def fails(folder):
        (folder / "resume").mkdir()
        raise UserError("no")

    with pytest.raises(UserError):
        Cache(tmp_path).get("key", fails, "baseline")
    assert not list_entries(tmp_path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda entry: (entry / "made").write_bytes(b"xxy"), "made has changed"),
        (lambda entry: (entry / "made").write_bytes(b"x"), "made has changed"),
        (lambda entry: (entry / "made").unlink(), "made is missing"),
        (lambda entry: (entry / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_entry_is_reported_and_made_again(tmp_path, make, calls, caplog, damage, reason):
    entry = Cache(tmp_path).get("key", make, "baseline")
    damage(entry)
    assert Cache(tmp_path).get("key", make, "baseline") == entry
    assert len(calls) == 2 and (entry / "made").read_bytes() == b"xxx"
    assert f"is damaged ({reason}) and is made again" in caplog.text


def test_refresh_makes_older_entries_again(tmp_path, make, calls):
    entry = Cache(tmp_path).get("key", make, "baseline")
    Cache(tmp_path, since=store.BEGAN).get("key", make, "baseline")
    assert len(calls) == 1
    os.utime(entry, (0, store.BEGAN - 1))
    (entry.with_suffix(".old") / "left").mkdir(parents=True)  # left by a killed process
    for _ in range(2):
        Cache(tmp_path, since=store.BEGAN).get("key", make, "baseline")
    assert len(calls) == 2 and not entry.with_suffix(".old").exists()


def test_the_source_and_the_libraries_are_part_of_the_address(tmp_path, monkeypatch):
    first = Cache(tmp_path).get("key", made, "baseline")
    monkeypatch.setattr("compress.cache.store.digest_environment", lambda: {"torch": "another"})
    assert Cache(tmp_path).get("key", made, "baseline") != first


def _chain(folder, log):
    """Make the stages of a chain, slowly enough for other processes to ask for the same stage."""

    def make(name):
        def make(into):
            with open(log, "a") as file:
                file.write(f"{name}\n")
            time.sleep(0.1)
            made(into)

        return make

    with Cache(folder) as cache:
        return [str(cache.get(stage, make(stage), stage)) for stage in ("baseline", "prune", "gptq")]


def test_eight_processes_at_once_make_every_stage_once(tmp_path):
    log = tmp_path / "log"
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        chains = pool.starmap(_chain, [(tmp_path, log)] * 8, chunksize=1)
    assert len({tuple(entries) for entries in chains}) == 1
    assert log.read_text().split() == ["baseline", "prune", "gptq"]
    assert not list(tmp_path.rglob("*.partial"))


def _dies(folder):
    Cache(folder).get("key", lambda into: os.kill(os.getpid(), signal.SIGKILL), "baseline")


def _uses(folder, ready, done):
    with Cache(folder) as cache:
        cache.get("key", made, "baseline")
        ready.set()
        done.wait()


def test_a_killed_process_leaves_no_lock(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_dies, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and list(tmp_path.rglob("*.partial"))
    Cache(tmp_path).get("key", made, "baseline")
    assert not list(tmp_path.rglob("*.partial"))


def test_prune_removes_the_least_recently_used_entries_first_and_keeps_those_in_use(tmp_path, capsys):
    for age, key in enumerate(("new", "old", "older")):
        entry = Cache(tmp_path).get(key, lambda folder: made(folder, 1_000_000), key)
        os.utime(entry.with_suffix(".used"), (0, time.time() - age))
    assert len(prune_cache(tmp_path, max_gb=0.0015)) == 2
    assert [entry.size_bytes // 1_000_000 for entry in list_entries(tmp_path)] == [1]

    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_uses, args=(tmp_path, ready, done))
    process.start()
    ready.wait()
    main(["prune", "--dir", str(tmp_path)])
    main(["report", "--dir", str(tmp_path)])
    assert "removed 1 entries, 0.001 GB" in (shown := capsys.readouterr().out)
    assert "in use" in shown and len(list_entries(tmp_path)) == 1
    done.set()
    process.join()
    assert len(prune_cache(tmp_path, max_gb=0)) == 1 and not list_entries(tmp_path)


def test_a_local_model_is_known_by_its_content(tmp_path):
    (tmp_path / "weights").write_bytes(b"1")
    first = fingerprint_files(tmp_path)
    (tmp_path / "weights").write_bytes(b"2")
    assert fingerprint_files(tmp_path) != first
