"""A server in a process of its own and those who ask it: a hundred at once, OpenAI's client, one that goes. Long."""

import http.client
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlparse

import pytest

from core.cli import main
from core.data.tokenizer import Tokenizer
from core.decoding.generate import sample
from core.decoding.settings import Decoding
from core.library.model import load
from shared_tests.support.killed import small_data
from shared_tests.support.server_process import Process, server

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=["torch", "mlx"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of two steps of a model with all parts, small."""
    folder = tmp_path_factory.mktemp("clients")
    options = ("--train.steps", "2", "--train.batch", "2", "--train.seq", "64", "--eval.documents", "2", "--model.dim",
               "64", "--model.layers", "2", "--data.path", small_data(folder))  # fmt: skip
    assert main(["train", "skc_mac", *options, "--out", str(folder / "run"), "--backend", "torch"]) == 0
    return str(folder / "run")


@pytest.fixture
def process(run: str, backend: str) -> Iterator[Process]:
    with server("serve", run, "--backend", backend) as one:
        yield one


def post(url: str, path: str, body: Any) -> tuple[int, dict[str, str], str]:
    """Return the status, headers and body of an answer."""
    place = urlparse(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=120)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.headers), text


def test_a_hundred_clients_get_a_whole_answer_or_are_told_to_come_back(
    process: Process, run: str, backend: str
) -> None:
    """Once all at a time, then each again until it is served: what is written is what a client alone would get."""
    model = load(run, backend=backend)  # type: ignore[arg-type]
    how = [Decoding(24, 0.8, None, seed=seed) for seed in range(5)]
    expected = [sample(model.engine, model.tokenizer, "Number 7", each, None) for each in how]
    answers: list[tuple[int, float]] = []
    gate = threading.Barrier(100)

    def play(number: int) -> None:
        gate.wait()
        asked = {"model": "run", "prompt": "Number 7", "max_tokens": 24, "temperature": 0.8, "seed": number % 5}
        while True:
            began = time.monotonic()
            status, headers, text = post(process.url, "/v1/completions", asked)
            answers.append((status, time.monotonic() - began))
            if status == 200:
                assert "Number 7" + json.loads(text)["choices"][0]["text"] == expected[number % 5]
                return
            assert status == 429 and headers["retry-after"] == "1"
            time.sleep(0.2)

    failed: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            play(number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]
    counts = Counter(status for status, _ in answers)
    assert counts.keys() == {200, 429} and counts[200] == 100, counts
    print(f"{backend}: {counts}, slowest {max(seconds for _, seconds in answers):.1f} s")


OPENAI = """
import json, sys, openai
client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
asked = dict(model="run", prompt="Number 7", max_tokens=12, temperature=0.8, seed=3, logprobs=2)
whole = client.completions.create(**asked)
streamed = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
try:
    client.completions.create(model="run", prompt=[1, 2])
except openai.BadRequestError as error:
    told = error.body["message"]
print(json.dumps({
    "models": [model.id for model in client.models.list()],
    "text": whole.choices[0].text,
    "reason": whole.choices[0].finish_reason,
    "logprobs": whole.choices[0].logprobs.token_logprobs,
    "usage": whole.usage.total_tokens,
    "streamed": "".join(part.choices[0].text for part in streamed if part.choices),
    "last": streamed[-1].usage.total_tokens,
    "told": told,
}))
"""


def test_openais_client_reads_what_we_say(process: Process, run: str, backend: str) -> None:
    done = subprocess.run([sys.executable, "-c", OPENAI, process.url], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    model = load(run, backend=backend)  # type: ignore[arg-type]
    text = sample(model.engine, model.tokenizer, "Number 7", Decoding(12, 0.8, None, seed=3), None)
    assert "Number 7" + value["text"] == "Number 7" + value["streamed"] == text
    assert value["models"] == ["run"] and value["reason"] == "length" and len(value["logprobs"]) == 12
    assert value["usage"] == value["last"] == 12 + len(Tokenizer.load(f"{run}/tokenizer.model").encode("Number 7"))
    assert "no token ids" in value["told"]


def test_who_goes_leaves_the_place_to_others(run: str) -> None:
    """One place; each client leaves in the middle of an endless text, and the next one gets the place."""
    with server(
        "serve", run, "--backend", "torch", "--requests", "1", "--tokens", "100000", "--seconds", "1000"
    ) as one:
        place = urlparse(one.url)
        for _ in range(3):
            connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
            body = {"model": "run", "prompt": "", "tokens": 100_000}
            connection.request("POST", "/api/generate", json.dumps(body))
            answer = connection.getresponse()
            assert answer.status == 200 and answer.readline() == b"event: token\n"
            answer.close()
            connection.close()
            until(lambda: post(one.url, "/api/tokens", {"model": "run", "text": "a"})[0] == 200)


def until(true: Any) -> None:
    """Wait for something that must become true."""
    for _ in range(600):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError("it did not become true within a minute")


def test_ctrl_c_ends_a_server_that_is_writing(run: str) -> None:
    with server("serve", run, "--backend", "torch", "--tokens", "100000", "--seconds", "1000") as one:
        place = urlparse(one.url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
        connection.request("POST", "/api/generate", json.dumps({"model": "run", "prompt": "", "tokens": 100_000}))
        answer = connection.getresponse()
        assert answer.readline() == b"event: token\n"
    # `server` saw that it stopped, with exit code 0 and no complaint
    assert b'event: error\ndata: {"message": "the server stops"' in answer.read()
    connection.close()
