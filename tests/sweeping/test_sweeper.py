"""A search from its command to its report, with jobs that only write known figures and with real jobs."""

import atexit
import json
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from small import SMALL
from test_command_line import ROOT
from test_kills import FORK
from test_report import OUTCOME, measured

from compress.cache.files import write_atomically
from compress.maths.statistics import Interval
from compress.reporting import findings, jobs
from compress.reporting.jobs import gather_rows
from compress.reporting.report import report_failure
from compress.reporting.rows import Job, collect_rows, drop_repeated_baselines
from compress.running import job as run

SPACE = [
    "search.slots=[[none,prune,gptq],[none,prune,gptq,awq],[none,onnx]]",
    "search.recovery=[]",
    "search.epochs=[0]",
    "search.settings={onnx:{precision:[null]}}",
    "+search.settings.awq.group_size=[7]",
]
SPEED = {"prune": 1.2, "gptq": 1.5, "onnx": 3.0}
DROP = {"prune": 0.002, "gptq": 0.009, "onnx": 0.0}


def stand_in(cfg):
    """Write a chain's known figures; on the test split it is a point worse than on the validation split."""
    folder, chain = Path(HydraConfig.get().runtime.output_dir), cfg.technique.name
    job = Job(chain, "tiny", "toy", 0, ())
    if chain == "prune+onnx":
        report_failure(folder, job, "out of luck")
        return 1
    stages = [] if chain == "none" else chain.split("+")
    accuracy, speed = 0.9 - 0.01 * (cfg.split == "test"), 1.0
    for stage in stages:
        accuracy, speed = accuracy - DROP[stage], speed * SPEED[stage]
    measurements = {"none": measured(0.9, 4_000_000)}
    if stages:
        measurements[chain] = measured(accuracy, 1_000_000, Interval(speed, speed - 0.1, speed + 0.1))
    measurements = {name: replace(each, split=cfg.split) for name, each in measurements.items()}
    descriptions = {name: OUTCOME.descriptions["none" if name == "none" else "prune"] for name in measurements}
    outcome = replace(OUTCOME, measurements=measurements, descriptions=descriptions, predictions={})
    rows = collect_rows(folder, job, outcome)
    write_atomically(folder / jobs.RESULT, json.dumps({"rows": rows, "environment": {}}))
    return 0


def train(flags, words, log, stub):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    os.chdir(ROOT)
    if stub:
        run.main = stand_in
    sys.argv = ["train.py", *flags, *words]
    try:
        runpy.run_path("train.py", run_name="__main__")
    finally:
        atexit._run_exitfuncs()


@pytest.fixture
def search(tmp_path):
    def search(*words, flags=("-m",), stub=True):
        words = [f"hydra.sweep.dir={tmp_path}/sweep", f"hydra.run.dir={tmp_path}/run", *words]
        process = FORK.Process(target=train, args=(flags, words, tmp_path / "log", stub))
        process.start()
        process.join()
        return process.exitcode, (tmp_path / "log").read_text()

    return search


@pytest.mark.slow
def test_trials_are_judged_on_validation_text_and_the_choice_on_the_test_split(search, tmp_path):
    code, said = search("search=latency", "search.trials=9", "search.jobs=2", *SPACE)
    assert code == 0, said
    trials = {row["method"]: row for row in gather_rows(tmp_path / "sweep" / "trials")}
    chains = set(trials) - {"none"}
    assert chains <= {"prune", "gptq", "onnx", "prune+gptq", "gptq+onnx", "prune+onnx", "prune+gptq+onnx"}
    assert {"gptq+onnx", "prune+onnx"} <= chains and trials["prune+onnx"]["reason"] == "out of luck"
    assert {row["split"] for row in trials.values() if row["status"] == "completed"} == {"validation"}
    (baseline, chosen) = drop_repeated_baselines(gather_rows(tmp_path / "sweep"))[:2]
    assert (baseline["split"], chosen["split"], chosen["method"]) == ("test", "test", "gptq+onnx")
    line = (tmp_path / "sweep" / findings.CONCLUSIONS).read_text().splitlines()[0]
    assert line.startswith("chosen: gptq+onnx") and "-0.90 pt there; on the test split: " in line and "-1.90 pt" in line
    for place in ("results.md", "report.html"):
        assert "chosen: gptq+onnx" in (tmp_path / "sweep" / place).read_text()
    assert "chosen: gptq+onnx" in said and "awq was left out: " in said
    assert "fastest within 1 point of the baseline:" not in said, "the test split chooses nothing"
    assert (tmp_path / "sweep" / "trials" / "report.html").is_file()
    assert "7 trials, 1 of which failed, in" in said.replace("\n", " ")

    begun = len(list((tmp_path / "sweep" / "trials").glob("*/result.json")))
    code, said = search("search=latency", "search.trials=9", "search.jobs=2", *SPACE)
    assert code == 0  # only the failed trial was tried again
    assert len(list((tmp_path / "sweep" / "trials").glob("*/result.json"))) == begun + 1
    assert "The search resumes after" in said


def test_where_no_chain_is_good_enough_the_baseline_is_chosen(search, tmp_path):
    code, said = search(
        "search=latency", "search.trials=2", "search.slots=[[gptq]]", "search.max_drop=0.5", *SPACE[1:3]
    )
    assert code == 0 and "chosen: none, the baseline: of 1 trials" in said
    assert [row["method"] for row in gather_rows(tmp_path / "sweep")] == ["none"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "The search has no budget. Set search.minutes=60, search.trials=40 or both."),
        (["search.trials=1", "technique=prune"], "`technique=prune` sets a technique, which the search chooses"),
        (["search.trials=1", "seed=1,2"], "`seed=1,2` has several values; a search takes one"),
        (["search.trials=1", "search.slots=[[prunne]]"], "did you mean `prune`?"),
        (["search.trials=1", "+search.settings.nf4.bitts=[2]"], "search.settings.nf4.bitts cannot be used"),
        (
            ["search.trials=1", "search.slots=[[awq]]", "+search.settings.awq.group_size=[7]"],
            "No chain of search.slots can work here: awq:",
        ),
    ],
)
def test_a_mistake_is_reported_in_one_line_and_nothing_is_begun(search, tmp_path, words, sentence):
    code, said = search("search=latency", *words)
    assert code == 1 and sentence in said and "Traceback" not in said and "to resume it" not in said
    assert not list(tmp_path.glob("sweep/**/result.json"))


def test_a_search_is_a_sweep(search):
    code, said = search("search=latency", "search.trials=1", flags=(), stub=False)
    assert code == 1 and "python train.py -m search=latency" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_real_search(search, tmp_path):
    words = ["search=size", "search.trials=3", "search.slots=[[none,structured],[gptq]]", "search.recovery=[finetune]",
             "search.max_drop=100", f"cache.dir={tmp_path}/cache"]  # fmt: skip
    code, said = search(*words, *SMALL, stub=False)
    assert code == 0, said
    assert said.count("baseline: from the cache") >= 3 and "chosen: " in said
    rows = gather_rows(tmp_path / "sweep")
    assert {row["split"] for row in rows} == {"test"} and rows[1]["examples"] == 128
    trials = gather_rows(tmp_path / "sweep" / "trials")
    assert {row["split"] for row in trials} == {"validation"} and trials[0]["examples"] == 64
    assert next((tmp_path / "sweep").glob("0_*/artifact/model.safetensors")).is_file()
    assert not list((tmp_path / "sweep").glob("trials/*/artifact"))
