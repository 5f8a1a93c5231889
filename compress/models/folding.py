"""Move scales of inputs into the norm or matrix before them: activations change, what the model computes does not.

No list of architectures says where. A pass through a part of the model shows which outputs feed which matrices, which
proposes folds; a proposal is accepted if random scales leave the outputs of the part as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.maths.scales import max_per_source, smoothing_scale
from compress.models.batches import Batch
from compress.models.calibration import Section, split_sections
from compress.models.layers import find_stacks, is_inside
from compress.models.matrices import Matrix, read_matrices
from compress.models.origins import find_readers, is_norm, trace_feeds
from compress.models.proofs import collect_outputs, is_same

HEAD_SIZES = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim", "d_kv")
"""Names that configs and attention modules have for the number of a head's dimensions."""


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm whose outputs are multiplied by its weight ``[channels]``, or by the weight plus ``offset``."""

    name: str
    module: nn.Module
    offset: float = 0.0

    @property
    def tensors(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self.module.parameters(recurse=False)]

    def divide(self, scale: Tensor) -> Tensor:
        """Divide the outputs by ``scale`` and return the exact divisors, which differ by the rounding of the weight."""
        module: Any = self.module
        before = module.weight.float() + self.offset
        module.weight.copy_(before / scale - self.offset)
        after = module.weight.float() + self.offset
        exact = torch.where((before != 0) & (after != 0), before / after, scale)
        if getattr(module, "bias", None) is not None:
            module.bias.copy_(module.bias.float() / exact)
        return exact


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a matrix: ``index`` ``[channels]`` of those whose outputs are the channels."""

    matrix: Matrix
    index: Tensor

    @property
    def name(self) -> str:
        return self.matrix.name

    @property
    def tensors(self) -> list[Tensor]:
        return [self.matrix.weight, *([] if self.matrix.bias is None else [self.matrix.bias.detach()])]

    def divide(self, scale: Tensor) -> Tensor:
        """Divide the outputs by ``scale`` and return it."""
        weight, bias = self.matrix.weight, self.matrix.bias
        weight[self.index] = (weight[self.index].float() / scale[:, None]).to(weight.dtype)
        if bias is not None:
            bias[self.index] = (bias[self.index].float() / scale).to(bias.dtype)
        return scale


@dataclass(frozen=True, eq=False)
class Fold:
    """Matrices ``after``, by name, that are the only readers of the outputs of ``before``, so that scales can move from
    these outputs to the matrices' inputs. ``source`` ``[inputs]`` is the index of the channel that feeds each input:
    query heads that share a key and value head read the same values."""

    before: Norm | Rows
    after: dict[str, Matrix]
    source: Tensor

    @property
    def channels(self) -> int:
        return int(self.source.max()) + 1

    @property
    def tensors(self) -> list[Tensor]:
        """What folding changes."""
        return [*self.before.tensors, *(matrix.weight for matrix in self.after.values())]

    @torch.no_grad()
    def apply(self, scale: Tensor) -> None:
        """Divide the outputs of ``before`` by ``scale`` ``[channels]``, and multiply the inputs of the matrices."""
        exact = self.before.divide(scale)[self.source]
        for matrix in self.after.values():
            matrix.weight.copy_(matrix.weight.float() * exact)


def find_folds(section: Section, outcomes: dict[str, int]) -> list[Fold]:
    """Return the folds of a section that change none of its outputs and no matrix that is not wanted.

    ``outcomes`` says which proposal was accepted at a place (-1 for none), and is extended: the blocks of a stack are
    alike, so a block is spared the places where the first one refused all, and tries what the first one accepted before
    the rest. It only saves time: nothing is returned without a proof.
    """
    stack = section.name.rpartition(".")[0]
    places = {f"{stack}{key}": proposals for key, proposals in propose_folds(section).items()}
    left: dict[str, list[int]] = {}
    for key, proposals in places.items():
        if proposals and (known := outcomes.get(key, 0)) >= 0:
            left[key] = [known, *(number for number in range(len(proposals)) if number != known)]
    run = section.probe or section.forwards[0]
    expected = collect_outputs(run) if left else []
    accepted: dict[str, Fold] = {}
    while left:
        folds = {key: places[key][tries[0]] for key, tries in left.items()}
        proven = select_proven(run, expected, list(folds.values()))
        for key, fold in folds.items():
            if fold in proven:
                accepted[key] = fold
                outcomes[key] = left.pop(key)[0]
            elif len(left[key]) == 1:
                outcomes.setdefault(key, -1)
                del left[key]
            else:
                del left[key][0]
    return [accepted[key] for key in places if key in accepted]


def select_proven(run: Callable[[], Any], expected: list[Tensor], folds: list[Fold]) -> list[Fold]:
    """Return the folds that change no output: all if they change none together, otherwise those of both halves."""
    if not folds or is_invariant(run, expected, folds):
        return folds
    if len(folds) == 1:
        return []
    half = len(folds) // 2
    return [*select_proven(run, expected, folds[:half]), *select_proven(run, expected, folds[half:])]


@torch.no_grad()
def is_invariant(run: Callable[[], Any], expected: list[Tensor], folds: Sequence[Fold]) -> bool:
    """Return whether the outputs of ``run`` stay as ``expected`` where random scales are folded. The weights are
    restored bit for bit.

    The scales are 2 or 1/2, which floats are multiplied by without rounding. Only the weights of a norm with an offset
    are rounded, and the smallest weights in float16.
    """
    generator = torch.Generator().manual_seed(0)
    stored = [tensor for fold in folds for tensor in fold.tensors]
    before = [tensor.clone() for tensor in stored]
    offset = any(isinstance(fold.before, Norm) and fold.before.offset for fold in folds)
    rounded = offset or any(tensor.dtype == torch.float16 for tensor in stored)
    try:
        for fold in folds:
            signs = torch.randint(2, (fold.channels,), generator=generator, device="cpu") * 2.0 - 1
            fold.apply(signs.exp2().to(fold.source.device))
        outputs = collect_outputs(run)
    finally:
        for tensor, values in zip(stored, before):
            tensor.copy_(values)
    return is_same(expected, outputs, rounded)


# Proposals


def propose_folds(section: Section) -> dict[str, list[Fold]]:
    """Return the folds that the structure of a section allows, by the place's name inside the section: for a norm those
    of both kinds of norms, for a matrix those of every matrix that feeds it and every order of rows."""
    modules = dict(section.module.named_modules(prefix=section.name))
    prefixes = [section.name] if section.name else list(find_stacks(section.module))
    norms = {name: module for name, module in modules.items() if is_norm(module)}
    found = find_readers(modules)
    feeds = trace_feeds(section.probe or section.forwards[0], found, norms)
    single = {name for name, matrix in found.items() if not read_matrices(name, matrix.module)}  # such as a router

    def is_free(names: Iterable[str]) -> bool:
        return all(name in section.watched or name in single for name in names)

    places: dict[str, list[Fold]] = {}
    for name, norm in norms.items():
        after = {reader: found[reader] for reader, origins in feeds.items() if origins == {name}}
        width = norm.weight.numel()  # type: ignore[union-attr,operator]
        fits = bool(after) and all(matrix.inputs == width for matrix in after.values())
        if fits and is_inside(name, prefixes) and is_free(after):
            source = torch.arange(width, device=norm.weight.device)  # type: ignore[union-attr]
            kinds = (Norm(name, norm), Norm(name, norm, offset=1.0))
            places[name.removeprefix(section.name)] = [Fold(kind, after, source) for kind in kinds]
    sizes = find_head_sizes(section.module)
    for name, origins in feeds.items():
        before = [found[origin] for origin in feeds if origin in origins and origin in found]
        if is_inside(name, prefixes) and is_free([name]):
            places[name.removeprefix(section.name)] = [
                Fold(Rows(matrix, rows.to(matrix.stored.device)), {name: found[name]}, source.to(matrix.stored.device))
                for matrix in reversed(before)
                if is_free([matrix.name]) and matrix.name not in single
                for rows, source in match_rows(matrix.rows, found[name].inputs, sizes)
            ]
    return places


def find_head_sizes(module: nn.Module) -> list[int]:
    """Return the possible numbers of a head's dimensions, as the modules inside a module and their configs say."""
    parts = list(module.modules())
    configs = {id(part.config): part.config for part in parts if getattr(part, "config", None) is not None}
    sizes = {getattr(owner, key, None): None for owner in [*configs.values(), *parts] for key in HEAD_SIZES}
    for config in configs.values():
        heads, width = (getattr(config, key, None) for key in ("num_attention_heads", "hidden_size"))
        sizes |= {width // heads: None} if heads and width else {}
    return [size for size in sizes if isinstance(size, int) and size > 0]


def match_rows(rows: int, inputs: int, head_sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Return the ways in which a matrix of ``rows`` outputs may feed ``inputs``: indices of the rows ``[channels]``,
    and of the channel that feeds each input, ``[inputs]``.

    One feeds one; or the rows hold gate and up (in halves, or by turns); or values with fewer heads than queries; or
    queries, keys and values, one after the other or by the group of heads that shares keys.
    """
    every, each = torch.arange(rows), torch.arange(inputs)
    ways = [(every, each)] if rows == inputs else []
    if rows == 2 * inputs:
        ways += [(every[inputs:], each), (every[:inputs], each), (every[1::2], each), (every[::2], each)]
    for size in head_sizes:
        heads, left = divmod(inputs, size)
        groups = rows // size if rows < inputs else (rows - inputs) // (2 * size)
        if left or not groups or heads % groups or rows not in (groups * size, inputs + 2 * groups * size):
            continue
        source = torch.arange(groups * size).view(groups, 1, size).expand(-1, heads // groups, -1).flatten()
        if rows == groups * size:
            ways += [(every, source)] if rows < inputs else []
        else:
            by_group = every.view(groups, -1, size)[:, -1].flatten()
            ways += [(every[-groups * size :], source), *([(by_group, source)] if groups > 1 else [])]
    return ways


# Scales


def smooth_model(model: nn.Module, batches: list[Batch], wanted: Mapping[str, Matrix], strength: float) -> list[Fold]:
    """Move a share ``strength`` of the difficulty of rounding the inputs of the ``wanted`` matrices to their weights,
    wherever scales can be folded, and return the folds. The model computes the same function.

    Xiao et al., "SmoothQuant", 2022, arXiv:2211.10438.
    """
    outcomes: dict[str, int] = {}
    folds: list[Fold] = []
    for section in split_sections(model, batches, wanted):
        found = find_folds(section, outcomes)
        smooth_section(section, found, strength)
        folds += found
    return folds


def smooth_section(section: Section, folds: list[Fold], strength: float) -> None:
    """Fold the scales that move a share ``strength`` of the difficulty of rounding inputs to the weights."""
    wanted = {name for fold in folds for name in fold.after}
    peaks: dict[str, Tensor] = {}
    for shared in section.observe(max_magnitudes, wanted, torch.maximum) if folds else ():
        peaks |= dict.fromkeys(shared.matrices, shared.statistic)
    for fold in folds:
        magnitudes = [peaks[name] for name in fold.after if name in peaks]
        weights = [matrix.weight.float().abs().amax(0) for matrix in fold.after.values()]
        activation, weight = (max_per_source(fold.source, torch.stack(x).amax(0)) for x in (magnitudes, weights))
        fold.apply(smoothing_scale(activation, weight, strength))


def max_magnitudes(x: Tensor) -> Tensor:
    """Return the largest magnitude of every input over the tokens of ``x`` ``[tokens, inputs]``."""
    return x.abs().amax(0)
