"""Files as the official scripts write them, of the weights of scripts/official_losses."""

import functools
import importlib.machinery
import importlib.util
import io
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
EMBEDDING = "tok_emb.weight"
Tensors = dict[str, torch.Tensor]


def load_script() -> Any:
    """Return scripts/official_losses as a module."""
    loader = importlib.machinery.SourceFileLoader("official_losses", str(ROOT / "scripts/official_losses"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("official_losses", loader))  # type: ignore[arg-type]
    loader.exec_module(module)
    return module


RECIPE = load_script()
drawn = functools.cache(RECIPE.weights)


def state(name: str) -> "OrderedDict[str, torch.Tensor]":
    """Return a size's weights as train_gpt.py saves them: the embedding in bfloat16, the rest in float32."""
    given = OrderedDict((key, torch.tensor(value)) for key, value in drawn(name).items())
    given[EMBEDDING] = given[EMBEDDING].bfloat16()
    return given


def saved(path: Path, value: Any) -> Path:
    """Write what torch.save makes of a value."""
    torch.save(value, path)
    return path


def packed(path: Path, value: Any) -> Path:
    """Write zlib over what torch.save makes of a value."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(zlib.compress(buffer.getvalue(), 1))
    return path


CONTROL = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weight")


def int8(name: str) -> dict[str, Any]:
    """Return the int8 artifact of a size, the format said once more in numpy: rows clipped at a quantile, 8 bits."""
    form: dict[str, Any] = {"__quant_format__": "int8_clean_per_row_v1"}
    form |= {key: {} for key in ("quantized", "scales", "dtypes", "passthrough", "qmeta", "passthrough_orig_dtypes")}
    for key, tensor in state(name).items():
        kind, values = str(tensor.dtype).split(".")[1], tensor.float().numpy()
        if tensor.numel() > 65_536:
            top = np.quantile(np.abs(values), np.float32(99.99984 / 100), axis=1).astype(np.float32)
            scale = np.maximum(top / np.float32(127), np.float32(1) / np.float32(127))
            clipped = np.clip(values, -top[:, None], top[:, None])
            codes = np.clip(np.round(clipped / scale[:, None]), -127, 127).astype(np.int8)
            form["quantized"][key], form["scales"][key] = torch.tensor(codes), torch.tensor(scale.astype(np.float16))
            form["dtypes"][key], form["qmeta"][key] = kind, {"scheme": "per_row", "axis": 0}
        elif any(part in key for part in CONTROL):
            form["passthrough"][key] = tensor
        else:
            form["passthrough"][key], form["passthrough_orig_dtypes"][key] = tensor.half(), kind
    return form


def small(layers: int = 2, vocab: int = 1024) -> Tensors:
    """Return official weights of a small model with the vocabulary of the bundled tokenizer, values of the mini's."""
    given = {key: torch.tensor(value) for key, value in drawn("mini").items()}
    last = range(layers, RECIPE.SIZES["mini"].layers)
    given = {key: value for key, value in given.items() if not any(f"blocks.{i}." in key for i in last)}
    given["skip_weights"] = given["skip_weights"][: layers // 2]
    return given | {EMBEDDING: given[EMBEDDING].repeat(8, 1)[:vocab]}
