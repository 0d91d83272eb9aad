"""What tokenizers of both kinds have in common: the bytes of tokens, and how a tokenizer is refused."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class TokenizerError(ValueError):
    """The tokenizer cannot be used or trained: the message says why."""


class ByteTable(NamedTuple):
    """What a token costs in bytes, by id."""

    base: np.ndarray  # (V,) int32: bytes of the piece without its leading space
    leading: np.ndarray  # (V,) bool: the piece starts with a space, which costs one byte unless it follows a boundary
    boundary: np.ndarray  # (V,) bool: control, unknown and unused pieces
    markers: tuple[int, ...] = ()
    """Ids of the case markers, the escape last, where the text is transformed: they cost nothing, escaped 3 bytes."""


def checked_ids(ids: Iterable[int] | np.ndarray, vocab: int) -> np.ndarray:
    """Return token ids as (count,) int64; ValueError for one that no piece has."""
    plain = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64).ravel()
    outside = plain[(plain < 0) | (plain >= vocab)]
    if outside.size:
        raise ValueError(f"token id {outside[0]}: expected from 0 to {vocab - 1}")
    return plain
