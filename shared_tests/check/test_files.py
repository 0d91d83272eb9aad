"""The doors of core.files: what they refuse, and that nothing is written through a link. Budget: 2 s."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from core import files
from core.files import FileError

READERS: dict[str, Callable[[Path], object]] = {
    "open_file": files.open_file,
    "open_input": files.open_input,
    "read_file": lambda path: files.read_file(path, 100),
    "read_text": files.read_text,
    "read_json": files.read_json,
}
WRITERS: dict[str, Callable[[Path], object]] = {"append_file": files.append_file, "edit_file": files.edit_file}


def odd(folder: Path, kind: str) -> Path:
    """Put something that is no regular file into `folder` and return its path."""
    path = folder / kind
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
@pytest.mark.parametrize("door", [*READERS, *WRITERS])
def test_only_regular_files_are_opened(door: str, kind: str, tmp_path: Path) -> None:
    """No reader and no writer waits for a FIFO, reads a device or takes a folder."""
    with pytest.raises(FileError, match="expected a regular file"):
        (READERS | WRITERS)[door](odd(tmp_path, kind))


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="a system without /proc")
@pytest.mark.parametrize("door", [*READERS, *WRITERS])
def test_a_file_of_the_kernels_is_no_file(door: str, tmp_path: Path) -> None:
    """What looks regular and lies in /proc may wait, fail or never end."""
    link = tmp_path / "link"
    link.symlink_to("/proc/self/mem")
    with pytest.raises(FileError, match="kernel|is a link"):
        (READERS | WRITERS)[door](link)


@pytest.mark.parametrize("door", WRITERS)
def test_nothing_is_written_through_a_link(door: str, tmp_path: Path) -> None:
    """A link to a regular file is read, never written through; `replace_file` puts a file in the link's place."""
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    assert files.read_file(link, 3) == b"old"
    with pytest.raises(FileError, match="is a link"):
        WRITERS[door](link)
    files.replace_file(link, b"new")
    assert (target.read_bytes(), link.read_bytes(), link.is_symlink()) == (b"old", b"new", False)


def test_a_fresh_name_is_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody guessed the temporary name, nothing of theirs is overwritten."""
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "0" * 16)
    stranger = tmp_path / "stranger"
    stranger.write_bytes(b"theirs")
    (tmp_path / ("a." + "0" * 16 + ".tmp")).symlink_to(stranger)
    with pytest.raises(FileExistsError):
        files.replace_file(tmp_path / "a", b"ours")
    assert stranger.read_bytes() == b"theirs"


def test_the_size_is_bounded(tmp_path: Path) -> None:
    """A file over the limit is refused before it is read, and one that grows while it is read afterwards."""
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(FileError, match="expected at most"):
        files.read_file(path, 1 << 20)
    with open("/dev/zero", "rb") as endless, pytest.raises(FileError, match="over 1,024 bytes"):
        files.read_bounded("endless", endless, 1024)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_other_encodings_are_named(encoding: str) -> None:
    """Text in another encoding than UTF-8 is refused by name; a byte order mark of UTF-8 is dropped."""
    with pytest.raises(FileError, match="UTF-16|UTF-32|not UTF-8"):
        files.decode_text("text", "né".encode(encoding))
    assert files.decode_text("text", "né".encode("utf-8-sig")) == "né"


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, '{"a": NaN}', "{", ""])
def test_json_that_is_none(text: str) -> None:
    """Nesting, digits, NaN and cut texts are one typed error."""
    with pytest.raises(FileError, match="not JSON"):
        files.parse_json("text", text)


def test_a_text_of_too_many_values_is_refused_before_it_is_parsed() -> None:
    """Empty lists take twenty times the memory of their text; commas in strings are no values."""
    many = files.MOST_VALUES + 2
    for text in (f"[{'[],' * many}0]", f"[{'1,' * many}0]", f"{{{','.join([chr(34) * 2 + ':{}'] * many)}}}"):
        with pytest.raises(FileError, match="values"):
            files.parse_json("text", text)
    written = ',[{\\"' * many
    assert files.parse_json("text", f'["{written}"]') == [written.replace("\\", "")]


def test_a_lock_ends_with_its_file(tmp_path: Path) -> None:
    """One holder at a time; readers share; closing the file lets the next one in."""
    with files.append_file(tmp_path / "lock") as first, files.append_file(tmp_path / "lock") as second:
        assert files.locked(first)
        assert not files.locked(second)
        assert not files.locked(second, shared=True)
        first.close()
        assert files.locked(second, shared=True)


def test_sweeping_takes_only_what_a_killed_writer_left(tmp_path: Path) -> None:
    """Names of our own form that are regular files go; everything else stays."""
    (tmp_path / "mine.tmp").touch()
    (tmp_path / ("a." + "f" * 16 + ".tmp")).touch()
    (tmp_path / ("b." + "f" * 16 + ".tmp")).symlink_to("mine.tmp")
    files.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b." + "f" * 16 + ".tmp", "mine.tmp"]
