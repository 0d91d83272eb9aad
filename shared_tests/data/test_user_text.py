"""Text of the user's own: prepared once in the cache, found by its content, never trusted half made. Budget: 20 s."""

import gzip
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import core.data.prepare
import core.data.user_text
from core.cli import main
from core.data.column import DataError
from core.data.user_text import Cutting, content_key, is_text, prepare_user_text
from core.training.run import Run
from shared_tests.support.command_line import SHORT, Capture, call, refuse

TEXTS = [f"It was the {i}th morning, and Mr. Bennet had read {i * i} letters to Zürich." for i in range(300)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "skc"


@pytest.fixture
def book(tmp_path: Path) -> str:
    """A text."""
    (tmp_path / "book.txt").write_text("\n\n".join(TEXTS))
    return str(tmp_path / "book.txt")


def prepared(path: str, cutting: Cutting = Cutting("bytes")) -> tuple[str, list[str]]:  # noqa: B008
    """Return the folder of a text, and what was said."""
    said: list[str] = []
    return prepare_user_text(path, said.append, cutting), said


def test_a_text_is_prepared_once_and_known_by_what_it_holds(book: str, tmp_path: Path, cache: Path) -> None:
    folder, said = prepared(book)
    assert said[0] == f"{book}: is prepared in {folder}, once" and Path(folder).parent == cache
    assert "one text, of which the last" in said[1]
    stamps = {file.name: file.stat().st_mtime_ns for file in Path(folder).iterdir()}
    copy = shutil.copy(book, tmp_path / "other.txt")
    for path in (book, str(copy)):
        assert prepared(path) == (folder, [f"{path}: was prepared before, in {folder}"])
    assert {file.name: file.stat().st_mtime_ns for file in Path(folder).iterdir()} == stamps
    with open(book, "a") as file:
        file.write(" ")
    assert prepared(book)[0] != folder and prepared(str(copy))[0] == folder


def test_what_decides_the_tokens_decides_the_folder(book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = tmp_path / "book.jsonl"
    lines.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (tmp_path / "same.txt").write_bytes(lines.read_bytes())
    keys = [content_key([book], cutting) for cutting in (Cutting(), Cutting(None, 300), Cutting("bytes"))]
    keys += [content_key([str(path)], Cutting()) for path in (lines, tmp_path / "same.txt")]
    keys += [content_key([book, str(lines)], Cutting()), content_key([str(lines), book], Cutting())]
    monkeypatch.setattr(core.data.user_text, "PREPARATION", 2)
    keys.append(content_key([book], Cutting()))
    assert len({*keys}) == len(keys)
    tokenizer = tmp_path / "mine.json"
    tokenizer.write_bytes(core.data.prepare.named_tokenizer("bytes").model)
    assert content_key([book], Cutting(str(tokenizer))) == content_key([book], Cutting("bytes"))


def test_folders_patterns_and_packed_files_are_texts(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("\f".join(TEXTS[:40]))
    (folder / "deep" / "b.jsonl.gz").write_bytes(
        gzip.compress("\n".join(json.dumps({"text": text}) for text in TEXTS[40:80]).encode())
    )
    documents = []
    for path in (str(folder), f"{folder}/*.txt", str(folder / "deep" / "b.jsonl.gz")):
        assert is_text(path)
        splits = json.loads(Path(prepared(path)[0], "manifest.json").read_text())["splits"]
        documents.append(sum(split["documents"] for split in splits.values()))
    assert documents == [80, 40, 40]
    assert not is_text("sample") and not is_text(prepared(str(folder))[0]) and not is_text(str(tmp_path / "nowhere"))
    assert is_text(str(tmp_path / "nowhere.txt")) and not is_text(str(tmp_path / "texts" / "none"))


def test_a_preparation_that_was_killed_is_not_trusted(book: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(BaseException):
        """As SIGKILL: nothing tidies up."""

    def kill(*_: object) -> None:
        raise KilledError

    whole = prepared(book)[0]
    kept = {file.name: file.read_bytes() for file in Path(whole).iterdir()}
    shutil.rmtree(cache)
    monkeypatch.setattr("core.data.making._clear", lambda part, keep: None)
    monkeypatch.setattr("core.data.making.shutil.rmtree", lambda *_, **__: None)
    for place in ("core.data.making.write_manifest", "core.data.prepare.install"):
        with monkeypatch.context() as patch, pytest.raises(KilledError):
            patch.setattr(place, kill)
            prepared(book)
        assert os.listdir(whole), "something was left"
    monkeypatch.undo()
    os.environ["XDG_CACHE_HOME"] = str(cache.parent)
    folder, said = prepared(book)
    assert (folder, said[0]) == (whole, f"{book}: is prepared in {folder}, once")
    assert {file.name: file.read_bytes() for file in Path(folder).iterdir()} == kept


def test_a_text_that_changes_meanwhile_is_no_data(book: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the text of before would find the tokens of the other one under its own name."""
    before = Path(book).read_text()

    def prepare(*arguments: Any, **options: Any) -> Any:
        Path(book).write_text(before.replace("Bennet", "Darcy"))
        return real(*arguments, **options)

    real = core.data.user_text.prepare
    with monkeypatch.context() as patch:
        patch.setattr(core.data.user_text, "prepare", prepare)
        with pytest.raises(DataError, match="changed while it was prepared"):
            prepared(book)
    Path(book).write_text(before)
    folder, said = prepared(book)
    assert said[0].endswith(", once") and folder == str(next(cache.iterdir()))
    found = json.loads(Path(folder, "manifest.json").read_text())["made_from"]["inputs"][0]["sha256"]
    assert found == hashlib.sha256(before.encode()).hexdigest()


def test_a_damaged_preparation_is_made_again_or_named(book: str) -> None:
    folder, _ = prepared(book)
    shard, manifest = Path(folder, "train_000000.bin"), Path(folder, "manifest.json")
    before = shard.read_bytes()
    shard.write_bytes(before[:-8] + bytes(8))
    again, said = prepared(book)
    assert again == folder and "prepared again, since" in said[0] and shard.read_bytes() == before
    manifest.write_text("{")
    with pytest.raises(DataError, match="or remove this folder of the cache"):
        prepared(book)


def test_a_run_on_a_text_is_judged_where_the_text_lies_prepared(
    book: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, argv = str(tmp_path / "run"), ("train", "debug", "--data", book, "--vocab", "300", *SHORT[:-1], "mlx")
    assert main([*argv, "--out", out]) == 0
    said = capsys.readouterr().out
    folder = Run.open(out).config.data.path
    assert f"{book}: is prepared in {folder}, once\n" in said and Run.open(out).config.model.vocab == 300
    monkeypatch.chdir("/")
    value = call(capsys, "eval", out, "--backend", "mlx")
    assert value["data"] == folder and value["score"] == Run.open(out).last("final/score")
    assert call(capsys, *argv, "--out", out)["already"]
    line = refuse(capsys, "eval", out, "--data", book)
    assert f"skc data prepare {book} --tokenizer {out}/tokenizer.model --out FOLDER" in line
    Path(book).write_text("\n\n".join(TEXTS[::-1]))
    assert "its tokenizer.model is not that of" in (line := refuse_last(capsys, *argv, "--out", out)), line
    assert main(["info", "debug", "--data", book]) == 0  # prepared again, by default with as many pieces as it allows
    assert f"{book}: is prepared in " in capsys.readouterr().out


def refuse_last(capsys: Capture, *argv: str) -> str:
    """Return the one line on stderr of a command that first says what it prepares."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        ("--data nowhere.txt", "nowhere.txt: no such file"),
        ("--data nowhere", "nowhere: no such folder"),
        ("--data /dev/null", "/dev/null: is a device, expected a regular file"),
        ("--data BOOK.md", "unknown kind of file; expected a name that ends in .txt"),
        ("--data sample --vocab 300", "--vocab 300: sample has its tokens already: leave it out, or give a text"),
        ("--tokenizer bytes", "--tokenizer bytes: sample has its tokens already"),
        ("--data BOOK --vocab 300 --tokenizer bytes", "--vocab 300 is for a tokenizer that is trained: leave it out"),
        ("--data BOOK --tokenizer nowhere.model", "nowhere.model: No such file"),
    ],
)
def test_what_is_no_text_gets_one_line(words: str, message: str, book: str, capsys: Capture) -> None:
    shutil.copy(book, f"{book}.md")
    assert message in refuse_last(capsys, "train", "debug", *words.replace("BOOK", book).split())
