"""The oracle's memories (EngramHash, bank, embedding) by hand: what they add, and that they are causal. Budget: 5 s."""

import dataclasses

import numpy as np

from core.config import ModelConfig, changed
from core.model.ngrams import BIGRAM_MULTIPLIER, MULTIPLIERS
from shared_tests import oracle
from shared_tests.oracle import Stream, text_of
from shared_tests.support.engram_examples import config, weights
from shared_tests.support.harness import draw, tokens


def logits(model: ModelConfig, ids: np.ndarray, **changes: np.ndarray) -> np.ndarray:
    return oracle.model(model, weights(model) | changes, ids)


def added(name: str, model: ModelConfig, w: dict[str, np.ndarray], stream: Stream, ids: np.ndarray) -> np.ndarray:
    """Return what a part of the oracle adds to the stream."""
    stage = next(stage for stage in model.stages(True) if stage.part == name)
    return oracle.PARTS[name](model, w, stream, stage, text_of(model, ids)).x - stream.x


def test_every_memory_of_the_oracle_has_a_neutral_setting() -> None:
    """Each alone, put to its neutral value, leaves the model without it."""
    none = {"engram.orders": 0, "bigram.buckets": 0, "smear.on": False, "bank.at": "none"}
    bare = config(none | {"residual_mix": True, "skips.on": True})
    ids = tokens("neutral", 2, 30, 24, 1)
    plain = logits(bare, ids)
    for changes, neutral in (
        ({"engram.orders": 2, "engram.dim": 12}, {"engram.value.weight": np.zeros((8, 12))}),
        ({"engram.orders": 1, "engram.layer": 0, "engram.dim": 12}, {"engram.bias": np.full(1, -1e3)}),
        ({"bigram.buckets": 29}, {"bigram.value.weight": np.zeros((8, 4))}),
        ({"smear.on": True}, {"smear.share": np.full(8, -1e3)}),
        ({"bank.at": "middle"}, {"bank_middle.gate": np.zeros(8)}),
        ({"bank.at": "head"}, {"bank_head.gate": np.zeros(8)}),
    ):
        model = changed(bare, changes)
        assert np.allclose(logits(model, ids, **neutral), plain, rtol=0, atol=1e-4), changes
        assert not np.allclose(logits(model, ids), plain, rtol=0, atol=1e-2), changes


def test_the_oracles_memories_are_causal_and_keep_documents_apart() -> None:
    ids = tokens("causal", 1, 20, 24, 1)
    ids[ids == 1] = 2
    ids[0, 12] = 1
    isolated, packed = config(), config({"documents": "packed"})
    other = ids.copy()
    other[0, 9] = ids[0, 9] + 1 if ids[0, 9] < 23 else 3
    for model in (isolated, packed):
        ours, theirs = logits(model, ids), logits(model, other)
        assert np.array_equal(ours[:, :9], theirs[:, :9]) and (ours[:, 9:12] != theirs[:, 9:12]).any(-1).all()
        assert np.array_equal(ours[:, 12:], theirs[:, 12:]) == (model is isolated)


def test_the_oracles_embedding_by_hand() -> None:
    model, ids = config(), np.array([[4, 5, 1, 6, 5]])
    w = weights(model)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean() + model.norm_eps)

    def pair(older: int, newer: int) -> np.ndarray:
        return w["bigram.value.weight"] @ w["bigram.table"][(older * BIGRAM_MULTIPLIER + newer) % 29]

    vectors, share = w["embed.weight"], 1 / (1 + np.exp(-w["smear.share"]))
    packed = {
        0: unit(vectors[4]),
        1: unit(vectors[5] + pair(4, 5)),
        2: unit(vectors[1] + pair(5, 1)),
        3: unit(vectors[6] + pair(1, 6)),
        4: unit(vectors[5] + pair(6, 5)),
    }
    isolated = packed | {2: unit(vectors[1])}
    for rule, plain, before in (("isolated", isolated, (None, 0, None, 2, 3)), ("packed", packed, (None, 0, 1, 2, 3))):
        text = text_of(dataclasses.replace(model, documents=rule), ids)
        stream = oracle.PARTS["embedding"](model, w, text)
        values = stream.values
        for stage in model.stages(True)[:2]:
            part = oracle.below(w, f"{stage.name}.")
            stream = oracle.PARTS[stage.part](model, part, stream, stage, text)
        for t, last in enumerate(before):
            expected = plain[t] + (0 if last is None else share * plain[last])
            assert np.allclose(stream.x[0, t], expected, rtol=0, atol=1e-12), (rule, t)
            assert np.allclose(values[0, t], unit(vectors[ids[0, t]]), rtol=0, atol=1e-12)


def test_the_oracles_engram_by_hand() -> None:
    model = config({"engram.orders": 2, "engram.heads": 1, "engram.dim": 6})
    w, ids = weights(model), np.array([[4, 5, 6, 1, 7]])
    own, x = oracle.below(w, "engram."), draw("stream", 1, 5, 8)
    got = added("engram", model, own, Stream(x, x, x, x), ids)
    none = np.zeros(3)
    (p,), (q,) = (heads[:1] for heads in MULTIPLIERS[:2])
    table = own["table"]
    memories = [
        (none, none),
        (table[(4 * p + 5) % 31], none),
        (table[(5 * p + 6) % 31], table[31 + (4 * q * q + 5 * q + 6) % 31]),
        (none, none),
        (table[(1 * p + 7) % 31], none),
    ]
    sharpness = 0.1 + 3.9 / (1 + np.exp(-own["sharpness"][0]))
    for t, memory in enumerate(memories):
        m = np.concatenate(memory)
        k, here = own["key.weight"] @ m, x[0, t]
        cosine = (k @ here) / 8 / np.sqrt(((k**2).mean() + model.norm_eps) * ((here**2).mean() + model.norm_eps))
        gate = 1 / (1 + np.exp(-(sharpness * cosine + own["bias"][0])))
        assert np.allclose(got[0, t], gate * (own["value.weight"] @ m), rtol=0, atol=1e-12), t


def test_the_oracles_bank_reads_what_followed_contexts_like_this() -> None:
    """Inside its first block a read is a sum over the document: (read key of t . write key of j - 1) times vector j."""
    model = config({"skc.block": 64, "bank.heads": 1})
    w, ids = weights(model), np.array([[4, 5, 6, 1, 7, 8, 9]])
    own, f, values = oracle.below(w, "bank_middle."), draw("f", 1, 7, 8), draw("values", 1, 7, 8)
    f /= np.sqrt((f**2).mean(-1, keepdims=True) + model.norm_eps)
    got = added("bank", model, own, Stream(f, f, values, f), ids)
    f /= np.sqrt((f**2).mean(-1, keepdims=True) + model.norm_eps)  # as the bank normalises what it reads

    def keys(bias: np.ndarray | float, temperature: float) -> np.ndarray:
        route = f[0] @ own["route.weight"].T + bias
        hot = np.exp(temperature * route / np.sqrt((route**2).mean(-1, keepdims=True) + model.norm_eps))
        return hot / hot.sum(-1, keepdims=True)

    warm = own["capsules.temperature"][:, 0]
    write, read = keys(own["write_bias"], warm[0]), keys(0.0, warm[1])
    for t in range(7):
        start = 0 if t < 3 else 3
        y = sum(((read[t] @ write[j - 1]) * values[0, j] for j in range(start + 1, t + 1)), np.zeros(8))
        expected = own["gate"] * y / np.sqrt((y**2).mean() + model.norm_eps)
        assert np.allclose(got[0, t], expected, rtol=0, atol=1e-12), t
    assert not got[0, [0, 3]].any()
