"""The second-order mathematics of layer-wise compression, of which GPTQ and SparseGPT are two uses."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import UserError


def second_moment(x: Tensor) -> Tensor:
    """``x^T x`` of inputs ``[tokens, inputs]``: half the Hessian of a layer's squared error, ``[inputs, inputs]``."""
    return x.T @ x


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse: row j holds how an error in column j is best spread
    over the columns after it."""
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
        "The Hessian of the calibration inputs cannot be inverted at any damping: they hold NaN or infinity, so the "
        "model that was to be compressed is broken already."
    )
