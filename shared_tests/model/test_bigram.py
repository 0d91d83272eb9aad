"""Hashed bigrams: the hash xor on all pairs, both hashes in the model, counts, and what is refused. Budget: 5 s."""

from typing import Any

import numpy as np
import pytest

from core import rng
from core.config import ConfigError, RunConfig
from core.model.ngrams import MOST_ID, XOR_MULTIPLIERS
from core.model.params import count, start_values
from shared_tests.support.harness import BACKENDS, batches, call, engine, module, reader
from shared_tests.support.one_layer import ONE_LAYER, check_reading_back, run_of

SOME: dict[str, Any] = {"bigram.buckets": 53, "bigram.dim": 6}
HASHES: dict[str, dict[str, Any]] = {
    "multiply": SOME,
    "xor": SOME | {"bigram.hash": "xor"},
    "scaled": SOME | {"bigram.scale": 0.05},
    "packed": SOME | {"bigram.hash": "xor", "bigram.scale": 0.05, "documents": "packed"},
}
WRAPS = 59_139
"""The first id whose multiple by 36,313 is no 32-bit integer with a sign."""


def of(changes: dict[str, Any]) -> RunConfig:
    """Return a run of the tiny model with other settings."""
    return run_of(ONE_LAYER | changes)


@pytest.fixture(scope="module")
def pairs() -> np.ndarray:
    """All pairs of 300 ids (90,000, 2), older first, with those where 32 bits end."""
    edges = [0, 1, WRAPS - 1, WRAPS, MOST_ID - 1, MOST_ID]
    ids = np.array([*edges, *rng.integers16(0, "pairs", 300 - len(edges)).tolist()], np.int32)
    return np.stack(np.meshgrid(ids, ids), -1).reshape(-1, 2)


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("buckets", [2, 2048, 3072, 65_521])
def test_all_pairs_read_the_rows_of_unbounded_integers(buckets: int, backend: str, pairs: np.ndarray) -> None:
    exact = [(36_313 * newer ^ 27_191 * older) % (buckets - 1) for older, newer in pairs.tolist()]
    (rows,) = call(backend, module(backend, "ops").xor_buckets, (pairs, np.zeros_like(pairs), buckets), "float32")
    assert rows.dtype == np.int32 and rows.shape == (90_000, 1, 1) and rows[:, 0, 0].tolist() == exact
    (rows,) = call(backend, module(backend, "ops").xor_buckets, (pairs, np.arange(2) + 0 * pairs, buckets), "float32")
    assert (rows == buckets - 1).all(), "the last row where the pair is in two documents"


def test_32_bits_with_a_sign_would_wrap_and_without_do_not(pairs: np.ndarray) -> None:
    newer, older = XOR_MULTIPLIERS
    assert newer * MOST_ID < 2**32 and newer * (WRAPS - 1) < 2**31 <= newer * WRAPS
    with np.errstate(over="ignore"):
        wrapped = (np.int32(newer) * pairs[:, 1] ^ np.int32(older) * pairs[:, 0]) % np.int32(3071)
    exact = (newer * pairs[:, 1].astype(np.int64) ^ older * pairs[:, 0].astype(np.int64)) % 3071
    small = (pairs < WRAPS).all(-1)
    assert (wrapped == exact)[small].all() and (wrapped != exact)[~small].mean() > 0.5


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", HASHES)
def test_a_hash_equals_the_oracle_keeps_documents_apart_and_decodes(name: str, backend: str) -> None:
    check_reading_back(ONE_LAYER | HASHES[name], "bigram", backend)


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_row_is_that_of_first_tokens(backend: str) -> None:
    """It learns where a document begins, and no pair reads it; the factor has a gradient as soon as P has moved."""
    config = of(HASHES["xor"] | {"bigram.scale": 0.05})
    batch = batches(config, 1)[0]
    _, gradients = reader(backend, config, 5.0, dtype="float64").gradients(batch)
    assert np.abs(gradients["bigram.table"][-1]).min() > 0 and np.abs(gradients["bigram.scale"]).min() > 0
    _, gradients = engine(backend, config, dtype="float64").gradients(batch)
    assert np.abs(gradients["bigram.value.weight"]).max() > 0, "the projection learns first"


def test_counts_and_starts() -> None:
    bare = count(of({}).model)
    added = {name: count(of(changes).model) - bare for name, changes in HASHES.items()}
    plain = 53 * 6 + 16 * 6
    assert added == {"multiply": plain, "xor": plain, "scaled": plain + 1, "packed": plain + 1}
    start = start_values(of(HASHES["scaled"]).model, 1)
    assert start["bigram.scale"].tolist() == [np.float32(0.05)] and not start["bigram.value.weight"].any()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"bigram.hash": "xor"}, "hash=xor: there is no table; set model.bigram.buckets, too"),
        ({"bigram.scale": 0.05}, "scale=0.05: there is no table; set model.bigram.buckets, too"),
        (SOME | {"bigram.scale": 0.0}, "scale=0.0: expected a number above 0"),
        (SOME | {"bigram.scale": float("nan")}, "scale=nan: expected a finite number"),
        (SOME | {"bigram.hash": "xor", "bigram.buckets": 1}, "buckets=1: expected from 2 to 65521"),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.bigram.{words}"):
        of(changes)


def test_a_vocabulary_that_the_hash_would_wrap_is_refused() -> None:
    with pytest.raises(ConfigError, match="^model.vocab=65537: n-gram memories hash token ids below 65536"):
        of(HASHES["xor"] | {"vocab": 65_537})
