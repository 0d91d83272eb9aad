"""What the coder codes of a tensor: whole numbers from 0 up in the order of the codes, and 16 bits of every scale."""

import itertools

import numpy as np

from core.export.coder import CodecError
from core.model.storage import LARGEST, RATIOS, Kind, Storage, by_ratios

OCTAVE = np.array([0, *itertools.accumulate(RATIOS[1][:-1])]) >> 13
"""The ten digits behind the leading one of the scales of an octave, on the grid of ratios."""


def top_of(cls: Kind) -> int:
    """Return the largest symbol of a class."""
    return 255 if cls == "fp8" else 2 * LARGEST[cls]


def symbols_of(cls: Kind, codes: np.ndarray) -> np.ndarray:
    """Return (rows, columns) uint8 symbols of codes."""
    if cls != "fp8":
        return np.ascontiguousarray(codes + np.int8(LARGEST[cls])).view(np.uint8)
    sizes = np.searchsorted(E4M3, np.abs(codes)).astype(np.uint8)
    if not np.array_equal(E4M3[sizes], np.abs(codes)):
        raise CodecError("fp8", "has a code that is not an e4m3 value")
    return np.where(np.signbit(codes), 127 - sizes, 128 + sizes).astype(np.uint8)


def codes_of(name: str, cls: Kind, symbols: np.ndarray) -> np.ndarray:
    """Return what symbols stand for, in their memory where it fits."""
    if cls != "fp8":
        symbols -= np.uint8(LARGEST[cls])  # in place: a large tensor takes its memory once
        return symbols.view(np.int8)
    if symbols.min() == 0 or symbols.max() == 255:
        raise CodecError(name, "has a code that is no number")
    return np.concatenate([-E4M3[::-1], E4M3])[symbols - 1]


def halves_of(scales: np.ndarray, storage: Storage) -> np.ndarray:
    """Return the numbers of 16 bits that are coded of scales: their bits, or their places on the grid of ratios."""
    bits = np.ascontiguousarray(scales).view(np.uint16)
    return (bits >> 10 << 5) + OCTAVE.searchsorted(bits & 1023).astype(np.uint16) if by_ratios(storage) else bits


def scales_of_halves(halves: np.ndarray, storage: Storage) -> np.ndarray:
    """Return the float16 scales that such numbers stand for."""
    if by_ratios(storage):
        halves = np.minimum((halves.astype(np.int64) >> 5 << 10) + OCTAVE[halves & 31], 0x7C00).astype(np.uint16)
    return halves.view(np.float16)


def _e4m3_sizes() -> np.ndarray:
    """Return the float32 values of the 127 e4m3 bytes from 0 up that are numbers: 4 bits of exponent, 3 of mantissa."""
    code = np.arange(127)
    exponent, mantissa = code >> 3, code & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0)).astype(np.float32)


E4M3 = _e4m3_sizes()
