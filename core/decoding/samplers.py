"""Which token follows: numpy on the host, the same on every backend, by draws that belong to a place of a text.

A draft is kept where the model says the very token that was drafted. `coupled` and `gumbel` draw without looking at the
draft, by noise that follows from the seed, the text's number and the place alone: a drafted text is the undrafted one,
token by token. A drafter without a model proposes one token for sure, so that they keep a draft d with probability
p(d), as often as any lossless rule can, and what they say in its place has p without d: they are speculative sampling
(Leviathan et al. 2023) with the draw of its residual coupled to that of its acceptance. `speculative` draws the two
apart: texts have the same distribution, but are others than the undrafted ones.
"""

import numpy as np

from core import rng
from core.decoding.settings import Decoding


def say(logits: np.ndarray, draft: int | None, place: int, number: int, how: Decoding) -> int:
    """Return the token at `place` of text `number`, by (V,) logits; None: nothing was drafted there."""
    if how.temperature == 0:
        return int(np.argmax(logits))
    ids, weights = candidates(logits, how.temperature, how.top_k, how.top_p)
    if how.sampler == "gumbel":
        return int(ids[np.argmax(np.log(weights) + gumbel(len(logits), place, number, how)[ids])])
    if how.sampler == "speculative" and draft is not None:
        drafted = ids == draft
        if (_draw(how.seed, "accept", place, number) + 1) / 2 * weights.sum() < weights[drafted].sum():
            return draft
        weights = np.where(drafted, 0.0, weights)
    return drawn(ids, weights, _draw(how.seed, "sample", place, number))


def guess(logits: np.ndarray, place: int, number: int, how: Decoding) -> int:
    """Return the token that a drafter with these (V,) logits proposes: what it would say by the text's own noise.

    That is the model's token as often as the two distributions allow. `speculative` draws acceptance and rest apart,
    and a proposal by either noise would bend its law: there it is the likeliest token.
    """
    return int(np.argmax(logits)) if how.sampler == "speculative" else say(logits, None, place, number, how)


def gumbel(vocab: int, place: int, number: int, how: Decoding) -> np.ndarray:
    """Return the Gumbel noise of every token, (vocab,), at `place` of text `number`."""
    return -np.log(-np.log((rng.uniform(how.seed, f"gumbel/{number}/{place}", vocab) + 1) / 2))


def candidates(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens that may follow, likeliest first (of equals the lower one), and their weights."""
    values = np.asarray(logits, np.float64)
    ids = np.arange(len(values))
    if top_k is not None and top_k < len(values):  # sorting all of a large vocabulary would take longer than the model
        ids = np.flatnonzero(values >= np.partition(values, -top_k)[-top_k])
    ids = ids[np.argsort(-values[ids], kind="stable")][:top_k]
    gaps = np.maximum(values[ids] - values[ids[0]], -700 * temperature)  # a weight of 1e-304, not of 0, has a logarithm
    weights = np.exp(gaps / temperature)
    if top_p < 1:
        ends = np.cumsum(weights)
        count = np.searchsorted(ends, top_p * ends[-1]) + 1
        ids, weights = ids[:count], weights[:count]
    return ids, weights


def drawn(ids: np.ndarray, weights: np.ndarray, draw: float) -> int:
    """Return the token that a uniform `draw` in (-1, 1) falls on."""
    ends = np.cumsum(weights)
    place = np.searchsorted(ends, (draw + 1) / 2 * ends[-1], "right")
    return int(ids[min(place, np.flatnonzero(weights)[-1])])


def choose(logits: np.ndarray, temperature: float, top_k: int | None, draw: float) -> int:
    """Return the token that a uniform `draw` in (-1, 1) falls on, among (V,) logits."""
    if temperature == 0:
        return int(np.argmax(logits))
    return drawn(*candidates(logits, temperature, top_k), draw)


def _draw(seed: int, kind: str, place: int, number: int) -> float:
    """Return the uniform in (-1, 1) that belongs to a place of a text."""
    return rng.uniform(seed, f"{kind}/{place}", number + 1)[-1]
