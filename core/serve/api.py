"""What the page asks for: the models, text as it is written, tokens with their bits, the score of a text."""

import functools
import json
import time
from collections.abc import Generator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from core.checks import ConfigError
from core.decoding.generate import Text
from core.decoding.settings import MOST_BLOCK, Decoding
from core.formats.kinds import Kind, among, number, text, whole
from core.serve.guards import Refused, read_body, read_json
from core.serve.models import OUTPUTS, Served, find_model
from core.serve.reading import score_of_text, tokens_of
from core.serve.surprise import describe_tokens
from core.serve.work import Client, Places
from core.serve.writing import writing

SEED = whole("a whole number from 0 to 2^63 - 1", 0, 2**63 - 1)


class Api:
    """The routes under /api, for some models."""

    def __init__(self, models: list[Served], places: Places) -> None:
        self._models, self._places, self._limits = models, places, places.limits
        prompt = text(self._limits.letters)
        self._generate: Kind = {
            "model": text(4096),
            "prompt": prompt,
            "tokens?": whole(f"1 to {self._limits.tokens:,}", 1, self._limits.tokens),
            "temperature?": number("a number from 0 to 10", 0, 10),
            "top_k??": whole("at least 1", 1, 1 << 20),
            "top_p?": number("a number from 0 to 1", 0, 1),
            "seed?": SEED,
            "draft?": among("none", "ngram", "jacobi", "twin"),
            "block?": whole(f"2 to {MOST_BLOCK}", 2, MOST_BLOCK),
        }
        self._tokens: Kind = {"model": text(4096), "text": prompt, "without??": among(*OUTPUTS)}

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/api/models", self.models),
            Route("/api/generate", self.generate, methods=["POST"]),
            Route("/api/tokens", self.tokens, methods=["POST"]),
            Route("/api/score", self.score, methods=["POST"]),
        ]

    async def models(self, request: Request) -> Response:
        """Tell which models there are, and what requests may ask for."""
        limits = {name: getattr(self._limits, name) for name in ("body", "letters", "tokens", "seconds", "requests")}
        return JSONResponse({"models": [model.to_json() for model in self._models], "limits": limits})

    async def generate(self, request: Request) -> Any:
        """Write text, token by token, with the bits of each and what else could have stood there."""
        asked = await read_json(request, self._generate, self._limits)
        model, prompt = find_model(self._models, asked.pop("model")), asked.pop("prompt")
        how = requested_decoding(model, {"tokens": min(128, self._limits.tokens), **asked})
        return self._places.events(functools.partial(generate_events, model, prompt, how))

    async def tokens(self, request: Request) -> Any:
        """Tell the tokens of a text with their bits, and by how much those change without a part."""
        asked = await read_json(request, self._tokens, self._limits)
        model = find_model(self._models, asked["model"])
        return self._places.answer(functools.partial(tokens_of, model, asked["text"], asked.get("without")))

    async def score(self, request: Request) -> Any:
        """Score a text that is the body of the request, and compress the same text."""
        model = find_model(self._models, request.query_params.get("model", ""))
        body = await read_body(request, self._limits)
        try:
            given = body.decode()
        except UnicodeDecodeError as error:
            raise Refused(400, f"the text is not UTF-8 (byte {error.start:,}): {error.reason}") from error
        return self._places.answer(functools.partial(score_of_text, model, given))


def requested_decoding(model: Served, asked: dict[str, Any]) -> Decoding:
    """Return how a text is to be written; Refused."""
    if asked.get("draft") == "twin" and model.twin is None:
        raise Refused(400, f"draft=twin: {model.name} has no twin beside it; make one with skc distill", "draft")
    try:
        how = Decoding(**asked)
        how.check()
    except ConfigError as error:
        raise Refused(400, str(error)) from error
    return how


def event(name: str, value: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"event: {name}\ndata: {json.dumps(value)}\n\n"


def generate_events(model: Served, prompt: str, how: Decoding, client: Client) -> Generator[str]:
    """Yield the events of a text that is written."""
    began, count, reason = time.perf_counter(), 0, "seconds"
    for said in writing(model, [Text(model.tokenizer, prompt)], how, client, explained=True):
        assert said.logits is not None
        count, reason = count + len(said.ids), said.reason or reason
        yield event("token", {"text": said.more, "tokens": describe_tokens(model.tokenizer, said.ids, said.logits)})
    seconds = time.perf_counter() - began
    rate = count / max(seconds, 1e-9)
    yield event("done", {"tokens": count, "seconds": seconds, "tokens_per_second": rate, "reason": reason})
