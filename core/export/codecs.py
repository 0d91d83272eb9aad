"""How tensors become the bytes of an artifact's streams, and back: docs/artifact.md, "Streams".

One stream holds one part of all tensors of one storage class, in table order. Packing is lossless and canonical: the
reader refuses bytes that the writer would not make.
"""

import math

import brotli
import numpy as np

from core.model.params import Param
from core.model.storage import KINDS, LARGEST, SCALE_FLOOR, Kind, Stored, scales_shape, storage_class

STREAMS = ("float16", "scales", "ternary", "int4", "int5", "int6 high", "int6 low", "int7", "int8", "fp8")
PATIENT = ("float16", "scales")
"""Streams that gain by brotli's best quality, 11, up to PATIENT_BYTES; all else is at 5 (measured: docs/log.md)."""
PATIENT_BYTES = 2 << 20
WINDOWS = (16, 24)
"""Smallest and largest brotli window, as logarithm of its bytes, that a writer asks for and a reader takes."""
TRIT_PLACES = np.array([1, 3, 9, 27, 81], np.uint8)
Table = dict[str, Param]
Arrays = dict[str, np.ndarray]


class CodecError(ValueError):
    """A stream or a tensor cannot be packed or unpacked: `field` is its name, the message what is wrong."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field, self.problem = field, problem


def stream_sizes(table: Table) -> dict[str, int]:
    """Return the bytes of every stream that a model of `table` has, before compression."""
    values = dict.fromkeys(KINDS, 0)
    scales = 0
    for row in table.values():
        values[storage_class(row.storage)] += math.prod(row.shape)
        scales += math.prod(scales_shape(row.storage, row.shape) or (0,))
    sizes = {
        "float16": 2 * values["float16"],
        "scales": 2 * scales,
        "ternary": -(-values["ternary"] // 5),
        "int4": -(-values["int4"] // 2),
        "int5": values["int5"],
        "int6 high": -(-values["int6"] // 2),
        "int6 low": -(-values["int6"] // 4),
        "int7": values["int7"],
        "int8": values["int8"],
        "fp8": values["fp8"],
    }
    return {name: sizes[name] for name in STREAMS if sizes[name]}


def pack(stored: dict[str, Stored], table: Table) -> dict[str, bytes]:
    """Return the streams of a model's tensors; CodecError names a tensor that its storage class cannot hold."""
    parts: dict[Kind, list[np.ndarray]] = {name: [] for name in KINDS}
    scales = []
    for name, row in table.items():
        _check_tensor(name, row, stored[name])
        parts[storage_class(row.storage)].append(stored[name].codes.ravel())
        if (part := stored[name].scales) is not None:
            scales.append(part.ravel())
    streams: dict[str, bytes] = {}
    for name, codes in parts.items():
        if codes:
            joined = np.concatenate(codes)
            streams |= {"float16": _planes(joined)} if name == "float16" else _pack_codes(name, joined)
    if scales:
        streams["scales"] = _planes(np.concatenate(scales))
    return {name: streams[name] for name in STREAMS if name in streams}


def unpack(streams: dict[str, bytes], table: Table) -> dict[str, Stored]:
    """Return the tensors of streams whose sizes are those of `stream_sizes`; CodecError names what is wrong."""
    counts = dict.fromkeys(KINDS, 0)
    for row in table.values():
        counts[storage_class(row.storage)] += math.prod(row.shape)
    codes = {name: _unpack_codes(name, streams, counts[name]) for name in KINDS if counts[name]}
    scales = _from_planes("scales", streams.get("scales", b""))
    if not (np.isfinite(scales).all() and (scales >= SCALE_FLOOR).all()):
        raise CodecError("scales", f"expected finite numbers from {SCALE_FLOOR} up")
    at = dict.fromkeys(KINDS, 0)
    first, out = 0, {}
    for name, row in table.items():
        cls, size, shape = storage_class(row.storage), math.prod(row.shape), scales_shape(row.storage, row.shape)
        part = codes[cls][at[cls] : at[cls] + size].reshape(row.shape)
        at[cls] += size
        if shape is None:
            out[name] = Stored(part, None)
        else:
            last = first + math.prod(shape)
            out[name] = Stored(part, scales[first:last].reshape(shape))
            first = last
    return out


def compress(name: str, raw: bytes) -> bytes:
    """Return the brotli stream of a stream's bytes."""
    low, high = WINDOWS
    window = min(high, max(low, (len(raw) - 1).bit_length()))
    quality = 11 if name in PATIENT and len(raw) <= PATIENT_BYTES else 5
    return brotli.compress(raw, quality=quality, lgwin=window)


def window_bits(payload: bytes | memoryview) -> int:
    """Return the logarithm of the window that a brotli stream declares in its first bits (RFC 7932, 9.1); 0: none."""
    first = payload[0] if len(payload) else 0x11
    if not first & 1:
        return 16
    if first >> 1 & 7:
        return 17 + (first >> 1 & 7)
    return {0: 17, 1: 0}.get(first >> 4 & 7, 8 + (first >> 4 & 7))


def inflate(name: str, payload: bytes | memoryview, size: int) -> bytes:
    """Return the `size` bytes of a brotli stream, stopping one buffer past them whatever it holds."""
    if not WINDOWS[0] <= window_bits(payload) <= WINDOWS[1]:
        raise CodecError(name, f"a brotli window of 2^{window_bits(payload)} bytes; expected 2^16 to 2^24")
    decoder = brotli.Decompressor()
    try:
        raw = decoder.process(payload, output_buffer_limit=size + 1)
    except brotli.error:
        raise CodecError(name, "not one whole brotli stream") from None
    if len(raw) != size or not decoder.is_finished():
        raise CodecError(name, f"it does not hold the {size} bytes that the model's table says")
    return raw


def _check_tensor(name: str, row: Param, stored: Stored) -> None:
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
    if cls != "float16" and not (np.abs(codes.astype(np.float32)) <= LARGEST[cls]).all():
        raise CodecError(name, f"has a code beyond {LARGEST[cls]}, the largest of {cls}")


def _pack_codes(cls: Kind, codes: np.ndarray) -> dict[str, bytes]:
    if cls == "fp8":
        return {"fp8": _e4m3_bytes(codes).tobytes()}
    unsigned = (codes + np.int8(LARGEST[cls])).view(np.uint8)
    if cls == "ternary":
        return {"ternary": (_rows_of(unsigned, 5) @ TRIT_PLACES).tobytes()}
    if cls == "int4":
        return {"int4": _nibbles(unsigned)}
    if cls == "int6":
        low = _rows_of(unsigned & 3, 4)
        quarters = low[:, 0] | low[:, 1] << 2 | low[:, 2] << 4 | low[:, 3] << 6
        return {"int6 high": _nibbles(unsigned >> 2), "int6 low": quarters.tobytes()}
    return {cls: unsigned.tobytes()}


def _unpack_codes(cls: Kind, streams: dict[str, bytes], count: int) -> np.ndarray:
    if cls == "float16":
        values = _from_planes(cls, streams[cls])
        if not np.isfinite(values).all():
            raise CodecError(cls, "has a value that is not finite")
        return values
    if cls == "int6":
        low = np.frombuffer(streams["int6 low"], np.uint8)[:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3
        high = _cut("int6 high", _from_nibbles(streams["int6 high"]), count)
        unsigned = high << 2 | _cut("int6 low", low.ravel(), count)
    else:
        packed = np.frombuffer(streams[cls], np.uint8)
        if cls == "fp8":
            values = E4M3[packed]
            if not np.isfinite(values).all():
                raise CodecError(cls, "has a value that is not a number")
            return values
        if cls == "ternary" and packed.max(initial=0) >= 3**5:
            raise CodecError(cls, "has a byte above 242, which five trits cannot make")
        if cls == "ternary":
            unsigned = _cut(cls, (packed[:, None] // TRIT_PLACES % np.uint8(3)).ravel(), count)
        else:
            unsigned = _cut(cls, _from_nibbles(streams[cls]), count) if cls == "int4" else packed
    if unsigned.max(initial=0) > 2 * LARGEST[cls]:
        raise CodecError(cls, f"has a code beyond {LARGEST[cls]}")
    return unsigned.view(np.int8) - np.int8(LARGEST[cls])


def _planes(values: np.ndarray) -> bytes:
    """Return float16 values as all their low bytes, then all their high bytes: brotli finds more (docs/log.md)."""
    return np.ascontiguousarray(values, "<f2").view(np.uint8).reshape(-1, 2).T.tobytes()


def _from_planes(name: str, raw: bytes) -> np.ndarray:
    return np.frombuffer(np.frombuffer(raw, np.uint8).reshape(2, -1).T.tobytes(), "<f2").astype(np.float16)


def _rows_of(values: np.ndarray, width: int) -> np.ndarray:
    """Return values as rows of `width`, the last one filled with zeros."""
    return np.pad(values, (0, -len(values) % width)).reshape(-1, width)


def _cut(name: str, values: np.ndarray, count: int) -> np.ndarray:
    """Return the first `count` values; what the writer filled the last byte with must be zeros."""
    if values[count:].any():
        raise CodecError(name, "its padding is not zero")
    return values[:count]


def _nibbles(values: np.ndarray) -> bytes:
    pairs = _rows_of(values, 2)
    return (pairs[:, 0] | pairs[:, 1] << 4).tobytes()


def _from_nibbles(raw: bytes) -> np.ndarray:
    packed = np.frombuffer(raw, np.uint8)
    return np.stack([packed & 15, packed >> 4], 1).ravel()


def _e4m3_table() -> np.ndarray:
    """Return the float32 value of every e4m3 byte: sign, 4 bits of exponent, 3 of mantissa; 0x7f and 0xff are NaN."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


E4M3 = _e4m3_table()


def _e4m3_bytes(values: np.ndarray) -> np.ndarray:
    codes = np.searchsorted(E4M3[:127], np.abs(values)).astype(np.uint8)
    if not np.array_equal(E4M3[codes], np.abs(values)):
        raise CodecError("fp8", "has a code that is not an e4m3 value")
    return codes | np.signbit(values).astype(np.uint8) << 7
