"""Calibration streams batches through the blocks and sees the inputs of every layer."""

import pytest
import tiny
import torch

from compress.maths.hessian import second_moment
from compress.models.calibration import calibrate_layers
from compress.models.layers import find_blocks, find_linears


@pytest.mark.parametrize("build", tiny.ALL)
def test_calibration_sees_every_layer_once_and_no_padding(build):
    model = build()
    batches = [{k: v for k, v in tiny.batch(seed=s).items() if k != "labels"} for s in range(3)]
    seen, inputs = {}, {}
    stack = find_blocks(model)[0]
    first = dict(find_linears(model))
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0]))
        for name, layer in first.items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    for layers, hessian in calibrate_layers(model, batches, second_moment):
        assert not set(layers) & set(seen)
        seen.update(dict.fromkeys(layers, hessian))
    assert set(seen) == set(first) and all(name.startswith(stack) for name in seen)
    for name, hessian in seen.items():  # no layer was changed, so the streamed inputs are the model's own
        tokens = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(inputs[name], batches)])
        assert torch.allclose(hessian, tokens.T @ tokens, rtol=1e-3, atol=1e-3), name


def test_batches_can_be_combined_by_other_than_their_sum():
    model = tiny.llama()
    batches = [{k: v for k, v in tiny.batch(seed=s).items() if k != "labels"} for s in range(3)]
    each = [
        next(calibrate_layers(model, [batch], lambda x: x.abs().amax(0), combine=torch.maximum))[1] for batch in batches
    ]
    _, largest = next(calibrate_layers(model, batches, lambda x: x.abs().amax(0), combine=torch.maximum))
    assert torch.equal(largest, torch.stack(each).amax(0))
