"""ONNX graphs on disk: read, changed and written, the tensors of large ones beside them.

Runtimes load this too, in the process whose memory is measured: nothing is imported here that trains.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGEST = 2**31 - 2**20
"""Bytes that a file in ONNX's format holds; the tensors of a larger model lie beside it."""


class Graph:
    """A graph at ``path`` to be changed. Tensors that lie beside it, those of a large one, stay there until they are
    asked for: the graph and its changes would hold them several times over."""

    def __init__(self, path: Path) -> None:
        import onnx

        self.beside = path.parent
        self.proto = onnx.load(path, load_external_data=False)
        self.large = any(map(onnx.external_data_helper.uses_external_data, self.initializer))
        self.load(2**20)

    @property
    def nodes(self) -> Any:
        return self.proto.graph.node

    @property
    def initializer(self) -> Any:
        """All tensors, in the order of the file."""
        return self.proto.graph.initializer

    @property
    def tensors(self) -> dict[str, Any]:
        return {one.name: one for one in self.initializer}

    @property
    def too_large(self) -> bool:
        """Whether a file cannot hold the tensors that do not lie beside it."""
        return sum(one.ByteSize() for one in self.initializer) > LARGEST

    def values(self, tensor: Any) -> np.ndarray:
        import onnx

        return onnx.numpy_helper.to_array(tensor, str(self.beside))

    def read_tensor(self, tensor: Any) -> Tensor:
        """The values for PyTorch, which takes none that cannot be written to."""
        return torch.from_numpy(self.values(tensor).copy())

    def load(self, most: float) -> None:
        """Take in the tensors of no more than so many numbers that lie beside the graph."""
        import onnx

        for one in self.initializer:
            if onnx.external_data_helper.uses_external_data(one) and math.prod(one.dims) <= most:
                one.CopyFrom(onnx.numpy_helper.from_array(self.values(one), one.name))

    def declare_domain(self, domain: str) -> None:
        """Let its nodes be operators of the ``domain``."""
        import onnx

        if not any(one.domain == domain for one in self.proto.opset_import):
            self.proto.opset_import.append(onnx.helper.make_opsetid(domain, 1))

    def write(self, path: Path) -> None:
        """Write it in place of what is at ``path``, the tensors of a large one beside it."""
        import onnx

        self.load(math.inf)
        beside = path.with_name(f"{path.name}.data")
        beside.unlink(missing_ok=True)  # onnx would append to it
        large = self.too_large
        onnx.save(self.proto, path, save_as_external_data=large, location=beside.name if large else None)
