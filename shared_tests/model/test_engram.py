"""P0 of hashed n-grams: hashes, what they reach, documents and edges, pruning; and the oracle's memories by hand.

Budget: 20 s.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from core import rng
from core.config import ModelConfig
from core.model.ngrams import BIGRAM_MULTIPLIER, MOST_BUCKETS, MOST_HASHES, MOST_ID, MULTIPLIERS, ngram_buckets
from core.training import pruning
from core.training.pruning import keep_rows, prune
from shared_tests.oracle import Text
from shared_tests.oracle.engram import ngrams
from shared_tests.support.engram_examples import config, weights
from shared_tests.support.harness import tokens

VOCABS = (1024, 2048, 4096, 8192)
SIZES = (1021, 2048, 3067, 3072, 4093, 4096, 8191, 8192, 16381, 16384, 20_000, 32_749, 32_768, MOST_BUCKETS)
"""Numbers of buckets that a user may choose, prime and not."""
GOLDEN_ROWS = [
    [-1] * 12,
    [498, 5961, 7383, 9588, *[-1] * 8],
    [83, 5891, 6655, 9742, 14056, 16068, 21042, 22642, *[-1] * 4],
    [2735, 5821, 8994, 9896, 12751, 16336, 18678, 23105, 27381, 29935, 31897, 34039],
]
"""What the tokens 5, 7, 9, 11 read from tables of 3,067 buckets (made by the oracle's `ngrams`)."""
GOLDEN_BIGRAM = [-1, 2073, 2288, 2503]
HASHES = [(order, p) for order, heads in enumerate(MULTIPLIERS, 1) for p in heads] + [(1, BIGRAM_MULTIPLIER)]


def hashes(grams: np.ndarray, multipliers: Sequence[int], buckets: int) -> np.ndarray:
    """Return the hashes (N, heads) of n-grams (N, n), which stand oldest id first."""
    order = grams.shape[1] - 1
    unused: list[Sequence[int]] = [()] * (order - 1)
    rows = ngram_buckets(grams, np.zeros_like(grams), [*unused, multipliers], buckets)
    return rows[:, -1] - np.arange(len(multipliers)) * buckets


def distinct(vocab: int, order: int, count: int, zipf: bool) -> np.ndarray:
    """Return `count` different n-grams (count, order + 1) of random ids: uniform, or with the shares of words."""
    drawn = rng.uniform(0, f"{vocab}/{order}/{zipf}", 6 * count * (order + 1)) / 2 + 0.5
    ids = (vocab + 1) ** drawn - 1 if zipf else vocab * drawn
    grams = np.minimum(ids.astype(np.int64), vocab - 1).reshape(-1, order + 1)
    first = np.unique(grams @ vocab ** np.arange(order + 1), return_index=True)[1]
    assert len(first) >= count
    return grams[np.sort(first)[:count]]


def reached_by_pairs(multiplier: int, vocab: int, buckets: int) -> int:
    """Return how many buckets the pairs of a vocabulary reach: every older id starts an arc of `vocab` buckets."""
    starts = np.unique(np.arange(vocab) * (multiplier % buckets) % buckets)
    return int(np.minimum(np.diff(starts, append=starts[0] + buckets), vocab).sum())


# Hashes


@pytest.mark.parametrize(
    "ids, multiplier, buckets, expected",
    [
        ((5, 7), 92821, 3072, 240),
        ((1000, 3), 131071, 4096, 3099),
        ((5, 7, 9), 216091, 3072, 771),
        ((8000, 777, 12), 524287, 3072, 1091),
        ((1, 2, 3, 4), 700001, 32768, 970),
        ((8191, 8190, 8189, 8188), 1153381, 32768, 9342),
    ],
)
def test_hashes_are_those_of_the_spec(ids: tuple[int, ...], multiplier: int, buckets: int, expected: int) -> None:
    assert hashes(np.array([ids]), [multiplier], buckets).tolist() == [[expected]]


def test_rows_of_all_tables_are_golden() -> None:
    """A trained table means nothing under other multipliers."""
    ids = np.array([[-1, -1, -1, 5, 7, 9, 11]])
    rows = ngram_buckets(ids, np.zeros_like(ids), MULTIPLIERS, 3067)
    assert rows.dtype == np.int32 and rows.shape == (1, 4, 12)
    assert rows[0].tolist() == GOLDEN_ROWS
    assert ngram_buckets(ids[:, 2:], np.zeros((1, 5)), [[BIGRAM_MULTIPLIER]], 3067)[0, :, 0].tolist() == GOLDEN_BIGRAM


def test_the_largest_hash_does_not_wrap() -> None:
    assert (MOST_BUCKETS - 1) ** 2 + MOST_ID < 2**32
    top = np.array([[MOST_ID] * 4, [MOST_ID, 0, MOST_ID, 0], [MOST_BUCKETS - 1] * 4, [0, 0, 0, MOST_ID]])
    many = np.concatenate([top, rng.integers16(0, "ids", 4000).reshape(-1, 4).astype(np.int64)])
    multipliers = (*MULTIPLIERS[2], MOST_BUCKETS - 1)  # the last is the largest remainder
    for buckets in (2, 3, 3067, 3072, MOST_BUCKETS - 1, MOST_BUCKETS):
        exact = [[polynomial(gram, p) % buckets for p in multipliers] for gram in many.tolist()]
        assert hashes(many, multipliers, buckets).tolist() == exact


def test_powers_that_wrap_are_other_hashes() -> None:
    """The original's int32 powers, and Horner's rule in uint32 without the remainders in between: only buckets that
    divide 2^32 hide them. The spec's own trigram vectors do not see either."""
    p, grams = MULTIPLIERS[1][0], rng.integers16(0, "ids", 3000).reshape(-1, 3) % 1024
    with np.errstate(over="ignore"):
        small = grams.astype(np.int32)
        powers = np.array([p * p, p, 1]).astype(np.int32)
        narrow = (small * powers).sum(1, dtype=np.int32)
        wide = grams.astype(np.uint32)
        unreduced = (wide[:, 0] * np.uint32(p) + wide[:, 1]) * np.uint32(p) + wide[:, 2]
    for buckets, hidden in ((3067, False), (3072, False), (4096, True)):
        ours = hashes(grams, [p], buckets)[:, 0]
        assert ours.tolist() == [polynomial(gram, p) % buckets for gram in grams.tolist()]
        for wrapped in (narrow, unreduced):
            assert ((wrapped % buckets == ours).mean() == 1) == hidden


def polynomial(gram: list[int], p: int) -> int:
    """Return the hash before it is reduced, in Python's unbounded integers."""
    return sum(token * p**j for j, token in enumerate(reversed(gram)))


@pytest.mark.parametrize(
    "ids, documents, buckets, message",
    [
        (np.zeros((1, 5), int), np.zeros((1, 4), int), 7, "expected both"),
        (np.zeros((1, 1), int), np.zeros((1, 1), int), 7, "expected both"),
        (np.zeros(5, int), np.zeros(5, int), 7, "expected both"),
        (np.full((1, 5), MOST_ID + 1), np.zeros((1, 5), int), 7, "token id 65536"),
        (np.zeros((1, 5), int), np.zeros((1, 5), int), 1, "buckets=1"),
        (np.zeros((1, 5), int), np.zeros((1, 5), int), MOST_BUCKETS + 1, "buckets=65522"),
    ],
)
def test_what_could_wrap_or_does_not_fit_is_refused(
    ids: np.ndarray, documents: np.ndarray, buckets: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ngram_buckets(ids, documents, [[3], [5]], buckets)


# Multipliers


def test_multipliers_are_units_and_differ_at_every_number_of_buckets() -> None:
    """Primes over MOST_BUCKETS have inverses: no id is lost. Heads of an order agree modulo small numbers only."""
    flat = [p for _, p in HASHES]
    assert len(set(flat)) == 13 and [len(heads) for heads in MULTIPLIERS] == [MOST_HASHES] * 3
    for p in flat:
        assert p > MOST_BUCKETS and all(p % d for d in range(2, math.isqrt(p) + 1))
        assert not {p % buckets for buckets in SIZES} & {0, 1, 2, 3}
        assert not {buckets - p % buckets for buckets in SIZES} & {1, 2, 3}
    for heads in MULTIPLIERS:
        assert sorted(p % 8 for p in heads) == [1, 3, 5, 7]
        for a, b in itertools.combinations(heads, 2):
            shared = np.gcd(abs(a - b), np.arange(2, MOST_BUCKETS + 1))
            assert shared.max() <= 24


@pytest.mark.parametrize("vocab", VOCABS)
def test_all_pairs_reach_every_bucket(vocab: int) -> None:
    for (_, p), buckets in itertools.product(HASHES, SIZES):
        assert reached_by_pairs(p, vocab, buckets) >= 0.9 * min(buckets, vocab**2), (p, buckets)


def test_the_measure_of_pairs_is_the_count_of_pairs() -> None:
    pairs = np.stack(np.meshgrid(np.arange(300), np.arange(300)), -1).reshape(-1, 2)
    for p, buckets in itertools.product((MULTIPLIERS[0][0], 131071, 174763), (3067, 4096, 8192, 32_749)):
        assert reached_by_pairs(p, 300, buckets) == len(np.unique(hashes(pairs, [p], buckets)))


@pytest.mark.parametrize(
    "multiplier, buckets, share",
    [(131071, 4096, 0.5), (131071, 8192, 0.25), (174763, 8192, 0.5), (524287, 8192, 0.25), (1048573, 8192, 0.5)],
)
def test_the_specs_degenerate_multipliers_are_seen(multiplier: int, buckets: int, share: float) -> None:
    assert reached_by_pairs(multiplier, 1024, buckets) / buckets == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("zipf", [False, True], ids=["uniform", "zipf"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_samples_reach_what_chance_would(order: int, zipf: bool) -> None:
    """Few inputs for the buckets: a hash that puts neighbours together is seen long before buckets stay empty."""
    multipliers = MULTIPLIERS[order - 1] + (BIGRAM_MULTIPLIER,) * (order == 1)
    for vocab, buckets in itertools.product((1024, 8192), (1021, 3067, 4096, 8191, 8192, 16_381, 20_000)):
        grams = distinct(vocab, order, 2 * buckets, zipf)
        expected = buckets * (1 - math.exp(-2))
        for p, own in zip(multipliers, hashes(grams, multipliers, buckets).T, strict=True):
            assert len(np.unique(own)) >= 0.9 * expected, (p, vocab, buckets)


def collisions(keys: np.ndarray) -> int:
    """Return how many pairs of keys are equal."""
    counts = np.unique(keys, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


@pytest.mark.parametrize("order", [1, 2, 3])
def test_heads_collide_on_other_inputs(order: int) -> None:
    """As rarely as chance, but for what the difference of two multipliers shares with the buckets: 2 or 4 of a
    power of two, since odd numbers differ by even ones."""
    heads, grams = MULTIPLIERS[order - 1], distinct(1024, order, 1 << 15, False)
    for buckets in (1021, 2048, 3067, 4096):
        own = hashes(grams, heads, buckets).astype(np.int64)
        chance = len(grams) ** 2 / 2 / buckets**2
        for a, b in itertools.combinations(range(4), 2):
            shared = math.gcd(heads[a] - heads[b], buckets)
            assert shared in (1, 2, 4)
            assert collisions(own[:, a] * buckets + own[:, b]) <= (1.5 * chance + 20) * shared, (heads[a], heads[b])
        assert collisions(own[:, 0] * buckets + own[:, 0]) > 100 * chance  # a head that is there twice


# Documents and edges


@pytest.mark.parametrize("documents", ["isolated", "packed"])
def test_rows_equal_the_oracle_token_by_token(documents: str) -> None:
    for orders, seq in itertools.product((1, 2, 3), (1, 2, 3, 4, 40)):
        ids = tokens(f"rows/{seq}", 3, seq, 50, 1)
        starts = (ids == 1) & (documents == "isolated")
        multipliers = MULTIPLIERS[:orders]
        padded = np.pad(ids, ((0, 0), (orders, 0)), constant_values=-1)
        within = np.cumsum(np.pad(starts, ((0, 0), (orders, 0))), 1)
        got = ngram_buckets(padded, within, multipliers, 97)
        assert np.array_equal(got, ngrams(Text(ids, starts), multipliers, 97))
        live = got[got >= 0]
        assert ((live >= 0) & (live < orders * 4 * 97)).all()


def test_every_split_with_its_history_equals_the_whole() -> None:
    ids = np.pad(tokens("split", 2, 30, 50, 1), ((0, 0), (3, 0)), constant_values=-1)
    within = np.cumsum(ids == 1, 1)
    whole = ngram_buckets(ids, within, MULTIPLIERS, 97)
    for cut in range(31):
        parts = [(ids[:, : cut + 3], within[:, : cut + 3]), (ids[:, cut:], within[:, cut:])]
        assert np.array_equal(whole, np.concatenate([ngram_buckets(*part, MULTIPLIERS, 97) for part in parts], 1))
    forgot = ngram_buckets(np.where(np.arange(33) < 13, -1, ids), within, MULTIPLIERS, 97)[:, 10:]
    assert not np.array_equal(forgot, whole[:, 10:]) and np.array_equal(forgot[:, 3:], whole[:, 13:])


def test_a_gap_anywhere_in_an_ngram_silences_it() -> None:
    ids = np.array([[4, 5, -1, 7, 8, 9, 10]])
    rows = ngram_buckets(ids, np.zeros_like(ids), [[3], [5], [7]], 97)[0]
    assert (rows >= 0).tolist() == [[False] * 3, [True, False, False], [True, True, False], [True] * 3]
    none = ngram_buckets(np.array([[4, -1, 6]]), np.zeros((1, 3), int), [[3]], 97)[0]
    assert none.tolist() == [[-1], [-1]]  # the newest, the oldest
    there_and_back = ngram_buckets(np.arange(7)[None], np.array([[0, 0, 0, 1, 0, 0, 0]]), [[3], [5]], 97)[0]
    assert (there_and_back >= 0).tolist() == [[True, True], [False, False], [False, False], [True, False], [True, True]]


# Pruning


def counted(model: ModelConfig, text: np.ndarray) -> np.ndarray:
    """Return the hits of every row, one token after the other."""
    starts = (text == model.bos) & (model.documents == "isolated")
    hits = np.zeros(model.engram.orders * model.engram.heads * model.engram.buckets, int)
    for row in ngrams(Text(text[None], starts[None]), model.engram.multipliers, model.engram.buckets).ravel():
        hits[row] += row >= 0
    return hits


@pytest.mark.parametrize("documents", ["isolated", "packed"])
def test_the_most_used_rows_of_every_table_are_kept(documents: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = (0.5, 0.2, 1.0)
    model = config({"engram.keep": shares, "documents": documents})
    text = tokens("text", 1, 300, 24, 1)[0].astype(np.uint16)
    hits, kept = counted(model, text).reshape(6, 31), keep_rows(model, text).reshape(6, 31)
    for table, (own, mask) in enumerate(zip(hits, kept, strict=True)):
        order = sorted(range(31), key=lambda row: (-own[row], row))
        assert np.flatnonzero(mask).tolist() == sorted(order[: math.ceil(shares[table // 2] * 31)])
    for piece in (1, 2, 7, 299, 300):
        monkeypatch.setattr(pruning, "PIECE", piece)
        assert np.array_equal(pruning._hits(model, text), hits.ravel())


def test_documents_change_what_is_kept() -> None:
    text = tokens("text", 1, 300, 24, 1)[0]
    isolated, packed = (counted(config({"documents": rule}), text) for rule in ("isolated", "packed"))
    assert isolated.sum() < packed.sum() == 6 * 300 - 2 * (1 + 2 + 3)


def test_of_equals_the_first_rows_stay_and_shares_are_decimal() -> None:
    model = config({"engram.orders": 1, "engram.buckets": 100, "engram.keep": (0.07,)})
    for text in (np.empty(0, np.int64), np.array([5])):  # nothing is hit
        assert np.flatnonzero(keep_rows(model, text)).tolist() == [*range(7), *range(100, 107)]
    assert 0.07 * 100 > 7 and keep_rows(config({"engram.keep": (1e-9,) * 3}), np.array([5, 6])).sum() == 6


def test_pruning_zeroes_a_copy_of_the_other_rows() -> None:
    model = config({"engram.keep": (0.5, 0.2, 1.0)})
    full = {name: value.astype(np.float32) for name, value in weights(model).items()}
    text = tokens("text", 1, 300, 24, 1)[0]
    before = {name: value.copy() for name, value in full.items()}
    pruned, kept = prune(model, full, text), keep_rows(model, text)
    table = pruned["engram.table"]
    assert np.array_equal(table[kept], full["engram.table"][kept]) and not table[~kept].any() and not kept.all()
    assert table.dtype == np.float32 and list(pruned) == list(full)
    assert all(np.array_equal(full[name], value) for name, value in before.items())
    assert all(pruned[name] is full[name] for name in full if name != "engram.table")


def test_without_a_share_nothing_is_pruned() -> None:
    model = config()
    unread: Any = None
    full = weights(model)
    same = prune(model, full, unread)
    assert list(same) == list(full) and all(same[name] is full[name] for name in full)
    assert keep_rows(model, unread).all() and keep_rows(model, unread).shape == (6 * 31,)
    assert keep_rows(config({"engram.orders": 0}), unread).shape == (0,)
