"""The tiny models of the other tests are what they claim to be."""

import architectures
import pytest
import torch
from architectures import ARCHITECTURES, CLASSIFIERS, DECODERS


@pytest.mark.parametrize(("name", "lm"), [*((n, False) for n in CLASSIFIERS), *((n, True) for n in DECODERS)])
@torch.no_grad()
def test_every_architecture_answers_and_has_a_skeleton_of_its_shapes(name, lm):
    model, again = architectures.build(name, lm), architectures.build(name, lm)
    answer = model(**architectures.batch(lm=lm))
    assert torch.isfinite(answer.logits).all() and torch.isfinite(answer.loss)
    assert torch.equal(again(**architectures.batch(lm=lm)).logits, answer.logits)
    with torch.device("meta"):
        skeleton = architectures.build(name, lm)
    assert model.config.model_type == ARCHITECTURES[name].model_type
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in skeleton.state_dict().items()} == shapes
    assert all(len(set(p.flatten().tolist())) > 1 for p in model.parameters() if p.ndim == 1)


def test_no_architecture_lacks_every_head():
    assert {*CLASSIFIERS, *DECODERS} == set(ARCHITECTURES)
