"""A part's output set to 0: what the engine says then is what the oracle says that never adds it. Budget: 6 s."""

import functools
import math
from typing import Any

import numpy as np
import pytest

from core import presets
from core.config import RunConfig, changed
from core.decoding.generate import Text
from core.engine.loading import load_engine
from core.engine.protocol import EngineOptions
from core.serve.models import Served, outputs, silenced
from core.serve.shared_engine import SharedEngine
from shared_tests.oracle import MODULES, PARTS
from shared_tests.oracle import model as oracle
from shared_tests.support.harness import BACKENDS, EVERYTHING, engine, mini, tokens, working_weights
from shared_tests.support.serving import THREAD, app_of, ask, bundled_tokenizer, served

NAMES = ("bank", "engram", "capsules")
SCALE = 5.0
"""Of the matrices: so large that every part shows."""


def silence_oracle(patch: pytest.MonkeyPatch, part: str) -> None:
    """Let the oracle's part add nothing, whatever its weights are."""
    if part == "engram":
        patch.setitem(PARTS, "engram", lambda config, w, stream, stage, text: stream)
        return

    def nothing(store: Any, eps: float, w: Any, write: Any, read: Any, values: Any, text: Any) -> Any:
        return np.zeros_like(values), ()

    patch.setattr(MODULES["bank" if part == "bank" else "skc"], "capsules", nothing)


def shared_blocks() -> RunConfig:
    """Return a model whose SKC blocks are used by several layers, and layers repeated."""
    config = mini("skc_mac")
    return RunConfig(
        preset="shared", model=changed(config.model, {"layers": 4, "shared_blocks": 2}), train=config.train
    )


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", NAMES)
@pytest.mark.parametrize("name", [EVERYTHING, "shared"])
def test_silenced_weights_give_what_the_oracle_gives_without_the_part(
    backend: str, part: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = shared_blocks() if name == "shared" else mini(name)
    rows = tokens("silenced", 2, 24, config.model.vocab, config.model.bos)
    first = engine(backend, config, working_weights(config.model, SCALE), dtype="float64")
    weights = first.weights()
    whole = oracle(config.model, weights, rows)
    silence_oracle(monkeypatch, part)
    expected = oracle(config.model, weights, rows)
    assert np.abs(expected - whole).max() > 1e-3, "the part changes nothing here"
    first.load_params(silenced(config.model, weights, part))
    assert np.abs(first.logits(rows) - expected).max() < 1e-9


def test_a_part_is_found_wherever_it_stands() -> None:
    model = mini(EVERYTHING).model
    assert outputs(model, "bank") == ["bank_middle.gate", "bank_head.gate"]
    assert outputs(model, "engram") == ["engram.value.weight"] and len(outputs(model, "capsules")) >= 2
    plain = presets.get("pr1394").config.model  # has gates of other parts
    assert [outputs(plain, part) for part in NAMES] == [[], [], []]


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_difference_is_told_token_by_token_for_stored_weights(backend: str) -> None:
    """Of a ternary run, whose second engine gets the weights as the first uses them; the oracle knows of no engine."""
    config = presets.get("skc_mac").config
    small = {"dim": 64, "layers": 2, "koopman.dim": 64, "mlp.hidden": 64, "engram.buckets": 101, "engram.dim": 16}
    config = RunConfig(preset="skc_mac", model=changed(config.model, small), train=config.train)
    build = functools.partial(load_engine, backend, config, options=EngineOptions(compile=False))
    own = THREAD.submit(build, working_weights(config.model, SCALE), quantise=True).result()
    model = Served("ternary", "", config, bundled_tokenizer(), SharedEngine(own, THREAD))
    model.build = build
    text = "She was glad of it, and so was he, for a while. " * 3  # capsules are read from the second block on
    ids, app = np.array(Text(model.tokenizer, text).ids, np.int32), app_of([model])
    stored = model.engine.turn(own.weights)
    plain = bits(oracle(config.model, stored, ids[None])[0], ids)
    for part in NAMES:
        rows = ask(app, "POST", "/api/tokens", {"model": "ternary", "text": text, "without": part}).json()["tokens"]
        with pytest.MonkeyPatch.context() as patch:
            silence_oracle(patch, part)
            change = bits(oracle(config.model, stored, ids[None])[0], ids) - plain
        assert np.abs(change).max() > 0.01, "the part changes nothing here"
        assert np.allclose([row["without"] for row in rows], change, atol=5e-4)


def bits(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return what each token but the first costs, by the logits of all."""
    wide = logits[:-1].astype(np.float64)
    return (np.log(np.exp(wide).sum(-1)) - np.take_along_axis(wide, ids[1:, None], 1)[:, 0]) / math.log(2.0)


def test_a_second_engine_is_built_once_for_each_part_and_the_first_stays_as_it_is() -> None:
    model = served("cuda", parts=True)
    before = model.engine.turn(model.engine.own.weights)
    engines = [model.without(part) for part in (*NAMES, *NAMES)]
    assert engines[:3] == engines[3:] and len({id(one.own) for one in engines}) == 3
    after = model.engine.turn(model.engine.own.weights)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    for part, one in zip(NAMES, engines, strict=False):
        theirs = model.engine.turn(one.own.weights)
        changed_names = {name for name in before if not np.array_equal(before[name], theirs[name])}
        assert changed_names == set(outputs(model.config.model, part))


def test_a_part_that_a_model_lacks_is_refused() -> None:
    app = app_of([served("cuda")])
    reply = ask(app, "POST", "/api/tokens", {"model": "debug", "text": "a", "without": "bank"})
    assert reply.status == 400 and "debug has no bank" in reply.json()["error"]["message"]
    assert ask(app, "POST", "/api/tokens", {"model": "debug", "text": "a", "without": "smear"}).status == 400
    assert ask(app, "POST", "/api/tokens", {"model": "debug", "text": "a", "without": None}).status == 200
