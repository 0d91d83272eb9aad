"""The model in PyTorch: embedding, layers, tied head. Reads as a translation of backends/mlx/model.py."""

from typing import Any

import torch
import torch.nn as nn

from backends.cuda import attention, ops
from backends.cuda.blocks import BLOCKS
from backends.cuda.blocks.linear import Linear
from backends.cuda.blocks.memory import Bank, Bigram, Engram
from backends.cuda.blocks.mlp import MLP
from core.model.config import TAPS
from core.model.context import Context, ModelState


class Embedding(nn.Module):
    """Token vectors, used at both ends of the model."""

    def __init__(self, vocab, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocab, width))


class Layer(nn.Module):
    """A mixer and an MLP, each added to the stream through a scale per channel."""

    def __init__(self, config, index, exact):
        super().__init__()
        self._config, self._exact = config, exact
        self._parallel = config.kinds[index] == "skc_parallel"
        uses = sum(step.block == index for step in config.passes(True))
        shape = (config.dim,) if uses == 1 else (uses, config.dim)
        self.mixer = BLOCKS[config.kinds[index]](config, exact)
        self.mixer_scale = nn.Parameter(torch.zeros(shape))
        self.mlp = MLP(config, exact)
        self.mlp_scale = nn.Parameter(torch.zeros(shape))
        if config.residual_mix:
            self.stream_mix = nn.Parameter(torch.zeros(shape))
            self.embed_mix = nn.Parameter(torch.zeros(shape))

    def norm(self, x_BTD, step):
        x_BTD = ops.rms_norm(x_BTD, self._config.norm_eps, self._exact)
        return x_BTD * (step.layer + 1) ** -0.5 if self._config.depth_damping and step.layer else x_BTD

    def forward(self, x_BTD, embedded_BTD, context, step, state):
        """Return the stream after the pass `step`, and the mixer's tape."""

        def scale_D(weight):
            return (weight if weight.ndim == 1 else weight[step.row]).to(x_BTD.dtype)

        if self._config.residual_mix:
            x_BTD = scale_D(self.stream_mix) * x_BTD + scale_D(self.embed_mix) * embedded_BTD
        n_BTD = self.norm(x_BTD, step)
        y_BTD, tape = self.mixer(n_BTD, context, state)
        x_BTD = x_BTD + scale_D(self.mixer_scale) * y_BTD
        n_BTD = n_BTD if self._parallel else self.norm(x_BTD, step)
        return x_BTD + scale_D(self.mlp_scale) * self.mlp(n_BTD), tape


class Model(nn.Module):
    """Tokens to softcapped logits. Letters: B rows, T positions, D width, E embedding width, V vocabulary."""

    def __init__(self, config, exact, attend=None):
        super().__init__()
        self._config, self._exact = config, exact
        self._attend = attend or ops.attention  # CUDA: the form that the engine chose
        width = config.embed_dim or config.dim
        self.embed = Embedding(config.vocab, width)
        if config.embed_dim is not None:
            self.embed_up = Linear(width, config.dim)
            self.embed_down = Linear(config.dim, width)
        self.blocks = nn.ModuleList([Layer(config, i, exact) for i in range(config.shared_blocks or config.layers)])
        if config.smear:
            self.smear = nn.Parameter(torch.zeros(config.dim))
        if config.bigram_buckets:
            self.bigram = Bigram(config)
        if config.engram_orders:
            self.engram = Engram(config, exact)
        if "middle" in config.banks:
            self.bank_middle = Bank(config, exact)
        if "head" in config.banks:
            self.bank_head = Bank(config, exact)
        if config.skips:
            self.skip_weights = nn.Parameter(torch.zeros(config.skips, config.dim))
        if config.vocab_bias:
            self.vocab_bias = nn.Parameter(torch.zeros(config.vocab))

    def norm(self, x_BTD):
        return ops.rms_norm(x_BTD, self._config.norm_eps, self._exact)

    def embedding(self, tokens_BT, context, state, dtype):
        """Return the stream that enters the layers, the same before it was smeared, and the tokens' own vectors."""
        x_BTD = ops.embedding(tokens_BT, self.embed.weight).to(dtype)
        x_BTD = self.embed_up(x_BTD) if self._config.embed_dim is not None else x_BTD
        values_BTD = plain_BTD = self.norm(x_BTD)
        if self._config.bigram_buckets:
            plain_BTD = self.norm(x_BTD + self.bigram(context, dtype))
        if not self._config.smear:
            return plain_BTD, plain_BTD, values_BTD
        last_B1D = state.smeared if state is not None and state.smeared is not None else plain_BTD[:, :1] * 0
        before_BTD = torch.cat([last_B1D, plain_BTD[:, :-1]], dim=1)
        same_BT1 = (context.history[:, TAPS - 2 : -1] == context.documents)[..., None]
        share_D = ops.sigmoid(self.smear, self._exact).to(dtype)
        return plain_BTD + share_D * torch.where(same_BT1, before_BTD, 0.0), plain_BTD, values_BTD

    def head(self, x_BTD):
        """Return logits before bias and softcap, as wide as they come."""
        x_BTD = self.norm(x_BTD)
        x_BTE = self.embed_down(x_BTD) if self._config.embed_dim is not None else x_BTD
        return ops.linear(x_BTE, self.embed.weight)

    def cap(self, logits_BTV):
        """Return logits with bias and softcap, float32 or wider."""
        if logits_BTV.dtype == torch.bfloat16:
            logits_BTV = logits_BTV.float()
        logits_BTV = logits_BTV + self.vocab_bias if self._config.vocab_bias else logits_BTV
        cap = self._config.softcap
        return logits_BTV if cap is None else ops.softcap(logits_BTV, cap, self._exact)

    def context(self, tokens_BT, constants, state, wide, begins=None):
        """Return the Context of these rows; `begins` as in forward."""
        seq, isolated = tokens_BT.shape[1], self._config.documents == "isolated"
        starts_BT = tokens_BT == self._config.bos if isolated else torch.zeros_like(tokens_BT, dtype=torch.bool)
        ids_BT = ops.document_ids(tokens_BT, self._config.bos) if isolated else torch.zeros_like(tokens_BT)
        history = torch.nn.functional.pad(ids_BT, (TAPS - 1, 0))
        kept_BS = None if state is None else state.kept
        ids_BS = ids_BT if kept_BS is None else torch.cat([kept_BS, ids_BT], dim=1)
        keys, mask = ids_BS.shape[1], None
        if "attention" in self._config.kinds and (isolated or keys > seq):
            mask = ops.causal_mask(seq, keys, ids_BS) if begins is None else None
        if begins is not None:  # CUDA: some forms of attention take where documents begin instead
            mask = attention.Spans(begins, seq)
        cos, sin, hadamard, walsh, position = constants
        ids = tokens_BT if state is None else torch.cat([state.ids, tokens_BT], dim=1)
        if state is None:
            ids = torch.nn.functional.pad(ids, (self._config.reach, 0), value=-1)
        tables = (hadamard, walsh, position, ids)
        return Context(cos, sin, mask, ids_BT, history, starts_BT, *tables, wide, attend=self._attend)

    def forward(self, tokens_BT, constants, dtype, repeat=True, record=None, state=None, capped=True, begins=None):
        """Return logits (B, T, V), float32 or wider, and a tape: what `commit` makes states of.

        `record` (a dict) collects the stream after every layer. `repeat`: layers that are to be repeated are. Not
        `capped`: logits before bias and softcap, as wide as they come, for ops.cross_entropy. `begins`: where
        documents begin (attention.spans), for attention without a mask, which takes no state.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        context = self.context(tokens_BT, constants, state, wide, begins)
        embedded_BTD, plain_BTD, values_BTD = self.embedding(tokens_BT, context, state, dtype)
        x_BTD = embedded_BTD
        record = {} if record is None else record
        record["embed"] = x_BTD
        skips, half, steps, tapes = [], self._config.layers // 2, self._config.passes(repeat), []
        mixers = (None,) * len(steps) if state is None else state.mixers
        places = self._config.banks
        banks: dict[str, Any] = dict(zip(places, (None,) * len(places) if state is None else state.banks, strict=True))
        for step, mixer in zip(steps, mixers, strict=True):
            unet = self._config.unet_skips and not step.again
            if step.layer == half and not step.again and "middle" in banks:
                f_BTD = self.norm(x_BTD)
                y_BTD, banks["middle"] = self.bank_middle(f_BTD, values_BTD, context, banks["middle"])
                x_BTD = record["bank_middle"] = x_BTD + y_BTD
            if unet and step.layer >= half and skips:
                x_BTD = x_BTD + self.skip_weights[step.layer - half].to(x_BTD.dtype) * skips.pop()
            if self._config.engram_orders and step.layer == self._config.engram_layer and not step.again:
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
        logits_BTV = self.head(x_BTD)
        record["logits"] = logits_BTV = self.cap(logits_BTV) if capped else logits_BTV
        return logits_BTV, (state, context, tapes, banks, plain_BTD)

    def start(self, rows, device):
        """Return the state before the first token."""
        attends = "attention" in self._config.kinds
        kept = torch.zeros((rows, 0), dtype=torch.int32, device=device) if attends else None
        ids = torch.full((rows, self._config.reach), -1, dtype=torch.int32, device=device)
        config = self._config
        return ModelState(kept, (None,) * len(config.passes(True)), (None,) * len(config.banks), ids, None)

    def commit(self, tape, n_B, keep):
        """Return the state after the first n tokens of each row of a chunk, with the last `keep` keys of attention."""
        state, context, tapes, banks, plain_BTD = tape
        kept = state.kept
        if kept is not None:
            ids_BS = torch.cat([kept, context.documents], dim=1)
            index_BS = ops.span(n_B + kept.shape[1] - keep, keep)
            context = context._replace(keep=torch.clamp(index_BS, min=0))
            last_B1 = ops.pick(context.history, n_B + TAPS - 2)[:, None]
            kept = torch.where((index_BS >= 0) & (ops.pick(ids_BS, context.keep) == last_B1), 0, -1).to(torch.int32)
        steps = self._config.passes(True)
        blocks: Any = self.blocks
        mixers = (blocks[s.block].mixer.commit(t, context, n_B) for s, t in zip(steps, tapes, strict=True))
        stores = (getattr(self, f"bank_{place}").capsules.commit(t, context, n_B) for place, t in banks.items())
        ids_BX, documents_BX = context.last_ids(self._config.reach)
        ids = ops.tail(ids_BX, documents_BX, n_B, self._config.reach, -1)
        before = torch.zeros_like(plain_BTD[:, 0]) if state.smeared is None else state.smeared[:, 0]
        smeared = ops.after(plain_BTD, n_B, before)[:, None] if self._config.smear else None
        return ModelState(kept, tuple(mixers), tuple(stores), ids, smeared)
