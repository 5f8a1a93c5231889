"""See which matrix of a model multiplies which inputs while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compress.models.matrices import Matrix, is_expert_list

PRODUCTS: dict[Any, tuple[int, int]] = {
    F.linear: (0, 1),
    torch.addmm: (1, 2),
    Tensor.addmm: (1, 2),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), (0, 1)),
}
"""Functions that multiply inputs by a matrix, with the places of both among their arguments."""


class Products(TorchFunctionMode):
    """Call ``see(matrix, inputs)`` for every product with one of the ``watched`` matrices while the mode is entered.

    A matrix is recognised by the memory that it is stored in, so it does not matter which module multiplies, or how.
    """

    def __init__(self, watched: Collection[Matrix], see: Callable[[Matrix, Tensor], None]) -> None:
        super().__init__()
        self.see = see
        self.places = {locate(matrix.weight): matrix for matrix in watched}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if product := match_product(func, args, self.places):
            self.see(*product)
        return func(*args, **kwargs or {})


def match_product(func: Any, args: Any, places: Mapping[Any, Matrix]) -> tuple[Matrix, Tensor] | None:
    """Return the matrix and the inputs that a call multiplies; None if it is no product with a matrix of ``places``,
    which are by :func:`locate`."""
    if func not in PRODUCTS or len(args) <= max(PRODUCTS[func]):
        return None
    inputs, weight = (args[place] for place in PRODUCTS[func])
    matrix = places.get(locate(weight)) if isinstance(weight, Tensor) else None
    return None if matrix is None or weight.numel() != matrix.size else (matrix, inputs)


def flatten_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from flatten_tensors(part)


def locate(weight: Tensor) -> tuple[int, Any]:
    """Return the storage of a tensor and its offset there, which a transposed view shares."""
    return weight.untyped_storage()._cdata, weight.storage_offset()


class Trace:
    """The products of one forward pass: which matrices multiply, in which order, and which of them the same inputs."""

    def __init__(self, run: Callable[[], Any], watched: Mapping[str, Matrix], mask: Tensor | None = None) -> None:
        self.inputs: dict[str, list[int]] = {}
        """Numbers of the inputs of every matrix that is called, in the order of first calls."""
        self.aligned = True
        """Whether every input is ``[batch, tokens, width]``, so that the attention mask shows its padding."""
        self._mask = mask
        self._watched = watched
        self._seen: dict[Any, tuple[int, Tensor]] = {}  # held, so that no two inputs share an address
        with Products(watched.values(), self._note):
            run()
        self._seen.clear()

    def _note(self, matrix: Matrix, x: Tensor) -> None:
        view = (x.data_ptr(), x.shape, x.stride())
        number, _ = self._seen.setdefault(view, (len(self._seen), x))
        self.inputs.setdefault(matrix.name, []).append(number)
        self.aligned &= self._mask is None or x.shape[:-1] == self._mask.shape

    @property
    def uncalled(self) -> list[str]:
        """Watched matrices that never multiply, except experts that the router could choose for other texts."""
        routed = {id(self._watched[name].stored) for name in self.inputs}
        return [
            name
            for name, matrix in self._watched.items()
            if name not in self.inputs and id(matrix.stored) not in routed
        ]

    def group(self) -> list[list[dict[str, Matrix]]]:
        """Return the matrices that multiply in the order in which they run, in groups that share all their inputs.
        Groups that cannot depend on each other, those of the experts of one parameter, are in one list."""
        groups: dict[tuple[int, ...], dict[str, Matrix]] = {}
        for name, numbers in self.inputs.items():
            groups.setdefault(tuple(numbers), {})[name] = self._watched[name]
        waves: dict[Any, list[dict[str, Matrix]]] = {}
        for together, members in groups.items():
            first = next(iter(members.values()))
            waves.setdefault(together if first.expert is None else id(first.stored), []).append(members)
        for name, matrix in self._watched.items():
            if name not in self.inputs and id(matrix.stored) in waves:
                waves[id(matrix.stored)].append({name: matrix})
        return list(waves.values())


@contextmanager
def separate_experts(model: nn.Module) -> Iterator[None]:
    """Let lists of experts multiply by one expert after the other, not by a product of all of them."""
    configs = {id(module.config): module.config for module in model.modules() if is_expert_list(module)}
    before = {key: config._experts_implementation for key, config in configs.items()}
    for config in configs.values():
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]
