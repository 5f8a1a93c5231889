"""Generate text token by token and time it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.measuring.bench import Bench
from compress.measuring.timing import Batch, Spread, move_batch, summarise_times, time_in_turns
from compress.planning.settings import Latency

Step = Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Generation:
    """A causal language model that goes on from a prompt, a token at a time, with what it keeps of the tokens before:
    the time to the first new token, and that of each one after it. Every artifact is fed the text's own tokens."""

    first_token: Spread
    per_token: Spread
    prompt_tokens: int
    new_tokens: int


def measure_generation(benches: dict[str, Bench], latency: Latency, device: torch.device) -> dict[str, Generation]:
    """The times of those artifacts that keep the tokens before, in turns."""
    calls, prompt, new = {}, 0, 0
    for name, bench in benches.items():
        text = move_batch(bench.texts[len(bench.texts) // 2], device)
        new = min(latency.new_tokens, text["input_ids"].shape[1] // 2)
        prompt = text["input_ids"].shape[1] - new
        if new > 1 and (step := find_decoder(bench.artifact.model, text)):
            calls[name] = build_decoding_call(step, text["input_ids"], text["attention_mask"], prompt, device)
    found = time_in_turns(calls, latency, cycle=new, label="generation").blocks if calls else {}
    split = {name: [block.reshape(-1, new) for block in blocks] for name, blocks in found.items()}
    return {
        name: Generation(
            summarise_times([block[:, 0] for block in blocks]),
            summarise_times([block[:, 1:].ravel() for block in blocks]),
            prompt,
            new,
        )
        for name, blocks in split.items()
    }


@torch.inference_mode()
def find_decoder(model: Any, text: Batch) -> Step | None:
    """``step(ids, mask, past)``: the logits of the tokens ``ids`` after those that ``past`` keeps, and what is to be
    kept then; None where the model keeps nothing."""
    if isinstance(model, nn.Module):
        answered = "past_key_values"

        def step(ids: Tensor, mask: Tensor, past: Any) -> tuple[Tensor, Any]:
            given = model(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True)
            return given.logits, given.past_key_values
    else:
        answered = "past"
        if answered not in inspect.signature(type(model).__call__).parameters:
            return None

        def step(ids: Tensor, mask: Tensor, past: Any) -> tuple[Tensor, Any]:
            given = model(input_ids=ids, attention_mask=mask, past=past)
            return given.logits, getattr(given, answered, None)

    return step if step(text["input_ids"], text["attention_mask"], None)[1] is not None else None


def build_decoding_call(
    step: Step, ids: Tensor, mask: Tensor, prompt: int, device: torch.device
) -> Callable[[int], None]:
    """A call that reads the prompt when ``i`` is 0, and then one more of the tokens that follow it."""
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
    """A call that makes tokens of text ``i``."""
    tokenizer, length = bench.artifact.tokenizer, bench.data.max_length

    def call(i: int) -> None:
        tokenizer(*bench.words[i], truncation=True, max_length=length)

    return call
