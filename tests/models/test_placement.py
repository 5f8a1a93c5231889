"""Blocks that are calibrated one by one on another device than their model."""

import pytest
import torch
from architectures import build, inputs
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from compress.errors import UserError
from compress.maths.hessian import second_moment
from compress.maths.rounding import Scheme
from compress.models import calibration
from compress.models.calibration import sequential, split_sections
from compress.models.layers import find_blocks
from compress.models.matrices import matrices
from compress.models.placement import move_tensors, run_blocks_on
from compress.planning.settings import Hardware
from compress.techniques.gptq import quantize_layers

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer")
ELSEWHERE = torch.device("lazy")  # a device that every build of PyTorch can have tensors without memory on


def replace_tensors(module, change):
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    changed = change(tensor.data)
                    tensors[name] = nn.Parameter(changed, False) if isinstance(tensor, nn.Parameter) else changed
    return module


@pytest.fixture
def fake(monkeypatch):
    """Tensors with devices and shapes but no values, whose operations fail where devices mix."""
    monkeypatch.setattr(nn.Module, "to", lambda self, device: replace_tensors(self, lambda tensor: tensor.to(device)))
    monkeypatch.setattr(calibration, "is_chain", lambda *_: True)  # it compares values
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


@pytest.mark.parametrize(("family", "lm"), [("bert", False), ("gpt2", True), ("llama", True)])
def test_each_block_is_on_the_device_while_it_is_calibrated_and_alone_there(family, lm, fake):
    model = replace_tensors(build(family, lm), fake.from_tensor)
    batch = {"input_ids": fake.from_tensor(inputs(lm=lm)["input_ids"])}
    _, stack = find_blocks(model)
    seen = []
    with run_blocks_on(ELSEWHERE):
        for section in split_sections(model, [batch], matrices(model), floats=True):
            seen.append([next(block.parameters()).device.type for block in stack])
            assert {part.device for part in (section.forwards[0](), section.unchanged.outputs[0])} == {ELSEWHERE}
            assert section.finishes[0]().logits.device.type == "cpu"  # the whole model runs where it is
            for shared in section.observe(second_moment):
                assert shared.statistic.device == ELSEWHERE
                assert {matrix.weight.device for matrix in shared.matrices.values()} == {ELSEWHERE}
    places = range(len(stack))
    assert seen == [["lazy" if place == turn else "cpu" for place in places] for turn in places]
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_a_matrix_that_is_in_no_block_is_calibrated_where_the_model_is(fake):
    model = replace_tensors(build("bert"), fake.from_tensor)
    wanted = {"classifier": calibration.Matrix("classifier", model.classifier)}
    with run_blocks_on(ELSEWHERE):
        (shared,) = sequential(model, [{"input_ids": fake.from_tensor(inputs()["input_ids"])}], second_moment, wanted)
    assert shared.statistic.device.type == "cpu"


def test_weights_are_rounded_alike_and_integers_stay_in_memory(monkeypatch):
    moves = []
    whole = build("llama", lm=True)
    by_block = build("llama", lm=True)
    monkeypatch.setattr(nn.Module, "to", lambda self, device: moves.append((id(self), str(device))) or self)
    monkeypatch.setattr(calibration, "move_tensors", lambda value, device, moved: value)
    how = ([inputs(lm=True)], dict.fromkeys(matrices(whole), Scheme(4)), 0.01, True)
    here = quantize_layers(whole, matrices(whole), *how)
    with run_blocks_on(ELSEWHERE):
        there = quantize_layers(by_block, matrices(by_block), *how)
    assert all(
        torch.equal(here[name].quantized.weight.integers, each.quantized.weight.integers)
        for name, each in there.items()
    )
    assert moves == [(id(block), device) for block in find_blocks(by_block)[1] for device in ("lazy", "cpu")]


def test_a_tensor_that_calls_share_is_moved_once():
    mask = torch.ones(2, 3)
    found = move_tensors([(mask, {"mask": mask}), calibration.Shared({}, mask)], torch.device("meta"), {})
    assert found[0][0] is found[0][1]["mask"] is found[1].statistic and found[0][0].device.type == "meta"
    assert isinstance(found[1], calibration.Shared)


def test_there_must_be_a_gpu_to_move_blocks_to(monkeypatch):
    with pytest.raises(UserError, match=r"hardware.offload is true.*on the CPU here. Set hardware.offload=false"):
        Hardware(accelerator="cpu", offload=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    hardware = Hardware(accelerator="gpu", offload=True)
    assert (hardware.device.type, hardware.serving_device.type) == ("cuda", "cpu")
    assert Hardware(accelerator="gpu").serving_device.type == "cuda"
