"""What the MLX engine holds: masters, optimizer state and averages, and the weights made of them."""

import mlx.core as mx
import numpy as np

from backends.mlx import storage
from backends.mlx.banks import banks, parts
from backends.mlx.update import Update
from core.engine.noise import byte_scale, weight_keys
from core.engine.optimizer_state import optimizer_slots
from core.engine.protocol import Arrays
from core.engine.ranks import buckets, owners
from core.engine.scaffolding import completed, scaffolding
from core.model.params import check_arrays, param_table
from core.model.storage import Stored, gridded, storage_class

SLOTS = ("m", "v", "ema", "mean")


class Masters:
    """The part of core.engine.protocol.Engine that weights go through on their way in and out."""

    _update: Update

    def __init__(self, config, ranks, wide):
        self._run, self._config, self._train = config, config.model, config.train
        self._wide, self.ranks = wide, ranks
        self._table, self._scaffolding = param_table(config.model), scaffolding(config.model, config.train)
        self._trains = self._table | self._scaffolding
        self._slots = optimizer_slots(config.model, config.train)
        self._buckets = buckets(config, ranks.world)
        self._banks = banks(config.model, owners(self._buckets), self._scaffolding)
        self._kept = [bank for bank in self._banks if not bank.scaffold]
        self._params, self._state, self._means = {}, self._zeros(("m", "v", "ema")), self._zeros(("mean",))
        self._snapshots = mx.zeros(1, wide)
        self._store, self._soften, self._shake = self._stored, self._soft, self._shaken  # an engine may compile them
        self._keys = dict(zip(self._table, map(int, weight_keys(list(self._table))), strict=True))
        self.quantise = False
        self._weights = None

    def _stored(self, rows):
        """Return every bank's row as the artifact would give it back."""
        return {bank.key: bank.stored(rows[bank.key]) for bank in self._banks if bank.key in rows}

    def _trained(self, params, quantise):
        """Return the rows of weights of a training step's forward pass; gradients at them are those of `params`."""
        return self._store(params) if quantise else params

    def _soft(self, rows, softness):
        """Return (values, slopes) of every bank that can be rounded softly."""
        made = {bank.key: bank.softened(rows[bank.key], softness) for bank in self._banks if gridded(bank.storage)}
        return {key: value for key, (value, _) in made.items()}, {key: slope for key, (_, slope) in made.items()}

    def _softened(self, params, softness):
        """Return the weights of a forward pass that rounds softly, and slopes by bank.

        Gradients at the weights, times slopes where there are any, are those of `params`.
        """
        values, slopes = self._soften(params, mx.array(softness, self._wide))
        return self._store(params) | values, slopes

    def _noisy(self, params, key, deviation):
        """Return the weights of a forward pass with noise on the codes of ternary ones; gradients as in _trained."""
        moved = {bank.key: params[bank.key] for bank in self._banks if storage_class(bank.storage) == "ternary"}
        rest = {name: row for name, row in params.items() if name not in moved}
        scale = mx.array(byte_scale(deviation), self._wide)
        return self._store(rest) | self._shake(moved, mx.array(key, mx.uint32), scale)

    def _shaken(self, rows, key, scale):
        """Return rows of ternary banks, stored with noise."""
        return {b.key: b.noised(rows[b.key], key, self._keys, scale) for b in self._banks if b.key in rows}

    def _learned(self, plan, key):
        """Return the weights of a step's forward pass, and slopes by bank: see _softened."""
        if plan.quantise and self._train.quantise_soft is not None:
            return self._softened(self._params, plan.softness)
        if plan.quantise and self._train.ternary_noise:
            return self._noisy(self._params, key, plan.ternary_noise), {}
        return self._trained(self._params, plan.quantise), {}

    def weights(self) -> Arrays:
        weights = self._scored()
        return {name: np.array(weights[name]) for name in self._table}

    def quantised(self) -> dict[str, Stored]:
        weights = parts(self._kept, self._exported())
        return {name: storage.to_host(weights[name], row.storage, row.deviation) for name, row in self._table.items()}

    def params(self) -> Arrays:
        return self._to_host(self._params)

    def load_params(self, params: Arrays, quantise: bool = False) -> None:
        params = completed(self._config, self._train, params)
        check_arrays(params, {name: row.shape for name, row in self._trains.items()}, "weights")
        self._params = {bank.key: self._row(bank, params) for bank in self._banks}
        for key, row in self._params.items():
            if f"{key}.ema" in self._state:
                self._state[f"{key}.ema"] = row
        self._means = {name: mx.zeros_like(row) for name, row in self._means.items()}
        self._snapshots = mx.zeros(1, self._wide)
        self.quantise, self._weights = quantise, None
        mx.eval(self._params)

    def optimizer(self) -> Arrays:
        if self.ranks.world > 1:  # each rank has the momentum of the matrices that it updates
            self._state = self._update.shared(self._state, ".m")
        arrays, held = {"snapshots": np.array(self._snapshots)}, self._state | self._means
        for slot in SLOTS:
            rows = {b.key: held[f"{b.key}.{slot}"] for b in self._banks if f"{b.key}.{slot}" in held}
            named = parts([bank for bank in self._banks if bank.key in rows], rows)
            arrays |= {f"{name}.{slot}": np.array(value) for name, value in named.items()}
        return {name: arrays[name] for name in self._slots}

    def load_optimizer(self, state: Arrays) -> None:
        check_arrays(state, self._slots, "optimizer state")
        for bank in self._banks:
            for held in (self._state, self._means):
                for slot in SLOTS:
                    if f"{bank.key}.{slot}" in held:
                        held[f"{bank.key}.{slot}"] = self._row(bank, state, f".{slot}")
        self._snapshots = mx.array(state.get("snapshots", np.zeros(1)), self._wide)
        self._weights = None
        mx.eval(self._state, self._means, self._snapshots)

    def _scored(self):
        """Return the weights that are scored, by name, made anew after every change of the masters."""
        if self._weights is None:
            mx.clear_cache()  # MLX: memory of the step's shapes serves no scoring
            rows = self._exported()
            self._weights = parts(self._kept, self._store(rows) if self.quantise else rows)
        return self._weights

    def _exported(self):
        """Return what core.engine.optimizer_state.exported would, in rows: the averages where there are any."""
        taken = bool(self._means) and np.array(self._snapshots).any()
        held, slot = (self._means, "mean") if taken else (self._state, "ema")
        return {bank.key: held.get(f"{bank.key}.{slot}", self._params[bank.key]) for bank in self._kept}

    def _zeros(self, slots):
        """Return zeros for the state of every bank, `<bank>.<slot>`."""
        kept = [(bank, slot) for bank in self._banks for slot in slots if f"{bank.names[0]}.{slot}" in self._slots]
        return {f"{bank.key}.{slot}": mx.zeros(bank.stacks[-1].end, self._wide) for bank, slot in kept}

    def _to_host(self, rows):
        named = parts(self._banks, rows)
        return {name: np.array(named[name]) for name in self._trains}

    def _row(self, bank, arrays, slot=""):
        """Return a bank's row of arrays from the host."""
        return mx.array(np.concatenate([arrays[name + slot].reshape(-1) for name in bank.names]), self._wide)
