"""Generate text token by token and time it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.measuring.bench import Bench
from compress.runtimes.timing import Batch, Latency, Spread, Turns, move_batch, summarise_times, time_in_turns

Step = Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Generation:
    """Times of a causal language model that continues a prompt token by token with a cache of keys and values.

    ``first_token`` is the time to the first new token, ``per_token`` the time of each later token. Every artifact is
    fed the text's own tokens, not the tokens that it predicts.
    """

    first_token: Spread
    per_token: Spread
    prompt_tokens: int
    new_tokens: int


def measure_generation(
    benches: dict[str, Bench], latency: Latency, device: torch.device
) -> tuple[dict[str, Generation], float]:
    """Time in turns the artifacts whose models have a cache of earlier tokens.

    Return the times by name, and the share of the CPUs that others took meanwhile.
    """
    calls, prompts = {}, {}
    texts = {name: move_batch(bench.texts[len(bench.texts) // 2], device) for name, bench in benches.items()}
    lengths = {name: text["input_ids"].shape[1] for name, text in texts.items()}  # tokenizers may differ
    new = min(latency.new_tokens, *(length // 2 for length in lengths.values()))
    for name, text in texts.items():
        prompts[name] = lengths[name] - new
        if new > 1 and (step := find_decoder(benches[name].artifact.model, text)):
            calls[name] = build_decoding_call(step, text["input_ids"], text["attention_mask"], prompts[name], device)
    timed = time_in_turns(calls, latency, cycle=new, label="generation") if calls else Turns({}, 0.0)
    by_token = {name: [block.reshape(-1, new) for block in blocks] for name, blocks in timed.blocks.items()}
    return {
        name: Generation(
            summarise_times([block[:, 0] for block in blocks]),
            summarise_times([block[:, 1:].ravel() for block in blocks]),
            prompts[name],
            new,
        )
        for name, blocks in by_token.items()
    }, timed.others


@torch.inference_mode()
def find_decoder(model: Any, text: Batch) -> Step | None:
    """Return ``step(ids, mask, past)``, or None if the model has no cache.

    The step returns the logits of the tokens ``ids``, which follow the tokens cached in ``past``, and the new cache.
    """
    if isinstance(model, nn.Module):

        def step(ids: Tensor, mask: Tensor, past: Any) -> tuple[Tensor, Any]:
            output = model(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True)
            return output.logits, output.past_key_values
    else:
        if "past" not in inspect.signature(type(model).__call__).parameters:
            return None

        def step(ids: Tensor, mask: Tensor, past: Any) -> tuple[Tensor, Any]:
            output = model(input_ids=ids, attention_mask=mask, past=past)
            return output.logits, getattr(output, "past", None)

    return step if step(text["input_ids"], text["attention_mask"], None)[1] is not None else None


def build_decoding_call(
    step: Step, ids: Tensor, mask: Tensor, prompt: int, device: torch.device
) -> Callable[[int], None]:
    """Return ``call(i)``: 0 reads the prompt, and each later ``i`` the next token of the text."""
    past: Any = None

    @torch.inference_mode()
    def call(i: int) -> None:
        nonlocal past
        new = ids[:, prompt + i - 1 : prompt + i] if i else ids[:, :prompt]
        logits, past = step(new, mask[:, : prompt + i], past if i else None)
        logits[:, -1].argmax(-1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


def build_tokenising_call(bench: Bench) -> Callable[[int], None]:
    """Return ``call(i)``, which tokenizes text ``i``."""
    tokenizer, length = bench.artifact.tokenizer, bench.data.max_length

    def call(i: int) -> None:
        tokenizer(*bench.words[i], truncation=True, max_length=length)

    return call
