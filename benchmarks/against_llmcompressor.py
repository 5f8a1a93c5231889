"""Compare this project, llm-compressor and the simplest method (rounding to nearest, pruning by magnitude): the
perplexity after weight-only quantization and after SparseGPT, with the same weights, calibration text and format.

    python benchmarks/against_llmcompressor.py MODEL CALIBRATION.txt TEST.txt [--group-size 128] [--length 256]

The first ``--samples`` windows of one text file calibrate, the first ``--windows`` of the other file test.
As in their papers, GPTQ's integers are symmetric and AWQ's are not.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from loguru import logger
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from untrained import carry_out

from compress.formats.packed import quantization_scheme
from compress.maths.rounding import Scheme
from compress.quiet import silence_libraries
from compress.techniques.awq import AWQ
from compress.techniques.gptq import GPTQ
from compress.techniques.prune import Prune

Windows = list[dict[str, torch.Tensor]]
Method = Callable[[LlamaForCausalLM, Windows], LlamaForCausalLM]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--samples", type=int, default=128, help="windows to calibrate on")
    parser.add_argument("--windows", type=int, default=400, help="windows to test on, at most")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="beginnings of names; all by default")
    options = parser.parse_args()
    silence_libraries()
    logger.remove()  # llm-compressor's own
    IntermediatesCache._pin_intermediate = staticmethod(lambda value: value)  # pins memory even without a GPU
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    calibration = windows(tokenizer, options.calibration, options.length, options.samples)
    test = windows(tokenizer, options.test, options.length, options.windows)
    dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    floats = perplexity(dense, test)
    table = Table("", "float", "simplest", "llm-compressor", "ours", "ours / llm-compressor")
    for name, methods in compared_methods(options.group_size).items():
        if options.methods and not name.startswith(tuple(options.methods)):
            continue
        perplexities = [perplexity(method(copy.deepcopy(dense), calibration), test) for method in methods]
        figures = (f"{value:.3f}" for value in (floats, *perplexities))
        table.add_row(name, *figures, f"{perplexities[2] / perplexities[1]:.4f}")
    Console(width=110).print(table)


def compared_methods(group_size: int) -> dict[str, tuple[Method, Method, Method]]:
    """Return the simplest method, llm-compressor's and ours, by name."""
    methods: dict[str, tuple[Method, Method, Method]] = {}
    awq = partial(AWQModifier, duo_scaling="both")
    for name, stage, modifier, symmetric in (("GPTQ", GPTQ, GPTQModifier, True), ("AWQ", AWQ, awq, False)):
        for bits in (4, 3):
            scheme = quantization_scheme(Scheme(bits, group_size, symmetric), None, dynamic=False, targets=["Linear"])
            groups = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
            methods[f"{name}, {bits} bits"] = (
                partial(theirs, QuantizationModifier(**groups)),
                partial(theirs, modifier(**groups)),
                partial(ours, partial(stage, bits, group_size, symmetric)),
            )
    for structure, goal in (("0:0", {"sparsity": 0.5}), ("2:4", {"pattern": "2:4"})):
        methods[f"SparseGPT, {goal.get('pattern', '50 %')}"] = (
            partial(ours, partial(Prune, criterion="magnitude", scope=None if "pattern" in goal else "layer", **goal)),
            partial(theirs, SparseGPTModifier(sparsity=0.5, mask_structure=structure, ignore=["re:.*lm_head"])),
            partial(ours, partial(Prune, criterion="sparsegpt", **goal)),
        )
    return methods


def windows(tokenizer, path: Path, length: int, most: int) -> Windows:
    """Return the first ``most`` windows of ``length`` tokens of a text file."""
    ids = tokenizer(path.read_text(errors="replace"), return_tensors="pt")["input_ids"][0]
    cut = ids[: len(ids) // length * length].view(-1, length)[:most]
    return [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in cut]


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, test: Windows) -> float:
    losses = [model(**window, labels=window["input_ids"]).loss.item() for window in test]
    return math.exp(sum(losses) / len(losses))


def ours(stage: Callable, model: LlamaForCausalLM, calibration: Windows) -> LlamaForCausalLM:
    return carry_out(model, calibration, stage(samples=len(calibration)))


def theirs(modifier: Modifier, model: LlamaForCausalLM, calibration: Windows) -> LlamaForCausalLM:
    rows = [{name: value[0].tolist() for name, value in window.items()} for window in calibration]
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=modifier,
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]["input_ids"]),
    )
    return model.eval()


if __name__ == "__main__":
    main()
