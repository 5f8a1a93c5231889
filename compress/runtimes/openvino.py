"""Artifacts that OpenVINO runs, on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from compress.models import from_pretrained
from compress.runtimes import need

GRAPH, SETTINGS = "openvino_model.xml", "compile.json"
WEIGHTS = ("openvino_model.bin",)
AROUND = ("/fq_", "/nncf_smooth_quant", "rotary_emb")
"""Parts of the names of what is no weight: scales and ranges of quantization, and the angles of positions."""


class Model:
    """A graph as a model: called with the tokens that it was exported with, answers with ``.logits``."""

    def __init__(self, path: Path, settings: dict[str, str], config: PretrainedConfig) -> None:
        import openvino

        self.graph = openvino.Core().read_model(path)
        threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self.compiled = openvino.compile_model(self.graph, "CPU", {**settings, **threads})
        self.config = config

    def __call__(self, **batch: Tensor) -> Any:
        logits = self.compiled({name: tensor.numpy() for name, tensor in batch.items()})["logits"]
        return SimpleNamespace(logits=torch.from_numpy(logits))

    def to(self, device: torch.device | str) -> Model:
        if torch.device(device).type != "cpu":
            raise ValueError("OpenVINO runs on the CPU here.")
        return self

    def parameters(self) -> Iterator[Tensor]:
        """The weights as they are stored, as integers where they are quantized; neither scales nor other constants of
        the graph."""
        for node in self.graph.get_ops():
            if node.get_type_name() != "Constant":
                continue
            kind, count = node.get_element_type(), int(np.prod(list(node.shape)))
            readers = [one.get_node().get_friendly_name() for one in node.output(0).get_target_inputs()]
            around = any(part in name for part in AROUND for name in (node.get_friendly_name(), *readers))
            if kind.bitwidth <= 8 and kind.is_integral_number():
                yield torch.from_numpy(node.get_data(dtype=np.float32)).char()  # four bits are packed otherwise
            elif kind.is_real() and count > 1 and not around:
                yield torch.from_numpy(node.get_data(dtype=np.float32).copy())


def load(folder: Path, kind: str) -> Model:
    """The graph, ready to run.

    Raises:
        UserError: OpenVINO is not installed, or ``folder`` says nothing of its model.
    """
    need("openvino", folder, ("openvino",))
    config = from_pretrained(AutoConfig, str(folder), "Artifact", "artifact")
    return Model(folder / GRAPH, json.loads((folder / SETTINGS).read_text()), config)
