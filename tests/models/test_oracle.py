"""The schedules of calibration against plain passes over every text alone, for all architectures."""

import pytest
import torch
from architectures import ARCHITECTURES, batch, build

from compress.maths.hessian import second_moment
from compress.models.calibration import observe, sequential
from compress.models.matrices import count_block_weights, matrices
from compress.models.products import Products, separate_experts

BATCHES = [batch(seed) for seed in range(3)]


def without_labels(rows):
    return {key: value for key, value in rows.items() if key != "labels"}


@torch.no_grad()
def plain_moments(model):
    """The second moment of every matrix's inputs, by a run of the whole model on every text alone, without padding."""
    totals = {}

    def see(matrix, x):
        x = x.reshape(-1, x.shape[-1]).float()
        totals[matrix.name] = totals.get(matrix.name, 0) + x.T @ x

    with separate_experts(model), Products(matrices(model).values(), see):
        for rows in BATCHES:
            for ids, mask in zip(rows["input_ids"], rows["attention_mask"]):
                model(input_ids=ids[None, mask.bool()], attention_mask=mask[None, mask.bool()])
    return totals


@pytest.mark.parametrize("schedule", [observe, sequential])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_matrix_is_calibrated_once_on_what_the_model_alone_would_give_it(name, schedule):
    model = build(name, lm=ARCHITECTURES[name].decoder)
    truth = plain_moments(model)
    seen = []
    for shared in schedule(model, [without_labels(rows) for rows in BATCHES], second_moment):
        for matrix in shared.matrices:
            seen.append(matrix)
            expected = truth.get(matrix, torch.zeros_like(shared.statistic))
            assert torch.allclose(shared.statistic, expected, rtol=1e-3, atol=1e-4 * expected.abs().max()), matrix
    assert sorted(seen) == sorted(matrices(model))
    share = sum(matrix.size for matrix in matrices(model).values()) / count_block_weights(model)
    print(name, f"{share:.2f}", len(seen))
