"""Score the heads, FFN channels and experts of a model on batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.maths.sparsity import squared_norms
from compress.maths.units import Scores, activation_score, standardise_score, taylor_score
from compress.models.batches import Batch
from compress.models.blocks import Block, read_blocks, select_blocks
from compress.models.calibration import observe
from compress.models.layers import detect_task_kind, limit_gradients
from compress.models.matrices import Matrix
from compress.tasks.kinds import KINDS

Reader = tuple[Matrix, int]
"""A matrix that reads units, and their number."""


def find_unit_readers(blocks: list[Block]) -> dict[str, list[list[Reader]]]:
    """Return the matrices that read the units of every block that has some: one for the heads or the FFN, and one for
    every expert."""
    return {
        part: [
            [(matrix, len(index)) for matrix, index in block.find_readers(part)]
            for block in select_blocks(blocks, part)
        ]
        for part in ("groups", "ffn", "experts")
    }


def score_by_gradient(model: Any, batches: list[Batch]) -> dict[str, Scores]:
    """Return the scores of all units from the gradients of the loss on ``batches``. Only one weight's gradient is in
    memory at a time."""
    blocks = read_blocks(model)
    of_weight: dict[nn.Parameter, list[tuple[Matrix, int, Tensor]]] = {}

    def start(reader: Reader) -> Tensor:
        matrix, units = reader
        score = torch.zeros(units, device=matrix.stored.device)
        of_weight.setdefault(matrix.stored, []).append((matrix, units, score))  # type: ignore[arg-type]
        return score

    readers = find_unit_readers(blocks)
    scores = {part: [[start(reader) for reader in row] for row in each] for part, each in readers.items()}

    def add(weight: nn.Parameter) -> None:
        for matrix, units, score in of_weight[weight]:
            score += taylor_score(matrix.weight, matrix.grad, units)  # type: ignore[arg-type]
        weight.grad = None

    with limit_gradients(model, of_weight):
        hooks = [weight.register_post_accumulate_grad_hook(add) for weight in of_weight]
        for batch in batches:
            model(**batch).loss.backward()
        for hook in hooks:
            hook.remove()
    return share_scores(blocks, join_scores(blocks, scores))


def score_by_fisher(model: Any, batches: list[Batch]) -> dict[str, Scores]:
    """Return the scores of head groups and FFN channels: half the mean, over texts, of the squared gradient of a text's
    loss with respect to a factor on the unit. This is the second-order change of the loss without the unit, in the same
    unit for heads and channels of all blocks (Kwon et al., "A Fast Post-Training Pruning Framework for Transformers",
    2022, arXiv:2204.09656)."""
    blocks = read_blocks(model)
    readers = {part: each for part, each in find_unit_readers(blocks).items() if part in ("groups", "ffn")}
    counts = {matrix.module: units for each in readers.values() for ((matrix, units),) in each}
    device = next(model.parameters()).device
    scores = {module: torch.zeros(units, device=device) for module, units in counts.items()}
    factors: list[tuple[nn.Module, Tensor]] = []

    def multiply(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (x,) = args
        by_text = x if x.ndim > 2 else x.view(rows if len(x) % rows == 0 else 1, -1, x.shape[-1])
        factor = x.new_ones(len(by_text), *[1] * (by_text.ndim - 2), counts[module], 1, requires_grad=True)
        factors.append((module, factor))
        return ((by_text.unflatten(-1, (counts[module], -1)) * factor).view(x.shape),)

    texts = rows = 0
    hooks = [module.register_forward_pre_hook(multiply) for module in counts]
    try:
        for batch in batches:
            factors.clear()
            rows = len(batch["input_ids"])
            with limit_gradients(model):
                loss = model(**batch).loss * rows  # the mean over texts, so each text's gradient is its own
                gradients = torch.autograd.grad(loss, [factor for _, factor in factors])
            of_module: dict[nn.Module, Tensor] = {}
            for (module, _), gradient in zip(factors, gradients):  # a module that is called twice has two factors
                of_module[module] = of_module.get(module, 0) + gradient.flatten(1).float()
            for module, gradient in of_module.items():
                scores[module] += gradient.square().sum(0) / 2
            texts += rows
    finally:
        for hook in hooks:
            hook.remove()
    means = {part: [scores[matrix.module] / texts for ((matrix, _),) in each] for part, each in readers.items()}
    return share_scores(blocks, means)


def score_by_activation(model: Any, batches: list[Batch]) -> dict[str, Scores]:
    """Return the scores of all units from their activations on ``batches``."""
    inputs: dict[Any, Tensor] = {}
    for shared in observe(model, batches, squared_norms):
        for matrix in shared.matrices.values():
            inputs[matrix.stored, matrix.expert] = shared.statistic.sqrt()

    def score(reader: Reader) -> Tensor:
        matrix, units = reader
        return activation_score(matrix.weight, inputs[matrix.stored, matrix.expert], units)

    blocks = read_blocks(model)
    readers = find_unit_readers(blocks)
    scores = {part: [[score(reader) for reader in row] for row in each] for part, each in readers.items()}
    joined = join_scores(blocks, scores)
    return share_scores(blocks, {part: [standardise_score(row) for row in each] for part, each in joined.items()})


def join_scores(blocks: list[Block], scores: dict[str, list[list[Tensor]]]) -> dict[str, Scores]:
    """Return the scores of every block as one tensor: ``[units]``, or ``[experts, channels]`` for the channels of
    experts."""
    return {
        part: [
            torch.stack(row) if part == "ffn" and block.experts else torch.cat(row)
            for row, block in zip(each, select_blocks(blocks, part), strict=True)
        ]
        for part, each in scores.items()
    }


def share_scores(blocks: list[Block], scores: dict[str, Scores]) -> dict[str, Scores]:
    """Return the scores, with those of heads summed over the blocks that share the biases of their heads: these lose
    the same heads."""
    shared: dict[int, Tensor] = {}
    for block, score in zip(blocks, scores["groups"], strict=True):
        if block.biases is not None:
            shared[id(block.biases)] = shared.get(id(block.biases), torch.zeros_like(score)) + score
    return scores | {"groups": [shared.get(id(b.biases), score) for b, score in zip(blocks, scores["groups"])]}


@torch.no_grad()
def label_with_predictions(model: Any, batch: Batch) -> Batch:
    """Return the batch with the model's predictions as labels. (The cross-entropy to the whole distribution has no
    gradient as long as the model is unchanged.)"""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    kind = KINDS[detect_task_kind(model)]
    return {**inputs, "labels": kind.choose_labels(model(**inputs).logits, batch)}
