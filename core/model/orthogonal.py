"""Orthogonal start values that are the same bits on every platform.

Gram-Schmidt in float64, made of nothing but products, sums, quotients and roots of single numbers, each of which
IEEE 754 rounds in one way. BLAS, LAPACK and np.sum add up in an order of their own, by processor, shape and thread;
here a sum is a tree that `_sums` spells out, array against array.
"""

import numpy as np

from core import rng

TILE = 32
"""Vectors that are worked on together, so that they stay in a processor's cache: no bit depends on how many."""


def orthogonal(seed: int, name: str, rows: int, columns: int) -> np.ndarray:
    """Return a random matrix (rows, columns) float64 whose rows, or columns if there are fewer, are orthonormal.

    It is the Q of the QR decomposition of standard normals whose R has a positive diagonal.
    """
    vectors = rng.normal(seed, name, rows * columns).reshape(rows, columns)
    vectors = np.ascontiguousarray(vectors if rows <= columns else vectors.T)
    for _ in range(2):  # after one pass rounding leaves as much as the normals were close to dependent
        _orthonormalise(vectors)
    return vectors if rows <= columns else vectors.T


def _orthonormalise(vectors: np.ndarray) -> None:
    """Make the rows of (n, length) orthonormal in place, each against all before it, one after the other."""
    products = np.empty((min(TILE, len(vectors)), vectors.shape[1]))
    for first in range(0, len(vectors), TILE):
        tile = vectors[first : first + TILE]
        for i, unit in enumerate(tile):
            unit /= np.sqrt(_sums(np.multiply(unit, unit, out=products[:1])))[0]
            _remove(unit, tile[i + 1 :], products)
        for later in range(first + TILE, len(vectors), TILE):
            for unit in tile:
                _remove(unit, vectors[later : later + TILE], products)


def _remove(unit: np.ndarray, others: np.ndarray, products: np.ndarray) -> None:
    """Take from each of `others` (n, length), in place, its part along `unit`; `products` is room to work in."""
    products = products[: len(others)]
    along = _sums(np.multiply(others, unit, out=products)).copy()
    np.subtract(others, np.multiply(along, unit, out=products), out=others)


def _sums(products: np.ndarray) -> np.ndarray:
    """Return the sums (n, 1) of the rows of (n, length), which it overwrites: the last half is added to the first, as
    long as there are two numbers; of an odd number the one in the middle waits."""
    width = products.shape[1]
    while width > 1:
        half = width // 2
        np.add(products[:, :half], products[:, width - half : width], out=products[:, :half])
        width -= half
    return products[:, :1]
