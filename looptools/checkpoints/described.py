"""What a file holds, in words. Texts are shortened, and nothing in a file is taken to be of the kind it should be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..archives.contents import Contents, Outline, shown

MOST_KEYS = 8  # of a group that are listed
MOST_LINES = 12  # of a traceback, its last
KEPT_APART = ("models", "optimizers", "scalers", "schedulers", "parts")  # groups with a name for each member

Row = tuple[str, str]  # a word on the left, what is said of it


def what_it_is(contents: Contents) -> str:
    """A file in one line.

    Example:
        >>> torch.save(torch.nn.Linear(2, 3).state_dict(), folder / "weights.pt")
        >>> from looptools.archives.contents import read_contents
        >>> what_it_is(read_contents(folder / "weights.pt"))
        'weights: 2 tensors of 36 bytes'
    """
    tree = contents.tree
    if not is_checkpoint(tree):
        word = "weights" if contents.tensors else "no tensors"
        return f"{word}: {_count(contents.tensors, 'tensor')} of {size(contents.stored)}" if contents.tensors else word
    run = _mapping(tree["run"])
    number, owner = shown(run.get("number", "?"), 12), shown(run.get("id", ""), 11)
    crash = _mapping(tree.get("crash"))
    if crash:
        return f"left by a flight recorder of run {owner}: {_wrong(crash)} before {progress(tree)}"
    return f"checkpoint {number} of run {owner}: {progress(tree)}"


def is_checkpoint(tree: Any) -> bool:
    """Whether a tree says that it is a run's."""
    return isinstance(tree, Mapping) and {"format", "run", "progress"} <= tree.keys()


def progress(tree: Mapping[str, Any]) -> str:
    """Where a checkpoint stands."""
    done = _mapping(tree.get("progress"))
    words = [f"{name} {shown(done.get(name, '?'), 20)}" for name in ("epoch", "iteration", "round")]
    place = _mapping(tree.get("pass"))
    if place:
        words.append(f"within {shown(place.get('phase'))}, {shown(place.get('index'), 20)} batches done")
    return ", ".join(words)


def rows(contents: Contents) -> list[Row]:
    """All that can be said of a file, by heading."""
    tree = contents.tree
    found: list[Row] = []
    if is_checkpoint(tree):
        found += _crash(_mapping(tree.get("crash"))) if tree.get("crash") else ()
        found += _of_the_run(tree)
    found += _groups(tree)
    return [*found, ("in all", f"{_count(contents.tensors, 'tensor')}, {size(contents.stored)} stored")]


def _wrong(crash: Mapping[str, Any]) -> str:
    """What a flight recorder has seen."""
    words = [crash.get("nonfinite"), crash.get("error") and f"{crash['error']} in {crash.get('part')}"]
    return shown("; ".join(str(word) for word in words if word) or "?", 200)


def _crash(crash: Mapping[str, Any]) -> Iterator[Row]:
    """What was wrong, in the file of a flight recorder."""
    yield "wrong", _wrong(crash)
    where = [f"{key} {shown(crash.get(key), 20)}" for key in ("phase", "epoch", "iteration", "index")]
    yield "in", ", ".join(where) + ("" if crash.get("open") else ", as its batch was fetched")
    if crash.get("batch"):
        lost = crash.get("batch_lost")
        yield "batch", shown(crash["batch"], 200) + (f"; not saved: {shown(lost, 200)}" if lost else "")
    versions = [(name, version) for name, version in _first(crash.get("versions")) if version]
    yield "versions", ", ".join(f"{shown(name, 20)} {shown(version, 40)}" for name, version in versions)
    lines = str(crash.get("traceback", "")).splitlines()
    if len(lines) > 2 * MOST_LINES:  # the user's own frames come first, the error last
        lines = [*lines[:MOST_LINES], "  ...", *lines[-MOST_LINES:]]
    for number, line in enumerate(lines):
        yield ("" if number else "traceback"), shown(line.rstrip(), 200)


def _of_the_run(tree: Mapping[str, Any]) -> Iterator[Row]:
    done, run = _mapping(tree.get("progress")), _mapping(tree.get("run"))
    yield "run", f"{shown(run.get('id', '?'))}, its checkpoint {shown(run.get('number', '?'), 20)}"
    yield "done", progress(tree)
    updates = ", ".join(f"{shown(name)} {shown(count, 20)}" for name, count in _first(_mapping(done.get("updates"))))
    if updates:
        yield "updates", updates
    yield "samples", f"{shown(done.get('samples', '?'), 20)} in {shown(_rounded(done.get('seconds')), 20)} s at work"
    if tree.get("stopping"):
        yield "stopped", shown(tree["stopping"], 100)
    results = ", ".join(f"{shown(name)} {shown(_rounded(value), 20)}" for name, value in _first(tree.get("results")))
    if results:
        yield "results", results
    for metric, facts in _first(tree.get("best")):
        facts = _mapping(facts)
        yield f"best {shown(metric)}", f"{shown(_rounded(facts.get('value')), 20)} in {shown(facts.get('file'))}"
    yield "written by", f"torch {shown(tree.get('torch', '?'))}, format {shown(tree.get('format'), 20)}"
    yield from _pipe(tree)
    yield from _changes(tree)
    yield from _fingerprint(_mapping(tree.get("fingerprint")))
    kinds = ", ".join(_generators(_mapping(tree.get("generators"))))
    yield "generators", kinds or "none"


def _pipe(tree: Mapping[str, Any]) -> Iterator[Row]:
    """The parts, in order, with their options."""
    names = tree.get("pipe")
    described = tree.get("description")  # pairs of name and options, in the order of the pipe
    pairs = [pair for pair in described if isinstance(pair, list | tuple)] if isinstance(described, list) else []
    options = {str(pair[0]): pair[1] for pair in pairs if len(pair) == 2} or _mapping(tree.get("options"))
    names = list(names) if isinstance(names, list | tuple) else list(options)
    for number, name in enumerate(names[:100], 1):
        given = shown(options.get(name, "") if isinstance(name, str) else "", 200)
        yield ("pipe" if number == 1 else ""), f"{number:>2} {shown(name)}{f'({given})' if given else ''}"
    if len(names) > 100:
        yield "", f"and {len(names) - 100} more"


def _changes(tree: Mapping[str, Any]) -> Iterator[Row]:
    """What was changed of the pipe by hand, the newest in the end, and what is muted."""
    made = _mapping(tree.get("changes")).get("made")
    made = [change for change in made if isinstance(change, Mapping)] if isinstance(made, list) else []
    for number, change in enumerate(made[-20:]):
        facts = {"iteration": 20, "verb": 20, "part": 80, "what": 200}
        iteration, verb, part, what = (shown(change.get(key, "?"), most) for key, most in facts.items())
        yield ("" if number else "changed by hand"), f"iteration {iteration}: {verb} {part}: {what}"
    names = [shown(name, 80) for name, _ in _first(tree.get("muted"))]
    if names:
        yield "muted", ", ".join(names)


def _fingerprint(facts: Mapping[str, Any]) -> Iterator[Row]:
    for name, source in _first(facts.get("sources")):
        known = [(key, value) for key, value in _first(source) if value is not None]
        yield f"data of {shown(name)}", ", ".join(f"{shown(k).replace('_', ' ')} {shown(v, 20)}" for k, v in known)
    rest = [(key, value) for key, value in _first(facts) if key != "sources" and value is not None]
    if rest:
        yield "besides", ", ".join(f"{shown(key).replace('_', ' ')} {shown(value, 20)}" for key, value in rest)


def _generators(found: Mapping[str, Any]) -> Iterator[str]:
    for name, state in _first(found):
        several = f" ({len(state)})" if name == "cuda" and isinstance(state, list | tuple) else ""
        yield shown(name) + several


def _groups(tree: Any) -> Iterator[Row]:
    """The tensors: those of each model, optimizer and part of a run by themselves; of another file, by its keys."""
    if isinstance(tree, Outline):
        yield "tensor", _one(tree)
    elif not isinstance(tree, Mapping):
        yield type(tree).__name__, _total(tree)
    elif not is_checkpoint(tree):
        if any(isinstance(value, Outline) for value in tree.values()):
            yield "weights", _total(tree)
            yield from _keys(tree)
        else:
            for name, value in _first(tree, 50):
                yield from _group(shown(name), value)
    else:
        for kind in KEPT_APART:
            for name, value in _first(tree.get(kind), 50):
                if kind != "parts" or _measure(value)[0]:
                    yield from _group(f"{kind.removesuffix('s')} {shown(name)}", value)
        if "weights" in tree:
            yield "weights", _total(tree["weights"])


def _group(word: str, value: Any) -> Iterator[Row]:
    if isinstance(value, Outline):
        yield word, _one(value)
    elif isinstance(value, Mapping | list | tuple):
        yield word, _total(value)
        if isinstance(value, Mapping) and any(isinstance(item, Outline) for item in value.values()):
            yield from _keys(value)
    else:
        yield word, shown(value)


def _keys(group: Mapping[Any, Any]) -> Iterator[Row]:
    """The first tensors of a group, with their shapes."""
    held = [(name, value) for name, value in group.items() if isinstance(value, Outline)]
    for name, outline in held[:MOST_KEYS]:
        yield "", f"{shown(name)} {_one(outline)}"
    if len(held) > MOST_KEYS:
        yield "", f"and {len(held) - MOST_KEYS} more"


def _one(outline: Outline) -> str:
    return f"{str(outline.dtype).removeprefix('torch.')} {shown(tuple(outline.shape), 80)}"


def _total(value: Any) -> str:
    """How much of tensors there is in a value."""
    tensors, elements, taken = _measure(value)
    if not tensors:
        return "no tensors"
    return f"{_count(tensors, 'tensor')}, {elements:,} elements, {size(taken)}"


def _measure(value: Any) -> tuple[int, int, int]:
    """Tensors, their elements and bytes, in a tree that is known to be small enough to be walked through."""
    if isinstance(value, Outline):
        return 1, value.bytes // value.dtype.itemsize, value.bytes
    tensors = elements = taken = 0
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Outline):
            tensors, taken = tensors + 1, taken + item.bytes
            elements += item.bytes // item.dtype.itemsize
        elif isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple) and not isinstance(item, torch.Size):
            waiting.extend(item)
    return tensors, elements, taken


def _mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a dictionary, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def _first(value: Any, most: int = 20) -> list[tuple[Any, Any]]:
    """The first pairs of what should be a dictionary."""
    return [pair for pair, _ in zip(_mapping(value).items(), range(most), strict=False)]


def _rounded(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def size(count: int) -> str:
    """Bytes as a person reads them.

    Example:
        >>> size(36), size(39360), size(1_250_000_000)
        ('36 bytes', '39.4 kB', '1.25 GB')
    """
    if count < 1000:
        return _count(count, "byte")
    value = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.5 or unit == "TB":
            break
    return f"{value:.3g} {unit}"
