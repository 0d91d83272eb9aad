"""What of a module never runs where some modules are absent, found in its tree and taken out of its source."""

import ast
from collections.abc import Collection
from typing import Any

from core.weights.naming import Edit, cut_statement, span


class Pruning(ast.NodeTransformer):
    """Takes out of a tree what only type checkers read, and branches that ask for an absent module.

    `edits` do the same to the source.
    """

    def __init__(self, source: bytes, absent: Collection[str]) -> None:
        self._source, self._absent = source, absent
        self._gone: set[str] = set()
        """Names that are imported from absent modules."""
        self.edits: list[Edit] = []

    def pruned(self, tree: ast.Module) -> ast.Module:
        """Return the tree without all that."""
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and self._is_absent(node):
                self._gone |= {alias.asname or alias.name for alias in node.names}
        # What explains a module or a constant: it goes where that goes.
        tree.body = [
            one for one in tree.body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))
        ]
        return self.visit(tree)

    def _is_absent(self, node: ast.ImportFrom) -> bool:
        module = node.module or ""
        wholes = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        return any(whole == one or whole.startswith(f"{one}.") for whole in wholes for one in self._absent)

    def _asks(self, node: ast.expr) -> bool:
        return any(isinstance(one, ast.Name) and one.id in self._gone for one in ast.walk(node))

    def visit_If(self, node: ast.If) -> Any:
        """Leave out a branch that asks for an absent module, or that only type checkers read."""
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return [self.visit(one) for one in node.orelse]
        imports = any(isinstance(one, ast.ImportFrom) and self._is_absent(one) for one in node.body)
        if not imports and not self._asks(node.test):
            return self.generic_visit(node)
        if node.orelse:
            raise ValueError(f"line {node.lineno}: a branch that asks for an absent module has another behind it")
        self.edits.append(cut_statement(self._source, node))
        return None

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        """Take the other side where a condition asks for an absent module."""
        self.generic_visit(node)
        if not self._asks(node.test):
            return node
        whole, kept = span(self._source, node), span(self._source, node.orelse)
        self.edits += [Edit(whole[0], kept[0], b""), Edit(kept[1], whole[1], b"")]
        return node.orelse
