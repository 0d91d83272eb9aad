"""Whatever lies in the place of a file of prepared data, a verb works or says so in one line, at once. Budget: 15 s.

All kinds for all files and verbs take some minutes: `scripts/test --long`; here a fixed draw of them.
"""

import functools
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

from core.data.dataset import open_dataset
from shared_tests.support.hostile import KINDS, Server, contents, drawn, judge, plant, played
from shared_tests.support.killed import small_data

SHORT = ("--train.steps", "2", "--train.eval-every", "None", "--train.sample-every", "None", "--backend", "cuda")
FILES = (
    "manifest.json", "tokenizer.model", "train_000000.bin", "val_000000.bin", "train_document_bytes.npy",
    "val_document_bytes.npy",
)  # fmt: skip
VERBS = ("train", "eval", "prepare", "again", "adopt", "part")
HARMLESS = {"link to a stranger"}
"""Kinds under which a file still holds what was there."""
NEEDED = {"train": FILES[:4], "eval": (*FILES[:2], FILES[3]), "prepare": FILES[:4]}
"""Verb -> the files without which it cannot work: what each holds is compared with what was prepared."""
CASES = [(verb, file, kind) for verb in VERBS for file in FILES for kind in KINDS]


class Place(NamedTuple):
    """Where the cases are played."""

    server: Server
    base: Path
    """Prepared data."""
    run: Path
    """A run of two steps on such data."""
    text: Path
    folder: Path

    def command(self, verb: str) -> list[str]:
        """Return the command line of a verb that reads the data in `folder`/data, or writes there."""
        data, out = str(self.folder / "data"), str(self.folder / "out")
        prepare = ["data", "prepare", str(self.text), "--out", data, "--tokenizer", str(self.base / "tokenizer.model")]
        return {
            "train": ["train", "debug", "--data.path", data, *SHORT, "--out", out],
            "eval": ["eval", str(self.run), "--documents", "all", "--backend", "cuda"],
            "prepare": prepare,
            "again": [*prepare, "--overwrite"],
            "adopt": ["data", "adopt", data, "--tokenizer", str(self.folder / "data" / "tokenizer.model")],
            "part": prepare,
        }[verb]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A server, prepared data, and a run on them; the data are copied to folder/data for each case."""
    folder = tmp_path_factory.mktemp("hostile")
    prepared = Path(small_data(folder / "small", 60))
    text = next(path for path in (folder / "small").iterdir() if path.suffix == ".jsonl")
    with closing(Server()) as server:
        place = Place(server, folder / "base", folder / "run", text, folder)
        ran = server.run(
            [
                "data",
                "prepare",
                str(text),
                "--out",
                str(folder / "data"),
                "--tokenizer",
                str(prepared / "tokenizer.model"),
            ]
        )
        assert ran.code == 0, ran.err
        shutil.copytree(folder / "data", folder / "base")
        ran = server.run([*place.command("train")[:-1], str(folder / "run")])
        assert ran.code == 0, ran.err
        yield place


def play(place: Place, verb: str, file: str, kind: str) -> int:
    """Plant a kind in the place of a file of the data, let a verb meet it, and return its exit code."""
    data, strangers = place.folder / "data", place.folder / "strangers"
    for path in (data, strangers, place.folder / "out"):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(place.base, data)
    if verb == "part":  # what a killed process may have left, or somebody put there
        (data / "manifest.json").unlink()
        (data / ".part").mkdir()
        target = data / ".part" / ("lock" if file == "manifest.json" else file)
        plant(kind, target, strangers)
    else:
        if verb == "adopt":
            (data / "manifest.json").unlink()
            for name in ("train", "val"):
                os.rename(data / f"{name}_000000.bin", data / f"x_{name}_000000.bin")
            file = f"x_{file}" if file.endswith(".bin") else file
        plant(kind, data / file, strangers)
    theirs = contents(strangers)
    ran = place.server.run(place.command(verb), place.folder)
    judge(ran)
    assert contents(strangers) == theirs, "a file that is none of the data was changed"
    if ran.code == 0 and verb != "adopt":
        if verb in NEEDED and file in NEEDED[verb]:
            assert kind in HARMLESS or (data / file).read_bytes() == (place.base / file).read_bytes()
        if verb in ("prepare", "again", "part"):
            open_dataset(str(data)).val.verify()
            open_dataset(str(data)).train.verify()
    return ran.code


def test_a_draw_of_all_cases(place: Place) -> None:
    codes = played(drawn(CASES, 30, "hostile/data"), functools.partial(play, place))
    assert {0, 2} == set(codes) and codes.count(2) > 10, "a draw without refusals, or with nothing else, proves little"


@pytest.mark.long
@pytest.mark.parametrize("verb", VERBS)
def test_every_case(place: Place, verb: str) -> None:
    played([case for case in CASES if case[0] == verb], functools.partial(play, place))
