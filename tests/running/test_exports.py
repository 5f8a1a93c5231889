"""Chains that end in an export, from their config to the artifact's answers in its runtime."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compress
from compress.errors import PostconditionError
from compress.reporting.rows import Job, collect_rows
from compress.techniques.onnx import Onnx


@pytest.mark.parametrize("stage", ["onnx", "openvino"])
def test_integers_of_quantization_aware_training_run_on_other_runtimes(carry_out, tmp_path, stage):
    outcome = carry_out(f"technique=prune+qat+{stage}", "technique.qat.samples=16")
    none, exported = outcome.measurements.values()
    assert exported.size_bytes < 0.7 * none.size_bytes and exported.parameters == none.parameters
    assert exported.nonzeros < 0.95 * none.nonzeros
    agreement = json.loads((tmp_path / f"report/3_{stage}/agreement.json").read_text())
    # A sum in another order may round an input to a neighbouring integer, and change a close decision.
    assert agreement["label_agreement"] >= 0.98
    assert agreement["max_logit_difference"] < 0.05 * agreement["largest_logit"]


def answer_without_us(folders):
    """Return the logits of the code in the artifacts' cards, run by one process without `compress`."""
    script = "import json, os, sys; sys.modules['compress'] = None\n"
    for folder in folders:
        (lines,) = re.findall(r"```python\n(.+?)```", (folder / "README.md").read_text(), re.DOTALL)
        script += f"os.chdir({str(folder)!r})\n{lines}\nprint(json.dumps(logits.tolist()))\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [torch.tensor(json.loads(line)) for line in done.stdout.splitlines()]


def test_exports_load_without_us_and_without_a_model_in_pytorch(carry_out, tmp_path):
    expected = {}
    for chain, model, task, precision in (
        ("gptq+onnx", "tiny", "toy", "fp32"),
        ("onnx", "tiny_llama", "toy_lm", "int8_dynamic"),
        ("onnx", "tiny_llama", "toy_chat", "int8_dynamic"),
        ("gptq+openvino", "tiny", "toy", "null"),
        ("openvino", "tiny_llama", "toy_lm", "int8_weights"),
    ):
        stage = chain.rpartition("+")[2]
        outcome = carry_out(f"technique={chain}", f"technique.{stage}.precision={precision}", model=model, task=task)
        none, exported = outcome.measurements.values()
        assert exported.speedup.low > 0 and exported.parameters == none.parameters
        assert exported.speedup_same_runtime.low > 0 and none.speedup_same_runtime is None
        assert exported.quality == pytest.approx(none.quality, rel=0.2)
        if precision != "fp32":
            assert exported.size_bytes < 0.8 * none.size_bytes
        assert outcome.agreements[chain].label_agreement > 0.9
        folder = (tmp_path / "artifact").rename(tmp_path / f"{chain} {task}")
        loaded = compress.load(folder)
        assert loaded.description.weights == stage
        expected[folder] = loaded.model(**loaded.tokenizer("A text.", return_tensors="pt")).logits
    for answer, logits in zip(answer_without_us(expected), expected.values(), strict=True):
        assert torch.allclose(answer, logits, atol=1e-6)


@pytest.mark.parametrize("runtime", ["torch", "llama_cpp"])
def test_a_file_of_llama_cpp_loads_without_us(carry_out, tmp_path, runtime):
    pytest.importorskip("llama_cpp" if runtime == "llama_cpp" else "gguf")
    settings = ["technique.gptq.group_size=32", "technique.gguf.precision=q8_0", f"technique.gguf.runtime={runtime}"]
    outcome = carry_out("technique=gptq+gguf", *settings, model="tiny_llama", task="toy_lm")
    none, exported = outcome.measurements.values()
    assert exported.parameters == none.parameters and exported.size_bytes < 0.3 * none.size_bytes
    assert exported.runtime == runtime and exported.generation.per_token.median_ms > 0
    assert (exported.speedup_same_runtime is None) == (runtime == "torch")
    assert exported.quality == pytest.approx(none.quality, rel=0.2)
    loaded = compress.load(tmp_path / "artifact")
    logits = loaded.model(**loaded.tokenizer("A text.", return_tensors="pt")).logits
    (answer,) = answer_without_us([tmp_path / "artifact"])
    assert torch.allclose(answer, logits, atol=1e-5)
    *_, description = outcome.descriptions.values()
    assert "float16" in description.limits[-1] and "no space before a text" in description.limits[-1]


@pytest.mark.parametrize(
    ("chain", "stage", "model", "settings"),
    [
        ("structured", "openvino", "tiny", ["target_heads=2", "target_ffn_size=64"]),
        ("structured", "onnx", "tiny_llama", ["target_heads=2", "target_ffn_size=64"]),
        ("distill", "onnx", "tiny", []),
        ("qat", "onnx", "tiny_llama", ["samples=16"]),
        ("gptq", "openvino", "tiny_llama", []),
        ("awq", "onnx", "tiny_llama", ["samples=16"]),
    ],
)
def test_an_export_answers_like_the_classifier_of_any_chain(carry_out, tmp_path, chain, stage, model, settings):
    method = f"{chain}+{stage}"
    outcome = carry_out(f"technique={method}", *(f"technique.{chain}.{setting}" for setting in settings), model=model)
    (agreement,) = outcome.agreements.values()
    rounded = chain in ("qat", "gptq", "awq")  # inputs are rounded too: by qat, and by ONNX Runtime's kernels
    assert agreement.label_agreement >= (0.98 if rounded else 1)
    assert agreement.max_logit_difference < (0.05 if rounded else 1e-3) * agreement.largest_logit
    row = collect_rows(tmp_path, Job(method, model, "toy", 0), outcome)[-1]
    assert row["label_agreement"] == agreement.label_agreement
    assert row["max_logit_difference"] == agreement.max_logit_difference


def test_a_quantized_model_stays_as_small_in_onnx_and_its_format_is_no_limit_there(carry_out):
    *_, packed = carry_out("technique=prune+gptq").measurements.values()
    outcome = carry_out("technique=prune+gptq+onnx")
    *_, exported = outcome.measurements.values()
    assert exported.size_bytes < 1.15 * packed.size_bytes and exported.parameters == packed.parameters
    assert exported.nonzeros == packed.nonzeros
    *_, description = outcome.descriptions.values()
    assert [limit.partition(":")[0] for limit in description.limits] == ["prune"]


class Drifts(Onnx):
    def save(self, model, folder):
        super().save(model, folder)
        shutil.copy(Path(self.folder.name) / "traced/model.onnx", folder / "model.onnx")


def test_an_export_in_lower_precision_must_reload_to_the_exported_model(carry_out):
    target = f"technique.onnx._target_={__name__}.Drifts"
    with pytest.raises(PostconditionError, match="the artifact of `onnx` reloads to other logits"):
        carry_out("technique=onnx", target, "technique.onnx.precision=int8_dynamic")
    carry_out("technique=onnx", target)  # in full precision it must agree with the model
