"""As many bits for every layer as it needs, under a budget for all of them."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pydantic import Field, validate_call
from torch import Tensor, nn
from tqdm.auto import tqdm

from compress.errors import UserError
from compress.formats import packed
from compress.formats.packed import Quantized, save_model
from compress.maths.losses import soft_loss
from compress.maths.rounding import Scheme, fit_grid, round_to_grid
from compress.models.calibration import Batch, calibrate_layers, draw_calibration_batches
from compress.models.layers import detect_task_kind, evaluation_mode, find_quantizable, unwrap_model
from compress.tasks.kinds import KINDS
from compress.technique import Technique
from compress.techniques.gptq import quantize_layers


@dataclass(frozen=True)
class Choice:
    """Layers that share an input, all at the same ``bits``: how many bits they then take, scales and zero points
    counted, and how far the model's answers move when they alone are rounded."""

    layers: tuple[str, ...]
    bits: int
    stored_bits: float
    divergence: float


class Mixed(Technique, pl.Callback):
    """Measure how far the model's answers move when one set of layers at a time is rounded to few bits, choose the bits
    of every set that move them least in all within a budget, and quantize with GPTQ.

    The choice under a budget from a sensitivity of each layer is that of Dong et al., "HAWQ-V2", 2020,
    arXiv:1911.03852, section 3, made exactly (an integer program); the sensitivity is not the Hessian's trace but
    measured: the Kullback-Leibler divergence of the model's answers to training text. Layers that share an input
    (query, key and value; gate and up) get the same bits, as runtimes fuse them.

    Args:
        average_bits: of a weight, over all layers that are quantized, scales and zero points counted.
        choices: bits that a layer may have.
        group_size: consecutive inputs that share a scale; -1 for one scale a row.
        symmetric: integers around zero, no zero points stored.
        act_order: as of :class:`compress.techniques.gptq.GPTQ`.
        damping: of GPTQ.
        samples: training examples that GPTQ calibrates on.
        measured: how many of them the answers are compared on.
        batch_size: of them run at a time.
        skip: what stays in full precision: ``embeddings`` (always), ``head`` and patterns of layers' names.

    Raises:
        UserError: the budget is below what the fewest bits take, or above what the most do.

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[Mixed(average_bits=4.5, group_size=32)]).fit(module, loader)
    """

    leaves = "packed"
    packages = ("compressed_tensors",)
    shrinks = True
    limits = "weights are decompressed to floats when transformers loads them: less to store, no speed there"

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
                f"{self.key}.measured is {measured} and {self.key}.samples {samples}: set it to {samples} or less."
            )
        self.budget = average_bits
        self.schemes = [Scheme(bits, group_size, symmetric) for bits in sorted(set(choices))]
        self.act_order = act_order
        self.damping = damping
        self.samples = self.train_samples = samples
        self.measured = measured
        self.batch_size = batch_size
        self.skip = skip
        self.keeps_head = "head" in skip
        self.options: list[list[Choice]] = []
        self.chosen: list[Choice] = []
        self.quantized: dict[str, Quantized] = {}
        self.average_bits: dict[str, float] = {}

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        layers = find_quantizable(skeleton, self.skip, self.key)
        for name, linear in layers.items():
            self.schemes[0].check(self.key, name, linear)
        weights = sum(linear.weight.numel() for linear in layers.values())
        least, most = (
            sum(count_stored_bits(scheme, linear) for linear in layers.values()) / weights
            for scheme in (self.schemes[0], self.schemes[-1])
        )
        if not least <= self.budget <= most:
            raise UserError(
                f"{self.key}.average_bits is {self.budget:g} and a weight takes {least:.3f} bits at "
                f"{self.schemes[0].bits}, its scale counted, and {most:.3f} at {self.schemes[-1].bits}: set a number "
                f"between, or other {self.key}.choices."
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = unwrap_model(pl_module).to(trainer.strategy.root_device)
        wanted = find_quantizable(model, self.skip, self.key)
        batches = list(draw_calibration_batches(trainer, self.samples, self.batch_size))
        few = batches[: -(-self.measured // len(batches[0]["input_ids"]))]
        with evaluation_mode(model):
            sets = list(calibrate_layers(model, few, sum_squares, wanted))
            answers = [model(**batch).logits for batch in few]
            self.options = [
                [measure_choice(model, layers, importance, scheme, few, answers) for scheme in self.schemes]
                for layers, importance in tqdm(sets, desc="measuring", unit="set", leave=False, disable=None)
            ]
        budget = self.budget * sum(one.weight.numel() for one in wanted.values())
        self.chosen = choose_bits(self.options, budget, self.key)
        of_bits = {scheme.bits: scheme for scheme in self.schemes}
        schemes = {name: of_bits[choice.bits] for choice in self.chosen for name in choice.layers}
        self.quantized = quantize_layers(model, batches, schemes, self.damping, self.act_order)
        self.average_bits = packed.average_bits(model, self.quantized)
        model.cpu()

    def save(self, model: nn.Module, folder: Path) -> None:
        save_model(model, self.quantized, folder)

    def report(self, folder: Path) -> None:
        """``bits.csv``: every layer's bits, and the divergence that each choice was measured to cost."""
        with (folder / "bits.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["layer", "bits", *(f"divergence_at_{scheme.bits}" for scheme in self.schemes)])
            for options, choice in zip(self.options, self.chosen):
                for name in choice.layers:
                    writer.writerow([name, choice.bits, *(option.divergence for option in options)])


def count_stored_bits(scheme: Scheme, linear: nn.Linear) -> float:
    """Bits that the weights of the layer take."""
    return scheme.average_bits(linear.in_features, linear.weight.dtype) * linear.weight.numel()


def sum_squares(x: Tensor) -> Tensor:
    """The sum of squares of every column of ``[tokens, inputs]``."""
    return x.square().sum(0)


@torch.no_grad()
def measure_choice(
    model: nn.Module,
    layers: dict[str, nn.Linear],
    importance: Tensor,
    scheme: Scheme,
    batches: list[Batch],
    answers: list[Tensor],
) -> Choice:
    """How far the model's ``answers`` to ``batches`` move when ``layers`` and nothing else are rounded to the nearest,
    ``importance`` ``[inputs]`` weighing the errors; they are put back as they were."""
    dense = {name: linear.weight.data for name, linear in layers.items()}
    for linear in layers.values():
        weight = linear.weight.data
        rounded = round_to_grid(weight, fit_grid(weight, scheme, weight.dtype, importance), scheme)
        linear.weight.data = rounded.to(weight.dtype) * (weight != 0)
    moved = [
        logit_distance(model(**batch).logits, before, batch, KINDS[detect_task_kind(model)].probabilities)
        for batch, before in zip(batches, answers)
    ]
    for name, linear in layers.items():
        linear.weight.data = dense[name]
    size = sum(count_stored_bits(scheme, linear) for linear in layers.values())
    return Choice(tuple(layers), scheme.bits, size, torch.stack(moved).mean().item())


def logit_distance(
    found: Tensor, before: Tensor, batch: Batch, probabilities: Literal["softmax", "sigmoid"] | None
) -> Tensor:
    """How far logits moved: the KL divergence over tokens that are no padding, or of a regression the squared error."""
    found, before = found.double(), before.double()  # a layer of many may move them by less than floats tell
    if probabilities is None:
        return F.mse_loss(found, before)
    mask = batch.get("attention_mask") if before.ndim == 3 else None
    return soft_loss("kl", found, before, 1.0, mask, probabilities)


def choose_bits(options: list[list[Choice]], budget_bits: float, key: str) -> list[Choice]:
    """One choice of every set, together of the least divergence that ``budget_bits`` allow.

    Raises:
        UserError: they allow none.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    flat = [(i, choice) for i, choices in enumerate(options) for choice in choices]
    one_each = [[float(i == row) for i, _ in flat] for row in range(len(options))]
    sizes = [choice.stored_bits / budget_bits for _, choice in flat]
    worst = max(choice.divergence for _, choice in flat) or 1.0  # the solver takes very small numbers for zero
    found = milp(
        [choice.divergence / worst for _, choice in flat],
        integrality=[1] * len(flat),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint([sizes], -float("inf"), 1)],
    )
    if found.x is None:
        raise UserError(f"{key}.average_bits leaves no choice of bits: set more.")
    return [choice for (_, choice), taken in zip(flat, found.x) if taken > 0.5]
