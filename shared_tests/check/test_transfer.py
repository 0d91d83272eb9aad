"""Where curves part: common windows, planted partings, false alarms, and MLX against torch. Budget: 30 s."""

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
from core.compare import curves as transfer
from core.compare.curves import ENOUGH, Curve, Finding, TransferError, Windows, find, windows
from core.compare.pair import _same_batches, _verdict, rounding
from core.compare.picture import noise_band
from core.compare.runs import compare, lines, write_comparison
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


def over(gaps: np.ndarray, step: float = 1.0) -> Windows:
    """Return windows of one length whose differences are `gaps`."""
    edges = np.arange(len(gaps) + 1) * step
    return Windows(edges[:-1], edges[1:], np.zeros(len(gaps)), np.asarray(gaps, float))


def remembering(draws: np.random.Generator, rows: int, count: int, share: float) -> np.ndarray:
    """Return (rows, count) noise of deviation 1, each value `share` of the one before and a draw."""
    fresh = draws.normal(size=(rows, count + 100)) * math.sqrt(1 - share**2)
    for i in range(1, count + 100):
        fresh[:, i] += share * fresh[:, i - 1]
    return fresh[:, 100:]


def claimed(rows: np.ndarray) -> float:
    return float(np.mean([find(over(row), 0.0).parts_after is not None for row in rows]))


def lined(losses: np.ndarray, every: int, extra: tuple[int, ...] = ()) -> Curve:
    """Return the lines that a run with these losses of single steps records: means since the last line."""
    ends = sorted({*range(every, len(losses) + 1, every), *extra, len(losses)})
    starts = [0, *ends[:-1]]
    return Curve(ends, [float(losses[a:b].mean()) for a, b in zip(starts, ends, strict=True)])


def test_windows_of_other_lines_hold_the_means_of_the_steps() -> None:
    draws = np.random.default_rng(1)
    a, b = draws.normal(size=120), draws.normal(size=97)
    found = windows(lined(a, 10, (25,)), lined(b, 4, (30, 75)))
    edges = [0, 20, 30, 40, 60, 80]
    assert [*found.starts, found.ends[-1]] == edges
    for i, (start, stop) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        assert found.first[i] == pytest.approx(a[start:stop].mean(), abs=1e-12)
        assert found.second[i] == pytest.approx(b[start:stop].mean(), abs=1e-12)
    plain = np.mean([m for e, m in zip(*lined(a, 10, (25,)), strict=True) if 20 < e <= 30])  # lines not weighted
    assert abs(plain - a[20:30].mean()) < 1e-12  # 25 splits 20 to 30 evenly; 23 does not
    odd = windows(lined(a, 10, (23,)), lined(b, 10))
    assert odd.first[2] == pytest.approx(a[20:30].mean(), abs=1e-12)
    assert abs(np.mean([a[20:23].mean(), a[23:30].mean()]) - a[20:30].mean()) > 1e-3


def test_equal_lines_keep_their_bits_and_cut_windows_are_those_of_the_shorter_list() -> None:
    losses = np.random.default_rng(2).normal(5.0, 1.0, 30)
    same = windows(lined(losses, 3), lined(losses, 3))
    assert (same.first == same.second).all() and same.first.tolist() == [*lined(losses, 3).means]
    whole = Curve([0.25, 0.5, 0.75, 1.0], [4.0, 3.0, 2.0, 1.0])
    fine = Curve([0.1, 0.3, 0.6, 0.9], [10.0, 20.0, 30.0, 40.0])
    found = windows(whole, fine, cut=True)
    assert found.ends.tolist() == [0.25, 0.5, 0.75]
    assert found.second == pytest.approx([(1.0 + 3.0) / 0.25, (1.0 + 6.0) / 0.25, (3.0 + 6.0) / 0.25])
    assert not len(windows(whole, Curve([], [])).ends) and not len(windows(Curve([2], [1.0]), Curve([3], [1.0])).ends)


@pytest.mark.parametrize("ends, means", [([2, 1], [1.0, 1.0]), ([0], [1.0]), ([1], [math.nan]), ([1, 2], [1.0])])
def test_a_curve_that_is_none_is_refused(ends: list[float], means: list[float]) -> None:
    with pytest.raises(TransferError, match="second curve: expected finite means"):
        windows(Curve([1, 2], [1.0, 1.0]), Curve(ends, means))


def test_no_parting_is_claimed_of_noise() -> None:
    draws = np.random.default_rng(3)
    assert claimed(draws.normal(size=(400, 60))) <= 0.05
    assert claimed(remembering(draws, 400, 100, 0.5)) <= 0.05
    assert claimed(remembering(draws, 100, 200, 0.8)) <= 0.08


def test_noise_that_grows_as_rounding_does_is_no_parting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last part is many times its first; a limit from noise of one size (planted) takes that for a parting."""
    draws, place = np.random.default_rng(4), np.arange(60) / 60
    growth = np.minimum(1.0, np.exp((place - 0.7) * 60))
    rows = draws.normal(size=(200, 60)) * growth
    assert np.mean([(find(over(row), 0.0).p or 1.0) <= transfer.LEVEL for row in rows]) <= 0.05

    def of_one_size(values: np.ndarray, block: int) -> float:
        drawn = np.random.default_rng(0).normal(size=(transfer.FLIPS, len(values)))
        scans = transfer._scan(np.concatenate([values[None], drawn]))
        return float(np.mean(scans >= scans[0]))

    monkeypatch.setattr(transfer, "chance", of_one_size)
    assert np.mean([(find(over(row), 0.0).p or 0.0) <= transfer.LEVEL for row in rows]) > 0.2


@pytest.mark.parametrize("sign", [1, -1])
def test_a_parting_of_three_deviations_is_found_and_placed(sign: int) -> None:
    """With 30 of 100 windows after it; the places are counted in steps of 10."""
    draws = np.random.default_rng(5)
    found = []
    for _ in range(100):
        gaps = draws.normal(size=100)
        gaps[70:] += sign * 3.0
        found.append(find(over(gaps, 10.0), 0.0))
    seen = [f for f in found if f.parts_after is not None and f.apart is not None and f.between is not None]
    assert len(seen) >= 90
    assert np.mean([abs(f.parts_after - 700) <= 20 for f in seen]) >= 0.9  # type: ignore[operator]
    assert np.mean([f.between[0] <= 700 <= f.between[1] for f in seen]) >= 0.9  # type: ignore[index]
    assert np.mean([sign * f.apart for f in seen]) == pytest.approx(3.0, abs=0.15)  # type: ignore[operator]
    covered = [abs(f.apart - sign * 3.0) <= f.apart_spread for f in seen]  # type: ignore[operator]
    assert np.mean(covered) >= 0.85 and np.mean([f.shape == "steady" for f in seen]) >= 0.85


def test_what_happens_after_a_parting_is_told() -> None:
    draws, count = np.random.default_rng(6), 120
    rise = np.maximum(0.0, np.arange(count) - 40) * 0.1
    fall = np.where(np.arange(count) < 40, 0.0, 8.0 - 6.0 * (np.arange(count) - 40) / 80)
    for shape, shift in {"growing": rise, "shrinking": fall}.items():
        found = [find(over(shift + draws.normal(size=count)), 0.0) for _ in range(20)]
        seen = [f.shape for f in found if f.parts_after is not None]
        assert len(seen) >= 18 and seen.count(shape) >= 0.8 * len(seen), (shape, seen)
    late = [find(over(rise + draws.normal(size=count)), 0.0) for _ in range(20)]
    assert np.mean([f.parts_after is not None and 40 <= f.parts_after <= 80 for f in late]) >= 0.9
    back = np.where((np.arange(count) >= 20) & (np.arange(count) < 80), 3.0, 0.0)
    assert claimed(back + draws.normal(size=(20, count))) <= 0.1  # it does not stay out


def test_the_interval_of_the_mean_holds_with_memory() -> None:
    """95 % is what it says; an interval that takes windows as independent (planted) fails."""
    rows = remembering(np.random.default_rng(7), 400, 120, 0.6)
    own = [abs(row.mean()) <= transfer.INTERVAL * transfer._error(row) for row in rows]
    independent = [abs(row.mean()) <= 1.98 * row.std() / math.sqrt(len(row)) for row in rows]
    assert np.mean(own) >= 0.92 > 0.8 >= np.mean(independent)


def test_memory_is_that_of_the_noise_and_not_of_the_parting() -> None:
    """Noise that keeps a share s of its last value remembers (1 + s) / (1 - s) windows."""
    draws = np.random.default_rng(11)
    shift = np.where(np.arange(240) < 150, 0.0, 6.0)
    for share, low, high in ((0.0, 1, 2), (0.5, 2, 4), (0.8, 5, 12)):
        found = [transfer.memory_of(row + shift) for row in remembering(draws, 60, 240, share)]
        assert low <= np.median(found) <= high, (share, np.median(found))


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
    found = find(over(gaps, 10.0), 5e-6)
    assert (found.same_until, found.same_within, found.after) == (60.0, 3e-6, 3)
    assert found.mean == pytest.approx(1e-3) and found.spread is found.p is found.parts_after is None
    equal = find(over(np.zeros(5)), 5e-6)
    assert (equal.same_until, equal.same_within, equal.mean) == (5.0, 0.0, None)
    at_once = find(over(np.ones(5)), 5e-6)
    assert (at_once.same_until, at_once.same_within, at_once.after) == (0.0, 0.0, 5)
    assert find(over(np.zeros(0)), 0.0) == Finding(0, 0.0, 0.0, 0.0, 0)
    few = np.random.default_rng(8).normal(9.0, 1.0, ENOUGH)
    assert find(over(few[1:]), 0.0).parts_after is None and find(over(few), 0.0).parts_after == 0.0


def test_many_windows_are_merged_and_still_placed() -> None:
    gaps = np.random.default_rng(9).normal(size=3001)
    gaps[2000:] += 2.0
    found = find(over(gaps), 0.0)
    assert found.parts_after is not None and abs(found.parts_after - 2000) <= 24 and found.windows == 3001


def test_the_floor_of_rounding_follows_the_coarser_type() -> None:
    two = [rounding([name, "float64"], 6.0, 256.0) for name in ("float64", "float32", "bfloat16", "?")]
    assert two[0] < 1e-13 < two[1] == two[3] == pytest.approx(5.7e-6, rel=0.01)
    assert two[2] == pytest.approx(2.9e-3, rel=0.02) and rounding(["bfloat16"], 6.0, 25600.0) < 3.0e-4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Runs of `debug`: on torch, on MLX, in bfloat16, with half the batch, and one resumed with another rate."""
    folder = tmp_path_factory.mktemp("transfer")
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
    found, _ = compare([str(runs["torch"]), str(runs["mlx"])])
    pair = found.pairs[str(runs["mlx"])]
    assert pair.by == "step" and pair.same_batches and not pair.data and not pair.decide and not pair.notes
    assert [line.split(":")[0] for line in pair.free] == ["train.log_every", "train.save_every", "train.keep_every"]
    assert "backend: cuda -> mlx" in pair.machine and any(line.startswith("compile:") for line in pair.machine)
    assert pair.curves.windows == 24 and pair.curves.same_until >= 20 and 0 < pair.curves.same_within < 1e-5
    assert [val.at for val in pair.validation] == [24, 48] and pair.same_documents
    assert any("the same to rounding (at most" in line for line in lines(found))


@pytest.mark.pair
def test_a_rate_changed_at_a_resume_is_found_and_placed(runs: dict[str, Path]) -> None:
    """Step 21 still takes its loss from the weights of step 20: the first loss that can differ is that of step 22."""
    found, _ = compare([str(runs["torch"]), str(runs["planted"]), str(runs["mlx"])])
    pair = found.pairs[str(runs["planted"])]
    assert [line.split(":")[0] for line in pair.decide] == ["train.lr_embed"] and not pair.free
    assert (pair.curves.same_until, pair.curves.same_within) == (21.0, 0.0)
    assert pair.curves.apart is not None and pair.curves.apart > 0.05, pair.curves
    assert pair.curves.parts_after is not None and 21 <= pair.curves.parts_after <= 40
    assert pair.verdict == "parted" and found.pairs[str(runs["mlx"])].verdict in ("same", "few")
    small = dataclasses.replace(pair.curves, apart=0.09, at_end=-0.09)
    assert [_verdict(small, "nats"), _verdict(small, "bits per byte")] == ["drift", "parted"]
    assert _verdict(dataclasses.replace(small, floor=1e-14), "nats") == "parted"
    far, _ = compare([str(runs["mlx"]), str(runs["planted"])])
    other = far.pairs[str(runs["planted"])].curves
    assert other.same_until == 20.0 and 0 < other.same_within < 1e-5 and other.after == 14


def test_other_batches_are_aligned_by_tokens_or_share(runs: dict[str, Path]) -> None:
    found, _ = compare([str(runs["torch"]), str(runs["half"])])
    pair = found.pairs[str(runs["half"])]
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
    pair: dict[str, Any] = value["transfer"][str(home["planted"])]
    assert pair["words"][0].startswith("DATA differ: sha256: ") and not pair["same_batches"]
    told = " ".join(pair["machine"])
    for expected in ("then a GPU", "ranks: 1 -> 1 then 8", "-> float32 then bfloat16", "version of torch: "):
        assert expected in told, told
    assert pair["curves"]["floor"] > 1e-3 and "over" not in pair and pair["curves"]["same_until"] >= 21
    text = (tmp_path / "out" / "compare.md").read_text()
    assert all(line in text for line in pair["words"]) and value["settings"] and value["gaps"]
    (home["planted"] / "env.json").unlink()
    found, opened = compare([str(path) for path in home.values()])
    assert any("copy its env.json too" in note for note in found.pairs[str(home["planted"])].notes)
    write_comparison(found, opened, tmp_path / "out")
    rows = (home["planted"] / "metrics.jsonl").read_text().replace('"train/loss": ', '"train/loss": "x", "o": ', 1)
    (home["planted"] / "metrics.jsonl").write_text(rows)
    assert main(["compare", *map(str, home.values())]) == 2
    with pytest.raises(RunError, match="metrics.jsonl:1: train/loss: 'x', expected a finite number"):
        compare([str(path) for path in home.values()])


def test_the_band_in_the_picture_is_noise_without_the_parting(runs: dict[str, Path]) -> None:
    found, _ = compare([str(runs["torch"]), str(runs["planted"])])
    draws = np.random.default_rng(10).normal(size=200)
    shifted = over(draws + np.where(np.arange(200) < 100, 0.0, 50.0))
    base = found.pairs[str(runs["planted"])]
    pair = dataclasses.replace(base, over=shifted, curves=find(shifted, 0.0))
    band = noise_band(pair, 4)
    assert pair.curves.parts_after == 100.0 and band == pytest.approx(2 / math.sqrt(4), rel=0.25)
    blind = noise_band(dataclasses.replace(pair, curves=dataclasses.replace(pair.curves, parts_after=None)), 4)
    assert blind is not None and blind > 10 * (band or 0.0)
