"""How curves of two runs are compared: common windows, rounding, the end, and MLX against torch. Budget: 30 s."""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.cli import main
from core.compare.curves import FEW, CommonWindows, Curve, CurveError, CurveGap, common_windows, measure_gap
from core.compare.pair import _same_batches, rounding, words
from core.compare.runs import compare, write_comparison
from core.training.run import Run, RunError
from shared_tests.support.command_line import SHORT, call

SMALL = (
    *SHORT,
    "--train.steps",
    "48",
    "--train.batch",
    "2",
    "--train.log_every",
    "1",
    "--train.eval_every",
    "24",
    "--eval.train_documents",
    "2",
    "--train.sample_every",
    "None",
)
KEEP = ("--train.save_every", "20", "--train.keep_every", "1")
NEEDED = ("config.json", "env.json", "metrics.jsonl")


def over(gaps: np.ndarray, step: float = 1.0) -> CommonWindows:
    """Return windows of one length whose differences are `gaps`."""
    edges = np.arange(len(gaps) + 1) * step
    return CommonWindows(edges[:-1], edges[1:], np.zeros(len(gaps)), np.asarray(gaps, float))


def lined(losses: np.ndarray, every: int, extra: tuple[int, ...] = ()) -> Curve:
    """Return the lines that a run with these losses of single steps records: means since the last line."""
    ends = sorted({*range(every, len(losses) + 1, every), *extra, len(losses)})
    starts = [0, *ends[:-1]]
    return Curve(ends, [float(losses[a:b].mean()) for a, b in zip(starts, ends, strict=True)])


def test_windows_of_other_lines_hold_the_means_of_the_steps() -> None:
    draws = np.random.default_rng(1)
    a, b = draws.normal(size=120), draws.normal(size=97)
    shared = common_windows(lined(a, 10, (25,)), lined(b, 4, (30, 75)))
    edges = [0, 20, 30, 40, 60, 80]
    assert [*shared.starts, shared.ends[-1]] == edges
    for i, (start, stop) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        assert shared.first[i] == pytest.approx(a[start:stop].mean(), abs=1e-12)
        assert shared.second[i] == pytest.approx(b[start:stop].mean(), abs=1e-12)
    plain = np.mean([m for e, m in zip(*lined(a, 10, (25,)), strict=True) if 20 < e <= 30])  # lines not weighted
    assert abs(plain - a[20:30].mean()) < 1e-12  # 25 splits 20 to 30 evenly; 23 does not
    odd = common_windows(lined(a, 10, (23,)), lined(b, 10))
    assert odd.first[2] == pytest.approx(a[20:30].mean(), abs=1e-12)
    assert abs(np.mean([a[20:23].mean(), a[23:30].mean()]) - a[20:30].mean()) > 1e-3


def test_equal_lines_keep_their_bits_and_cut_windows_are_those_of_the_shorter_list() -> None:
    losses = np.random.default_rng(2).normal(5.0, 1.0, 30)
    same = common_windows(lined(losses, 3), lined(losses, 3))
    assert (same.first == same.second).all() and same.first.tolist() == [*lined(losses, 3).means]
    whole = Curve([0.25, 0.5, 0.75, 1.0], [4.0, 3.0, 2.0, 1.0])
    fine = Curve([0.1, 0.3, 0.6, 0.9], [10.0, 20.0, 30.0, 40.0])
    shared = common_windows(whole, fine, cut=True)
    assert shared.ends.tolist() == [0.25, 0.5, 0.75]
    assert shared.second == pytest.approx([(1.0 + 3.0) / 0.25, (1.0 + 6.0) / 0.25, (3.0 + 6.0) / 0.25])
    assert not len(common_windows(whole, Curve([], [])).ends) and not len(
        common_windows(Curve([2], [1.0]), Curve([3], [1.0])).ends
    )


@pytest.mark.parametrize("ends, means", [([2, 1], [1.0, 1.0]), ([0], [1.0]), ([1], [math.nan]), ([1, 2], [1.0])])
def test_a_curve_that_is_none_is_refused(ends: list[float], means: list[float]) -> None:
    with pytest.raises(CurveError, match="second curve: expected finite means"):
        common_windows(Curve([1, 2], [1.0, 1.0]), Curve(ends, means))


def test_the_end_is_a_mean_with_a_plain_interval() -> None:
    """The last quarter after rounding; 95 % of intervals hold the truth, of one standard error (planted) far fewer."""
    draws = np.random.default_rng(3)
    gaps = [measure_gap(over(np.concatenate([np.zeros(20), 2.0 + draws.normal(size=200)])), 1e-9) for _ in range(400)]
    assert {(gap.same_until, gap.end_from, gap.end_windows) for gap in gaps} == {(20.0, 170.0, 50)}
    errors = np.array([abs((gap.end or 0.0) - 2.0) / (gap.end_spread or math.nan) for gap in gaps])
    assert np.mean(errors <= 1) >= 0.92 > 0.8 >= np.mean(errors <= 0.5)
    short = measure_gap(over(np.ones(FEW - 1)), 0.0)
    assert (short.end_windows, short.end, short.end_spread) == (FEW - 1, 1.0, None)
    assert measure_gap(over(np.ones(FEW)), 0.0).end_spread == 0.0


def test_the_end_counts_windows_by_their_length() -> None:
    edges = np.array([0, *range(10, 90, 10), 170.0])
    uneven = CommonWindows(edges[:-1], edges[1:], np.zeros(9), np.array([9.0] * 2 + [1.0] * 6 + [2.0]))
    gap = measure_gap(uneven, 0.0)
    assert (gap.end_windows, gap.end_from, gap.largest) == (FEW, 10.0, 9.0)
    assert gap.end == pytest.approx((9.0 * 10 + 1.0 * 60 + 2.0 * 90) / 160) and gap.end_spread


def test_batches_are_the_same_only_where_what_draws_them_is(runs: dict[str, Path]) -> None:
    config = Run.open(runs["torch"]).config
    assert _same_batches(config, dataclasses.replace(config, preset="tiny"), "step")
    for other in (
        dataclasses.replace(config, seed=7),
        dataclasses.replace(config, train=dataclasses.replace(config.train, batch=4)),
    ):
        assert not _same_batches(config, other, "step")
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=99))
    assert _same_batches(config, longer, "tokens") and not _same_batches(config, longer, "share")


def test_rounding_is_told_from_what_follows() -> None:
    gaps = np.concatenate([np.full(4, -2e-6), [0.0, 3e-6], np.full(3, 1e-3)])
    gap = measure_gap(over(gaps, 10.0), 5e-6)
    assert (gap.same_until, gap.same_within, gap.largest) == (60.0, 3e-6, 1e-3)
    assert gap.end == pytest.approx(1e-3) and (gap.end_from, gap.end_windows, gap.end_spread) == (60.0, 3, None)
    equal = measure_gap(over(np.zeros(5)), 5e-6)
    assert (equal.same_until, equal.same_within, equal.end) == (5.0, 0.0, None)
    at_once = measure_gap(over(np.ones(5)), 5e-6)
    assert (at_once.same_until, at_once.same_within, at_once.end_windows) == (0.0, 0.0, 5)
    assert measure_gap(over(np.zeros(0)), 0.0) == CurveGap(0, 0.0, 0.0, 0.0, 0.0)


def test_the_floor_of_rounding_follows_the_coarser_type() -> None:
    two = [rounding([name, "float64"], 6.0, 256.0) for name in ("float64", "float32", "bfloat16", "?")]
    assert two[0] < 1e-13 < two[1] == two[3] == pytest.approx(5.7e-6, rel=0.01)
    assert two[2] == pytest.approx(2.9e-3, rel=0.02) and rounding(["bfloat16"], 6.0, 25600.0) < 3.0e-4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Runs of `debug`: on torch, on MLX, in bfloat16, with half the batch, and one resumed with another rate."""
    folder = tmp_path_factory.mktemp("curves")
    changes: dict[str, tuple[str, ...]] = {
        "torch": KEEP,
        "mlx": ("--backend", "mlx", "--train.log_every", "2"),
        "half": ("--train.batch", "1", "--train.steps", "96", "--train.log_every", "2", "--train.eval_every", "48"),
    }
    for name, extra in changes.items():
        assert main(["train", "debug", *SMALL, *extra, "--out", str(folder / name)]) == 0
    planted = shutil.copytree(folder / "torch", folder / "planted")
    shutil.move(planted / "state" / "step-20.safetensors", planted / "state" / "checkpoint.safetensors")
    (planted / "state" / "step-40.safetensors").unlink()
    config = json.loads((planted / "config.json").read_text())
    config["train"]["lr_embed"] /= 10
    (planted / "config.json").write_text(json.dumps(config))
    rate = ("--train.lr_embed", str(config["train"]["lr_embed"]))
    assert main(["train", "debug", *SMALL, *KEEP, *rate, "--out", str(planted)]) == 0
    yield {name: folder / name for name in (*changes, "planted")}


@pytest.mark.pair
def test_mlx_and_torch_are_the_same_to_rounding(runs: dict[str, Path]) -> None:
    comparison, _ = compare([str(runs["torch"]), str(runs["mlx"])])
    pair = comparison.pairs[str(runs["mlx"])]
    assert pair.by == "step" and pair.same_batches and not pair.data and not pair.decide and not pair.notes
    assert [line.split(":")[0] for line in pair.free] == ["train.log_every", "train.save_every", "train.keep_every"]
    assert "backend: cuda -> mlx" in pair.machine and any(line.startswith("compile:") for line in pair.machine)
    assert pair.curves.windows == 24 and pair.curves.same_until >= 20 and 0 < pair.curves.same_within < 1e-5
    assert pair.curves.largest < 0.05
    assert [val.at for val in pair.validation] == [24, 48] and pair.same_documents
    assert any("the same to rounding (at most" in line for line in words(pair))


@pytest.mark.pair
def test_a_rate_changed_at_a_resume_is_placed_and_measured(runs: dict[str, Path]) -> None:
    """Step 21 still takes its loss from the weights of step 20: the first loss that can differ is that of step 22."""
    comparison, _ = compare([str(runs["torch"]), str(runs["planted"]), str(runs["mlx"])])
    pair = comparison.pairs[str(runs["planted"])]
    assert [line.split(":")[0] for line in pair.decide] == ["train.lr_embed"] and not pair.free
    gap = pair.curves
    assert (gap.same_until, gap.same_within, gap.end_windows, gap.end_from) == (21.0, 0.0, 8, 40.0)
    assert gap.end is not None and gap.end > 0.05 and gap.end_spread and gap.end > gap.end_spread, gap
    far, _ = compare([str(runs["mlx"]), str(runs["planted"])])
    other = far.pairs[str(runs["planted"])].curves
    assert other.same_until == 20.0 and 0 < other.same_within < 1e-5 and other.end_windows == 8


def test_what_a_difference_at_the_end_means_is_said(runs: dict[str, Path]) -> None:
    """Below what rounding grows to that is said; in bits per byte, in float64 or from the first step it is not."""
    comparison, _ = compare([str(runs["torch"]), str(runs["planted"])])
    pair = comparison.pairs[str(runs["planted"])]
    small = dataclasses.replace(pair.curves, end=-0.09, end_spread=0.01)

    def said(gap: CurveGap, **changes: Any) -> str:
        (line,) = [line for line in words(dataclasses.replace(pair, curves=gap, **changes)) if "curves by" in line]
        return line

    assert "-0.0900 ± 0.0100 nats after step 40 (8 windows" in said(small)
    assert "grown rounding alone can bring 0.10; seeds decide: skc ablate" in said(small)
    for line in (
        said(small, unit="bits per byte"),
        said(dataclasses.replace(small, floor=1e-14)),
        said(dataclasses.replace(small, same_until=0.0)),
        said(dataclasses.replace(small, end=0.11)),
    ):
        assert "grown rounding" not in line and "seeds decide" in line
    assert "too few for an interval" in said(dataclasses.replace(small, end_spread=None))


def test_other_batches_are_aligned_by_tokens_or_share(runs: dict[str, Path]) -> None:
    comparison, _ = compare([str(runs["torch"]), str(runs["half"])])
    pair = comparison.pairs[str(runs["half"])]
    config = Run.open(runs["torch"]).config.train
    assert pair.by == "tokens" and pair.over.ends.tolist() == [config.tokens_per_step * s for s in range(1, 49)]
    assert not pair.same_batches and any("no common batches" in note for note in pair.notes)
    assert [val.at for val in pair.validation] == [config.tokens_per_step * s for s in (24, 48)]
    shares, _ = compare([str(runs["torch"]), str(runs["half"])], "share")
    by_share = shares.pairs[str(runs["half"])]
    assert by_share.over.ends[-1] == 1.0 and by_share.over.second == pytest.approx(pair.over.second, abs=1e-9)
    steps, _ = compare([str(runs["torch"]), str(runs["half"])], "step")
    note = steps.pairs[str(runs["half"])].notes[-1]
    assert "100 % through its schedule, this one 50 %" in note and "--by share" in note


def test_three_files_are_enough_and_machines_are_told(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    home = {name: tmp_path / name for name in ("torch", "planted")}
    for name, path in home.items():
        path.mkdir()
        for file in NEEDED:
            shutil.copy(runs[name] / file, path / file)
    env = json.loads((home["planted"] / "env.json").read_text())
    env |= {"device": "a GPU", "ranks": 8, "dtype": "bfloat16", "data": {**env["data"], "sha256": "f" * 64}}
    env["versions"]["torch"] = "9.9"
    (home["planted"] / "env.json").write_text(json.dumps(env))
    value = call(capsys, "compare", *map(str, home.values()), "--out", str(tmp_path / "out"))
    pair: dict[str, Any] = value["pairs"][str(home["planted"])]
    assert pair["words"][0].startswith("DATA differ: sha256: ") and not pair["same_batches"]
    machine = " ".join(pair["machine"])
    for expected in ("then a GPU", "ranks: 1 -> 1 then 8", "-> float32 then bfloat16", "version of torch: "):
        assert expected in machine, machine
    assert pair["curves"]["floor"] > 1e-3 and "over" not in pair and pair["curves"]["same_until"] >= 21
    text = (tmp_path / "out" / "compare.md").read_text()
    assert all(line in text for line in pair["words"]) and value["settings"]
    (home["planted"] / "env.json").unlink()
    comparison, opened = compare([str(path) for path in home.values()])
    assert any("copy its env.json too" in note for note in comparison.pairs[str(home["planted"])].notes)
    write_comparison(comparison, opened, tmp_path / "out")
    rows = (home["planted"] / "metrics.jsonl").read_text().replace('"train/loss": ', '"train/loss": "x", "o": ', 1)
    (home["planted"] / "metrics.jsonl").write_text(rows)
    assert main(["compare", *map(str, home.values())]) == 2
    with pytest.raises(RunError, match="metrics.jsonl:1: train/loss: 'x', expected a finite number"):
        compare([str(path) for path in home.values()])
