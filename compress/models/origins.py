"""Follow which norms and matrices feed the inputs of every matrix while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from compress.models.matrices import Matrix, read_matrices
from compress.models.products import flatten_tensors, locate, match_product

FRESH = frozenset(
    {torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like}
    | {Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full}
)
"""Functions that take no more than the shape of a tensor."""


class Origins(TorchFunctionMode):
    """While the mode is entered, follow which norms and matrices feed the inputs of every matrix, without a norm or
    another matrix in between."""

    def __init__(self, watched: Iterable[Matrix]) -> None:
        super().__init__()
        self.feeds: dict[str, set[str]] = {}
        """Names of the norms and matrices that feed each matrix that multiplies, in the order in which they run."""
        self._places = {locate(matrix.weight): matrix for matrix in watched}
        self._origins: Any = WeakTensorKeyDictionary()

    def mark(self, tensors: Any, names: set[str]) -> None:
        for tensor in flatten_tensors(tensors):
            if tensor.is_floating_point():  # an index chooses values and is none of them
                self._origins[tensor] = names

    def find(self, tensors: Any) -> set[str]:
        """Return the names of all that feeds the tensors."""
        return set().union(*(self._origins.get(tensor, ()) for tensor in flatten_tensors(tensors)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **kwargs or {})
        names = set() if func in FRESH else self.find([args, kwargs or {}])
        if product := match_product(func, args, self._places):
            matrix, _ = product
            self.feeds.setdefault(matrix.name, set()).update(names)
            names = {matrix.name}
        if names:
            self.mark(args[0] if output is None else output, names)
        return output


def is_norm(module: nn.Module) -> bool:
    """Return whether a module has a weight for every channel and nothing inside, as norms have."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1 and not next(module.children(), None)


def find_readers(modules: Mapping[str, nn.Module]) -> dict[str, Matrix]:
    """Return everything that may multiply by inputs, by name: matrices, and other parameters of two dimensions, such as
    those of the routers of experts."""
    found: dict[str, Matrix] = {}
    for name, module in modules.items():
        readers = read_matrices(name, module)
        if not readers and not isinstance(module, nn.Embedding):
            single = [key for key, weight in module.named_parameters(recurse=False) if weight.ndim == 2]
            readers = [Matrix(f"{name}.{key}", module, key) for key in single]
        found |= {matrix.name: matrix for matrix in readers}
    return found


@torch.no_grad()
def trace_feeds(
    run: Callable[[], Any], found: Mapping[str, Matrix], norms: Mapping[str, nn.Module]
) -> dict[str, set[str]]:
    """Return the names of the norms and matrices that feed every matrix, in the order in which matrices run. Experts
    that no text was routed to are fed like the other ones of their parameter."""
    trace = Origins(found.values())
    hooks = [
        norm.register_forward_hook(lambda _, __, output, name=name: trace.mark(output, {name}))
        for name, norm in norms.items()
    ]
    try:
        with trace:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    numbered = {(id(matrix.stored), matrix.expert): name for name, matrix in found.items()}
    for name in list(trace.feeds):
        if found[name].expert is None:
            continue
        for other, matrix in found.items():
            if other not in trace.feeds and matrix.stored is found[name].stored:
                trace.feeds[other] = {
                    numbered[id(found[origin].stored), matrix.expert]
                    if origin in found and found[origin].expert is not None
                    else origin
                    for origin in trace.feeds[name]
                }
    order = {name: place for place, name in enumerate(found)}
    experts = sorted((name for name in trace.feeds if found[name].expert is not None), key=order.__getitem__)
    return {name: trace.feeds[name] for name in [*(n for n in trace.feeds if n not in experts), *experts]}
