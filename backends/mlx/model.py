"""The model in MLX: embedding, layers, tied head. Reads as a translation of backends/cuda/model.py."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from backends.mlx import ops
from backends.mlx.blocks import BLOCKS
from backends.mlx.blocks.linear import Linear
from backends.mlx.blocks.memory import Bank, Bigram, Engram
from backends.mlx.blocks.mlp import MLP
from core.model import trunk
from core.model.context import Context, ModelState
from core.model.layer import KINDS
from core.model.table import TAPS


class Embedding(nn.Module):
    """Token vectors, used at both ends of the model."""

    def __init__(self, vocab, width):
        super().__init__()
        self.weight = mx.zeros((vocab, width))


class Vectors(nn.Module):
    """Parameters of these shapes, by name."""

    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, mx.zeros(shape))


class Layer(nn.Module):
    """A mixer and an MLP, each added to the stream through a scale per channel."""

    def __init__(self, config, index, exact):
        super().__init__()
        self._config, self._exact = config, exact
        self._parallel = KINDS[config.kind(index)].parallel
        uses = sum(step.block == index for step in trunk.layers(config, True))
        shape = (config.dim,) if uses == 1 else (uses, config.dim)
        self.mixer = BLOCKS[config.kind(index)](config, exact)
        self.mixer_scale = mx.zeros(shape)
        self.mlp = MLP(config, exact)
        self.mlp_scale = mx.zeros(shape)
        if config.residual_mix:
            self.stream_mix = mx.zeros(shape)
            self.embed_mix = mx.zeros(shape)

    def norm(self, x_BTD, step):
        x_BTD = ops.rms_norm(x_BTD, self._config.norm_eps, self._exact)
        return x_BTD * (step.layer + 1) ** -0.5 if self._config.depth_damping and step.layer else x_BTD

    def __call__(self, x_BTD, embedded_BTD, context, step, state):
        """Return the stream after the pass `step`, and the mixer's tape."""

        def scale_D(weight):
            return (weight if weight.ndim == 1 else weight[step.row]).astype(x_BTD.dtype)

        if self._config.residual_mix:
            x_BTD = scale_D(self.stream_mix) * x_BTD + scale_D(self.embed_mix) * embedded_BTD
        n_BTD = self.norm(x_BTD, step)
        y_BTD, tape = self.mixer(n_BTD, context, state)
        x_BTD = x_BTD + scale_D(self.mixer_scale) * y_BTD
        n_BTD = n_BTD if self._parallel else self.norm(x_BTD, step)
        return x_BTD + scale_D(self.mlp_scale) * self.mlp(n_BTD), tape


class Model(nn.Module):
    """Tokens to softcapped logits. Letters: B rows, T positions, D width, E embedding width, V vocabulary."""

    def __init__(self, config, exact):
        super().__init__()
        self._config, self._exact = config, exact
        width = config.embedding.dim or config.dim
        self.embed = Embedding(config.vocab, width)
        if config.embedding.dim is not None:
            self.embed_up = Linear(width, config.dim)
            self.embed_down = Linear(config.dim, width)
        self.blocks = [Layer(config, i, exact) for i in range(config.shared_blocks or config.layers)]
        if config.smear.on:
            self.smear = Vectors(share=(config.dim,))
        if config.bigram.buckets:
            self.bigram = Bigram(config)
        if config.engram.orders:
            self.engram = Engram(config, exact)
        if "middle" in config.bank.places:
            self.bank_middle = Bank(config, exact)
        if "head" in config.bank.places:
            self.bank_head = Bank(config, exact)
        if config.skips.count(config):
            self.skips = Vectors(weight=(config.skips.count(config), config.dim))
        if config.head.bias:
            self.head = Vectors(bias=(config.vocab,))

    def norm(self, x_BTD):
        return ops.rms_norm(x_BTD, self._config.norm_eps, self._exact)

    def embedding(self, tokens_BT, context, state, dtype):
        """Return the stream that enters the layers, the same before it was smeared, and the tokens' own vectors."""
        x_BTD = ops.embedding(tokens_BT, self.embed.weight).astype(dtype)
        x_BTD = self.embed_up(x_BTD) if self._config.embedding.dim is not None else x_BTD
        values_BTD = plain_BTD = self.norm(x_BTD)
        if self._config.bigram.buckets:
            plain_BTD = self.norm(x_BTD + self.bigram(context, dtype))
        if not self._config.smear.on:
            return plain_BTD, plain_BTD, values_BTD
        last_B1D = state.smeared if state is not None and state.smeared is not None else plain_BTD[:, :1] * 0
        before_BTD = mx.concatenate([last_B1D, plain_BTD[:, :-1]], axis=1)
        same_BT1 = (context.history[:, TAPS - 2 : -1] == context.documents)[..., None]
        share_D = ops.sigmoid(self.smear.share, self._exact).astype(dtype)
        return plain_BTD + share_D * mx.where(same_BT1, before_BTD, 0.0), plain_BTD, values_BTD

    def logits(self, x_BTD):
        """Return logits before bias and softcap, as wide as they come."""
        x_BTD = self.norm(x_BTD)
        x_BTE = self.embed_down(x_BTD) if self._config.embedding.dim is not None else x_BTD
        return ops.linear(x_BTE, self.embed.weight)

    def cap(self, logits_BTV):
        """Return logits with bias and softcap, float32 or wider."""
        if logits_BTV.dtype == mx.bfloat16:
            logits_BTV = logits_BTV.astype(mx.float32)
        logits_BTV = logits_BTV + self.head.bias if self._config.head.bias else logits_BTV
        cap = self._config.head.softcap
        return logits_BTV if cap is None else ops.softcap(logits_BTV, cap, self._exact)

    def context(self, tokens_BT, constants, state, wide):
        """Return the Context of these rows."""
        seq, isolated = tokens_BT.shape[1], self._config.documents == "isolated"
        starts_BT = tokens_BT == self._config.bos if isolated else mx.zeros(tokens_BT.shape, mx.bool_)
        ids_BT = ops.document_ids(tokens_BT, self._config.bos) if isolated else mx.zeros_like(tokens_BT)
        history = mx.pad(ids_BT, [(0, 0), (TAPS - 1, 0)])
        kept_BS = None if state is None else state.kept
        ids_BS = ids_BT if kept_BS is None else mx.concatenate([kept_BS, ids_BT], axis=1)
        keys, mask = ids_BS.shape[1], None
        if self._config.mixes("attention") and (isolated or keys > seq):
            mask = ops.causal_mask(seq, keys, ids_BS)
        position = 0 if state is None else state.position
        cos, sin, hadamard, walsh = constants
        ids = tokens_BT if state is None else mx.concatenate([state.ids, tokens_BT], axis=1)
        if state is None:
            ids = mx.pad(ids, [(0, 0), (self._config.reach, 0)], constant_values=-1)
        tables = (hadamard, walsh, position, keys - seq, ids)
        return Context(cos, sin, mask, ids_BT, history, starts_BT, *tables, wide)

    def __call__(self, tokens_BT, constants, dtype, repeat=True, record=None, state=None, capped=True):
        """Return logits (B, T, V), float32 or wider, and a tape: what `commit` makes states of.

        `record` (a dict) collects the stream after every layer. `repeat`: layers that are to be repeated are. Not
        `capped`: logits before bias and softcap, as wide as they come, for ops.cross_entropy.
        """
        wide = mx.float64 if dtype == mx.float64 else mx.float32
        context = self.context(tokens_BT, constants, state, wide)
        embedded_BTD, plain_BTD, values_BTD = self.embedding(tokens_BT, context, state, dtype)
        x_BTD = embedded_BTD
        record = {} if record is None else record
        record["embed"] = x_BTD
        skips, half, steps, tapes = [], self._config.layers // 2, trunk.layers(self._config, repeat), []
        mixers = (None,) * len(steps) if state is None else state.mixers
        places = self._config.bank.places
        banks: dict[str, Any] = dict(zip(places, (None,) * len(places) if state is None else state.banks, strict=True))
        for step, mixer in zip(steps, mixers, strict=True):
            unet = self._config.skips.on and not step.again
            if step.layer == half and not step.again and "middle" in banks:
                f_BTD = self.norm(x_BTD)
                y_BTD, banks["middle"] = self.bank_middle(f_BTD, values_BTD, context, banks["middle"])
                x_BTD = record["bank_middle"] = x_BTD + y_BTD
            if unet and step.layer >= half and skips:
                x_BTD = x_BTD + self.skips.weight[step.layer - half].astype(x_BTD.dtype) * skips.pop()
            if self._config.engram.orders and step.layer == self._config.engram.layer and not step.again:
                x_BTD = record["engram"] = self.engram(x_BTD, context)
            x_BTD, tape = self.blocks[step.block](x_BTD, embedded_BTD, context, step, mixer)
            tapes.append(None if state is None else tape)  # only a chunk is committed: else memory for nothing
            if unet and step.layer < half:
                skips.append(x_BTD)
            record[f"blocks.{step.layer}" + ".again" * step.again] = x_BTD
        if "head" in banks:
            f_BTD = self.norm(x_BTD)
            y_BTD, banks["head"] = self.bank_head(f_BTD, values_BTD, context, banks["head"])
            x_BTD = record["bank_head"] = f_BTD + y_BTD
        logits_BTV = self.logits(x_BTD)
        record["logits"] = logits_BTV = self.cap(logits_BTV) if capped else logits_BTV
        return logits_BTV, (state, context, tapes, banks, plain_BTD)

    def start(self, rows):
        """Return the state before the first token."""
        attends = self._config.mixes("attention")
        kept = mx.zeros((rows, 0), dtype=mx.int32) if attends else None
        ids = mx.full((rows, self._config.reach), -1, dtype=mx.int32)
        config = self._config
        mixers, banks = (None,) * len(trunk.layers(config, True)), (None,) * len(config.bank.places)
        return ModelState(0, kept, mixers, banks, ids, None)

    def commit(self, tape, n, keep):
        """Return the state after the first n tokens of a chunk, n from 1 up, with the last `keep` keys of attention."""
        state, context, tapes, banks, plain_BTD = tape
        context = context._replace(keep=keep)
        kept = state.kept
        if kept is not None:
            ids_BS = mx.concatenate([kept, context.documents[:, :n]], axis=1)
            kept = mx.where(ids_BS == ids_BS[:, -1:], 0, -1).astype(mx.int32)[:, max(ids_BS.shape[1] - keep, 0) :]
        steps = trunk.layers(self._config, True)
        mixers = (self.blocks[s.block].mixer.commit(t, context, n) for s, t in zip(steps, tapes, strict=True))
        stores = (getattr(self, f"bank_{place}").capsules.commit(t, context, n) for place, t in banks.items())
        ids_BX, documents_BX = context.last_ids(self._config.reach)
        end = ids_BX.shape[1] - context.documents.shape[1] + n
        last = slice(end - self._config.reach, end)
        ids = mx.where(documents_BX[:, last] == context.documents[:, n - 1 : n], ids_BX[:, last], -1)
        smeared = plain_BTD[:, n - 1 : n] if self._config.smear.on else None
        return ModelState(state.position + n, kept, tuple(mixers), tuple(stores), ids, smeared)
