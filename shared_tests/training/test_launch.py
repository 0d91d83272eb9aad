"""The launch files: their syntax, what they refuse, two ranks from start to end, the cloud's fields. Budget: 15 s."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from core import presets
from core.config import ConfigError
from core.training.run import Run
from core.training.schedule import lr_scale
from shared_tests.support.killed import small_data

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "launch"
SCRIPTS = ("one_node", "nodes", "macs")


def launch(script: str, *arguments: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a launch script with this interpreter."""
    environment = {**os.environ, "PYTHON": sys.executable, **more}
    command = [str(FOLDER / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_sound(script: str, tmp_path: Path) -> None:
    """bash reads them, they may be run, they stop at the first error, and --help says how they are used."""
    path = FOLDER / script
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert os.access(path, os.X_OK) and "\nset -euo pipefail\n" in path.read_text()
    asked = launch(script, "--help", cwd=tmp_path)
    assert asked.returncode == 0 and asked.stdout.startswith(f"usage: scripts/launch/{script} ")


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("one_node", [], "usage:"),
        ("one_node", ["--train.steps", "3"], "usage:"),
        ("one_node", ["-n"], "usage:"),
        ("nodes", ["--nnodes=2"], "usage:"),
        ("nodes", ["--", "debug"], "usage:"),
        ("macs", [], "usage:"),
        ("macs", ["hosts.json"], "usage:"),
        ("macs", ["hosts.json", "debug"], "hosts.json: no such file"),
        ("macs", ["--backend", "mpi", "hosts.json", "debug"], "--backend 'mpi': expected ring, jaccl or jaccl-ring"),
        ("macs", ["--backend"], "--backend '': expected ring"),
    ],
)
def test_a_wrong_command_line_starts_nothing(script: str, arguments: list[str], says: str, tmp_path: Path) -> None:
    """It is told on stderr, with exit code 2."""
    found = launch(script, *arguments, cwd=tmp_path)
    assert found.returncode == 2 and says in found.stderr and not found.stdout
    assert not any(tmp_path.iterdir())


def one_node_options(tmp_path: Path) -> list[str]:
    """Return the options of a short run."""
    data = small_data(tmp_path / "text", 60)
    return ["debug", "--data.path", data, "--train.steps", "4", "--eval.documents", "2", "--json"]


@pytest.mark.pair
def test_one_node_stops_at_a_plan_that_cannot_be(tmp_path: Path) -> None:
    """The plan comes first, and nothing is trained."""
    options = one_node_options(tmp_path)
    refused = launch("one_node", *options, "--out", "over", "--export.budget", "250000", cwd=tmp_path, NPROC="2")
    assert refused.returncode == 1 and "one_node: the plan failed, or passes a limit" in refused.stderr
    assert not json.loads(refused.stdout)["ok"] and not (tmp_path / "over").exists()


@pytest.mark.long
@pytest.mark.pair
def test_one_node_plans_then_trains_with_two_ranks(tmp_path: Path) -> None:
    """Both ranks train, and rank 0 writes the run."""
    options = one_node_options(tmp_path)
    found = launch("one_node", "-n", "2", *options, "--out", "run", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    plan, result = map(json.loads, found.stdout.splitlines())
    assert plan["ok"] and plan["ranks"] == 2 and plan["steps"] == result["step"] == 4
    run = Run.open(tmp_path / "run")
    assert run.environment()["ranks"] == 2 and run.artifact_path.exists()
    assert 0 < run.last("clock/stopped") <= run.last("clock/closed")


@pytest.mark.parametrize(
    ("plan", "run", "code", "started"),
    [("", "", 0, 2), ("Node with rank 1 exited with code 1", "", 1, 1), ("", "Node with rank 0 was killed", 1, 2)],
)
def test_macs_hear_of_a_rank_that_failed(plan: str, run: str, code: int, started: int, tmp_path: Path) -> None:
    """mlx.launch returns 0 whatever its ranks return (0.32.4), and says it on stderr: a stand-in does the same."""
    found, lines = launched_macs(tmp_path, plan, run)
    assert found.returncode == code and len(lines) == started and not found.stdout
    assert lines[0].endswith("-m core.cli train tiny --seed 3 --backend mlx --dry-run")
    assert lines[0].startswith(f"--backend ring --hostfile hosts.json --env PYTHONPATH={FOLDER.parent.parent} --cwd ")
    assert started == 1 or lines[1].endswith("--seed 3 --backend mlx")
    assert (plan or run) in found.stderr and ("nothing was trained" in found.stderr) is bool(plan)


@pytest.mark.parametrize("backend", ["jaccl", "jaccl-ring"])
def test_macs_by_jaccl(backend: str, tmp_path: Path) -> None:
    found, lines = launched_macs(tmp_path, "", "", "--backend", backend)
    assert found.returncode == 0 and len(lines) == 2
    assert all(line.startswith(f"--backend {backend} --hostfile hosts.json ") for line in lines)
    assert lines[1].endswith("train tiny --seed 3 --backend mlx")


def launched_macs(
    tmp_path: Path, plan: str, run: str, *first: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run `macs` with a stand-in for mlx.launch, which says `plan`, then `run`; return the arguments that it got."""
    (tmp_path / "bin").mkdir()
    for name, text in (
        ("python", "exit 0\n"),
        (
            "mlx.launch",
            f'echo "$@" >>started\ncase "$*" in *dry-run) echo "{plan}" >&2 ;; *) echo "{run}" >&2 ;; esac\n',
        ),
    ):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "hosts.json").write_text("[]")
    python = str(tmp_path / "bin" / "python")
    found = launch("macs", *first, "hosts.json", "tiny", "--seed", "3", cwd=tmp_path, PYTHON=python)
    return found, (tmp_path / "started").read_text().splitlines()


@pytest.mark.parametrize(("file", "keys"), [("example", {"ssh", "ips"}), ("jaccl", {"ssh", "ips", "rdma"})])
def test_the_examples_are_host_files(file: str, keys: set[str]) -> None:
    """One ssh name and at least one address for each Mac, none twice; an RDMA device for every other Mac."""
    hosts = json.loads((FOLDER / f"macs.{file}.json").read_text())
    assert len(hosts) >= 2 and all(host.keys() == keys for host in hosts)
    rows = [host.get("rdma", [None, ""] if i == 0 else ["", None]) for i, host in enumerate(hosts)]
    assert all([device is None for device in row] == [j == i for j in range(2)] for i, row in enumerate(rows))
    addresses = [ip for host in hosts for ip in host["ips"]]
    assert len({*addresses}) == len(addresses) >= len(hosts) == len({host["ssh"] for host in hosts})


def test_baseline_has_the_official_settings() -> None:
    """Optimizer, schedule and sizes of the official script's defaults (docs/challenge.md, 5)."""
    config = presets.get("baseline").config
    train = config.train
    assert train.tokens_per_step == 524_288 and (train.steps, train.seconds, train.seq) == (20_000, 600.0, 1024)
    assert (train.lr_embed, train.lr_matrix, train.lr_vector) == (0.05, 0.04, 0.04)
    assert (train.beta1, train.beta2, train.eps, train.weight_decay, train.clip) == (0.9, 0.95, 1e-8, 0.0, None)
    assert (train.muon_momentum_start, train.muon_momentum, train.muon_momentum_steps) == (0.85, 0.95, 500)
    assert (train.muon_iterations, train.muon_coefficients) == (5, (3.4445, -4.775, 2.0315))
    assert (train.muon_rows, train.muon_scale, train.quantise, train.average_from) == (False, "ratio", "never", None)
    assert train.rows_of(1024) == (512, 64) and config.seed == 1337  # 65,536 tokens a pass: one per GPU of 8


def official_scale(seconds: float, step: float) -> float:
    """Return the official rate scale: what is left over the time of 1,200 steps, once less than that is left."""
    return min(1.0, (600 - seconds) / (1200 * step))


def test_baseline_falls_as_the_official_rate_does() -> None:
    """At the official speed, 43.54 ms a step, the rates are the same within 0.002; on a slower machine they are not."""
    train = presets.get("baseline").config.train
    gaps = [
        max(abs(lr_scale(t / 600, train) - official_scale(t, step)) for t in np.linspace(0, 600, 10_001))
        for step in (0.04354, 0.06)
    ]
    assert gaps[0] < 0.002 and gaps[1] > 0.1


def check_task(task: dict[str, Any]) -> None:
    """Raise unless a SkyPilot task is one that can train: 8 H100, what it runs, and every variable it uses."""
    assert task["resources"]["accelerators"] == "H100:8" and task["num_nodes"] >= 1 and task["workdir"] == "."
    given = {"SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS", "SKYPILOT_NUM_GPUS_PER_NODE"}
    for part in ("setup", "run"):
        assert subprocess.run(["bash", "-n"], input=task[part], text=True, check=False).returncode == 0
        used = {*re.findall(r"\$\{?([A-Z_]+)", task[part])}
        assert used <= given | task["envs"].keys(), used
    assert given <= {*re.findall(r"\$([A-Z_]+)", task["run"])}
    assert all(isinstance(value, str) for value in task["envs"].values())
    assert "scripts/launch/nodes" in task["run"] and task["run"].count("train 29") == 2 and "--dry-run" in task["run"]
    assert presets.get(task["envs"]["PRESET"]).config.model.vocab == int(task["envs"]["VARIANT"][2:])


def test_the_cloud_file_has_what_it_needs() -> None:
    """Its fields are SkyPilot's, its scripts are bash, its preset exists and has the tokenizer of its shards."""
    task = yaml.safe_load((FOLDER / "sky.yaml").read_text())
    check_task(task)
    known = {"name", "resources", "num_nodes", "workdir", "envs", "setup", "run"}
    assert task.keys() == known
    planted = [
        {"resources": {"accelerators": "H100:4"}},
        {"run": task["run"].replace("SKYPILOT_NODE_RANK", "NODE_RANK")},
        {"envs": {k: v for k, v in task["envs"].items() if k != "OPTIONS"}},
        {"envs": {**task["envs"], "TRAIN_SHARDS": 80}},
        {"run": task["run"].replace("}\n", "\n", 1)},
    ]
    for change in planted:
        with pytest.raises(AssertionError):
            check_task({**task, **change})
    with pytest.raises(ConfigError):
        check_task({**task, "envs": {**task["envs"], "PRESET": "skc_8xh200"}})


def test_the_cloud_file_starts_every_node(tmp_path: Path) -> None:
    """Its run part, with a stand-in for the launcher, calls it with this node's place, planning before training."""
    task = yaml.safe_load((FOLDER / "sky.yaml").read_text())
    (tmp_path / "scripts" / "launch").mkdir(parents=True)
    stand_in = tmp_path / "scripts" / "launch" / "nodes"
    stand_in.write_text('#!/bin/sh\necho "$@"\n')
    stand_in.chmod(0o755)
    given = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
             "SKYPILOT_NUM_GPUS_PER_NODE": "8", "PATH": os.environ["PATH"]}  # fmt: skip
    bash = shutil.which("bash")
    assert bash
    found = subprocess.run(
        [bash, "-c", task["run"]], cwd=tmp_path, env={**task["envs"], **given, "OPTIONS": "--seed 1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    place = "--nnodes=2 --node_rank=1 --nproc_per_node=8 --master_addr=10.0.0.1"
    what = "-- skc_8xh100 --data.path data/sp8192 --out runs/sky --seed 1"
    assert found.stdout.splitlines() == [
        f"{place} --master_port=29500 {what} --dry-run",
        f"{place} --master_port=29501 {what}",
    ]
