"""How a model is to write: its candidates, its draws and its drafts."""

from dataclasses import dataclass
from typing import Literal, get_args

from core.checks import in_words
from core.config import require

Draft = Literal["none", "ngram", "jacobi", "twin"]
Sampler = Literal["coupled", "gumbel", "speculative"]
MOST_BLOCK = 64
"""Tokens of a block: a pass over more costs more than drafts can save."""


@dataclass(frozen=True)
class Decoding:
    """What decides which tokens follow a prompt, beside the model."""

    tokens: int = 128
    """Most tokens of a text."""
    temperature: float = 0.8
    """0: always the likeliest token."""
    top_k: int | None = 40
    """Candidates per token; None: all."""
    top_p: float = 1.0
    """Of these the likeliest that have this share of the probability together."""
    seed: int = 0
    """Seed of the draws."""
    sampler: Sampler = "coupled"
    """How a token is drawn; see core/decoding/samplers.py."""
    draft: Draft = "none"
    """Who drafts."""
    block: int = 8
    """Tokens of a pass that checks drafts: the last token and block - 1 drafts."""

    def check(self) -> None:
        """Raise ConfigError for what no model can do."""
        require(self.tokens >= 1, f"tokens={self.tokens}: expected at least 1")
        require(self.temperature >= 0, f"temperature={self.temperature}: expected 0 or more")
        require(self.top_k is None or self.top_k >= 1, f"top_k={self.top_k}: expected at least 1, or None")
        require(0 < self.top_p <= 1, f"top_p={self.top_p}: expected more than 0, at most 1")
        block = f"block={self.block}: expected 2 to {MOST_BLOCK}, the last token and drafts"
        require(2 <= self.block <= MOST_BLOCK, block)
        for name, value, known in (("sampler", self.sampler, Sampler), ("draft", self.draft, Draft)):
            kinds = get_args(known)
            require(value in kinds, f"{name}={in_words(value)}: expected one of {', '.join(kinds)}")
