"""Sums of 8-bit products are exact on every processor, or the export names the processors."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from test_onnx import every_shape, make_distinct, needs_vnni, tied
from torch import nn

from compress.artifacts.artifact import load_artifact
from compress.errors import UserError
from compress.runtimes import processor
from compress.runtimes.openvino import load
from compress.runtimes.processor import WIDEST, adds_exactly, read_instructions
from compress.techniques.finetune import FineTune
from compress.techniques.onnx import Onnx
from compress.techniques.openvino import OpenVINO
from compress.techniques.w8a8 import W8A8

ZEN_2 = "processor\t: 0\nflags\t\t: fpu sse4_1 avx avx2\nprocessor\t: 1\nflags\t\t: fpu\n"
ZEN_4 = "flags\t\t: fpu avx2 avx512f avx512_vnni\n"
ALDER_LAKE = "flags\t\t: fpu avx2 avx_vnni\n"
GRAVITON_2 = "Features\t: fp asimd asimddp\n"


def add_in_pairs(inputs, weights):
    """Return sums of products of unsigned ``inputs`` and signed ``weights`` ``[..., count]``, as `vpmaddubsw` computes
    them: pairs in 16 bits, their sum in 32 bits."""
    pairs = (inputs.astype(np.int64) * weights).reshape(*weights.shape[:-1], -1, 2).sum(-1)
    return pairs.clip(-(2**15), 2**15 - 1).sum(-1)


def test_products_by_weights_of_seven_bits_never_saturate_and_those_of_eight_can():
    numbers = np.random.default_rng(0)
    inputs = np.concatenate([np.full((1, 64), 255), numbers.integers(0, 256, (99, 64))])
    for widest, exact in ((WIDEST, True), (WIDEST + 1, False), (127, False)):
        weights = np.concatenate([np.full((1, 64), widest), numbers.integers(-widest, widest + 1, (99, 64))])
        assert np.array_equal(add_in_pairs(inputs, weights), (inputs * weights).sum(-1)) == exact
    random = numbers.integers(-127, 128, (99, 64))  # as in a layer, not only extremes
    assert not np.array_equal(add_in_pairs(inputs[1:], random), (inputs[1:] * random).sum(-1))


@pytest.mark.parametrize(
    ("cpuinfo", "exact"), [(ZEN_2, False), (ZEN_4, True), (ALDER_LAKE, True), (GRAVITON_2, True), (None, False)]
)
def test_the_instructions_say_whether_sums_are_exact(cpuinfo, exact, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    if cpuinfo:
        path.write_text(cpuinfo)
    instructions = read_instructions(path)
    monkeypatch.setattr(processor, "read_instructions", lambda: instructions)
    monkeypatch.setattr(processor.platform, "system", lambda: "Linux")
    assert adds_exactly() == exact
    monkeypatch.setattr(processor.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(processor.platform, "machine", lambda: "arm64")
    assert adds_exactly()


def export(stage, folder, *before, build=tiny.bert):
    model = make_distinct(build())
    for one in (*before, stage):
        tiny.trainer(one).fit(FineTune(model), tiny.loader(batches=2, lm=build is tied))
    folder.mkdir(exist_ok=True)
    stage.save(model, folder)
    return model


@pytest.mark.parametrize(
    ("kind", "precision"), [(Onnx, "int8_dynamic"), (Onnx, "int8_static"), (OpenVINO, "int8")], ids=str
)
def test_rounded_weights_have_seven_bits_unless_the_export_is_for_vnni(kind, precision, tmp_path):
    for made_for, widest in (("any", WIDEST), ("vnni", 128)):
        stage = kind(precision=precision, samples=8, processor=made_for)
        model = export(stage, tmp_path)
        tables = {one.weight.shape for one in model.modules() if isinstance(one, nn.Embedding)}  # looked up, no factors
        factors = [p for p in stage.exported.parameters() if not p.is_floating_point() and p.shape not in tables]
        assert len(factors) >= 8 and widest // 2 < max(p.short().abs().max() for p in factors) <= widest


ANSWER = """
import json, sys, torch
from pathlib import Path
from compress.runtimes.openvino import load
batches = torch.load(sys.argv[2])
model = load(Path(sys.argv[1]), "")
print(torch.cat([model(**batch).logits.flatten() for batch in batches]).tolist())
"""


@pytest.mark.skipif("avx2" not in read_instructions(), reason="this processor is no x86 with AVX2")
@pytest.mark.parametrize(
    ("made_for", "integers"),
    [("any", "rounded"), ("any", "rounded, tied"), ("any", "kept"), pytest.param("vnni", "rounded", marks=needs_vnni)],
)
def test_openvino_answers_alike_without_vnni_unless_the_export_is_for_it(made_for, integers, tmp_path):
    before = [W8A8(samples=8, dynamic=False, symmetric=False)] if integers == "kept" else []
    stage = OpenVINO(precision=None if before else "int8", samples=8, processor=made_for)
    # Not bfloat16, which this processor may have and AVX2 lacks.
    stage.settings = {**stage.settings, "INFERENCE_PRECISION_HINT": "f32"}
    export(stage, tmp_path / "exported", *before, build=tied if integers == "rounded, tied" else tiny.bert)
    batches = [{name: value for name, value in batch.items() if name != "labels"} for batch in every_shape()]
    torch.save(batches, tmp_path / "batches.pt")
    command = [sys.executable, "-c", ANSWER, str(tmp_path / "exported"), str(tmp_path / "batches.pt")]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.tensor(json.loads(done.stdout))
    here = torch.cat([load(tmp_path / "exported", "")(**batch).logits.flatten() for batch in batches])
    difference = (found - here).abs().max() / here.abs().max()
    assert difference < 1e-5 if made_for == "any" else difference > 0.005


@pytest.mark.parametrize("kind", [Onnx, OpenVINO])
def test_an_export_for_vnni_is_refused_where_there_is_none(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(processor, "adds_exactly", lambda: False)
    key = kind.key
    with pytest.raises(UserError, match=f"{key}.processor=vnni is for processors with VNNI .* Set {key}.processor=any"):
        kind(processor="vnni").check(tiny.bert(), [])
    kind().check(tiny.bert(), [])
    name = key.removeprefix("technique.")
    done = {"name": name, "settings": {"processor": "vnni"}, "seconds": 1, "trained": False}
    described = {
        "kind": "multiclass",
        "model": "m",
        "task": "t",
        "runtime": kind.runtime,
        "limits": [],
        "history": [done],
    }
    (tmp_path / "compress.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=f"{tmp_path} is for processors with VNNI .* Set {key}.processor=any"):
        load_artifact(tmp_path)
