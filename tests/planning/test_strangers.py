"""A user's own folder can hold a stage, its YAML and a task to calibrate on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small import SMALL

import compress
from compress.models.matrices import matrices

ROOT = Path(__file__).parents[2]
STAGE = '''
"""A user's own stage."""

import pytorch_lightning as pl

from compress.models.batches import draw_calibration_batches
from compress.models.layers import unwrap_model
from compress.models.matrices import matrices
from compress.technique import Technique


class Halve(Technique, pl.Callback):
    keeps_head = True

    def __init__(self, factor: float = 0.5, samples: int = 8) -> None:
        self.factor = factor
        self.train_samples = samples

    def on_fit_end(self, trainer, pl_module):
        assert len(list(draw_calibration_batches(trainer, self.train_samples, 4))) == self.train_samples // 4
        for linear in matrices(unwrap_model(pl_module)).values():
            linear.weight.data *= self.factor
'''
FILES = {
    "elsewhere.py": STAGE,
    "mine/technique/stage/mine.yaml": "_target_: elsewhere.Halve\nfactor: 0.5\nsamples: 8\ncalibration: null\n",
    "mine/task/mytask.yaml": "defaults: [toy, _self_]\nname: mytask\n",
}


@pytest.fixture
def train(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)

    def train(*words):
        return subprocess.run(
            [sys.executable, str(ROOT / "train.py"), "--config-dir", "mine", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    return train


@pytest.mark.slow
def test_it_runs_is_cached_by_its_source_and_reloads(train, tmp_path):
    words = [*SMALL, "model=tiny", "task=toy", "cache.dir=cache", "technique=prune+mine+mine"]
    words += ["technique.mine.calibration=mytask", "technique.mine_2.factor=0.25"]
    whole = train(*words, "hydra.run.dir=one")
    assert whole.returncode == 0, whole.stderr[-3000:]
    loaded = compress.load(tmp_path / "one" / "artifact")
    assert loaded.description.method == "prune+mine+mine"
    assert loaded.description.history[2].settings["calibration"] == "mytask"
    again = train(*words, "hydra.run.dir=two")
    (tmp_path / "elsewhere.py").write_text(STAGE.replace("*= self.factor", "*= 3 * self.factor"))
    other = train(*words, "hydra.run.dir=three")
    assert again.returncode == other.returncode == 0, again.stderr[-3000:] + other.stderr[-3000:]
    models = [compress.load(tmp_path / name / "artifact").model for name in ("one", "two", "three")]
    first, same, larger = (next(iter(matrices(model).items()))[1].weight for model in models)
    assert first.equal(same) and larger.allclose(9 * first)


def test_it_is_listed_and_named_in_errors(train):
    assert "mine" in train("--help").stdout
    wrong = train("technique=prune+mien")
    assert "unknown stage `mien`: did you mean `prune+mine`?" in wrong.stderr + wrong.stdout
    missing = train("technique=mine", "technique.mine.calibration=mytsk")
    assert "(did you mean `mytask`?)" in missing.stderr + missing.stdout
