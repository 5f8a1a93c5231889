"""Weights of every layout become integers in both exports, or are refused from the shapes alone."""

import pytest
import torch
from test_every_architecture import build, every_shape, export

from compress.errors import UserError
from compress.exporting.agreement import measure_agreement
from compress.models.matrices import find_all_matrices
from compress.techniques.onnx import Onnx
from compress.techniques.openvino import OpenVINO
from compress.techniques.prune import Prune
from compress.techniques.w8a8 import W8A8

RUNTIMES = (Onnx, OpenVINO)


@pytest.mark.parametrize(("stage", "precision"), [(Onnx, "int8_dynamic"), (OpenVINO, "int8_weights")])
@pytest.mark.parametrize(
    ("name", "lm"),  # of weights that are plain, transposed, of experts, joined, shared by blocks, without biases
    [
        *(("bert", False), ("gpt2", True), ("mixtral", True)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("phi3", True), ("albert", False), ("t5", False))),
    ],
)
def test_every_matrix_of_the_blocks_becomes_integers(name, lm, stage, precision, tmp_path):
    model = build(name, lm)
    exported = export(stage(precision=precision, skip=("embeddings", "head")), model, lm, tmp_path)
    agreement = measure_agreement(model, exported, every_shape(lm))
    # A token whose scores are close changes its expert.
    most = 0.4 if hasattr(model.config, "num_experts_per_tok") else 0.1
    assert 0 < agreement.max_logit_difference < most * agreement.largest_logit
    integers = sum(p.numel() for p in exported.parameters() if not p.is_floating_point())
    assert integers == sum(matrix.size for matrix in find_all_matrices(model, False, False).values())


@pytest.mark.parametrize(
    ("name", "lm", "stage", "precision", "most"),
    [
        ("albert", False, Onnx, "int8_static", 0.2),
        ("qwen3_moe", True, Onnx, "int8_static", 0.2),
        ("gpt2", True, Onnx, "int4", 0.4),
        ("albert", False, OpenVINO, "int8", 0.2),
        ("mixtral", True, OpenVINO, "int4_weights", 0.4),
    ],
)
def test_zeros_stay_zeros_in_few_bits(name, lm, stage, precision, most, tmp_path):
    model = build(name, lm)
    settings = {"group_size": 16} if stage is OpenVINO else {}
    exported = export(stage(precision=precision, samples=8, **settings), model, lm, tmp_path, Prune(sparsity=0.5))
    agreement = measure_agreement(model, exported, every_shape(lm))
    assert 0 < agreement.max_logit_difference < most * agreement.largest_logit
    zeros = sum(int((p == 0).sum()) for p in exported.parameters())
    assert zeros >= sum(int((m.weight == 0).sum()) for m in find_all_matrices(model, False, False).values()) > 0


@pytest.mark.parametrize("precision", [None, "int8_static"])
def test_a_weight_that_several_blocks_use_is_stored_once(precision, tmp_path):
    model = build("albert", False)
    exported = export(Onnx(precision=precision, samples=4), model, False, tmp_path)
    biases = 3 * model.config.hidden_size  # of query, key and value, joined
    assert sum(p.numel() for p in exported.parameters()) <= sum(p.numel() for p in model.parameters()) + biases


@pytest.mark.parametrize(("stage", "lm"), [(Onnx, False), (OpenVINO, True)])
def test_products_of_two_axes_without_names_are_integers_that_answer_as_the_model(stage, lm, tmp_path):
    model = build("opt", lm)
    exported = export(stage(), model, lm, tmp_path, W8A8(samples=8, dynamic=False))
    agreement = measure_agreement(model, exported, every_shape(lm))
    # Sums in another order round an input to the next integer, rarely.
    assert agreement.max_logit_difference < 0.03 * agreement.largest_logit
    integers = sum(p.numel() for p in exported.parameters() if not p.is_floating_point())
    assert integers == sum(matrix.size for matrix in find_all_matrices(model, False, False).values())


@pytest.mark.parametrize(("stage", "precision"), [(Onnx, "int8_dynamic"), (OpenVINO, "int8_weights")])
def test_weights_that_are_no_matrices_are_exported_in_floats_only(stage, precision):
    with torch.device("meta"):
        skeleton = build("xlnet", False)
    with pytest.raises(UserError, match=r"compresses matrices, .* onnx and openvino with precision=null"):
        stage(precision=precision).check(skeleton, [])
    stage().check(skeleton, [])
