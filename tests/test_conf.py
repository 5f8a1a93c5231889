"""Check every YAML of conf/ as shipped: its first comment is a command that uses it. New files need no edit here."""

import inspect
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict
from transformers import PretrainedConfig

from compress.models.backbone import Backbone
from compress.planning.chain import PACKAGE, drop_unused_settings, expand_jobs, read_stages
from compress.planning.settings import to_plain
from compress.sweeping import sweeper as _sweeper  # noqa: F401  (whose sweepers the configs name)
from compress.tasks.task import Task

CONF = Path(__file__).parents[1] / "conf"
FILES = sorted(str(path.relative_to(CONF)) for path in CONF.rglob("*.yaml"))


@pytest.fixture(autouse=True)
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def command(file):
    """Return the words of the command in the file's first comment, without `python`."""
    lines = (CONF / file).read_text().splitlines()
    first = next((line for line in lines if not line.startswith("# @package")), "")
    assert first.startswith(("# python train.py", "# python evaluate.py")), (
        f"conf/{file} starts with {first!r}: start it with the command that uses it, "
        f"e.g. `# python train.py {Path(file).parent}={Path(file).stem}`."
    )
    return shlex.split(first[2:], comments=True)[1:]


def jobs(program, overrides, every=True):
    """Return the configs of a command: one, or those of its sweep. Without ``every`` only the last job of each
    technique."""

    def chosen(jobs):
        by_technique = {next((word for word in job if word.startswith("technique=")), ""): job for job in jobs}
        return jobs if every else list(by_technique.values())

    def split(words):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parsed = parser.parse_overrides(words)
        if any(word.key_or_group == "technique" and word.is_sweep_override() for word in parsed):
            return expand_jobs(parsed, "none")
        return BasicSweeper.split_arguments(parsed, None)[0]

    def composed(words):
        try:
            return compose(program, words, return_hydra_config=True)
        except MissingConfigException as error:
            if (error.missing_cfg_file or "").startswith("hydra/"):
                pytest.skip(f"{error.missing_cfg_file} comes with a Hydra plugin that is not installed")
            raise

    configs = [composed(words) for words in chosen(split(overrides))]
    sweeper = configs[0].hydra.sweeper
    params = sweeper.get("params") if sweeper._target_ == f"{PACKAGE}.ChainSweeper" else None
    if params:  # the sweep of an experiment
        words = split([f"{key}={value}" for key, value in params.items()] + overrides)
        configs = [composed(job) for job in chosen(words)]
    return configs


def uses(config, program, file):
    """Return whether the config's defaults list contains the file, directly or through another file."""
    loader, overrides = GlobalHydra.instance().config_loader(), config.hydra.overrides
    found = loader.compute_defaults_list(program, [*overrides.hydra, *overrides.task], RunMode.RUN).defaults
    used = {default.config_path for default in found}
    if "technique/none" in used:
        used.add("technique/stage/none")  # a choice without a stage: there is nothing to load
    return file.removesuffix(".yaml") in used


@pytest.mark.parametrize("file", FILES)
def test_its_command_composes_and_uses_it(file, monkeypatch):
    script, *words = command(file)
    program = script.removesuffix(".py")
    configs = jobs(program, [word for word in words if "=" in word and not word.startswith("-")], every=False)
    assert any(uses(config, program, file) for config in configs), f"the command in conf/{file} does not use it"
    for config in configs:
        if "technique" in config:
            drop_unused_settings(config.technique, config.hydra.overrides.task)
            read_stages(config.technique)
        with open_dict(config):
            config.hydra.runtime.output_dir = "."
            monkeypatch.setattr(HydraConfig.instance(), "cfg", config.copy())
            del config["hydra"]
        OmegaConf.to_container(config, resolve=True)  # an interpolation that leads nowhere raises


@pytest.mark.parametrize("file", FILES)
def test_its_package_is_where_hydra_reads_it(file):
    # Hydra reads `# @` headers only up to the first other line, and does not report later ones.
    assert not any(line.startswith("# @") for line in (CONF / file).read_text().splitlines()[1:])


@pytest.mark.parametrize("name", [Path(file).stem for file in FILES if Path(file).parent.name == "model"])
def test_a_models_architecture_can_be_built_for_the_task_of_its_command(name):
    words = [word for word in command(f"model/{name}.yaml")[1:] if "=" in word]
    cfg = compose("train", [word for word in words if not word.startswith("model.path")])
    if cfg.model.config is None:
        pytest.skip("it is whatever the user's folder holds")
    backbone, task = Backbone(**{**to_plain(cfg.model), "path": None}), Task(**to_plain(cfg.task))
    skeleton = backbone.skeleton(task)
    # A key that the architecture does not know would be stored and change nothing.
    code = "".join(inspect.getsource(inspect.getmodule(type(each))) for each in (skeleton, skeleton.config))
    assert not [
        key for key in backbone.config if key not in (*PretrainedConfig().to_dict(), "model_type") and key not in code
    ]


def test_the_test_sees_the_files():
    assert {"train.yaml", "technique/stage/prune.yaml", "model/tiny.yaml", "task/toy.yaml"} <= set(FILES)


def test_a_misspelt_experiment_is_refused():
    with pytest.raises(Exception, match="experiment"):
        compose("train", ["experiment=no_such_experiment"])
