"""Reads checkpoints of the two official scripts (openai/parameter-golf) safely, and turns them into our weights.

train_gpt.py (CUDA) writes final_model.pt and final_model.int8.ptz, train_gpt_mlx.py an .npz. Their GPT is our
`baseline` under other names, except that train_gpt.py turns RoPE by minus the angle: (x1 cos + x2 sin,
x2 cos - x1 sin). With y = (x2, x1) that is our turn (y1 cos - y2 sin, y1 sin + y2 cos), halves swapped; the norm and
the dot products of a head do not mind the order of its channels. So the rows of its q and k matrices change places,
half against half of each head, and nothing else does. docs/official.md has the proof in figures.
"""

import hashlib
import importlib
import importlib.util
import io
import math
import re
import zipfile
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from core.checks import ConfigError
from core.config import changed
from core.engine.loading import EXTRAS
from core.engine.protocol import Arrays
from core.files import FileError, open_input, read_bounded
from core.formats.npy import NpyError, read_header
from core.model.config import ModelConfig
from core.model.params import check_arrays, param_table
from core.official.refusal import MAX_BYTES, MAX_TENSORS, MAX_VALUES, OfficialError, excerpt, fail
from core.presets.transformers import BASELINE

MAX_ENTRIES = 2 * MAX_TENSORS
"""Files in a zip archive."""
BFLOAT16 = ("|V2", "<V2")
"""What bfloat16 is called in an .npz of MLX."""
Script = Literal["train_gpt.py", "train_gpt_mlx.py"]
EPS: dict[Script, float] = {"train_gpt.py": float(np.finfo(np.float32).eps), "train_gpt_mlx.py": 1e-6}
"""Epsilon of the RMS norms; train_gpt.py leaves it to torch, which takes float32's (docs/official.md)."""
NAMES = {
    "mixer.q.weight": "attn.c_q.weight", "mixer.k.weight": "attn.c_k.weight", "mixer.v.weight": "attn.c_v.weight",
    "mixer.o.weight": "attn.proj.weight", "mixer.q_gain": "attn.q_gain", "mixer_scale": "attn_scale",
    "mlp.up.weight": "mlp.fc.weight", "mlp.down.weight": "mlp.proj.weight", "mlp_scale": "mlp_scale",
    "stream_mix": "resid_mix", "embed_mix": "resid_mix",
}  # fmt: skip
"""Our name of a block's parameter -> the official one; the two mixes are the rows of one official tensor."""
TOP = {"embed.weight": "tok_emb.weight", "skips.weight": "skip_weights"}
TURNED = ("mixer.q.weight", "mixer.k.weight")
WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put in front of every name."""


class OfficialCheckpoint(NamedTuple):
    """What an official checkpoint holds."""

    script: Script
    """Whose model it is: that decides the sense of RoPE and the epsilon of the norms."""
    kind: str
    """state dict, int8 or npz."""
    arrays: Arrays
    """Finite float32 weights under the official names."""
    sha256: str
    size: int
    """Bytes of the file."""


def read_official(path: str | Path) -> OfficialCheckpoint:
    """Read an official checkpoint; OfficialError says what is wrong with it, ConfigError that PyTorch is needed.

    Nothing in the file is executed, and time and memory (a few times MAX_BYTES) are bounded whatever the bytes say.
    """
    data = _read(path)
    script: Script = "train_gpt.py"
    if data[:4] == b"PK\x03\x04":
        parts = _unzip(path, data)
        if all(name.endswith(".npy") for name in parts):
            script, kind, arrays = "train_gpt_mlx.py", "npz", _npz(path, parts)
        else:
            kind, arrays = _torch(path, parts)
    elif data[:1] == b"\x78" and int.from_bytes(data[:2], "big") % 31 == 0:  # the header of a zlib stream
        raw = _inflate(path, data)
        if raw[:1] == b"\x80":
            fail(
                path,
                "a pickle inside zlib, as train_gpt_mlx.py writes its .int8.ptz: reading one runs whatever code is in "
                "it, so it is not read; give the .npz that the script wrote beside it, which holds the same model",
            )
        if raw[:4] != b"PK\x03\x04":
            fail(path, "zlib, but with no torch.save archive inside; give final_model.pt or final_model.int8.ptz")
        kind, arrays = _torch(path, _unzip(path, raw))
    elif data[:1] == b"\x80":
        fail(path, "a bare pickle, which may run code when it is read; give what torch.save writes today (a zip)")
    else:
        fail(path, "not an official checkpoint; give final_model.pt, final_model.int8.ptz, or the .npz of the MLX one")
    arrays = _unwrapped(arrays)
    _check(path, arrays)
    return OfficialCheckpoint(script, kind, arrays, hashlib.sha256(data).hexdigest(), len(data))


def _read(path: str | Path) -> bytes:
    try:
        with open_input(path, MAX_BYTES) as file:
            return read_bounded(path, file, MAX_BYTES)
    except OSError as error:
        raise OfficialError(f"{path}: cannot be read: {error.strerror}; give the path of a checkpoint") from error
    except FileError as error:
        raise OfficialError(str(error)) from error


def _inflate(path: str | Path, data: bytes) -> bytes:
    """Return what a zlib stream holds; OfficialError if it is damaged or holds more than MAX_BYTES."""
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(data, MAX_BYTES + 1)
    except zlib.error as error:
        raise OfficialError(f"{path}: damaged zlib stream ({error}); copy the file again") from error
    if len(raw) > MAX_BYTES:
        fail(path, f"inflates to more than the {MAX_BYTES:,} bytes that are read")
    if not stream.eof or stream.unused_data:
        fail(path, "zlib stream cut off, or followed by other bytes; copy the file again")
    return raw


def _unzip(path: str | Path, data: bytes) -> dict[str, bytes]:
    """Return the files of a zip archive; OfficialError if it is damaged, or they are over MAX_ENTRIES or MAX_BYTES."""
    if data.count(b"PK\x01\x02") > MAX_ENTRIES:  # before zipfile makes an object of each entry
        fail(path, f"zip archive of more than {MAX_ENTRIES} files")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            total = sum(entry.file_size for entry in entries)  # read() gives no more of an entry than it says
            if total > MAX_BYTES:
                fail(path, f"zip archive of {total:,} bytes; at most {MAX_BYTES:,} are read")
            if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
                fail(path, "zip archive packed with something else than deflate, which no official script uses")
            return {entry.filename: archive.read(entry) for entry in entries}
    except OfficialError:
        raise
    except Exception as error:  # zipfile has no one type for what hostile bytes make it raise
        raise OfficialError(f"{path}: damaged zip archive ({excerpt(str(error))}); copy the file again") from error


def _torch(path: str | Path, parts: dict[str, bytes]) -> tuple[str, Arrays]:
    """Return kind and arrays of what torch.save wrote."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(f"{path}: reading what torch.save wrote needs PyTorch: pip install -e '.[{EXTRAS['cuda']}]'")
    return importlib.import_module("backends.cuda.official").read_state(path, parts)


def _npz(path: str | Path, parts: dict[str, bytes]) -> Arrays:
    """Return the arrays of what mx.savez wrote: float32, float16, or bfloat16, which it calls V2."""
    if len(parts) > MAX_TENSORS:
        fail(path, f"{len(parts)} arrays; at most {MAX_TENSORS}")
    return {name.removesuffix(".npy"): _npy(path, name, part) for name, part in parts.items()}


def _npy(path: str | Path, name: str, part: bytes) -> np.ndarray:
    file = io.BytesIO(part)
    try:
        kind, fortran, shape = read_header(file)
    except NpyError as error:
        raise OfficialError(f"{path}: {excerpt(name)}: {error}") from error
    body = memoryview(part)[file.tell() :]
    if kind not in ("<f4", "<f2", *BFLOAT16):
        fail(path, f"{excerpt(name)}: type {excerpt(kind)}; expected float32, float16 or bfloat16")
    size = 4 if kind == "<f4" else 2
    if math.prod(shape) * size != len(body):
        fail(path, f"{excerpt(name)}: shape {excerpt(shape)} does not fit its {len(body):,} bytes")
    if math.prod(shape) > MAX_VALUES:
        fail(path, f"{excerpt(name)}: {math.prod(shape):,} values; at most {MAX_VALUES:,}")
    flat = np.frombuffer(body, np.uint16 if kind in BFLOAT16 else kind)
    if kind in BFLOAT16:
        flat = (flat.astype(np.uint32) << 16).view(np.float32)  # bfloat16 is the upper half of a float32
    return np.ascontiguousarray(flat.astype(np.float32).reshape(shape, order="F" if fortran else "C"))


def _unwrapped(arrays: Arrays) -> Arrays:
    """Return the arrays under their own names, without the prefix that a wrapper put in front of all of them."""
    wrapper = next((w for w in WRAPPERS if arrays and all(name.startswith(w) for name in arrays)), None)
    return arrays if wrapper is None else _unwrapped({name[len(wrapper) :]: value for name, value in arrays.items()})


def _check(path: str | Path, arrays: Arrays) -> None:
    """Refuse names that cannot be printed, too many values, and values that are not finite."""
    values = sum(value.size for value in arrays.values())
    if values > MAX_VALUES or len(arrays) > MAX_TENSORS:
        fail(path, f"{len(arrays):,} tensors, {values:,} values; at most {MAX_TENSORS:,} and {MAX_VALUES:,}")
    for name, value in arrays.items():
        if not re.fullmatch(r"[A-Za-z0-9_.]{1,200}", name, re.ASCII):
            fail(path, f"{excerpt(name)} is not the name of a tensor of the official model")
        if not np.isfinite(value).all():
            fail(path, f"{name} holds NaN or infinity: the training went wrong; take an earlier checkpoint")


def model_of(
    path: str | Path,
    checkpoint: OfficialCheckpoint,
    *,
    rope_base: float,
    softcap: float,
    norm_eps: float | None,
    bos: int,
) -> ModelConfig:
    """Return the model that a checkpoint's shapes say; OfficialError names what is missing, extra or misshapen.

    What shapes do not say is given: `rope_base`, `softcap`, the tokenizer's `bos`, and `norm_eps` (None: EPS).
    """
    arrays = checkpoint.arrays
    if "lm_head.weight" in arrays:
        fail(path, "lm_head.weight: trained with TIE_EMBEDDINGS=0; only models whose head is the embedding are read")
    vocab, dim = _shape(path, arrays, "tok_emb.weight", 2)
    (heads,) = _shape(path, arrays, "blocks.0.attn.q_gain", 1)
    keys, _ = _shape(path, arrays, "blocks.0.attn.c_k.weight", 2)
    hidden, _ = _shape(path, arrays, "blocks.0.mlp.fc.weight", 2)
    head, rest = divmod(dim, heads)
    if rest or head % 2:
        fail(path, f"{heads} heads (blocks.0.attn.q_gain) do not cut width {dim} into heads of an even width")
    if keys % head or heads % (keys // head):
        fail(path, f"blocks.0.attn.c_k.weight: {keys} rows are no number of key heads that {heads} heads can share")
    layers = {match[1] for match in (re.match(r"blocks\.(\d{1,4})\.", name) for name in arrays) if match}
    eps = EPS[checkpoint.script] if norm_eps is None else norm_eps
    model = changed(BASELINE.model, {
        "vocab": vocab, "dim": dim, "layers": len(layers), "bos": bos, "norm_eps": eps, "mlp.hidden": hidden,
        "attention.heads": heads, "attention.kv_heads": keys // head, "attention.rope_dims": head,
        "attention.rope_base": rope_base, "head.softcap": softcap, "skips.on": len(layers) > 1,
    })  # fmt: skip
    try:
        check_arrays(arrays, _shapes(model), str(path))
    except ValueError as error:
        raise OfficialError(f"{error} (the official model of {len(layers)} layers, {heads} heads)") from error
    return model


def _shape(path: str | Path, arrays: Arrays, name: str, ndim: int) -> tuple[int, ...]:
    if name not in arrays:
        there = ", ".join(list(arrays)[:3]) or "nothing"
        fail(path, f"{name} is missing, so this is no model of the official scripts; it holds {there}")
    if arrays[name].ndim != ndim or 0 in arrays[name].shape:
        fail(path, f"{name} has shape {arrays[name].shape}; expected {ndim} dimensions, none of them 0")
    return arrays[name].shape


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every official tensor of a model."""
    table = param_table(model)
    shapes = {official_name(name): row.shape for name, row in table.items()}
    mixes = {name: (2, model.dim) for name in shapes if name.endswith("resid_mix")}
    return {"skip_weights": (model.layers // 2, model.dim), **shapes, **mixes}


def official_name(name: str) -> str:
    """Return the official name of one of our parameters."""
    if name in TOP:
        return TOP[name]
    _, index, rest = name.split(".", 2)
    return f"blocks.{index}.{NAMES[rest]}"


def to_ours(checkpoint: OfficialCheckpoint, model: ModelConfig) -> Arrays:
    """Return a checkpoint's weights under our names, in table order, q and k in our sense of RoPE."""
    weights = {}
    for name in param_table(model):
        value = checkpoint.arrays[official_name(name)]
        if name.endswith(("stream_mix", "embed_mix")):
            value = value[0 if name.endswith("stream_mix") else 1]
        if name.endswith(TURNED) and checkpoint.script == "train_gpt.py":
            value = swap_halves(value, model.attention.width(model))
        weights[name] = np.ascontiguousarray(value)
    return weights


def swap_halves(weight: np.ndarray, head: int) -> np.ndarray:
    """Return (rows, columns) with the two halves of every `head` rows in each other's place."""
    return weight.reshape(-1, 2, head // 2, weight.shape[1])[:, ::-1].reshape(weight.shape)
