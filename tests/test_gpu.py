"""Every stage on a CUDA GPU: it does there what it does on the CPU, and its artifact reloads."""

import pytest
import tiny
import torch
from architectures import build, inputs
from compatibility import EPOCH, STAGES
from hydra.utils import get_class
from pytorch_lightning import LightningModule

from compress.artifacts.artifact import Description, load_artifact, write_artifact
from compress.errors import UserError
from compress.maths.hessian import second_moment
from compress.maths.rounding import Scheme
from compress.models.calibration import sequential
from compress.models.layers import detect_task_kind, unwrap_model
from compress.models.matrices import matrices
from compress.models.placement import run_blocks_on
from compress.techniques.finetune import FineTune
from compress.techniques.gptq import quantize_layers
from compress.testing import Case
from compress.tiny_models import make_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
]
ELSEWHERE = ("onnx", "openvino")  # exports run on the CPU


def run(stage, family, lm, accelerator, folder):
    """Return the stage and the model after it, from a fit on this accelerator."""
    name, settings, training = STAGES[stage]
    model = build(family, lm)
    write_artifact(folder, model, make_tokenizer(), Description(detect_task_kind(model), "tiny", "random"))
    technique = Case(get_class(f"compress.techniques.{name}"), settings, training).build(model, folder)
    technique.check(model, [])
    module = technique if isinstance(technique, LightningModule) else FineTune(model, training=training)
    callbacks = [] if module is technique else [technique]
    loader = tiny.loader(lm=lm)
    trainer = tiny.trainer(*callbacks, epochs=training.epochs, accelerator=accelerator)
    trainer.fit(module, loader, loader)
    return technique, unwrap_model(module).cpu()


@pytest.mark.parametrize("stage", [name for name in STAGES if name not in ELSEWHERE])
@pytest.mark.parametrize(("family", "lm"), [("bert", False), ("llama", True)])
def test_a_stage_does_on_a_gpu_what_it_does_on_the_cpu(stage, family, lm, tmp_path):
    try:
        (_, here), (technique, there) = (
            run(stage, family, lm, accelerator, tmp_path / accelerator) for accelerator in ("cpu", "gpu")
        )
    except UserError as error:
        pytest.skip(str(error))
    with torch.no_grad():
        expected, got = (model.eval()(**inputs(lm=lm)).logits.float() for model in (here, there))
    scale = expected.abs().max()
    # Sums in another order move a weight that lies between two integers, and training amplifies what moved.
    assert (got - expected).abs().max() < (0.2 if STAGES[stage][2] is EPOCH else 0.05) * scale
    description = Description(detect_task_kind(there), "tiny", "random", weights=technique.leaves or "float")
    write_artifact(tmp_path / "artifact", there, make_tokenizer(), description, technique)
    with torch.no_grad():
        again = load_artifact(tmp_path / "artifact").model(**inputs(lm=lm)).logits.float()
    assert (again - got).abs().max() < 1e-3 * scale


def test_a_gpu_calibrates_to_the_moments_of_the_cpu():
    model = build("llama", lm=True)
    here = {name: s for shared, s in sequential(model, [inputs(lm=True)], second_moment) for name in shared}
    on_gpu = {key: value.cuda() for key, value in inputs(lm=True).items()}
    there = {name: s for shared, s in sequential(model.cuda(), [on_gpu], second_moment) for name in shared}
    assert set(here) == set(there) == set(matrices(model))
    for name, moment in here.items():
        assert torch.allclose(there[name].cpu(), moment, rtol=1e-2, atol=1e-3 * moment.abs().max()), name


def test_a_model_that_does_not_fit_on_a_gpu_is_quantized_there_block_by_block():
    model = build("llama", lm=True, num_hidden_layers=24, hidden_size=256, intermediate_size=1024)
    size = sum(parameter.nbytes for parameter in model.parameters())
    layers = matrices(model)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with run_blocks_on(torch.device("cuda")):
        outcomes = quantize_layers(model, layers, [inputs(lm=True)], dict.fromkeys(layers, Scheme(4)), 0.01, True)
    assert torch.cuda.max_memory_allocated() - before < size / 3
    assert set(outcomes) == set(layers) and {matrix.weight.device.type for matrix in layers.values()} == {"cpu"}
