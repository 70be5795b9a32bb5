"""Keep the traceback of an exception to the user's own lines, and what it holds on to small.

Between the cell that calls ``next(run)`` and the step that raises stand some frames of looptools. They say nothing to a
user and are left out, as are those further in; frames of the user's own, of torch and of loaders stay. Where looptools
itself raises, the message says what to do, so the cell's line is enough. Where something goes wrong within looptools
that it does not raise itself, its innermost frame stays.

Whoever looks for a fault in looptools gets all frames with ``LOOPTOOLS_FULL_TRACEBACK=1`` in the environment, also when
set in a running process.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, TypeVar, cast

Verb = TypeVar("Verb", bound=Callable[..., Any])
Kind = TypeVar("Kind")

FULL = "LOOPTOOLS_FULL_TRACEBACK"
MARK = "_looptools_slip"  # on an exception: the code of the one frame of looptools that its traceback shows, or None
GENERATORS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
RAISE, YIELD = dis.opmap["RAISE_VARARGS"], dis.opmap["YIELD_VALUE"]

# methods of a run that are called within an iteration, by parts and for each state: these take part in others' calls
WITHIN = {"at_boundary", "batches_after", "is_last", "is_round_last", "record", "require_run_scope", "stop", "total"}
SPECIAL = {"__enter__", "__exit__", "__getitem__", "__iter__", "__len__", "__or__"}


def shorten(error: BaseException) -> None:
    """Leave the frames of looptools out of the tracebacks of *error* and of what it came from.

    To be called in an ``except`` that goes on with a bare ``raise``: this adds no frame, so the one with the ``except``
    is left out too. What the frames held is let go.

    Example:
        >>> try:
        ...     try:
        ...         lt.epochs("three")
        ...     except TypeError as error:
        ...         shorten(error)
        ...         raise
        ... except TypeError as error:
        ...     frames = error.__traceback__
        >>> frames.tb_frame.f_code.co_name, frames.tb_next
        ('<module>', None)
    """
    if os.environ.get(FULL, "0") != "0":
        return
    for one in _family(error):
        one.with_traceback(_without_own(one, one.__traceback__))  # not an assignment: it may be frozen


def let_go(error: BaseException) -> None:
    """Have the frames that *error* and what it came from passed through forget their local variables.

    Frames that are still at work keep them, and so do generators that will go on. Whoever keeps the exception, as a
    notebook does, no longer keeps a batch or a graph.

    Example:
        >>> def fails(batch):
        ...     raise ValueError
        >>> try:
        ...     fails(torch.ones(3))
        ... except ValueError as error:
        ...     let_go(error)
        ...     error.__traceback__.tb_next.tb_frame.f_locals
        {}
    """
    for one in _family(error):
        traceback = one.__traceback__
        while traceback is not None:
            _clear(traceback.tb_frame)
            traceback = traceback.tb_next


def short(verb: Verb) -> Verb:
    """A function or generator function whose exceptions show no frame of looptools, its own neither.

    Example:
        >>> @short
        ... def halve(number):
        ...     return number / 2
        >>> halve(3)
        1.5
    """
    if inspect.isgeneratorfunction(verb):

        @functools.wraps(verb)
        def call(*args: Any, **options: Any) -> Any:
            try:
                return (yield from verb(*args, **options))
            except BaseException as error:
                shorten(error)
                raise
    else:

        @functools.wraps(verb)
        def call(*args: Any, **options: Any) -> Any:
            try:
                return verb(*args, **options)
            except BaseException as error:
                shorten(error)
                raise

    return cast(Verb, call)


def short_verbs(kind: type[Kind]) -> type[Kind]:
    """The class of a run, with all of its verbs `short`; ``__next__`` sees to that itself, to save a call."""
    for name, verb in list(vars(kind).items()):
        if inspect.isfunction(verb) and name not in WITHIN and (name[0] != "_" or name in SPECIAL):
            setattr(kind, name, short(verb))
    return kind


def _family(error: BaseException) -> Iterator[BaseException]:
    """The exception, its causes and contexts, and the members of groups; each once."""
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            members = one.exceptions if isinstance(one, BaseExceptionGroup) else ()
            waiting += [other for other in (one.__cause__, one.__context__, *members) if other is not None]


def _without_own(error: BaseException, traceback: TracebackType | None) -> TracebackType | None:
    first = last = None
    while traceback is not None:
        following = traceback.tb_next
        if not _is_own(traceback.tb_frame) or (following is None and _is_slip(error, traceback)):
            if last is None:
                first = traceback
            else:
                last.tb_next = traceback
            last = traceback
        else:
            _clear(traceback.tb_frame)
        traceback = following
    if last is not None:
        last.tb_next = None
    error.__dict__[MARK] = last.tb_frame.f_code if last is not None and _is_own(last.tb_frame) else None
    return first


def _is_own(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(HOUSE)  # attrs names those that it makes after their class


def _is_slip(error: BaseException, traceback: TracebackType) -> bool:
    """Whether this frame, the innermost, has not raised *error* on purpose: with what it called, something is wrong."""
    code = traceback.tb_frame.f_code
    if MARK in error.__dict__:  # a verb within this one has seen to it
        return error.__dict__[MARK] is code
    return isinstance(error, Exception) and error.__cause__ is None and code.co_code[traceback.tb_lasti] != RAISE


def _clear(frame: FrameType) -> None:
    waits = frame.f_code.co_flags & GENERATORS and frame.f_code.co_code[frame.f_lasti] == YIELD
    if not waits:  # clear() would close it, but for Python 3.13 and later
        with contextlib.suppress(RuntimeError):  # it is at work
            frame.clear()
            frame.f_locals  # noqa: B018 (empties the dictionary that a debugger was given, before Python 3.13)


HOUSE = (  # the folder as the code itself has it, which __file__ need not be
    os.path.dirname(_is_own.__code__.co_filename) + os.sep,
    f"<attrs generated methods {__name__.partition('.')[0]}.",
)
