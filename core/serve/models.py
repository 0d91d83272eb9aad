"""A model that is served: its engine behind turns, its tokenizer, and what of it can be set to 0."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from core.config import ModelConfig, RunConfig
from core.data.tokenizer import Tokenizer
from core.decoding.generate import context_limit
from core.engine.protocol import Arrays, Engine
from core.model.params import param_table
from core.serve.guards import Refused
from core.serve.shared_engine import SharedDrafter, SharedEngine

OUTPUTS = {"bank": r"bank_\w+\.gate", "engram": r"engram\.value\.weight", "capsules": r".*\.capsule_gain"}
"""Of each part the weights that its output is a product with: while these are 0, the output is 0."""


class Served:
    """A model that is served under a name."""

    def __init__(self, name: str, what: str, config: RunConfig, tokenizer: Tokenizer, engine: SharedEngine) -> None:
        self.name, self.what, self.config, self.tokenizer, self.engine = name, what, config, tokenizer, engine
        self.limit = context_limit(config)
        self.parts = tuple(part for part in OUTPUTS if outputs(config.model, part))
        self.bytes: int | None = None
        """Of its artifact, where there is one."""
        self.score: float | None = None
        """Bits per byte of its validation text, where that was measured."""
        self.label: str | None = None
        """Whether that is a score or an estimate."""
        self.build: Callable[[Arrays], Engine] | None = None
        """Builds another engine of the same settings, of weights that are used as they are."""
        self.twin: SharedDrafter | None = None
        self._silent: dict[str, SharedEngine] = {}

    def to_json(self) -> dict[str, Any]:
        """Return what a page has to know of the model."""
        return {
            "name": self.name,
            "what": self.what,
            "backend": f"{self.engine.backend}, {self.engine.device}, {self.engine.dtype}",
            "parameters": sum(row.size for row in param_table(self.config.model).values()),
            "bytes": self.bytes,
            "vocab": self.config.model.vocab,
            "parts": list(self.parts),
            "limit": self.limit,
            "score": self.score,
            "label": self.label,
            "drafts": ["none", "ngram", "jacobi", *(["twin"] if self.twin else [])],
        }

    def without(self, part: str) -> SharedEngine:
        """Return an engine of the same model in which the output of `part` is 0; Refused if the model has none.

        It is built when it is first asked for, of the weights as forward passes use them, and kept.
        """
        if part not in self.parts:
            known = ", ".join(self.parts) or "none"
            raise Refused(
                400, f"without: {self.name} has no {part} whose output could be 0; it has: {known}", "without"
            )
        return self.engine.turn(self._without, part)

    def _without(self, part: str) -> SharedEngine:
        if part not in self._silent:
            assert self.build is not None
            weights = silenced(self.config.model, self.engine.own.weights(), part)
            self._silent[part] = SharedEngine(self.build(weights), self.engine.thread)
        return self._silent[part]


def outputs(config: ModelConfig, part: str) -> list[str]:
    """Return the names of the weights that the output of a part is a product with, wherever it stands."""
    return [name for name in param_table(config) if re.fullmatch(OUTPUTS[part], name)]


def silenced(config: ModelConfig, weights: Arrays, part: str) -> Arrays:
    """Return weights with which the output of a part is 0."""
    return weights | {name: np.zeros_like(weights[name]) for name in outputs(config, part)}


def find_model(models: Sequence[Served], name: str) -> Served:
    """Return the model of a name; Refused."""
    for model in models:
        if model.name == name:
            return model
    raise Refused(404, f"model {name[:100]!r}: expected one of: {', '.join(m.name for m in models)}", "model")
