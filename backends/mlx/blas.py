"""MLX: on Linux the wheel links the reference BLAS; a fast one that is loaded first takes its place.

The dynamic linker resolves `sgemm_` to the first library in the process that has it, so a fast BLAS opened with
RTLD_GLOBAL before `import mlx.core` serves MLX too.
"""

import ctypes
import ctypes.util
import importlib.util
import sys
from pathlib import Path

_status: str | None = None


def _torch_libraries() -> list[Path]:
    """Return torch's own libraries in loading order, or nothing where torch is missing or exports no BLAS."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).parent / "lib"
    needed = [*folder.glob("libgomp*.so*"), folder / "libc10.so", folder / "libtorch_cpu.so"]
    return needed if all(path.exists() for path in needed) else []


def _open(paths: list[Path | str]) -> bool:
    """Open libraries for the whole process; True when the last one exports sgemm_."""
    try:
        handles = [ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in paths]
    except OSError:
        return False
    return bool(handles) and hasattr(handles[-1], "sgemm_")


def load_fast_blas() -> str:
    """Load a fast BLAS into this process if that is needed and possible; return what was found, in words.

    Must run before `import mlx.core`: afterwards the reference BLAS is already bound.
    """
    global _status
    if _status is not None:
        return _status
    openblas = ctypes.util.find_library("openblas")
    if sys.platform != "linux":
        _status = "the platform's own (not Linux: nothing to load)"
    elif "mlx.core" in sys.modules:
        _status = "reference BLAS (MLX was imported before a fast one could be loaded)"
    elif openblas and _open([openblas]):
        _status = f"OpenBLAS ({openblas})"
    elif _open(list(_torch_libraries())):
        _status = "the BLAS inside torch's library"
    else:
        _status = "reference BLAS, 20 to 50 times slower: apt-get install libopenblas0, or pip install torch"
    return _status
