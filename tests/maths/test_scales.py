"""Scales of channels, worked by hand."""

import torch

from compress.maths.scales import max_per_source, mean_per_source, raise_smallest, smoothing_scale


def test_smoothing_makes_activations_and_weights_equally_large():
    scale = smoothing_scale(torch.tensor([16.0, 1.0, 0.0, 5.0]), torch.tensor([1.0, 4.0, 1.0, 0.0]), 0.5)
    assert scale.tolist() == [4, 0.5, 1, 1]  # 16 / 4 = 1 * 4, 1 / 0.5 = 4 * 0.5; nothing to gain for the others
    assert smoothing_scale(torch.tensor([16.0]), torch.tensor([2.0]), 1.0).item() == 16


def test_inputs_of_the_same_channel_are_reduced_together():
    source, x = torch.tensor([0, 1, 0]), torch.tensor([1.0, 2.0, 3.0])
    assert max_per_source(source, x).tolist() == [3, 2]
    assert mean_per_source(source, x).tolist() == [2, 2]


def test_channels_that_are_almost_never_active_count_as_a_ten_thousandth_of_the_mean():
    magnitudes = torch.tensor([1.0] * 99 + [1e-30])
    assert torch.allclose(raise_smallest(magnitudes)[-1], torch.tensor(0.99e-4))
    scale = smoothing_scale(magnitudes, torch.ones(100), 1.0)
    assert (1 / scale).half().isfinite().all()
