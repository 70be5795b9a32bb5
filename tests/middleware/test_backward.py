"""Gradients over windows of iterations."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from loops import Case, assert_same, by_hand, classify, device_reads, piped
from torch import nn

import looptools as lt


def phase_of(model, batches, *parts):
    phase = lt.train(model, batches, lambda model, batch: model(batch))
    for part in parts:
        phase = phase | part
    return phase


def test_gradients_stay_to_be_looked_at(model, sgd, batches):
    """They are zeroed when the next window opens, not after the update."""
    run = iter(phase_of(model, batches, lt.optimize(sgd, accumulate=2)))

    assert [(next(run).updates, model.w.grad.item()) for _ in range(3)] == [(False, 0.5), (True, 1.5), (True, 3.0)]


def test_accumulation_has_a_correct_tail(model, sgd, batches):
    """Three batches by two: the mean of the first two, then the third alone."""
    run = lt.workflow([(phase_of(model, batches, lt.optimize(sgd, accumulate=2)), 1)], max_epochs=2)

    weights = [(state.updates, model.w.item()) for state in run]

    assert weights == [(False, 3.0), (True, 1.5), (True, -1.5)] + [(False, -1.5), (True, -3.0), (True, -6.0)]
    assert list(run.progress.updates.values()) == [4]


def test_a_skipped_batch_leaves_the_window_one_short(model, sgd, batches):
    """Its share is made up for: the window's gradient is the mean of what came."""

    def fails(states):
        for state in states:
            if state.index == 2:
                raise ValueError
            yield state

    phase = phase_of(model, batches, fails, lt.optimize(sgd, accumulate=3))
    run = lt.workflow([(phase.on(batches + batches), 1)], max_epochs=1)
    with pytest.raises(ValueError):
        run.to_end()
    run.skip()
    next(run)

    assert model.w.item() == pytest.approx(3 - (1 + 2 + 1) / 3)


def test_a_loss_without_a_graph_is_named(model, sgd, batches):
    """Detached, or computed in validation."""
    with pytest.raises(RuntimeError, match="the loss of iteration 0 of train has no graph. Was it detached"):
        next(iter(lt.train(model, batches, lambda model, batch: model(batch).detach()) | lt.optimize(sgd)))
    with pytest.raises(RuntimeError, match="A validation phase has none; leave optimize out of it"):
        next(lt.pipe([lt.State(phase="val", trains=False, loss=torch.ones(()))], lt.backward(sgd)))


# Windows across the ends of passes


def workflow(model, batches, entries, **bounds):
    """A run over (phase, n) made by *entries* from one phase of 3 batches with means 1, 2, 3."""
    return lt.workflow(entries(lt.train(model, batches, lambda model, batch: model(batch))), **bounds)


def weights_of(run, model):
    return [(state.updates, model.w.item()) for state in run if state.trains]


def test_a_window_goes_on_in_the_next_pass(model, sgd, batches):
    """Three batches by two, twice: (1, 2), (3, 1), (2, 3)."""
    part = lt.optimize(sgd, accumulate=2, across_epochs=True)
    run = workflow(model, batches, lambda train: [(train | part, 1)], max_epochs=2)

    assert run.total("update", sgd) == 3
    assert weights_of(run, model) == [
        *[(False, 3.0), (True, 1.5), (False, 1.5)],
        *[(True, -0.5), (False, -0.5), (True, -3.0)],
    ]


@pytest.mark.parametrize(
    ("accumulate", "moves"),
    [(4, [(1 + 2 + 3 + 1) / 4, (2 + 3) / 2]), (5, [(1 + 2 + 3 + 1 + 2) / 5, 3]), (9, [2])],
)
@pytest.mark.parametrize("bound", [{"max_epochs": 2}, {"max_iterations": 6}, {"max_rounds": 2}])
def test_only_the_last_window_is_short(model, sgd, batches, accumulate, moves, bound):
    """What is left at the end of the run is divided by its own number."""
    part = lt.optimize(sgd, accumulate=accumulate, across_epochs=True)
    run = workflow(model, batches, lambda train: [(train | part, 1)], **bound)

    weights = [w for updates, w in weights_of(run, model) if updates]

    assert weights == pytest.approx([3 - sum(moves[:n]) for n in range(1, len(moves) + 1)])
    assert run.total("update", sgd) == len(moves) == run.progress.updates[sgd]


@pytest.mark.parametrize("bound", [{"max_epochs": 2}, {"max_iterations": 6}, {"max_rounds": 2}])
@pytest.mark.parametrize("known", [True, False])
def test_a_validation_in_between_and_a_source_without_length(model, sgd, batches, bound, known):
    """The window waits; with no length, the last one is found out when its pass ends."""
    source = batches if known else lambda: iter(batches)
    train = lt.train(model, source, lambda model, batch: model(batch))
    val = lt.validate(model, batches, lambda model, batch: model(batch))
    train = train | lt.optimize(sgd, accumulate=4, across_epochs=True)

    moved = weights_of(lt.workflow([(train, 1), (val, 1)], **bound), model)

    assert [n for n, (updates, _) in enumerate(moved) if updates] == [3, 5]
    assert model.w.item() == pytest.approx(3 - 7 / 4 - 5 / 2)


def test_a_bound_by_iterations_tells_the_last_window_ahead():
    """Without a length too, so that the bits are those of the loop by hand: 14 iterations by 3, of a source of 7."""
    case = Case(optimizer="AdamW", accumulate=3, across_epochs=True)
    model, optimizer, train, val = case.make()
    phase = lt.train(model, lambda: iter(train), classify) | lt.optimize(optimizer, accumulate=3, across_epochs=True)

    lt.workflow([(phase, 1), (lt.validate(model, val, classify), 1)], max_iterations=14).to_end()

    assert_same(model.state_dict(), by_hand(case))


def test_two_training_phases_have_two_windows(model, sgd, batches):
    """Each phase's part waits for its own next pass, though they share an optimizer."""
    step = lambda model, batch: model(batch)  # noqa: E731
    a = lt.train(model, batches, step, name="a") | lt.optimize(sgd, accumulate=2, across_epochs=True)
    b = lt.train(model, [10 * batch for batch in batches], step, name="b") | lt.optimize(
        sgd, accumulate=2, across_epochs=True
    )
    run = lt.workflow([(a, 1), (b, 1)], max_rounds=2)

    moves = []
    for state in run:
        if state.updates:
            moves.append((state.phase, model.w.grad.item()))

    once = [("a", (1 + 2) / 2), ("b", (10 + 20) / 2)]
    assert moves == [*once, ("a", (3 + 1) / 2), ("a", (2 + 3) / 2), ("b", (30 + 10) / 2), ("b", (20 + 30) / 2)]


def test_a_phase_that_comes_last_beside_one_without_length(model, sgd, batches):
    """It does not matter to a's last window how long b's passes are."""
    step = lambda model, batch: model(batch)  # noqa: E731
    a = lt.train(model, batches, step, name="a") | lt.optimize(sgd, accumulate=4, across_epochs=True)
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    b = lt.train(model, lambda: iter(batches), step, name="b") | lt.optimize(still)
    run = lt.workflow([(a, 1), (b, 1)], max_epochs=4)

    assert [state.epoch for state in run if state.updates and state.phase == "a"] == [2, 2]
    assert model.w.item() == pytest.approx(3 - 7 / 4 - 5 / 2)


def test_a_run_that_is_extended_goes_on_with_the_mean(model, sgd, batches):
    """Within its shortened last window, which becomes a whole one; and after it was closed."""
    part = lt.optimize(sgd, accumulate=4, across_epochs=True)
    run = workflow(model, batches, lambda train: [(train | part, 1)], max_epochs=2)
    list(run.take(5))  # one iteration is in the window of two

    run.extend(max_epochs=3)
    rest = [w for updates, w in weights_of(run, model) if updates]

    assert rest == pytest.approx([3 - 7 / 4 - (2 + 3 + 1 + 2) / 4, 3 - 7 / 4 - 8 / 4 - 3])
    run.extend(max_epochs=4)
    assert weights_of(run, model)[-1] == (True, pytest.approx(3 - 7 / 4 - 8 / 4 - 3 - 2))


def test_an_open_window_is_in_the_checkpoint(tmp_path):
    """Resumed at a pass's end with pending gradients: the same bits."""
    case = Case(optimizer="AdamW", max_norm=0.5, accumulate=4, across_epochs=True, cosine=True, epochs=3)
    for rounds in (1, 2):
        first = piped(case) | lt.checkpoint(tmp_path / str(rounds))
        list(first.take(14 * rounds))
        assert first["train/backward"].filled == 7 * rounds % 4
        torch.manual_seed(99)

        run = piped(case) | lt.checkpoint(tmp_path / str(rounds))
        run.resume()
        run.to_end()

        assert_same(run.model.state_dict(), by_hand(case))


def test_an_open_window_of_another_phase_is_in_the_checkpoint(tmp_path):
    """The gradients that a waits with are not the ones that b has left on the parameters."""

    def make():
        model, optimizer, train, _ = Case().make()
        a, b = (
            lt.train(model, train, classify, name=name) | lt.optimize(optimizer, accumulate=n, across_epochs=True)
            for name, n in (("a", 4), ("b", 3))
        )
        return lt.workflow([(a, 1), (b, 1)], max_rounds=3)

    straight = make()
    straight.to_end()
    list((make() | lt.checkpoint(tmp_path)).take(14))
    run = make() | lt.checkpoint(tmp_path)
    run.resume()
    run.to_end()

    assert_same(run.model.state_dict(), straight.model.state_dict())


def test_a_replaced_backward_goes_on_with_the_open_window(model, sgd, batches):
    """With another length, even; weighed in another way it is refused, and nothing is changed."""
    part = lt.optimize(sgd, accumulate=4, across_epochs=True)
    run = workflow(model, batches, lambda train: [(train | part, 1)], max_epochs=2)
    next(run)

    with pytest.raises(RuntimeError, match="replace: 1 iterations are in the open window of backward, weighed"):
        run.replace("backward", lt.backward(sgd, accumulate=2, weigh="samples"))
    run.replace("backward", lt.backward(sgd, accumulate=2, across_epochs=True))

    assert [w for updates, w in weights_of(run, model) if updates] == pytest.approx([1.5, -0.5, -3.0])


def test_gradients_of_an_open_window_are_kept_from_another_phase():
    """B's loss goes through all of the weights that A waits with, though its optimizer holds one of them."""
    weights = [nn.Parameter(torch.tensor(value)) for value in (2.0, 3.0)]
    step = lambda model, batch: batch * weights[0] * weights[1]  # noqa: E731
    every, second = torch.optim.SGD(weights, lr=0.0), torch.optim.SGD(weights[1:], lr=0.0)
    a, b = (
        lt.train(nn.ParameterList(weights), [x] * n, step, name=name) for x, n, name in ((1.0, 3, "a"), (10.0, 1, "b"))
    )
    a = a | lt.optimize(every, accumulate=2, across_epochs=True)
    run = lt.workflow([(a, 1), (b | lt.optimize(second), 1)], max_rounds=2)

    grads = [[weight.grad.item() for weight in weights] for state in run if state.updates and state.phase == "a"]

    assert grads == [[3.0, 2.0]] * 3


def test_a_replaced_backward_keeps_its_gradients_to_itself_too():
    """G's loss goes through D's weight, whose window is open."""
    weights = [nn.Parameter(torch.tensor(value)) for value in (2.0, 3.0)]
    d, g = (torch.optim.SGD([weight], lr=0.0) for weight in weights)
    train = lt.train(nn.ParameterList(weights), [1.0] * 4, lambda model, batch: weights[0] * 1)
    train = train | lt.optimize(d, accumulate=4, name="D")
    train = train | lt.forward(lambda model, batch: 10 * weights[0] * weights[1]) | lt.optimize(g, name="G")
    run = lt.workflow([(train, 1)], max_epochs=1)
    next(run)
    run.replace("G.backward", lt.backward(g))
    run.to_end()

    assert [weight.grad.item() for weight in weights] == [1.0, 20.0]


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu")])
def test_states_of_a_closed_window_are_let_go(model, sgd, batches, scaler):
    """With their batches and graphs, though the next window is long."""
    part = lt.optimize(sgd, accumulate=4, scaler=scaler)
    run = iter(phase_of(model, batches * 3, part))
    states = [weakref.ref(state) for state in run.take(8)]

    gc.collect()
    assert [n for n, state in enumerate(states) if state() is not None] in ([], [7])


def test_a_window_that_is_open_at_the_end_is_told_once(model, sgd, batches):
    """The run was stopped, not only closed; `extend` goes on with its gradients."""
    part = lt.optimize(sgd, accumulate=2, across_epochs=True)
    run = workflow(model, batches, lambda train: [(train | part, 1)], max_epochs=2)
    list(run.take(2))
    next(run).stop("enough")

    with pytest.warns(UserWarning, match=r"backward: the run ended \(enough\) .* the last 1 batches made no") as told:
        next(run, None)
    run.close()
    assert len(told) == 1

    run.extend(max_epochs=2)
    assert weights_of(run, model) == [(True, -0.5), (False, -0.5), (True, -3.0)]


def test_updates_of_a_source_without_length(model, sgd, batches):
    """Known from max_iterations, if windows go on across passes."""
    train = lt.train(model, lambda: iter(batches), lambda model, batch: model(batch))
    for across, expected in ((True, 4), (False, None)):
        part = lt.optimize(sgd, accumulate=2, across_epochs=across)
        run = lt.workflow([(train | part, 1)], max_iterations=7)
        assert run.total("update", sgd) == expected
    run = lt.workflow([(train | lt.optimize(sgd, accumulate=2, across_epochs=True), 1)], max_iterations=7)
    run.to_end()

    assert run.progress.updates[sgd] == 4


def test_the_last_window_of_two_phases_bound_by_iterations(model, sgd, batches):
    """The run ends in b, so a's last window ends with a's last pass before it."""
    step = lambda model, batch: model(batch)  # noqa: E731
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    a = lt.train(model, batches, step, name="a") | lt.optimize(sgd, accumulate=2, across_epochs=True)
    b = lt.train(model, batches, step, name="b") | lt.optimize(still)
    run = lt.workflow([(a, 1), (b, 1)], max_iterations=6)

    moved = [(state.iteration, model.w.grad.item()) for state in run if state.updates and state.phase == "a"]

    assert moved == [(1, (1 + 2) / 2), (2, 3.0)]


# What an iteration counts in its window


def weighed(model, sgd, weigh, batches, accumulate=2):
    train = lt.train(model, batches, lambda model, batch: model(batch))
    run = lt.workflow([(train | lt.optimize(sgd, accumulate=accumulate, weigh=weigh), 1)], max_epochs=1)
    run.to_end()
    return model.w.item()


def test_by_samples(model, sgd):
    """Batches of 3 and 1 samples: a mean over all four of them; the tail is one batch of its own."""
    batches = [torch.full((3, 1), 1.0), torch.full((1, 1), 5.0), torch.full((2, 1), 4.0)]

    assert weighed(model, sgd, "samples", batches) == 3 - (3 * 1 + 1 * 5) / 4 - 4


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_by_a_function_of_the_state(model, sgd, batches, kind):
    """A number, or a tensor that stays on its device."""
    weights = {0: 3.0, 1: 1.0, 2: 4.0}

    moved = weighed(model, sgd, lambda state: kind(weights[state.index]), batches, accumulate=3)

    assert moved == 3 - (3 * 1 + 1 * 2 + 4 * 3) / 8


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_window_whose_weights_are_all_0_leaves_zeros(model, sgd, batches, kind):
    """Not NaN; the window after it is as ever."""
    moved = weighed(model, sgd, lambda state: kind(float(state.index == 2)), batches)

    assert moved == 3 - 3


def test_a_weight_that_hangs_on_the_graph_is_a_number_to_it(model, sgd, batches):
    """Learned weights, say: no gradient goes through them, nor does the open window keep their graph."""
    moved = weighed(model, sgd, lambda state: state.model.w * 2, batches, accumulate=3)

    assert moved == 3 - (1 + 2 + 3) / 3


@pytest.mark.parametrize("across_epochs", [False, True])
def test_by_tokens_as_by_hand(across_epochs):
    """sum(w g) / sum(w), to the bit, and without a device read."""
    tokens = lambda batch: 1 + (batch[1] == 1).sum()  # noqa: E731
    model, optimizer, train, _ = Case().make()
    model.train()
    end = 14 if across_epochs else 7
    for epoch in range(2):
        for n, batch in enumerate(train, 7 * epoch if across_epochs else 0):
            if n % 3 == 0:
                optimizer.zero_grad()
                total = 0
            (classify(model, batch)["loss"] * tokens(batch)).backward()
            total = total + tokens(batch)
            if n % 3 == 2 or n == end - 1:
                for parameter in model.parameters():
                    parameter.grad /= total
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
    expected = model.state_dict()

    model, optimizer, train, _ = Case().make()
    part = lt.optimize(
        optimizer, max_norm=0.5, accumulate=3, across_epochs=across_epochs, weigh=lambda state: tokens(state.batch)
    )
    run = lt.workflow([(lt.train(model, train, classify) | part, 1)], max_epochs=2)
    next(run)
    with device_reads() as reads:
        list(run.take(5))
    run.to_end()

    assert reads == []
    assert_same(model.state_dict(), expected)


def test_weights_of_an_open_window_are_resumed(tmp_path):
    """The sum of the weights is saved with the gradients."""

    def make():
        model, optimizer, train, _ = Case().make()
        part = lt.optimize(optimizer, accumulate=4, across_epochs=True, weigh=lambda state: state.batch[1].sum())
        return lt.workflow([(lt.train(model, train, classify) | part, 1)], max_epochs=3)

    straight = make()
    straight.to_end()
    list((make() | lt.checkpoint(tmp_path)).take(14))
    run = make() | lt.checkpoint(tmp_path)
    run.resume()
    run.to_end()

    assert_same(run.model.state_dict(), straight.model.state_dict())


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.ones(2), TypeError, r"tensor of shape \(\), got shape \(2,\) in iteration 0 of train. Add it up with"),
        ("3", TypeError, "backward: weigh must give a number or a tensor of shape"),
        (-1, ValueError, "backward: weigh must give a number of at least 0, got -1"),
        (float("nan"), ValueError, "backward: weigh must give a number of at least 0, got nan"),
    ],
)
def test_a_weight_that_is_none(model, sgd, batches, weight, error, message):
    """Refused at the iteration; the run goes on with a mended function."""
    with pytest.raises(error, match=message):
        weighed(model, sgd, lambda state: weight, batches)


@pytest.mark.parametrize("weigh", ["tokens", 3, float])
def test_bad_options_are_refused_where_they_are_typed(sgd, weigh):
    """What was given, and how tokens are counted."""
    with pytest.raises(
        ValueError, match="backward: weigh must be 'batches', 'samples' or a function of the state, got"
    ):
        lt.optimize(sgd, weigh=weigh)
    with pytest.raises(TypeError, match="across_epochs"):
        lt.optimize(sgd, across_epochs=3)


def test_one_next_is_one_iteration(model, sgd, batches):
    """With a window across passes and a source without length, no batch is fetched ahead before the last pass."""
    fetched = []

    def source():
        for batch in batches:
            fetched.append(len(fetched))
            yield batch

    part = lt.backward(sgd, accumulate=2, across_epochs=True)
    train = lt.train(model, source, lambda model, batch: model(batch)) | part | lt.update(sgd)
    run = lt.workflow([(train, 1)], max_epochs=2)
    run.after("update")

    assert fetched == [0]


def test_stopping_early_leaves_nothing_open(model, sgd, batches):
    """`close` within a window ends the generator; the gradients stay to be looked at."""
    run = iter(phase_of(model, batches, lt.optimize(sgd, accumulate=3)))
    next(run)
    run.close()

    assert all(slot.stream is None for slot in run.cursor.slots)
    assert model.w.grad.item() == pytest.approx(1 / 3)
