"""Text without what only people and checkers read: docstrings, assertions, annotations, checks of settings."""

import ast
from typing import Any

FIELDS = ("dataclass", "NamedTuple", "TypedDict")
"""What makes annotations of a class its fields."""


def bare(tree: ast.Module, words: bool = True) -> ast.Module:
    """Return the module without docstrings, assertions and annotations, but for fields and Triton's.

    Without `words` an error that is raised says nothing: its traceback says where it was.
    """
    return _Bare(words).visit(tree)


class _Bare(ast.NodeTransformer):
    def __init__(self, words: bool) -> None:
        self._words, self._fields = words, False

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        """Leave out the words of an error."""
        if not self._words and isinstance(node.exc, ast.Call):
            node.exc.args = [
                ast.Constant("") if isinstance(one, ast.JoinedStr | ast.BinOp) or _long(one) else one
                for one in node.exc.args
            ]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Leave out the annotations of a function."""
        if "triton" not in "".join(map(ast.unparse, node.decorator_list)):  # whose annotations say what is a constant
            arguments = node.args
            several = (arguments.vararg, arguments.kwarg)
            for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *filter(None, several)):
                one.annotation = None
        node.returns = None
        before, self._fields = self._fields, False
        self.generic_visit(node)
        self._fields = before
        node.body = node.body or [ast.Expr(ast.Constant(0))]
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Leave out the words of a check."""
        self.generic_visit(node)
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if not self._words and name in ("require", "_fail"):  # both raise, with words of their arguments
            node.args = [node.args[0], *(ast.Constant("") for _ in node.args[1:])]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """Leave out the checks of settings, and know whose annotations are fields."""
        before = self._fields
        self._fields = any(word in ast.unparse(part) for part in (*node.decorator_list, *node.bases) for word in FIELDS)
        if node.name.endswith(("Config", "Settings")):  # settings were checked when the program was packed
            node.body = [one for one in node.body if getattr(one, "name", "") != "__post_init__"]
        self.generic_visit(node)
        self._fields = before
        node.body = node.body or [ast.Expr(ast.Constant(0))]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        """Leave out an annotation that is no field."""
        if self._fields:
            return node
        return None if node.value is None else ast.Assign([node.target], self.visit(node.value), lineno=node.lineno)

    def visit_Assert(self, node: ast.Assert) -> None:
        """Leave out an assertion."""
        return None

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        """Leave out a docstring."""
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> Any:
        """Leave out what only type checkers read."""
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return [self.visit(one) for one in node.orelse]
        return self.visit_For(node)

    def visit_For(self, node: Any) -> ast.AST:
        """Keep a body that has lost everything."""
        self.generic_visit(node)
        node.body = node.body or [ast.Pass()]
        return node

    visit_While = visit_With = visit_ExceptHandler = visit_For


def _long(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
