"""How runs, phases and states look in a notebook and in a terminal."""

from __future__ import annotations

import math
import re
import warnings
from xml.etree import ElementTree

import attrs
import pytest
import torch
from loops import device_reads

import looptools as lt
from looptools import html
from looptools.stepping import describe, html_of_run
from looptools.stepping.html import _thinned

HOSTILE = "<script>alert('x')</script>&\"' onload=1"


def step(model, batch):
    return {"loss": model(batch), "accuracy": batch.mean()}


@pytest.fixture
def train(model, sgd, batches):
    return lt.train(model, batches, step) | lt.optimize(sgd, max_norm=0.5)


@pytest.fixture
def run(train, model, batches):
    return lt.workflow([(train, 1), (lt.validate(model, batches[:1], step), 1)], max_epochs=2) | lt.log(line=None)


def words(fragment):
    """The text of a piece of HTML, which must be well formed."""
    return " ".join(" ".join(ElementTree.fromstring(fragment).itertext()).split())


def terminal(run):
    return describe(run._agenda, run._cursor, run._middlewares)


PIPE = "train: forward | backward | clip_grad_norm | update | average; val: forward | average; run: log"


def test_terminal_says_where_it_is_and_what_the_pipe_is(run):
    """Two lines, from the first look to the end."""
    assert terminal(run) == f"<Run: train x 1, val x 1; not begun\n {PIPE}>"

    run.after("backward")
    assert terminal(run).splitlines()[0] == (
        "<Run: train x 1, val x 1; 0/2 epochs, 0/6 iterations done; in train: 0/3 batches done; "
        "an iteration is open, train/clip_grad_norm comes next"
    )
    next(run)
    assert "; in train: 1/3 batches done\n" in terminal(run)
    list(run.take(3))
    assert "; 1/2 epochs, 3/6 iterations done\n" in terminal(run)
    run.to_end()
    assert terminal(run).endswith(f"ended: finished: 2 epochs, 6 iterations\n {PIPE}>")


def test_terminal_names_what_failed(run, batches):
    """A third line: the part and the exception, cut where it is long."""
    batches[1].fill_(math.nan)

    def guard(states):
        for state in states:
            if not state.loss.isfinite():
                raise ValueError("the loss is not finite" + " at all" * 100)
            yield state

    run = lt.workflow([(run._agenda.phases[0] | guard, 1)], max_epochs=1)
    with pytest.raises(ValueError, match="the loss"):
        run.to_end()

    last = terminal(run).splitlines()[2]
    assert last.startswith(" failed in train/guard: ValueError('the loss is not finite at all")
    assert len(last) < 240


def test_run_before_it_begins(run):
    """The pipe and its options; looking builds nothing."""
    shown = words(html_of_run(run))

    assert shown.startswith("Run · train x 1, val x 1 not begun pipe train · Weight on list, 3 batches forward")
    assert "max_norm=0.5" in shown
    assert run._cursor is None


def test_run_under_way(run):
    """Progress, curves of the passes that are done, and the part that comes next."""
    list(run.take(4))
    run.after("backward")

    fragment = html_of_run(run)

    shown = words(fragment)
    assert "in train: 0/3 batches done" in shown
    assert "clip_grad_norm params=<1 tensors>, max_norm=0.5 ◀ comes next" in shown
    assert "loss · train" in shown
    assert "width:50.0%" in fragment
    assert fragment.count("<svg") == 2
    assert fragment == html_of_run(run)


def test_run_that_failed_and_run_that_ended(run):
    """What failed, the exception, its notes, and what to do; later why it ended."""
    run.after("forward")
    run.cursor.state.loss = None
    with pytest.raises(TypeError):
        next(run)

    shown = words(html_of_run(run))
    assert "failed in train/backward : TypeError: backward: the step of iteration 0 of train gave no loss" in shown
    assert shown.count("run.retry() redoes the iteration") == 1
    run.skip()
    run.to_end()
    shown = words(html_of_run(run))
    assert "failed" not in shown
    assert "ended: finished: 2 epochs, 6 iterations" in shown


def test_looking_reads_no_device(run):
    """The means of passes are numbers already."""
    list(run.take(5))

    with device_reads() as reads:
        html_of_run(run)
        terminal(run)

    assert reads == []


class Unshowable:
    """A batch that is not loaded yet, an option, a metric."""

    def __repr__(self):
        raise RuntimeError("not now")

    @property
    def shape(self):
        raise RuntimeError("not loaded")


@attrs.define(eq=False)
class odd:
    """Options whose defaults ask for the part, or that cannot be shown."""

    size: int = attrs.field(default=1, converter=int)
    double: int = attrs.field()
    half: int = attrs.field(default=1, converter=attrs.Converter(lambda v, part: v, takes_self=True))
    table: list = attrs.field(factory=list)
    value: object = None

    @double.default
    def _double(self):
        return self.size * 2

    def __call__(self, states):
        yield from states


def test_options_of_a_part_of_ones_own(model, batches, capsys):
    """Defaults that need the part are shown, long values cut, what fails to show itself named by its type."""
    part = odd("1", table=list(range(100_000)), value=Unshowable())
    run = lt.workflow([(lt.validate(model, batches, step) | part, 1)], max_rounds=1)

    run.explain()

    said = capsys.readouterr().out
    assert "double=2, half=1, table=[0, 1, 2, 3" in said
    assert "size=" not in said
    assert "..., value=<Unshowable>" in said
    assert len(said) < 1000
    assert "value=<Unshowable>" in words(html_of_run(run))


def test_state_shows_what_it_can(model, batches):
    """Of what cannot be shown the type: a strided nested tensor, an object with odd shape, a scalar on no device."""

    class Shapeless:
        shape = dtype = None

    with warnings.catch_warnings(action="ignore"):  # torch says once that they are a prototype
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    state = lt.State(phase="train", batch=[nested, Shapeless(), Unshowable()], outputs={"a": nested})
    state.loss = torch.ones((), device="meta")
    state.metrics |= {"good": torch.tensor(2.0), "nested": nested, "odd": Unshowable()}

    shown = words(state._repr_html_())

    assert "good 2 " in shown
    assert "odd Unshowable" in shown
    assert "batch [Tensor, Shapeless, Unshowable]" in shown
    assert "device='meta'" in shown


def test_a_failure_that_cannot_be_shown(model, batches):
    """The name of its type is enough."""

    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no words")

    def mute(states):
        for _ in states:
            raise Mute
        yield

    run = lt.workflow([(lt.validate(model, batches, step) | mute, 1)], max_rounds=1)
    with pytest.raises(Mute):
        next(run)

    assert "failed in val/mute : Mute: Mute" in words(html_of_run(run))


def test_many_points_are_thinned_and_the_newest_is_kept():
    """At most 120 of them."""
    points = [(float(n), 0.0) for n in range(1001)]

    thinned = _thinned(points)

    assert len(thinned) <= 120
    assert thinned[-1] == points[-1]


@attrs.define(eq=False)
class note:
    """A part with an option that says anything."""

    text: str
    error: Exception | None = None

    def __call__(self, states):
        for state in states:
            if self.error is not None:
                raise self.error
            state.metrics[HOSTILE] = 1.0
            yield state


def test_every_text_is_escaped(model, batches):
    """Names, options, metrics, exceptions and batches may hold anything."""
    model.__class__ = type(HOSTILE, (type(model),), {})
    phase = lt.train(model, batches, step, name=HOSTILE.replace("/", "")) | note(HOSTILE)
    run = lt.workflow([(phase, 1)], max_epochs=1) | note(HOSTILE)
    state = next(run)
    state.batch = {HOSTILE: torch.ones(1)}
    list(run)
    failing = lt.workflow([(phase | note(HOSTILE, ValueError(HOSTILE)), 1)], max_epochs=1)
    with pytest.raises(ValueError, match="script"):
        next(failing)

    picture = html.curve(HOSTILE, {HOSTILE: [(1.0, 2.0)]})
    for fragment in (html_of_run(run), html_of_run(failing), picture, phase._repr_html_(), state._repr_html_()):
        assert "<script" not in fragment
        assert not {element.tag for element in ElementTree.fromstring(fragment).iter()} - {
            *("div", "b", "span", "code", "ol", "li", "details", "summary", "table", "tr", "td"),
            *("svg", "path", "polyline", "circle"),
        }
        assert not any("onload" in element.attrib for element in ElementTree.fromstring(fragment).iter())
        assert HOSTILE.replace("/", "") in words(fragment) or HOSTILE in words(fragment)


def test_nothing_from_outside_no_ids_no_addresses(run, train):
    """Two outputs on one page do not meet, and a fresh kernel shows the same."""
    run = run | lt.log(line=None, every=lambda state: True)
    list(run.take(5))

    for fragment in (html_of_run(run), train._repr_html_(), next(run)._repr_html_()):
        assert not re.search(r"https?:|<style|<link|\bid=|\bclass=|\bsrc=|0x[0-9a-f]{6}", fragment)


def test_phase_shows_model_source_and_parts(train):
    """Before any run: what it is made of."""
    assert words(train.limit(2)._repr_html_()).startswith(
        "Phase · train · trains model Weight source list, 2 batches forward step=step backward optimizer=SGD"
    )
    assert repr(train) == (
        "<Phase train: Weight on list, 3 batches: forward | backward | clip_grad_norm | update | average>"
    )


def test_state_shows_what_it_measured(run):
    """Facts, metrics, learning rate, norm and the batch's shape; one read, and no look ahead."""
    state = next(run)
    state.gauges["peak"] = 12.5

    with device_reads() as reads:
        fragment = state._repr_html_()

    assert words(fragment) == (
        "State · train · iteration 0, epoch 0, index 0 of 3 loss 3 accuracy 1 lr 1 grad_norm 1 peak 12.5 updates True "
        "batch float32 (2, 1) outputs {loss: float32 (), accuracy: float32 ()}"
    )
    assert reads == ["tolist"]


def test_state_by_hand_and_odd_values():
    """Nothing is asked for that is not there; what is no number is shown as text."""
    assert words(lt.State(phase="val", trains=False)._repr_html_()) == "State · val · iteration 0, epoch 0, index 0"

    state = lt.State(phase="val", batch=[("a", torch.ones(2, 3))] * 9, loss=torch.tensor(float("nan")), dropped=True)
    state.metrics["many"] = torch.ones(2)
    shown = words(state._repr_html_())
    assert "dropped loss nan many tensor([1., 1.])" in shown
    assert "[(str, float32 (2, 3)), " in shown
    assert ", ... 9 in all]" in shown


def test_reading_a_state_fetches_no_batch(model, sgd, batches):
    """`last` is left alone where only a look ahead could tell."""
    taken = []

    def source():
        for batch in batches:
            taken.append(1)
            yield batch

    run = lt.workflow([(lt.train(model, source, step) | lt.optimize(sgd), 1)], max_epochs=1)
    state = run.after("forward")
    state._repr_html_()
    html_of_run(run)

    assert len(taken) == 1


def test_curve_has_gaps_and_single_points():
    """What is not finite is left out; a point alone is a dot."""
    points = [(1.0, 2.0), (2.0, math.nan), (3.0, 1.0), (4.0, 0.0)]

    fragment = html.curve("loss", {"train": points, "val": [(1.0, math.inf)]})

    tags = [element.tag for element in ElementTree.fromstring(fragment).iter()]
    assert (tags.count("circle"), tags.count("polyline")) == (1, 1)
    assert words(fragment) == "loss · train 0, val inf"
