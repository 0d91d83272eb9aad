"""Shards, streams, documents, batches and prefetch: nothing lost, nothing doubled, damage named. Budget: 10 s."""

import functools
import struct
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import core.data.dataset
import core.data.prepare
from core.data.batch import Batch
from core.data.batches import Prefetch, batch, batch_from
from core.data.bundled import BUNDLED
from core.data.dataset import DataError, Split, open_shard, write_shard
from core.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(str(BUNDLED / "tokenizer.model"))
BOS = TOKENIZER.bos


def numbered(count: int) -> Split:
    """Return a stream whose tokens tell their own position (count below the vocabulary)."""
    return Split([np.arange(count, dtype=np.uint16)], TOKENIZER)


def shard_file(folder: Path, header: list[int], payload: bytes) -> str:
    """Write bytes that may or may not be a shard."""
    path = folder / "x.bin"
    path.write_bytes(struct.pack(f"<{len(header)}i", *header).ljust(1024, b"\0") + payload)
    return str(path)


def test_shard_bytes_are_the_official_format(tmp_path: Path) -> None:
    path = str(tmp_path / "train_000000.bin")
    write_shard(path, np.array([1, 2, 65_535]))
    content = Path(path).read_bytes()
    assert content == struct.pack("<256i", 20240520, 1, 3, *[0] * 253) + b"\x01\0\x02\0\xff\xff"
    assert np.asarray(open_shard(path)).tolist() == [1, 2, 65_535]
    assert [p.name for p in tmp_path.iterdir()] == ["train_000000.bin"]


def test_rest_of_the_header_is_ignored(tmp_path: Path) -> None:
    shard = open_shard(shard_file(tmp_path, [20240520, 1, 2, 7, -1], b"\x05\0\x06\0"))
    assert np.asarray(shard).tolist() == [5, 6]


@pytest.mark.parametrize(
    ("header", "payload", "field"),
    [
        ([20240521, 1, 2], b"1234", "magic"),
        ([0x57A73501, 1, 2], b"1234", "magic"),  # big-endian
        ([20240520, 2, 2], b"1234", "version"),
        ([20240520, 1, 0], b"", "count"),
        ([20240520, 1, -2], b"1234", "count"),
        ([20240520, 1, 3], b"1234", "size"),
        ([20240520, 1, 2], b"12345", "size"),
        ([20240520, 1, 2**31 - 1], b"1234", "size"),
    ],
)
def test_malformed_shard(tmp_path: Path, header: list[int], payload: bytes, field: str) -> None:
    with pytest.raises(DataError, match=rf"x\.bin: {field}: ") as caught:
        open_shard(shard_file(tmp_path, header, payload))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 12, 1023])
def test_shard_cut_inside_the_header(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(struct.pack("<3i", 20240520, 1, 2).ljust(1024, b"\0")[:size])
    with pytest.raises(DataError, match=r"x\.bin: header: "):
        open_shard(str(path))


@pytest.mark.parametrize("tokens", [[], [-1], [65_536]])
def test_shard_writer_refuses_what_the_format_cannot_hold(tmp_path: Path, tokens: list[int]) -> None:
    with pytest.raises(DataError, match="from 0 to 65535"):
        write_shard(str(tmp_path / "x.bin"), np.array(tokens))
    assert not list(tmp_path.iterdir())


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 200), max_size=6), data=st.data())
def test_many_shards_are_one_stream(cuts: list[int], data: st.DataObject) -> None:
    whole = np.arange(200, dtype=np.uint16)
    split = Split(np.split(whole, sorted(cuts)), TOKENIZER)
    assert len(split) == 200
    start = data.draw(st.integers(0, 200))
    stop = data.draw(st.integers(start, 200))
    np.testing.assert_array_equal(split.read(start, stop), whole[start:stop])
    length = data.draw(st.integers(0, 200))
    starts = np.array(data.draw(st.lists(st.integers(0, 200 - length), max_size=5)), np.int64)
    gathered = split.gather(starts, length)
    assert gathered.dtype == np.int32 and gathered.shape == (len(starts), length)
    np.testing.assert_array_equal(gathered, starts[:, None] + np.arange(length))


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (8, 11), (11, 12)])
def test_reading_outside_the_stream(start: int, stop: int) -> None:
    with pytest.raises(DataError, match="outside the stream of 10"):
        numbered(10).read(start, stop)
    with pytest.raises(DataError, match="outside the stream of 10"):
        numbered(10).gather(np.array([0, start]), stop - start)


def test_ids_outside_the_vocabulary_are_refused_when_read() -> None:
    split = Split([np.array([1, 5, 1023, 1024], np.uint16)], TOKENIZER, "here/train")
    assert split.read(0, 3).tolist() == [1, 5, 1023]
    with pytest.raises(DataError, match="here/train: token id 1024 is outside the vocabulary of 1024"):
        split.read(2, 4)
    with pytest.raises(DataError, match="token id 1024"):
        batch(split, 0, 1, 3, 0)


def test_document_starts_are_the_positions_of_bos(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.array([BOS, 5, 6, BOS, BOS, 7, 8, 9, BOS], np.uint16)
    for scan in (1, 2, 1000):
        monkeypatch.setattr(core.data.dataset, "SCAN", scan)
        starts = Split([tokens[:4], tokens[4:]], TOKENIZER).document_starts
        assert starts.tolist() == [0, 3, 4, 8] and starts.dtype == np.int64


@pytest.mark.parametrize("tokens", [[5, BOS, 6], [5, 6, 7]])
def test_documents_of_a_stream_without_bos_in_front(tokens: list[int]) -> None:
    split = Split([np.array(tokens, np.uint16)], TOKENIZER)
    assert split.read(0, 3).tolist() == tokens
    with pytest.raises(DataError, match="does not start with BOS"):
        _ = split.document_starts


def test_document_bytes_must_fit_the_documents() -> None:
    split = Split([np.array([BOS, 5, BOS, 6], np.uint16)], TOKENIZER, document_bytes=np.array([3]))
    with pytest.raises(DataError, match="document_bytes: 1 documents, but the shards hold 2"):
        _ = split.document_starts


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(2, 400),
    seq=st.integers(1, 40),
    rows=st.integers(1, 9),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
)
def test_every_window_of_an_epoch_comes_once(length: int, seq: int, rows: int, seed: int, epoch: int) -> None:
    split = numbered(length)
    windows = (length - 1) // seq
    if windows == 0:
        with pytest.raises(DataError, match=rf"{length} tokens, shorter than one row of seq \+ 1 = {seq + 1}"):
            batch(split, 0, rows, seq, seed)
        return
    first, last = epoch * windows, (epoch + 1) * windows
    seen: Counter[int] = Counter()
    for step in range(first // rows, -(-last // rows)):
        made = batch(split, step, rows, seq, seed)
        assert made.tokens.shape == made.targets.shape == (rows, seq)
        np.testing.assert_array_equal(made.targets, made.tokens + 1)
        np.testing.assert_array_equal(made.tokens, made.tokens[:, :1] + np.arange(seq))
        inside = [r for r in range(rows) if first <= step * rows + r < last]
        seen.update(made.tokens[inside, 0].tolist())
    assert seen == Counter({window * seq: 1 for window in range(windows)})


def test_batch_is_pure_and_follows_seed_epoch_and_shape() -> None:
    split = numbered(1000)
    reference = [batch(split, step, 4, 10, 7) for step in range(60)]
    for step in (59, 3, 3, 0, 31):
        np.testing.assert_array_equal(batch(split, step, 4, 10, 7).tokens, reference[step].tokens)
    assert reference[0].tokens.dtype == np.int32 and reference[0].tokens.flags.c_contiguous
    order = np.concatenate([made.tokens[:, 0] for made in reference])
    assert (order[:99] != order[99:198]).any(), "epochs have the same order"
    assert (order[:99] != np.arange(99) * 10).any(), "not shuffled"
    other_seed = np.concatenate([batch(split, step, 4, 10, 8).tokens[:, 0] for step in range(25)])
    assert (order[:99] != other_seed[:99]).any()
    # Rows are numbered through: other rows per step, same windows in the same order.
    regrouped = np.concatenate([batch(split, step, 6, 10, 7).tokens[:, 0] for step in range(40)])
    np.testing.assert_array_equal(regrouped, order)
    # A change of seq in the middle of a run is just another argument.
    assert batch(split, 31, 4, 25, 7).tokens.shape == (4, 25)


def test_batch_of_a_golden_stream() -> None:
    """P0: this order is part of what a resumed run relies on."""
    made = batch(numbered(1000), 5, 4, 10, 1337)
    assert made.tokens[:, 0].tolist() == [80, 480, 880, 290]


def test_prefetch_gives_the_same_batches_and_stays_ahead_by_depth() -> None:
    split = numbered(1000)
    made: list[int] = []

    def make(tokens: int, rows: int, seq: int) -> Batch:
        made.append(tokens // 20)
        return batch(split, tokens // 20, rows, seq, 3)

    prefetch = Prefetch(make, 100, 2, 10, depth=3)
    try:
        for step in range(5, 12):
            np.testing.assert_array_equal(prefetch.get(20 * step, 2, 10).tokens, batch(split, step, 2, 10, 3).tokens)
            assert max(made) <= step + 3
        with pytest.raises(ValueError, match="token 100 was asked of a prefetcher whose next token is 240"):
            prefetch.get(100, 2, 10)
    finally:
        prefetch.close()
    # what is dropped at the end goes one by one, while the thread may still take the one behind it
    assert made[:7] == list(range(5, 12)) and made == sorted(set(made)) and made[-1] <= 14
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def behind(split: Split, tokens: int, rows: int, seq: int) -> Batch:
    """Return the rows behind `tokens` tokens."""
    return batch_from(split, tokens // seq, rows, seq, 3)


def test_prefetch_obeys_a_change_of_row_length_at_once() -> None:
    """What was made ahead in the old length, or of the old number of rows, is dropped, not trained on."""
    split, tokens = numbered(1000), 0
    prefetch = Prefetch(functools.partial(behind, split), 0, 8, 10)
    try:
        for rows, seq in [(8, 10), (8, 10), (4, 20), (4, 20), (4, 20), (2, 40), (4, 40), (8, 20), (1, 20), (8, 20)]:
            ours = prefetch.get(tokens, rows, seq)
            np.testing.assert_array_equal(ours.tokens, behind(split, tokens, rows, seq).tokens)
            tokens += rows * seq
    finally:
        prefetch.close()


def test_prefetch_raises_what_the_thread_raised() -> None:
    split = numbered(30)

    def make(tokens: int, rows: int, seq: int) -> Batch:
        return behind(split, tokens, rows, 100 if tokens == 20 else seq)

    prefetch = Prefetch(make, 0, 1, 10)
    try:
        prefetch.get(0, 1, 10)
        prefetch.get(10, 1, 10)
        for _ in range(2):
            with pytest.raises(DataError, match="shorter than one row"):
                prefetch.get(20, 1, 10)
    finally:
        prefetch.close()
