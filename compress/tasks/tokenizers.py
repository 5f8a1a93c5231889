"""Describe tokenizers: what decides their tokens, and which of their tokens a model does not know. Pad prompts."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from compress.cache.digests import fingerprint_files


def pad_left(rows: Sequence[list[int]], filler: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of tokens as one tensor, padded on the left for a model that continues them, and its mask."""
    width = max(map(len, rows))
    ids = [[filler] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def describe_rules(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return everything that decides a text's tokens, as JSON-like content. A tokenizer that is written in Python is
    described by the files that it saves, and by its source if that is not transformers' own."""
    if getattr(tokenizer, "is_fast", False):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        del rules["truncation"], rules["padding"]  # set by the last call, so no property of the tokenizer
        return rules
    kind = type(tokenizer)
    source = "" if kind.__module__.startswith("transformers.") else inspect.getsource(kind)
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        config = Path(folder) / "tokenizer_config.json"
        settings = json.loads(config.read_text(encoding="utf-8"))
        config.unlink()
        for name in ("is_local", "local_files_only"):  # how it was loaded
            settings.pop(name, None)
        return [settings, fingerprint_files(Path(folder)), source]


def describe_unknown_token(tokenizer: PreTrainedTokenizerBase, token: int, known: int, key: str = "model.path") -> str:
    """Return the end of a sentence on a token that a model of ``known`` tokens, the setting ``key``, has no embedding
    for."""
    return (
        f"token {token}, {tokenizer.convert_ids_to_tokens(token)!r}; the model has embeddings for the tokens 0 to "
        f"{known - 1}. Set {key} to a folder with the tokenizer that the model was trained with, or to a copy of "
        f"the model with more embeddings (model.resize_token_embeddings({token + 1}); the new ones are random)."
    )
