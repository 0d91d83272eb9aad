"""Verb `skc compare RUN RUN ...`: runs held against the first of them."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from core.compare.pair import By
from core.compare.runs import compare, comparison_table, lines, write_comparison
from core.verbs.common import Context, Outcome


@dataclass(frozen=True)
class Compare:
    """Options of `skc compare`."""

    runs: Positional[tuple[str, ...]]
    """Run folders; the first is what the others are held against. Of a run trained elsewhere, config.json, env.json
    and metrics.jsonl are enough."""
    out: str = "runs/compare"
    """Folder for compare.md and compare.png."""
    by: By = "auto"
    """What curves are aligned by: step, tokens, share of the schedule; auto: step if steps are alike, else tokens."""
    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""


def compare_runs(options: Compare, context: Context) -> Outcome:
    """Hold runs against the first of them: data, settings, machine, where the curves part, scores, bytes, speed."""
    comparison, runs = compare(list(options.runs), options.by)
    context.say.table(*comparison_table(comparison))
    context.say()
    for line in lines(comparison):
        context.say(line)
    written = write_comparison(comparison, runs, Path(options.out))
    for path in written:
        context.say(f"wrote {path}")
    return Outcome(True, {**comparison.to_json(), "files": [str(path) for path in written]})
