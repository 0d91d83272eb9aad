"""What a program needs of our modules: found by names from an entry on, without running anything.

A module's definitions (functions, classes, constants) stay if what stays names them, a class's methods if their name
occurs anywhere as an attribute or a text; what is neither (a call at the top of a file) stays with its module. So more
may stay than is ever run, never less: whoever makes a name of pieces has to say it whole somewhere.
"""

import ast
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from core import ROOT
from core.files import read_text
from core.submission.bare import bare

OURS = ("core", "backends")
ENTRY = "__main__"
CALLED = {"forward", "backward", "run", "write"}
"""Methods that libraries call by names that no text of ours has: torch's modules and functions, threads, files."""
REGISTERED = ("custom_op", "register_fake")
"""Decorators that give a function to a library, which calls it."""
GRADIENTS = "vjp"
"""A decorator that gives a function to the one that it is asked of (`@scan.vjp`), whose gradients it makes."""
Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


class Module:
    """A module's text and what of it is needed."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.defined: dict[str, list[ast.stmt]] = {}
        """Name -> the statements that define it."""
        self.imported: dict[str, tuple[str, str | None]] = {}
        """Name -> (module, name in it; None: the module itself)."""
        self.others: list[ast.stmt] = []
        self.needed: set[str] = set()
        for statement in tree.body:
            self._read(statement)

    def _read(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            self.imported.update(imports(statement))
            return
        names = list(defines(statement))
        if not names:
            self.others.append(statement)
        for name in names:
            self.defined.setdefault(name, []).append(statement)


def defines(statement: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement defines and does nothing else; none for one that does more."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield from _owners(statement)
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        inner = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
        if all(isinstance(part, ast.Name) for part in inner):
            yield from (part.id for part in inner if isinstance(part, ast.Name))


def _owners(statement: ast.FunctionDef | ast.ClassDef) -> list[str]:
    """Return the name that a definition belongs to: its own, or that of the function whose gradients it makes.

    None of what a library calls.
    """
    for one in statement.decorator_list:
        called = one.func if isinstance(one, ast.Call) else one
        if isinstance(called, ast.Attribute) and called.attr in REGISTERED:
            return []
        if isinstance(called, ast.Attribute) and called.attr == GRADIENTS and isinstance(called.value, ast.Name):
            return [called.value.id]
    return [statement.name]


def imports(statement: ast.Import | ast.ImportFrom) -> dict[str, tuple[str, str | None]]:
    """Return name -> (module, name in it) of an import; (module, None) for the module itself."""
    if isinstance(statement, ast.ImportFrom):
        assert statement.module and not statement.level, ast.unparse(statement)
        return {alias.asname or alias.name: (statement.module, alias.name) for alias in statement.names}
    return {alias.asname or alias.name.partition(".")[0]: (alias.name, None) for alias in statement.names}


class Shaken:
    """The modules that `entry`, a program's text, needs, each of whose texts is changed first.

    `absent` modules, definitions (module.name) and methods (module.class.name) are what the program never calls: empty
    classes stand for what is imported of them.
    """

    def __init__(
        self,
        entry: str,
        absent: Collection[str] = (),
        change: Callable[[str, ast.Module], ast.Module] = lambda name, tree: bare(tree),
    ) -> None:
        self._change = change
        self.modules: dict[str, Module] = {}
        self._absent = tuple(absent)
        self._attributes = set(CALLED)
        self._methods: dict[str, list[tuple[str, ast.stmt]]] = {}
        """Name -> (module, method) of classes that stay and methods that nobody has called so far."""
        self._dropped: set[ast.stmt] = set()
        self._waiting: list[tuple[str, ast.AST]] = []
        self._enter(ENTRY, change(ENTRY, ast.parse(entry)))
        while self._waiting:
            self._scan(*self._waiting.pop())

    def is_absent(self, name: str) -> bool:
        """Return whether a module is left out."""
        return any(name == other or name.startswith(f"{other}.") for other in self._absent)

    def text(self, name: str) -> ast.Module:
        """Return what stays of a module."""
        module, body = self.modules[name], []
        for statement in module.tree.body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                body += self._import(module, statement)
            elif not (names := list(defines(statement))) or module.needed.intersection(names):
                body.append(self._without(statement))
        return ast.fix_missing_locations(ast.Module(body, []))

    def _import(self, module: Module, statement: ast.Import | ast.ImportFrom) -> list[ast.stmt]:
        """Return what stays of an import: names that are needed; of absent modules empty classes."""
        kept: list[ast.alias] = []
        stubs: list[ast.stmt] = []
        for alias, (local, (place, name)) in zip(statement.names, imports(statement).items(), strict=True):
            if local not in module.needed:
                continue
            if self.is_absent(place) or self.is_absent(f"{place}.{name}"):
                stubs += ast.parse(f"class {local}:0").body
            else:
                kept.append(alias)
        if kept and isinstance(statement, ast.ImportFrom):
            return [ast.ImportFrom(statement.module, kept, 0), *stubs]
        return [ast.Import(kept), *stubs] if kept else stubs

    def _without(self, statement: ast.stmt) -> ast.stmt:
        """Return a definition without the methods that nobody calls."""
        if isinstance(statement, ast.ClassDef):
            body = [one for one in statement.body if one not in self._dropped]
            statement.body = body or [ast.Expr(ast.Constant(0))]
        return statement

    def _enter(self, name: str, tree: ast.Module | None = None) -> Module | None:
        """Read a module of ours, with its packages, and what it does by itself; None for others' and absent ones."""
        if name in self.modules:
            return self.modules[name]
        path = Path(ROOT, *name.split("."))
        if tree is None:
            if name.partition(".")[0] not in OURS or self.is_absent(name):
                return None
            file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            if not file.is_file():
                return None
            tree = self._change(name, ast.parse(read_text(file)))
        module = self.modules[name] = Module(tree)
        self._waiting += [(name, statement) for statement in module.others]
        if "." in name:
            self._enter(name.rpartition(".")[0])
        return module

    def _need(self, place: str, name: str) -> None:
        """Keep a name of a module: its definition, or what it is imported from."""
        module = self._enter(place)
        if module is None:
            return
        if name not in module.defined and name not in module.imported:
            self._enter(f"{place}.{name}")
        elif name not in module.needed and not self.is_absent(f"{place}.{name}"):
            module.needed.add(name)
            for statement in module.defined.get(name, []):
                self._keep(place, statement)
            if name in module.imported:
                source, inner = module.imported[name]
                if self.is_absent(f"{source}.{inner}"):
                    return
                if inner is None:
                    self._enter(source)
                else:
                    self._need(source, inner)

    def _keep(self, place: str, statement: ast.stmt) -> None:
        """Scan a definition; of a class all but the methods that nobody has called so far."""
        if not isinstance(statement, ast.ClassDef):
            self._waiting.append((place, statement))
            return
        parts: list[ast.AST] = [*statement.decorator_list, *statement.bases, *statement.keywords]
        for one in statement.body:
            method = isinstance(one, ast.FunctionDef)
            if method and self.is_absent(f"{place}.{statement.name}.{one.name}"):
                self._dropped.add(one)
            elif not method or one.name in self._attributes or one.name.startswith("__"):
                parts.append(one)
            else:
                self._dropped.add(one)
                self._methods.setdefault(one.name, []).append((place, one))
        self._waiting += [(place, part) for part in parts]

    def _named(self, name: str) -> None:
        """Keep the methods of a name."""
        self._attributes.add(name)
        for place, method in self._methods.pop(name, []):
            self._dropped.discard(method)
            self._waiting.append((place, method))

    def _scan(self, place: str, tree: ast.AST) -> None:
        """Keep whatever a piece of a module's text names."""
        module = self.modules[place]
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                if node.id in module.defined or node.id in module.imported:
                    self._need(place, node.id)
            elif isinstance(node, ast.Attribute):
                self._named(node.attr)
                source = module.imported.get(node.value.id) if isinstance(node.value, ast.Name) else None
                if source is not None:
                    self._need(source[0] if source[1] is None else f"{source[0]}.{source[1]}", node.attr)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                for source, name in imports(node).values():
                    if name is None:
                        self._enter(source)
                    elif not self.is_absent(f"{source}.{name}"):
                        self._need(source, name)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                self._text(node.value)

    def _text(self, text: str) -> None:
        """Keep what a text may name: methods, and all of a module of ours that is imported by its name."""
        if text.isidentifier():
            self._named(text)
        elif all(map(str.isidentifier, text.split("."))) and (module := self._enter(text)) is not None:
            for name in module.defined:
                self._need(text, name)
