"""What a step does with its gradients: clip, rules, finiteness guard, averages. In MLX the engine's own methods do it.

A rule is compiled for every bank's shape: the same few kernels each time, where one graph of a whole update would have
some for every parameter.
"""

import math

import torch

from backends.cuda import optim
from backends.cuda.banks import joined
from backends.cuda.storage import priced
from core.engine.plan import NUMBERS
from core.engine.ranks import updated_by
from core.model.storage import gridded


class Update:
    """The optimizer update of one run; `compiled` compiles a function, or returns it."""

    def __init__(self, config, banks, buckets, ranks, orthogonal, compiled):
        self._train, self._banks, self._buckets, self._ranks = config.train, banks, buckets, ranks
        self._orthogonal = orthogonal
        # CUDA: neither is decorated: all that no_grad wraps is one function to the compiler, with one limit
        self._change, self._after = compiled(self._rules), compiled(self._follow)
        self._take, self._price = compiled(self._mean), compiled(self._priced)
        self._coded = sum(math.prod(bank.shape) for bank in banks if gridded(bank.storage))

    @torch.no_grad()
    def alone(self, params, state, grads, loss, hyper, count, slopes=None):
        """Return (mean loss, norm, finite) after one clipped and guarded update of params and state, in place.

        `params` and `state` are Banked; loss and gradients are `count` times too large. `slopes`, by bank, are what
        gradients are multiplied by.
        """
        grads = {bank: joined(bank, [grads[name] for name in bank.names]) for bank in self._banks}
        grads = {bank: grad * slopes[bank] if slopes and bank in slopes else grad for bank, grad in grads.items()}
        grads = {bank: self._rated(bank, slice(None), params, grad, hyper, count) for bank, grad in grads.items()}
        loss, norm, finite = _measured(loss / count, _norm(grads) / count)
        for bank, grad in grads.items():
            self._bank(bank, slice(None), params, state, grad, norm, finite, hyper, count)
        self._average(params, state, finite, hyper)
        return loss, norm, finite

    @torch.no_grad()
    def together(self, params, state, reducer, loss, hyper, count, slopes=None):
        """Do what `alone` does with all ranks: each updates its part of Muon's matrices, which then go to all."""
        sums, work = reducer.finish(), {}
        alone = updated_by(self._buckets, self._ranks.rank)[0]
        ours, common = [torch.zeros_like(loss)], [torch.zeros_like(loss)]  # a rank may have no matrix of its own
        for bank in self._banks:
            mine = [i for i, name in enumerate(bank.names) if name in sums]
            if mine:
                # The matrices of one rank are neighbours; what every rank updates is whole.
                part = slice(mine[0], mine[-1] + 1) if bank.stacked else slice(None)
                grad = joined(bank, [sums[bank.names[i]] for i in mine])
                grad = grad * slopes[bank][part] if slopes and bank in slopes else grad
                grad = self._rated(bank, part, params, grad, hyper, count)
                (ours if bank.names[mine[0]] in alone else common).append(grad)
                work[bank] = part, grad
        ours, common = (torch.square(optim.global_norm(grads)) for grads in (ours, common))
        loss, ours = self._ranks.sum(torch.stack([loss, ours]))
        loss, norm, finite = _measured(loss / count, torch.sqrt(ours + common) / count)
        waits = []
        for bank in self._banks:
            if bank in work:
                part, grad = work[bank]
                self._bank(bank, part, params, state, grad, norm, finite, hyper, count)
            shared = [b for b in self._buckets if b.slots and b.names[0] in bank.names]
            waits.append(self._ranks.share_updates(shared, params))  # while the next bank is updated
        for wait in waits:
            wait()
        self._average(params, state, finite, hyper)
        return loss, norm, finite

    @torch.no_grad()
    def collect(self, means, snapshots, state, finite):
        """Take the averages into their running means, in place, after the step that gave them; `snapshots` counts."""
        averages = [state.whole[bank, "ema"] for bank, _ in means.whole]
        self._take(list(means.whole.values()), averages, snapshots, finite)

    def _mean(self, means, averages, snapshots, finite):
        count = snapshots + 1
        new = [optim.running_mean(old, average, count) for old, average in zip(means, averages, strict=True)]
        _replace([*means, snapshots], [*new, count], finite)

    def _rated(self, bank, part, params, grad, hyper, count):
        """Return a gradient with that of the code length (train.rate), which is of no micro-batch or rank."""
        if not (self._train.rate and gridded(bank.storage)):
            return grad
        return self._price(params.whole[bank, ""][part], grad, bank.storage, bank.deviation, hyper, count)

    def _priced(self, param, grad, storage, deviation, hyper, count):
        share = dict(zip(NUMBERS, hyper, strict=True))["rate"] * count / self._coded
        return grad + priced(param, storage, deviation)[1] * share

    def _bank(self, bank, part, params, state, grad, *numbers):
        """Update a part of a bank and its state, in place; `numbers` are the rest of _rules' arguments."""
        slots = {slot: whole[part] for (of, slot), whole in state.whole.items() if of == bank and slot != "ema"}
        param = params.whole[bank, ""][part]
        if bank.slices > 1:  # views, of matrices that are updated each by itself
            _, rows, columns = param.shape
            shape = (-1, rows // bank.slices, columns)
            param, grad = param.view(shape), grad.view(shape)
            slots = {slot: whole.view(shape) for slot, whole in slots.items()}
        self._change(bank.group, bank.slices > 1, param, slots, grad, *numbers)

    def _rules(self, group, guarded, param, slots, grad, norm, finite, hyper, count):
        numbers = dict(zip(NUMBERS, hyper, strict=True))
        grad = grad * (optim.clip_scale(norm, self._train.clip) / count)
        new, changed = optim.rule(self._train, group, param, grad, slots, numbers, self._orthogonal, guarded)
        _replace([param, *slots.values()], [new, *(changed[slot] for slot in slots)], finite)

    def _average(self, params, state, finite, hyper):
        """Update the running averages, in place."""
        held = {bank: whole for (bank, slot), whole in state.whole.items() if slot == "ema"}
        if held:
            self._after(list(held.values()), [params.whole[bank, ""] for bank in held], finite, hyper)

    def _follow(self, averages, params, finite, hyper):
        decay = dict(zip(NUMBERS, hyper, strict=True))["average"]
        new = [optim.average(old, param, decay) for old, param in zip(averages, params, strict=True)]
        _replace(averages, new, finite)


def _norm(grads):
    """Return the norm of all banks' gradients."""
    model, scaffolding = ([grad for bank, grad in grads.items() if bank.scaffold == side] for side in (False, True))
    norm = optim.global_norm(model)  # apart: a scaffolding whose gradients are zero changes no bit
    return torch.hypot(norm, optim.global_norm(scaffolding)) if scaffolding else norm


def _measured(loss, norm):
    """Return both, and whether they are finite."""
    return loss, norm, torch.isfinite(loss) & torch.isfinite(norm)


def _replace(old, new, finite):
    for stale, fresh in zip(old, new, strict=True):  # CUDA: in place, so that no second copy is kept
        stale.copy_(torch.where(finite, fresh, stale))
