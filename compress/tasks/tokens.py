"""Turn a task's splits into batches of tokens."""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytorch_lightning as pl
import torch
from datasets import Dataset, disable_progress_bars, enable_progress_bars, load_from_disk
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase

from compress.cache.digests import compute_digest, digest_environment
from compress.cache.sources import digest_source
from compress.cache.store import make_once
from compress.errors import UserError
from compress.tasks.kinds import KINDS, Kind
from compress.tasks.splits import Splits, hash_rows
from compress.tasks.tokenizers import describe_rules, describe_unknown_token

Batch = dict[str, torch.Tensor]
LONG = 100_000
"""Rows from which tokenising takes some seconds and shows a progress bar."""


class LengthBuckets(Sampler[list[int]]):
    """Draw batches of texts of similar length in random order, different ones in every epoch.

    Random texts for 50 batches at a time are sorted by length and cut into batches; then all batches are shuffled.
    transformers' own sampler leaves its batches running from long to short, and a model learns worse from that.

    Args:
        lengths: lengths of the texts, in tokens.
        batch_size: texts in a batch, over all processes.
        seed: seed of the order.
        rank: rank of this process; every process gets its share of each batch.
        processes: number of the processes that train together.
        groups: rows that are drawn together, each group as one of the texts that ``lengths`` describe.
    """

    def __init__(
        self,
        lengths: list[int],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
        groups: list[list[int]] | None = None,
    ) -> None:
        self.lengths = torch.tensor(lengths)
        self.batch_size = batch_size
        self.rank, self.processes = rank, processes
        self.groups = groups
        self.seed = seed
        self.go_on(0)

    def go_on(self, seen: int) -> None:
        """Continue after the first ``seen`` batches, counted over all epochs."""
        self.generator = torch.Generator().manual_seed(self.seed)
        epochs, self.seen = divmod(seen, len(self))
        for _ in range(epochs):
            self._draw_batches()

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        batches, self.seen = self._draw_batches()[self.seen :], 0
        for batch in batches:
            short = -len(batch) % self.processes  # every process needs the same number of texts
            own = [*batch, *(batch * self.processes)[:short]][self.rank :: self.processes]
            yield own if self.groups is None else [row for group in own for row in self.groups[group]]

    def _draw_batches(self) -> list[list[int]]:
        """Return the batches of the next epoch."""
        pools = torch.randperm(len(self.lengths), generator=self.generator).split(50 * self.batch_size)
        by_length = (pool[self.lengths[pool].argsort(stable=True)] for pool in pools)
        batches = [batch.tolist() for pool in by_length for batch in pool.split(self.batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=self.generator).tolist()]


class TaskData(pl.LightningDataModule):
    """Load batches of texts of similar length, padded on the right to the longest text.

    A language model's documents are joined and cut into blocks of ``max_length`` tokens; its labels are its inputs,
    -100 where padded. Tokens are stored in the folder ``tokens``, if it is set, by a digest of their text. Stages
    calibrate on the column ``text`` of ``calibration_text``, by default on the training split. Texts with a token that
    is not among the first ``known_tokens``, those that the model has embeddings for, are refused. A data module that
    ``packs`` trains on several conversations in a line.

        TaskData(load_splits(task), tokenizer, max_length=128, batch_size=32).train_dataloader()
    """

    def __init__(
        self,
        splits: Splits,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        batch_size: int = 32,
        seed: int = 0,
        tokens: Path | None = None,
        calibration_text: Dataset | None = None,
        known_tokens: int | None = None,
        packs: bool = False,
    ) -> None:
        super().__init__()
        self.splits = splits
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.seed = seed
        self.tokens = tokens
        self.calibration_text = calibration_text
        self.known_tokens = known_tokens
        self.packs = packs
        self.kind = KINDS[splits.task.kind]
        self.buckets: LengthBuckets
        self._tokenised: dict[str, Dataset] = {}
        self._expanded: dict[str, Dataset] = {}
        self._uses: list[IO] = []
        """Stored tokens in use, which are read from the disk when they are needed."""

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.trainer.fit_loop.total_batch_idx + 1}  # type: ignore[union-attr]

    def load_state_dict(self, state: dict[str, int]) -> None:
        if self.trainer.train_dataloader is None:  # type: ignore[union-attr]
            self.trainer.fit_loop.setup_data()  # type: ignore[union-attr]
        self.buckets.go_on(state["seen"])  # the existing iterator would begin at the first batch

    def train_dataloader(self) -> DataLoader:
        rows = self.tokenised("train")
        lengths = [len(ids) for ids in rows["input_ids"]]
        groups = self.kind.find_groups(self.expanded("train"))
        if groups:
            lengths = [max(lengths[row] for row in group) for group in groups]
        rank, processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        self.buckets = LengthBuckets(lengths, self.batch_size, self.seed, rank, processes, groups)
        return DataLoader(rows, batch_sampler=self.buckets, collate_fn=self.pack if self.packs else self.collate)

    def val_dataloader(self) -> DataLoader:
        return self.in_batches("validation")

    def test_dataloader(self) -> DataLoader:
        return self.in_batches("test")

    def calibration(self, samples: int, batch_size: int) -> DataLoader:
        """Return ``samples`` random examples (blocks, for a language model) of the calibration text or the training
        split, and never of a split that a model is measured on.

        Raises:
            UserError: there are fewer examples.
        """
        own = self.calibration_text
        rows = self.tokenised("train") if own is None else self._known(own, "the calibration text")
        if len(rows) < samples:
            owner = f"of task `{self.splits.task.name}`" if self.calibration_text is None else "for calibration"
            raise UserError(
                f"Calibration asks for {samples} {self.kind.unit} and the text {owner} has {len(rows)}. Set "
                f"{len(rows)} or fewer (samples={len(rows)})."
            )
        if own is None and (groups := self.kind.find_groups(self.expanded("train"))):
            random.Random(self.seed).shuffle(groups)
            drawn = rows.select([row for group in groups[:samples] for row in group][:samples])
        else:
            drawn = rows.shuffle(self.seed, keep_in_memory=True).select(range(samples))
        return DataLoader(drawn, batch_size, collate_fn=self.collate)

    def texts(self, count: int, split: str, batch_size: int = 1) -> list[Batch]:
        """Return ``count`` batches of texts of a split without labels, spread evenly from short to long. Every
        tokenizer gets the same texts, except for a language model, whose blocks depend on its tokenizer. Of a text that
        is read in windows, the first is returned."""
        rows, first = self.tokenised(split), self._first_windows(split)
        picked = [first[text] for text in self._spread_rows(count * batch_size, split)]
        cuts = (picked[at : at + batch_size] for at in range(0, len(picked), batch_size))
        batches = (self.collate([rows[i] for i in cut]) for cut in cuts)
        return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]

    def words(self, split: str, count: int | None = None) -> list[tuple[str, ...]]:
        """Return the untokenised form of the same ``count`` texts and their pairs; without ``count``, of all texts in
        their own order."""
        rows, texts = self.tokenised(split), self.expanded(split)
        picked = self._spread_rows(count, split) if count else self._number_texts(split)
        if self.kind.in_blocks:
            return [(str(self.tokenizer.decode(rows[i]["input_ids"])),) for i in picked]
        chosen: Any = texts.select(picked)
        columns: list[list[str]] = [chosen[name] for name in ("text", "text_pair") if name in texts.column_names]
        return list(zip(*columns))

    def describe_cut(self, split: str) -> str:
        """Return a note on the texts that are longer than ``max_length`` tokens; empty if there are none."""
        rows, texts = self.tokenised(split), self.expanded(split)
        if self.kind.in_blocks or self.kind.reads_windows:
            return ""
        cut = self.kind.count_cut(rows, texts, self.tokenizer, self.max_length)
        share = f"{cut:,} of {len(rows):,} {self.kind.unit} ({cut / len(rows):.1%})"
        effect = f"; {self.kind.cut_effect}" if self.kind.cut_effect else ""
        return f"{split}: {share} {self.kind.cuts} {self.max_length} tokens (task.max_length){effect}" if cut else ""

    def in_order(self, split: str) -> list[int]:
        """Return the indices of a split's rows in the order of its batches: from long to short."""
        lengths = self.kind.keep_together([len(ids) for ids in self.tokenised(split)["input_ids"]])
        return sorted(range(len(lengths)), key=lambda row: -lengths[row])

    def expanded(self, split: str) -> Dataset:
        """Return the rows of a split before tokenising, one for each row of tokens (but for a language model)."""
        if split not in self._expanded:
            self._expanded[split] = self.kind.expand_rows(getattr(self.splits, split))
        return self._expanded[split]

    def tokenised(self, split: str) -> Dataset:
        """Return the split's ``input_ids``, ``attention_mask`` and, except for a language model, ``labels``.

        Raises:
            UserError: the split makes no block of tokens.
        """
        if split not in self._tokenised:
            task, texts = self.splits.task, self.expanded(split)
            if task.rows == "joined" and split != "train":
                texts = Dataset.from_dict({"text": ["".join(texts["text"])]})
            rows = self._known(texts, split, task.stride if split != "train" else None)
            if not len(rows):
                raise UserError(
                    f"Task `{self.splits.task.name}` has too little text in {split} for one {self.kind.unit[:-1]} of "
                    "two tokens. Set task.path to more text."
                )
            self._tokenised[split] = rows
        return self._tokenised[split]

    def replace_training(self, rows: Dataset) -> None:
        """Train on other rows than the data's, with the columns of the splits."""
        self.splits = dataclasses.replace(self.splits, train=rows)
        self._tokenised.pop("train", None)
        self._expanded.pop("train", None)

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        """Return the rows as one padded batch."""
        return self.kind.collate(rows, self.tokenizer)

    def pack(self, rows: list[dict[str, Any]]) -> Batch:
        """Return the rows as one batch whose lines hold several rows."""
        return self.kind.pack(rows, self.tokenizer, self.max_length)

    def in_batches(self, split: str) -> DataLoader:
        """Return a loader of the whole split, from long texts to short."""
        rows = self.tokenised(split).select(self.in_order(split))
        return DataLoader(rows, self.batch_size, collate_fn=self.collate)

    def _spread_rows(self, count: int, split: str) -> list[int]:
        """Return the indices of ``count`` texts, spread evenly from the split's shortest texts to its longest; some
        repeat if the split has fewer."""
        order = self._number_texts(split)
        if not self.kind.in_blocks:
            lengths = [sum(map(len, texts)) for texts in self.words(split)]
            order.sort(key=lengths.__getitem__)
        return [order[(2 * i + 1) * len(order) // (2 * count)] for i in range(count)]

    def _number_texts(self, split: str) -> list[int]:
        """Return the indices of a split's texts, or of a language model's blocks."""
        return list(range(len(self.tokenised(split) if self.kind.in_blocks else self.expanded(split))))

    def _first_windows(self, split: str) -> list[int]:
        """Return for every text the index of the row of tokens that it, or its first window, is in."""
        rows = self.tokenised(split)
        if not self.kind.reads_windows:
            return list(range(len(rows)))
        return [int(first) for first in np.unique(rows["row"], return_index=True)[1]]

    def _known(self, texts: Dataset, where: str, stride: int | None = None) -> Dataset:
        """Return the tokens of texts, in blocks that begin a ``stride`` apart.

        Raises:
            UserError: one of them has no embedding.
        """
        rows, known = self._kept(texts, stride), self.known_tokens
        if known is None:
            return rows
        chunks = rows.data.column("input_ids").chunks
        last = max((pc.max(chunk.flatten()).as_py() or 0 for chunk in chunks), default=0)
        if last >= known:
            token = describe_unknown_token(self.tokenizer, last, known)
            raise UserError(f"Task `{self.splits.task.name}` has a text in {where} with {token}")
        return rows

    def _kept(self, rows: Dataset, stride: int | None) -> Dataset:
        if self.tokens is None:
            return self._tokenise(rows, stride)
        own = self.tokenizer
        outputs = [type(own).__name__, own.model_input_names, own.truncation_side]
        settings = [own.init_kwargs.get("prompts"), getattr(own, "chat_template", None)]
        key = [hash_rows(rows), describe_rules(own), outputs, settings, self.kind.name, self.max_length, stride]
        key += [digest_environment(), digest_source(__name__)]
        folder = Path(self.tokens) / compute_digest(key)
        self._uses.append(make_once(folder, lambda into: self._write_tokens(rows, into, stride)))
        return load_from_disk(str(folder))

    def _write_tokens(self, rows: Dataset, folder: Path, stride: int | None) -> None:
        tokenised = self._tokenise(rows, stride)
        disable_progress_bars()
        tokenised.save_to_disk(folder)

    def _tokenise(self, rows: Dataset, stride: int | None) -> Dataset:
        (enable_progress_bars if len(rows) >= LONG and sys.stderr.isatty() else disable_progress_bars)()
        encode = partial(tokenise_batch, kind=self.kind, tokenizer=self.tokenizer, max_length=self.max_length)
        names = rows.column_names
        tokenised = rows.map(encode, with_indices=True, batched=True, remove_columns=names, desc="tokenising")
        return cut_blocks(tokenised, self.max_length, stride) if self.kind.in_blocks else tokenised


def tokenise_batch(
    rows: dict[str, list], numbers: list[int], kind: Kind, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list]:
    """Return the tokens of rows as their kind of task makes them; ``numbers`` are the rows' own in the split."""
    return kind.tokenise({**rows, "row": numbers}, tokenizer, max_length)


def cut_blocks(documents: Dataset, max_length: int, stride: int | None = None) -> Dataset:
    """Return the documents' tokens, joined and cut into blocks of ``max_length`` tokens with their masks.

    The tokens stay in Arrow's buffers: as Python lists, those of a large split would need ten times the memory.

    With a ``stride`` below the length blocks overlap: each begins that many tokens after the one before it. ``labels``
    then counts its first tokens, which an earlier block scores. (Hugging Face, "Perplexity of fixed-length models".)
    """
    column = documents.data.column("input_ids").cast(pa.list_(pa.int32())).combine_chunks()
    ids = column.flatten()
    if stride and stride < max_length:
        return cut_windows(ids.to_numpy(), max_length, stride)
    starts = list(range(0, len(ids), max_length))
    if len(ids) % max_length == 1:  # one token predicts nothing
        ids = ids[:-1]
        starts.pop()
    cuts = pa.array([*starts, len(ids)], pa.int32())
    mask = pa.array(np.ones(len(ids), np.int8))
    return Dataset(
        pa.table(
            {
                "input_ids": pa.ListArray.from_arrays(cuts, ids),
                "attention_mask": pa.ListArray.from_arrays(cuts, mask),
            }
        )
    )


def cut_windows(ids: np.ndarray, max_length: int, stride: int) -> Dataset:
    """Return blocks of ``max_length`` tokens that begin a ``stride`` apart, until one reaches the last of ``ids``."""
    if len(ids) < 2:  # one token predicts nothing
        return Dataset.from_dict({name: [] for name in ("input_ids", "attention_mask", "labels")})
    starts = [*range(0, max(len(ids) - max_length, 0), stride)]
    starts.append(stride * len(starts))
    ends = [min(start + max_length, len(ids)) for start in starts]
    cuts = pa.array(np.cumsum([0, *(end - start for start, end in zip(starts, ends))]), pa.int32())
    tokens = np.concatenate([ids[start:end] for start, end in zip(starts, ends)])
    seen = [0, *(end - start for start, end in zip(starts[1:], ends))]
    columns = {"input_ids": tokens, "attention_mask": np.ones(len(tokens), np.int8)}
    blocks = {name: pa.ListArray.from_arrays(cuts, pa.array(column)) for name, column in columns.items()}
    return Dataset(pa.table({**blocks, "labels": seen}))
