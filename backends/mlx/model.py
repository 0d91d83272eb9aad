"""The model in MLX: embedding, layers, tied head. Reads as a translation of backends/cuda/model.py."""

from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from backends.mlx import ops
from backends.mlx.blocks import BLOCKS
from backends.mlx.blocks.linear import Linear
from backends.mlx.blocks.mlp import MLP


class Context(NamedTuple):
    """What every layer of one forward pass shares."""

    cos: Any  # (T, rope_dims / 2)
    sin: Any
    mask: Any  # which keys a query sees, or None: plain causal


class Embedding(nn.Module):
    """Token vectors, used at both ends of the model."""

    def __init__(self, vocab, width):
        super().__init__()
        self.weight = mx.zeros((vocab, width))


class Layer(nn.Module):
    """A mixer and an MLP, each added to the stream through a scale per channel."""

    def __init__(self, config, index, exact):
        super().__init__()
        self._config, self._exact = config, exact
        self._damp = (index + 1) ** -0.5 if config.depth_damping else 1.0
        self.mixer = BLOCKS[config.kinds[index]](config, exact)
        self.mixer_scale = mx.zeros((config.dim,))
        self.mlp = MLP(config, exact)
        self.mlp_scale = mx.zeros((config.dim,))
        if config.residual_mix:
            self.stream_mix = mx.zeros((config.dim,))
            self.embed_mix = mx.zeros((config.dim,))

    def norm(self, x_BTD):
        x_BTD = ops.rms_norm(x_BTD, self._config.norm_eps, self._exact)
        return x_BTD * self._damp if self._damp != 1.0 else x_BTD

    def __call__(self, x_BTD, embedded_BTD, context):
        kind = x_BTD.dtype
        if self._config.residual_mix:
            x_BTD = self.stream_mix.astype(kind) * x_BTD + self.embed_mix.astype(kind) * embedded_BTD
        x_BTD = x_BTD + self.mixer_scale.astype(kind) * self.mixer(self.norm(x_BTD), context)
        return x_BTD + self.mlp_scale.astype(kind) * self.mlp(self.norm(x_BTD))


class Model(nn.Module):
    """Tokens to softcapped logits. Letters: B rows, T positions, D width, E embedding width, V vocabulary."""

    def __init__(self, config, exact):
        super().__init__()
        self._config, self._exact = config, exact
        width = config.embed_dim or config.dim
        self.embed = Embedding(config.vocab, width)
        if config.embed_dim is not None:
            self.embed_up = Linear(width, config.dim)
            self.embed_down = Linear(config.dim, width)
        self.blocks = [Layer(config, i, exact) for i in range(config.layers)]
        if config.unet_skips:
            self.skip_weights = mx.zeros((config.layers // 2, config.dim))
        if config.vocab_bias:
            self.vocab_bias = mx.zeros((config.vocab,))

    def norm(self, x_BTD):
        return ops.rms_norm(x_BTD, self._config.norm_eps, self._exact)

    def embedding(self, tokens_BT, dtype):
        x_BTD = ops.embedding(tokens_BT, self.embed.weight).astype(dtype)
        return self.norm(self.embed_up(x_BTD) if self._config.embed_dim is not None else x_BTD)

    def head(self, x_BTD):
        x_BTD = self.norm(x_BTD)
        x_BTE = self.embed_down(x_BTD) if self._config.embed_dim is not None else x_BTD
        logits_BTV = ops.linear(x_BTE, self.embed.weight)
        if logits_BTV.dtype == mx.bfloat16:
            logits_BTV = logits_BTV.astype(mx.float32)
        if self._config.vocab_bias:
            logits_BTV = logits_BTV + self.vocab_bias
        return (
            logits_BTV if self._config.softcap is None else ops.softcap(logits_BTV, self._config.softcap, self._exact)
        )

    def context(self, tokens_BT, tables):
        """Return the Context of these rows; tables is (cos, sin) for their length."""
        mask = None
        if self._config.documents == "isolated":
            seq = tokens_BT.shape[1]
            mask = ops.causal_mask(seq, seq, ops.document_ids(tokens_BT, self._config.bos))
        cos, sin = tables
        return Context(cos, sin, mask)

    def __call__(self, tokens_BT, tables, dtype, record=None):
        """Return logits (B, T, V), float32 or wider; `record` (a dict) collects the stream after every layer."""
        context = self.context(tokens_BT, tables)
        embedded_BTD = x_BTD = self.embedding(tokens_BT, dtype)
        record = {} if record is None else record
        record["embed"] = x_BTD
        skips, half = [], self._config.layers // 2
        for i, layer in enumerate(self.blocks):
            if self._config.unet_skips and i >= half and skips:
                x_BTD = x_BTD + self.skip_weights[i - half].astype(x_BTD.dtype) * skips.pop()
            x_BTD = layer(x_BTD, embedded_BTD, context)
            if self._config.unet_skips and i < half:
                skips.append(x_BTD)
            record[f"blocks.{i}"] = x_BTD
        record["logits"] = logits_BTV = self.head(x_BTD)
        return logits_BTV
