"""What the user sees while a verb works: lines, one line of progress, tables, and one JSON object at the end."""

import io
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

PLAIN_EVERY = 10.0
"""Seconds between progress lines where the output is not a terminal."""
MESSAGE = 360
"""Letters of the longest message of an error."""
LINE = 10_000
"""Letters of the longest line that is shown: samples are long."""
CELL = 200
"""Letters of the longest entry of a table."""
ODD = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that steer a terminal or turn its text around, and those that no encoding has."""


def duration(seconds: float) -> str:
    """Return seconds as people read them: 45s, 3m20s, 2h05m."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole // 60 % 60:02d}m"


def one_line(message: object) -> str:
    """Return a message as one line that any terminal and file can have, at most MESSAGE letters long.

    White space is one space, of a long message the middle is left out: what it is about and what to do stay.
    """
    text = str(message)
    return shorten(printable(" ".join(shorten(text, 8 * MESSAGE).split())), MESSAGE, len(text))


def printable(text: str) -> str:
    """Return text whose control characters (escapes of a terminal among them) and lone surrogates are written out."""
    return ODD.sub(lambda match: _written_out(ord(match[0])), text)


def _written_out(code: int) -> str:
    """Return a character's code as Python writes it; of a byte that is no UTF-8 that byte."""
    code = code - 0xDC00 if 0xDC80 <= code < 0xDD00 else code
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def replace_odd(stream: object) -> None:
    """Let a stream show `?` for what its encoding lacks; in the C locale it would end the program otherwise."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
        stream.reconfigure(errors="replace")


def shorten(text: str, most: int, letters: int | None = None) -> str:
    """Return text of at most `most` letters, by leaving out its middle; it says how many `letters` there were."""
    if len(text) <= most:
        return text
    words = f" ... (cut: {letters or len(text):,} letters) ... "
    tail = (most - len(words)) // 3
    return f"{text[: most - len(words) - tail]}{words}{text[len(text) - tail :]}"


class Console:
    """Lines for people: on stdout, or on stderr when stdout carries the JSON object."""

    def __init__(self, as_json: bool = False, stream: TextIO | None = None) -> None:
        self.as_json = as_json
        self.stream: TextIO = stream or (sys.stderr if as_json else sys.stdout)
        # What an ASCII terminal lacks is replaced there, not in log.txt.
        replace_odd(self.stream)
        self.terminal = self.stream.isatty()
        self._log: TextIO | None = None
        self._status: Any = None
        self._muted = False

    def mute(self) -> None:
        """Say nothing from here on: another rank speaks."""
        self._muted = True

    @contextmanager
    def copied_to(self, file: TextIO) -> Iterator[None]:
        """Copy every line to `file` as well."""
        self._log = file
        try:
            yield
        finally:
            self._log = None

    def __call__(self, line: str = "", end: str = "\n") -> None:
        """Print one line, or several with line ends between them; with another `end` the line goes on."""
        if self._muted:
            return
        line = printable(shorten(line, LINE))
        self.clear()
        if self.terminal:
            from rich.console import Console as Rich

            Rich(file=self.stream, soft_wrap=True).print(line, markup=False, emoji=False, end=end)
        else:
            print(line, end=end, file=self.stream, flush=True)
        if self._log is not None:
            print(line, end=end, file=self._log, flush=True)

    def note(self, line: str) -> None:
        """Write one line into the log alone."""
        if self._log is not None and not self._muted:
            print(line, file=self._log, flush=True)

    def progress(self, label: str, detail: object = "") -> Callable[..., None]:
        """Return a function of (done, total) that shows `label`, the share and the time left; `label` may be replaced.

        A terminal shows one moving line; anything else gets a line every ten seconds, so that short work stays quiet.
        `detail` is made text only for a line that is shown. What was done at the first call took no time of this work.
        """
        began = shown = time.monotonic()
        first: tuple[float, int] | None = None

        def report(done: int, total: int, label: str = label) -> None:
            nonlocal shown, first
            if self._muted:
                return
            now = time.monotonic()
            first = first or (now, done)
            if self.terminal and done >= total:
                self.clear()
            elif now - shown >= (0.1 if self.terminal else PLAIN_EVERY):
                shown = now
                start, before = first if done > first[1] else (began, 0)
                left = (now - start) * (total - done) / (done - before) if done else 0.0
                share = f"{done}/{total} ({100 * done / max(total, 1):.0f} %)"
                self._show(", ".join(filter(None, (f"{label}: {share}", str(detail), f"{duration(left)} left"))))

        return report

    def stages(self) -> Callable[[str, int, int], None]:
        """Return a function of (stage, done, total) that shows the progress of each stage as `progress` does."""
        shown: dict[str, Callable[..., None]] = {}

        def report(stage: str, done: int, total: int) -> None:
            shown.setdefault(stage, self.progress(stage))(done, total)

        return report

    def moving(self, line: str, below: Sequence[str] = ()) -> None:
        """Show a line, and lines below it, on a terminal, in place of the last ones; elsewhere nothing."""
        if self.terminal and not self._muted:
            self._show(line, below)

    def _show(self, line: str, below: Sequence[str] = ()) -> None:
        line = "\n".join([one_line(line), *below])
        if not self.terminal:
            print(line, file=self.stream, flush=True)
            return
        if self._status is None:
            from rich.console import Console as Rich

            self._status = Rich(file=self.stream).status("")
            self._status.start()
        self._status.update(line)

    def clear(self) -> None:
        """Take the moving line away."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print aligned columns: numbers to the right, text to the left."""
        cells = [[f"{cell:,}" if isinstance(cell, int) else shorten(str(cell), CELL) for cell in row] for row in rows]
        right = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(head))]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        for row in (head, *cells):
            padded = zip(row, widths, right, strict=True)
            self("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in padded).rstrip())

    def result(self, value: dict[str, Any]) -> None:
        """Print the verb's JSON object on stdout, if it was asked for."""
        self.clear()
        if self.as_json and not self._muted:
            print(json.dumps(value, allow_nan=False), flush=True)
