"""After an exception nothing is lost and nothing is done twice."""

from __future__ import annotations

import pytest
import torch
from loops import Planted

import looptools as lt


def raising_at(*iterations, times=1):
    """A part that raises *times* at each of *iterations*."""
    left = dict.fromkeys(iterations, times)

    def fragile(states):
        for state in states:
            if left.get(state.iteration, 0):
                left[state.iteration] -= 1
                raise Planted
            yield state

    return fragile


def ahead(phase_or_run, part):
    return phase_or_run | part


@pytest.fixture
def run(model, sgd, batches):
    """Three batches, one epoch: weights 3, 2, 0, -3; fails once at iteration 1, before the update."""
    train = lt.train(model, batches, lambda model, batch: model(batch))
    train = train | lt.backward(sgd) | raising_at(1) | lt.update(sgd)
    return lt.workflow([(train, 1)], max_epochs=1)


def fail(run):
    with pytest.raises(Planted) as caught:
        run.to_end()
    return caught.value


def test_failed_says_what_happened(run):
    """`run.failed` holds part, state and exception; the exception's note says where, and what can be done."""
    error = fail(run)

    assert (run.failed.part, run.failed.state.iteration, run.failed.exception) == ("train/fragile", 1, error)
    notes = "\n".join(error.__notes__)
    assert "looptools: train/fragile (iteration 1, epoch 0, part 4 of 6)." in notes
    assert "next(run) goes on there, run.retry() redoes the iteration, run.skip() drops it." in notes
    assert "plain generator" not in notes  # it keeps nothing in local variables


def test_a_plain_generator_that_keeps_something_is_said_to_begin_anew(batches):
    """What its local variables held is gone; fields of an attrs class would outlive the exception."""

    def counting(states):
        seen = []
        for state in states:
            seen.append(state.index)
            if seen == [0, 1]:
                raise Planted
            yield state

    run = lt.workflow([(lt.train(None, batches, lambda model, batch: {"x": 1.0}) | counting, 1)], max_epochs=1)

    assert any("train/counting is a plain generator: it begins anew" in note for note in fail(run).__notes__)


def test_next_goes_on_at_the_part_that_failed(run, model):
    """The same state goes on; `failed` is None then."""
    fail(run)
    failed = run.failed.state

    state = next(run)

    assert state is failed
    assert run.failed is None
    assert model.w.item() == 0
    assert [s.iteration for s in run] == [2]


def test_retry_redoes_the_iteration_from_its_batch(run, model):
    """`retry` runs the step again, and returns the state."""
    fail(run)
    run.failed.state.metrics["mine"] = 1

    state = run.retry()

    assert (state.iteration, state.metrics.keys(), model.w.item()) == (1, {"loss"}, 0.0)


def test_skip_drops_the_iteration(run, model):
    """The batch is left out; the counters move on."""
    fail(run)

    run.skip()

    assert [s.iteration for s in run] == [2]
    assert model.w.item() == 3 - 1 - 3
    assert run.results["train/loss"] == (3 * 1 + 2 * 3) / 2


def test_retry_is_refused_once_the_weights_have_moved(model, sgd, batches):
    """A part behind `update` redoes only itself; `retry` says that `next(run)` is what goes on."""
    train = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd) | raising_at(1)
    run = lt.workflow([(train, 1)], max_epochs=1)
    fail(run)

    with pytest.raises(RuntimeError, match=r"update has moved the weights. next\(run\) goes on"):
        run.retry()

    assert run.failed.part == "train/fragile"
    run.to_end()
    assert model.w.item() == -3


def test_retry_is_refused_in_an_open_accumulation_window(model, sgd, batches):
    """The batch's gradients are in the window, and cannot be taken out; going on is exact."""
    train = lt.train(model, batches, lambda model, batch: model(batch))
    train = train | lt.backward(sgd, accumulate=3) | raising_at(1) | lt.update(sgd)
    run = lt.workflow([(train, 1)], max_epochs=1)
    fail(run)

    with pytest.raises(RuntimeError, match="its gradients are in the accumulation window already"):
        run.retry()

    run.to_end()
    assert model.w.item() == 3 - (1 + 2 + 3) / 3


def test_a_step_mended_and_retried_gives_what_the_mended_one_gives(sgd, model, batches):
    """`replace` finds the part by the function's name; the run goes on as if the step had been right from the start."""

    def step(model, batch):
        if batch[0] == 2:
            raise Planted
        return model(batch)

    run = lt.workflow([(lt.train(model, batches, step) | lt.optimize(sgd), 1)], max_epochs=1)
    fail(run)

    def step(model, batch):
        return model(batch)

    run.replace(step)
    run.retry()
    run.to_end()

    assert model.w.item() == -3


def test_a_failed_backward_is_redone_from_the_forward(model, sgd, batches):
    """Its graph is gone, so the step runs again with the same batch."""
    steps, failing = [], [2]

    def step(model, batch):
        steps.append(batch.mean().item())
        loss = model(batch)
        loss.register_hook(lambda grad: 1 / 0 if failing and failing.pop() else None)
        return loss

    run = lt.workflow([(lt.train(model, batches, step) | lt.optimize(sgd), 1)], max_epochs=1)
    with pytest.raises(ZeroDivisionError):
        run.to_end()
    assert run.failed.part == "train/backward"
    run.to_end()

    assert steps == [1, 1, 2, 3]
    assert model.w.item() == -3


def test_the_second_forward_of_a_pipe_is_the_one_redone():
    """In a GAN's pipe a failed generator backward goes back to the generator's forward, not to the discriminator's."""
    gan = torch.nn.ModuleDict({"D": torch.nn.Linear(1, 1), "G": torch.nn.Linear(1, 1)})
    calls = []

    def d_step(gan, batch):
        calls.append("D")
        return gan["D"](batch).mean()

    def g_step(gan, batch):
        calls.append("G")
        if calls.count("G") == 1:
            return gan["G"](batch).mean().detach()
        return gan["G"](batch).mean()

    optimizers = {name: torch.optim.SGD(gan[name].parameters(), lr=0.1) for name in gan}
    phase = lt.train(gan, [torch.ones(1, 1)], d_step) | lt.optimize(optimizers["D"], name="D")
    phase = phase | lt.forward(g_step) | lt.optimize(optimizers["G"], name="G")
    run = lt.workflow([(phase, 1)], max_epochs=1)
    with pytest.raises(RuntimeError, match="has no graph"):
        next(run)
    assert run.failed.part == "train/G.backward"
    next(run)

    assert calls == ["D", "G", "G"]
    assert run.optimizer.keys() == {"D.optimizer", "G.optimizer"}
    assert list(run.progress.updates.values()) == [1, 1]


def test_a_part_of_the_run_that_fails_redoes_only_itself(model, sgd, batches):
    """Run-scope parts fail and go on like those of a phase; the weights are not moved again."""
    train = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)
    run = lt.workflow([(train, 1)], max_epochs=1) | raising_at(0, 2)

    for _ in range(2):
        fail(run)
        assert run.failed.part == "run/fragile"
    run.to_end()

    assert model.w.item() == -3
    assert run.results["train/loss"] == (3 + 4 + 0) / 3


def test_memory_in_fields_outlives_an_exception(model, batches):
    """A part with attrs fields keeps them; the locals of a plain generator begin anew."""
    import attrs

    @attrs.define(eq=False)
    class counts:
        seen: int = attrs.field(default=0, init=False)

        def __call__(self, states):
            for state in states:
                self.seen += 1
                if self.seen == 2:
                    raise Planted
                yield state

    train = lt.train(model, batches, lambda model, batch: model(batch)) | counts()
    run = lt.workflow([(train, 1)], max_epochs=1)
    fail(run)
    run.to_end()

    assert run["train/counts"].seen == 4


@pytest.mark.filterwarnings("ignore:train. its order is exact, but random transforms:UserWarning")
@pytest.mark.parametrize("kind", ["list-like", "callable", "class", "loader", "workers"])
def test_a_source_that_raises_gives_the_same_batch_again(kind):
    """The batch whose loading failed is loaded again: none is lost, whatever the source is."""

    class Data(torch.utils.data.Dataset):
        broken = True

        def __len__(self):
            return 4

        def __getitem__(self, index):
            if index == 2 and self.broken:
                raise Planted
            return torch.tensor([float(index)])

    data = Data()

    class Walk:
        def __iter__(self):
            for index in range(4):
                yield data[index]

    source = {
        "list-like": [0.0, 1.0, 2.0, 3.0],
        "callable": lambda: (data[index] for index in range(4)),
        "class": Walk(),
        "loader": torch.utils.data.DataLoader(data, None),
        "workers": torch.utils.data.DataLoader(data, None, num_workers=1),
    }[kind]
    run = lt.workflow([(lt.train(None, source, lambda model, batch: {"x": batch}), 1)], max_epochs=1)
    seen = []
    if kind != "list-like":
        with pytest.raises(Planted):
            for state in run:
                seen.append(float(state.batch))
        # With a length, the failing batch is fetched at its turn; without, at the look ahead before it.
        assert run.failed.part == "train/batches"
        data.broken = False
    seen += [float(state.batch) for state in run]

    assert seen == [0, 1, 2, 3]


def test_skip_drops_a_batch_that_cannot_be_loaded():
    """The one broken file of a data set is passed over."""

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            if index == 2:
                raise Planted
            return torch.tensor([float(index)])

    loader = torch.utils.data.DataLoader(Data(), None)
    run = lt.workflow([(lt.train(None, loader, lambda model, batch: {"x": batch}), 1)], max_epochs=1)
    seen = []
    while not run.ended:
        try:
            seen += [float(state.batch) for state in run.take(1)]
        except Planted:
            run.skip()

    assert seen == [0, 1, 3]


def test_a_generator_that_raised_cannot_go_on(model):
    """A one-shot generator is ended by its exception: the run says so, rather than end the pass in silence."""

    def source():
        yield torch.ones(1)
        raise Planted

    run = lt.workflow([(lt.train(model, source(), lambda model, batch: model(batch)), 1)], max_epochs=1)
    fail(run)

    with pytest.raises(RuntimeError, match="its source is a generator, and the exception ended it"):
        next(run)


def test_work_at_the_boundary_that_fails_is_done_again(model, batches):
    """An action asked for at the boundary is tried again by `next(run)`, which then hands the state out."""
    failing = [1]

    def asks(states):
        for state in states:
            if state.iteration == 1:
                state.run.at_boundary(lambda run: 1 / 0 if failing and failing.pop() else done.append(state.iteration))
            yield state

    done = []
    phase = lt.train(model, batches, lambda model, batch: model(batch))
    run = lt.workflow([(phase, 1)], max_epochs=1) | asks
    with pytest.raises(ZeroDivisionError):
        run.to_end()

    assert [state.iteration for state in run] == [1, 2]
    assert done == [1]
    assert run.progress.iteration == 3


def test_skip_at_the_boundary_drops_what_failed_there_not_the_iteration(model, batches):
    """The iteration is complete: it is handed out next."""

    def asks(states):
        for state in states:
            state.run.at_boundary(lambda run: 1 / 0)
            yield state

    phase = lt.train(model, batches, lambda model, batch: model(batch))
    run = lt.workflow([(phase, 1)], max_epochs=1) | asks
    with pytest.raises(ZeroDivisionError):
        next(run)

    run.skip()

    assert next(run).iteration == 0


def test_nothing_to_retry_or_skip_at_a_boundary(run):
    """Both verbs say so when no iteration is open."""
    next(run)

    with pytest.raises(RuntimeError, match=r"retry: no iteration is open. next\(run\) goes on"):
        run.retry()
    with pytest.raises(RuntimeError, match="skip: no iteration is open"):
        run.skip()


def test_stopiteration_out_of_a_step_is_an_error(model, batches):
    """A bare `next` on something empty inside a step must not end the training in silence."""
    run = lt.workflow([(lt.train(model, batches, lambda model, batch: next(iter([]))), 1)], max_epochs=1)

    with pytest.raises(RuntimeError, match="generator raised StopIteration"):
        next(run)


def test_next_inside_the_runs_own_step_is_refused(model, batches):
    """A step that calls `next(run)` would enter the machine twice."""
    run = lt.workflow([(lt.train(model, batches, lambda model, batch: next(run)), 1)], max_epochs=1)

    with pytest.raises(RuntimeError, match="it is at work already"):
        next(run)


def skips_first_of_second_pass():
    def fragile(model, batch, state):
        if state.epoch == 1 and state.first:
            raise Planted
        return {"x": float(batch)}

    return fragile


def test_means_begin_anew_though_the_first_state_of_the_pass_was_skipped():
    """What begins with a pass begins with the pass, not with the state that says `first`."""
    run = lt.workflow([(lt.train(None, [1.0, 2.0, 100.0], skips_first_of_second_pass()), 1)], max_epochs=2)
    fail(run)
    run.skip()
    run.to_end()

    assert [row["x"] for row in run.history] == [103 / 3, 51.0]


def test_an_accumulation_window_does_not_reach_into_the_next_pass(model, sgd, batches):
    """If the state that would close it is skipped, that is said, and the next pass opens a new window."""

    def fragile(states):
        for state in states:
            if state.epoch == 0 and state.last:
                raise Planted
            yield state

    phase = lt.train(model, batches, lambda model, batch: model(batch)) | fragile | lt.optimize(sgd, accumulate=2)
    run = lt.workflow([(phase.on([*batches, batches[0]]), 1)], max_epochs=2)
    fail(run)
    run.skip()

    with pytest.warns(UserWarning, match="the gradients of the last 1 batches made no update"):
        next(run)
    assert run["backward"].filled == 1


def test_a_scaler_survives_a_state_that_is_dropped_between_backward_and_update(batches):
    """Its bookkeeping is closed for the dropped one, and the next update works."""
    model = torch.nn.Linear(1, 1)
    sgd, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")

    def drops(states):
        for state in states:
            if state.index != 1:
                yield state

    phase = lt.train(model, batches, lambda model, batch: model(batch).mean())
    phase = phase | lt.backward(sgd, scaler=scaler) | drops | lt.update(sgd, scaler=scaler)
    run = lt.workflow([(phase, 1)], max_epochs=1)

    assert [state.index for state in run] == [0, 2]
    assert run.progress.updates[sgd] == 2


def test_the_first_fetch_that_fails_draws_the_same_order_again():
    """A shuffling sampler draws its order at the first fetch; a second try must draw it as the first would have."""

    class Data(torch.utils.data.Dataset):
        broken = True

        def __len__(self):
            return 8

        def __getitem__(self, index):
            if self.broken:
                Data.broken = False
                raise Planted
            return float(index)

    def order(broken):
        torch.manual_seed(4)
        Data.broken = broken
        run = lt.workflow(
            [(lt.train(None, torch.utils.data.DataLoader(Data(), 2, shuffle=True), STEP), 1)], max_epochs=1
        )
        if broken:
            fail(run)
        return [state.batch.tolist() for state in run], torch.rand(1).item()

    assert order(True) == order(False)


STEP = lambda model, batch: {"x": 1.0}  # noqa: E731


def test_an_iterator_that_is_no_generator_goes_on_behind_its_failure():
    """`map` survives an exception of its function: nothing is walked through again."""
    failing = [3]

    def load(n):
        if n in failing:
            failing.clear()
            raise Planted
        return n

    run = lt.workflow([(lt.train(None, map(load, range(6)), STEP), 1)], max_epochs=1)
    seen = []
    with pytest.raises(Planted):
        seen.extend(state.batch for state in run)
    seen = [0, 1] + [state.batch for state in run]

    assert seen == [0, 1, 2, 4, 5]  # what raised is gone with the exception; all else comes once


def test_a_batch_that_cannot_be_moved_is_not_lost():
    """`.to` raises once: the same batch is moved again."""

    class Batch:
        moved = False

        def __init__(self, n):
            self.n = n

        def to(self, device):
            if self.n == 2 and not Batch.moved:
                Batch.moved = True
                raise Planted
            return self.n

    phase = lt.train(None, [Batch(n) for n in range(4)], STEP, device="cpu")
    run = lt.workflow([(phase, 1)], max_epochs=1)
    seen = []
    while not run.ended:
        try:
            seen += [state.batch for state in run.take(1)]
        except Planted:
            assert run.failed.part == "train/batches"

    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("where", ["source", "entry", "boundary"])
def test_stopiteration_out_of_the_users_code_does_not_end_the_run_in_silence(where, batches):
    """Something exhausted that a source, an entry or a boundary's action calls `next` on."""
    raises = lambda *_: next(iter([]))  # noqa: E731

    def asks(states):
        for state in states:
            state.run.at_boundary(raises)
            yield state

    entries = [(lt.train(None, raises if where == "source" else batches, STEP), 1)]
    if where == "entry":
        entries.append((raises, 1))
    run = lt.workflow(entries, max_epochs=2)
    run = run | asks if where == "boundary" else run

    with pytest.raises(RuntimeError, match="raised StopIteration: something that it calls next"):
        run.to_end()


def test_a_function_of_the_workflow_that_fails_is_called_again_or_skipped(batches):
    """`next(run)` calls it again; `skip` goes on behind it."""
    calls = []

    def report(run):
        calls.append(run.progress.epoch)
        if calls in ([1], [1, 1, 2]):
            raise Planted

    run = lt.workflow([(lt.train(None, batches, STEP), 1), (report, 1)], max_epochs=3)
    fail(run)
    assert run.failed.part == "workflow/report"
    fail(run)
    run.skip()
    run.to_end()

    assert calls == [1, 1, 2, 3]


def test_a_closed_run_hands_nothing_out(model, sgd, batches):
    """Closed in the middle of an iteration: that iteration is dropped."""
    phase = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)
    run = lt.workflow([(phase, 1)], max_epochs=1)
    run.after("forward")

    run.close()

    assert next(run, None) is None
    assert model.w.item() == 3.0


def test_a_retried_iteration_has_no_gauges_of_the_first_try(model, batches):
    """What stood for itself is measured anew."""

    def gauge(states):
        for state in states:
            state.gauges[f"try {len(state.gauges)}"] = 1.0
            yield state

    run = lt.workflow([(lt.validate(model, batches, lambda model, batch: model(batch)) | gauge, 1)], max_rounds=1)
    run.after("gauge")

    assert run.retry().gauges == {"try 0": 1.0}


def test_a_window_that_has_the_gradients_of_a_skipped_batch_goes_with_it(model, sgd, batches):
    """Means 1, 2, 3, 4 by three, failing at 2: what moves the weight is the mean of 3 and 4."""
    train = lt.train(model, [*batches, 4 * torch.ones(1, 1)], lambda model, batch: model(batch))
    train = train | lt.backward(sgd, accumulate=3) | raising_at(1) | lt.update(sgd)
    run = lt.workflow([(train, 1)], max_epochs=1)
    fail(run)

    with pytest.warns(
        UserWarning, match="skip: the gradients of this batch .* train/backward already, so those of 1 b"
    ):
        run.skip()
    run.to_end()

    assert model.w.item() == 3 - (3 + 4) / 2
