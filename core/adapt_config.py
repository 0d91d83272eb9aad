"""The settings of adaptation: the docstring under a field is its help text (import them from core/config.py)."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from core.checks import require, require_least, require_limits
from core.train_config import MOST_ROWS, MOST_TOKENS

LARGEST_COUNT = 2**31 - 1
SHARED = ("kind", "chunk", "steps", "lr", "decay", "clip", "schedule", "reset")
"""Settings that both kinds have."""
LORA = ("rank", "alpha", "sites", "layers", "rule", "warm_a", "documents", "order")
SGD = ("params", "frozen")
ADAMW = ("beta1", "beta2", "eps")


@dataclass(frozen=True)
class AdaptConfig:
    """How weights, or adapters beside them, learn from the targets that have been scored."""

    kind: Literal["none", "lora", "sgd"] = "none"
    """lora: every document has low-rank adapters of its own; sgd: the weights themselves, on chunks of the text."""
    rank: int = 8
    """Rank of an adapter (lora)."""
    alpha: float = 8.0
    """An adapter adds alpha / rank * B A x (lora)."""
    sites: tuple[str, ...] = ("q", "v", "head")
    """Matrices with an adapter beside them (lora): q, k, v, o, up, down, head, any other matrix by its name; or mixer
    and block_mlp, a map parallel to a whole mixer or MLP."""
    layers: tuple[int, ...] = ()
    """Layers whose sites have adapters (lora), from 0; none: all."""
    chunk: int = 64
    """Targets of a document that are scored before its adapters learn from them (lora); tokens of the text (sgd)."""
    steps: int = 1
    """Updates for each chunk (lora); passes over it (sgd)."""
    rule: Literal["adamw", "sgd"] = "adamw"
    """How adapters are updated (lora)."""
    lr: float = 0.001
    """Learning rate."""
    momentum: float = 0.9
    """Momentum of SGD."""
    beta1: float = 0.9
    """Decay of the mean gradient (adamw)."""
    beta2: float = 0.999
    """Decay of the mean squared gradient (adamw)."""
    eps: float = 1e-8
    """What is added to the root of the mean square (adamw)."""
    decay: float = 0.0
    """Decay of what learns: w *= 1 - lr * decay at each update."""
    clip: float = 0.0
    """Largest norm of the gradients, of a document's adapters (lora) or of all weights (sgd); 0: no limit."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over the chunks of the text. Adapters that are reset have none over their document's: it would
    know where the document ends before that is read."""
    warm_a: bool = False
    """A new document's adapters begin with the A that the last document of their row left in the round before (lora);
    B and the moments are always cleared."""
    reset: Literal["document", "never"] = "document"
    """document: every document begins with new adapters, or with the weights as they were; never: what was learned
    stays, and adapters are those of one stream of documents, in eval.adapt.documents=1 row."""
    documents: int = 64
    """Documents side by side, each with its own adapters (lora)."""
    order: Literal["text", "length"] = "text"
    """Order in which documents are scored (lora); length: longest first."""
    params: tuple[str, ...] = ()
    """Weights that learn (sgd): names, patterns (blocks.*.mixer.*) or scopes; none: all."""
    frozen: int = 0
    """First layers whose weights do not learn (sgd)."""

    def __post_init__(self) -> None:
        where = "eval.adapt"
        require_limits(where, self, LARGEST_COUNT, chunk=MOST_TOKENS, documents=MOST_ROWS, rank=4096, steps=1024)
        require_least(where, self, 1, "rank", "chunk", "steps", "documents")
        require_least(where, self, 0, "lr", "decay", "clip", "frozen")
        for name in ("alpha", "eps"):
            require(getattr(self, name) > 0, f"{where}.{name}={getattr(self, name)}: expected a number above 0")
        for name in ("momentum", "beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"{where}.{name}={getattr(self, name)}: expected from 0 to below 1")
        require(
            self.lr * self.decay < 1, f"{where}.decay={self.decay}: expected below 1 / {where}.lr, which is {self.lr}"
        )
        for name in ("sites", "layers", "params"):
            value = getattr(self, name)
            require(len(set(value)) == len(value), f"{where}.{name}={', '.join(map(str, value))}: one is named twice")
        self._check_uses(where)

    def _check_uses(self, where: str) -> None:
        """Raise ConfigError for a setting that changes nothing."""
        if self.kind == "none":
            _require_defaults(where, self, (), f"{where}.kind=none, nothing learns: leave it out, or set {where}.kind")
        elif self.kind == "sgd":
            used = (*SHARED, *SGD, "momentum")
            _require_defaults(where, self, used, f"{where}.kind=sgd: it is a setting of adapters; leave it out")
        else:
            used = (*SHARED, *LORA, *(ADAMW if self.rule == "adamw" else ("momentum",)))
            words = (
                f"{where}.kind=lora and {where}.rule={self.rule}: leave it out, or take the kind or rule that has it"
            )
            _require_defaults(where, self, used, words)
            require(bool(self.sites), f"{where}.sites: no site; name one, or take {where}.kind=none")
            require(
                min(self.layers, default=0) >= 0, f"{where}.layers={min(self.layers, default=0)}: expected from 0 up"
            )
            require(
                self.reset == "document" or self.documents == 1,
                f"{where}.reset=never with {where}.documents={self.documents}: adapters that are never reset see one "
                f"document after another; take {where}.documents=1",
            )
            require(
                self.reset == "never" or self.schedule == "constant",
                f"{where}.schedule=cosine with {where}.reset=document: the rate would know where the document ends "
                f"before that is read; take constant, or {where}.reset=never",
            )
            require(
                self.reset == "document" or not self.warm_a,
                f"{where}.warm_a=True with {where}.reset=never: A is kept anyway; leave one out",
            )


@dataclass(frozen=True)
class PhasesConfig:
    """Phases: at some shares of all documents the weights learn from every document that has been scored so far."""

    at: tuple[float, ...] = ()
    """Shares of all documents after which a phase comes, ascending, between 0 and 1."""
    lr: float = 0.001
    """Learning rate at the start of a phase, which falls to 0 along a cosine."""
    momentum: float = 0.9
    """Momentum of a phase's SGD, which begins with none."""
    chunk: int = 32768
    """Tokens of an update, in rows of eval.seq."""
    clip: float = 1.0
    """Largest norm of all gradients together; 0: no limit."""
    epochs: int = 1
    """Updates on each chunk of the scored documents in a phase, which goes through them once."""
    params: tuple[str, ...] = ()
    """Weights that learn: names, patterns or scopes, as in eval.adapt.params; none: all."""

    def __post_init__(self) -> None:
        where = "eval.phases"
        require_limits(where, self, LARGEST_COUNT, chunk=MOST_TOKENS, epochs=1024)
        require_least(where, self, 1, "chunk", "epochs")
        require_least(where, self, 0, "lr", "clip")
        require(0 <= self.momentum < 1, f"{where}.momentum={self.momentum}: expected from 0 to below 1")
        shares = ", ".join(map(str, self.at))
        inside = all(0 < share < 1 for share in self.at)
        ascending = all(a < b for a, b in zip(self.at, self.at[1:], strict=False))
        require(inside and ascending, f"{where}.at={shares}: expected shares between 0 and 1, ascending")
        require(
            len(set(self.params)) == len(self.params), f"{where}.params={', '.join(self.params)}: one is named twice"
        )
        if not self.at:
            _require_defaults(
                where, self, (), f"{where}.at empty, there are no phases: leave it out, or set {where}.at"
            )


def _require_defaults(where: str, config: Any, used: tuple[str, ...], words: str) -> None:
    """Raise ConfigError, with `words` behind what was given, for a setting that is not among `used` nor its default."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in used and value != field.default:
            shown = ", ".join(map(str, value)) if isinstance(value, tuple) else value
            require(False, f"{where}.{field.name}={shown} changes nothing with {words}")
