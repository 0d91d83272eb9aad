"""Experts: a few of many MLPs, which a router chooses token by token."""

import torch
import torch.nn as nn

from backends.cuda import ops, routing
from backends.cuda.linear import Linear, Output
from backends.cuda.parts import Part
from backends.cuda.parts.mlp import ACTIVATIONS, MLP


class Experts(Part):
    """Send every token to the experts of the highest probability; their matrices lie one below the other.

    Letters: B rows, T positions, D width, E experts, h hidden width, k experts of a token.
    """

    def __init__(self, config, exact):
        super().__init__()
        own = config.experts
        self._config, self._exact, self._count, self._active = config, exact, own.count, own.active
        self._activation = ACTIVATIONS[config.mlp.activation]
        self.router = nn.Parameter(torch.zeros(own.count, config.dim))
        self.up = Linear(config.dim, own.count * own.hidden)
        self.down = Output(own.hidden, config, exact, own.count)
        if own.shared:
            self.shared = MLP(config, exact, own.shared)

    def forward(self, stream, context, stage, state):
        n_BTD, training = stream.x, context.training
        shared_BTD = self.shared(stream, context, stage, None)[0].x if self._config.experts.shared else None
        if training is not None and not training.route:
            return stream._replace(x=shared_BTD), None
        wide_BTD = ops.rms_norm(n_BTD.to(context.wide), self._config.norm_eps, self._exact)
        p_BTE = ops.softmax(ops.linear(wide_BTD, self.router), self._exact)
        ranks_BTE = routing.ranks(p_BTE)
        chosen_BTE = ranks_BTE < self._active
        weights_BTE = weights(p_BTE, chosen_BTE, self._active)
        if training is not None and "router_balance" in training.auxiliary:
            loss_B = balance(p_BTE, chosen_BTE, self._active)
            stream = stream._replace(auxiliary=(*stream.auxiliary, ("router_balance", loss_B)))
        # Which expert is the first, the second, ... of each token.
        order_BTkE = ranks_BTE[..., None, :] == torch.arange(self._active, device=n_BTD.device)[:, None]
        expert_BTk = torch.sum(torch.where(order_BTkE, torch.arange(self._count, device=n_BTD.device), 0), dim=-1)
        # CUDA: a GPU's grouped product is for bfloat16, which is what it trains in, and for rows of whole 16 bytes.
        fits = n_BTD.dtype == torch.bfloat16 and self._config.experts.hidden % 8 == self._config.dim % 8 == 0
        if self._exact or (n_BTD.is_cuda and not fits):
            y_BTD = self._dense(n_BTD, weights_BTE, chosen_BTE)
        else:
            weights_BTk = torch.sum(torch.where(order_BTkE, weights_BTE[..., None, :], 0.0), dim=-1)
            y_BTD = self._grouped(n_BTD, weights_BTk, expert_BTk)
        y_BTD = y_BTD if shared_BTD is None else y_BTD + shared_BTD
        return stream._replace(x=y_BTD, routes=(*stream.routes, expert_BTk)), None

    def _dense(self, n_BTD, weights_BTE, chosen_BTE):
        """Return the sum over all experts, of which most have the weight 0: one product up, one down."""
        self.up.watch(torch.broadcast_to(n_BTD, (self._active, *n_BTD.shape)))  # each of its experts reads a token
        a_BTH = self._activation(ops.linear(n_BTD, self.up.weight), self._exact)
        a_BTEh = self.down.entering(a_BTH.reshape(*weights_BTE.shape, -1))
        self.down.watch(torch.where(chosen_BTE[..., None], a_BTEh, 0.0))
        a_BTH = (weights_BTE[..., None].to(a_BTEh.dtype) * a_BTEh).reshape(a_BTH.shape)
        down_DEh = torch.swapaxes(self.down.weight.reshape(self._count, n_BTD.shape[-1], -1), 0, 1)
        return ops.linear(a_BTH, down_DEh.reshape(n_BTD.shape[-1], -1))

    def _grouped(self, n_BTD, weights_BTk, expert_BTk):
        """Return the sum over the experts of each token, of rows that are sorted by expert."""
        rows, seq, dim = n_BTD.shape
        blocks = routing.blocks(expert_BTk.reshape(-1), self._count)
        n_ND = torch.broadcast_to(n_BTD[:, :, None], (*weights_BTk.shape, dim)).reshape(-1, dim)
        n_PD = routing.moved(n_ND, blocks.row, blocks.place)
        self.up.watch(n_ND)
        u_Ph = routing.products(n_PD, self.up.weight.reshape(self._count, -1, dim), blocks.owner)
        a_Ph = self.down.entering(self._activation(u_Ph, self._exact))
        if self.down.watched:
            self.down.watch(routing.moved(a_Ph, blocks.place, blocks.row))
        y_PD = routing.products(a_Ph, self.down.weight.reshape(self._count, dim, -1), blocks.owner)
        y_BTkD = routing.moved(y_PD, blocks.place, blocks.row).reshape(rows, seq, -1, dim)
        y_BTkD = weights_BTk[..., None].to(y_BTkD.dtype) * y_BTkD
        return y_BTkD[:, :, 0] if self._active == 1 else torch.sum(y_BTkD, dim=2)


def weights(p_BTE, chosen_BTE, active):
    """Return what the chosen experts of a token weigh, in sum 1, and 0 for the others."""
    part_BTE = torch.where(chosen_BTE, p_BTE, 0.0)
    total_BT1 = torch.sum(part_BTE, dim=-1, keepdim=True)
    # Of one expert p / p would be 1 without a gradient, and the router would learn nothing: here it has that of log p.
    return part_BTE / (total_BT1.detach() if active == 1 else total_BT1)


def balance(p_BTE, chosen_BTE, active):
    """Return E sum_e f_e P_e of each row: f_e the share of what is sent that expert e gets, P_e its mean probability.

    1 if all get the same. Row by row: then micro-batches and ranks add up to what one process has.
    """
    f_BE = torch.mean(chosen_BTE.to(p_BTE.dtype), dim=1).detach() / active
    return p_BTE.shape[-1] * torch.sum(f_BE * torch.mean(p_BTE, dim=1), dim=-1)
