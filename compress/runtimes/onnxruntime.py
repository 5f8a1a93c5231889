"""Artifacts that ONNX Runtime runs, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from compress.models import from_pretrained
from compress.runtimes import need

WEIGHTS = ("model.onnx*",)  # the tensors of a large one lie beside it
BESIDE = ("_scale", "_zero_point")
"""The ends of the names of what is stored beside quantized weights."""


class Model:
    """A graph as a model: called with the tokens that it was exported with, answers with ``.logits``."""

    def __init__(self, path: Path, config: PretrainedConfig) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.path = path
        self.config = config

    def __call__(self, **batch: Tensor) -> Any:
        (logits,) = self.session.run(["logits"], {name: tensor.numpy() for name, tensor in batch.items()})
        return SimpleNamespace(logits=torch.from_numpy(logits))

    def to(self, device: torch.device | str) -> Model:
        if torch.device(device).type != "cpu":
            raise ValueError("ONNX Runtime runs on the CPU here.")
        return self

    def parameters(self) -> Iterator[Tensor]:
        """The weights as they are stored, where they are quantized as integers with zero at 0; neither scales nor the
        shapes and indices that are constants of the graph."""
        import onnx

        kinds = onnx.TensorProto
        weights = (kinds.FLOAT, kinds.FLOAT16, kinds.INT8, kinds.UINT8)
        stored = {one.name: one for one in onnx.load(self.path).graph.initializer}
        for name, one in stored.items():
            if one.data_type in weights and not name.endswith(BESIDE):
                weight = torch.from_numpy(onnx.numpy_helper.to_array(one).copy())
                if one.data_type == kinds.UINT8:
                    zero = stored[name.removesuffix("_quantized") + "_zero_point"]
                    weight = weight.short() - int(onnx.numpy_helper.to_array(zero))
                yield weight


def load(folder: Path, kind: str) -> Model:
    """The graph, ready to run.

    Raises:
        UserError: ONNX Runtime is not installed, or ``folder`` says nothing of its model.
    """
    need("onnx", folder, ("onnx", "onnxruntime"))
    return Model(folder / "model.onnx", from_pretrained(AutoConfig, str(folder), "Artifact", "artifact"))
