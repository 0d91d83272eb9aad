"""Several modules of ours as the text of one that imports none: what a program needs, as it was written.

Which definitions are needed the packer's shaking says; here they are put one behind the other, with comments and
docstrings. A name that two modules have, or that is some variable's too, gets another one.
"""

import ast
import builtins
import itertools
import keyword
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeGuard

from core import ROOT
from core.files import read_text
from core.submission.shaking import ENTRY, OURS, Shaken, defines
from core.weights.naming import Called, Edit, cut_statement, first_line, line_starts, local_names, renamed
from core.weights.pruning import Pruning

SETTINGS = "core.model"
"""Below it classes are the settings of parts; a backend's part has the same name."""


class Defined(NamedTuple):
    """A definition: the module that it stands in, and its name there."""

    module: str
    name: str


def flat_module(entry: str, names: Mapping[Defined, str], absent: Collection[str] = ()) -> str:
    """Return one module's text with what `entry`, a program's text, needs of ours.

    `names`: what definitions are called there. `absent` modules, definitions (module.name) and methods
    (module.class.name) are left out, and with them the branches that ask for an absent module. ValueError for what
    cannot be put into one module.
    """
    return _Flat(entry, names, absent).text()


class _Flat:
    def __init__(self, entry: str, names: Mapping[Defined, str], absent: Collection[str]) -> None:
        self._absent = absent
        self._sources: dict[str, bytes] = {}
        self._edits: dict[str, list[Edit]] = {}
        self._members: dict[ast.ClassDef, list[ast.stmt]] = {}
        shaken = Shaken(entry, absent, self._pruned)
        self._modules = {name: module for name, module in shaken.modules.items() if name != ENTRY}
        self._kept = {name: shaken.text(name).body for name in self._modules}
        self._foreign = self._foreign_imports()
        self._names = self._unique_names(names)

    def _pruned(self, name: str, tree: ast.Module) -> ast.Module:
        """Return a module's tree without what is never run; positions stay those of the source."""
        if name == ENTRY:
            return tree
        source = self._sources[name] = read_text(_path(name)).encode()
        pruning = Pruning(source, self._absent)
        tree = pruning.pruned(tree)
        self._edits[name] = pruning.edits
        self._members |= {node: list(node.body) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        return tree

    def _place(self, module: str, name: str) -> Defined | str | None:
        """Return what a module's global name stands for: a definition, or the name of a module of ours; else None."""
        own = self._modules[module]
        if name in own.defined:
            return Defined(module, name)
        source, inner = own.imported.get(name, ("", None))
        whole = source if inner is None else f"{source}.{inner}"
        if source in self._modules and inner is not None and (found := self._place(source, inner)) is not None:
            return found
        return whole if whole in self._modules else None

    def _foreign_imports(self) -> dict[str, tuple[str, str | None]]:
        """Return local name -> (module of others, name in it; None: the module itself)."""
        found: dict[str, tuple[str, str | None]] = {}
        for name, module in self._modules.items():
            for local in sorted(module.needed & set(module.imported)):
                source, inner = module.imported[local]
                if source.partition(".")[0] in OURS:
                    continue
                if found.setdefault(local, (source, inner)) != (source, inner):
                    raise ValueError(f"{name}: {local} is {source}.{inner}, but elsewhere {found[local]}")
        return found

    def _unique_names(self, given: Mapping[Defined, str]) -> dict[Defined, str]:
        """Return what every definition is called in the one module."""
        every = (Defined(name, one) for name, body in self._kept.items() for part in body for one in defines(part))
        places = list(dict.fromkeys(every))
        counts = Counter(place.name for place in places if not place.module.startswith(SETTINGS))
        taken = {*self._foreign, *dir(builtins), *keyword.kwlist, *given.values()}
        taken = taken.union(*map(local_names, self._kept.values()))
        names = dict(given)
        for place in places:
            if place.name == "_":
                names[place] = "_"
            elif place not in names:
                names[place] = next(name for name in _proposals(place, counts[place.name]) if name not in taken)
                taken.add(names[place])
        return names

    def text(self) -> str:
        """Return the module's text."""
        sections = [section for name in self._order() if (section := self._section(name))]
        return "\n\n\n".join([_import_lines(self._foreign), *sections]) + "\n"

    def _order(self) -> list[str]:
        """Return the modules, each behind those that it imports."""
        order: dict[str, None] = {}
        entered: set[str] = set()

        def enter(name: str) -> None:
            if name in entered:
                return
            entered.add(name)
            module = self._modules[name]
            for local in module.imported:
                found = self._place(name, local) if local in module.needed else None
                if found is not None:
                    enter(found.module if isinstance(found, Defined) else found)
            order[name] = None

        for name in self._modules:
            enter(name)
        return list(order)

    def _section(self, name: str) -> str:
        """Return what is kept of a module behind a comment that says what the module is; empty: nothing is."""
        body = [one for one in self._kept[name] if not isinstance(one, ast.Import | ast.ImportFrom)]
        body = [one for one in body if one not in self._stubs(name)]
        if not body:
            return ""
        source = self._sources[name]
        tree, nameless = ast.parse(source), {one.name for one in body if _is_nameless(one)}

        def called(one: str) -> Called:
            return "_" if one in nameless else self._called(name, one)

        edits = [*self._edits[name], *renamed(source, body, called), *self._gone(name)]
        head = (ast.get_docstring(tree) or "").splitlines()
        lines = [f"# -------- {name}", "#", *(f"# {line}".rstrip() for line in head)]
        text, before = "\n".join(lines) + "\n", None
        for statement in body:
            close = before is not None and not isinstance(statement, ast.FunctionDef | ast.ClassDef)
            close = close and not isinstance(before, ast.FunctionDef | ast.ClassDef)
            text += ("\n" if close or before is None else "\n\n\n") + _piece(source, tree, statement, edits)
            before = statement
        return text

    def _stubs(self, name: str) -> list[ast.stmt]:
        """Return the empty classes that stand for what is absent: nobody asks for them here."""
        known = {id(one) for ones in self._modules[name].defined.values() for one in ones}
        known |= {id(one) for one in self._modules[name].others}
        return [one for one in self._kept[name] if id(one) not in known]

    def _called(self, module: str, name: str) -> Called:
        """Return what a module's global name is called in the one module."""
        found = self._place(module, name)
        if isinstance(found, Defined):
            return self._names[found]
        if found is None:
            return None
        inner = {*self._modules[found].defined, *self._modules[found].imported}
        places = {one: self._place(found, one) for one in inner}
        return {one: self._names[at] for one, at in places.items() if isinstance(at, Defined) and at in self._names}

    def _gone(self, name: str) -> Iterator[Edit]:
        """Yield the edits that take methods away which nobody calls."""
        for statement in self._kept[name]:
            members = self._members.get(statement, []) if isinstance(statement, ast.ClassDef) else []
            kept = {id(one) for one in getattr(statement, "body", [])}
            yield from (cut_statement(self._sources[name], one) for one in members if id(one) not in kept)


def _path(name: str) -> Path:
    path = Path(ROOT, *name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _is_nameless(statement: ast.stmt) -> TypeGuard[ast.FunctionDef]:
    """Return whether a function is called by the one alone whose gradients it makes."""
    return isinstance(statement, ast.FunctionDef) and statement.name not in [*defines(statement), statement.name][:1]


def _import_lines(imports: Mapping[str, tuple[str, str | None]]) -> str:
    """Return the statements that import names (local name -> module, name in it)."""
    lines, several = [], dict[str, list[str]]()
    for local, (source, inner) in sorted(imports.items()):
        alias = f" as {local}" if local != (inner or source) else ""
        if inner is None:
            lines.append(f"import {source}{alias}")
        else:
            several.setdefault(source, []).append(f"{inner}{alias}")
    lines += [f"from {source} import {', '.join(names)}" for source, names in sorted(several.items())]
    return "\n".join(sorted(lines, key=lambda line: line.startswith("from")))


def _proposals(place: Defined, others: int) -> Iterator[str]:
    """Yield names for a definition, the best first; `others`: how many modules but those of settings have its name."""
    tail, name = place.module.rpartition(".")[2], place.name.lstrip("_")
    if place.module.startswith(SETTINGS):
        yield place.name if not others else f"{name}Settings" if name[0].isupper() else f"{tail}_{name}"
    elif others == 1:
        yield place.name
    yield f"{tail}_{name}".upper() if name.isupper() else f"{tail}_{name}"
    whole = place.module.replace(".", "_")
    yield from (f"{whole}_{name}{number or ''}" for number in itertools.count())


def _piece(source: bytes, tree: ast.Module, statement: ast.stmt, edits: list[Edit]) -> str:
    """Return a statement with the comments in front of it and the text behind it that explains it, edited."""
    starts, last = line_starts(source), statement.end_lineno or statement.lineno
    for one, following in itertools.pairwise(tree.body):
        explains = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if explains and one.lineno == statement.lineno and isinstance(one, ast.Assign | ast.AnnAssign):
            last = following.end_lineno or last
    begin, end = starts[first_line(source, statement)], starts[last] - 1
    text, at = b"", begin
    for edit in sorted(set(edits)):
        if at <= edit.begin and edit.end <= end + 1:
            text, at = text + source[at : edit.begin] + edit.text, edit.end
    indent = statement.col_offset
    lines = (text + source[at:end]).decode().split("\n")
    return "\n".join(line[indent:] if not line[:indent].strip() else line for line in lines).strip("\n")
