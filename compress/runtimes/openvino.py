"""Run artifacts in OpenVINO, on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from compress.models.loading import from_pretrained
from compress.quiet import disable_telemetry
from compress.runtimes.decoder import Decoder
from compress.runtimes.runtime import Loading, explain_unreadable, require_packages
from compress.tasks.kinds import KINDS, Kind

GRAPH, SETTINGS = "openvino_model.xml", "compile.json"
STAGE = "openvino"
EXTRA = "openvino"
DEVICES = ("cpu",)
PACKAGES = ("openvino",)
LIBRARY = "openvino"
WEIGHTS = ("openvino_model.bin",)
CODE = f"""\
import json

import openvino
from transformers import AutoTokenizer

settings = json.load(open("{SETTINGS}"))
model = openvino.compile_model("{GRAPH}", "CPU", settings)
tokenizer = AutoTokenizer.from_pretrained(".")
tokens = tokenizer("A text.", return_tensors="np")
inputs = {{port.any_name: tokens[port.any_name] for port in model.inputs}}
logits = model(inputs)["logits"]
"""
SCALE, ZERO = "/fq_weights_1/scale", "/fq_weights_1/zero_point"
"""Endings that NNCF adds to a weight's name for the scales and zero points of its integers."""
AROUND = ("/fq_", "/nncf_smooth_quant", "rotary_emb")
"""Parts of the names of constants that are not weights: scales, ranges, and the angles of positions."""
OURS = {"INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE", "KV_CACHE_PRECISION", "LP_TRANSFORMS_MODE"}
"""What an artifact may set of OpenVINO: arithmetic, and nothing that names files."""
HERE = {"PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
"""Settings for one caller that waits for each batch: all threads at once, on any core, as PyTorch's threads run."""

disable_telemetry()


@cache
def shared_core() -> Any:
    """Return the only Core of the process.

    Each Core installs a signal stack. Destroying two in creation order leaves a dangling stack, and Ctrl-C then kills
    the process.
    """
    import openvino

    return openvino.Core()


@contextmanager
def use_shared_core() -> Iterator[None]:
    """Make NNCF, which creates a Core for every graph, use the one of the process."""
    import openvino

    shared_core()  # created by the class that is patched below
    with patch.object(openvino, "Core", shared_core), patch.object(openvino._ov_api, "Core", shared_core):
        yield


class Model(Decoder):
    """A graph as a model: it takes the inputs of its export, ignores others, and returns ``.logits``.

    A causal language model also decodes: ``model(input_ids=..., attention_mask=..., past=())`` returns ``.past``, the
    keys and values so far. The next call takes it with the next tokens and the mask of all, and consumes it.
    """

    def __init__(self, path: Path, settings: dict[str, str], config: PretrainedConfig) -> None:
        self.graph = shared_core().read_model(path)
        threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self.compiled = shared_core().compile_model(self.graph, "CPU", {**settings, **HERE, **threads})
        self.request = self.compiled.create_infer_request()
        self.config = config
        self.inputs = {name for port in self.compiled.inputs for name in port.get_names()}

    def __call__(self, past: Any = None, **batch: Tensor) -> Any:
        request = self.request if past is None else past or self.compiled.create_infer_request()
        if past is None:
            request.reset_state()
        feeds = {name: tensor.numpy() for name, tensor in batch.items() if name in self.inputs}
        logits = request.infer(feeds, share_inputs=True)["logits"]
        return SimpleNamespace(logits=torch.from_numpy(logits), past=request)

    def to(self, device: torch.device | str) -> Model:
        if torch.device(device).type != "cpu":
            raise ValueError("OpenVINO runs on the CPU here.")
        return self

    def parameters(self) -> Iterator[Tensor]:
        """Yield the stored weights, quantized ones as integers with zero at 0, without scales and other constants."""
        for node in self.graph.get_ops():
            if node.get_type_name() != "Constant":
                continue
            kind, count = node.get_element_type(), int(np.prod(list(node.shape)))
            around = any(
                part in name for part in AROUND for name in (node.get_friendly_name(), *list_names(find_readers(node)))
            )
            if kind.bitwidth <= 8 and kind.is_integral_number():
                (convert, *_) = find_readers(node)
                after = [one for one in find_readers(convert) if one.get_type_name() == "Subtract"]
                if after and after[0].input_value(1).get_node() == convert:
                    continue  # a zero point
                weight = read_constant(node)  # as floats, because four bits are packed
                if after:
                    weight = weight - read_constant(after[0].input_value(1).get_node().input_value(0).get_node())
                yield weight.short()
            elif kind.is_real() and count > 1 and not around:
                yield read_constant(node)


def find_readers(node: Any) -> list[Any]:
    """Return the nodes that read the output of ``node``."""
    return [port.get_node() for port in node.output(0).get_target_inputs()]


def list_names(nodes: list[Any]) -> list[str]:
    return [node.get_friendly_name() for node in nodes]


def read_constant(constant: Any) -> Tensor:
    """Return a constant as floats."""
    return torch.from_numpy(constant.get_data(dtype=np.float32).copy())


def load(folder: Path, kind: str) -> Model:
    """Return the graph, ready to run.

    Raises:
        UserError: OpenVINO is not installed, or ``folder`` has no config or no graph that it can read.
    """
    require_packages(EXTRA, folder, PACKAGES)
    config = from_pretrained(AutoConfig, str(folder), "Artifact", "artifact")
    with explain_unreadable(folder, GRAPH, SETTINGS):
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if unknown := sorted(set(settings) - OURS):
            raise ValueError(f"{SETTINGS} sets {', '.join(unknown)}")
        return Model(folder / GRAPH, settings, config)


def describe_loading(folder: Path, kind: str) -> Loading:
    """Return how to load the graph by OpenVINO alone."""
    task = KINDS[kind]
    return Loading(CODE.replace(Kind.example, task.example) + task.reading)
