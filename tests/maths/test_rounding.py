import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as theirs
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from compress.errors import UserError
from compress.maths import rounding
from compress.maths.rounding import (
    Grid,
    Inputs,
    Scheme,
    count_values,
    fake_quantize,
    fit_grid,
    grid_between,
    minmax_grid,
    percentile_range,
    round_to_grid,
)


def test_a_symmetric_grid_worked_by_hand():
    weight = torch.tensor([[0.0, 0.25, -0.7, 0.2]])
    grid = minmax_grid(weight, Scheme(3), torch.float32)  # seven steps from -0.7 to 0.7
    assert grid.scale.item() == pytest.approx(0.2)
    assert round_to_grid(weight, grid, Scheme(3)).tolist() == [pytest.approx([0.0, 0.2, -0.8, 0.2], abs=1e-6)]


def test_an_asymmetric_grid_worked_by_hand():
    weight = torch.tensor([[0.0, 0.3, 1.5, 1.2]])
    grid = minmax_grid(weight, Scheme(2, symmetric=False), torch.float32)  # three steps from 0 to 1.5
    assert grid.scale.item() == pytest.approx(0.5) and grid.zero.item() == -2
    assert round_to_grid(weight, grid, Scheme(2, symmetric=False)).tolist() == [pytest.approx([0.0, 0.5, 1.5, 1.0])]


def test_every_group_has_its_own_scale():
    weight = torch.tensor([[1.0, -0.5, 10.0, -5.0]])
    grid = minmax_grid(weight, Scheme(4, group_size=2), torch.float32)
    assert grid.scale[0, 1].item() == pytest.approx(10 * grid.scale[0, 0].item())
    assert Scheme(4, group_size=2).average_bits(4, torch.float32) == 4 + 32 / 2
    assert Scheme(4, symmetric=False).average_bits(64, torch.float16) == 4 + (16 + 4) / 64


def test_a_group_that_does_not_divide_all_inputs_is_refused_with_the_largest_that_does():
    inputs = {"q_proj": 576, "down_proj": 1536}  # SmolLM2
    Scheme(4, 64).check("technique.gptq", inputs)
    with pytest.raises(UserError, match=r"128, which does not divide the 576 inputs of `q_proj`. Set .*group_size=64,"):
        Scheme(4, 128).check("technique.gptq", inputs)
    with pytest.raises(UserError, match=r"Set a divisor of the inputs of every layer, or .*group_size=-1"):
        Scheme(4, 128).check("technique.gptq", {"q_proj": 72})


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_fitted_grid_loses_no_more_than_one_of_the_whole_range(bits, symmetric):
    torch.manual_seed(0)
    weight, importance = torch.randn(8, 64), torch.rand(64)
    scheme = Scheme(bits, 16, symmetric)

    def lost(grid):
        return ((weight - round_to_grid(weight, grid, scheme)).square() * importance).unflatten(1, (4, 16)).sum(2)

    fitted = lost(fit_grid(weight, scheme, torch.float32, importance))
    whole = lost(minmax_grid(weight, scheme, torch.float32))
    assert (fitted <= whole).all()
    assert bits == 8 or fitted.sum() < 0.95 * whole.sum()


def test_a_grid_for_inputs_that_correlate_worked_by_hand():
    weight, scheme = torch.tensor([[1.0, 0.2]]), Scheme(2, -1, symmetric=False)  # four levels from 0 on

    def rounded(moment):
        return round_to_grid(weight, fit_grid(weight, scheme, torch.float32, moment, steps=10), scheme)[0].tolist()

    # The wide weight has no input: 0.2 is a third of 0.6.
    assert rounded(torch.tensor([[0.0, 0.0], [0.0, 1.0]])) == pytest.approx([0.6, 0.2])
    # Both have inputs of one size: 0.05^2 + 0.117^2 is less than 0.133^2 without clipping, and than 0.1^2 + 0.1^2.
    assert rounded(torch.eye(2)) == pytest.approx([0.95, 0.95 / 3])
    # Inputs that are always equal: what the one weight loses, the other gains.
    assert rounded(torch.ones(2, 2)) == pytest.approx([0.9, 0.3])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_group_has_the_range_at_which_its_outputs_lose_least(bits, symmetric):
    torch.manual_seed(0)
    weight, inputs = torch.randn(24, 64), torch.randn(400, 64) @ torch.randn(64, 64)
    scheme = Scheme(bits, 16, symmetric)

    def lost(grid):
        difference = (round_to_grid(weight, grid, scheme) - weight).unflatten(1, (4, 16))
        return torch.einsum("tgi,rgi->trg", inputs.unflatten(1, (4, 16)), difference).square().sum(0)

    fitted = lost(fit_grid(weight, scheme, torch.float32, inputs.T @ inputs))
    whole = lost(minmax_grid(weight, scheme, torch.float32))
    assert (fitted <= whole * 1.001).all() and fitted.sum() < 0.95 * whole.sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_is_on_every_grid(symmetric):
    torch.manual_seed(0)
    weight = torch.rand(4, 32) + 1  # far from zero
    weight[:, ::3] = 0
    scheme = Scheme(3, 8, symmetric)
    rounded = round_to_grid(weight, fit_grid(weight, scheme, torch.float32, torch.ones(32)), scheme)
    assert (rounded[weight == 0] == 0).all()


def test_values_and_gradients_worked_by_hand():
    x = torch.tensor([0.26, 1.4, -3.0], requires_grad=True)  # inside the range, above it, below it
    scale = torch.tensor(0.5, requires_grad=True)
    zero = torch.tensor(0.0, requires_grad=True)
    quantized = fake_quantize(x, scale, zero, -2, 1)
    assert quantized.tolist() == [0.5, 0.5, -1.0]  # of -1, -0.5, 0 and 0.5
    quantized.sum().backward()
    assert x.grad.tolist() == [1, 0, 0]
    assert scale.grad.item() == pytest.approx((1 - 0.52) + 1 - 2)  # 0.26 / 0.5 is rounded from 0.52 to 1
    assert zero.grad.item() == pytest.approx(0 - 0.5 - 0.5)  # which moves the ends of the range


def test_a_zero_point_moves_the_range():
    x = torch.tensor([-1.0, 0.0, 0.3, 2.4, 9.0])
    assert fake_quantize(x, torch.tensor(0.8), -3, -4, 3).tolist() == pytest.approx([-0.8, 0, 0, 2.4, 4.8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_token_has_a_scale_of_its_own(dtype):
    torch.manual_seed(0)
    x = (torch.randn(3, 7, 16) * torch.logspace(-3, 3, 7)[:, None]).to(dtype)
    x[1, 2] = 0
    quantized = Inputs(Scheme(8)).quantize(x)
    args = QuantizationArgs(strategy="token", dynamic=True)
    assert torch.equal(quantized, theirs(x, *compute_dynamic_scales_and_zp(x, args, None), args))
    assert (quantized - x).abs().amax(-1).le(x.abs().amax(-1) / 127 + 1e-12).all()
    assert (quantized[1, 2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_serves_all_tokens(symmetric, dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 7, 16, dtype=dtype)
    scheme = Scheme(8, symmetric=symmetric)
    grid = grid_between(torch.tensor([-0.5, 2.0]), scheme, dtype)
    assert grid.scale.item() == pytest.approx((4.0 if symmetric else 2.5) / 255, rel=0.01)
    assert grid.zero.item() == (0 if symmetric else -128 + 51)  # a fifth of the range is below zero
    quantized = Inputs(scheme, grid).quantize(x)
    args = QuantizationArgs(strategy="tensor", symmetric=symmetric)
    assert torch.equal(quantized, theirs(x, *grid, args)) and quantized.dtype == dtype
    assert quantized.min().item() == pytest.approx(-2.0 if symmetric else -0.5, rel=0.02)


def test_attached_to_a_layer_it_quantizes_what_enters():
    layer = nn.Linear(2, 1, bias=False)
    Inputs(Scheme(8), Grid(torch.tensor([0.5]), torch.tensor([0], dtype=torch.int8))).attach(layer)
    x = torch.tensor([[0.7, 99.0]])
    with torch.no_grad():
        assert torch.equal(layer(x), torch.tensor([[0.5, 63.5]]) @ layer.weight.T)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_histogram_tells_the_ends(sign):
    x = sign * torch.cat([torch.arange(1000.0), torch.tensor([-3.0, 5e4])])
    counts = count_values(x[:500]) + count_values(x[500:])  # adds up over batches
    assert counts.sum() == 1002
    whole = torch.tensor([-3.0, 5e4]) if sign == 1 else torch.tensor([-5e4, 3.0])
    assert torch.allclose(percentile_range(counts, 100), whole, rtol=2**-8)
    most = torch.tensor([0.0, 990.0]) if sign == 1 else torch.tensor([-990.0, 0.0])
    assert torch.allclose(percentile_range(counts, 99), most, rtol=2**-7)


def test_zero_is_always_between_the_ends():
    assert percentile_range(count_values(torch.tensor([2.0, 3.0])), 100).tolist() == [0, 3]
    assert percentile_range(count_values(torch.tensor([-2.0, -3.0])), 100).tolist() == [-3, 0]


class Copies(TorchDispatchMode):
    """Counts copies between devices and dtypes."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default and (kwargs or {}).get("device") is not None
        return function(*args, **(kwargs or {}))


def test_a_grid_is_copied_to_the_device_of_the_inputs_once():
    layer = nn.Linear(2, 1, device="meta")
    Inputs(Scheme(8, symmetric=False), grid_between(torch.tensor([-0.5, 2.0]), Scheme(8), torch.float32)).attach(layer)
    copies = []
    for _ in range(3):
        with Copies() as copied:
            layer(torch.ones(1, 2, device="meta"))
        copies.append(copied.count)
    assert copies == [2, 0, 0]  # the scale and the zero point


@pytest.mark.parametrize("rows, inputs, group_size", [(70, 5000, -1), (3, 40, 8), (9000, 32, 16)])
def test_the_parts_in_which_a_grid_is_searched_change_nothing(rows, inputs, group_size, monkeypatch):
    torch.manual_seed(0)
    weight, importance = torch.randn(rows, inputs), torch.rand(inputs)
    scheme = Scheme(3, group_size, symmetric=False)
    parts = fit_grid(weight, scheme, torch.float32, importance)
    monkeypatch.setattr(rounding, "PART", 2**40)
    whole = fit_grid(weight, scheme, torch.float32, importance)
    assert parts.scale.shape == parts.zero.shape == (rows, inputs // scheme.group(inputs))
    assert ((parts.scale - whole.scale).abs() > 1e-6).float().mean() < 1e-3  # sums in another order decide ties
