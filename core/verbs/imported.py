"""How an import makes its run folder: in a part of it, moved up once it is whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.config import RunConfig
from core.files import place_file
from core.training.run import Run, RunError
from core.training.writer import hold

PART = ".import.part"
"""Folder in that of the run in which it is made."""


def check_new(out: Path) -> None:
    """Raise RunError unless a run folder can be made there."""
    if os.path.lexists(out) and (not out.is_dir() or set(os.listdir(out)) - {PART}):
        raise RunError(f"{out}: exists, and an import makes a folder of its own; choose another --out")


@contextmanager
def new_run(
    out: Path, config: RunConfig, tokenizer: bytes, env: dict[str, Any], lines: list[str], data: Any = None
) -> Iterator[Run]:
    """Yield a run in a part of the folder `out`, into which the block puts weights; then move it up, config.json last.

    Nothing is left in `out` if the block fails. `lines` are log.txt; `data` is that of `Run.create`.
    """
    staging, fresh = out / PART, not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(staging, ignore_errors=True)  # of an import that was killed
    try:
        with hold(out):
            run = Run.create(staging, config, tokenizer, data)
            run.record_environment(env)
            with run.open_log() as log:
                log.writelines(f"{line}\n" for line in lines)
            yield run
            for name in sorted(os.listdir(staging), key=lambda name: name == "config.json"):
                place_file(staging / name, out / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if fresh and set(os.listdir(out)) <= {"lock"}:
            shutil.rmtree(out)
