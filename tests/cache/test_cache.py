import errno
import json
import multiprocessing
import os
import re
import signal
import time

import pytest

from compress.cache import digests, store
from compress.cache.__main__ import main
from compress.cache.digests import fingerprint_files
from compress.cache.store import Cache, list_entries, prune_cache
from compress.errors import UserError, explain_error


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
    main(["prune", "--dir", str(tmp_path), "--all"])
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


def test_the_place_of_a_file_in_its_folder_is_part_of_its_fingerprint(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "file").write_bytes(b"1")
    first = fingerprint_files(tmp_path)
    (tmp_path / "a" / "file").rename(tmp_path / "b" / "file")
    assert fingerprint_files(tmp_path) != first


def test_a_model_is_read_once_by_all_processes_until_it_changes(tmp_path, monkeypatch):
    file, known = tmp_path / "weights", tmp_path / "known"
    file.write_bytes(b"1")
    monkeypatch.setattr(digests, "RECENT_S", -1.0)
    monkeypatch.setattr(digests, "CHECKSUMS", {})
    first = digests.compute_checksum(file, known)

    def open_other(path, mode="r", *args, **options):
        assert path != file, "was read again"
        return open(path, mode, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(file), "open", open_other)
        assert digests.compute_checksum(file, known) == first
        digests.CHECKSUMS.clear()  # as in another process
        assert digests.compute_checksum(file, known) == first
    (tmp_path / "new").write_bytes(b"2")
    os.utime(tmp_path / "new", ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    os.replace(tmp_path / "new", file)  # of the same size and time
    assert digests.compute_checksum(file, known) != first


def test_a_checksum_is_not_kept_while_the_file_may_change_unnoticed(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "CHECKSUMS", {})
    (tmp_path / "weights").write_bytes(b"1")
    digests.compute_checksum(tmp_path / "weights", tmp_path / "known")
    assert not digests.CHECKSUMS and not (tmp_path / "known").exists()


def stop_training(folder):
    (folder / "resume").mkdir(exist_ok=True)
    (folder / "resume" / "3.ckpt").write_bytes(b"x" * 1000)
    raise KeyboardInterrupt


def test_refresh_starts_a_stopped_training_again_unless_it_began_since(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path).get("key", stop_training, "baseline")

    def resumed(folder):
        left.append((folder / "resume" / "3.ckpt").is_file())
        stop_training(folder)

    left, now = [], time.time()
    for since in (0.0, now - 100, now + 100):
        with pytest.raises(KeyboardInterrupt):
            Cache(tmp_path, since=since).get("key", resumed, "baseline")
    assert left == [True, True, False]


def test_what_is_made_again_replaces_nothing_that_another_process_reads(tmp_path):
    def write(text):
        return lambda folder: (folder / "made").write_text(text)

    with Cache(tmp_path) as reader:
        read = reader.get("key", write("old"), "baseline")
        later = time.time() + 100
        with Cache(tmp_path, since=later) as refreshing:
            new = refreshing.get("key", write("new"), "baseline")
            assert (read / "made").read_text() == "old" and (new / "made").read_text() == "new"
            assert prune_cache(tmp_path, max_gb=0) == []
        assert Cache(tmp_path).get("key", make=None, name="baseline") == new
    assert Cache(tmp_path, since=later).get("key", write("newest"), "baseline") == new  # no other reads it
    assert (new / "made").read_text() == "newest"
    assert {entry.path for entry in prune_cache(tmp_path, max_gb=0)} == {read, new}


def test_prune_needs_a_size_and_keeps_stopped_trainings_unless_asked(tmp_path, capsys):
    Cache(tmp_path).get("done", made, "baseline")
    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path).get("key", stop_training, "prune")
    with pytest.raises(SystemExit):
        main(["prune", "--dir", str(tmp_path)])
    assert len(list_entries(tmp_path)) == 2
    main(["prune", "--dir", str(tmp_path), "--all"])
    assert "removed 1 entries" in (shown := capsys.readouterr().out) and "kept 1 stopped trainings" in shown
    assert [entry.name for entry in list_entries(tmp_path)] == ["a stopped training"]
    main(["prune", "--dir", str(tmp_path), "--all", "--stopped"])
    assert not list_entries(tmp_path)


def test_the_advice_for_a_full_disk_can_be_typed(tmp_path):
    advice = explain_error(OSError(errno.ENOSPC, "No space left on device"))
    command = re.search("`python -m compress.cache (.+?)`", advice)[1]
    main(command.replace("CACHE", str(tmp_path)).replace("SIZE", "1").split())


def test_files_have_the_permissions_of_new_files(tmp_path):
    def secretly(folder):
        made(folder)
        (folder / "made").chmod(0o600)

    before = os.umask(0o027)
    try:
        entry = Cache(tmp_path).get("key", secretly, "baseline")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in entry.iterdir()} == {0o640}


def test_the_machine_of_an_entry_is_recorded(tmp_path):
    made_on = json.loads((Cache(tmp_path).get("key", made, "baseline") / "manifest.json").read_text())["made_on"]
    assert {"cpu_capability", "threads", "python", "torch", "numpy"} <= {*made_on}


def test_a_folder_in_use_is_not_pruned(tmp_path):
    with store.make_once(tmp_path / "tokens" / "abc", made):
        assert prune_cache(tmp_path, max_gb=0) == []
    assert len(prune_cache(tmp_path, max_gb=0)) == 1
