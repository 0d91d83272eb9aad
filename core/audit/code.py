"""How many bytes the code of an evaluation has, as an audit counts it, and before there is an evaluation."""

import ast
import functools
import lzma
from collections.abc import Sequence
from pathlib import Path

from core import ROOT
from core.files import read_file

MAX_SOURCE = 1 << 30
EVALUATION = ("core.audit.watch.watched_process", "core.audit.watch.evaluation")
"""What an audited evaluation begins with, beside its backend."""
ENGINES = {"mlx": ("backends.mlx.blas", "backends.mlx.engine"), "cuda": ("backends.cuda.engine",)}


def packed_bytes(files: Sequence[Path]) -> int:
    """Return the bytes of source files as submissions pack them: one LZMA stream in base85."""
    text = b"".join(read_file(file, MAX_SOURCE) for file in sorted(files, key=str) if file.is_file())
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    return -(-len(lzma.compress(text, lzma.FORMAT_RAW, filters=filters)) * 5 // 4) if text else 0


@functools.cache
def packed_code() -> dict[str, int]:
    """Return backend -> bytes of the code that an audit counts: every file of ours that the evaluation imports, packed.

    Kernels count, which are imported on a GPU only.
    """
    return {name: packed_bytes(imported(*EVALUATION, *engine)) for name, engine in ENGINES.items()}


def against_reserve(code: int, reserve: int) -> str:
    """Return, in words, how the bytes of code stand to export.code_bytes, which training leaves for them."""
    more = f"{code - reserve:,} more than" if code > reserve else "within"
    return f"{more} the {reserve:,} of export.code_bytes"


def imported(*modules: str) -> list[Path]:
    """Return the files of `modules` and of all modules of ours that they import, read from their text: none is run.

    In core only imports at the top of a file count, in a backend also those inside functions.
    """
    files: dict[Path, None] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop(0)
        for path in _files(name):
            if path not in files:
                files[path] = None
                waiting += _imports(path)
    return sorted(files, key=str)


def _files(module: str) -> list[Path]:
    """Return the files that importing a module of ours runs: its packages' and its own; none for others' modules."""
    parts = module.split(".")
    places = [Path(ROOT, *parts[: i + 1]) for i in range(len(parts))] if parts[0] in ("core", "backends") else []
    files = [place / "__init__.py" if place.is_dir() else place.with_suffix(".py") for place in places]
    return [file for file in files if file.is_file()]


def _imports(path: Path) -> list[str]:
    """Return the modules that a file imports when it is imported."""
    names, tree = [], ast.parse(read_file(path, 1 << 24))
    for node in ast.walk(tree) if "backends" in path.relative_to(ROOT).parts else tree.body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names
