"""The count table against a plain dictionary, its three rules against loops, and its settings. Budget: 5 s."""

import collections
import re
from typing import Any

import numpy as np
import pytest

from core.config import ConfigError
from core.scoring import counts
from core.scoring.counts import Counts, CountTable, Followers, backoff, engram, strongest, sure_hint
from core.scoring.ledger import Ledger, LedgerError
from core.scoring.plugins import load_plugins
from core.scoring.predictions import Prediction, ScoredReader, View
from shared_tests.support.known_scores import BOS, make_dataset

ORDERS, VOCAB = (1, 2, 4), 6
Plain = dict[tuple[int, ...], collections.Counter]
"""Context -> follower -> count."""


def texts(seed: int, count: int = 400) -> np.ndarray:
    """Return tokens of a small vocabulary, of which BOS is one, so that every n-gram comes often."""
    dice = np.random.default_rng(seed)
    tokens = dice.integers(0, VOCAB, count)
    tokens[dice.random(count) < 0.1] = BOS
    tokens[0] = BOS
    return tokens.astype(np.int32)


def context(tokens: np.ndarray, end: int, order: int) -> tuple[int, ...] | None:
    """Return the `order` tokens up to index `end`, unless they reach over a document's start."""
    found = tuple(tokens[max(0, end - order + 1) : end + 1].tolist())
    return found if len(found) == order and BOS not in found[1:] else None


def plain(tokens: np.ndarray, places: Any) -> Plain:
    """Count followers at `places`, one by one."""
    table: Plain = collections.defaultdict(collections.Counter)
    for place in places:
        for order in ORDERS:
            before = context(tokens, place - 1, order)
            if before is not None:
                table[before][int(tokens[place])] += 1
    return table


def chunks(total: int, seed: int) -> list[list[tuple[int, int]]]:
    """Cut the places 1 .. total - 1 into ranges, and these into passes, at random."""
    dice = np.random.default_rng(seed)
    cuts = np.unique(np.concatenate([[1, total], dice.integers(1, total, 30)])).tolist()
    ranges = list(zip(cuts[:-1], cuts[1:], strict=True))
    ends = np.unique(dice.integers(0, len(ranges), 5)).tolist()
    return [ranges[a:b] for a, b in zip([0, *ends], [*ends, len(ranges)], strict=True)]


def learned(tokens: np.ndarray, parts: list[list[tuple[int, int]]], **options: Any) -> CountTable:
    """Return a table that learned the ranges, pass by pass, with what they need in front of them."""
    table = CountTable(ORDERS, VOCAB, BOS, **options)
    for part in parts:
        begins = [max(0, start - max(ORDERS)) for start, _ in part]
        table.count([(tokens[a:stop], start - a) for a, (start, stop) in zip(begins, part, strict=True)])
    return table


def asked(table: CountTable, tokens: np.ndarray, most: int = 99) -> list[Followers]:
    """Return the followers at every place of a row."""
    return table.followers(tokens[None], np.ones((1, len(tokens)), bool), most)


@pytest.mark.parametrize("seed", range(6))
def test_the_table_is_a_dictionary_however_the_text_was_cut(seed: int) -> None:
    tokens = texts(seed)
    dictionary, bits = plain(tokens, range(1, len(tokens))), []
    row = texts(seed + 100, 60)
    for cut in range(3):
        table = learned(tokens, chunks(len(tokens), seed * 10 + cut))
        assert table.size == sum(map(len, dictionary.values()))
        found = asked(table, row)
        for order, one in zip(ORDERS, found, strict=True):
            for place in range(len(row)):
                before = context(row, place, order)
                expected = dictionary.get(before, {}) if before is not None else {}
                here = one.place == place
                assert dict(zip(one.token[here].tolist(), one.count[here].tolist(), strict=True)) == expected
                assert one.total[place] == sum(expected.values()) and one.distinct[place] == len(expected)
        bits.append(b"".join(side.tobytes() for one in found for side in one))
    assert len(set(bits)) == 1, "the same bits for every cut"


def test_documents_are_seams_and_windows_are_none() -> None:
    """A context that goes on over a window's start is counted; one that goes over a document's is in no table."""
    tokens = np.array([BOS, 4, 5, 2, 3, BOS, 3, 4, 5, 2], np.int32)
    for parts in ([[(1, 10)]], [[(1, 3)], [(3, 4), (4, 10)]], [[(i, i + 1)] for i in range(1, 10)]):
        table = learned(tokens, parts)
        four = asked(table, np.array([4, 5, 2, 3], np.int32))[2]
        assert four.token.tolist() == [BOS] and four.count.tolist() == [1] and four.place.tolist() == [3]
        assert not len(asked(table, np.array([2, 3, BOS, 3], np.int32))[2].place), "over the start"
        assert asked(table, np.array([BOS], np.int32))[0].token.tolist() == [3, 4], "BOS is a context"


def test_the_most_frequent_are_kept_and_sums_are_of_all() -> None:
    tokens = np.array([BOS, *[4, 2] * 3, *[4, 3] * 3, 4, 5, 4, 0], np.int32)
    found = asked(learned(tokens, [[(1, len(tokens))]]), np.array([4], np.int32), 2)[0]
    assert found.token.tolist() == [2, 3] and found.count.tolist() == [3, 3]
    assert (found.total[0], found.distinct[0]) == (8, 4)


def test_a_full_table_goes_on_counting_what_it_has() -> None:
    tokens, parts = texts(0), [[(1, 50)], [(50, 200)], [(200, 400)]]
    first, size = plain(tokens, range(1, 50)), learned(tokens, parts[:1]).size
    table = learned(tokens, parts, most=size)
    assert table.size == size == sum(map(len, first.values()))
    all_ = plain(tokens, range(1, len(tokens)))
    row = tokens[:50]
    for order, one in zip(ORDERS, asked(table, row), strict=True):
        for place, token, count in zip(one.place, one.token, one.count, strict=True):
            before = context(row, int(place), order)
            assert before is not None and int(token) in first[before] and count == all_[before][int(token)]
    again = CountTable(ORDERS, VOCAB, BOS, size)
    again.load(learned(tokens, parts[:2], most=size).state())
    again.count([(tokens[196:], 4)])
    for name, value in table.state().items():
        assert np.array_equal(value, again.state()[name]), "gone on from a copy, full as it is"


# The rules.


def distributions(found: list[Followers], k: float, network: np.ndarray) -> np.ndarray:
    """Return the back-off's distributions (positions, V), by its recursion over whole distributions."""
    out = network.copy()
    for one in found:
        for place in range(len(out)):
            counted = np.zeros(out.shape[1])
            here = one.place == place
            counted[one.token[here]] = one.count[here]
            kappa = k * np.count_nonzero(counted)
            if kappa:
                out[place] = (counted + kappa * out[place]) / (counted.sum() + kappa)
    return out


def test_back_off_unrolled_is_its_recursion() -> None:
    tokens, row = texts(3), texts(4, 50)
    found = asked(learned(tokens, [[(1, len(tokens))]]), row)
    network = np.random.default_rng(0).dirichlet(np.ones(VOCAB), len(row))
    ids, weights = strongest(backoff(found, 1.5), len(row), 99)
    mixed = network * (1 - weights.sum(-1, keepdims=True))
    for column in range(ids.shape[1]):
        given = ids[:, column] >= 0
        mixed[given, ids[given, column]] += weights[given, column]
    expected = distributions(found, 1.5, network)
    assert np.abs(mixed - expected).max() < 1e-14 and np.abs(expected - network).max() > 0.05
    assert (np.diff(weights, axis=1) <= 0).all() and weights.sum(-1).max() < 1
    few, less = strongest(backoff(found, 1.5), len(row), 2)
    assert few.shape == (50, 2) and (less == weights[:, :2]).all(), "the rest goes back to the network"


def follower(pairs: list[tuple[int, float, float]]) -> Followers:
    """Return one follower of each position: (token, count, total); total 0: none."""
    given = [(place, *pair) for place, pair in enumerate(pairs) if pair[2]]
    place, token, count, _ = (np.array(side) for side in zip(*given, strict=True))
    total = np.array([pair[2] for pair in pairs], float)
    return Followers(place, token, count.astype(float), total, np.sign(total))


def test_the_longest_sure_context_gives_the_hint() -> None:
    short = follower([(2, 3, 4), (2, 3, 4), (2, 2, 2), (2, 69, 100), (2, 70, 100), (0, 0, 0)])  # 3 and 0.7
    middle = follower([(3, 2, 3), (3, 2, 4), (3, 1, 1), (3, 1, 1), (3, 0, 0), (3, 2, 2)])  # 2 and 0.6
    long = follower([(4, 2, 4), (4, 1, 1), (4, 0, 0), (4, 1, 1), (4, 2, 5), (0, 0, 0)])  # 2 and 0.5
    ids, weights = strongest(sure_hint([short, middle, long], (8, 12, 16), 2.0), 6, 1)
    assert ids[:, 0].tolist() == [4, 2, -1, -1, 2, 3]
    np.testing.assert_allclose(weights[:, 0], [1.0, 1.5, 0, 0, 1.4, 2.0])


def test_engram_adds_the_evidence_up() -> None:
    one = follower([(2, 3, 4), (4, 1, 1)])
    ids, weights = strongest(engram([one, one], 0.05, 0.5), 2, 8)
    assert ids.tolist() == [[2], [4]]
    np.testing.assert_allclose(weights[:, 0], 2 * 0.05 * np.log([7, 3]))


# The plug-in.


def view(tokens: np.ndarray, **changes: Any) -> View:
    """Return rows that are all kept."""
    shape = tokens.shape
    return View(tokens, np.zeros(shape, np.int64), np.ones(shape, bool))._replace(**changes)


def counted(choice: str, tokens: list[int]) -> Counts:
    """Return the plug-in that has learned a text."""
    (plugin,) = load_plugins([choice])
    assert isinstance(plugin, Counts)
    dataset = make_dataset([5])
    dataset.val.tokens = np.array(tokens, np.int32)
    dataset.val.document_starts = np.flatnonzero(dataset.val.tokens == BOS)
    ledger = Ledger(len(tokens))
    plugin.start(ScoredReader(dataset.val, ledger))
    plugin.learn(ledger.write(np.arange(1, len(tokens)), np.ones(len(tokens) - 1), 0), None)
    return plugin


def test_a_row_reads_its_own_inputs_only() -> None:
    """The context of a row's first positions is what the row read before, if it did; not the row above."""
    plugin = counted("counts(orders=3-3)", [BOS, 5, 6, 7, 8, 5, 6, 7, 8])
    rows = np.array([[9, 9, 5, 6], [7, 9, 9, 9]], np.int32)
    assert plugin.prediction(view(rows), Prediction()) == Prediction(), "no row has a context"
    tilt = plugin.prediction(view(rows, before=np.array([[-1, -1], [5, 6]], np.int32)), Prediction()).tilt
    assert tilt is not None and tilt.kind == "mix" and tilt.ids.shape == (2, 4, 1)
    assert tilt.ids[1, 0, 0] == 8 and (tilt.ids >= 0).sum() == 1 and tilt.weights[1, 0, 0] == pytest.approx(2 / 6)
    kept = np.ones((2, 4), bool)
    kept[1, 0] = False
    hidden = view(rows, before=np.array([[-1, -1], [5, 6]], np.int32), kept=kept)
    assert plugin.prediction(hidden, Prediction()) == Prediction(), "who is not scored needs no candidate"


@pytest.mark.parametrize(
    ("choice", "kind", "weight"),
    [("rule=tilt, beta=3", "boost", 3.0), ("rule=engram, alpha=1, above=0", "boost", 3 * np.log(4))],
)
def test_every_rule_has_its_form(choice: str, kind: str, weight: float) -> None:
    plugin = counted(f"counts({choice})", [BOS, *[5, 6, 7, 8, 9] * 3])
    tilt = plugin.prediction(view(np.array([[5, 6, 7, 8]], np.int32)), Prediction(1.1)).tilt
    assert tilt is not None and (tilt.kind, tilt.above) == (kind, 0.0 if "engram" in choice else None)
    assert tilt.ids[0, -1].tolist() == [9] and tilt.weights[0, -1, 0] == pytest.approx(weight)


def test_only_what_is_in_the_ledger_is_read() -> None:
    dataset = make_dataset([5, 9])
    ledger, other = Ledger(14), Ledger(14)
    (scored,) = ledger.write(np.arange(6, 9), np.ones(3), 0)
    reader = ScoredReader(dataset.val, ledger)
    assert reader.read(scored, 4).tolist() == dataset.val.tokens[5:9].tolist(), "from the document's start on"
    assert reader.read(scored).tolist() == dataset.val.tokens[6:9].tolist()
    with pytest.raises(LedgerError, match="were not scored so"):
        ScoredReader(dataset.val, other).read(scored)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("orders=4-2", "orders='4-2': expected two numbers from 1 to 64, as in 2-4"),
        ("orders=0-2", "expected two numbers"),
        ("orders=2-65", "expected two numbers"),
        ("orders=2-8/0", "expected two numbers"),
        ("orders=two", "expected two numbers"),
        ("rule=tilt, k=3", "k=3.0 is of rule backoff: leave it out with tilt"),
        ("rule=tilt, candidates=3", "candidates=3 is of rule backoff and engram: leave it out with tilt"),
        ("alpha=3", "alpha=3.0 is of rule engram: leave it out with backoff"),
        ("k=0", "k=0.0: expected a number above 0"),
        ("candidates=0", "candidates=0: expected a number from 1 up"),
        ("candidates=1025", "candidates=1025: expected at most 1024"),
        ("rule=mean", "rule='mean'"),
    ],
)
def test_settings_that_are_refused(settings: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"eval.plugins.counts.{words}" if "=" in words else words)):
        load_plugins([f"counts({settings})"])


def test_orders() -> None:
    assert Counts.Settings().lengths == (2, 3, 4) and Counts.Settings(orders="8-16/2").lengths == (8, 10, 12, 14, 16)
    assert Counts.Settings(orders="3-3").lengths == (3,) and counts.MOST * 12 < 1 << 30
