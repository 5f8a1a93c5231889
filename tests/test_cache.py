import multiprocessing
import time

import pytest

from compress.cache import Cache, fingerprint


def test_an_entry_is_made_once_and_found_again(tmp_path):
    calls = []

    def make(folder):
        calls.append(folder)
        (folder / "made").write_text("yes")

    first = Cache(tmp_path).get({"seed": 0}, make, "baseline")
    again = Cache(tmp_path).get({"seed": 0}, make, "baseline")
    other = Cache(tmp_path).get({"seed": 1}, make, "baseline")
    assert first == again != other and len(calls) == 2 and (first / "made").is_file()


def test_what_was_interrupted_is_made_anew(tmp_path):
    def broken(folder):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path).get("key", broken, "baseline")
    entry = Cache(tmp_path).get("key", lambda folder: (folder / "whole").write_text(""), "baseline")
    assert [file.name for file in entry.iterdir()] == ["whole"]


def test_the_source_and_the_libraries_are_part_of_the_address(tmp_path, monkeypatch):
    first = Cache(tmp_path).get("key", lambda folder: None, "baseline")
    monkeypatch.setattr("compress.cache.environment", lambda: {"torch": "another"})
    assert Cache(tmp_path).get("key", lambda folder: None, "baseline") != first


def _slowly(folder):
    time.sleep(0.2)  # long enough for the others to come
    (folder / "made").write_text("yes")


def _get(folder):
    return str(Cache(folder).get("key", _slowly, "baseline"))


def test_of_several_processes_one_makes_the_entry(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert len(set(pool.map(_get, [tmp_path] * 3))) == 1
    assert not list(tmp_path.rglob("*.partial"))


def test_a_local_model_is_known_by_its_content(tmp_path):
    (tmp_path / "weights").write_bytes(b"1")
    first = fingerprint(tmp_path)
    (tmp_path / "weights").write_bytes(b"2")
    assert fingerprint(tmp_path) != first
