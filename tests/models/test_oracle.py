"""The schedules of calibration against plain runs of every text alone, for all architectures."""

import pytest
import torch
from architectures import ARCHITECTURES, batch, build

from compress.maths.hessian import second_moment
from compress.models.calibration import observe, sequential
from compress.models.matrices import matrices
from compress.models.products import Products, separate_experts

BATCHES = [{key: value for key, value in batch(seed).items() if key != "labels"} for seed in range(3)]


@torch.no_grad()
def alone():
    """Yield every text of the batches by itself, without padding."""
    for rows in BATCHES:
        for ids, mask in zip(rows["input_ids"], rows["attention_mask"]):
            yield {"input_ids": ids[None, mask.bool()], "attention_mask": mask[None, mask.bool()]}


@torch.no_grad()
def plain_moments(model):
    """Return the second moment of every matrix's inputs, all its calls counted, from runs of the whole model."""
    totals = {}

    def see(matrix, x):
        x = x.reshape(-1, x.shape[-1]).float()
        totals[matrix.name] = totals.get(matrix.name, 0) + x.T @ x

    with separate_experts(model), Products(matrices(model).values(), see):
        for text in alone():
            model(**text)
    return totals


def check(model, schedule):
    truth, seen = plain_moments(model), []
    for shared in schedule(model, BATCHES, second_moment):
        for name in shared.matrices:
            seen.append(name)
            expected = truth.get(name, torch.zeros_like(shared.statistic))  # an expert that no text was routed to
            assert torch.allclose(shared.statistic, expected, rtol=1e-3, atol=1e-4 * expected.abs().max()), name
    assert sorted(seen) == sorted(matrices(model))


@pytest.mark.parametrize("schedule", [observe, sequential])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_matrix_is_calibrated_once_on_what_the_model_alone_would_give_it(name, schedule):
    check(build(name, lm=ARCHITECTURES[name].decoder), schedule)
