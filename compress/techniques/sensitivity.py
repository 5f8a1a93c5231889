"""How much each layer's weights matter: the fall of the task's metric as one layer at a time is pruned."""

from __future__ import annotations

import csv
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pytorch_lightning as pl
import torch
from pydantic import Field, validate_call
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchmetrics import MetricCollection
from tqdm.auto import tqdm

from compress.errors import UserError
from compress.metrics import higher_is_better
from compress.models import compressed, evaluating, linears
from compress.sparsity import magnitude, smallest_of
from compress.techniques.finetune import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Batch = dict[str, Tensor]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Curve = tuple[list[float], list[float]]
COLUMNS = ("layer", "weights", "sparsity", "metric", "value", "drop")
TALLEST = 48  # layers in one column of the heat map


@dataclass(frozen=True)
class Point:
    """The metric's ``value`` with one layer of so many ``weights`` at one sparsity and all others whole; ``drop`` is
    the difference from the unpruned model, positive where worse."""

    layer: str
    weights: int
    sparsity: float
    value: float
    drop: float


class Sensitivity(pl.Callback):
    """Report how the task's metric falls as the smallest weights of one layer at a time are set to zero.

    Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015, arXiv:1506.02626,
    section 4; Li et al., "Pruning Filters for Efficient ConvNets", 2017, arXiv:1608.08710, section 3.2.

    Works when the fit ends, on validation examples, and changes nothing: every layer is put back, bit for bit. Leaves
    ``points``, ``sensitivity.csv`` and a heat map. ``metrics`` and ``task`` come from the chain; without them the
    model's own loss is measured.

    Args:
        sparsities: fractions of a layer's weights that are set to zero.
        samples: validation examples (for a language model, blocks of tokens), spread evenly over the split.

    Raises:
        UserError: there are not so many validation examples, or on them the metric is no number.

        pl.Trainer(max_epochs=1, callbacks=[Sensitivity(samples=64)]).fit(module, loader, validation_loader)
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
            raise UserError(
                f"technique.sensitivity.sparsities is {list(sparsities)} and names one twice: name each once."
            )
        self.sparsities = sorted(sparsities)
        self.samples = self.validation_samples = samples
        self.metrics = metrics.clone() if metrics is not None and task is not None else None
        self.metric = task.primary if self.metrics is not None else "loss"
        self.points: list[Point] = []

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        linears(skeleton)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model, device = compressed(pl_module), trainer.strategy.root_device
        batches = [
            {key: value.to(device) for key, value in batch.items()}
            for batch in evenly_spread(validation_batches(trainer), self.samples)
        ]
        model.to(device)
        if self.metrics is not None:
            self.metrics.to(device)
        with evaluating(model):
            self.points = list(
                prune_each(
                    dict(linears(model)),
                    self.sparsities,
                    lambda: quality(model, batches, self.metrics, self.metric),
                    higher_is_better(self.metric),
                )
            )
        model.cpu()
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.add_figure("sensitivity", heat_map(self.points, self.metric))

    def report(self, folder: Path) -> None:
        write(folder / "sensitivity.csv", self.points, self.metric)
        heat_map(self.points, self.metric).savefig(folder / "sensitivity.png")


def validation_batches(trainer: pl.Trainer) -> list[Batch]:
    """The whole validation split as the Trainer's own loaders give it.

    Raises:
        UserError: the Trainer has none.
    """
    if not trainer.enable_validation:
        raise UserError(
            "`sensitivity` measures on validation data and the Trainer has none: give `fit` a validation loader, and "
            "the module a `validation_step`."
        )
    trainer.fit_loop.epoch_loop.val_loop.setup_data()  # nothing where it is set up already
    loaders: Any = trainer.val_dataloaders
    return list(chain.from_iterable(loaders if isinstance(loaders, (list, tuple)) else [loaders]))


def evenly_spread(batches: list[Batch], samples: int) -> list[Batch]:
    """Batches of exactly ``samples`` examples, picked at even distances: a loader may be sorted, by length say.

    Raises:
        UserError: there are fewer.
    """
    sizes = [len(batch["input_ids"]) for batch in batches]
    if sum(sizes) < samples:
        raise UserError(
            f"`sensitivity` asks for {samples} validation examples and there are {sum(sizes)}: set "
            f"technique.sensitivity.samples={sum(sizes)} or less."
        )
    count, parts = len(batches), math.ceil(samples / max(sizes))
    while sum(sizes[i] for i in middles(count, parts)) < samples:
        parts += 1
    picked: list[Batch] = []
    for i in middles(count, parts):
        picked.append({key: value[:samples] for key, value in batches[i].items()})
        samples -= len(picked[-1]["input_ids"])
    return [batch for batch in picked if len(batch["input_ids"])]


def middles(count: int, parts: int) -> list[int]:
    """The middles of so many equal parts of ``range(count)``."""
    return [(2 * i + 1) * count // (2 * parts) for i in range(parts)]


@torch.inference_mode()
def quality(model: nn.Module, batches: list[Batch], metrics: MetricCollection | None, metric: str) -> float:
    """The metric of that name over the batches, or without ``metrics`` the mean loss of an example."""
    loss, examples = 0.0, 0
    for batch in batches:
        output = model(**batch)
        if metrics is not None:
            metrics.update(*aligned(output.logits, batch["labels"]))
        else:
            loss += output.loss.item() * len(batch["input_ids"])
            examples += len(batch["input_ids"])
    if metrics is None:
        return loss / examples
    value = metrics.compute()[metric].item()
    metrics.reset()
    return value


def prune_each(
    layers: dict[str, nn.Linear], sparsities: Sequence[float], value: Callable[[], float], higher: bool
) -> Iterator[Point]:
    """Measure ``value()`` with each layer alone at each sparsity; ``higher`` says that more of it is better. A value
    that is no number counts as endlessly worse.

    Raises:
        UserError: the unpruned model's value is none.
    """
    unpruned = value()
    if not math.isfinite(unpruned):
        raise UserError(
            f"`sensitivity` measured {unpruned} on the model before pruning, from which nothing can fall: measure on "
            "more examples (technique.sensitivity.samples), or by another metric (task.primary)."
        )
    for name, layer in tqdm(layers.items(), desc="sensitivity", unit="layer", leave=False, disable=None):
        for sparsity in sparsities:
            with pruned(layer, sparsity):
                found = value()
            drop = unpruned - found if higher else found - unpruned
            yield Point(name, layer.weight.numel(), sparsity, found, math.inf if math.isnan(drop) else drop)


@contextmanager
def pruned(layer: nn.Linear, sparsity: float) -> Iterator[None]:
    """The layer with its smallest weights at zero, and afterwards as it was, bit for bit."""
    weight = layer.weight.data
    kept = weight.clone()
    weight.masked_fill_(smallest_of(magnitude(weight), sparsity), 0)
    try:
        yield
    finally:
        weight.copy_(kept)


def allocate(points: list[Point], sparsity: float) -> dict[str, float]:
    """A sparsity for every layer, their mean over all weights exactly ``sparsity``, so that each layer alone costs the
    same drop, or less where it is pruned as far as was measured.

    A layer's drop is taken to be 0 at sparsity 0, to run straight between the sparsities measured and never to fall
    again. Under a tolerance every layer is pruned as far as its drop stays within; the tolerance is the one at which
    the mean is met. Where it jumps there, because some drops stay level, those layers go the same share of their way.

    Raises:
        UserError: more than the largest sparsity measured is asked for.

        allocate(read("report/1_sensitivity/sensitivity.csv"), 0.6)["bert.encoder.layer.0.output.dense"]
    """
    weights = {point.layer: point.weights for point in points}
    curves = {layer: curve([point for point in points if point.layer == layer]) for layer in weights}

    def mean(allocation: dict[str, float]) -> float:
        return sum(weights[layer] * share for layer, share in allocation.items()) / sum(weights.values())

    # All that one tolerance allows, short of it and with it: between two such rungs every layer's share runs straight.
    tolerances = sorted({drop for _, drops in curves.values() for drop in drops})
    rungs = [(tolerance, side) for tolerance in tolerances for side in (bisect_left, bisect_right)]

    def rung(at: tuple[float, Callable[..., int]]) -> dict[str, float]:
        return {layer: furthest(measured, *at) for layer, measured in curves.items()}

    most = mean(rung(rungs[-1]))
    if sparsity > most + 1e-9:
        raise UserError(
            f"A sparsity of {sparsity:g} is asked for and the layers' sensitivity was measured up to {most:.4g}: ask "
            "for less, or measure further (technique.sensitivity.sparsities)."
        )
    above = min(bisect_left(rungs, sparsity, lo=1, key=lambda at: mean(rung(at))), len(rungs) - 1)
    low, high = rung(rungs[above - 1]), rung(rungs[above])
    gap = mean(high) - mean(low)  # none where rounding puts the largest sparsity measured just below the one asked for
    way = (sparsity - mean(low)) / gap if gap else 1.0
    return {layer: low[layer] + way * (high[layer] - low[layer]) for layer in weights}


def curve(points: list[Point]) -> Curve:
    """Sparsities from 0 on and the drops there, which never fall; it ends where the drop is endless."""
    ordered = sorted(points, key=lambda point: point.sparsity)
    drops = [drop for drop in accumulate((point.drop for point in ordered), max, initial=0.0) if math.isfinite(drop)]
    return [0.0, *(point.sparsity for point in ordered)][: len(drops)], drops


def furthest(curve: Curve, tolerance: float, side: Callable[..., int]) -> float:
    """The sparsity up to which the drop stays below ``tolerance`` (``side=bisect_left``) or at most at it
    (``bisect_right``)."""
    sparsities, drops = curve
    i = side(drops, tolerance)
    if i in (0, len(drops)):
        return sparsities[max(i - 1, 0)]
    share = (tolerance - drops[i - 1]) / (drops[i] - drops[i - 1])
    return sparsities[i - 1] + share * (sparsities[i] - sparsities[i - 1])


def write(path: Path | str, points: list[Point], metric: str) -> None:
    """Write ``points`` as csv."""
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({**vars(point), "metric": metric} for point in points)


def read(path: Path | str) -> list[Point]:
    """The points of a csv that ``write`` wrote, exactly.

    Raises:
        UserError: it has other columns.
    """
    with Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not set(COLUMNS) <= rows[0].keys():
        raise UserError(f"{path} is no table of `sensitivity`, which has the columns {', '.join(COLUMNS)}.")
    return [
        Point(row["layer"], int(row["weights"]), *(float(row[key]) for key in ("sparsity", "value", "drop")))
        for row in rows
    ]


def heat_map(points: list[Point], metric: str) -> Figure:
    """Layers by sparsities, red where the metric is worse than without pruning; many layers side by side."""
    from matplotlib.colors import CenteredNorm
    from matplotlib.figure import Figure

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
        axis.set_ylim(rows - 0.5, -0.5)  # a last, shorter strip has cells of the same height
        axis.set_xticks(range(len(sparsities)), [f"{sparsity:g}" for sparsity in sparsities], fontsize=8)
        axis.set_yticks(range(len(shown)), [layer.removeprefix(prefix) for layer in shown], fontsize=7)
        axis.set_xlabel("sparsity of the layer", fontsize=8)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        for y, row in enumerate(values):
            for x, drop in enumerate(row):
                text = f"{round(drop, decimals) + 0.0:.{decimals}f}"  # never -0.0
                axis.text(x, y, text, ha="center", va="center", fontsize=7, color=ink(drop / limit))
    direction = "drop" if higher_is_better(metric) else "rise"
    bar = figure.colorbar(image, ax=list(axes), shrink=min(1, 4 / (0.2 * rows)))
    bar.ax.set_ylim(min([0.0, *finite]), limit)
    bar.ax.tick_params(labelsize=8)
    bar.set_label(f"{direction} of {metric}", fontsize=8)
    figure.suptitle(f"Layers of {prefix.rstrip('.') or 'the model'}, each pruned alone", fontsize=10)
    return figure


def ink(strength: float) -> str:
    """What can be read on a cell that is so deeply coloured (-1 to 1)."""
    return "white" if abs(strength) > 0.6 else "black"
