"""What core.device_check asks of PyTorch: device, ops in both forms, attention. A translation of the MLX file."""

import importlib.metadata

import numpy as np
import torch

from backends.cuda import attention, ops


def accelerator() -> dict | None:
    """Return what the GPU is: name, memory in bytes, versions; None if there is none."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "memory": found.total_memory,
        "versions": {
            "torch": torch.__version__,
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            "triton": importlib.metadata.version("triton"),
            "compute capability": f"{found.major}.{found.minor}",
        },
    }


def outcome(op: str, arguments: tuple, options: dict, exact: bool, dtype: str) -> tuple[list, list]:
    """Return an op's outputs, and the gradients of their weighted sum by every array of floats, from the device.

    Floats are rounded to `dtype`; the exact form then computes in float32.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given, leaves = [], []
    for value in arguments:
        if isinstance(value, np.ndarray):
            floats = value.dtype.kind == "f"
            value = torch.tensor(value, device=device)
            if floats:
                value = value.to(getattr(torch, dtype)).to(torch.float32 if exact else getattr(torch, dtype))
                leaves.append(value.requires_grad_())
        given.append(value)
    out = getattr(ops, op)(*given, exact=exact, **options)
    out = out if isinstance(out, tuple) else (out,)
    waves = [torch.cos(torch.arange(x.numel(), device=device)).reshape(x.shape) for x in out]
    weights = [wave.to(getattr(torch, dtype)).to(x.dtype) for wave, x in zip(waves, out, strict=True)]
    grads = torch.autograd.grad(out, leaves, weights)
    outputs, gradients = ([x.detach().float().cpu().numpy() for x in values] for values in (out, grads))
    return outputs, gradients


def forms(model, seq: int) -> dict[str, dict[str, float] | str]:
    """Return, of every form of attention that there may be, its gaps to ours in bfloat16, or why it is not there."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours = {"torch scaled_dot_product_attention": attention.gaps(None, model, torch.bfloat16, device, seq=seq)}
    tried = {name: attention.trial(name, model, "bfloat16", device, seq)[1] for name in attention.CANDIDATES}
    return {**ours, **tried}
