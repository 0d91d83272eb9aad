"""Verb `skc bench PRESET`: training speed."""

from dataclasses import dataclass

from core import presets
from core.check.bench import run_bench
from core.verbs.common import Context, Outcome, PresetOptions


@dataclass(frozen=True)
class Bench(PresetOptions):
    """Options of `skc bench`."""

    against: str | None = None
    """Another preset, timed in the same rounds on as many tokens a step: reports the ratio of their times."""
    variants: tuple[str, ...] = ()
    """cuda, cuda-compiled, mlx, mlx-reference-blas; none: what this machine can run."""
    rounds: int = 5
    """Interleaved rounds; the median is reported."""
    seconds: float = 5.0
    """Time that one round of one variant takes at least."""
    threads: int = 1
    """CPU threads of each variant."""
    ranks: int = 1
    """Time what one of so many ranks does of a step: its rows, its part of the update; nothing is sent."""


def bench(options: Bench, context: Context) -> Outcome:
    """Measure training speed."""
    report = run_bench(
        options.config(),
        against=None if options.against is None else presets.get(options.against).config,
        variants=list(options.variants) or None,
        rounds=options.rounds,
        seconds=options.seconds,
        threads=options.threads,
        ranks=options.ranks,
        report=context.say,
    )
    for line in report.lines():
        context.say(line)
    return Outcome(True, report.to_json())
