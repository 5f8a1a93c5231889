"""Artifacts that ONNX Runtime runs, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from compress.formats import nbits
from compress.formats.nbits import read_integers
from compress.formats.onnx import Graph
from compress.models.backbone import from_pretrained
from compress.runtimes.decoder import Decoder
from compress.runtimes.runtime import Loading, require_packages
from compress.tasks.kinds import KINDS

STAGE = "onnx"
DEVICES = ("cpu",)
PACKAGES = ("onnx", "onnxruntime")
LIBRARY = "onnx"
WEIGHTS = ("model.onnx*",)  # the tensors of a large graph are in a file beside it
CODE = """\
import onnxruntime
from transformers import AutoTokenizer

session = onnxruntime.InferenceSession("model.onnx")
tokenizer = AutoTokenizer.from_pretrained(".")
(logits,) = session.run(["logits"], dict(tokenizer("A text.", return_tensors="np")))
"""
CODE_TO_GENERATE = """\
import onnxruntime
from transformers import AutoTokenizer

onnxruntime.set_default_logger_severity(3)  # it warns about every optional input
session = onnxruntime.InferenceSession("model.onnx")
tokenizer = AutoTokenizer.from_pretrained(".")
tokens = dict(tokenizer("A text.", return_tensors="np"))
(logits,) = session.run(["logits"], tokens)  # `compress.load` generates text with a cache of keys and values:
# model, tokenizer, _ = compress.load(".")
# tokenizer.decode(model.generate(**tokenizer("A text.", return_tensors="pt"), max_new_tokens=20)[0])
"""
BESIDE = ("_scale", "_zero_point")
"""The ends of the names of what is stored beside quantized weights."""


DTYPES = (np.float32, np.float16, np.int8)
PAST = "past_key_values."
PRESENT = (PAST, "present.")
"""How the name of a block's keys or values for earlier tokens begins, and what that of the graph's answer has there."""


class Model(Decoder):
    """A graph as a model: called with the tokens that it was exported with, answers with ``.logits``.

    A causal language model answers with ``.past`` too, the keys and values of the tokens so far, which the next call
    may take with the next tokens and the mask of all: ``model(input_ids=..., attention_mask=..., past=...)``. Of others
    it is None.
    """

    def __init__(self, path: Path, config: PretrainedConfig) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.past = [one.name for one in self.session.get_outputs()[1:]]
        self.path = path
        self.config = config

    def __call__(self, past: tuple[Any, ...] | None = None, **batch: Tensor) -> Any:
        from onnxruntime import OrtValue

        given = {name: OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy()) for name, tensor in batch.items()}
        earlier = {name.replace(*reversed(PRESENT)): part for name, part in zip(self.past, past or ())}
        logits, *after = self.session.run_with_ort_values(["logits", *self.past], {**given, **earlier})
        return SimpleNamespace(logits=torch.from_numpy(logits.numpy()), past=tuple(after) or None)

    def to(self, device: torch.device | str) -> Model:
        if torch.device(device).type != "cpu":
            raise ValueError("ONNX Runtime runs on the CPU here.")
        return self

    def parameters(self) -> Iterator[Tensor]:
        """The weights as they are stored, where they are quantized as integers with zero at 0; neither scales nor the
        shapes and indices that are constants of the graph."""
        from onnx.helper import tensor_dtype_to_np_dtype

        graph = Graph(self.path)
        stored = graph.tensors
        kinds = {name: tensor_dtype_to_np_dtype(one.data_type) for name, one in stored.items()}

        def values(name: str) -> Tensor:
            return graph.read_tensor(stored[name])

        for node in graph.nodes:
            if node.op_type in nbits.OPERATORS and node.input[1] in stored:
                yield read_integers(node, values)
                del stored[node.input[1]]
            elif node.op_type == "DequantizeLinear" and node.input[0] in stored and kinds[node.input[0]] == np.uint8:
                yield values(node.input[0]).short() - values(node.input[2]).short()
                del stored[node.input[0]]
        for name in stored:
            if kinds[name] in DTYPES and not name.endswith(BESIDE):
                yield values(name)


def load(folder: Path, kind: str) -> Model:
    """The graph, ready to run.

    Raises:
        UserError: ONNX Runtime is not installed, or ``folder`` says nothing of its model.
    """
    require_packages(STAGE, folder, PACKAGES)
    return Model(folder / "model.onnx", from_pretrained(AutoConfig, str(folder), "Artifact", "artifact"))


def describe_loading(folder: Path, kind: str) -> Loading:
    """Return how to load the graph by ONNX Runtime alone."""
    return Loading(CODE_TO_GENERATE if KINDS[kind].generates else CODE)
