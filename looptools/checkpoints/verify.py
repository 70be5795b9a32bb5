"""See whether files are sound, and what is inside."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from .. import html
from ..archives.contents import Contents, Refused, read_header, shown
from ..archives.files import Damaged
from ..archives.loading import examine
from .described import Row, rows, size, what_it_is
from .manifest import MANIFEST, Broken, Manifest, checkpoints_in, read_list, rebuilt
from .weight_files import SUFFIX, damage_of_safetensors

UNFINISHED = re.compile(r"\..*\.tmp")  # what a killed process leaves
SET_ASIDE = re.compile(r".*\.damaged(-\d+)?")


@attrs.frozen(eq=False)
class File:
    """What was found out about a file.

    Args:
        name: Its name.
        bytes: Its size; 0 if it is missing.
        what: What it is.
        problem: What is wrong with it; empty if it is sound.
        newest: Whether it is the newest sound checkpoint of its folder, which ``run.resume()`` goes on from.
        rows: All that it holds, by heading.
    """

    name: str
    bytes: int
    what: str
    problem: str = ""
    newest: bool = False
    rows: list[Row] = attrs.field(factory=list, repr=False)

    @property
    def sound(self) -> bool:
        """Whether it is what was written, and can be loaded."""
        return not self.problem

    def __str__(self) -> str:
        return f"{size(self.bytes)}, {self.what}" if self.sound else f"{self.problem} ({self.what})"


@attrs.frozen(eq=False, repr=False)
class Report:
    """What `verify` has found; printed, it is a table.

    Args:
        path: What was looked at.
        files: Its checkpoints, newest first, then the best ones, then other files of weights.
        problems: What else is wrong with a folder.
        leftovers: Files that nobody needs, and why they are there.
    """

    path: Path
    files: list[File]
    problems: list[str] = attrs.field(factory=list)
    leftovers: list[str] = attrs.field(factory=list)

    @property
    def sound(self) -> bool:
        """Whether everything that is there is as it was written."""
        return not self.problems and all(file.sound for file in self.files)

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.path}: {self._verdict()}"
        if self.files and self.files[0].rows:
            width = max(len(word) for word, _ in self.files[0].rows)
            yield from (f"  {word:<{width}}  {said}".rstrip() for word, said in self.files[0].rows)
            return
        width = max((len(file.name) for file in self.files), default=0)
        for file in self.files:
            mark, state = "*" if file.newest else " ", "sound  " if file.sound else "DAMAGED"
            yield f"{mark} {file.name:<{width}}  {state}  {file}"
        yield from (f"! {problem}" for problem in self.problems)
        yield from (f"- {leftover}" for leftover in self.leftovers)
        if any(file.newest for file in self.files):
            yield "* run.resume() goes on from here"

    def _verdict(self) -> str:
        if not self.files and not self.problems:
            return "no checkpoints and no weights"
        if self.files and self.files[0].rows:
            return f"sound, {self.files[0]}"
        wrong = [file for file in self.files if not file.sound]
        if not wrong:
            return "its list of checkpoints is damaged" if self.problems else "sound"
        return f"{len(wrong)} of {len(self.files)} files damaged" if len(self.files) > 1 else "DAMAGED"

    def _repr_html_(self) -> str:
        color = "" if self.sound else f"color:{html.RED}"
        head = f"<b>{html.text(self.path.name or self.path)}</b> {html.text(f'· {self._verdict()}', color)}"
        if self.files and self.files[0].rows:
            return html.box(head, html.table((word, html.text(said)) for word, said in self.files[0].rows))
        listed = [
            (f"{file.name} *" if file.newest else file.name, html.text(file, "" if file.sound else color))
            for file in self.files
        ]
        rest = [html.text(said, color) for said in self.problems] + [html.text(s, html.FAINT) for s in self.leftovers]
        return html.box(head, html.table(listed), *rest)


def verify(path: str | Path) -> Report:
    """See whether a file, or all checkpoints of a folder, are sound, and what they hold.

    No tensor is loaded, no code in a file runs, and nothing on the disk is changed. Takes checkpoints of runs, other
    ``.pt`` files that ``torch.save`` wrote, and ``.safetensors``. Of a single file all is said: how far the run was,
    keys, shapes and sizes, versions, the pipe and the data that it was saved with.

    Args:
        path: A file or a folder.

    Returns:
        A report: ``report.sound``, ``report.files``; printed, it is a table.

    Raises:
        FileNotFoundError: If there is neither.
        OSError: If it cannot be read.

    Example:
        >>> torch.save({"weight": torch.zeros(2, 3)}, folder / "weights.pt")
        >>> report = lt.verify(folder)
        >>> report.sound, report.files[0].what
        (True, 'weights: 1 tensor of 24 bytes')
        >>> _ = (folder / "weights.pt").write_bytes((folder / "weights.pt").read_bytes()[:-100])
        >>> lt.verify(folder).sound
        False
    """
    path = Path(path)
    if path.is_dir():
        return _of_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"verify: there is no file or folder {path}.")
    return Report(path, [_look(path, in_full=True)])


def _of_folder(folder: Path) -> Report:
    manifest, problem = _manifest(folder)
    checkpoints = [_listed(folder, entry) for entry in reversed(manifest.checkpoints)]
    newest = next((n for n, file in enumerate(checkpoints) if file.sound), None)
    if newest is not None:
        checkpoints[newest] = attrs.evolve(checkpoints[newest], newest=True)
    best = [_listed(folder, entry) for entry in manifest.best]
    known = {entry["file"] for entry in (*manifest.checkpoints, *manifest.best)}
    others, leftovers = [], []
    for path in sorted(folder.iterdir()):
        name = shown(path.name, 100)
        if UNFINISHED.fullmatch(name):
            leftovers.append(f"{name} is left from a save that was not finished")
        elif SET_ASIDE.fullmatch(name):
            leftovers.append(f"{name} was set aside, since it was damaged")
        elif path.suffix in (".pt", SUFFIX) and path.name not in known and path.is_file():
            others.append(_look(path))
            if manifest.checkpoints:
                leftovers.append(f"{name} is not in {MANIFEST}")
    return Report(folder, [*checkpoints, *best, *others], [problem] if problem else [], leftovers)


def _manifest(folder: Path) -> tuple[Manifest, str]:
    """The list of a folder's checkpoints, or what it would be made anew as, and what is wrong with it."""
    try:
        manifest = read_list(folder / MANIFEST)
        if all(_is_complete(entry) for entry in (*manifest.checkpoints, *manifest.best)):
            return manifest, ""
        wrong = f"{MANIFEST} is damaged: its entries are not complete"
    except FileNotFoundError:
        if not checkpoints_in(folder):
            return Manifest(), ""
        wrong = f"{MANIFEST} is missing"
    except Broken as error:
        wrong = f"{MANIFEST} is damaged: {shown(error, 200)}"
    except RuntimeError as error:  # a later version's
        return Manifest(), shown(error, 200)
    return rebuilt(folder), f"{wrong}; run.resume() makes it anew from the files"


def _is_complete(entry: Any) -> bool:
    """Whether a manifest's entry says what is needed to check its file."""
    wanted = {"file": str, "bytes": int, "crc32": int}
    return isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in wanted.items())


def _listed(folder: Path, entry: dict[str, Any]) -> File:
    """What the manifest lists, and what it is."""
    name: str = entry["file"]
    if Path(name).name != name:
        return File(shown(name), 0, _by_entry(entry), "its name leads out of the folder")
    found = _look(folder / name, entry)
    if "metric" not in entry:
        return found
    value, rank = entry.get("value"), entry.get("rank", 1)
    number = f"{value:.4g}" if isinstance(value, float) else shown(value, 20)
    ranked = f", the best but {rank - 1}" if isinstance(rank, int) and rank > 1 else ""
    return attrs.evolve(found, what=f"best {shown(entry['metric'])}: {number}{ranked}, of {found.what}")


def _look(path: Path, entry: dict[str, Any] | None = None, in_full: bool = False) -> File:
    """Check a file and describe it, if that can be done."""
    if not path.exists():
        return File(shown(path.name, 100), 0, _by_entry(entry), "it is missing")
    try:
        contents = _contents(path, entry)
    except (Damaged, Refused) as error:
        problem = str(error).removeprefix(f"verify: {path} ").removeprefix("is damaged: ").removesuffix(".")
        return File(shown(path.name, 100), path.stat().st_size, _by_entry(entry), problem)
    return File(shown(path.name, 100), contents.bytes, what_it_is(contents), rows=rows(contents) if in_full else [])


def _contents(path: Path, entry: dict[str, Any] | None) -> Contents:
    if path.suffix != SUFFIX:
        return examine(path, "verify", entry)
    contents = read_header(path)
    wrong = damage_of_safetensors(path)
    if wrong:
        raise Damaged(f"verify: {path} is damaged: {wrong}.")
    return contents


def _by_entry(entry: dict[str, Any] | None) -> str:
    """What the manifest says of a file that does not say it itself."""
    if entry is None:
        return "of unknown contents"
    number = f"checkpoint {shown(entry['number'], 20)}: " if "number" in entry else ""
    return number + ", ".join(f"{word} {shown(entry.get(word, '?'), 20)}" for word in ("epoch", "iteration"))
