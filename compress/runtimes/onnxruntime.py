"""Run artifacts in ONNX Runtime, on the CPU."""

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
from compress.models.loading import from_pretrained
from compress.runtimes.decoder import Decoder
from compress.runtimes.runtime import Loading, explain_unreadable, require_packages
from compress.tasks.kinds import KINDS, Kind

GRAPH = "model.onnx"
STAGE = "onnx"
EXTRA = "onnx"
DEVICES = ("cpu",)
PACKAGES = ("onnx", "onnxruntime")
LIBRARY = "onnx"
WEIGHTS = ("model.onnx*",)  # the tensors of a large graph are in a file beside it
CODE = """\
import onnxruntime
from transformers import AutoTokenizer

session = onnxruntime.InferenceSession("model.onnx")
tokenizer = AutoTokenizer.from_pretrained(".")
tokens = tokenizer("A text.", return_tensors="np")
(logits,) = session.run(["logits"], {tensor.name: tokens[tensor.name] for tensor in session.get_inputs()})
"""
CODE_TO_GENERATE = """\
import onnxruntime
from transformers import AutoTokenizer

onnxruntime.set_default_logger_severity(3)  # it warns about every optional input
session = onnxruntime.InferenceSession("model.onnx")
tokenizer = AutoTokenizer.from_pretrained(".")
tokens = tokenizer("A text.", return_tensors="np")
inputs = {tensor.name: tokens[tensor.name] for tensor in session.get_inputs() if tensor.name in tokens}
(logits,) = session.run(["logits"], inputs)  # `compress.load` generates text with a cache of keys and values:
# model, tokenizer, _ = compress.load(".")
# tokenizer.decode(model.generate(**tokenizer("A text.", return_tensors="pt"), max_new_tokens=20)[0])
"""
BESIDE = ("_scale", "_zero_point")
"""Endings of the names of tensors that are stored with quantized weights."""
DTYPES = (np.float32, np.float16, np.int8)
QUANTIZED = "_quantized"
"""Ending of the names of tensors that ONNX Runtime's quantizer has rounded: biases have 32 bits."""
PAST = "past_key_values."
PRESENT = (PAST, "present.")
"""Beginnings of the names of a block's keys or values: as an input, and as an output."""


class Model(Decoder):
    """A graph as a model: it takes the inputs of its export, ignores others, and returns ``.logits``.

    A causal language model also returns ``.past``, the keys and values so far; for other models it is None. The next
    call may take it with the next tokens and the mask of all: ``model(input_ids=..., attention_mask=..., past=...)``.
    """

    def __init__(self, path: Path, config: PretrainedConfig) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {tensor.name for tensor in self.session.get_inputs()}
        self.past = [output.name for output in self.session.get_outputs()[1:]]
        self.path = path
        self.config = config

    def __call__(self, past: tuple[Any, ...] | None = None, **batch: Tensor) -> Any:
        from onnxruntime import OrtValue

        inputs = {
            name: OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())
            for name, tensor in batch.items()
            if name in self.inputs
        }
        earlier = {name.replace(*reversed(PRESENT)): part for name, part in zip(self.past, past or ())}
        logits, *after = self.session.run_with_ort_values(["logits", *self.past], {**inputs, **earlier})
        return SimpleNamespace(logits=torch.from_numpy(logits.numpy()), past=tuple(after) or None)

    def to(self, device: torch.device | str) -> Model:
        if torch.device(device).type != "cpu":
            raise ValueError("ONNX Runtime runs on the CPU here.")
        return self

    def parameters(self) -> Iterator[Tensor]:
        """Yield the stored weights, quantized ones as integers with zero at 0, without scales and other constants."""
        from onnx.helper import tensor_dtype_to_np_dtype

        graph = Graph(self.path)
        stored = graph.tensors
        kinds = {name: tensor_dtype_to_np_dtype(tensor.data_type) for name, tensor in stored.items()}

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
            rounded = name.endswith(QUANTIZED) and kinds[name] == np.int32
            if rounded or (kinds[name] in DTYPES and not name.endswith(BESIDE)):
                yield values(name)


def load(folder: Path, kind: str) -> Model:
    """Return the graph, ready to run.

    Raises:
        UserError: ONNX Runtime is not installed, or ``folder`` has no config or no graph that it can read.
    """
    require_packages(EXTRA, folder, PACKAGES)
    config = from_pretrained(AutoConfig, str(folder), "Artifact", "artifact")
    with explain_unreadable(folder, GRAPH):
        return Model(folder / GRAPH, config)


def describe_loading(folder: Path, kind: str) -> Loading:
    """Return how to load the graph by ONNX Runtime alone."""
    task = KINDS[kind]
    code = CODE_TO_GENERATE if task.generates else CODE
    return Loading(code.replace(Kind.example, task.example) + task.reading)
