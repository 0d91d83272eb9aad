"""Several ranks compute what one does: gloo and the MLX ring, training, resuming, scoring. Budget: 60 s."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import core.engine.ranks
from core.check.tolerances import P4_FLOAT64
from core.config import ConfigError
from core.engine.ranks import (
    agree,
    buckets,
    check_same,
    join,
    launched,
    only_rank_0,
    share,
    share_arrays,
    updated_by,
)
from core.model.params import param_table
from core.scoring.ledger import Ledger
from core.training.run import Run
from shared_tests.support.harness import BACKENDS, mini
from shared_tests.support.killed import small_data
from shared_tests.support.ranked import Seat, cases, start, together

pytestmark = pytest.mark.pair
STATE = 1e-7
"""Weights and optimizer state after 50 steps: float64, absolute."""
STREAM = 1e-9
"""Nats of a stream that weights learn from, float64: by how much they may depend on the number of ranks."""
SCORES = 1e-9
"""Bits per byte: by how much a score may depend on the number of ranks."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Some short documents."""
    return small_data(tmp_path_factory.mktemp("ranks"), 100)


@pytest.fixture(scope="module", params=BACKENDS)
def both(request: pytest.FixtureRequest, data: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one rank and two ranks did: (backend, folder and results of the one, of the two)."""
    made, tasks = [], ("curves", "scores", "whole_run", "timed", "apart", "dormant", "streams")
    for world in (1, 2):
        folder = fresh(tmp_path_factory.mktemp(f"{world}-{request.param}"), data)
        made.append((folder, together(request.param, world, folder, *tasks)))
    return request.param, *made


def fresh(folder: Path, data: str) -> Path:
    """Return a folder in which ranks can work."""
    folder.mkdir(exist_ok=True)
    (folder / "data-path").write_text(data)
    return folder


def same_curves(one: tuple[Path, Any], many: tuple[Path, Any], world: int) -> None:
    """P4, float64, 50 steps: losses, gradient norms, weights and optimizer state."""
    for name in cases(world):
        pairs = list(zip(one[1]["curves"][name], many[1]["curves"][name], strict=True))
        assert len(pairs) == 50 and all(a["finite"] and b["finite"] for a, b in pairs)
        gap = max(abs(a[key] - b[key]) for a, b in pairs for key in ("loss", "grad_norm"))
        assert gap < P4_FLOAT64, (name, world, gap)
        assert abs(pairs[0][0]["loss"] - pairs[-1][0]["loss"]) > 0.01, "nothing was learned"
        assert apart(one[0] / f"{name}.safetensors", many[0] / f"{name}.safetensors") < STATE, (name, world)


def apart(ours: Path, theirs: Path) -> float:
    """Return the largest difference of two files of arrays."""
    a, b = load_file(ours), load_file(theirs)
    assert a.keys() == b.keys()
    return max(float(np.abs(value - b[name]).max()) for name, value in a.items())


def test_two_ranks_train_as_one(both: Any) -> None:
    """Float and ternary, Muon and AdamW, averages, micro-batches, rows that do not divide; and a whole run."""
    _, one, two = both
    same_curves(one, two, 2)
    close(one[1]["whole_run"]["rows"], two[1]["whole_run"]["rows"])
    assert apart(one[0] / "run.safetensors", two[0] / "run.safetensors") < STATE


def test_a_dormant_expert_keeps_its_bits(both: Any) -> None:
    """On one rank and on two, by both rules, with decay; and the routers' balance is of rows, whoever has them."""
    _, one, two = both
    for rule, ours in one[1]["dormant"].items():
        theirs = two[1]["dormant"][rule]
        assert np.abs(np.array(ours["losses"]) - theirs["losses"]).max() < P4_FLOAT64
        assert ours["kept"] == theirs["kept"] and len(ours["kept"]) == (4 if rule == "muon" else 6)
        assert all(same == [False, False, True, False] for same in ours["kept"].values())


def test_whole_weights_learn_alike_from_a_stream(both: Any) -> None:
    """Each rank scores and learns from its rows: the same nats by the same versions, to float sums."""
    _, one, two = both
    for name, (nats, version) in one[1]["streams"].items():
        assert two[1]["streams"][name][1] == version and len(set(version)) > 2
        assert np.abs(np.array(nats) - two[1]["streams"][name][0]).max() < STREAM, name


WIRE = 0.1
"""Of the fall of the loss over 8 steps: by how much gradients that were sent in bfloat16 may move any loss."""
WIRE_ONCE = 1e-4
"""Nats: by how much they may move the loss after one update."""


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_in_bfloat16_on_the_wire(backend: str, data: str, tmp_path: Path) -> None:
    """Losses follow those of one process, which sends nothing, and both ranks end with the same bits."""
    one, two = (fresh(tmp_path / str(world), data) for world in (1, 2))
    alone, many = (together(backend, n, folder, "wired")["wired"] for n, folder in ((1, one), (2, two)))
    for name, found in many.items():
        losses = alone[name]["losses"]
        gaps = [abs(a - b) for a, b in zip(found["losses"], losses, strict=True)]
        assert len({*found["bits"]}) == 1 and len(found["bits"]) == 2, f"{name}: the ranks have other weights"
        assert max(gaps) < WIRE * abs(losses[0] - losses[-1]), (name, gaps)
        assert gaps[0] < P4_FLOAT64 < gaps[1] < WIRE_ONCE, f"{name}: {gaps}, expected rounding after one update"
        # What arrives is wide again: a norm in bfloat16 would be off by a thousandth and more.
        assert abs(found["norms"][0] / alone[name]["norms"][0] - 1) < 5e-4, name
        assert found["notes"] == ["gradients sent in bfloat16"] and not alone[name]["notes"]


def test_rank_0_has_the_clock(both: Any) -> None:
    """A run for a second ends at the same step on both ranks, though rank 1's clock is past its end at once."""
    found = both[2][1]["timed"]
    assert found["steps"] == [found["saved"]] * 2 and found["saved"] >= 2 and 1 <= found["seconds"] < 20


def test_ranks_are_started_alike(both: Any) -> None:
    """Another dtype on one rank is found before anything is built."""
    assert both[2][1]["apart"]["said"].startswith("rank 1 has another options than rank 0: start every rank with the")


def test_the_command_line_with_two_ranks(data: str, tmp_path: Path) -> None:
    """Train and eval by the ring: rank 0 prints and writes, rank 1 is silent, and the score is that of one process."""
    out = str(tmp_path / "run")
    command = ["-m", "core.cli", "train", "debug", "--backend", "mlx", "--data.path", data, "--out", out, "--json"]
    command += ["--train.steps", "4", "--train.batch", "3", "--eval.documents", "None"]
    processes = start("mlx", 2, command, tmp_path)
    assert [process.wait(timeout=300) for process in processes] == [0, 0], (tmp_path / "rank-0").read_text()
    trained = json.loads((tmp_path / "rank-0").read_text().splitlines()[-1])
    assert (tmp_path / "rank-1").read_text() == "" and trained["step"] == 4
    assert json.loads((tmp_path / "run" / "env.json").read_text())["ranks"] == 2
    assert not [row for row in Run.open(out).metrics() if "clock/closed" in row][1:], "one close of the training text"
    evaluate = ["-m", "core.cli", "eval", out, "--backend", "mlx", "--json"]
    book = tmp_path / "cost.ledger"
    processes = start("mlx", 2, [*evaluate, "--ledger", str(book)], tmp_path)
    assert [process.wait(timeout=300) for process in processes] == [0, 0], (tmp_path / "rank-0").read_text()
    scored = json.loads((tmp_path / "rank-0").read_text().splitlines()[-1])["score"]
    assert (tmp_path / "rank-1").read_text() == "" and Ledger.read(book).complete()
    alone = subprocess.run([sys.executable, *evaluate], capture_output=True, text=True, timeout=300)
    expected = json.loads(alone.stdout)["score"]
    assert abs(scored["bpb"] - expected["bpb"]) < SCORES and abs(trained["score"]["bpb"] - expected["bpb"]) < SCORES


def test_chips_of_two_generations_are_told_to_agree_on_a_type(data: str, tmp_path: Path) -> None:
    """An M2 beside an M4 would compute in float32 and the other in bfloat16, and nothing would say so."""
    program = (
        "import os, sys; from backends.mlx import device; from core.cli import main\n"
        "own = int(os.environ['MLX_RANK'])\n"
        "device.chip = lambda: device.Chip(True, True, 'M', ('applegpu_g16g', 'applegpu_g14g')[own], 1e10)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = ["-c", program, "train", "debug", "--backend", "mlx", "--data.path", data, "--out", str(tmp_path / "run")]
    command += ["--train.steps", "1", "--train.batch", "2", "--dry-run"]
    processes = start("mlx", 2, command, tmp_path)
    assert [process.wait(timeout=300) for process in processes] == [2, 2]
    said = (tmp_path / "rank-0").read_text()
    assert "rank 1 has another compute type than rank 0: their chips differ: give all ranks one, as --dtype" in said


def test_two_ranks_score_as_one(both: Any) -> None:
    """Every kind of windows, whole text and estimate, and with a plug-in."""
    _, one, two = both
    assert len({found["windows"] for found in one[1]["scores"].values()}) == 6
    same_scores(one, two)


def test_a_run_of_two_goes_on_with_one(both: Any, tmp_path: Path) -> None:
    """A checkpoint belongs to no number of ranks: begun by 2 and ended by 1 is what 1 does alone."""
    backend, one, two = both
    folder = stopped(two[0], tmp_path / "then")
    rows = together(backend, 1, folder, "whole_run")["whole_run"]["rows"]
    close(one[1]["whole_run"]["rows"], rows)
    assert apart(one[0] / "run.safetensors", folder / "run.safetensors") < STATE


@pytest.mark.long
@pytest.mark.parametrize("both", ["cuda"], indirect=True)
def test_three_and_four_ranks(both: Any, data: str, tmp_path: Path) -> None:
    """Three score, four train, and four go on with a run of two."""
    backend, one, two = both
    three = fresh(tmp_path / "three", data)
    same_scores(one, (three, together(backend, 3, three, "scores")))
    four = stopped(two[0], tmp_path / "four")
    found = together(backend, 4, four, "curves", "whole_run")
    same_curves(one, (four, found), 4)
    close(one[1]["whole_run"]["rows"], found["whole_run"]["rows"])
    assert apart(one[0] / "run.safetensors", four / "run.safetensors") < STATE


def stopped(run: Path, folder: Path) -> Path:
    """Return a copy of a finished run's folder as if it had been killed after step 6."""
    shutil.copytree(run, folder)
    state = folder / "run" / "state"
    (state / "step-6.safetensors").replace(state / "checkpoint.safetensors")
    return folder


def same_scores(one: tuple[Path, Any], many: tuple[Path, Any]) -> None:
    """The same scores, and everything else the same."""
    for name, ours in one[1]["scores"].items():
        theirs = many[1]["scores"][name]
        assert abs(ours["bpb"] - theirs["bpb"]) < SCORES, name
        exact = ("targets", "bytes", "documents", "windows", "full", "plugins", "byte_rule")
        assert [ours[key] for key in exact] == [theirs[key] for key in exact]


def close(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Two runs recorded the same losses and estimates."""
    for name in ("train/loss", "val/bpb"):
        a, b = ([(row["step"], row[name]) for row in rows if name in row] for rows in (ours, theirs))
        assert [step for step, _ in a] == [step for step, _ in b] and len(a) >= 2
        assert max(abs(x - y) for (_, x), (_, y) in zip(a, b, strict=True)) < P4_FLOAT64


# What is decided in core.


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("preset", ["baseline", "skc_mac", "tiny"])
def test_every_gradient_is_in_one_bucket(preset: str, world: int) -> None:
    """Buckets hold every parameter once, and every parameter is updated by one rank or by all."""
    config = mini(preset)
    made = buckets(config, world)
    assert sorted(name for bucket in made for name in bucket.names) == sorted(param_table(config.model))
    table = param_table(config.model)
    for bucket in made:
        if bucket.slots:
            assert len(bucket.slots) == world and sorted(filter(None, bucket.slots)) == sorted(bucket.names)
            assert len({table[name].shape for name in bucket.names}) == 1
    owners = [updated_by(made, rank) for rank in range(world)]
    alone = [name for rank in owners for name in rank[0]]
    assert len(alone) == len(set(alone)) and all(rank[1] == owners[0][1] for rank in owners)
    muon = config.train.matrix_rule == "muon"
    assert {*alone} == {name for name, row in table.items() if muon and row.group == "matrix"}


def test_muons_work_is_spread() -> None:
    """On 8 ranks the official baseline's 54 matrices cost the busiest rank at most a third more than the mean."""
    from core import presets

    config = presets.get("baseline").config
    table, made = param_table(config.model), buckets(config, 8)
    loads = []
    for rank in range(8):
        loads.append(sum(np.prod(table[n].shape) * min(table[n].shape) for n in updated_by(made, rank)[0]))
    assert max(loads) < 4 / 3 * np.mean(loads), loads


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_shares_cover_all_rows(world: int) -> None:
    """Every row is some rank's, once, and no rank has two more than another."""
    for rows in range(world, 40):
        parts = [range(rows)[share(rows, Seat(rank, world))] for rank in range(world)]
        assert [row for part in parts for row in part] == list(range(rows))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1 and max(map(len, parts)) == -(-rows // world)


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a launcher nothing is asked of a framework."""
    for variable in ("RANK", "MLX_RANK"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(core.engine.ranks.importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    ranks = join("cuda")
    assert (ranks.rank, ranks.world, launched()) == (0, 1, None)
    assert agree(ranks, {"a": 1}) == {"a": 1} and only_rank_0(ranks, lambda: 3) == 3
    row = np.arange(3)
    assert share_arrays(ranks, {"x": row})["x"] is row and ranks.gather(row)[0] is row
    check_same(ranks, {"data": "x"})


def test_the_other_launcher_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun with --backend mlx, and mlx.launch with --backend cuda."""
    monkeypatch.delenv("MLX_RANK", raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="started by torchrun.*add --backend cuda, or start it with mlx.launch"):
        join("mlx")
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("MLX_RANK", "0")
    with pytest.raises(ConfigError, match="started by mlx.launch.*add --backend mlx, or start it with torchrun"):
        join("cuda")


def test_ranks_that_differ_are_named() -> None:
    """check_same compares all with rank 0."""

    class Two(Seat):
        def gather(self, value: np.ndarray) -> list[np.ndarray]:
            return [value, value[::-1]]

    with pytest.raises(ConfigError, match="rank 1 has another data than rank 0"):
        check_same(Two(0, 2), {"data": json.dumps([1])})
