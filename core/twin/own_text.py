"""Text that a frozen model writes for its twin to learn from: greedily, after some tokens of training text."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core import rng
from core.data.dataset import Split
from core.engine.protocol import Engine
from core.files import parse_json
from core.formats.tensors import read_tensors, write_tensors
from core.training.records import RunError, of_a_run

ROWS = 64
"""Texts that are written side by side."""
GRAM = 8
"""Length of the endings that are counted to see how much a text repeats itself."""
NAME = "own_text.safetensors"


def prompts(split: Split, bos: int, count: int, length: int, seed: int) -> np.ndarray:
    """Return `count` beginnings of texts, (count, length) int32: BOS, and tokens from places of `split` by the seed."""
    places = len(split) - length
    if places < 1:
        raise RunError(f"{split.name}: {len(split)} tokens, no more than a prompt of {length}: lower distill.prompt")
    order = [rng.choose(seed, f"prompts/{turn}", places, min(count, places)) for turn in range(-(-count // places))]
    starts = np.concatenate(order)[:count]
    body = split.gather(starts, length - 1) if length > 1 else np.empty((count, 0), np.int32)
    return np.concatenate([np.full((count, 1), bos, np.int32), body], axis=1)


def continued(engine: Engine, begun: np.ndarray, seq: int, report: Callable[[int, int], object]) -> np.ndarray:
    """Return rows of `seq` tokens, (rows, seq) int32: what `begun` has, and then always the model's likeliest token.

    A row goes on after the end of a document. `report` gets how many rows are done, and of how many.
    """
    length = begun.shape[1]
    rows = np.zeros((len(begun), seq), np.int32)
    rows[:, :length] = begun
    for begin in range(0, len(rows), ROWS):
        part = rows[begin : begin + ROWS]
        state = engine.start(len(part))
        for place in range(length, seq):
            unread = part[:, :length] if place == length else part[:, place - 1 : place]
            tape = engine.chunk(state, unread)
            part[:, place] = tape.best()[:, -1]
            state = engine.commit(tape, unread.shape[1])
        report(begin + len(part), len(rows))
    return rows


def distinct(texts: Sequence[Sequence[int]], gram: int = GRAM) -> float:
    """Return the share of all endings of `gram` tokens that no earlier one is like; 1 where there is none."""
    grams = [tuple(text[i : i + gram]) for text in texts for i in range(len(text) - gram + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def write_own(path: Path, rows: np.ndarray, made: dict[str, Any]) -> None:
    """Write own text in place of `path`; `made`: what decides it."""
    write_tensors(path, {"tokens": rows}, {"skc": json.dumps({**made, "sha256": _sha256(rows)}, sort_keys=True)})


def read_own(path: Path, count: int, seq: int, vocab: int, made: dict[str, Any]) -> np.ndarray | None:
    """Return the own text of a distillation, (count, seq) int32; None where there is none, or other settings made it.

    RunError for a damaged file.
    """
    if not path.exists():
        return None
    with of_a_run():
        metadata, arrays = read_tensors(path, (1 << 20) + 4 * count * seq)
        head = parse_json(f"{path}: skc", str(metadata.get("skc", "")))
    rows = arrays.get("tokens", np.zeros(0))
    if type(head) is not dict or {name: head.get(name) for name in made} != made:
        return None
    good = rows.shape == (count, seq) and rows.dtype == np.int32 and 0 <= rows.min() <= rows.max() < vocab
    if not good or head.get("sha256") != _sha256(rows):
        raise RunError(f"{path}: not the text that was written; delete it, and it is written again")
    return rows


def _sha256(rows: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest()
