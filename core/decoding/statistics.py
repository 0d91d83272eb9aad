"""What drafts came to."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class DraftStatistics:
    """Counts of what was written, and where the time went, in seconds.

    A cycle is a pass after which a text has more tokens; one pass serves several texts. All of a cycle's tokens but
    the last one were drafted.
    """

    cycles: Counter[int] = field(default_factory=Counter)
    """Cycles by the number of drafts that were kept."""
    drafted: int = 0
    passes: int = 0
    """Forward passes, those over prompts too."""
    draft: float = 0.0
    verify: float = 0.0
    """Passes, until their logits are on the host."""
    commit: float = 0.0
    """Making states of what was kept."""
    rest: float = 0.0
    """Choosing tokens."""

    def add_pass(self, *times: float) -> None:
        """Add a pass: when drafting, passing, choosing and committing began, and when the last of them ended."""
        drafted, verified, chosen, committed = (b - a for a, b in zip(times, times[1:], strict=False))
        self.passes, self.draft, self.verify = self.passes + 1, self.draft + drafted, self.verify + verified
        self.rest, self.commit = self.rest + chosen, self.commit + committed

    def add_cycle(self, drafted: int, kept: int) -> None:
        """Add a cycle of one text."""
        self.drafted += drafted
        self.cycles[kept] += 1

    @property
    def count(self) -> int:
        """Return the number of cycles."""
        return self.cycles.total()

    @property
    def accepted(self) -> int:
        """Return the number of drafts that were kept."""
        return sum(kept * count for kept, count in self.cycles.items())

    @property
    def tokens(self) -> int:
        """Return the number of tokens that were said, the ends of texts included."""
        return self.accepted + self.count

    @property
    def tokens_per_pass(self) -> float:
        """Return tokens per cycle: a text's tokens per forward pass (TPF), as no drafter runs a model."""
        return self.tokens / max(1, self.count)

    def line(self, draft: str) -> str:
        """Return in words what the drafts of `draft` came to."""
        empty = self.cycles[0] / max(1, self.count)
        return f"{draft}: {self.tokens_per_pass:.2f} tokens a cycle, {empty:.0%} of {self.count:,} cycles kept no draft"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; times in milliseconds per pass."""
        cycles, passes = max(1, self.count), max(1, self.passes)
        times = {name: 1e3 * getattr(self, name) / passes for name in ("draft", "verify", "commit", "rest")}
        return {
            "tokens": self.tokens,
            "cycles": self.count,
            "passes": self.passes,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "accepted_per_cycle": self.accepted / cycles,
            "tokens_per_cycle": self.tokens_per_pass,
            "tpf": self.tokens_per_pass,
            "empty": self.cycles[0] / cycles,
            "by_accepted": {str(kept): self.cycles[kept] for kept in sorted(self.cycles)},
            "ms": times,
        }
