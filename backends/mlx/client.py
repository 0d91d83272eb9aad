"""The model as mlx-lm loads it: `skc export --format mlx-lm` makes a folder's modelling file of this.

Nothing of ours imports this file. It is put behind all that it needs of ours, into one module that imports none.
"""

import dataclasses
import inspect
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from backends.mlx import ops
from backends.mlx.attention import Forms
from backends.mlx.model import Model as Trunk
from core.model.client import model_of_spec
from core.model.context import Constants
from core.model.tables import mixer_tables, rope_tables


@dataclasses.dataclass
class ModelArgs:
    """What config.json says: `spec` holds the settings of the model."""

    model_type: str
    spec: dict[str, Any]

    @classmethod
    def from_dict(cls, values):
        """Return the fields out of all that config.json holds."""
        return cls(**{name: value for name, value in values.items() if name in inspect.signature(cls).parameters})


class TextState:
    """A place in a text: mlx-lm's only cache of this model, which every pass moves on."""

    def __init__(self, model, position):
        self.model, self.position = model, position

    @property
    def state(self):
        """All arrays, for whoever waits for them."""
        return [array for _, array in tree_flatten(self.model) if isinstance(array, mx.array)]

    @property
    def nbytes(self):
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.state)

    @property
    def offset(self):
        """Tokens so far."""
        return self.position

    def size(self):
        """Return the tokens so far."""
        return self.position

    def empty(self):
        """Return whether nothing has been read."""
        return self.position == 0

    def is_trimmable(self):
        """Return False: a state cannot forget its last tokens."""
        return False


class Model(nn.Module):
    """Tokens to logits. A BOS token begins a document, which sees nothing of what came before it."""

    def __init__(self, args):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self._settings = model_of_spec(args.spec)
        self.model = Trunk(self._settings, False, Forms(ops.attention, ops.attention, ""))
        self._mixing = [mx.array(table, mx.float32) for table in mixer_tables(self._settings)]

    def __call__(self, inputs, cache=None):
        """Return logits (B, T, V), float32; with a cache the texts go on from it, and it moves on with them."""
        tokens = inputs.astype(mx.int32)
        if cache is None:
            return self.model(tokens, self.constants(tokens.shape[1]), mx.float32)[0]
        text, (rows, seq) = cache[0], tokens.shape
        state = self.model.start(rows) if text.model is None else text.model
        constants = self.constants(seq, np.full(rows, text.position))
        logits, tape = self.model(tokens, constants, mx.float32, state=state)
        keep = 0 if state.kept is None else state.kept.shape[1] + seq
        text.model = self.model.commit(tape, mx.full((rows,), seq, mx.int32), keep)
        text.position += seq
        return logits

    def constants(self, seq, position=None):
        """Return the tables of rows from `position` (B,) on; None: from 0."""
        own, attends = self._settings.attention, self._settings.mixes("attention")
        tables = rope_tables(seq, own.rope_dims if attends else 0, own.rope_base, position)
        made = Constants(*(mx.array(table, mx.float32) for table in tables), *self._mixing)
        return made if position is None else made._replace(position=mx.array(position.astype(np.int32)))

    def make_cache(self):
        """Return the cache of a text of which nothing has been read."""
        return [TextState(None, 0)]

    def sanitize(self, weights):
        """Return the weights as float32, in which the model computes: the file has some of them in fewer bits."""
        return {name: weight.astype(mx.float32) for name, weight in weights.items()}

    @property
    def layers(self):
        """The blocks of weights."""
        return self.model.blocks
