"""Check the promises of a stage: a stage that breaks one of them has failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.artifacts.artifact import measure_size_bytes
from compress.errors import PostconditionError, UserError
from compress.formats.packed import count_stored_bits
from compress.models.layers import digest_tensor, find_stacks, is_inside
from compress.models.matrices import find_all_matrices, find_zeros
from compress.technique import Technique


@dataclass(frozen=True)
class State:
    """The state of a model before a stage: a digest of every tensor, and the zeros of the layers that can change."""

    digests: dict[str, bytes]
    zeros: dict[str, Tensor]


def capture_state(model: nn.Module) -> State:
    """Return the state of a model, without a copy of its weights."""
    digests = {name: digest_tensor(tensor) for name, tensor in model.state_dict().items()}
    return State(digests, find_zeros(model, trainable=True))


def check_model(key: str, stage: Technique, before: State, model: nn.Module) -> None:
    """Check that a stage changed a weight, filled in no pruned weight, and kept the head if it promises to.

    Raises:
        UserError: the stage changed nothing.
        PostconditionError: another promise is broken.
    """
    after = {name: digest_tensor(tensor) for name, tensor in model.state_dict().items()}
    changed = {name for name in {*before.digests, *after} if before.digests.get(name) != after.get(name)}
    if stage.changes and not changed:
        raise UserError(f"`{key}` changed nothing; it should change a weight. Remove it, or change its settings.")
    if stage.keeps_head:
        stacks = find_stacks(model)
        if outside := sorted(name for name in changed if not is_inside(name, stacks)):
            raise PostconditionError(
                f"`{key}` should change the transformer blocks alone and changed {', '.join(outside)}."
            )
    found = find_all_matrices(model, embeddings=True, head=True)
    for name, mask in before.zeros.items() if stage.keeps_zeros else ():
        if found[name].shape != mask.shape:
            continue  # the layer was cut
        filled = int((found[name].weight[mask] != 0).sum())
        if filled:
            raise PostconditionError(f"`{key}` filled in {filled} of the {int(mask.sum())} pruned weights of `{name}`.")


def check_folder(key: str, stage: Technique, source: Path, folder: Path, expected: Tensor, reloaded: Tensor) -> None:
    """Check that the saved artifact reloads to equal logits, and is smaller if the stage promises so.

    Raises:
        PostconditionError: a promise is broken.
    """
    distance = (expected - reloaded).abs().max().item()
    allowed = stage.tolerance * max(1.0, expected.abs().max().item())
    if not distance <= allowed:  # written so that NaN fails
        raise PostconditionError(
            f"the artifact of `{key}` reloads to other logits; they differ by up to {distance:.2g}, expected at most "
            f"{allowed:.2g}."
        )
    size_before, size_after = measure_size_bytes(source), measure_size_bytes(folder)
    if stage.shrinks and size_after >= size_before:
        raise PostconditionError(
            f"`{key}` should make the model smaller: {size_before} bytes before, {size_after} after."
        )


def check_bits(key: str, bits: Mapping[str, float], sizes: Mapping[str, int], folder: Path) -> None:
    """Check that weights take the promised ``bits`` on disk, on average over the layers of these ``sizes`` in weights.

    The tolerance is 2 %, because rows are padded to whole words.

    Raises:
        PostconditionError: they take more or fewer bits.
    """
    total = sum(sizes[name] for name in bits)
    promised = sum(bits[name] * sizes[name] for name in bits) / total
    stored = sum(count_stored_bits(folder, bits).values()) / total
    if abs(stored - promised) > 0.02 * promised:
        raise PostconditionError(f"`{key}` should store {promised:.3f} bits a weight and stored {stored:.3f}.")


@torch.inference_mode()
def compute_logits(model: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    """Return the model's logits on ``batches``, flat."""
    if isinstance(model, nn.Module):
        model.eval()
    return torch.cat([model(**batch).logits.float().flatten() for batch in batches])
