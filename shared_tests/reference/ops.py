"""Every op of the backends in numpy float64, by another road where there is one: it decides if the twins disagree."""

import numpy as np

Array = np.ndarray


def exp(x: Array, exact: bool) -> Array:
    return np.exp(x)


def softmax(x: Array, exact: bool) -> Array:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def logsumexp(x: Array, exact: bool) -> Array:
    top = x.max(-1, keepdims=True)
    return top[..., 0] + np.log(np.exp(x - top).sum(-1))


def embedding(tokens: Array, weight: Array) -> Array:
    return weight[tokens]


def linear(x: Array, weight: Array) -> Array:
    return np.einsum("...i,oi->...o", x, weight)


def rms_norm(x: Array, eps: float, exact: bool, gain: Array | None = None) -> Array:
    return (1.0 if gain is None else gain) * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def rope(x: Array, cos: Array, sin: Array) -> Array:
    """Turn each pair (x_i, x_{i + half}) as a complex number by +angle: another road to the same rotation."""
    half = cos.shape[-1]
    turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * (cos + 1j * sin)
    return np.concatenate([turned.real, turned.imag, x[..., 2 * half :]], -1)


def document_ids(tokens: Array, bos: int) -> Array:
    return np.cumsum(tokens == bos, axis=-1)


def causal_mask(queries: int, keys: int, documents: Array | None) -> Array:
    mask = np.zeros((queries, keys), bool)
    for i in range(queries):
        mask[i, : keys - queries + i + 1] = True
    if documents is None:
        return mask
    return (mask & (documents[:, keys - queries :, None] == documents[:, None, :]))[:, None]


def attention(q: Array, k: Array, v: Array, mask: Array | None, exact: bool) -> Array:
    rows, heads, queries, width = q.shape
    mask = causal_mask(queries, k.shape[2], None) if mask is None else mask
    mask = np.broadcast_to(mask if mask.ndim == 4 else mask[None, None], (rows, 1, queries, k.shape[2]))
    out = np.empty_like(q)
    for head in range(heads):
        shared = head * k.shape[1] // heads
        scores = np.einsum("btk,bsk->bts", q[:, head], k[:, shared]) / np.sqrt(width)
        out[:, head] = softmax(np.where(mask[:, 0], scores, -np.inf), exact) @ v[:, shared]
    return out


def exclude(y: Array, v: Array, alone: Array, projected: bool) -> Array:
    """Take v off y, or multiply y by the matrix that projects it to what is across v, head by head."""
    out = np.empty_like(y)
    for head in range(y.shape[2]):
        own = v[:, :, head * v.shape[2] // y.shape[2]]
        unit = own / np.sqrt((own * own).sum(-1, keepdims=True) + 1e-12)
        across = np.eye(own.shape[-1]) - unit[..., :, None] * unit[..., None, :]
        out[:, :, head] = (across @ y[:, :, head][..., None])[..., 0] if projected else y[:, :, head] - own
    return out * ~alone[..., None, None]


def relu2(x: Array, exact: bool) -> Array:
    return np.where(x > 0, x, 0) ** 2


def leaky_relu2(x: Array, exact: bool) -> Array:
    return np.where(x > 0, x, 0.5 * x) ** 2


def sigmoid(x: Array, exact: bool) -> Array:
    return np.exp(-np.logaddexp(0, -x))


def silu(x: Array, exact: bool) -> Array:
    return x * sigmoid(x, exact)


def softplus(x: Array, exact: bool) -> Array:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def decay(x: Array, exact: bool) -> tuple[Array, Array]:
    """Return d = sigmoid(-x) and sqrt(1 - d^2 + 1e-6), with 1 - d^2 = (1 - d) (1 + d) and 1 - d = sigmoid(x)."""
    d = sigmoid(-x, exact)
    return d, np.sqrt(sigmoid(x, exact) * (1 + d) + 1e-6)


def hadamard(x: Array, matrix: Array) -> Array:
    return x @ matrix


def xor_buckets(ids: Array, documents: Array, buckets: int) -> Array:
    """Return the row that every pair reads by the hash xor, pair by pair in Python's unbounded integers."""
    out = np.full((len(ids), ids.shape[1] - 1, 1), buckets - 1, np.int32)
    for row, t in np.ndindex(out.shape[:2]):
        older, newer = ids[row, t : t + 2].tolist()
        if min(older, newer) >= 0 and documents[row, t] == documents[row, t + 1]:
            out[row, t] = (36_313 * newer ^ 27_191 * older) % (buckets - 1)
    return out


def hashed_rows(table: Array, rows: Array) -> Array:
    """Return rows of `table` side by side, zeros where the index is -1: (B, T, N) -> (B, T, N * width)."""
    out = np.zeros((*rows.shape, table.shape[1]))
    for at in zip(*np.nonzero(rows >= 0), strict=True):
        out[at] = table[rows[at]]
    return out.reshape(*rows.shape[:2], -1)


def short_conv(x: Array, weight: Array, documents: Array) -> Array:
    history = weight.shape[1] - 1
    out = np.zeros((x.shape[0], x.shape[1] - history, x.shape[2]))
    for t in range(out.shape[1]):
        now = history + t
        for tap in range(history + 1):
            same = documents[:, now - tap] == documents[:, now]
            out[:, t] += np.where(same[:, None], weight[:, tap] * x[:, now - tap], 0)
    return out


def span(first: Array, size: int) -> Array:
    """Return first[b], first[b] + 1, ... of every row."""
    return np.array([[start + j for j in range(size)] for start in first])


def pick(x: Array, index: Array) -> Array:
    """Return x[b, index[b]] of every row."""
    return np.stack([x[b, at] for b, at in enumerate(index)])


def after(x: Array, n: Array, before: Array) -> Array:
    """Return x[b, n[b] - 1], or before[b] where n[b] is 0."""
    return np.stack([x[b, count - 1] if count else before[b] for b, count in enumerate(n)])


def ends(documents: Array, n: Array, size: int) -> tuple[Array, Array]:
    """Return the last `size` positions of each row when n of T are kept, and which are in the last one's document."""
    index = np.array([range(count, count + size) for count in n])
    return index, np.array([[row[i] == row[at[-1]] for i in at] for row, at in zip(documents, index, strict=True)])


def tail(x: Array, index: Array, same: Array, empty: float) -> Array:
    """Return the positions `index` of each row, `empty` where they are not the `same` document."""
    out = np.full((*index.shape, *x.shape[2:]), empty, x.dtype)
    for b, j in zip(*np.nonzero(same), strict=True):
        out[b, j] = x[b, index[b, j]]
    return out


def scan(decay: Array, drive: Array, start: Array, exact: bool) -> Array:
    out, state = np.empty_like(drive), start
    for t in range(drive.shape[1]):
        state = decay[:, t] * state + drive[:, t]
        out[:, t] = state
    return out


def softcap(x: Array, cap: float, exact: bool) -> Array:
    return cap * np.tanh(x / cap)


def cross_entropy(logits: Array, targets: Array, exact: bool) -> tuple[Array, Array]:
    total = logsumexp(logits, exact)
    return total - np.take_along_axis(logits, targets[..., None], -1)[..., 0], total
