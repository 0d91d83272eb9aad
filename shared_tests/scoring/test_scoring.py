"""Scores of engines whose every number is known, byte accounting and estimates. Budget: 5 s."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from core import rng
from core.config import ConfigError, EvalConfig
from core.engine.protocol import Scoring
from core.scoring import score as scoring
from core.scoring.accounting import bits_per_byte
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger, LedgerError
from core.scoring.plugins import Temperature
from core.scoring.score import Score, score, score_text
from core.scoring.session import Session
from core.scoring.windows import sliding
from shared_tests.support.known_scores import UNKNOWN, VOCAB, BigramEngine, make_dataset
from shared_tests.support.predicted import HostPredictions


class ContextEngine:
    """nll falls with the number of visible tokens and depends on all of them; causal."""

    shapes: set[tuple[int, ...]]

    def __init__(self) -> None:
        self.shapes, self.calls = set(), 0

    def nll(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        self.shapes.add(tokens.shape)
        self.calls += 1
        visible = np.arange(1, tokens.shape[1] + 1)
        return 1 + 1 / visible + (np.cumsum(tokens, 1) % 97 + targets) / 200


def config(**changes: Any) -> EvalConfig:
    return EvalConfig(**{"seq": 16, "batch": 4, **changes})


LENGTHS = [5, 40, 1, 17, 16, 2, 33, 90, 3, 1]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seq": 7, "batch": 3},
        {"windows": "sliding", "stride": 5},
        {"windows": "documents"},
        {"windows": "documents", "stride": 3},
    ],
)
def test_every_cut_scores_every_target_once(changes: dict[str, Any]) -> None:
    dataset = make_dataset(LENGTHS)
    tokens = dataset.val.tokens
    expected = BigramEngine().nll(tokens[:-1], tokens[1:])
    ledger = Ledger(len(tokens))
    seen: list[tuple[int, int]] = []
    evaluation = Evaluation(dataset.val, config(**changes))
    result = score(BigramEngine(), evaluation, ledger, progress=lambda done, total: seen.append((done, total)))
    np.testing.assert_array_equal(ledger.entries["nats"], expected)
    assert set(ledger.entries["version"]) == {0}
    assert (np.diff(ledger.entries["order"]) >= 0).all(), "single left-to-right pass"
    assert result.nats == pytest.approx(math.fsum(expected), rel=1e-14)
    assert result.targets == len(tokens) - 1 and result.loss == result.nats / result.targets
    assert (result.label, result.full, result.error) == ("score", True, None)
    assert result.documents == result.total_documents == len(LENGTHS)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen}) and seen[-1][0] == seen[-1][1]


def test_context_is_what_the_windows_promise() -> None:
    dataset = make_dataset(LENGTHS)
    tokens = dataset.val.tokens
    ledgers = {}
    for name, changes in {
        "plain": {},
        "same": {"windows": "sliding", "stride": 16},
        "sliding": {"windows": "sliding", "stride": 4},
        "documents": {"windows": "documents", "stride": 4},
    }.items():
        ledgers[name] = Ledger(len(tokens))
        score(ContextEngine(), Evaluation(dataset.val, config(**changes)), ledgers[name])
    np.testing.assert_array_equal(ledgers["plain"].entries, ledgers["same"].entries)

    def expected(target: int, begin: int) -> float:
        text = tokens[begin:target]
        return 1 + 1 / len(text) + (text.sum() % 97 + tokens[target]) / 200

    starts = dataset.val.document_starts
    for t in range(1, len(tokens)):
        document = starts[starts < t].max()
        slid = 0 if t <= 16 else -(-(t - 16) // 4) * 4
        inside = document if t - document <= 16 else document - (-(t - document - 16) // 4) * 4
        for name, begin in {"plain": (t - 1) // 16 * 16, "sliding": slid, "documents": inside}.items():
            assert ledgers[name].entries["nats"][t - 1] == pytest.approx(expected(t, begin), abs=1e-12), (name, t)


@pytest.mark.parametrize("changes", [{}, {"windows": "sliding", "stride": 3}, {"windows": "documents", "stride": 16}])
def test_batch_size_does_not_matter(changes: dict[str, Any]) -> None:
    results = []
    for batch in (1, 3, 64):
        engine = ContextEngine()
        results.append(score(engine, Evaluation(make_dataset(LENGTHS).val, config(batch=batch, **changes))))
        assert engine.shapes == {(batch, 16)}, "one static shape"
    assert results[0] == results[1] == results[2]


def test_padding_is_not_scored() -> None:
    class PaddingIsPoison(BigramEngine):
        def nll(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
            return np.where(targets == 0, np.nan, super().nll(tokens, targets))

    assert score(PaddingIsPoison(), Evaluation(make_dataset(LENGTHS).val, config())).full


def test_bad_engines_are_refused() -> None:
    dataset = make_dataset(LENGTHS)

    class NaN(BigramEngine):
        def nll(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
            return np.where(tokens == tokens[0, 5], np.nan, super().nll(tokens, targets))

    class Flat(BigramEngine):
        def nll(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
            return super().nll(tokens, targets).ravel()

    with pytest.raises(LedgerError, match="nan nats"):
        score(NaN(), Evaluation(dataset.val, config()))
    with pytest.raises(LedgerError, match="shape"):
        score(Flat(), Evaluation(dataset.val, config()))


def test_killed_evaluation_goes_on(tmp_path: Path) -> None:
    dataset, settings = make_dataset(LENGTHS), config(windows="sliding", stride=4)
    whole = ContextEngine()
    expected = score(whole, Evaluation(dataset.val, settings))
    ledger = Ledger.open(tmp_path / "ledger", len(dataset.val), "key")
    windows = sliding(len(dataset.val), 16, 4)
    for i in range(0, 5):
        Session(ContextEngine(), Evaluation(dataset.val, settings), ledger).windows(
            windows.take(slice(4 * i, 4 * i + 4))
        )
    assert np.flatnonzero(ledger.entries["order"]).tolist() == list(range(92))
    ledger.close()
    rest = ContextEngine()
    done: list[int] = []
    opened = Ledger.open(tmp_path / "ledger", len(dataset.val), "key")
    again = score(rest, Evaluation(dataset.val, settings), opened, progress=lambda n, total: done.append(n))
    opened.close()
    assert again == expected and rest.calls == whole.calls - 5 and done[0] == 24


def test_wrong_ledger_is_refused() -> None:
    dataset = make_dataset(LENGTHS)
    with pytest.raises(LedgerError, match="start a new one"):
        score(BigramEngine(), Evaluation(dataset.val, config()), Ledger(len(dataset.val) + 1))
    other = Ledger(len(dataset.val))
    Session(BigramEngine(), Evaluation(dataset.val, config()), other).windows(
        sliding(len(dataset.val), 10, 10).take(slice(0, 4))
    )
    with pytest.raises(LedgerError, match="already scored"):
        score(BigramEngine(), Evaluation(dataset.val, config()), other)
    ends = Ledger(len(dataset.val))
    ends.write(np.array([16]), np.array([1.0]), 0)
    with pytest.raises(LedgerError, match="target 1 is not scored"):
        score(BigramEngine(), Evaluation(dataset.val, config()), ends)


def table_bytes(dataset: Any, begin: int, end: int) -> int:
    """The official rule, token by token."""
    total = 0
    for t in range(begin + 1, end + 1):
        token, previous = dataset.val.tokens[t], dataset.val.tokens[t - 1]
        total += 0 if token < 4 else 1 if token < 20 else 2
        total += token >= 35 and previous >= 4
    return int(total)


def test_byte_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.scoring.accounting.CHUNK", 13)

    def run(**changes: Any) -> Score:
        return score(BigramEngine(), Evaluation(make_dataset(LENGTHS, **changes).val, config()))

    table, raw = table_bytes(make_dataset(LENGTHS), 0, sum(LENGTHS) - 1), sum(3 * n + 1 for n in LENGTHS)
    both = run()
    assert (both.byte_rule, both.bytes) == ("table", table)
    assert both.bpb == both.nats / math.log(2) / table == bits_per_byte(both.nats, table)
    assert both.bpb_raw == both.nats / math.log(2) / raw
    official = run(raw=False, unknown=None)
    assert (official.byte_rule, official.bytes, official.bpb_raw) == ("table", table, None)
    for refused in (run(byte_pieces=False), run(unknown=1)):
        assert (refused.byte_rule, refused.bytes) == ("raw", raw)
        assert refused.bpb == refused.bpb_raw == both.bpb_raw
    for neither in ({"byte_pieces": False, "raw": False}, {"unknown": 2, "raw": False}):
        with pytest.raises(ConfigError, match="raw bytes .* not recorded"):
            run(**neither)


def test_unknown_tokens_are_found_where_they_are_not_recorded() -> None:
    dataset = make_dataset(LENGTHS, unknown=None)
    dataset.val.tokens[70] = UNKNOWN
    assert score(BigramEngine(), Evaluation(dataset.val, config())).byte_rule == "raw"


def test_nothing_to_score() -> None:
    for lengths, message in (([1], "at least 2"), ([1, 1], "no bytes")):
        with pytest.raises(ConfigError, match=message):
            score(BigramEngine(), Evaluation(make_dataset(lengths, raw=False).val, config()))


def test_score_as_json() -> None:
    result = score(BigramEngine(), Evaluation(make_dataset(LENGTHS).val, config(), 4))
    plain_values = result.to_json()
    assert json.loads(json.dumps(plain_values)) == plain_values
    assert plain_values.pop("label") == "estimate"
    assert plain_values == {**dataclasses.asdict(result), "plugins": []}


def test_estimate_is_the_drawn_documents_by_themselves() -> None:
    dataset = make_dataset(LENGTHS)
    starts = [*dataset.val.document_starts, sum(LENGTHS) - 1]
    for seed in range(5):
        drawn = rng.choose(seed, "eval/documents", len(LENGTHS), 4)
        engine = ContextEngine()
        result = score(engine, Evaluation(dataset.val, config(stride=None, seed=seed), 4))
        nats, counts = [], []
        for d in drawn:
            text = dataset.val.tokens[starts[d] : starts[d + 1] + 1]
            pieces = [text[i : i + 17] for i in range(0, len(text) - 1, 16)]
            nats.append(sum(float(ContextEngine().nll(p[None, :-1], p[None, 1:]).sum()) for p in pieces))
            counts.append(table_bytes(dataset, starts[d], starts[d + 1]))
        assert result.nats == pytest.approx(sum(nats), rel=1e-13) and result.bytes == sum(counts)
        assert result.bpb_raw == bits_per_byte(result.nats, sum(3 * LENGTHS[d] + 1 for d in drawn))
        assert (result.label, result.full, result.documents, result.total_documents) == ("estimate", False, 4, 10)
        assert result.windows == "documents seq=16 stride=16"
        without = [bits_per_byte(sum(nats) - n, sum(counts) - b) for n, b in zip(nats, counts, strict=True)]
        expected = math.sqrt(0.6 * 0.75 * sum((bpb - result.bpb) ** 2 for bpb in without))
        assert result.error == pytest.approx(expected, rel=1e-9)


def test_estimate_of_all_documents_is_still_an_estimate() -> None:
    dataset = make_dataset(LENGTHS)
    whole = score(ContextEngine(), Evaluation(dataset.val, config(windows="documents")))
    for documents in (10, 99):
        result = score(ContextEngine(), Evaluation(dataset.val, config(windows="plain"), documents))
        assert (result.label, result.full, result.error, result.documents) == ("estimate", False, 0.0, 10)
        assert (result.bytes, result.targets) == (whole.bytes, whole.targets)
        assert result.bpb == pytest.approx(whole.bpb, rel=1e-14)
    one = score(BigramEngine(), Evaluation(make_dataset([30, 30]).val, config(), 1))
    assert one.error is None and one.label == "estimate"


# Passes that are under way together, as on a GPU.


class Late(HostPredictions, ContextEngine):
    """Gives costs only when it is waited for; `under_way` and `most` count what was started and not read."""

    def __init__(self, ahead: int) -> None:
        super().__init__()
        self.scoring = Scoring(tokens=130, ahead=ahead)  # 8 windows of 16
        self.started = self.under_way = self.most = 0
        self.often: set[bool] = set()

    def nll_later(self, tokens: np.ndarray, targets: np.ndarray, often: bool) -> Any:
        self.started, self.under_way = self.started + 1, self.under_way + 1
        self.most = max(self.most, self.under_way)
        self.often.add(often)

        def wait() -> np.ndarray:
            self.under_way -= 1
            return self.nll(tokens, targets)

        return wait

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return np.zeros((*tokens.shape, VOCAB))


def test_passes_under_way_give_the_same_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, entries = make_dataset(LENGTHS * 5), []
    for engine in (ContextEngine(), Late(3), Late(1000)):
        ledger = Ledger(len(dataset.val))
        score(engine, Evaluation(dataset.val, config()), ledger)
        entries.append(ledger.entries)
        assert ledger.complete() and engine.shapes == {(8, 16) if isinstance(engine, Late) else (4, 16)}
        if isinstance(engine, Late):
            # The first pass was read at once: else one more would be under way.
            assert engine.most == min(engine.scoring.ahead, engine.started - 1) and not engine.under_way
            assert engine.often == {False}
    for later in entries[1:]:
        np.testing.assert_array_equal(later["nats"], entries[0]["nats"])
        assert (np.diff(later["order"]) >= 0).all(), "entered in the order of the text"
    monkeypatch.setattr(scoring, "OFTEN", 2)
    many = Late(3)
    score(many, Evaluation(dataset.val, config()))
    assert many.often == {True}


def test_what_was_under_way_is_entered_when_an_evaluation_is_broken_off() -> None:
    dataset, engine = make_dataset(LENGTHS * 5), Late(1000)
    ledger = Ledger(len(dataset.val))

    def stop(done: int, total: int) -> None:
        if engine.started == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(engine, Evaluation(dataset.val, config()), ledger, progress=stop)
    assert ledger.writes == 4 and int((ledger.entries["order"] > 0).sum()) == 4 * 8 * 16
    score(engine, Evaluation(dataset.val, config()), ledger)
    whole = Ledger(len(dataset.val))
    score(ContextEngine(), Evaluation(dataset.val, config()), whole)
    np.testing.assert_array_equal(ledger.entries["nats"], whole.entries["nats"])


@pytest.mark.parametrize("judged", ["plugins", "watch"])
def test_nothing_is_under_way_where_somebody_looks(judged: str) -> None:
    """What learns, or judges, does so from what is in the ledger, pass by pass of eval.batch."""
    dataset, engine = make_dataset(LENGTHS), Late(1000)
    watch = SimpleNamespace(wants=lambda number: number == 2, see=lambda *given: None)
    given: dict[str, Any] = {"watch": watch} if judged == "watch" else {"plugins": [Temperature()]}
    settings = config(plugins=("temperature",)) if judged == "plugins" else config()
    ledger = Ledger(len(dataset.val))
    score(engine, Evaluation(dataset.val, settings, plugins=bool(settings.plugins)), ledger, **given)
    assert ledger.complete() and not engine.started
    assert ledger.writes == -(-(len(dataset.val) - 1) // 64), "passes of 4 windows of 16"


def test_ranks_exchange_what_was_under_way() -> None:
    dataset = make_dataset(LENGTHS * 5)
    sent: list[list[np.ndarray]] = [[], []]

    def ranks(rank: int) -> Any:
        def gather(row: np.ndarray) -> list[np.ndarray]:
            sent[rank].append(row)
            return [row, np.empty(0, row.dtype)]

        return SimpleNamespace(rank=rank, world=2, address="-", gather=gather)

    for rank in (0, 1):
        score_text(Late(1000), Evaluation(dataset.val, config()), Ledger(len(dataset.val)), ranks=ranks(rank))
    positions = np.concatenate([row for rank in sent for row in rank[::2]])
    assert np.array_equal(np.sort(positions), np.arange(1, len(dataset.val))), "every target, once"
