"""What knows a token by its neighbours: EngramHash, hashed bigrams, and the bank of what followed such contexts.

Letters: B rows, T positions, D width, W width of all tables together, R routing logits.
"""

import mlx.core as mx
import mlx.nn as nn

from backends.mlx import ops
from backends.mlx.blocks.capsules import Capsules
from backends.mlx.blocks.linear import Linear
from core.model.ngrams import BIGRAM_MULTIPLIER, multipliers_of


class Bigram(nn.Module):
    """A row of a hashed table for every pair of tokens, projected to the stream's width (spec/original_skc.md 1.6)."""

    def __init__(self, config):
        super().__init__()
        self._buckets = config.bigram.buckets
        self.table = mx.zeros((config.bigram.buckets, config.bigram.dim))
        self.value = Linear(config.bigram.dim, config.dim)

    def __call__(self, context, dtype):
        ids, documents = context.last_ids(1)
        rows_BT1 = ops.ngram_buckets(ids, documents, [(BIGRAM_MULTIPLIER,)], self._buckets)
        return self.value(ops.hashed_rows(self.table, rows_BT1).astype(dtype))


class Engram(nn.Module):
    """Rows of hashed n-gram tables, added to the stream through a gate that compares them with it (causal_skc a4)."""

    def __init__(self, config, exact):
        super().__init__()
        self._config, self._exact = config, exact
        tables = config.engram.orders * config.engram.heads
        width = config.engram.dim // tables
        self.table = mx.zeros((tables * config.engram.buckets, width))
        self.value = Linear(config.engram.dim, config.dim)
        self.key = Linear(config.engram.dim, config.dim)
        self.sharpness = mx.zeros((1,))
        self.bias = mx.zeros((1,))

    def __call__(self, x_BTD, context):
        config, exact, kind = self._config, self._exact, x_BTD.dtype
        ids, documents = context.last_ids(config.engram.orders)
        rows_BTN = ops.ngram_buckets(ids, documents, multipliers_of(config), config.engram.buckets)
        m_BTW = ops.hashed_rows(self.table, rows_BTN).astype(kind)
        x_norm_BTD = ops.rms_norm(x_BTD, config.norm_eps, exact).astype(context.wide)
        key_BTD = ops.rms_norm(self.key(m_BTW), config.norm_eps, exact).astype(context.wide)
        alike_BT1 = mx.mean(x_norm_BTD * key_BTD, axis=-1, keepdims=True)
        sharpness = 0.1 + 3.9 * ops.sigmoid(self.sharpness, exact)
        gate_BT1 = ops.sigmoid(sharpness * alike_BT1 + self.bias, exact)
        return x_BTD + gate_BT1.astype(kind) * self.value(m_BTW)


class Bank(nn.Module):
    """A store of token vectors under the routing of the token before each: what followed contexts like this one
    (spec/causal_skc.md a3)."""

    def __init__(self, config, exact):
        super().__init__()
        self._config, self._exact = config, exact
        routes = config.bank.heads * config.bank.capsules
        self.route = Linear(config.dim, routes)
        self.write_bias = mx.zeros((routes,))
        self.capsules = Capsules(config.bank.store(config), config.norm_eps, exact)
        self.gate = mx.zeros((config.dim,))

    def __call__(self, f_BTD, values_BTD, context, state):
        """Return what is read for every token of the normalised stream f, and the tape."""
        kind, route_BTR = f_BTD.dtype, self.route(f_BTD)
        write_BTR = route_BTR + self.write_bias.astype(kind)
        y_BTD, tape = self.capsules(write_BTR, route_BTR, values_BTD, context, state)
        return self.gate.astype(kind) * ops.rms_norm(y_BTD, self._config.norm_eps, self._exact).astype(kind), tape
