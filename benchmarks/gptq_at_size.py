"""Measure the peak memory and time per block of GPTQ at TinyLlama's shape, by this project (pruned first, its zeros
kept) and by llm-compressor, each in its own process, on the same random weights and calibration tokens.

    python benchmarks/gptq_at_size.py [--blocks 22] [--samples 32] [--length 256] [--dtype float32]
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from yaml import safe_load

MODEL = Path(__file__).parents[1] / "conf" / "model" / "tinyllama.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--samples", type=int, default=32, help="windows to calibrate on")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    table = Table("", "model built, GiB", "peak, GiB", "seconds a block", "zeros kept")
    for name, method in (("gptq, llm-compressor", llm_compressor), ("prune+gptq, ours", ours)):
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            built, peak, seconds, kept = pool.apply(measured, (method, options))
        table.add_row(name, f"{built:.1f}", f"{peak:.1f}", f"{seconds / options.blocks:.1f}", f"{kept:.2%}")
    Console(width=110).print(table)


def measured(method, options: argparse.Namespace) -> tuple[float, float, float, float]:
    """Return the GiB of the process with the model built and at its peak, the seconds, and the share of pruned weights
    that are still zero."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**safe_load(MODEL.read_text())["config"], "num_hidden_layers": options.blocks})
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()
    windows = torch.randint(config.vocab_size, (options.samples, options.length))
    masks = prune(model)
    built = peak_gib()
    begin = time.perf_counter()
    method(model, windows)
    seconds = time.perf_counter() - begin
    peak = peak_gib()
    kept = [(model.get_submodule(name).weight[mask] == 0).float().mean().item() for name, mask in masks.items()]
    return built, peak, seconds, sum(kept) / len(kept)


def prune(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Set a fifth of every layer to zero and return the masks of the zeros."""
    from compress.maths.sparsity import magnitude_score, mask_tensor
    from compress.models.matrices import find_zeros, matrices

    for linear in matrices(model).values():
        linear.weight.data[mask_tensor(magnitude_score(linear.weight.data), 0.2)] = 0
    return find_zeros(model)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def ours(model: LlamaForCausalLM, windows: torch.Tensor) -> None:
    from untrained import carry_out

    from compress.techniques.gptq import GPTQ

    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows.split(1)]
    carry_out(model, batches, GPTQ(samples=len(windows)))


def llm_compressor(model: LlamaForCausalLM, windows: torch.Tensor) -> None:
    from llmcompressor.modifiers.quantization import GPTQModifier
    from untrained import run_llm_compressor

    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows.split(1)]
    run_llm_compressor(model, batches, GPTQModifier(scheme="W4A16", targets="Linear", ignore=["lm_head"]))


if __name__ == "__main__":
    main()
