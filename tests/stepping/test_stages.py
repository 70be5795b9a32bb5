"""Into an iteration, part by part."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest
import torch

import looptools as lt
from tests.loops import Case, Planted, assert_same, classify, piped

STEP = lambda model, batch: model(batch)  # noqa: E731


@pytest.fixture
def run(model, sgd, batches):
    step = lambda model, batch: model(batch)  # noqa: E731
    train = lt.train(model, batches, step) | lt.optimize(sgd, max_norm=0.5)
    return lt.workflow([(train, 1), (lt.validate(model, batches[:1], step), 1)], max_epochs=2) | lt.log(line=None)


TRAIN = ["batches", "forward", "backward", "clip_grad_norm", "update", "average"]


def test_stages_yields_after_each_part(run, model):
    """Names are full and in order; the weights move at `update`, and not before."""
    seen = [(name, model.w.item()) for name, state in run.stages()]

    assert [name for name, _ in seen] == [*(f"train/{name}" for name in TRAIN), "run/log"]
    assert [weight for _, weight in seen] == pytest.approx([3.0] * 4 + [2.5] * 3)


def test_stages_goes_on_in_the_open_iteration(run):
    """Left with `break`, the next `stages` walks through the rest."""
    for name, _ in run.stages():
        if name == "train/backward":
            break

    assert [name for name, _ in run.stages()] == ["train/clip_grad_norm", "train/update", "train/average", "run/log"]
    assert next(run).iteration == 1


def test_after_and_before_stop_there_and_next_completes(run, model):
    """Gradients can be looked at and changed before the optimizer moves."""
    state = run.after("backward")
    assert (state.iteration, model.w.grad.item(), model.w.item()) == (0, 1.0, 3.0)

    assert run.before("update") is state
    model.w.grad.fill_(0.25)
    assert next(run) is state
    assert model.w.item() == 2.75

    assert run.before("train/forward").iteration == 1
    assert run.after("val/forward").phase == "val"


def test_short_names_are_resolved_in_the_pass_under_way(run):
    """`forward` stands in both phases, and means the next one to run."""
    phases = [run.after("forward").phase for _ in range(5)]

    assert phases == ["train"] * 3 + ["val", "train"]


def test_a_short_name_that_matches_twice_in_a_pass_is_an_error():
    """In a GAN's pipe `backward` stands twice; the error lists both full names."""
    gan = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(gan.parameters(), lr=0.1)
    step = lambda model, batch: model(batch).mean()  # noqa: E731
    phase = lt.train(gan, [torch.ones(1, 1)], step) | lt.optimize(optimizer, name="D") | lt.forward(step)
    run = lt.workflow([(phase | lt.optimize(optimizer, name="G"), 1)], max_epochs=1)

    with pytest.raises(LookupError, match=r"'backward' matches train/D.backward, train/G.backward. Give the full name"):
        run.after("backward")
    assert run.after("D.backward").updates
    assert run.after("train/G.backward").updates


def test_a_name_that_nothing_has_is_an_error_at_once(run):
    """All names are listed."""
    with pytest.raises(LookupError, match=r"after: there is no part 'clip'. There are: train/batches, .*run/log"):
        run.after("clip")
    with pytest.raises(LookupError, match="there is no part 'batches'"):
        run.before("batches")
    with pytest.raises(LookupError, match="there is no part"):
        run["clip"]


def test_after_says_when_the_run_ends_first(run):
    """A LookupError, once no further pass has that part."""
    run.to_end()

    with pytest.raises(LookupError, match="the run ended before 'backward' came again"):
        run.after("backward")


# Across passes, and with parts that drop states


def walk(run):
    """(name, phase and index of the batch) of every stage until the run ends, an iteration after the other."""
    seen = []
    while not run.ended:
        seen.append([(name.rpartition("/")[2], f"{state.phase}{state.index}") for name, state in run.stages()])
    return seen[:-1]  # the last walk finds that there is no more


def test_stages_goes_across_passes_and_epochs(run, model):
    """Each walk is one iteration, the end of its pass included; a validation has its own parts."""
    iterations = walk(run)

    assert [walk[0][1] for walk in iterations] == ["train0", "train1", "train2", "val0"] * 2
    assert {len({place for _, place in walk}) for walk in iterations} == {1}
    assert [name for name, _ in iterations[2]] == [*TRAIN, "log"]
    assert [name for name, _ in iterations[3]] == ["batches", "forward", "average", "log"]
    assert [row["phase"] for row in run.history] == ["train", "val"] * 2
    assert run.progress.epoch == 2


def test_several_forwards_and_recipes_by_their_full_names(batches):
    """A GAN's iteration, stopped at each of its ends."""
    gan = torch.nn.ParameterDict({"D": torch.tensor(0.0), "G": torch.tensor(0.0)})
    sgd = {name: torch.optim.SGD([gan[name]], lr=1.0) for name in gan}
    phase = lt.train(gan, batches, lambda gan, batch: gan["D"] * batch.mean()) | lt.optimize(sgd["D"], name="D")
    phase = phase | lt.forward(lambda gan, batch: gan["G"] * gan["D"]) | lt.optimize(sgd["G"], name="G")
    run = lt.workflow([(phase, 1)], max_epochs=1)

    weights = dict.fromkeys(["D.backward", "train/D.update", "forward#2", "G.backward", "G.update"])
    for name in weights:
        assert run.after(name).iteration == 0
        weights[name] = (gan["D"].item(), gan["G"].item())
    assert run.before("G.update").iteration == 1
    assert list(weights.values()) == [(0, 0), (-1, 0), (-1, 0), (-1, 0), (-1, 1)]


def drops(*indices):
    """A part that drops the training states with these indices."""

    def drops(states):
        for state in states:
            if not (state.trains and state.index in indices):
                yield state

    return drops


def dropping(model, sgd, batches, *indices):
    train = lt.train(model, batches, STEP) | drops(*indices) | lt.optimize(sgd)
    return lt.workflow([(train, 1), (lt.validate(model, batches[:1], STEP), 1)], max_epochs=2)


def test_a_state_that_is_dropped_is_followed_by_the_next_and_no_part_of_it_is_left_out(model, sgd, batches):
    """What the next one has gone through, up to the part that dropped, is told afterwards."""
    iterations = walk(dropping(model, sgd, batches, 1))

    rest = ["drops", "backward", "update", "average"]
    assert iterations[1] == [
        *((name, "train1") for name in ["batches", "forward"]),
        *((name, "train2") for name in ["batches", "forward", *rest]),
    ]
    assert [walk[0][1] for walk in iterations] == ["train0", "train1", "val0"] * 2


def test_if_a_pass_ends_with_a_dropped_state_only_who_learns_of_it_is_told(model, sgd, batches):
    """`backward` does not see it, those that close a pass do; it is no state to stop at."""
    run = dropping(model, sgd, batches, 2)
    iterations = walk(run)
    assert [name for name, _ in iterations[2]] == ["batches", "forward", "drops", "update", "average"]

    run.reset()
    run.until(iteration=1)
    assert run.after("average").phase == "val"
    run.until(iteration=4)
    assert run.before("average").phase == "val"


@pytest.mark.filterwarnings("ignore:train. every state of this pass was dropped:UserWarning")
@pytest.mark.parametrize("part", ["average", "drops"])
@pytest.mark.parametrize("indices", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_a_state_that_a_part_was_waiting_for_is_not_missed(model, sgd, batches, indices, part):
    """`after` stops at each that is not dropped, and at none twice."""
    run = dropping(model, sgd, batches, *indices)
    found = []
    with pytest.raises(LookupError, match=f"the run ended before '{part}' came again"):
        while True:
            state = run.after(part)
            found.append((state.phase, state.index))

    kept = [("train", index) for index in range(3) if index not in indices]
    assert found == [*kept, *([("val", 0)] if part == "average" else [])] * 2


def test_a_part_in_front_of_one_that_drops_misses_no_state_either(model, sgd, batches):
    """`forward` has seen batch 2 when the part that dropped batch 1 hands it on: `after` stops there."""
    run = dropping(model, sgd, batches, 1)
    found = [run.after("train/forward") for _ in range(6)]

    assert [state.index for state in found] == [0, 1, 2] * 2
    assert [state.dropped for state in found] == [False, True, False] * 2


def test_a_part_that_is_muted_is_no_stage(run):
    """And waiting for it is refused, since it would be in vain."""
    run.cursor.slots[2].muted = True

    assert "train/clip_grad_norm" not in [name for name, _ in run.stages()]
    for verb in (run.after, run.before):
        with pytest.raises(LookupError, match="train/clip_grad_norm is muted, so no state comes to it. run.mute"):
            verb("clip_grad_norm")


def test_a_name_that_is_ambiguous_everywhere_is_an_error_before_anything_runs(model, sgd, batches):
    """As in a GAN's pipe, with the full names."""
    phase = lt.train(model, batches, STEP) | lt.optimize(sgd, name="D") | lt.forward(STEP) | lt.optimize(sgd, name="G")
    run = lt.workflow([(phase, 1)], max_epochs=1)

    with pytest.raises(LookupError, match=r"before: 'update' matches train/D.update, train/G.update. Give the full na"):
        run.before("update")
    assert not run.begun


# Left anywhere, everything goes on


class Digits(torch.nn.Module):
    """One weight; batch i is 10 ** i, so that the weight tells how often each has moved it."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.0))

    def forward(self, batch):
        return self.w * batch.mean()


def digits(kind):
    """Two epochs of three batches and two validation batches, with a part that drops some."""
    model, batches = Digits(), [torch.tensor([10.0**index]) for index in range(3)]
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    train = lt.train(model, batches, STEP) | drops(*{"front": (0, 2), "front all": range(3)}.get(kind, ()))
    train = train | lt.backward(sgd) | drops(*{"middle": (1, 2)}.get(kind, ())) | lt.update(sgd)
    run = lt.workflow([(train, 1), (lt.validate(model, batches[:2], STEP), 1)], max_epochs=2)
    return run | drops(*{"run": (0, 2)}.get(kind, ())) | lt.log(line=None), model


VERBS = {
    "next": next,
    "stages": lambda run: list(run.stages()),
    "after": lambda run: run.after("average"),
    "before": lambda run: run.before("log"),
    "until": lambda run: run.until(lambda state: True, before="average"),
    "retry": lambda run: run.retry(),
    "skip": lambda run: run.skip(),
}


@pytest.mark.filterwarnings("ignore:train. every state of this pass was dropped:UserWarning")
@pytest.mark.parametrize("kind", ["", "front", "front all", "middle", "run"])
@pytest.mark.parametrize("verb", VERBS)
def test_stages_can_be_left_anywhere(verb, kind):
    """Whatever comes then: every batch moves the weight once, but one that is skipped before its update."""
    moving = {"front": [1], "front all": [], "middle": [0]}.get(kind, [0, 1, 2])
    for cut in range(1, 40, 1 if verb in ("skip", "after") else 2):
        run, model = digits(kind)
        stages = 0
        while stages < cut and not run.ended:
            for stages, (_, state) in enumerate(run.stages(), stages + 1):  # noqa: B007
                if stages == cut:
                    break
        if run.ended:
            break
        expected = 2.0 * sum(10**index for index in moving)
        if verb == "skip" and run.cursor.state is not None and state.trains and state.index in moving:
            moved = any(slot.short == "update" for slot in run.cursor.line[: run.cursor.at])
            expected -= 0 if moved else 10**state.index
        with contextlib.suppress(StopIteration, LookupError, RuntimeError):
            VERBS[verb](run)
        run.to_end()

        assert -model.w.item() == expected, cut
        assert (run.progress.iteration, run.progress.epoch) == (6, 2)


def test_another_verb_in_the_middle_of_a_walk_ends_it(run):
    """What it was walking through is finished; it does not go on in another iteration."""
    walk = iter(run.stages())
    assert next(walk)[0] == "train/batches"
    next(run)
    run.after("backward")

    assert list(walk) == []
    assert [name for name, _ in run.stages()] == ["train/clip_grad_norm", "train/update", "train/average", "run/log"]


@pytest.mark.parametrize("part", ["forward", "backward", "clip_grad_value", "update", "average"])
@pytest.mark.parametrize("iteration", [0, 2, 4])
def test_a_failure_within_stages_goes_on_where_it_stopped(model, sgd, batches, part, iteration):
    """The part that raised is done again, `backward` with its forward; in the end the weight is that of the loop."""

    def trips(states):
        for state in states:
            if state.iteration == iteration and not tripped:
                tripped.append(part)
                raise Planted
            yield state

    tripped, parts = [], {name: lt.chain() for name in ("backward", "clip_grad_value", "update", "average")}
    parts[part] = trips
    train = lt.train(model, batches, STEP) | parts.get("forward", lt.chain()) | parts["backward"] | lt.backward(sgd)
    train = train | parts["clip_grad_value"] | lt.clip_grad_value(model.parameters(), 2.5) | parts["update"]
    run = lt.workflow([(train | lt.update(sgd) | parts["average"], 1)], max_epochs=2)
    names = []
    with pytest.raises(Planted):
        while True:
            names += [name for name, _ in run.stages()]
    assert run.failed.part == "train/trips"
    names = [name for name, _ in run.stages()]
    assert names[0] == "train/trips"
    run.to_end()

    assert model.w.item() == 3 - 2 * (1 + 2 + 2.5)


# Changed in between: the same as the loop by hand


def test_weights_gradients_learning_rate_and_batch_can_be_changed_in_between():
    """To the bit, with dropout and BatchNorm, in all of two epochs and their validations."""
    case = Case(optimizer="SGD", epochs=2)
    model, optimizer, train, val = case.make()
    for _ in range(2):
        model.train()
        for index, (images, labels) in enumerate(train):
            optimizer.zero_grad()
            loss = classify(model, (images + index, labels))["loss"]
            loss.backward()
            model[0].weight.grad.mul_(2 - index / 8)
            optimizer.param_groups[0]["lr"] = 0.05 / (index + 1)
            optimizer.step()
            with torch.no_grad():
                model[4].bias.clamp_(max=0.1)
        model.eval()
        for images, labels in val:
            with torch.no_grad():
                classify(model, (images, labels))
    expected = model.state_dict()

    run = piped(case)
    while not run.ended:
        for name, state in run.stages():
            if name == "train/batches":
                state.batch = (state.batch[0] + state.index, state.batch[1])
            if name == "train/backward":
                state.model[0].weight.grad.mul_(2 - state.index / 8)
                run.optimizer.param_groups[0]["lr"] = 0.05 / (state.index + 1)
            if name == "train/update":
                with torch.no_grad():
                    state.model[4].bias.clamp_(max=0.1)

    assert_same(run.model.state_dict(), expected)


def test_after_and_before_change_the_same_as_stages():
    """The verbs of a prompt, each changing what the one before it left."""

    def trained(change):
        run = piped(Case(optimizer="AdamW", epochs=1, max_norm=1.0))
        change(run)
        run.to_end()
        return run.model.state_dict()

    def by_verbs(run):
        run.after("batches").batch[0].mul_(2)
        run.after("backward").model[0].weight.grad.zero_()
        run.before("update").model[4].bias.grad.add_(1)
        next(run)

    def by_stages(run):
        for name, state in run.stages():
            if name == "train/batches":
                state.batch[0].mul_(2)
            if name == "train/backward":
                state.model[0].weight.grad.zero_()
            if name == "train/clip_grad_norm":
                state.model[4].bias.grad.add_(1)

    assert_same(trained(by_verbs), trained(by_stages))


def test_a_schedule_takes_a_rate_that_was_set_between_its_parts(model, batches):
    """Set before `update` it holds in this iteration; the schedule goes on from it, and says so."""
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    train = lt.train(model, batches, STEP) | lt.schedule_lr(sgd, lt.schedules.constant()) | lt.optimize(sgd)
    run = lt.workflow([(train, 1)], max_epochs=1)
    run.before("update")
    sgd.param_groups[0]["lr"] = 0.5
    next(run)
    assert model.w.item() == 3 - 0.5 * 1

    with pytest.warns(UserWarning, match="by hand"):
        next(run)
    assert model.w.item() == 3 - 0.5 * 1 - 0.5 * 2


# Ctrl-C


@pytest.mark.skipif(os.name == "nt", reason="os.kill(SIGINT) ends the process on Windows")
@pytest.mark.parametrize("verb", ["after", "before"])
def test_ctrl_c_in_the_iteration_that_a_verb_stops_in_is_raised_there(model, sgd, batches, verb):
    """Not by the next cell, at this iteration's boundary; what was kept back is not taken for an open one."""
    presses = [1]

    def step(model, batch):
        if presses and presses.pop():
            os.kill(os.getpid(), signal.SIGINT)
        return model(batch)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run = lt.workflow([(lt.train(model, batches, step) | lt.optimize(sgd), 1)], max_epochs=1)
        with pytest.raises(KeyboardInterrupt):
            getattr(run, verb)("backward" if verb == "after" else "update")
        assert (run.state.iteration, run.progress.iteration, model.w.item()) == (0, 0, 3.0)
        assert next(run).iteration == 0

        presses.append(1)
        with pytest.raises(KeyboardInterrupt):
            next(run)
        assert getattr(run, verb)("forward").iteration == 2
    finally:
        run.close()
        signal.signal(signal.SIGINT, before)
