"""The MLX engine's training step with every parameter apart, each quantised and guarded by itself.

Banks must have its bits.
"""

from typing import Any

import mlx.core as mx
import numpy as np

from backends.mlx import optim, storage
from backends.mlx.further import further_loss
from core.config import RunConfig
from core.data.batch import Batch
from core.engine.optimizer_state import averaged
from core.engine.plan import NUMBERS, StepPlan
from core.engine.protocol import Arrays
from core.engine.scaffolding import scaffolding, trained_table
from core.model.context import Training
from core.model.params import banks
from core.model.storage import gridded


class ByName:
    """Parameters and optimizer state by name; `engine` lends its forward pass."""

    def __init__(self, config: RunConfig, engine: Any) -> None:
        self._config, self._train, self._engine = config, config.train, engine
        beside = scaffolding(config.model, config.train)
        self._table, self._banks = trained_table(config.model, config.train), banks(config.model, None, beside)
        self._order = [name for bank in engine._banks for name in bank.names]
        self.load(engine.params(), engine.optimizer())

    def load(self, params: Arrays, state: Arrays) -> None:
        """Take parameters and optimizer state from the host."""
        wide = self._engine._wide
        self._params = {name: mx.array(np.ascontiguousarray(params[name]), wide) for name in self._table}
        self._state = {name: mx.array(np.ascontiguousarray(value), wide) for name, value in state.items()}

    def arrays(self) -> Arrays:
        """Return parameters and optimizer state."""
        return {name: np.array(value) for name, value in {**self._params, **self._state}.items()}

    def train_step(self, batch: Batch, plan: StepPlan) -> tuple[float, float, bool]:
        """Return (loss, norm, finite) of one step."""
        engine, hyper = self._engine, mx.array(np.array(plan.numbers), self._engine._wide)
        weights, slopes = dict(self._params), {}
        for name, row in self._table.items() if plan.quantise else ():
            if self._train.quantise_soft and gridded(row.storage):
                softness = mx.array(plan.softness, engine._wide)
                soft = storage.softened(weights[name], row.storage, softness, row.deviation)
                weights[name], slopes[name] = (mx.contiguous(side) for side in soft)
            elif not row.scaffold:
                weights[name] = mx.contiguous(storage.stored(weights[name], row.storage, row.deviation))
        constants = engine._constants(batch.tokens.shape[1])

        def losses(weights: Any) -> Any:
            tokens, targets, record = mx.array(batch.tokens), mx.array(batch.targets), {}
            model, heads = ({n: w for n, w in weights.items() if self._table[n].scaffold == side} for side in (0, 1))
            training = Training(frozenset(self._train.auxiliary), plan.route)
            nll, total = engine._costs(model, tokens, targets, constants, plan.repeat, training, record)
            loss = mx.mean(nll)
            z_loss = self._train.z_loss
            objective = loss + z_loss * mx.mean(mx.square(total)) if z_loss else loss
            if heads:
                further = further_loss(record["hidden"], [*heads.values()], targets, self._config.model, engine._exact)
                objective = objective + self._train.mtp_weight * further
            for name, loss_B in record["auxiliary"]:
                objective = objective + self._train.auxiliary[name] * mx.mean(loss_B)
            return objective, loss

        (_, loss), grads = mx.value_and_grad(losses)(weights)
        grads = {name: grad * slopes[name] if name in slopes else grad for name, grad in grads.items()}
        norm = self._norm(grads)
        finite = mx.isfinite(loss) & mx.isfinite(norm)
        numbers = {**dict(zip(NUMBERS, hyper, strict=True)), "finite": mx.array(True)}
        scale = optim.clip_scale(norm, self._train.clip)
        params, state = self._updated({name: g * scale for name, g in grads.items()}, numbers)
        for name in averaged(self._config.model, self._train):
            state[f"{name}.ema"] = optim.average(self._state[f"{name}.ema"], params[name], numbers["average"])
        state |= {name: value for name, value in self._state.items() if name not in state}
        if plan.snapshot:
            count = state["snapshots"] = self._state["snapshots"] + 1
            for name in averaged(self._config.model, self._train):
                old, value = self._state[f"{name}.mean"], state[f"{name}.ema"]
                state[f"{name}.mean"] = optim.running_mean(old, value, count)
        self._params = {n: mx.contiguous(mx.where(finite, params[n], old)) for n, old in self._params.items()}
        self._state = {n: mx.contiguous(mx.where(finite, state[n], old)) for n, old in self._state.items()}
        mx.eval(self._params, self._state)
        return float(np.array(loss)), float(np.array(norm)), bool(finite.item())

    def _norm(self, grads: Any) -> Any:
        """Return the norm of all gradients, those of the scaffolding added up apart.

        The order in which squares are added up is the banks': a gradient's rows, then the parameters of a bank.
        """
        sides = [[name for name in self._order if self._table[name].scaffold == side] for side in (False, True)]
        sums = [[mx.sum(mx.square(mx.contiguous(grads[name]))) for name in side] for side in sides]
        total = mx.sum(mx.stack(sums[0]))
        return mx.sqrt(total + mx.sum(mx.stack(sums[1])) if sums[1] else total)

    def _updated(self, grads: Any, numbers: Any) -> Any:
        params, state, train = {}, {}, self._train
        adamw: Any = optim.adamw
        for bank in self._banks:
            if bank.group == "matrix" and train.matrix_rule == "muon":
                old, grad = (mx.stack([of[name] for name in bank.names]) for of in (self._params, grads))
                slots = {"m": mx.stack([self._state[f"{name}.m"] for name in bank.names])}
                whole, slices = old.shape, bank.slices
                old, grad, m = (x.reshape(-1, whole[1] // slices, whole[2]) for x in (old, grad, slots["m"]))
                new, slots = optim.rule(train, bank.group, old, grad, {"m": m}, numbers, self._engine._orthogonal)
                new, slots = new.reshape(whole), {"m": slots["m"].reshape(whole)}
                for i, name in enumerate(bank.names):
                    params[name], state[f"{name}.m"] = new[i], slots["m"][i]
                continue
            for name in bank.names:
                rates = [numbers[key] for key in (f"lr_{bank.group}", f"decay_{bank.group}", "bias1", "bias2")]
                moments = [self._state[f"{name}.{slot}"] for slot in ("m", "v")]
                given = (*rates, train.beta1, train.beta2, train.eps)
                new = adamw(self._params[name], grads[name], *moments, *given)
                if bank.slices > 1:
                    live = optim.moves(grads[name].reshape(bank.slices, 1, -1))[:, 0]
                    live = mx.repeat(live, grads[name].shape[0] // bank.slices, axis=0)
                    old = self._params[name], *moments
                    new = [mx.where(live, a, b) for a, b in zip(new, old, strict=True)]
                params[name], state[f"{name}.m"], state[f"{name}.v"] = new
        return params, state
