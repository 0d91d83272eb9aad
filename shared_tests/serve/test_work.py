"""Work for clients: so much at once, so long, fairly in turns, and none for whoever has gone. Budget: 5 s."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from starlette.routing import Route

from core.checks import ConfigError
from core.decoding.generate import Text
from core.decoding.settings import Decoding
from core.serve.guards import LOOPBACK, Refused
from core.serve.limits import Limits
from core.serve.run import application
from core.serve.shared_engine import SharedEngine
from core.serve.work import Client, Gone, Places
from core.serve.writing import writing
from shared_tests.support.serving import app_of, ask, never, request, served


def app_with(work: Any, limits: Limits, stream: bool = False, stopping: threading.Event | None = None) -> Any:
    """Return an application with one route, which does `work`."""
    places = Places(limits, stopping)

    async def endpoint(request: Any) -> Any:
        return places.events(work) if stream else places.answer(work)

    return application([Route("/work", endpoint)], LOOPBACK)


def test_one_more_than_may_run_is_told_to_come_back() -> None:
    begun, free = threading.Semaphore(0), threading.Event()

    def work(client: Client) -> str:
        begun.release()
        assert free.wait(60)
        return "done"

    app = app_with(work, Limits(requests=3))

    async def play() -> list[Any]:
        running = [asyncio.create_task(request(app, "GET", "/work")) for _ in range(3)]
        for _ in range(3):
            await asyncio.to_thread(begun.acquire)
        late = [await request(app, "GET", "/work") for _ in range(5)]
        free.set()
        done = await asyncio.gather(*running)
        return [*late, *done, await request(app, "GET", "/work")]

    replies = asyncio.run(play())
    assert [reply.status for reply in replies] == [429] * 5 + [200] * 4
    assert replies[0].headers["retry-after"] == "1" and replies[0].json()["error"]["type"] == "rate_limit_error"
    assert [reply.json() for reply in replies[5:]] == ["done"] * 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_place_is_free_again_after_an_error(stream: bool) -> None:
    def work(client: Client) -> Any:
        raise ZeroDivisionError

    app = app_with(work, Limits(requests=1), stream)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            ask(app, "GET", "/work")


def test_work_ends_when_the_client_goes() -> None:
    told: list[int] = []

    def work(client: Client) -> Iterator[str]:
        for i in range(20_000):
            told.append(i)
            yield f"data: {i}\n\n"

    def third(message: dict[str, Any]) -> bool:
        return b"data: 3" in message.get("body", b"")

    reply = ask(app_with(work, Limits(), stream=True), "GET", "/work", seen=third)
    assert reply.status == 200 and 4 <= len(told) < 10_000


def test_text_that_nobody_waits_for_is_not_written_on() -> None:
    app, asked = app_of([served("cuda")]), {"model": "debug", "prompt": "She", "tokens": 1000, "stream": True}
    first = {"seen": lambda message: b'"text"' in message.get("body", b"")}
    for path, body in (
        ("/api/generate", {k: v for k, v in asked.items() if k != "stream"}),
        ("/v1/completions", {("max_tokens" if k == "tokens" else k): v for k, v in asked.items()}),
    ):
        reply = ask(app, "POST", path, body, **first)
        assert reply.status == 200 and 1 <= len(reply.events()) < 500 and "[DONE]" not in reply.body


def test_the_server_stops_work_when_it_stops() -> None:
    stopping = threading.Event()

    def work(client: Client) -> Iterator[str]:
        for i in range(20_000):
            stopping.set() if i == 5 else None
            yield "data: 1\n\n"

    reply = ask(app_with(work, Limits(), stream=True, stopping=stopping), "GET", "/work")
    *_, (name, last) = reply.events()
    assert reply.status == 200 and len(reply.events()) <= 7 and (name, last["message"]) == ("error", "the server stops")


def test_a_client_that_reads_nothing_holds_a_place_no_longer_than_the_time() -> None:
    ended = threading.Event()

    def work(client: Client) -> Iterator[str]:
        try:
            while True:
                yield "data: 1\n\n"
        finally:
            ended.set()

    app = app_with(work, Limits(seconds=0.01, requests=1), stream=True)

    async def stuck(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def play() -> None:
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/work",
            "query_string": b"",
            "headers": [(b"host", b"localhost")],
        }

        async def receive() -> Any:
            return await asyncio.Event().wait()

        await app(scope, receive, stuck)

    asyncio.run(asyncio.wait_for(play(), 60))
    assert ended.is_set()


def test_text_ends_where_it_is_when_the_time_is_over() -> None:
    app = app_of([served("cuda")], Limits(seconds=1e-6))
    *grown, (_, done) = ask(app, "POST", "/api/generate", {"model": "debug", "prompt": "She", "tokens": 50}).events()
    assert done["reason"] == "seconds" and len(grown) == 1 and done["tokens"] == 1
    asked = {"model": "debug", "prompt": "She", "max_tokens": 50, "n": 2}
    choices = ask(app, "POST", "/v1/completions", asked).json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["length"] * 2
    for path, body in (("/api/score?model=debug", b"text"), ("/api/tokens", {"model": "debug", "text": "text"})):
        reply = ask(app, "POST", path, body)
        assert reply.status == 503 and "--seconds" in reply.json()["error"]["message"]


class Waiting(SharedEngine):
    """SharedEngine that count what was asked for, and notes in `order` whose pass was made while the others waited."""

    def __init__(self, thread: ThreadPoolExecutor, passes: int) -> None:
        super().__init__(self, thread)  # type: ignore[arg-type]
        self.order: list[int] = []
        self._asked, self._passes, self._news = 0, passes, threading.Condition()

    def turn(self, act: Any, *given: Any) -> Any:
        future = self.thread.submit(act, *given)
        with self._news:
            self._asked += 1
            self._news.notify()
        return future.result()

    def make(self, client: int) -> None:
        """Make a pass, once somebody else waits for theirs."""
        self.order.append(client)
        with self._news:
            assert self._news.wait_for(lambda: self._asked > min(len(self.order), self._passes - 1), 60)


def test_requests_take_turns_pass_by_pass() -> None:
    with ThreadPoolExecutor(1) as thread, ThreadPoolExecutor(2) as clients:
        engine = Waiting(thread, 100)
        list(clients.map(lambda client: [engine.turn(engine.make, client) for _ in range(50)], (0, 1)))
    assert sorted(engine.order) == [0] * 50 + [1] * 50
    assert all(a != b for a, b in zip(engine.order, engine.order[1:], strict=False))


def test_an_engine_and_all_that_it_makes_are_touched_in_one_thread_alone() -> None:
    class Tape:
        """Notes its threads."""

        def logits(self) -> np.ndarray:
            return note(np.zeros((1, 1, 3)))

        best = nll = lambda self, *given: note(np.zeros((1, 1), int))

    threads: list[int] = []

    def note(value: Any) -> Any:
        threads.append(threading.get_ident())
        return value

    own: Any = SimpleNamespace()
    for name in ("start", "commit", "forget", "nll", "logits"):
        setattr(own, name, lambda *given: note(0))
    own.chunk, own.nll_later = lambda *given: note(Tape()), lambda *given: note(lambda: note(0))
    with ThreadPoolExecutor(1) as thread:
        engine: Any = SharedEngine(own, thread)
        tape = engine.chunk(engine.start(1), np.zeros((1, 1)))
        done = [tape.logits(), tape.best(), tape.nll(0), engine.commit(tape, 1), engine.forget(0, 0), engine.logits(0)]
        done += [engine.nll(0, 0), engine.nll_later(0, 0, True)()]
        assert len(done) == 8 and set(threads) == {thread.submit(threading.get_ident).result()}
    assert len(threads) == 11 and threading.get_ident() not in threads


@pytest.mark.parametrize(
    "error, status, words",
    [
        (Refused(503, "too late"), 503, "too late"),
        (ConfigError("text: bits per byte\nis undefined"), 400, "text: bits per byte is undefined"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"), 503,
         "not enough memory"),
        (MemoryError(), 503, "not enough memory"),
    ],
)  # fmt: skip
def test_what_is_no_bug_is_told_before_an_answer_and_in_the_middle(error: Exception, status: int, words: str) -> None:
    def fail(client: Client) -> Any:
        raise error

    def begin(client: Client) -> Iterator[str]:
        yield "data: 1\n\n"
        raise error

    for stream in (False, True):
        reply = ask(app_with(fail, Limits(), stream), "GET", "/work")
        assert reply.status == status and words in reply.json()["error"]["message"]
    (_, one), (name, told) = ask(app_with(begin, Limits(), stream=True), "GET", "/work").events()
    assert (one, name) == (1, "error") and words in told["message"] == told["error"]["message"]
    assert told["error"]["type"] == ("server_error" if status == 503 else "invalid_request_error")


def test_a_generator_that_is_left_waits_for_nobody() -> None:
    model, client = served("cuda"), never()
    texts = writing(model, [Text(model.tokenizer, "She")], Decoding(100), client)
    next(texts)
    client.left.set()
    with pytest.raises(Gone):
        next(texts)
