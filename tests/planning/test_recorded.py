"""`resume=FOLDER` continues a run or a sweep with its own words, and refuses other folders."""

import os
import shutil

import pytest
from omegaconf import OmegaConf
from small import SMALL
from test_kills import FORK, run_script

from compress.errors import UserError
from compress.install import CONF, format_command
from compress.planning.recorded import format_repeat_command, resume_words


def record(folder, file="multirun.yaml", conf=CONF, cwd=None, name="train"):
    """Write the file in which Hydra records a sweep or a run."""
    sources = [{"provider": "main", "path": str(conf)}]
    hydra = {
        "job": {"config_name": name},
        "runtime": {"cwd": str(cwd or os.getcwd()), "config_sources": sources},
        "overrides": {"task": ["technique=none,prune", "task.epochs=${scaled:1,2}"], "hydra": ["hydra.mode=MULTIRUN"]},
    }
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save({"hydra": hydra}, folder / file)
    return folder


def test_a_sweep_is_resumed_with_its_words_into_its_folder(tmp_path):
    folder = record(tmp_path / "it's a sweep")
    assert resume_words([f"resume={folder}"]) == [
        "--multirun",
        "technique=none,prune",
        "task.epochs=${scaled:1,2}",
        f"hydra.sweep.dir='{tmp_path}/it\\'s a sweep'",
    ]
    assert resume_words(["technique=none", "seed=1"]) == ["technique=none", "seed=1"]


def test_what_cannot_be_resumed_is_refused_on_one_line(tmp_path):
    def refused(*words):
        with pytest.raises(UserError) as error:
            resume_words(list(words))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no folder of a run or a sweep. Set resume=multirun/" in refused(f"resume={tmp_path}")
    sweep = record(tmp_path / "sweep")
    assert "`seed=2` is beside resume=" in refused(f"resume={sweep}", "seed=2")
    job = record(sweep / "0_seed-1", ".hydra/hydra.yaml")
    assert refused(f"resume={job}").endswith(f"Set resume={sweep}.")
    evaluation = record(tmp_path / "evaluation", ".hydra/hydra.yaml", name="evaluate")
    assert "is an evaluation" in refused(f"resume={evaluation}")


def test_a_record_that_hydra_did_not_write_is_refused(tmp_path):
    for number, text in enumerate(("", "hydra: 3", "a: [", "hydra: {job: {}}")):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "multirun.yaml").write_text(text)
        with pytest.raises(UserError, match=r"multirun\.yaml is not as Hydra wrote it"):
            resume_words([f"resume={tmp_path}/{number}"])


def test_the_command_that_repeats_a_job_is_its_own(tmp_path):
    folder = record(tmp_path / "run", ".hydra/hydra.yaml")
    assert format_repeat_command(folder).endswith(" technique=none,prune 'task.epochs=${scaled:1,2}'")
    folder = record(tmp_path / "evaluation", ".hydra/hydra.yaml", name="evaluate")
    assert format_repeat_command(folder).startswith(f"{format_command('evaluate')} technique=")
    folder = record(tmp_path / "own", ".hydra/hydra.yaml", name="mine")
    assert f"{format_command('train')} --config-name=mine technique=" in format_repeat_command(folder)
    assert format_repeat_command(tmp_path) == ""


def test_a_run_of_another_checkout_or_folder_is_refused_unless_it_was_moved(tmp_path):
    for place in ("conf", "cwd"):
        (tmp_path / place).mkdir()
        folder = record(tmp_path / f"run_{place}", **{place: tmp_path / place})
        with pytest.raises(UserError, match=rf"{tmp_path / place}.*Resume it from there\.$"):
            resume_words([f"resume={folder}"])
        (tmp_path / place).rmdir()
        assert resume_words([f"resume={folder}"])[0] == "--multirun"


@pytest.mark.slow
def test_a_finished_run_and_the_finished_jobs_of_a_sweep_are_left_as_they_are(tmp_path):
    def train(*words):
        (tmp_path / "log").unlink(missing_ok=True)
        process = FORK.Process(target=run_script, args=("train.py", words, tmp_path / "log"))
        process.start()
        process.join()
        assert process.exitcode == 0, (tmp_path / "log").read_text()
        return (tmp_path / "log").read_text()

    words = [*SMALL, f"cache.dir={tmp_path / 'cache'}", "baseline.epochs=0", "technique=prune"]
    run, sweep = tmp_path / "run", tmp_path / "a sweep"
    train(*words, f"hydra.run.dir={run}")
    assert "finished before" in train(f"resume={run}")
    train("-m", *words, "technique.prune.sparsity=0.2,0.5", f"hydra.sweep.dir='{sweep}'")
    done, lost = sorted(sweep.glob("*_*"))
    before = (done / "artifact" / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(lost)
    output = train(f"resume={sweep}")
    assert output.count("finished before") == 1 and sorted(sweep.glob("*_*")) == [done, lost]
    assert (done / "artifact" / "model.safetensors").stat().st_mtime_ns == before
    assert (lost / "result.json").is_file()
