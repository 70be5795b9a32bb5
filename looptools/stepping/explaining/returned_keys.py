"""Find the keys of what a step returns."""

from __future__ import annotations

import ast
from typing import Any

from .source_code import Function, own_nodes, python_function, tree_of


def returned_keys(step: Any) -> tuple[list[str], bool]:
    """Keys of the mappings that a step returns, and whether these are all that can be.

    Example:
        >>> returned_keys(lambda model, batch: {"loss": model(batch), "size": len(batch)})
        (['loss', 'size'], True)
        >>> returned_keys(lambda model, batch: model(batch))
        ([], False)
    """
    function = python_function(step)[0]
    tree = None if function is None else tree_of(function)
    if tree is None or isinstance(tree, ast.AsyncFunctionDef):
        return [], False
    if isinstance(tree, ast.Lambda):
        return _keys(tree.body, tree)
    inner = {id(node) for one in own_nodes(tree) if isinstance(one, Function) for node in own_nodes(one)}
    returns = [one for one in own_nodes(tree) if isinstance(one, ast.Return) and id(one) not in inner]
    found = [_keys(one.value, tree) for one in returns if one.value is not None]
    keys = list(dict.fromkeys(key for keys, _ in found for key in keys))
    return keys, bool(found) and len(found) == len(returns) and all(complete for _, complete in found)


def _keys(value: ast.expr, tree: ast.AST) -> tuple[list[str], bool]:
    """Those of an expression: a literal, or a name that stands for one and is only added to."""
    if isinstance(value, ast.IfExp):
        (one, first), (other, second) = _keys(value.body, tree), _keys(value.orelse, tree)
        return list(dict.fromkeys([*one, *other])), first and second
    if isinstance(value, ast.Dict):
        keys = [key.value for key in value.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
        return keys, len(keys) == len(value.keys)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "dict" and not value.args:
        return [one.arg for one in value.keywords if one.arg], all(one.arg for one in value.keywords)
    return _keys_of_name(value.id, tree) if isinstance(value, ast.Name) else ([], False)


def _keys_of_name(name: str, tree: ast.AST) -> tuple[list[str], bool]:
    above = {id(child): node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    keys: list[str] = []
    complete, made = True, 0
    for node in own_nodes(tree):
        if not isinstance(node, ast.Name) or node.id != name:
            continue
        use = above[id(node)]
        if isinstance(use, ast.Assign) and isinstance(use.value, ast.Dict) and not isinstance(node.ctx, ast.Load):
            more, all_of_them = _keys(use.value, tree)
            keys, complete, made = [*keys, *more], complete and all_of_them, made + 1
        elif isinstance(use, ast.Subscript) and use.value is node and isinstance(use.slice, ast.Constant):
            keys += [str(use.slice.value)] if isinstance(use.ctx, ast.Store) else []
        else:
            complete = complete and isinstance(use, ast.Return)
    return list(dict.fromkeys(keys)), complete and made > 0
