"""What the machine is: device, versions, settings that change arithmetic, compilers."""

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import time
from typing import Any

from shared_tests.device.child import NO_DEVICE, Child

PREFIXES = ("CUDA_", "CUBLAS", "CUDNN", "NVIDIA_TF32", "TORCH", "PYTORCH", "TRITON", "MLX_", "OMP_", "NCCL")
"""Environment variables that may change what is computed, or how fast."""


def run(child: Child) -> int | None:
    """Write the facts; NO_DEVICE if an accelerator was asked for and there is none."""
    child.text("machine", f"{platform.platform()}, {os.cpu_count()} processors, Python {platform.python_version()}")
    found = sorted(f"{key}={value}" for key, value in os.environ.items() if key.startswith(PREFIXES))
    child.text("environment variables", ", ".join(found) or "none that matter")
    compilers = (f"{name}: {shutil.which(name) or 'none'}" for name in ("cc", "gcc", "g++", "ptxas", "nvcc"))
    child.text("compilers", ", ".join(compilers))
    return (_cuda if child.backend == "cuda" else _mlx)(child)


def _mlx(child: Child) -> int | None:
    import mlx.core as mx

    child.text("mlx", importlib.import_module("importlib.metadata").version("mlx"))
    device: Any = mx.default_device()
    child.text("device", f"{device}: {mx.device_info(device)}")
    return NO_DEVICE if child.gpu and device != mx.Device(mx.gpu) else None


def _cuda(child: Child) -> int | None:
    began = time.monotonic()
    import torch

    child.figure("import torch", time.monotonic() - began, "s")
    child.text("torch", f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    if child.gpu and not torch.cuda.is_available():
        return NO_DEVICE
    for name in ("triton", "flash_attn_interface", "flash_attn"):
        there = importlib.util.find_spec(name) is not None
        child.text(name, getattr(importlib.import_module(name), "__version__", "there") if there else "not installed")
    with child.part("inductor"):
        from torch._inductor import config

        child.text("inductor", f"mix_order_reduction={getattr(config.triton, 'mix_order_reduction', 'not known')}")
    child.text(
        "float32 products", f"TF32 {torch.backends.cuda.matmul.allow_tf32}, {torch.get_float32_matmul_precision()}"
    )
    if not child.only_gpu("device"):
        return None
    card = torch.cuda.get_device_properties(0)
    memory = f"{card.total_memory / 2**30:.1f} GiB"
    child.text(
        "device", f"{card.name}, {memory}, {card.multi_processor_count} multiprocessors, {card.major}.{card.minor}"
    )
    with child.part("our kernels"):
        for name in ("scan", "cross_entropy"):
            importlib.import_module(f"backends.cuda.kernels.{name}")
        child.text("our kernels", "imported")
    with child.part("nvidia-smi"):
        asked = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=10)
        child.text("nvidia-smi", asked.stdout or asked.stderr)
    child.text("torch build", torch.__config__.show())
    return None
