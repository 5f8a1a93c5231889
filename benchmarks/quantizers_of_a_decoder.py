"""Compare quantizers of a decoder's weights: the perplexity at the same bits, groups and calibration windows, of
rounding to nearest, of this project's stages, of AutoRound's own library and of llm-compressor's GPTQ.

    python benchmarks/quantizers_of_a_decoder.py MODEL CALIBRATION.txt TEST.txt --results FILE.json \
        [--methods nearest gptq ...] [--bits 4 3 2] [--iterations 50]

The first ``--samples`` windows of one text file calibrate, the first ``--windows`` of the other test. Integers are
symmetric. A figure that FILE.json holds is not computed again, so that a run can be split; with all figures there, the
command prints the table.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from against_llmcompressor import Windows, perplexity, windows
from hydra.utils import get_class
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from untrained import carry_out

from compress.formats.packed import quantization_scheme
from compress.maths.rounding import Scheme, minmax_grid, round_to_nearest
from compress.models.matrices import matrices
from compress.quiet import silence_libraries

Method = Callable[[LlamaForCausalLM, Windows, Scheme, argparse.Namespace], LlamaForCausalLM]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--results", type=Path, required=True, help="JSON file that figures are added to")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=50, help="of autoround, ours and theirs")
    parser.add_argument("--batch-size", type=int, default=4, help="windows of a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--samples", type=int, default=32, help="windows to calibrate on")
    parser.add_argument("--windows", type=int, default=80, help="windows to test on")
    options = parser.parse_args()
    silence_libraries()
    results = json.loads(options.results.read_text()) if options.results.is_file() else {}
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    calibration = windows(tokenizer, options.calibration, options.length, options.samples)
    test = windows(tokenizer, options.test, options.length, options.windows)
    dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    if "float" not in results:
        write(options.results, "float", {"perplexity": perplexity(dense, test)})
    for bits in options.bits:
        for name in options.methods:
            key = f"{name}, {bits} bits"
            if "inputs" in name and bits != 4:
                continue
            if key not in json.loads(options.results.read_text()):
                torch.manual_seed(0)
                model, start = copy.deepcopy(dense), time.perf_counter()
                model = METHODS[name](model, calibration, Scheme(bits, options.group_size), options)
                seconds = time.perf_counter() - start
                write(options.results, key, {"perplexity": perplexity(model, test), "seconds": seconds})
    print_table(json.loads(options.results.read_text()), options)


def write(path: Path, key: str, figures: dict[str, float]) -> None:
    """Add figures to the JSON file."""
    results = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**results, key: figures}, indent=1))
    print(key, figures, flush=True)


def print_table(results: dict[str, Any], options: argparse.Namespace) -> None:
    print(f"float: {results['float']['perplexity']:.2f}")
    table = Table("perplexity (seconds)", *(f"{bits} bits" for bits in options.bits))
    for name in options.methods:
        figures = [results.get(f"{name}, {bits} bits") for bits in options.bits]
        table.add_row(name, *(row and f"{row['perplexity']:.2f} ({row['seconds']:.0f})" for row in figures))
    Console(width=110).print(table)


@torch.no_grad()
def nearest(model: LlamaForCausalLM, _: Windows, scheme: Scheme, __: argparse.Namespace) -> LlamaForCausalLM:
    for matrix in matrices(model).values():
        rounded = round_to_nearest(matrix.weight, minmax_grid(matrix.weight, scheme, matrix.dtype), scheme)
        matrix.weight.copy_(rounded.dequantize(matrix.dtype))
    return model


def ours(
    model: LlamaForCausalLM, calibration: Windows, scheme: Scheme, options: argparse.Namespace, stages: str
) -> LlamaForCausalLM:
    """Apply a chain of our stages."""
    common = {"samples": len(calibration), "batch_size": options.batch_size}
    rounding = {"bits": scheme.bits, "group_size": scheme.group_size, **common}
    inputs = {"weight_bits": scheme.bits, "activation_bits": 4, "group_size": scheme.group_size, "rounding": "gptq"}
    settings = {
        "gptq": rounding,
        "autoround": {**rounding, "iterations": options.iterations},
        "w8a8": {**inputs, **common},
    }
    for name in stages.split("+"):
        stage = get_class(CLASSES[name])(**settings.get(name, {}))
        model = carry_out(model, join(calibration, options.batch_size), stage)
    return model


def join(calibration: Windows, batch_size: int) -> Windows:
    """Return the windows in batches."""
    return [
        {
            name: torch.cat([window[name] for window in calibration[start : start + batch_size]])
            for name in calibration[0]
        }
        for start in range(0, len(calibration), batch_size)
    ]


def llm_compressor(
    model: LlamaForCausalLM, calibration: Windows, scheme: Scheme, _: argparse.Namespace
) -> LlamaForCausalLM:
    from against_llmcompressor import theirs
    from llmcompressor.modifiers.quantization import GPTQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from loguru import logger

    logger.remove()
    IntermediatesCache._pin_intermediate = staticmethod(lambda value: value)  # pins memory even without a GPU
    described = quantization_scheme(scheme, None, dynamic=False, targets=["Linear"])
    return theirs(GPTQModifier(config_groups={"group_0": described}, ignore=["lm_head"]), model, calibration)


def auto_round(
    model: LlamaForCausalLM, calibration: Windows, scheme: Scheme, options: argparse.Namespace
) -> LlamaForCausalLM:
    """Apply the library, which reads rows of one batch at a time."""
    from auto_round import AutoRound

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    library = AutoRound(
        model,
        tokenizer,
        scheme="W4A16",
        bits=scheme.bits,
        group_size=scheme.group_size,
        sym=scheme.symmetric,
        iters=options.iterations,
        nsamples=len(calibration),
        seqlen=options.length,
        batch_size=options.batch_size,
        dataset=join(calibration, options.batch_size),
        device_map="cpu",
    )
    model, _ = library.quantize()
    return model.float().eval()


CLASSES = {
    "rotate": "compress.techniques.rotate.Rotate",
    "gptq": "compress.techniques.gptq.GPTQ",
    "autoround": "compress.techniques.autoround.AutoRound",
    "w8a8": "compress.techniques.w8a8.W8A8",
}
METHODS: dict[str, Method] = {
    "nearest": nearest,
    "llm-compressor's gptq": llm_compressor,
    "gptq": partial(ours, stages="gptq"),
    "rotate+gptq": partial(ours, stages="rotate+gptq"),
    "AutoRound's library": auto_round,
    "autoround": partial(ours, stages="autoround"),
    "rotate+autoround": partial(ours, stages="rotate+autoround"),
    "gptq, inputs of 4 bits": partial(ours, stages="w8a8"),
    "rotate+gptq, inputs of 4 bits": partial(ours, stages="rotate+w8a8"),
}

if __name__ == "__main__":
    main()
