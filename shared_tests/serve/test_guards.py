"""What the server refuses, in front of every route, and what every answer carries. Budget: 3 s."""

import json
from typing import Any

import pytest

from core.serve.guards import HEADERS, allowed_hosts, host_name
from core.serve.limits import Limits
from shared_tests.support.serving import app_of, ask, served

LIMITS = Limits(body=2000, letters=100, tokens=8)


@pytest.fixture(scope="module")
def app() -> Any:
    return app_of([served("cuda")], LIMITS)


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000", "[::1]"])
def test_this_machine_may_be_called_by_its_names(app: Any, host: str) -> None:
    assert ask(app, "GET", "/v1/models", headers=[("host", host)]).status == 200
    assert ask(app, "GET", "/v1/models", headers=[("host", host), ("origin", f"http://{host}")]).status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.", "127.0.0.1:8000@evil.example", ""],
)
def test_a_foreign_host_is_refused(app: Any, host: str) -> None:
    for method, path in (("GET", "/"), ("GET", "/api/models"), ("POST", "/v1/completions"), ("GET", "/nothing")):
        reply = ask(app, method, path, headers=[("host", host)])
        assert reply.status == 403 and "Host" in reply.json()["error"]["message"]


def test_two_hosts_are_refused(app: Any) -> None:
    pairs = [("host", "127.0.0.1"), ("host", "evil.example")]
    assert ask(app, "GET", "/v1/models", headers=pairs).status == 403


@pytest.mark.parametrize(
    "origin", ["null", "http://evil.example", "http://127.0.0.1:9000", "http://127.0.0.1:8000.evil.example"]
)
def test_a_page_of_another_site_is_refused(app: Any, origin: str) -> None:
    reply = ask(app, "POST", "/api/generate", {"model": "debug", "prompt": ""}, headers=[("origin", origin)])
    assert reply.status == 403 and origin in reply.json()["error"]["message"]


def test_further_names_are_those_that_are_given() -> None:
    assert allowed_hosts("0.0.0.0", ["gpu.example"]) == ["127.0.0.1", "localhost", "[::1]", "gpu.example"]
    assert allowed_hosts("10.0.0.1", [])[-1] == "10.0.0.1" and allowed_hosts("fd00::1", [])[-1] == "[fd00::1]"
    assert host_name("[::1]") == "[::1]" and host_name("A:80") == "a" and host_name(":80") == ":80"


@pytest.mark.parametrize("path", ["/v1/models", "/nothing", "/api/generate"])
def test_every_answer_carries_the_headers(app: Any, path: str) -> None:
    reply = ask(app, "GET", path)
    assert HEADERS.items() <= reply.headers.items()
    assert "default-src 'self'" in reply.headers["content-security-policy"]
    assert HEADERS.items() <= ask(app, "GET", path, headers=[("host", "evil.example")]).headers.items()


@pytest.mark.parametrize(
    "path",
    ["/../pyproject.toml", "/page/../../limits.py", "/%2e%2e/limits.py", "/page.js/../../limits.py", "//etc/passwd",
     "/page/", "/index.html", "/core/serve/limits.py", "/page.css/", "/api/", "/\x00", "/page.js%00"],
)  # fmt: skip
def test_nothing_else_of_the_disk_is_there(app: Any, path: str) -> None:
    reply = ask(app, "GET", path)
    assert reply.status in (404, 405, 307) and "Limits" not in reply.body and "root:" not in reply.body


def generate(**changes: Any) -> bytes:
    """Return a good request for text with some of it changed."""
    return json.dumps({"model": "debug", "prompt": "She", "tokens": 2, **changes}).encode()


@pytest.mark.parametrize(
    "body, status, words",
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"[]", 400, "expected an object"),
        (b"\xff{}", 400, "UTF-8"),
        (b"[" * 1900, 400, "not JSON"),
        (b'{"a":' * 350, 400, "not JSON"),
        (b'{"model": "debug", "prompt": "", "temperature": NaN}', 400, "NaN"),
        (b'{"model": "debug", "prompt": "", "temperature": 1e999}', 400, "temperature"),
        (b'{"model": "debug", "prompt": "\\ud800"}', 400, "Unicode"),
        (b'{"model": "debug"}', 400, "prompt: missing"),
        (generate(prompt=["She"]), 400, "prompt"),
        (generate(prompt="a" * 101), 400, "at most 100 letters"),
        (generate(tokens=9), 400, "tokens: 9, expected 1 to 8"),
        (generate(tokens=0), 400, "tokens"),
        (generate(tokens=True), 400, "tokens"),
        (generate(tokens=1.5), 400, "tokens"),
        (generate(temperature=-1), 400, "temperature"),
        (generate(temperature="hot"), 400, "temperature"),
        (generate(top_p=0), 400, "top_p"),
        (generate(top_k=0), 400, "top_k"),
        (generate(seed=-1), 400, "seed"),
        (generate(seed=10**30), 400, "seed"),
        (generate(draft="twin"), 400, "no twin"),
        (generate(draft="x"), 400, "draft"),
        (generate(path="/etc/passwd"), 400, "unknown name"),
        (generate(model="/etc/passwd"), 404, "expected one of: debug"),
        (generate(prompt="a" * 3000), 413, "2,000 bytes"),
    ],
)
def test_bad_requests_get_one_line(app: Any, body: bytes, status: int, words: str) -> None:
    reply = ask(app, "POST", "/api/generate", body)
    error = reply.json()["error"]
    assert (reply.status, error["type"]) == (status, "invalid_request_error")
    assert words in error["message"] and "\n" not in error["message"] and "damaged" not in error["message"]


@pytest.mark.parametrize("path", ["/api/generate", "/api/tokens", "/api/score?model=debug", "/v1/completions"])
def test_a_body_in_chunks_is_bounded_too(app: Any, path: str) -> None:
    taken = []

    def endless():
        for i in range(100):
            taken.append(i)
            yield b"a" * 500

    reply = ask(app, "POST", path, list(endless()))
    assert reply.status == 413 and "2,000 bytes" in reply.json()["error"]["message"]
    for length in ("3000", "9" * 5000):
        assert ask(app, "POST", path, b"x", headers=[("content-length", length)]).status == 413


@pytest.mark.parametrize("path", ["/api/generate", "/api/tokens", "/api/score?model=debug", "/v1/completions"])
def test_a_body_that_does_not_come_is_waited_for_no_longer_than_the_time(path: str) -> None:
    reply = ask(app_of([served("cuda")], Limits(seconds=0.01)), "POST", path, [b"{", None])
    assert reply.status == 408 and "0.01 seconds" in reply.json()["error"]["message"]


def test_a_method_that_a_route_does_not_have_is_refused(app: Any) -> None:
    assert ask(app, "GET", "/api/generate").status == 405
    assert ask(app, "DELETE", "/v1/models").status == 405


def test_a_body_of_a_million_values_is_refused_before_it_is_built() -> None:
    app = app_of([served("cuda")])
    for body in (b"[" * 100_000 + b"]" * 100_000, b"[" + b"1," * 300_000 + b"1]"):
        reply = ask(app, "POST", "/v1/completions", body)
        assert (reply.status, reply.json()["error"]["message"]) == (400, "the request: over 4,096 values")


def test_an_error_of_ours_tells_nothing(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.serve.api.generate_events", lambda *given: 1 / 0)
    messages: list[dict[str, Any]] = []
    with pytest.raises(ZeroDivisionError):  # for the terminal
        ask(app, "POST", "/api/generate", generate(), seen=messages.append)
    assert messages[0]["status"] == 500 and b"terminal" in messages[1]["body"]
    assert b"division" not in messages[1]["body"] and b"Traceback" not in messages[1]["body"]
