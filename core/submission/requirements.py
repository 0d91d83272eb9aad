"""requirements.txt: the packages that a program imports, pinned to the versions that its runs recorded."""

import ast
import importlib.metadata
import re
import sys
from collections.abc import Sequence
from typing import Any

from core.submission.unpack import unpack_program

OURS = ("core", "backends", "skc")


def requirements(program: bytes, versions: dict[str, Any]) -> str:
    """Return the lines `name==version` of what the program imports, as far as its runs recorded a version.

    A version's local part (+cpu, +cu128) names a build that the package index does not have: it becomes a comment.
    """
    lines = []
    for name in sorted(_imports(unpack_program(program).texts) & versions.keys()):
        version, _, build = str(versions[name]).partition("+")
        lines.append(f"{name}=={version}" + (f"  # ran with {version}+{build}" if build else ""))
    return "\n".join([f"# Python {versions.get('python', 'unknown')}", *lines]) + "\n"


def _imports(texts: Sequence[str]) -> set[str]:
    """Return the names of the packages that sources import and that are neither Python's nor ours."""
    modules: set[str] = set()
    for text in texts:
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):  # check 9 names it
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
                modules |= _named_import(node)
    modules -= {*sys.stdlib_module_names, *OURS}
    known = importlib.metadata.packages_distributions()
    return {normal for module in modules for normal in map(_normal, known.get(module, [module]))}


def _named_import(node: ast.Call) -> set[str]:
    """Return the package of importlib.import_module("name")."""
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    first = node.args[0] if node.args else None
    if called not in ("import_module", "__import__") or not isinstance(first, ast.Constant):
        return set()
    return {first.value.partition(".")[0]} if isinstance(first.value, str) else set()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
