"""Shards read by position: few open files, no memory beyond what is read, every change named. Budget: 5 s."""

import io
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from core.data import column
from core.data.column import DataError
from core.data.dataset import Split
from core.data.shards import _header, file_sha256, open_shard, write_shard
from core.formats.npy import NpyError, read_header
from shared_tests.support.column_files import TOKENIZER, shards

ROOT = Path(__file__).resolve().parents[2]


MANY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from pathlib import Path
import numpy as np
from shared_tests.support.column_files import shards
split = shards(Path(sys.argv[1]), 1500, 7)
starts = np.random.default_rng(0).integers(0, len(split) - 20, 3000)
assert (split.gather(starts, 20) == (starts[:, None] + np.arange(20)) % 1000).all()
assert (split.read(0, len(split)) == np.arange(len(split)) % 1000).all()
"""


def test_many_shards_need_few_descriptors(tmp_path: Path) -> None:
    """1,500 shards in a process that may open 256 files, as on a Mac."""
    done = subprocess.run([sys.executable, "-c", MANY, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_the_pool_is_bounded_shared_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(column, "MOST_OPEN", 3)
    split = shards(tmp_path, 8, 5)
    wrong: list[object] = []

    def read() -> None:
        for start in (0, 33, 12, 21, 5, 38):
            if split.read(start, start + 2).tolist() != [start, start + 1]:
                wrong.append(start)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(column._open) <= 3
    split.close("over")
    with pytest.raises(DataError, match="is closed: over"):
        split.read(0, 1)
    numbers = {shard._number for shard in Split([open_shard(str(tmp_path / "000000.bin"))], TOKENIZER)._shards}  # type: ignore[union-attr]
    assert not numbers & set(column._open), "opened before it is read"


def cut(path: Path) -> None:
    os.truncate(path, 1100)


def grown(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def replaced(path: Path) -> None:
    write_shard(str(path), np.full(1000, 7))


def rewritten(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(1100)
        file.write(b"\7\0")
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("change", [cut, grown, replaced, rewritten, Path.unlink])
def test_a_shard_that_changes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], held: bool
) -> None:
    """No signal, no other tokens: also where the pool has given the file back in between."""
    monkeypatch.setattr(column, "MOST_OPEN", 1)
    split = shards(tmp_path, 2, 1000)
    assert split.read(500, 502).tolist() == [500, 501]
    if not held:
        split.read(1500, 1502)
    change(tmp_path / "000000.bin")
    if held and change in (replaced, Path.unlink):  # what was opened is still what it was
        assert split.read(500, 502).tolist() == [500, 501]
        return
    with pytest.raises((DataError, FileNotFoundError), match=r"000000\.bin") as caught:
        split.read(500, 502)
    assert "\n" not in str(caught.value) and split.read(1500, 1502).tolist() == [500, 501]


def test_a_sparse_shard_costs_what_is_read_of_it(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(_header(2**31 - 1))
    os.truncate(path, 1024 + 2 * (2**31 - 1))
    tracemalloc.start()
    try:
        shard = open_shard(str(path))
        assert len(shard) == 2**31 - 1 and not shard[2**31 - 1000 :].any()
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(DataError, match="does not start with BOS"):  # at once, not after two thousand million tokens
        _ = Split([open_shard(str(path))], TOKENIZER).document_starts
    os.truncate(path, 40 << 30)
    with pytest.raises(DataError, match=r"x\.bin: size: 42949672960 bytes"):
        open_shard(str(path))


def test_checksums_are_compared_once(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    write_shard(str(path), np.arange(1000))
    digest = file_sha256(str(path))
    split = Split([open_shard(str(path), digest)], TOKENIZER)
    split.verify()
    assert split._shards[0]._verified  # type: ignore[union-attr]
    data = bytearray(path.read_bytes())
    data[1500] ^= 1
    path.write_bytes(data)
    damaged = Split([open_shard(str(path), digest)], TOKENIZER)
    with pytest.raises(DataError, match=r"x\.bin: sha256: not what the manifest says"):
        damaged.verify()
    Split([open_shard(str(path))], TOKENIZER).verify()  # not recorded, so taken as it is


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def headed(text: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


SAMPLE = b"{'descr': '<i8', 'fortran_order': False, 'shape': (3,), }    \n"
HEADERS = {
    "empty": b"",
    "cut in the magic": npy(np.arange(3))[:7],
    "cut in the header": npy(np.arange(3))[:40],
    "version 2": b"\x93NUMPY\x02\x00" + npy(np.arange(3))[8:],
    "nested": headed(b"{'descr': " + b"[" * 4000 + b"}\n"),
    "deep tuples": headed(SAMPLE.replace(b"(3,)", b"((3,),)")),
    "tuples as shape": headed(SAMPLE.replace(b"(3,)", b"((3, 4), (5, 6))")),
    "booleans": headed(SAMPLE.replace(b"(3,)", b"(True,)")),
    "no tuple": headed(SAMPLE.replace(b"(3,)", b"(3)")),
    "negative": headed(SAMPLE.replace(b"(3,)", b"(-3,)")),
    "many digits": headed(SAMPLE.replace(b"(3,)", b"(" + b"9" * 3000 + b",)")),
    "no text": headed(bytes(range(128, 228))),
    "fields": headed(SAMPLE.replace(b"'<i8'", b"[('a', '<i8')]")),
    "unclosed": headed(b"{'descr': '''"),
    "longest": headed(b" " * 65_535),
}


@pytest.mark.parametrize("what", HEADERS)
def test_odd_npy_headers_are_one_typed_error(what: str) -> None:
    with pytest.raises(NpyError) as caught:
        read_header(io.BytesIO(HEADERS[what]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (0,), (2, 3, 4)])
@pytest.mark.parametrize("kind", ["<i8", "<f4", "<f2", "|b1"])
def test_npy_headers_that_numpy_writes(shape: tuple[int, ...], kind: str) -> None:
    array = np.zeros(shape, kind, order="F")
    file = io.BytesIO(npy(array))
    header = read_header(file)
    assert (header.type, header.shape) == (kind, shape)
    assert len(file.read()) == array.nbytes
    assert header.fortran == (array.flags.f_contiguous and not array.flags.c_contiguous)
