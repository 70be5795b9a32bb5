"""Find the source of a function, and what the names in it stand for."""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import linecache
import types
from collections.abc import Iterable, Iterator
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
NOTHING = object()


def tree_of(function: types.FunctionType) -> Function | None:
    """The syntax tree of *function*; None if its source is not there, or is not what was run.

    Example:
        >>> tree_of(lambda states: iter(states)).args.args[0].arg, tree_of(eval("lambda states: states"))
        ('states', None)
    """
    code = function.__code__
    text = "".join(linecache.getlines(code.co_filename, function.__globals__))
    found = [node for node in _functions(text) if _line(node) == code.co_firstlineno and _fits(node, code)]
    if len(found) > 1:  # lambdas on one line
        found = [node for node in found if _within(node, code)]
    return found[0] if len(found) == 1 else None


@functools.lru_cache(maxsize=64)
def _functions(text: str) -> tuple[Function, ...]:
    try:
        return tuple(node for node in ast.walk(ast.parse(text)) if isinstance(node, Function))
    except (SyntaxError, ValueError):
        return ()


def _line(node: Function) -> int:
    """Where its code begins: at its first decorator."""
    decorators = [] if isinstance(node, ast.Lambda) else node.decorator_list
    return min([node.lineno, *(one.lineno for one in decorators)])


def _fits(node: Function, code: types.CodeType) -> bool:
    """Whether the code can have been made of this; a file may have been edited since it was imported."""
    args = node.args
    parameters = [one.arg for one in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    count = code.co_argcount + code.co_kwonlyargcount
    body = ast.Expression(node.body) if isinstance(node, ast.Lambda) else ast.Module(node.body, [])
    noted = {id(inner) for one in ast.walk(body) for hint in _annotations(one) for inner in ast.walk(hint)}
    inside = [one for one in ast.walk(body) if isinstance(one, ast.Attribute) and id(one) not in noted]
    attributes = {one.attr for one in inside}
    named = getattr(node, "name", "<lambda>") == code.co_name and parameters == list(code.co_varnames[:count])
    return named and {name for name in attributes if not name.startswith("__")} <= _names(code)


def _annotations(node: ast.AST) -> list[ast.expr]:
    """Those that hang on a node; of them nothing need be in the code."""
    found = [getattr(node, name, None) for name in ("annotation", "returns")]
    return [one for one in found if isinstance(one, ast.expr)]


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(one) for one in code.co_consts if isinstance(one, types.CodeType))
    return set(code.co_names).union(*inner)


def _within(node: Function, code: types.CodeType) -> bool:
    """Whether the code's instructions come from here."""
    body: Any = node.body
    places = [(line, column) for line, _, column, _ in code.co_positions() if line and column is not None]
    places = [place for place in places if place != (code.co_firstlineno, 0)]  # the instruction that begins it
    start, end = (body.lineno, body.col_offset), (body.end_lineno, body.end_col_offset)
    return bool(places) and isinstance(node, ast.Lambda) and all(start <= place < end for place in places)


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes beneath *node*."""
    return (inner for inner in ast.walk(node) if inner is not node)


def parameters(function: types.FunctionType) -> list[str]:
    """Names of the parameters that can be given by position."""
    return list(function.__code__.co_varnames[: function.__code__.co_argcount])


def python_function(thing: Any) -> tuple[types.FunctionType | None, Any, int]:
    """The Python function that is called if *thing* is.

    Returns:
        The function, or None; the object it is bound to, or `NOTHING`; and how many arguments are bound to it already.
    """
    if isinstance(thing, functools.partial):
        function, owner, bound = python_function(thing.func)
        return function, owner, bound + len(thing.args)
    if isinstance(thing, types.FunctionType):
        return thing, NOTHING, 0
    if isinstance(thing, types.MethodType):
        return python_function(thing.__func__)[0], thing.__self__, 1
    call = inspect.getattr_static(type(thing), "__call__", None)
    if isinstance(call, types.FunctionType) and not isinstance(thing, type):
        return call, thing, 1
    return None, NOTHING, 0


def resolve(expression: ast.expr, function: types.FunctionType, owner: Any) -> Any:
    """What an expression of names and attributes stands for, without running code; `NOTHING` if that can't be said."""
    if isinstance(expression, ast.Name):
        return _look_up(expression.id, function, owner)
    if not isinstance(expression, ast.Attribute):
        return NOTHING
    of = resolve(expression.value, function, owner)
    return NOTHING if of is NOTHING else _member(of, expression.attr)


def _look_up(name: str, function: types.FunctionType, owner: Any) -> Any:
    code = function.__code__
    if owner is not NOTHING and code.co_argcount and name == code.co_varnames[0]:
        return owner
    if name in code.co_freevars:
        try:
            return (function.__closure__ or ())[code.co_freevars.index(name)].cell_contents
        except ValueError:  # not filled yet
            return NOTHING
    if name in code.co_varnames or name in code.co_cellvars:
        return NOTHING
    return function.__globals__.get(name, getattr(builtins, name, NOTHING))


def _member(of: Any, name: str) -> Any:
    """An attribute, if it is plainly there: a property would run code."""
    if isinstance(of, types.ModuleType):
        return vars(of).get(name, NOTHING)
    found = inspect.getattr_static(of, name, NOTHING)
    if isinstance(found, types.MemberDescriptorType):  # a slot
        try:
            return found.__get__(of)
        except AttributeError:
            return NOTHING
    if isinstance(found, staticmethod):
        return found.__func__
    if isinstance(found, classmethod):
        return types.MethodType(found.__func__, of if isinstance(of, type) else type(of))
    own = isinstance(found, types.FunctionType) and not isinstance(of, type) and name not in getattr(of, "__dict__", ())
    if own:
        return types.MethodType(found, of)
    return NOTHING if isinstance(found, property | functools.cached_property) else found


def is_one(thing: Any, of: Iterable[Any]) -> bool:
    """Whether it is one of these: asked by identity, since a user's objects may compare in their own way."""
    return any(thing is one for one in of)
