"""The oracle's recurrences, token by token as a decoder runs them: a state that a document start sets to zero.

No chunks, no blocks in parallel, no masks: what the engines' parallel forms are held to (spec/causal_skc.md a5).
Everything between one token and the next is here; what a token does by itself is in shared_tests/reference.py.
"""

import numpy as np

Array = np.ndarray


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
