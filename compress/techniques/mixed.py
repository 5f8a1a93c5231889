"""Mixed-precision quantization: bits for every layer, under a budget for all of them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pydantic import Field, validate_call
from torch import Tensor, nn

from compress.errors import UserError
from compress.formats.stage import WeightOnly
from compress.maths.losses import soft_loss
from compress.maths.rounding import Scheme, fit_grid, round_to_grid
from compress.maths.sparsity import squared_norms
from compress.models.batches import Batch, draw_calibration_batches
from compress.models.calibration import Section, Shared, split_sections
from compress.models.layers import detect_task_kind, evaluation_mode, unwrap_model
from compress.models.matrices import Matrix
from compress.tasks.kinds import KINDS, Probabilities
from compress.techniques.gptq import Outcome, quantize_layers, write_errors


@dataclass(frozen=True)
class Choice:
    """Bits for layers that share an input. ``stored_bits`` is their size with scales and zero points; ``divergence``
    is how far the model's answers move if these layers alone are rounded."""

    layers: tuple[str, ...]
    bits: int
    stored_bits: float
    divergence: float


class Mixed(WeightOnly):
    """Measure how far the model's answers move if one set of layers at a time is rounded, choose the bits of every set
    within a budget, and quantize with GPTQ.

    The choice under a budget from a sensitivity of each layer is that of Dong et al., "HAWQ-V2", 2020,
    arXiv:1911.03852, section 3, solved exactly (an integer program). The sensitivity is not the Hessian's trace but is
    measured: the Kullback-Leibler divergence of the model's answers to training text. Layers that share an input
    (query, key and value; gate and up) get the same bits, because runtimes fuse them.

    Args:
        average_bits: budget in bits a weight, over all quantized layers, scales and zero points included.
        choices: bits to choose from.
        group_size: consecutive inputs that share a scale; -1 for one scale a row.
        symmetric: integers around zero, without stored zero points.
        act_order: ``act_order`` of :class:`compress.techniques.gptq.GPTQ`.
        damping: ``damping`` of GPTQ.
        samples: training examples that GPTQ calibrates on.
        measured: number of these examples that the answers are compared on.
        batch_size: examples in a batch.
        skip: layers in full precision: ``embeddings`` (always), ``head`` and patterns of layer names.

    Raises:
        UserError: the budget is below the size at the fewest bits, or above the size at the most bits.

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[Mixed(average_bits=4.5, group_size=32)]).fit(module, loader)
    """

    @validate_call
    def __init__(
        self,
        average_bits: Annotated[float, Field(gt=0)] = 4.5,
        choices: Annotated[tuple[Literal[2, 3, 4, 8], ...], Field(min_length=2)] = (2, 3, 4, 8),
        group_size: Annotated[int, Field(ge=-1)] = 128,
        symmetric: bool = True,
        act_order: bool = True,
        damping: Annotated[float, Field(gt=0)] = 0.01,
        samples: Annotated[int, Field(ge=1)] = 128,
        measured: Annotated[int, Field(ge=1)] = 32,
        batch_size: Annotated[int, Field(ge=1)] = 8,
        skip: tuple[str, ...] = ("embeddings", "head"),
    ) -> None:
        if measured > samples:
            raise UserError(
                f"{self.key}.measured is {measured} and {self.key}.samples {samples}. Set {self.key}.measured to "
                f"{samples} or less."
            )
        self.budget = average_bits
        self.schemes = [Scheme(bits, group_size, symmetric) for bits in sorted(set(choices))]
        super().__init__(self.schemes[0], samples, batch_size, skip)
        self.act_order = act_order
        self.damping = damping
        self.measured = measured
        self.options: list[list[Choice]] = []
        self.chosen: list[Choice] = []
        self.outcomes: dict[str, Outcome] = {}

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        super().check(skeleton, before)
        layers = self.select(skeleton)
        weights = sum(matrix.size for matrix in layers.values())
        least, most = (
            sum(count_stored_bits(scheme, matrix) for matrix in layers.values()) / weights
            for scheme in (self.schemes[0], self.schemes[-1])
        )
        if not least <= self.budget <= most:
            raise UserError(
                f"{self.key}.average_bits is {self.budget:g}; with its scale a weight takes {least:.3f} bits at "
                f"{self.schemes[0].bits} and {most:.3f} at {self.schemes[-1].bits}. Set a number between, or other "
                f"{self.key}.choices."
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # 1) Measure the divergence of every set of layers at every number of bits
        model = unwrap_model(pl_module).to(trainer.strategy.root_device)
        wanted = self.select(model)
        batches = list(draw_calibration_batches(trainer, self.samples, self.batch_size))
        few = batches[: -(-self.measured // len(batches[0]["input_ids"]))]
        with evaluation_mode(model):
            self.options = list(measure_choices(model, few, wanted, self.schemes))
        # 2) Choose the bits and quantize
        budget = self.budget * sum(matrix.size for matrix in wanted.values())
        self.chosen = choose_bits(self.options, budget, self.key)
        of_bits = {scheme.bits: scheme for scheme in self.schemes}
        schemes = {name: of_bits[choice.bits] for choice in self.chosen for name in choice.layers}
        self.outcomes = quantize_layers(model, wanted, batches, schemes, self.damping, self.act_order)
        self.keep({name: outcome.quantized for name, outcome in self.outcomes.items()})
        model.cpu()

    def report(self, folder: Path) -> None:
        """Write ``bits.csv``, the bits of every layer and the measured divergence of every choice, and ``errors.csv``,
        the error of every layer's outputs beside that of rounding to nearest."""
        write_errors(self.outcomes, folder / "errors.csv")
        with (folder / "bits.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["layer", "bits", *(f"divergence_at_{scheme.bits}" for scheme in self.schemes)])
            for options, choice in zip(self.options, self.chosen):
                for name in choice.layers:
                    writer.writerow([name, choice.bits, *(option.divergence for option in options)])


def count_stored_bits(scheme: Scheme, matrix: Matrix) -> float:
    """Return the bits that the matrix takes, scales and zero points included."""
    return scheme.average_bits(matrix.inputs, matrix.dtype) * matrix.size


@torch.no_grad()
def measure_choices(
    model: nn.Module, batches: list[Batch], wanted: dict[str, Matrix], schemes: list[Scheme]
) -> Iterator[list[Choice]]:
    """Yield the choices for every set of matrices that share an input: how far the model's answers to ``batches`` move
    if only these are rounded, by each of ``schemes``.

    What runs before the block of a set is not computed again.
    """
    probabilities = KINDS[detect_task_kind(model)].probabilities
    answers: list[Tensor] = []
    for section in split_sections(model, batches, wanted):
        answers = answers or [finish().logits for finish in section.finishes]
        for shared in section.observe(squared_norms):
            yield [measure_choice(section, shared, scheme, answers, probabilities) for scheme in schemes]


def measure_choice(
    section: Section, shared: Shared, scheme: Scheme, answers: list[Tensor], probabilities: Probabilities
) -> Choice:
    """Return how far the ``answers`` move if only the ``shared`` matrices of a section are rounded to nearest, on grids
    fitted with errors weighted by the squared norms of their inputs. The weights are restored."""
    layers, importance = shared
    dense = {name: matrix.weight.clone() for name, matrix in layers.items()}
    for name, matrix in layers.items():
        weight = dense[name]
        rounded = round_to_grid(weight, fit_grid(weight, scheme, weight.dtype, importance), scheme)
        matrix.weight.copy_(rounded.to(weight.dtype) * (weight != 0))
    moved = [
        logit_distance(finish().logits, before, mask, probabilities)
        for finish, before, mask in zip(section.finishes, answers, section.masks)
    ]
    for name, matrix in layers.items():
        matrix.weight.copy_(dense[name])
    size = sum(count_stored_bits(scheme, matrix) for matrix in layers.values())
    return Choice(tuple(layers), scheme.bits, size, torch.stack(moved).mean().item())


def logit_distance(after: Tensor, before: Tensor, mask: Tensor | None, probabilities: Probabilities) -> Tensor:
    """Return how far logits moved: the KL divergence over all tokens except padding, or for a regression the squared
    error."""
    if probabilities is None:
        return F.mse_loss(after.double(), before.double())  # a small layer may move them by less than float32 resolves
    if before.ndim == 2 or probabilities == "positions":
        return soft_loss("kl", after.double(), before.double(), 1.0, mask if before.ndim > 2 else None, probabilities)
    total, count = torch.zeros((), dtype=torch.float64, device=before.device), 0
    for row in range(len(before)):  # in 64 bits the logits of a vocabulary take several times the memory of the model
        one = slice(row, row + 1)
        kept = mask if mask is None else mask[one]
        tokens = before.shape[1] if kept is None else int(kept.sum())
        loss = soft_loss("kl", after[one].double(), before[one].double(), 1.0, kept, probabilities)
        total, count = total + loss * tokens, count + tokens
    return total / count


def choose_bits(options: list[list[Choice]], budget_bits: float, key: str) -> list[Choice]:
    """Return a choice for every set, with the least total divergence within ``budget_bits``.

    Raises:
        UserError: no choice is within the budget.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    flat = [(i, choice) for i, choices in enumerate(options) for choice in choices]
    one_each = [[float(i == row) for i, _ in flat] for row in range(len(options))]
    sizes = [choice.stored_bits / budget_bits for _, choice in flat]
    worst = max(choice.divergence for _, choice in flat) or 1.0  # the solver treats very small numbers as zero
    solution = milp(
        [choice.divergence / worst for _, choice in flat],
        integrality=[1] * len(flat),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint([sizes], -float("inf"), 1)],
    )
    if solution.x is None:
        raise UserError(f"{key}.average_bits is too low for any choice of bits. Set {key}.average_bits higher.")
    return [choice for (_, choice), taken in zip(flat, solution.x) if taken > 0.5]
