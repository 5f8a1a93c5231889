"""Choose the dimensions of hidden states that stay, fit what reads them, and write the width to the config."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.models.batches import Batch
from compress.models.blocks import read_blocks
from compress.models.calibration import select_tokens, sequential
from compress.models.compensation import add_constant, fit_kept
from compress.models.depth import INVALID, make_skeleton
from compress.models.families import FAMILIES, name_family
from compress.models.matrices import matrices
from compress.models.probes import CLOSE, measure_change, run_probe
from compress.models.products import Products
from compress.models.replay import run_model
from compress.models.students import WIDTHS
from compress.models.width import Space, find_spaces

# What the dimensions are worth


@torch.no_grad()
def watch_norms(
    model: Any, batches: list[Batch], norms: dict[str, nn.Module], see: Callable[[str, Tensor], None]
) -> None:
    """Call ``see(name, outputs)``, ``[tokens, width]`` without padding, for the norms of every batch."""
    batch: Batch = {}

    def leave(_: nn.Module, __: tuple, output: Tensor, name: str) -> None:
        if output.shape[:-1] == batch["input_ids"].shape:  # others normalise a table of positions
            see(name, select_tokens(output, batch.get("attention_mask")).float())

    hooks = [norm.register_forward_hook(partial(leave, name=name)) for name, norm in norms.items()]
    try:
        for batch in batches:
            run_model(model, batch)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def score_dimensions(model: Any, space: Space, batches: list[Batch]) -> Tensor:
    """Return the scores of the dimensions, ``[width]``: the mean magnitude over all tokens of a norm's outputs, as a
    share of the sum over all dimensions, summed over the norms. Where no norm sees every token, that of what the
    matrices read."""
    totals: dict[str, Tensor] = {}

    def see(name: str, outputs: Tensor) -> None:
        totals[name] = totals.get(name, 0) + outputs.abs().sum(0).double()

    watch_norms(model, batches, space.norms, see)
    if not totals:
        with Products(space.readers.values(), lambda matrix, x: see(matrix.name, x.float().flatten(0, -2))):
            for batch in batches:
                run_model(model, batch)
    return torch.stack([total / total.sum() for total in totals.values()]).sum(0).cpu()


# Compensation


@torch.no_grad()
def fit_readers(model: Any, space: Space, kept: Tensor, batches: list[Batch]) -> None:
    """Change the weights of the blocks' matrices, and of the output layer's, that read the dimensions ``kept``, and
    their biases, so that on ``batches`` the outputs come as close as possible to those with all dimensions, in the sum
    of squares. The other dimensions are no longer read. Weights that are also embeddings stay as they are.

    Matrices are fitted in the order in which they run, each on what the fitted ones before it compute.
    """
    inside, head = matrices(model), model.get_output_embeddings()
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    wanted = {
        name: matrix
        for name, matrix in space.readers.items()
        if (name in inside or matrix.module is head) and id(matrix.stored) not in tables
    }
    mask = torch.zeros(space.size, dtype=torch.bool, device=kept.device).index_fill(0, kept, True)
    for shared in sequential(model, batches, add_constant, wanted):
        for matrix in shared.matrices.values():
            fit_kept(matrix, mask, shared.statistic)
            matrix.weight[:, ~mask] = 0


# Config


def record_width(model: Any) -> None:
    """Write the width of a model, maybe on the meta device, to its config: under the config's own keys if they describe
    the same model, otherwise in the entry ``compress``."""
    config, width = model.config, find_spaces(model)[0].size
    own = {key: value for key, value in getattr(config, "compress", {}).items() if key != "width"}
    plain, rest = propose_config(model, width, own)
    stored, expected = dict(vars(config)), run_probe(model)
    set_entry(config, rest)
    config.update(plain)
    if not (is_described(model) and (model.device.type == "meta" or is_answer(model, expected))):
        vars(config).clear()
        vars(config).update(stored)
        set_entry(config, {**own, "width": width})


def propose_config(model: Any, width: int, own: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config's keys and the entry ``compress`` that may describe a model of this ``width``. The size of
    BERT's heads is its width divided by their number, so that fewer heads may suit fewer dimensions."""
    config, family = model.config, FAMILIES.get(name_family(model))
    numbers = {key: value for key, value in config.to_dict().items() if type(value) is int}
    plain = {key: width for key, value in numbers.items() if value == config.hidden_size and WIDTHS.fullmatch(key)}
    if family and family.head_size_in_config:
        plain["head_dim"] = read_blocks(model)[0].head_size
    if family and len(set(own.get("heads", ()))) == 1:
        plain[family.heads_count] = own["heads"][0]
        own = {key: value for key, value in own.items() if key != "heads"}
    return plain, own


def set_entry(config: Any, entry: dict[str, Any]) -> None:
    if entry:
        config.compress = entry
    elif hasattr(config, "compress"):
        del config.compress


def is_described(model: Any) -> bool:
    """Return whether the class builds this model, in all shapes and plain settings, from its config."""
    try:
        return describe(model) == describe(make_skeleton(model, model.config))
    except INVALID:
        return False


def describe(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the shape of every Parameter and buffer, and the class and the plain settings of every module."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    hidden = ("training", "name_or_path")
    settings = {
        name: (
            type(module).__qualname__,
            {key: value for key, value in vars(module).items() if isinstance(value, str | int | float | tuple)},
        )
        for name, module in model.named_modules()
    }
    for _, values in settings.values():
        for key in [key for key in values if key.startswith("_") or key in hidden]:
            del values[key]
    return {name: tensor.shape for name, tensor in tensors}, settings


def is_answer(model: Any, expected: Tensor) -> bool:
    """Return whether the model's logits are the ``expected`` ones: some read a width from their config as they run."""
    return measure_change(expected, run_probe(model)) <= CLOSE
