"""What `skc bench` measured, as a table."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class BenchRow:
    """One variant's medians over the rounds."""

    variant: str
    device: str
    dtype: str
    ms_per_step: float
    spread: tuple[float, float]
    """Fastest and slowest round, in ms per step."""
    tokens_per_second: float
    update_ms: float
    """The optimizer update alone: clip, rules, averages, finiteness guard."""
    update_share: float
    """Median over the rounds of the update's share of a step of the same round."""
    update_spread: tuple[float, float]
    """Smallest and largest of these shares."""
    flops: float
    """Achieved model FLOP/s."""
    own_peak: float
    """FLOP/s of the variant's own large matmul in the same run."""
    peak_size: int
    """Rows and columns of that matmul."""
    share: float
    """Achieved FLOP/s over `reference_peak` of the report."""
    peak_bytes: float
    peak_of: str
    """What peak_bytes counts: `arrays` of the framework, or the whole `process` where only that can be known."""
    traces: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class PresetBench:
    """What was measured of one preset."""

    preset: str
    parameters: int
    batch: int
    seq: int
    vocab: int
    flops_per_token: int
    rows: tuple[BenchRow, ...]

    def lines(self) -> list[str]:
        """Return the table as text."""
        out = [
            f"{self.preset}: {self.parameters:,} parameters, B={self.batch} T={self.seq} V={self.vocab}, "
            f"{self.flops_per_token / 1e6:.2f} MFLOP/token",
            f"{'variant':<18} {'ms/step':>8} {'fastest..slowest':>16} {'tokens/s':>9} {'update':>9} {'of step':>7} "
            f"{'GFLOP/s':>8} {'of peak':>7} {'own peak':>8} {'memory':>8} {'traces':>6}",
        ]
        for r in self.rows:
            spread = f"{r.spread[0]:.0f}..{r.spread[1]:.0f}"
            out.append(
                f"{r.variant:<18} {r.ms_per_step:>8.1f} {spread:>16} {r.tokens_per_second:>9,.0f} "
                f"{r.update_ms:>7.1f}ms {r.update_share:>7.1%} {r.flops / 1e9:>8.1f} {r.share:>7.1%} "
                f"{r.own_peak / 1e9:>8.1f} {r.peak_bytes / 2**20:>5.0f}MiB {r.traces:>6.0f}"
            )
        for r in self.rows:
            low, high = r.update_spread
            out.append(
                f"{r.variant}: {r.device}, {r.dtype}; memory of the {r.peak_of}; update {low:.1%} to {high:.1%} of "
                "a step; " + "; ".join(r.notes)
            )
        return out


@dataclass(frozen=True)
class Ratio:
    """Time per step of a preset over another's, on one variant."""

    variant: str
    median: float
    """Median over the rounds; a round's ratio is that of two neighbours in time."""
    spread: tuple[float, float]
    """Smallest and largest ratio of a round."""
    cpu_median: float
    """The same of the processors' time, which other jobs on the machine disturb less; on a GPU: the host's work."""
    cpu_spread: tuple[float, float]


@dataclass(frozen=True)
class Against:
    """The other preset of a comparison, trained on as many rows and tokens a step."""

    other: PresetBench
    changed: tuple[str, ...]
    """Settings of the other preset that were replaced by the preset's, one line each."""
    ratios: tuple[Ratio, ...]


@dataclass(frozen=True)
class BenchReport(PresetBench):
    """What `run_bench` measured: of one preset, and of another one beside it."""

    threads: int
    rounds: int
    seconds: float
    """Time that one round of one variant takes at least; a slow variant runs one step."""
    flop_rule: str
    reference: str
    reference_peak: float
    ranks: int
    """Of so many ranks one was timed: its rows, its part of the update, nothing sent. 1: a whole step."""
    against: Against | None

    def to_json(self) -> dict:
        """Return plain JSON values."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """Return the tables as text."""
        size = next(row.peak_size for row in self.rows if row.variant == self.reference)
        out = [
            f"{self.threads} thread(s), medians of {self.rounds} interleaved rounds of {self.seconds:g} s",
            *([f"one rank of {self.ranks}: its rows and its part of the update, nothing is sent"] * (self.ranks > 1)),
            f"peak: ({size}, {size}) matmul of {self.reference}, {self.reference_peak / 1e9:.1f} GFLOP/s",
            "",
            *super().lines(),
        ]
        if self.against is None:
            return out
        other = self.against.other
        out += ["", *other.lines()]
        out += [f"{other.preset} was changed for this comparison: {line}" for line in self.against.changed]
        out.append("")
        for r in self.against.ratios:
            wall, cpu = (f"(rounds {low:.3f} to {high:.3f})" for low, high in (r.spread, r.cpu_spread))
            out.append(
                f"{r.variant}: a step of {self.preset} takes {r.median:.3f} times that of {other.preset} {wall}; "
                f"of processor time {r.cpu_median:.3f} times {cpu}"
            )
        return out
