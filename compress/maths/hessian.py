"""Second-order mathematics of layer-wise compression, shared by GPTQ and SparseGPT."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import UserError


def second_moment(x: Tensor) -> Tensor:
    """Return ``x^T x`` ``[inputs, inputs]`` of ``[tokens, inputs]``: half the Hessian of a layer's squared error."""
    return x.T @ x


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the damped Hessian's inverse, ``[inputs, inputs]``.

    Row j says how an error in column j is best spread over the later columns.

    Raises:
        UserError: no damping makes the Hessian invertible.
    """
    mean = hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    while damping <= 100:
        damped = hessian + damping * mean * torch.eye(len(hessian), device=hessian.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and upper.isfinite().all():
                return upper
        damping *= 10
    raise UserError(
        "The Hessian of the calibration inputs is not invertible at any damping; the inputs hold NaN or infinity, so "
        "the model was already broken before this stage. Check the stages before it."
    )


def output_error(error: Tensor, moment: Tensor) -> float:
    """Return ``tr(E M E^T)``, the squared error of a layer's outputs over all tokens: its weights are off by ``error``
    ``[rows, inputs]``, and ``moment`` ``[inputs, inputs]`` is the second moment of its inputs."""
    error = error.float()
    return ((error @ moment) * error).sum().item()
