"""Score the heads, FFN channels and experts of a model on batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.maths.sparsity import squared_norms
from compress.maths.units import Scores, activation_score, standardise_score, taylor_score
from compress.models.batches import Batch
from compress.models.calibration import observe
from compress.models.layers import detect_task_kind
from compress.models.matrices import Matrix
from compress.models.shapes import read_blocks, see_matrix
from compress.tasks.kinds import KINDS


def find_unit_readers(model: nn.Module) -> dict[str, list[list[tuple[Matrix, int]]]]:
    """Return the matrices that read the units of every block, each with its number of units: one for the heads or the
    FFN, and one for every expert."""
    readers: dict[str, list[list[tuple[Matrix, int]]]] = {"groups": [], "ffn": [], "experts": []}
    for block in read_blocks(model):
        readers["groups"].append([(see_matrix(block.attention_out), block.groups)])
        readers["ffn"].append([(see_matrix(block.ffn_out), block.ffn)] if block.ffn else [])
        readers["experts"].append([(matrix, 1) for matrix in block.expert_outs])
    return readers


def score_by_gradient(model: Any, batches: list[Batch]) -> dict[str, Scores]:
    """Return the scores of all units from the gradients of the loss on ``batches``. Only one weight's gradient is in
    memory at a time."""
    readers = find_unit_readers(model)
    of_weight: dict[nn.Parameter, list[tuple[Matrix, int, Tensor]]] = {}
    scores: dict[str, list[list[Tensor]]] = {part: [[] for _ in each] for part, each in readers.items()}
    for part, each in readers.items():
        for index, row in enumerate(each):
            for matrix, units in row:
                score = torch.zeros(units, device=matrix.stored.device)
                of_weight.setdefault(matrix.stored, []).append((matrix, units, score))  # type: ignore[arg-type]
                scores[part][index].append(score)

    def add(weight: nn.Parameter) -> None:
        for matrix, units, score in of_weight[weight]:
            score += taylor_score(matrix.weight, matrix.grad, units)  # type: ignore[arg-type]
        weight.grad = None

    learned = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in learned:
        parameter.requires_grad_(parameter in of_weight)
    hooks = [weight.register_post_accumulate_grad_hook(add) for weight in of_weight]
    for batch in batches:
        model(**batch).loss.backward()
    for hook in hooks:
        hook.remove()
    for parameter, required in learned.items():
        parameter.requires_grad_(required)
    return {part: [torch.cat(row) for row in each if row] for part, each in scores.items()}


def score_by_activation(model: Any, batches: list[Batch]) -> dict[str, Scores]:
    """Return the scores of all units from their activations on ``batches``."""
    inputs: dict[Any, Tensor] = {}
    for shared in observe(model, batches, squared_norms):
        for matrix in shared.matrices.values():
            inputs[matrix.stored, matrix.expert] = shared.statistic.sqrt()

    def score(matrix: Matrix, units: int) -> Tensor:
        return activation_score(matrix.weight, inputs[matrix.stored, matrix.expert], units)

    return {
        part: [standardise_score(torch.cat([score(*reader) for reader in row])) for row in each if row]
        for part, each in find_unit_readers(model).items()
    }


@torch.no_grad()
def label_with_predictions(model: Any, batch: Batch) -> Batch:
    """Return the batch with the model's predictions as labels. (The cross-entropy to the whole distribution has no
    gradient as long as the model is unchanged.)"""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    kind = KINDS[detect_task_kind(model)]
    return {**inputs, "labels": kind.choose_labels(model(**inputs).logits, batch)}
