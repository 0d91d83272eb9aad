"""Random numbers that are the same bits on every platform: Philox integers keyed by (seed, name), then only + and *."""

import hashlib

import numpy as np

UNIFORMS_PER_NORMAL = 12


def stream(seed: int, name: str) -> np.random.Philox:
    """Return a counter-based generator keyed by (seed, name): independent of order, backend and platform."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(digest, "<u8"))


def integers16(seed: int, name: str, count: int) -> np.ndarray:
    """Return `count` uniform integers from 0 to 65535 as uint16."""
    raw = np.asarray(stream(seed, name).random_raw(-(-count // 4)), "<u8")
    return raw.view("<u2")[:count]


def normal(seed: int, name: str, count: int) -> np.ndarray:
    """Return `count` standard normals (float64): centred sums of 12 uniforms of 16 bits, variance 1 - 2^-32."""
    sums = integers16(seed, name, count * UNIFORMS_PER_NORMAL).reshape(count, UNIFORMS_PER_NORMAL)
    total = sums.sum(axis=1, dtype=np.int64) * 2 - UNIFORMS_PER_NORMAL * 65535
    return total * 2.0**-17


def uniform(seed: int, name: str, count: int) -> np.ndarray:
    """Return `count` uniforms (float64) strictly inside (-1, 1), symmetric about 0."""
    raw = stream(seed, name).random_raw(count) >> np.uint64(32)
    return (raw.astype(np.int64) * 2 - (2**32 - 1)) * 2.0**-32


def below(seed: int, name: str, limit: int) -> int:
    """Return one integer in [0, limit), limit <= 2^31; the bias of the 64-bit remainder is below 2^-33."""
    return int(stream(seed, name).random_raw(1)[0] % np.uint64(limit))


def choose(seed: int, name: str, total: int, count: int) -> np.ndarray:
    """Return `count` distinct integers in [0, total), drawn uniformly and sorted."""
    order = np.argsort(stream(seed, name).random_raw(total), kind="stable")
    return np.sort(order[:count])


def hash32(key: int, index: np.ndarray) -> np.ndarray:
    """Return a well-mixed uint32 for each uint32 index under a uint32 key; backends compute the same bits.

    The mixer is the two-multiply xorshift hash of the "hash prospector" search (constants 0x7feb352d, 0x846ca68b).
    """
    x = index.astype(np.uint32) ^ np.uint32(key)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def hash_key(seed: int, step: int, name: str) -> int:
    """Return the uint32 key of device noise for (seed, step, name)."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=4).digest(), "little")
