"""Measure the seconds a decoder block of TinyLlama's shape takes by this project and by llm-compressor, in turns, and
the errors of both.

    python benchmarks/quantizers_at_size.py [--methods gptq sparsegpt 2:4 awq] [--samples 8] [--length 256]

The model has one block with random weights, correlated inputs of very different sizes, and next to no head. Both sides
get the same weights, windows, bits, groups and threads, with their own defaults otherwise: GPTQ visits columns in the
order of activations on both sides. Seconds are those of the processor, so that other programs count less. The time of
the same call on a narrow block, which is that of the machinery around the mathematics, is subtracted.

The error of the layers is the mean of tr(dW H dW') / tr(W H W') over the layers of the block; H is the second moment of
the dense model's inputs. The error of the block is that of its outputs, both blocks reading the same: the inputs of the
calibration, and as many others, which count more, because any method fits a few tokens well. AWQ scales weights and
inputs, so that only the outputs of the block can be compared.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial

import torch
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.quantization import GPTQModifier
from loguru import logger
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from untrained import carry_out, run_llm_compressor

from compress.formats.packed import quantization_scheme
from compress.maths.hessian import second_moment
from compress.maths.rounding import Scheme
from compress.quiet import silence_libraries
from compress.runtimes.processor import read_processor
from compress.techniques.awq import AWQ
from compress.techniques.gptq import GPTQ
from compress.techniques.prune import Prune

Batches = list[dict[str, torch.Tensor]]
Method = Callable[[LlamaForCausalLM, Batches], LlamaForCausalLM]
TINYLLAMA = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
NARROW = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
VOCABULARY = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods = compared_methods(bits=4, group_size=128)
    parser.add_argument("--methods", nargs="+", default=list(methods), choices=list(methods))
    parser.add_argument("--samples", type=int, default=8, help="windows to calibrate on")
    parser.add_argument("--batch-size", type=int, default=8, help="windows of a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1, help="runs of each; the fastest counts")
    options = parser.parse_args()
    silence_libraries()
    logger.remove()  # llm-compressor's own
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    batches, others = (draw_batches(options.samples, options.length, options.batch_size) for _ in range(2))
    model, narrow = one_block(TINYLLAMA), one_block(NARROW)
    dense = Dense(model, batches, others)
    tokens, processor = options.samples * options.length, read_processor()["model name"]
    print(f"{processor}, {options.threads} threads, {tokens} tokens, PyTorch {torch.__version__}")
    for name in options.methods:
        errors = ("error of the layers", "ratio", "error of the block", "ratio", "on other text", "ratio")
        table = Table("", "", "s a block", "ratio", *errors)
        seconds, results = {}, {}
        for method in methods[name].values():  # what is imported and compiled on first use is not timed
            timed(method, narrow, batches)
        for _ in range(options.repeats):
            for side, method in methods[name].items():
                machinery, _ = timed(method, narrow, batches)
                whole, results[side] = timed(method, model, batches)
                seconds[side] = min(whole - machinery, seconds.get(side, float("inf")))
        add_rows(table, name, seconds, {side: dense.compare(result) for side, result in results.items()})
        Console(width=150).print(table)  # at once: a run takes minutes


def draw_batches(samples: int, length: int, size: int) -> Batches:
    windows = torch.randint(VOCABULARY, (samples, length))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows.split(size)]


def compared_methods(bits: int, group_size: int) -> dict[str, dict[str, Method]]:
    def groups(symmetric: bool) -> dict:
        scheme = quantization_scheme(Scheme(bits, group_size, symmetric), None, dynamic=False, targets=["Linear"])
        return {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}

    def sparse(structure: str) -> Callable:
        return partial(SparseGPTModifier, sparsity=0.5, mask_structure=structure, ignore=["re:.*lm_head"])

    return {
        "gptq": {
            "llm-compressor": partial(theirs, lambda: GPTQModifier(**groups(True))),
            "ours": partial(ours, lambda **found: GPTQ(bits, group_size, symmetric=True, **found)),
        },
        "sparsegpt": {
            "llm-compressor": partial(theirs, sparse("0:0")),
            "ours": partial(ours, partial(Prune, sparsity=0.5, criterion="sparsegpt")),
        },
        "2:4": {
            "llm-compressor": partial(theirs, sparse("2:4")),
            "ours": partial(ours, partial(Prune, pattern="2:4", criterion="sparsegpt")),
        },
        "awq": {
            "llm-compressor": partial(theirs, lambda: AWQModifier(duo_scaling="both", **groups(False))),
            "ours": partial(ours, lambda **found: AWQ(bits, group_size, symmetric=False, **found)),
        },
    }


def one_block(sizes: dict[str, int]) -> LlamaForCausalLM:
    """Return a model of one block whose inputs are correlated and of very different sizes."""
    config = LlamaConfig(
        **sizes, vocab_size=VOCABULARY, num_hidden_layers=1, tie_word_embeddings=False, use_cache=False
    )
    model = LlamaForCausalLM(config).eval()
    width = sizes["hidden_size"]
    mixing = torch.randn(width, width) / width**0.5 + torch.eye(width)
    unequal = torch.logspace(-0.5, 0.5, width)[torch.randperm(width)]
    directions = torch.logspace(0, -2, width)[:, None] * mixing * unequal
    model.model.embed_tokens.weight.data = torch.randn(VOCABULARY, width) @ directions
    model.lm_head = nn.Linear(width, 1, bias=False)  # a large one would cost llm-compressor two more passes
    return model


def timed(method: Method, model: LlamaForCausalLM, batches: Batches) -> tuple[float, LlamaForCausalLM]:
    changed = copy.deepcopy(model)
    begin = time.process_time()
    result = method(changed, batches)
    return time.process_time() - begin, result


def ours(stage: Callable, model: LlamaForCausalLM, batches: Batches) -> LlamaForCausalLM:
    return carry_out(model, batches, stage(samples=sum(len(batch["input_ids"]) for batch in batches)))


def theirs(modifier: Callable, model: LlamaForCausalLM, batches: Batches) -> LlamaForCausalLM:
    return run_llm_compressor(model, batches, modifier())


class Dense:
    """The weights of a dense model, the second moments of its inputs and the outputs of its block."""

    @torch.inference_mode()
    def __init__(self, model: LlamaForCausalLM, batches: Batches, others: Batches) -> None:
        layers = {name: one for name, one in model.model.layers.named_modules() if isinstance(one, nn.Linear)}
        self.weights = {name: layer.weight.data for name, layer in layers.items()}
        self.moments: dict[str, torch.Tensor] = {}
        self.texts = batches[:1], others[:1]
        hooks = [layer.register_forward_pre_hook(partial(self._add_moment, name)) for name, layer in layers.items()]
        for batch in batches:
            model(**batch)
        for hook in hooks:
            hook.remove()
        self.outputs = [self._run(model, text) for text in self.texts]

    def _add_moment(self, name: str, _: nn.Module, args: tuple) -> None:
        moment = second_moment(args[0].flatten(0, 1))
        self.moments[name] = self.moments[name].add_(moment) if name in self.moments else moment

    def _run(self, model: LlamaForCausalLM, batches: Batches) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        block = model.model.layers[0]
        hook = block.register_forward_hook(lambda _, args, output: seen.append(output - args[0]))
        for batch in batches:
            model(**batch)
        hook.remove()
        return torch.cat(seen)

    @torch.inference_mode()
    def compare(self, model: LlamaForCausalLM) -> tuple[float, ...]:
        """Return the relative squared errors of the layers, and of what the block adds to its inputs: those of the
        calibration, and others."""
        errors = []
        for name, weight in self.weights.items():
            change, moment = model.model.layers.get_submodule(name).weight.data - weight, self.moments[name]
            errors.append(((change @ moment) * change).sum() / ((weight @ moment) * weight).sum())
        pairs = [(self._run(model, text), outputs) for text, outputs in zip(self.texts, self.outputs)]
        blocks = [((found - outputs).square().sum() / outputs.square().sum()).item() for found, outputs in pairs]
        return torch.stack(errors).mean().item(), *blocks


def add_rows(table: Table, name: str, seconds: dict[str, float], errors: dict[str, tuple[float, ...]]) -> None:
    layers, block, other = ({side: found[i] for side, found in errors.items()} for i in range(3))
    if name == "awq":
        layers = {}
    for side in seconds:
        cells = [name, side]
        for values, shape in ((seconds, ".2f"), (layers, ".3e"), (block, ".3e"), (other, ".3e")):
            if values:
                cells += [f"{values[side]:{shape}}", f"{values['llm-compressor'] / values[side]:.2f}"]
            else:
                cells += ["", ""]
        table.add_row(*cells)


if __name__ == "__main__":
    main()
