"""Read off a function's source what it does with a state: which fields, and which keys of their mappings."""

from __future__ import annotations

import ast
import builtins
import types
import weakref
from collections.abc import Iterable
from typing import Any

import attrs

from ...state import State
from .asking import COPIES, LOOKS, SHOWS, is_taken_for_granted, is_tested
from .fields import FIELDS, MAPPINGS, Uses, item_of, items_of
from .source_code import NOTHING, Function, is_one, own_nodes, parameters, python_function, resolve, tree_of

STREAM, STATE, PAIRS = "stream", "state", "pairs"  # what an expression can stand for, besides one of the mappings
FACTS = {field.name for field in attrs.fields(State)} | {"stop"}
COUNTERS = {"iteration", "epoch", "index", "first", "last", "round_last"}
DEEPEST = 4  # calls

LEAVES = (ast.Continue, ast.Return, ast.Break, ast.Raise)


def read(thing: Any, given: dict[int, str], depth: int = 0, seen: frozenset[Any] = frozenset()) -> Uses:
    """What calling *thing* does with the states that it is given.

    Args:
        thing: A function, or an object that is called.
        given: What it is given: `STATE` or `STREAM`, by position.
        depth: How many calls this is away from the first.
        seen: The functions on the way here.
    """
    function, owner, bound = python_function(thing)
    if function is None or depth > DEEPEST:
        return Uses(unseen=True)
    names = dict(enumerate(parameters(function)))
    if any(number + bound not in names for number in given):
        return Uses(unseen=True)
    return _read(function, owner, {names[number + bound]: role for number, role in given.items()}, depth, seen)


def _read(function: types.FunctionType, owner: Any, roles: dict[str, str], depth: int, seen: frozenset[Any]) -> Uses:
    key = (function.__code__, *sorted(roles.items()))
    if key in seen:
        return Uses()
    tree = tree_of(function)
    return Uses(unseen=True) if tree is None else _Reader(tree, function, owner, roles, depth, seen | {key}).uses


class _Reader:
    """Goes through one function."""

    def __init__(
        self,
        tree: Function,
        function: types.FunctionType,
        owner: Any,
        roles: dict[str, str],
        depth: int,
        seen: frozenset[Any],
    ) -> None:
        self.function, self.owner, self.depth, self.seen = function, owner, depth, seen
        self.uses = Uses()
        self.asked: set[str] = set()  # what is tested for being there
        self.above = {id(child): node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        self.names = dict(roles)
        self.bound: set[int] = set()
        self.called: dict[int, Uses] = {}
        self.late = False  # behind a yield: when that is run, all other parts have seen the state
        for _ in range(3):  # an alias of an alias
            self._bind_all(tree)
        self._require_plain_names(tree)
        body: Any = tree.body
        if isinstance(tree, ast.Lambda):
            self._visit(body, False)
        else:
            self._block(body, False)
        for item in [one for one in self.uses.needs if one != "updates" and _asked(one, self.asked)]:
            del self.uses.needs[item]

    # What names stand for

    def _bind_all(self, tree: ast.AST) -> None:
        for node in own_nodes(tree):
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and node.value is not None:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self._bind(target, self._role(node.value))
            elif isinstance(node, ast.For | ast.comprehension):
                role, target = self._role(node.iter), node.target
                if role == PAIRS and isinstance(target, ast.Tuple) and len(target.elts) == 2:
                    self._bind(target.elts[1], STATE)
                elif role == STREAM:
                    self._bind(target, STATE)

    def _bind(self, target: ast.expr, role: str) -> None:
        if role and isinstance(target, ast.Name) and self.names.get(target.id, role) == role:
            self.names[target.id] = role
            self.bound.add(id(target))

    def _require_plain_names(self, tree: ast.AST) -> None:
        """A name that stands for a state here and for something else there is not followed."""
        for node in own_nodes(tree):
            again = isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load) and id(node) not in self.bound
            if again and node.id in self.names:  # type: ignore[attr-defined]
                self.uses.unseen = True
            if isinstance(node, Function) and any(one.arg in self.names for one in node.args.args):
                self.uses.unseen = True

    def _role(self, node: ast.expr) -> str:
        """What an expression stands for: `STATE`, `STREAM`, the name of one of its mappings, or nothing of them."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, "")
        if isinstance(node, ast.Attribute):
            return node.attr if node.attr in MAPPINGS and self._role(node.value) == STATE else ""
        if isinstance(node, ast.NamedExpr):
            return self._role(node.value)
        if isinstance(node, ast.Call) and node.args:
            role, target = self._role(node.args[0]), resolve(node.func, self.function, self.owner)
            if role == STREAM and is_one(target, (next, iter, enumerate)):
                return {next: STATE, iter: STREAM, enumerate: PAIRS}[target]
            hands_on = role == STREAM and python_function(target)[0] is not None
            return STREAM if hands_on and not self._called(node, target).unseen else ""
        return ""

    # Going through it; guarded is what does not happen for every state

    def _block(self, body: Iterable[ast.stmt], guarded: bool) -> None:
        before = self.late
        for statement in body:
            self._visit(statement, guarded)
            inner = list(own_nodes(statement))
            if isinstance(statement, ast.If) and not self._counts(statement.test):
                guarded = guarded or any(isinstance(node, LEAVES) for node in inner)
            if any(isinstance(node, ast.Yield | ast.YieldFrom) for node in inner):
                guarded = self.late = True
        self.late = before

    def _visit(self, node: ast.AST, guarded: bool) -> None:
        if isinstance(node, ast.If | ast.IfExp):
            self._visit(node.test, guarded)
            inner = guarded or not self._counts(node.test)
            for branch in (node.body, node.orelse):
                self._block(branch, inner) if isinstance(branch, list) else self._visit(branch, inner)
        elif isinstance(node, ast.BoolOp):
            for value in node.values:
                self._visit(value, guarded)
                guarded = guarded or not self._counts(value)
        elif isinstance(node, ast.For):
            self._visit(node.target, guarded)
            self._visit(node.iter, guarded)
            self._block(node.body, guarded or self._role(node.iter) not in (STREAM, PAIRS))
            self._block(node.orelse, True)
        elif isinstance(node, ast.With):
            self._children(node, guarded or any("suppress" in ast.dump(one) for one in node.items))
        elif isinstance(node, ast.While):
            self._visit(node.test, guarded)
            self._block(node.body, guarded or not isinstance(node.test, ast.Constant))
            self._block(node.orelse, True)
        elif isinstance(node, ast.Call):
            self._call(node, guarded)
        elif isinstance(node, ast.Attribute) and self._role(node.value) == STATE:
            self._field(node, guarded)
            if not isinstance(node.value, ast.Name):
                self._visit(node.value, guarded)
        elif isinstance(node, ast.expr) and self._role(node) in MAPPINGS:
            self._mapping(node, self._role(node), guarded)
        elif isinstance(node, ast.Name) and self._role(node):
            self._whole(node)
        else:
            conditional = (ast.Try, ast.TryStar, ast.Match, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
            guarded = guarded or isinstance(node, (conditional, Function))
            self._children(node, guarded)

    def _children(self, node: ast.AST, guarded: bool) -> None:
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                self._block(value, guarded)
            else:
                for one in value if isinstance(value, list) else [value]:
                    if isinstance(one, ast.AST):
                        self._visit(one, guarded)

    def _counts(self, test: ast.expr) -> bool:
        """Whether a condition is only about how far the run is: it will be true some time."""
        if isinstance(test, ast.BoolOp):
            return all(map(self._counts, test.values))
        if isinstance(test, ast.Constant):
            return bool(test.value)
        of_state = {n.attr for n in ast.walk(test) if isinstance(n, ast.Attribute) and self._role(n.value) == STATE}
        return bool(of_state) and of_state <= COUNTERS

    # What is done with a state

    def _read(self, item: str, needed: bool) -> None:
        self.uses.reads[item] = None
        if needed:
            self.uses.needs[item] = None

    def _whole(self, node: ast.Name) -> None:
        """A state, or a stream, by itself: followed as far as it only goes through."""
        above = self.above[id(node)]
        through: Any = (ast.Yield, ast.YieldFrom, ast.Compare, ast.Expr, ast.For, ast.comprehension, ast.NamedExpr)
        through = (*through, ast.GeneratorExp)
        if isinstance(above, ast.Return) and self.names[node.id] == STREAM:
            return
        renamed = isinstance(above, ast.Assign | ast.AnnAssign)
        targets: list[ast.expr] = above.targets if isinstance(above, ast.Assign) else [getattr(above, "target", node)]
        fine = isinstance(above, through) or not isinstance(node.ctx, ast.Load) or self._is_tested(node)
        if not fine and not (renamed and all(id(target) in self.bound for target in targets)):
            self.uses.unseen = True

    def _field(self, node: ast.Attribute, guarded: bool) -> None:
        name, above = node.attr, self.above[id(node)]
        stored_into = isinstance(above, ast.Subscript) and not isinstance(above.ctx, ast.Load)
        if name == "run" and isinstance(above, ast.Attribute) and above.attr in ("state", "cursor"):
            self.uses.unseen = True
        elif name not in FIELDS:
            self.uses.unseen = self.uses.unseen or name not in FACTS
        elif not isinstance(node.ctx, ast.Load):
            self.uses.writes[name] = None
            if isinstance(above, ast.AugAssign):
                self._read(name, not guarded)
        elif name in MAPPINGS:
            self._mapping(node, name, guarded)
        elif stored_into and above.value is node:  # type: ignore[attr-defined]
            self.uses.writes[name] = None
        else:
            if name == "updates":  # it is there, but False until a backward has set it
                self._read(name, not self.late)
                return
            self._read(name, not guarded and is_taken_for_granted(node, above, self._callee(above)))
            if self._is_tested(node):
                self.asked.add(name)

    def _mapping(self, node: ast.expr, field: str, guarded: bool) -> None:
        above = self.above[id(node)]
        if isinstance(above, ast.Subscript) and above.value is node:
            item, constant = item_of(field, above.slice), isinstance(above.slice, ast.Constant)
            again = isinstance(self.above[id(above)], ast.AugAssign)
            if not isinstance(above.ctx, ast.Store) or again:
                self._read(item, constant and not guarded)
            if not isinstance(above.ctx, ast.Load):
                self.uses.writes[item] = None
        elif isinstance(above, ast.Attribute):
            call = self.above[id(above)]
            self._method(
                field, above.attr, call if isinstance(call, ast.Call) and call.func is above else None, guarded
            )
        elif isinstance(above, ast.Compare) and isinstance(above.ops[0], ast.In | ast.NotIn):
            self._read(item_of(field, above.left), False)
            self.asked.add(item_of(field, above.left))
        elif isinstance(above, ast.Assign | ast.AnnAssign | ast.NamedExpr) and self._is_alias(above, node):
            return
        else:
            self._read(field, False)
            takes = is_one(self._callee(above), COPIES)
            plain = isinstance(
                above, ast.Dict | ast.keyword | ast.For | ast.comprehension | ast.FormattedValue | ast.BinOp
            )
            harmless = takes or plain or self._is_tested(node) or field == "outputs"
            self.uses.unseen = self.uses.unseen or not harmless

    def _is_alias(self, statement: ast.Assign | ast.AnnAssign | ast.NamedExpr, node: ast.expr) -> bool:
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return node in targets or all(id(target) in self.bound for target in targets)

    def _method(self, field: str, name: str, call: ast.Call | None, guarded: bool) -> None:
        item = item_of(field, call.args[0]) if call is not None and call.args else field
        if call is None or name not in (
            "get",
            "setdefault",
            "pop",
            "update",
            "items",
            "values",
            "keys",
            "copy",
            "clear",
        ):
            self._read(field, False)
            self.uses.unseen = self.uses.unseen or field != "outputs"
        elif name == "update":
            items = [item for given in call.args for item in items_of(field, given)]
            items += [f"{field}[{one.arg}]" if one.arg else field for one in call.keywords]
            self.uses.writes |= dict.fromkeys(items)
        elif name == "clear":
            self.uses.writes[field] = None
        else:
            self._read(item, name == "pop" and len(call.args) == 1 and item != field and not guarded)
            if name in ("get", "setdefault"):
                self.asked.add(item)
            if name in ("setdefault", "pop"):
                self.uses.writes[item] = None

    def _is_tested(self, node: ast.expr) -> bool:
        above = self.above[id(node)]
        return is_tested(node, above, self._callee(above))

    def _callee(self, node: ast.AST) -> Any:
        return resolve(node.func, self.function, self.owner) if isinstance(node, ast.Call) else NOTHING

    def _call(self, node: ast.Call, guarded: bool) -> None:
        handed = [one for one in [*node.args, *(k.value for k in node.keywords)] if self._role(one) in (STATE, STREAM)]
        if handed:
            target = resolve(node.func, self.function, self.owner)
            if is_one(target, (*vars(builtins).values(), weakref.ref)):
                self._builtin(target, node, guarded)
            else:
                done = self._called(node, target)
                self.uses.add(attrs.evolve(done, needs=()) if guarded else done)
        plain = [one for one in handed if isinstance(one, ast.Name)]
        for one in [node.func, *node.args, *(keyword.value for keyword in node.keywords)]:
            if one not in plain:
                self._visit(one, guarded)

    def _builtin(self, target: Any, node: ast.Call, guarded: bool) -> None:
        named = node.args[1] if len(node.args) > 1 else None
        if is_one(target, (getattr, setattr)) and isinstance(named, ast.Constant) and named.value in FACTS:
            if named.value in FIELDS:
                done = self.uses.reads if target is getattr else self.uses.writes
                done[named.value] = None
            self.uses.unseen = self.uses.unseen or named.value in MAPPINGS
        elif is_one(target, SHOWS):
            self.uses.reads |= {"loss": None, "metrics": None}
        elif not is_one(target, (next, iter, enumerate, *LOOKS)):
            self.uses.unseen = True

    def _called(self, node: ast.Call, target: Any) -> Uses:
        """What a function of one's own does with what it is handed."""
        if id(node) not in self.called:
            function, owner, bound = python_function(target) if target is not NOTHING else (None, NOTHING, 0)
            starred = any(isinstance(one, ast.Starred) for one in node.args) or any(not k.arg for k in node.keywords)
            if function is None or starred or self.depth >= DEEPEST:
                return Uses(unseen=True)
            names = dict(enumerate(parameters(function)))
            roles = {names.get(number + bound): self._role(one) for number, one in enumerate(node.args)}
            roles |= {one.arg: self._role(one.value) for one in node.keywords}
            known = {name: role for name, role in roles.items() if role and name is not None}
            lost = any(role in (STATE, STREAM) and name not in names.values() for name, role in roles.items())
            done = Uses(unseen=True) if lost else _read(function, owner, known, self.depth + 1, self.seen)
            self.called[id(node)] = done
        return self.called[id(node)]


def _asked(item: str, asked: set[str]) -> bool:
    return item in asked or item.partition("[")[0] in asked
