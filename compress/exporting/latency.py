"""Measure how the time of a model on this machine depends on its heads and FFN channels."""

from __future__ import annotations

import copy
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from compress.cache.files import write_atomically
from compress.exporting import onnx, openvino
from compress.exporting.tracing import select_inputs
from compress.maths.budgets import interpolate
from compress.models.batches import Batch
from compress.models.blocks import read_blocks
from compress.models.layers import detect_task_kind
from compress.models.shapes import record_shapes, shape_blocks
from compress.quiet import hide_progress_bars
from compress.runtimes.runtime import import_runtime
from compress.runtimes.timing import Latency, build_model_call, estimate_speedup, time_in_turns

EXPORTS = {"onnx": onnx.export, "openvino": openvino.export}
"""Functions that export a model in floats, by stage."""
TIMING = Latency(seconds=0.3, block_s=0.05, warmup=1)
"""How long each shape is timed."""


@dataclass(frozen=True)
class LatencyTable:
    """The time of a model with at most so many ``heads`` or ``ffn`` channels in each block, as a share of its time
    before. ``whole_ms`` is that time: the median of a text alone, in milliseconds; ``sizes`` are those of the blocks
    before, of each part."""

    whole_ms: float
    heads: Mapping[int, float]
    ffn: Mapping[int, float]
    sizes: Mapping[str, Sequence[int]]

    def estimate_savings(self, part: str, levels: Sequence[int]) -> list[float]:
        """Return the milliseconds that the model takes less if one block has each of the ``levels`` of a ``part``,
        ``heads`` or ``ffn``, and not the last of them."""
        table = getattr(self, part)
        sizes, block = sorted(table), {min(table): 0.0}
        for low, high in pairwise(sizes):  # only larger blocks were cut from the one size to the other
            larger = sum(size > low for size in self.sizes[part]) or 1
            block[high] = block[low] + (table[high] - table[low]) / larger
        shares = [interpolate(block, level) for level in levels]
        return [self.whole_ms * (shares[-1] - share) for share in shares]

    def write(self, path: Path) -> None:
        """Write the table as csv, all of it or nothing."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("part", "size", "share", "ms"))
        writer.writerow(("whole", "", 1.0, self.whole_ms))
        for part in ("heads", "ffn"):
            rows = sorted(getattr(self, part).items())
            writer.writerows((part, size, share, share * self.whole_ms) for size, share in rows)
        write_atomically(path, text.getvalue())

    @classmethod
    def read(cls, path: Path, sizes: Mapping[str, Sequence[int]]) -> LatencyTable:
        """Return the table that :meth:`write` wrote of a model with these ``sizes``."""
        with path.open(newline="", encoding="utf-8") as file:
            first, *rows = csv.DictReader(file)
        heads, ffn = (
            {int(row["size"]): float(row["share"]) for row in rows if row["part"] == part} for part in ("heads", "ffn")
        )
        return cls(float(first["ms"]), heads, ffn, sizes)


class ShapeTimer:
    """Times a model in other shapes, in turns with the model as it is, because the speed of a machine drifts.

    Args:
        model: the model; it is not changed.
        texts: single texts, from short to long.
        runtime: module of ``compress.runtimes`` that runs the models, in floats.
    """

    def __init__(self, model: Any, texts: list[Batch], runtime: str) -> None:
        self.model, self.texts, self.runtime = model, texts, runtime
        blocks = read_blocks(model)
        self.sizes = {"heads": [block.heads for block in blocks], "ffn": [block.ffn for block in blocks]}
        self.whole = serve_model(copy.deepcopy(model), texts, runtime)

    def measure_table(self, heads: Sequence[int], ffn: Sequence[int]) -> LatencyTable:
        """Measure the model with each number of query ``heads`` in every block and, with all heads, each number of
        ``ffn`` channels; blocks with fewer keep theirs. Kurtic et al., "ZipLM", 2023, arXiv:2302.04089, choose
        structures by such a table."""
        had = self.sizes
        shares: dict[str, dict[int, float]] = {"heads": {}, "ffn": {}}
        levels = [("heads", level) for level in heads] + [("ffn", level) for level in ffn]
        for part, level in tqdm(levels, desc=f"timing shapes in {self.runtime}", leave=False, disable=None):
            sizes = [min(level, size) for size in had[part]]
            shares[part][level] = 1.0 if sizes == had[part] else self.compare(**{part: sizes})
        return LatencyTable(self.measure_whole(), **shares, sizes=had)

    def measure_whole(self) -> float:
        """Return the median time of a text in the model as it is, in milliseconds."""
        (blocks,) = time_in_turns({"whole": self.whole}, TIMING, len(self.texts)).blocks.values()
        return float(np.median(np.concatenate(blocks)))

    def compare(self, **sizes: list[int]) -> float:
        """Return the time with ``heads`` and ``ffn`` of every block as a share of that of the model as it is."""
        smaller = copy.deepcopy(self.model)
        shape_blocks(smaller, **sizes)
        record_shapes(smaller)
        calls = {"whole": self.whole, "smaller": serve_model(smaller, self.texts, self.runtime)}
        blocks = time_in_turns(calls, TIMING, len(self.texts)).blocks
        return 1 / estimate_speedup(blocks["whole"], blocks["smaller"]).value


def serve_model(model: Any, texts: list[Batch], runtime: str) -> Callable[[int], None]:
    """Return ``call(i)``, which runs text ``i`` in the runtime. PyTorch runs the model itself, which is put into eval
    mode."""
    inputs = [select_inputs(text, model) for text in texts]
    served = model.cpu().float().eval()
    if stage := import_runtime(runtime).STAGE:
        longest = max(inputs, key=lambda text: text["input_ids"].shape[1])
        with TemporaryDirectory() as folder, hide_progress_bars():
            EXPORTS[stage](model, longest, Path(folder))
            served = import_runtime(runtime).load(Path(folder), detect_task_kind(model))
    return build_model_call(served, inputs, torch.device("cpu"))
