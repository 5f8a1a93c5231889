"""Compute a teacher's logits in lower precision, or store them on disk once for all epochs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from compress.cache.store import make_once
from compress.maths.losses import expand_topk, gather_positions, top_k
from compress.models.layers import keep_unstored_buffers
from compress.tasks.kinds import Probabilities

Batch = dict[str, Tensor]


@torch.inference_mode()
def round_teacher(teacher: nn.Module, batch: Batch, probabilities: Probabilities = "softmax") -> nn.Module:
    """Return a copy of the teacher in bfloat16 if its answers to ``batch`` agree, otherwise the teacher itself.

    With ``probabilities`` they agree if the predictions are the same and the probabilities within 0.01. Without, for a
    regression, they agree if the numbers are within 1 % of their standard deviation over the batch.
    """
    copied = cast_teacher(teacher)
    exact, rounded = teacher(**batch).logits.float(), copied(**batch).logits.float()
    if probabilities == "positions":
        exact, rounded = (gather_positions(x, batch.get("attention_mask")) for x in (exact, rounded))
    elif exact.ndim == 3 and "attention_mask" in batch:
        exact, rounded = exact[batch["attention_mask"].bool()], rounded[batch["attention_mask"].bool()]
    if probabilities is None:
        close = (exact - rounded).abs().max() < 0.01 * exact.std(correction=0)
        return copied if close else teacher
    if probabilities == "sigmoid":
        same, answers = torch.equal(exact > 0, rounded > 0), (exact.sigmoid(), rounded.sigmoid())
    else:
        same, answers = torch.equal(exact.argmax(-1), rounded.argmax(-1)), (exact.softmax(-1), rounded.softmax(-1))
    return copied if same and (answers[0] - answers[1]).abs().max() < 0.01 else teacher


def cast_teacher(teacher: nn.Module) -> nn.Module:
    """Return a copy of the teacher in bfloat16, as transformers would load it: buffers that are not stored, such as
    the angles of rotary embeddings, keep their precision."""
    copied = copy.deepcopy(teacher)
    with keep_unstored_buffers(copied):
        copied.to(torch.bfloat16)
    return copied


class KeptLogits:
    """A teacher's logits on every row of a dataset of tokens, in a folder and in half precision.

    A classifier's logits are ``[rows, labels]``, a language model's ``[tokens of all rows, vocabulary]``. With ``k``,
    a language model's are the log-probabilities and the ids of the k most likely tokens. A row is identified by its
    tokens, so any batch of the dataset can be looked up.
    """

    def __init__(self, folder: Path, rows: Dataset, k: int | None = None) -> None:
        self.folder, self.rows, self.k = folder, rows, k
        tokens = rows["input_ids"]
        self.starts = np.concatenate([[0], np.cumsum([len(ids) for ids in tokens])])
        self.places = {np.asarray(ids, dtype=np.int64).tobytes(): row for row, ids in enumerate(tokens)}
        self.kept: dict[str, np.ndarray] = {}
        self.use: IO | None = None
        """The lock that keeps the folder while it is read."""
        self.labels = 0
        """Number of a classifier's labels, or of the vocabulary's tokens."""

    def fill(self, ask: Callable[[Batch], Tensor], collate: Callable[[list[Any]], Batch], batch_size: int) -> None:
        """Read the logits from the folder; if it does not exist, first compute and write them with ``ask(batch)``."""
        self.use = make_once(self.folder, lambda into: self._write(into, ask, collate, batch_size))
        self.kept = {path.stem: np.load(path, mmap_mode="r") for path in self.folder.glob("*.npy")}
        self.labels = int((self.folder / "labels").read_text(encoding="utf-8"))

    def _write(
        self, folder: Path, ask: Callable[[Batch], Tensor], collate: Callable[[list[Any]], Batch], batch_size: int
    ) -> None:
        by_length = np.argsort(-np.diff(self.starts), kind="stable").tolist()
        kept: dict[str, np.memmap] = {}
        batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
        for rows in tqdm(batches, desc="teacher", unit="batch", leave=False, disable=None):
            batch = collate([self.rows[row] for row in rows])
            batch.pop("labels", None)
            logits = ask(batch).float().cpu()
            parts = {"logits": logits}
            if self.k and logits.ndim == 3:
                parts["logits"], parts["indices"] = top_k(logits, min(self.k, logits.shape[-1]))
            for name, part in parts.items():
                if name not in kept:
                    shape = (len(self.rows) if part.ndim == 2 else int(self.starts[-1]), part.shape[-1])
                    dtype = np.float16 if name == "logits" else np.int32
                    kept[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
                for row, answer in zip(rows, part.numpy()):
                    where, count = self._locate_logits(row, part.ndim == 3)
                    kept[name][where] = answer[:count] if part.ndim == 3 else answer
        for array in kept.values():
            array.flush()
        (folder / "labels").write_text(str(logits.shape[-1]), encoding="utf-8")

    def _locate_logits(self, row: int, by_token: bool) -> tuple[slice | int, int]:
        start, stop = int(self.starts[row]), int(self.starts[row + 1])
        return (slice(start, stop) if by_token else row), stop - start

    def __call__(self, batch: Batch) -> Tensor:
        """Return the teacher's logits on ``batch`` in float32, 0 where padded."""
        mask, device = batch["attention_mask"].bool(), batch["input_ids"].device
        tokens = batch["input_ids"].to(torch.int64).cpu().numpy()
        rows = [self.places[ids[keep].tobytes()] for ids, keep in zip(tokens, mask.cpu().numpy())]
        if len(self.kept["logits"]) == len(self.rows) < self.starts[-1]:
            return torch.from_numpy(self.kept["logits"][rows].astype(np.float32)).to(device)
        answer = torch.zeros(*mask.shape, self.labels)
        for place, row in enumerate(rows):
            where, count = self._locate_logits(row, by_token=True)
            logits = torch.from_numpy(self.kept["logits"][where].astype(np.float32))
            if self.k:
                logits = expand_topk(
                    logits, torch.from_numpy(self.kept["indices"][where].astype(np.int64)), self.labels
                )
            answer[place, :count] = logits
        return answer.to(device)
