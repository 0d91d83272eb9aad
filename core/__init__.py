"""The lab's decisions, made once. Numpy only: nothing here imports torch, mlx or triton.

Importing it takes the current folder off the import path, unless that is the folder that holds it or one that
PYTHONPATH names in full: files beside a downloaded run are not code.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


def _leave_current_folder() -> bool:
    """Take the current folder off the import path, and return whether a child may not put it there either."""
    try:
        here = os.path.realpath(os.curdir)
    except OSError:  # it was deleted: nothing can be imported from it
        return True
    if here == ROOT:
        return False
    named = {place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(place)}
    sys.path[:] = [p for p in sys.path if p in named or (p != "" and os.path.realpath(p) != here)]
    return True


PYTHON = (sys.executable, "-P") if _leave_current_folder() else (sys.executable,)
"""How a process of ours is started: `-m module` is then not looked for in the current folder."""
