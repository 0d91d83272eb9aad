"""The routes of the page on both backends: text and bits are those of `skc sample` and the library. Budget: 8 s."""

import bz2
import math
from typing import Any

import brotli
import numpy as np
import pytest

from core.decoding.generate import Text, write
from core.decoding.settings import Decoding
from core.scoring.evaluation import Evaluation, one_document
from core.scoring.score import score
from core.serve.reading import series
from core.serve.surprise import predictions
from shared_tests.support.harness import BACKENDS
from shared_tests.support.serving import app_of, ask, never, served

PROMPT = "She was glad"
TEXT = "It was naïve of Mr. Knightley, she thought; 東 is “far” away.\nAnd so it was. " * 3


def test_the_models_are_told_with_what_can_be_asked_of_them() -> None:
    reply = ask(app_of([served("cuda"), served("cuda", parts=True)]), "GET", "/api/models").json()
    plain, parts = reply["models"]
    assert (plain["name"], plain["vocab"], plain["parts"], plain["limit"]) == ("debug", 1024, [], 64)
    assert plain["parameters"] == 32_900 and plain["bytes"] is None and plain["drafts"] == ["none", "ngram", "jacobi"]
    assert (parts["parts"], parts["limit"]) == (["bank", "engram", "capsules"], None)
    assert reply["limits"] == {"body": 1 << 20, "letters": 16_384, "tokens": 1024, "seconds": 50.0, "requests": 8}


def text_by_hand(backend: str, how: Decoding, parts: bool = False) -> Text:
    """Return what `skc sample` writes."""
    model = served(backend, parts)
    text = Text(model.tokenizer, PROMPT)
    model.engine.turn(lambda: list(write(model.engine.own, [text], how, model.limit)))
    return text


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_text_is_that_of_sample_and_bits_are_the_models(backend: str) -> None:
    app, model = app_of([served(backend)]), served(backend)
    asked = {"model": "debug", "prompt": PROMPT, "tokens": 70, "seed": 3, "temperature": 0.9, "top_k": None}
    *grown, (name, done) = ask(app, "POST", "/api/generate", asked).events()
    text = text_by_hand(backend, Decoding(70, 0.9, None, seed=3))
    assert PROMPT + "".join(event["text"] for _, event in grown) == str(text)
    assert (name, done["tokens"], done["reason"]) == ("done", 70, "tokens") and done["tokens_per_second"] > 0
    tokens = [token for _, event in grown for token in event["tokens"]]
    assert [token["piece"] for token in tokens] == list(map(model.tokenizer.piece, text.ids[text.begin :]))
    ids = np.array(text.ids[: model.limit], np.int32)  # further on it begins anew
    for token, i, row in zip(tokens, ids[text.begin :], bits_by_hand(model, ids)[text.begin - 1 :], strict=False):
        assert token["bits"] == pytest.approx(row[i], abs=2e-3)
        assert [one["bits"] for one in token["alternatives"]] == pytest.approx(np.sort(row)[:5], abs=2e-3)
        best = {model.tokenizer.piece(j) for j in np.argsort(row)[:8]}
        assert {one["piece"] for one in token["alternatives"]} <= best


def bits_by_hand(model: Any, ids: np.ndarray) -> np.ndarray:
    """Return the bits that every token would cost at every place but the first, (places, vocab), from whole logits."""
    logits = model.engine.logits(ids[None])[0, :-1].astype(np.float64)
    return (np.log(np.exp(logits).sum(-1, keepdims=True)) - logits) / math.log(2.0)


def test_settings_left_out_are_those_of_sample_and_drafts_change_no_letter() -> None:
    app, texts = app_of([served("cuda", parts=True)]), []
    for draft in ("none", "ngram", "jacobi"):
        events = ask(
            app, "POST", "/api/generate", {"model": "parts", "prompt": PROMPT, "tokens": 24, "draft": draft}
        ).events()
        assert sum(len(event["tokens"]) for _, event in events[:-1]) == 24
        texts.append(PROMPT + "".join(event["text"] for _, event in events[:-1]))
    assert texts == [str(text_by_hand("cuda", Decoding(24), parts=True))] * 3


def test_a_draft_brings_each_token_the_bits_of_its_own_place() -> None:
    """Greedy text of drafts: the likeliest token is the first alternative, wherever in a pass it was said."""
    asked = {"model": "parts", "prompt": "a a a a a a", "tokens": 40, "temperature": 0, "draft": "jacobi"}
    events = ask(app_of([served("cuda", parts=True)]), "POST", "/api/generate", asked).events()
    assert max(len(event["tokens"]) for _, event in events[:-1]) > 1, "no draft was kept: this test shows nothing"
    for _, event in events[:-1]:
        assert all(token["alternatives"][0]["piece"] == token["piece"] for token in event["tokens"])


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_cover_the_text_and_cost_what_the_model_says(backend: str) -> None:
    model = served(backend, parts=True)
    reply = ask(app_of([model]), "POST", "/api/tokens", {"model": "parts", "text": TEXT}).json()
    read, tokens = reply["read_as"], reply["tokens"]
    assert read == model.tokenizer.decode(model.tokenizer.encode(TEXT))
    assert [token["start"] for token in tokens] == [0, *(token["end"] for token in tokens[:-1])]
    assert tokens[-1]["end"] == len(read) and all("without" not in token for token in tokens)
    plain = [token for token in tokens if "<0x" not in token["piece"]]
    assert all(read[token["start"] : token["end"]].strip() == token["piece"].strip() for token in plain)
    assert any("<0x" in token["piece"] for token in tokens)
    ids = np.array(Text(model.tokenizer, TEXT).ids, np.int32)
    expected = np.take_along_axis(bits_by_hand(model, ids), ids[1:, None], 1)[:, 0]
    assert np.allclose([token["bits"] for token in tokens], expected, atol=2e-3)
    assert reply["bits"] == pytest.approx(expected.sum(), abs=0.05)
    assert reply["bytes"] == len(read.encode()) and reply["bpb"] == pytest.approx(reply["bits"] / reply["bytes"])


def test_a_model_with_a_limit_reads_as_it_writes() -> None:
    """Behind its limit a model begins anew with the later half: the logits are those by which it would write on."""
    model = served("cuda")
    ids = np.array(Text(model.tokenizer, TEXT * 2).ids, np.int32)[:150]
    rows = np.concatenate(list(predictions(model.engine, ids, model.limit, never())))
    assert len(rows) == len(ids) - 1
    said: list[np.ndarray] = []
    text = Text(model.tokenizer, "")

    def choose(logits: np.ndarray, *given: Any) -> int:
        said.append(logits)
        return int(ids[len(said)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("core.decoding.generate.say", choose)
        for _ in write(model.engine, [text], Decoding(149, 1.0), model.limit):  # type: ignore[arg-type]
            pass
    assert text.ids == ids.tolist() and np.allclose(rows, said, atol=2e-4)


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_score_is_the_library_s_and_stands_beside_two_compressors(backend: str) -> None:
    model = served(backend)
    reply = ask(app_of([model]), "POST", "/api/score?model=debug", TEXT.encode()).json()
    own = model.engine.own
    expected = model.engine.turn(score, own, Evaluation.of(one_document(model.tokenizer, TEXT), model.config))
    assert reply["bpb"] == pytest.approx(expected.bpb) and reply["bytes"] == expected.bytes
    data = TEXT.encode()
    assert reply["bz2"] == 8 * len(bz2.compress(data)) / len(data)
    assert reply["brotli"] == 8 * len(brotli.compress(data)) / len(data)
    last = reply["series"][-1]
    assert last["bpb"] == pytest.approx(expected.bpb) and last["byte"] == expected.bytes


def test_a_curve_has_few_points_and_its_parts_add_up() -> None:
    nats, costs = np.linspace(1, 2, 5000), np.tile([3, 0, 2, 1], 1250)
    rows = series(nats, costs, 7500)
    assert len(rows) <= 400 and rows[-1]["byte"] == 7500
    bits, before = 0.0, 0
    for row in rows:
        bits += row["here"] * (row["byte"] - before)
        before = row["byte"]
        assert row["bpb"] == pytest.approx(bits / row["byte"])
    assert bits == pytest.approx(nats.sum() / math.log(2))
    assert series(nats, costs, 15_000)[-1]["bpb"] == pytest.approx(bits / 15_000), "bytes of the raw text"


@pytest.mark.parametrize("text, words", [(b"", "no tokens"), (b"\xff", "not UTF-8"), (b"a\xed\xa0\x80", "byte 1")])
def test_what_cannot_be_scored_is_told(text: bytes, words: str) -> None:
    reply = ask(app_of([served("cuda")]), "POST", "/api/score?model=debug", text)
    assert reply.status == 400 and words in reply.json()["error"]["message"]
    assert ask(app_of([served("cuda")]), "POST", "/api/score", b"a").status == 404
    assert ask(app_of([served("cuda")]), "POST", "/api/tokens", {"model": "debug", "text": ""}).status == 400
