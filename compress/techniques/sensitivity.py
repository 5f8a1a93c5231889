"""Sensitivity of every layer: the drop of the task's metric if this layer alone is pruned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pytorch_lightning as pl
from pydantic import Field, validate_call
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn
from tqdm.auto import tqdm

from compress.errors import UserError
from compress.maths.allocation import Point, write_points
from compress.maths.sparsity import magnitude_score, mask_tensor
from compress.models.batches import read_validation_batches, spread_evenly
from compress.models.layers import evaluation_mode, unwrap_model
from compress.models.matrices import Matrix, matrices, select_matrices
from compress.tasks.kinds import higher_is_better
from compress.tasks.metrics import evaluate_metric
from compress.technique import Technique

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Fraction = Annotated[float, Field(gt=0, lt=1)]
TALLEST = 48  # most layers in one column of the heat map


class Sensitivity(Technique, pl.Callback):
    """Report how far the task's metric drops if the smallest weights of one layer at a time are set to zero.

    Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015, arXiv:1506.02626,
    section 4; Li et al., "Pruning Filters for Efficient ConvNets", 2017, arXiv:1608.08710, section 3.2.

    Runs when the fit ends, on validation examples, and changes nothing: every layer is restored, bit for bit. The
    results are ``points``, ``sensitivity.csv`` and a heat map. ``metrics`` and ``task`` come from the chain; without
    them the model's own loss is measured.

    Args:
        sparsities: fractions of a layer's weights that are set to zero.
        samples: validation examples (for a language model, blocks of tokens), spread evenly over the split.

    Raises:
        UserError: there are too few validation examples, or the metric is not finite on them.

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[Sensitivity(samples=16)]).fit(module, loader, validation_loader)
    """

    changes = False
    keeps_head = True

    @validate_call
    def __init__(
        self,
        sparsities: Annotated[tuple[Fraction, ...], Field(min_length=1)] = (0.3, 0.5, 0.7, 0.9),
        samples: Annotated[int, Field(ge=1)] = 256,
        metrics: Any = None,
        task: Any = None,
    ) -> None:
        if len(set(sparsities)) < len(sparsities):
            raise UserError(f"{self.key}.sparsities is {list(sparsities)} and repeats a value. Name each value once.")
        self.sparsities = sorted(sparsities)
        self.samples = self.validation_samples = samples
        self.metrics = metrics.clone() if metrics is not None and task is not None else None
        self.metric = task.primary if self.metrics is not None else "loss"
        self.points: list[Point] = []

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        select_matrices(skeleton, ("embeddings", "head"), self.key)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model, device = unwrap_model(pl_module), trainer.strategy.root_device
        available = read_validation_batches(trainer)
        if (count := sum(len(batch["input_ids"]) for batch in available)) < self.samples:
            raise UserError(
                f"{self.key}.samples is {self.samples} and there are {count} validation examples. Set "
                f"{self.key}.samples={count} or less."
            )
        batches = [
            {key: value.to(device) for key, value in batch.items()} for batch in spread_evenly(available, self.samples)
        ]
        model.to(device)
        if self.metrics is not None:
            self.metrics.to(device)
        with evaluation_mode(model):
            self.points = list(
                prune_each(
                    matrices(model),
                    self.sparsities,
                    lambda: evaluate_metric(model, batches, self.metrics, self.metric),
                    higher_is_better(self.metric),
                    self.key,
                )
            )
        model.cpu()
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.add_figure("sensitivity", draw_layer_drops(self.points, self.metric))

    def report(self, folder: Path) -> None:
        write_points(folder / "sensitivity.csv", self.points, self.metric)
        draw_layer_drops(self.points, self.metric).savefig(folder / "sensitivity.png")


def prune_each(
    layers: Mapping[str, Matrix], sparsities: Sequence[float], value: Callable[[], float], higher: bool, key: str
) -> Iterator[Point]:
    """Yield ``value()`` with each layer alone pruned to each sparsity; ``higher`` is True if a higher value is better.
    NaN counts as an infinite drop.

    Raises:
        UserError: the unpruned model's value is not finite.
    """
    unpruned = value()
    if not math.isfinite(unpruned):
        raise UserError(
            f"{key} measured {unpruned} on the unpruned model, so no drop can be computed. Set {key}.samples higher, "
            "or task.primary to another metric."
        )
    for name, layer in tqdm(layers.items(), desc="sensitivity", unit="layer", leave=False, disable=None):
        for sparsity in sparsities:
            with pruned_layer(layer, sparsity):
                pruned = value()
            drop = unpruned - pruned if higher else pruned - unpruned
            yield Point(name, layer.size, sparsity, pruned, math.inf if math.isnan(drop) else drop)


@contextmanager
def pruned_layer(layer: Matrix, sparsity: float) -> Iterator[None]:
    """Set the layer's smallest weights to zero, and restore them afterwards, bit for bit."""
    weight = layer.weight
    kept = weight.clone()
    weight.masked_fill_(mask_tensor(magnitude_score(weight), sparsity), 0)
    try:
        yield
    finally:
        weight.copy_(kept)


def draw_layer_drops(points: list[Point], metric: str) -> Figure:
    """Return a heat map of layers by sparsities, red where pruning makes the metric worse. Many layers are drawn in
    several columns."""
    from matplotlib.colors import CenteredNorm
    from matplotlib.figure import Figure

    # 1) Find the common prefix of the names and the scale of the colours
    drops = {(point.layer, point.sparsity): point.drop for point in points}
    layers = list(dict.fromkeys(point.layer for point in points))
    sparsities = sorted({point.sparsity for point in points})
    prefix = layers[0][: layers[0].rindex(".") + 1] if "." in layers[0] else ""
    while not all(layer.startswith(prefix) for layer in layers):
        prefix = prefix[: prefix[:-1].rfind(".") + 1]
    finite = [drop for drop in drops.values() if math.isfinite(drop)]
    limit = max(map(abs, finite), default=0) or 1
    decimals = min(max(2 - math.floor(math.log10(limit)), 0), 5)
    strips = math.ceil(len(layers) / TALLEST)
    rows = math.ceil(len(layers) / strips)
    label = max(len(layer) - len(prefix) for layer in layers)

    # 2) Draw a strip of cells for every column of layers
    width = strips * (0.55 * len(sparsities) + 0.075 * label + 0.2) + 1.2
    figure = Figure(figsize=(max(width, 5), max(0.2 * rows + 1.2, 2.4)), dpi=120, layout="constrained")
    axes = figure.subplots(1, strips, squeeze=False)[0]
    for number, axis in enumerate(axes):
        shown = layers[number * rows : (number + 1) * rows]
        values = [[drops[layer, sparsity] for sparsity in sparsities] for layer in shown]
        image = axis.imshow(
            [[min(drop, limit) for drop in row] for row in values],
            cmap="RdBu_r",
            norm=CenteredNorm(0, limit),
            aspect="auto",
        )
        axis.set_ylim(rows - 0.5, -0.5)  # keeps the height of the cells in a last, shorter strip
        axis.set_xticks(range(len(sparsities)), [f"{sparsity:g}" for sparsity in sparsities], fontsize=8)
        axis.set_yticks(range(len(shown)), [layer.removeprefix(prefix) for layer in shown], fontsize=7)
        axis.set_xlabel("sparsity of the layer", fontsize=8)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        for y, row in enumerate(values):
            for x, drop in enumerate(row):
                text = f"{round(drop, decimals) + 0.0:.{decimals}f}"  # never -0.0
                axis.text(x, y, text, ha="center", va="center", fontsize=7, color=text_colour(drop / limit))
    # 3) Draw the colour bar
    direction = "drop" if higher_is_better(metric) else "rise"
    bar = figure.colorbar(image, ax=list(axes), shrink=min(1, 4 / (0.2 * rows)))
    bar.ax.set_ylim(min([0.0, *finite]), limit)
    bar.ax.tick_params(labelsize=8)
    bar.set_label(f"{direction} of {metric}", fontsize=8)
    figure.suptitle(f"Layers of {prefix.rstrip('.') or 'the model'}, each pruned alone", fontsize=10)
    return figure


def text_colour(strength: float) -> str:
    """Return a text colour that is legible on a cell of this colour ``strength``, -1 to 1."""
    return "white" if abs(strength) > 0.6 else "black"
