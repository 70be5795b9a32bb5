"""How a piece of source uses a value: whether it asks if that is there, or takes it for granted."""

from __future__ import annotations

import ast
import weakref
from typing import Any

from .source_code import is_one

SHOWS = {print, repr, str, format}  # builtins that show a whole state,
TAKES = {*SHOWS, float, int, round, abs, min, max, sum}  # those that make something of a value,
LOOKS = {isinstance, hasattr, id, type, bool, len, weakref.ref}  # and those that leave it alone
COPIES = {dict, list, sorted, tuple, set, len, any, all, iter, *TAKES}
ORDERS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)


def is_tested(node: ast.expr, above: ast.AST, callee: Any) -> bool:
    """Whether it is asked if something is there.

    Args:
        node: The value.
        above: What it is part of.
        callee: The function that is called, where that is a call.
    """
    if isinstance(above, ast.Compare):
        return not isinstance(above.ops[0], ORDERS)
    if isinstance(above, ast.Call):
        return is_one(callee, (isinstance, bool))
    negated = isinstance(above, ast.UnaryOp) and isinstance(above.op, ast.Not)
    in_ifs = isinstance(above, ast.comprehension) and node in above.ifs
    return negated or in_ifs or isinstance(above, ast.BoolOp) or getattr(above, "test", None) is node


def is_taken_for_granted(node: ast.expr, above: ast.AST, callee: Any) -> bool:
    """Whether a None in its place would fail, or be shown or kept; arguments as for `is_tested`."""
    if isinstance(above, ast.Compare):
        return isinstance(above.ops[0], ORDERS)
    if isinstance(above, ast.Call) and node in above.args:
        return is_one(callee, TAKES) or (isinstance(above.func, ast.Attribute) and above.func.attr == "append")
    kinds = (ast.BinOp, ast.UnaryOp, ast.Attribute, ast.FormattedValue)
    return isinstance(above, kinds) or (isinstance(above, ast.Subscript) and above.value is node)
