"""CUDA: parameters that lie together in memory (core.model.params.ParamBank); MLX's arrays are values."""

import warnings

import torch

from backends.cuda import noise
from backends.cuda.storage import softened, stored
from core.model.storage import KINDS, storage_class

DIVISION = ("eager_numerics.division_rounding", "emulate_divison_rounding")
"""Inductor's option that divides as IEEE does, from torch 2.12 on and before."""


class Banked(dict):
    """Tensors by name. They are views of `whole`, which holds one tensor for every (bank, slot).

    The tensor `<param>.<slot>` is of optimizer state, that of the empty slot is the parameter itself.
    """

    def __init__(self, whole):
        super().__init__()
        self.whole = whole
        for (bank, slot), tensor in whole.items():
            names = [f"{name}.{slot}" if slot else name for name in bank.names]
            self |= zip(names, parts(bank, tensor), strict=True)

    def map(self, function):
        """Return the same of what `function` makes of every whole tensor."""
        return Banked({key: function(tensor) for key, tensor in self.whole.items()})


def parts(bank, tensor):
    """Return the parameters of a bank, which are views of it."""
    if bank.stacked:
        return torch.unbind(tensor)
    sizes = [shape.numel() for shape in map(torch.Size, bank.shapes)]
    return [part.view(shape) for part, shape in zip(torch.split(tensor, sizes), bank.shapes, strict=True)]


def joined(bank, tensors):
    """Return some or all parameters of a stack, or all of a row, as one tensor."""
    return torch.stack(tensors) if bank.stacked else torch.cat([tensor.reshape(-1) for tensor in tensors])


def compiler_options():
    """Return the options by which compiled code rounds as eager code does, as far as this torch has them."""
    division = [name for name in DIVISION if name in torch._inductor.list_options()][:1]
    return dict.fromkeys(["emulate_precision_casts", *division], True)


class Quantiser:
    """What stores many weights at once, compiled by `compiler` (None: eager) where that gives the same bits.

    Ternary and float16 need no division. What is compiled is compared with the eager form once, at its first use.
    """

    def __init__(self, compiler):
        self._made, self._tried, self._classes, self.note = stored_all, compiler is None, KINDS, "eager"
        if compiler is not None:
            self._made, divides = compiler(stored_all), len(compiler_options()) > 1
            self._classes = KINDS if divides else ("ternary", "float16")
            self.note = f"compiled ({', '.join(self._classes)}), held to the eager bits at first use"

    @torch.no_grad()
    def __call__(self, weights, rules):
        """Return the stored form of every weight or stack, row after row: as a reader of the artifact has it.

        A rule is (storage, deviation), as core.model.table.Param has them.
        """
        fit = [i for i, (storage, _) in enumerate(rules) if storage_class(storage) in self._classes]
        made = self._made([weights[i] for i in fit], [rules[i] for i in fit])
        found = dict(zip(fit, made, strict=True))
        values = [found[i] if i in found else stored(weights[i], *rules[i]) for i in range(len(weights))]
        # CUDA: not in the compiled code: there a slice of wider rows gave zeros (torch 2.13, on the CPU)
        values = [value.contiguous() for value in values]
        return values if self._tried else self._compared(values, weights, rules)

    def _compared(self, values, weights, rules):
        """Return `values` if they have the bits of the eager form, else that form, from now on."""
        self._tried, eager = True, [value.contiguous() for value in stored_all(weights, rules)]
        same = [torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(values, eager, strict=True)]
        if all(same):
            return values
        self._made, self.note = stored_all, "eager"
        other = ", ".join(sorted({rules[i][0] for i, equal in enumerate(same) if not equal}))
        warnings.warn(f"the compiled quantisers give other bits ({other}): eager ones are used", stacklevel=2)
        return eager


def stored_all(weights, rules):
    """Return the stored form of every weight or stack."""
    return [stored(weight, *rule) for weight, rule in zip(weights, rules, strict=True)]


def softened_all(weights, rules, softness):
    """Return the value and the slope of every weight or stack of an int class."""
    made = zip(weights, rules, strict=True)
    return [softened(weight, storage, softness, deviation) for weight, (storage, deviation) in made]


def noised_all(weights, storages, names, key, scale):
    """Return stacks of ternary weights as stored with noise, drawn by the step's key and those of their names (N,)."""
    made = zip(weights, storages, names, strict=True)
    return [stored(w, storage, noise=noise.of_weights(key, keys, w.shape[1:], scale)) for w, storage, keys in made]
