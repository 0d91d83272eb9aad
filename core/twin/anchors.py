"""Where blocks of a text begin."""

import numpy as np

from core import rng


def anchor_places(tokens: np.ndarray, bos: int, block: int) -> np.ndarray:
    """Return which of (rows, seq) tokens a block can begin with, bool: each of its places has a token behind it, and no
    document begins within it.
    """
    rows, seq = tokens.shape
    starts = np.concatenate([tokens == bos, np.ones((rows, block), np.bool_)], axis=1)
    within = np.lib.stride_tricks.sliding_window_view(starts[:, 1:], block - 1, axis=1)[:, :seq].any(axis=-1)
    return ~within & (np.arange(seq) < seq - block)


def draw_anchors(tokens: np.ndarray, bos: int, block: int, count: int, seed: int, name: str) -> np.ndarray:
    """Return `count` places of each row that blocks begin at, (rows, count) int64, sorted; keyed by (seed, name).

    Without replacement as long as a row has so many places (anchor_places), else some twice; a row that has none takes
    any that tokens follow. ValueError where rows are shorter than a block.
    """
    rows, seq = tokens.shape
    if seq <= block:
        raise ValueError(f"rows of {seq} tokens: expected more than a block of {block}")
    drawn = np.empty((rows, count), np.int64)
    for row, places in enumerate(anchor_places(tokens, bos, block)):
        where = np.flatnonzero(places)
        where = where if len(where) else np.arange(seq - block)
        turns = -(-count // len(where))
        order = [rng.choose(seed, f"{name}/{row}/{turn}", len(where), min(count, len(where))) for turn in range(turns)]
        drawn[row] = np.sort(where[np.concatenate(order)[:count]])
    return drawn


def check_anchors(tokens: np.ndarray, anchors: np.ndarray, block: int) -> None:
    """Raise ValueError unless a block can begin at each of `anchors` (rows, count) of `tokens` (rows, seq)."""
    rows, seq = tokens.shape
    good = anchors.ndim == 2 and len(anchors) == rows and anchors.shape[1] > 0
    if not good or anchors.min() < 0 or anchors.max() >= seq - block:
        raise ValueError(
            f"anchors of shape {anchors.shape}, at most {anchors.max(initial=-1)}: expected some for each of {rows} "
            f"rows, below {seq} - {block}, so that a token follows every place of a block"
        )
