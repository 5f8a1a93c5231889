"""Second-order mathematics of layer-wise compression, shared by GPTQ and SparseGPT."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from compress.errors import UserError

LEAF = 16
"""Columns that are visited one by one; errors move between longer runs of columns by matrix products."""


def second_moment(x: Tensor, width: int = 512) -> Tensor:
    """Return ``x^T x`` ``[inputs, inputs]`` of ``[tokens, inputs]``: half the Hessian of a layer's squared error.

    It is symmetric: ``width`` rows at a time, only the columns from the diagonal on are multiplied.
    """
    moment = x.new_empty(x.shape[1], x.shape[1])
    for start in range(0, len(moment), width):
        stop = start + width
        moment[start:stop, start:] = x[:, start:stop].T @ x[:, start:]
        moment[stop:, start:stop] = moment[start:stop, stop:].T
    return moment


class Factor(NamedTuple):
    """A Hessian as ``upper @ diagonal.diag() @ upper.T``; ``upper`` ``[inputs, inputs]`` is triangular with ones on its
    diagonal, and ``diagonal`` ``[inputs]`` is positive.

    Errors E of a weight's columns cost ``sum_j diagonal_j (E @ upper)_j^2``. Column j therefore adds nothing if it
    takes over ``E[:, :j] @ upper[:j, j]`` of the errors before it, and rounding it costs ``diagonal_j`` times the
    squared distance. Chee et al., "QuIP", 2023, arXiv:2307.13304, prove that this is GPTQ's update; the inverse of the
    Hessian is not needed.
    """

    upper: Tensor
    diagonal: Tensor


def factorize(hessian: Tensor, damping: float) -> Factor:
    """Return the factor of ``hessian`` ``[inputs, inputs]``, whose diagonal is raised by the fraction ``damping`` of
    its mean; ten times more until the result is exact.

    Raises:
        UserError: no damping makes the Hessian positive definite.
    """
    mean = hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    while damping <= 100:
        upper = hessian.clone()
        upper.diagonal().add_(damping * mean)
        failed = decompose(upper)
        pivots = upper.diagonal().clone()
        # Exactly computed, no pivot is smaller than what was added to the diagonal.
        if not failed and pivots.square().min() > 0.5 * damping * mean:
            return Factor(upper.triu_().div_(pivots), pivots.square_())
        damping *= 10
    raise UserError(
        "The Hessian of the calibration inputs is not invertible at any damping; the inputs hold NaN or infinity, so "
        "the model was already broken before this stage. Check the stages before it."
    )


def decompose(matrix: Tensor, width: int = 512) -> Tensor:
    """Replace the upper triangle of a symmetric ``matrix`` ``[n, n]`` in place by that of ``U`` with ``U @ U.T`` equal
    to it, and return how often that failed.

    LAPACK factors ``width`` columns at a time, from the last to the first, and matrix products do the rest: PyTorch
    spends as long on clearing the other triangle of one large factor as on computing it.
    """
    failures = torch.zeros((), dtype=torch.int32, device=matrix.device)
    for stop in range(len(matrix), 0, -width):
        start = max(stop - width, 0)
        own = matrix[start:stop, start:stop]
        lower, failed = torch.linalg.cholesky_ex(own.flip(0, 1))  # in reverse order, it is an upper triangle
        own.copy_(lower.flip(0, 1))
        failures += failed != 0
        if start == 0:
            break
        above = torch.linalg.solve_triangular(own, matrix[:start, start:stop].T, upper=True).T  # contiguous, so fast
        matrix[:start, start:stop] = above
        for end in range(start, 0, -width):
            begin = max(end - width, 0)
            matrix[:end, begin:end].addmm_(above[:end], above[begin:end].T, alpha=-1)
    return failures


class Sweep:
    """A visit of the columns of a weight in order, in which each compensates the errors of those before it.

    ``weight`` ``[inputs, rows]`` is transposed: its columns are contiguous. ``prepare(start, stop, columns)`` is called
    before each ``segment`` of columns; ``columns`` ``[stop - start, rows]`` is the best continuation in floats.
    ``choose(j, column)`` returns the new values ``[rows]`` of column j, which has taken over the errors before it.

    The second half of a range receives the errors of the first half by one matrix product. No value is read on the
    host: on a GPU that would wait for the device at every column.
    """

    def __init__(
        self,
        weight: Tensor,
        factor: Factor,
        segment: int,
        prepare: Callable[[int, int, Tensor], None],
        choose: Callable[[int, Tensor], Tensor],
    ) -> None:
        self.weight, self.upper, self.segment = weight, factor.upper, segment
        self.prepare, self.choose = prepare, choose
        self.current = weight.clone()  # columns after compensation; once visited, the error of the column
        self.inverses: Tensor | None = None
        if segment <= LEAF and len(weight) % segment == 0:
            own = self.upper.unflatten(0, (-1, segment)).unflatten(2, (-1, segment)).diagonal(dim1=0, dim2=2)
            unit = torch.eye(segment, device=own.device).expand(own.shape[2], -1, -1)
            inside = own.permute(2, 1, 0)  # lower triangles [segments, segment, segment]
            self.inverses = torch.linalg.solve_triangular(inside, unit, upper=False, unitriangular=True)

    def run(self) -> None:
        """Visit all columns."""
        self._visit(0, len(self.weight), prepared=False)

    def _visit(self, start: int, stop: int, prepared: bool) -> None:
        if not prepared and stop - start <= self.segment:
            self.prepare(start, stop, self._continue(start, stop))
            prepared = True
        if prepared and stop - start <= LEAF:
            self._visit_columns(start, stop)
            return
        unit = LEAF if prepared else self.segment
        middle = start + max((stop - start) // unit // 2, 1) * unit
        self._visit(start, middle, prepared)
        errors, later = self.current[start:middle], self.current[middle:stop]
        later.addmm_(self.upper[start:middle, middle:stop].T, errors)
        self._visit(middle, stop, prepared)

    def _continue(self, start: int, stop: int) -> Tensor:
        """Return the values of columns that compensate the errors before ``start`` best."""
        before = self.weight[start:stop]
        if start == 0:
            return before
        received = self.current[start:stop] - before
        if self.inverses is not None:
            return torch.addmm(before, self.inverses[start // self.segment], received)
        inside = self.upper[start:stop, start:stop].T
        return before + torch.linalg.solve_triangular(inside, received, upper=False, unitriangular=True)

    def _visit_columns(self, start: int, stop: int) -> None:
        columns, before = self.current[start:stop].unbind(), self.weight[start:stop].unbind()
        for j, (column, original) in enumerate(zip(columns, before)):
            if j:
                column.addmv_(self.current[start : start + j].T, self.upper[start : start + j, start + j])
            torch.sub(original, self.choose(start + j, column), out=column)


def output_error(error: Tensor, moment: Tensor) -> float:
    """Return ``tr(E M E^T)``, the squared error of a layer's outputs over all tokens: its weights are off by ``error``
    ``[rows, inputs]``, and ``moment`` ``[inputs, inputs]`` is the second moment of its inputs."""
    return row_errors(error, moment).sum().item()


def row_errors(error: Tensor, moment: Tensor, width: int = 512) -> Tensor:
    """Return the squared error of every output over all tokens, ``[rows]``, as :func:`output_error` sums it.

    The moment is symmetric: for ``width`` columns at a time, only its rows from the diagonal on are multiplied.
    """
    error = error.float()
    total = error.new_zeros(len(error))
    for start in range(0, len(moment), width):
        stop = start + width
        own, later = error[:, start:stop], error[:, stop:]
        product = own @ moment[start:stop, start:stop] + 2 * (later @ moment[stop:, start:stop])
        total += product.mul_(own).sum(1)
    return total
