"""What tests of several folders share: real data and weights, and whole runs on the built-in ones."""

import copy
import gc
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
from small import SMALL


@pytest.hookimpl(tryfirst=True)  # before the marks select tests
def pytest_collection_modifyitems(config, items):
    """Mark the tests of real data and weights as slow. With ``--no-loadscope-reorder`` files with slow tests come
    first, and then those with many: at the end no worker waits for a long file."""
    for item in items:
        if {"shared_data", "shared_models"} & set(item.fixturenames):
            item.add_marker("slow")
    if not getattr(config.option, "loadscopereorder", True):
        counts = Counter(item.path for item in items)
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: (item.path not in slow, -counts[item.path]))


def pytest_collection_finish():
    """Start the server of forked commands if a test has one, and leave the imported libraries out of garbage
    collections: a run collects after every stage, 0.3 s each."""
    if "test_kills" in sys.modules:
        sys.modules["test_kills"].start_server()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def keep_yaml():
    """Parse every YAML of Hydra's once, which is a fifth of composing a config."""
    from hydra._internal.core_plugins.file_config_source import FileConfigSource

    load, known = FileConfigSource.load_config, {}

    def load_config(source, config_path):
        file = Path(source.path, source._normalize_file_name(config_path))
        key = (source.provider, file, file.is_file() and file.stat().st_mtime_ns)
        if key not in known:
            known[key] = load(source, config_path)
        return copy.deepcopy(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileConfigSource, "load_config", load_config)
        yield


BESIDE = Path(__file__).parents[2] / "shared"


def folders(variable, name):
    """Return a function that finds a folder of real data or weights, or skips the test without it."""
    root = Path(os.environ.get(variable, BESIDE / name))

    def folder(child):
        if not (root / child).is_dir():
            pytest.skip(f"there is no {root / child}: set {variable} to a folder with {child}")
        return root / child

    return folder


@pytest.fixture
def shared_data():
    return folders("COMPRESS_DATA", "data")


@pytest.fixture
def shared_models():
    return folders("COMPRESS_MODELS", "models")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def carry_out(cache, tmp_path, monkeypatch):
    """Run an experiment with its results in ``tmp_path``; all tests of a process share a cache."""
    from hydra import compose, initialize_config_dir

    from compress.install import CONF
    from compress.running import experiment
    from compress.runtimes import timing

    monkeypatch.setattr(timing, "PAUSE_S", 0)  # no test depends on exact times

    def carry_out(*overrides, model="tiny", task="toy"):
        chosen = [f"model={model}", f"task={task}", f"cache.dir={cache}", *SMALL, *overrides]
        if "gptq" in overrides[0]:
            chosen.append("technique.gptq.samples=16")
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", chosen)
        return experiment.run_experiment(cfg, tmp_path)

    return carry_out
