"""CUDA: what torch.save wrote in the official train_gpt.py, as numpy arrays: a state dict, or its int8 artifact.

torch.load(weights_only=True) runs no code, but allocates what a pickle asks of it (bytearray(10**12) is allowed), and
reads zip archives in its own way. So the pickle is looked through first, without being run, for anything that is not a
tensor, and torch is given an archive that is written anew from the parts that were checked.
"""

import io
import pickletools
import warnings
import zipfile

import numpy as np
import torch

from core.official.refusal import MAX_TENSORS, MAX_VALUES, OfficialError, excerpt, fail

MAX_PICKLE = 1 << 20
MAX_TUPLES = 1 << 14
"""Four of a tensor; one in the other they would make Python's own stack overflow."""
PLAIN = {
    "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Char")),
}  # fmt: skip
"""All that the pickle of a state dict names, or that of the int8 artifact."""
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FORMAT = "int8_clean_per_row_v1"
NEEDED = ("quantized", "scales", "dtypes", "passthrough")
OPTIONAL = ("qmeta", "passthrough_orig_dtypes")


def read_state(path, parts):
    """Return (kind, float32 arrays by official name) of the files of a torch.save archive; OfficialError."""
    value = _load(path, parts)
    quantised = isinstance(value, dict) and "__quant_format__" in value
    state = _dequantised(path, value) if quantised else value
    _check_tensors(path, state, FLOATS.values())
    return "int8" if quantised else "state dict", {name: _array(tensor) for name, tensor in state.items()}


def _load(path, parts):
    """Return the one object of an archive."""
    pickles = [name for name in parts if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        fail(path, "a zip archive, but not one that torch.save wrote (no data.pkl), nor an .npz")
    root = pickles[0].removesuffix("data.pkl")
    if parts.get(f"{root}byteorder", b"little") != b"little":
        fail(path, "written on a big-endian machine; save it again on a little-endian one")
    _check_pickle(path, parts[pickles[0]])
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:  # without what else torch.load looks at: code, constants, byte order
        archive.writestr("archive/data.pkl", parts[pickles[0]])
        archive.writestr("archive/version", "3\n")
        for name, part in parts.items():
            if name.startswith(f"{root}data/"):
                archive.writestr(f"archive/{name.removeprefix(root)}", part)
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a hostile file can make torch warn: more than the one line
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no one type for what hostile bytes make it raise
        fail(path, f"torch.load refuses it ({type(error).__name__}: {excerpt(str(error))}); copy the file again")


def _check_pickle(path, text):
    """Refuse a pickle that names anything but tensors, without running it."""
    if len(text) > MAX_PICKLE:
        fail(path, f"data.pkl: {len(text):,} bytes; at most {MAX_PICKLE:,} for names and shapes")
    tuples = 0
    try:
        for opcode, argument, _ in pickletools.genops(text):
            if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
                fail(path, f"data.pkl: {opcode.name} makes an object that is no tensor; it is not read")
            if opcode.name == "GLOBAL" and argument not in PLAIN:
                fail(path, f"data.pkl: {excerpt(argument)} is no part of a tensor: it could run code, and is not read")
            tuples += opcode.name.startswith("TUPLE")
    except OfficialError:
        raise
    except Exception as error:  # as above
        fail(path, f"data.pkl: not a pickle ({excerpt(str(error))}); copy the file again")
    if tuples > MAX_TUPLES:
        fail(path, f"data.pkl: {tuples:,} tuples; at most {MAX_TUPLES:,}")


def _check_tensors(path, state, kinds):
    """Refuse what is not a bounded dict of dense tensors of some types."""
    if not isinstance(state, dict) or len(state) > MAX_TENSORS:
        fail(path, f"holds {type(state).__name__}; expected a state dict of at most {MAX_TENSORS} tensors")
    for name, tensor in state.items():
        if type(name) is not str or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            fail(path, f"{excerpt(name)}: {type(tensor).__name__}; expected a tensor under its name")
        if tensor.layout is not torch.strided or tensor.dtype not in kinds:
            names = ", ".join(str(kind).removeprefix("torch.") for kind in kinds)
            fail(path, f"{excerpt(name)}: type {tensor.dtype}, {tensor.layout}; expected {names}")
    values = sum(tensor.numel() for tensor in state.values())  # strides of 0 make many values of few bytes
    if values > MAX_VALUES:
        fail(path, f"{values:,} values; at most {MAX_VALUES:,}")


def _array(tensor):
    return np.ascontiguousarray(tensor.detach().float().numpy())


def _dequantised(path, value):
    """Return the state dict that the int8 artifact stands for: the arithmetic of the official script."""
    if type(value["__quant_format__"]) is not str or value["__quant_format__"] != FORMAT:
        fail(path, f"__quant_format__ {excerpt(value['__quant_format__'])}; only {FORMAT} is known")
    for key in (*NEEDED, *(key for key in OPTIONAL if key in value)):
        if not isinstance(value.get(key), dict):
            fail(path, f"{key}: {type(value.get(key)).__name__}; expected a dict by tensor name")
    for key in value:
        if key not in (*NEEDED, *OPTIONAL, "__quant_format__"):
            fail(path, f"{excerpt(key)} is no part of {FORMAT}")
    codes, scales, types, kept = (value[key] for key in NEEDED)
    originals, meta = value.get("passthrough_orig_dtypes", {}), value.get("qmeta", {})
    _check_tensors(path, codes, (torch.int8,))
    _check_tensors(path, scales, (torch.float16, torch.float32))
    _check_tensors(path, kept, FLOATS.values())
    for name in (*scales, *types, *meta):
        if name not in codes:
            fail(path, f"scales, dtypes or qmeta name {excerpt(name)}, which has no codes in quantized")
    state = {}
    for name, code in codes.items():
        if name in kept or name not in scales:
            fail(path, f"{excerpt(name)}: needs a scale, and may not be in passthrough too")
        rows = isinstance(meta.get(name), dict) and meta[name].get("scheme") == "per_row"
        scale = scales[name]
        if tuple(scale.shape) != ((code.shape[:1]) if rows or scale.ndim else ()):
            fail(
                path, f"{excerpt(name)}: scales of shape {tuple(scale.shape)} do not fit its shape {tuple(code.shape)}"
            )
        wide = scale.float().reshape(-1, *(1,) * (code.ndim - 1)) if scale.ndim else scale.float()
        state[name] = (code.float() * wide).to(_type(path, name, types.get(name)))
    for name, tensor in kept.items():
        state[name] = tensor.to(_type(path, name, originals[name])) if name in originals else tensor
    return state


def _type(path, name, given):
    """Return the torch type of its name in an artifact."""
    if type(given) is not str or given not in FLOATS:
        fail(path, f"{excerpt(name)}: type {excerpt(given)}; expected one of {', '.join(FLOATS)}")
    return FLOATS[given]
