"""Imports among a program's own modules that its loader finds again: most names are those of one definition alone."""

import ast
import builtins
from collections import Counter

import python_minifier


def linked(texts: dict[str, str]) -> tuple[dict[str, str], str]:
    """Return modules without `from ours import name` where the loader knows whose name it is, and names to leave alone.

    The loader (loader.py) gives a module every name that its text has, that is bound nowhere at its top, and that one
    other module defines. So a name stays imported by words if another module binds it too, or has a local variable of
    that name; the latter are what the loader is told to leave alone.
    """
    trees = {name: ast.parse(text) for name, text in texts.items()}
    own = {name: bound_names(tree) for name, tree in trees.items()}
    counts = Counter(one for names in own.values() for one in names)
    known = {one for one, count in counts.items() if count == 1} - set(dir(builtins))
    for name, tree in trees.items():
        brought = {alias.asname or alias.name: alias for node in _ours(tree) for alias in node.names}
        known -= {local for local, alias in brought.items() if local != alias.name}
        known -= foreign_names(tree) | _asked_of_modules(tree)
        known -= {one for one in all_names(tree) if one not in brought and one not in own[name]}
    for tree in trees.values():
        for node in _ours(tree):
            node.names = [alias for alias in node.names if alias.name not in known]
        tree.body = [one for one in tree.body if not isinstance(one, ast.ImportFrom) or one.names]
    alone = {one for one, count in counts.items() if count == 1} - known
    strangers = {one for name, tree in trees.items() for one in all_names(tree) & alone if one not in own[name]}
    return {name: python_minifier.unparse(tree) for name, tree in trees.items()}, ",".join(sorted(strangers))


def bound_names(tree: ast.Module) -> set[str]:
    """Return the names that a module's own statements define at its top."""
    return {
        one
        for node in tree.body
        for one in (
            [node.name]
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            else [part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]
        )
    }


def all_names(tree: ast.Module) -> set[str]:
    """Return the names that a module's text has, of variables of any kind."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def foreign_names(tree: ast.Module) -> set[str]:
    """Return the names that a module imports from others' modules, or imports inside a function, or as a module."""
    tops = set(map(id, _ours(tree)))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in tops]
    return {alias.asname or alias.name.partition(".")[0] for node in nodes for alias in node.names}


def _ours(tree: ast.Module) -> list[ast.ImportFrom]:
    """Return the imports of names from our modules at a module's top."""
    places = ("core", "backends")
    found = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return [node for node in found if (node.module or "").partition(".")[0] in places]


def _asked_of_modules(tree: ast.Module) -> set[str]:
    """Return attributes of what may be modules: such a name must be bound in the module that is asked for it."""
    brought = {alias.asname or alias.name for node in _ours(tree) for alias in node.names}
    asked = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    return {node.attr for node in asked if isinstance(node.value, ast.Name) and node.value.id in brought}
