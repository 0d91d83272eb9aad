"""One text of a completion as it grows: what of it may be told, where a stop ends it, and its log-probabilities."""

import math
from collections.abc import Sequence
from typing import Any

Token = dict[str, Any]
"""A token as `core.serve.surprise.describe_tokens` tells it."""


class Choice:
    """One text of an answer; what a stop may begin with at its end is held back until more has come."""

    def __init__(self, index: int, stops: Sequence[str], logprobs: int | None) -> None:
        self._index, self._stops, self._logprobs = index, stops, logprobs
        self._length, self._held = 0, ""
        self._tokens: list[tuple[int, Token]] = []
        """Where those begin that were not told, and what they are."""

    def echo(self, prompt: str, tokens: list[tuple[int, Token]], end: str | None) -> dict[str, Any]:
        """Return the prompt as an entry of `choices`, which no stop ends; `tokens`: with where they begin."""
        self._length = len(prompt)
        return self._entry(prompt, tokens, end)

    def add(self, more: str, tokens: list[Token], end: str | None) -> dict[str, Any] | None:
        """Take what came, and return what may be told, as an entry of `choices`; None: nothing.

        `tokens`: those of a pass, which is over one. `end`: why nothing comes after it.
        """
        self._tokens += [(self._length, token) for token in tokens]
        self._length += len(more)
        waiting = self._held + more
        places = [place for stop in self._stops if (place := waiting.find(stop)) >= 0]
        if places:
            told, self._held, end = waiting[: min(places)], "", "stop"
            self._length += min(places) - len(waiting)
        else:
            keep = 0 if end else beginning_of(waiting, self._stops)
            told, self._held = waiting[: len(waiting) - keep], waiting[len(waiting) - keep :]
        until = self._length - len(self._held)
        ready = [(start, token) for start, token in self._tokens if start < until or (end and not places)]
        self._tokens = self._tokens[len(ready) :]
        return self._entry(told, ready, end) if told or ready or end else None

    def _entry(self, told: str, ready: list[tuple[int, Token]], end: str | None) -> dict[str, Any]:
        logprobs, count = None, self._logprobs
        if count is not None:
            tokens = [token for _, token in ready]
            logprobs = {
                "tokens": [token["piece"] for token in tokens],
                "token_logprobs": [_nats(token) for token in tokens],
                "top_logprobs": [_top(token, count) for token in tokens] if count else None,
                "text_offset": [start for start, _ in ready],
            }
        return {"text": told, "index": self._index, "logprobs": logprobs, "finish_reason": end}


def beginning_of(text: str, stops: Sequence[str]) -> int:
    """Return how many letters at the end of a text may be the beginning of a stop."""
    longest = min(len(text), max(map(len, stops), default=1) - 1)
    counts = range(longest, 0, -1)
    return next((count for count in counts if any(stop.startswith(text[-count:]) for stop in stops)), 0)


def _nats(token: Token) -> float:
    return -token["bits"] * math.log(2.0)


def _top(token: Token, count: int) -> dict[str, float]:
    """Return the likeliest tokens, and the token itself, with their log-probabilities."""
    best = {one["piece"]: _nats(one) for one in token["alternatives"][:count]}
    return best if token["piece"] in best else best | {token["piece"]: _nats(token)}


def join_entries(before: dict[str, Any] | None, entry: dict[str, Any]) -> dict[str, Any]:
    """Return what was told of a choice before, and now, as one entry."""
    if before is None:
        return entry
    logprobs = entry["logprobs"]
    if logprobs is not None:
        told = before["logprobs"]
        logprobs = {name: None if value is None else told[name] + value for name, value in logprobs.items()}
    return {**entry, "text": before["text"] + entry["text"], "logprobs": logprobs}
