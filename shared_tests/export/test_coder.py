"""The entropy coder: round trips, its size, its tables, and 10,000 changed payloads (long: a million). Budget: 12 s."""

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.export import coder
from core.export.coder import FRACTION, LENGTHS, TOTAL, WEIGHTS, CodecError, Decoder, SymbolRun, encode, fitted, lanes

LANES = (1, 2, 16, 32, 64, 1024)


def run_of(symbols: np.ndarray) -> SymbolRun:
    return SymbolRun(symbols, fitted(np.bincount(symbols))[0])


def decoded(payload: bytes, runs: list[SymbolRun], count: int) -> list[np.ndarray]:
    """Take the runs out of a payload and check its end."""
    decoder = Decoder(memoryview(payload), count)
    found = [decoder.take(run.table, len(run.symbols)) for run in runs]
    decoder.close()
    return found


def gaussian(size: int, deviation: float = 2.4, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(size)
    return np.clip(np.rint(noise * deviation) + 31, 0, 62).astype(np.uint8)


def some_runs() -> list[SymbolRun]:
    """Runs of every kind of symbols: even, uneven, all alike, two that are far apart, one, and none."""
    noise = np.random.default_rng(7)
    rare = np.zeros(5000, np.uint8)
    rare[[0, 17, 4999]] = 255
    symbols = [
        noise.integers(0, 256, 3001).astype(np.uint8), gaussian(7777), np.full(2500, 9, np.uint8), rare,
        np.array([255], np.uint8), np.zeros(1, np.uint8), noise.integers(0, 2, 1024).astype(np.uint8) * 255,
        (noise.random(4096) < 0.01).astype(np.uint8), gaussian(31), gaussian(65),
    ]  # fmt: skip
    return [*map(run_of, symbols), SymbolRun(np.zeros(0, np.uint8), run_of(gaussian(100)).table)]


@pytest.mark.parametrize("count", LANES)
def test_round_trip(count: int) -> None:
    runs = some_runs()
    payload = encode(runs, count)
    for run, found in zip(runs, decoded(payload, runs, count), strict=True):
        assert found.dtype == np.uint8 and found.tobytes() == run.symbols.tobytes()
    again = [SymbolRun(found, run.table) for run, found in zip(runs, decoded(payload, runs, count), strict=True)]
    assert encode(again, count) == payload


@pytest.mark.parametrize("count", LANES)
def test_symbol_by_symbol_and_all_lanes_at_once_are_the_same(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, payloads = some_runs(), []
    for few in (0, 2048):
        monkeypatch.setattr(coder, "FEW_LANES", few)
        payloads.append(encode(runs, count))
        decoded(payloads[-1], runs, count)
    assert payloads[0] == payloads[1]
    monkeypatch.setattr(coder, "FEW_LANES", 0)
    decoded(payloads[1], runs, count)


@pytest.mark.parametrize("deviation", [0.1, 0.5, 1.2, 2.4, 8.0, 20.0])
def test_the_size_is_the_code_length_of_the_tables(deviation: float) -> None:
    """Within 0.2 %, plus 4 bytes a lane; and the tables are within 0.1 % of the entropy."""
    symbols = gaussian(1 << 20, deviation)
    table, cost = fitted(np.bincount(symbols))
    run, count = SymbolRun(symbols, table), lanes(len(symbols))
    share = np.bincount(symbols)[np.bincount(symbols) > 0] / len(symbols)
    frequencies = table.frequencies[table.frequencies > 0] / TOTAL
    exact = -(share * np.log2(frequencies[np.bincount(symbols)[table.frequencies > 0] > 0])).sum() * len(symbols)
    assert count == 128 and len(encode([run], count)) <= exact / 8 * 1.002 + 4 * count
    assert run.bits / (1 << FRACTION) == pytest.approx(exact, rel=2e-4, abs=1)
    assert cost == run.bits + (8 * len(table.data) << FRACTION)
    assert exact <= -(share * np.log2(share)).sum() * len(symbols) * 1.001


def test_lanes_are_a_power_of_two_that_8192_symbols_pay_for() -> None:
    for values in (1, 8191, 8192, 16_383, 16_384, 65_536, 2_000_000, 1 << 21, 1 << 28):
        count = lanes(values)
        assert count == 1 or (count & (count - 1) == 0 and count <= values / 8192 and count <= 1024)
        assert 2 * count > min(values / 8192, 1024)


def test_code_lengths_are_logarithms() -> None:
    for frequency in (1, 2, 3, 5, 100, 8191, 8192, 12_345, TOTAL - 1, TOTAL):
        exact = math.log2(TOTAL / frequency) * (1 << FRACTION)
        assert exact <= LENGTHS[frequency] + 1e-9 and LENGTHS[frequency] - exact < 1.01
    assert (np.diff(LENGTHS[1:]) <= 0).all() and LENGTHS[TOTAL] == 0


def test_tables_are_those_of_every_machine() -> None:
    """Whole numbers alone: another figure would garble every artifact that there is."""
    digest = hashlib.sha256(LENGTHS.astype("<i8").tobytes() + WEIGHTS.astype("<i8").tobytes())
    noise = np.random.default_rng(5)
    for size in (1, 2, 3, 15, 63, 255, 256):
        table, cost = fitted((noise.integers(0, 1 << 20, size) >> noise.integers(0, 20, size)) + (size == 1))
        digest.update(table.data + table.frequencies.astype("<u4").tobytes() + cost.to_bytes(8, "little"))
    assert digest.hexdigest() == "9bbe771d8be2812eedf8744ee133f44882ddf69fc17b4a79e75e37305a9918f0"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.just(0), st.integers(0, 40), st.integers(0, 1 << 28)), min_size=1, max_size=256))
def test_every_symbol_that_is_there_can_be_coded(counts: list[int]) -> None:
    found = np.array(counts)
    if not found.any():
        found[-1] = 1
    table, _ = fitted(found)
    frequencies = np.pad(table.frequencies.astype(np.int64), (0, len(found) - len(table.frequencies)))
    assert frequencies.sum() == TOTAL and (frequencies[found > 0] >= 1).all()
    assert coder.table_of(table.data).frequencies.tobytes() == table.frequencies.tobytes()


@pytest.mark.parametrize("changes", [5_000, pytest.param(500_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("count", [1, 64])
def test_a_payload_that_was_changed(count: int, changes: int) -> None:
    """Words and states: each change is refused, or is what the writer makes of what was read."""
    noise, runs = np.random.default_rng(count), [run_of(gaussian(150)), run_of(gaussian(150, 0.5))]
    payload, accepted = encode(runs, count), 0
    for _ in range(changes):
        data = bytearray(payload)
        for _ in range(noise.integers(1, 4)):
            at, what = int(noise.integers(len(data))), noise.integers(6)
            if what < 3:
                data[at] ^= 1 << noise.integers(8)
            elif what == 3:
                del data[at & ~1 : (at & ~1) + 2]
            elif what == 4:
                data[at & ~1 : at & ~1] = noise.bytes(2)
            else:
                data[at] = noise.integers(256)
        try:
            found = decoded(bytes(data), runs, count)
        except CodecError:
            continue
        accepted += data != payload
        again = [SymbolRun(symbols, run.table) for symbols, run in zip(found, runs, strict=True)]
        assert encode(again, count) == bytes(data)
    assert 0 < accepted < changes // 10, (
        "what a few words say may be said of other symbols: few, since every lane has to end"
    )


@pytest.mark.parametrize("count", [1, 64])
def test_every_lane_is_checked(count: int) -> None:
    """A word in place of another leads every lane somewhere else than where the writer began."""
    runs = [run_of(gaussian(640))]
    payload = encode(runs, count)
    for lane in range(count):
        bad = bytearray(payload)
        bad[4 * lane] ^= 1  # the lowest bit of a state: another slot, and another symbol at times
        with pytest.raises(CodecError):
            decoded(bytes(bad), runs, count)
