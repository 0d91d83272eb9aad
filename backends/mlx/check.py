"""What core.device_check asks of MLX: its device, ops in both forms. A translation of the PyTorch file."""

import importlib.metadata
import platform

import mlx.core as mx
import numpy as np

from backends.mlx import ops


def accelerator() -> dict | None:
    """Return what the GPU is: name, memory in bytes, versions; None if there is none."""
    if not mx.metal.is_available():
        return None
    found = mx.device_info()
    return {
        "name": str(found["device_name"]),
        "memory": int(found["max_recommended_working_set_size"]),
        "versions": {"mlx": importlib.metadata.version("mlx"), "macOS": platform.mac_ver()[0]},
    }


def outcome(op: str, arguments: tuple, options: dict, exact: bool, dtype: str) -> tuple[list, list]:
    """Return an op's outputs, and the gradients of their weighted sum by every array of floats, from the device.

    Floats are rounded to `dtype`; the exact form then computes in float32.
    """
    given, places = [], []
    for place, value in enumerate(arguments):
        if isinstance(value, np.ndarray):
            floats = value.dtype.kind == "f"
            value = mx.array(value)
            if floats:
                value = value.astype(getattr(mx, dtype)).astype(mx.float32 if exact else getattr(mx, dtype))
                places.append(place)
        given.append(value)

    def outputs(*floats):
        full = list(given)
        for place, value in zip(places, floats, strict=True):
            full[place] = value
        out = getattr(ops, op)(*full, exact=exact, **options)
        return list(out) if isinstance(out, tuple) else [out]

    floats = [given[place] for place in places]
    out = outputs(*floats)
    waves = [mx.cos(mx.arange(x.size)).reshape(x.shape) for x in out]
    weights = [wave.astype(getattr(mx, dtype)).astype(x.dtype) for wave, x in zip(waves, out, strict=True)]
    out, grads = mx.vjp(outputs, floats, weights)
    out, grads = ([np.array(x.astype(mx.float32)) for x in values] for values in (out, grads))
    return out, grads


def forms(model, seq: int) -> dict[str, dict[str, float] | str]:
    """Return nothing: MLX has one form of attention, which `outcome` covers."""
    return {}
