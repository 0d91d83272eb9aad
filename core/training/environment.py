"""What a run is made by and on: the versions of packages, the commit, the code and the machine."""

import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import core
from core.data.dataset import Dataset, identity
from core.engine.protocol import Engine
from core.files import MAX_TEXT, read_file

PACKAGES = (
    "numpy", "torch", "triton", "mlx", "scipy", "sentencepiece", "tokenizers", "safetensors", "tyro", "matplotlib",
    "rich",
)  # fmt: skip
ROOT = Path(core.__file__).resolve().parent.parent
READERS = ("core/ablation/", "core/compare/", "core/verbs/")
"""How the names of files begin that ask for runs or read them: no run imports them, but for these."""
IMPORTED = (
    "core/ablation/records.py",
    *(f"core/verbs/{name}.py" for name in ("__init__", "ablation_worker", "common", "errors", "train")),
)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed, by name."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def commit() -> tuple[str | None, bool | None]:
    """Return (commit, whether files differ from it) of this checkout; None where git or the checkout is missing."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return None, None
    answers = []
    for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"]):
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=30)
        if done.returncode:
            return None, None
        answers.append(done.stdout.strip())
    return answers[0], bool(answers[1])


def code_version(root: Path = ROOT) -> str:
    """Return a hash of the Python files that may decide what a run computes: of all that are not READERS."""
    state = hashlib.sha256()
    for folder in ("core", "backends"):
        for path in sorted((root / folder).rglob("*.py")):
            if reads(path.relative_to(root).as_posix()):
                continue
            state.update(str(path.relative_to(root)).encode() + b"\0" + read_file(path, MAX_TEXT) + b"\0")
    return state.hexdigest()


def reads(name: str) -> bool:
    """Return whether a file of this checkout only asks for runs or reads them."""
    return name.startswith(READERS) and name not in IMPORTED


def environment(engine: Engine, dataset: Dataset, command: str, step: int) -> dict[str, Any]:
    """Return what env.json says about this start of a run at `step`, by a checkout."""
    return {**made_by(command, step), **surroundings(engine, dataset, step)}


def made_by(command: str, step: int) -> dict[str, Any]:
    """Return what env.json says where a checkout made a run and no engine was needed."""
    head, dirty = commit()
    return {"command": command, "commit": head, "dirty": dirty, **machine(step)}


def surroundings(engine: Engine, dataset: Dataset, step: int) -> dict[str, Any]:
    """Return what env.json says about any start of a run: machine, engine, versions, data."""
    return {
        **machine(step),
        "backend": engine.backend,
        "device": engine.device,
        "ranks": engine.ranks.world,
        "dtype": engine.dtype,
        "notes": list(engine.notes),
        "data": identity(dataset),
        "train_tokens": len(dataset.train),
        "val_tokens": len(dataset.val),
        "tokenizer_sha256": dataset.tokenizer.sha256,
        "transform": dataset.tokenizer.transform,
    }


def machine(step: int) -> dict[str, Any]:
    """Return what env.json says about the machine and what is installed on it."""
    return {"step": step, "platform": platform.platform(), "versions": versions()}
