import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from compress.errors import UserError
from compress.maths.gptq import gptq
from compress.maths.hessian import Sweep, factorize, output_error, row_errors, second_moment
from compress.maths.rounding import Scheme
from compress.maths.sparsity import sparsegpt


@pytest.mark.parametrize("width", [1, 7, 16, 40, 64])
def test_a_second_moment_is_multiplied_once_and_mirrored(width):
    torch.manual_seed(0)
    x = torch.randn(50, 40)
    moment = second_moment(x, width)
    assert torch.allclose(moment, x.T @ x, atol=1e-5)


def test_a_factor_worked_by_hand():
    # [[2, 1], [1, 4]] = [[1, 1/4], [0, 1]] diag(7/4, 4) [[1, 0], [1/4, 1]]
    upper, diagonal = factorize(torch.tensor([[2.0, 1.0], [1.0, 4.0]]), damping=1e-9)
    assert torch.allclose(upper, torch.tensor([[1.0, 0.25], [0.0, 1.0]]))
    assert torch.allclose(diagonal, torch.tensor([1.75, 4.0]))


def test_a_factor_is_that_of_the_damped_hessian_and_its_pivots_are_those_of_the_inverse():
    torch.manual_seed(0)
    x = torch.randn(30, 20)
    hessian = x.T @ x
    before = hessian.clone()
    upper, diagonal = factorize(hessian, 0.01)
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(20)
    assert torch.allclose((upper * diagonal @ upper.T).double(), damped, rtol=1e-5, atol=1e-4)
    inverse = torch.linalg.cholesky(damped.inverse(), upper=True)
    assert torch.allclose(diagonal.double(), inverse.diagonal() ** -2, rtol=1e-4)
    assert torch.equal(hessian, before)


def test_damping_grows_until_the_factor_is_exact():
    rank_one = torch.ones(8, 1) @ torch.ones(1, 8)
    upper, diagonal = factorize(rank_one, 1e-12)
    assert upper.isfinite().all() and (diagonal > 1e-7).all()
    with pytest.raises(UserError, match=r"not invertible at any damping; the inputs hold NaN or infinity"):
        factorize(torch.full((4, 4), torch.nan), 0.01)


def test_the_factor_of_inputs_that_are_all_zero_is_finite():
    upper, diagonal = factorize(torch.zeros(4, 4), 0.01)
    assert torch.equal(upper, torch.eye(4)) and (diagonal > 0).all()


def test_what_a_sweep_holds_is_freed_at_once():
    current = []

    class Watched(Sweep):
        def run(self):
            super().run()
            current.append(weakref.ref(self.current))

    weight = torch.randn(40, 3)
    Watched(weight, factorize(torch.eye(40), 0.01), 40, lambda *_: None, lambda _, column: column).run()
    assert current[0]() is None  # no cycle that would wait for the garbage collector


class HostReads(TorchDispatchMode):
    """Counts the values that are read on the host, each of which would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "compress",
    [
        lambda weight, hessian: gptq([weight], hessian, [Scheme(4, 16)], act_order=True),
        lambda weight, hessian: gptq([weight], hessian, [Scheme(4, 16, symmetric=False)], act_order=False),
        lambda weight, hessian: sparsegpt([weight], hessian, [(2, 4)]),
    ],
)
def test_no_column_is_read_on_the_host(compress):
    counts = []
    for columns in (32, 128):
        weight, x = torch.randn(8, columns), torch.randn(200, columns)
        with HostReads() as reads:
            compress(weight, x.T @ x)
        counts.append(reads.count)
    assert counts[0] == counts[1] <= 4


@pytest.mark.parametrize("width", [3, 8, 512])
def test_the_error_of_the_outputs_is_that_of_their_tokens(width):
    torch.manual_seed(0)
    inputs, error = torch.randn(40, 8), torch.randn(5, 8)
    expected = (inputs @ error.T).square().sum(0)
    assert torch.allclose(row_errors(error, second_moment(inputs), width), expected, rtol=1e-5)
    assert output_error(error, second_moment(inputs)) == pytest.approx(expected.sum().item(), rel=1e-5)
