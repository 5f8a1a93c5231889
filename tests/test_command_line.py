"""The command line, up to the call of `compress.running.job`."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "pytorch_lightning", "datasets", "pandas", "rich", "matplotlib"}

STAND_IN = """
import runpy, sys, types
from hydra.core.hydra_config import HydraConfig
from compress.planning.chain import read_stages

def main(cfg):
    keys = "+".join(stage.key for stage in read_stages(cfg.technique))
    print("ran", keys or None, cfg.seed, HydraConfig.get().runtime.output_dir)
    return FAILED

sys.modules["compress.running.job"] = types.SimpleNamespace(main=main)
runpy.run_path(TRAIN, run_name="__main__")
"""


def python(*args, check=True, **env):
    command = [sys.executable, *args]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


def cpu_seconds(*args):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    python(*args)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture
def train(tmp_path):
    """Run train.py with a stand-in for `compress.running.job` that only prints, and without a sweep's report."""
    (tmp_path / "no_report.yaml").write_text(
        "defaults: [model: tiny, task: toy, technique: none, hardware: auto, _self_]\n"
        "seed: 0\n"
        "hydra:\n"
        f"  sweep: {{dir: {tmp_path}/out, subdir: '${{slug:${{hydra.job.num}},${{hydra.job.override_dirname}}}}'}}\n"
        f"  run: {{dir: {tmp_path}/out}}\n"
    )

    def run(*args, fail=False):
        script = tmp_path / "stand_in.py"
        script.write_text(f"FAILED, TRAIN = {int(fail)}, {str(ROOT / 'train.py')!r}\n{STAND_IN}")
        flags = ["--config-dir", str(tmp_path), "--config-name", "no_report"]
        done = python(str(script), *flags, *args, check=False, PYTHONPATH=str(ROOT))
        return done, [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("ran")]

    return run


def test_help_is_for_a_newcomer():
    text = python("train.py", "--help").stdout
    groups = dict(line.split(": ") for line in text.splitlines() if line.count(": ") == 1 and line[0] != " ")
    assert {"none", "prune", "gptq"} <= set(groups["technique"].split(", "))
    assert {"model", "task", "hardware"} <= set(groups)
    assert ("experiment" in groups) == any((ROOT / "conf/experiment").glob("*.yaml"))
    assert "technique/stage" not in text and "technique=prune+gptq" in text and "multirun/" in text
    assert text.count("  python train.py") >= 4 and len(text.splitlines()) < 35


@pytest.mark.parametrize("args", [["--help"], ["--cfg", "job", "technique=prune+gptq"], ["-sc", "query=bash"]])
def test_commands_without_a_model_import_nothing_heavy(args):
    shown = python("-X", "importtime", "train.py", *args, COMP_LINE="python train.py technique=").stderr
    imported = {line.split("|")[-1].strip().split(".")[0] for line in shown.splitlines()}
    assert "hydra" in imported and not imported & HEAVY


@pytest.mark.parametrize("args", [["--help"], ["--cfg", "job", "technique=prune+gptq"]])
def test_commands_without_a_model_cost_less_than_the_import_of_torch(args):
    assert cpu_seconds("train.py", *args) < 0.8 * cpu_seconds("-c", "import torch")


def test_cfg_and_info_show_the_chain():
    assert "name: gptq+prune\n" in python("train.py", "--cfg", "job", "technique=gptq+prune").stdout
    shown = python("train.py", "--info", "defaults", "technique=gptq+prune").stdout
    assert shown.index("technique/stage/gptq ") < shown.index("technique/stage/prune ")
    assert "conf" in python("train.py", "--info", "searchpath").stdout


@pytest.mark.parametrize("args", [[], ["-m"], ["--help"], ["--info", "defaults"], ["--cfg", "job"]])
def test_a_misspelt_stage_is_reported_without_a_traceback(args, tmp_path):
    chains = "technique=none,gptq+prunne" if args == ["-m"] else "technique=gptq+prunne"
    done = python("train.py", *args, chains, f"hydra.run.dir={tmp_path}", check=False)
    assert done.returncode == 1
    assert "did you mean `gptq+prune`?" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("word", ["technique=null", "model="])
def test_a_group_without_a_choice_is_reported_without_a_traceback(word):
    done = python("train.py", word, check=False)
    assert done.returncode == 1 and done.stderr.startswith(f"`{word}` chooses no {word.partition('=')[0]}")
    assert "Traceback" not in done.stderr


def test_a_run_ends_with_what_happened(train):
    done, ran = train("technique=prune+gptq")
    assert done.returncode == 0 and [keys for keys, *_ in ran] == ["prune+gptq"]
    assert train(fail=True)[0].returncode == 1


def test_a_sweep_runs_every_combination_in_a_folder_of_its_own(train):
    done, ran = train("-m", "technique=none,prune+gptq+prune", "model=tiny,tiny_llama", "seed=7")
    assert done.returncode == 0
    assert [keys for keys, *_ in ran] == ["None", "None", "prune+gptq+prune_2", "prune+gptq+prune_2"]
    folders = [Path(folder).name for *_, folder in ran]
    assert folders[0] == "0_model-tiny_seed-7_technique-none"
    assert folders[3] == "3_model-tiny_llama_seed-7_technique-prune+gptq+prune"


def test_a_sweep_sets_stages_that_not_every_chain_has(train):
    done, ran = train(
        "-m", "technique=none,prune,prune+gptq", "technique.prune.sparsity=0.5", "technique.gptq.bits=3,4"
    )
    assert done.returncode == 0, done.stderr
    assert [keys for keys, *_ in ran] == ["None", "prune", "prune+gptq", "prune+gptq"]


@pytest.mark.parametrize("words", [["technique=gptq"], ["-m", "technique=gptq,none"]])
def test_a_stage_that_is_set_and_in_no_chain_is_reported_without_a_traceback(words):
    done = python("train.py", *words, "technique.prune.sparsity=0.5", check=False)
    assert done.returncode == 1 and done.stderr.endswith("e.g. `technique=prune+gptq`.\n")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["technique=gptq", "technique.gptq.bitz=3"],
            " (did you mean `technique.gptq.bits`?); technique.gptq has ",
        ),
        (
            ["-m", "technique=gptq", "technique.gptq.bitz=3,4"],
            " (did you mean `technique.gptq.bits`?); technique.gptq has ",
        ),
        (["experiment=bert_semeval", "technique.gptq.bits=3"], "the chain `none` has no stage `gptq`"),
        (["hardware.nowhere.x=1"], ", latency. Type `+hardware.nowhere.x=1` to add it.\n"),
        (["task=sst3"], "`task=sst3` is not a choice (did you mean `task=sst2`?); expected one of agnews, "),
        (["task=sst2,cola"], "To sweep over it, add --multirun"),
    ],
)
def test_an_unknown_setting_or_choice_is_reported_with_the_known_ones(words, sentence, tmp_path):
    done = python("train.py", *words, f"hydra.sweep.dir={tmp_path}", check=False)
    assert done.returncode == 1 and sentence in done.stderr
    assert "Traceback" not in done.stderr and "FULL_ERROR" not in done.stderr


def test_a_traceback_is_shown_where_hydra_is_asked_for_one():
    assert "Traceback" in python("train.py", "task=sst3", check=False, HYDRA_FULL_ERROR="1").stderr


def test_a_failed_job_does_not_stop_a_sweep(train):
    _, ran = train("-m", "technique=prune", "seed=1,2", fail=True)
    assert [seed for _, seed, _ in ran] == ["1", "2"]


def test_a_sweep_of_one_and_one_with_odd_overrides(train, tmp_path):
    done, ran = train("-m", "technique=prune+gptq", "+model.path=/a/b", "+note=" + "y" * 300)
    assert done.returncode == 0 and len(ran) == 1
    assert (tmp_path / "out").resolve() == Path(ran[0][-1]).resolve().parent
