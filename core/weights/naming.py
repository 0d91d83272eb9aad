"""Changes of a source by place: what a module's global names are called instead, wherever its text names them."""

import ast
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

Called = str | dict[str, str] | None
"""What a global name is called: another name; of a module's name, what its names are called; None: as it was."""
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
SCOPES = (ast.FunctionDef, ast.Lambda, ast.ClassDef, *COMPREHENSIONS)


class Edit(NamedTuple):
    """Bytes of a source from `begin` up to `end`, and what stands there instead."""

    begin: int
    end: int
    text: bytes


@functools.lru_cache(256)
def line_starts(source: bytes) -> list[int]:
    """Return the first byte of every line, and the one behind the last."""
    return [0, *itertools.accumulate(len(line) + 1 for line in source.split(b"\n"))]


def span(source: bytes, node: ast.AST) -> tuple[int, int]:
    """Return the first byte of a node and the one behind it."""
    starts, place = line_starts(source), node if isinstance(node, ast.expr | ast.stmt) else ast.Pass()
    assert place.end_lineno is not None and place.end_col_offset is not None
    return starts[place.lineno - 1] + place.col_offset, starts[place.end_lineno - 1] + place.end_col_offset


def first_line(source: bytes, node: ast.stmt) -> int:
    """Return the line (from 0) on which a statement begins, with its decorators and the comments above them."""
    lines = source.split(b"\n")
    first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))]) - 1
    while first and lines[first - 1].lstrip().startswith(b"#"):
        first -= 1
    return first


def cut_statement(source: bytes, node: ast.stmt) -> Edit:
    """Return the edit that takes a statement away, with all that belongs to it and the blank lines in front."""
    lines, starts, first = source.split(b"\n"), line_starts(source), first_line(source, node)
    while first and not lines[first - 1].strip():
        first -= 1
    return Edit(starts[first], starts[node.end_lineno or node.lineno], b"")


def bound(scope: ast.AST) -> set[str]:
    """Return the names that a function, a class or a comprehension binds itself."""
    names: set[str] = set()
    if isinstance(scope, ast.FunctionDef | ast.Lambda):
        given = scope.args
        several = [one for one in (given.vararg, given.kwarg) if one is not None]
        names |= {one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs, *several)}
    inner = (
        [one.target for one in scope.generators] if isinstance(scope, COMPREHENSIONS) else getattr(scope, "body", [])
    )
    waiting: list[ast.AST] = list(inner) if isinstance(inner, list) else [inner]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
        if not isinstance(node, SCOPES):
            waiting += ast.iter_child_nodes(node)
    return names


def local_names(body: Iterable[ast.stmt]) -> set[str]:
    """Return the names of all variables of functions and classes in statements."""
    scopes = (node for statement in body for node in ast.walk(statement) if isinstance(node, SCOPES))
    return {name for scope in scopes for name in bound(scope)}


def renamed(source: bytes, body: Iterable[ast.stmt], called: Callable[[str], Called]) -> Iterator[Edit]:
    """Yield the edits that give global names in statements at the top of a module what `called` says of each."""
    finder = _Globals()
    for statement in body:
        finder.visit(statement)
    for node in finder.found:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = called(node.name)
            if isinstance(name, str) and name != node.name:
                yield Edit(*_name_span(source, node), name.encode())
            continue
        asked = node.value if isinstance(node, ast.Attribute) else node
        assert isinstance(asked, ast.Name)
        name = called(asked.id)
        if isinstance(name, dict):
            if not isinstance(node, ast.Attribute) or node.attr not in name:
                raise ValueError(f"line {node.lineno}: {ast.unparse(node)} is no definition of a module that is kept")
            name = name[node.attr]
        elif isinstance(node, ast.Attribute):
            node = asked
        if name is not None and name != ast.unparse(node):
            if asked in finder.quoted:
                raise ValueError(
                    f"line {node.lineno}: {ast.unparse(node)} stands in a text, where Python tells no place"
                )
            yield Edit(*span(source, node), name.encode())


class _Globals(ast.NodeVisitor):
    """Finds names that no function, class or comprehension around them binds."""

    def __init__(self) -> None:
        self.found: list[ast.Name | ast.Attribute | ast.FunctionDef | ast.ClassDef] = []
        self.quoted: set[ast.AST] = set()
        """Those in a text with values."""
        self._scopes: list[tuple[set[str], bool]] = []

    def _is_global(self, name: str) -> bool:
        # A class's own names are seen in its body, not in its methods.
        return not any(
            name in names for i, (names, is_class) in enumerate(reversed(self._scopes)) if not (is_class and i)
        )

    def _inside(self, scope: ast.AST, nodes: Iterable[ast.AST]) -> None:
        self._scopes.append((bound(scope), isinstance(scope, ast.ClassDef)))
        for node in nodes:
            self.visit(node)
        self._scopes.pop()

    def visit_Name(self, node: ast.Name) -> None:
        """Find a name."""
        if self._is_global(node.id):
            self.found.append(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Find a name that is asked for something, which may be a module's."""
        if isinstance(node.value, ast.Name):
            if self._is_global(node.value.id):
                self.found.append(node)
        else:
            self.visit(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Mark what stands in a text."""
        self.quoted |= set(ast.walk(node))
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Look for a function's defaults and types around it, and into it."""
        if not self._scopes:
            self.found.append(node)
        for part in (*node.decorator_list, node.args, *filter(None, [node.returns])):
            self.visit(part)
        self._inside(node, node.body)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        """Look into a function without a name."""
        self.visit(node.args)
        self._inside(node, [node.body])

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Look into a class."""
        if not self._scopes:
            self.found.append(node)
        for part in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(part)
        self._inside(node, node.body)

    def _visit_comprehension(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        self.visit(node.generators[0].iter)
        own = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        parts = [part for one in node.generators for part in (one.target, *one.ifs)]
        self._inside(node, [*own, *parts, *(one.iter for one in node.generators[1:])])

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _visit_comprehension


def _name_span(source: bytes, node: ast.FunctionDef | ast.ClassDef) -> tuple[int, int]:
    """Return where the name of a definition stands."""
    match = re.compile(rb"(?:def|class)\s+(\w+)").match(source, span(source, node)[0])
    assert match is not None, node.name
    return match.span(1)
