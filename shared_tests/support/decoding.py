"""What tests and the benchmark of drafts share: a tokenizer of numbers, and drafters that know the text."""

import numpy as np

from core import rng
from core.decoding.drafters import Nothing
from core.decoding.generate import Text


class Numbers:
    """A tokenizer whose texts are token numbers."""

    bos = 1

    def encode(self, text: str) -> np.ndarray:
        return np.array(text.split(), np.int64)

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{i} " for i in ids if i != self.bos)


class Oracle(Nothing):
    """Drafts what a finished text has, each token wrong with probability `wrong`, and useless ones behind its end."""

    def __init__(self, text: Text, vocab: int, wrong: float, seed: int = 0) -> None:
        self._right = [*text.ids[text.begin :], Numbers.bos]  # a text that ended early ends with the next document
        self._begin, self._vocab, self._wrong, self._seed = text.begin, vocab, wrong, seed

    def draft(self, ids, count: int) -> list[int]:
        place = len(ids) - self._begin
        right = (self._right[place:] + [0] * count)[:count]
        draws = (rng.uniform(self._seed, f"oracle/{place}", count) + 1) / 2
        return [(token + (draw < self._wrong)) % self._vocab for token, draw in zip(right, draws.tolist(), strict=True)]
