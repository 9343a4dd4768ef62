"""Rewrite one line of source so that the graph stays whole: ``y = math.tanh(a.item())`` is ``y = torch.tanh(a)``."""

from __future__ import annotations

import ast
import linecache
import re

import torch

from dualnn.diagnosis.tracer import Place

_LEAVES = {"item", "detach", "numpy", "cpu", "tolist"}
_COPIES = {"from_numpy", "as_tensor", "tensor", "asarray", "array"}
_FOREIGN = {"math", "np", "numpy"}


def source(place: Place) -> str:
    """The text of a line, without its comment."""
    line = linecache.getline(place.file, place.line).strip() if place.file else ""
    return re.sub(r"\s+#[^'\"]*$", "", line)


def rewritten(line: str) -> str:
    """The line with its exits from the graph removed; "" where it has none, or where that takes more than a line."""
    try:
        tree = ast.parse(f"def f():\n {line}")
    except SyntaxError:
        return ""
    if any(isinstance(n, (ast.comprehension, ast.Lambda)) for n in ast.walk(tree)):
        return ""  # numbers taken one by one
    before = ast.dump(tree)
    whole = _Whole()
    after = whole.visit(tree)
    if not whole.known or ast.dump(after) == before:
        return ""
    return ast.unparse(ast.fix_missing_locations(after.body[0].body[0]))


def _expression(code: str) -> ast.expr:
    return ast.parse(code, mode="eval").body


class _Whole(ast.NodeTransformer):
    known = True  # every function that takes the place of a foreign one is one of torch's

    def visit_Call(self, node: ast.Call) -> ast.AST:  # noqa: N802
        self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Attribute(value=value, attr=name), args=[], keywords=[]) if name in _LEAVES:
                return value
            case ast.Call(func=ast.Name(id="float"), args=[value]):
                return value
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="vander"), args=[x, n], keywords=[]):
                # torch.vander starts with the highest power, torch.linalg.vander with the lowest.
                return _expression(f"torch.linalg.vander({ast.unparse(x)}, N={ast.unparse(n)}).flip(-1)")
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="linspace"), args=[low, high, *rest]):
                if ast.unparse(low) == "0" and ast.unparse(high) == "1":
                    return node
                unit = ast.Call(node.func, [ast.Constant(0), ast.Constant(1), *rest], node.keywords)
                a, b = ast.unparse(low), ast.unparse(high)
                return _expression(f"({a}) + (({b}) - ({a})) * {ast.unparse(unit)}")
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name), args=[x, *_]) if name in _COPIES:
                return x
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.value, ast.Name) and node.value.id in _FOREIGN:
            self.known = self.known and (node.attr in _COPIES or hasattr(torch, node.attr))
            return ast.Attribute(ast.Name("torch", ast.Load()), node.attr, node.ctx)
        return node.value if node.attr == "data" else node
