"""Ways past the auditor that go through predictions and claims, each caught, and honest near-misses. Budget: 15 s.

The evaluations run in this process, with an engine of numpy: about 0.2 s each. What needs a process is in test_zoo.py.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.audit import auditor
from core.audit.changed_text import SURE, draw_passes, guesses, token_chances
from core.audit.flips import PASSES
from core.audit.rules import RULES
from core.audit.watch import evaluation
from core.data.dataset import open_dataset
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger
from core.scoring.plugins import load_plugins
from core.scoring.score import score_text
from shared_tests.support import zoo_predictions
from shared_tests.support.in_process import BATCH, SEQ, Place, Tiny, made, verdicts

ZOO = "shared_tests.support.zoo:"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with made(tmp_path_factory.mktemp("zoo")) as here:
        yield here


DOCUMENTS = {"windows": "documents", "stride": 16}
CHEATS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "counts first": (f"{ZOO}CountsFirst", {}, {"D7": "that must not", "D9": "before it was in", "D12": "D7, D9"}),
    "forges Scored": (f"{ZOO}Forger", {}, {"D9": "cannot be made by hand"}),
    "boosts the target": (f"{ZOO}GoldBoost", {}, {"D8": "away from 0", "D7": "must not", "D9": "before it was in"}),
    "pools the window": (f"{ZOO}Pool", {}, {"D7": "that must not", "D9": "before it was in", "D12": "D7, D9"}),
    "a tilt that reads the target": ("TargetTilt", {}, {"D7": "must not", "D9": "before it was in", "D12": "D7, D9"}),
    "a tilt that reads the target, with carry": (
        "TargetTilt", {"windows": "stateful"}, {"D7": "must not", "D9": "before it was in", "D12": "D7, D9"},
    ),
    "a hint table updated before the write": (
        "SoonerCounts", {}, {"D7": "that must not", "D9": "before it was in", "D12": "D7, D9"},
    ),
    "best of two": (f"{ZOO}BestOfTwo", {}, {"D8": "away from 0"}),
    "late": (f"{ZOO}LateFuture", {}, {"D7": "scored again in a fresh process|random tokens, put in"}),
    "late, unnormalised": (f"{ZOO}LateGold", {}, {"D7": "scored again|random tokens, put in", "D8": "away from 0"}),
    "scores twice": (f"{ZOO}Rescorer", {}, {"D10": "scored twice"}),
    "scores the tail twice": (f"{ZOO}TailTwice", {}, {"D5": "scored 2 times"}),
    "noise over targets": ("NoisyFuture", {}, {"D7": "noticed that must not.*nats", "D9": "before it was in"}),
    "noise, in the evaluation only": ("NoisyFirst", {}, {"D7": r"by up to [\d.]+ nats \(bound of rounding 1e-04\)"}),
    "never the same": ("Restless", {}, {"D7": "that is no rounding"}),
    "the first 45 %": ("Early", {}, {"D7": "scored again in a fresh process|random tokens, put in"}),
    "where it is no surprise": ("Now", {"batch": 16, "seq": 8}, {"D7": "scored again in a fresh process"}),
    "complex": ("Complex", {}, {"D8": "type complex64, expected float32 or float64"}),
    "objects": ("Objects", {}, {"D8": "type object"}),
    "two passes": ("TwoPasses", {}, {"D7": "scored again in a fresh process"}),
    "knows the end": ("Ending", {}, {"D7": "scored again in a fresh process"}),
    "two passes, always": ("FarPass", {}, {"D7": "when another stood at token", "D9": "before it was in"}),
    "backwards": ("Backwards", {}, {"D10": "before earlier parts of its document", "D12": "broken: D10"}),
    "backwards, documents": ("Backwards", DOCUMENTS, {"D10": "before earlier parts", "D12": "broken: D10"}),
    "cut anew": ("Recut", {}, {"D10": "cut anew", "D12": "broken: D10"}),
    "short windows": ("Ender", DOCUMENTS, {"D7": "when a document went on, not ended", "D9": "before it was in"}),
    "narrow chunks": ("Ender", {"windows": "stateful"}, {"D7": "when a document went on", "D9": "before it was in"}),
    "a discount in the ledger": ("Discount", {}, {"D7": "scored again in a fresh", "D8": "added up by the audit"}),
    "leaves": ("Leaves", {}, {"D5": "the evaluation died: builtins.SystemExit: 0"}),
    "leaves when it is looked at": ("Shy", {}, {"D7": "could not score the changed text: the evaluation died"}),
}  # fmt: skip
"""Way -> plug-in, options, and the rules that fail, these and no others, with words of why."""


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_fails_by_its_rule(place: Place, tmp_path: Path, name: str) -> None:
    plugin, options, broken = CHEATS[name]
    text = open_dataset(place.data).val
    zoo_predictions.KNOWN[0] = int(text.read(0, len(text)).astype(np.int64).sum())
    found = place.audit(tmp_path, plugin, **options)
    failed = verdicts(found, "FAIL")
    assert failed.keys() == broken.keys() and not found.ok, failed
    for rule, words in broken.items():
        assert re.search(words, failed[rule]), failed[rule]
    assert {f.rule for f in found.findings} == RULES.keys()


HONEST: dict[str, tuple[str, dict[str, Any], str]] = {
    "cache, sliding": (f"{ZOO}HonestCache", {"windows": "sliding", "stride": 8}, ""),
    "cache, with carry": (f"{ZOO}HonestCache", {"windows": "stateful"}, ""),
    "temperature": ("core.scoring.plugins:Temperature", DOCUMENTS, ""),
    "temperature, by its name": ("temperature", {}, ""),
    "counts": ("counts", {}, ""),
    "counts, sliding": ("counts(rule=engram, alpha=0.5)", {"windows": "sliding", "stride": 8}, ""),
    "counts, with carry": ("counts(orders=1-4)", {"windows": "stateful"}, ""),
    "a tilt towards what was read": ("LastAgain", DOCUMENTS, ""),
    "noise": ("HonestNoise", {}, r"not all bits repeat: .* the bound of rounding for float32 on CPU is 1e-04"),
    "learns for the first 45 %": ("EarlyCache", {}, ""),
    "float64": ("Double", {}, ""),
    "a statistic of what was scored": ("Running", {}, ""),
    "longest documents first": ("LongestFirst", DOCUMENTS, ""),
    "expects ends": ("HonestEnder", DOCUMENTS, "2 documents ended"),
    "expects ends, with carry": ("HonestEnder", {"windows": "stateful"}, "2 documents ended"),
    "talks": ("Talker", {}, ""),
}
"""Near-miss -> plug-in, options, and words of D7."""


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_near_miss_breaks_nothing(place: Place, tmp_path: Path, name: str) -> None:
    plugin, options, words = HONEST[name]
    found = place.audit(tmp_path, plugin, **options)
    assert found.ok and not verdicts(found, "FAIL")
    passed = verdicts(found, "PASS")
    assert {"D3", "D4", "D5", "D7", "D8", "D9", "D10", "D12", "D13", "D14"} <= passed.keys()
    assert re.search(words, passed["D7"]), passed["D7"]
    assert ("documents in the order of plug-ins" in found.isolated.value["score"]["windows"]) == (
        plugin == "LongestFirst"
    )


def test_what_repeats_its_bits_has_no_rounding_to_excuse_it(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 may round by 0.05 nats: a lean of 0.02 hides in that, if it may; noise of that size is fine."""
    monkeypatch.setattr(Tiny, "dtype", "bfloat16")
    failed = verdicts(place.audit(tmp_path, "Faint"), "FAIL")
    assert failed.keys() == {"D7"} and "in their bits, which repeat without a change" in failed["D7"]
    monkeypatch.setattr(zoo_predictions.HonestNoise, "size", 1e-3)
    monkeypatch.setattr(evaluation, "NORMAL", {"bfloat16": 1e-2})  # a mean of all its noise, which is no distribution's
    found = place.audit(tmp_path / "noise", "HonestNoise")
    assert found.ok and "for bfloat16 on CPU is 5e-02" in verdicts(found, "PASS")["D7"], verdicts(found, "FAIL")


# Answers that are not those of the ledger.


@pytest.mark.parametrize("name", ["bpb", "targets", "windows", "nats"])
def test_a_forged_answer_is_not_what_counts(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    score = evaluation.score
    honest = place.audit(tmp_path / "honest").isolated.value["score"]
    forged = {"bpb": 0.9 * honest["bpb"], "targets": 9000, "windows": "sliding seq=1", "nats": float("nan")}[name]
    monkeypatch.setattr(
        evaluation, "score", lambda *args, **options: dataclasses.replace(score(*args, **options), **{name: forged})
    )
    found = place.audit(tmp_path)
    assert verdicts(found, "FAIL").keys() == {"D16"} and f"{name} {forged} for" in verdicts(found, "FAIL")["D16"]
    assert found.isolated.value["score"] == honest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: [], "its answer: \\[\\], expected an object"),
        (lambda value: {**value, "flips": {"wrong": []}}, "its answer: flips: flips: missing"),
        (lambda value: {**value, "dtype": "float8"}, "dtype: 'float8', expected"),
        (lambda value: {**value, "resumed": "no"}, "resumed: 'no', expected a whole number"),
        (lambda value: {k: v for k, v in value.items() if k != "score"}, "its answer: score: missing"),
    ],
)
def test_an_odd_answer_is_a_death(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, words: str
) -> None:
    audited = evaluation.audited
    monkeypatch.setattr(evaluation, "audited", lambda **options: change(audited(**options)))
    found = place.audit(tmp_path)
    failed = verdicts(found, "FAIL")
    assert failed.keys() == {"D5"} and re.search(f"the evaluation died: odd: .*{words}", failed["D5"]), failed


# An audit that goes on.


def killed(place: Place, out: Path, share: float, plugins: tuple[str, ...] = (), **options: Any) -> Path:
    """Leave the ledger of an audit that was killed half-way, with `share` of the true costs; return its path."""
    plan = place.plan(out, *plugins, **options)
    dataset = open_dataset(place.data)
    value: dict[str, Any] = {}

    def seen(engine: Any, dataset: Any, settings: Any, path: Path, key: str, *_: Any) -> dict[str, Any]:
        value["key"] = key
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_score", seen)
        auditor._evaluate(plan, Path(place.data), out / "ledger", None, 1, [])
    honest = Ledger(len(dataset.val))
    used = load_plugins(plan.config.eval.plugins)
    vocab = plan.config.model.vocab
    score_text(Tiny(vocab), Evaluation(dataset.val, plan.config.eval, plugins=True), honest, plugins=used)
    out.mkdir(exist_ok=True)
    book = Ledger.open(out / "ledger", len(dataset.val), value["key"])
    for number in range(1, int(honest.entries["order"].max()) // 2):
        at = np.flatnonzero(honest.entries["order"] == number)
        book.write(at + 1, share * honest.entries["nats"][at], 0)
    book.close()
    return out / "ledger"


GOES_ON: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    ((), {}), ((), {"windows": "stateful"}), ((), {"windows": "sliding", "stride": 8}), (("Running",), {}),
]  # fmt: skip


@pytest.mark.parametrize(("plugins", "options"), GOES_ON)
def test_a_killed_audit_that_was_left_alone_goes_on(
    place: Place, tmp_path: Path, plugins: tuple[str, ...], options: dict[str, Any]
) -> None:
    killed(place, tmp_path, 1.0, plugins, **options)
    found = place.audit(tmp_path, *plugins, **options)
    assert found.ok and found.isolated.value["resumed"] > 5 and "D7" in verdicts(found, "PASS")
    honest = place.audit(tmp_path / "anew", *plugins, **options).isolated.value["score"]
    assert found.isolated.value["score"]["bpb"] == pytest.approx(honest["bpb"], rel=1e-9)
    if not plugins:
        assert re.search(r"of what a killed start had written [\d,]+ targets", verdicts(found, "PASS")["D8"])


@pytest.mark.parametrize(("plugins", "options"), GOES_ON)
def test_a_killed_audit_whose_ledger_was_edited(
    place: Place, tmp_path: Path, plugins: tuple[str, ...], options: dict[str, Any]
) -> None:
    ledger = killed(place, tmp_path, 0.9, plugins, **options)
    if plugins:  # a state of the plug-ins that belongs to it, so that nothing is repeated
        _skip(ledger, int(Ledger.read(ledger).writes), plugins, place)
    found = place.audit(tmp_path, *plugins, **options)
    failed = verdicts(found, "FAIL")
    rule, words = ("D7", "scored again in a fresh process") if plugins else ("D8", "not of this evaluation")
    assert rule in failed and words in failed[rule], failed


def _skip(ledger: Path, number: int, plugins: tuple[str, ...], place: Place) -> None:
    """Write the state that the plug-ins had after pass `number` beside a ledger."""
    import safetensors.numpy

    dataset = open_dataset(place.data)
    counted = np.full(1024, 0.1, np.float32)
    done = np.flatnonzero(Ledger.read(ledger).entries["order"]) + 1
    counted += np.bincount(dataset.val.read(0, len(dataset.val))[done], minlength=1024).astype(np.float32)
    state = json.dumps({"number": number, "version": 0})
    Path(f"{ledger}.plugins").write_bytes(safetensors.numpy.save({"0/counted": counted}, {"skc": state}))


# The draws.


def test_the_place_of_the_change_is_anywhere() -> None:
    drawn = np.array([draw_passes(20, True, 0) for _ in range(400)])
    thirds = [range(1, 7), range(7, 14), range(14, 21)]
    assert [set(np.unique(side)) for side in drawn.T] == [set(third) for third in thirds]
    assert all(draw_passes(20, True, 17)[-1] > 17 for _ in range(50)) and draw_passes(20, True, 20)[-1] == 20
    assert draw_passes(20, False, 0) == [PASSES] and draw_passes(1, False, 0) == [1] == draw_passes(1, True, 0)
    assert draw_passes(2, True, 2) == [1, 2]


def test_nobody_wins_a_fair_bet() -> None:
    """Not even with the chances themselves, or with one that is nearly right; a tenth of the truth is enough to win."""
    dice = np.random.default_rng(0)
    chances = token_chances(dice.integers(0, 100, 5000), 128, [1, 3])
    assert chances[[1, 3]].tolist() == [0, 0] and chances.min() >= 0 and abs(chances.sum() - 1) < 1e-12
    most = -np.inf
    for _ in range(200):
        drawn = dice.choice(128, 300, p=chances)
        guess = dice.dirichlet(np.full(128, 0.3), 300)
        for p in (chances[drawn], guess[np.arange(300), drawn]):
            most = max(most, guesses(-np.log(p + 1e-30), chances[drawn])["log_money"])
    assert most < np.log(200 * 2 * 100) < SURE  # by Markov's inequality in 99 of 100 such tests
    known = 0.9 * chances[drawn] + 0.1
    assert guesses(-np.log(known), chances[drawn])["log_money"] > 2 * SURE


def test_windows_of_the_zoo_are_small() -> None:
    """What the cheats are made for."""
    assert zoo_predictions.Ender.widest == SEQ and BATCH * SEQ == 64
