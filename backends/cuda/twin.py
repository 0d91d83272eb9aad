"""The twin: a frozen model that drafts for itself with a second set of mixer weights. Translates the MLX file.

A draft is a pass over [last token, masks] from the model's own state. In training one pass over whole rows gives the
states at every anchor: its tape, committed there. Letters: B rows, M anchors of a row, N blocks, K places of a block,
V vocabulary, E embedding width.
"""

import math
from typing import Any

import numpy as np
import torch

from backends.cuda import ops, optim
from core.engine.protocol import Arrays, State, StepResult
from core.model.context import Draft, joined_rows
from core.model.params import check_arrays
from core.twin.anchors import check_anchors
from core.twin.params import BLOCKS, MASK, low_rank, mask_start, scale, twin_rows, twin_start
from core.twin.report import BETAS, EPS, TwinReport
from core.twin.settings import TwinConfig

PLACES = 1 << 17
"""Most places of blocks and of their states' keys that go through the twin at once."""


class Drafted:
    """What a twin says of a block, like core.engine.protocol.Tape; it leaves no state."""

    before = None

    def __init__(self, tokens, logits):
        self.tokens, self._logits = tokens, logits

    def logits(self) -> np.ndarray:
        return self._logits.cpu().numpy()

    def best(self) -> np.ndarray:
        return torch.argmax(self._logits, dim=-1).cpu().numpy()


class Twin:
    """See core.twin.protocol.Twin for every public method."""

    def __init__(self, engine: Any, config: TwinConfig, params: Arrays | None):
        self.config, self._engine, self._model = config, engine, engine._config
        self._table, self._low = twin_rows(self._model, config), low_rank(self._model, config)
        self._frozen = {name: value.detach() for name, value in dict(engine._scored()).items()}
        host = engine.weights()
        start, rest = twin_start(self._model, config, host)
        self._rest = {name: self._move(value) for name, value in rest.items()}
        self._mask = self._move(mask_start(host))
        self._open = config.attention == "open"
        self.load_params(start if params is None else params)

    # Weights and state of the optimizer.

    def params(self) -> Arrays:
        return {name: value.cpu().numpy().copy() for name, value in self._params.items()}

    def load_params(self, params: Arrays) -> None:
        check_arrays(params, {name: row.shape for name, row in self._table.items()}, "weights of the twin")
        self._params = {name: self._move(params[name]) for name in self._table}
        self._m, self._v = ({name: torch.zeros_like(p) for name, p in self._params.items()} for _ in range(2))
        self._steps, self._weights = 0, None

    def optimizer(self) -> Arrays:
        slots = {f"{name}.{slot}": held[name] for slot, held in (("m", self._m), ("v", self._v)) for name in held}
        return {name: value.cpu().numpy().copy() for name, value in slots.items()} | {"steps": np.array([self._steps])}

    def load_optimizer(self, state: Arrays) -> None:
        slots = {f"{name}.{slot}": row.shape for slot in "mv" for name, row in self._table.items()}
        check_arrays(state, slots | {"steps": (1,)}, "optimizer state of the twin")
        self._m, self._v = ({name: self._move(state[f"{name}.{slot}"]) for name in self._table} for slot in "mv")
        self._steps = int(state["steps"][0])

    # Drafting.

    @torch.no_grad()
    def draft(self, state: State, anchors: np.ndarray, block: int | None = None) -> Drafted:
        tokens, places = self._blocks(anchors, block or self.config.block), state.position
        model, first = state.model, []
        if self.config.exact_anchor:
            tape = self._engine.chunk(state, tokens[:, :1])
            after, first = self._engine.commit(tape, 1), [tape._logits]
            model, places = after.model, after.position
        if self._weights is None:
            self._weights = self._whole(self._params)
        if tokens.shape[1] > len(first):
            first = [*first, self._pass(self._weights, tokens[:, len(first) :], model, places)]
        return Drafted(tokens, torch.cat(first, dim=1))

    def _blocks(self, anchors, block):
        """Return tokens of blocks that begin with `anchors` (N,), (N, K): -1 is a mask."""
        masks = np.full((len(anchors), block - 1), -1, np.int32)
        return np.concatenate([np.asarray(anchors, np.int32)[:, None], masks], axis=1)

    def _whole(self, params):
        """Return all weights of the twin's pass: its mixers, and what is the frozen model's."""
        own = {name.removeprefix("twin."): value for name, value in params.items() if name.startswith(BLOCKS)}
        weights = {name: own.get(name, value) for name, value in self._frozen.items()}
        for name, low in self._low.items():
            product = params[f"{name}.lora_b"] @ params[f"{name}.lora_a"]
            matrix = self._rest[name] + scale(self.config) * product
            weights |= zip(low.members, torch.split(matrix, list(low.sizes)), strict=True)
        return weights | {MASK: params.get(MASK, self._mask)}

    def _pass(self, weights, tokens, state, places, mixed=None):
        """Return logits (N, K, V) of the twin's `weights` (of _whole) over blocks from a model's state."""
        draft = Draft(weights[MASK], self.config.rule, self._open, mixed)
        given = {name: value for name, value in weights.items() if name != MASK}
        return self._run(given, tokens, state, places, draft)[0]

    def _run(self, weights, tokens, state, places, draft):
        engine = self._engine
        constants = engine._constants(tokens.shape[1], places)
        return engine._forward(weights, engine._move(tokens), constants, state=state, draft=draft)

    # Training.

    def gradients(self, tokens: np.ndarray, anchors: np.ndarray, weights: np.ndarray, loss: str = "kl"):
        value, grads = self._gradient(tokens, anchors, weights, loss)
        return value.item(), {name: grad.cpu().numpy() for name, grad in grads.items()}

    def step(
        self, tokens: np.ndarray, anchors: np.ndarray, weights: np.ndarray, loss: str, lr: float, clip: float | None
    ) -> StepResult:
        value, grads = self._gradient(tokens, anchors, weights, loss)
        norm = optim.global_norm(grads.values())
        mean, size = value.item(), norm.item()
        result = StepResult(mean, size, math.isfinite(mean) and math.isfinite(size))
        if not result.finite:
            return result
        self._steps, self._weights = self._steps + 1, None
        bias1, bias2 = (1 - beta**self._steps for beta in BETAS)
        share = optim.clip_scale(norm, clip)
        for name, grad in grads.items():
            old = self._params[name], grad * share, self._m[name], self._v[name]
            self._params[name], self._m[name], self._v[name] = optim.adamw(*old, lr, 0.0, bias1, bias2, *BETAS, EPS)
        return result

    def _gradient(self, tokens, anchors, weights, loss):
        """Return the loss and its gradients: of whole rows one frozen pass, of blocks a group at a time."""
        first, count = self._checked(tokens, anchors, weights), self.config.block
        logits_BTV, tape = self._frozen_pass(tokens)
        shares = torch.as_tensor(weights[first:] / weights[first:].sum() / anchors.size).to(logits_BTV)
        total = torch.zeros((), dtype=self._engine._wide, device=self._engine._device)
        sums = {name: torch.zeros_like(value) for name, value in self._params.items()}
        for group in self._groups(tokens, anchors):
            at_NK, state = self._places(group, first, count), self._states(tokens, group, tape, first)
            leaves = {name: value.detach().requires_grad_() for name, value in self._params.items()}
            drafted_NKV = self._drafted(self._whole(leaves), tokens, group, state, first)
            if loss == "kl":
                costs_NK = divergence(logits_BTV[at_NK], drafted_NKV, self._engine._exact)
            else:
                targets_NK = self._engine._move(tokens)[at_NK[0], at_NK[1] + 1]
                costs_NK = ops.cross_entropy(drafted_NKV, targets_NK, self._engine._exact)[0]
            cost = torch.sum(costs_NK * shares)
            options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
            found = torch.autograd.grad(cost, list(leaves.values()), **options)
            total = total + cost.detach()
            sums = {name: sums[name] + grad for name, grad in zip(sums, found, strict=True)}
        return total, sums

    def _checked(self, tokens, anchors, weights):
        """Return the first place of a block that the twin answers for; ValueError for what cannot be."""
        check_anchors(tokens, anchors, self.config.block)
        first = int(self.config.exact_anchor)
        good = weights.shape == (self.config.block,) and (weights >= 0).all() and weights[first:].sum() > 0
        if not good:
            given = f"weights of places {weights.tolist()}"
            raise ValueError(f"{given}: expected {self.config.block} from 0 up, not all 0 from place {first} on")
        return first

    @torch.no_grad()
    def _frozen_pass(self, tokens, mixed=None):
        """Return the frozen model's logits (B, T, V) and its tape of whole rows."""
        start = self._engine.start(len(tokens))
        draft = None if mixed is None else Draft(self._mask, mixed=mixed)
        return self._run(self._frozen, tokens, start.model, start.position, draft)

    def _groups(self, tokens, anchors):
        """Return columns of anchors (B, M'), so many at a time as memory is meant for."""
        rows, seq = tokens.shape
        keys = seq if self._model.mixes("attention") else 0
        size = max(1, PLACES // (rows * (self.config.block + keys)))
        return [anchors[:, begin : begin + size] for begin in range(0, anchors.shape[1], size)]

    @torch.no_grad()
    def _states(self, tokens, anchors, tape, first):
        """Return the frozen model's states that blocks go on from, N = M * B rows."""
        counts = [torch.from_numpy(column + first).to(self._engine._device) for column in anchors.T]
        return joined_rows([self._engine._model.commit(tape, n_B, tokens.shape[1]) for n_B in counts], torch.cat)

    def _drafted(self, weights, tokens, anchors, state, first, mixed=None):
        """Return the twin's logits at the places of blocks from `first` on, (N, K - first, V)."""
        blocks = self._blocks(np.take_along_axis(tokens, anchors, 1).T.reshape(-1), self.config.block)
        return self._pass(weights, blocks[:, first:], state, (anchors + first).T.reshape(-1), mixed)

    def _places(self, anchors, first, count):
        """Return row (N, 1) and places (N, K - first) of every block of a group, in the order of _states."""
        rows = np.tile(np.arange(len(anchors)), anchors.shape[1])[:, None]
        places = anchors.T.reshape(-1, 1) + np.arange(first, count)
        return torch.from_numpy(rows).to(self._engine._device), torch.from_numpy(places).to(self._engine._device)

    @torch.no_grad()
    def report(self, tokens: np.ndarray, anchors: np.ndarray) -> TwinReport:
        first, count = self._checked(tokens, anchors, np.ones(self.config.block)), self.config.block
        weights, right = self._whole(self._params), dict[str, Any]()
        logits_BTV, tape = self._frozen_pass(tokens, right)
        agreement_K, kl_K = np.zeros(count), np.zeros(count)
        agreement_K[:first] = 1.0  # the anchor's place is the model's own
        alike = dict.fromkeys(right, 0.0)
        for group in self._groups(tokens, anchors):
            mixed: dict[str, Any] = {}
            state = self._states(tokens, group, tape, first)
            drafted_NKV = self._drafted(weights, tokens, group, state, first, mixed)
            at_NK = self._places(group, first, count)
            same_NK = torch.argmax(logits_BTV[at_NK], dim=-1) == torch.argmax(drafted_NKV, dim=-1)
            apart_NK = divergence(logits_BTV[at_NK], drafted_NKV, self._engine._exact)
            agreement_K[first:] += same_NK.cpu().numpy().sum(axis=0) / anchors.size
            kl_K[first:] += apart_NK.cpu().numpy().sum(axis=0) / anchors.size
            for label, value in right.items():
                alike[label] += cosines(value[at_NK], mixed[label]) / (anchors.size * (count - first))
        return TwinReport(agreement_K, kl_K, alike)

    @torch.no_grad()
    def alike(self, tokens: np.ndarray, anchors: np.ndarray) -> Arrays:
        first, count = self._checked(tokens, anchors, np.ones(self.config.block)), self.config.block
        weights, right = self._whole(self._params), dict[str, Any]()
        tape = self._frozen_pass(tokens, right)[1]
        sums = {label: np.zeros(count - first) for label in right}
        for group in self._groups(tokens, anchors):
            mixed: dict[str, Any] = {}
            state, at_NK = self._states(tokens, group, tape, first), self._places(group, first, count)
            blocks = tokens[tuple(at.cpu().numpy() for at in at_NK)]
            self._pass(weights, blocks, state, (group + first).T.reshape(-1), mixed)
            for label, value in right.items():
                for place in range(count - first):
                    here = cosines(value[at_NK][:, place], mixed[label][:, place])
                    sums[label][place] += here / anchors.size
        return sums

    def _move(self, array):
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._engine._device, self._engine._wide)


def divergence(teacher, drafted, exact):
    """Return KL(softmax(teacher) || softmax(drafted)) in nats over the last axis."""
    known = teacher - ops.logsumexp(teacher, exact)[..., None]
    said = drafted - ops.logsumexp(drafted, exact)[..., None]
    return torch.sum(ops.exp(known, exact) * (known - said), dim=-1)


def cosines(a, b):
    """Return the sum of all cosines of a and b over the last axis."""
    a, b = (x if x.dtype == torch.float64 else x.float() for x in (a, b))
    lengths = torch.sqrt(torch.sum(torch.square(a), dim=-1) * torch.sum(torch.square(b), dim=-1))
    return torch.sum(torch.sum(a * b, dim=-1) / torch.clamp(lengths, min=1e-12)).item()
