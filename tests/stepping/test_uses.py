"""What parts read and write: our own, compared with what they really do; the user's, read off their source."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import looptools as lt
from looptools import passes
from looptools.order import kind
from looptools.state import State
from looptools.stepping.explaining.fields import MADE, MAPPINGS, Uses
from looptools.stepping.explaining.reader import STATE, STREAM, read
from looptools.stepping.explaining.returned_keys import returned_keys
from looptools.stepping.explaining.unmet import unmet
from looptools.stepping.explaining.uses import OURS, shown, uses_of

HOUSE = Path(lt.__file__).parent
ASIDE = {"cursor.py", "links.py", "passes.py"}  # the machine, which is no part


# Our own: what is declared is what happens

NOTED: list[tuple[str, str]] = []


def note(what: str, item: str) -> None:
    frame = sys._getframe(2)
    if Path(frame.f_code.co_filename).name not in ASIDE:
        NOTED.append((what, item))


class Noting(dict):
    """A mapping of a state that notes which of its keys are written."""

    def __init__(self, field: str, given: Any = ()) -> None:
        super().__init__(given)
        self.field = field

    def __setitem__(self, key: Any, value: Any) -> None:
        note("writes", f"{self.field}[{key}]" if self.field in MAPPINGS else self.field)
        super().__setitem__(key, value)

    def update(self, other: Any) -> None:
        for key in other:
            note("writes", f"{self.field}[{key}]" if self.field in MAPPINGS else self.field)
        super().update(other)


class Recorded(State):
    """A state that notes what is read and written."""

    def __init__(self, **facts: Any) -> None:
        super().__init__(**facts)
        for field in ("metrics", "gauges", "windows"):
            object.__setattr__(self, field, Noting(field))
        NOTED.clear()

    def __getattribute__(self, name: str) -> Any:
        if name in MADE:
            note("reads", name)
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        for item in [f"outputs[{key}]" for key in value] if name == "outputs" and value else [name]:
            if name in MADE:
                note("writes", item)
        object.__setattr__(self, name, value)


def recorded(run: lt.Run, monkeypatch: pytest.MonkeyPatch, states: int) -> dict[str, tuple[set[str], set[str]]]:
    """What each part reads and writes in so many iterations, by its full name."""
    monkeypatch.setattr(passes, "State", Recorded)
    found: dict[str, tuple[set[str], set[str]]] = {}
    for _ in range(states):
        for name, _ in run.stages():
            reads, writes = found.setdefault(name, (set(), set()))
            reads |= {item for what, item in NOTED if what == "reads"}
            writes |= {item for what, item in NOTED if what == "writes"}
            NOTED.clear()
    return found


def step(model: nn.Module, batch: Any) -> dict[str, Any]:
    return {"loss": model(batch).square().mean(), "size": len(batch)}


def everything(tmp_path: Path) -> lt.Run:
    """Two phases and a run with nearly all parts in them."""
    model = nn.Linear(2, 1)
    sgd, params = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5), list(model.parameters())
    other = nn.Linear(2, 1)
    apart = torch.optim.LBFGS(other.parameters(), max_iter=3)
    train = (
        lt.train(model, [torch.ones(2, 2)] * 3, step)
        | lt.freeze("bias", until=lt.epochs(1))
        | lt.schedule_lr(sgd, lt.schedules.cosine())
        | lt.schedule_momentum(sgd, lt.schedules.constant())
        | lt.backward(sgd, weigh="samples")
        | lt.nan_guard()
        | lt.watch(model, every=1)
        | lt.unused_params(model)
        | lt.grad_noise(params)
        | lt.clip_grad_value(params, 1.0)
        | lt.clip_grad_norm(params, 1.0)
        | lt.update(sgd)
        | lt.ema(AveragedModel(model))
        | lt.swa(AveragedModel(model), start=lt.epochs(1))
        | lt.timer()
        | lt.memory(every=1)
    )
    closure = (
        lt.train(other, [torch.ones(2, 2)], step, name="closure")
        | lt.nan_guard()
        | lt.update_by_closure(apart, max_norm=1.0)
    )
    third = nn.Linear(2, 1)
    bare = lt.train(third, [torch.ones(2, 2)], step, name="bare") | lt.optimize(torch.optim.SGD(third.parameters()))
    val = lt.validate(model, [torch.ones(2, 2)] * 2, step) | lt.measure({"most": torch.max}, lambda state: state.batch)
    return (
        lt.workflow([(train, 1), (closure, 1), (bare, 1), (val, 1)], max_epochs=6)
        | lt.log(tmp_path, line=None, every=1)
        | lt.checkpoint(tmp_path)
        | lt.early_stop(lt.lowest("val/loss"))
        | lt.stop_after(lt.samples(1000))
        | lt.profile(tmp_path, wait=100)
        | lt.leak_guard()
    )


@pytest.mark.filterwarnings("ignore:unused_params")
def test_what_is_declared_is_what_our_parts_do(tmp_path, monkeypatch):
    """Each reads and writes what it is said to, in at least one of its iterations, and nothing else."""
    run = everything(tmp_path)
    slots = {slot.name: slot for slot in run.cursor.slots}

    done = recorded(run, monkeypatch, 14)
    run.close()

    assert set(done) - {f"{name}/batches" for name in ("train", "closure", "bare", "val")} == set(slots)
    for own in OURS:  # an update leaves lr to a schedule where there is one, so all of a kind together
        alike = [slot for slot in slots.values() if kind(slot) == own]
        uses = functools.reduce(Uses.add, map(uses_of, alike), Uses())
        reads, writes = ({item for slot in alike for item in done[slot.name][n]} for n in (0, 1))
        mine = fields(uses.writes)  # what it writes it may look at first
        assert fields(reads) - mine == fields(uses.reads) - mine, own
        assert fields(writes) == mine, own
        assert {item for item in writes if item.partition("[")[0] not in uses.writes} <= set(uses.writes), own


def fields(items: Iterable[str]) -> set[str]:
    return {item.partition("[")[0] for item in items}


def test_every_one_of_our_parts_is_declared():
    """A new middleware gets a line in the table, unless its source says it all."""
    files = {path.stem for path in (HOUSE / "middleware").glob("*.py") if path.stem != "__init__"}
    recipes = {"optimize", "schedule_lr", "schedule_momentum"}
    read_off = {"flight_recorder"}

    assert files - recipes - read_off == set(OURS)


def test_options_decide_what_is_declared(model, sgd, batches):
    """A weight by samples reads them, a scaler may take an update back, a momentum is a gauge."""
    scaler = torch.amp.GradScaler("cpu")
    train = (
        lt.train(model, batches, step)
        | lt.schedule(sgd, "weight_decay", lt.schedules.constant())
        | lt.optimize(sgd, weigh=lambda state: state.outputs["size"], scaler=scaler)
    )
    slots = {slot.short: slot for slot in iter(train).cursor.slots}

    assert shown(uses_of(slots["backward"])) == "outputs[size], loss -> updates, windows"
    assert "updates" in uses_of(slots["update"]).writes
    assert shown(uses_of(slots["schedule_weight_decay"])) == "-> gauges[weight_decay]"


# The user's own: read off their source


def plain(states):
    for state in states:
        state.metrics["twice"] = 2 * state.loss.detach()
        yield state


def aliased(stream):
    for number, s in enumerate(stream):
        metrics = s.metrics
        metrics["n"] = number + metrics["loss"]
        metrics.update(m=s.lr)
        yield s


def by_hand(states):
    it = iter(states)
    while (state := next(it, None)) is not None:
        state.loss *= 2
        yield state


def handed_on(states):
    for state in states:
        note_rate(state, to="rate")
        yield state


def note_rate(state, to):
    state.gauges["rate"] = state.lr


class Keeps:
    """A part with methods that it hands the state to."""

    def __init__(self):
        self.seen = []
        self.look = lambda state: state.outputs["logits"]

    def __call__(self, states):
        for state in self._through(states):
            if state.updates:
                self._keep(state)
            yield state

    def _through(self, states):
        for state in states:
            state.metrics["a"] = self.look(state)
            yield state

    @staticmethod
    def _keep(state):
        state.gauges.setdefault("norm", state.grad_norm)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (plain, "loss -> metrics[twice]"),
        (aliased, "metrics[loss], lr -> metrics[n, m]"),
        (by_hand, "loss -> loss"),
        (handed_on, "lr -> gauges[rate]"),
        (Keeps(), "outputs[logits], gauges[norm], grad_norm, updates -> metrics[a], gauges[norm]"),
        (functools.partial(lambda states, k: (s for s in states if s.metrics.get("x", 0) < k), k=3), "metrics[x] ->"),
        (lambda states: (s for s in states if s.loss is not None), "loss ->"),
    ],
    ids=lambda part: getattr(part, "__name__", type(part).__name__),
)
def test_what_a_part_of_ones_own_does_is_seen(part, expected):
    """Under any name of the state, through aliases, functions and methods that it is handed to."""
    assert shown(read(part, {0: STREAM})) == expected


def by_name(states, name="loss"):
    for state in states:
        print(getattr(state, name))
        yield state


def out_of_sight(states):
    for state in states:
        SOMETHING(state)
        yield state


SOMETHING: Any = None


def kept(states):
    seen = []
    for state in states:
        seen.append(state)
        yield state


def mapping_handed_on(states):
    for state in states:
        SOMETHING(state.metrics)
        yield state


def one_name_for_two_things(states):
    for state in states:
        yield state
        state = None


def wrapped(states):
    return map(note_rate, states)


@pytest.mark.parametrize("part", [by_name, out_of_sight, kept, mapping_handed_on, one_name_for_two_things, wrapped])
def test_what_cannot_be_seen_is_said(part):
    """A getattr, an unknown function, a list: from there on anything may be."""
    assert read(part, {0: STREAM}).unseen
    assert "cannot be seen" in shown(read(part, {0: STREAM}))


def test_code_without_a_source_is_not_guessed_at():
    """Built in C, or made by exec."""
    made: dict[str, Any] = {}
    exec("def part(states):\n    for state in states:\n        yield state", made)

    assert read(made["part"], {0: STREAM}).unseen
    assert read(iter, {0: STREAM}).unseen


def test_a_file_that_was_edited_since_is_not_believed(tmp_path, monkeypatch):
    """The source beside the code is another one than what runs."""
    path = tmp_path / "edited_part.py"
    path.write_text("def part(states):\n    for state in states:\n        state.loss\n        yield state\n")
    monkeypatch.syspath_prepend(tmp_path)
    import edited_part

    path.write_text("def part(states):\n    for state in states:\n        state.lr\n        yield state\n")

    assert read(edited_part.part, {0: STREAM}).unseen


NEEDED = [
    (lambda s: s.grad_norm > 10, True),
    (lambda s: f"{s.grad_norm:.2f}", True),
    (lambda s: s.iteration % 50 == 0 and print(s.grad_norm), True),
    (lambda s: s.grad_norm is not None and s.grad_norm > 10, False),
    (lambda s: s.grad_norm and s.grad_norm > 10, False),
    (lambda s: s.trains and s.grad_norm > 10, False),
    (lambda s: s.grad_norm > 10 if s.updates else False, False),
    (lambda s: SOMETHING(s.grad_norm), False),
]


@pytest.mark.parametrize(("asks", "needs"), NEEDED)
def test_only_what_is_read_without_asking_is_needed(asks, needs):
    """A test for None, or a condition that may never be true, is how one asks."""
    uses = read(asks, {0: STATE})

    assert list(uses.reads)[0] in ("grad_norm", "updates")
    assert ("grad_norm" in uses.needs) is needs


def leaves_early(states):
    for state in states:
        if not state.trains:
            yield state
            continue
        print(state.metrics["x"])
        yield state


def tries(states):
    for state in states:
        try:
            print(state.metrics["x"])
        except KeyError:
            pass
        yield state


def looks_first(states):
    for state in states:
        if "x" in state.metrics:
            print(state.metrics["x"])
        yield state


def looks_back(states):
    for state in states:
        with torch.no_grad():
            yield state
        if state.updates:
            print(state.metrics["x"])


@pytest.mark.parametrize("part", [leaves_early, tries, looks_first, looks_back])
def test_what_may_be_left_out_is_not_needed(part):
    """Behind an early exit, in a try, where the key was asked for, behind the yield: there all parts are through."""
    uses = read(part, {0: STREAM})

    assert "metrics[x]" in uses.reads
    assert not uses.needs


def in_a_name(model, batch):
    out = {"loss": model(batch)}
    if len(batch) > 1:
        out["extra"] = 1.0
    return out


def grown(model, batch):
    out = {"loss": model(batch)}
    out.update(SOMETHING)
    return out


@pytest.mark.parametrize(
    ("function", "keys", "complete"),
    [
        (step, ["loss", "size"], True),
        (in_a_name, ["loss", "extra"], True),
        (grown, ["loss"], False),
        (lambda model, batch: {**SOMETHING, "loss": 1}, ["loss"], False),
        (lambda model, batch: dict(loss=1), ["loss"], True),  # noqa: C408
        (lambda model, batch: model(batch), [], False),
        (nn.Linear(1, 1), [], False),
        (None, [], False),
    ],
)
def test_the_keys_that_a_step_returns(function, keys, complete):
    """Of literals, and of names that stand for one and are only added to."""
    assert returned_keys(function) == (keys, complete)


# Doubts


def doubts(phase: lt.Phase, *of_run: Any, also: Any = ()) -> list[str]:
    run = lt.workflow([(phase, 1), *((one, 1) for one in also)], max_rounds=1)
    for part in of_run:
        run = run | part
    return unmet(run.cursor)


def prints(item):
    """A part that needs *item*."""

    def norms(states):
        for state in states:
            print(state.grad_norm)
            yield state

    def rates(states):
        for state in states:
            print(state.lr)
            yield state

    def scores(states):
        for state in states:
            print(state.metrics["acuracy"])
            yield state

    def moves(states):
        for state in states:
            if state.updates:
                print("moves")
            yield state

    return {"grad_norm": norms, "lr": rates, "metrics": scores, "updates": moves}[item]


def accurate(model, batch):
    return {"loss": model(batch), "accuracy": 1.0}


def test_a_part_before_the_one_that_writes_is_told_to_stand_behind(model, sgd, batches):
    """With the names of both; behind it, all is well."""
    phase, moves = lt.train(model, batches, accurate), lt.optimize(sgd, max_norm=1.0)

    assert doubts(phase | prints("grad_norm") | moves) == [
        "train/norms: it reads state.grad_norm, which train/clip_grad_norm writes only behind it. Put it behind that."
    ]
    assert doubts(phase | prints("updates") | moves) == [
        "train/moves: it reads state.updates, which is False until train/backward has set it. Put it behind that."
    ]
    assert "train/update writes only behind it" in doubts(phase | prints("lr") | moves)[0]
    assert doubts(phase | moves | prints("grad_norm") | prints("updates") | prints("lr")) == []


def test_a_part_that_reads_what_nobody_writes_is_told_who_would(model, sgd, batches):
    """And which keys there are."""
    phase = lt.train(model, batches, accurate) | lt.optimize(sgd)

    assert doubts(phase | prints("grad_norm")) == [
        "train/norms: it reads state.grad_norm, which no part of train sets. Stand behind "
        "lt.optimize(optimizer, max_norm=...), where inf only measures it."
    ]
    assert doubts(phase | prints("metrics")) == [
        'train/scores: it reads state.metrics["acuracy"], which no part of train writes; known are loss, accuracy. '
        "Did you mean 'accuracy'?"
    ]


def test_functions_among_the_options_are_looked_into(model, batches):
    """What `measure` takes from the outputs must be there."""
    val = lt.validate(model, batches, accurate) | lt.measure({"most": torch.max}, lambda state: state.outputs["logits"])

    (doubt,) = doubts(val)
    assert doubt.startswith(
        'val/measure: it reads state.outputs["logits"], which no part of val writes; known are loss, accuracy.'
    )


def test_nothing_is_said_where_something_cannot_be_seen(model, sgd, batches):
    """A step whose keys are not literal, and a part that may do anything, end what can be told."""
    dark = lt.train(model, batches, lambda model, batch: SOMETHING) | lt.optimize(sgd)
    phase = lt.train(model, batches, accurate) | lt.optimize(sgd)

    assert doubts(dark | prints("metrics")) == []
    assert doubts(phase | out_of_sight | prints("metrics") | prints("grad_norm")) == []
    assert doubts(dark, lt.early_stop(lt.highest("train/acc"))) == []


def test_a_part_of_the_run_may_be_meant_for_one_of_the_phases(model, sgd, batches):
    """The norm is there in training, though not in validation."""
    train = lt.train(model, batches, accurate) | lt.optimize(sgd, max_norm=1.0)
    val = lt.validate(model, batches, accurate)

    assert doubts(train, prints("grad_norm"), also=[val]) == []
    assert len(doubts(val, prints("grad_norm"))) == 1


def test_a_result_that_nobody_writes_is_said_before_the_first_pass(model, sgd, batches):
    """Where all metrics are known beforehand; of a phase that is not in the workflow it cannot be known."""
    train = lt.train(model, batches, accurate) | lt.optimize(sgd)

    (doubt,) = doubts(train, lt.early_stop(lt.highest("train/acuracy")))
    assert doubt.startswith(
        'run/early_stop: it judges by "train/acuracy", which no part writes; known are train/loss, train/accuracy. '
        "Did you mean 'train/accuracy'"
    )
    assert doubts(train, lt.early_stop(lt.highest("train/accuracy"))) == []
    assert doubts(train, lt.early_stop(lt.highest("test/accuracy"))) == []


def test_a_result_that_nobody_wrote_is_said_after_the_first_pass(model, sgd, batches):
    """Also of a step whose keys are not literal; best, plateau and target alike."""
    plateau = lt.schedules.plateau(lt.lowest("train/los"))
    stop = lt.stop_after(lt.target("train/f1", at_least=2))
    phase = lt.train(model, batches, lambda model, batch: model(batch)) | lt.schedule_lr(sgd, plateau)
    run = lt.workflow([(phase | lt.optimize(sgd), 1)], max_epochs=2) | stop
    assert unmet(run.cursor) == []

    run.record(State(phase="train"), {"loss": 1.0})

    assert [doubt.partition(";")[0] for doubt in unmet(run.cursor)] == [
        'train/schedule_lr: it judges by "train/los", which no part writes',
        'run/stop_after: it judges by "train/f1", which no part writes',
    ]


def test_what_our_parts_make_of_each_other_raises_no_doubt(tmp_path):
    """No pipe of our own parts is in doubt."""
    run = everything(tmp_path)

    assert unmet(run.cursor) == []
    assert {kind(slot) for slot in run.cursor.slots} == set(OURS)
