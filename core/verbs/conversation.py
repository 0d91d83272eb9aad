"""`skc sample RUN --interactive`: somebody at a terminal, or a pipe, and a model write one text together."""

import dataclasses
import sys
from typing import Any

from core.checks import closest
from core.config import ConfigError
from core.console import Console
from core.data.tokenizer import Tokenizer
from core.decoding.drafters import RowDrafter
from core.decoding.generate import Text, streamed
from core.decoding.settings import Decoding
from core.decoding.statistics import DraftStatistics
from core.engine.protocol import Engine
from core.verbs.errors import UsageError

SETTINGS = {"temperature": float, "top_p": float, "top_k": int, "tokens": int}
"""Settings that a line may change, and the kind of number that each is."""
COMMANDS = ("help", "new", "quit", *(name.replace("_", "-") for name in SETTINGS))
HELP = (
    "type a beginning, and the model goes on; what you type next goes behind its text; an empty line: it writes on; "
    "Ctrl-C: it stops; /new: another text; /temperature X, /top-p X, /top-k X, /tokens X; /quit or Ctrl-D: the end"
)
MOST_LETTERS = 1 << 20
"""Of a line."""


class Conversation:
    """One text, which lines and a model add to in turn."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, how: Decoding, limit: int | None, twin: RowDrafter | None,
        say: Console,
    ) -> None:  # fmt: skip
        self._engine, self._tokenizer, self._how, self._limit, self._twin = engine, tokenizer, how, limit, twin
        self._say, self._text, self._turns = say, Text(tokenizer, ""), 0
        self._statistics = DraftStatistics()
        self._ended: list[str] = []

    def hold(self, beginning: str) -> None:
        """Go on from a beginning, if there is one, then take lines until /quit or the end of the input."""
        self._say(HELP)
        if beginning:
            self._add(beginning)
        while (line := self._ask()) is not None:
            if not line.startswith("/"):
                self._add(line)
            elif line.strip() == "/quit":
                break
            else:
                self._obey(*line.removeprefix("/").split())

    def to_json(self) -> dict[str, Any]:
        """Return the texts that were written, and how fast."""
        return {
            "texts": [text for text in (*self._ended, str(self._text)) if text],
            "decoding": self._statistics.to_json(),
        }

    def _ask(self) -> str | None:
        """Return the next line that is typed, None at the end of the input; UsageError for what is no text."""
        while True:
            try:
                if sys.stdin.isatty():
                    self._say("> ", end="")
                line = sys.stdin.readline(MOST_LETTERS + 1)
                line.encode()
            except KeyboardInterrupt:  # there is nothing to stop
                self._say("\n/quit or Ctrl-D: the end")
                continue
            except UnicodeError as error:
                raise UsageError("standard input: not UTF-8; type, or pipe, UTF-8") from error
            if len(line) > MOST_LETTERS:
                raise UsageError(f"standard input: a line of over {MOST_LETTERS:,} letters; break it up")
            return line.removesuffix("\n").removesuffix("\r") if line else None

    def _add(self, typed: str) -> None:
        """Put what was typed behind the text, and let the model go on, until it is done or Ctrl-C stops it."""
        if typed:  # cut into tokens together: what was written may end inside a word
            self._text = Text(self._tokenizer, f"{self._text}{typed}", self._turns)
        else:
            self._text.go_on(self._turns)
        self._turns += 1  # every turn has draws of its own; the first those of skc sample --prompt
        said = DraftStatistics()
        self._say(typed, end="")
        try:
            for new in streamed(self._engine, self._text, self._how, self._limit, said, self._twin):
                self._say(new, end="")
        except KeyboardInterrupt:
            self._say(" (stopped)", end="")
        self._say(f"\n({said.speed()})")
        self._statistics.add(said)

    def _obey(self, name: str = "", value: str = "", *more: str) -> None:
        """Do what a line that begins with / says."""
        setting = name.replace("-", "_")
        if name == "new" and not value:
            self._ended.append(str(self._text))
            self._text = Text(self._tokenizer, "")
        elif setting in SETTINGS and value and not more:
            self._set(setting, value)
        elif name == "help":
            self._say(HELP)
        elif setting in SETTINGS:
            self._say(f"/{name}: expected one number; now {getattr(self._how, setting)}")
        else:
            close = closest(name, set(COMMANDS) - {name})
            self._say(f"/{name}: {f'did you mean /{close}?' if close else HELP}")

    def _set(self, name: str, value: str) -> None:
        try:
            how = dataclasses.replace(self._how, **{name: SETTINGS[name](value)})
            how.check()
        except ConfigError as error:
            return self._say(str(error))
        except ValueError:
            return self._say(f"/{name.replace('_', '-')} {value}: expected a number")
        self._how = how
