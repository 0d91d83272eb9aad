"""The packed program's loader, its first part: it is run, never imported.

PARTS: this text, the entry, names to leave alone, then names and texts of modules in turn; FILE: the program's own
path. linecache and inspect, which Triton and torch.compile read, find every module's text under a file name inside the
program's own, where no file can be. A module gets the names that linking.py has left to it.
"""

import ast
import builtins
import importlib.util
import linecache
import os
import sys

FILE, PARTS = os.path.abspath(globals()["FILE"]), globals()["PARTS"]
TEXTS = dict(zip(PARTS[3::2], PARTS[4::2], strict=True))


def _bound(tree):
    for node in tree.body:
        if hasattr(node, "name"):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0]
        else:
            yield from (
                part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
            )


def _defined(tree):
    for node in tree.body:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            yield from _bound(ast.Module([node], []))


TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
OWNERS = {}
for name, tree in TREES.items():
    for one in set(_defined(tree)):
        OWNERS[one] = None if one in OWNERS else name
for one in [*PARTS[2].split(","), *dir(builtins)]:
    OWNERS[one] = None


class _Packed:
    def find_spec(self, name, path=None, target=None):
        """Find a module of the program."""
        package = any(other.startswith(name + ".") for other in TEXTS)
        if name in TEXTS or package:
            place = FILE + "/" + name.replace(".", "/") + ".py"
            return importlib.util.spec_from_loader(name, self, origin=place, is_package=package)  # pyright: ignore[reportArgumentType]

    def create_module(self, spec):
        """Leave it to Python."""

    def exec_module(self, module):
        """Run a module, whose text linecache knows, with the names that its text leaves out."""
        name, place = module.__name__, module.__spec__.origin
        text = self.get_source(name)
        module.__file__ = place
        linecache.cache[place] = len(text), None, text.splitlines(True), place
        if name in TREES:
            tree = TREES.pop(name)
            for one in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - set(_bound(tree)):
                if OWNERS.get(one):
                    setattr(module, one, getattr(importlib.import_module(OWNERS[one]), one))
        exec(compile(text, place, "exec"), module.__dict__)

    def get_source(self, name):
        """Return a module's text."""
        return TEXTS.get(name, "")


sys.meta_path.insert(0, _Packed())
if __name__ == "__main__":
    exec(compile(PARTS[1], FILE + "/start.py", "exec"))
