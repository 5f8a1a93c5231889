"""Processes that train together on one machine."""

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from pytorch_lightning.demos.boring_classes import BoringModel
from small import SMALL
from test_command_line import ROOT
from test_conf import CONF
from test_kills import FORK  # noqa: F401  (the server of the processes, with the libraries)

from compress.cache.digests import compute_checksum
from compress.errors import UserError
from compress.planning.settings import Hardware
from compress.running import stages
from compress.running.experiment import prepare_experiment
from compress.running.resume import Checkpoints, make_trainer_options
from compress.running.team import Team, set_rank_variables

WORDS = [*SMALL, "technique=none", "hardware.devices=2", "hardware.threads=1", "baseline.epochs=3"]


def train(folder):
    words = [*WORDS, f"cache.dir={folder}/cache", f"hydra.run.dir={folder}/run"]
    return subprocess.Popen(
        [sys.executable, "train.py", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_two_processes_that_were_stopped_end_like_two_uninterrupted_ones(tmp_path):
    weights = []
    for stopped in (False, True):
        folder = tmp_path / str(stopped)
        process = train(folder)
        if stopped:
            while process.poll() is None and not list(folder.glob("cache/stages/*.partial/resume/*.ckpt")):
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.02)
            process.terminate()
            output, _ = process.communicate()
            assert process.returncode == 130, output
            process = train(folder)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        assert ("resumes after step" in output) == stopped
        weights.append(compute_checksum(folder / "run" / "artifact" / "model.safetensors"))
    assert weights[0] == weights[1]


def test_another_process_trains_and_writes_nothing(monkeypatch, tmp_path):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*SMALL, "technique=prune", f"cache.dir={tmp_path}/cache"])
    first, splits, _ = prepare_experiment(cfg)
    second = replace(first, team=SimpleNamespace(rank=1))
    trained = []
    monkeypatch.setattr(stages, "fit_module", lambda *args: trained.append(args[-1]) or (args[-3], 1.0, {}))
    for name in ("baseline", "own baseline", "own stage"):
        (tmp_path / name).mkdir()
    stages.write_baseline(first, splits, tmp_path / "baseline")
    stages.write_baseline(second, splits, tmp_path / "own baseline")
    source = tmp_path / "baseline"
    stages.apply_stage(second, splits, second.steps[0], source, source, tmp_path / "own stage")
    assert trained == ["baseline", "baseline", "prune"] and (source / "model.safetensors").is_file()
    assert not [*(tmp_path / "own baseline").iterdir(), *(tmp_path / "own stage").iterdir()]


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Asked(pl.Callback):
    def on_validation_batch_start(self, trainer, *args):
        if trainer.is_global_zero:
            os.kill(os.getpid(), signal.SIGTERM)


def stopped_in_validation(rank, port, folder):
    set_rank_variables(rank, 2)
    hardware = Hardware(accelerator="cpu", devices=2)
    callbacks = [Asked(), Checkpoints(folder)]
    trainer = pl.Trainer(
        max_epochs=2,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=False,
        **make_trainer_options(hardware, together=True),
    )
    with Team(rank, 2, "127.0.0.1", port).training(hardware):
        trainer.fit(BoringModel())


def test_the_first_process_stops_in_validation_without_waiting_for_the_others(port, tmp_path):
    both = torch.multiprocessing.start_processes(
        stopped_in_validation, (port, tmp_path), nprocs=2, join=False, start_method="forkserver"
    )
    both.processes[0].join(120)
    for process in both.processes:
        process.kill()
    assert both.processes[0].exitcode == -signal.SIGTERM


def test_the_first_process_reports_the_failure_of_another(port):
    def other():
        with Team(1, 2, "127.0.0.1", port).take_part():
            raise UserError("The disk is full.")

    def ignored():
        with pytest.raises(UserError):
            other()

    thread = threading.Thread(target=ignored)
    thread.start()
    with (
        pytest.raises(UserError, match="with this one has failed: The disk is full."),
        Team(0, 2, "127.0.0.1", port).take_part() as team,
        team.training(Hardware(accelerator="cpu")),
    ):
        pass
    thread.join()


def test_the_first_process_does_not_wait_for_a_process_that_has_ended(port):
    thread = threading.Thread(target=lambda: Team(1, 2, "127.0.0.1", port))
    thread.start()
    team = Team(0, 2, "127.0.0.1", port, alive=lambda: False)
    thread.join()
    with pytest.raises(UserError, match="has ended"), team.training(Hardware(accelerator="cpu")):
        pass
