"""Where a resumed run first goes another way than the uninterrupted one, and why that may be."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import attrs

from .digests import CLOCKS, without

MOST_SUSPECTS = 4
TRAINING = ("models/", "optimizers/", "scalers/", "schedulers/", "generators/", "sources/")
NUMPY = {"python": "Python's", "numpy": "NumPy's", "torch": "torch's"}

Record = Mapping[str, Any]


@attrs.frozen
class Difference:
    """The first thing that is not the same.

    Args:
        path: What it is: ``"batch"``, ``"models/model/0.bias"``.
        where: When: ``"train, iteration 13"``.
        expected: What it is in the uninterrupted run.
        got: What it is here.
        phase: The phase of the state that shows it.
    """

    path: str
    where: str
    expected: str
    got: str
    phase: str = ""

    def __str__(self) -> str:
        both = f": {self.expected} without interruption, {self.got} here"
        values = "" if self.expected[:1] == "#" or self.got[:1] == "#" else both
        return f"{_spoken(self.path, self.where)}{values if self.path != 'batch' else ''}"


def _spoken(path: str, where: str) -> str:
    kind, _, rest = path.partition("/")
    if path == "batch":
        return f"batch of {where} differs: the data's order or its transforms"
    if kind in ("models", "optimizers", "scalers", "schedulers"):
        return f"{rest.replace('/', '.')} {where}"
    if kind == "generators":
        name, _, number = rest.partition("/")
        whose = f"{NUMPY[name]} random generator" if name in NUMPY else f"the random generator of device {number}"
        return f"the state of {whose} {where}"
    if kind == "sources":
        name, _, place = rest.partition("/")
        return f"the state of {name}'s random generator {place} {where}"
    if kind == "parts":
        return f"what {'/'.join(rest.split('/')[:2])} remembers ({'.'.join(rest.split('/')[2:])}) {where}"
    return (
        f"{path.replace('metrics/', '').replace('gauges/', '')} of {where}" if "/" not in where else f"{path} {where}"
    )


def clocks(one: Record, other: Record) -> tuple[set[str], set[str]]:
    """What differs between two uninterrupted runs though they train the same: names of metrics, and further places."""
    names, places = set(CLOCKS), set()
    for left, right in zip(one["states"], other["states"], strict=False):
        names |= {
            path.split("/", 1)[1] for path in left if path[:7] in ("metrics", "gauges/") and _differ(path, left, right)
        }
    names = {part for name in names for part in (name, name.rpartition("/")[2])}
    for path in one["final"]:
        if not path.startswith(TRAINING) and _differ(path, one["final"], other["final"]):
            places.add(path)
    return names, places


def unseeded(one: Record, other: Record) -> set[str]:
    """Random generators that stood elsewhere when the two runs began: nobody has seeded them, nor need they be used."""
    return {path for path in one["begun"] if _differ(path, one["begun"], other["begun"])}


def _differ(path: str, left: Mapping[str, str], right: Mapping[str, str]) -> bool:
    return left.get(path) != right.get(path)


def first_difference(
    straight: Record, record: Record, start: int = 0, names: Collection[str] = CLOCKS, places: Collection[str] = ()
) -> Difference | None:
    """Compare what is told of an uninterrupted run with what is told of one that was resumed after *start* states.

    Args:
        straight: The uninterrupted one's record.
        record: The other one's.
        start: States that were done when it was saved.
        names: Whatever has one of these in its place is not compared.
        places: Nor are these.
    """
    return next(_differences(straight, record, start, names, places), None)


def _differences(
    straight: Record, record: Record, start: int, names: Collection[str], places: Collection[str]
) -> Iterator[Difference]:
    def compare(left: Mapping[str, str], right: Mapping[str, str], where: str, phase: str = "") -> Iterator[Difference]:
        left, right = without(left, names), without(right, names)
        for path in [*left, *(path for path in right if path not in left)]:
            if _differ(path, left, right) and path not in places:
                yield Difference(path, where, left.get(path, "nothing"), right.get(path, "nothing"), phase)

    def held(number: int, where: str, phase: str = "") -> Iterator[Difference]:
        left, right = (told["deep"].get(str(number)) for told in (straight, record))
        if left is not None and right is not None:
            yield from compare(left, right, where, phase)

    if start:
        yield from held(start, "right after the resumption")
    for number, (left, right) in enumerate(zip(straight["states"][start:], record["states"], strict=False), start + 1):
        where, phase = place_of(left), left["phase"]
        yield from compare(left, right, where, phase)
        yield from held(number, f"after {where}", phase)
    counts = len(straight["states"]), start + len(record["states"])
    if counts[0] != counts[1]:
        yield Difference("number of states", "the whole run", *map(str, counts))
    yield from compare(straight["final"], record["final"], "at the end")
    for file, rows in straight["logs"].items():
        others = record["logs"].get(file, [])
        if len(rows) != len(others):
            yield Difference("rows", f"log.jsonl ({file})", str(len(rows)), str(len(others)))
        for number, (left, right) in enumerate(zip(rows, others, strict=False), 1):
            yield from compare(left, right, f"row {number} of log.jsonl ({file})")


def place_of(told: Mapping[str, str]) -> str:
    """Where a state is, in words."""
    if told["trains"] == "True":
        return f"iteration {told['iteration']}" + (f" ({told['phase']})" if told["phase"] != "train" else "")
    return f"{told['phase']}, batch {told['index']} after iteration {told['iteration']}"


def hints(difference: Difference, straight: Record, record: Record, start: int) -> list[str]:
    """What may be the cause, the surest first."""
    found = []
    said = [text for text in record["warnings"] if text.startswith("resume: ") and "begins anew" in text]
    doubts = [text for text in record["warnings"] if "not reproduced" in text or "may draw other numbers" in text]
    found += [text.removeprefix("resume: ") for text in said]
    source = straight["sources"].get(difference.phase, {})
    of_data = difference.path == "batch"
    if of_data and source.get("draws_in_workers"):
        found.append("random transforms within workers draw other numbers: lt.seeded(loader, seed) makes them exact.")
    elif doubts:
        found += doubts
    suspects = _suspects(straight, record, start)
    if of_data:
        suspects = [s for s in suspects if ": source" in s] or suspects
    found += [f"not saved, and not as it was: {suspect}." for suspect in suspects[:MOST_SUSPECTS]]
    if found and not (of_data and suspects):
        return found
    return [*found, _cure(difference.path, start)] if not said else found


def _cure(path: str, start: int) -> str:
    if path == "batch":
        return (
            "the data set, its transforms or its sampler keep something that no checkpoint holds. Keep random "
            "generators as attributes of the data set, or use lt.seeded(loader, seed)."
        )
    if path.startswith(("parts/", "generators/", "sources/")):
        return "something of it is not given back: state_dict() and load_state_dict() of a part or source must agree."
    return (
        "the model, the step or a part remembers something that no checkpoint holds: register_buffer saves a model's, "
        "a field of an attrs class a part's."
    )


def _suspects(straight: Record, record: Record, start: int) -> list[str]:
    """What hangs on the objects, is in no checkpoint, and was not the same right after the resumption."""
    before, after = (told["unsaved"].get(str(start), {}) for told in (straight, record))
    return [
        f"{path} ({before[path]} without interruption, {after.get(path, 'nothing')} here)"
        for path in before
        if before[path] != after.get(path)
    ]
