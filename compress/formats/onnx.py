"""Read, change and write ONNX graphs; the tensors of a large graph are in a file beside it.

Runtimes import this module in the process whose memory is measured: it imports nothing that trains.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGEST = 2**31 - 2**20
"""Largest size of a file in ONNX's format, in bytes; the tensors of a larger model are in a second file."""


class Graph:
    """A graph at ``path`` to change. Tensors in a second file stay there until they are read: the graph and its changes
    would hold them several times."""

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
        return {tensor.name: tensor for tensor in self.initializer}

    @property
    def too_large(self) -> bool:
        """Whether one file cannot hold the tensors in memory."""
        return sum(tensor.ByteSize() for tensor in self.initializer) > LARGEST

    def values(self, tensor: Any) -> np.ndarray:
        import onnx

        return onnx.numpy_helper.to_array(tensor, str(self.beside))

    def read_tensor(self, tensor: Any) -> Tensor:
        """Return a writable copy of the values for PyTorch."""
        return torch.from_numpy(self.values(tensor).copy())

    def load(self, most: float) -> None:
        """Read the tensors of at most ``most`` numbers from the second file."""
        import onnx

        for tensor in self.initializer:
            if onnx.external_data_helper.uses_external_data(tensor) and math.prod(tensor.dims) <= most:
                tensor.CopyFrom(onnx.numpy_helper.from_array(self.values(tensor), tensor.name))

    def declare_domain(self, domain: str) -> None:
        """Allow nodes with operators of the ``domain``."""
        import onnx

        if not any(opset.domain == domain for opset in self.proto.opset_import):
            self.proto.opset_import.append(onnx.helper.make_opsetid(domain, 1))

    def write(self, path: Path) -> None:
        """Write the graph to ``path``, in place of what is there; a large one puts its tensors into a second file."""
        import onnx

        self.load(math.inf)
        beside = path.with_name(f"{path.name}.data")
        beside.unlink(missing_ok=True)  # onnx would append to it
        large = self.too_large
        onnx.save(self.proto, path, save_as_external_data=large, location=beside.name if large else None)
