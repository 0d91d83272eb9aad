"""Counts of what followed every context in the text that is scored already, and three ways to predict from them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import numpy as np

from core.checks import LARGEST, in_words
from core.config import require
from core.engine.protocol import Arrays
from core.scoring.ledger import Scored
from core.scoring.predictions import LONGEST, Prediction, Predictor, ScoredReader, Tilt, View

MOST = 1 << 26
"""Pairs (context, follower) that a table holds, 12 bytes each; when it is full it goes on counting those it has."""
WIDEST = 1024
"""Candidates of a position at most."""
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Followers(NamedTuple):
    """What followed the contexts of one order, at the positions where that order's context was seen."""

    place: np.ndarray  # (n,) int64: index of the position
    token: np.ndarray  # (n,) int64: one of its followers
    count: np.ndarray  # (n,) float64: how often
    total: np.ndarray  # (positions,) float64: of all followers of a position's context; 0: not seen
    distinct: np.ndarray  # (positions,) float64: followers that are different


class CountTable:
    """How often each token followed each context of `orders` tokens, none of which reaches over a document's start.

    Contexts are told apart by hashes, of 64 bits less those of a token. Pairs lie in sorted runs; a run is merged with
    the one before once it is half as long, so that a pair is moved a logarithmic number of times.
    """

    def __init__(self, orders: Sequence[int], vocab: int, bos: int, most: int = MOST) -> None:
        self.orders, self._bos, self._most = tuple(orders), bos, most
        self._bits = np.uint64(max(1, (vocab - 1).bit_length()))
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []
        self.size = 0
        """Different pairs that it holds."""

    def contexts(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return hash and presence, (orders, rows, seq), of the contexts that end at each of (rows, seq) tokens.

        -1 is no token: contexts begin after it. BOS begins contexts too, and is in them.
        """
        rows, seq = tokens.shape
        ids = tokens.astype(np.int64)
        hashed, present = np.zeros((rows, seq), np.uint64), ids >= 0
        hashes, presence = [], []
        for lag in range(max(self.orders)):
            moved = np.full((rows, seq), -1, np.int64)
            moved[:, lag:] = ids[:, : max(seq - lag, 0)]
            present = present & (moved >= 0)
            hashed = (hashed + (moved + 1).astype(np.uint64)) * MULTIPLIER
            hashed ^= hashed >> np.uint64(29)
            if lag + 1 in self.orders:
                order = np.uint64(lag + 1)
                hashes.append((hashed + order) * MULTIPLIER)
                presence.append(present)
            present = present & (moved != self._bos)
        return np.stack(hashes), np.stack(presence)

    def count(self, pieces: Sequence[tuple[np.ndarray, int]]) -> None:
        """Count followers in pieces of the text: (tokens (n,), index of the first that counts as one, at least 1)."""
        pairs = [np.zeros(0, np.uint64)]
        for tokens, first in pieces:
            hashes, presence = (side[:, 0, first - 1 :] for side in self.contexts(tokens[None, :-1]))
            followers = np.broadcast_to(tokens[first:].astype(np.uint64), hashes.shape)
            pairs.append(((hashes >> self._bits << self._bits) | followers)[presence])
        keys, counts = np.unique(np.concatenate(pairs), return_counts=True)
        new = np.ones(len(keys), bool)
        for run, _ in self._runs:
            new &= run[np.minimum(np.searchsorted(run, keys), len(run) - 1)] != keys
        if self.size + int(new.sum()) > self._most:
            keys, counts, new = keys[~new], counts[~new], new[~new]
        self.size += int(new.sum())
        if len(keys):
            self._runs.append((keys, counts.astype(np.int32)))
        while len(self._runs) > 1 and 2 * len(self._runs[-1][0]) >= len(self._runs[-2][0]):
            self._runs.append(_merged([self._runs.pop(), self._runs.pop()]))

    def followers(self, tokens: np.ndarray, wanted: np.ndarray, most: int) -> list[Followers]:
        """Return, for each order, what followed the contexts at the positions of (rows, seq) tokens that are `wanted`.

        The `most` frequent followers of a context; of equals the lowest tokens.
        """
        hashes, presence = self.contexts(tokens)
        return [self._followers(h[wanted], p[wanted], most) for h, p in zip(hashes, presence, strict=True)]

    def state(self) -> Arrays:
        """Return all pairs in one run."""
        keys, counts = _merged(self._runs) if self._runs else (np.zeros(0, np.uint64), np.zeros(0, np.int32))
        return {"keys": keys.view(np.int64), "counts": counts}

    def load(self, state: Arrays) -> None:
        """Take back what `state` returned."""
        keys = state["keys"].view(np.uint64)
        self._runs, self.size = [(keys, state["counts"])] if len(keys) else [], len(keys)

    def _followers(self, hashes: np.ndarray, presence: np.ndarray, most: int) -> Followers:
        contexts, inverse = np.unique(hashes[presence] >> self._bits, return_inverse=True)
        lowest, low = contexts << self._bits, (np.uint64(1) << self._bits) - np.uint64(1)
        pairs, counts = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)]
        for keys, numbers in self._runs:
            index = _ranges(np.searchsorted(keys, lowest), np.searchsorted(keys, lowest | low, "right"))
            pairs.append(keys[index])
            counts.append(numbers[index])
        keys, where = np.unique(np.concatenate(pairs), return_inverse=True)
        number, token = np.bincount(where, np.concatenate(counts), len(keys)), (keys & low).astype(np.int64)
        context = np.searchsorted(contexts, keys >> self._bits)
        total, distinct = np.bincount(context, number, len(contexts)), np.bincount(context, minlength=len(contexts))
        ranked = np.lexsort((token, -number, context))
        ranked = ranked[np.arange(len(keys)) - (np.cumsum(distinct) - distinct)[context] < most]  # context is sorted
        ends = np.cumsum(np.minimum(distinct, most))
        begins = ends - np.minimum(distinct, most)
        index, places = ranked[_ranges(begins[inverse], ends[inverse])], np.flatnonzero(presence)
        of_all = np.zeros((2, len(presence)))
        of_all[:, places] = total[inverse], distinct[inverse]
        place = np.repeat(places, (ends - begins)[inverse])
        return Followers(place, token[index], number[index], *of_all)


def _ranges(begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the numbers of all ranges, one after the other."""
    lengths = ends - begins
    return np.arange(lengths.sum()) + np.repeat(begins - np.cumsum(lengths) + lengths, lengths)


def _merged(runs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return runs as one."""
    keys, where = np.unique(np.concatenate([keys for keys, _ in runs]), return_inverse=True)
    counts = np.bincount(where, np.concatenate([counts for _, counts in runs]), len(keys))
    return keys, counts.astype(np.int32)


class Candidates(NamedTuple):
    """Candidates of positions; a token may occur more than once at a position, and its weights add up."""

    place: np.ndarray  # (n,) int64: index of the position
    token: np.ndarray  # (n,) int64
    weight: np.ndarray  # (n,) float64


def joined(candidates: Sequence[Candidates]) -> Candidates:
    """Return lists of candidates as one."""
    return Candidates(*(np.concatenate(side) for side in zip(*candidates, strict=True)))


def backoff(found: Sequence[Followers], k: float) -> Candidates:
    """Return shares of the distribution p_o(v) = (c_o(v) + kappa_o p_(o-1)(v)) / (c_o + kappa_o), p_0 the network's.

    kappa_o = k times the different followers: a context that many things followed says little.
    """
    candidates, rest = [], np.ones(len(found[0].total))
    for one in reversed(found):  # from the longest context on: what it leaves is the next one's
        kappa = k * one.distinct
        whole = np.where(one.total > 0, one.total + kappa, 1.0)
        candidates.append(Candidates(one.place, one.token, one.count * (rest / whole)[one.place]))
        rest = rest * np.where(one.total > 0, kappa / whole, 1.0)
    return joined(candidates)


def sure_hint(found: Sequence[Followers], orders: Sequence[int], beta: float) -> Candidates:
    """Return the most frequent follower of the longest context that is sure of it, with beta times its share as weight.

    A context of up to 10 tokens is sure from 3 counts on and a share of 0.7, one of up to 13 from 2 and 0.6, a longer
    one from 2 and 0.5. `found`: one follower of each context.
    """
    candidates, silent = [], np.ones(len(found[0].total), bool)
    for order, one in zip(reversed(orders), reversed(found), strict=True):
        least, share = (3, 0.7) if order <= 10 else (2, 0.6) if order <= 13 else (2, 0.5)
        shares = one.count / one.total[one.place]
        sure = (one.count >= least) & (shares >= share) & silent[one.place]
        candidates.append(Candidates(one.place[sure], one.token[sure], beta * shares[sure]))
        silent[one.place[sure]] = False
    return joined(candidates)


def engram(found: Sequence[Followers], alpha: float, smooth: float) -> Candidates:
    """Return alpha log(1 + c_o(v) / smooth): the evidence of all contexts, added up.

    It is alpha log((c_o(v) + smooth) / (c_o + smooth V)) but for what all tokens share, which normalising takes away.
    """
    return joined([Candidates(one.place, one.token, alpha * np.log1p(one.count / smooth)) for one in found])


def strongest(candidates: Candidates, positions: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids int32 and weights, (positions, at most `most`), of the heaviest candidates; -1: none.

    Of equals the lowest token comes first.
    """
    sorted_ = np.lexsort((candidates.token, candidates.place))
    place, token = candidates.place[sorted_], candidates.token[sorted_]
    new = np.append(True, (np.diff(place) != 0) | (np.diff(token) != 0))[: len(place)]
    place, token, group = place[new], token[new], np.cumsum(new) - 1
    weight = np.bincount(group, candidates.weight[sorted_], len(place))
    ranked = np.lexsort((token, -weight, place))
    place, token, weight = place[ranked], token[ranked], weight[ranked]
    rank = np.arange(len(place)) - np.searchsorted(place, place)
    kept = rank < most
    width = int(rank[kept].max(initial=-1)) + 1
    ids, weights = np.full((positions, width), -1, np.int32), np.zeros((positions, width))
    ids[place[kept], rank[kept]], weights[place[kept], rank[kept]] = token[kept], weight[kept]
    return ids, weights


class Counts(Predictor):
    """Predicts what followed the same context in the text that is scored already."""

    @dataclass(frozen=True)
    class Settings:
        """What a run may choose."""

        orders: str = "2-4"
        """Lengths of contexts in tokens, SHORTEST-LONGEST, or SHORTEST-LONGEST/STEP."""
        rule: Literal["backoff", "tilt", "engram"] = "backoff"
        """backoff: from long contexts to shorter ones to the model; tilt: raise the token that the longest sure context
        names; engram: add up the evidence of all contexts."""
        candidates: int = 32
        """Tokens of a position at most (backoff, engram); the share of others goes back to the model."""
        k: float = 4.0
        """backoff: weight of what is shorter, in counts for each different follower."""
        beta: float = 2.0
        """tilt: weight at a share of 1, in nats."""
        alpha: float = 0.05
        """engram: weight of a context's log count."""
        smooth: float = 1.0
        """engram: counts that every token has to begin with."""
        above: float = 2.0
        """engram: entropy in nats above which predictions are changed."""

        def __post_init__(self) -> None:
            where = "eval.plugins.counts"
            rules = {"candidates": ("backoff", "engram"), "k": ("backoff",), "beta": ("tilt",)}
            rules |= dict.fromkeys(("alpha", "smooth", "above"), ("engram",))
            for field in (field for field in fields(self) if field.name in rules):
                value, of = getattr(self, field.name), rules[field.name]
                words = f"{where}.{field.name}={value} is of rule {' and '.join(of)}: leave it out with {self.rule}"
                require(value == field.default or self.rule in of, words)
                least = 0 if field.name == "above" else 1 if field.name == "candidates" else None
                good = 0 < value <= LARGEST if least is None else least <= value <= LARGEST
                words = "above 0" if least is None else f"from {least} up"
                require(good, f"{where}.{field.name}={value}: expected a number {words}, at most {LARGEST:g}")
            require(self.candidates <= WIDEST, f"{where}.candidates={self.candidates}: expected at most {WIDEST}")
            words = f"expected two numbers from 1 to {LONGEST}, as in 2-4, or with a step, as in 8-16/2"
            require(bool(self.lengths), f"{where}.orders={in_words(self.orders)}: {words}")

        @property
        def lengths(self) -> tuple[int, ...]:
            """The lengths of contexts, ascending; empty if `orders` names none."""
            shortest, _, rest = self.orders.partition("-")
            longest, _, step = rest.partition("/")
            parts = [shortest, longest, step or "1"]
            if not all(part.isascii() and part.isdecimal() and len(part) < 3 for part in parts):
                return ()
            first, last, by = map(int, parts)
            return tuple(range(first, last + 1, by)) if 1 <= first <= last <= LONGEST and by else ()

    kind = "cache"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or self.Settings()

    def start(self, text: ScoredReader) -> None:
        """Begin with an empty table."""
        self._text, self.table = text, CountTable(self.settings.lengths, text.vocab, text.bos)

    def prediction(self, view: View, prediction: Prediction) -> Prediction:
        """Return the prediction with the candidates that the table has for the contexts in the rows' own inputs."""
        (rows, seq), settings, longest = view.tokens.shape, self.settings, max(self.table.orders)
        before = np.full((rows, 0), -1, np.int32) if view.before is None else view.before[:, -longest:]
        wanted = np.concatenate([np.zeros(before.shape, bool), view.kept], axis=1)
        most = 1 if settings.rule == "tilt" else settings.candidates
        found = self.table.followers(np.concatenate([before, view.tokens], axis=1), wanted, most)
        if settings.rule == "backoff":
            candidates = backoff(found, settings.k)
        elif settings.rule == "tilt":
            candidates = sure_hint(found, self.table.orders, settings.beta)
        else:
            candidates = engram(found, settings.alpha, settings.smooth)
        if not len(candidates.place):
            return prediction
        kept_ids, kept_weights = strongest(candidates, int(view.kept.sum()), most)
        ids, weights = np.full((rows, seq, kept_ids.shape[1]), -1, np.int32), np.zeros((rows, seq, kept_ids.shape[1]))
        ids[view.kept], weights[view.kept] = kept_ids, kept_weights
        kind: Literal["mix", "boost"] = "mix" if settings.rule == "backoff" else "boost"
        return prediction._replace(tilt=Tilt(ids, weights, kind, settings.above if settings.rule == "engram" else None))

    def learn(self, ranges: Sequence[Scored], moments: np.ndarray | None) -> None:
        """Count what followed in the ranges; their contexts reach back into what was scored earlier."""
        texts = [self._text.read(one, max(self.table.orders)) for one in ranges]
        pieces = [(text, len(text) - (one.stop - one.start)) for text, one in zip(texts, ranges, strict=True)]
        self.table.count(pieces)

    def state(self) -> Arrays:
        """Return the table."""
        return self.table.state()

    def load(self, state: Arrays) -> None:
        """Take the table back."""
        self.table.load(state)
