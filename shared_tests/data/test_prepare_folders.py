"""Where prepared data go: a folder is whole or absent, whatever was there and whoever is killed. Budget: 8 s."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from core.data.dataset import DataError, open_dataset
from core.data.prepare import prepare
from core.files import FileError
from shared_tests.support.texts import MODEL, jsonl, words

ROOT = Path(__file__).resolve().parents[2]


def test_an_existing_folder(tmp_path: Path) -> None:
    one, two = jsonl(tmp_path / "a.jsonl", words(0, 9)), jsonl(tmp_path / "b.jsonl", words(5, 19))
    out = str(tmp_path / "out")
    first = prepare([one], out, tokenizer=MODEL)
    stamp = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert prepare([one], out, tokenizer=MODEL) == first
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == stamp, "made again"
    for changed in (
        lambda: prepare([two], out, tokenizer=MODEL),
        lambda: prepare([one], out, tokenizer=MODEL, val_share=0.3),
        lambda: prepare([one], out, tokenizer=MODEL, shard_tokens=50),
        lambda: prepare([one], out, vocab=270),
    ):
        with pytest.raises(DataError, match="out: holds data made from other inputs") as caught:
            changed()
        assert "\n" not in str(caught.value)
    assert open_dataset(out).manifest == first
    second = prepare([two], out, tokenizer=MODEL, overwrite=True)
    assert open_dataset(out).manifest == second != first
    shard = tmp_path / "out" / "train_000000.bin"
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for damage, message in ((b"", "header: 0 bytes"), (shard.read_bytes()[:-1] + b"\0", "sha256: not what")):
        shard.write_bytes(damage)
        with pytest.raises(DataError, match=f"train_000000.bin: {message}.* or --overwrite it"):
            prepare([two], out, tokenizer=MODEL)
        assert prepare([two], out, tokenizer=MODEL, overwrite=True) == second == open_dataset(out).manifest
    assert prepare([one], out, tokenizer=MODEL, overwrite=True, shard_tokens=50)["splits"]["train"]["files"][1:]
    assert prepare([two], out, tokenizer=MODEL, overwrite=True) == second
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "out"]
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine" and not (tmp_path / "out" / ".part").exists()
    assert not (tmp_path / "out" / "train_000001.bin").exists(), "left of more shards"


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "t.jsonl", words(0, 9))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match="exists and holds no prepared data"):
        prepare([source], str(tmp_path / "out"), tokenizer=MODEL, overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("where", ["link", "here", "empty"])
def test_the_folder_that_was_named_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A link stays one, `.` is where one is, a mount stays mounted: nothing is put in the folder's place."""
    source, big = jsonl(tmp_path / "t.jsonl", words(0, 9)), tmp_path / "big"
    big.mkdir()
    before = big.stat().st_ino
    (tmp_path / "link").symlink_to("big")
    monkeypatch.chdir(big if where == "here" else tmp_path)
    out = {"link": "link", "here": ".", "empty": "big"}[where]
    manifest = prepare([source], out, tokenizer=MODEL)
    assert manifest["name"] == {"link": "link", "here": "big", "empty": "big"}[where]
    assert big.stat().st_ino == before and (tmp_path / "link").is_symlink()
    assert {"manifest.json", "train_000000.bin"} < {file.name for file in big.iterdir()}
    assert open_dataset(str(big)).manifest == manifest == prepare([source], out, tokenizer=MODEL)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["big", "link", "t.jsonl"]
    assert not (big / ".part").exists()


def test_what_cannot_be_the_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "t.jsonl", words(0, 9))
    (tmp_path / "lost").symlink_to("nowhere")
    (tmp_path / "locked").mkdir(mode=0o500)
    refused = [
        ("t.jsonl", "t.jsonl: is no folder"),
        ("t.jsonl/deep", "t.jsonl/deep: .*t.jsonl is no folder"),
        ("lost", "lost: is a link to nothing"),
    ]
    refused += [("locked/deep", "locked/deep: .*locked cannot be written to")] if os.getuid() else []
    for out, message in refused:
        with pytest.raises(DataError, match=message):
            prepare([str(tmp_path / "also-missing.txt")], str(tmp_path / out), tokenizer=MODEL)
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / ".part").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(FileError, match=r"\.part: is a link, expected a folder: remove it"):
        prepare([source], str(tmp_path / "trap"), tokenizer=MODEL)
    assert not list((tmp_path / "elsewhere").iterdir())


KILLED = """
import os, signal, sys, time
from core.data.prepare import prepare
def die(stage, done, total):
    if stage == sys.argv[4]:
        print("there", flush=True)
        if sys.argv[5] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        sys.stdin.readline()
prepare([sys.argv[1]], sys.argv[2], tokenizer=sys.argv[3], overwrite=True, progress=die)
"""


@pytest.mark.parametrize("existing", [False, True])
def test_a_kill_leaves_nothing_half_made(tmp_path: Path, existing: bool) -> None:
    source = jsonl(tmp_path / "t.jsonl", words(0, 200))
    out = tmp_path / "out"
    before = prepare([jsonl(tmp_path / "o.jsonl", words(0, 9))], str(out), tokenizer=MODEL) if existing else None
    killed = subprocess.run([sys.executable, "-c", KILLED, source, str(out), MODEL, "tokenising", "kill"], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert (out / ".part" / "tokenizer.model").exists(), "killed before it wrote anything"
    if before is None:
        with pytest.raises(DataError, match="no manifest.json here"):
            open_dataset(str(out))
    else:
        assert open_dataset(str(out)).manifest == before
    after = prepare([source], str(out), tokenizer=MODEL, overwrite=True)
    assert open_dataset(str(out)).manifest == after and not (out / ".part").exists()


@pytest.mark.parametrize("nth", [4, 6, 8, 9])  # the first three make files of the part, the last is the manifest
def test_a_kill_while_the_data_are_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """Of an overwritten folder nothing is left that could be taken for data, and the next call makes it whole."""
    one, two, out = (
        jsonl(tmp_path / "a.jsonl", words(0, 9)),
        jsonl(tmp_path / "b.jsonl", words(5, 40)),
        tmp_path / "out",
    )
    prepare([one], str(out), tokenizer=MODEL, shard_tokens=50)
    move, calls = os.replace, []

    def killed(*paths: str) -> None:
        calls.append(paths)
        if len(calls) == nth:
            raise KeyboardInterrupt
        move(*paths)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a kill would not tidy up either
        prepare([two], str(out), tokenizer=MODEL, overwrite=True)
    if not (out / "manifest.json").exists():
        with pytest.raises(DataError, match="no manifest.json here"):
            open_dataset(str(out))
    after = prepare([two], str(out), tokenizer=MODEL, overwrite=True)
    assert open_dataset(str(out)).manifest == after and after["made_from"]["inputs"][0]["file"] == "b.jsonl"
    files = {record["file"] for split in after["splits"].values() for record in split["files"]}
    assert {file.name for file in out.glob("*.bin")} == files and not (out / ".part").exists()


def test_a_second_process_waits_and_takes_what_the_first_made(tmp_path: Path) -> None:
    source, out = jsonl(tmp_path / "t.jsonl", words(0, 20)), str(tmp_path / "out")
    arguments = [sys.executable, "-c", KILLED, source, out, MODEL, "tokenising", "wait"]
    with subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdin and first.stdout and first.stdout.readline() == "there\n"
        seen: list[str] = []

        def report(stage: str, done: int, total: int) -> None:
            seen.append(stage)
            first.stdin.write("\n" * 100)  # type: ignore[union-attr]
            first.stdin.flush()  # type: ignore[union-attr]

        manifest = prepare([source], out, tokenizer=MODEL, progress=report)
        assert seen == ["waiting for another process that prepares this folder"]
    assert first.returncode == 0 and open_dataset(out).manifest == manifest
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "t.jsonl"]
