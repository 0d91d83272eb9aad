"""What the settings decide is decided when a program is packed: branches that they never take are left out."""

import ast
import dataclasses
import operator
from typing import Any

from core.config import RunConfig
from core.model.params import param_table
from core.model.storage import KINDS, storage_class

ROOTS = {
    "config": ("", "model", "train", "eval"),
    "settings": ("train", "eval", "export"),
    "model": ("model",),
}
"""Name of a variable, or of an attribute less its underscores -> parts of the settings that it may hold; "": all."""
LATER = ("preset", "seed", "data", "export.code_bytes")
"""Settings that are read as they are when the program runs."""
LEARNING = ("eval.plugins", "eval.round", "eval.adapt", "eval.phases", "eval.learns")
"""Settings that EvalConfig.plain changes."""
OPERATORS = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
MISSING = object()
PLAIN = (bool, int, float, str, type(None))


class Folding(ast.NodeTransformer):
    """Puts the values of settings, and of attributes by module, into texts and leaves out what they make dead."""

    def __init__(self, config: RunConfig, facts: dict[str, dict[str, Any]]) -> None:
        self._facts, self._known, self._module = facts, dict[str, Any](), ""
        self._later = (*LATER, *(LEARNING if config.eval.learns else ()))
        parts = {"model": config.model, "train": config.train, "eval": config.eval, "export": config.export}
        self._parts: dict[str, Any] = {"": config, **parts}
        self._classes = {_class(part): name for name, part in self._parts.items()}
        for field in dataclasses.fields(config.model):
            inner = getattr(config.model, field.name)
            if dataclasses.is_dataclass(inner):
                self._parts[f"model.{field.name}"] = inner
                self._classes[_class(inner)] = f"model.{field.name}"
        self._parts |= {"adapt": config.eval.adapt, "eval.phases": config.eval.phases}
        self._inside: str | None = None
        used = {storage_class(row.storage) for row in param_table(config.model).values()}
        self._unused = {kind for kind in KINDS if kind not in used} - {"float16"}  # that is a compute type, too

    def folded(self, name: str, tree: ast.Module) -> ast.Module:
        """Return the text of module `name`, changed."""
        self._module, self._known = name, self._facts.get(name, {})
        return ast.fix_missing_locations(self.visit(tree))

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """Know in whose methods a name stands."""
        before, self._inside = self._inside, self._classes.get(f"{self._module}.{node.name}")
        self.generic_visit(node)
        self._inside = before
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """Put in what a variable is known to hold."""
        value = self._known.get(node.id, MISSING) if isinstance(node.ctx, ast.Load) else MISSING
        return node if value is MISSING else _literal(value)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """Put in what an attribute is known to hold."""
        value = self._known.get(node.attr, MISSING) if isinstance(node.ctx, ast.Load) else MISSING
        if value is MISSING and isinstance(node.ctx, ast.Load):
            value = self._value(node)
        return _literal(value) if type(value) in PLAIN or value == () else self.generic_visit(node)

    def _value(self, node: ast.Attribute) -> Any:
        """Return the value of a setting, or of a property of settings; MISSING for anything else."""
        holders = self._holders(node.value)
        found = [(place, self._parts[place]) for place in holders if hasattr(self._parts[place], node.attr)]
        if found and len(holders) > 1:  # a variable's name is no proof: no other part may have such a setting
            found = [(place, part) for place, part in self._parts.items() if hasattr(part, node.attr)]
        if len(found) != 1 or self._is_later(f"{found[0][0]}.{node.attr}".strip(".")):
            return MISSING
        return getattr(found[0][1], node.attr)

    def _is_later(self, name: str) -> bool:
        return any(name == one or name.startswith(f"{one}.") for one in self._later)

    def _holders(self, node: ast.expr) -> list[str]:
        """Return the parts of the settings that an expression may stand for."""
        if isinstance(node, ast.Name) and node.id == "self":
            return [] if self._inside is None else [self._inside]
        if isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if isinstance(node, ast.Attribute):
                inner = [f"{place}.{name}".strip(".") for place in self._holders(node.value)]
                if known := [place for place in inner if place in self._parts]:
                    return known
            if name == "_run":
                return [""]
            if name == "_adapt":  # of what adapts, which an evaluation without it does not make
                return ["adapt"]
            if name != "_model":  # a backend's module
                return list(ROOTS.get(name.lstrip("_"), ("train",) if name == "_train" else ()))
        return []

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Put in what a call is known to give."""
        asked = node.func if isinstance(node.func, ast.Attribute) and node.func.attr == "mixes" else None
        if asked is not None and "model" in self._holders(asked.value):
            return ast.Constant(self._parts["model"].mixes(ast.literal_eval(node.args[0])))
        if isinstance(node.func, ast.Attribute) and f"{node.func.attr}()" in self._known:
            return _literal(self._known[f"{node.func.attr}()"])
        if isinstance(node.func, ast.Attribute):  # a method has no value here
            node.func.value = self.visit(node.func.value)
            node.args = [self.visit(one) for one in node.args]
            node.keywords = [self.visit(one) for one in node.keywords]
            return node
        self.generic_visit(node)
        name, inner = getattr(node.func, "id", ""), node.args[0] if node.args else None
        if name == "any" and isinstance(inner, ast.GeneratorExp) and _constant(inner.generators[0].iter) == ():
            return ast.Constant(False)
        given = self._known.get(f"{name}()", MISSING)
        if given is not MISSING:
            return _literal(given)
        plain = isinstance(node.func, ast.Name) and node.func.id == "bool" and len(node.args) == 1
        value = _constant(node.args[0]) if plain else MISSING
        return node if value is MISSING else ast.Constant(bool(value))

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        """Put in what a comparison of constants says."""
        self.generic_visit(node)
        left, right = _constant(node.left), _constant(node.comparators[0])
        if type(right) is str and right in self._unused and isinstance(node.ops[0], ast.Eq | ast.NotEq):
            return ast.Constant(isinstance(node.ops[0], ast.NotEq))
        if len(node.ops) > 1 or left is MISSING or right is MISSING:
            return node
        try:
            return ast.Constant(OPERATORS[type(node.ops[0])](left, right))
        except TypeError:  # it stands where it is never reached
            return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        """Put in what `not` makes of a constant."""
        self.generic_visit(node)
        value = _constant(node.operand) if isinstance(node.op, ast.Not) else MISSING
        return node if value is MISSING else ast.Constant(not value)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        """Leave out what a constant decides."""
        self.generic_visit(node)
        ends, kept = isinstance(node.op, ast.Or), list[ast.expr]()
        for place, one in enumerate(node.values):
            value = _constant(one)
            if value is MISSING or place == len(node.values) - 1:
                kept.append(one)
            elif bool(value) == ends:
                kept.append(one)
                break
        node.values = kept
        return node if len(kept) > 1 else kept[0]

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        """Take the side that a constant decides for."""
        self.generic_visit(node)
        value = _truth(node.test)
        return node if value is MISSING else node.body if value else node.orelse

    def visit_If(self, node: ast.If) -> Any:
        """Take the branch that a constant decides for."""
        self.generic_visit(node)
        node.body, node.orelse = _alive(node.body) or [ast.Pass()], _alive(node.orelse)
        value = _truth(node.test)
        return node if value is MISSING else (node.body if value else node.orelse)

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        """Leave out the words of `skc info` on FLOPs."""
        self.generic_visit(node)
        return None if ast.unparse(node.targets[0]) == "FLOPS" else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Leave out what nobody reads any more, and what stands behind a return."""
        self.generic_visit(node)
        read = {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load)}
        node = _Unread(read).visit(node)
        node.body = _alive(node.body) or [ast.Pass()]
        return node

    def visit_ListComp(self, node: ast.ListComp) -> ast.AST:
        """Put in what comes of going through nothing."""
        self.generic_visit(node)
        return ast.List([], ast.Load()) if _constant(node.generators[0].iter) == () else node

    def visit_For(self, node: ast.For) -> ast.AST:
        """Leave out a walk through nothing, and keep a body that has lost everything."""
        self.generic_visit(node)
        if isinstance(node, ast.For) and _constant(node.iter) == ():
            return ast.Pass()
        node.body = _alive(node.body) or [ast.Pass()]
        return node

    visit_With = visit_While = visit_ExceptHandler = visit_For  # type: ignore[assignment]


def _class(part: Any) -> str:
    return f"{type(part).__module__}.{type(part).__name__}"


def _literal(value: Any) -> ast.expr:
    return ast.Tuple([], ast.Load()) if value == () else ast.Constant(value)


def _alive(body: list[ast.stmt]) -> list[ast.stmt]:
    """Return the statements up to one that leaves."""
    for place, one in enumerate(body):
        if isinstance(one, ast.Return | ast.Raise):
            return body[: place + 1]
    return body


class _Unread(ast.NodeTransformer):
    """Takes texts away that are given names which nobody reads: of errors whose words were left out."""

    def __init__(self, read: set[str]) -> None:
        self._read = read

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        """Leave out a text that nobody reads."""
        target, text = node.targets[0], isinstance(node.value, ast.JoinedStr | ast.Constant)
        return None if text and isinstance(target, ast.Name) and target.id not in self._read else node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """Leave classes as they are."""
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        """Keep a body that has lost everything."""
        self.generic_visit(node)
        node.body = node.body or [ast.Pass()]
        return node

    visit_For = visit_While = visit_With = visit_Try = visit_ExceptHandler = visit_If  # type: ignore[assignment]


def _truth(node: ast.expr) -> Any:
    """Return what a condition comes to, also where its last part decides and the others do nothing; else MISSING."""
    if isinstance(node, ast.BoolOp) and not any(isinstance(one, ast.Call) for one in ast.walk(node)):
        last = _constant(node.values[-1])
        return bool(last) if last is not MISSING and bool(last) == isinstance(node.op, ast.Or) else MISSING
    return _constant(node)


def _constant(node: ast.expr) -> Any:
    """Return the value of a constant, or of a list of constants; MISSING for anything else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Tuple | ast.List) and all(isinstance(one, ast.Constant) for one in node.elts):
        return tuple(one.value for one in node.elts if isinstance(one, ast.Constant))
    return MISSING
