"""What drafts came to."""

from collections import Counter
from dataclasses import dataclass, field, fields
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
    """Forward passes that check drafts, those over prompts too."""
    draft_passes: int = 0
    """Forward passes of a twin that drafts."""
    turns: int = 0
    """Forward passes of both kinds in the cycles, counted for every text."""
    draft: float = 0.0
    verify: float = 0.0
    """Passes, until their logits are on the host."""
    commit: float = 0.0
    """Making states of what was kept."""
    rest: float = 0.0
    """Choosing tokens."""

    def add(self, other: "DraftStatistics") -> None:
        """Add what was written elsewhere."""
        for name in (one.name for one in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def add_pass(self, *times: float) -> None:
        """Add a pass: when drafting, passing, choosing and committing began, and when the last of them ended."""
        drafted, verified, chosen, committed = (b - a for a, b in zip(times, times[1:], strict=False))
        self.passes, self.draft, self.verify = self.passes + 1, self.draft + drafted, self.verify + verified
        self.rest, self.commit = self.rest + chosen, self.commit + committed

    def add_cycle(self, drafted: int, kept: int, passes: int = 1) -> None:
        """Add a cycle of one text, which took so many `passes`."""
        self.drafted, self.turns = self.drafted + drafted, self.turns + passes
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
    def tokens_per_cycle(self) -> float:
        """Return the tokens that a cycle gives."""
        return self.tokens / max(1, self.count)

    @property
    def tokens_per_pass(self) -> float:
        """Return a text's tokens per forward pass (TPF), a twin's passes counted like the model's."""
        return self.tokens / max(1, self.turns)

    @property
    def seconds(self) -> float:
        """Return the time that the passes took, those over prompts too, with the choice of tokens."""
        return self.draft + self.verify + self.commit + self.rest

    @property
    def tokens_per_second(self) -> float:
        """Return the tokens of all texts together in a second of that time."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def speed(self) -> str:
        """Return in words how fast texts were written."""
        return f"{self.tokens:,} tokens in {self.seconds:.1f} s, {self.tokens_per_second:,.0f} tokens/s"

    def line(self, draft: str) -> str:
        """Return in words what the drafts of `draft` came to."""
        empty = self.cycles[0] / max(1, self.count)
        passes = f", {self.tokens_per_pass:.2f} a forward pass" if self.draft_passes else ""
        words = f"{self.tokens_per_cycle:.2f} tokens a cycle{passes}"
        return f"{draft}: {words}, {empty:.0%} of {self.count:,} cycles kept no draft"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; times in milliseconds per pass."""
        cycles, passes = max(1, self.count), max(1, self.passes)
        times = {name: 1e3 * getattr(self, name) / passes for name in ("draft", "verify", "commit", "rest")}
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "cycles": self.count,
            "passes": self.passes,
            "draft_passes": self.draft_passes,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "accepted_per_cycle": self.accepted / cycles,
            "tokens_per_cycle": self.tokens_per_cycle,
            "tpf": self.tokens_per_pass,
            "empty": self.cycles[0] / cycles,
            "by_accepted": {str(kept): self.cycles[kept] for kept in sorted(self.cycles)},
            "ms": times,
        }
