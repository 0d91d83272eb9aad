"""/v1: completions in OpenAI's form, plain and streaming, with the text of `skc sample`. Budget: 6 s."""

import math
from typing import Any

import numpy as np
import pytest

from core.decoding.generate import Text, write
from core.decoding.settings import Decoding
from core.serve.choices import Choice, beginning_of
from core.serve.limits import Limits
from core.serve.surprise import offsets
from shared_tests.support.harness import BACKENDS
from shared_tests.support.serving import app_of, ask, served

PROMPTS = ["She was glad", "It is"]
SEEDED = {"model": "debug", "seed": 5, "temperature": 0.8, "max_tokens": 12}


@pytest.fixture(scope="module")
def app() -> Any:
    return app_of([served("cuda"), served("cuda", parts=True)], Limits(tokens=64, letters=200))


def by_hand(backend: str, prompts: list[str], n: int, how: Decoding) -> list[Text]:
    """Return what `skc sample` writes after some prompts, `n` texts each."""
    model = served(backend)
    texts = [Text(model.tokenizer, prompt, number) for prompt in prompts for number in range(n)]
    model.engine.turn(lambda: list(write(model.engine.own, texts, how, model.limit)))
    return texts


def joined(events: list[tuple[str, Any]]) -> dict[int, str]:
    """Return the text of each choice of a streamed answer."""
    texts: dict[int, str] = {}
    for _, event in events[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_and_streamed_text_is_that_of_sample(backend: str) -> None:
    app, asked = app_of([served(backend)]), {**SEEDED, "prompt": PROMPTS, "n": 2}
    texts = by_hand(backend, PROMPTS, 2, Decoding(12, 0.8, None, seed=5))
    expected = [str(text).removeprefix(text.prompt) for text in texts]
    reply = ask(app, "POST", "/v1/completions", asked)
    value = reply.json()
    assert [choice["text"] for choice in value["choices"]] == expected
    assert [choice["index"] for choice in value["choices"]] == [0, 1, 2, 3] and value["object"] == "text_completion"
    assert {choice["finish_reason"] for choice in value["choices"]} == {"length"} and value["model"] == "debug"
    read = sum(len(served(backend).tokenizer.encode(prompt)) for prompt in PROMPTS)
    assert value["usage"] == {"prompt_tokens": read, "completion_tokens": 48, "total_tokens": read + 48}
    reply = ask(app, "POST", "/v1/completions", {**asked, "stream": True, "stream_options": {"include_usage": True}})
    events = reply.events()
    assert reply.headers["content-type"].startswith("text/event-stream") and events[-1] == ("message", "[DONE]")
    assert joined(events) == dict(enumerate(expected)) and events[-2][1]["usage"] == value["usage"]
    ends = [
        choice["finish_reason"] for _, event in events[:-1] for choice in event["choices"] if choice["finish_reason"]
    ]
    assert ends == ["length"] * 4


def test_the_models_are_listed(app: Any) -> None:
    value = ask(app, "GET", "/v1/models").json()
    assert value["object"] == "list" and [model["id"] for model in value["data"]] == ["debug", "parts"]
    assert all(model["object"] == "model" for model in value["data"])
    assert ask(app, "GET", "/v1/models/parts").json() == value["data"][1]
    assert ask(app, "GET", "/v1/models/a/../gpt-4").status == 404


def test_what_is_left_out_is_as_openai_has_it(app: Any) -> None:
    first = ask(app, "POST", "/v1/completions", {"model": "debug", "prompt": "It"}).json()
    ended = first["choices"][0]["finish_reason"] == "stop"  # which draws without a seed may bring
    assert ended or first["usage"]["completion_tokens"] == 16 and len(first["choices"]) == 1
    second = ask(app, "POST", "/v1/completions", {"model": "debug", "prompt": "It", "temperature": None}).json()
    assert first["choices"][0]["text"] != second["choices"][0]["text"], "each without a seed draws anew"
    assert first["id"] != second["id"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_ends_a_text_before_it_and_is_never_shown(app: Any, stream: bool) -> None:
    (whole,) = by_hand("cuda", PROMPTS[:1], 1, Decoding(40, 0.8, None, seed=5))
    text = str(whole).removeprefix(PROMPTS[0])
    ends = offsets(served("cuda").tokenizer, whole.ids[whole.begin :], text)
    stop = text[ends[7] - 2 : ends[7] + 2]  # across two tokens
    place = text.index(stop)
    asked = {**SEEDED, "max_tokens": 40, "prompt": PROMPTS[0], "stop": ["\x00", stop, "never there"], "stream": stream}
    reply = ask(app, "POST", "/v1/completions", asked)
    if stream:
        assert joined(reply.events()) == {0: text[:place]}
        ends = [event["choices"][0]["finish_reason"] for _, event in reply.events()[:-1]]
        assert ends[-1] == "stop" and not any(ends[:-1])
    else:
        (choice,) = reply.json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text[:place], "stop")
        assert reply.json()["usage"]["completion_tokens"] < 40


def test_what_may_be_the_beginning_of_a_stop_is_held_back() -> None:
    choice = Choice(0, ["bcd", "x"], None)
    told = [choice.add(more, [], None) for more in ("ab", "c", "c", "bc", "de")]
    assert [one and (one["text"], one["finish_reason"]) for one in told] == [
        ("a", None), None, ("bcc", None), None, ("", "stop")]  # fmt: skip
    assert [beginning_of(text, ["bcd", "bcbx"]) for text in ("", "a", "b", "abcb", "bcbc")] == [0, 0, 1, 3, 2]


def test_a_stop_that_only_begins_is_told_at_the_end(app: Any) -> None:
    (whole,) = by_hand("cuda", PROMPTS[:1], 1, Decoding(12, 0.8, None, seed=5))
    text = str(whole).removeprefix(PROMPTS[0])
    asked = {**SEEDED, "prompt": PROMPTS[0], "stop": text[-2:] + "\x00", "stream": True}
    assert joined(ask(app, "POST", "/v1/completions", asked).events()) == {0: text}


def test_a_stop_in_the_prompt_ends_nothing(app: Any) -> None:
    asked = {**SEEDED, "prompt": "She was glad", "stop": "was", "echo": True, "max_tokens": 3}
    (choice,) = ask(app, "POST", "/v1/completions", asked).json()["choices"]
    assert choice["text"].startswith("She was glad") and choice["finish_reason"] == "length"


def test_a_stop_of_one_text_does_not_end_the_others(app: Any) -> None:
    texts = by_hand("cuda", PROMPTS, 1, Decoding(12, 0.8, None, seed=5))
    first, second = (str(text).removeprefix(text.prompt) for text in texts)
    stop = next(first[i : i + 3] for i in range(len(first)) if first[i : i + 3] not in second)
    asked = {**SEEDED, "prompt": PROMPTS, "stop": stop}
    choices = ask(app, "POST", "/v1/completions", asked).json()["choices"]
    assert [choice["text"] for choice in choices] == [first[: first.index(stop)], second]
    assert [choice["finish_reason"] for choice in choices] == ["stop", "length"]


def test_log_probabilities_are_the_models_for_prompt_and_text(app: Any) -> None:
    model, (text,) = served("cuda"), by_hand("cuda", PROMPTS[:1], 1, Decoding(12, 0.8, None, seed=5))
    asked = {**SEEDED, "prompt": PROMPTS[0], "logprobs": 3, "echo": True}
    (choice,) = ask(app, "POST", "/v1/completions", asked).json()["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"] == str(text)
    assert logprobs["tokens"] == list(map(model.tokenizer.piece, text.ids[1:]))
    ids = np.array(text.ids, np.int32)
    logits = model.engine.logits(ids[None])[0, :-1].astype(np.float64)
    said = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(said, ids[1:, None], 1)[:, 0]
    assert logprobs["token_logprobs"] == pytest.approx(expected.tolist(), abs=1e-3)
    for best, own, piece, row in zip(logprobs["top_logprobs"], expected, logprobs["tokens"], said, strict=True):
        assert best[piece] == pytest.approx(own, abs=1e-3) and max(best.values()) == pytest.approx(row.max(), abs=1e-3)
        assert len(best) in (3, 4)
    offsets = logprobs["text_offset"]
    assert offsets[0] == 0 and offsets == sorted(offsets) and max(offsets) < len(choice["text"])
    streamed = ask(app, "POST", "/v1/completions", {**asked, "stream": True}).events()
    parts = [event["choices"][0] for _, event in streamed[:-1]]
    assert "".join(part["text"] for part in parts) == choice["text"]
    for name in ("tokens", "text_offset", "token_logprobs"):
        assert [one for part in parts for one in part["logprobs"][name]] == logprobs[name]


def test_a_prompt_alone_may_be_asked_for(app: Any) -> None:
    """As programs do that compare the likelihoods of given texts."""
    asked = {**SEEDED, "prompt": PROMPTS, "max_tokens": 0, "echo": True, "logprobs": 0}
    value = ask(app, "POST", "/v1/completions", asked).json()
    assert [choice["text"] for choice in value["choices"]] == PROMPTS and value["usage"]["completion_tokens"] == 0
    for prompt, choice in zip(PROMPTS, value["choices"], strict=True):
        row = ask(app, "POST", "/api/tokens", {"model": "debug", "text": prompt}).json()
        nats = [-token["bits"] * math.log(2) for token in row["tokens"]]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(nats) and choice["finish_reason"] == "length"
        assert choice["logprobs"]["text_offset"] == [token["start"] for token in row["tokens"]]


def test_a_document_that_ends_stops_a_text(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = served("cuda").tokenizer
    script = [*tokenizer.encode("a b").tolist(), tokenizer.bos]
    monkeypatch.setattr("core.decoding.generate.say", lambda logits, draft, place, number, how: script[place])
    (choice,) = ask(app, "POST", "/v1/completions", {**SEEDED, "logprobs": 1}).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("a b", "stop")
    assert choice["logprobs"]["tokens"] == list(map(tokenizer.piece, script[:-1]))
    *grown, (_, done) = ask(app, "POST", "/api/generate", {"model": "debug", "prompt": ""}).events()
    assert done["reason"] == "end" and done["tokens"] == 2 and grown[-1][1] == {"text": "", "tokens": []}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"prompt": [1, 2, 3]}, "no token ids"),
        ({"prompt": [[1, 2]]}, "no token ids"),
        ({"prompt": []}, "list of 1 to 16"),
        ({"prompt": ["a"] * 17}, "list of 1 to 16"),
        ({"prompt": "a" * 201}, "200 letters"),
        ({"prompt": ["a"] * 4, "n": 5}, "at most 16 texts"),
        ({"max_tokens": 65}, "0 to 64"),
        ({"max_tokens": 0}, "echo=true"),
        ({"n": 0}, "n: 0"),
        ({"n": 17}, "n: 17"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 6}, "from 0 to 5"),
        ({"stop": ["a"] * 5}, "at most 4"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"presence_penalty": 0.5}, "penalties"),
        ({"logit_bias": {"5": 1}}, "unknown name"),
        ({"suffix": "end"}, "suffix"),
        ({"stream": 1}, "true or false"),
        ({"top_p": 0}, "top_p"),
        ({"messages": []}, "unknown name"),
    ],
)
def test_what_is_not_done_is_told_in_openais_form(app: Any, changes: dict[str, Any], words: str) -> None:
    reply = ask(app, "POST", "/v1/completions", {"model": "debug", "prompt": "It", **changes})
    error = reply.json()["error"]
    assert reply.status == 400 and error.keys() == {"message", "type", "param", "code"} and words in error["message"]


def test_an_unknown_model_is_told(app: Any) -> None:
    error = ask(app, "POST", "/v1/completions", {"model": "gpt-4", "prompt": "a"})
    assert error.status == 404 and "debug, parts" in error.json()["error"]["message"]
