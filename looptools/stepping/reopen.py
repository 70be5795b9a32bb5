"""Stand just before the iteration that a flight recorder has left a file of."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..archives.loading import load
from ..checkpoints.changes import take_up_changes
from ..checkpoints.fingerprint import WORDS, said
from ..checkpoints.fit import misfits, obstacles
from ..checkpoints.forgetful import forgetful
from ..checkpoints.identity import resume_identity
from ..checkpoints.lock import let_go
from ..checkpoints.tree import FORMATS, apply
from ..cursor import Cursor
from ..interrupts import interrupts
from ..tracebacks import short
from ..warn import warn
from .crash import files_in
from .recorder import Recorder

if TYPE_CHECKING:
    from ..run import Run


@short
def reopen(file: str | Path, run: Run, *, accept: str | Iterable[str] = ()) -> Run:
    """Have *run* stand just before the iteration that a `flight_recorder` has left *file* of, and return it.

    ``next(run)``, ``run.stages()``, ``run.after("forward")`` and the like then do that iteration: the same batch, the
    same random numbers, the same bits. The batch comes from the file, and goes to the phase's device, or else to where
    it was if that device is here; the source goes on behind it. One that could not be saved is fetched from the source.
    Where a batch could not be fetched at all, ``next(run)`` fetches it.

    The run goes on as the run that was saved, as with ``run.resume()``: its log and checkpoints continue where they
    stood. To look only, leave these out of its pipe: parts that only look may come and go.

    Args:
        file: The file, or the recorder's folder for its newest one.
        run: A run that has not begun, of the pipe that was saved; steps and options may have been mended since.
        accept: What may differ, as for `Run.resume`: ``"data"``, ``"batch_size"``, ``"world_size"``, ``"seed"``,
            ``"pipe"``.

    Raises:
        Damaged: If the file is not what was written.
        FileNotFoundError: If there is none.
        Refused: If it holds more than plain values and tensors. No code in it runs.
        RuntimeError: If the run has begun, the file is none of a flight recorder, or something differs that is not
            accepted; then nothing was changed.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> def step(model, batch):
        ...     return model(batch).mean()
        >>> def piped():
        ...     sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     train = lt.train(model, [torch.ones(2, 1), torch.ones(2, 3)], step) | lt.optimize(sgd)
        ...     return lt.workflow([(train, 1)], max_epochs=1)
        >>> import pytest
        >>> with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ...     (piped() | lt.flight_recorder(folder)).to_end()
        >>> def step(model, batch):
        ...     return model(batch[:, :1]).mean()
        >>> run = lt.reopen(folder, piped())
        >>> run.state.iteration, run.state.batch.shape, next(run).loss.shape
        (1, torch.Size([2, 3]), torch.Size([]))
    """
    words = _words(accept)
    if not hasattr(run, "cursor"):
        raise TypeError(f"reopen: give a run, as in lt.reopen(file, lt.workflow(...)), got {run!r:.100}.")
    cursor = run.cursor
    if cursor.started:
        raise RuntimeError("reopen: the run has begun already. Give one that has not, or call run.reset().")
    path = _find(Path(file))
    tree = load(path, "reopen")
    crash = tree.get("crash") if isinstance(tree, dict) and tree.get("format") in FORMATS else None
    if not isinstance(crash, dict):
        raise RuntimeError(
            f"reopen: {path} was not left by a flight recorder of this version. From a checkpoint, run.resume(path) "
            "goes on."
        )
    try:
        _restore(run, tree, words)
        opens = crash["open"]
        _tell(cursor, crash)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RuntimeError(f"reopen: {path} does not hold what this version saves: {error!r}.") from error
    cursor.resumed_from = path
    if opens:
        try:
            cursor.work(lambda: _open(cursor, path))
        except BaseException as error:
            let_go(cursor)
            error.add_note("reopen: the file is loaded, but its iteration could not begin. next(run) tries again.")
            raise
    return run


def _words(accept: str | Iterable[str]) -> tuple[str, ...]:
    words = (accept,) if isinstance(accept, str) else tuple(accept)
    for word in words:
        if word not in WORDS:
            raise ValueError(f"reopen: accept knows {', '.join(WORDS)}; got {word!r}.")
    return words


def _find(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"reopen: there is no {path}.")
    if not path.is_dir():
        return path
    found = files_in(path)
    if not found:
        raise FileNotFoundError(f"reopen: there is no file of a flight recorder in {path}.")
    return found[-1]


def _restore(run: Run, tree: dict[str, Any], words: tuple[str, ...]) -> None:
    """Put the run where the file was written. Everything is looked at before anything is changed."""
    cursor = run.cursor
    problems = [difference for difference in obstacles(cursor, tree) if difference.word not in words]
    if problems:
        can = all(difference.word for difference in problems)
        listed = "\n".join(f"- {d.text}" + (f'  (accept="{d.word}")' if can else "") for d in problems)
        cure = "\nOpen it all the same with lt.reopen(file, run, accept=...)." if can else ""
        raise RuntimeError(
            f"reopen: the file does not fit this run. Nothing was changed. They differ in:\n{listed}{cure}"
        )
    changed = said(cursor, tree, misfits(cursor, tree)["optimizers"])
    if changed:
        listed = "\n".join(f"- {line}" for line in changed)
        warn(
            "reopen: since the file was written, this has changed; the run goes on with what is here, unless said "
            f"otherwise.\n{listed}"
        )
    ahead = tree["sources"].get((tree["pass"] or {}).get("phase"), {}).get("ahead", {})
    if not _is_here(ahead.get("device")):
        ahead["device"] = None
    try:
        take_up_changes(cursor, tree)
        apply(run, tree)
        resume_identity(cursor, tree)
    except BaseException as error:
        run.reset()  # its parts are made anew
        error.add_note("reopen: the run is as if new, but for weights and optimizers, which may be loaded already.")
        raise


def _is_here(device: str | None) -> bool:
    try:
        return device is None or torch.empty(0, device=device).numel() == 0
    except (RuntimeError, AssertionError):  # what torch raises where there is none
        return False


def _tell(cursor: Cursor, crash: dict[str, Any]) -> None:
    """Say what will not be as it was."""
    if crash["batch_lost"]:
        warn(
            f"reopen: the batch ({crash['batch']}) could not be saved: {crash['batch_lost']}. It is fetched from the "
            "source again."
        )
    for name in forgetful(cursor):
        warn(f"reopen: {name} begins anew: what it keeps in local variables is not saved. Fields of a class are.")


def _open(cursor: Cursor, path: Path) -> None:
    if not cursor.begin():
        raise RuntimeError(f"reopen: the run is over before the iteration that {path} holds. Mend its bounds.")
    assert cursor.state is not None
    for listener in getattr(cursor.keeper, "listeners", ()):
        if isinstance(listener, Recorder):
            listener.reopened(cursor.state, path)
    if interrupts.pending:
        interrupts.deliver(cursor)
