"""Swapping parts and steps."""

from __future__ import annotations

import functools

import attrs
import pytest
import torch

import looptools as lt


@pytest.fixture
def run(model, sgd, batches):
    step = lambda model, batch: model(batch)  # noqa: E731
    train = lt.train(model, batches, step) | lt.optimize(sgd, max_norm=0.5)
    return lt.workflow([(train, 1), (lt.validate(model, batches[:1], step), 1)], max_epochs=2) | lt.log(line=None)


def test_replace_swaps_a_part_in_mid_iteration(run, sgd, model):
    """A part swapped before its turn acts in this very iteration."""
    run.after("backward")

    run.replace("clip_grad_norm", lt.clip_grad_norm(model.parameters(), 0.125))
    next(run)

    assert model.w.item() == pytest.approx(3 - 0.125)
    assert run["clip_grad_norm"].max_norm == 0.125


def test_replace_keeps_the_memory_of_a_part_of_the_same_class(model, sgd, batches):
    """Swapping `backward` in an open window keeps what is in it."""
    train = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd, accumulate=3)
    run = lt.workflow([(train, 1)], max_epochs=1)
    next(run)

    run.replace("backward", lt.backward(sgd, accumulate=3))
    run.to_end()

    assert model.w.item() == 3 - (1 + 2 + 3) / 3


def test_replace_by_name_needs_something_of_that_name(run):
    """The error lists the steps there are."""

    def classify(model, batch):
        return model(batch)

    with pytest.raises(LookupError, match=r"no step or part is called 'classify'. Steps are lambda"):
        run.replace(classify)
    with pytest.raises(TypeError, match="replace: give a name and a part, or a function"):
        run.replace(3)


def test_replace_by_name_swaps_a_plain_generator(model, batches):
    """A part that was redefined in a cell takes the place of the old one."""

    def mark(states):
        for state in states:
            state.metrics["mark"] = 1
            yield state

    run = lt.workflow([(lt.train(model, batches, lambda model, batch: model(batch)) | mark, 1)], max_epochs=1)
    first = next(run).metrics["mark"]

    def mark(states):
        for state in states:
            state.metrics["mark"] = 2
            yield state

    run.replace(mark)

    assert (first, next(run).metrics["mark"]) == (1, 2)


def test_a_step_is_swapped_by_the_old_ones_name(model, sgd, batches):
    """The mended step may be called otherwise."""

    def lm(model, batch):
        return model(batch)

    def lm_mended(model, batch):
        return 2 * model(batch)

    run = iter(lt.train(model, batches, lm) | lt.optimize(sgd))
    with pytest.raises(LookupError, match=r"Steps are lm; give the old name first: run.replace\('lm', lm_mended\)"):
        run.replace(lm_mended)

    run.replace("lm", lm_mended)

    assert next(run).loss.item() == 6.0


def test_what_waits_for_the_boundary_is_done_by_the_new_part(model, sgd, batches, tmp_path):
    """A checkpoint with a wrong key is named, and mended by another one; the same boundary then saves."""
    phase = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)
    run = lt.workflow([(phase, 1)], max_epochs=1) | lt.checkpoint(tmp_path, best=lt.lowest("train/los"))
    with pytest.raises(LookupError, match="no part writes"):
        run.to_end()
    assert run.failed.part == "run/checkpoint"

    run.replace("checkpoint", lt.checkpoint(tmp_path, best=lt.lowest("train/loss")))
    run.to_end()

    assert (tmp_path / "best.pt").exists()
    assert run.best["train/loss"]["iteration"] == 3


# What is swapped, and by which name


def mean(model, batch):
    return model(batch)


class Scaled:
    """A step that is an object, and has a method that is one."""

    def __init__(self, by):
        self.by = by

    def __call__(self, model, batch):
        return self.by * model(batch)

    def method(self, model, batch):
        return self.by * model(batch)


def scaled(model, batch, *, by):
    return by * model(batch)


STEPS = {
    "function": (mean, "mean", lambda model, batch: 2 * model(batch)),
    "lambda": (lambda model, batch: model(batch), "lambda", lambda model, batch: 2 * model(batch)),
    "object": (Scaled(1), "Scaled", Scaled(2)),
    "method": (Scaled(1).method, "method", Scaled(2).method),
    "partial": (functools.partial(scaled, by=1), "scaled", functools.partial(scaled, by=2)),
}


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("named", [True, False])
def test_any_kind_of_step_is_swapped(model, sgd, batches, kind, named):
    """By the old one's name, or by its own."""
    old, name, new = STEPS[kind]
    run = iter(lt.train(model, batches, old) | lt.optimize(sgd))
    losses = [next(run).loss.item()]  # 3 · 1; then the weight is 2

    if named or kind == "function":
        run.replace(name, new)
    else:
        run.replace(new)

    assert [*losses, next(run).loss.item()] == [3, 2 * 2 * 2]


def two_phases(model, batches, *steps):
    """On the first batch, whose mean is 1, at weight 3."""
    one, two = (lt.validate(model, batches[:1], step, name=n) for step, n in zip(steps, ("one", "two"), strict=True))
    return lt.workflow([(one, 1), (two, 1)], max_rounds=1)


def test_a_redefined_function_keeps_what_a_partial_has_bound(model, batches):
    """Each of them its own."""

    def scaled(model, batch, *, by):
        return {"loss": 10 * by * model(batch)}

    steps = [functools.partial(globals()["scaled"], by=by) for by in (2, 3)]
    run = two_phases(model, batches, *steps)
    scaled.__qualname__ = "scaled"

    run.replace(scaled)

    assert [state.loss.item() for state in run] == [60, 90]


def test_one_step_of_two_phases_is_swapped_in_both(model, batches):
    """Also in a pipe that has a new version of it in one of them already."""

    def version(by):
        def mean(model, batch):
            return by * model(batch)

        return mean

    first = version(1)
    run = two_phases(model, batches, first, first)
    run.replace("one/forward", version(2))

    run.replace(version(3))

    assert [state.loss.item() for state in run] == [9, 9]
    assert [change["part"] for change in run.changes] == ["one/forward", "one/forward", "two/forward"]


def test_two_steps_of_one_name_have_to_be_told_apart(model, batches):
    """The lambdas of both phases would become the same one."""
    run = two_phases(model, batches, lambda model, batch: model(batch), lambda model, batch: 2 * model(batch))
    new = lambda model, batch: 3 * model(batch)  # noqa: E731

    for given in (("lambda", new), (new,)):
        with pytest.raises(LookupError, match="one/forward, two/forward have different things that are called 'lam"):
            run.replace(*given)
    run.replace("two/forward", new)

    assert [state.loss.item() for state in run] == [3, 9]


def test_a_step_and_a_part_of_one_name_have_to_be_told_apart(model, sgd, batches):
    """The part's full name says that it is meant."""

    def update(model, batch):
        return model(batch)

    run = iter(lt.train(model, batches, update) | lt.optimize(sgd))

    with pytest.raises(LookupError, match="'update' can be two things: train/update is a part, train/forward calls"):
        run.replace("update", lt.update(sgd))
    run.replace("train/update", lt.update(sgd))
    run.to_end()

    assert model.w.item() == -3


def test_a_part_goes_by_its_own_name(run, model):
    """There is no need to type it twice."""
    run.replace(lt.clip_grad_norm(model.parameters(), 0.125))

    assert run["clip_grad_norm"].max_norm == 0.125


def test_a_chain_of_several_is_no_part(run, sgd):
    """Each has a place of its own."""
    with pytest.raises(TypeError, match="optimize|chain is a chain of 2 parts; a part can be replaced by one part"):
        run.replace("update", lt.optimize(sgd))


# Memory


@pytest.mark.parametrize("plain", [True, False])
def test_memory_stays_with_a_class_that_a_cell_defines_anew(run, plain):
    """Of a plain class what has changed of its attributes, of an attrs class its fields; options are the new ones."""

    def version(scale):
        class Counts:
            def __init__(self, by):
                self.by, self.n = by, 0

            def __call__(self, states):
                for state in states:
                    self.n += self.by * scale
                    yield state

        @attrs.define(eq=False)
        class counts:
            by: int
            n: int = attrs.field(default=0, init=False)
            new: int = attrs.field(default=scale, init=False)
            __call__ = Counts.__call__

        return (Counts if plain else counts)(by=2)

    name = "Counts" if plain else "counts"
    run.insert(version(1), before="update")
    list(run.take(2))

    run.replace(name, version(10))
    next(run)

    assert run[name].n == 2 + 2 + 20


def test_a_part_of_another_class_begins_afresh(run):
    """As an inserted one does: on_start and on_pass are called."""
    told = []

    class Told:
        def on_start(self, run):
            told.append("start")

        def on_pass(self, run):
            told.append("pass")

        def __call__(self, states):
            yield from states

    next(run)
    run.replace("clip_grad_norm", Told())

    assert told == ["start", "pass"]
    assert run.cursor.line[2].name == "train/clip_grad_norm"


def test_gradients_in_a_window_that_is_not_taken_over_are_said(model, sgd, batches):
    """By a part of another class."""

    def by_hand(states):
        for state in states:
            state.loss.backward()
            yield state

    run = iter(lt.train(model, batches, mean) | lt.optimize(sgd, accumulate=3))
    next(run)

    with pytest.warns(UserWarning, match="replace: the gradients of 1 batches are in the open window"):
        run.replace("backward", by_hand)


# What is refused


def test_what_the_order_forbids_is_refused(run, sgd, model):
    """As when a run is built; the old part stays, and works."""
    scaler = torch.amp.GradScaler("cpu")
    old = run["update"]

    with pytest.raises(ValueError, match="share an optimizer, but only train/update has a scaler") as caught:
        run.replace("update", lt.update(sgd, scaler=scaler))
    with pytest.raises(ValueError, match="nobody would fill the gradients that train/update moves by"):
        run.replace("backward", lt.nan_guard())

    assert caught.value.__notes__ == ["looptools: replace has changed nothing."]
    assert run["update"] is old
    assert run.changes == []
    run.to_end()
    assert model.w.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("hook", ["on_build", "on_start", "on_pass", "carry_over"])
def test_a_part_that_raises_as_it_is_put_in_leaves_the_old_one(run, hook):
    """With its generator, which is not even begun anew; and all that came before it."""

    class Part:
        def __init__(self, kind):
            self.begun = 0
            if kind == "bad":
                setattr(self, hook, self.fail)

        def fail(self, _):
            raise ZeroDivisionError

        def __call__(self, states):
            self.begun += 1
            yield from states

    class Other(Part):
        pass

    run.insert(Part("good"), before="update")
    next(run)
    old = run["Part"]

    new = Part("bad") if hook in ("on_build", "carry_over") else Other("bad")
    with pytest.raises(ZeroDivisionError):
        run.replace("Part", new)

    assert run["Part"] is old
    next(run)
    assert old.begun == 1


def test_of_several_swaps_all_or_none_are_made(model, batches):
    """A step that fits one of two phases goes into neither."""
    run = lt.workflow([(lt.train(model, batches, mean), 1), (lt.validate(model, batches, mean), 1)], max_epochs=1)

    class Refuses:
        def on_build(self, run):
            if run["val/forward"].step is not mean and run.cursor.passes.phase is not None:
                raise ZeroDivisionError

        def __call__(self, states):
            yield from states

    run.insert(Refuses(), before="val/average")
    next(run)

    with pytest.raises(ZeroDivisionError):
        run.replace("mean", lambda model, batch: 2 * model(batch))

    assert [run[f"{phase}/forward"].step for phase in ("train", "val")] == [mean, mean]


def test_replace_is_refused_while_a_part_is_at_work(run):
    """Its generator could not be closed."""

    def meddles(states):
        for state in states:
            state.run.replace("meddles", lt.timer())
            yield state

    run.insert(meddles, before="update")

    with pytest.raises(RuntimeError, match="replace: a part is at work"):
        next(run)


def test_an_optimizer_that_takes_the_place_of_another_is_the_runs(model, sgd, batches):
    """Part by part, in an order in which the pipe is right at any time."""
    other = torch.optim.SGD(model.parameters(), lr=2.0)
    run = iter(lt.train(model, batches, mean) | lt.optimize(sgd))
    next(run)

    run.remove("update")
    run.replace("backward", lt.backward(other))
    run.insert(lt.update(other), after="backward")
    next(run)

    assert run.optimizer is other
    assert model.w.item() == 3 - 1 - 2 * 2


def test_a_step_that_runs_elsewhere_already_says_where_it_is_not(model, sgd, batches):
    """Else the old one would go on in training, and the change would be noted all the same."""

    def old(model, batch):
        return model(batch)

    def good(model, batch):
        return model(batch)

    train = lt.train(model, batches, old) | lt.optimize(sgd)
    run = lt.workflow([(train, 1), (lt.validate(model, batches, good), 1)], max_epochs=1)

    with pytest.raises(LookupError, match=r"good runs in val/forward already, and train/forward calls old"):
        run.replace(good)
    assert run.changes == []
    run.replace("old", good)
    run.replace(good)
