"""A layer whose weight is computed again in every forward pass is refused, because no change of it would last."""

import pytest
import tiny
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import orthogonal

from compress.errors import UserError
from compress.models.layers import unwrap_model
from compress.techniques.finetune import FineTune
from compress.techniques.gptq import GPTQ
from compress.techniques.prune import Prune

WAYS = {
    "pruned": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
        lambda layer: prune.remove(layer, "weight"),
        r"torch.nn.utils.prune.remove\(layer, 'weight'\)",
    ),
    "orthogonal": (
        orthogonal,
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
        r"torch.nn.utils.parametrize.remove_parametrizations\(layer, 'weight'\)",
    ),
    "weight norm": (
        nn.utils.weight_norm,
        nn.utils.remove_weight_norm,
        r"torch.nn.utils.remove_weight_norm\(layer\)",
    ),
    "spectral norm": (
        nn.utils.spectral_norm,
        nn.utils.remove_spectral_norm,
        r"torch.nn.utils.remove_spectral_norm\(layer\)",
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("stage", [GPTQ(group_size=-1, samples=8), Prune(sparsity=0.7)], ids=["gptq", "prune"])
@pytest.mark.parametrize("way", WAYS)
def test_it_is_refused_with_the_call_that_makes_it_plain(way, stage):
    reparametrize, remove, call = WAYS[way]
    model = tiny.bert()
    layer = model.bert.encoder.layer[0].intermediate.dense
    reparametrize(layer)
    with pytest.raises(UserError, match=rf"`bert.encoder.layer.0.intermediate.dense` computes .* Call {call}\."):
        tiny.trainer(stage).fit(FineTune(model), tiny.loader())
    remove(layer)
    with torch.no_grad():
        assert isinstance(layer.weight, nn.Parameter) and unwrap_model(FineTune(model)) is model
