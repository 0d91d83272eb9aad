"""What the PyTorch engine holds: masters, optimizer state and averages, and the weights made of them."""

import numpy as np
import torch

from backends.cuda import storage
from backends.cuda.banks import Banked, Quantiser, noised_all, softened_all
from core.engine.noise import byte_scale, weight_keys
from core.engine.optimizer_state import optimizer_slots
from core.engine.protocol import Arrays
from core.engine.ranks import buckets, owners
from core.engine.scaffolding import completed, scaffolding
from core.model.params import banks, check_arrays, param_table
from core.model.storage import Stored, gridded, storage_class


class Masters:
    """The part of core.engine.protocol.Engine that weights go through on their way in and out."""

    def __init__(self, config, ranks, wide, device):
        self._run, self._config, self._train = config, config.model, config.train
        self._wide, self._device, self.ranks = wide, device, ranks
        self._table, self._scaffolding = param_table(config.model), scaffolding(config.model, config.train)
        self._trains = self._table | self._scaffolding
        self._slots = optimizer_slots(config.model, config.train)
        self._buckets = buckets(config, ranks.world)
        self._banks = banks(config.model, owners(self._buckets), self._scaffolding)
        self._params, self._state = self._zeros(("",)), self._zeros(("m", "v", "ema"))
        self._means, self._snapshots = self._zeros(("mean",)), torch.zeros(1, dtype=wide, device=device)
        self._store, self._soften, self._shake = Quantiser(None), softened_all, noised_all  # an engine may compile them
        self.quantise = False
        self._weights: Banked | None = None

    def _stored(self, weights):
        """Return every weight as the artifact would give it back, the scaffolding as it is."""
        kept = {key: value for key, value in weights.whole.items() if not key[0].scaffold}
        stored = self._store(list(kept.values()), [(bank.storage, bank.deviation) for bank, _ in kept])
        return Banked(weights.whole | dict(zip(kept, stored, strict=True)))

    def _trained(self, params, quantise):
        """Return the weights of a training step's forward pass; gradients at them are those of `params`."""
        weights = self._stored(params) if quantise else params
        return {name: value.detach().requires_grad_() for name, value in weights.items()}

    @torch.no_grad()
    def _softened(self, params, softness):
        """Return the weights of a forward pass that rounds softly, and slopes by bank.

        Gradients at the weights, times slopes where there are any, are those of `params`.
        """
        soft = [bank for bank in self._banks if gridded(bank.storage)]
        given = [params.whole[bank, ""] for bank in soft], [(bank.storage, bank.deviation) for bank in soft]
        made = dict(zip(soft, self._soften(*given, self._numbers(softness)), strict=True))
        values = {(bank, ""): value.contiguous() for bank, (value, _) in made.items()}  # CUDA: as in Quantiser
        weights = Banked(self._stored(params).whole | values)
        slopes = {bank: slope.contiguous() for bank, (_, slope) in made.items()}
        return {name: value.detach().requires_grad_() for name, value in weights.items()}, slopes

    @torch.no_grad()
    def _noisy(self, params, key, deviation):
        """Return the weights of a forward pass with noise on the codes of ternary ones; gradients as in _trained."""
        moved = [bank for bank in self._banks if storage_class(bank.storage) == "ternary"]
        rest = Banked({place: value for place, value in params.whole.items() if place[0] not in moved})
        given = [params.whole[bank, ""] for bank in moved], [bank.storage for bank in moved]
        numbers = self._integers(key), self._numbers(byte_scale(deviation))
        made = self._shake(*given, [self._integers(weight_keys(bank.names)) for bank in moved], *numbers)
        values = {(bank, ""): value.contiguous() for bank, value in zip(moved, made, strict=True)}  # as in Quantiser
        weights = Banked(self._stored(rest).whole | values)
        return {name: value.detach().requires_grad_() for name, value in weights.items()}

    def _learned(self, plan, key):
        """Return the weights of a step's forward pass, and slopes by bank: see _softened."""
        if plan.quantise and self._train.quantise_soft is not None:
            return self._softened(self._params, plan.softness)
        if plan.quantise and self._train.ternary_noise:
            return self._noisy(self._params, key, plan.ternary_noise), {}
        return self._trained(self._params, plan.quantise), {}

    def weights(self) -> Arrays:
        weights = self._scored()
        return {name: weights[name].cpu().numpy().copy() for name in self._table}

    def quantised(self) -> dict[str, Stored]:
        weights = self._exported()
        return {name: storage.to_host(weights[name], row.storage, row.deviation) for name, row in self._table.items()}

    def params(self) -> Arrays:
        return {name: self._params[name].cpu().numpy().copy() for name in self._trains}

    def load_params(self, params: Arrays, quantise: bool = False) -> None:
        params = completed(self._config, self._train, params)
        check_arrays(params, {name: row.shape for name, row in self._trains.items()}, "weights")
        for name in self._trains:
            self._params[name].copy_(torch.from_numpy(np.ascontiguousarray(params[name])))
            if f"{name}.ema" in self._slots:
                self._state[f"{name}.ema"].copy_(self._params[name])
        for value in (*self._means.whole.values(), self._snapshots):
            value.zero_()
        self.quantise, self._weights = quantise, None

    @torch.no_grad()
    def optimizer(self) -> Arrays:
        if self.ranks.world > 1:  # each rank has the momentum of the matrices that it updates
            shared = {name: self._state[f"{name}.m"] for b in self._buckets for name in b.names}
            self.ranks.share_updates([b for b in self._buckets if b.slots], shared)()
        held = self._held()
        return {name: held[name].cpu().numpy().copy() for name in self._slots}

    def load_optimizer(self, state: Arrays) -> None:
        check_arrays(state, self._slots, "optimizer state")
        held = self._held()
        for name in self._slots:
            held[name].copy_(torch.from_numpy(np.ascontiguousarray(state[name])))
        self._weights = None

    def _scored(self):
        """Return the weights that are scored, made anew after every change of the masters."""
        if self._weights is None:
            self._weights = self._stored(self._exported()) if self.quantise else self._exported()
        return self._weights

    def _exported(self):
        """Return what core.engine.optimizer_state.exported would, in banks: the averages where there are any."""
        masters, averages = self._params.whole, self._state.whole
        if self._means and float(self._snapshots) > 0:
            averages = {(bank, "ema"): mean for (bank, _), mean in self._means.whole.items()}
        kept = [bank for bank in self._banks if not bank.scaffold]
        return Banked({(bank, ""): averages.get((bank, "ema"), masters[bank, ""]) for bank in kept})

    def _held(self):
        """Return all that core.engine.optimizer_state.optimizer_slots names."""
        return {**self._state, **self._means, "snapshots": self._snapshots}

    def _zeros(self, slots):
        """Return zeros for the parameters (the empty slot) or the state of every bank."""
        kept = [
            (bank, slot)
            for slot in slots
            for bank in self._banks
            if not slot or f"{bank.names[0]}.{slot}" in self._slots
        ]
        return Banked({key: torch.zeros(key[0].shape, dtype=self._wide, device=self._device) for key in kept})

    def _integers(self, value):
        """Return uint32 numbers of the host on the device, where they are int64."""
        return torch.tensor(np.asarray(value, np.int64)).to(self._device, non_blocking=True)

    def _numbers(self, value):
        """Return numbers of the host on the device."""
        return torch.tensor(value, dtype=self._wide).to(self._device, non_blocking=True)
