"""One stream: every target once, each chunk scored before it is learned from, on any number of ranks. Budget: 15 s."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import core.scoring.snapshots
from core.data.batch import Batch
from core.engine.adapting import AdaptStep
from core.engine.protocol import Arrays, StepResult
from core.model.scopes import loose_names
from core.scoring.adapt.stream import learn_chunk, stream_chunks
from core.scoring.adapt.weights import LooseWeights, scored_rows
from core.scoring.ledger import Ledger, LedgerError
from core.scoring.plugins import load_plugins
from core.scoring.score import score_text
from core.scoring.windows import Windows
from shared_tests.support.harness import BACKENDS
from shared_tests.support.plugin_examples import fresh, held, small
from shared_tests.support.streams import DOCUMENTS, FORMS, Recorder, run, stream

pytestmark = pytest.mark.pair
CHUNK = 24


def targets_of(windows: Windows) -> list[int]:
    """Return the positions that windows score, in order."""
    sides = zip(windows.start, windows.length, windows.first, strict=True)
    return [int(start + i + 1) for start, length, first in sides for i in range(first, length)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 24, 64, 500])
def test_chunks_hold_every_target_once_in_order(form: str, size: int) -> None:
    """Learned from are all chunks of each text but the last, each when its targets have been scored and no later."""
    evaluation = stream(chunk=size, **FORMS[form])
    windows, starts = evaluation.rows(), evaluation.split.document_starts
    chunks = list(stream_chunks(windows, evaluation.config.adapt, starts))
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    scored = [place for chunk in chunks for place in targets_of(chunk.windows)]
    assert scored == targets_of(windows)
    texts: list[list[Any]] = []
    for chunk in chunks:
        texts += [[chunk]] if chunk.anew else []
        if not chunk.anew:
            texts[-1].append(chunk)
    for text in texts:
        all_ = [place for chunk in text for place in targets_of(chunk.windows)]
        seen: list[int] = []
        for i, chunk in enumerate(text):
            seen += targets_of(chunk.windows)
            last = i + 1 == len(text)
            assert chunk.places.tolist() == ([] if last else all_[i * size : (i + 1) * size])
            assert seen[: len(chunk.places) + i * size] == all_[: len(chunk.places) + i * size], "learned before scored"
            assert last or len(seen) < (i + 1) * size + evaluation.config.seq, "scored more than it had to"
            expected = 0.1 * (1 + np.cos(np.pi * i / len(text))) / 2
            assert abs(chunk.lr - expected) < 1e-15
        assert len(text) == -(-len(all_) // size)
    documents = sum(n > 0 for n in DOCUMENTS[:-1]) + (DOCUMENTS[-1] > 1)
    assert len(texts) == (documents if form == "reset" else 1)


@pytest.mark.parametrize("form", FORMS)
def test_a_pass_scores_first_and_learns_then(form: str) -> None:
    """The order of what an engine is asked for; and what it learns from is the text's own rows, without the end."""
    engine, evaluation = Recorder(), stream(**FORMS[form])
    entries = run(engine, evaluation)
    chunks = list(stream_chunks(evaluation.rows(), evaluation.config.adapt, evaluation.split.document_starts))
    expected, version, moved = ["loosen"], 0, False
    for chunk in chunks:
        if chunk.anew and moved:
            expected, version, moved = [*expected, "tighten", "loosen"], version + 1, False
        expected += ["nll"] * -(-len(chunk.windows.start) // min(3, -(-CHUNK // evaluation.stride)))
        assert all(entries["version"][place - 1] == version for place in targets_of(chunk.windows))
        learned = 2 if len(chunk.places) else 0
        expected, version, moved = expected + ["descend"] * learned, version + learned, moved or learned > 0
    assert engine.calls == [*expected, "tighten"]
    tokens = evaluation.split.read(0, len(evaluation.split))
    learned_from = iter(zip(engine.batches, engine.steps, strict=True))
    for chunk in chunks:
        for _ in range(2 if len(chunk.places) else 0):
            batch, step = next(learned_from)
            real = batch.targets >= 0
            assert batch.tokens.shape == batch.targets.shape == (-(-len(chunk.places) // 12), 12)
            assert (batch.targets[real] == tokens[chunk.places]).all()
            assert (batch.tokens[real] == tokens[chunk.places - 1]).all()
            assert step == AdaptStep("sgd", chunk.lr, momentum=0.9, clip=1.0)
    assert next(learned_from, None) is None


def test_nothing_is_learned_before_it_is_scored() -> None:
    evaluation, engine = stream(), Recorder()
    split = evaluation.split
    ledger = Ledger(len(split))
    weights = LooseWeights(engine, split, ledger, 12, ("embed.weight",))
    chunk = next(stream_chunks(evaluation.rows(), evaluation.config.adapt, split.document_starts))
    ledger.write(chunk.places[:-1], np.ones(len(chunk.places) - 1), 0)
    with pytest.raises(LedgerError, match="target 24 is not") as refused:
        learn_chunk(weights, ledger, chunk, evaluation.config.adapt)
    assert refused.value.rule == "D9" and "descend" not in engine.calls
    other = Ledger(len(split)).write(chunk.places, np.ones(len(chunk.places)), 0)
    for ranges in (other, ()):
        with pytest.raises(LedgerError) as refused:
            weights.train(ranges, AdaptStep("sgd", 0.1))
        assert refused.value.rule == "D9" and "descend" not in engine.calls
    rows = scored_rows(split, ledger, ledger.scored(chunk.places[2:9]), 5)
    text = split.read(0, len(split))
    assert rows.targets.tolist() == [text[3:8].tolist(), [*text[8:10].tolist(), -1, -1, -1]]
    assert rows.tokens.tolist() == [text[2:7].tolist(), [*text[7:9].tolist(), 0, 0, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["sliding", "reset"])
def test_a_pass_is_what_a_plain_loop_gives(backend: str, form: str) -> None:
    """Windows one by one and updates on rows of the text, by the engine's own methods: the same nats, to rounding."""
    config = small("debug")
    evaluation = stream(loose_names(config.model, ("all",)), **FORMS[form])
    model = fresh(backend, config, "float64")
    before = held(model)
    entries = run(model, evaluation)
    assert held(model) == before, "the weights were not put back"
    text, names, size = evaluation.split.read(0, len(evaluation.split)), evaluation.loose, 24
    starts = [*evaluation.split.document_starts.tolist(), len(text) - 1] if form == "reset" else [0, len(text) - 1]
    nats = np.full(len(text) - 1, np.nan)
    for begin, end in zip(starts, starts[1:], strict=False):
        model.tighten()
        model.loosen(names)
        done, count = 0, end - begin
        for chunk in range(-(-count // size)):
            while done < min((chunk + 1) * size, count):
                stop = min(count, max(done + 5, 12))
                window = slice(begin + max(0, -(-(stop - 12) // 5) * 5), begin + stop)
                cost = model.nll(text[None, window], text[None, window.start + 1 : window.stop + 1])[0]
                nats[begin + done : begin + stop] = cost[begin + done - window.start :]
                done = stop
            for _ in range(2 if (chunk + 1) * size < count else 0):
                row = text[begin + chunk * size : begin + (chunk + 1) * size + 1]
                lr = 0.1 * (1 + np.cos(np.pi * chunk / -(-count // size))) / 2
                batch = Batch(row[:-1].reshape(2, 12), row[1:].reshape(2, 12))
                model.descend(batch, AdaptStep("sgd", lr, clip=1.0))
    model.tighten()
    assert np.abs(entries["nats"] - nats).max() < 1e-10
    plain = model.nll(text[None, :13][:, :-1], text[None, 1:13])[0]
    assert np.abs(entries["nats"][:12] - plain).max() < 1e-10
    assert len(np.unique(entries["version"])) > 3


def test_backends_score_a_stream_alike() -> None:
    config = small("hybrid")
    evaluation = stream(loose_names(config.model, ("skc_safe", "*.weight"), frozen=1), **FORMS["sliding"])
    nats = [run(fresh(backend, config, "float64"), evaluation)["nats"] for backend in BACKENDS]
    fixed = run(fresh("cuda", config, "float64"), stream(evaluation.loose, lr=0.0, **FORMS["sliding"]))["nats"]
    assert np.abs(nats[0] - nats[1]).max() < 1e-8
    assert np.abs(nats[0] - fixed).max() > 1e-2 and np.abs(nats[0] - fixed)[:24].max() < 1e-8


class Killed(Exception):
    """What a test kills an evaluation with."""


class Mortal:
    """An engine that dies at its N-th update, and counts forward passes."""

    def __init__(self, engine: Any, updates: int) -> None:
        self._engine, self._left, self.passes = engine, updates, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def descend(self, *given: Any) -> Any:
        """Learn, or die."""
        self._left -= 1
        if self._left < 0:
            raise Killed
        return self._engine.descend(*given)

    def nll(self, *given: Any) -> Arrays:
        """Score and count."""
        self.passes += 1
        return self._engine.nll(*given)

    def predicted(self, *given: Any) -> Any:
        """Score and count."""
        self.passes += 1
        return self._engine.predicted(*given)


@pytest.mark.parametrize("form", ["sliding", "reset"])
@pytest.mark.parametrize("copies", [False, True])
def test_a_killed_stream_goes_on(form: str, copies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its last copy, or from the start; what the ledger holds is repeated to the same numbers, and not written."""
    monkeypatch.setattr(core.scoring.snapshots, "SNAPSHOT_EVERY", -1.0 if copies else 1e9)
    choices, config = ("temperature", "counts") if form == "sliding" else (), small("debug")
    evaluation, path = stream(loose_names(config.model, ("blocks.*",)), **FORMS[form]), tmp_path / "ledger"
    whole, last = Mortal(fresh("cuda", config), 10**6), Mortal(fresh("cuda", config), 10**6)
    expected = run(whole, evaluation, plugins=load_plugins(choices))
    if choices:
        assert np.abs(run(fresh("cuda", config), evaluation)["nats"] - expected["nats"]).max() > 1e-2
    for updates in (3, 1):
        with LedgerAt(path, evaluation) as ledger, pytest.raises(Killed):
            run(Mortal(fresh("cuda", config), updates), evaluation, ledger, load_plugins(choices))
        assert Path(f"{path}.plugins").exists() == copies
    with LedgerAt(path, evaluation) as ledger:
        entries = run(last, evaluation, ledger, load_plugins(choices))
    assert (entries["nats"] == expected["nats"]).all() and (entries["version"] == expected["version"]).all()
    assert (last.passes < whole.passes) == copies and not Path(f"{path}.plugins").exists()


class LedgerAt:
    """A ledger at a path, closed at the end."""

    def __init__(self, path: Path, evaluation: Any) -> None:
        self._ledger = Ledger.open(path, len(evaluation.split), "key")

    def __enter__(self) -> Ledger:
        return self._ledger

    def __exit__(self, *_: object) -> None:
        self._ledger.close()


@pytest.mark.parametrize("fault", ["cut", "other", "weights"])
def test_a_copy_that_is_not_of_this_evaluation_is_refused(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core.scoring.snapshots, "SNAPSHOT_EVERY", -1.0)
    config, path = small("debug"), tmp_path / "ledger"
    evaluation, copy = stream(loose_names(config.model, ("blocks.*",)), **FORMS["sliding"]), Path(f"{path}.plugins")
    with LedgerAt(path, evaluation) as ledger, pytest.raises(Killed):
        run(Mortal(fresh("cuda", config), 3), evaluation, ledger)
    message = {"cut": "damaged", "other": "of another ledger", "weights": "is not a parameter"}[fault]
    if fault == "cut":
        copy.write_bytes(copy.read_bytes()[:-9])
    elif fault == "other":
        path.unlink()
        with LedgerAt(path, evaluation) as ledger:
            ledger.write(np.arange(1, 13), np.full(12, 3.0), 0)
    else:
        evaluation = stream(loose_names(config.model, ("blocks.1.*",)), **FORMS["sliding"])
    model = fresh("cuda", config)
    before = held(model)
    with LedgerAt(path, evaluation) as ledger, pytest.raises(LedgerError, match=message):
        run(model, evaluation, ledger)
    assert held(model) == before


def test_updates_that_are_left_out_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line at the end, with how many; none where all were made."""
    for finite, words in ((True, []), (False, ["left out"])):
        monkeypatch.setattr(Recorder, "descend", lambda *_, good=finite: StepResult(1.0, 1.0, good))
        said: list[str] = []
        evaluation = stream(windows="plain")
        score_text(Recorder(), evaluation, Ledger(len(evaluation.split)), say=said.append)
        assert [word in line for word, line in zip(words, said, strict=True)] == [True] * len(words)
    updates = 2 * (-(-(len(evaluation.split) - 1) // CHUNK) - 1)
    assert said[0].startswith(f"WARNING: {updates} updates were left out")


def test_weights_that_went_too_far_get_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, evaluation = Recorder(), stream(windows="plain")
    monkeypatch.setattr(engine, "nll", lambda tokens, _: np.full(tokens.shape, np.nan if engine.steps else 1.0))
    with pytest.raises(LedgerError, match="got nan nats: .*; if what learned went too far, take a smaller") as ended:
        run(engine, evaluation)
    assert ended.value.rule == "D8" and engine.calls[-1] == "tighten"
