"""A static entropy coder: interleaved rANS over integer tables, as docs/artifact.md says ("Tables", "The coder").

numpy and whole numbers only: no figure depends on a library's logarithm, or on a version of anything.
"""

from typing import NamedTuple

import numpy as np

BITS = 14
TOTAL = 1 << BITS
"""The frequencies of a table add up to it."""
LOW = 1 << 16
"""States lie from here up to 2^32; every lane starts, and for the reader ends, here."""
WEIGHTS = (16 + (np.arange(256) & 15)) << (np.arange(256) >> 4)
"""What a level stands for: 4 bits of mantissa under 4 bits of exponent, so that a table costs a byte per symbol."""
BETWEEN = WEIGHTS[1:-1] + WEIGHTS[2:]
"""Twice what lies half-way between neighbouring levels."""
TABLE_HEAD = 3
"""Bytes of a table beside its levels: kind, first and last symbol."""
SYMBOLS_PER_LANE, MOST_LANES, FEW_LANES = 8192, 1024, 32
FRACTION = 12
"""Code lengths are counted in 2^-12 bits."""


class CodecError(ValueError):
    """A stream or a tensor cannot be packed or unpacked: `field` is its name, the message what is wrong."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field, self.problem = field, problem


class SymbolTable(NamedTuple):
    """How often each symbol is expected."""

    data: bytes
    """As the artifact keeps it."""
    frequencies: np.ndarray
    """(symbols,) uint32 that add up to TOTAL."""


class SymbolRun(NamedTuple):
    """Symbols that one table codes."""

    symbols: np.ndarray
    """(n,) uint8."""
    table: SymbolTable

    @property
    def bits(self) -> int:
        """The code length by the table, the table not counted, in 2^-FRACTION bits."""
        frequencies = self.table.frequencies
        return int(np.bincount(self.symbols, minlength=len(frequencies)) @ LENGTHS[frequencies])


def lanes(values: int) -> int:
    """Return how many states code `values` values: a power of two, from one to MOST_LANES."""
    return 1 << min(max(1, values // SYMBOLS_PER_LANE).bit_length() - 1, MOST_LANES.bit_length() - 1)


def _code_lengths() -> np.ndarray:
    """Return the length of the code of a symbol of frequency 0 (unused) to TOTAL, in 2^-FRACTION bits, rounded up."""
    frequency = np.arange(1, TOTAL + 1, dtype=np.uint64)
    whole = (np.frexp(frequency)[1] - 1).astype(np.uint64)
    mantissa, logarithm = frequency << (30 - whole), whole
    for _ in range(FRACTION):  # the square of a number has twice its logarithm
        mantissa = mantissa * mantissa >> np.uint64(30)
        bit = mantissa >> np.uint64(31)
        mantissa, logarithm = mantissa >> bit, logarithm << np.uint64(1) | bit
    return np.concatenate([[0], (BITS << FRACTION) - logarithm.astype(np.int64)])


LENGTHS = _code_lengths()


def fitted(counts: np.ndarray) -> tuple[SymbolTable, int]:
    """Return the cheaper table, flat or with levels, for symbols that are there `counts` times, and its cost.

    The cost is that of the table and of the symbols, in 2^-FRACTION bits. A tie is flat.
    """
    first, last = counts.nonzero()[0][[0, -1]].tolist()
    inside = counts[first : last + 1]
    flat, cost = _priced(bytes([0, first, last]), inside)
    if cost <= (TABLE_HEAD + len(inside)) * 8 << FRACTION:  # levels alone would cost as much
        return flat, cost
    # To the nearest level, beside the most frequent symbol, which has the highest.
    levels = BETWEEN.searchsorted(2 * (inside * WEIGHTS[-1] // inside.max()), "right") + 1
    levels[inside == 0] = 0
    return min((flat, cost), _priced(bytes([1, first, last, *levels.tolist()]), inside), key=lambda found: found[1])


def _priced(data: bytes, counts: np.ndarray) -> tuple[SymbolTable, int]:
    """Return the table of its bytes, and what it costs with symbols that are there `counts` times."""
    table = table_of(data)
    return table, (len(data) * 8 << FRACTION) + int(counts @ LENGTHS[table.frequencies[data[1] :]])


def table_of(data: bytes) -> SymbolTable:
    """Return the table of its bytes: kind, first and last symbol, and for kind 1 a level for each of them."""
    kind, first, last = data[:TABLE_HEAD]
    levels = np.frombuffer(data[TABLE_HEAD:] if kind else bytes([1]) * (last - first + 1), np.uint8)
    # One for each symbol that is there, so that none becomes too rare to code; the rest as the levels say.
    present, weights = (levels > 0).cumsum(), (WEIGHTS[levels] * (levels > 0)).cumsum()
    ends = present + (TOTAL - present[-1]) * weights // weights[-1]
    frequencies = np.zeros(last + 1, np.uint32)
    frequencies[first:] = ends
    frequencies[first + 1 :] -= frequencies[first:-1].copy()
    return SymbolTable(data, frequencies)


def encode(runs: list[SymbolRun], count: int) -> bytes:
    """Return the states (uint32) and then the words (uint16), little-endian, of runs that `count` lanes code."""
    states = np.full(count, LOW, np.uint32)
    words: list[np.ndarray] = []
    push = _push_singly if count < FEW_LANES else _push
    for symbols, table in reversed(runs):  # the last symbol first: a state is a stack
        if table.frequencies.max() < TOTAL:  # else the symbols take no bits, and no step changes a state
            words += push(symbols, table.frequencies, states)
    return states.astype("<u4").tobytes() + b"".join(part.astype("<u2").tobytes() for part in reversed(words))


def _starts(frequencies: np.ndarray) -> np.ndarray:
    return frequencies.cumsum(dtype=np.uint32) - frequencies


def _push(symbols: np.ndarray, frequencies: np.ndarray, states: np.ndarray) -> list[np.ndarray]:
    """Put symbols on the states, all lanes at once, and return the words of every step, last step first."""
    starts, count, words = _starts(frequencies), len(states), []
    for at in range((len(symbols) - 1) // count * count, -1, -count):
        part = symbols[at : at + count]
        frequency, state = frequencies[part], states[: len(part)]
        full = np.flatnonzero(state >> (32 - BITS) >= frequency)
        words.append(state[full].astype(np.uint16))
        state[full] >>= 16
        quotient = state // frequency
        state[:] = (quotient << BITS) + (state - quotient * frequency) + starts[part]
    return words


def _push_singly(symbols: np.ndarray, frequencies: np.ndarray, states: np.ndarray) -> list[np.ndarray]:
    """Do what `_push` does symbol by symbol: with few lanes, numpy's calls take longer than Python's whole numbers."""
    starts, table, held, words = _starts(frequencies).tolist(), frequencies.tolist(), states.tolist(), []
    for place in range(len(symbols) - 1, -1, -1):
        symbol, lane = symbols[place], place % len(held)
        frequency, state = table[symbol], held[lane]
        if state >> (32 - BITS) >= frequency:
            words.append(state & 0xFFFF)
            state >>= 16
        held[lane] = (state // frequency << BITS) + state % frequency + starts[symbol]
    states[:] = held
    return [np.array(words[::-1], np.uint16)]


class Decoder:
    """Takes the runs of a payload, one after the other; CodecError for what `encode` would not have written."""

    def __init__(self, payload: memoryview, count: int) -> None:
        if len(payload) < 4 * count or len(payload) % 2:
            raise CodecError(
                "payload", f"{len(payload)} bytes of states and words, expected {4 * count} and more, even"
            )
        self._states = np.frombuffer(payload[: 4 * count], "<u4").astype(np.uint32)
        self._words, self._at = np.frombuffer(payload[4 * count :], "<u2").astype(np.uint32), 0
        if (self._states < LOW).any():
            raise CodecError("payload", f"a state below {LOW}")

    def take(self, table: SymbolTable, size: int) -> np.ndarray:
        """Return the next `size` symbols, uint8."""
        frequencies = table.frequencies
        if frequencies.max() == TOTAL:
            return np.full(size, frequencies.argmax(), np.uint8)
        symbol_of = np.repeat(np.arange(len(frequencies), dtype=np.uint8), frequencies)
        take = self._take_singly if len(self._states) < FEW_LANES else self._take
        return take(size, symbol_of, frequencies)

    def _take(self, size: int, symbol_of: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
        # Frequency and place among the symbol's slots lie in one number: one look-up instead of two.
        place = np.arange(TOTAL, dtype=np.uint32) - _starts(frequencies)[symbol_of]
        entries = frequencies[symbol_of] | place << np.uint32(16)
        symbols, count = np.empty(size, np.uint8), len(self._states)
        for at in range(0, size, count):
            state = self._states[: min(count, size - at)]
            slots = state & (TOTAL - 1)
            symbols[at : at + count] = symbol_of[slots]
            entry = entries[slots]
            state >>= BITS
            state *= entry & 0xFFFF
            state += entry >> 16
            low = np.flatnonzero(state < LOW)
            state[low] = state[low] << 16 | self._next(len(low))
        return symbols

    def _take_singly(self, size: int, symbol_of: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
        """Do what `_take` does symbol by symbol."""
        symbols, held, of = bytearray(size), self._states.tolist(), symbol_of.tobytes()
        starts, table = _starts(frequencies).tolist(), frequencies.tolist()
        for place in range(size):
            lane = place % len(held)
            slot = held[lane] & (TOTAL - 1)
            symbol = symbols[place] = of[slot]
            state = table[symbol] * (held[lane] >> BITS) + slot - starts[symbol]
            held[lane] = state if state >= LOW else state << 16 | int(self._next(1)[0])
        self._states[:] = held
        return np.frombuffer(symbols, np.uint8)

    def _next(self, count: int) -> np.ndarray:
        self._at += count
        if self._at > len(self._words):
            raise CodecError("payload", "its words end before the symbols do")
        return self._words[self._at - count : self._at]

    def close(self) -> None:
        """Check that every word was used and that every lane is back where the writer began."""
        if self._at != len(self._words) or (self._states != LOW).any():
            raise CodecError("payload", "words are left over, or a lane does not end where it began")
