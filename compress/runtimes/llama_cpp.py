"""Run artifacts in llama.cpp, on the CPU."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from compress.formats.gguf import FILE, FREQUENCIES, HEAD, unpack_integers
from compress.models.loading import from_pretrained
from compress.runtimes.decoder import Decoder
from compress.runtimes.runtime import Loading, explain_unreadable, require_packages
from compress.tasks.kinds import KINDS, Kind

STAGE = "gguf"
EXTRA = "llamacpp"
DEVICES = ("cpu",)
PACKAGES = ("llama_cpp", "gguf")
LIBRARY = "gguf"
WEIGHTS = (FILE,)
CODE = f"""\
import llama_cpp
import numpy
from transformers import AutoTokenizer

model = llama_cpp.Llama("{FILE}", n_ctx=0, logits_all=True, flash_attn=True, verbose=False)
tokenizer = AutoTokenizer.from_pretrained(".")
model.eval(tokenizer("A text.")["input_ids"])
logits = numpy.array(model.scores[None, : model.n_tokens])
"""
NOTE = (
    f"`{FILE}` alone is enough for llama.cpp and what is built on it: `llama-cli -m {FILE}`, Ollama, LM Studio. The "
    "lines below take the tokenizer beside it, whose tokens the measurement used."
)
PART = 512
"""Tokens that llama.cpp computes together."""
ROWS = 64
"""Texts that are computed together."""


class Model(Decoder):
    """A file as a model: ``model(input_ids=..., attention_mask=...)`` returns ``.logits`` of every position, and
    ``.past``, the keys and values so far, which the next call may take with the next tokens and the mask of all.

    Logits of padding are zero. There is one state: a call without ``past`` ends what earlier calls returned. Keys and
    values are in float16, as llama.cpp has them by default.
    """

    def __init__(self, path: Path, config: PretrainedConfig) -> None:
        import llama_cpp

        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # its levels are not llama.cpp's
        self.library = llama_cpp
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        if not (model := llama_cpp.llama_model_load_from_file(str(path).encode(), settings)):
            raise ValueError("llama.cpp does not load it")
        self.owned = {"model": model}
        weakref.finalize(self, free_memory, llama_cpp, self.owned)
        self.vocabulary = llama_cpp.llama_model_get_vocab(model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        self.path, self.config = path, config
        self.past: Any = None
        self.room = (0, 0)

    def __call__(self, past: Any = None, **batch: Tensor) -> Any:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        if not past and len(ids) > ROWS:
            parts = [self(input_ids=i, attention_mask=m).logits for i, m in zip(ids.split(ROWS), mask.split(ROWS))]
            return SimpleNamespace(logits=torch.cat(parts), past=None)
        if past and past is not self.past:
            raise ValueError("llama.cpp has one state, and a later call has replaced that of `past`.")
        new = ids.shape[1]
        earlier, mask = mask[:, :-new], mask[:, -new:]
        seen = torch.cat([past.ids, ids], 1) if past else ids
        if not past or seen.shape[1] > self.room[1]:
            self.start(*seen.shape)
            if past:  # a longer state reads the earlier tokens again
                self.decode(past.ids, earlier, torch.zeros(len(ids), dtype=torch.long))
        logits = self.decode(ids, mask, earlier.sum(1))
        self.past = SimpleNamespace(ids=seen)
        return SimpleNamespace(logits=logits, past=self.past)

    def start(self, rows: int, length: int) -> None:
        """Begin new texts: up to ``rows`` of up to ``length`` tokens."""
        library = self.library
        if rows > self.room[0] or length > self.room[1]:
            if "context" in self.owned:
                library.llama_free(self.owned.pop("context"))
            rows, length = max(rows, self.room[0]), max(-(-length // PART) * PART, self.room[1])
            settings = library.llama_context_default_params()
            settings.n_ctx, settings.n_seq_max = rows * length, rows
            settings.n_batch = settings.n_ubatch = PART
            settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
            if not (context := library.llama_init_from_model(self.owned["model"], settings)):
                raise MemoryError(f"llama.cpp has no memory for {rows} texts of {length} tokens.")
            self.owned["context"] = context
            self.room = (rows, length)
        library.llama_memory_clear(library.llama_get_memory(self.owned["context"]), False)

    def decode(self, ids: Tensor, mask: Tensor, before: Tensor) -> Tensor:
        """Return the logits ``[rows, tokens, vocabulary]`` of the next tokens ``ids``, without those that ``mask``
        excludes. ``before`` counts the tokens of each row so far."""
        places = before[:, None] + mask.cumsum(1) - 1
        logits = torch.zeros(*ids.shape, self.size)
        for at in mask.nonzero().split(PART):
            row, column = at.unbind(1)
            tokens = (part.int().numpy() for part in (ids[row, column], places[row, column], row))
            if code := self.library.llama_decode(self.owned["context"], make_batch(self.library, *tokens)):
                raise RuntimeError(f"llama.cpp answers {code} to {len(at)} tokens.")
            found = np.ctypeslib.as_array(self.library.llama_get_logits(self.owned["context"]), (len(at), self.size))
            logits[row, column] = torch.from_numpy(found)
        return logits

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens that llama.cpp makes of a text by the tokenizer in the file."""
        words = text.encode()
        room = (self.library.llama_token * (len(words) + 2))()
        count = self.library.llama_tokenize(self.vocabulary, words, len(words), room, len(room), True, False)
        return list(room[:count])

    def to(self, device: torch.device | str) -> Model:
        if torch.device(device).type != "cpu":
            raise ValueError("llama.cpp runs on the CPU here.")
        return self

    def parameters(self) -> Iterator[Tensor]:
        """Yield the stored weights, quantized ones as integers with zero at 0, without scales and other constants."""
        from gguf import GGUFReader

        for tensor in GGUFReader(self.path).tensors:
            kind = tensor.tensor_type.name
            if tensor.name == FREQUENCIES:
                continue
            if kind in HEAD:
                yield unpack_integers(tensor.data, kind)
            else:
                yield torch.from_numpy(np.array(tensor.data))


def free_memory(library: Any, owned: dict[str, Any]) -> None:
    """Free what a :class:`Model` had of llama.cpp."""
    if "context" in owned:
        library.llama_free(owned["context"])
    library.llama_model_free(owned["model"])


def make_batch(library: Any, tokens: np.ndarray, places: np.ndarray, rows: np.ndarray) -> Any:
    """Return llama.cpp's description of ``tokens`` at ``places`` of the texts ``rows``, all of whose logits it
    computes."""
    count = len(tokens)
    numbers, logits = np.ones(count, np.int32), np.ones(count, np.int8)
    texts = rows.ctypes.data + rows.itemsize * np.arange(count, dtype=np.uint64)  # a pointer for each token
    given = {"token": tokens, "pos": places, "n_seq_id": numbers, "seq_id": texts, "logits": logits}
    kinds: dict[str, Any] = dict(library.llama_batch._fields_)
    batch = library.llama_batch(count, **{name: each.ctypes.data_as(kinds[name]) for name, each in given.items()})
    batch.arrays = given, rows  # as long as the description exists
    return batch


def load(folder: Path, kind: str) -> Model:
    """Return the model, ready to run.

    Raises:
        UserError: llama-cpp-python is not installed, or ``folder`` has no config or no file that it can read.
    """
    require_packages(EXTRA, folder, PACKAGES)
    config = from_pretrained(AutoConfig, str(folder), "Artifact", "artifact")
    with explain_unreadable(folder, FILE):
        return Model(folder / FILE, config)


def describe_loading(folder: Path, kind: str) -> Loading:
    """Return how to load the file by llama-cpp-python alone."""
    task = KINDS[kind]
    return Loading(CODE.replace(Kind.example, task.example) + task.reading, (NOTE,))
