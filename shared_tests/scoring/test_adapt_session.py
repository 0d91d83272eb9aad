"""The adaptive path: scored, entered, then learned from; the same on any number of ranks; goes on. Budget: 15 s."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.config import ConfigError
from core.engine.adapting import AdaptStep
from core.model.adapters import AdapterSpec
from core.scoring import snapshots
from core.scoring.adapt import session
from core.scoring.adapt.rows import Rows
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger, LedgerError
from core.scoring.score import score, windows_in_words
from shared_tests.support.adapting import FORMS, LENGTHS, evaluation, run, settings
from shared_tests.support.adapting_numpy import SITES, AdaptingEngine, Talk
from shared_tests.support.known_scores import VOCAB, make_dataset

SHARES = ("warm", "predictors", "carried", "phases")
"""Forms in which rounds hang on those before them."""
EXACT = 1e-9
"""Nats of any number of ranks, in float64."""


def plain_nats(windows: str) -> np.ndarray:
    """Return what the documents cost without adaptation, in the windows of the chunks."""
    return run(evaluation(settings(windows=windows, adapt_lr=0.0)))["nats"]


def test_gradients_are_those_of_small_steps() -> None:
    engine, spec = AdaptingEngine(9), AdapterSpec(2, 3.0, SITES)
    draw = np.random.default_rng(0)
    tokens, targets = draw.integers(1, 9, (2, 7)), draw.integers(1, 9, (2, 7))
    adapters = engine.adapters(spec, 2, 0)
    for value in adapters.values.values():
        value += 0.3 * draw.standard_normal(value.shape)
    shares, state = draw.random((2, 7)), draw.standard_normal((2, 6))

    def cost() -> float:
        return float((engine.adapted(adapters, tokens, targets, None, state).nll() * shares).sum())

    grads = engine.adapted(adapters, tokens, targets, None, state).gradient(shares)
    for key, value in adapters.values.items():
        for place in [(0, 0, 1), (1, 1, 3)]:
            before = value[place]
            ends = []
            for step in (1e-6, -1e-6):
                value[place] = before + step
                ends.append(cost())
            value[place] = before
            assert abs((ends[0] - ends[1]) / 2e-6 - grads[key][place]) < 1e-7


@pytest.mark.parametrize("form", FORMS)
def test_every_target_once_by_the_rows_own_adapters(form: str) -> None:
    given = evaluation(settings(**FORMS[form]))
    entries = run(given)
    assert (entries["order"] > 0).all()
    starts, order = given.split.document_starts, given.config.adapt.order
    ends = np.append(starts[1:], len(given.split) - 1)
    longest = np.argsort(starts - ends, kind="stable") if order == "length" else np.arange(len(starts))
    for number, document in enumerate(longest):
        own = entries[starts[document] : ends[document]]
        assert (own["row"] == number + 1).all(), "a document has adapters of its own"
        assert own["version"].tolist() == [place // 5 for place in range(len(own))], "one update behind each chunk"
    plain = plain_nats(given.config.windows)
    first = entries["version"] == 0
    if form not in SHARES:
        assert np.abs(entries["nats"] - plain)[first].max() == 0, "before it has learned a document costs what it did"
    assert np.abs(entries["nats"] - plain)[~first].max() > 1e-2, "what is tested must matter"


@pytest.mark.parametrize("windows", ["documents", "stateful"])
def test_what_cannot_learn_costs_what_documents_cost(windows: str) -> None:
    """With a rate of 0, and windows that hold a whole document, or carry its state: what the plain path says."""
    given = evaluation(settings(windows=windows, adapt_lr=0.0, seq=64))
    plain = Evaluation(given.split, settings(windows=windows, seq=64))
    ours, theirs = run(given)["nats"], run(plain)["nats"]
    assert np.abs(ours - theirs).max() <= 1e-11


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_agree(form: str, world: int) -> None:
    given = evaluation(settings(**FORMS[form]))
    alone = run(given)
    for entries in Talk(world).run(lambda ranks: run(given, ranks=ranks)):
        assert np.abs(entries["nats"] - alone["nats"]).max() <= EXACT
        assert (entries["row"] == alone["row"]).all() and (entries["version"] == alone["version"]).all()


@pytest.mark.parametrize("form", ["documents", "stateful", "steps", "sgd"])
def test_a_document_by_hand(form: str) -> None:
    """One document, chunk by chunk in a plain loop: window, mean cost of the chunk's targets, updates, rates, state."""
    given = evaluation(settings(**FORMS[form]), [33])
    tokens, adapt, costs = given.split.tokens, given.config.adapt, []
    engine, count = AdaptingEngine(VOCAB), len(tokens) - 1
    adapters, taken = engine.adapters(AdapterSpec(2, 8.0, SITES), 1, 0), 0
    state = engine.start(1) if given.carries else None
    for chunk in range(-(-count // 5)):
        end = min(5 * chunk + 5, count)
        begin = 5 * chunk if given.carries else max(0, end - 12)
        inputs, targets = tokens[None, begin:end], tokens[None, begin + 1 : end + 1]
        shares = np.where(np.arange(begin, end) >= 5 * chunk, 1 / (end - 5 * chunk), 0.0)[None]
        tape = engine.adapted(adapters, inputs, targets, None, state)
        costs += tape.nll()[0, 5 * chunk - begin :].tolist()
        after = engine.commit(tape, end - begin) if given.carries else None
        for _ in range(adapt.steps):
            again = engine.adapted(adapters, inputs, targets, None, state)
            rule = {"rule": adapt.rule, "momentum": adapt.momentum, "clip": adapt.clip}
            adapters = engine.adapt(again, shares, AdaptStep(lr=adapt.lr, taken=np.array([taken]), **rule))
            taken += 1
        state = after
    assert np.abs(run(given)["nats"] - costs).max() <= 1e-12


def test_what_is_never_reset_is_one_stream() -> None:
    given = evaluation(settings(adapt_reset="never", adapt_documents=1, adapt_schedule="cosine"))
    alone = run(given)
    assert (alone["row"] == 1).all() and (np.diff(alone["version"]) >= 0).all()
    chunks = sum(-(-(n - (i + 1 == len(LENGTHS))) // 5) for i, n in enumerate(LENGTHS))
    assert alone["version"].max() == chunks - 1, "every chunk is learned from but the text's last"
    anew = run(evaluation(settings(adapt_documents=1)))
    second = given.split.document_starts[1]
    assert np.abs(anew["nats"] - alone["nats"])[second : second + 1].max() > 1e-3, "kept over documents"
    for entries in Talk(2).run(lambda ranks: run(given, ranks=ranks)):
        assert (entries["nats"] == alone["nats"]).all()


def test_a_document_does_not_see_its_neighbours() -> None:
    """Alone, and beside others: the same bits; so is every document of a batch after others of it have changed."""
    together = run(evaluation(settings(adapt_documents=64)))
    alone = run(evaluation(settings(adapt_documents=1), LENGTHS[:1]))
    assert np.abs(together["nats"][: LENGTHS[0] - 1] - alone["nats"]).max() <= 1e-12
    given = evaluation(settings(adapt_documents=64))
    before, begin, end = run(given), *given.split.document_starts[[4, 8]]
    tokens = given.split.tokens
    inner = np.arange(begin, end)[tokens[begin:end] != 1]
    tokens[inner] = (tokens[inner] - 3) % (VOCAB - 4) + 4
    after = run(given)
    other = np.ones(len(before), bool)
    other[begin:end] = False  # the last target is the next document's BOS, which has not changed
    assert (before["nats"][other] == after["nats"][other]).all()
    assert (before["nats"][~other] != after["nats"][~other]).mean() > 0.8


@pytest.mark.parametrize("form", [form for form in FORMS if form not in SHARES])
def test_flips(form: str) -> None:
    """Another token changes no cost of an earlier position, nor one of another document: bit for bit."""
    given = evaluation(settings(**FORMS[form]))
    before, tokens = run(given), given.split.tokens
    starts = given.split.document_starts
    for place in (45, 100, len(tokens) - 1):
        if tokens[place] == 1:
            place += 1
        kept = tokens[place]
        tokens[place] = (kept - 3) % (VOCAB - 4) + 4
        changed = np.flatnonzero(run(given)["nats"] != before["nats"]) + 1
        tokens[place] = kept
        document = starts[np.searchsorted(starts, place, "right") - 1]
        end = np.append(starts, len(tokens) - 1)[np.searchsorted(starts, place, "right")]
        assert place in changed and document < changed.min() and changed.min() == place and changed.max() <= end


@pytest.mark.parametrize("form", SHARES)
def test_flips_reach_later_rounds_alone(form: str) -> None:
    """Where rounds hang on those before them: nothing of the same round but the document's own later targets."""
    given = evaluation(settings(**FORMS[form]))
    before, tokens = run(given), given.split.tokens
    starts, side = given.split.document_starts, given.config.adapt.documents * given.config.round
    later = 0
    for place in (2, 45, 100):
        place += int(tokens[place] == 1)
        kept = tokens[place]
        tokens[place] = (kept - 3) % (VOCAB - 4) + 4
        changed = np.flatnonzero(run(given)["nats"] != before["nats"]) + 1
        tokens[place] = kept
        document = np.searchsorted(starts, place, "right") - 1
        following, end = [*starts, len(tokens)], (document // side + 1) * side
        free = (changed <= following[document + 1]) | (changed > following[min(end, len(starts))])
        assert place in changed and changed.min() == place and free.all()
        later += int((changed > following[document + 1]).any())
    assert later, "what is tested must matter"


def rows_of(ledger: Ledger, engine: AdaptingEngine) -> Rows:
    documents = session.documents_of(Evaluation(make_dataset([17, 20]).val, settings()))
    return Rows(engine, ledger, AdapterSpec(2, 2.0, SITES), documents, 3, 0)


def chunk_and_nats(rows: Rows, number: int) -> tuple[Any, np.ndarray, Any]:
    config = settings()
    dataset = make_dataset([17, 20])
    documents = session.documents_of(Evaluation(dataset.val, config))
    chunk = session.chunk_of(dataset.val, documents, 3, number, config)
    nats = rows.run(chunk, None, None).nll()
    return chunk, nats, dataset


def entered(ledger: Ledger, rows: Rows, chunk: Any, nats: np.ndarray) -> tuple[Any, ...]:
    row, column = np.nonzero(chunk.view.kept)
    marks = rows.version[row], rows.numbers[row]
    return ledger.write(chunk.view.positions[row, column], nats[row, column], *marks)


def test_an_update_needs_what_the_row_has_just_scored() -> None:
    """Before the write, another row's targets, an earlier version's, half of a chunk, twice: all refused."""
    engine, ledger, rates = AdaptingEngine(VOCAB), Ledger(37), np.full(3, 0.1)
    adapt = settings().adapt
    rows = rows_of(ledger, engine)
    with pytest.raises(LedgerError, match="not scored"):
        rows.learn(ledger.write(np.array([1]), np.ones(1), 0, 1), adapt, rates)
    ledger = Ledger(37)
    rows = rows_of(ledger, engine)
    chunk, nats, _ = chunk_and_nats(rows, 0)
    other = Ledger(37)
    elsewhere = entered(other, rows, chunk, nats)
    with pytest.raises(LedgerError, match="were not scored so"):  # before the write
        rows.learn(elsewhere, adapt, rates)
    first = entered(ledger, rows, chunk, nats)
    assert [(one.row, one.version) for one in first] == [(1, 0), (2, 0)]
    swapped = rows_of(ledger, engine)
    swapped.numbers = np.array([2, 1, 0])
    swapped.run(chunk, None, None)
    with pytest.raises(LedgerError, match="other targets"):  # a neighbour's gradient
        swapped.learn(first, adapt, rates)
    half = [ledger.scored(np.arange(one.start, one.stop - 1))[0] for one in first]
    with pytest.raises(LedgerError, match="other targets"):
        rows.learn(half, adapt, rates)
    with pytest.raises(LedgerError, match="which row 2 scored"):
        ledger.advance([first[1]], 1)
    done = list(engine.done)
    rows.learn(first, adapt, rates)
    assert engine.done[len(done) :] == ["adapt"] and rows.version.tolist() == [1, 1, 0]
    with pytest.raises(LedgerError, match="twice from one"):
        rows.learn(first, adapt, rates)
    rows.run(chunk, None, None)
    with pytest.raises(LedgerError, match="at version 1 .* which row 1 scored at version 0"):
        rows.learn(first, adapt, rates)
    with pytest.raises(LedgerError, match="nothing that was scored"):
        ledger.advance([], 1)


def test_adapters_end_with_their_document() -> None:
    """Kept over it they score nothing more; under the number of an earlier row new ones learn nothing."""
    engine, ledger, rates = AdaptingEngine(VOCAB), Ledger(37), np.full(3, 0.1)
    rows = rows_of(ledger, engine)
    chunk, nats, dataset = chunk_and_nats(rows, 0)
    rows.learn(entered(ledger, rows, chunk, nats), settings().adapt, rates)
    documents = session.documents_of(Evaluation(dataset.val, settings())).take(slice(1, 2))
    with pytest.raises(LedgerError, match="target 18 is not of the document of row 1, whose adapters are reset"):
        rows.run(session.chunk_of(dataset.val, documents, 3, 0, settings()), None, None)
    again = rows_of(ledger, engine)
    chunk, nats, _ = chunk_and_nats(again, 1)
    with pytest.raises(LedgerError, match="at version 1"):
        again.learn(entered(ledger, again, chunk, nats), settings().adapt, rates)


class Stops(Exception):
    """A kill."""


def killed(path: Path, given: Evaluation, after: int, ranks: Any = None) -> np.ndarray | None:
    """Go on with the evaluation at `path` for `after` passes; return its entries if it ended."""
    engine, passes = AdaptingEngine(VOCAB), []

    def progress(done: int, total: int) -> None:
        passes.append(done)
        if len(passes) == after:
            raise Stops

    first = ranks is None or ranks.rank == 0
    ledger = Ledger.open(path, len(given.split), "key") if first else Ledger(len(given.split))
    try:
        return run(given, engine, ledger, progress=progress, ranks=ranks)
    except Stops:
        return None
    finally:
        ledger.close()


@pytest.mark.parametrize("form", [*FORMS, "never"])
@pytest.mark.parametrize("every", [0.0, 1e9], ids=["copies", "no-copies"])
def test_killed_at_every_pass(form: str, every: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "SNAPSHOT_EVERY", every)
    changes = {"adapt_reset": "never", "adapt_documents": 1} if form == "never" else FORMS[form]
    given = evaluation(settings(**{**changes, "round": 1}), LENGTHS[:8])
    whole = run(given)
    passes = int(whole["order"].max())
    for after in range(1, passes, 1 if form in ("documents", "warm") else 3):
        path = tmp_path / f"{after}.ledger"
        assert killed(path, given, after) is None
        again = killed(path, given, 0)
        assert again is not None and again.tobytes() == whole.tobytes(), f"killed after pass {after}"
        assert not Path(f"{path}.plugins").exists()


def test_open_documents_alone_are_repeated(tmp_path: Path) -> None:
    given = evaluation(settings())
    total = int(run(given)["order"].max())
    assert killed(tmp_path / "ledger", given, 9) is None
    engine, ledger = AdaptingEngine(VOCAB), Ledger.open(tmp_path / "ledger", len(given.split), "key")
    before = ledger.writes
    run(given, engine, ledger)
    ledger.close()
    assert before == 9 and total - before < engine.done.count("adapted") < total
    other = Ledger(len(given.split))
    other.write(np.arange(1, 3), np.ones(2), 0, 1)
    with pytest.raises(LedgerError, match="target 1: repeating it in row 1 .* cannot go on"):
        run(given, AdaptingEngine(VOCAB), other)


def test_progress_counts_what_an_open_round_holds(tmp_path: Path) -> None:
    """A batch that the ledger holds is done, also where others of its round are open."""
    given, seen = evaluation(settings(round=8)), []
    whole = run(given)
    first = int(np.argmax(whole["row"] == 4))  # begins the second batch
    assert killed(tmp_path / "ledger", given, int(whole["order"][first])) is None
    ledger = Ledger.open(tmp_path / "ledger", len(given.split), "key")
    run(given, ledger=ledger, progress=lambda done, total: seen.append((done, total)))
    ledger.close()
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("form", ["documents", "warm"])
@pytest.mark.parametrize("worlds", [(3, 1), (1, 2), (2, 3)])
def test_another_number_of_ranks_goes_on(
    form: str, worlds: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "SNAPSHOT_EVERY", 0.0)
    given, path = evaluation(settings(**{**FORMS[form], "round": 2})), tmp_path / "ledger"  # fewer than three ranks
    whole = run(given)

    def kill(ranks: Any) -> None:
        killed(path, given, 14, ranks)
        raise Stops

    with pytest.raises(Stops):
        Talk(worlds[0]).run(kill)
    assert not Ledger.read(path).complete() and Ledger.read(path).writes
    for entries in Talk(worlds[1]).run(lambda ranks: killed(path, given, 0, ranks)):
        assert np.abs(entries["nats"] - whole["nats"]).max() <= EXACT and (entries["row"] == whole["row"]).all()


def test_a_score_says_what_learned() -> None:
    given = evaluation(settings(adapt_warm_a=True))
    made = score(AdaptingEngine(VOCAB), given)  # type: ignore[arg-type]
    assert made.full and made.windows == "documents seq=12 chunk=5"
    assert (
        made.adaptation.startswith("lora rank=2 alpha=8 on q, v, head, adamw lr=0.05") and "warm A" in made.adaptation
    )
    few = evaluation(settings(adapt_order="length"), documents=5)
    estimate = score(AdaptingEngine(VOCAB), few)  # type: ignore[arg-type]
    assert not estimate.full and estimate.error and estimate.documents == 5
    assert windows_in_words(few, np.zeros(1)).endswith("longest document first")
    without = score(AdaptingEngine(VOCAB), evaluation(settings(), adapts=False))  # type: ignore[arg-type]
    assert without.adaptation == "" and without.nats != made.nats


def test_the_rate_follows_the_text() -> None:
    rates: list[np.ndarray] = []

    class Noted(AdaptingEngine):
        def adapt(self, tape: Any, shares: np.ndarray, step: AdaptStep) -> Any:
            rates.append(np.where((shares != 0).any(axis=1), step.lr, np.nan))
            return super().adapt(tape, shares, step)

    stream = settings(adapt_schedule="cosine", adapt_reset="never", adapt_documents=1)
    run(evaluation(stream, [21, 11]), Noted(VOCAB))
    assert np.allclose([rate[0] for rate in rates], [0.05 * (1 + np.cos(np.pi * c / 7)) / 2 for c in range(6)])
    with pytest.raises(ConfigError, match="the rate would know where the document ends"):
        settings(adapt_schedule="cosine", adapt_documents=2)
