"""A store of capsules, token by token, as a decoder runs it."""

import numpy as np

from core.model import tables
from core.model.capsules import Store
from shared_tests.oracle import Array, Weights
from shared_tests.reference.ops import rms_norm, sigmoid, softmax

EXAMPLE = {"bank.at": "both", "skc.block": 8}
"""The bank's stores: what a layer stores in its own is an example of skc's."""


def capsules(store: Store, eps: float, w: Weights, write: Array, read: Array, values: Array, starts: Array) -> Array:
    """Return what every token reads from a store of capsules, (B, T, C); write and read are routing logits."""
    rows, seq, width = values.shape
    heads, count, block = store.heads, store.capsules, store.block

    def keys(logits: Array, temperature: Array) -> Array:
        logits = rms_norm(logits.reshape(rows, seq, heads, count), eps, True)
        return softmax(temperature[:, None] * logits, True)

    write, read = keys(write, w["temperature"][0]), keys(read, w["temperature"][1])
    weighting = tables.walsh(block).T @ w["bands"] if store.bands else np.ones((block, count))
    kept = sigmoid(-w["rate"], True)
    coupling = w["couple_out"] @ w["couple_in"]
    coupling = coupling / np.maximum(np.sqrt((coupling**2).sum((1, 2), keepdims=True)), 1)
    values = values.reshape(rows, seq, heads, width // heads)
    y = recall(write, read, values, weighting, kept, coupling, starts, store.shift, store.intra)
    return y.reshape(rows, seq, width)


def recall(
    write: Array,
    read: Array,
    values: Array,
    weighting: Array,
    kept: Array,
    coupling: Array,
    starts: Array,
    shift: bool,
    intra: float,
) -> Array:
    """Return what every token reads from the capsules, (B, T, H, Ch).

    write and read are the keys (B, T, H, N), values is (B, T, H, Ch), weighting (b, N) the weight of a place in its
    block, kept (H, N) what a capsule keeps from block to block, coupling (H, N, N).
    """
    rows, seq, heads, count = write.shape
    block = len(weighting)
    stored = np.zeros((rows, heads, count, values.shape[-1]))  # c
    weighted, plain = np.zeros_like(stored), np.zeros_like(stored)  # o and A of the open block
    mass, before = np.zeros((rows, heads, count)), np.zeros((rows, heads, count))
    out = np.empty_like(values)
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

        coupled = stored + np.einsum("hnm,bhmc->bhnc", coupling, stored)
        out[:, t] = np.einsum("bhn,bhnc->bhc", read[:, t], coupled + intra * plain)

        if place == block - 1:
            observed = weighted / (mass + 0.5)[..., None]
            stored = kept[..., None] * stored + (1 - kept)[..., None] * observed
            weighted, plain, mass = np.zeros_like(stored), np.zeros_like(stored), np.zeros_like(mass)
    return out
