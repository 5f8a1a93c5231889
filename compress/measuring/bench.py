"""Prepare an artifact for its measurement."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import DataLoader

from compress.artifacts.artifact import Artifact
from compress.runtimes.timing import Batch, Latency
from compress.tasks.tokens import TaskData


@dataclass(frozen=True)
class Bench:
    """An artifact ready to be measured.

    ``batched`` is the whole split in the artifact's tokens. ``texts`` are the single texts to time and ``words`` the
    same texts before tokenizing. ``batches`` are the batches to time, by size.
    """

    folder: Path
    artifact: Artifact
    split: str
    batched: DataLoader
    texts: list[Batch]
    data: TaskData
    words: list[tuple[str, ...]]
    batches: dict[int, list[Batch]]


def build_bench(folder: Path, loaded: Artifact, data: TaskData, latency: Latency, split: str = "test") -> Bench:
    """Prepare an artifact and a split of ``data``, which must be in the artifact's own tokens."""
    batches = {size: data.texts(max(1, latency.texts // size), split, size) for size in latency.batch_sizes}
    singles, words = data.texts(latency.texts, split), data.words(split, latency.texts)
    return Bench(folder, loaded, split, data.in_batches(split), singles, data, words, batches)


def list_texts(bench: Bench) -> list[str]:
    """Return the texts of the split in its order, a pair as one text; none if documents are cut into blocks."""
    return [] if bench.data.kind.in_blocks else [" ".join(row) for row in bench.data.words(bench.split)]
