"""The oracle's recurrences, token by token as a decoder runs them: a state that a document start sets to zero.

No chunks, no blocks in parallel, no masks: what the engines' parallel forms are held to (spec/causal_skc.md a5).
Everything between one token and the next is here; what a token does by itself is in shared_tests/oracle/reference.py.
"""

from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def smear(x: Array, share: Array, starts: Array) -> Array:
    """Return x (B, T, D) with `share` (D,) of the token before added to every token that has one in its document."""
    out, before = np.empty_like(x), np.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        before[starts[:, t]] = 0
        out[:, t] = x[:, t] + share * before
        before = x[:, t].copy()
    return out


def ngrams(tokens: Array, starts: Array, multipliers: Sequence[Sequence[int]], buckets: int) -> Array:
    """Return the rows of the stacked tables that every token's n-grams read, (B, T, orders * heads), -1 where one would
    be longer than its document so far: the polynomial as it is written, in Python's unbounded integers.
    """
    out = np.full((*tokens.shape, sum(map(len, multipliers))), -1)
    for row, ids in enumerate(tokens.tolist()):
        document: list[int] = []
        for t, token in enumerate(ids):
            document = [token] if starts[row, t] else [*document, token]
            table = 0
            for order, heads in enumerate(multipliers, 1):
                for p in heads:
                    if len(document) > order:
                        hashed = sum(document[-1 - j] * p**j for j in range(order + 1)) % buckets
                        out[row, t, table] = table * buckets + hashed
                    table += 1
    return out


def remember(
    value: Array, conv: Array, decay: Array, gain: Array, hadamard: Array, starts: Array
) -> tuple[Array, Array]:
    """Return the convolved values s and the states h of a Koopman mixer, both (B, T, C).

    value, decay and gain are (B, T, C), conv is (C, K); starts (B, T) is True where a document begins.
    """
    rows, seq, width = value.shape
    taps = conv.shape[1]
    tail = np.zeros((rows, taps - 1, width))  # the values before the current one, newest first
    state = np.zeros((rows, width))
    convolved, states = np.empty_like(value), np.empty_like(value)
    for t in range(seq):
        tail[starts[:, t]] = 0
        state[starts[:, t]] = 0
        window = np.concatenate([value[:, t : t + 1], tail], 1)
        tail = window[:, :-1]
        convolved[:, t] = sum(conv[:, i] * window[:, i] for i in range(taps))
        state = decay[:, t] * state + (convolved[:, t] @ hadamard) * gain[:, t]
        states[:, t] = state
    return convolved, states


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
