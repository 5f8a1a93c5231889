"""Find a model's layers in a graph by the values of their weights, which exporters rename and transpose but keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from compress.errors import PostconditionError
from compress.formats.onnx import Graph
from compress.models.layers import digest_tensor
from compress.models.matrices import Matrix

Digest = tuple[bytes, torch.Size]


def digest_weight(weight: Tensor) -> Digest:
    return digest_tensor(weight), weight.shape


class Weights:
    """The names of ``layers`` by the values of their weights ``[rows, inputs]``."""

    def __init__(self, layers: Mapping[str, Matrix]) -> None:
        self.names: dict[Digest, list[str]] = {}
        for name, layer in layers.items():
            self.names.setdefault(digest_weight(layer.weight), []).append(name)

    def find(self, weight: Tensor, node: str = "") -> str | None:
        """Return the layer with this ``weight`` ``[rows, inputs]``, or None. Of several layers with equal weights it is
        the one whose path is in the name of the ``node``, or the first."""
        names = self.names.get(digest_weight(weight), [])
        path = node.replace("/", ".")
        return next((name for name in names if name in path), names[0] if names else None)


def require_all(key: str, wanted: Iterable[str], found: Iterable[str], layers: Mapping[str, Matrix]) -> None:
    """Raise PostconditionError if a layer in ``wanted`` is not in ``found``, the layers whose products in the graph are
    in integers. A table whose rows no node looks up, as for some kinds of relative positions, stays in floats."""
    left = set(wanted) - set(found)
    if missing := sorted(name for name in left if not layers[name].is_embedding):
        raise PostconditionError(
            f"`{key.rpartition('.')[2]}` should have written integers for {', '.join(missing[:4])}"
            f"{f' and {len(missing) - 4} more' if len(missing) > 4 else ''}, but the graph has no such product. Name "
            f"these layers in {key}.skip."
        )


def find_factors(node: Any, graph: Graph, tensors: dict[str, Any]) -> list[Tensor]:
    """Return the weights ``[rows, inputs]`` of a product, or the table of a lookup; none for other nodes. A node of
    fused attention has three weights."""
    place = {"Gather": 0, "MatMul": 1, "Gemm": 1, "Attention": 1}.get(node.op_type)
    stored = tensors.get(node.input[place]) if place is not None else None
    if stored is None or len(stored.dims) != 2:
        return []
    weight = graph.read_tensor(stored)
    if node.op_type == "Gather" or any(attribute.name == "transB" and attribute.i for attribute in node.attribute):
        return [weight]
    return [part.T for part in weight.chunk(3 if node.op_type == "Attention" else 1, dim=1)]


def find_constants(graph: Any, layers: Mapping[str, Matrix]) -> list[tuple[Any, str, bool]]:
    """Return the constants of an OpenVINO graph with the weights of the ``layers``: the node, the layer's name, and
    whether the constant is transposed to ``[inputs, rows]``."""
    weights = Weights(layers)
    found = []
    for node in graph.get_ops():
        if node.get_type_name() != "Constant" or not node.get_element_type().is_real() or len(node.shape) != 2:
            continue
        stored = torch.from_numpy(node.data)
        for turned in (False, True):
            if name := weights.find(stored.T if turned else stored, node.get_friendly_name()):
                found.append((node, name, turned))
                break
    return found


def multiply_by_rows(product: Any, inputs: Any, weight: Any) -> None:
    """Let the readers of an OpenVINO ``product`` read that of ``inputs`` by ``weight`` ``[rows, inputs]``."""
    from openvino import opset13 as ops

    new = ops.matmul(inputs, weight, False, True)
    new.set_friendly_name(product.get_friendly_name())
    for reader in product.output(0).get_target_inputs():
        reader.replace_source_output(new.output(0))
