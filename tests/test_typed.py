"""Anything that a user may type ends in a result or in one sentence, in this process, with jobs that train nothing."""

import logging
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress import command
from compress.errors import UserError
from compress.install import IS_CHECKOUT
from compress.planning import chain
from compress.planning.plan import make_plan
from compress.planning.recorded import format_repeat_command
from compress.planning.words import arrange_words
from compress.reporting.jobs import gather_rows
from compress.running import job
from compress.sweeping import callbacks


@dataclass
class Ended:
    """How a command ended: its exit status, all that it printed, and its folder."""

    status: int
    text: str
    folder: Path

    @property
    def rows(self):
        return gather_rows(self.folder)


@pytest.fixture
def type_words(tmp_path, monkeypatch, capfd):
    """Run a command whose jobs are planned and then fail, saying `planned`."""

    def stop(*args):
        raise UserError("planned")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        job,
        "prepare_experiment",
        lambda cfg, team=None: (
            make_plan(cfg),
            SimpleNamespace(fingerprint="", measured=SimpleNamespace(fingerprint="")),
            [],
        ),
    )
    monkeypatch.setattr(job, "execute_plan", stop)
    monkeypatch.setattr(callbacks.atexit, "register", lambda *args: None)
    monkeypatch.setattr(logging, "shutdown", lambda *args: None)  # Hydra's logging would close pytest's streams by it
    count = 0

    def type_words(*words, run=command.train):
        nonlocal count
        count += 1
        folder, status = tmp_path / str(count), 0
        given = {word.partition("=")[0] for word in words}
        added = [f"{key}={folder}" for key in ("hydra.run.dir", "hydra.sweep.dir") if key not in given]
        argv, environment, handlers = sys.argv, dict(os.environ), logging.getLogger().handlers[:]
        try:
            run([*words, *added])
        except SystemExit as end:
            status = end.code
        finally:
            GlobalHydra.instance().clear()
            HydraConfig.instance().cfg = None
            sys.argv, logging.getLogger().handlers = argv, handlers
            os.environ.clear()
            os.environ.update(environment)
            while callbacks.HELD:
                callbacks.HELD.pop().release()
        sentence, status = (status, 1) if isinstance(status, str) else ("", status)
        printed = capfd.readouterr()
        text = printed.out + printed.err + sentence
        assert status in (0, 1, 2) and "Traceback" not in text, text
        return Ended(status, text, folder)

    return type_words


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["~technique"], "`~technique` chooses no technique. Set technique="),
        (["+technique=prune"], "`+technique=prune` adds a technique, and every run has one. Type technique=prune"),
        (["technique=prune+"], "`technique=prune+` has an empty stage name. Type `technique=prune`"),
        (["technique.name=prune"], "Type technique=NAME."),
        (["task=[toy,sst2]"], "task is a list; one choice is expected. For a sweep type -m task=toy,sst2"),
        (["seed=[1,2]"], "seed is [1, 2]; input should be a valid integer. For a sweep type -m seed=1,2"),
        (["seed=1,2"], "`seed=1,2` has several values, and a run takes one. To sweep over it, add --multirun."),
        (["task=files", "task.path=${oc.env:NOPE}/x"], "task.path has no value (KeyError raised while resolving"),
        (["seed=${seed}"], "seed has no value (Recursive interpolation detected). Set seed=VALUE"),
        (["hydra.run.dir=${oc.env:NOPE}"], "hydra.run.dir has no value (KeyError raised"),
        (["hydra.output_subdir=null"], "hydra.output_subdir is null; the report reads .hydra. Remove"),
        (
            ["hydra.job.chdir=true"],
            "hydra.job.chdir is true; paths are those of the folder where",
        ),
        (["hydra.mode=OFTEN"], "Error merging override hydra.mode=OFTEN (Invalid value 'OFTEN', expected one of [RUN"),
        (["hydra.job.name=a/b"], "Unable to configure handler 'file'"),
        (["hydra/launcher=cloud"], "`hydra/launcher=cloud` is not a choice; expected one of basic, "),
        (["--config-name", "other"], "--config-name is 'other', which no config folder has. Set --config-name=train"),
        (["--config-name", "evaluate"], "The config has no technique. Set --config-name to one for "),
        (["--config-dir", "/nowhere"], "Additional config directory '/nowhere' not found."),
        (["--resolve"], "The --resolve flag can only be used in conjunction with --cfg or --help."),
        (["cache.dir="], "cache.dir is ''; string should have at least 1 character."),
        (["-m", "seed=glob(*)"], "`seed=glob(*)` has no value; expected one or more."),
        (["-m", "hydra.sweep.subdir=same"], "hydra.sweep.subdir is same; expected a folder for each job"),
        (["-m", "hydra.sweep.subdir=a/${hydra.job.num}"], "hydra.sweep.subdir is a/0; expected a folder for each job"),
        (["-m", "hydra.sweeper.max_batch_size=0"], "Hydra stops on AssertionError()."),
    ],
)
def test_a_mistake_is_one_sentence(type_words, words, sentence):
    ended = type_words(*words)
    assert ended.status == 1 and sentence in ended.text
    assert len([line for line in ended.text.splitlines() if line and line[0] not in "\t L"]) == 1  # Launching, #0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "artifact is not set; expected the `artifact` folder of a run. Set artifact=FOLDER."),
        (["artifact=null"], "artifact is None; one folder is expected."),
        (["artifact=2026", "seed=[1]"], "There is no folder 2026. Set artifact=FOLDER"),  # the row has no odd seed
        (["artifact={a:1}"], "artifact is {'a': 1}; a folder is expected. Set artifact=FOLDER."),
        (["artifact=${oc.env:NOPE}"], "artifact has no value (KeyError raised"),
        (["artifact=nowhere", "task.path=data", "split=validation"], "There is no folder nowhere."),
        (["report=2026"], "2026 holds no results; expected the folder of a run or a sweep"),
        (["compare={a:1,b:2}"], "compare is {'a': 1, 'b': 2}; a folder is expected."),
        (["--config-name=train"], "The config has no artifact to measure. Remove --config-name."),
    ],
)
def test_a_mistake_in_an_evaluation_is_one_sentence(type_words, words, sentence):
    ended = type_words(*words, run=command.evaluate)
    assert ended.status == 1 and sentence in ended.text and ended.text.count("\n") <= 1


def test_the_other_jobs_of_a_sweep_with_an_odd_value_are_reported(type_words):
    ended = type_words("technique=prune", "-m", "seed=1,abc,[2],${nope}", "-m", "hydra/job_logging=disabled")
    reasons = [(row["seed"], row["reason"].partition(";")[0]) for row in ended.rows]
    assert reasons == [
        (1, "planned"),
        ("abc", "seed is 'abc'"),
        ("[2]", "seed is [2]"),
        (0, "seed has no value (Interpolation key 'nope' not found). Set seed=VALUE, or set what it refers to."),
    ]
    report = (ended.folder / "results.csv").read_text()
    assert ended.status == 1 and report.count("failed") == 4 and (ended.folder / "report.html").is_file()


def test_a_value_with_blanks_is_one_setting_from_the_command_to_the_report(type_words, tmp_path):
    ended = type_words("task=files", "-m", "task.path='my data 1','my data 2'", "technique=prune")
    assert [row["overrides"] for row in ended.rows] == [["task.path='my data 1'"], ["task.path='my data 2'"]]
    assert "│ task.path='my data 1' │" in ended.text
    program = "python train.py" if IS_CHECKOUT else "compress train"
    command = f"{program} task=files 'task.path='\"'\"'my data 1'\"'\"'' technique=prune"
    assert format_repeat_command(Path(ended.rows[0]["folder"])) == command


def test_jobs_record_what_was_typed_and_not_what_it_refers_to(type_words):
    ended = type_words("task.epochs=${scaled:3,1}")
    assert [row["overrides"] for row in ended.rows] == [["task.epochs=${scaled:3,1}"]]


@pytest.mark.parametrize(
    "word",
    [
        "hydra/job_logging=none",
        "hydra/job_logging=stdout",
        "hydra/job_logging=disabled",
        "--run",
        "hydra.run.dir='x y ü'",
        "hydra.run.dir=.",
    ],
)
def test_odd_but_right_words_run(type_words, word):
    ended = type_words(word)
    assert ended.status == 1 and ended.text == "planned\n"


def test_evaluate_lists_only_the_groups_that_it_has(type_words):
    lines = type_words("--help", run=command.evaluate).text.splitlines()
    listed = [line.split(":")[0] for line in lines if ": " in line]
    assert listed == ["hardware", "task", "Every value", "Results"]


def test_windows_is_refused_at_the_door(type_words, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "fcntl" else find_spec(name))
    monkeypatch.setattr(command.platform, "system", lambda: "Windows")
    assert type_words().text == "Windows is not supported; expected Linux or macOS. Use WSL: wsl --install"


TEXT = st.text(st.sampled_from("ab1 ~=,'\"$\\{}[]()#:+-/%@!?*&|;<>\n\té🙂"), max_size=8)
VALUES = st.one_of(
    TEXT,
    TEXT.map(lambda text: f"'{text}'"),
    st.sampled_from(
        "0 -1 1e999 nan null true ??? [1,2] {a:1} a,b 1,2 range(0,1,0.5) glob(*) choice(1,a) interval(0,1) ${seed} "
        "${nope} ${oc.env:NOPE} ${now:%Y} prune prune+gptq none+none +".split()
    ),
)
KEYS = st.sampled_from(
    "seed task task.path task.limit.train task.name model model.path model.config technique technique.prune.sparsity "
    "technique.gptq.calibration hardware hardware.latency.batch_sizes baseline.epochs cache.dir cache split scale "
    "artifact report compare where.seed experiment search search.trials note hydra.job.name hydra.verbose "
    "hydra/job_logging hydra.output_subdir".split()
)
PREFIXES = st.sampled_from(["", "", "", "+", "++", "~"])
OVERRIDES = st.builds(lambda prefix, key, value: f"{prefix}{key}={value}", PREFIXES, KEYS, VALUES)
FLAGS = st.sampled_from("-m -m --multirun --run --cfg=job --cfg=x --resolve --nonsense -p --info=defaults --".split())
LINES = st.lists(st.one_of(OVERRIDES, OVERRIDES, TEXT, FLAGS), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(LINES)
def test_the_words_of_any_command_line_are_read_or_refused_in_a_sentence(words):
    try:
        arranged = chain.prepare_overrides(arrange_words(words))
    except UserError as error:
        assert any(advice in str(error) for advice in ("Type ", "type ", "Set ", "Remove ", "expected one of"))
    else:
        assert sorted(arrange_words(arranged)) == sorted(arranged)


def check_line(type_words, words, run):
    ended = type_words(*words, run=run)
    assert ended.text.strip() or ended.status == 0


PROGRAMS = st.sampled_from([command.train, command.train, command.evaluate])
WHOLE = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@settings(WHOLE, max_examples=10)
@given(LINES, PROGRAMS)
def test_any_command_line_ends_in_a_result_or_a_sentence(type_words, words, run):
    check_line(type_words, words, run)


@pytest.mark.slow
@settings(WHOLE, max_examples=300)
@given(LINES, PROGRAMS)
def test_any_of_300_command_lines_ends_in_a_result_or_a_sentence(type_words, words, run):
    check_line(type_words, words, run)
