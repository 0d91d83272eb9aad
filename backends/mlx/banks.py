"""Parameters that lie together in memory, so that what is done to one is done to all at once.

A bank is one row of values: all parameters of an optimizer group and rule of storage, one after the other. Parameters
of one shape are neighbours in it: a stack, which is a view of the row. In the order of the table they are neighbours
within a stack too, so that matrices of one shape that read the same input (keys and values; values, gates and decays)
can be read as one.
"""

import itertools
from typing import Any, NamedTuple

import mlx.core as mx

from backends.mlx import noise
from backends.mlx import storage as quantiser
from core.model.params import param_table
from core.model.storage import Storage, group_size


class Stack(NamedTuple):
    """Neighbours of one shape in the row of a bank, from `begin` to `end`; `width` is what they are quantised by."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    begin: int
    end: int
    width: int
    slices: int = 1

    def of(self, row):
        """Return the stack (N, *shape), a view of the row."""
        return row[self.begin : self.end].reshape(len(self.names), *self.shape)

    def sliced(self, stack):
        """Return some of the stack as a stack of the matrices that the optimizer updates each by itself."""
        return stack.reshape(-1, self.shape[0] // self.slices, self.shape[1]) if self.slices > 1 else stack

    def parts(self, row):
        """Return the parameters, views of the row."""
        size = (self.end - self.begin) // len(self.names)
        return [row[begin : begin + size].reshape(self.shape) for begin in range(self.begin, self.end, size)]


class Bank(NamedTuple):
    """All parameters of one optimizer group and rule of storage."""

    group: str
    storage: Storage
    stacks: tuple[Stack, ...]
    scaffold: bool = False
    deviation: float | None = None
    slice: int = 0
    """Values of a matrix that the optimizer updates by itself, if parameters hold several; else 0."""

    @property
    def key(self):
        """The bank's name among arrays by name."""
        own = (f"/{self.deviation}" if self.deviation else "") + (f"/{self.slice}" if self.slice else "")
        return f"{self.group}/{'scaffold' if self.scaffold else self.storage}{own}"

    @property
    def names(self):
        """Return its parameters, in order."""
        return [name for stack in self.stacks for name in stack.names]

    def parts(self, row):
        """Return name -> parameter, a view of the row; the gradients of them all are joined to a row at once."""
        # MLX: of mx.split into more than ten every part has a gradient of its own, of the row's whole size

        @mx.custom_function
        def apart(row):
            return [part for stack in self.stacks for part in stack.parts(row)]

        @apart.vjp
        def together(row, grads, _):
            return joined(grads)

        values: Any = apart(row)
        return dict(zip(self.names, values, strict=True))

    def joined(self, arrays):
        """Return the row of parameters by name."""
        return joined([arrays[name] for name in self.names])

    def stored(self, row):
        """Return the row as the artifact would give it back, of the scaffolding as it is."""
        if self.scaffold:
            return row
        if self.storage == "float16":
            return quantiser.stored(row, self.storage)
        return joined([quantiser.stored(matrix, self.storage, self.deviation) for matrix in self._matrices(row)])

    def softened(self, row, softness):
        """Return the row as soft rounding gives it, and the slopes of it."""
        kind = self.storage, softness, self.deviation
        pairs = [quantiser.softened(matrix, *kind) for matrix in self._matrices(row)]
        return joined([value for value, _ in pairs]), joined([slope for _, slope in pairs])

    def rises(self, row):
        """Return how the bits that the row's codes take rise with the weights: of storage's `priced` the slopes."""
        return joined([quantiser.priced(s.of(row), self.storage, self.deviation)[1] for s in self.stacks])

    def noised(self, row, key, keys, scale):
        """Return a row of ternary weights as stored with noise, drawn by the step's key and those of its names."""
        made = []
        for stack in self.stacks:
            drawn = noise.of_weights(key, mx.array([keys[name] for name in stack.names], mx.uint32), stack.shape, scale)
            made.append(quantiser.stored(stack.of(row).reshape(drawn.shape), self.storage, noise=drawn))
        return joined(made)

    def _matrices(self, row):
        """Return views of the row whose rows are quantised each by itself."""
        # Whole groups are quantised as rows of their own, whatever matrix they are of: a quantiser sees no further.
        runs = [list(stacks) for _, stacks in itertools.groupby(self.stacks, key=lambda stack: stack.width)]
        return [row[run[0].begin : run[-1].end].reshape(-1, run[0].width) for run in runs]


def banks(config, owner, scaffolding=None):
    """Return the banks of all parameters; in a stack those of one `owner` (a rank, by name) are neighbours.

    Those of the scaffolding are the last.
    """
    table, members = param_table(config) | (scaffolding or {}), {}

    def width(name):
        row = table[name]
        columns, size = row.shape[-1], group_size(row.storage, row.shape[-1])
        return 0 if row.storage == "float16" else columns if columns % size else size

    def place(name):  # so that each begins at a multiple of the power of two in its size, as devices like it
        size = table[name].size
        return width(name), -(size & -size), table[name].shape, owner.get(name, 0)

    def bank(group, storage, scaffold, deviation, size, names):
        stacks, begin = [], 0
        for shape, same in itertools.groupby(sorted(names, key=place), key=lambda name: table[name].shape):
            stack = tuple(same)
            end = begin + len(stack) * table[stack[0]].size
            stacks.append(Stack(stack, shape, begin, end, width(stack[0]), table[stack[0]].slices))
            begin = end
        return Bank(group, storage, tuple(stacks), scaffold, deviation, size)

    for name, row in table.items():
        size = row.size // row.slices if row.slices > 1 else 0
        members.setdefault((row.group, row.storage, row.scaffold, row.deviation, size), []).append(name)
    return [bank(*kind, names) for kind, names in members.items()]  # pyright: ignore


def parts(banks, rows):
    """Return the parameters by name: views of the banks' rows."""
    return {name: part for bank in banks for name, part in bank.parts(rows[bank.key]).items()}


def joined(arrays):
    """Return the row of all values of some arrays."""
    rows = [array.reshape(-1) for array in arrays if array.size]
    return mx.concatenate(rows) if len(rows) > 1 else rows[0]
