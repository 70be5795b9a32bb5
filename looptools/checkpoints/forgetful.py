"""Plain generator functions that remember something in local variables, which nobody can save."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from ..cursor import Cursor

GROWING = {"add", "append", "appendleft", "extend", "insert", "pop", "popleft", "setdefault", "update"}


def forgetful(cursor: Cursor) -> list[str]:
    """Names of the parts that lose something when the run is resumed, with the variables: ``run/spikes (count)``.

    Of a phase only while a pass is under way: with a new pass it begins anew in any case.
    """
    inside = set(map(id, cursor.line))
    slots = [slot for slot in cursor.slots if slot.of_run or id(slot) in inside]
    found = [(slot.name, kept_in_locals(slot.part)) for slot in slots]
    return [f"{name} ({', '.join(names)})" for name, names in found if names]


def kept_in_locals(part: Any) -> list[str]:
    """Local variables that a generator function sets before its loop, and changes within it.

    Example:
        >>> import functools
        >>> kept_in_locals(functools.wraps), kept_in_locals(print)
        ([], [])
    """
    while isinstance(part, functools.partial):
        part = part.func
    if not inspect.isgeneratorfunction(part):
        return []
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
    except (OSError, TypeError, SyntaxError):  # typed at a prompt, or a lambda: nobody can tell
        return []
    body = next((node.body for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)), [])
    loop = next((n for n, node in enumerate(body) if isinstance(node, ast.For | ast.While)), len(body))
    before = {name for node in body[:loop] for name in _stored(ast.walk(node))}
    within = {name for node in body[loop:] for name in _changed(ast.walk(node))}
    return sorted(before & within)


def _stored(nodes: Iterable[ast.AST]) -> Iterator[str]:
    return (node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))


def _changed(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Names that are assigned to, item by item too, or whose method makes them grow or shrink."""
    for node in nodes:
        yield from _stored([node])
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            yield node.value.id
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and called.attr in GROWING and isinstance(called.value, ast.Name):
            yield called.value.id
