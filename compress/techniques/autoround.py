"""Weight-only quantization whose rounding is learnt, block by block; pruned zeros stay."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pydantic import Field, validate_call
from torch import Tensor

from compress.errors import UserError
from compress.formats.gptq import SCALE
from compress.formats.packed import Quantized
from compress.formats.stage import WeightOnly
from compress.maths.rounding import Integers, Scheme
from compress.maths.signround import Learnt, Rounding, search_shares
from compress.maths.sparsity import squared_norms
from compress.models.batches import draw_calibration_batches
from compress.models.calibration import Section, select_tokens, split_sections
from compress.models.layers import evaluation_mode, limit_gradients, unwrap_model
from compress.models.matrices import Matrix

GPTQ_BITS = (2, 3, 4, 8)


class AutoRound(WeightOnly):
    """Round the weights of the transformer blocks to a few bits, and learn for every weight whether it is rounded up or
    down, and for every group how far its range is clipped.

    Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", 2023,
    arXiv:2309.05516 (SignRound, the method of AutoRound). Blocks are quantized in order. Signed gradient descent, whose
    step falls linearly to zero, brings a block's outputs close to those of the unchanged model, and the best iterate is
    kept. It begins with the ranges of the least rounding error, weighted by the inputs. A block is never worse than
    rounded to nearest on the calibration text. A weight that is exactly zero stays exactly zero.

    Where blocks cannot run one by one (layers that blocks share, encoder-decoders), all are learnt together, on the
    model's logits. The activations of one block are in memory, with and without quantization, and so is an offset for
    every weight of the block.

    Runs when the fit ends, on the first ``samples`` examples of the datamodule's ``calibration``, or of the training
    loader if there is none. The artifact is in the compressed-tensors format, which transformers and vLLM load. A
    language model can be saved in GPTQ's own format instead, for GPTQModel, and for transformers with GPTQModel
    installed.

    Args:
        bits: bits of each integer.
        group_size: consecutive inputs that share a scale; -1 for one scale a row.
        symmetric: integers around zero, without stored zero points.
        iterations: steps for each block, each on one batch.
        step: size of the first step, in steps of the grid and shares of a range; null for 1 / ``iterations``, with
            which a rounding can just turn.
        clip: learn the ranges too.
        inputs: inputs of a block while it learns: what the ``quantized`` blocks before it compute, or the unchanged
            ones (``float``).
        samples: training examples (for a language model, blocks of tokens) to calibrate on.
        batch_size: examples in a batch.
        format: ``compressed-tensors`` or ``gptq``, which stores scales in float16.
        skip: layers in full precision: ``embeddings`` (always), ``head`` (all else outside the transformer blocks) and
            patterns of layer names.

    Raises:
        UserError: groups do not divide a layer, a pattern matches no layer, or the format cannot store the settings.

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[AutoRound(bits=4, group_size=32, iterations=4)]).fit(module, loader)
    """

    @validate_call
    def __init__(
        self,
        bits: Annotated[int, Field(ge=2, le=8)] = 4,
        group_size: Annotated[int, Field(ge=-1)] = 128,
        symmetric: bool = True,
        iterations: Annotated[int, Field(ge=1)] = 200,
        step: Annotated[float, Field(gt=0)] | None = None,
        clip: bool = True,
        inputs: Literal["quantized", "float"] = "quantized",
        samples: Annotated[int, Field(ge=1)] = 128,
        batch_size: Annotated[int, Field(ge=1)] = 8,
        format: Literal["compressed-tensors", "gptq"] = "compressed-tensors",
        skip: tuple[str, ...] = ("embeddings", "head"),
    ) -> None:
        super().__init__(Scheme(bits, group_size, symmetric), samples, batch_size, skip, format)
        self.descent = Descent(iterations, step or 1 / iterations, clip)
        self.inputs = inputs
        self.outcomes: list[Outcome] = []
        if format == "gptq" and bits not in GPTQ_BITS:
            raise UserError(
                f"{self.key}.bits is {bits}; readers of {self.key}.format=gptq know 2, 3, 4 and 8. Set one "
                f"of these, or {self.key}.format=compressed-tensors."
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = unwrap_model(pl_module).to(trainer.strategy.root_device)
        self.check(model, [])  # a script without the chain has not checked the model
        batches = list(draw_calibration_batches(trainer, self.samples, self.batch_size))
        scale = SCALE if self.format == "gptq" else None
        with evaluation_mode(model), limit_gradients(model):
            sections = split_sections(model, batches, self.select(model), floats=True)
            self.outcomes = [
                learn_section(section, self.scheme, self.descent, self.inputs == "float", scale) for section in sections
            ]
        integers = (pair for outcome in self.outcomes for pair in outcome.integers.items())
        self.keep({name: Quantized(weight) for name, weight in integers})
        model.cpu()

    def report(self, folder: Path) -> None:
        """Write ``losses.csv``: the mean squared error of every block's outputs, beside that of rounding to nearest."""
        with (folder / "losses.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["block", "squared_error", "squared_error_of_nearest", "gain"])
            for name, _, loss, nearest in self.outcomes:
                writer.writerow([name or "model", loss, nearest, 1 - loss / nearest if nearest else 0.0])


class Descent(NamedTuple):
    """The settings of signed gradient descent: its number of iterations, the size of the first step, and whether ranges
    are learnt too."""

    iterations: int
    step: float
    clip: bool


class Outcome(NamedTuple):
    """A quantized section, by its name: the integers of its matrices, and the mean squared error of its outputs on the
    calibration text: of these integers, and of those from rounding to nearest."""

    name: str
    integers: dict[str, Integers]
    loss: float
    nearest: float


class Objective:
    """The mean squared error of a section's outputs, batch by batch, without padding: the distance to the outputs of
    the unchanged model. With ``floats`` the section runs on the inputs that it had there."""

    @torch.no_grad()
    def __init__(self, section: Section, floats: bool) -> None:
        unchanged = section.unchanged
        self.forwards: Sequence[Callable[[], Any]] = section.forwards
        if unchanged and floats:
            self.forwards = unchanged.forwards
        self.masks = section.masks
        outputs = unchanged.outputs if unchanged else [forward().logits for forward in section.forwards]
        self.targets = [select_tokens(output, mask).float() for output, mask in zip(outputs, self.masks)]

    def loss(self, number: int) -> Tensor:
        """Return the error on a batch."""
        output = self.forwards[number]()
        output = output if isinstance(output, Tensor) else output.logits
        return F.mse_loss(select_tokens(output, self.masks[number]).float(), self.targets[number])

    @torch.no_grad()
    def measure(self) -> list[float]:
        """Return the error on every batch."""
        return [self.loss(number).item() for number in range(len(self.forwards))]

    def mean(self, losses: list[float]) -> float:
        """Return the error over all tokens, given that on every batch."""
        tokens = [len(target) for target in self.targets]
        return sum(loss * count for loss, count in zip(losses, tokens)) / sum(tokens)


def learn_section(
    section: Section, scheme: Scheme, descent: Descent, floats: bool = False, scale: torch.dtype | None = None
) -> Outcome:
    """Quantize the matrices of a section in place with a learnt rounding. Scales have the dtype ``scale``, by default
    that of the weights.

    What is kept is the best on all of the text: of rounding to nearest, of the iterate with the least error on its
    batch, relative to that of rounding to nearest there, and of the last iterate.
    """
    # 1) Measure rounding to nearest
    objective, layers = Objective(section, floats), section.watched
    dense = {name: matrix.weight.clone() for name, matrix in layers.items()}
    roundings = {name: Rounding(weight, scheme, scale or weight.dtype) for name, weight in dense.items()}
    candidates = [write_rounded(layers, roundings)]
    nearest = objective.measure()
    losses = [objective.mean(nearest)]
    # 2) Begin with the ranges of the least rounding error, and descend
    for name, matrix in layers.items():
        matrix.weight.copy_(dense[name])
    for shared in section.observe(squared_norms):
        for name in shared.matrices:
            shares = search_shares(dense[name], scheme, scale or dense[name].dtype, shared.statistic)
            roundings[name] = Rounding(dense[name], scheme, scale or dense[name].dtype, shares)
    best = descend(objective, layers, roundings, descent, nearest)
    # 3) Keep the best on all batches
    for learnt in ({name: rounding.learnt for name, rounding in roundings.items()}, best):
        for name, rounding in roundings.items():
            rounding.learnt = learnt[name]
        candidates.append(write_rounded(layers, roundings))
        losses.append(objective.mean(objective.measure()))
    chosen = min(range(len(losses)), key=losses.__getitem__)
    for name, integers in candidates[chosen].items():
        layers[name].weight.copy_(integers.dequantize(layers[name].dtype))
    learnt_integers = {name: each.cpu() for name, each in candidates[chosen].items()}
    return Outcome(section.name, learnt_integers, losses[chosen], losses[0])


def descend(
    objective: Objective,
    layers: dict[str, Matrix],
    roundings: dict[str, Rounding],
    descent: Descent,
    nearest: list[float],
) -> dict[str, Learnt]:
    """Learn the roundings of the ``layers`` in place and return what was learnt by the iterate with the least share of
    the loss of rounding to ``nearest`` on its batch."""
    best = {name: rounding.learnt.copy() for name, rounding in roundings.items()}
    least = float("inf")
    with trainable(layers):
        for iteration, number in enumerate(cycle_batches(len(nearest), descent.iterations)):
            write_rounded(layers, roundings)
            with torch.enable_grad():
                loss = objective.loss(number)
                # Only signs count, and the gradient of a mean is 0 in float16.
                loss.backward(torch.full_like(loss, objective.targets[number].numel()))  # type: ignore[no-untyped-call]
            if (share := loss.item() / max(nearest[number], torch.finfo(torch.float32).tiny)) < least:
                least, best = share, {name: rounding.learnt.copy() for name, rounding in roundings.items()}
            size = descent.step * (1 - iteration / descent.iterations)
            for name, matrix in layers.items():
                if (gradient := matrix.grad) is not None:
                    roundings[name].step(gradient, size, descent.clip)
            for matrix in layers.values():
                matrix.stored.grad = None
    return best


def write_rounded(layers: dict[str, Matrix], roundings: dict[str, Rounding]) -> dict[str, Integers]:
    """Write the rounded weights to the layers and return the integers."""
    integers = {name: rounding.round() for name, rounding in roundings.items()}
    for name, matrix in layers.items():
        matrix.weight.copy_(integers[name].dequantize(matrix.dtype))
    return integers


def cycle_batches(count: int, iterations: int) -> Iterator[int]:
    """Yield the numbers of batches: all of them, in a new order every time."""
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    for _ in range(iterations):
        order = order or torch.randperm(count, generator=generator, device="cpu").tolist()
        yield order.pop()


@contextmanager
def trainable(layers: dict[str, Matrix]) -> Iterator[None]:
    """Let the weights of ``layers`` have gradients."""
    for matrix in layers.values():
        matrix.stored.requires_grad_(True)
    try:
        yield
    finally:
        for matrix in layers.values():
            matrix.stored.requires_grad_(False)
