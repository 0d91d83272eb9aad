"""Whatever lies in the place of a file of a run, every verb works or says so in one line, at once. Budget: 20 s.

All kinds for all files and verbs take a quarter of an hour of `scripts/test --long`; here a fixed draw of them.
"""

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from shared_tests.support.hostile import KINDS, Server, Slow, contents, copied, drawn, judge, plant, played
from shared_tests.support.killed import small_data

SHORT = ("--train.steps", "4", "--train.save-every", "2", "--train.keep-every", "1", "--train.log-every", "1")
SHORT += ("--train.eval-every", "None", "--train.sample-every", "None", "--eval.documents", "2", "--backend", "cuda")
LAST, KEPT = "state/checkpoint.safetensors", "state/step-2.safetensors"
WRITTEN = (
    "log.txt", "tokenizer.model", "lock", "artifact.skc", "report.md", "curve.png", LAST, "state/score.ledger",
    "state/artifact.ledger",
)  # fmt: skip
RECORDS = ("config.json", "env.json", "metrics.jsonl")
TOUCHED = ("log.txt", "lock", "audit/legality.md", "audit/audit.json", "audit/ledger")
"""Files that an audit locks, writes or searches for a line: the ledger's reader meets every kind in test_ledger.py."""
FILES = {
    "train": (*RECORDS, *WRITTEN, "state/step-4.safetensors"),
    "export": (*RECORDS, *WRITTEN),
    "eval": ("config.json", "tokenizer.model", LAST),
    "eval kept": (KEPT,),
    "eval artifact": ("artifact.skc",),
    "sample": ("config.json", "tokenizer.model", LAST),
    "compare": (*RECORDS, "tokenizer.model"),
    "track": ("config.json", "metrics.jsonl", "lock"),
    "audit": (*RECORDS, "artifact.skc", *TOUCHED),
}  # fmt: skip
"""Verb -> the files of a run that it reads or writes."""
QUICK = [(verb, file, kind) for verb, files in FILES.items() if verb != "audit" for file in files for kind in KINDS]
ALWAYS = ("fifo", "link to a folder", "link to a stranger", "folder", "sparse")
"""Kinds in the place of every file of TOUCHED; others are drawn, as each takes a whole audit."""


class Place(NamedTuple):
    """Where the cases are played."""

    server: Server
    data: str
    base: Path
    """A run that has come to its end, whose last checkpoint is the one of step 2 again."""
    folder: Path

    def command(self, verb: str, run: Path) -> list[str]:
        """Return the command line of a verb of FILES."""
        quick = ["--backend", "cuda"]
        return {
            "train": ["train", "debug", "--data.path", self.data, *SHORT, "--again", "--out", str(run)],
            "export": ["export", str(run), *quick],
            "eval": ["eval", str(run), *quick],
            "eval kept": ["eval", str(run), "--step", "2", *quick],
            "eval artifact": ["eval", str(run / "artifact.skc"), "--data", self.data, "--documents", "2", *quick],
            "sample": ["sample", str(run), "--tokens", "4", *quick],
            "compare": ["compare", str(run), str(self.base), "--out", str(self.folder / "compared")],
            "track": ["track", str(run)],
            "audit": ["audit", str(run), "--tokens", "500", "--flips", "1", *quick],
        }[verb]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A server, and the run that the cases copy."""
    folder = tmp_path_factory.mktemp("hostile")
    data, base = small_data(folder / "small", 60), folder / "base"
    with Server() as server:
        made = server.run(["train", "debug", "--data.path", data, *SHORT, "--out", str(base)])
        assert made.code == 0, made.err
        shutil.copyfile(base / KEPT, base / LAST)
        yield Place(server, data, base, folder)


def untouched(place: Place) -> float:
    """Return the processor time in seconds of an audit of the untouched run: its processes import a framework each."""
    ran = place.server.run(place.command("audit", copied(place.base, place.folder / "run")), place.folder)
    assert ran.code in (0, 1) and "wrote" in ran.out, ran
    return ran.seconds


@pytest.fixture(scope="module")
def honest(place: Place) -> float:
    """What every audit is compared with."""
    return untouched(place)


def play(place: Place, verb: str, file: str, kind: str, allowed: float = 0.0) -> int:
    """Plant a kind in the place of a file of a run, let a verb meet it, and return its exit code."""
    run = copied(place.base, place.folder / "run")
    strangers = place.folder / "strangers"
    shutil.rmtree(strangers, ignore_errors=True)
    (run / file).parent.mkdir(exist_ok=True)
    plant(kind, run / file, strangers)
    theirs, saved = contents(strangers), contents(run / "state") if not file.startswith("state") else {}
    ran = place.server.run(place.command(verb, run), place.folder)
    judge(ran, (0, 1, 2) if verb == "audit" else (0, 2), allowed)
    assert contents(strangers) == theirs, "a file that is none of the run's was changed"
    if ran.code == 2:
        assert "training stopped" not in ran.out, f"a whole training was lost: {ran.err}"
        assert not saved or contents(run / "state") == saved, f"a checkpoint was touched: {ran.err}"
    return ran.code


def test_a_draw_of_all_cases(place: Place) -> None:
    cases = {verb: [case for case in QUICK if case[0] == verb] for verb in FILES if verb != "audit"}
    some = [case for verb, of_it in cases.items() for case in drawn(of_it, 2, f"hostile/run/{verb}")]
    codes = played(some, functools.partial(play, place))
    assert {0, 2} == set(codes) and codes.count(2) > 5, "a draw without refusals, or with nothing else, proves little"


@pytest.mark.parametrize("verb, name", [("train", "state"), ("track", "tensorboard"), ("audit", "audit")])
def test_a_folder_of_a_run_is_no_link(verb: str, name: str, place: Place) -> None:
    """Written through it, files of somebody else would be replaced, and swept."""
    run, theirs = copied(place.base, place.folder / "run"), place.folder / "theirs"
    theirs.mkdir()
    for file in ("checkpoint.safetensors", "events.out.tfevents.1", "legality.md"):
        (theirs / file).write_text("mine")
    before = contents(theirs)
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).symlink_to(theirs)
    ran = place.server.run(place.command(verb, run), place.folder)
    judge(ran, (2,))
    assert f"{run / name}: is a link" in ran.err and contents(theirs) == before
    shutil.rmtree(theirs)


@pytest.mark.long
@pytest.mark.parametrize("verb, file", [(verb, file) for verb in FILES if verb != "audit" for file in FILES[verb]])
def test_every_case(place: Place, verb: str, file: str) -> None:
    played([case for case in QUICK if case[:2] == (verb, file)], functools.partial(play, place))


@pytest.mark.long
@pytest.mark.parametrize("file", FILES["audit"])
def test_every_audit(place: Place, honest: float, file: str) -> None:
    """An audit may take as much longer than an untouched one as any command may take."""

    def attempt(*case: str) -> int:
        try:
            return play(place, *case, allowed=honest)
        except Slow:  # a busy machine makes one audit twice as slow as another: both once more, next to each other
            return play(place, *case, allowed=untouched(place))

    others = [kind for kind in KINDS if kind not in ALWAYS]
    kinds = [*ALWAYS, *drawn(others, 2, f"hostile/{file}")] if file in TOUCHED else list(KINDS)
    played([("audit", file, kind) for kind in kinds], attempt)
