"""How tensors become the payload of an artifact, and back: docs/artifact.md, "Payload".

Packing is lossless and canonical: what is coded follows from the tensors alone, and the reader refuses anything else.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from core.export.coder import (
    FRACTION,
    TABLE_HEAD,
    TOTAL,
    CodecError,
    Decoder,
    SymbolRun,
    SymbolTable,
    encode,
    fitted,
    lanes,
    table_of,
)
from core.export.symbols import codes_of, halves_of, scales_of_halves, symbols_of, top_of
from core.model.params import Param
from core.model.storage import (
    LARGEST,
    SCALE_FLOOR,
    Stored,
    scales_shape,
    storage_class,
)

ONE, ROWS, COLUMNS = range(3)
"""What a matrix has classes of: nothing, its rows, or its columns; each class has a table of its own."""
MOST_CLASSES = 16
CLASSED = 2048
"""Values from which on classes are tried: the tables of a smaller matrix cost more than they save."""
TOGETHER = 1 << 14
"""Values up to which float16 tensors of one role, in all layers, have their tables together."""
MOST_SHIFT = 8
CHUNK = 1 << 17
"""Codes that are counted at a time, so that counting takes little memory."""
Table = dict[str, Param]


class CodingPlan(NamedTuple):
    """How one part of a tensor is coded."""

    data: bytes
    """As the artifact keeps it."""
    bits: int
    """What the part takes, plan and symbols, in 2^-FRACTION bits."""
    tables: list[SymbolTable]
    """In the order of the runs."""
    axis: int
    classes: np.ndarray | None
    """(lines,) uint8: the class of every row or column; None: one table."""


class TensorSize(NamedTuple):
    """What a tensor takes of an artifact."""

    bits: float
    """Of codes, scales and tables, beside the lanes' states."""
    entropy: float | None
    """Bits a code, by how often each of its codes is there; None for float16."""


def values_in(table: Table) -> int:
    """Return how many codes and scales a model of `table` has."""
    return sum(row.size + math.prod(scales_shape(row.storage, row.shape) or (0,)) for row in table.values())


def pack(stored: dict[str, Stored], table: Table) -> bytes:
    """Return the payload of a model's tensors; CodecError names a tensor that its storage class cannot hold."""
    for name, row in table.items():
        check_tensor(name, row, stored[name])
    return pack_unchecked(stored, table)


def pack_unchecked(stored: dict[str, Stored], table: Table) -> bytes:
    """Do what `pack` does with tensors that are known to fit."""
    plans, runs = b"", []
    for names in together(table):
        for plan, part in planned(names, stored, table):
            plans += plan.data
            runs += part
    return len(plans).to_bytes(4, "little") + plans + encode(runs, lanes(values_in(table)))


def tensor_sizes(stored: dict[str, Stored], table: Table) -> dict[str, TensorSize]:
    """Return what each tensor takes; tensors that are coded together share by their values."""
    out = {}
    for names in together(table):
        bits = sum(plan.bits for plan, _ in planned(names, stored, table)) / (1 << FRACTION)
        values = sum(table[name].size for name in names)
        for name in names:
            cls, entropy = storage_class(table[name].storage), None
            if cls != "float16":
                share = np.bincount(symbols_of(cls, stored[name].codes).ravel()) / table[name].size
                entropy = float(-(share * np.log2(share, where=share > 0, out=np.zeros_like(share))).sum())
            out[name] = TensorSize(bits * table[name].size / values, entropy)
    return {name: out[name] for name in table}


def unpack(payload: memoryview, table: Table) -> dict[str, Stored]:
    """Return the tensors of a payload; CodecError names what is wrong."""
    length = int.from_bytes(payload[:4], "little")
    reader = PlanReader(payload[4 : 4 + length])
    if len(payload) < 4 + length:
        raise CodecError("payload", f"tables of {length} bytes in {len(payload)}")
    decoder = Decoder(payload[4 + length :], lanes(values_in(table)))
    out = {}
    for names in together(table):
        name, row = names[0], table[names[0]]
        groups = scales_shape(row.storage, row.shape)
        if groups is None:
            counts = [table[name].size for name in names]
            values = _read_halves(name, reader, decoder, (1, sum(counts))).view(np.float16).ravel()
            if not np.isfinite(values).all():
                raise CodecError(name, "has a value that is not finite")
            for name, part in zip(names, np.split(values, np.cumsum(counts)[:-1]), strict=True):
                out[name] = Stored(part.reshape(table[name].shape), None)
        else:
            cls, (rows, columns) = storage_class(row.storage), row.shape
            codes = codes_of(name, cls, _read_matrix(name, reader, decoder, (rows, columns), top_of(cls)))
            scales = scales_of_halves(_read_halves(f"{name}: scales", reader, decoder, groups), row.storage)
            if not (np.isfinite(scales).all() and (scales >= SCALE_FLOOR).all()):
                raise CodecError(name, f"its scales: expected finite numbers from {SCALE_FLOOR} up")
            out[name] = Stored(codes, scales)
    if reader.rest():
        raise CodecError("payload", "tables are left over")
    decoder.close()
    return {name: out[name] for name in table}


def together(table: Table) -> list[list[str]]:
    """Return the tensors in the order in which they are coded; those of one list have their tables in common."""
    groups: dict[str, list[str]] = {}
    for name, row in table.items():
        small = row.storage == "float16" and row.size <= TOGETHER
        groups.setdefault(re.sub("[0-9]+", "*", name) if small else name, []).append(name)
    return list(groups.values())


def check_tensor(name: str, row: Param, stored: Stored) -> None:
    """Raise CodecError for a tensor that its storage class cannot hold."""
    codes, scales, expected = stored.codes, stored.scales, scales_shape(row.storage, row.shape)
    cls = storage_class(row.storage)
    dtype = {"float16": np.float16, "fp8": np.float32}.get(cls, np.int8)
    if codes.shape != row.shape or codes.dtype != dtype:
        raise CodecError(name, f"codes {codes.shape} {codes.dtype}; {row.storage} needs {row.shape} {dtype.__name__}")
    if (None if scales is None else (scales.shape, scales.dtype)) != (
        None if expected is None else (expected, np.dtype(np.float16))
    ):
        raise CodecError(name, f"scales do not fit: {row.storage} of {row.shape} needs {expected} float16")
    if cls == "float16" and not np.isfinite(codes).all():
        raise CodecError(name, "has a value that is not finite, or beyond float16's largest, 65504")
    if scales is not None and not (np.isfinite(scales).all() and (scales >= SCALE_FLOOR).all()):
        raise CodecError(name, "has a weight that is not finite, or too large for a float16 scale")
    if scales is not None and not np.array_equal(scales_of_halves(halves_of(scales, row.storage), row.storage), scales):
        raise CodecError(name, f"has a scale that is not on the grid of {row.storage}")
    if cls != "float16" and not (np.abs(codes.astype(np.float32)) <= LARGEST[cls]).all():
        raise CodecError(name, f"has a code beyond {LARGEST[cls]}, the largest of {cls}")


# Plans: what the writer chooses, and the reader holds a file to.


def planned(names: list[str], stored: dict[str, Stored], table: Table) -> Iterator[tuple[CodingPlan, list[SymbolRun]]]:
    """Yield plan and runs of what is coded of tensors that have their tables in common: codes, then scales."""
    codes, scales = stored[names[0]]
    if scales is None:
        values = np.concatenate([stored[name].codes.ravel() for name in names]).view(np.uint16)[None]
    else:
        cls = storage_class(table[names[0]].storage)
        symbols = symbols_of(cls, codes)
        plan = matrix_plan(symbols, top_of(cls))
        yield plan, _matrix_runs(symbols, plan)
        values = halves_of(scales, table[names[0]].storage)
    plan = halves_plan(values)
    shift, base = plan.data[0], int.from_bytes(plan.data[1:3], "little")
    runs = _matrix_runs(((values >> shift) - base).astype(np.uint8), plan)
    yield plan, runs + [SymbolRun((values & (1 << shift) - 1).ravel().astype(np.uint8), plan.tables[-1])] * (shift > 0)


def halves_plan(values: np.ndarray) -> CodingPlan:
    """Return the cheapest split of (rows, groups) numbers of 16 bits into a high part, at most 256, and a low one.

    A float16 number's bits grow with its size: the high part is its order of magnitude, the low one nearly noise.
    """
    low, high, splits = int(values.min()), int(values.max()), []
    start = low >> MOST_SHIFT << MOST_SHIFT
    size = ((high >> MOST_SHIFT) + 1 << MOST_SHIFT) - start
    counts = np.bincount((values - np.uint16(start)).ravel(), minlength=size)
    for shift in range(0, MOST_SHIFT + 1, 2):
        base = low >> shift
        if (high >> shift) - base < 256:
            split = counts.reshape(-1, 1 << shift)
            parts = [fitted(split.sum(1)[base - (start >> shift) :]), *([fitted(split.sum(0))] if shift else [])]
            splits.append((sum(cost for _, cost in parts), shift, base, parts[1:]))
    _, shift, base, rest = min(splits, key=lambda split: split[0])
    plan = matrix_plan(((values >> shift) - base).astype(np.uint8), (high >> shift) - base, _by_mean)
    data = bytes([shift]) + base.to_bytes(2, "little") + plan.data + b"".join(table.data for table, _ in rest)
    bits = (3 * 8 << FRACTION) + plan.bits + sum(cost for _, cost in rest)
    return plan._replace(data=data, bits=bits, tables=plan.tables + [table for table, _ in rest])


def matrix_plan(
    symbols: np.ndarray, top: int, classes: Callable[[np.ndarray, int], np.ndarray] | None = None
) -> CodingPlan:
    """Return the cheapest plan of (rows, columns) symbols up to `top`: one table, or one for each class of lines.

    Lines are classed by their sum of squares, or by `classes`.
    """
    plans = [_plan_along(symbols, ONE, top, None)]
    if symbols.size >= CLASSED and plans[0].tables[0].frequencies.max() < TOTAL:  # else it is as short as can be
        for axis in ROWS, COLUMNS:
            lines = _lines(symbols, axis)
            plans.append(_plan_along(lines, axis, top, (classes or _by_squares)(lines, top)))
    return min(plans, key=lambda plan: plan.bits)


def _plan_along(lines: np.ndarray, axis: int, top: int, classes: np.ndarray | None) -> CodingPlan:
    own = np.zeros(len(lines), np.uint8) if classes is None else classes
    counts = np.zeros((int(own.max()) + 1, top + 1), np.int64)
    for part, some in zip(_chunks(lines), _chunks(own, lines.shape[1]), strict=True):
        places = some[:, None] * np.int64(top + 1) + part
        counts += np.bincount(places.ravel(), minlength=counts.size).reshape(counts.shape)
    fits = [fitted(row) for row in counts]
    data, bits = bytes([axis]), 8 << FRACTION
    if classes is not None:
        fits.insert(0, fitted(np.bincount(classes)))
        data, bits = bytes([axis, len(counts)]), 16 << FRACTION
    data += b"".join(table.data for table, _ in fits)
    return CodingPlan(data, bits + sum(cost for _, cost in fits), [table for table, _ in fits], axis, classes)


def _by_squares(lines: np.ndarray, top: int) -> np.ndarray:
    """Return the class of every line by its sum of squares, in steps of half an octave; lines of zeros are the first.

    Powers of two and one product: the same on every machine.
    """
    squares = np.concatenate([(((part.astype(np.int64) * 2) - top) ** 2).sum(1) for part in _chunks(lines)])
    mantissa, exponent = np.frexp(squares.astype(np.float64))
    size = 2 * exponent + (mantissa * mantissa >= 0.5)
    size = np.where(squares > 0, np.maximum(size, size.max() - (MOST_CLASSES - 2)), 0)
    return np.unique(size, return_inverse=True)[1].astype(np.uint8)


def _by_mean(lines: np.ndarray, top: int) -> np.ndarray:
    """Return the class of every line by its sum, in equal steps from the least to the largest."""
    sums = np.concatenate([part.sum(1, dtype=np.int64) for part in _chunks(lines)])
    sums -= sums.min()
    return np.unique(sums * MOST_CLASSES // (sums.max() + 1), return_inverse=True)[1].astype(np.uint8)


def _lines(symbols: np.ndarray, axis: int) -> np.ndarray:
    return np.ascontiguousarray(symbols.T) if axis == COLUMNS else symbols


def _chunks(lines: np.ndarray, width: int | None = None) -> Iterator[np.ndarray]:
    """Yield some lines at a time, of about CHUNK values of `width` a line together."""
    step = max(1, CHUNK // (width or lines.shape[1]))
    return (lines[at : at + step] for at in range(0, len(lines), step))


def _matrix_runs(symbols: np.ndarray, plan: CodingPlan) -> list[SymbolRun]:
    if plan.classes is None:
        return [SymbolRun(symbols.ravel(), plan.tables[0])]
    lines = _lines(symbols, plan.axis)
    own = [lines[plan.classes == number].ravel() for number in range(int(plan.classes.max()) + 1)]
    return [SymbolRun(part, table) for part, table in zip([plan.classes, *own], plan.tables, strict=False)]


# Reading.


class PlanReader:
    """Takes the plans of a payload, byte by byte."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = bytes(data), 0

    @property
    def at(self) -> int:
        """Return how many bytes were taken."""
        return self._at

    def since(self, at: int) -> bytes:
        """Return the bytes that were taken after the first `at`."""
        return self._data[at : self._at]

    def rest(self) -> int:
        """Return how many bytes are left."""
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        if count > self.rest():
            raise CodecError("payload", "its tables end early")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, field: str, most: int) -> int:
        """Return the next byte, a number up to `most`."""
        (value,) = self.take(1)
        if value > most:
            raise CodecError(field, f"{value} in its tables, expected at most {most}")
        return value

    def table(self, field: str, top: int) -> SymbolTable:
        """Return the next table, of symbols up to `top`."""
        kind, first, last = head = self.take(TABLE_HEAD)
        if kind > 1 or not first <= last <= top:
            raise CodecError(field, f"a table of kind {kind} from {first} to {last}, expected 0 or 1 and up to {top}")
        levels = self.take(last - first + 1) if kind else b""
        if kind and not any(levels):
            raise CodecError(field, "a table without a symbol")
        return table_of(head + levels)


def _read_halves(field: str, reader: PlanReader, decoder: Decoder, shape: tuple[int, int]) -> np.ndarray:
    """Return (rows, groups) numbers of 16 bits."""
    at = reader.at
    shift = reader.number(field, MOST_SHIFT)
    base = int.from_bytes(reader.take(2), "little")
    high, classes = _take_matrix(field, reader, decoder, shape, 255)
    values = high.astype(np.uint16) + np.uint16(base) << np.uint16(shift)
    if shift:
        values |= decoder.take(reader.table(field, (1 << shift) - 1), values.size).reshape(shape)
    _check_plan(field, halves_plan(values), reader.since(at), classes)
    return values


def _read_matrix(field: str, reader: PlanReader, decoder: Decoder, shape: tuple[int, int], top: int) -> np.ndarray:
    """Return (rows, columns) symbols."""
    at = reader.at
    symbols, classes = _take_matrix(field, reader, decoder, shape, top)
    _check_plan(field, matrix_plan(symbols, top), reader.since(at), classes)
    return symbols


def _check_plan(field: str, plan: CodingPlan, data: bytes, classes: np.ndarray | None) -> None:
    """Raise CodecError unless the writer's plan is the file's: its bytes, and the class of every line."""
    if plan.data != data or (plan.classes is not None and bool((plan.classes != classes).any())):
        raise CodecError(field, "other tables or classes than the writer's")


def _take_matrix(
    field: str, reader: PlanReader, decoder: Decoder, shape: tuple[int, int], top: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return (rows, columns) symbols, and the class of every line if there are classes."""
    axis = reader.number(field, COLUMNS)
    if axis == ONE:
        return decoder.take(reader.table(field, top), math.prod(shape)).reshape(shape), None
    count = reader.number(field, MOST_CLASSES)
    lines = np.empty(shape if axis == ROWS else shape[::-1], np.uint8)
    classes = decoder.take(reader.table(field, count - 1), len(lines))
    for number in range(count):
        own = np.flatnonzero(classes == number)
        size = len(own), lines.shape[1]
        lines[own] = decoder.take(reader.table(field, top), math.prod(size)).reshape(size)
    return _lines(lines, axis), classes
