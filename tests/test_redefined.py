"""A cell that was run again defines another function; the run still calls the one it was given, and says so."""

from __future__ import annotations

import functools
import sys
import textwrap
import types
import warnings

import pytest
import torch

import looptools as lt


@pytest.fixture
def cell(monkeypatch):
    """Runs a cell of a notebook; returns what is defined there by then."""
    notebook = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    vars(notebook).update(torch=torch, functools=functools)

    def run(text):
        exec(compile(textwrap.dedent(text), "<cell>", "exec"), vars(notebook))  # noqa: S102 (a notebook does that)
        return notebook

    return run


BROKEN = """
    def classify(model, batch):
        raise ValueError("planted")
"""
MENDED = """
    def classify(model, batch):
        return {"x": batch.sum()}
"""


def fail(step, *parts):
    """A run of one phase whose first iteration has failed."""
    phase = lt.validate(None, [torch.ones(2)] * 3, step)
    for part in parts:
        phase = phase | part
    run = lt.workflow([(phase, 1)], max_rounds=1)
    with pytest.raises(ValueError, match="planted"):
        next(run)
    return run


def test_a_step_that_was_mended_is_said(cell):
    """In `run.failed`, in its advice and in the run's HTML; no longer once it is in."""
    run = fail(cell(BROKEN).classify)
    before = repr(run.failed)
    notebook = cell(MENDED)
    said = "classify has been redefined since: run.replace(classify) puts it in."

    assert "redefined" not in before
    assert repr(run.failed) == f"{before} {said}"
    assert run.failed.advice == f"{said} {run.failed.verbs}"
    assert run._repr_html_().count(said) == 1

    run.replace(notebook.classify)
    assert run.failed.redefined == ""
    assert run.retry().iteration == 0


@pytest.mark.parametrize("onward", [lambda run: run.retry(), lambda run: next(run), lambda run: list(run.stages())])
def test_going_on_without_it_warns_once(cell, onward):
    """The old one still runs, and fails again."""
    run = fail(cell(BROKEN).classify)
    cell(MENDED)

    with (
        pytest.warns(UserWarning, match=r"run: classify has been redefined, but the old one still runs. run.replace"),
        pytest.raises(ValueError, match="planted"),
    ):
        onward(run)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="planted"):
        warnings.simplefilter("error")
        onward(run)


def test_dropping_or_ending_it_warns_of_nothing(cell):
    """What failed is not done again."""
    for way in ("skip", "reset", "close"):
        run = fail(cell(BROKEN).classify)
        cell(MENDED)
        getattr(run, way)()


def test_the_step_is_said_where_another_part_failed(cell):
    """A loss without a graph stops backward, but it is the step that was mended."""

    def guard(states):
        for state in states:
            raise ValueError("planted")
            yield state

    run = fail(cell(MENDED).classify, guard)
    cell(MENDED.replace("sum", "mean"))

    assert run.failed.part == "val/guard"
    assert "classify has been redefined since" in run.failed.advice


def test_a_cell_that_was_only_run_again_says_the_same(cell):
    """Its function is another one with the same text and the same defaults."""
    text = BROKEN.replace("batch)", "batch, *, weight=0.5, names=())")
    run = fail(cell(text).classify)
    cell(text)

    assert run.failed.redefined == ""
    cell(text.replace("0.5", "0.25"))
    assert "classify has been redefined" in run.failed.redefined


@pytest.mark.parametrize(
    ("text", "given", "said"),
    [
        (BROKEN, "functools.partial(classify)", 'run.replace("classify", functools.partial(classify, ...))'),
        (
            "class Trainer:\n    def step(self, model, batch): raise ValueError('planted')",
            "Trainer().step",
            'run.replace("step", Trainer(...).step)',
        ),
        (
            "class Steps:\n    @staticmethod\n    def step(model, batch): raise ValueError('planted')",
            "Steps.step",
            "run.replace(Steps.step)",
        ),
        (
            "class Step:\n    def __call__(self, model, batch): raise ValueError('planted')",
            "Step()",
            'run.replace("Step", Step(...))',
        ),
        (
            "def wrapped(f):\n    @functools.wraps(f)\n    def g(*a): return f(*a)\n    return g\n"
            "@wrapped\ndef classify(model, batch): raise ValueError('planted')",
            "classify",
            "run.replace(classify)",
        ),
    ],
)
def test_whatever_a_step_is(cell, text, given, said):
    """A partial, a method, an object, a decorated function: the call that puts the new one in."""
    run = fail(eval(given, vars(cell(text))))  # noqa: S307 (as a cell would)
    cell(text.replace("planted", "mended"))

    assert f"redefined since: {said} puts it in." in run.failed.advice


@pytest.mark.parametrize(
    ("text", "given", "said"),
    [
        ("def part(states):\n    for state in states: raise ValueError('planted')\n    yield", "part", "(part)"),
        (
            "class Part:\n    def __call__(self, states):\n        for state in states: raise ValueError('planted')\n"
            "        yield",
            "Part()",
            '("Part", Part(...))',
        ),
    ],
)
def test_parts_of_the_users_own(cell, text, given, said):
    """Plain generators and classes."""
    run = fail(lambda model, batch: {"x": 1.0}, eval(given, vars(cell(text))))  # noqa: S307 (as a cell would)
    cell(text.replace("planted", "mended"))

    assert f"redefined since: run.replace{said} puts it in." in run.failed.advice


@pytest.mark.parametrize(
    "text",
    [
        "classify = lambda model, batch: int('planted')",
        "def make():\n    def step(model, batch): raise ValueError('planted')\n    return step\nclassify = make()",
    ],
)
def test_what_cannot_be_looked_up_is_not_guessed(cell, text):
    """Lambdas and functions within functions have no name to be found by."""
    run = fail(cell(text).classify)
    cell(text.replace("planted", "planted mended"))

    assert run.failed.redefined == ""


def test_a_name_that_is_gone_or_no_function_is_no_definition(cell):
    """`del classify`, `classify = None`."""
    run = fail(cell(BROKEN).classify)

    cell("classify = None")
    assert run.failed.redefined == ""
    cell("del classify")
    assert run.failed.redefined == ""


def test_in_a_module_that_was_reloaded(cell, monkeypatch):
    """The name says where the new one is: the notebook's own may still be the old one."""
    module = types.ModuleType("steps")
    monkeypatch.setitem(sys.modules, "steps", module)
    exec(textwrap.dedent(BROKEN), vars(module))  # noqa: S102 (as an import does)
    run = fail(module.classify)
    exec(textwrap.dedent(MENDED), vars(module))  # noqa: S102 (as a reload does)

    assert "steps.classify has been redefined since: run.replace(steps.classify) puts it in." in run.failed.advice


def test_the_name_is_another_function_by_now(cell):
    """The old name goes first, since `replace` finds a step by its name."""
    run = fail(cell(BROKEN).classify)
    notebook = cell("def better(model, batch): return {'x': batch.sum()}\nclassify = better")
    assert 'run.replace("classify", classify)' in run.failed.advice

    run.replace("classify", notebook.classify)
    assert run.retry().iteration == 0
