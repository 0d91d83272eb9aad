"""Exact state: token by token, in chunks and with carry, as one pass over the whole text. Budget: 60 s."""

import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest

from core import rng
from core.check.tolerances import CAUSAL, P2_FLOAT32
from core.config import RunConfig
from core.engine.protocol import Engine, step
from core.model import trunk
from core.model.shares import decoding_state, decoding_tape
from shared_tests.support.harness import (
    BACKENDS,
    EVERYTHING,
    HYBRID,
    OPPOSITE,
    mini,
    minis,
    reader,
    to_numpy,
    tokens,
)

pytestmark = pytest.mark.pair
SEQ = 50
NAMES = ("tiny", "skc_ablate", "delta_ablate", HYBRID, "skc_mac", EVERYTHING, "packed", OPPOSITE)
"""Attention alone, recurrent layers alone, both, recurrent layers with memories, every option, also with documents that
do not end, and few options."""


def config_of(name: str) -> RunConfig:
    config = mini(EVERYTHING if name == "packed" else name)
    if name != "packed":
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, documents="packed"))


def made(name: str, backend: str, **options: Any) -> tuple[Engine, np.ndarray]:
    """Return an engine with working weights, and rows with documents at block edges, in mid-block and side by side."""
    config = config_of(name)
    rows = tokens("incremental", 3, SEQ, config.model.vocab, config.model.bos)
    rows[1, [7, 8, 9, 15, 16, 31]] = config.model.bos
    rows[2] = np.where(rows[2] == config.model.bos, 5, rows[2])  # one document, longer than any window
    return reader(backend, config, 1.0, **{"dtype": "float64", **options}), rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_token_by_token_equals_the_whole(name: str, backend: str) -> None:
    model, rows = made(name, backend)
    whole, state = model.logits(rows), model.start(len(rows))
    for t in range(SEQ):
        said, state = step(model, state, rows[:, t])
        assert np.abs(said - whole[:, t]).max() <= CAUSAL, t


def ragged(model: Engine, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the logits of chunks, of which each row keeps another number of tokens, those numbers, and the whole's."""
    whole, state, turn, at = model.logits(rows), model.start(len(rows)), 0, np.zeros(len(rows), int)
    while at.min() < SEQ:
        size, *drawn = rng.integers16(0, f"chunks/{turn}", 1 + len(rows)).astype(int)
        turn, size = turn + 1, 1 + size % 20
        n = np.minimum(np.array(drawn) % (size + 1), SEQ - at)
        chunk, wanted = tokens(f"draft/{turn}", len(rows), size, 97, 1), np.zeros((len(rows), size, whole.shape[2]))
        for row, (begin, count) in enumerate(zip(at, n, strict=True)):
            chunk[row, :count] = rows[row, begin : begin + count]
            wanted[row, :count] = whole[row, begin : begin + count]
        tape = model.chunk(state, chunk)
        yield tape.logits(), n, wanted
        state, at = model.commit(tape, n), at + n


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*minis(), "packed"])
def test_each_row_keeps_its_own_number_of_a_chunks_tokens(name: str, backend: str) -> None:
    """Chunks of 1 to 20 tokens, of which each row keeps 0 to all; what is dropped was another text."""
    counts = set()
    for logits, n, wanted in ragged(*made(name, backend)):
        for row, count in enumerate(n):
            assert np.abs(logits[row, :count] - wanted[row, :count]).max(initial=0.0) <= CAUSAL, (n, row)
        counts.add(tuple(n))
    assert len(counts) > 9 and any(min(n) == 0 < max(n) for n in counts), "rows must part"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_windows_with_carry_equal_one_long_window(name: str, backend: str) -> None:
    for width in (16, 13):  # blocks of 8: in phase, and not
        model, rows = made(name, backend)
        whole, state = model.nll(rows[:, :-1], rows[:, 1:]), model.start(len(rows))
        for begin in range(0, SEQ - 1, width):
            end = min(begin + width, SEQ - 1)
            tape = model.chunk(state, rows[:, begin:end])
            assert np.abs(tape.nll(rows[:, begin + 1 : end + 1]) - whole[:, begin:end]).max() <= CAUSAL
            state = model.commit(tape, end - begin)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_float32_and_with_fast_ops(backend: str) -> None:
    model, rows = made(EVERYTHING, backend, dtype="float32")
    size = np.sqrt(np.mean(model.logits(rows) ** 2))
    for logits, n, wanted in ragged(model, rows):
        gaps = np.concatenate([logits[row, :count] - wanted[row, :count] for row, count in enumerate(n)])
        assert np.sqrt(np.mean(gaps**2)) <= P2_FLOAT32 * size


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_chunk_changes_no_state(name: str, backend: str) -> None:
    model, rows = made(name, backend)
    state = model.commit(model.chunk(model.start(3), rows[:, :13]), 13)
    before = flat(state)
    first = model.chunk(state, rows[:, 13:30])
    model.commit(first, 5)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(before, flat(state), strict=True))
    assert model.chunk(state, rows[:, 13:30]).logits().tobytes() == first.logits().tobytes()
    assert model.commit(first, 0) is state
    for n in (-1, 18, np.array([1, 2]), np.array([1, 18, 0])):
        with pytest.raises(ValueError, match="of a chunk of 17 in 3 rows; expected 0 to 17"):
            model.commit(first, n)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_is_forgotten_begins_anew(name: str, backend: str) -> None:
    model, rows = made(name, backend)
    state = model.commit(model.chunk(model.start(3), rows[:, :13]), np.array([13, 4, 7]))
    after, anew = model.chunk(state, rows[:, 13:30]).logits(), model.logits(rows[1:2, 13:30])
    forgotten = model.forget(state, np.array([False, True, False]))
    found = model.chunk(forgotten, rows[:, 13:30]).logits()
    assert np.abs(found[1] - anew[0]).max() <= CAUSAL and found[[0, 2]].tobytes() == after[[0, 2]].tobytes()
    assert forgotten.position.tolist() == [13, 0, 7] and forgotten.seen[1] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_part_of_the_state_matters(name: str, backend: str) -> None:
    """A state that a layer carries but never reads would look exact and be worth nothing."""
    model, rows = made(name, backend)
    state = model.commit(model.chunk(model.start(3), rows[:, :13]), 13)
    after = model.chunk(state, rows[:, 13:40]).logits()
    count = 0
    for changed in nudged(state.model):
        other = model.chunk(dataclasses.replace(state, model=changed), rows[:, 13:40]).logits()
        assert np.abs(other - after).max() > 1e-9
        count += 1
    assert count >= len(trunk.layers(config_of(name).model, True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_state_is_as_large_as_declared(name: str, backend: str) -> None:
    model, rows = made(name, backend)
    size = decoding_state(config_of(name).model)
    state = model.start(1)
    for t in range(20):
        _, state = step(model, state, rows[2:, t])
        floats = sum(a.size for a in flat(state) if a.dtype.kind == "f")
        assert floats == size.fixed + (t + 1) * size.per_token


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_tape_is_as_large_as_declared(name: str, backend: str) -> None:
    model, rows = made(name, backend)
    sizes = [
        sum(array.size for tape in chunk.model[2] for array in flat(tape) if array.dtype.kind == "f")
        for chunk in (cast(Any, model.chunk(model.start(1), rows[:1, :seq])) for seq in (16, 40))
    ]
    assert sizes[1] - sizes[0] == 24 * decoding_tape(config_of(name).model)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_of_ended_documents_are_dropped(backend: str) -> None:
    model, rows = made(HYBRID, backend)
    state, whole = model.start(1), model.logits(rows[1:2])
    for t in range(12):  # row 1 has documents at 7, 8 and 9
        said, state = step(model, state, rows[1:2, t])
        assert np.abs(said - whole[:, t]).max() <= CAUSAL, t
    assert state.model.kept.shape == (1, 3) and state.seen.tolist() == [3]


def flat(state: Any) -> list[np.ndarray]:
    """Return every array of a state as numpy."""
    value = getattr(state, "model", state)
    if isinstance(value, tuple):
        return [array for part in value for array in flat(part)]
    return [] if value is None or isinstance(value, int) else [to_numpy(value)]


def nudged(state: Any) -> list[Any]:
    """Return copies of a model's state in which one of its arrays is moved a little, or its last token another one."""
    out = []
    for i, part in enumerate(state.parts):
        out += [state._replace(parts=(*state.parts[:i], changed, *state.parts[i + 1 :])) for changed in _nudge(part)]
    if state.ids.shape[1]:
        out.append(state._replace(ids=abs(state.ids - 1)))
    return out


def _nudge(part: Any) -> list[Any]:
    """Return copies of a part's state in which one of its arrays is moved a little."""
    if not isinstance(part, tuple):
        return [] if part is None else [part + 0.1]
    fields: Any = part
    return [
        fields._replace(**{name: changed})
        for name, value in zip(fields._fields, part, strict=True)
        for changed in _nudge(value)
    ]
