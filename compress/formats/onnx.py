"""Read, change and write ONNX graphs; the tensors of a large graph are in a file beside it.

Runtimes import this module in the process whose memory is measured: it imports nothing that trains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGEST = 2**31 - 2**20
"""Largest size of a file in ONNX's format, in bytes; the tensors of a larger model are in a second file."""


def list_read(graph: Any) -> Iterator[str]:
    """Yield the names that the nodes of a graph read, those of its branches too, and its outputs."""
    yield from (output.name for output in graph.output)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from list_read(attribute.g)


def rename_read(graph: Any, names: Mapping[str, str]) -> None:
    """Let the nodes of a graph, and those of its branches, read other tensors: the values of ``names``."""
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = names.get(name, name)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                rename_read(attribute.g, names)


def inline_copies(path: Path) -> None:
    """Let the graph at ``path`` read each tensor itself where it reads a copy: PyTorch writes an ``Identity`` for every
    further use of a weight."""
    import onnx

    proto = onnx.load(path, load_external_data=False)
    stored = {tensor.name for tensor in proto.graph.initializer}
    copies: dict[str, str] = {}
    for node in list(proto.graph.node):
        source = copies.get(node.input[0], node.input[0]) if node.op_type == "Identity" else ""
        if source in stored:
            copies[node.output[0]] = source
            proto.graph.node.remove(node)
    if copies:
        rename_read(proto.graph, copies)
        onnx.save(proto, path)


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

    def select_feeds(self, batches: Iterable[Mapping[str, Tensor]]) -> list[dict[str, np.ndarray]]:
        """Return the tensors of the ``batches`` that the graph takes: a tokenizer may give more."""
        names = {tensor.name for tensor in self.proto.graph.input}
        return [{name: value.numpy() for name, value in batch.items() if name in names} for batch in batches]

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

    def replace(self, nodes: Iterable[Any], tensors: Mapping[str, np.ndarray]) -> None:
        """Replace all nodes by ``nodes``, add the ``tensors``, and remove the tensors that no node reads any more."""
        import onnx

        new = list(nodes)
        self.proto.graph.ClearField("node")
        self.nodes.extend(new)
        self.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in tensors.items())
        self.remove_unread()

    def remove_unread(self) -> None:
        """Remove the tensors that no node reads."""
        read = set(list_read(self.proto.graph))
        left = [tensor for tensor in self.initializer if tensor.name in read]
        self.proto.graph.ClearField("initializer")
        self.initializer.extend(left)

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
