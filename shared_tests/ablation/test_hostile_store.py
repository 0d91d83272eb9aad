"""Whatever lies in the place of a file of an ablation store or of its TOML, `skc ablate` works or says one line.

Budget: 18 s; the whole, under the marker `long`: 10 minutes.
"""

import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.ablation.plan import read_plan
from core.ablation.runner import run_all
from core.ablation.store import RunStore
from core.data.dataset import identity, open_dataset
from core.training.environment import code_version
from shared_tests.support.ablation_runs import WORKER
from shared_tests.support.hostile import KINDS, Ran, Server, contents, copied, drawn, judge, plant, played
from shared_tests.support.killed import small_data

PLAN = """
    name = "parts"
    base = "debug"
    seeds = [1]
    backends = ["cuda"]
    [budget]
    steps = 10
    [variants.plain]
    [variants.wide]
    "model.dim" = 64
    """
IMPORTS = ("core.cli", "core.verbs.ablate", "core.verbs.train", "matplotlib.figure")
ABLATION = ("members.json", "lock", "looked.json", "report.html", "report.md", "difference.png", "curves.png")
HOME = ("job.json", "machine.json", "failed.json", "lock", "worker.txt")
RUN = ("run/config.json", "run/metrics.jsonl", "run/env.json")
FILES = ("parts.toml", *(f"store/ablations/parts/{name}" for name in ABLATION), *HOME, *RUN)
"""Files that are tried; those of HOME and RUN lie in the folder of the first run."""
LINE = 10_000
"""Letters of a line that is not an error."""


class Made:
    """A finished ablation and a server that runs `skc ablate` on copies of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.server = folder, Server(IMPORTS)
        self.data = small_data(folder)
        self.whole = folder / "whole"
        self.whole.mkdir()
        (self.whole / "parts.toml").write_text(textwrap.dedent(PLAN))
        plan, store = read_plan(self.whole / "parts.toml"), RunStore(self.whole / "store")
        code, data = code_version(), identity(open_dataset(self.data))
        places = [store.place(job, code, data) for job in plan.jobs()]
        run_all(
            store, places, parallel=2, threads=1, worker=WORKER, shown=lambda progress: None,
            started=lambda place: store.prepare(place, code, data, "test"), ended=lambda place: None,
        )  # fmt: skip
        self.home = f"store/runs/{places[0].key}"
        self.copy = folder / "copy"  # where the ablation was made, or its name would be taken by another file
        self.whole.rename(self.copy)
        done = self.run(self.copy)
        assert done.code == 0 and "2 of 2 runs are done already" in done.out, done
        self.copy.rename(self.whole)

    def run(self, where: Path) -> Ran:
        """Run `skc ablate` on a copy."""
        command = ["ablate", "parts.toml", "--store", "store", "--data", self.data, "--threads", "1"]
        return self.server.run(command, where)

    def attempt(self, file: str, kind: str) -> Ran:
        """Try one case in a fresh copy and return what was done; AssertionError says what was wrong."""
        where, strangers = copied(self.whole, self.copy), self.folder / "strangers"
        plant(kind, where / (self.home if file in HOME + RUN else "") / file, strangers)
        before = contents(strangers)
        ran = self.run(where)
        judge(ran, (0, 1, 2))
        for line in (ran.out + ran.err).splitlines():
            assert line.isprintable() and len(line) <= LINE, f"{line[:1000]!r}"
        assert contents(strangers) == before, "a file elsewhere was changed"
        return ran


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    found = Made(tmp_path_factory.mktemp("store"))
    yield found
    found.server.close()


def test_odd_files_in_a_store(made: Made) -> None:
    """A few cases of all, always the same ones."""
    cases = [(file, kind) for file in FILES for kind in KINDS if file not in RUN[:2]]
    played(drawn(cases, 8, "store"), made.attempt)


def test_records_of_a_gigabyte(made: Made) -> None:
    """A run that is begun again is looked at by its worker, and by the table of what is under way."""
    for ran in played([("run/metrics.jsonl", "sparse"), ("run/metrics.jsonl", "sparse tail")], made.attempt):
        assert ran.code == 1 and "FAILED: plain, seed 1, cuda" in ran.out, ran


def test_a_link_in_the_place_of_a_folder(made: Made) -> None:
    """Reports and locks are not written into another folder."""
    where, strangers = copied(made.whole, made.copy), made.folder / "elsewhere"
    (where / "store/ablations/parts").rename(strangers)
    (where / "store/ablations/parts").symlink_to(strangers)
    before = contents(strangers)
    ran = made.run(where)
    judge(ran, (2,))
    assert "parts: is a link, expected a folder" in ran.err and contents(strangers) == before


@pytest.mark.long
@pytest.mark.parametrize("file", FILES)
def test_every_odd_file_in_a_store(made: Made, file: str) -> None:
    played([(file, kind) for kind in KINDS], made.attempt)
