"""Time each next token of a causal language model of TinyLlama's shape: PyTorch in float32 against the exports of the
stages `onnx`, `openvino` and, if llama-cpp-python is installed, `gguf`, in turns in one process.

    python benchmarks/decoding.py [--blocks 22] [--context 64] [--tokens 16] [--repeats 5]

The weights are random: speed does not depend on them. The output layer is rounded too (`skip=[]`).
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from untrained import carry_out
from yaml import safe_load

from compress.quiet import silence_libraries
from compress.runtimes import llama_cpp, onnxruntime, openvino
from compress.runtimes.runtime import find_missing
from compress.runtimes.timing import estimate_speedup
from compress.techniques.gguf import GGUF
from compress.techniques.onnx import Onnx
from compress.techniques.openvino import OpenVINO

MODEL = Path(__file__).parents[1] / "conf" / "model" / "tinyllama.yaml"
STAGES: dict[str, Any] = {
    "ONNX Runtime int4": (Onnx("int4", block_size=128, skip=()), onnxruntime),
    "OpenVINO int8_weights": (OpenVINO("int8_weights", skip=()), openvino),
    "OpenVINO int4_weights": (OpenVINO("int4_weights", skip=()), openvino),
}
if not find_missing(llama_cpp.PACKAGES):
    STAGES |= {f"llama.cpp {kind}": (GGUF(kind), llama_cpp) for kind in ("q4_0", "q8_0")}
Step = Callable[[torch.Tensor, torch.Tensor, Any], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--context", type=int, default=64, help="tokens before the first timed token")
    parser.add_argument("--tokens", type=int, default=16, help="tokens timed in a row")
    parser.add_argument("--repeats", type=int, default=5, help="rows for each runtime")
    options = parser.parse_args()
    silence_libraries()
    config = AutoConfig.for_model(**{**safe_load(MODEL.read_text())["config"], "num_hidden_layers": options.blocks})
    torch.manual_seed(0)
    context = torch.randint(config.vocab_size, (1, options.context))
    folders = {}
    for name, (stage, _) in STAGES.items():
        folders[name] = exported(built(config), stage, context)
        gc.collect()  # a Trainer and its model refer to each other
    model = built(config)
    steps: dict[str, Step] = {"PyTorch float32": in_pytorch(model)}
    for name, (_, runtime) in STAGES.items():
        steps[name] = in_runtime(runtime.load(folders[name], "lm"))
    times: dict[str, list[np.ndarray]] = {name: [] for name in steps}
    for repeat in range(options.repeats + 1):
        for name, step in steps.items():
            row = decode(step, context, options.tokens)
            if repeat:  # the first warms up
                times[name].append(row)
    table = Table("", "ms a token", "faster [95%]")
    for name, rows in times.items():
        ratio = estimate_speedup(times["PyTorch float32"], rows)
        table.add_row(
            name, f"{np.median(np.concatenate(rows)):.1f}", f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
        )
    Console(width=110).print(table)


def built(config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def exported(model: LlamaForCausalLM, stage: Any, ids: torch.Tensor) -> Path:
    folder = Path(mkdtemp())
    stage.save(carry_out(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], stage), folder)
    return folder


def in_pytorch(model: LlamaForCausalLM) -> Step:
    return lambda ids, mask, past: model(
        input_ids=ids, attention_mask=mask, past_key_values=past or None, use_cache=True
    )


def in_runtime(model: Any) -> Step:
    return lambda ids, mask, past: model(input_ids=ids, attention_mask=mask, past=past)


@torch.inference_mode()
def decode(step: Step, context: torch.Tensor, tokens: int) -> np.ndarray:
    """Return the milliseconds of each of ``tokens`` tokens after the ``context``."""
    ids, mask, past, times = context, torch.ones_like(context), (), []
    for _ in range(tokens + 1):
        begin = time.perf_counter()
        answer = step(ids, mask, past)
        times.append(1000 * (time.perf_counter() - begin))
        past = answer.past_key_values if "past_key_values" in answer.__dict__ else answer.past
        ids = answer.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
    return np.array(times[1:])


if __name__ == "__main__":
    main()
