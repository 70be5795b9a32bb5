"""Iterators that complain when nobody iterates over them."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest

from looptools.stepping import Lazily


def lazily(stream):
    return Lazily(stream, "run.take(3)", "for state in run.take(3)")


def test_dropped_unasked_it_warns_where_it_was_typed():
    """As a coroutine that was never awaited."""
    with pytest.warns(RuntimeWarning, match="run.take.3. was never iterated") as caught:
        lazily(iter([1]))

    assert caught[0].filename == __file__


@pytest.mark.parametrize("ask", [list, iter, next, Lazily.close, lambda it: [*zip(it, [1], strict=False)]])
def test_asked_in_any_way_it_is_silent(ask):
    """Also if it is left in the middle."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ask(lazily(iter([1, 2, 3])))


def test_it_gives_what_its_stream_gives():
    """`iter` is the stream itself, so that `for` costs nothing more; `next` goes on with it."""
    stream = iter([1, 2, 3])
    it = lazily(stream)

    assert next(it) == 1
    assert iter(it) is stream
    assert list(it) == [2, 3]
    assert next(it, None) is None


def test_closing_it_closes_the_stream():
    """A generator's `finally` runs."""
    calls = []

    def generator():
        try:
            yield 1
        finally:
            calls.append("closed")

    it = lazily(generator())
    next(it)
    it.close()

    assert calls == ["closed"]


def test_its_repr_says_what_to_type():
    """What a notebook shows of `run.take(3)` in a cell of its own."""
    it = lazily(iter([1]))

    assert repr(it) == "<run.take(3): nothing has happened yet. Write `for state in run.take(3)` or list(run.take(3)).>"
    list(it)
    assert repr(it) == "<run.take(3)>"


def test_at_the_end_of_the_process_it_still_says_so():
    """Kept in a variable, and never used."""
    code = "from looptools.stepping import Lazily; it = Lazily(iter([1]), 'run.take(1)', 'for state in run.take(1)')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "RuntimeWarning: run.take(1) was never iterated" in done.stderr
    assert "Traceback" not in done.stderr
