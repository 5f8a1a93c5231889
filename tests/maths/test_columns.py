"""GPTQ and SparseGPT against their definition: every column is chosen for the weights that minimise the error of the
layer given the columns before it, computed in float64 without a factorization."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from torch import Tensor

from compress.maths.gptq import gptq
from compress.maths.rounding import Grid, Integers, Scheme, fit_grid, round_to_grid
from compress.maths.sparsity import mask_groups, mask_tensor, sparsegpt

COLUMNS = 72


def problem(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """Return the weights of three layers, the first pruned, and the second moment of their inputs, of which one is
    dead."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    x[:, 5] = 0
    weights = [torch.randn(rows, COLUMNS, generator=generator) for rows in (12, 7, 20)]
    weights[0][torch.rand(12, COLUMNS, generator=generator) < 0.3] = 0
    return [weight.to(dtype) for weight in weights], x.T @ x


def damp(hessian: Tensor) -> Tensor:
    return hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(COLUMNS)


def continue_weights(weight: Tensor, hessian: Tensor, errors: Tensor) -> Tensor:
    """Return the best values of the later columns, given the ``errors`` of the first ones."""
    done = errors.shape[1]
    later = torch.linalg.solve(hessian[done:, done:], hessian[done:, :done] @ errors.T).T
    return weight[:, done:] + later


def check_grid(weight: Tensor, found: Integers, groups: range, importance: Tensor) -> None:
    """Check that the grids of some groups, of which these are the weights, lose no more than the best grids."""
    scheme, dtype = found.scheme, found.grid.scale.dtype
    ours = Grid(*(part[:, groups.start : groups.stop] for part in found.grid))

    def lost(grid: Grid) -> Tensor:
        change = round_to_grid(weight, grid, scheme) - weight.float()
        return (change.square() * importance).unflatten(1, (len(groups), -1)).sum(2)

    assert (lost(ours) <= 1.001 * lost(fit_grid(weight, scheme, dtype, importance))).all()


def check_integers(weight: Tensor, hessian: Tensor, found: Integers, act_order: bool) -> None:
    scheme, integers, grid = found
    size = scheme.group(COLUMNS)
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(COLUMNS)
    ordered, damped = weight.double()[:, order], damp(hessian)[order][:, order]
    errors = ordered - found.dequantize(torch.float64)[:, order]
    importance = torch.linalg.cholesky(damped.inverse(), upper=True).diagonal().float() ** -2
    if act_order:
        check_grid(weight, found, range(COLUMNS // size), importance[order.argsort()])
    for position, column in enumerate(order.tolist()):
        continued = continue_weights(ordered, damped, errors[:, :position])
        scale, zero = (part[:, column // size].double() for part in grid)
        kept = weight[:, column] != 0
        exact = (continued[:, 0] / scale + zero).clamp(scheme.lowest, scheme.highest)
        assert (integers[:, column] - exact)[kept].abs().max() < 0.501
        assert torch.equal(integers[~kept, column].double(), zero[~kept])
        if not act_order and column % size == 0:
            members = (continued[:, :size] * (weight[:, column : column + size] != 0)).float()
            check_grid(members, found, range(column // size, column // size + 1), importance[column : column + size])


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    ("group_size", "symmetric", "dtype"),
    [(-1, True, torch.float32), (8, False, torch.bfloat16), (24, True, torch.bfloat16), (36, False, torch.float32)],
)
def test_gptq_rounds_what_minimises_the_error_given_the_columns_before(symmetric, group_size, act_order, dtype):
    weights, hessian = problem(dtype)
    schemes = [Scheme(bits, group_size, symmetric) for bits in (3, 8, 3)]
    for weight, scheme, found in zip(weights, schemes, gptq(weights, hessian, schemes, act_order=act_order)):
        assert found.scheme == scheme and found.integers.dtype is torch.int8 and found.grid.scale.dtype is dtype
        check_integers(weight, hessian, found, act_order)


def test_layers_rounded_together_are_those_rounded_alone():
    weights, hessian = problem()
    schemes = [Scheme(4, 24), Scheme(3, 24), Scheme(4, 24)]
    together = gptq(weights, hessian, schemes, act_order=True)
    for weight, scheme, found in zip(weights, schemes, together):
        alone = gptq([weight], hessian, [scheme], act_order=True)[0]
        assert torch.equal(found.grid.scale, alone.grid.scale)
        assert (found.integers != alone.integers).float().mean() < 0.01  # sums in another order


def test_eight_bits_survive_scales_of_sixteen():
    weights, hessian = problem(torch.bfloat16)
    weight = weights[1].abs() - 0.1  # almost all on one side of zero
    (found,) = gptq([weight], hessian, [Scheme(8, 8, symmetric=False)])
    zero = found.grid.zero.repeat_interleave(8, 1)
    steps = found.integers.short() - zero
    assert steps.abs().max() > 200
    read_back = (found.dequantize(torch.bfloat16).float() / found.grid.scale.float().repeat_interleave(8, 1)).round()
    assert (read_back != steps).any()  # bfloat16 weights do not say their integers
    args = QuantizationArgs(num_bits=8, symmetric=False, group_size=8)
    theirs = dequantize(found.integers, *found.grid, args, dtype=torch.bfloat16)
    assert torch.equal(found.dequantize(torch.bfloat16), theirs)


def plain_sparsegpt(
    weight: Tensor, hessian: Tensor, goal: float | tuple[int, int], block: int
) -> tuple[Tensor, Tensor]:
    """Return the mask and the weights, column by column."""
    if isinstance(goal, tuple):  # groups of large inputs first
        sizes = hessian.diagonal().view(-1, goal[1]).sum(1)
        order = torch.arange(COLUMNS).view(-1, goal[1])[sizes.argsort(descending=True, stable=True)].flatten()
        mask, result = prune_in_order(weight[:, order], hessian[order][:, order], goal, goal[1])
        return mask[:, order.argsort()], result[:, order.argsort()]
    return prune_in_order(weight, hessian, goal, block)


def prune_in_order(
    weight: Tensor, hessian: Tensor, goal: float | tuple[int, int], segment: int
) -> tuple[Tensor, Tensor]:
    """Return the mask and the weights, column by column in the given order."""
    damped, before = damp(hessian), weight == 0
    weight, mask = weight.double(), before.clone()
    factor = torch.linalg.cholesky(damped.inverse(), upper=True)
    result = torch.zeros_like(weight)
    for j in range(COLUMNS):
        continued = continue_weights(weight, damped, (weight - result)[:, :j])
        if j % segment == 0:
            inside = slice(j, min(j + segment, COLUMNS))
            score = continued[:, : inside.stop - j].square() / factor.diagonal()[inside].square()
            score = score.masked_fill(before[:, inside], -1)
            if isinstance(goal, tuple):
                mask[:, inside] |= mask_groups(score, *goal)
            else:
                due = round(goal * len(weight) * inside.stop) - round(goal * len(weight) * j)
                mask[:, inside] |= mask_tensor(score, due / score.numel())
        result[:, j] = continued[:, 0].masked_fill(mask[:, j], 0)
    return mask, result


@pytest.mark.parametrize(
    ("goals", "block"), [((0.5, 0.3, 0.7), 24), (((2, 4), (1, 4), (2, 4)), 128), (((4, 8), (2, 3), 0.5), 24)]
)
def test_sparsegpt_prunes_and_updates_column_by_column(goals, block):
    weights, hessian = problem()
    for weight, goal, found in zip(weights, goals, sparsegpt(weights, hessian, goals, block=block)):
        mask, expected = plain_sparsegpt(weight, hessian, goal, block)
        assert torch.equal(found == 0, mask)
        assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
