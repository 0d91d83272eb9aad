"""A store of capsules, token by token, as a decoder runs it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from core.model import tables
from core.model.capsules import Store
from shared_tests.oracle import Array, Text, Weights
from shared_tests.reference.ops import rms_norm, sigmoid, softmax

EXAMPLE = {"bank.at": "both", "skc.block": 8}
"""The bank's stores: what a layer stores in its own is an example of skc's."""


def capsules(
    store: Store, eps: float, w: Weights, write: Array, read: Array, values: Array, text: Text
) -> tuple[Array, tuple[Any, ...]]:
    """Return what every token reads from a store of capsules, (B, T, C), and its losses that the text asks for.

    write and read are routing logits.
    """
    rows, seq, width = values.shape
    heads, count, block = store.heads, store.capsules, store.block

    def keys(logits: Array, temperature: Array) -> Array:
        logits = rms_norm(logits.reshape(rows, seq, heads, count), eps, True)
        return softmax(temperature[:, None] * logits, True)

    def coupled(stored: Array) -> Array:
        return stored + np.einsum("hnm,bhmc->bhnc", coupling, stored)

    def ahead(stored: Array) -> Array:
        spectrum = stored @ tables.hadamard(width // heads)
        spectrum = sigmoid(w["ahead_diag"], True) * spectrum + spectrum @ w["ahead_in"] @ w["ahead_out"].T
        return spectrum @ tables.hadamard(width // heads)

    write, read = keys(write, w["temperature"][0]), keys(read, w["temperature"][1])
    weighting = tables.walsh(block).T @ w["bands"] if store.bands else np.ones((block, count))
    kept = sigmoid(-w["rate"], True)
    coupling = w["couple_out"] @ w["couple_in"]
    coupling = coupling / np.maximum(np.sqrt((coupling**2).sum((1, 2), keepdims=True)), 1)
    values = values.reshape(rows, seq, heads, width // heads)
    seen = (lambda stored: coupled(stored) + ahead(stored)) if store.ahead else coupled
    foreseen = ahead if store.ahead else coupled
    y, loss = recall(write, read, values, weighting, kept, seen, foreseen, text.starts, store.shift, store.intra)
    return y.reshape(rows, seq, width), (("consistency", loss),) * ("consistency" in text.auxiliary)


def recall(
    write: Array,
    read: Array,
    values: Array,
    weighting: Array,
    kept: Array,
    seen: Callable[[Array], Array],
    foreseen: Callable[[Array], Array],
    starts: Array,
    shift: bool,
    intra: float,
) -> tuple[Array, Array]:
    """Return what every token reads from the capsules, (B, T, H, Ch), and each row's loss of consistency (B,).

    write and read are the keys (B, T, H, N), values is (B, T, H, Ch), weighting (b, N) the weight of a place in its
    block, kept (H, N) what a capsule keeps from block to block; `seen` is what a read shows of capsules (B, H, N, Ch),
    `foreseen` what they are expected to hold a block later.
    """
    rows, seq, heads, count = write.shape
    block = len(weighting)
    stored = np.zeros((rows, heads, count, values.shape[-1]))  # c
    weighted, plain = np.zeros_like(stored), np.zeros_like(stored)  # o and A of the open block
    mass, before = np.zeros((rows, heads, count)), np.zeros((rows, heads, count))
    out, error, energy = np.empty_like(values), np.zeros(rows), np.zeros(rows)
    for t in range(seq):
        place = t % block
        for state in (stored, weighted, plain, mass, before):
            state[starts[:, t]] = 0
        key = before if shift else write[:, t]
        before = write[:, t].copy()

        token = key[..., None] * values[:, t, :, None, :]
        weighted = weighted + weighting[place][:, None] * token
        plain = plain + token
        mass = mass + key

        out[:, t] = np.einsum("bhn,bhnc->bhc", read[:, t], seen(stored) + intra * plain)

        if place == block - 1:
            observed, expected = weighted / (mass + 0.5)[..., None], foreseen(stored)
            stored = kept[..., None] * stored + (1 - kept)[..., None] * observed
            weighted, plain, mass = np.zeros_like(stored), np.zeros_like(stored), np.zeros_like(mass)
            for row in range(rows):
                if t >= block and not starts[row, t - block + 1 : t + 1].any():
                    error[row] += ((expected[row] - stored[row]) ** 2).sum()
                    energy[row] += (stored[row] ** 2).sum()
    return out, error / (energy + 1e-6)
