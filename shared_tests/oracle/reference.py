"""The numpy float64 oracle: every op, and the whole model composed from them. When the twins disagree, it decides."""

import numpy as np

from core.config import ModelConfig, TrainConfig
from core.model import tables, trunk
from core.model.capsules import Store
from core.model.ngrams import BIGRAM_MULTIPLIER, MULTIPLIERS
from core.model.params import param_table
from core.model.storage import KINDS, STORAGES, Storage, Stored
from core.model.trunk import Stage
from shared_tests.oracle.skc import ngrams, recall, remember, smear

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


def rms_norm(x: Array, eps: float, exact: bool) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


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


def relu2(x: Array, exact: bool) -> Array:
    return np.where(x > 0, x, 0) ** 2


def leaky_relu2(x: Array, exact: bool) -> Array:
    return np.where(x > 0, x, 0.5 * x) ** 2


def sigmoid(x: Array, exact: bool) -> Array:
    return np.exp(-np.logaddexp(0, -x))


def silu(x: Array, exact: bool) -> Array:
    return x * sigmoid(x, exact)


def decay(x: Array, exact: bool) -> tuple[Array, Array]:
    """Return d = sigmoid(-x) and sqrt(1 - d^2 + 1e-6), with 1 - d^2 = (1 - d) (1 + d) and 1 - d = sigmoid(x)."""
    d = sigmoid(-x, exact)
    return d, np.sqrt(sigmoid(x, exact) * (1 + d) + 1e-6)


def hadamard(x: Array, matrix: Array) -> Array:
    return x @ matrix


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


LARGEST = {"ternary": 1, "int4": 7, "int6": 31, "int8": 127}


def quantise(weight: Array, storage: Storage) -> Stored:
    """Return codes and scales by dividing and rounding group by group, in float64: the definition, word for word."""
    assert storage in STORAGES and storage.split("/")[0] in KINDS
    if storage == "float16":
        return Stored(weight.astype(np.float32).astype(np.float16), None)
    cls, grouping = storage.split("/")
    rows, columns = weight.shape
    size = columns if grouping == "row" else int(grouping)
    starts = range(0, columns, size)
    codes, scales = np.zeros(weight.shape), np.zeros((rows, len(starts)), np.float16)
    for j, start in enumerate(starts):
        group = weight[:, start : start + size].astype(np.float64)
        if cls == "ternary":
            exact = np.abs(group).mean(1)
        else:
            exact = np.abs(group).max(1) / (448 if cls == "fp8" else LARGEST[cls])
        scales[:, j] = np.maximum(exact.astype(np.float32).astype(np.float16), 2.0**-14)
        ratio = group / scales[:, j : j + 1].astype(np.float64)
        if cls == "fp8":
            codes[:, start : start + size] = to_e4m3(ratio)
        else:
            codes[:, start : start + size] = np.clip(np.round(ratio), -LARGEST[cls], LARGEST[cls])
    return Stored(codes.astype(np.float32 if cls == "fp8" else np.int8), scales)


def to_e4m3(x: Array) -> Array:
    """Round to the nearest of all 253 finite e4m3 values, a tie to the even code: by looking at every one of them."""
    grid = [m * 2.0**-9 for m in range(8)]
    grid += [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:-1]
    values = np.array(grid)
    size = np.minimum(np.abs(x), 448.0)
    above = np.searchsorted(values, size)
    below = np.maximum(above - 1, 0)
    low, high = size - values[below], values[above] - size
    nearest = np.where((low < high) | ((low == high) & (below % 2 == 0)), below, above)
    return np.copysign(values[nearest], x)


def stored_model(config: ModelConfig, weights: dict[str, Array]) -> dict[str, Stored]:
    """Return every tensor of a model as the artifact keeps it."""
    return {name: quantise(weights[name], row.storage) for name, row in param_table(config).items()}


def decode(stored: Stored, storage: Storage) -> Array:
    """Return code times scale, value by value."""
    if stored.scales is None:
        return stored.codes.astype(np.float64)
    rows, columns = stored.codes.shape
    size = columns if storage.endswith("row") else int(storage.split("/")[1])
    out = np.empty((rows, columns))
    for column in range(columns):
        out[:, column] = stored.codes[:, column] * stored.scales[:, column // size].astype(np.float64)
    return out


def stored_weights(config: ModelConfig, weights: dict[str, Array]) -> dict[str, Array]:
    """Return the weights that a quantised forward pass uses."""
    table = param_table(config)
    return {name: decode(value, table[name].storage) for name, value in stored_model(config, weights).items()}


def adamw(
    param: Array, grads: list[Array], lr: float, decay: float, beta1: float, beta2: float, eps: float
) -> tuple[Array, Array, Array]:
    """Run AdamW over a list of gradients from zero state; return (param, m, v)."""
    m, v = np.zeros_like(param), np.zeros_like(param)
    for t, grad in enumerate(grads, 1):
        m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
        update = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        param = param - lr * (update + decay * param)
    return param, m, v


def muon(
    param: Array, grads: list[Array], lr: float, decay: float, momentum: float, settings: TrainConfig
) -> tuple[Array, Array]:
    """Run Muon over a list of gradients of one matrix from zero momentum; return (param, m)."""
    m = np.zeros_like(param)
    for grad in grads:
        if not np.linalg.norm(grad) > 1e-9:
            continue
        m = momentum * m + grad
        x = grad + momentum * m
        if settings.muon_rows:
            x = x / np.linalg.norm(x, axis=1, keepdims=True)
        param = param - lr * (muon_scale(x, settings) * orthogonal(x, settings) + decay * param)
    return param, m


def orthogonal(x: Array, settings: TrainConfig) -> Array:
    """Apply the Newton-Schulz polynomial to the singular values: the same map, by way of the SVD."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = s / (np.linalg.norm(x) + 1e-7)
    a, b, c = settings.muon_coefficients
    for _ in range(settings.muon_iterations):
        s = a * s + b * s**3 + c * s**5
    return u @ np.diag(s) @ vt


def muon_scale(x: Array, settings: TrainConfig) -> float:
    rows, columns = x.shape
    return max(1.0, rows / columns) ** 0.5 if settings.muon_scale == "ratio" else 0.2 * max(rows, columns) ** 0.5


def model(config: ModelConfig, weights: dict[str, Array], tokens: Array) -> Array:
    """Return the logits (B, T, V) of the whole model."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    eps, starts = config.norm_eps, document_starts(config, tokens)
    x, values = embedded_tokens(config, w, tokens, starts)
    embedded, skips, half = x, [], config.layers // 2
    for p in trunk.layers(config, True):
        skipping = config.skips.on and not p.again
        if "middle" in config.bank.places and p.layer == half and not p.again:
            x = x + bank(config, part(w, "bank_middle."), rms_norm(x, eps, True), values, starts)
        if skipping and p.layer >= half and skips:
            x = x + w["skips.weight"][p.layer - half] * skips.pop()
        if config.engram.orders and p.layer == config.engram.layer and not p.again:
            x = x + engram(config, part(w, "engram."), x, tokens, starts)
        x = layer(config, pass_weights(w, p), p, x, embedded, tokens)
        if skipping and p.layer < half:
            skips.append(x)
    if "head" in config.bank.places:
        f = rms_norm(x, eps, True)
        x = f + bank(config, part(w, "bank_head."), f, values, starts)
    x = rms_norm(x, eps, True)
    logits = linear(linear(x, w["embed_down.weight"]) if config.embedding.dim else x, w["embed.weight"])
    logits = logits + w["head.bias"] if config.head.bias else logits
    return logits if config.head.softcap is None else softcap(logits, config.head.softcap, True)


def document_starts(config: ModelConfig, tokens: Array) -> Array:
    """Return where a document begins that the one before it may not reach, (B, T) bool."""
    return (tokens == config.bos) & (config.documents == "isolated")


def part(w: dict[str, Array], prefix: str) -> dict[str, Array]:
    """Return the weights whose names begin with `prefix`, under the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}


def pass_weights(w: dict[str, Array], p: Stage) -> dict[str, Array]:
    """Return the weights of a pass: its block's, and its own row of what has one row per pass."""
    own = part(w, f"blocks.{p.block}.")
    for name in ("mixer_scale", "mlp_scale", "stream_mix", "embed_mix"):
        if name in own and own[name].ndim == 2:
            own[name] = own[name][p.row]
    return own


def embedded_tokens(config: ModelConfig, w: dict[str, Array], tokens: Array, starts: Array) -> tuple[Array, Array]:
    """Return the stream that enters the first layer, and the tokens' own vectors, which know nothing of neighbours."""
    x = w["embed.weight"][tokens]
    x = linear(x, w["embed_up.weight"]) if config.embedding.dim else x
    values = rms_norm(x, config.norm_eps, True)
    if config.bigram.buckets:
        rows = ngrams(tokens, starts, [[BIGRAM_MULTIPLIER]], config.bigram.buckets)
        x = x + linear(hashed_rows(w["bigram.table"], rows), w["bigram.value.weight"])
    x = rms_norm(x, config.norm_eps, True)
    return smear(x, sigmoid(w["smear.share"], True), starts) if config.smear.on else x, values


def engram(config: ModelConfig, w: dict[str, Array], x: Array, tokens: Array, starts: Array) -> Array:
    """Return what EngramHash adds to the stream x (spec/causal_skc.md a4)."""
    multipliers = [heads[: config.engram.heads] for heads in MULTIPLIERS[: config.engram.orders]]
    memory = hashed_rows(w["table"], ngrams(tokens, starts, multipliers, config.engram.buckets))
    key = rms_norm(linear(memory, w["key.weight"]), config.norm_eps, True)
    cosine = (rms_norm(x, config.norm_eps, True) * key).sum(-1, keepdims=True) / config.dim
    gate = sigmoid((0.1 + 3.9 * sigmoid(w["sharpness"], True)) * cosine + w["bias"], True)
    return gate * linear(memory, w["value.weight"])


def bank(config: ModelConfig, w: dict[str, Array], f: Array, values: Array, starts: Array) -> Array:
    """Return what the bank adds to the normalised stream f (spec/causal_skc.md a3)."""
    read = linear(f, w["route.weight"])
    write = read + w["write_bias"]
    y = capsules(config.bank.store(config), config.norm_eps, part(w, "capsules."), write, read, values, starts)
    return w["gate"] * rms_norm(y, config.norm_eps, True)


def layer(config: ModelConfig, w: dict[str, Array], p: Stage, x: Array, embedded: Array, tokens: Array) -> Array:
    """Return the stream after one pass through a layer."""
    kind = config.kind(p.layer)
    mixer = attention_mixer if kind == "attention" else recurrent_mixer
    damp = 1 / np.sqrt(p.layer + 1) if config.depth_damping else 1.0
    if config.residual_mix:
        x = w["stream_mix"] * x + w["embed_mix"] * embedded
    n = rms_norm(x, config.norm_eps, True) * damp
    x = x + w["mixer_scale"] * output(config, w, "mixer.o", mixer(config, w, n, tokens))
    if kind != "skc_parallel":
        n = rms_norm(x, config.norm_eps, True) * damp
    activation = {"relu2": relu2, "leaky_relu2": leaky_relu2}[config.mlp.activation]
    return x + w["mlp_scale"] * output(config, w, "mlp.down", activation(linear(n, w["mlp.up.weight"]), True))


def attention_mixer(config: ModelConfig, w: dict[str, Array], n: Array, tokens: Array) -> Array:
    """Return what enters the output projection of attention."""
    rows, seq, dim = n.shape
    turn = tables.rope_tables(seq, config.attention.rope_dims, config.attention.rope_base)
    documents = document_ids(tokens, config.bos) if config.documents == "isolated" else None
    mask = causal_mask(seq, seq, documents)
    if config.attention.conv:
        ids = np.zeros_like(tokens) if documents is None else documents
        before = np.concatenate([np.zeros((rows, 3), int), ids], axis=1)
        n = short_conv(np.concatenate([np.zeros((rows, 3, dim)), n], axis=1), w["mixer.conv"], before)

    def heads(name: str) -> Array:
        return (
            linear(n, w[f"mixer.{name}.weight"])
            .reshape(rows, seq, -1, config.attention.width(config))
            .transpose(0, 2, 1, 3)
        )

    q, k = (rope(rms_norm(heads(name), config.norm_eps, True), *turn) for name in "qk")
    y = attention(q * w["mixer.q_gain"][:, None, None], k, heads("v"), mask, True)
    return y.transpose(0, 2, 1, 3).reshape(rows, seq, dim)


def recurrent_mixer(config: ModelConfig, w: dict[str, Array], n: Array, tokens: Array) -> Array:
    """Return what enters the output projection of a Koopman or an SKC mixer."""
    starts = document_starts(config, tokens)
    transform = tables.hadamard(config.koopman.dim)
    d, gain = decay(linear(n, w["mixer.decay.weight"]) + w["mixer.decay_bias"], True)
    value = linear(n, w["mixer.value.weight"])
    s, h = remember(value, w["mixer.conv"], d, gain, transform, starts)
    h = hadamard(h + h @ w["mixer.couple_in"] @ w["mixer.couple_out"].T, transform)
    z = rms_norm(h, config.norm_eps, True) * w["mixer.state_gain"]
    if "mixer.capsule_gain" in w:
        write = linear(n, w["mixer.write.weight"]) + w["mixer.write_bias"]
        read = linear(n, w["mixer.read.weight"])
        y = capsules(config.skc.store, config.norm_eps, part(w, "mixer.capsules."), write, read, s, starts)
        z = z + rms_norm(y, config.norm_eps, True) * w["mixer.capsule_gain"]
    return z * silu(linear(n, w["mixer.gate.weight"]), True)


def capsules(
    store: Store, eps: float, w: dict[str, Array], write: Array, read: Array, values: Array, starts: Array
) -> Array:
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


def output(config: ModelConfig, w: dict[str, Array], name: str, x: Array) -> Array:
    """Return the projection `name` of x back to the stream."""
    if config.output_norm != "none":
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps)
    return linear(x * w[f"{name}.gain"] if config.output_norm == "gain" else x, w[f"{name}.weight"])
