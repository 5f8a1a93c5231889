import pytest
import torch

from compress.maths.rounding import Scheme, minmax_grid, round_to_nearest, straight_through_round
from compress.maths.signround import LEAST_SHARE, Rounding, search_shares

SCHEMES = [Scheme(bits, size, symmetric) for bits in (2, 4) for size in (-1, 8) for symmetric in (True, False)]


def random_rounding(scheme, seed=0):
    """Return a rounding in the middle of its descent, of weights with zeros."""
    torch.manual_seed(seed)
    weight = torch.randn(6, 16) * (torch.rand(6, 16) > 0.2)
    rounding = Rounding(weight, scheme, torch.float32)
    rounding.learnt.offsets.uniform_(-0.5, 0.5).masked_fill_(rounding.groups == 0, 0)
    rounding.learnt.shares.uniform_(0.5, 0.9)
    return weight, rounding


def differentiate(rounding, gradient):
    """Return the gradients of offsets and shares by autograd, of the formula of the paper."""
    scheme, levels = rounding.scheme, 2**rounding.scheme.bits - 1
    offsets, shares = (part.clone().requires_grad_() for part in rounding.learnt)
    low, high = shares * torch.stack([rounding.low, rounding.high])
    if scheme.symmetric:
        scale, zero = 2 * torch.maximum(-low, high)[:, :, None] / levels, 0
    else:
        scale = (high - low)[:, :, None] / levels
        zero = straight_through_round(scheme.lowest - low[:, :, None] / scale)
    places = (rounding.groups / scale + offsets + zero).clamp(scheme.lowest, scheme.highest)
    values = ((straight_through_round(places) - zero) * scale).flatten(1)
    (values * gradient).sum().backward()
    return values, offsets.grad, shares.grad


def test_a_step_worked_by_hand():
    rounding = Rounding(torch.tensor([[1.4, -3.5, 0.0]]), Scheme(3), torch.float32)  # steps of 1
    assert rounding.round().integers.tolist() == [[1, -4, 0]]  # -3.5 to the even number
    rounding.step(torch.tensor([[-1.0, -1.0, -1.0]]), 0.25, clip=False)
    assert rounding.learnt.offsets.flatten().tolist() == [0.25, 0.25, 0]  # a zero does not move
    assert rounding.round().integers.tolist() == [[2, -3, 0]]
    rounding.step(torch.tensor([[-1.0, 0.0, -1.0]]), 0.75, clip=False)
    assert rounding.learnt.offsets.flatten().tolist() == [0.5, 0.25, 0]
    rounding.step(torch.tensor([[0.0, 2.0, 0.0]]), 0.1)  # the slope of the scale is 2 (-3 + 3.5), above 0
    assert rounding.learnt.shares.flatten().tolist() == pytest.approx([0.9, 1])  # the lowest value has the widest range


@pytest.mark.parametrize("scheme", SCHEMES)
def test_steps_follow_the_signs_of_the_gradients(scheme):
    weight, rounding = random_rounding(scheme)
    gradient = torch.randn(weight.shape)
    values, by_offset, by_share = differentiate(rounding, gradient)
    assert torch.allclose(rounding.round().dequantize(torch.float32), values, atol=1e-6)
    before = rounding.learnt.copy()
    rounding.step(gradient, 1e-3)
    kept = rounding.groups != 0
    moved = (before.offsets - rounding.learnt.offsets) / 1e-3
    inside = (before.offsets - 1e-3 * by_offset.sign()).abs() <= 0.5
    assert torch.allclose(moved[kept & inside], by_offset.sign()[kept & inside], atol=1e-3)
    assert torch.allclose((before.shares - rounding.learnt.shares) / 1e-3, by_share.sign(), atol=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_stay_and_the_start_is_rounding_to_nearest(scheme):
    weight, moved = random_rounding(scheme)
    nearest = round_to_nearest(weight, minmax_grid(weight, scheme, torch.float32), scheme)
    begun = Rounding(weight, scheme, torch.float32).round()
    assert torch.equal(begun.integers, nearest.integers) and torch.equal(begun.grid.scale, nearest.grid.scale)
    for _ in range(9):
        moved.step(torch.randn(weight.shape), 0.3)
    assert moved.learnt.offsets.abs().max() <= 0.5
    assert moved.learnt.shares.min() >= LEAST_SHARE and moved.learnt.shares.max() <= 1
    assert (moved.round().dequantize(torch.float32)[weight == 0] == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_searched_ranges_lose_less_than_the_whole_ones(symmetric):
    torch.manual_seed(0)
    weight, scheme = torch.randn(8, 64), Scheme(3, 32, symmetric)
    importance = torch.rand(64)

    def lost(**settings):
        values = Rounding(weight, scheme, torch.float32, **settings).round().dequantize(torch.float32)
        return ((values - weight).square() * importance).sum()

    assert lost(shares=search_shares(weight, scheme, torch.float32, importance)) < 0.9 * lost()
