"""Orthogonal matrices that spread every channel over all of them."""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import hadamard
from scipy.stats import ortho_group
from torch import Tensor


def make_rotation(size: int, kind: str, seed: int) -> Tensor:
    """Return an orthogonal matrix ``[size, size]`` in float64.

    ``hadamard``: all entries are of one magnitude, with random signs of its rows (Ashkboos et al., "QuaRot", 2024,
    arXiv:2404.00456, section 3); ``random``: evenly distributed over all rotations.

    Raises:
        ValueError: no Hadamard matrix of this size is known here.
    """
    generator = np.random.default_rng(seed)
    if kind == "random":
        return torch.from_numpy(ortho_group.rvs(size, random_state=generator) if size > 1 else np.ones((1, 1)))
    signs = generator.choice([-1.0, 1.0], size)
    return torch.from_numpy(signs[:, None] * make_hadamard(size) / np.sqrt(size))


def make_hadamard(size: int) -> np.ndarray:
    """Return a matrix ``[size, size]`` of 1 and -1 with orthogonal rows.

    Sylvester's for powers of two; Paley's two constructions from a prime ``q``, of sizes ``q + 1`` and ``2 (q + 1)``;
    and products of these with Sylvester's: 12, 20, 28, 36, 44... times a power of two.

    Raises:
        ValueError: none of them has this size.
    """
    if not has_hadamard(size):
        raise ValueError(f"no Hadamard matrix of size {size} is known here")
    if size & (size - 1) == 0:
        return hadamard(size).astype(float)
    if is_prime(size - 1):
        return build_paley(size - 1)
    if is_prime(size // 2 - 1) and (size // 2) % 4 == 2:
        return build_symmetric_paley(size // 2 - 1)
    return np.kron(hadamard(2), make_hadamard(size // 2))


def has_hadamard(size: int) -> bool:
    """Return whether :func:`make_hadamard` knows a matrix of this size."""
    while size & (size - 1):
        if size % 4:
            return False
        if is_prime(size - 1) or (is_prime(size // 2 - 1) and (size // 2) % 4 == 2):
            return True
        size //= 2
    return size > 0


def build_paley(prime: int) -> np.ndarray:
    """Return the Hadamard matrix of size ``prime + 1``; the prime leaves 3 when divided by 4."""
    core = np.zeros((prime + 1, prime + 1))
    core[0, 1:], core[1:, 0] = 1, -1
    core[1:, 1:] = find_residues(prime)
    return core + np.eye(prime + 1)


def build_symmetric_paley(prime: int) -> np.ndarray:
    """Return the Hadamard matrix of size ``2 (prime + 1)``; the prime leaves 1 when divided by 4."""
    core = np.ones((prime + 1, prime + 1))
    core[0, 0] = 0
    core[1:, 1:] = find_residues(prime)
    return np.kron(core, [[1, 1], [1, -1]]) + np.kron(np.eye(prime + 1), [[1, -1], [-1, -1]])


def find_residues(prime: int) -> np.ndarray:
    """Return Jacobsthal's matrix ``[prime, prime]``: 1 where the difference of row and column is a square modulo the
    prime, -1 where it is not, and 0 on the diagonal."""
    character = np.full(prime, -1.0)
    character[np.arange(1, prime) ** 2 % prime] = 1
    character[0] = 0
    return character[(np.arange(prime)[:, None] - np.arange(prime)) % prime]


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def rotate_columns(matrix: Tensor, rotation: Tensor, rows: int = 4096) -> Tensor:
    """Return ``matrix`` ``[rows, columns]`` with every run of neighbouring columns, as many as ``rotation`` has,
    multiplied by it; in the dtype of the matrix, computed in float64 for some ``rows`` at a time."""
    rotation = rotation.to(matrix.device)
    parts = (part.double().unflatten(1, (-1, len(rotation))) for part in matrix.split(rows))
    return torch.cat([(part @ rotation).flatten(1).to(matrix.dtype) for part in parts])


def rotate_rows(matrix: Tensor, rotation: Tensor) -> Tensor:
    """Return ``matrix`` ``[rows, ...]`` with every run of neighbouring rows multiplied from the left by the transposed
    ``rotation``: what is computed with it is then rotated like the columns of :func:`rotate_columns`."""
    return rotate_columns(matrix.reshape(len(matrix), -1).T, rotation).T.reshape(matrix.shape)
