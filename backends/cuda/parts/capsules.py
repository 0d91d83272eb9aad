"""A store of capsules: in every block of tokens each capsule gathers the values that are routed to it, and tokens read
what the blocks before theirs have stored (docs/model.md).

Blocks are counted from the start of the row, or of the carried state: no position depends on the length of the row.
"""

import torch
import torch.nn as nn

from backends.cuda import ops
from core.model.capsules import COUPLING, FLOOR, NOTHING
from core.model.context import Blocks, CapsuleState, CapsuleTape


class Capsules(nn.Module):
    """Letters: B rows, T positions, C channels in H heads of K, N capsules per head, M blocks of Q positions."""

    def __init__(self, store, eps, exact):
        super().__init__()
        self._store, self._eps, self._exact = store, eps, exact
        heads, count, block = store.heads, store.capsules, store.block
        self.temperature = nn.Parameter(torch.zeros(2, heads))
        if store.bands:
            self.bands = nn.Parameter(torch.zeros(block, count))
        self.rate = nn.Parameter(torch.zeros(heads, count))
        self.couple_in = nn.Parameter(torch.zeros(heads, COUPLING, count))
        self.couple_out = nn.Parameter(torch.zeros(heads, count, COUPLING))
        if store.ahead:
            self.ahead_diag = nn.Parameter(torch.zeros(store.channels))
            self.ahead_in = nn.Parameter(torch.zeros(store.channels, COUPLING))
            self.ahead_out = nn.Parameter(torch.zeros(store.channels, COUPLING))

    def forward(self, write_BTR, read_BTR, values_BTC, context, state):
        """Return what every token reads (B, T, C), the tape, and auxiliary losses; R = H * N routing logits."""
        store, blocks = self._store, context.blocks
        rows, seq, width = values_BTC.shape
        state = state or self.start(values_BTC, context)
        keys_BTHN, reads_BTHN = self.route(write_BTR, 0, context), self.route(read_BTR, 1, context)
        writes_BTHN = self.shifted(keys_BTHN, context, state) if store.shift else keys_BTHN
        template_QN = self.template(context)
        w_BMHQN, q_BMHQN = self.aligned(writes_BTHN, blocks), self.aligned(reads_BTHN, blocks)
        # A capsule is a sum over many tokens: bfloat16 would round the next one away.
        values_BTHK = values_BTC.to(context.wide).reshape(rows, seq, store.heads, -1)
        v_BMHQK = self.aligned(values_BTHK, blocks)
        if blocks.inside is not None:
            # A place without a token holds a copy of some token, which must not be stored again.
            w_BMHQN = torch.where(blocks.inside, w_BMHQN, 0.0)
        # Written at the end of its block: what of it is in the document that is open then.
        live_BMHQN = torch.where(blocks.live, w_BMHQN, 0.0)
        # The mass has no template: bands may cancel, and a mean over their sum would have no bound.
        mass_BMHN = torch.sum(live_BMHQN, dim=3)
        sums_BMHNK = torch.swapaxes(live_BMHQN * template_QN, -1, -2) @ v_BMHQK
        if blocks.phase is not None:
            # The open block of the state is this first one, and lost once a document begins in it.
            kept_B = blocks.fresh[:, 0, -1].to(context.wide)
            mass_BMHN = add_first(mass_BMHN, state.mass * kept_B[:, None, None])
            sums_BMHNK = add_first(sums_BMHNK, state.sums * kept_B[:, None, None, None])
        # The floor stands for half a token: a capsule that got nothing keeps almost nothing, and divides by no zero.
        stored_BMHNK = self.evolve(sums_BMHNK / (mass_BMHN + FLOOR)[..., None], blocks.fresh[..., -1], state)
        # A block reads what the blocks before it left: its own sum is not complete before its last token.
        before_BMHNK = torch.cat([state.stored[:, None], stored_BMHNK[:, :-1]], dim=1)
        fresh_BMHQ1 = blocks.fresh[:, :, None, :, None]
        coupled_BMHQN = torch.where(fresh_BMHQ1, q_BMHQN + q_BMHQN @ self.coupling(), 0.0)
        y_BMHQK, ahead_BMHNK = coupled_BMHQN @ before_BMHNK, None
        if store.ahead:
            ahead_BMHNK = before_BMHNK @ self.ahead(context)
            y_BMHQK = y_BMHQK + torch.where(fresh_BMHQ1, q_BMHQN, 0.0) @ ahead_BMHNK
        if store.intra:
            # Not coupled: the open block is read as tokens, each under its own key.
            seen_XQQ = ops.causal_mask(store.block, store.block, blocks.documents.reshape(-1, store.block))
            seen_BMQQ = seen_XQQ.reshape(*blocks.documents.shape, store.block)
            scores_BMHQQ = torch.where(seen_BMQQ[:, :, None], q_BMHQN @ torch.swapaxes(w_BMHQN, -1, -2), 0.0)
            inside_BMHQK = scores_BMHQQ @ v_BMHQK
            if blocks.phase is not None:
                # Such a read is linear in the tokens: of those before the chunk the sum is enough.
                first_BHQN = torch.where(fresh_BMHQ1[:, 0], q_BMHQN[:, 0], 0.0)
                inside_BMHQK = add_first(inside_BMHQK, first_BHQN @ state.plain)
            y_BMHQK = y_BMHQK + store.intra * inside_BMHQK
        y_BPC = torch.swapaxes(y_BMHQK, 2, 3).reshape(rows, -1, width)
        y_BTC = y_BPC[:, :seq] if blocks.phase is None else ops.pick(y_BPC, blocks.place)
        tape = CapsuleTape(state, keys_BTHN, w_BMHQN, v_BMHQK, template_QN, stored_BMHNK)
        return y_BTC, tape, self.losses(before_BMHNK, ahead_BMHNK, stored_BMHNK, context)

    def start(self, values_BTC, context):
        """Return the state before the first token."""
        heads, count = self._store.heads, self._store.capsules
        rows, width = values_BTC.shape[0], values_BTC.shape[-1] // heads
        zeros = torch.zeros((rows, heads, count, width), dtype=context.wide, device=values_BTC.device)
        return self.state(zeros, zeros, zeros, zeros[..., 0], zeros[..., 0])

    def state(self, stored_BHNK, sums_BHNK, plain_BHNK, mass_BHN, key_BHN):
        """Return the state without what these options never read."""
        plain_BHNK = plain_BHNK if self._store.intra else None
        return CapsuleState(stored_BHNK, sums_BHNK, plain_BHNK, mass_BHN, key_BHN if self._store.shift else None)

    def route(self, logits_BTR, which, context):
        """Return the share of each capsule: a softmax of normalised, so bounded, logits, in float32."""
        store = self._store
        rows, seq, _ = logits_BTR.shape
        logits_BTHN = logits_BTR.to(context.wide).reshape(rows, seq, store.heads, store.capsules)
        # Normalised over the capsules, a logit is at most sqrt(N): the temperature says how sharp routing gets.
        logits_BTHN = ops.rms_norm(logits_BTHN, self._eps, self._exact)
        return ops.softmax(logits_BTHN * self.temperature[which][:, None], self._exact)

    def shifted(self, keys_BTHN, context, state):
        """Return for every token the key of the one before it in its document, else 0."""
        before_BTHN = torch.cat([state.key[:, None], keys_BTHN[:, :-1]], dim=1)
        return torch.where(context.continues[..., None, None], before_BTHN, 0.0)

    def template(self, context):
        """Return the weight of every place in a block, per capsule: the inverse Walsh transform of its bands."""
        store = self._store
        if store.bands:
            return torch.swapaxes(context.walsh, 0, 1) @ self.bands.to(context.wide)
        shape = (store.block, store.capsules)
        return torch.ones(shape, dtype=context.wide, device=context.documents.device)

    def aligned(self, x_BTHX, blocks):
        """Return (B, M, H, Q, X): whole blocks, of which places without a token are not to be looked at."""
        rows, _, heads, width = x_BTHX.shape
        x_BPHX = aligned(x_BTHX, blocks.token, self._store.block)
        return torch.swapaxes(x_BPHX.reshape(rows, -1, self._store.block, heads, width), 2, 3)

    def evolve(self, means_BMHNK, fresh_BM, state):
        """Return the capsules after every block: each forgets at its rate; a document that begins clears them all."""
        # sigmoid(-rate) is exp(-softplus(rate)), without a logarithm to lose digits in.
        forget_HN = ops.sigmoid(-self.rate, self._exact)
        decay_BMHN = torch.where(fresh_BM[..., None, None], forget_HN, 0.0)
        decay_BMHNK = torch.broadcast_to(decay_BMHN[..., None], means_BMHNK.shape)
        # A running mean: a capsule never grows beyond what was written, whatever its rate.
        drive_BMHNK = (1 - forget_HN)[..., None] * means_BMHNK
        flat = (*means_BMHNK.shape[:2], -1)
        start_BX = state.stored.reshape(flat[0], -1)
        stored_BMX = ops.scan(decay_BMHNK.reshape(flat), drive_BMHNK.reshape(flat), start_BX, self._exact)
        return stored_BMX.reshape(means_BMHNK.shape)

    def coupling(self):
        """Return M (H, N, N): a capsule also shows what the others hold; its Frobenius norm is at most 1.

        Applied to the reads, q (c + M c) = (q + q M) c, it never touches the channels.
        """
        coupling_HNN = self.couple_out @ self.couple_in
        coupling_HNN = coupling_HNN.to(torch.promote_types(coupling_HNN.dtype, torch.float32))
        # Bounded, so that what is shown of other capsules never outgrows what is stored.
        norm_H11 = torch.sqrt(torch.sum(torch.square(coupling_HNN), dim=(-2, -1), keepdim=True))
        return coupling_HNN / torch.clamp(norm_H11, min=1.0)

    def ahead(self, context):
        """Return the step of capsules (K, K), from the right: diagonal and of low rank in their Walsh basis.

        It acts on what is read, never on what is stored: so it needs no bound to be stable.
        """
        count = self._store.channels
        walsh_KK = context.signs[:count, :count] * count**-0.5
        low_KK = walsh_KK @ self.ahead_in.to(context.wide) @ self.ahead_out.T.to(context.wide)
        return (walsh_KK * ops.sigmoid(self.ahead_diag, self._exact) + low_KK) @ walsh_KK

    def losses(self, before_BMHNK, ahead_BMHNK, stored_BMHNK, context):
        """Return by name how far what is shown of capsules lies from what the open block will leave in them, by row."""
        if context.training is None or "consistency" not in context.training.auxiliary:
            return ()
        # The first block sees empty capsules, and the last one may have no end.
        some = slice(1, context.documents.shape[1] // self._store.block)
        shown_BMHNK = before_BMHNK + self.coupling() @ before_BMHNK if ahead_BMHNK is None else ahead_BMHNK
        # A target is no way to learn: what is stored would become what is easy to foresee.
        target_BMHNK = stored_BMHNK[:, some].detach()
        same_BM111 = context.blocks.fresh[:, some, -1, None, None, None]
        error_BMHNK = torch.where(same_BM111, shown_BMHNK[:, some] - target_BMHNK, 0.0)
        energy_BMHNK = torch.where(same_BM111, target_BMHNK, 0.0)
        error_B, energy_B = (torch.sum(torch.square(x), dim=(1, 2, 3, 4)) for x in (error_BMHNK, energy_BMHNK))
        return (("consistency", error_B / (energy_B + NOTHING)),)

    def commit(self, tape, context, n_B):
        """Return the state after the first n tokens of each row of a chunk."""
        before, kept = tape.before, context.kept
        # All of the block, zeros for what is not kept: n must not become a shape.
        w_BHQN, v_BHQK = torch.where(kept.live, ops.pick(tape.writes, kept.open), 0.0), ops.pick(tape.values, kept.open)
        sums_BHNK = torch.swapaxes(w_BHQN * tape.template, -1, -2) @ v_BHQK
        plain_BHNK, mass_BHN = torch.swapaxes(w_BHQN, -1, -2) @ v_BHQK, torch.sum(w_BHQN, dim=2)
        # A row that is still in the block that it came with adds to what the state has of it.
        mass_BHN = mass_BHN + torch.where(kept.first, before.mass, 0.0)
        sums_BHNK = sums_BHNK + torch.where(kept.first[..., None], before.sums, 0.0)
        if before.plain is not None:
            plain_BHNK = plain_BHNK + torch.where(kept.first[..., None], before.plain, 0.0)
        stored_BHNK = torch.where(kept.fresh, ops.after(tape.stored, kept.full, before.stored), 0.0)
        key_BHN = ops.after(tape.keys, n_B, before.key) if self._store.shift else None
        return self.state(stored_BHNK, sums_BHNK, plain_BHNK, mass_BHN, key_BHN)


def blocks(size, position, documents_BT):
    """Return where tokens stand in blocks of `size` tokens; without `position` (B,) rows begin with a block."""
    (rows, seq), phase_B, token_BP, place_BT, inside_BMHQ1 = documents_BT.shape, None, None, None, None
    if position is not None:
        # As many blocks as a row needs that is furthest into its first: no shape may depend on a position.
        phase_B = position % size
        chunk_BP = ops.span(-phase_B, -(-(seq + size - 1) // size) * size)
        token_BP, place_BT = torch.clamp(chunk_BP, 0, seq - 1), ops.span(phase_B, seq)
        inside_BMHQ1 = ((chunk_BP >= 0) & (chunk_BP < seq)).reshape(rows, -1, 1, size, 1)
    documents_BP = aligned(documents_BT, token_BP, size)
    if position is not None:
        documents_BP = torch.where(torch.lt(chunk_BP, 0), 0, documents_BP)
    documents_BMQ = documents_BP.reshape(rows, -1, size)
    ends_BM1 = documents_BMQ[:, :, -1:]
    # The first block follows document 0, which was open before the first token.
    fresh_BMQ = documents_BMQ == torch.cat([ends_BM1[:, :1] * 0, ends_BM1[:, :-1]], dim=1)
    live_BMHQ1 = (documents_BMQ == ends_BM1)[:, :, None, :, None]
    return Blocks(phase_B, token_BP, place_BT, inside_BMHQ1, documents_BMQ, fresh_BMQ, live_BMHQ1)


def aligned(x, token_BP, size):
    """Return x (B, T, ...) at every place of the blocks (B, M * Q, ...), something of x where there is no token."""
    if token_BP is not None:
        return ops.pick(x, token_BP)
    end = -x.shape[1] % size
    return torch.nn.functional.pad(x, (0, 0) * (x.ndim - 2) + (0, end)) if end else x


def opened(size, blocks, kept, n_B):
    """Return `kept` with the block that is open after n tokens of each row."""
    full_B, place_B = (blocks.phase + n_B) // size, (blocks.phase + n_B) % size
    open_B = torch.clamp(full_B, max=blocks.fresh.shape[1] - 1)  # of a row that ended with its last block: masked
    fresh_B = ops.pick(ops.pick(blocks.fresh, open_B), torch.clamp(place_B - 1, min=0)) | (place_B == 0)
    live_BQ = (ops.pick(blocks.documents, open_B) == kept.last) & (ops.span(-place_B, size) < 0)
    fresh_B111, first_B11 = fresh_B[:, None, None, None], (fresh_B & (full_B == 0))[:, None, None]
    return kept._replace(full=full_B, open=open_B, live=live_BQ[:, None, :, None], fresh=fresh_B111, first=first_B11)


def add_first(x, more):
    """Return x with `more` added to its first block."""
    return torch.cat([x[:, :1] + more[:, None], x[:, 1:]], dim=1)
