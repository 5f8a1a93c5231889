"""The stage keeps the contract of `compress`, and clips what it should."""

from pathlib import Path

import torch
import yaml
from compress_clip.clip import Clip, clip_outliers

from compress.testing import check_technique


def test_it_keeps_the_contract():
    config = yaml.safe_load(Path(__file__).with_name("conf").joinpath("technique/stage/clip.yaml").read_text())
    check_technique(Clip, config=config)


def test_outliers_become_the_limit():
    weight = torch.tensor([[0.0, 0.0, 0.0, 4.0]])  # their standard deviation is 2
    clip_outliers(weight, deviations=1.5)
    assert weight.tolist() == [[0.0, 0.0, 0.0, 3.0]]
