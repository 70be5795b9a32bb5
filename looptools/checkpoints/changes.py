"""What of a run's pipe was changed by hand: kept with the run, and in its checkpoints."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary, ref

import attrs

from ..cursor import Cursor
from ..links import Slot
from ..middleware.forward import forward
from ..phases import Phase
from ..state import State
from ..warn import warn

MOST = 1000  # changes that are kept, the newest: somebody may mute a part in every other iteration
WORDS = {"insert": "inserted", "remove": "removed", "replace": "replaced"}


@attrs.define(eq=False)
class Changes:
    """What was done to one run.

    Attributes:
        made: All changes, oldest first.
        untold: How many of the newest no row of ``run.history`` has yet.
        seen: By the name of a muted part, the pass whose beginning it was there for.
        through: By the name of a muted part, the open state that it had let through before.
        unstarted: Names of muted parts whose ``on_start`` is still to come.
    """

    made: list[dict[str, Any]] = attrs.field(factory=list)
    untold: int = 0
    seen: dict[str, tuple[int, ...] | None] = attrs.field(factory=dict)
    through: dict[str, ref[State]] = attrs.field(factory=dict)
    unstarted: set[str] = attrs.field(factory=set)


class Made(list[dict[str, Any]]):
    """Changes for a user to look at: shown with a line each.

    Example:
        >>> Made([{"iteration": 3, "epoch": 1, "phase": "train", "verb": "mute", "part": "train/ema", "what": ""}])
        iteration 3 (train, epoch 1): mute train/ema
        >>> Made() == []
        True
    """

    def __repr__(self) -> str:
        return "\n".join(map(in_words, self)) or "[]"


def in_words(change: Mapping[str, Any]) -> str:
    """One change in a line."""
    where = f"{change['phase']}, epoch {change['epoch']}" if change["phase"] else f"epoch {change['epoch']}"
    what = f": {change['what']}" if change["what"] else ""
    return f"iteration {change['iteration']} ({where}): {change['verb']} {change['part']}{what}"


_CHANGES: WeakKeyDictionary[Cursor, Changes] = WeakKeyDictionary()


def changes_of(cursor: Cursor) -> Changes:
    """Those of the run; a run that is reset has a new cursor, and none."""
    return _CHANGES.setdefault(cursor, Changes())


def note(cursor: Cursor, verb: str, part: str, what: str, code: tuple[str, str] = ("", "")) -> None:
    """Write down a change.

    Args:
        cursor: The run's machine.
        verb: What was done.
        part: Full name of the part that it was done to.
        what: Its options, before and after.
        code: Digests of the function before and after, if it is one.
    """
    passes, done = cursor.passes, cursor.progress
    where = {"iteration": done.iteration, "epoch": done.epoch, "phase": passes.plan.phase if passes.phase else ""}
    change: dict[str, Any] = {**where, "verb": verb, "part": part, "what": what}
    if all(code):
        change["code"] = list(code)
    known = changes_of(cursor)
    known.made.append(change)
    del known.made[:-MOST]
    known.untold = min(known.untold + 1, MOST)


def take_untold(cursor: Cursor) -> list[str]:
    """What was changed since a row of ``run.history`` said so, in few words; from now on one does."""
    known = changes_of(cursor)
    told = known.made[len(known.made) - known.untold :]
    known.untold = 0
    return [f"{change['verb']} {change['part']}" for change in told]


def this_pass(cursor: Cursor) -> tuple[int, ...] | None:
    """By what the pass under way is told from all others; None between two."""
    passes = cursor.passes
    return None if passes.phase is None else (passes.place.entry, passes.place.done, cursor.progress.round)


# In checkpoints


def kept_changes(cursor: Cursor) -> dict[str, Any]:
    """What a checkpoint keeps of the changes."""
    known = changes_of(cursor)
    return {"made": [dict(change) for change in known.made], "untold": known.untold}


def muted(cursor: Cursor) -> dict[str, bool]:
    """The muted parts by name, and whether each was there when the pass under way began."""
    here, seen = this_pass(cursor), changes_of(cursor).seen
    return {slot.name: here is not None and seen.get(slot.name) == here for slot in cursor.slots if slot.muted}


def take_up_changes(cursor: Cursor, tree: Mapping[str, Any]) -> None:
    """Go on with the changes of *tree*, and mute again what was muted; before parts are lined up.

    What was changed here before, by a script that does again what was done by hand, comes after them, once.
    """
    known, saved = changes_of(cursor), _made(tree)
    facts = ("verb", "part", "what")
    before = [[change[fact] for fact in facts] for change in saved]
    new = [change for change in known.made if [change[fact] for fact in facts] not in before]
    known.made = [*saved, *new]
    untold = tree.get("changes", {}).get("untold", 0)
    known.untold = min(int(untold) + len(new), len(known.made))
    again = dict(tree.get("muted", {}))
    names = [slot.name for slot in cursor.slots if slot.name in again]
    for slot in cursor.slots:
        slot.muted = slot.muted or slot.name in again
    known.unstarted.update(names)
    if names:
        warn(
            f"resume: muted, as they were when it was saved: {', '.join(names)}. "
            f"run.mute({names[0]!r}, False) lets states in again."
        )


def interrupted(cursor: Cursor, phase: Phase, tree: Mapping[str, Any]) -> list[Slot]:
    """The muted parts that were there when the pass of *phase* in *tree* began, and have that behind them here too."""
    through = (*cursor.lines[id(phase)], *cursor.run_slots)
    before, saved = tree.get("muted", {}), set(tree["pipe"])
    found = [slot for slot in through if slot.muted and slot.name in saved and before.get(slot.name, True)]
    changes_of(cursor).seen.update({slot.name: this_pass(cursor) for slot in found})
    return found


def by_hand(tree: Mapping[str, Any], part: str) -> str:
    """How a part came into the pipe of *tree*, or out of it; empty if not by hand."""
    change = next((c for c in reversed(_made(tree)) if c["part"] == part and c["verb"] in ("insert", "remove")), None)
    return "" if change is None else f" ({WORDS[change['verb']]} by hand at iteration {change['iteration']})"


def lacking(cursor: Cursor, tree: Mapping[str, Any]) -> Iterator[str]:
    """The changes in *tree* that the pipe here lacks, one line each; but options, which are compared in any case."""
    here = {slot.name: slot for slot in cursor.slots}
    made, saved = _made(tree), set(tree["pipe"])
    for name in dict.fromkeys(change["part"] for change in made):
        if (name in saved) is not (name in here) and (words := by_hand(tree, name)):
            yield f"{name}{words}: {'it is here' if name in here else 'not here'}"
        codes = [code for change in made if change["part"] == name for code in change.get("code", ())]
        if name in here and code_of(here[name].part) in set(codes) - set(codes[-1:]):
            last = [change for change in made if change["part"] == name and "code" in change][-1]
            when = f"replaced by hand at iteration {last['iteration']}"
            yield f"{name} ({when}: {last['what']}): here is the old function"


def _made(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The changes in a tree; older ones have none.

    Raises:
        TypeError: If they are something else.
    """
    made = tree.get("changes", {}).get("made", [])
    kinds = {"iteration": int, "epoch": int, "phase": str, "verb": str, "part": str, "what": str}
    for change in made:
        if not isinstance(change, dict) or any(type(change.get(key)) is not kind for key, kind in kinds.items()):
            raise TypeError(f"a change is {change!r:.80}")
    return [dict(change) for change in made]


def code_of(part: Any) -> str:
    """A digest of the function that a part is, or that a `forward` calls; empty if it is none.

    Another version of Python may give another one.

    Example:
        >>> def step(model, batch):
        ...     return model(batch)
        >>> len(code_of(step)), code_of(lt.forward(step)) == code_of(step), code_of(lt.timer())
        (16, True, '')
    """
    thing = part.step if isinstance(part, forward) else part
    while isinstance(thing, functools.partial):
        thing = thing.func
    code = getattr(getattr(thing, "__func__", thing), "__code__", None)
    return "" if code is None else hashlib.sha256(repr(_content(code)).encode()).hexdigest()[:16]


def _content(value: Any) -> Any:
    """What code does, not where it stands."""
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, value.co_varnames, _content(value.co_consts)
    if isinstance(value, tuple):
        return [_content(item) for item in value]
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)
