"""What the layers of one forward pass share, and the state that goes on to the next: a backend's arrays."""

from typing import Any, NamedTuple

from core.model_config import TAPS


class Constants(NamedTuple):
    """Tables that the host makes: of the row's positions, and of the mixers."""

    cos: Any  # (T, rope_dims / 2)
    sin: Any
    hadamard: Any  # (C, C), Sylvester order
    walsh: Any  # (Q, Q), sequency order, Q tokens per capsule block


class ModelState(NamedTuple):
    """What the next token needs of those before it, all layers together."""

    position: int  # tokens before it
    kept: Any  # (B, S) int32: 0 for a kept key of the current document, -1 for another's; None: no attention
    mixers: tuple  # one state per pass; None: nothing yet
    banks: tuple  # one state per place of the bank
    ids: Any  # (B, P): the last tokens, -1 where there is none in the current document; P: as far as n-grams reach
    smeared: Any  # (B, 1, D): the last token's embedding, before it was mixed; None: nothing yet


class Context(NamedTuple):
    """What every layer of one forward pass shares."""

    cos: Any  # (T, rope_dims / 2)
    sin: Any
    mask: Any  # which keys a query sees, or None: plain causal
    documents: Any  # (B, T) int32, 0: the document that was open before the first token
    history: Any  # (B, TAPS - 1 + T): the same, with the positions before in front
    starts: Any  # (B, T) bool: where a document begins and recurrences start anew
    hadamard: Any
    walsh: Any
    position: int  # tokens before the first
    kept: int  # keys before the first
    ids: Any  # (B, P + T): tokens, with those before in front
    wide: Any  # type of recurrent states: float32 or wider
    keep: int = 0  # keys to keep when the chunk is committed

    def last_ids(self, before):
        """Return tokens and documents with `before` positions in front: (B, before + T) each."""
        extra = self.ids.shape[1] - self.documents.shape[1] - before
        return self.ids[:, extra:], self.history[:, TAPS - 1 - before :]
