"""Every stage keeps its promises on a model whose answers are vectors."""

import pytest
from hydra.utils import get_class
from test_testing import NAMES, SETTINGS, TRAINED, read_config

from compress.technique import Training
from compress.testing import Case, check_promises, make_embedding

DECODERS = ("gguf", "rotate")
"""Stages that no encoder fits."""


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DECODERS])
def test_a_stage_keeps_its_promises(name):
    training = Training(epochs=1, learning_rate=1e-2) if name in TRAINED else Training()
    technique = get_class(read_config(name)["_target_"])
    check_promises(Case(technique, SETTINGS.get(name, {}), training, models=(make_embedding,)))
