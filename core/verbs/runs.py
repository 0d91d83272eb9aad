"""Verbs `skc runs [FOLDER]` and `skc runs rm PATH ...`: which runs there are, which is best, and away with some."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tyro.conf import Positional

from core.console import Console, duration
from core.runs.board import Boards, leaderboards
from core.runs.listing import Order, chosen_rows, in_order, list_runs
from core.runs.removing import check_removals, remove
from core.runs.row import RunRow, RunState
from core.verbs.common import Context, Outcome
from core.verbs.errors import UsageError

HEAD = (
    "run",
    "preset or variant",
    "seed",
    "backend",
    "parameters",
    "state",
    "bits per byte",
    "bytes",
    "tokens/s",
    "age",
)
BEST = 10
"""Runs of a board that are shown; --json has all of them."""
DAY = 86_400


@dataclass(frozen=True)
class Runs:
    """Options of `skc runs`."""

    folder: Positional[str] = "runs"
    """What is looked through: three folders deep, without links."""
    sort: Order = "age"
    """The best first: youngest, lowest score, fewest bytes with code, fastest, first by name."""
    reverse: bool = False
    """The other way round; runs without the figure stay last."""
    preset: str | None = None
    """Only runs of this preset."""
    backend: str | None = None
    """Only runs of this backend: mlx or cuda."""
    state: RunState | None = None
    """Only runs in this state; resumable: a checkpoint is there; begun: none yet; failed: in an ablation."""
    members: bool = False
    """Every run of an ablation too, not only the ablation by its best one."""
    board: bool = False
    """The best runs by budget, --members included: only scores of the same text, made in the same way, together."""
    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""


@dataclass(frozen=True)
class RemoveRuns:
    """Options of `skc runs rm`."""

    paths: Positional[tuple[str, ...]]
    """Run folders and stores of ablations; all are checked before any is removed."""
    yes: bool = False
    """Do not ask."""
    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""


def show_runs(options: Runs, context: Context) -> Outcome:
    """List the runs and ablations of a folder, or its leaderboards."""
    say = context.say
    rows = list_runs(options.folder, members=options.members or options.board)
    rows = in_order(chosen_rows(rows, options.preset, options.backend, options.state), options.sort, options.reverse)
    if options.board:
        return _show_boards(leaderboards(rows), options.folder, say)
    if rows:
        now = time.time()
        say.table(HEAD, [_cells(row, now) for row in rows])
        for row in rows:
            if row.problem:
                say(f"{row.path}: {row.state}: {row.problem}")
    else:
        say(f"{options.folder}: no runs{' of that kind' if options != Runs(options.folder, json=options.json) else ''}")
    return Outcome(True, {"folder": options.folder, "rows": [row.to_json() for row in rows]})


def remove_runs(options: RemoveRuns, context: Context) -> Outcome:
    """Remove runs and stores, once somebody has said yes."""
    say = context.say
    if not options.paths:
        raise UsageError("name one or more run folders or stores: skc runs rm PATH")
    removals = check_removals(options.paths)
    for removal in removals:
        beside = f", with what training did not write: {', '.join(removal.others)}" if removal.others else ""
        say(f"{removal.path}: {removal.what}, {removal.files:,} files, {removal.bytes:,} bytes{beside}")
    if not options.yes:
        if not sys.stdin.isatty():
            raise UsageError("nobody to ask, as standard input is no terminal: add --yes to remove them")
        say(f"remove {'them' if len(removals) > 1 else 'it'} for good? [y/N] ", end="")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            say("nothing was removed")
            return Outcome(True, {"removed": []})
    for removal in removals:
        remove(removal)
    say(f"removed {len(removals)}")
    return Outcome(True, {"removed": [str(removal.path) for removal in removals]})


def _show_boards(found: Boards, folder: str, say: Console) -> Outcome:
    now = time.time()
    for board in found.boards:
        say(f"budget {board.words()}:")
        say.table(("place", *HEAD), [(i, *_cells(row, now)) for i, row in enumerate(board.rows[:BEST], 1)])
        if len(board.rows) > BEST:
            say(f"and {len(board.rows) - BEST:,} more")
        say()
    if not found.boards:
        say(f"{folder}: no finished runs within their budget")
    for why in dict.fromkeys(why for _, why in found.left_out):
        say(f"left out: {sum(of == why for _, of in found.left_out):,} runs: {why}")
    boards = [{**board._asdict(), "rows": [row.to_json() for row in board.rows]} for board in found.boards]
    left_out = [{"path": row.path, "why": why} for row, why in found.left_out]
    return Outcome(True, {"folder": folder, "boards": boards, "left_out": left_out})


def _cells(row: RunRow, now: float) -> Sequence[object]:
    """Return a row as the cells of the table."""
    spread = f" ± {row.error:.4f}" if row.error else ""
    mark = " (estimate)" if row.label == "estimate" else ""
    size = "-"
    if row.total is not None:
        size = f"{row.total:,}" + ("" if row.within else " OVER")
    return (
        row.path,
        row.variant or row.preset or "-",
        "-" if row.seed is None else str(row.seed),
        row.backend or "-",
        "-" if row.parameters is None else f"{row.parameters:,}",
        _state(row),
        "-" if row.bpb is None else f"{row.bpb:.4f}{spread}{mark}",
        size,
        "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        _age(now - row.changed) if row.changed else "-",
    )


def _state(row: RunRow) -> str:
    if row.kind == "ablation":
        return f"{row.state}, {row.done} of {row.runs} runs"
    return f"{row.state} at step {row.step:,}" if row.state in ("resumable", "running") and row.step else row.state


def _age(seconds: float) -> str:
    return duration(seconds) if seconds < 2 * DAY else f"{seconds / DAY:.0f} days"
