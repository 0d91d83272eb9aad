"""Files beside a downloaded run are not code: what config.json names runs only if the command says so. Budget: 30 s."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from core.cli import main
from core.scoring.plugins import foreign
from shared_tests.support.killed import small_data

MODULE = """
from pathlib import Path
Path(__file__).with_suffix(".ran").touch()
from core.scoring.plugins import Plugin
class Cheat(Plugin):
    pass
"""
BESIDE = ("evil", "wandb", "optuna", "matplotlib", "tyro", "torch", "mlx", "sentencepiece")
"""Modules beside config.json: the one it names, and names that verbs import by and by."""
OURS = ("core", "backends")
"""Where `python -m` and `-c` find these in the current folder nothing can be done, `skc` does not look there."""
VERBS = """
import json, sys
from core.cli import main
for argv in json.loads(sys.argv[1]):
    code = main(argv)
    print(json.dumps([argv[0], code]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose config.json names a plug-in, with modules beside it that tell when they are imported."""
    folder = tmp_path_factory.mktemp("foreign")
    data = small_data(folder)
    options = ("--train.steps", "2", "--train.seq", "16", "--eval.seq", "16", "--backend", "mlx", "--data.path", data)
    assert main(["train", "debug", *options, "--out", str(folder / "run")]) == 0
    settings = json.loads((folder / "run" / "config.json").read_text())
    settings["eval"]["plugins"] = ["temperature", "evil:Cheat"]
    (folder / "run" / "config.json").write_text(json.dumps(settings))
    for name in BESIDE:
        (folder / "run" / f"{name}.py").write_text(MODULE)
    shutil.copytree(folder / "run", folder / "other")
    (folder / "skc").write_text(VERBS)  # a program elsewhere, as the installed one is
    return folder / "run"


def ran(run: Path) -> list[str]:
    """Return the modules beside config.json that were imported, and forget them."""
    found = sorted(run.glob("*.ran"))
    for file in found:
        file.unlink()
    return [file.stem for file in found]


def called(run: Path, calls: list[list[str]], start: list[str], **more: str) -> tuple[dict[str, int], str]:
    """Run verbs in one process started in the run's folder; return their exit codes, and what was said of errors."""
    done = subprocess.run(
        [*start, json.dumps(calls)], cwd=run, env={**os.environ, **more}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")), done.stderr


@pytest.mark.parametrize("installed", [True, False])
def test_no_verb_imports_what_lies_beside_a_run(installed: bool, run: Path) -> None:
    """By the installed program with a `core` in the folder too, and by `python -c`, which looks there first."""
    for name in OURS if installed else ():
        (run / f"{name}.py").write_text(MODULE)
    data = json.loads((run / "config.json").read_text())["data"]["path"]
    options = ["--train.steps", "3", "--train.seq", "16", "--eval.seq", "16", "--data.path", data]
    mlx = ["--backend", "mlx"]
    calls = [
        ["eval", ".", *mlx],
        ["audit", ".", *mlx],
        ["sample", ".", "--tokens", "2", *mlx],
        ["compare", ".", "../other"],
        ["export", ".", *mlx],
        ["train", "debug", *options, *mlx, "--out", "."],
        ["info", "debug"],
    ]
    start = [sys.executable, str(run.parent / "skc")] if installed else [sys.executable, "-c", VERBS]
    codes, said = called(run, calls, start)
    for name in OURS:
        (run / f"{name}.py").unlink(missing_ok=True)
    assert codes == {
        "eval": 2, "audit": 2, "sample": 0, "compare": 0, "export": 0, "train": 2, "info": 0
    }, said  # fmt: skip
    lines = [line for line in said.splitlines() if line.startswith(("skc eval", "skc audit"))]
    assert len(lines) == 2 and all("add --plugins temperature evil:Cheat" in line for line in lines), said
    assert ran(run) == []


def test_the_command_may_name_it(run: Path) -> None:
    mlx, named = ["--backend", "mlx"], ["--plugins", "evil:Cheat"]
    codes, said = called(run, [["eval", ".", *mlx, *named]], [sys.executable, "-c", VERBS])
    assert codes == {"eval": 2} and "No module named 'evil'; it is looked for on PYTHONPATH" in said and not ran(run)
    for name in BESIDE[1:]:
        (run / f"{name}.py").unlink()
    place = os.pathsep.join((os.environ["PYTHONPATH"], str(run)))
    codes, said = called(run, [["eval", ".", *mlx, *named]], [sys.executable, "-c", VERBS], PYTHONPATH=place)
    assert codes == {"eval": 0} and ran(run)[0] == "evil", said
    assert main(["eval", str(run), *mlx, "--plugins"]) == 0  # none at all


def test_built_in_plugins_need_no_word() -> None:
    assert foreign(["temperature"]) == [] and foreign(["temperature", "a:B"]) == ["a:B"]


@pytest.mark.parametrize("path, left", [("", []), (".", []), ("HERE", ["HERE"])])
def test_the_current_folder_leaves_the_import_path(path: str, left: list[str], tmp_path: Path) -> None:
    """Unless PYTHONPATH names it in full, or it is the one that holds core."""
    code = "import sys, core, json; print(json.dumps([sys.path, core.PYTHON, core.ROOT]))"
    place = os.pathsep.join((os.environ["PYTHONPATH"], path.replace("HERE", str(tmp_path))))

    def asked(folder: Path) -> tuple[list[str], list[str], str]:
        out = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env={**os.environ, "PYTHONPATH": place}, capture_output=True,
            check=True,
        ).stdout  # fmt: skip
        return json.loads(out)

    paths, start, root = asked(tmp_path)
    here = [p for p in paths if p == "" or os.path.realpath(p) == os.path.realpath(tmp_path)]
    assert here == [p.replace("HERE", str(tmp_path)) for p in left] and start[1:] == ["-P"]
    paths, start, root = asked(Path(root))
    assert "" in paths and start[1:] == []
