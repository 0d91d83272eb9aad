"""A data set in memory and an engine whose every number is known."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from core import rng
from core.data.tokenizer import ByteTable, token_bytes

BOS, UNKNOWN, VOCAB = 1, 3, 50


class FakeSplit:
    """A stream in memory."""

    name = "fake/val"

    def __init__(
        self, tokens: np.ndarray, document_bytes: np.ndarray | None, unknown_tokens: int | None, tokenizer: Any
    ) -> None:
        self.tokens, self.tokenizer = tokens.astype(np.int32), tokenizer
        self.document_starts = np.flatnonzero(tokens == BOS).astype(np.int64)
        self.document_bytes = document_bytes
        self.unknown_tokens = unknown_tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def verify(self) -> None:
        """Do nothing: no checksum is known."""

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= len(self.tokens)
        return self.tokens[start:stop].copy()

    def costs(self, start: int, stop: int) -> np.ndarray:
        assert 1 <= start <= stop <= len(self.tokens)
        return token_bytes(self.tokenizer.table, self.tokens[start - 1 : stop - 1], self.tokens[start:stop])


def make_dataset(
    lengths: list[int], *, byte_pieces: bool = True, raw: bool = True, unknown: int | None = 0, seed: int = 0
) -> Any:
    """Documents of `lengths` tokens with BOS, over ids 4 .. 49: 4 .. 19 cost 1 byte, others 2 and maybe a space."""
    parts = [np.append(BOS, rng.integers16(seed, f"doc/{i}", n - 1) % (VOCAB - 4) + 4) for i, n in enumerate(lengths)]
    ids = np.arange(VOCAB)
    boundary = ids < 4
    table = ByteTable(np.where(boundary, 0, np.where(ids < 20, 1, 2)).astype(np.int32), ids >= 35, boundary)
    fault = None if byte_pieces else "no byte pieces"
    tokenizer = SimpleNamespace(table=table, table_fault=fault, bos=BOS, unknown=UNKNOWN, vocab=VOCAB)
    document_bytes = np.array([3 * n + 1 for n in lengths], np.int64) if raw else None
    split = FakeSplit(np.concatenate(parts), document_bytes, unknown, tokenizer)
    return SimpleNamespace(name="fake", tokenizer=tokenizer, val=split)


class BigramEngine:
    """nll depends on (previous token, target) alone, so every cut of the stream costs the same."""

    def nll(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return 0.5 + (tokens * 31 + targets * 7) % 101 / 50
