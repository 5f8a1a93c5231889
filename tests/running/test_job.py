"""A job in a folder that has a history: the user's own files, a finished run, a failure, a kill."""

import json
import shutil
import time

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict
from test_conf import CONF
from test_experiment import SMALL
from test_folder import read_folder

from compress.reporting.folder import NAMES, RunFolder
from compress.reporting.jobs import CONFIG, FAILED, RESULT, gather_rows
from compress.running import experiment, job
from compress.sweeping.callbacks import Folder


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Run a job in ``tmp_path / "run"`` as Hydra does, and return its exit status."""
    config = HydraConfig.instance().cfg

    def start(*words, mode=RunMode.MULTIRUN):
        folder = tmp_path / "run"
        words = ["technique=none", *SMALL, "baseline.epochs=0", f"cache.dir={tmp_path / 'shared'}", *words]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", words, return_hydra_config=True)
        with open_dict(cfg):
            cfg.hydra.mode = mode
            cfg.hydra.sweep.dir = str(tmp_path)
            cfg.hydra.runtime.output_dir = str(folder)
            HydraConfig.instance().set_config(cfg)
            del cfg["hydra"]
        (folder / CONFIG).parent.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(cfg, folder / CONFIG)
        OmegaConf.save(words, folder / CONFIG.replace("config", "overrides"))
        return job.main(cfg)

    yield start
    HydraConfig.instance().cfg = config


def read_results(folder):
    """Return the content of all files but Hydra's, our private ones and the locks."""
    return {name: text for name, text in read_folder(folder).items() if not name.startswith((".hydra", ".job.lock"))}


def test_a_folder_of_the_users_is_refused_before_anything_is_loaded_or_written(start, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "prepare_experiment", lambda *args: pytest.fail("loaded data"))
    folder = tmp_path / "run"
    for name in NAMES:
        place = folder / name if "." in name else folder / name / "mine"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("mine")
    before = read_folder(folder)
    assert start() == 1 and start("cache.mode=off") == 1
    assert {name: text for name, text in read_folder(folder).items() if not name.startswith(".hydra")} == before
    with pytest.raises(SystemExit, match=r"hydra\.run\.dir is .* which holds result\.json, artifact, report,"):
        Folder().on_run_start(
            OmegaConf.create(
                {"hydra": {"run": {"dir": str(folder)}, "output_subdir": ".hydra", "job": {"chdir": False}}}
            )
        )
    assert not (folder / ".lock").exists() and not (folder / ".compress").exists()


class Killed(BaseException):
    """The process ends, and nothing of it runs any more."""


def stop_with(error):
    def stop(*args, **options):
        raise error

    return stop


def test_a_finished_job_stays_until_its_successor_is_whole(start, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "run"
    mine = {"data.csv": b"mine", "cache/stages/mine": b"mine", "notes/results.csv": b"mine"}
    for name, text in mine.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)

    # A run leaves its results, and the user's files as they were
    assert start("cache.mode=off", mode=RunMode.RUN) == 0
    first = read_results(folder)
    assert mine.items() <= first.items() and {RESULT, "results.csv", "report.html", "artifact/compress.json"} <= {
        *first
    }
    assert not (folder / ".compress" / "cache").exists() and not (folder / ".compress" / "new").exists()

    # A wrong value, Ctrl-C and a kill leave them as they were
    wrong = ("technique=gptq", "technique.gptq.bits=5")
    assert start(*wrong) == 1 and read_results(folder) == first
    (row,) = gather_rows(tmp_path)
    assert row["status"] == "failed" and "bits is 5" in row["reason"] and "earlier run is kept" in row["reason"]
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "measure_artifacts", stop_with(KeyboardInterrupt()))
        with pytest.raises(SystemExit):
            start("seed=1")
        assert read_results(folder) == first and "stopped by Ctrl-C" in (folder / FAILED).read_text()
        patch.setattr(experiment, "measure_artifacts", stop_with(Killed()))
        with pytest.raises(Killed):
            start("seed=1")
        assert read_results(folder) == first

    # A job killed while its results replace the old ones is finished by the next
    with monkeypatch.context() as patch:
        settle = RunFolder.settle
        patch.setattr(RunFolder, "settle", lambda run: stop_with(Killed())() if run.ready.is_dir() else settle(run))
        with pytest.raises(Killed):
            start("seed=1")
    caplog.clear()
    assert start("seed=1") == 0 and "finished before" in caplog.text
    second = read_results(folder)
    assert json.loads(second[RESULT])["rows"][0]["seed"] == 1 and mine.items() <= second.items()
    assert not (folder / FAILED).exists()

    # A lost artifact is made again; another number of threads and metric take the same baseline, a refresh another
    shutil.rmtree(folder / "artifact")
    caplog.clear()
    assert start("seed=1") == 0 and "baseline: from the cache" in caplog.text
    assert (folder / "artifact" / "compress.json").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "write_baseline", lambda *args: pytest.fail("trained the baseline again"))
        assert start("seed=1", "hardware.threads=2", "task.metrics=[accuracy,matthews]", "task.limit.test=100") == 0
    assert "matthews" in json.loads((folder / RESULT).read_text())["rows"][0]
    caplog.clear()
    monkeypatch.setattr(job, "BEGAN", time.time())  # as in a new process
    assert start("seed=1", "hardware.threads=2", "cache.mode=refresh") == 0
    assert "from the cache" not in caplog.text and "finished before" not in caplog.text
