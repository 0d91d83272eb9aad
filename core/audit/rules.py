"""The rules of the challenge that software can check (docs/challenge.md, 6), and the finding of a check."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Progress = Callable[[int, int], None]
"""Called with (done, in all), in tokens of a text, while a check goes on."""
Verdict = Literal["PASS", "FAIL", "NOT CHECKED"]
RULES = {
    "D1": "code and compressed model within 16,000,000 bytes",
    "D2": "training, access to its data included, within 600 s",
    "D3": "evaluation within 600 s, from before decompression and compilation",
    "D4": "evaluation offline, without training data",
    "D5": "the full validation set, every target once",
    "D6": "no validation text in the training text",
    "D7": "C1: a prediction depends on the artifact and on earlier tokens only",
    "D8": "C2: a full, normalised distribution over the vocabulary",
    "D9": "C3: a score is fixed before anything learns from its target",
    "D10": "C4: a single pass, no re-scoring, no choice among passes",
    "D11": "no two-pass rescoring, logit bias, per-sample optimisation on scored text, or tuning before scoring",
    "D12": "caches are causal, normalised, and updated after scoring",
    "D13": "the bytes that the score is divided by are those of the text",
    "D14": "tokens can be turned back into the text",
    "D15": "beats the reference by 0.005 nats at p < 0.01, over all seeds",
    "D16": "one configuration for all seeds, and figures that follow from the logs",
    "D17": "no brute force over seeds, no hidden computing",
    "D18": "packages, not capabilities: what was imported and executed",
}
"""Rule -> what it asks for."""


class Finding(NamedTuple):
    """What an audit says about one rule."""

    rule: str
    """Key of RULES."""
    verdict: Verdict
    evidence: str
    """What was measured, in a sentence or two that a reader can check."""
    details: dict[str, Any] = {}
    """The figures behind the evidence, plain JSON values."""

    def to_json(self) -> dict[str, Any]:
        """Return the finding, with what its rule asks for, as plain JSON values."""
        return {**self._asdict(), "asks": RULES[self.rule]}
