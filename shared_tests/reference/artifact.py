"""The payload of an artifact, read value by value with Python's whole numbers, as docs/artifact.md says."""

import math
import re
import struct
from collections.abc import Iterator

from core.config import ModelConfig
from core.model.params import param_table
from core.model.storage import scales_shape
from shared_tests.reference.storage import LARGEST


class Payload:
    """What is left to read of a payload."""

    def __init__(self, data: bytes, values: int) -> None:
        end, count = 4 + int.from_bytes(data[:4], "little"), 1
        while count < 1024 and 2 * count * 8192 <= values:
            count *= 2
        self.plan, rest = iter(data[4:end]), data[end:]
        self.states = list(struct.unpack(f"<{count}I", rest[: 4 * count]))
        self.words = iter(struct.unpack(f"<{(len(rest) - 4 * count) // 2}H", rest[4 * count :]))

    def table(self) -> dict[int, tuple[int, int]]:
        """Return symbol -> (first slot, slots)."""
        kind, first, last = next(self.plan), next(self.plan), next(self.plan)
        levels = [next(self.plan) if kind else 1 for _ in range(first, last + 1)]
        weights = {s: (16 + level % 16) * 2 ** (level // 16) for s, level in enumerate(levels, first) if level}
        spare, total, below, ends = 16384 - len(weights), sum(weights.values()), 0, [0]
        for number, weight in enumerate(weights.values(), 1):
            below += weight
            ends.append(number + spare * below // total)
        return {s: (ends[i], ends[i + 1] - ends[i]) for i, s in enumerate(weights)}

    def symbols(self, table: dict[int, tuple[int, int]], count: int) -> list[int]:
        """Return the next symbols: the first of a run is the first lane's."""
        found = []
        for place in range(count):
            lane = place % len(self.states)
            slot = self.states[lane] % 16384
            ((symbol, start, slots),) = [(s, a, n) for s, (a, n) in table.items() if a <= slot < a + n]
            state = slots * (self.states[lane] // 16384) + slot - start
            self.states[lane] = state if state >= 65536 else state * 65536 + next(self.words)
            found.append(symbol)
        return found

    def halves(self, rows: int, groups: int, storage: str = "") -> list[float]:
        """Return float16 numbers, each in a high and a low part."""
        shift, base = next(self.plan), next(self.plan) + 256 * next(self.plan)
        bits = [(base + high) << shift for high in self.matrix(rows, groups)]
        if shift:
            bits = [high + low for high, low in zip(bits, self.symbols(self.table(), len(bits)), strict=True)]
        if storage.endswith("g"):
            return [2.0 ** ((number - 480) / 32) for number in bits]
        return [struct.unpack("<e", struct.pack("<H", number))[0] for number in bits]

    def matrix(self, rows: int, columns: int) -> list[int]:
        """Return the symbols of a matrix, row by row."""
        axis = next(self.plan)
        if axis == 0:
            return self.symbols(self.table(), rows * columns)
        lines, width = (rows, columns) if axis == 1 else (columns, rows)
        count = next(self.plan)
        classes, found = self.symbols(self.table(), lines), {}
        for number in range(count):
            own = [line for line in range(lines) if classes[line] == number]
            symbols = self.symbols(self.table(), len(own) * width)
            found |= {line: symbols[i * width : (i + 1) * width] for i, line in enumerate(own)}
        if axis == 1:
            return [found[row][column] for row in range(rows) for column in range(columns)]
        return [found[column][row] for row in range(rows) for column in range(columns)]


def e4m3(symbol: int) -> float:
    """Return the e4m3 value of a symbol: they are in the order of the values, minus zero below zero."""
    size = symbol - 128 if symbol >= 128 else 127 - symbol
    value = size % 8 / 8 * 2.0**-6 if size < 8 else (1 + size % 8 / 8) * 2.0 ** (size // 8 - 7)
    return math.copysign(value, 1 if symbol >= 128 else -1)


def roles(model: ModelConfig) -> Iterator[list[str]]:
    """Yield the tensors that are coded together: float16 ones of up to 16,384 values whose names differ in numbers."""
    table, groups = param_table(model), {}
    for name, row in table.items():
        letters = re.sub("[0-9]+", "*", name)
        small = row.storage == "float16" and row.size <= 16384
        groups.setdefault(letters if small else name, []).append(name)
    yield from groups.values()


def read_payload(data: bytes, model: ModelConfig) -> dict[str, tuple[list[float], list[float] | None]]:
    """Return codes and scales of every tensor, as flat lists; all of the payload must have been used."""
    table = param_table(model)
    shapes = {name: scales_shape(row.storage, row.shape) for name, row in table.items()}
    payload = Payload(data, sum(row.size + math.prod(shapes[name] or (0,)) for name, row in table.items()))
    found: dict[str, tuple[list[float], list[float] | None]] = {}
    for names in roles(model):
        row, shape = table[names[0]], shapes[names[0]]
        if shape is None:
            values = iter(payload.halves(1, sum(table[name].size for name in names)))
            found |= {name: ([next(values) for _ in range(table[name].size)], None) for name in names}
        else:
            rows, columns = row.shape
            symbols, cls = payload.matrix(rows, columns), row.storage.split("/")[0]
            codes = [e4m3(s) if cls == "fp8" else s - LARGEST[cls] for s in symbols]
            found[names[0]] = codes, payload.halves(*shape, row.storage)
    assert next(payload.plan, None) is next(payload.words, None) is None, "something is left over"
    assert set(payload.states) == {65536}, "a lane does not end where it began"
    return found
