"""Options of the optimizer, iteration by iteration."""

from __future__ import annotations

import pytest
import torch
from loops import Case, assert_same, classify, device_reads

import looptools as lt
from looptools import stepping


def phase_of(model, batches, *parts):
    phase = lt.train(model, batches, lambda model, batch: model(batch))
    for part in parts:
        phase = phase | part
    return phase


def test_weight_decay_that_grows_is_the_same_as_by_hand():
    """AdamW's weight decay along half a cosine, as in DINO: the bits of the loop by hand."""
    model, optimizer, train, _ = Case(optimizer="AdamW").make()
    cosine, total = lt.schedules.cosine(end=0.4), 2 * len(train)
    model.train()
    for epoch in range(2):
        for index, batch in enumerate(train):
            optimizer.param_groups[0]["weight_decay"] = cosine(epoch * len(train) + index, total, 0.1)
            optimizer.zero_grad()
            classify(model, batch)["loss"].backward()
            optimizer.step()
    by_hand = model.state_dict()

    model, optimizer, train, _ = Case(optimizer="AdamW").make()
    phase = lt.train(model, train, classify) | lt.schedule(optimizer, "weight_decay", cosine) | lt.optimize(optimizer)
    lt.workflow([(phase, 1)], max_epochs=2).to_end()

    assert_same(model.state_dict(), by_hand)


def test_a_schedule_for_each_group_from_its_own_base(model, batches):
    """The backbone stands still while the head falls."""
    other = torch.nn.Parameter(torch.ones(()))
    model.other = other
    sgd = torch.optim.SGD([{"params": [model.w], "lr": 1.0}, {"params": [other], "lr": 0.5}])
    parts = [lt.schedules.poly(), lt.schedules.constant()]
    phase = phase_of(model, batches, lt.schedule_lr(sgd, parts), lt.optimize(sgd))

    rates = [[round(group["lr"], 3) for group in sgd.param_groups] for state in phase]

    assert rates == [[1.0, 0.5], [0.667, 0.5], [0.333, 0.5]]


def two_groups(first, second, option="lr"):
    """A model of two weights, and its optimizer with this option in two groups."""
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(())) for _ in range(2)])
    groups = [{"params": [weight], option: value} for weight, value in zip(model, (first, second), strict=True)]
    return model, torch.optim.SGD(groups, lr=1.0)


def values_of(model, optimizer, option, given):
    """The option of both groups, iteration by iteration."""
    phase = lt.train(model, [1, 2], lambda model, batch: model[0] * batch + model[1])
    phase = phase | lt.schedule(optimizer, option, given) | lt.optimize(optimizer)
    return [[round(group[option], 3) for group in optimizer.param_groups] for state in phase]


@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_a_group_that_began_at_0_stays_there(option):
    """As that of param_groups which is not to decay, under a schedule that goes to a value of its own."""
    rising = lt.schedules.linear(end=0.4)

    assert values_of(*two_groups(0.2, 0.0, option), option, rising) == [[0.2, 0.0], [0.3, 0.0]]
    model, optimizer = two_groups(0.2, torch.tensor(0.0), option)
    optimizer.param_groups[0][option] = 0.0
    optimizer.param_groups[1][option] = 0.2
    assert values_of(model, optimizer, option, rising) == [[0.0, 0.2], [0.0, 0.3]]


@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_a_list_of_schedules_is_obeyed_where_a_group_began_at_0(option):
    """It says of each group what it wants; and where all began at 0, nothing was set apart."""
    rising = lt.schedules.linear(end=0.4)

    assert values_of(*two_groups(0.2, 0.0, option), option, [rising, rising]) == [[0.2, 0.0], [0.3, 0.2]]
    assert values_of(*two_groups(0.0, 0.0, option), option, rising) == [[0.0, 0.0], [0.2, 0.2]]


def test_weights_in_no_decay_do_not_decay():
    """With param_groups as it comes, and a weight decay that grows as in DINO."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    adam = torch.optim.AdamW(lt.param_groups(model, lr=0.1, weight_decay=0.04))
    phase = lt.train(model, [torch.ones(2, 2)] * 3, lambda model, batch: model(batch).pow(2).mean())

    (phase | lt.schedule(adam, "weight_decay", lt.schedules.cosine(end=0.4)) | lt.optimize(adam)).to_end()

    assert [group["weight_decay"] for group in adam.param_groups] == [pytest.approx(0.31), 0.0]


def test_a_value_that_is_a_tensor_is_noted_as_it_is_now(model, batches):
    """Filled in place, it would change in all the states that have gone by."""
    sgd = torch.optim.SGD(model.parameters(), lr=torch.tensor(1.0), weight_decay=0.5)
    phase = phase_of(model, batches, lt.schedule_lr(sgd, lt.schedules.step(1, 0.5)), lt.optimize(sgd))

    states = list(phase)

    assert [float(state.lr) for state in states] == [1.0, 0.5, 0.25]


def test_groups_that_are_added_later_follow_the_one_schedule(model, sgd, batches):
    """From their own base; a list of schedules does not know what they should do, and says so."""
    model.other = torch.nn.Parameter(torch.ones(()))
    phase = phase_of(model, batches, lt.schedule_lr(sgd, lt.schedules.poly()), lt.optimize(sgd))
    listed = iter(phase_of(model, batches, lt.schedule_lr(sgd, [lt.schedules.poly()]), lt.optimize(sgd)))
    run = iter(phase)
    next(run), next(listed)
    sgd.add_param_group({"params": [model.other], "lr": 0.3})

    next(run)
    assert sgd.param_groups[1]["lr"] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="schedule_lr: got 1 schedules for 2 param groups"):
        next(listed)


def test_it_acts_before_the_update_and_names_itself(model, sgd, batches):
    """In the order of the pipe; part names say the option, and the newest value is a gauge."""
    sgd.param_groups[0]["weight_decay"] = 0.25
    order = []

    def look(states):
        for state in states:
            order.append((sgd.param_groups[0]["weight_decay"], model.w.item()))
            yield state

    part = lt.schedule(sgd, "weight_decay", lt.schedules.step(1, 0.5))
    run = iter(phase_of(model, batches, look, part, look, lt.optimize(sgd), look))
    state = next(run)

    assert order == [(0.25, 3.0), (0.25, 3.0), (0.25, 1.25)]
    assert next(run).gauges == {"weight_decay": 0.125}
    assert state.gauges == {"weight_decay": 0.25}
    assert "train/schedule_weight_decay" in [name for name, _ in run.stages()]


def test_one_next_is_one_iteration_and_stopping_early_closes_it(model, sgd, batches):
    """It asks for no second state, and leaves nothing open."""
    asked = []

    def states():
        for number in range(3):
            asked.append(number)
            yield lt.State(phase="train", iteration=number, run=run)

    run = iter(phase_of(model, batches, lt.schedule_lr(sgd, lt.schedules.step(1)), lt.optimize(sgd)))
    stream = run["train/schedule_lr"](states())
    next(stream)
    stream.close()

    assert asked == [0]
    assert list(stream) == []


@pytest.mark.parametrize("option", ["lr", "momentum"])
def test_tensors_are_filled_and_never_read(model, batches, option):
    """A rate or a beta that stays on its device: one read for the base value, none at an iteration."""
    held = torch.tensor(0.5)
    options = {"lr": held} if option == "lr" else {"betas": (held, torch.tensor(0.99))}
    adam = torch.optim.Adam(model.parameters(), foreach=False, **options)
    run = iter(phase_of(model, batches, lt.schedule(adam, option, lt.schedules.step(1, 0.5)), lt.optimize(adam)))
    part = run["train/schedule_" + option]
    states = (lt.State(phase="train", iteration=n, run=run) for n in range(4))
    stream = part(states)
    next(stream)

    with device_reads() as reads:
        for n in range(1, 4):
            run.progress.updates[adam] = n
            next(stream)

    group = adam.param_groups[0]
    assert reads == []
    assert (group["lr"] if option == "lr" else group["betas"][0]) is held
    assert held.item() == 0.5**4


def test_a_value_changed_by_hand_rescales_what_follows(model, sgd, batches):
    """As for a learning rate, with the option's name in the warning."""
    sgd.param_groups[0]["weight_decay"] = 0.5
    part = lt.schedule(sgd, "weight_decay", lt.schedules.poly())
    run = iter(phase_of(model, batches, part, lt.optimize(sgd)))
    next(run)
    sgd.param_groups[0]["weight_decay"] = 0.05

    with pytest.warns(UserWarning, match="schedule: weight_decay was changed by hand from 0.5 to 0.05"):
        next(run)

    assert sgd.param_groups[0]["weight_decay"] == pytest.approx(0.05 * 2 / 3)


def resumable(kind):
    """A run with this schedule, all objects new."""
    model, optimizer, train, val = Case().make()
    parts = {
        "one_cycle": lambda: [lt.schedule_lr(optimizer, lt.schedules.one_cycle(0.2), warmup=3)],
        "momentum": lambda: [lt.schedule_momentum(optimizer, lt.schedules.cosine(end=0.5), warmup=lt.epochs(3))],
        "plateau": lambda: [
            lt.schedule_lr(optimizer, lt.schedules.plateau(lt.lowest("val/loss"), patience=0, threshold=0.1))
        ],
        "torch": lambda: [lt.schedule_lr(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20))],
        "both": lambda: [
            lt.schedule_lr(optimizer, [lt.schedules.cyclic(cycles=2)], by="iteration"),
            lt.schedule_momentum(optimizer, lt.schedules.one_cycle_momentum()),
            lt.schedule(optimizer, "weight_decay", lambda done, total, base: 0.001 * done, by="epoch"),
        ],
    }[kind]()
    phase = lt.train(model, train, classify)
    for part in [*parts, lt.optimize(optimizer)]:
        phase = phase | part
    return lt.workflow([(phase, 1), (lt.validate(model, val, classify), 1)], max_epochs=4)


def options_of(run):
    keys = ("lr", "momentum", "weight_decay")
    return [[run.optimizer.param_groups[0][key] for key in keys] for state in run if state.trains]


@pytest.mark.parametrize("kind", ["one_cycle", "momentum", "plateau", "torch", "both"])
@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_resumed_schedule_is_the_uninterrupted_one(tmp_path, kind, epochs):
    """Saved after some epochs, gone on with by new objects: options and weights to the bit."""
    straight = resumable(kind)
    expected = options_of(straight)
    first = resumable(kind) | lt.checkpoint(tmp_path)
    list(first.take(14 * epochs))
    torch.manual_seed(99)

    run = resumable(kind) | lt.checkpoint(tmp_path)
    run.resume()

    assert options_of(run) == expected[7 * epochs :]
    assert_same(run.model.state_dict(), straight.model.state_dict())
    assert len({tuple(row) for row in expected}) > 2


@pytest.mark.parametrize("part", [lt.schedule_lr, lt.schedule_momentum, lt.schedule])
def test_a_schedule_without_its_options_is_refused(model, batches, part):
    """The error says to call it first."""
    with pytest.raises(TypeError, match=rf"options.* first: {part.__name__}\(...\)"):
        phase_of(model, batches, part)


def test_it_shows_what_it_does(model, sgd, batches):
    """In a cell, and in the resolved pipe, where its name says the option."""
    part = lt.schedule_lr(sgd, [lt.schedules.step(5)], warmup=lt.epochs(2))
    run = iter(phase_of(model, batches, part, lt.optimize(sgd)))

    step = "step(every=5, gamma=0.1, floor=None)"
    warmup = "warmup(count=epochs(n=2), ratio=0.1, kind='linear')"
    assert repr(part) == f"schedule_lr(SGD, [{step}], warmup={warmup}, by='update')"
    shown = stepping.explain(run.cursor)
    assert f"schedule_lr  optimizer=SGD, schedule=[{step}],\n" in shown
    assert "warmup=warmup(count=epochs(n=2))\n" in shown  # without its defaults


def test_states_that_belong_to_no_run_are_refused(sgd):
    """Nobody counts for them."""
    with pytest.raises(RuntimeError, match="schedule_lr: these states belong to no run, so nobody counts"):
        next(lt.schedule_lr(sgd, lt.schedules.step(1))([lt.State(phase="train")]))


def test_in_a_plain_pipe_over_a_run_it_knows_the_runs_length(model, sgd, batches):
    """Nested instead of piped on, it acts behind the run's own parts."""
    run = iter(phase_of(model, batches, lt.optimize(sgd)))

    rates = [round(state.lr, 3) for state in lt.pipe(run, lt.schedule_lr(sgd, lt.schedules.poly(), by="iteration"))]

    assert rates == [1.0, 0.667, 0.333]
