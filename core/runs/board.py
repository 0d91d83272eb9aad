"""The leaderboard: by budget, and within a budget by what may be held against each other at all."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from core.runs.row import RunRow


class Board(NamedTuple):
    """Finished runs within one budget whose figures were made in the same way of the same text."""

    budget: int
    label: str
    """`score`, or `estimate`."""
    byte_rule: str
    windows: str
    documents: int
    targets: int
    data: str
    """Hash of the text."""
    rows: tuple[RunRow, ...]
    """The best first."""

    def words(self) -> str:
        """Return in a line what its figures are."""
        text = f"{self.documents:,} documents, {self.targets:,} tokens of text {self.data[:8]}"
        return f"{self.budget:,} bytes; {self.label} by byte rule {self.byte_rule}, windows {self.windows}; {text}"


class Boards(NamedTuple):
    """All boards, the smallest budget first, and the runs that stand on none."""

    boards: tuple[Board, ...]
    left_out: tuple[tuple[RunRow, str], ...]
    """Finished runs, and why they are on no board."""


def leaderboards(rows: Sequence[RunRow]) -> Boards:
    """Return the boards of the finished runs among `rows`."""
    groups: dict[tuple[Any, ...], list[RunRow]] = {}
    left_out = []
    for row in rows:
        if row.kind != "run" or row.state != "finished":
            continue
        how = (row.label, row.byte_rule, row.windows, row.documents, row.targets, row.data)
        if not row.within:
            left_out.append((row, f"over its budget of {row.budget or 0:,} bytes"))
        elif row.bpb is None or None in how:
            left_out.append((row, "does not say on what text it was scored, or how"))
        else:
            groups.setdefault((row.budget, *how), []).append(row)
    boards = [Board._make((*how, tuple(sorted(of, key=lambda r: (r.bpb, r.path))))) for how, of in groups.items()]
    order = sorted(boards, key=lambda board: (board.budget, board.label != "score", board.data, *map(str, board[2:6])))
    return Boards(tuple(order), tuple(left_out))
