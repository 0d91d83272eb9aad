"""What a score says beside its figure: what learning gained on the same documents, how far it is, how long it took.

Budget: 3 s.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from core import rng
from core.config import AdaptConfig, ConfigError, EvalConfig, RunConfig
from core.console import Console
from core.scoring import tally as tallying
from core.scoring.accounting import bits_per_byte
from core.scoring.evaluation import Evaluation
from core.scoring.gain import measure_gain, paired_difference, without
from core.scoring.ledger import Ledger
from core.scoring.score import score
from core.scoring.tally import Tally
from shared_tests.support.command_line import Capture
from shared_tests.support.known_scores import BigramEngine, make_dataset

LENGTHS = [5, 40, 1, 17, 16, 2, 33, 90, 3, 1]


@pytest.mark.parametrize("text", [{}, {"unknown_tokens": 1}], ids=["table", "raw"])
def test_a_tally_is_that_of_the_ledger(text: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """After every pass, in any order of documents: sums over what is written, each target counted once."""
    split = make_dataset(LENGTHS).val
    split.unknown_tokens = text.get("unknown_tokens", 0)
    ledger, every = Ledger(len(split)), np.concatenate([[0], split.costs(1, len(split))])
    ledger.write(np.array([9, 3, 4]), np.array([1.0, 2.0, 3.0]), 0)  # from an evaluation that was killed
    monkeypatch.setattr(tallying, "PAUSE", 0)
    monkeypatch.setattr(tallying.time, "monotonic", iter(np.arange(0.0, 1e4, 0.5)).__next__)
    tally, rest = Tally(ledger, split), [p for p in range(1, len(split)) if p not in (3, 4, 9)]
    drawn = np.array(rest)[rng.choose(1, "order", len(rest), len(rest))]
    for turn, positions in enumerate(np.array_split(drawn, 7)):
        ledger.write(positions, positions / 7.0, 0)
        entries = ledger.entries
        places = np.flatnonzero(entries["order"])
        nats, counted = entries["nats"][places].sum(), int(every[places + 1].sum())
        figure = nats / len(places) if text else bits_per_byte(nats, counted)
        unit = "nats per token" if text else "bits per byte"
        rate = (len(places) - 3) / (0.5 + turn)  # what was there before took no time
        assert str(tally) == f"{figure:.4f} {unit} so far, {rate:,.0f} tokens/s"


def test_a_tally_is_brought_up_to_date_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is shown, it takes at most a fiftieth of the time."""
    split = make_dataset(LENGTHS).val
    ledger, clock = Ledger(len(split)), [0.0]
    tally = Tally(ledger, split)
    updates: list[float] = []

    def update() -> None:
        updates.append(clock[0])
        clock[0] += 1.0

    monkeypatch.setattr(tally, "_update", update)
    monkeypatch.setattr(tallying, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    for _ in range(1000):
        clock[0] += 0.1
        str(tally)
    assert len(updates) == 2 and updates[1] - updates[0] >= 50


def test_progress_shows_the_score_and_leaves_out_what_was_there(capsys: Capture, monkeypatch: Any) -> None:
    clock = [0.0]
    monkeypatch.setattr("core.console.time", SimpleNamespace(monotonic=lambda: clock[0]))
    report = Console().progress("scoring", "1.25 bits per byte")
    for clock[0], done in ((1.0, 500), (21.0, 510), (41.0, 520)):
        report(done, 620)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "scoring: 510/620 (82 %), 1.25 bits per byte, 3m40s left",
        "scoring: 520/620 (84 %), 1.25 bits per byte, 3m20s left",
    ]


def test_the_difference_of_pairs_is_surer_than_that_of_scores() -> None:
    """Documents differ by 0.3 bits, a gain that is the same in each of them shows with 16."""
    noise = rng.normal(0, "documents", 64).reshape(4, 16)
    counted = np.ceil(np.exp(7 + noise[0])).astype(np.int64)
    before = counted * (0.8 + 0.2 * noise[1])
    difference, error = paired_difference(before, before - counted * (0.01 + 0.001 * noise[2]), counted)
    assert error is not None and difference == pytest.approx(-0.01 / np.log(2), abs=4 * error) and error < 0.001
    same, none = paired_difference(before, before, counted)
    assert same == 0 and none == 0
    assert paired_difference(before, before - counted * 0.01, counted)[1] == pytest.approx(0, abs=1e-12)


class OneRank(BigramEngine):
    """An engine that is alone."""

    ranks = SimpleNamespace(rank=0, world=1)


def test_a_gain_is_the_paired_difference_of_two_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    split, run = make_dataset(LENGTHS).val, RunConfig(eval=EvalConfig(seq=16, batch=4, plugins=("temperature",)))
    seen: list[EvalConfig] = []

    def scored(engine: Any, evaluation: Evaluation, ledger: Ledger, **rest: Any) -> Any:
        seen.append(evaluation.config)
        result = score(engine, dataclasses.replace(evaluation, plugins=False), ledger, **rest)
        if evaluation.plugins:
            ledger._entries["nats"] *= np.where(np.arange(len(split) - 1) % 2, 0.9, 0.8)
        return result

    monkeypatch.setattr("core.scoring.gain.score", scored)
    gain = measure_gain(cast(Any, OneRank()), split, run, 6, Console())
    assert seen == [run.eval.plain(), run.eval] and gain.before.documents == gain.after.documents == 6
    evaluation = Evaluation(split, run.eval, 6)
    begins, ends = evaluation.ranges()
    expected = Ledger(len(split))
    score(BigramEngine(), evaluation, expected)
    cheaper = np.where(np.arange(len(split) - 1) % 2, 0.1, 0.2) * expected.entries["nats"]
    lost = sum(float(cheaper[a:b].sum()) for a, b in zip(begins, ends, strict=True))
    assert gain.difference == pytest.approx(-bits_per_byte(lost, gain.before.bytes)) and gain.error
    assert gain.to_json()["before"] == gain.before.to_json()


def test_a_gain_needs_something_that_learns() -> None:
    split = make_dataset(LENGTHS).val
    with pytest.raises(ConfigError, match="nothing adapts and nothing changes predictions"):
        measure_gain(cast(Any, OneRank()), split, RunConfig(), 6, Console())
    learning = RunConfig(eval=EvalConfig(plugins=("temperature",)))
    with pytest.raises(ConfigError, match="a gain on 1 documents: expected at least 2"):
        measure_gain(cast(Any, OneRank()), split, learning, 1, Console())


def test_what_is_compared_with_reads_the_same_contexts() -> None:
    lora = EvalConfig(seq=64, windows="documents", adapt=AdaptConfig(kind="lora", chunk=16))
    assert without(lora) == EvalConfig(seq=64, windows="documents", stride=16)
    sliding: dict[str, Any] = {"seq": 64, "windows": "sliding", "stride": 8}
    stateful = dataclasses.replace(lora, windows="stateful")
    assert without(stateful) == EvalConfig(seq=64, windows="stateful")
    sgd = EvalConfig(**sliding, plugins=("temperature",), adapt=AdaptConfig(kind="sgd", reset="never"))
    assert without(sgd) == EvalConfig(**sliding)
