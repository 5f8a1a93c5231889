"""What the schedules of calibration promise beside their statistics, which test_oracle.py compares with plain runs."""

import pytest
import tiny
import torch
from architectures import batch, build, inputs

from compress.errors import UserError
from compress.maths.hessian import second_moment
from compress.models.calibration import observe, sequential
from compress.models.matrices import matrices
from compress.models.products import Products

BATCHES = [{k: v for k, v in tiny.batch(seed=s).items() if k != "labels"} for s in range(3)]


def peaks(x):
    return x.abs().amax(0)


def test_batches_can_be_combined_by_other_than_their_sum():
    model = tiny.llama()
    each = [observe(model, [rows], peaks, combine=torch.maximum)[0].statistic for rows in BATCHES]
    largest = observe(model, BATCHES, peaks, combine=torch.maximum)[0].statistic
    assert torch.equal(largest, torch.stack(each).amax(0))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "albert", "deberta-v2", "t5", "mixtral"])
def test_later_matrices_see_what_the_changed_ones_compute(name):
    model = build(name)
    moments = {}
    for shared in sequential(model, [inputs()], second_moment):
        for key, matrix in shared.matrices.items():
            moments[key] = shared.statistic
            matrix.weight.mul_(1.25)
    # Once the last matrix is changed, one pass of the changed model gives every matrix the inputs that it was given,
    # except where its own later calls, in a block that is run again, see its own change.
    after = {key: shared.statistic for shared in observe(model, [inputs()], second_moment) for key in shared.matrices}
    again = name == "albert"
    equal = [torch.allclose(moments[key], after[key], rtol=1e-3, atol=1e-3 * after[key].abs().max()) for key in after]
    assert not all(equal) if again else all(equal)


def test_observing_changes_nothing_and_runs_the_model_once_a_batch():
    model = build("modernbert")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    runs = []
    hook = model.register_forward_pre_hook(lambda *_: runs.append(1))
    observe(model, [inputs(1), inputs(2)], second_moment)
    hook.remove()
    assert len(runs) == 4  # two of them on two texts: what is padding, and the order of the matrices
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_matrix_that_no_text_reaches_is_named():
    model = build("bert", add_cross_attention=True, is_decoder=True)
    with pytest.raises(UserError, match=r"without a product with `.*crossattention.*` and \d+ other matrices.*`skip`"):
        next(sequential(model, [inputs()], second_moment))


def test_an_expert_that_no_text_is_routed_to_counts_zeros():
    model = build("mixtral", num_local_experts=16)
    few = inputs(rows=1, length=3)  # three tokens reach at most six experts
    seen = {key: shared.statistic for shared in observe(model, [few], second_moment) for key in shared.matrices}
    idle = [key for key, statistic in seen.items() if not statistic.any()]
    assert set(seen) == set(matrices(model)) and idle and all(".experts." in key for key in idle)


def test_products_are_recognised_by_memory_whatever_function_multiplies():
    weight = torch.nn.Linear(4, 3)
    holder = torch.nn.Module()
    holder.layers = torch.nn.ModuleList([weight])
    x, seen = torch.randn(2, 4), []
    with Products(matrices(holder).values(), lambda matrix, inputs: seen.append(inputs)):
        for multiply in (
            lambda: weight(x),
            lambda: x @ weight.weight.T,
            lambda: torch.matmul(x, weight.weight.t()),
            lambda: torch.addmm(torch.zeros(3), x, weight.weight.T),
            lambda: torch.mm(x, weight.weight.T),
        ):
            multiply()
        x @ torch.randn(4, 3)
        weight.weight[:2] @ x.T  # a part, and from the left: no product of inputs by the matrix
    assert len(seen) == 5 and all(inputs is x for inputs in seen)


def test_labels_are_no_inputs():
    rows = batch()
    assert "labels" in rows
    observe(build("opt"), [rows], second_moment)  # texts run one by one, each with its label
