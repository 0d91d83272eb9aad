"""What the layers of one forward pass share, and the state that goes on to the next: a backend's arrays.

B rows, T positions, S kept keys, G key/value heads, K channels of a head, D width of the stream, C mixer channels; of
a store of capsules: H heads, N capsules, M blocks, Q tokens of a block; of the delta rule: H heads, V channels of a
value.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from core.model.table import TAPS


class Constants(NamedTuple):
    """Tables that the host makes: of the row's positions, and of the mixers."""

    cos: Any  # (T, rope_dims / 2), or by row (B, 1, T, rope_dims / 2)
    sin: Any
    hadamard: Any  # (C, C), Sylvester order
    walsh: Any  # (Q, Q), sequency order, Q tokens per capsule block
    signs: Any  # (X, X) of 1 and -1, Sylvester order, X channels of the widest capsules that look ahead
    position: Any = None  # (B,) int: tokens before the first of each row; None: the rows begin here


class AttentionState(NamedTuple):
    """What the next token needs of those before it."""

    k: Any  # (B, G, S, K), rotated
    v: Any  # (B, G, S, K)
    tail: Any  # (B, TAPS - 1, D): what entered last, 0 where it was another document; in a tape (B, TAPS - 1 + T, D)


class KoopmanState(NamedTuple):
    """What the next token needs of those before it."""

    tail: Any  # (B, TAPS - 1, C): the last values that are in the current document, else 0
    last: Any  # (B, C): the recurrence, float32 or wider


class KoopmanTape(NamedTuple):
    """What the state after any token of a chunk is made of."""

    values: Any  # (B, TAPS - 1 + T, C)
    states: Any  # (B, T, C)
    before: Any  # (B, C): the recurrence before the chunk


class DeltaState(NamedTuple):
    """What the next token needs of those before it; X channels of queries, keys and values together."""

    tail: Any  # (B, TAPS - 1, X): what entered last, 0 where it was another document; None: no convolution
    last: Any  # (B, H, K, V): the matrix of every head, float32 or wider


class DeltaTape(NamedTuple):
    """What the state after any token of a chunk is made of: the factors of the tokens, no state of theirs."""

    tail: Any  # (B, TAPS - 1 + T, X)
    keys: Any  # (B, T, G, K)
    written: Any  # (B, T, H, V): d, what each token writes under its key
    decay: Any  # (B, T, H): the logarithm of each token's decay
    before: Any  # (B, H, K, V): the matrices before the chunk


class CapsuleState(NamedTuple):
    """What the next token needs of those before it; float32 or wider."""

    stored: Any  # (B, H, N, K): the capsules, as completed blocks left them
    sums: Any  # (B, H, N, K): of the open block, weighted over time
    plain: Any  # (B, H, N, K): of the open block, not weighted; None without an intra-block read
    mass: Any  # (B, H, N): what was routed in the open block
    key: Any  # (B, H, N): the last token's own routing; None without a shift


class CapsuleTape(NamedTuple):
    """What the state after any token of a chunk is made of. M blocks, Q tokens in each."""

    before: CapsuleState
    keys: Any  # (B, T, H, N), not shifted
    writes: Any  # (B, M, H, Q, N)
    values: Any  # (B, M, H, Q, K)
    template: Any  # (Q, N)
    stored: Any  # (B, M, H, N, K), after each block


class Blocks(NamedTuple):
    """Where the tokens of a chunk stand in blocks of Q tokens: the same in every store of capsules."""

    phase: Any  # (B,): tokens of the first block that came before the chunk; None, like the next three: rows begin here
    token: Any  # (B, M * Q): the token at each place, any where there is none
    place: Any  # (B, T): the place of each token
    inside: Any  # (B, M, 1, Q, 1) bool: there is a token
    documents: Any  # (B, M, Q)
    fresh: Any  # (B, M, Q): no document has begun in the block up to here
    live: Any  # (B, M, 1, Q, 1) bool: in the document that is open when the block ends


class Training(NamedTuple):
    """What the forward pass of a training step has beside tokens."""

    auxiliary: frozenset[str] = frozenset()  # the auxiliary losses that parts put into the stream, by name
    route: bool = True  # whether tokens are sent to experts
    kept: Any = None  # by a layer's label (2, B): factors of its mixer and its MLP in every row; None: they stay
    untied: Any = None  # (): share u with which an untied head's own table counts; None: 1


class Draft(NamedTuple):
    """What a twin's pass has beside tokens, of which -1 is a mask (core/twin)."""

    mask: Any  # (E,): a mask's vector
    rule: str = "causal"  # what recurrent mixers read in the block: TwinConfig.rule
    open: bool = False  # attention sees the whole block
    mixed: Any = None  # a dict that collects what mixers put out, by a pass' label; None: nobody asks


class Kept(NamedTuple):
    """The first n tokens of each row, which a commit keeps."""

    last: Any  # (B, 1) int: the document of the last
    tail: Any  # the last TAPS - 1 positions (ops.ends)
    keys: Any = None  # (B, S) int: which keys are kept
    full: Any = None  # (B,): blocks that are full
    open: Any = None  # (B,): the block that is not
    live: Any = None  # (B, 1, Q, 1) bool: tokens of it in the last document
    fresh: Any = None  # (B, 1, 1, 1) bool: no document has begun in it
    first: Any = None  # (B, 1, 1) bool: and it was open before the chunk


class SKCState(NamedTuple):
    """What the next token needs of those before it."""

    koopman: Any  # KoopmanState
    capsules: Any  # CapsuleState, or None: empty


class SKCTape(NamedTuple):
    """What the state after any token of a chunk is made of."""

    koopman: Any  # KoopmanTape
    capsules: Any  # CapsuleTape


class Stream(NamedTuple):
    """What one stage passes on to the next."""

    x: Any  # (B, T, D): the residual stream; inside a layer what enters its mixer or MLP, and what that puts out
    raw: Any  # (B, T, D): the tokens' own vectors
    values: Any  # (B, T, D): the same, normalised
    embedded: Any  # (B, T, D): what entered the first layer
    skips: tuple = ()  # what layers put out that others will add
    to_values: Any = ()  # layer -> (B, T, G * K): what its attention adds to its values, of the layers that do
    lane: Any = None  # (B, T, D): of two lanes the one that MLPs read, x is the other; None: there is one
    branches: tuple = ()  # in lanes: what a layer's mixer and its MLP add, (B, T, D) each
    entered: Any = None  # (B, T, D): what the first pass of repeated layers was given; None: no feedback
    auxiliary: tuple = ()  # (name, (B,)) of every auxiliary loss so far: one number per row, wide
    routes: tuple = ()  # (B, T, k) int of every pass through experts so far: to which each token was sent, best first


class ModelState(NamedTuple):
    """What the next token needs of those before it, all stages together."""

    kept: Any  # (B, S) int32: 0 for a kept key of the current document, -1 for another's; None: no attention
    ids: Any  # (B, P): the last tokens, -1 where there is none in the current document; P: as far as n-grams reach
    parts: tuple  # one state per stage; None: nothing yet, or a part that keeps nothing


class Context(NamedTuple):
    """What every layer of one forward pass shares."""

    cos: Any  # (T, rope_dims / 2), or by row (B, 1, T, rope_dims / 2)
    sin: Any
    mask: Any  # which keys a query sees, or None: plain causal; CUDA: or where its document begins
    documents: Any  # (B, T) int32, 0: the document that was open before the first token
    history: Any  # (B, TAPS - 1 + T): the same, with the positions before in front
    starts: Any  # (B, T) bool: where a document begins and recurrences start anew
    hadamard: Any
    walsh: Any
    signs: Any
    position: Any  # (B,): tokens before the first; None: the rows begin here
    ids: Any  # (B, P + T): tokens, with those before in front
    wide: Any  # type of recurrent states: float32 or wider
    blocks: Any = None  # Blocks, or None: no capsules
    kept: Any = None  # Kept, when the chunk is committed
    attend: Any = None  # the form of attention that was chosen at build; MLX: one to train, one to score
    alone: Any = None  # (B, T) bool: tokens that see no other; None: no attention leaves out its own value
    training: Any = None  # Training, or None: not a step's forward pass
    draft: Any = None  # Draft, or None: not a twin's pass

    @property
    def continues(self):
        """Which tokens go on with the document of the token before them, (B, T) bool."""
        return self.history[:, TAPS - 2 : -1] == self.documents

    def last_ids(self, before):
        """Return tokens and documents with `before` positions in front: (B, before + T) each."""
        extra = self.ids.shape[1] - self.documents.shape[1] - before
        return self.ids[:, extra:], self.history[:, TAPS - 1 - before :]


def each_array(state: Any, change: Callable[[Any], Any]) -> Any:
    """Return a state with every array of it changed."""
    if not isinstance(state, tuple):
        return None if state is None else change(state)
    parts = [each_array(part, change) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def joined_rows(states: list[Any], join: Callable[[list], Any]) -> Any:
    """Return one state of the rows of several, whose arrays `join` puts together."""
    if not isinstance(states[0], tuple):
        return None if states[0] is None else join(states)
    parts = [joined_rows(list(part), join) for part in zip(*states, strict=True)]
    return type(states[0])(*parts) if hasattr(states[0], "_fields") else tuple(parts)
