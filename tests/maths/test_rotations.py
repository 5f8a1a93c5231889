import numpy as np
import pytest
import torch

from compress.maths.rotations import has_hadamard, make_hadamard, make_rotation, rotate_columns, rotate_rows

SIZES = (1, 2, 12, 20, 28, 36, 44, 60, 64, 76, 96, 128, 576, 768, 896, 960, 1152, 1536)


@pytest.mark.parametrize("size", SIZES)
def test_rows_of_ones_are_orthogonal(size):
    matrix = make_hadamard(size)
    assert has_hadamard(size) and set(np.unique(matrix)) <= {-1, 1}
    assert np.array_equal(matrix @ matrix.T, size * np.eye(size))


@pytest.mark.parametrize("size", [0, 3, 6, 18, 90, 52, 92])  # 52 and 92 exist, by constructions that are not here
def test_unknown_sizes_are_refused(size):
    assert not has_hadamard(size)
    with pytest.raises(ValueError, match=f"of size {size} is known"):
        make_hadamard(size)


@pytest.mark.parametrize(("kind", "size"), [("hadamard", 24), ("random", 24), ("random", 7), ("random", 1)])
def test_rotations_are_orthogonal_and_differ_by_seed(kind, size):
    rotation = make_rotation(size, kind, 0)
    assert torch.allclose(rotation @ rotation.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(rotation, make_rotation(size, kind, 0))
    assert size == 1 or not torch.equal(rotation, make_rotation(size, kind, 1))
    assert kind == "random" or torch.allclose(rotation.abs(), torch.full((), 24**-0.5, dtype=torch.float64))


def test_one_large_channel_is_spread_over_all():
    torch.manual_seed(0)
    states = torch.randn(100, 64)
    states[:, 5] *= 50
    rotated = rotate_columns(states, make_rotation(64, "hadamard", 0))
    assert rotated.abs().max() < 0.25 * states.abs().max()
    assert torch.allclose(rotated.norm(dim=1), states.norm(dim=1))


def test_rows_and_columns_rotate_in_runs():
    torch.manual_seed(0)
    before, after, x = torch.randn(6, 5), torch.randn(4, 6), torch.randn(3, 5)
    rotation = make_rotation(3, "random", 0)
    hidden = x @ rotate_rows(before, rotation).T
    assert torch.allclose(hidden, rotate_columns(x @ before.T, rotation), atol=1e-6)
    assert torch.allclose(hidden @ rotate_columns(after, rotation).T, x @ before.T @ after.T, atol=1e-5)
    assert torch.allclose(rotate_rows(before[:, 0], rotation), rotate_rows(before, rotation)[:, 0])
