"""Hostile files for `support.mutations`: whole artifacts, shards and checkpoints of a few KB, and changes of them.

A change is made to what a file holds, which is then compressed and framed as a writer would, checksums repaired or not;
or to the bytes of the finished file. All of it follows from the random generator that is given.
"""

import functools
import hashlib
import json
import random
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import brotli
import numpy as np

from core.config import ConfigError, ModelConfig, RunConfig, changed, from_json
from core.data.shards import write_shard
from core.engine.optimizer_state import optimizer_slots
from core.engine.protocol import Engine
from core.export import codecs
from core.export.artifact import write_artifact
from core.model.params import param_table, start_values
from core.model.storage import STORAGES
from core.training.run import Run
from shared_tests.reference.storage import stored_model

Random = random.Random
SIZES: dict[str, Any] = {
    "vocab": 7, "dim": 4, "layers": 1, "attention.heads": 2, "attention.kv_heads": 1, "attention.rope_dims": 2,
    "mlp.hidden": 66, "head.bias": True,
}  # fmt: skip
MODELS = [
    changed(ModelConfig(), SIZES | {"matrix_storage": matrix, "embedding.storage": table, "embedding.dim": width})
    for matrix, table, width in (
        ("ternary/64", "int6/row", None),
        ("int4/64", "fp8/row", 3),
        ("int8/64", "float16", None),
        ("fp8/row", "ternary/128", 5),
    )
]
RUN = RunConfig(model=MODELS[0])
HOSTILE: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 8, 65, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, -(10**30), 10**400, 10**4300 - 1,
    0.0, -0.0, 0.5, 1.0, 1e-320, 1e308, float("inf"), float("nan"), True, False, None,
    "", "x", "0" * 64, "é", "\x1b[2J\n", "\ud800", "a" * 5000, "F16", "BF16", "F64", "I64", "F8_E4M3", "F4", "BOOL",
    "attention", *STORAGES, [], {}, [[]], [0], [{}], {"": 0}, [1] * 1000,
)  # fmt: skip
TOKENS = (*'[]{},:"-90.e\\ \xff', "null", "true", "\\u0000", "NaN", "9" * 4300, "[" * 3000)
BYTES = (0, 1, 0x7E, 0x7F, 0x80, 0xF2, 0xF3, 0xFE, 0xFF)


def hostile(rng: Random) -> Any:
    """Return a value that a reader may not expect: a copy, since what it is put into may be changed again."""
    value = rng.choice(HOSTILE)
    return copied(value) if type(value) in (list, dict) else value


def near(rng: Random, value: Any) -> Any:
    """Return a value like the given one, but not it: off by one, of another type, negative, longer."""
    if type(value) is int and abs(value) < 2**64:
        return rng.choice([value + 1, value - 1, -value, 2 * value, value // 2, float(value), str(value), [value]])
    if type(value) is str:
        return rng.choice([value[:-1], value + "0", value[::-1], value.upper(), value + "\n", [value]])
    return hostile(rng)


def copied(value: Any) -> Any:
    """Return a JSON value that shares nothing with the given one."""
    return json.loads(json.dumps(value))


def alter(rng: Random, tree: Any) -> None:
    """Change one place of a JSON tree in place: replace, nudge, remove, overwrite, repeat or rename what is there."""
    places: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        keys = list(node) if type(node) is dict else list(range(len(node)))
        places += [(node, key) for key in keys]
        waiting += [node[key] for key in keys if type(node[key]) in (dict, list)]
    if not places:
        return
    node, key = rng.choice(places)
    what = rng.randrange(8)
    if what < 2:
        node[key] = hostile(rng)
    elif what < 4:
        node[key] = near(rng, node[key])
    elif what == 4:
        del node[key]
    elif what == 5:
        other, at = rng.choice(places)
        node[key] = copied(other[at])
    elif type(node) is list:
        node.insert(rng.randrange(len(node) + 1), copied(node[key]))
    else:
        node[str(near(rng, key))] = node[key] if what == 6 else node.pop(key)


def edit(rng: Random, data: bytes) -> bytes:
    """Return bytes with one to three changes: bits flipped, bytes set, spans removed, inserted, repeated or cut off."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, what, span = rng.randrange(len(out) + 1), rng.randrange(8), rng.choice((1, 1, 2, 4, 7, 64, 600))
        if what < 3 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif what == 3 and at < len(out):
            out[at] = rng.choice(BYTES)
        elif what == 4:
            del out[at : at + span]
        elif what == 5:
            out[at:at] = rng.randbytes(span)
        elif what == 6:
            out[at:at] = out[at : at + span]
        elif what == 7 and rng.random() < 0.3:
            del out[at:]
    return bytes(out)


def edit_payload(rng: Random, data: bytes) -> bytes:
    """Return a tensor's bytes changed: in half of the cases their length stays, so that the values are looked at."""
    if rng.random() < 0.5 or not data:
        return edit(rng, data)
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.choice((0, len(out) // 2, len(out) - 1, rng.randrange(len(out))))
        out[at] = rng.choice((rng.randrange(256), *BYTES))
    return bytes(out)


def json_text(rng: Random, value: Any, canonical: bool = True) -> bytes:
    """Return a JSON value as text: nearly always as a writer would, at times with pieces of syntax put over it."""
    odd = rng.random() < 0.03
    spaces = (", ", ": ") if odd else (",", ":")
    out = bytearray(json.dumps(value, sort_keys=canonical and not odd, separators=spaces).encode())
    for _ in range(rng.randint(1, 3) if rng.random() < 0.08 else 0):
        at = rng.randrange(len(out) + 1)
        out[at : at + rng.randrange(3)] = rng.choice(TOKENS).encode("latin-1")
    return bytes(out)


def length_field(rng: Random, length: int, size: int) -> bytes:
    """Return a length as little-endian bytes: nearly always the right one."""
    wrong = (0, 1, length + 1, abs(length - 1), 2**31, 2 ** (8 * size) - 1)
    return (rng.choice(wrong) if rng.random() < 0.03 else length).to_bytes(size, "little")


# Artifacts.


def artifact_files(folder: Path) -> list[bytes]:
    """Return artifacts that have every storage class between them."""
    out = []
    for number, model in enumerate(MODELS):
        stored = stored_model(model, start_values(model, number))
        provenance = {"seed": number, "steps": 20, "lr": 1e-3, "code": "0.1.0"}
        write_artifact(folder / "a", model, stored, tokenizer_sha256="0f" * 32, provenance=provenance)
        out.append((folder / "a").read_bytes())
    return out


def artifact_parts(whole: bytes) -> tuple[bytes, tuple[bytes, ...]]:
    """Return the header's text and the streams of an artifact, as docs/artifact.md says."""
    at = 12 + int.from_bytes(whole[8:12], "little")
    text, streams = whole[12:at], []
    for entry in json.loads(text)["streams"]:
        streams.append(brotli.decompress(whole[at : at + entry["payload_bytes"]]))
        at += entry["payload_bytes"]
    return text, tuple(streams)


known_parts = functools.lru_cache(len(MODELS))(artifact_parts)


def mutate_artifact(rng: Random, whole: bytes) -> bytes:
    """Return an artifact with streams, model or header changed before it was compressed and framed."""
    text, parts = known_parts(whole)
    header, streams, what = json.loads(text), list(parts), rng.randrange(8)
    if rng.random() < 1 / 1000:
        return bomb(rng, header)
    if what == 0:
        streams = other_model(rng, header, streams)
    for _ in range(rng.randint(1, 2) if what < 5 else 0):
        number = rng.randrange(len(streams))
        streams[number] = edit_payload(rng, streams[number])
    payloads = [compressed(rng, raw) for raw in streams]
    for entry, raw, payload in zip(header["streams"], streams, payloads, strict=True):
        if rng.random() < 0.95:
            entry |= {"payload_bytes": len(payload), "window": codecs.window_bits(payload)}
        if rng.random() < 0.9:
            entry["sha256"] = hashlib.sha256(raw).hexdigest()
        if rng.random() < 0.2:
            entry["raw_bytes"] = len(raw)
    for _ in range(rng.randint(1, 2) if what >= 5 else rng.random() < 0.1):
        alter(rng, header)
    magic = b"SKCMODEM" if rng.random() < 0.01 else b"SKCMODEL"
    return framed(rng, magic, json_text(rng, header), payloads)


def framed(rng: Random, magic: bytes, text: bytes, payloads: list[bytes]) -> bytes:
    """Return the bytes of an artifact file."""
    return magic + length_field(rng, len(text), 4) + text + b"".join(payloads)


def compressed(rng: Random, raw: bytes) -> bytes:
    """Return a brotli stream with a window that a writer may choose, at times one that it may not, or a damaged one."""
    window = rng.randint(10, 24) if rng.random() < 0.1 else 16
    payload = packed(raw, window)
    return edit(rng, payload) if rng.random() < 0.02 else payload


@functools.lru_cache(256)
def packed(raw: bytes, window: int) -> bytes:
    """Return a brotli stream; those of streams that were not changed are made once."""
    return brotli.compress(raw, quality=2, lgwin=window)  # 0 and 1 take no window below 2^18


def other_model(rng: Random, header: dict[str, Any], streams: list[bytes]) -> list[bytes]:
    """Change a field of the model, and tensors and streams with it: a consistent file of another small model."""
    field = rng.choice([*(name for name in SIZES if name != "head.bias"), "matrix_storage", "embedding.storage"])
    value = rng.choice(STORAGES) if "storage" in field else rng.choice((1, 2, 3, 4, 6, 8, 12, 64, 65, 1024))
    before = {entry["name"]: raw for entry, raw in zip(header["streams"], streams, strict=True)}
    sizes = set_model(header, field, value, 1 << 16)
    if sizes is None:
        return streams
    return [np.resize(np.frombuffer(before.get(n, b"\x3c"), np.uint8), size).tobytes() for n, size in sizes.items()]


def set_model(header: dict[str, Any], field: str, value: Any, most: int) -> dict[str, int] | None:
    """Set a field of a header's model and what follows from it, unless it is no model or has over `most` bytes.

    Returns the bytes of each stream; checksums and payload sizes are left open.
    """
    part, _, name = field.rpartition(".")
    (header["model"].setdefault(part, {}) if part else header["model"])[name] = (
        value  # what is at its default is absent
    )
    try:
        table = param_table(from_json(ModelConfig, header["model"]))
    except ConfigError:
        return None
    sizes = codecs.stream_sizes(table)
    if sum(sizes.values()) > most:
        return None
    header["tensors"] = [[name, row.storage, list(row.shape)] for name, row in table.items()]
    header["streams"] = [{"name": name, "raw_bytes": size, "sha256": ""} for name, size in sizes.items()]
    return sizes


def bomb(rng: Random, header: dict[str, Any]) -> bytes:
    """Return a small file that is right in every way and holds a model of up to 96 MB, all codes alike."""
    header["model"]["dim"], field = 64, rng.choice(("vocab", "mlp.hidden"))
    for bits in range(20, 13, -1):
        if set_model(header, field, 1 << bits, 96 << 20):
            break
    payloads = []
    for entry in header["streams"]:
        payload, entry["sha256"] = alike(entry["raw_bytes"])
        entry |= {"payload_bytes": len(payload), "window": codecs.window_bits(payload)}
        payloads.append(payload)
    return framed(rng, b"SKCMODEL", json_text(rng, header), payloads)


@functools.lru_cache(64)
def alike(size: int) -> tuple[bytes, str]:
    """Return the brotli stream of `size` equal bytes and their checksum, without ever holding them."""
    packer, digest, payload, block = brotli.Compressor(quality=1), hashlib.sha256(), b"", 1 << 20
    for at in range(0, size, block):
        part = b"\x3c" * min(block, size - at)
        payload += packer.process(part)
        digest.update(part)
    return payload + packer.finish(), digest.hexdigest()


# Shards.


def shard_files(folder: Path) -> list[bytes]:
    """Return shards of 1 and of 300 tokens."""
    out = []
    for count in (1, 300):
        write_shard(str(folder / "s"), np.arange(count) * 211 % 65_536)
        out.append((folder / "s").read_bytes())
    return out


def mutate_shard(rng: Random, whole: bytes) -> bytes:
    """Return a shard with header words or tokens changed, the count repaired or not."""
    words, tokens = list(struct.unpack("<256i", whole[:1024])), whole[1024:]
    if rng.random() < 0.5:
        tokens = edit(rng, tokens)
        if rng.random() < 0.7:
            words[2] = len(tokens) // 2
    if rng.random() < 0.7:
        at = rng.choice((0, 1, 2, 2, rng.randrange(256)))
        values = (0, 1, -1, words[at] + 1, words[at] - 1, -words[at], 2**31 - 1, -(2**31), 2**30, rng.getrandbits(31))
        words[at] = max(-(2**31), min(2**31 - 1, rng.choice(values)))
    header = struct.pack("<256i", *words)
    return (header[: rng.randrange(1025)] if rng.random() < 0.05 else header) + tokens


# Checkpoints.


def checkpoint_files(folder: Path) -> list[bytes]:
    """Return the checkpoint of a run that no engine trained."""
    run = Run.create(folder / "run", RUN, b"no tokenizer")
    params = start_values(RUN.model, 1)
    state = {name: np.full(shape, 0.5, np.float32) for name, shape in optimizer_slots(RUN.model, RUN.train).items()}
    engine = SimpleNamespace(dtype="float32", quantise=True, params=lambda: params, optimizer=lambda: state)
    run.save(cast(Engine, engine), 3, 1.5)
    return [run.checkpoint_path.read_bytes()]


def mutate_checkpoint(rng: Random, whole: bytes) -> bytes:
    """Return a safetensors file with tensors, their entries or the metadata changed before it was framed."""
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    state = json.loads(header.pop("__metadata__")["skc"])
    tensors = []
    for name, entry in header.items():
        low, high = entry["data_offsets"]
        tensors.append([name, entry["dtype"], entry["shape"], whole[start + low : start + high]])
    what = rng.randrange(8)
    for _ in range(rng.randint(1, 2) if what < 4 else 0):
        alter_tensors(rng, tensors)
    if rng.random() < 0.8:
        ordered = sorted(tensors, key=lambda tensor: tensor[0])
        state["sha256"] = hashlib.sha256(b"".join(raw for *_, raw in ordered)).hexdigest()
    if what in (4, 5):
        alter(rng, state)
    text = json_text(rng, state).decode("latin-1")
    header, end = cast(dict[str, Any], {"__metadata__": {"skc": text}}), 0
    for name, dtype, shape, raw in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(raw)]}
        end += len(raw)
    if what in (6, 7):
        alter(rng, header)
    text = json_text(rng, header, canonical=False)
    text += b" " * (-len(text) % 8)
    return length_field(rng, len(text), 8) + text + b"".join(raw for *_, raw in tensors)


OTHER_TYPES = (("F64", 2), ("I32", 1), ("F16", 0.5), ("BF16", 0.5), ("I64", 2), ("BOOL", 0.25), ("F4", 0.125))
"""Names of safetensors' types, and their size in float32s."""


def alter_tensors(rng: Random, tensors: list[list[Any]]) -> None:
    """Change one tensor of a list of [name, dtype, shape, bytes] in place."""
    at, what = rng.randrange(len(tensors)), rng.randrange(8)
    name, dtype, shape, raw = tensors[at]
    if what < 2:
        tensors[at][3] = edit_payload(rng, raw)
    elif what == 2:
        kind, size = rng.choice(OTHER_TYPES)
        tensors[at][1] = kind
        tensors[at][3] = np.resize(np.frombuffer(raw, np.uint8), int(len(raw) * size)).tobytes()
    elif what == 3:
        tensors[at][2] = rng.choice((shape[::-1], [len(raw) // 4], [1, *shape], [0], [], [*shape[:-1], 2**62]))
    elif what == 4:
        del tensors[at]
    elif what == 5:
        tensors.append([str(near(rng, name)), dtype, shape, raw])
    elif what == 6:
        tensors[at][0] = rng.choice((str(near(rng, name)), name.replace("param", "optim"), "x", "param/", "a" * 3000))
    else:
        other = rng.choice(tensors)
        tensors[at][3], other[3] = other[3], tensors[at][3]
