"""Real data and weights lie in folders of their own; without them the tests that need them are skipped."""

import os
from pathlib import Path

import pytest

BESIDE = Path(__file__).parents[2] / "shared"


def folders(variable, name):
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
