"""Plug-ins: the temperature, what no plug-in may do, and `skc eval` with them. Budget: 20 s.

test_adaptation.py has those that train, test_evaluation_resume.py what a kill leaves.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core import presets
from core.cli import main
from core.config import ConfigError
from core.data.bundled import open_data
from core.engine.loading import load_engine
from core.engine.protocol import EngineOptions
from core.export.artifact import write_artifact
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger, LedgerError
from core.scoring.plugins import Plugin, Temperature, load_plugins, log_softmax
from core.scoring.score import score_text
from core.scoring.windows import Windows, cut
from shared_tests.support.command_line import Capture, call
from shared_tests.support.known_scores import VOCAB, make_dataset
from shared_tests.support.plugin_examples import (
    SHORT,
    Adaptation,
    Markov,
    Ordered,
    Predicts,
    config,
    fresh,
    run,
    small,
)
from shared_tests.support.zoo_honest import HonestCache

# Temperature.


@pytest.mark.parametrize("k", [1.5, 0.7, 1.0])
def test_temperature_finds_the_one_that_is_missing(k: float) -> None:
    engine = Markov(k)
    dataset, changes = engine.text(20_000), {"seq": 64, "batch": 4}
    temperature = Temperature()
    helped, _ = run(engine, dataset, [temperature], **changes)
    without, _ = run(engine, dataset, [], **changes)
    true, _ = run(Markov(), dataset, [], **changes)
    assert temperature.inverse == pytest.approx(1 / k, rel=0.02)
    if k == 1.0:
        assert abs(helped.nats / true.nats - 1) < 1e-3
    else:
        gain, left = without.nats - helped.nats, helped.nats - true.nats
        assert gain > 0.02 * true.nats and left < 0.03 * gain, (gain, left)


# What is refused.


def moved(windows: Windows, which: int, start: int = 0, length: int = 0, first: int = 0) -> Windows:
    """Return `windows` with numbers added to those of window `which`."""
    one = np.arange(len(windows.start)) == which % len(windows.start)
    return Windows(windows.start + one * start, windows.length + one * length, windows.first + one * first)


def merged(windows: Windows) -> Windows:
    """Return the first two windows as one."""
    return Windows(windows.start[[0]], windows.length[[0]] * 2, windows.first[[0]])


ORDERS: dict[str, tuple[Callable[[Windows], Windows], str | None, str]] = {
    "repeats": (lambda w: w.take(np.append(0, np.arange(len(w.start)))), "D10", "scored twice"),
    "repeats, shorter": (
        lambda w: Windows(*(np.append(side, extra) for side, extra in zip(w, (0, 8, 0), strict=True))), "D10", "twice",
    ),
    "drops the first": (lambda w: w.take(slice(1, None)), "D5", "target 1 is to be scored 0 times"),
    "drops the last": (lambda w: w.take(slice(0, -1)), "D5", r"target 129 is to be scored 0 times"),
    "drops the very first": (lambda w: moved(w, 0, first=1), "D5", "target 1 is to be scored 0 times"),
    "drops the very last": (lambda w: moved(w, -1, length=-1), "D5", "target 133 is to be scored 0 times"),
    "drops one target": (lambda w: moved(w, 2, first=1), "D5", "target 33 is to be scored 0 times"),
    "overlaps": (lambda w: moved(w, 2, first=-1), "D5", "target 32 is to be scored 2 times"),
    "before the text": (lambda w: w._replace(first=w.first - 1), "D5", "outside"),
    "after the text": (lambda w: w._replace(start=w.start + 1), "D5", "outside"),
    "empty": (lambda w: moved(w, 2, first=99), "D5", "outside 1 to 133, or none"),
    "too long": (lambda w: Windows(*(np.append(a, b) for a, b in zip(merged(w), w.take(slice(2, None)), strict=True))),
                 None, "window of 32 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_must_score_every_target_once(name: str) -> None:
    change, rule, message = ORDERS[name]
    dataset, engine = make_dataset(SHORT), Markov()
    with pytest.raises(LedgerError, match=message) as refused:
        run(engine, dataset, [Plugin(), Ordered(change), Plugin()])
    assert refused.value.rule == rule


def by_document(windows: Windows, starts: np.ndarray) -> Windows:
    """Return windows of documents, the last document first."""
    return windows.take(np.argsort(-np.searchsorted(starts, windows.start, "right"), kind="stable"))


def test_documents_may_change_places_and_the_label_says_so() -> None:
    dataset, options = make_dataset(SHORT), {"windows": "documents", "stride": 4}
    starts = dataset.val.document_starts
    straight, entries = run(Markov(), dataset, [Plugin()], **options)
    same, _ = run(Markov(), dataset, [Ordered(lambda w: w.take(slice(None)))], **options)
    assert same == straight and straight.windows == "documents seq=16 stride=4"
    moved, back = run(Markov(), dataset, [Ordered(lambda w: by_document(w, starts)), Plugin()], **options)
    assert moved.windows == "documents seq=16 stride=4, documents in the order of plug-ins"
    assert moved.bpb == pytest.approx(straight.bpb, rel=1e-12) and (entries["nats"] == back["nats"]).all()
    assert back["order"][0] == back["order"].max() and back["order"][-1] == 1


@pytest.mark.parametrize("windows", ["plain", "sliding", "documents"])
def test_a_document_is_read_forwards_and_in_the_windows_that_the_label_says(windows: str) -> None:
    dataset, options = make_dataset([40, 40, 40]), {"windows": windows, "stride": 8 if windows != "plain" else None}
    for change, message in (
        (lambda w: w.take(slice(None, None, -1)), "before earlier parts of its document"),
        (lambda w: w.take(np.r_[1, 0, 2 : len(w.start)]), "before earlier parts of its document"),
        (lambda w: cut(np.zeros(1, np.int64), np.array([len(dataset.val) - 1]), 16, 5), "cut anew"),
    ):
        with pytest.raises(LedgerError, match=message) as refused:
            run(Markov(), dataset, [Ordered(change)], **options)
        assert refused.value.rule == "D10"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p[..., :-1], r"plug-in Predicts: predictions of shape \(4, 16, 49\), expected \(4, 16, 50\)"),
        (lambda p: p[:, :-1], "shape"),
        (lambda p: p.max(-1), "shape"),
        (lambda p: np.where(np.arange(VOCAB) == 9, np.nan, p), "from nan to nan: expected finite numbers"),
        (lambda p: np.full_like(p, np.inf), "from inf to inf"),
        (lambda p: np.where(np.arange(VOCAB) == 9, -np.inf, p), "from -inf to"),
        (lambda p: p + 40, "expected finite numbers, none above 0"),
        (lambda p: p.astype(np.complex64), "plug-in Predicts: predictions of type complex64, expected float32 or"),
        (lambda p: p + np.log(np.complex64(-1)), "type complex64"),
        (lambda p: p.astype(object), "type object"),
        (lambda p: p.astype(np.float16), "type float16"),
        (lambda p: p.astype(">f4"), "type >f4"),
        (lambda p: p.astype(int), "type int64"),
    ],
)
def test_predictions_must_be_a_distribution_of_finite_costs(change: Any, message: str) -> None:
    dataset = make_dataset(SHORT)
    book = Ledger(len(dataset.val))
    with pytest.raises(LedgerError, match=message) as refused:
        score_text(
            Markov(), Evaluation(dataset.val, config(), plugins=True), book, plugins=[Plugin(), Predicts(change)]
        )
    assert refused.value.rule == "D8" and book.writes == 0


def test_plugins_change_predictions_one_after_the_other() -> None:
    """In the order of eval.plugins, in the engine's own precision, and where none changes anything nothing changes."""
    dataset, model = make_dataset(SHORT), fresh("cuda", small("debug"), "float64")
    _, plain = run(model, dataset, [])
    _, same = run(model, dataset, [Plugin(), Plugin()])
    assert np.abs(plain["nats"]).max() > 0 and np.abs(plain["nats"] - same["nats"]).max() < 1e-12
    sharper, flatter = Predicts(lambda p: log_softmax(2 * p)), Predicts(lambda p: np.log(0.5 * np.exp(p) + 0.5 / VOCAB))
    _, found = run(model, dataset, [sharper, flatter])
    _, other = run(model, dataset, [flatter, sharper])
    text = dataset.val.tokens
    p = np.exp(log_softmax(2 * log_softmax(model.logits(text[None, :16]))))[0, np.arange(16), text[1:17]]
    assert np.abs(found["nats"][:16] + np.log(0.5 * p + 0.5 / VOCAB)).max() < 1e-12
    assert np.abs(found["nats"] - other["nats"]).max() > 1e-3


@pytest.mark.parametrize("plugin", [Adaptation(), Ordered(lambda w: w)])
def test_carry_takes_no_plugin_that_it_cannot_honour(plugin: Plugin) -> None:
    with pytest.raises(
        ConfigError, match=r"eval.windows=stateful with plug-in \w+: .*take sliding windows or documents"
    ):
        run(fresh("cuda", small()), make_dataset(SHORT), [plugin], windows="stateful")


@pytest.mark.parametrize(
    "name, message",
    [
        ("temprature", "eval.plugins: 'temprature' is not a plug-in; did you mean temperature"),
        ("xyz", r"known: temperature, counts \(your own: package.module:Class\)"),
        ("nowhere.at_all:Cache", "No module named 'nowhere'; it is looked for on PYTHONPATH"),
        ("shared_tests.support.plugin_examples:Missing", "not a class that extends core.scoring.plugins.Plugin, or"),
        ("shared_tests.support.plugin_examples:small", "not a class that extends"),
        ("shared_tests.support.plugin_examples:EvalConfig", "not a class that extends"),
        (":Cache", "is not a plug-in"),
        (".zoo:HonestCache", "is not a plug-in"),
        ("shared_tests.support.plugin_examples:", "is not a plug-in"),
    ],
)
def test_plugins_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_plugins(["temperature", name])


def test_plugins_by_name() -> None:
    found = load_plugins(["temperature", "shared_tests.support.zoo:HonestCache"])
    assert [type(plugin) for plugin in found] == [Temperature, HonestCache]


# `skc eval --ledger` and the end of a run.


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that has learned nothing, over the bundled text."""
    config, path = presets.mini(presets.get("debug").config), tmp_path_factory.mktemp("artifact") / "debug.skc"
    model = dataclasses.replace(config.model, vocab=presets.get("debug").config.model.vocab)
    config = dataclasses.replace(config, model=model)
    sha256 = open_data(config.data.path, train=False).tokenizer.sha256
    weights = load_engine("mlx", config, options=EngineOptions(dtype="float32", compile=False)).quantised()
    write_artifact(path, model, weights, tokenizer_sha256=sha256, provenance={"preset": "debug", "train_seq": 64})
    return str(path)


def refused_with(capsys: Capture, *argv: str) -> str:
    """Return the last line, on stderr, of a verb that refuses its input."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    return capsys.readouterr().err.strip().split("\n")[-1]


def test_eval_keeps_a_ledger_and_refuses_another(artifact: str, tmp_path: Path, capsys: Capture) -> None:
    book = str(tmp_path / "book")
    helped = ("--plugins", "temperature", "counts(candidates=4)", "shared_tests.support.zoo:HonestCache")
    argv = ("eval", artifact, "--documents", "2", "--batch", "16", "--backend", "mlx", "--ledger", book)
    found = call(capsys, *argv, *helped)["score"]
    assert found["plugins"] == list(helped[1:]) and found["label"] == "estimate"
    entries = Ledger.read(book).entries
    assert (entries["order"] > 0).sum() == found["targets"] and not Path(f"{book}.plugins").exists()
    assert call(capsys, *argv, *helped)["score"] == found
    for others in ((), helped[:2], (*helped, "--seq", "32"), (*helped, "--batch", "8")):
        said = refused_with(capsys, *argv, *others)
        assert "book: holds another evaluation" in said and "give another file" in said
    assert Ledger.read(book).entries.tobytes() == entries.tobytes()
    assert "did you mean temperature?" in refused_with(capsys, *argv, "--plugins", "temprature")
    said = refused_with(
        capsys, *argv[:-2], "--windows", "stateful", "--plugins", "shared_tests.support.plugin_examples:Adaptation"
    )
    assert "with plug-in Adaptation" in said
