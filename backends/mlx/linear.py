"""The linear layers: a weight (out, in), no bias."""

from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from backends.mlx import ops


class Adapter(NamedTuple):
    """A map of low rank of each row. Letters: B rows, R rank, I channels that come in, O that go out."""

    a_BRI: Any
    b_BRO: Any
    scale: float


class Site(nn.Module):
    """A place beside which there can be an adapter."""

    def __init__(self):
        super().__init__()
        self._adapter: Adapter | None = None  # that of the pass under way; the model hands it over (Model.hand)

    def beside(self, x, y):
        """Return y (B, T, O), with what the adapter makes of x (B, T, I) added if there is one."""
        if self._adapter is None:
            return y
        a_BRI, b_BRO, scale = self._adapter
        return mx.addmm(y, x @ mx.swapaxes(a_BRI, 1, 2), b_BRO, alpha=scale)


class Matrix(Site):
    """A weight (out, in) that multiplies what comes in, and can sum up second moments of that on the way."""

    def __init__(self):
        super().__init__()
        self._moment: Any = None  # the sum so far; only Engine.second_moments sets one

    @property
    def watched(self):
        """Whether second moments of what comes in are asked for."""
        return self._moment is not None

    def watch(self, x):
        """Add what comes in to the sum of second moments, if there is one."""
        if self.watched:
            rows = x.reshape(-1, x.shape[-1]).astype(self._moment.dtype)
            self._moment = self._moment + rows.T @ rows

    def product(self, x, weight=None):
        """Return x @ weight.T, with another weight in place of this one if it is given."""
        self.watch(x)
        return self.beside(x, ops.linear(x, self.weight if weight is None else weight))


class Linear(Matrix):
    """y = x @ weight.T."""

    def __init__(self, into, out):
        super().__init__()
        self.weight = mx.zeros((out, into))

    def __call__(self, x):
        return self.product(x)


class Output(Linear):
    """A projection back to the stream: its input may be normalised, without or with a gain per channel."""

    def __init__(self, into, config, exact, slices=1):
        super().__init__(into, slices * config.dim)
        self._norm, self._eps, self._exact = config.output_norm, config.norm_eps, exact
        if self._norm == "gain":
            self.gain = mx.zeros((into,))

    def entering(self, x):
        """Return what the weight multiplies."""
        if self._norm == "none":
            return x
        return ops.rms_norm(x, self._eps, self._exact, self.gain if self._norm == "gain" else None)

    def __call__(self, x):
        return super().__call__(self.entering(x))
