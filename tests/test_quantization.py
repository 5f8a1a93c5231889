import pytest
import torch

from compress.quantization import Scheme, fitted_grid, minmax_grid, to_grid


def test_a_symmetric_grid_worked_by_hand():
    weight = torch.tensor([[0.0, 0.25, -0.7, 0.2]])
    grid = minmax_grid(weight, Scheme(3), torch.float32)  # seven steps from -0.7 to 0.7
    assert grid.scale.item() == pytest.approx(0.2)
    assert to_grid(weight, grid, Scheme(3)).tolist() == [pytest.approx([0.0, 0.2, -0.8, 0.2], abs=1e-6)]


def test_an_asymmetric_grid_worked_by_hand():
    weight = torch.tensor([[0.0, 0.3, 1.5, 1.2]])
    grid = minmax_grid(weight, Scheme(2, symmetric=False), torch.float32)  # three steps from 0 to 1.5
    assert grid.scale.item() == pytest.approx(0.5) and grid.zero.item() == -2
    assert to_grid(weight, grid, Scheme(2, symmetric=False)).tolist() == [pytest.approx([0.0, 0.5, 1.5, 1.0])]


def test_every_group_has_its_own_scale():
    weight = torch.tensor([[1.0, -0.5, 10.0, -5.0]])
    grid = minmax_grid(weight, Scheme(4, group_size=2), torch.float32)
    assert grid.scale[0, 1].item() == pytest.approx(10 * grid.scale[0, 0].item())
    assert Scheme(4, group_size=2).average_bits(4, torch.float32) == 4 + 32 / 2
    assert Scheme(4, symmetric=False).average_bits(64, torch.float16) == 4 + (16 + 4) / 64


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_fitted_grid_loses_no_more_than_one_of_the_whole_range(bits, symmetric):
    torch.manual_seed(0)
    weight, importance = torch.randn(8, 64), torch.rand(64)
    scheme = Scheme(bits, 16, symmetric)

    def lost(grid):
        return ((weight - to_grid(weight, grid, scheme)).square() * importance).unflatten(1, (4, 16)).sum(2)

    fitted = lost(fitted_grid(weight, scheme, torch.float32, importance))
    whole = lost(minmax_grid(weight, scheme, torch.float32))
    assert (fitted <= whole).all()
    assert bits == 8 or fitted.sum() < 0.95 * whole.sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_is_on_every_grid(symmetric):
    torch.manual_seed(0)
    weight = torch.rand(4, 32) + 1  # far from zero
    weight[:, ::3] = 0
    scheme = Scheme(3, 8, symmetric)
    rounded = to_grid(weight, fitted_grid(weight, scheme, torch.float32, torch.ones(32)), scheme)
    assert (rounded[weight == 0] == 0).all()
