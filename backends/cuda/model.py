"""The model in PyTorch: embedding, layers, tied head. Reads as a translation of backends/mlx/model.py."""

from typing import Any

import torch
import torch.nn as nn

from backends.cuda import attention, ops
from backends.cuda.linear import Linear, Matrix, Site
from backends.cuda.parts.bank import Bank
from backends.cuda.parts.bigram import Bigram
from backends.cuda.parts.capsules import blocks, opened
from backends.cuda.parts.embedding import Embedding
from backends.cuda.parts.engram import Engram
from backends.cuda.parts.feedback import Feedback
from backends.cuda.parts.head import Head
from backends.cuda.parts.lanes import Lanes
from backends.cuda.parts.layer import Layer
from backends.cuda.parts.skips import Skips
from backends.cuda.parts.smear import Smear
from backends.cuda.parts.value_embed import ValueEmbed
from core.model.context import Context, Kept, ModelState, Stream, each_array
from core.model.table import TAPS

PARTS = {
    "bank": Bank, "bigram": Bigram, "engram": Engram, "feedback": Feedback, "lanes": Lanes, "skips": Skips,
    "smear": Smear, "value_embed": ValueEmbed,
}  # fmt: skip
"""What stands beside the layers."""


class Model(nn.Module):
    """Tokens to logits: the embedding, the stages in order, the head.

    Letters: B rows, T positions, D width, E embedding width, V vocabulary, P tokens before, S kept keys.
    """

    def __init__(self, config, exact, attend=None):
        super().__init__()
        self._config, self._exact = config, exact
        self._attend = attend or ops.attention  # CUDA: the form that the engine chose
        self._stages = {repeat: config.stages(repeat) for repeat in (False, True)}
        width = config.embedding.dim or config.dim
        self.embed = Embedding(config.vocab, width)
        if config.embedding.dim is not None:
            self.embed_up = Linear(width, config.dim)
            self.embed_down = Linear(config.dim, width)
        layers = range(config.shared_blocks or config.layers)
        self.blocks = nn.ModuleList([Layer(config, i, exact) for i in layers])
        for name, part in {stage.name: stage.part for stage in self._stages[True]}.items():
            if part != "layer":
                setattr(self, name, PARTS[part](config, exact))
        self.head = Head(config, exact)
        # By the name of a stage: what it has that can be adapted; "": what no stage has.
        beside = {name: getattr(self, name) for name in ("embed", "embed_up", "embed_down") if hasattr(self, name)}
        self._sites = {"": tuple(beside.items())} | {s.name: _sites(self.part(s)) for s in self._stages[True]}

    def part(self, stage) -> Any:
        """Return the module that a stage is a use of."""
        return self.blocks[stage.block] if stage.part == "layer" else getattr(self, stage.name)

    def matrices(self):
        """Return every weight that multiplies what comes in, by name, with the module that it is in."""
        return {f"{name}.weight": module for name, module in self.named_modules() if isinstance(module, Matrix)}

    def hand(self, name, label, adapters):
        """Give what the stage `name` has the adapters (by site) of its pass `label`; where there is none: None."""
        for suffix, site in self._sites[name]:
            site._adapter = adapters.get(f"{label}.{suffix}" if label else suffix)

    def take_back(self):
        """Leave no adapter behind."""
        for name in self._sites:
            self.hand(name, name, {})

    def norm(self, x_BTD, gain_D=None):
        return ops.rms_norm(x_BTD, self._config.norm_eps, self._exact, gain_D)

    def embedding(self, tokens_BT, dtype, draft=None):
        """Return the stream before the first stage; `draft` as in forward."""
        x_BTD = self.embed(tokens_BT if draft is None else torch.clamp(tokens_BT, min=0)).to(dtype)
        if draft is not None:
            x_BTD = torch.where((tokens_BT < 0)[..., None], draft.mask.to(dtype), x_BTD)
        x_BTD = self.embed_up(x_BTD) if self._config.embedding.dim is not None else x_BTD
        n_BTD = self.norm(x_BTD)
        entering_BTD = n_BTD if self._config.embedding.norm else x_BTD
        return Stream(entering_BTD, x_BTD, n_BTD, entering_BTD)

    def hidden(self, x_BTD):
        """Return what the tied head multiplies, (B, T, E)."""
        x_BTD = self.norm(x_BTD, 1 + self.head.norm_gain if self._config.norm_gains else None)
        return self.embed_down(x_BTD) if self._config.embedding.dim is not None else x_BTD

    def context(self, tokens_BT, constants, state, wide, begins=None, training=None, draft=None):
        """Return the Context of these rows; `begins`, `training` and `draft` as in forward."""
        seq, isolated = tokens_BT.shape[1], self._config.documents == "isolated"
        starts_BT = tokens_BT == self._config.bos if isolated else torch.zeros_like(tokens_BT, dtype=torch.bool)
        ids_BT = ops.document_ids(tokens_BT, self._config.bos) if isolated else torch.zeros_like(tokens_BT)
        history = torch.nn.functional.pad(ids_BT, (TAPS - 1, 0))
        kept_BS = None if state is None else state.kept
        ids_BS = ids_BT if kept_BS is None else torch.cat([kept_BS, ids_BT], dim=1)
        keys, mask = ids_BS.shape[1], None
        if self._config.mixes("attention") and (isolated or keys > seq):
            mask = ops.causal_mask(seq, keys, ids_BS) if begins is None else None
        if draft is not None and draft.open and kept_BS is not None:
            mask = (ids_BS[:, keys - seq :, None] == ids_BS[:, None])[:, None]
        if begins is not None:  # CUDA: some forms of attention take where documents begin instead
            mask = attention.Spans(begins, seq)
        position = constants.position
        ids = tokens_BT if state is None else torch.cat([state.ids, tokens_BT], dim=1)
        if state is None:
            ids = torch.nn.functional.pad(ids, (self._config.reach, 0), value=-1)
        stored = blocks(self._config.skc.block, position, ids_BT) if self._config.stores else None
        attend, alone = self._attend, None
        if self._config.attention.xsa != "none":
            before = torch.nn.functional.pad(ids_BS, (1, 0), value=-1)
            alone = before[:, keys - seq : keys] != ids_BT
        return Context(
            constants.cos, constants.sin, mask, ids_BT, history, starts_BT, constants.hadamard, constants.walsh,
            constants.signs, position, ids, wide, stored, attend=attend, alone=alone, training=training, draft=draft,
        )  # fmt: skip

    def forward(
        self, tokens_BT, constants, dtype, repeat=True, record=None, state=None, capped=True, training=None,
        begins=None, adapters=None, draft=None,
    ):  # fmt: skip
        """Return logits (B, T, V), float32 or wider, and a tape: what `commit` makes states of.

        `record` (a dict) collects the stream after every stage, what the head reads, auxiliary losses and routes.
        `repeat`: layers that are to be repeated are. Not `capped`: logits before bias and softcap, as wide as they
        come, for ops.cross_entropy. `training` (Training): this is a training step's pass.
        `begins`: where documents begin (attention.spans), for attention without a mask, which takes no state.
        `adapters` (Adapter by site): what is added beside matrices; they stay handed over until `take_back`.
        `draft` (Draft): this is a twin's pass.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        context = self.context(tokens_BT, constants, state, wide, begins, training, draft)
        if adapters is not None:
            self.hand("", "", adapters)
        stream, stages, tapes = self.embedding(tokens_BT, dtype, draft), self._stages[repeat], []
        if record is not None:
            record["embed"] = stream.x
        states = (None,) * len(stages) if state is None else state.parts
        for stage, part_state in zip(stages, states, strict=True):
            if adapters is not None:
                self.hand(stage.name, stage.label, adapters)
            stream, tape = self.part(stage)(stream, context, stage, part_state)
            tapes.append(None if state is None else tape)  # only a chunk is committed: else memory for nothing
            if record is not None:
                record[stage.label] = stream.x
        hidden_BTE = self.hidden(stream.x)
        logits_BTV = self.embed.product(hidden_BTE, self.head.vectors(self.embed.weight, hidden_BTE, training))
        logits_BTV = self.head(logits_BTV) if capped else logits_BTV
        if record is not None:
            record |= {"hidden": hidden_BTE, "logits": logits_BTV, "routes": stream.routes}
            if training is not None:
                record["auxiliary"] = stream.auxiliary
        return logits_BTV, (state, context, tapes)

    def start(self, rows, device):
        """Return the state before the first token."""
        attends = self._config.mixes("attention")
        kept = torch.zeros((rows, 0), dtype=torch.int32, device=device) if attends else None
        ids = torch.full((rows, self._config.reach), -1, dtype=torch.int32, device=device)
        return ModelState(kept, ids, (None,) * len(self._stages[True]))

    def commit(self, tape, n_B, keep):
        """Return the state after the first n tokens of each row of a chunk, with the last `keep` keys of attention."""
        state, context, tapes = tape
        last_B1 = ops.pick(context.history, n_B + TAPS - 2)[:, None]
        kept, keys = Kept(last_B1, ops.ends(context.history, n_B, TAPS - 1)), state.kept
        if context.blocks is not None:
            kept = opened(self._config.skc.block, context.blocks, kept, n_B)
        if keys is not None:
            ids_BS = torch.cat([keys, context.documents], dim=1)
            index_BS = ops.span(n_B + keys.shape[1] - keep, keep)
            kept = kept._replace(keys=torch.clamp(index_BS, min=0))
            keys = torch.where((index_BS >= 0) & (ops.pick(ids_BS, kept.keys) == last_B1), 0, -1).to(torch.int32)
        context = context._replace(kept=kept)
        parts = (self.part(s).commit(t, context, n_B) for s, t in zip(self._stages[True], tapes, strict=True))
        ids_BX, documents_BX = context.last_ids(self._config.reach)
        ids = ops.tail(ids_BX, *ops.ends(documents_BX, n_B, self._config.reach), -1)
        return ModelState(keys, ids, tuple(parts))

    def forget(self, state, rows_B):
        """Return the state with nothing read in the rows that are marked: every part of it is empty when it is zero."""

        def emptied(x):
            empty = 0 if x.is_floating_point() else -1  # a token id, or the document of a key
            return torch.where(rows_B.reshape(-1, *(1,) * (x.ndim - 1)), empty, x)

        return each_array(state, emptied)


def _sites(part):
    """Return (name, site) of all of a part that can be adapted; a layer's map beside its mixer is called `mixer`."""
    sites = ((name, site) for name, site in part.named_modules() if isinstance(site, Site))
    return tuple((name.replace("block_mixer", "mixer"), site) for name, site in sites)
