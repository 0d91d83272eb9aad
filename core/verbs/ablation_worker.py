"""One run of an ablation in a process of its own: `python -m core.verbs.ablation_worker FOLDER`; not for people.

It reads FOLDER/job.json, trains in FOLDER/run or goes on there, and ends when whoever started it is gone.
"""

import dataclasses
import os
import sys
import threading
from pathlib import Path

from core.ablation.records import JobFile, read_job
from core.console import Console
from core.training.environment import code_version
from core.verbs.common import Context
from core.verbs.errors import is_users, message
from core.verbs.train import Train, train_run

GONE = 75
"""Exit code of a worker whose parent is gone."""


def train_options(job: JobFile, folder: Path) -> Train:
    """Return the options of `skc train` for what job.json says."""
    options = Train.of(job.config)
    return dataclasses.replace(options, backend=job.backend, dtype=job.dtype, out=str(folder / "run"))


def main() -> int:
    """Train; 2 and one line where the settings do not work, 1 where a check failed."""
    folder = Path(sys.argv[1])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        job = read_job(folder)
        if job.code != code_version():
            print("the code in core/ or backends/ has changed since this ablation was started: start it again")
            return 2
        outcome = train_run(train_options(job, folder), Context(Console(), job.command))
    except KeyboardInterrupt:  # a checkpoint was made, if training was under way
        return 130
    except (ValueError, ArithmeticError, OSError) as error:
        if not is_users(error):
            raise
        print(message(error), flush=True)
        return 2
    return 0 if outcome.ok else 1


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(GONE)


if __name__ == "__main__":
    sys.exit(main())
