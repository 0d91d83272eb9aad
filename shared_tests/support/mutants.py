"""Hostile files for `support.mutations`: whole artifacts, shards and checkpoints of a few KB, and changes of them.

A change is made to what a file holds, which is then coded and framed as a writer would, checksums repaired or not;
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

import numpy as np

from core.config import ConfigError, ModelConfig, RunConfig, changed, chosen, from_json
from core.data.shards import write_shard
from core.engine.optimizer_state import optimizer_slots
from core.engine.protocol import Engine
from core.export import codecs, coder
from core.export.artifact import write_artifact
from core.export.coder import encode, lanes
from core.model.params import Param, param_table, start_values
from core.model.storage import LARGEST, STORAGES, Stored, storage_class
from core.training.run import Run
from shared_tests.reference.storage import quantise, stored_model

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
        ("ternary/64g", "int5/row", None),
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


def mutate_artifact(rng: Random, whole: bytes) -> bytes:
    """Return an artifact with tensors, tables, words, model or header changed before it was framed."""
    at = 12 + int.from_bytes(whole[8:12], "little")
    header, payload, what = json.loads(whole[12:at]), whole[at:], rng.randrange(8)
    if rng.random() < 1 / 1000:
        return bomb(rng, header)
    if what < 3:
        payload = other_tensors(rng, whole, header, what == 0)
    elif what < 5:
        payload = other_coding(rng, payload)
    repair(header, payload, rng.random() < 0.95, rng.random() < 0.9)
    for _ in range(rng.randint(1, 2) if what >= 5 else rng.random() < 0.1):
        alter(rng, header)
    magic = b"SKCMODEM" if rng.random() < 0.01 else b"SKCMODEL"
    return framed(rng, magic, json_text(rng, header), payload)


def repair(header: dict[str, Any], payload: bytes, size: bool = True, checksum: bool = True) -> None:
    """Make a header say what follows it."""
    header |= {"payload_bytes": len(payload)} if size else {}
    header |= {"payload_sha256": hashlib.sha256(payload).hexdigest()} if checksum else {}


def framed(rng: Random, magic: bytes, text: bytes, payload: bytes) -> bytes:
    """Return the bytes of an artifact file."""
    return magic + length_field(rng, len(text), 4) + text + payload


def other_coding(rng: Random, payload: bytes) -> bytes:
    """Return a payload with its tables, its states and words, or the length between them changed."""
    end = 4 + int.from_bytes(payload[:4], "little")
    tables, coded = payload[4:end], payload[end:]
    if rng.random() < 0.6:
        tables = edit_payload(rng, tables)
    else:
        coded = edit_payload(rng, coded)
    return length_field(rng, len(tables), 4) + tables + coded


@functools.lru_cache(len(MODELS))
def tensors_of(whole: bytes) -> dict[str, Stored]:
    """Return what an artifact holds."""
    at = 12 + int.from_bytes(whole[8:12], "little")
    model = from_json(ModelConfig, json.loads(whole[12:at])["model"])
    return codecs.unpack(memoryview(whole)[at:], param_table(model))


def other_tensors(rng: Random, whole: bytes, header: dict[str, Any], other_model: bool) -> bytes:
    """Return the payload of an artifact with some numbers changed, also to such that no writer codes.

    With `other_model` a field of the model is changed first, and the tensors are made to fit.
    """
    table, stored = param_table(from_json(ModelConfig, header["model"])), dict(tensors_of(whole))
    if other_model:
        field = rng.choice([*(name for name in SIZES if name != "head.bias"), "matrix_storage", "embedding.storage"])
        value = rng.choice(STORAGES) if "storage" in field else rng.choice((1, 2, 3, 4, 6, 8, 12, 64, 65, 1024))
        changed_table = set_model(header, field, value, 1 << 14)
        if changed_table is not None:
            table, weights = changed_table, start_values(from_json(ModelConfig, header["model"]), 1)
            stored = {name: quantise(weights[name], row.storage) for name, row in table.items()}
    for _ in range(rng.randint(1, 2)):
        name, row = rng.choice(list(table.items()))
        stored[name] = other_numbers(rng, row, stored[name])
    return codecs.pack_unchecked(stored, table) if rng.random() < 0.7 else by_other_tables(rng, stored, table)


def by_other_tables(rng: Random, stored: dict[str, Stored], table: dict[str, Param]) -> bytes:
    """Return the payload of the very same tensors, one run of it coded by a table that is not the writer's."""
    plans, runs = [], []
    for names in codecs.together(table):
        for plan, part in codecs.planned(names, stored, table):
            plans.append(plan.data)
            runs.append(part)
    number = rng.randrange(len(plans))
    at = rng.randrange(len(runs[number]))
    symbols, was = runs[number][at]
    first, last = was.data[1:3]
    other = bytes([0, rng.randint(0, first), last]) if rng.random() < 0.5 else bytes([1, first, last])
    if other[0]:
        other += bytes(rng.randint(1, 255) for _ in range(first, last + 1))
    runs[number][at] = coder.SymbolRun(symbols, coder.table_of(other))
    plans[number] = plans[number][:1] + plans[number][1:].replace(was.data, other)
    coded = encode([run for part in runs for run in part], lanes(codecs.values_in(table)))
    return sum(map(len, plans)).to_bytes(4, "little") + b"".join(plans) + coded


def other_numbers(rng: Random, row: Param, stored: Stored) -> Stored:
    """Return a tensor with some codes or scales changed: any of their type's bits that the coder has symbols for."""
    codes, scales = stored.codes.copy(), None if stored.scales is None else stored.scales.copy()
    cls = storage_class(row.storage)
    halves = codes if scales is None else scales
    for _ in range(rng.randint(1, 3)):
        if scales is None or rng.random() < 0.5:
            at, bits = rng.randrange(halves.size), rng.choice((rng.randrange(1 << 16), 0x7C00, 0x7E00, 0xFC00, 0x3FF))
            halves.flat[at] = np.uint16(bits).view(np.float16)
        elif cls == "fp8":
            codes.flat[rng.randrange(codes.size)] = rng.choice((448.0, -0.0, 2.0**-9, -1.125))
        else:
            codes.flat[rng.randrange(codes.size)] = rng.randint(-LARGEST[cls], LARGEST[cls])
    return Stored(codes, scales)


def set_model(header: dict[str, Any], field: str, value: Any, most: int) -> dict[str, Param] | None:
    """Set a field of a header's model and what follows from it, unless it is no model or has over `most` values.

    Returns its table; what is said of the payload is left as it is.
    """
    part, _, name = field.rpartition(".")
    model = copied(header["model"])
    (model.setdefault(part, {}) if part else model)[name] = value
    try:
        config = from_json(ModelConfig, model)
        table = param_table(config)
    except ConfigError:
        return None
    if sum(row.size for row in table.values()) > most:
        return None
    header["model"] = copied(chosen(config))  # what is at its default is absent
    tensors = [[name, row.storage, list(row.shape)] for name, row in table.items()]
    header["tensors_sha256"] = hashlib.sha256(json.dumps(tensors, separators=(",", ":")).encode()).hexdigest()
    return table


def bomb(rng: Random, header: dict[str, Any]) -> bytes:
    """Return a small file that is right in every way and holds a model of up to 96 M values, all codes alike."""
    header["model"]["dim"], field, table = 64, rng.choice(("vocab", "mlp.hidden")), None
    for bits in range(20, 13, -1):
        if table := set_model(header, field, 1 << bits, 96 << 20):
            break
    assert table is not None
    alike, plans = bytes([0, 0, 0]), b""  # one symbol takes no bits, however often it is there
    for names in codecs.together(table):
        if table[names[0]].storage != "float16":
            plans += bytes([0, 0, 1, 1])
        plans += bytes([0, 0x00, 0x3C, 0]) + alike
    states = encode([], lanes(codecs.values_in(table)))
    payload = len(plans).to_bytes(4, "little") + plans + states
    repair(header, payload)
    return framed(rng, b"SKCMODEL", json_text(rng, header), payload)


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
