"""A sweep that is killed at any moment and started again ends like an uninterrupted one."""

import atexit
import csv
import json
import multiprocessing
import os
import random
import runpy
import signal
import sys
import threading
import time
from multiprocessing import forkserver
from unittest.mock import patch

import pytest
from small import SMALL
from test_command_line import ROOT

from compress.cache.digests import compute_checksum
from compress.cache.store import list_entries, lock_if_unused

KILLS = 8
SWEEP = [
    "technique=none,prune,prune+gptq",
    *SMALL,
    "task.limit.test=64",
    "baseline.epochs=3",
    "hardware.threads=1",
]
FORK = multiprocessing.get_context("forkserver")  # imports the heavy libraries once, before any thread runs


def start_server():
    """Start the server that processes are forked from, before a measurement of memory starts it without ``warm``."""
    FORK.set_forkserver_preload(["warm"])
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # the server does not get our sys.path
        forkserver.ensure_running()


def sweep(words, log):
    run_script("train.py", ["-m", *words], log)


def run_script(script, words, log):
    """Run a command in this forked process, and write what it prints to a file."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal; in the background it is ignored
    os.chdir(ROOT)
    sys.argv = [script, *words]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        threading._shutdown()  # a forked process does neither by itself
        atexit._run_exitfuncs()


def start(folder):
    words = [*SWEEP, f"cache.dir={folder}/cache", f"hydra.sweep.dir={folder}/sweep"]
    process = FORK.Process(target=sweep, args=(words, folder / "log"))
    process.start()
    return process


def read_results(folder):
    """Return the figures of every row that do not depend on the clock, and the weights of every job."""
    with (folder / "sweep" / "results.csv").open() as file:
        rows = [{key: row[key] for key in ("method", "status", "accuracy", "f1_macro", "size_mb", "nonzeros")}
                for row in csv.DictReader(file)]  # fmt: skip
    weights = [compute_checksum(file) for file in sorted((folder / "sweep").glob("*/artifact/model.safetensors"))]
    return rows, weights


@pytest.mark.slow
def test_killed_at_random_moments_and_started_again_it_ends_in_the_same_table(tmp_path):
    whole, kills, rounds = tmp_path / "whole", 0, 0
    whole.mkdir()
    begin = time.perf_counter()
    process = start(whole)
    process.join()
    seconds = time.perf_counter() - begin
    assert process.exitcode == 0, (whole / "log").read_text()
    expected, moments = read_results(whole), random.Random(0)
    assert [row["method"] for row in expected[0]] == ["none", "prune", "prune+gptq"] and len(expected[1]) == 3

    while kills < KILLS:  # another sweep follows a sweep that has ended
        killed, rounds = tmp_path / f"killed {rounds}", rounds + 1
        killed.mkdir()
        ended = False
        while not ended:
            process = start(killed)
            process.join(moments.uniform(0, seconds / 3) if kills < KILLS else None)
            process.kill()
            process.join()
            ended = process.exitcode != -signal.SIGKILL
            kills += not ended
        assert process.exitcode == 0, (killed / "log").read_text()
        assert read_results(killed) == expected
        assert not list(killed.rglob("*.partial"))
        for entry in list_entries(killed / "cache"):
            with lock_if_unused(entry.path) as free:
                assert free

    before = (killed / "log").read_text().count("finished before")
    process = start(killed)
    process.join()
    assert (killed / "log").read_text().count("finished before") == before + 3
    assert json.loads(next((killed / "sweep").glob("0_*/result.json")).read_text())["rows"]
