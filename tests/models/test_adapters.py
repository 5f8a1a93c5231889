"""An adapter trains few parameters, holds pruned zeros, and leaves a plain model that computes what was trained."""

import architectures
import pytest
import tiny
import torch
from torch import nn

from compress.errors import UserError
from compress.models import adapters
from compress.models.adapters import Adaptation, check_adapter, find_head, select_targets
from compress.models.matrices import find_zeros, matrices
from compress.technique import Adapter

pytest.importorskip("peft", reason="pip install -e '.[peft]'")

KEY = "technique.finetune.adapter"
FAMILIES = [("bert", False), ("gpt2", True), ("albert", False), ("t5", False), ("qwen2", True)]


def prune(model):
    """Prune half of every other matrix, and a whole row of it."""
    for matrix in list(matrices(model).values())[::2]:
        matrix.weight[torch.rand(matrix.shape, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
        matrix.weight[0] = 0


def train(model, steps=2, **settings):
    """Train what requires gradients, and return the names of what had any."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        model(**architectures.batch(step, **settings)).loss.backward()
        optimizer.step()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@torch.no_grad()
def answer(model):
    return model.eval()(**architectures.inputs()).logits


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(("name", "lm"), FAMILIES)
def test_what_was_trained_is_merged_and_zeros_stay(name, lm, kind):
    model = architectures.build(name, lm)
    with torch.no_grad():
        prune(model)
    zeros, before, attributes, names = find_zeros(model), answer(model), set(vars(model)), list(model.state_dict())
    classes = [type(module) for module in model.modules()]

    adaptation = Adaptation(model, Adapter(kind, rank=4, dropout=0.2), KEY)
    assert torch.allclose(answer(model), before, atol=1e-5)
    trained = train(model.train(), lm=lm)
    assert all("lora_" in name or any(head in name for head in ("classif", "pooler")) for name in trained)
    unmerged = answer(model)
    adaptation.merge()

    assert torch.allclose(answer(model), unmerged, atol=1e-4) and not torch.allclose(unmerged, before, atol=1e-3)
    assert find_zeros(model).keys() == zeros.keys()
    assert all(torch.equal(mask, zeros[name]) for name, mask in find_zeros(model).items())
    assert list(model.state_dict()) == names and set(vars(model)) == attributes
    assert [type(module) for module in model.modules()] == classes
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_mask_of_nothing_computes_as_peft_does(name, kind):
    from compress.models.masked_lora import mask_layer

    outputs, gradients = [], []
    for masked in (False, True):
        torch.manual_seed(0)
        model = architectures.build(name)
        Adaptation(model, Adapter(kind, rank=4), KEY)
        for target in list(select_layers(model)) if masked else ():
            layer = model.get_submodule(target)
            mask_layer(layer, torch.ones_like(layer.base_layer.weight, dtype=torch.bool))
        train(model.eval())
        outputs.append(answer(model))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*outputs, atol=1e-5) and torch.allclose(*gradients, atol=1e-5)


def select_layers(model):
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]


def test_half_precision_trains_in_floats_and_merges_into_halves():
    model = architectures.build("llama", lm=True).bfloat16()
    with torch.no_grad():
        prune(model)
    zeros = find_zeros(model)
    adaptation = Adaptation(model, Adapter("lora", rank=4), KEY)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    train(model, lm=True)
    adaptation.merge()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all((model.get_submodule(name).weight[mask] == 0).all() for name, mask in zeros.items())


def test_the_output_layer_that_is_tied_stays_tied_and_frozen():
    model = architectures.build("gpt2", lm=True)
    table = model.transformer.wte.weight.clone()
    adaptation = Adaptation(model, Adapter("lora", rank=4), KEY)
    train(model, lm=True)
    adaptation.merge()
    assert model.lm_head.weight is model.transformer.wte.weight and torch.equal(table, model.lm_head.weight)


def test_the_head_is_what_only_the_task_has():
    def names(model):
        head = {id(p) for p in find_head(model)}
        return {
            name.removesuffix(".weight").removesuffix(".bias") for name, p in model.named_parameters() if id(p) in head
        }

    assert names(architectures.build("bert")) == {"bert.pooler.dense", "classifier"}
    assert names(architectures.build("llama")) == {"score"}
    assert not names(architectures.build("llama", lm=True)) and not names(architectures.build("gpt2", lm=True))
    theirs = nn.Sequential(nn.Embedding(4, 8), nn.ModuleList([nn.Linear(8, 8)]), nn.Linear(8, 2))
    assert names(theirs) == {"2"}


def test_perp_trains_norms_biases_and_the_head():
    model = architectures.build("bert")
    adaptation = Adaptation(model, Adapter("perp"), KEY)
    trained = train(model)
    expected = {n for n, p in model.named_parameters() if p.ndim == 1 or n.startswith(("classifier", "bert.pooler"))}
    assert trained == expected
    assert adaptation.trained.count == sum(model.get_parameter(name).numel() for name in expected)
    adaptation.merge()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_that_trained_nothing_is_refused():
    adaptation = Adaptation(architectures.build("bert"), Adapter("dora", rank=4), KEY)
    with pytest.raises(UserError, match=r"finetune.adapter: none of the [\d,]+ trained parameters changed. Set more"):
        adaptation.merge()


def test_targets_are_chosen_by_the_model_and_by_patterns():
    model = architectures.build("bert")

    def ends(targets):
        return {
            name.split("layer.0.")[1]
            for name in select_targets(model, Adapter("lora", targets=targets), KEY)
            if ".0." in name
        }

    attention = {f"attention.self.{name}" for name in ("query", "key", "value")} | {"attention.output.dense"}
    assert ends("attention") == attention
    assert ends("all") == attention | {"intermediate.dense", "output.dense"}
    assert ends(["*query", "*intermediate*"]) == {"attention.self.query", "intermediate.dense"}


@pytest.mark.parametrize("name", [name for name in architectures.CLASSIFIERS if name != "xlnet"])
def test_every_family_has_matrices_in_its_attention(name):
    with torch.device("meta"):
        model = architectures.build(name)
    found = select_targets(model, Adapter("lora", targets="attention"), KEY)
    everything = {name: matrix for name, matrix in matrices(model).items() if matrix.expert is None}
    assert found and (len(found) < len(everything) or name in ("mixtral", "qwen3_moe"))


@pytest.mark.parametrize(
    ("family", "settings", "sentence"),
    [
        (
            "bert",
            {"rank": 65},
            r"adapter.rank is 65 and `bert.*query` has 64 outputs and 64 inputs; .*{kind: lora, rank: 64}",
        ),
        (
            "bert",
            {"targets": ["*qery"]},
            r"adapter.targets has the pattern `\*qery`, which matches no layer; a layer is",
        ),
        (
            "xlnet",
            {"targets": "attention"},
            r"targets is attention, and `XLNet.*` has no such matrix. Set targets in .* to all",
        ),
        ("mixtral", {}, r"`model.layers.0.mlp.experts.0.gate_up_proj` is an expert's, .* Set .*targets: attention"),
        ("bert", {"kind": "perp", "rank": 8}, r"adapter.rank is 8, and `perp` trains norms and biases, without a rank"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_in_one_sentence(family, settings, sentence):
    with torch.device("meta"):
        model = architectures.build(family)
    with pytest.raises(UserError, match=sentence):
        check_adapter(Adapter(**{"kind": "lora", "rank": 4, **settings}), model, KEY, epochs=1)


def test_without_peft_the_error_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"adapter.kind is lora, which needs peft. Type pip install .*\[peft\]"):
        check_adapter(Adapter("lora"), tiny.bert(), KEY, epochs=1)
    check_adapter(Adapter("perp"), tiny.bert(), KEY, epochs=1)
