"""Files that are no official checkpoints, or damaged, or hostile: one line, nothing run, nothing left. Budget: 15 s."""

import io
import math
import pickle
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core import rng
from core.cli import main
from core.official import checkpoint as official
from core.official.checkpoint import model_of, read_official, to_ours
from shared_tests.support.killed import small_data
from shared_tests.support.official_files import EMBEDDING, Tensors, drawn, int8, packed, saved, small, state

FUZZ = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a prepared folder of 60 short documents, cut by the bundled tokenizer."""
    return small_data(tmp_path_factory.mktemp("text"), 60)


class Runs:
    """Pickles as a call, which runs when it is read."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.made = call, arguments

    def __reduce__(self) -> Any:
        return self.made


def archive(path: Path, edit: Any = lambda text: text, **more: bytes) -> Path:
    """Write a torch.save archive of the small model whose data.pkl is edited, with more files."""
    buffer = io.BytesIO()
    torch.save(small(), buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, edit(old.read(name)) if name.endswith("data.pkl") else old.read(name))
        for name, part in more.items():
            new.writestr(f"archive/data/{name}", part)
    return path


def npy(descr: str, shape: str, body: bytes = b"") -> bytes:
    """Return a .npy file with a header of one's own."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + body


def npz(path: Path, part: bytes) -> Path:
    """Write an archive of one array."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("tok_emb.weight.npy", part)
    return path


def cut(path: Path) -> Path:
    """Drop the second half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def raw(path: Path, content: bytes) -> Path:
    """Write bytes."""
    path.write_bytes(content)
    return path


def without(key: str) -> Tensors:
    """Return the small model without one tensor."""
    return {name: value for name, value in small().items() if name != key}


def form(**changes: Any) -> dict[str, Any]:
    """Return an int8 artifact of the small model's embedding, with changed parts."""
    table = small()[EMBEDDING]
    codes, scales = {EMBEDDING: table.to(torch.int8)}, {EMBEDDING: torch.ones(len(table), dtype=torch.float16)}
    parts = {"quantized": codes, "scales": scales, "dtypes": {EMBEDDING: "bfloat16"}, "passthrough": without(EMBEDDING)}
    return {"__quant_format__": "int8_clean_per_row_v1", **parts, **changes}


GAIN, SCALE = "blocks.0.attn.q_gain", "blocks.1.attn_scale"
NESTED = b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"K\x01s."
MANY = 4 << 20
HOSTILE: dict[str, tuple[Any, str]] = {
    "code": (lambda p: saved(p, {"x": Runs(open, "ran", "w")}), "could run code"),
    "memory": (lambda p: saved(p, {"x": Runs(bytearray, 10**13)}), "could run code"),
    "code, newer protocol": (
        lambda p: archive(p, lambda _: pickle.dumps({"x": Runs(open, "ran", "w")}, 4)), "STACK_GLOBAL"
    ),
    "code inside zlib": (lambda p: packed(p, {"x": Runs(open, "ran", "w")}), "could run code"),
    "pickle of the MLX script": (lambda p: raw(p, zlib.compress(pickle.dumps({"x": Runs(open, "ran", "w")}))), ".npz"),
    "bare pickle": (lambda p: raw(p, pickle.dumps({"x": Runs(open, "ran", "w")})), "bare pickle"),
    "tuples in tuples": (lambda p: archive(p, lambda _: NESTED), "200,000 tuples"),
    "no pickle": (lambda p: archive(p, lambda _: b"\x80\x02garbage"), "not a pickle"),
    "pickle that ends early": (lambda p: archive(p, lambda text: text[:40]), "not a pickle"),
    "storage larger than its file": (
        lambda p: archive(p, lambda text: text.replace(b"M\x00\x10t", b"J\0\0\0\x10t")), "torch.load refuses it"
    ),
    "tensor of no bytes": (lambda p: saved(p, {"x": torch.zeros(1).expand(10**12)}), "1,000,000,000,000 values"),
    "zip cut off": (lambda p: cut(saved(p, small())), "damaged zip"),
    "zip that inflates": (lambda p: archive(p, big=bytes(MANY)), "zip archive of"),
    "zlib that inflates": (lambda p: raw(p, zlib.compress(bytes(MANY))), "inflates to more"),
    "zlib cut off": (lambda p: cut(packed(p, small())), "cut off"),
    "zlib of nothing known": (lambda p: raw(p, zlib.compress(b"hello")), "no torch.save archive"),
    "large file": (lambda p: raw(p, bytes(MANY)), "at most"),
    "text": (lambda p: raw(p, b"hello"), "not an official checkpoint"),
    "empty file": (lambda p: raw(p, b""), "not an official checkpoint"),
    "folder": (lambda p: p.mkdir() or p, "is a folder, expected a regular file"),
    "zip of something else": (lambda p: raw(p, cut_zip()), "no data.pkl"),
    "missing tensor": (lambda p: saved(p, without(SCALE)), f"{SCALE} is missing"),
    "nothing": (lambda p: saved(p, {}), "tok_emb.weight is missing"),
    "extra tensor": (lambda p: saved(p, small() | {"blocks.0.bias": torch.ones(2)}), "blocks.0.bias is not"),
    "untied head": (lambda p: saved(p, small() | {"lm_head.weight": torch.ones(2)}), "TIE_EMBEDDINGS=0"),
    "misshapen": (lambda p: saved(p, small() | {SCALE: torch.ones(63)}), f"{SCALE} has shape (63,), expected (64,)"),
    "heads": (lambda p: saved(p, small() | {GAIN: torch.ones(5)}), "5 heads"),
    "no heads": (lambda p: saved(p, small() | {GAIN: torch.ones(0)}), "none of them 0"),
    "NaN": (lambda p: saved(p, small() | {SCALE: torch.full((64,), math.nan)}), f"{SCALE} holds NaN"),
    "integers": (lambda p: saved(p, small() | {SCALE: torch.ones(64, dtype=torch.int8)}), "type torch.int8"),
    "number": (lambda p: saved(p, small() | {SCALE: 3}), f"'{SCALE}': int"),
    "list": (lambda p: saved(p, [torch.ones(2)]), "holds list"),
    "name": (lambda p: saved(p, small() | {"a\x1b[2J": torch.ones(2)}), r"a\x1b[2J"),
    "format": (lambda p: packed(p, form(__quant_format__="int6_v2")), "'int6_v2'; only int8_clean_per_row_v1"),
    "no scales": (lambda p: packed(p, form(scales={})), "needs a scale"),
    "short scales": (lambda p: packed(p, form(scales={EMBEDDING: torch.ones(3).half()})), "(3,) do not fit"),
    "scales of nothing": (lambda p: packed(p, form(scales={"x": torch.ones(3)})), "no codes"),
    "type": (lambda p: packed(p, form(dtypes={EMBEDDING: "save"})), "type 'save'"),
    "type of a passthrough": (
        lambda p: packed(p, form(passthrough_orig_dtypes={SCALE: ["float32"]})), "type ['float32']"
    ),
    "twice": (lambda p: packed(p, form(passthrough=small())), "in passthrough too"),
    "other key": (lambda p: packed(p, form(code="x")), "'code' is no part"),
    "NaN of a scale": (lambda p: packed(p, form(scales={EMBEDDING: torch.full((1024,), math.inf)})), "NaN or infinity"),
    "npz of objects": (lambda p: npz(p, npy("|O", "(2,)", pickle.dumps(Runs(open, "ran", "w")))), "type '|O'"),
    "npz that claims": (lambda p: npz(p, npy("<f4", "(1000000000000,)")), "does not fit"),
    "npz of negative size": (lambda p: npz(p, npy("<f4", "(-1, -1)", bytes(4))), "not a .npy array"),
    "npz header": (lambda p: npz(p, npy("<f4", "(", bytes(4))), "not a .npy array"),
    "other vocabulary": (lambda p: saved(p, small(vocab=100)), "has 100 tokens, but the tokenizer of"),
}  # fmt: skip


def cut_zip() -> bytes:
    """Return a zip archive that is nobody's checkpoint."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("readme.txt", "hello")
    return buffer.getvalue()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_line_and_leaves_nothing(
    name: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, words = HOSTILE[name]
    monkeypatch.setattr(official, "MAX_BYTES", MANY - 1)
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path / "final_model.pt")
    capsys.readouterr()
    assert main(["import-official", str(path), "--out", str(tmp_path / "run"), "--data", data, "--seq", "64"]) == 2
    line = capsys.readouterr().err
    assert words in line and line.endswith("\n") and line[:-1].isprintable(), line
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no --out, and no call was made


def test_a_bomb_is_not_inflated_before_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(official, "MAX_BYTES", 1 << 20)
    path = raw(tmp_path / "final_model.int8.ptz", zlib.compress(bytes(64 << 20)))
    tracemalloc.start()
    with pytest.raises(official.OfficialError, match="inflates to more"):
        read_official(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20, peak


def test_torch_refuses_code_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first guard off: weights_only is the second."""
    from backends.cuda import official as reader

    monkeypatch.setattr(reader, "_check_pickle", lambda path, text: None)
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "final_model.pt", {"x": Runs(open, "ran", "w")})
    with pytest.raises(official.OfficialError, match="torch.load refuses it .UnpicklingError"):
        read_official(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["state dict", "int8", "npz"])
def test_random_damage_is_refused_or_harmless(kind: str, tmp_path: Path) -> None:
    """Bytes are changed where they have meaning, under sound checksums: the pickle, or the header of an array."""
    path = tmp_path / "x.npz"
    if kind == "npz":
        np.savez(path, **drawn("mini"))  # type: ignore[arg-type]
    else:
        saved(path, int8("mini") if kind == "int8" else state("mini"))
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    names = [name for name in parts if name.endswith(("data.pkl", ".npy"))]
    refused = 0
    for trial in range(FUZZ):
        draws = rng.integers16(trial, f"official/{kind}", 8).tolist()
        name = names[draws[0] % len(names)]
        text = bytearray(parts[name])
        for place, value in zip(draws[1:4], draws[4:7], strict=True):
            text[place % min(len(text), 4096)] = value % 256
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as new:
            for key, part in parts.items():
                new.writestr(key, bytes(text) if key == name else part)
        try:
            found = read_official(raw(path, buffer.getvalue()))
            to_ours(found, model_of(path, found, rope_base=1e4, softcap=30.0, norm_eps=None, bos=1))
        except official.OfficialError:
            refused += 1
    assert refused > FUZZ // 10
