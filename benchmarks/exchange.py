"""Time the exports of bert-base by the stages `onnx` and `openvino` against PyTorch and against the same libraries
used by hand, in turns in one process.

    python benchmarks/exchange.py [--batch-sizes 1 32] [--length 128] [--seconds 10]

The weights are random: speed does not depend on them. `half` has half of the heads and half of the FFN.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

import nncf
import numpy as np
import onnxruntime
import openvino
import torch
from onnxruntime import quantization
from onnxruntime.transformers.optimizer import optimize_model
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from untrained import Batch, carry_out
from yaml import safe_load

from compress.quiet import silence_libraries
from compress.runtimes import onnxruntime as ours_onnxruntime
from compress.runtimes import openvino as ours_openvino
from compress.runtimes.timing import Latency, estimate_speedup, summarise_times, time_in_turns
from compress.techniques.onnx import Onnx
from compress.techniques.openvino import OpenVINO
from compress.techniques.structured import Structured

MODEL = Path(__file__).parents[1] / "conf" / "model" / "bert.yaml"
NAMES = ("input_ids", "attention_mask")
Run = Callable[[Batch], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each variant, wall time")
    options = parser.parse_args()
    silence_libraries()
    nncf.set_log_level("ERROR")
    torch.manual_seed(0)
    config = AutoConfig.for_model(**safe_load(MODEL.read_text())["config"])
    config._attn_implementation = "sdpa"
    model = AutoModelForSequenceClassification.from_config(config).eval()
    calibration = [texts(config, 1, options.length) for _ in range(32)]
    halve = Structured(6, config.intermediate_size // 2, importance="activation")
    half = carry_out(copy.deepcopy(model), calibration, halve)
    runs: dict[str, tuple[Run, Run | None]] = {
        "PyTorch": (in_pytorch(model), None),
        "PyTorch, oneDNN": (in_pytorch(model, "bf16"), None),
        "ONNX Runtime fp32": (in_ours(model, calibration, Onnx("fp32")), onnx_by_hand(model, calibration[0])),
        "ONNX Runtime int8": (
            in_ours(model, calibration, Onnx("int8_dynamic")),
            onnx_by_hand(model, calibration[0], int8=True),
        ),
        "OpenVINO bf16": (in_ours(model, calibration, OpenVINO("bf16")), openvino_by_hand(model, calibration)),
        "OpenVINO int8": (
            in_ours(model, calibration, OpenVINO("int8", samples=len(calibration))),
            openvino_by_hand(model, calibration, int8=True),
        ),
        "half, PyTorch": (in_pytorch(half), None),
        "half, OpenVINO int8": (
            in_ours(half, calibration, OpenVINO("int8", samples=len(calibration))),
            openvino_by_hand(half, calibration, int8=True),
        ),
    }
    for size in options.batch_sizes:
        Console(width=110).print(compared(runs, texts(config, size, options.length), options.seconds))


def compared(runs: dict[str, tuple[Run, Run | None]], batch: Batch, seconds: float) -> Table:
    calls = {}
    for name, (ours, by_hand) in runs.items():
        calls[name] = lambda _, run=ours: run(batch)
        if by_hand:
            calls[f"{name} by hand"] = lambda _, run=by_hand: run(batch)
    with torch.inference_mode():
        times = time_in_turns(calls, Latency(seconds=seconds, block_s=0.5), cycle=1).blocks
    size, length = batch["input_ids"].shape
    table = Table(f"batch {size}, {length} tokens", "ms", "faster [95%]", "by hand", "ours is faster [95%]")
    for name, (_, by_hand) in runs.items():
        row = [name, f"{summarise_times(times[name]).median_ms:.2f}", ratio(times["PyTorch"], times[name])]
        if by_hand:
            hand = times[f"{name} by hand"]
            row += [ratio(times["PyTorch"], hand), ratio(hand, times[name])]
        table.add_row(*row)
    return table


def ratio(slow: list[np.ndarray], fast: list[np.ndarray]) -> str:
    ratio = estimate_speedup(slow, fast)
    return f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def texts(config, size: int, length: int) -> Batch:
    ids = torch.randint(1000, config.vocab_size, (size, length))
    return dict(zip(NAMES, (ids, torch.ones_like(ids))))


def in_pytorch(model: PreTrainedModel, fp32: str = "none") -> Run:
    def run(batch: Batch) -> object:
        torch.backends.mkldnn.matmul.fp32_precision = fp32
        return model(**batch)

    return run


def in_ours(model: PreTrainedModel, calibration: list[Batch], stage: Onnx | OpenVINO) -> Run:
    folder = Path(mkdtemp())
    stage.save(carry_out(copy.deepcopy(model), calibration, stage), folder)
    runtime = ours_onnxruntime if isinstance(stage, Onnx) else ours_openvino
    loaded = runtime.load(folder, "sequence_classification")
    return lambda batch: loaded(**batch)


class Logits(torch.nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def onnx_by_hand(model: PreTrainedModel, example: Batch, int8: bool = False) -> Run:
    """Return a run of the model exported by torch.onnx, fused by ONNX Runtime's optimizer and, on request, in int8."""
    folder = Path(mkdtemp())
    path, fused = folder / "traced.onnx", folder / "fused.onnx"
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    axes = {name: {0: "batch", 1: "length"} for name in NAMES}
    arguments = {"input_names": list(NAMES), "output_names": ["logits"], "dynamic_axes": axes, "opset_version": 17}
    inputs = tuple(texts(model.config, 2, example["input_ids"].shape[1]).values())
    torch.onnx.export(Logits(eager).eval(), inputs, path, dynamo=False, **arguments)
    heads, width = model.config.num_attention_heads, model.config.hidden_size
    optimize_model(str(path), "bert", num_heads=heads, hidden_size=width).save_model_to_file(str(fused))
    if int8:
        signed = quantization.QuantType.QInt8
        quantization.quantize_dynamic(
            fused, path, per_channel=True, weight_type=signed, extra_options={"DefaultTensorType": 1}
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path if int8 else fused, options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {name: value.numpy() for name, value in batch.items()})


def openvino_by_hand(model: PreTrainedModel, calibration: list[Batch], int8: bool = False) -> Run:
    """Return a run of the model converted by OpenVINO, on request quantized by NNCF, and compiled for latency.

    OpenVINO computes in bfloat16 by default.
    """
    graph = openvino.convert_model(model, example_input=calibration[0])
    if int8:
        rows = nncf.Dataset([{name: value.numpy() for name, value in batch.items()} for batch in calibration])
        preset = nncf.QuantizationPreset.MIXED
        graph = nncf.quantize(graph, rows, model_type=nncf.ModelType.TRANSFORMER, preset=preset)
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(graph, "CPU", settings)
    return lambda batch: compiled({name: value.numpy() for name, value in batch.items()})


if __name__ == "__main__":
    main()
