"""Paired statistics of ablations against scipy, by hand, by simulation; equal steps, seconds, bytes. Budget: 10 s."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from core.ablation.stats import effects
from core.ablation.stats.effects import holm, judge, paired, pooled_spread, resolvable, seeds_needed
from core.ablation.stats.findings import assess
from core.statistics import StatisticsError
from shared_tests.support.ablations import change, outcome, unfinished

TRUE = {"plain": 0.0, "good": -0.05, "same": 0.0, "bad": 0.06}


@pytest.mark.parametrize("n", [2, 3, 5, 12])
@pytest.mark.parametrize("shift", [-0.01, 0.0, 0.002])
def test_equals_scipy_on_synthetic_effects(n: int, shift: float) -> None:
    draw = np.random.default_rng(n)
    reference = draw.normal(1.9, 0.02, n)
    ours = reference + shift + draw.normal(0, 0.004, n)
    made, wanted = paired(ours.tolist(), reference.tolist()), scipy.stats.ttest_rel(ours, reference)
    test: Any = wanted
    interval = test.confidence_interval(0.95)
    assert made.n == n
    assert [made.low, made.high, made.p] == pytest.approx([interval.low, interval.high, test.pvalue], rel=1e-9)
    assert made.mean == pytest.approx(float(np.mean(ours - reference)), rel=1e-12)
    other: Any = scipy.stats.ttest_ind(ours, reference)
    assert made.p is not None and abs(made.p - other.pvalue) > 1e-3, "this would pass without pairing too"


def test_by_hand() -> None:
    """Differences -1 and -3: mean -2, spread sqrt 2, error 1; t(0.975, 1) = tan(0.475 pi); p of a Cauchy at 2."""
    made = paired([1.0, 1.0], [2.0, 4.0])
    reach = math.tan(0.475 * math.pi)
    assert made.spread is not None and made.spread == pytest.approx(math.sqrt(2), rel=1e-12)
    assert [made.low, made.high] == pytest.approx([-2 - reach, -2 + reach], rel=1e-9)
    assert made.p == pytest.approx(1 - 2 * math.atan(2) / math.pi, rel=1e-9)


def coverage(runs: int, n: int) -> float:
    draw = np.random.default_rng(5)
    gaps = draw.normal(-0.003, 0.004, (runs, n))
    base = draw.normal(1.9, 0.02, (runs, n))
    found = [paired(a, b) for a, b in zip((base + gaps).tolist(), base.tolist(), strict=True)]
    return sum(f.low < -0.003 < f.high for f in found if f.low is not None and f.high is not None) / runs


def test_the_interval_covers_the_true_difference_95_times_of_100(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0.94 < coverage(6_000, 3) < 0.96  # 3.6 standard errors
    assert 0.94 < coverage(4_000, 8) < 0.96
    monkeypatch.setattr(effects, "LEVEL", 0.10)
    assert coverage(2_000, 3) < 0.92, "an interval of 90 % must not pass"


def power(n: int, effect: float, spread: float) -> float:
    draw = np.random.default_rng(11)
    made = [paired(row, [0.0] * n) for row in draw.normal(effect, spread, (3_000, n)).tolist()]
    return sum(f.high is not None and f.high < 0 for f in made) / len(made)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_resolvable_is_found_in_80_of_100(n: int) -> None:
    least = resolvable(n, 0.004)
    assert 0.77 < power(n, -least, 0.004) < 0.83  # 4 standard errors
    assert power(n, -0.8 * least, 0.004) < 0.74
    assert resolvable(n, 0.008) == pytest.approx(2 * least, rel=1e-9)
    assert resolvable(n, 0.004, 0.9) > least


def test_resolvable_by_the_normal_limit_and_seeds_needed_inverts_it() -> None:
    limit = (1.959964 + 0.841621) * 0.004 / math.sqrt(4000)
    assert resolvable(4000, 0.004) == pytest.approx(limit, rel=1e-3)
    for n in (2, 3, 7, 40):
        assert seeds_needed(resolvable(n, 0.004) * 1.0001, 0.004) == n
        assert seeds_needed(-resolvable(n, 0.004) * 0.9999, 0.004) == n + 1
    assert seeds_needed(0.01, 0.0) == 2 and resolvable(3, 0.0) == 0.0


def test_holm_by_hand() -> None:
    """Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, then not below the one before: 0.06."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, None, 0.6]) == [pytest.approx(0.03), None, 1.0]  # the one not known yet counts
    assert holm([0.04]) == [0.04] and holm([]) == []


def test_holm_keeps_the_rate_of_any_false_alarm() -> None:
    chances = np.random.default_rng(3).uniform(size=(4000, 12))
    alarms = [min(p for p in holm(row) if p is not None) < 0.05 for row in chances.tolist()]
    assert 0.035 < sum(alarms) / len(alarms) < 0.062
    assert (chances.min(axis=1) < 0.05).mean() > 0.4, "what looking at 12 does without it"


def test_verdicts() -> None:
    clear = paired([1.0, 1.1, 1.2], [2.0, 2.1001, 2.2])
    assert judge(clear, 0.01) == "better" and judge(clear, 0.2) == "perhaps better"
    assert judge(paired([2.0, 2.1001, 2.2], [1.0, 1.1, 1.2]), 0.01) == "worse"
    assert judge(paired([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]), 1.0) == "inside noise"
    assert judge(paired([1.0], [2.0]), None) == "one seed: no interval"
    assert judge(None, None) == "nothing to compare"


def test_differences_that_do_not_vary_show_nothing() -> None:
    for ours, reference in [([0.1 + 0.2, 1.3], [0.3, 1.3]), ([1.1, 2.1, 3.3], [1.0, 2.0, 3.2]), ([1, 1], [1, 1])]:
        made = paired(ours, reference)
        assert (made.spread, made.low, made.high, made.p) == (0.0, None, None, 1.0)
        assert judge(made, 1.0) == "equal differences: no interval"
    assert paired([1.1, 2.1 + 1e-12], [1.0, 2.0]).low is not None


def test_refusals() -> None:
    for act, words in [
        (lambda: paired([1.0], [1.0, 2.0]), "1 values against 2"),
        (lambda: paired([], []), "at least one pair"),
        (lambda: paired([math.nan], [1.0]), r"ours\[0\]"),
        (lambda: resolvable(1, 0.1), "plan more seeds"),
        (lambda: resolvable(3, -1.0), "spread"),
        (lambda: resolvable(3, 1.0, 1.0), "power"),
        (lambda: seeds_needed(0.0, 1.0), "effect"),
    ]:
        with pytest.raises(StatisticsError, match=words):
            act()


def test_pooled_spread() -> None:
    parts = [paired([0, 2], [0, 0]), paired([0, 3, 6], [0, 0, 0]), paired([1], [0]), paired([1, 1], [0, 0]), None]
    assert pooled_spread(parts) == pytest.approx(math.sqrt((2 + 2 * 9) / 3))
    assert pooled_spread(parts[2:]) is None


def test_assess_finds_true_effects_and_only_them(tmp_path: Path) -> None:
    made = outcome(tmp_path, TRUE, seeds=5)
    (found,) = assess(made)
    assert {e.variant: e.verdict for e in found.ends} == {"good": "better", "same": "inside noise", "bad": "worse"}
    for one in found.ends:
        truth: Any = scipy.stats.ttest_rel([r.bpb for r in made.of(one.variant)], [r.bpb for r in made.of("plain")])
        assert one.paired is not None and one.paired.p == pytest.approx(truth.pvalue, rel=1e-9)
        assert one.seeds == (0, 1, 2, 3, 4) and not one.early
    assert [s.variant for s in found.summaries] == list(TRUE) and found.summaries[0].n == 5
    assert found.doubts == () and found.steps == tuple(e._replace(at="step 250, the end") for e in found.ends)


def test_pairs_only_where_both_exist_and_are_alike(tmp_path: Path) -> None:
    made = change(outcome(tmp_path, TRUE, seeds=4), "plain", 1, status="failed", bpb=None)
    made = change(made, "good", 2, byte_rule="raw")
    made = change(made, "same", 0, bpb=math.nan)
    (found,) = assess(made)
    assert [e.seeds for e in found.ends] == [(0, 3), (2, 3), (0, 2, 3)]
    assert not any(e.early for e in found.ends), "nothing is to come"
    assert [e.short for e in found.ends] == [
        "2 of 4; 1 failed; 1 left out", "2 of 4; 1 failed; 1 left out", "3 of 4; 1 failed",
    ]  # fmt: skip
    text = "\n".join(found.doubts)
    assert "failed: plain seed 1" in text and "good: different byte rules (raw, table), seed 2 left out" in text
    assert "without a finite score, left out: same seed 0" in text
    estimate = change(outcome(tmp_path, TRUE), "bad", 0, label="estimate", error=0.01)
    (found,) = assess(estimate)
    assert "kinds of figure (estimate, score)" in found.doubts[0] and "standard error about 0.0100" in found.doubts[1]
    assert [e.paired.n for e in found.ends if e.paired] == [3, 3, 2]


def test_equal_steps_reads_curves_where_runs_end_apart(tmp_path: Path) -> None:
    made = outcome(tmp_path, TRUE, noise=0.0)
    for seed in range(3):
        run = next(r for r in made.of("good") if r.seed == seed)
        made = change(made, "good", seed, curve=run.curve[:40], steps=200)
    (found,) = assess(made)
    good, same, _ = found.steps
    assert (good.basis, good.at) == ("validation estimates", "step 200")
    assert good.paired is not None and good.paired.mean == pytest.approx(-0.05, abs=1e-9)
    assert same.at == "step 250, the end" and any("good: 200 against 250 steps" in d for d in found.doubts)


@pytest.mark.parametrize("val", [True, False])
def test_equal_seconds_favours_the_faster_one(tmp_path: Path, val: bool) -> None:
    """Same curve against steps, half the speed: at equal seconds the slow one is where the curve was at half."""
    made = outcome(tmp_path, {"plain": 0.0, "slow": 0.0}, 5, 0.002, val=val, speed={"plain": 1.0, "slow": 0.5})
    (found,) = assess(made)
    one = found.seconds[0]
    assert one.basis == ("validation estimates" if val else "training curves") and one.at == "25.6 s"
    truth = 3.0 * (135**-0.6 - 260**-0.6)
    assert one.paired is not None and one.paired.mean == pytest.approx(truth, abs=0.003 if val else 0.02)
    assert one.verdict == "worse" and found.ends[0].verdict == "inside noise"


def test_a_budget_of_seconds_is_compared_at_the_end(tmp_path: Path) -> None:
    made = outcome(tmp_path, {"plain": 0.0, "b": -0.1}, budget="seconds = 25.6", speed={"plain": 1.0, "b": 1.0})
    (found,) = assess(made)
    assert found.seconds[0].at == "25.6 s, the end" and found.seconds[0].basis == "artifact"
    made = outcome(tmp_path, {"plain": 0.0, "b": -0.1}, speed={"plain": 1.0, "b": 0.99})
    (found,) = assess(made)  # a budget of steps: 1 % more time is more training, however little
    assert found.seconds[0].at == "25.6 s" and found.seconds[0].basis == "validation estimates"


def test_equal_bytes(tmp_path: Path) -> None:
    """Reference 1.9 at 800 kB, wide -0.04 at 900 kB: the line is at -0.02 for 850 kB, where `mid` has -0.03."""
    true = {"plain": 0.0, "mid": -0.03, "wide": -0.04, "twin": -0.01, "small": 0.02}
    size = {"plain": 800_000, "mid": 850_000, "wide": 900_000, "twin": 801_000, "small": 700_000}
    (found,) = assess(outcome(tmp_path, true, noise=1e-9, size=size))
    mid, wide, twin, small = found.sizes
    assert mid.equal and mid.equal.paired and mid.equal.paired.mean == pytest.approx(-0.01, abs=1e-6)
    assert mid.per_100kb == pytest.approx(-0.06, abs=1e-6) and mid.note == "line from plain to wide"
    assert wide.equal is None and wide.note.startswith("not comparable") and wide.bytes == 100_000
    assert twin.per_100kb is None and twin.equal and twin.equal.paired
    assert twin.equal.paired.mean == pytest.approx(-0.01, abs=1e-6)
    assert small.equal is None and small.per_100kb == pytest.approx(-0.02, abs=1e-6)
    worse = {**true, "wide": 0.04}
    (found,) = assess(outcome(tmp_path, worse, noise=1e-9, size=size))
    held = found.sizes[0].equal
    assert held and held.paired and held.paired.mean == pytest.approx(-0.03, abs=1e-6), "more bytes never count for it"


def test_backends_are_never_mixed_and_unfinished_is_an_early_look(tmp_path: Path) -> None:
    made = outcome(tmp_path, TRUE, backends='["mlx", "cuda"]')
    mlx, cuda = assess(made)
    assert [mlx.backend, cuda.backend] == ["mlx", "cuda"]
    assert [e.paired and e.paired.n for e in mlx.ends + cuda.ends] == [3] * 6
    assert mlx.ends[0].differences != cuda.ends[0].differences
    (found,) = assess(unfinished(outcome(tmp_path, TRUE), 4))
    assert all(e.early and e.verdict == "one seed: no interval" for e in found.ends)
    (found,) = assess(unfinished(outcome(tmp_path, TRUE)))
    assert {e.verdict for e in found.ends} == {"nothing to compare"} and found.spread is None


def test_a_seed_that_failed_is_not_one_to_come(tmp_path: Path) -> None:
    """Eight of twelve runs are there, one failed: a verdict says both, and what can still come makes it early."""
    early = unfinished(outcome(tmp_path, TRUE), 8)
    (found,) = assess(change(early, "bad", 1, status="failed", bpb=None))
    assert [(e.waiting, e.failed) for e in found.ends] == [(1, 0), (1, 0), (1, 1)]
    assert [e.short for e in found.ends] == ["early look: 2 of 3", "early look: 2 of 3", "early look: 1 of 3; 1 failed"]
    assert {e.short for e in found.steps + found.seconds if e.variant == "bad"} == {"early look: 1 of 3; 1 failed"}
    (found,) = assess(change(outcome(tmp_path, TRUE), "plain", 1, status="failed", bpb=None))
    assert {(e.waiting, e.failed, e.early, e.short) for e in found.ends} == {(0, 1, False, "2 of 3; 1 failed")}


def test_scores_over_other_targets_are_not_comparable(tmp_path: Path) -> None:
    """Same text, other numbers of targets: left out; other tokens of the same documents: held against each other."""
    text = {"documents": 9, "total_documents": 9, "targets": 5_000, "data": "a"}
    made = outcome(tmp_path, TRUE)
    for variant in TRUE:
        for seed in range(3):
            made = change(made, variant, seed, **text)
    assert assess(made)[0].doubts == ()
    (found,) = assess(change(made, "good", 1, targets=4_000))
    assert found.doubts == ("good: different numbers of targets (4,000, 5,000), seed 1 left out: not comparable",)
    assert found.ends[0].seeds == (0, 2)
    (found,) = assess(change(made, "good", 1, targets=4_000, data="other tokens"))
    assert found.doubts == () and found.ends[0].seeds == (0, 1, 2)
    (found,) = assess(change(made, "good", 1, targets=4_000, data="other tokens", documents=8))
    assert found.ends[0].seeds == (0, 2)
    assert assess(change(made, "good", 1, targets=None))[0].doubts == (), "of an older run: not known"


def test_speeds_measured_under_other_conditions_are_said(tmp_path: Path) -> None:
    """Company, devices, machines, threads, types; more where the budget is in seconds; nothing where all are alike."""
    for budget, words in (("steps = 250", "tokens/s and seconds are not"), ("seconds = 9.5", "bits per byte are not")):
        made = outcome(tmp_path, TRUE, budget=budget)
        here = {"device": "H100", "host": "aa", "threads": 1, "beside": 2.0, "dtype": "float32"}
        for variant in TRUE:
            for seed in range(3):
                made = change(made, variant, seed, **here)
        assert not any("good" in doubt for doubt in assess(made)[0].doubts)
        for fields, said in (
            ({"beside": 1.0}, "good: on average 1.7 runs side by side against 2.0 of the reference: "),
            ({"device": "A100"}, "good: other devices than the reference (A100, H100), seed 1: "),
            ({"host": "bb"}, "good: other machines than the reference (bb, aa), seed 1: "),
            ({"threads": None}, "good: other numbers of CPU threads than the reference (as the libraries chose, 1), "),
            ({"dtype": "bfloat16"}, "good: computed in another type than the reference (bfloat16, float32), seed 1"),
        ):
            (doubt,) = (doubt for doubt in assess(change(made, "good", 1, **fields))[0].doubts if "good" in doubt)
            assert doubt.startswith(said) and (words in doubt or "dtype" in fields), doubt
        assert not any("good" in d for d in assess(change(made, "good", 1, beside=1.5))[0].doubts), "a little is alike"
        assert not any("good" in d for d in assess(change(made, "good", 1, device=None, host=None))[0].doubts)
