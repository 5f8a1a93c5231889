"""Unstructured and N:M pruning."""

from __future__ import annotations

import zlib
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
import torch
from pydantic import Field, validate_call
from torch import Tensor, nn

from compress.errors import PostconditionError, UserError
from compress.maths import sparsity as maths
from compress.maths.hessian import second_moment
from compress.maths.sparsity import (
    SCOPES,
    gradual_schedule,
    iterative_schedule,
    magnitude_score,
    mask_groups,
    mask_model,
    mask_rows,
    mask_tensor,
    parse_pattern,
    random_score,
    squared_norms,
    wanda_score,
)
from compress.models.batches import draw_calibration_batches
from compress.models.calibration import sequential
from compress.models.layers import evaluation_mode, unwrap_model
from compress.models.matrices import (
    Matrix,
    apply_masks,
    match_ratios,
    matrices,
    measure_sparsity,
    select_matrices,
)
from compress.technique import Technique, Training

CALIBRATED = ("wanda", "sparsegpt")


class Prune(Technique, pl.Callback):
    """Set the least important weights to zero, and hold them at zero during further training.

    Criteria, each with its paper in :mod:`compress.maths.sparsity`: ``magnitude``; ``wanda`` (magnitude times the
    norm of the input); ``sparsegpt`` (joint choice and update of the other weights); ``movement`` (weights that
    training moves towards zero: Sanh et al., "Movement Pruning", 2020, arXiv:2005.07683); ``random``, the control.

    Schedules: ``one_shot`` prunes when the fit starts, and the epochs of that fit retrain the other weights;
    ``gradual`` raises the sparsity during training; ``iterative`` prunes and retrains in equal rounds.

    Args:
        sparsity: fraction of zero weights afterwards, over all layers that are not skipped.
        pattern: ``"2:4"`` leaves at most 2 of every 4 consecutive inputs of a row; it replaces the sparsity.
        criterion: the score that makes a weight important.
        scope: the weights that are ranked together: ``global``, ``layer`` or ``row``; null for the scope of the
            criterion's paper.
        ratios: ``uniform``; ``sensitivity`` to use the results of that stage before this one, or the path of its csv;
            or sparsities by layer name, ``{"*attention*": 0.3}``, where the first matching pattern counts.
        skip: ``embeddings``, ``head`` (all else outside the transformer blocks) and patterns of layer names.
        schedule: ``one_shot``, ``gradual`` or ``iterative``.
        begin: fraction of the training steps at which ``gradual`` starts.
        end: fraction of the training steps at which ``gradual`` reaches the sparsity.
        every: training steps between two prunings of ``gradual``.
        rounds: number of prunings of ``iterative``.
        damping: damping of SparseGPT's Hessian, as a fraction of its mean diagonal.
        samples: training examples that ``wanda`` and ``sparsegpt`` calibrate on.
        batch_size: calibration examples in a batch.
        training: settings of the fit, if known; the schedules are checked against them.
        source: folder of the artifact that the stage starts from.

    Raises:
        UserError: the model is already that sparse, a pattern matches no layer or width, or settings contradict.

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[Prune(sparsity=0.5)]).fit(module, loader)
    """

    resumes = True
    files = ("ratios",)
    together = True
    limits = "pruned weights are stored and multiplied as zeros: no size, no speed on a dense runtime"

    @validate_call(config={"arbitrary_types_allowed": True})
    def __init__(
        self,
        sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.2,
        pattern: str | int | None = None,
        criterion: Literal["magnitude", "wanda", "sparsegpt", "movement", "random"] = "magnitude",
        scope: Literal["global", "layer", "row"] | None = None,
        ratios: str | dict[str, Annotated[float, Field(ge=0, lt=1)]] = "uniform",
        skip: tuple[str, ...] = ("embeddings", "head"),
        schedule: Literal["one_shot", "gradual", "iterative"] = "one_shot",
        begin: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        end: Annotated[float, Field(gt=0, le=1)] = 0.7,
        every: Annotated[int, Field(ge=1)] = 10,
        rounds: Annotated[int, Field(ge=1)] = 3,
        damping: Annotated[float, Field(gt=0)] = 0.01,
        samples: Annotated[int, Field(ge=1)] = 128,
        batch_size: Annotated[int, Field(ge=1)] = 8,
        training: Training | None = None,
        source: Path | None = None,
    ) -> None:
        self.pattern = parse_pattern(pattern, f"{self.key}.pattern")
        self.sparsity = self.pattern[0] / self.pattern[1] if self.pattern else sparsity
        self.criterion = criterion
        self.scope = scope or ("layer" if ratios != "uniform" else SCOPES[criterion][0])
        self.ratios = ratios
        self.skip = skip
        self.schedule = schedule
        self.begin, self.end, self.every, self.rounds = begin, end, every, rounds
        self.damping = damping
        self.samples = samples
        self.train_samples = samples if criterion in CALIBRATED else 0
        self.batch_size = batch_size
        self.source = source
        self.layers: dict[str, Matrix] = {}
        self.due: dict[int, float] = {}
        """The prunings that are still due: training step and fraction of the way from ``start`` to ``targets``."""
        self.start: dict[str, float] = {}
        self.targets: dict[str, float] = {}
        self.masks: dict[str, Tensor] = {}
        self.movement: dict[str, Tensor] = {}
        self.dense: dict[str, Tensor] = {}
        self._refuse_contradictions(scope, pattern, training)

    def _refuse_contradictions(self, scope: str | None, pattern: str | int | None, training: Training | None) -> None:
        key, criterion, schedule = self.key, self.criterion, self.schedule
        if self.scope not in SCOPES[criterion]:
            raise UserError(
                f"{key}.scope is {self.scope}; `{criterion}` ranks weights by {' or '.join(SCOPES[criterion])}. Set "
                f"{key}.scope={SCOPES[criterion][0]}."
            )
        if self.ratios != "uniform" and (pattern or self.scope == "global"):
            other = f"pattern={pattern}" if pattern else "scope=global"
            raise UserError(
                f"{key}.ratios gives every layer its own sparsity, which contradicts {key}.{other}. Remove one of them."
            )
        if pattern and scope:
            raise UserError(
                f"{key}.pattern={pattern} always prunes in groups, which contradicts {key}.scope={scope}. Remove one "
                "of them."
            )
        if criterion == "movement" and schedule != "gradual":
            raise UserError(
                f"{key}.schedule is {schedule}; `movement` learns its scores during training. Set "
                f"{key}.schedule=gradual and {key}.train.epochs=1 or more."
            )
        if schedule == "gradual" and self.begin >= self.end:
            raise UserError(f"{key}.begin={self.begin:g} is not before {key}.end={self.end:g}. Set {key}.begin lower.")
        if schedule != "one_shot" and training and not training.epochs:
            raise UserError(
                f"{key}.train.epochs is 0; {key}.schedule={schedule} prunes during training. Set {key}.train.epochs=1 "
                f"or more, or {key}.schedule=one_shot."
            )

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("due", "start", "masks", "movement", "dense")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.due, self.start = state["due"], state["start"]
        for kind in ("masks", "movement", "dense"):
            tensors = {name: tensor.to(self.layers[name].weight.device) for name, tensor in state[kind].items()}
            setattr(self, kind, tensors)

    @property
    def settled(self) -> bool:
        """True if no pruning is due."""
        return not self.due

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        layers = self._select_layers(skeleton)
        for name, layer in layers.items():
            if self.pattern and layer.inputs % self.pattern[1]:
                raise UserError(
                    f"{self.key}.pattern needs groups of {self.pattern[1]}, and the {layer.inputs} inputs of "
                    f"`{name}` are no multiple of {self.pattern[1]}. Set another pattern, or {self.key}.skip to leave "
                    "the layer out."
                )
        self._check_ratios(layers, before[-1] if before else None)
        if self.ratios == "uniform" and not self.sparsity:
            raise UserError(
                f"{self.key}.sparsity is 0, which prunes nothing. Set {self.key}.sparsity=0.2, or remove the stage."
            )
        for stage in reversed(before):
            if type(stage).preview is not Technique.preview:
                break  # after a removal of weights, the others may be denser
            if not isinstance(stage, Prune) or stage.skip != self.skip or stage.pattern != self.pattern:
                continue
            if stage.ratios == self.ratios == "uniform" and stage.sparsity >= self.sparsity:
                raise UserError(
                    f"{self.key}.sparsity of {self.sparsity:g} follows {stage.key}.sparsity of {stage.sparsity:g} and "
                    f"has nothing left to prune. Set {self.key}.sparsity higher."
                )

    def _check_ratios(self, layers: dict[str, Matrix], previous: Any) -> None:
        if isinstance(self.ratios, dict):
            match_ratios(self.ratios, layers, self.sparsity, f"{self.key}.ratios")
        elif self.ratios == "sensitivity":
            measured = getattr(previous, "sparsities", None)
            if measured is None:
                raise UserError(
                    f"{self.key}.ratios is sensitivity, and the stage before is no `sensitivity`. Set "
                    f"technique=sensitivity+prune, or {self.key}.ratios to a sensitivity.csv."
                )
            if self.sparsity > max(measured):
                raise UserError(
                    f"{self.key}.sparsity is {self.sparsity:g} and `sensitivity` before it measures up to "
                    f"{max(measured):g}. Set a lower sparsity, or {previous.key}.sparsities=[...,{self.sparsity:g}]."
                )
            if set(self.skip) & {"embeddings", "head"} != {"embeddings", "head"}:
                raise UserError(
                    f"{self.key}.ratios is sensitivity, which measures only the layers of the blocks. Leave embeddings "
                    f"and head in {self.key}.skip."
                )
        elif self.ratios != "uniform":
            if not Path(self.ratios).is_file():
                raise UserError(
                    f"{self.key}.ratios is {self.ratios}, which is no file. Set {self.key}.ratios to uniform, "
                    "sensitivity, a sensitivity.csv, or sparsities by pattern ({*attention*:0.3})."
                )
            self._allocate_sparsity(Path(self.ratios), layers)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # 1) Compare the sparsity of the model with the target
        model = unwrap_model(pl_module)
        self.layers = self._select_layers(model)
        self.start = {name: measure_sparsity([layer.weight]) for name, layer in self.layers.items()}
        self.targets = self._choose_targets()
        before = measure_sparsity(layer.weight for layer in self.layers.values())
        target = self._total_target()
        if before >= target and not self.pattern:
            raise UserError(
                f"{self.key} has a target sparsity of {target:g} and the model's is {before:.4g} already. Set "
                f"{self.key}.sparsity higher, or remove the stage."
            )
        # 2) Prepare the scores of movement pruning
        if self.criterion == "movement":
            if str(trainer.precision).startswith("16"):
                raise UserError(
                    f"`movement` sums gradients and precision {trainer.precision} scales them. Set "
                    "hardware.precision=bf16-mixed or 32-true."
                )
            self.dense = {name: layer.weight.clone() for name, layer in self.layers.items()}
            self.movement = {
                # Weights that an earlier stage pruned never return.
                name: torch.zeros_like(layer.weight, dtype=torch.float32).masked_fill(layer.weight == 0, -torch.inf)
                for name, layer in self.layers.items()
            }
        # 3) Prune now, or schedule the steps of training at which to prune
        if self.schedule == "one_shot":
            self._prune_layers(trainer, model, 1.0)
            return
        steps = int(trainer.estimated_stepping_batches) if trainer.max_epochs else 0
        if steps < 2:
            raise UserError(
                f"{self.key}.schedule={self.schedule} prunes during training and the Trainer has {steps} steps. Set "
                f"more epochs, or {self.key}.schedule=one_shot."
            )
        self.due = (
            gradual_schedule(steps, self.begin, self.end, self.every)
            if self.schedule == "gradual"
            else iterative_schedule(steps, self.rounds)
        )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if (way := self.due.pop(trainer.global_step, None)) is not None:
            self._prune_layers(trainer, unwrap_model(pl_module), way)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Update the movement scores: a weight scores when its gradient pushes it away from zero. Pruned weights score
        too and can return with their last value."""
        for name, score in self.movement.items():
            if (gradient := self.layers[name].grad) is not None:
                score.sub_(gradient.float() * self._update_dense(name).float())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        apply_masks(self.layers, self.masks)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.reached = set(self.layers)
        weights = [matrix.weight for matrix in self.layers.values()]
        reached, count = measure_sparsity(weights), sum(weight.numel() for weight in weights)
        if self.due or reached < self._total_target() - len(weights) / count:  # each layer may round by one weight
            raise PostconditionError(
                f"{self.key} has a target sparsity of {self._total_target():.4g} and the model's is {reached:.4g}"
                + (": training ended before the schedule did." if self.due else ".")
            )

    def _select_layers(self, model: nn.Module) -> dict[str, Matrix]:
        kept = select_matrices(model, self.skip, self.key)
        inside = matrices(model)
        if self.criterion in CALIBRATED and (outside := [name for name in kept if name not in inside]):
            raise UserError(
                f"`{self.criterion}` needs inputs recorded in the transformer blocks, and `{outside[0]}` is outside of "
                f"them. Set {self.key}.skip=[embeddings,head], or {self.key}.criterion=magnitude."
            )
        return kept

    def _choose_targets(self) -> dict[str, float]:
        """Return the target sparsity of every layer. The scope ``global`` uses only their total."""
        if isinstance(self.ratios, dict):
            return match_ratios(self.ratios, self.layers, self.sparsity, f"{self.key}.ratios")
        if self.ratios == "uniform":
            return dict.fromkeys(self.layers, self.sparsity)
        if self.ratios == "sensitivity":
            return self._allocate_sparsity((self.source or Path()) / "report" / "sensitivity.csv", self.layers)
        return self._allocate_sparsity(Path(self.ratios), self.layers)

    def _allocate_sparsity(self, path: Path, layers: dict[str, Matrix]) -> dict[str, float]:
        from compress.maths.allocation import allocate_sparsity, read_points

        points = [point for point in read_points(path) if point.layer in layers]
        if missing := sorted(set(layers) - {point.layer for point in points}):
            raise UserError(f"{path} has no row for `{missing[0]}`. Run technique=sensitivity on this model.")
        return allocate_sparsity(points, self.sparsity)

    def _total_target(self) -> float:
        """Return the target sparsity of all layers together."""
        sizes = {name: layer.size for name, layer in self.layers.items()}
        return sum(self.targets[name] * size for name, size in sizes.items()) / sum(sizes.values())

    def _prune_layers(self, trainer: pl.Trainer, model: nn.Module, way: float) -> None:
        """Prune to the fraction ``way`` of the way from the model's initial sparsity to the target."""
        now = {name: self.start[name] + way * (target - self.start[name]) for name, target in self.targets.items()}
        if self.criterion in CALIBRATED:
            self._prune_calibrated(trainer, model, now)
        elif self.scope == "global" and not self.pattern:
            sizes = {name: layer.size for name, layer in self.layers.items()}
            total = sum(now[name] * size for name, size in sizes.items()) / sum(sizes.values())
            for name, mask in mask_model({name: partial(self._score_layer, name) for name in self.layers}, total):
                self._apply_mask(name, mask)
        else:
            for name in self.layers:
                self._apply_mask(name, self._choose_mask(self._score_layer(name), now[name]))
        if trainer.max_epochs:
            self.masks = {name: layer.weight != 0 for name, layer in self.layers.items()}

    def _prune_calibrated(self, trainer: pl.Trainer, model: nn.Module, now: dict[str, float]) -> None:
        batches = list(draw_calibration_batches(trainer, self.samples, self.batch_size))
        statistic = second_moment if self.criterion == "sparsegpt" else squared_norms
        with evaluation_mode(model):
            for layers, total in sequential(model, batches, statistic, self.layers):
                weights = [matrix.weight for matrix in layers.values()]
                if self.criterion == "sparsegpt":
                    goals = [self._partial_pattern(now[name]) or now[name] for name in layers]
                    for weight, pruned in zip(weights, maths.sparsegpt(weights, total, goals, self.damping)):
                        weight.copy_(pruned)
                    continue
                for name, weight in zip(layers, weights):
                    self._apply_mask(name, self._choose_mask(wanda_score(weight, total), now[name]))

    def _score_layer(self, name: str) -> Tensor:
        if self.criterion == "movement":
            return self.movement[name]
        weight = self.layers[name].weight
        if self.criterion == "magnitude":
            return magnitude_score(weight)
        return random_score(weight, torch.initial_seed() ^ zlib.crc32(name.encode()))

    def _choose_mask(self, score: Tensor, target: float) -> Tensor:
        if pattern := self._partial_pattern(target):
            return mask_groups(score, *pattern)
        return mask_rows(score, target) if self.scope == "row" else mask_tensor(score, target)

    def _partial_pattern(self, target: float) -> tuple[int, int] | None:
        """Return the number of weights to prune in a group at the sparsity ``target``, and the group's size."""
        return (round(target * self.pattern[1]), self.pattern[1]) if self.pattern else None

    @torch.no_grad()
    def _apply_mask(self, name: str, mask: Tensor) -> None:
        weight = self.layers[name].weight
        if self.criterion == "movement":
            weight.copy_(self._update_dense(name))
        weight.masked_fill_(mask, 0)

    def _update_dense(self, name: str) -> Tensor:
        """Return the layer's weights, with the last value of each pruned weight in place of its zero."""
        weight = self.layers[name].weight
        kept = self.masks.get(name, torch.ones_like(weight, dtype=torch.bool))
        self.dense[name] = torch.where(kept, weight, self.dense[name])
        return self.dense[name]
