"""Welch's test against scipy, by hand and by simulation, and what rule D15 makes of it. Budget: 10 s."""

import json
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats

from core.audit.seeds import beats
from core.statistics import StatisticsError, welch

OURS = {"seed1": 1.9301, "seed2": 1.9312, "seed3": 1.9296}
REFERENCE = [1.9402, 1.9410, 1.9399, 1.9407]


@pytest.mark.parametrize("margin", [-0.1, 0.0, 0.005])
@pytest.mark.parametrize(("own", "other"), [(2, 2), (3, 5), (7, 2)])
def test_equals_scipy_on_shifted_values(own: int, other: int, margin: float) -> None:
    draw = np.random.default_rng(own * 10 + other)
    ours, reference = draw.normal(2.0, 0.01, own), draw.normal(2.01, 0.03, other)
    made = welch(ours.tolist(), reference.tolist(), margin)
    wanted: Any = scipy.stats.ttest_ind(reference - margin, ours, equal_var=False, alternative="greater")
    np.testing.assert_allclose([made.t, made.p, made.degrees], [wanted.statistic, wanted.pvalue, wanted.df], rtol=1e-9)
    equal: Any = scipy.stats.ttest_ind(reference - margin, ours, alternative="greater")
    assert abs(made.p - equal.pvalue) > 1e-6, "this would pass with equal variances too"


def test_by_hand() -> None:
    """Variances of the means 1/3 and 4/3; t = (5 - 2 - 1) / sqrt(5/3); degrees (5/3)^2 / (1/18 + 16/18) = 50/17."""
    made = welch([1, 2, 3], [3, 5, 7], 1.0)
    assert made.ours == (1.0, 2.0, 3.0) and made.reference == (3.0, 5.0, 7.0)
    assert (made.difference, made.margin) == (3.0, 1.0)
    assert made.t == pytest.approx(2 / math.sqrt(5 / 3), rel=1e-12)
    assert made.degrees == pytest.approx(50 / 17, rel=1e-12)
    assert 0.10 < made.p < 0.12
    # With one degree of freedom t is Cauchy: p = 1/2 - atan(t) / pi.
    made = welch([1, 1], [2, 4], 0.0)
    assert made.t == 2.0 and made.degrees == 1.0
    assert made.p == pytest.approx(0.5 - math.atan(2.0) / math.pi, rel=1e-12)


def rejections(difference: float, runs: int, own: int, other: int) -> float:
    """Return how often `own` against `other` runs of unequal spread pass at margin 0.005, alpha 0.01."""
    draw = np.random.default_rng(7)
    ours, reference = draw.normal(2.0 - difference, 0.002, (runs, own)), draw.normal(2.0, 0.001, (runs, other))
    return sum(welch(a, b, 0.005).p < 0.01 for a, b in zip(ours.tolist(), reference.tolist(), strict=True)) / runs


def test_rate_of_false_alarms_is_alpha_and_real_effects_are_found() -> None:
    assert 0.007 < rejections(0.005, 10_000, 12, 20) < 0.013  # 3 standard errors: 0.003
    assert 0.010 < rejections(0.005, 10_000, 3, 5) < 0.020  # what welch's docstring says of few runs
    assert rejections(0.004, 2_000, 12, 20) < 0.005
    assert rejections(0.020, 500, 3, 5) > 0.9


def test_values_that_do_not_vary_show_nothing() -> None:
    for ours, reference in [([0.1] * 3, [0.9] * 3), ([0.1 + 0.2] * 7, [0.3] * 7), ([1, 1], [1, 1])]:
        made = welch(ours, reference, 0.0)
        assert (made.t, made.degrees, made.p) == (0.0, 0.0, 1.0)
    one_side = welch([0.1] * 3, [0.9, 0.91, 0.92], 0.0)
    assert one_side.degrees == 2.0 and one_side.p < 0.001
    tiny = welch([0.0, 1e-160], [1.0, 1.0 + 1e-15], 0.0)  # squares of variances underflow
    assert math.isfinite(tiny.p) and tiny.degrees >= 1.0


@pytest.mark.parametrize(
    ("ours", "reference", "margin", "message"),
    [
        ([1.0], [1.0, 2.0], 0.0, r"ours: 1 values, expected at least 2"),
        ([1.0, 2.0], [], 0.0, r"reference: 0 values"),
        ([1.0, math.nan], [1.0, 2.0], 0.0, r"ours\[1\] is nan"),
        ([1.0, 2.0], [math.inf, 2.0], 0.0, r"reference\[0\] is inf"),
        ([1.0, 2.0], [1.0, 2.0], math.nan, r"margin=nan"),
    ],
)
def test_what_cannot_be_tested_is_refused(ours: list, reference: list, margin: float, message: str) -> None:
    with pytest.raises(StatisticsError, match=message):
        welch(ours, reference, margin)


def test_a_claim_that_holds() -> None:
    found = beats(OURS, REFERENCE)
    assert (found.rule, found.verdict) == ("D15", "PASS")
    for name, value in OURS.items():
        assert f"{name} {value:.6f}" in found.evidence
    assert found.details["ours"] == OURS and found.details["reference"] == REFERENCE
    assert found.details["p"] == welch(list(OURS.values()), REFERENCE, 0.005).p < 0.01
    json.dumps(found.to_json(), allow_nan=False)


def test_a_claim_that_does_not_hold() -> None:
    assert beats(OURS, REFERENCE, margin=0.0095).verdict == "FAIL"  # lower, but not by that much
    assert beats(OURS, REFERENCE, alpha=1e-9).verdict == "FAIL"
    assert beats(dict(zip("abcd", REFERENCE, strict=True)), list(OURS.values())).verdict == "FAIL"  # the wrong way
    # A bad run that was made counts: the same claim without it passes.
    assert beats(OURS | {"seed4": 1.9450}, REFERENCE).verdict == "FAIL"


def test_too_few_runs_are_no_verdict() -> None:
    found = beats({"seed1": 1.93}, REFERENCE[:1])
    assert found.verdict == "NOT CHECKED"
    assert "2 more of ours (has 1, needs 3) and 1 more of the reference (has 1, needs 2)" in found.evidence
    assert "seed1 1.930000" in found.evidence
    assert beats(dict(list(OURS.items())[:2]), REFERENCE).verdict == "NOT CHECKED"
    assert beats({}, []).verdict == "NOT CHECKED"
    with pytest.raises(StatisticsError, match=r"ours\[0\] is nan"):
        beats({"seed1": math.nan}, [])


def test_copies_of_one_run_are_no_verdict() -> None:
    found = beats({"a": 1.9, "b": 1.9, "c": 1.9}, [2.0, 2.0])
    assert found.verdict == "NOT CHECKED" and "copies of one run" in found.evidence
    json.dumps(found.to_json(), allow_nan=False)
