"""The routes under /v1, in the form of OpenAI's API, which existing clients speak."""

import functools
import json
import secrets
import time
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from core.decoding.generate import ROWS, Text
from core.formats.kinds import FLAG, Kind, Leaf, number, text, whole
from core.serve.api import SEED, requested_decoding
from core.serve.choices import Choice, join_entries
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
        return [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),  # a name may be the end of a path
            Route("/v1/completions", self.completions, methods=["POST"]),
        ]

    async def models(self, request: Request) -> Response:
        """Tell which models there are."""
        return JSONResponse({"object": "list", "data": [_row(model) for model in self._models]})

    async def model(self, request: Request) -> Response:
        """Tell whether there is a model of a name."""
        return JSONResponse(_row(find_model(self._models, request.path_params["name"])))

    async def completions(self, request: Request) -> Any:
        """Write on after prompts."""
        asked = await read_json(request, self._kind, self._limits)
        wanted = CompletionRequest(
            find_model(self._models, asked["model"]), {name: v for name, v in asked.items() if v is not None}
        )
        if wanted.stream:
            return self._places.events(functools.partial(completion_events, wanted))
        return self._places.answer(functools.partial(completion, wanted))


def _row(model: Served) -> dict[str, Any]:
    """Return a model in the form of OpenAI's API."""
    return {"id": model.name, "object": "model", "created": 0, "owned_by": "skc"}


STOP = Leaf("a text of 1 to 256 letters", lambda value: isinstance(value, str) and 0 < len(value) <= 256)
COPIES = whole(f"a whole number from 1 to {ROWS}", 1, ROWS)


def _list_of(value: Any, most: int, leaf: Leaf) -> bool:
    return type(value) is list and 1 <= len(value) <= most and all(map(leaf.fits, value))


class CompletionRequest:
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
        self.how = requested_decoding(model, settings)
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
            "model": model.name,
        }  # fmt: skip

    def texts(self) -> list[Text]:
        """Return the texts to write, all of a prompt's one after the other."""
        return [Text(self.model.tokenizer, prompt, number) for prompt in self.prompts for number in range(self.n)]


def parts(wanted: CompletionRequest, client: Client) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield what is told, as entries of `choices`, each with how many tokens were written for it."""
    model, texts, explained = wanted.model, wanted.texts(), wanted.logprobs is not None
    choices = [Choice(index, wanted.stops, wanted.logprobs) for index in range(len(texts))]
    open_ = set(range(len(texts))) if wanted.tokens else set()
    for choice, given in zip(choices, texts, strict=True) if wanted.echo else ():
        tokens = _prompt_tokens(model, given, client) if explained else []
        yield 0, choice.echo(given.prompt, tokens, None if open_ else "length")
    for said in writing(model, texts, wanted.how, client, explained) if open_ else ():
        if said.place not in open_:
            continue
        rows = [] if said.logits is None else describe_tokens(model.tokenizer, said.ids, said.logits)
        end = {"end": "stop", "tokens": "length", None: None}[said.reason]
        entry = choices[said.place].add(said.more, rows, end)
        if entry and entry["finish_reason"]:
            open_.discard(said.place)
            texts[said.place].done = True  # the writer goes on with the others
        yield len(said.ids), entry or {}
    for place in sorted(open_):  # the time is over
        yield 0, choices[place].add("", [], "length") or {}


def _prompt_tokens(model: Served, given: Text, client: Client) -> list[tuple[int, dict[str, Any]]]:
    """Return where the tokens of a prompt begin, and what they are."""
    rows, ids = [], np.array(given.ids, np.int32)
    for logits in predictions(model.engine, ids, model.limit, client):
        rows += describe_tokens(model.tokenizer, given.ids[len(rows) + 1 :][: len(logits)], logits)
    ends = offsets(model.tokenizer, given.ids[1:], given.prompt)
    return list(zip([0, *ends[:-1]], rows, strict=False))  # of a prompt without tokens there is one end, and no row


def usage(wanted: CompletionRequest, written: int) -> dict[str, int]:
    """Return how many tokens were read and written."""
    read = sum(len(wanted.model.tokenizer.encode(prompt)) for prompt in wanted.prompts)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def completion(wanted: CompletionRequest, client: Client) -> dict[str, Any]:
    """Return the whole answer."""
    written = 0
    joined: dict[int, dict[str, Any]] = {}
    for count, entry in parts(wanted, client):
        written += count
        if entry:
            joined[entry["index"]] = join_entries(joined.get(entry["index"]), entry)
    choices = [joined[index] for index in sorted(joined)]
    return {**wanted.head, "choices": choices, "usage": usage(wanted, written)}


def completion_events(wanted: CompletionRequest, client: Client) -> Generator[str]:
    """Yield the answer part by part, as data-only server-sent events."""
    written = 0
    for count, entry in parts(wanted, client):
        written += count
        if entry:
            yield f"data: {json.dumps({**wanted.head, 'choices': [entry]})}\n\n"
    if wanted.usage:
        yield f"data: {json.dumps({**wanted.head, 'choices': [], 'usage': usage(wanted, written)})}\n\n"
    yield "data: [DONE]\n\n"
