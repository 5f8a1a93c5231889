"""What must be true after every stage; where it is not, the stage failed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.artifacts.artifact import measure_size_bytes
from compress.errors import PostconditionError, UserError
from compress.formats.packed import count_stored_bits
from compress.models.layers import dequantize_weight, digest_tensor, find_blocks, find_zeros
from compress.technique import Technique


@dataclass(frozen=True)
class State:
    """What to remember of a model before a stage: a digest of every tensor, and where the weights of its layers that
    can change are zero."""

    digests: dict[str, bytes]
    zeros: dict[str, Tensor]


def capture_state(model: nn.Module) -> State:
    """Remember the model as it is, without a second copy of it."""
    digests = {name: digest_tensor(tensor) for name, tensor in model.state_dict().items()}
    return State(digests, {name: one for name, one in find_zeros(model).items() if is_trainable(model, name)})


def is_trainable(model: nn.Module, layer: str) -> bool:
    weight: Any = model.get_submodule(layer).weight
    return weight.requires_grad


def check_model(key: str, stage: Technique, before: State, model: nn.Module) -> None:
    """The stage changed something, filled in no pruned weight, and kept what is not its business.

    Raises:
        PostconditionError: it did not.
    """
    after = {name: digest_tensor(tensor) for name, tensor in model.state_dict().items()}
    changed = {name for name in {*before.digests, *after} if before.digests.get(name) != after.get(name)}
    if stage.changes and not changed:
        raise UserError(f"`{key}` changed nothing: leave it out, or give it settings under which it has work to do.")
    if stage.keeps_head:
        inside = find_blocks(model)[0] + "."
        if outside := sorted(name for name in changed if not name.startswith(inside)):
            raise PostconditionError(
                f"`{key}` should change the transformer blocks alone and changed {', '.join(outside)}."
            )
    for name, mask in before.zeros.items() if stage.keeps_zeros else ():
        weight = dequantize_weight(model.get_submodule(name).weight)  # type: ignore[arg-type]
        if weight.shape != mask.shape:
            continue  # cut, and so another one
        filled = int((weight[mask] != 0).sum())
        if filled:
            raise PostconditionError(f"`{key}` filled in {filled} of the {int(mask.sum())} pruned weights of `{name}`.")


def check_folder(key: str, stage: Technique, source: Path, folder: Path, expected: Tensor, reloaded: Tensor) -> None:
    """The saved artifact is the model that was saved, and smaller where the stage promises so.

    Raises:
        PostconditionError: it is not.
    """
    distance = (expected - reloaded).abs().max().item()
    allowed = stage.tolerance * max(1.0, expected.abs().max().item())
    if not distance <= allowed:  # so that NaN fails
        raise PostconditionError(
            f"the artifact of `{key}` reloads to other logits: they differ by up to {distance:.2g}."
        )
    size_before, size_after = measure_size_bytes(source), measure_size_bytes(folder)
    if stage.shrinks and size_after >= size_before:
        raise PostconditionError(
            f"`{key}` should make the model smaller: {size_before} bytes before, {size_after} after."
        )


def check_bits(key: str, asked: dict[str, float], model: nn.Module, folder: Path) -> None:
    """On average over the layers, every weight takes the bits on disk that were ``asked``: to a fiftieth, as rows are
    filled up to whole words.

    Raises:
        PostconditionError: it does not.
    """
    layers = {name: model.get_submodule(name) for name in asked}
    weights = {name: layer.in_features * layer.out_features for name, layer in layers.items()}
    every = sum(weights.values())
    wanted = sum(asked[name] * weights[name] for name in asked) / every
    found = sum(count_stored_bits(folder, asked).values()) / every
    if abs(found - wanted) > 0.02 * wanted:
        raise PostconditionError(f"`{key}` should store {wanted:.3f} bits a weight and stored {found:.3f}.")


@torch.inference_mode()
def compute_logits(model: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    """The model's logits on ``batches``, flat."""
    if isinstance(model, nn.Module):
        model.eval()
    return torch.cat([model(**batch).logits.float().flatten() for batch in batches])
