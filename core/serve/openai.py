"""The routes under /v1, in the form of OpenAI's API, which existing clients speak."""

import functools
import json
import math
import secrets
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from core.decoding.generate import ROWS, Text
from core.formats.kinds import FLAG, Kind, Leaf, number, text, whole
from core.serve.api import SEED, decoding
from core.serve.guards import Refused, read_json
from core.serve.models import Served, find_model
from core.serve.surprise import describe_tokens, offsets, predictions
from core.serve.work import Client, Places
from core.serve.writing import writing

TOKENS, TEMPERATURE = 16, 1.0
"""What OpenAI's API takes where a request says nothing."""
NONE = number("0: this server has no penalties", 0, 0)
STOPS = 4


class Completions:
    """The routes under /v1, for some models."""

    def __init__(self, models: list[Served], places: Places) -> None:
        self._models, self._places, self._limits = models, places, places.limits
        prompt = text(self._limits.letters)
        texts = Leaf(
            f"a text, or a list of 1 to {ROWS} texts, of at most {self._limits.letters:,} letters (no token ids)",
            lambda value: prompt.fits(value) or _list_of(value, ROWS, prompt),
        )
        stops = Leaf(
            f"a text, or a list of at most {STOPS} texts",
            lambda value: STOP.fits(value) or value == [] or _list_of(value, STOPS, STOP),
        )
        self._kind: Kind = {
            "model": text(4096), "prompt??": texts,
            "max_tokens??": whole(f"0 to {self._limits.tokens:,}", 0, self._limits.tokens),
            "temperature??": number("a number from 0 to 10", 0, 10), "top_p??": number("a number from 0 to 1", 0, 1),
            "top_k??": whole("at least 1", 1, 1 << 20), "n??": COPIES, "best_of??": COPIES, "stream??": FLAG,
            "stream_options??": {"include_usage??": FLAG, "include_obfuscation??": FLAG}, "stop??": stops,
            "seed??": SEED, "logprobs??": whole("a whole number from 0 to 5", 0, 5), "echo??": FLAG,
            "user??": text(4096),
            "presence_penalty??": NONE, "frequency_penalty??": NONE, "suffix??": text(0), "logit_bias??": {},
        }  # fmt: skip

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [Route("/v1/models", self.models), Route("/v1/completions", self.completions, methods=["POST"])]

    async def models(self, request: Request) -> Response:
        """Tell which models there are."""
        rows = [{"id": model.name, "object": "model", "created": 0, "owned_by": "skc"} for model in self._models]
        return JSONResponse({"object": "list", "data": rows})

    async def completions(self, request: Request) -> Any:
        """Write on after prompts."""
        asked = await read_json(request, self._kind, self._limits)
        order = Order(find_model(self._models, asked["model"]), {name: v for name, v in asked.items() if v is not None})
        if order.stream:
            return self._places.events(functools.partial(completion_events, order))
        return self._places.answer(functools.partial(completion, order))


STOP = Leaf("a text of 1 to 256 letters", lambda value: isinstance(value, str) and 0 < len(value) <= 256)
COPIES = whole(f"a whole number from 1 to {ROWS}", 1, ROWS)


def _list_of(value: Any, most: int, leaf: Leaf) -> bool:
    return type(value) is list and 1 <= len(value) <= most and all(map(leaf.fits, value))


class Order:
    """What a request for completions asks for, with the defaults of OpenAI's API; Refused."""

    def __init__(self, model: Served, asked: dict[str, Any]) -> None:
        prompt, stop, n = asked.get("prompt", ""), asked.get("stop", []), asked.get("n", 1)
        self.model, self.n = model, n
        self.prompts = [prompt] if isinstance(prompt, str) else prompt
        self.stops = [stop] if isinstance(stop, str) else stop
        self.logprobs: int | None = asked.get("logprobs")
        self.echo, self.stream = asked.get("echo", False), asked.get("stream", False)
        self.usage = asked.get("stream_options", {}).get("include_usage", False)
        self.tokens = asked.get("max_tokens", TOKENS)
        if asked.get("best_of", n) != n:
            raise Refused(400, f"best_of={asked['best_of']}: expected n, which is {n}", "best_of")
        if len(self.prompts) * n > ROWS:
            raise Refused(400, f"{len(self.prompts)} prompts with n={n}: expected at most {ROWS} texts together", "n")
        if self.tokens == 0 and not self.echo:
            raise Refused(400, "max_tokens=0: expected at least 1, or echo=true", "max_tokens")
        settings = {
            "tokens": max(1, self.tokens),
            "temperature": asked.get("temperature", TEMPERATURE),
            "top_k": asked.get("top_k"),
            "top_p": asked.get("top_p", 1.0),
            "seed": asked.get("seed", secrets.randbits(48)),
        }
        self.how = decoding(model, settings)
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
            "model": model.name,
        }  # fmt: skip

    def texts(self) -> list[Text]:
        """Return the texts to write, all of a prompt's one after the other."""
        return [Text(self.model.tokenizer, prompt, number) for prompt in self.prompts for number in range(self.n)]


@dataclass
class Choice:
    """One text of an answer: what of it may be told, now that a stop may begin at its end."""

    order: Order
    index: int
    length: int = 0
    """Letters that came, all in all."""
    held: str = ""
    """Letters that may be the beginning of a stop."""
    tokens: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """Where those begin that were not told, and what they are."""
    count: int = 0

    def add(self, more: str, tokens: list[dict[str, Any]], starts: list[int], end: str | None) -> dict[str, Any] | None:
        """Take what came, and return what may be told, as an entry of `choices`; None: nothing.

        `starts`: where tokens begin, from the end of what came before; `end`: why nothing comes after it.
        """
        self.tokens += [(self.length + start, token) for start, token in zip(starts, tokens, strict=True)]
        self.length += len(more)
        waiting = self.held + more
        places = [place for stop in self.order.stops if (place := waiting.find(stop)) >= 0]
        if places:
            told, self.held, end = waiting[: min(places)], "", "stop"
            self.length += min(places) - len(waiting)
        else:
            keep = 0 if end else _beginning(waiting, self.order.stops)
            told, self.held = waiting[: len(waiting) - keep], waiting[len(waiting) - keep :]
        upto = self.length - len(self.held)
        ready = [(start, token) for start, token in self.tokens if start < upto or (end and not places)]
        self.tokens = [] if end else self.tokens[len(ready) :]
        if not told and not ready and not end:
            return None
        return {"text": told, "index": self.index, "logprobs": self._logprobs(ready), "finish_reason": end}

    def _logprobs(self, ready: list[tuple[int, dict[str, Any]]]) -> dict[str, Any] | None:
        """Return what tokens are in OpenAI's form: natural logarithms, of the model as it is."""
        count = self.order.logprobs
        if count is None:
            return None
        tokens = [token for _, token in ready]
        return {
            "tokens": [token["piece"] for token in tokens],
            "token_logprobs": [_nats(token) for token in tokens],
            "top_logprobs": [_top(token, count) for token in tokens] if count else None,
            "text_offset": [start for start, _ in ready],
        }


def _beginning(waiting: str, stops: list[str]) -> int:
    """Return how many letters at the end of a text may be the beginning of a stop."""
    longest = max(map(len, stops), default=1) - 1
    ends = (count for count in range(min(longest, len(waiting)), 0, -1) if _begins(stops, waiting[-count:]))
    return next(ends, 0)


def _begins(stops: list[str], end: str) -> bool:
    return any(stop.startswith(end) for stop in stops)


def _nats(token: dict[str, Any]) -> float:
    return -token["bits"] * math.log(2.0)


def _top(token: dict[str, Any], count: int) -> dict[str, float]:
    best = {one["piece"]: _nats(one) for one in token["alternatives"][:count]}
    return best if token["piece"] in best else best | {token["piece"]: _nats(token)}


def parts(order: Order, client: Client) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield what is told, as entries of `choices`, each with how many tokens were written for it."""
    model, texts, explained = order.model, order.texts(), order.logprobs is not None
    choices = [Choice(order, index) for index in range(len(texts))]
    open_ = set(range(len(texts))) if order.tokens else set()
    for choice, given in zip(choices, texts, strict=True) if order.echo else ():
        tokens, starts = _prompt_tokens(model, given, client) if explained else ([], [])
        entry = choice.add(given.prompt, tokens, starts, None if open_ else "length")
        if entry:
            yield 0, entry
    for said in writing(model, texts, order.how, client, explained) if open_ else ():
        if said.place not in open_:
            continue
        rows = [] if said.logits is None else describe_tokens(model.tokenizer, said.ids, said.logits)
        end = {"end": "stop", "tokens": "length", None: None}[said.reason]
        entry = choices[said.place].add(said.more, rows, [0] * len(rows), end)
        if entry and entry["finish_reason"]:
            open_.discard(said.place)
            texts[said.place].done = True  # the writer goes on with the others
        yield len(said.ids), entry or {}
    for place in sorted(open_):  # the time is over
        yield 0, choices[place].add("", [], [], "length") or {}


def _prompt_tokens(model: Served, given: Text, client: Client) -> tuple[list[dict[str, Any]], list[int]]:
    """Return what the tokens of a prompt are, and where they begin."""
    rows, ids = [], np.array(given.ids, np.int32)
    for logits in predictions(model.engine, ids, model.limit, client):
        rows += describe_tokens(model.tokenizer, given.ids[len(rows) + 1 :][: len(logits)], logits)
    ends = offsets(model.tokenizer, given.ids[1:], given.prompt)
    return rows, [0, *ends[:-1]][: len(rows)]


def usage(order: Order, written: int) -> dict[str, int]:
    """Return how many tokens were read and written."""
    read = sum(len(order.model.tokenizer.encode(prompt)) for prompt in order.prompts)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def completion(order: Order, client: Client) -> dict[str, Any]:
    """Return the whole answer."""
    written = 0
    joined: dict[int, dict[str, Any]] = {}
    for count, entry in parts(order, client):
        written += count
        if entry:
            _join(joined.setdefault(entry["index"], {"text": "", "logprobs": None}), entry)
    choices = [joined[index] for index in sorted(joined)]
    return {**order.head, "choices": choices, "usage": usage(order, written)}


def _join(joined: dict[str, Any], entry: dict[str, Any]) -> None:
    """Add what was told of a choice to what was told before."""
    logprobs, before = entry["logprobs"], joined["logprobs"]
    if logprobs and before:
        logprobs = {name: None if value is None else before[name] + value for name, value in logprobs.items()}
    joined |= {**entry, "text": joined["text"] + entry["text"], "logprobs": logprobs or before}


def completion_events(order: Order, client: Client) -> Generator[str]:
    """Yield the answer part by part, as data-only server-sent events."""
    written = 0
    for count, entry in parts(order, client):
        written += count
        if entry:
            yield f"data: {json.dumps({**order.head, 'choices': [entry]})}\n\n"
    if order.usage:
        yield f"data: {json.dumps({**order.head, 'choices': [], 'usage': usage(order, written)})}\n\n"
    yield "data: [DONE]\n\n"
