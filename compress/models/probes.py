"""Run a model on a few random tokens: what feeds its norms and matrices, and whether its logits have changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from compress.models.layers import evaluation_mode, keep_unstored_buffers
from compress.models.origins import Origins, is_norm
from compress.models.products import flatten_tensors, separate_experts
from compress.models.replay import run_model
from compress.models.skeletons import AssumeTrue

CLOSE = 1e-4
"""Largest change of a logit, as a fraction of the largest logit, that comes from rounding in 32 bits."""


def find_norms(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: module for name, module in modules.items() if is_norm(module)}


@torch.no_grad()
def trace_model(model: Any, trace: Origins, norms: dict[str, nn.Module]) -> tuple[dict[str, set[str]], set[str]]:
    """Return the origins of the inputs of every norm that a run enters, and those of the model's answer; those of the
    inputs of matrices are in ``trace``."""
    inputs: dict[str, set[str]] = {}

    def enter(_: nn.Module, args: tuple, kwargs: dict[str, Any], name: str) -> None:
        inputs.setdefault(name, set()).update(trace.find([args, kwargs]))

    hooks = []
    for name, module in model.named_modules():
        if name in norms:
            hooks.append(
                module.register_forward_pre_hook(
                    lambda module, args, kwargs, name=name: enter(module, args, kwargs, name), with_kwargs=True
                )
            )
        if name in norms or isinstance(module, nn.Embedding):
            hooks.append(module.register_forward_hook(lambda _, __, output, name=name: trace.mark(output, {name})))
    try:
        with trace:
            answer = run_probe(model)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs, trace.find([answer])


def can_trace(model: Any) -> bool:
    """Return whether a run of the model, maybe on the meta device, reaches its end. A few need the values of tensors,
    such as those that choose experts."""
    with suppress(Exception):
        run_probe(model)
        return True
    return False


@torch.no_grad()
def run_probe(model: Any) -> Tensor:
    """Return the model's logits for a few random tokens, or the hidden states that are its answer."""
    table = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(table.num_embeddings, (2, 12), generator=generator, device="cpu").to(table.weight.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    meta = (torch.device("meta"), AssumeTrue()) if ids.device.type == "meta" else ()
    with ExitStack() as contexts:
        for context in (evaluation_mode(model), separate_experts(model), *meta):
            contexts.enter_context(context)
        return next(flatten_tensors(run_model(model, batch))).float()


@contextmanager
def in_single_precision(model: Any) -> Iterator[None]:
    """Let a model compute in 32 bits, and round its weights to their own dtype again at the end."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    with keep_unstored_buffers(model):
        model.float()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])


def measure_change(expected: Tensor, logits: Tensor) -> float:
    """Return the largest change of a logit as a fraction of the largest logit."""
    return float((logits - expected).abs().max() / expected.abs().max())
