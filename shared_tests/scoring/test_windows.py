"""Windows score every target exactly once, with the promised context. Budget: 10 s."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.scoring.windows import Windows, cut, document_ranges, document_windows, sliding

SETTINGS = settings(max_examples=300, deadline=None)
TOKENS = st.integers(1, 300)
SEQ = st.integers(1, 70)


@st.composite
def seq_and_stride(draw: st.DrawFn) -> tuple[int, int]:
    seq = draw(SEQ)
    return seq, draw(st.integers(1, seq))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, np.ndarray]:
    """A stream length and its BOS positions; the first document may be preceded by a headless piece."""
    tokens = draw(TOKENS)
    starts = draw(st.lists(st.integers(0, tokens - 1), unique=True, max_size=20))
    return tokens, np.array(sorted(starts), np.int64)


def targets_of(windows: Windows) -> list[np.ndarray]:
    """The target positions that each window scores, by the definition in the module's docstring."""
    return [
        np.arange(start + first, start + length) + 1
        for start, length, first in zip(windows.start, windows.length, windows.first, strict=True)
    ]


def check_cover(windows: Windows, tokens: int, seq: int) -> None:
    for column in windows:
        assert column.dtype == np.int64
    count = np.zeros(tokens, int)
    for positions in targets_of(windows):
        assert len(positions), "a window that scores nothing costs a forward pass for nothing"
        count[positions] += 1
    assert count[0] == 0 and (count[1:] == 1).all()
    assert (windows.start >= 0).all() and (windows.start + windows.length <= tokens - 1).all()
    assert (windows.length <= seq).all() and (windows.first < windows.length).all()
    assert (np.diff(windows.start + windows.length) > 0).all(), "single left-to-right pass"


@SETTINGS
@given(TOKENS, SEQ)
def test_plain(tokens: int, seq: int) -> None:
    windows = sliding(tokens, seq, seq)
    check_cover(windows, tokens, seq)
    assert len(windows.start) == -(-(tokens - 1) // seq)
    assert not windows.first.any()


@SETTINGS
@given(TOKENS, seq_and_stride())
def test_sliding(tokens: int, shape: tuple[int, int]) -> None:
    seq, stride = shape
    windows = sliding(tokens, seq, stride)
    check_cover(windows, tokens, seq)
    for i, positions in enumerate(targets_of(windows)):
        visible = positions - windows.start[i]
        if i == 0:
            np.testing.assert_array_equal(visible, positions)
        else:
            assert (visible >= seq - stride + 1).all()
            assert len(positions) == stride or i == len(windows.start) - 1


@SETTINGS
@given(layouts(), seq_and_stride())
def test_documents(layout: tuple[int, np.ndarray], shape: tuple[int, int]) -> None:
    tokens, starts = layout
    seq, stride = shape
    windows = document_windows(tokens, starts, seq, stride)
    check_cover(windows, tokens, seq)
    for start, length, positions in zip(windows.start, windows.length, targets_of(windows), strict=True):
        inputs = np.arange(start, start + length)
        assert not np.isin(inputs[1:], starts).any(), "a window reaches past the start of its document"
        document = max([0, *starts[starts <= start]])
        promised = np.minimum(positions - document, seq - stride + 1)
        assert (positions - start >= promised).all()


@SETTINGS
@given(layouts(), seq_and_stride(), st.randoms(use_true_random=False))
def test_drawn_documents_are_their_part_of_all(layout, shape, random) -> None:
    tokens, starts = layout
    begins, ends = document_ranges(tokens, starts)
    drawn = np.array(sorted(random.sample(range(len(starts)), random.randint(0, len(starts)))), np.int64)
    some = cut(begins[drawn], ends[drawn], *shape)
    expected = [np.arange(b + 1, e + 1) for b, e in zip(begins[drawn], ends[drawn], strict=True)]
    np.testing.assert_array_equal(
        np.concatenate([np.empty(0, int), *targets_of(some)]), np.concatenate([np.empty(0, int), *expected])
    )


def test_worked_example() -> None:
    windows = sliding(12, 6, 2)
    assert windows.start.tolist() == [0, 2, 4, 6]
    assert windows.length.tolist() == [6, 6, 6, 5]
    assert windows.first.tolist() == [0, 4, 4, 4]
    assert [p.tolist() for p in targets_of(windows)] == [[1, 2, 3, 4, 5, 6], [7, 8], [9, 10], [11]]
    windows = document_windows(8, np.array([0, 3, 7]), 4, 4)
    assert windows.start.tolist() == [0, 3]
    assert [p.tolist() for p in targets_of(windows)] == [[1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("tokens", [1, 2])
def test_tiny_streams(tokens: int) -> None:
    assert len(sliding(tokens, 8, 8).start) == tokens - 1
    assert len(document_windows(tokens, np.array([0]), 8, 2).start) == tokens - 1
