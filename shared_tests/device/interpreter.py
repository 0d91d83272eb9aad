"""Which Python checks a device: the one that started, or an environment of the checkout. Any Python 3 reads this."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = (".venv", ".venv-test")
ASK = """
import importlib.util, sys
old = [] if sys.version_info >= (3, 11) else ["Python 3.11"]
print(" ".join(old + [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]))
"""


def use(needed: tuple[str, ...], extra: str, better: tuple[str, ...] = ()) -> None:
    """Go on in a Python that has the packages `needed`; end with one line and code 2 where there is none.

    One that has those of `better` as well comes first. `extra` is what pip installs them by. The process is replaced if
    it is another Python that has them.
    """
    told, pythons = [], (sys.executable, *(str(ROOT / name / "bin" / "python") for name in ENVIRONMENTS))
    lacks = {python: lacking(python, (*needed, *better)) for python in pythons}
    for wanted in ((*needed, *better), needed):
        for python, missing in lacks.items():
            if missing is not None and not {*missing} - ({*better} - {*wanted}):
                os.environ["PYTHONPATH"] = str(ROOT)  # for this process and those that it starts
                if python != sys.executable:
                    os.execv(python, [python, *sys.argv])
                return
    for python, missing in lacks.items():
        told.append(f"{python} " + ("is not there" if missing is None else f"lacks {', '.join(missing)}"))
    print(
        f"scripts/{Path(sys.argv[0]).name} needs Python 3.11 with {', '.join(needed)}: {'; '.join(told)}: "
        f"pip install -c constraints.txt -e '.[{extra}]' in one of them",
        file=sys.stderr,
    )
    sys.exit(2)


def lacking(python: str, needed: tuple[str, ...]) -> list[str] | None:
    """Return which packages a Python lacks, nothing of them imported; None if it does not run."""
    try:
        asked = subprocess.run([python, "-c", ASK, *needed], capture_output=True, text=True)
    except OSError:
        return None
    return None if asked.returncode else asked.stdout.replace("Python 3.11", "Python-3.11").split()
