"""Payloads of an artifact that no writer makes (words, states, tables, classes, values) are refused. Budget: 10 s."""

import contextlib
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from core.config import ModelConfig, changed
from core.export import codecs
from core.export.artifact import ArtifactError, read_artifact
from core.export.coder import LOW, SymbolRun, table_of
from core.model.params import param_table
from core.model.storage import Stored
from shared_tests.support.artifacts import (
    MODEL,
    MODELS,
    SMALL,
    Piece,
    Refused,
    assembled,
    parts,
    pieces,
    refusing,
    repaired,
    some_stored,
    write,
)


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    return refusing(tmp_path / "bad.skc")


def made(tmp_path: Path, name: str = "ternary") -> bytes:
    """The payload of an artifact of one of the models."""
    write(tmp_path / "made.skc", MODELS[name])
    return parts((tmp_path / "made.skc").read_bytes())[1]


def test_the_pieces_make_the_artifact(tmp_path: Path) -> None:
    for name, model in MODELS.items():
        assert parts(assembled(model, pieces(model)))[1] == made(tmp_path, name), "what is below is about other files"


def test_words_and_states(tmp_path: Path, refused: Refused) -> None:
    payload = made(tmp_path)
    made_whole = (tmp_path / "made.skc").read_bytes()
    states = 4 + int.from_bytes(payload[:4], "little")
    words = states + 4
    for bad in (payload[:-2], payload[:words], payload[:-1], payload + b"\0\0", payload + b"\0", payload[: states + 2]):
        refused(repaired(MODEL, bad), "")
    for at in range(words, len(payload), 31):
        flipped = bytearray(payload)
        flipped[at] ^= 1 << at % 8
        refused(made_whole.replace(payload, bytes(flipped)), "payload_sha256")
        (tmp_path / "other.skc").write_bytes(repaired(MODEL, bytes(flipped)))
        with contextlib.suppress(ArtifactError):  # with its checksum put right it may be another model's
            other = read_artifact(tmp_path / "other.skc")
            write(tmp_path / "again.skc", MODEL, other.stored)
            assert (tmp_path / "again.skc").read_bytes() == (tmp_path / "other.skc").read_bytes()
    for state in (0, 1, LOW - 1):
        refused(repaired(MODEL, payload[:states] + state.to_bytes(4, "little") + payload[words:]), "payload: a state")
    refused(repaired(MODEL, payload[:-2]), "payload: its words end")


def test_the_length_of_the_tables(tmp_path: Path, refused: Refused) -> None:
    payload = made(tmp_path)
    length, rest = int.from_bytes(payload[:4], "little"), payload[4:]
    for bad in (0, 1, length - 1, length + 2, len(rest) + 1, 2**32 - 1):
        refused(repaired(MODEL, bad.to_bytes(4, "little") + rest), "")
    more = (length + 2).to_bytes(4, "little") + rest[:length] + b"\0\0" + rest[length:]
    refused(repaired(MODEL, more), "payload: tables are left over")
    for bad in (b"", b"\0", b"\0\0\0\0", payload[:4]):
        refused(repaired(MODEL, bad), "payload")


def coded(piece: Piece, plan: bytes, *tables: bytes) -> Piece:
    """A piece with another plan, and its runs coded by other tables."""
    runs = [SymbolRun(run.symbols, table_of(table)) for run, table in zip(piece.runs, tables, strict=True)]
    return Piece(piece.name, plan, runs)


def test_tables_that_no_writer_makes(refused: Refused) -> None:
    """Each is a file from which the very same tensors could be decoded."""
    model, name = MODELS["nibbles"], "blocks.0.mlp.up.weight"
    stored = some_stored(model)
    codes = np.clip(np.rint(np.random.default_rng(0).standard_normal((130, 8)) * 2), -7, 7).astype(np.int8)
    codes[0, :2] = -7, 7
    stored[name] = Stored(codes, stored[name].scales)
    whole = pieces(model, stored)
    place = next(i for i, p in enumerate(whole) if p.name == name)  # its codes; its scales are the next piece
    piece = whole[place]
    axis, table = piece.plan[:1], piece.plan[1:]
    assert axis == b"\0" and table[:3] == bytes([1, 0, 14]) and len(table) == 18

    def with_piece(bad: Piece) -> bytes:
        return assembled(model, [*whole[:place], bad, *whole[place + 1 :]])

    nudged = table[:9] + bytes([table[9] - 1]) + table[10:]
    for other in (bytes([0, 0, 14]), nudged, table[:3] + bytes([9] * 15)):
        refused(with_piece(coded(piece, axis + other, other)), f"{name}: other tables")
    columns = np.ascontiguousarray(piece.runs[0].symbols.reshape(-1, 8).T).ravel()
    one, empty = bytes([0, 0, 0]), bytes([0, 3, 3])
    for along, lines, symbols in ((1, 130, piece.runs[0].symbols), (2, 8, columns)):
        classes, codes = SymbolRun(np.zeros(lines, np.uint8), table_of(one)), SymbolRun(symbols, table_of(table))
        for plan in (bytes([along, 1]) + one + table, bytes([along, 2]) + one + table + empty):
            refused(with_piece(Piece(name, plan, [classes, codes])), f"{name}: other tables or classes")
    for plan in (bytes([3]) + table, bytes([1, 17]) + table, bytes([1, 0]) + table, axis + bytes([2]) + table[1:]):
        refused(with_piece(coded(piece, plan, table)), name)
    for bad in (bytes([0, 1, 0]), bytes([0, 0, 15]), bytes([1, 0, 2, 0, 0, 0]), bytes([0, 255, 255])):
        refused(with_piece(coded(piece, axis + bad, table)), name)


def two_sizes(name: str) -> tuple[ModelConfig, dict[str, Stored], int]:
    """Tensors of a model, one of them of lines of two sizes that hold the same values; and where its piece is."""
    noise = np.random.default_rng(2)
    if name == "scales":
        model = changed(SMALL, {"vocab": 1000, "embedding.dim": 384, "embedding.storage": "ternary/64", "layers": 1})
        stored, few = some_stored(model), np.arange(1000) % 2 == 0
        large = noise.permuted(np.tile([True] + 5 * [False], (1000, 1)), axis=1) == few[:, None]
        stored["embed.weight"] = Stored(stored["embed.weight"].codes, np.where(large, 8, 0.125).astype(np.float16))
        return model, stored, 1
    model = changed(SMALL, {"matrix_storage": "int4/row", "mlp.hidden": 600, "layers": 1})
    stored, own = some_stored(model), f"blocks.0.mlp.{'up' if name == 'rows' else 'down'}.weight"
    many = np.arange(600)[:, None] % 2 == 0
    codes = noise.choice([-1, 1], (600, 8)) * (noise.permuted(np.tile(np.arange(8) < 1, (600, 1)), axis=1) != many)
    stored[own] = Stored((codes if name == "rows" else codes.T).astype(np.int8), stored[own].scales)
    return model, stored, [piece.name for piece in pieces(model, stored)].index(own)


@pytest.mark.parametrize("name", ["rows", "columns", "scales"])
def test_a_line_in_another_class_than_the_writers(refused: Refused, name: str, tmp_path: Path) -> None:
    """The same tables code the very same tensors: only what class two lines are in is exchanged."""
    model, stored, place = two_sizes(name)
    whole = pieces(model, stored)
    classes, *parts = whole[place].runs
    axis = whole[place].plan[3 if name == "scales" else 0]
    assert axis == (2 if name == "columns" else 1), "there are classes"
    other, width = classes.symbols.copy(), parts[0].symbols.size // int((classes.symbols == 0).sum())
    lines = np.empty((other.size, width), np.uint8)
    for number, part in enumerate(parts[: other.max() + 1]):
        lines[other == number] = part.symbols.reshape(-1, width)
    first, last = np.flatnonzero(other == 0)[0], np.flatnonzero(other == other.max())[0]
    other[first], other[last] = other[last], other[first]
    own = [SymbolRun(lines[other == k].ravel(), part.table) for k, part in enumerate(parts[: other.max() + 1])]
    runs = [SymbolRun(other, classes.table), *own, *parts[len(own) :]]
    bad = Piece(whole[place].name, whole[place].plan, runs)
    (tmp_path / "good.skc").write_bytes(assembled(model, whole))
    read_artifact(tmp_path / "good.skc")
    refused(assembled(model, [*whole[:place], bad, *whole[place + 1 :]]), bad.name)


def test_halves_that_no_writer_makes(refused: Refused) -> None:
    whole = pieces(MODEL)
    (place,) = [i for i, p in enumerate(whole) if p.name == "embed.weight" and p.runs[0].symbols.size == 11]
    piece = whole[place]
    for plan in (
        bytes([9, *piece.plan[1:]]),
        bytes([255, *piece.plan[1:]]),
        piece.plan[:1] + b"\xff\xff" + piece.plan[3:],  # so that numbers wrap around
        piece.plan[:2] + bytes([piece.plan[2] ^ 1]) + piece.plan[3:],
    ):
        bad = Piece(piece.name, plan, piece.runs)
        refused(assembled(MODEL, [*whole[:place], bad, *whole[place + 1 :]]), "embed.weight: scales")


BAD_HALVES = {
    "blocks.0.mlp_scale": [np.nan, np.inf, -np.inf],
    "blocks.0.mlp.up.weight": [np.nan, np.inf, -np.inf, 0.0, -0.0, -1.0, 2.0**-14 - 2.0**-24, 2.0**-24],
}


@pytest.mark.parametrize("name", BAD_HALVES)
def test_numbers_that_no_writer_makes(refused: Refused, name: str, tmp_path: Path) -> None:
    """They are coded as the writer would code them."""
    for value in (*BAD_HALVES[name], 2.0**-14):
        stored = some_stored(MODEL)
        codes, scales = stored[name]
        (codes if scales is None else scales).flat[3] = value
        data = assembled(MODEL, pieces(MODEL, stored))
        if value == 2.0**-14:  # the smallest scale that there is
            (tmp_path / "a.skc").write_bytes(data)
            assert read_artifact(tmp_path / "a.skc").size == len(data)
        else:
            refused(data, name)


def test_a_place_beyond_the_grid_of_ratios(refused: Refused) -> None:
    """992 would be infinite; 1024 and 2048 would be other numbers' places in 16 bits."""
    model = MODELS["ratios"]
    whole = pieces(model)
    names = [piece.name for piece in whole]
    place = names.index("blocks.0.mlp.up.weight") + 1
    count = sum(run.symbols.size for run in whole[place].runs[:1])
    for value in (992, 1023, 1024 + 480, 2048 + 480, 65_535, 0, 31):
        plan = codecs.halves_plan(np.full((count, 1), value, np.uint16))
        bad = Piece(names[place], plan.data, [SymbolRun(np.zeros(count, np.uint8), plan.tables[0])])
        refused(assembled(model, [*whole[:place], bad, *whole[place + 1 :]]), f"{names[place]}: its scales")


def test_codes_of_fp8_that_are_no_numbers(refused: Refused) -> None:
    model = MODELS["nibbles"]
    whole = pieces(model)
    (place,) = [i for i, p in enumerate(whole) if p.name == "embed.weight" and p.runs[0].symbols.size == 55]
    for symbol in (0, 255):
        symbols = whole[place].runs[0].symbols.copy()
        symbols[7] = symbol
        plan = codecs.matrix_plan(symbols.reshape(11, 5), 255)
        bad = Piece("embed.weight", plan.data, [SymbolRun(symbols, plan.tables[0])])
        refused(assembled(model, [*whole[:place], bad, *whole[place + 1 :]]), "embed.weight: has a code that is no")


def large(values: int) -> tuple[bytes, float]:
    """An artifact of a few thousand bytes that holds a matrix of `values` codes, all of them 0, and others alike."""
    model = changed(SMALL, {"matrix_storage": "int8/row", "mlp.hidden": values // 8, "layers": 1, "skips.on": False})
    stored = {
        name: Stored(
            np.ones(row.shape, np.float16) if row.storage == "float16" else np.zeros(row.shape, np.int8),
            None if row.storage == "float16" else np.ones((row.shape[0], 1), np.float16),
        )
        for name, row in param_table(changed(model, {"mlp.hidden": 8})).items()
    }
    whole = pieces(changed(model, {"mlp.hidden": 8}), stored)
    return assembled(model, whole), sum(row.size for row in param_table(model).values())


def test_a_few_bytes_may_hold_a_large_model(tmp_path: Path) -> None:
    """Codes that are all alike take no bytes: their number must not cost more than a pass over them."""
    data, values = large(1 << 23)
    (tmp_path / "a.skc").write_bytes(data)
    assert len(data) < 6000
    tracemalloc.start()
    started = time.process_time()
    artifact = read_artifact(tmp_path / "a.skc")
    seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(stored.codes.size for stored in artifact.stored.values()) == values > 1 << 24
    assert seconds < 2 and peak < 3 * values
