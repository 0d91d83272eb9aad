"""What a step does with its gradients: clip, rules, finiteness guard, averages. A translation of the PyTorch file.

A rule is one operation for a whole bank; Muon's is one for every stack.
"""

import mlx.core as mx

from backends.mlx import optim
from backends.mlx.banks import joined
from backends.mlx.distributed import reduce
from core.engine.plan import NUMBERS
from core.engine.ranks import owners
from core.model.storage import gridded


class Update:
    """The optimizer update of one run: pure functions of rows by bank; `compiled` compiles one, or returns it."""

    def __init__(self, config, banks, buckets, ranks, orthogonal, wire, compiled):
        self._train, self._banks, self._ranks = config.train, banks, ranks
        self._orthogonal, self._wire = orthogonal, wire
        self._shared = [bucket for bucket in buckets if bucket.slots]
        self._owner = owners(buckets)
        self._gridded = [bank for bank in banks if gridded(bank.storage)]
        self._change, self._after = compiled(self._rules), compiled(self._follow)
        self._price = compiled(self._priced)
        self.collect = compiled(self._mean)

    def alone(self, params, state, grads, loss, hyper, count):
        """Return (params, state, mean loss, norm, finite) after one clipped and guarded update.

        Loss and gradients are `count` times too large.
        """
        grads = self._priced(params, grads, hyper, count)
        loss, norm, finite = _measured(loss / count, self._norm(grads) / count)
        params, changed = self._rules(params, state, grads, norm, finite, hyper, count)
        return params, {**changed, **self._follow(params, state, finite, hyper)}, loss, norm, finite

    def together(self, params, state, grads, loss, hyper, count):
        """Do what `alone` does with all ranks: each updates its part of Muon's matrices, which then go to all."""
        grads, loss = reduce(self._ranks, grads, loss, self._wire)
        grads = self._price(params, grads, hyper, count)
        loss, norm, finite = _measured(loss / count, self._norm(grads) / count)
        mx.eval(loss, norm, finite)  # MLX: collectives in the same order on every rank
        params, changed = self._change(params, state, grads, norm, finite, hyper, count)
        params, state = self.shared(params), state | changed
        return params, state | self._after(params, state, finite, hyper), loss, norm, finite

    def shared(self, rows, slot=""):
        """Return rows by bank, or those of an optimizer state's slot, with what each rank updated, on all ranks."""
        banks = [bank for bank in self._banks if self._shared and bank.group == "matrix"]
        named = {name: part for bank in banks for name, part in bank.parts(rows[bank.key + slot]).items()}
        named |= self._ranks.share_updates(self._shared, named)
        return rows | {bank.key + slot: bank.joined(named) for bank in banks}

    def _priced(self, params, grads, hyper, count):
        """Return gradients with those of the code length (train.rate), which is of no micro-batch or rank."""
        if not self._train.rate:
            return grads
        share = dict(zip(NUMBERS, hyper, strict=True))["rate"] * count / sum(b.stacks[-1].end for b in self._gridded)
        return grads | {b.key: grads[b.key] + b.rises(params[b.key]) * share for b in self._gridded}

    def _norm(self, grads):
        """Return the root of the sum of all squared gradients."""
        squares = [(bank, mx.square(grads[bank.key])) for bank in self._banks]
        # Parameter by parameter: a CPU adds one value after the other, and would lose digits over a whole row.
        sums = [[], []]
        for bank, row in squares:
            sums[bank.scaffold] += [mx.sum(s.of(row).reshape(len(s.names), -1), axis=1) for s in bank.stacks]
        total = mx.sum(mx.concatenate(sums[False]))
        if sums[True]:  # apart: a scaffolding whose gradients are zero changes no bit
            total = total + mx.sum(mx.concatenate(sums[True]))
        return mx.sqrt(total)

    def _rules(self, params, state, grads, norm, finite, hyper, count):
        """Return params, and the state of the rules; of Muon's matrices this rank updates its own."""
        scale, new, changed = optim.clip_scale(norm, self._train.clip) / count, {}, {}
        numbers = {**dict(zip(NUMBERS, hyper, strict=True)), "finite": finite}
        for bank in self._banks:
            slots = {slot: state[name] for slot in ("m", "v") if (name := f"{bank.key}.{slot}") in state}
            muon = bank.group == "matrix" and self._train.matrix_rule == "muon"
            rule = self._stacks if muon else self._row
            new[bank.key], slots = rule(bank, params[bank.key], grads[bank.key] * scale, slots, numbers)
            changed |= {f"{bank.key}.{slot}": value for slot, value in slots.items()}
        return new, changed

    def _row(self, bank, param, grad, slots, numbers):
        if not bank.slice:
            return optim.rule(self._train, bank.group, param, grad, slots, numbers)
        param, grad = (row.reshape(-1, 1, bank.slice) for row in (param, grad))
        slots = {slot: row.reshape(param.shape) for slot, row in slots.items()}
        param, slots = optim.rule(self._train, bank.group, param, grad, slots, numbers, guarded=True)
        return param.reshape(-1), {slot: value.reshape(-1) for slot, value in slots.items()}

    def _stacks(self, bank, param, grad, slots, numbers):
        """Do what _row does, stack by stack."""
        params, moments = [], []
        for stack in bank.stacks:
            given = (stack.of(row) for row in (param, grad, slots["m"]))
            mine = [i for i, name in enumerate(stack.names) if self._owner[name] == self._ranks.rank]
            begin, end = (mine[0], mine[-1] + 1) if mine else (0, 0)  # those of one rank are neighbours
            old, g, m = given
            if mine:
                own, g, moment = (stack.sliced(x[begin:end]) for x in (old, g, m))
                new, changed = optim.rule(self._train, bank.group, own, g, {"m": moment}, numbers, self._orthogonal)
                params += [old[:begin], new, old[end:]]
                moments += [m[:begin], changed["m"], m[end:]]
            else:
                params.append(old)
                moments.append(m)
        return joined(params), {"m": joined(moments)}

    def _follow(self, params, state, finite, hyper):
        """Return the running averages, `<bank>.ema`, after the update that gave `params`."""
        decay, new = dict(zip(NUMBERS, hyper, strict=True))["average"], {}
        for bank in self._banks:
            old = state.get(f"{bank.key}.ema")
            if old is not None:
                new[f"{bank.key}.ema"] = mx.where(finite, optim.average(old, params[bank.key], decay), old)
        return new

    def _mean(self, means, snapshots, state, finite):
        """Return the running means of averages, `<bank>.mean`, with those of a step, and the number of snapshots."""
        count = snapshots + 1
        new = {
            name: mx.where(finite, optim.running_mean(old, state[f"{name.removesuffix('.mean')}.ema"], count), old)
            for name, old in means.items()
        }
        return new, mx.where(finite, count, snapshots)


def _measured(loss, norm):
    """Return both, and whether they are finite."""
    return loss, norm, mx.isfinite(loss) & mx.isfinite(norm)
