"""`skc ablate` from the command line, with real training. Budget: 30 s."""

import ast
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.ablation.plan import read_plan
from core.ablation.records import read_job
from core.ablation.store import RunStore
from core.cli import main
from core.training.environment import READERS, ROOT, code_version, reads
from core.training.run import Run
from shared_tests.support.command_line import events
from shared_tests.support.killed import small_data

PLAN = """
    name = "first"
    base = "debug"
    seeds = [1, 2]
    backends = ["cuda"]
    [budget]
    steps = 6
    [settings]
    "train.eval_every" = 3
    "train.sample_every" = "none"
    [variants.plain]
    [variants.wide]
    "model.dim" = 64
    """


def call(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    """Run a command line with --json and return its exit code, its object and what it said."""
    code = main([*arguments, "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out) if said.out else {}, said.err


def test_a_run_is_trained_and_one_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real worker, once to its end and once into a loss that is not finite; the report is written all the same."""
    plan, store = tmp_path / "first.toml", tmp_path / "store"
    text = textwrap.dedent(PLAN).replace("[1, 2]", "[1]")
    plan.write_text(text.partition("[variants.wide]")[0] + '[variants.broken]\n"train.lr_vector" = 1e30\n')
    command = ["ablate", str(plan), "--data", small_data(tmp_path), "--store", str(store), "--threads", "1"]
    code, found, said = call([*command, "--parallel", "2"], capsys)
    assert code == 1, said
    assert [failure.startswith("broken, seed 1, cuda: ") and "finite" in failure for failure in found["failed"]] == [
        True
    ]
    assert [row["n"] for row in found["backends"]["cuda"]["variants"]] == [1, 0]
    folder = store / "ablations" / "first"
    assert {"report.html", "report.md", "members.json"} <= {path.name for path in folder.iterdir()}


@pytest.mark.long
def test_an_ablation_from_plan_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plan, run, report; again nothing is trained; a new variant trains its own runs only; one that fails is named."""
    data, store = small_data(tmp_path), str(tmp_path / "store")
    plan = tmp_path / "first.toml"
    plan.write_text(textwrap.dedent(PLAN))
    command = ["ablate", str(plan), "--data", data, "--store", store, "--threads", "1", "--parallel", "2"]

    code, found, said = call([*command, "--dry-run"], capsys)
    assert code == 0 and (found["runs"], found["to_do"]) == (4, 4) and found["seconds"] > 0
    assert "2 seeds can resolve a difference of" in said and "assumed" in said
    assert not (tmp_path / "store").exists(), "a dry run writes nothing"

    code, found, said = call(command, capsys)
    assert code == 0 and found["failed"] == [], said
    summaries = {row["variant"]: row for row in found["backends"]["cuda"]["variants"]}
    assert summaries["plain"]["n"] == summaries["wide"]["n"] == 2
    assert summaries["wide"]["parameters"] > summaries["plain"]["parameters"]
    effect = found["backends"]["cuda"]["effects"][0]
    assert effect["variant"] == "wide" and effect["paired"]["n"] == 2
    folder = Path(store) / "ablations" / "first"
    assert {"report.html", "report.md", "members.json"} <= {path.name for path in folder.iterdir()}
    assert {read_job(path.parent).code for path in Path(store).glob("runs/*/job.json")} == {code_version()}

    places = sorted(Path(store).glob("runs/*/run/metrics.jsonl"))
    before = {path: path.stat().st_mtime_ns for path in places}
    code, again, said = call([*command, "--track", "tensorboard"], capsys)
    assert code == 0 and "4 of 4 runs are done already" in said
    tracked = {path.name: events(path / "tensorboard") for path in (folder / "tracked").iterdir()}
    assert tracked.keys() == {"plain-1-cuda", "plain-2-cuda", "wide-1-cuda", "wide-2-cuda"}
    ends = [v for rows in tracked.values() for _, name, v, _ in rows if name == "final/artifact/score/bpb"]
    scores = [Run.open(path.parent).last("final/artifact")["score"]["bpb"] for path in places]
    assert len(scores) == 4 and sorted(ends) == pytest.approx(sorted(scores), rel=1e-6)
    assert {path: path.stat().st_mtime_ns for path in places} == before, "a run was repeated"
    assert again["backends"] == found["backends"]

    plan.write_text(textwrap.dedent(PLAN).replace("[1, 2]", "[1]") + '[variants.broken]\n"train.lr_vector" = 1e30\n')
    code, found, said = call(command, capsys)
    assert code == 1 and "2 of 3 runs are done already" in said
    assert len(found["failed"]) == 1 and found["failed"][0].startswith("broken, seed 1, cuda: ")
    assert "finite" in found["failed"][0] and {path: path.stat().st_mtime_ns for path in places} == before


def test_a_run_refuses_other_code_than_its_ablations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever edits a file while an ablation runs gets runs that refuse, not runs that are not alike."""
    from core.verbs import ablation_worker as worker

    plan = tmp_path / "first.toml"
    plan.write_text(textwrap.dedent(PLAN))
    store = RunStore(tmp_path / "store")
    job = read_plan(plan).jobs()[0]
    place = store.place(job, "0" * 64, {"name": "x", "sha256": "y"})
    store.prepare(place, "0" * 64, {"name": "x", "sha256": "y"}, "test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.sys, "argv", ["worker", str(place.home)])
        patch.setattr(worker.threading, "Thread", lambda **_: type("Quiet", (), {"start": lambda self: None})())
        assert worker.main() == 2
    assert "has changed since this ablation was started" in capsys.readouterr().out


def _imported(path: Path) -> Iterator[Path]:
    """Yield the files of this checkout that a Python file imports, at its top or anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name}" for name in names] + [str(node.module)]
        for name in names:
            for file in (ROOT / f"{name.replace('.', '/')}.py", ROOT / name.replace(".", "/") / "__init__.py"):
                if name.startswith(("core", "backends")) and file.exists():
                    yield file


def test_what_a_run_is_named_by_is_all_that_it_imports() -> None:
    """Files that are left out of the code's version are imported by no run: a change in them cannot change a score."""
    begin = [ROOT / "core" / "verbs" / "ablation_worker.py", *(ROOT / "backends").rglob("*.py")]
    seen, waiting = set(begin), list(begin)
    while waiting:
        for file in set(_imported(waiting.pop())) - seen:
            seen.add(file)
            waiting.append(file)
    names = {str(path.relative_to(ROOT).as_posix()) for path in seen}
    assert {"core/training/loop.py", "core/config.py", "core/scoring/accounting.py", "core/verbs/train.py"} <= names
    assert {name for name in names if reads(name)} <= {"core/ablation/__init__.py"}
    assert not (ROOT / "core" / "ablation" / "__init__.py").read_text().count("import")
    assert all((ROOT / path).exists() or list(ROOT.glob(f"{path}*")) for path in READERS)


def test_what_would_stop_a_run_is_found_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A vocabulary that is not the data's, a model over the budget, and a store that is a file: one line, exit 2."""
    data = small_data(tmp_path)
    plan = tmp_path / "first.toml"
    for change, message in (
        ('"model.vocab" = 512', "model.vocab=512, but data.path="),
        ('"export.budget" = 231_000', "over what export.budget leaves"),
    ):
        plan.write_text(textwrap.dedent(PLAN).replace("[variants.plain]", f"{change}\n[variants.plain]"))
        assert main(["ablate", str(plan), "--data", data, "--store", str(tmp_path / "store")]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert not (tmp_path / "store").exists()
    plan.write_text(textwrap.dedent(PLAN))
    assert main(["ablate", str(plan), "--data", data, "--store", str(plan)]) == 2
    assert "is a file, expected a folder" in capsys.readouterr().err
