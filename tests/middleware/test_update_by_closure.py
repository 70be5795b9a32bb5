"""Optimizers that evaluate the loss several times a step: LBFGS and SAM, against loops by hand."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from loops import Planted, assert_same, classify, device_reads, loader, network, tripping
from torch import nn

import looptools as lt

BUFFERS = ["running_mean", "running_var", "num_batches_tracked"]


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021, eq. 2 and 3), in the form in which it is commonly written."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self):
        norms = [p.grad.norm() for group in self.param_groups for p in group["params"]]
        scale = torch.stack(norms).norm() + 1e-12
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["there"] = p.clone()
                p.add_(p.grad * (group["rho"] / scale))

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p].pop("there"))
        self.base.step()

    @torch.no_grad()
    def step(self, closure):
        self.first_step()
        torch.enable_grad()(closure)()
        self.second_step()


def make(kind):
    torch.manual_seed(0)
    model = network()
    make_optimizer = {
        "wolfe": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4, line_search_fn="strong_wolfe"),
        "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
        "sam": lambda p: Sam(p, torch.optim.SGD, lr=0.05, momentum=0.9),
    }[kind]
    return model, make_optimizer(model.parameters()), loader()


def by_hand(kind, max_norm=None, autocast=None, epochs=2):
    """torch's own convention for LBFGS: the first evaluation is the forward. SAM: gradients, then step(closure)."""
    model, optimizer, train = make(kind)
    model.train()

    def evaluate(batch):
        optimizer.zero_grad()
        with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
            loss = classify(model, batch)["loss"]
        loss.backward()
        if max_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        return loss

    for batch in itertools.chain.from_iterable(train for _ in range(epochs)):
        if kind == "sam":
            evaluate(batch)
        optimizer.step(lambda batch=batch: evaluate(batch))
    return model.state_dict()


def piped(kind, max_norm=None, autocast=None, epochs=2):
    model, optimizer, train = make(kind)
    if kind == "sam":
        part = lt.update_by_closure(optimizer, max_norm=max_norm, gradients_first=True)
    else:
        part = lt.optimize(optimizer, max_norm=max_norm)
    return lt.workflow([(lt.train(model, train, classify, autocast=autocast) | part, 1)], max_epochs=epochs)


@pytest.fixture(params=["wolfe", "lbfgs", "sam"])
def kind(request):
    return request.param


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.1}, {"autocast": torch.bfloat16}], ids=str)
def test_same_as_by_hand(kind, options):
    """With dropout and BatchNorm, clipped or under bf16: each evaluation draws and counts as in the loop."""
    run = piped(kind, **options)

    run.to_end()

    assert_same(run.model.state_dict(), by_hand(kind, **options))
    assert run.progress.updates[run.optimizer] == run.total("update", run.optimizer) == 14


def test_left_within_an_iteration(kind):
    """Part by part, and completed by `next`."""
    run = piped(kind)

    for n in itertools.cycle([1, 2, 3, 4]):
        for _ in itertools.islice(run.stages(), n):
            pass
        if next(run, None) is None:
            break

    assert_same(run.model.state_dict(), by_hand(kind))


@pytest.mark.parametrize("name", ["forward", "update_by_closure", "average"])
def test_after_an_exception_at_the_entry_of_a_part(kind, name):
    """It is redone from `forward`, whose second run moves BatchNorm's statistics once more."""
    run = piped(kind)
    slot = next(slot for slot in run.cursor.slots if slot.short == name)
    slot.part = tripping(slot.part, at=lambda state: True)

    while not run.ended:
        with contextlib.suppress(Planted):
            run.to_end()

    assert_same(run.model.state_dict(), by_hand(kind), but=BUFFERS if name == "update_by_closure" else [])


def test_an_exception_within_the_step_moves_nothing(kind):
    """A closure that fails at each first try: weights and LBFGS's memory are put back, and it is all redone."""
    run = piped(kind)
    failed, tries = set(), []

    def fragile(model, batch, state):
        tries.append(state.iteration)
        again = tries.count(state.iteration) == 3 if state.iteration not in failed else False
        loss = classify(model, batch)["loss"]
        if (kind == "sam" and tries.count(state.iteration) == 2 and state.iteration not in failed) or again:
            failed.add(state.iteration)
            raise Planted
        return loss

    run.replace("forward", fragile)
    while not run.ended:
        with contextlib.suppress(Planted):
            run.to_end()

    assert len(failed) == 14
    assert_same(run.model.state_dict(), by_hand(kind), but=BUFFERS)
    assert run.progress.updates[run.optimizer] == 14


def test_what_an_exception_within_the_step_leaves(model, sgd, batches):
    """A note on it says so, retry is refused, and next goes on from forward."""
    calls = []

    class Closure(torch.optim.SGD):
        def step(self, closure):
            with torch.no_grad():
                model.w.add_(5)
            closure()
            super().step()

    def step(model, batch):
        calls.append(model.w.item())
        if len(calls) == 2:
            raise Planted
        return model(batch)

    part = lt.update_by_closure(Closure(model.parameters(), lr=1.0), gradients_first=True)
    run = iter(lt.train(model, batches, step) | part)
    with pytest.raises(Planted) as caught:
        next(run)

    assert any("the optimizer's own memory may have moved" in note for note in caught.value.__notes__)
    with pytest.raises(RuntimeError, match="retry: this iteration cannot be redone: update has moved the weights"):
        run.retry()
    assert next(run).iteration == 0
    assert (calls, model.w.item()) == ([3.0, 8.0, 3.0, 8.0], 7.0)


def test_the_order_of_evaluations(model, batches):
    """LBFGS takes the loss of forward first; with gradients_first, every call computes it again."""
    seen = []

    class Twice(torch.optim.SGD):
        def step(self, closure):
            seen.append(("step", self.param_groups[0]["params"][0].grad is not None))
            for _ in range(2):
                seen.append(closure().item())
            super().step()

    def step(model, batch):
        seen.append("evaluate")
        return model(batch)

    for first in (False, True):
        optimizer = Twice(model.parameters(), lr=0.0)
        next(iter(lt.train(model, batches, step) | lt.update_by_closure(optimizer, gradients_first=first)))
        model.zero_grad()

    assert seen[:5] == ["evaluate", ("step", False), 3.0, "evaluate", 3.0]
    assert seen[5:] == ["evaluate", ("step", True), "evaluate", 3.0, "evaluate", 3.0]


def test_nothing_else_on_the_state_changes(model, batches):
    """Loss, outputs and metrics are those of forward, though the closure ran the step again."""
    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=3)
    run = iter(lt.train(model, batches, lambda model, batch: (model(batch) - 1).pow(2)) | lt.optimize(lbfgs))
    state = run.after("forward")
    before = state.loss, state.outputs, dict(state.metrics), state.num_samples

    next(run)

    assert (state.loss, state.outputs, state.metrics, state.num_samples) == before
    assert (state.updates, state.lr, state.grad_norm) == (True, 1.0, None)


def test_the_norm_is_that_of_the_first_evaluation(model, batches):
    """Of the gradients at the weights that the iteration began with."""
    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=3)
    part = lt.optimize(lbfgs, max_norm=0.5, max_value=3.0)
    run = iter(lt.train(model, batches, lambda model, batch: (model(batch) - 1).pow(2)) | part)

    assert next(run).grad_norm == 3.0  # 2 * (3 - 1), clamped


def test_the_latest_forward_is_the_one_computed_again(model, batches):
    """A pipe with two steps: the second one's loss is what LBFGS minimizes."""
    seen = []
    step = lambda model, batch: seen.append("first") or model(batch)  # noqa: E731
    other = lambda model, batch: seen.append("second") or (model(batch) - 1).pow(2)  # noqa: E731
    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=4)

    next(iter(lt.train(model, batches, step) | lt.forward(other) | lt.optimize(lbfgs)))

    assert seen[:2] == ["first", "second"]
    assert set(seen[2:]) == {"second"}


def test_a_step_changed_within_the_iteration_is_used(model, batches):
    """`run.replace` of the step between forward and update: what is computed again is what made the loss."""
    seen = []
    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def fit(model, batch):
        seen.append("old")
        return (model(batch) - 1).pow(2)

    run = iter(lt.train(model, batches, fit) | lt.optimize(lbfgs))
    run.after("forward")

    def fit(model, batch):
        seen.append("new")
        return (model(batch) - 1).pow(2)

    run.replace(fit)
    next(run)
    next(run)

    assert seen == ["old"] * 2 + ["new"] * 2


@pytest.mark.parametrize("kind", ["wolfe", "lbfgs"])  # the small Sam above does not save its base optimizer
def test_resumed(kind, tmp_path):
    """LBFGS's history is the optimizer's state; the same bits."""
    list((piped(kind, epochs=3) | lt.checkpoint(tmp_path)).take(7))
    run = piped(kind, epochs=3) | lt.checkpoint(tmp_path)
    run.resume()

    run.to_end()

    assert_same(run.model.state_dict(), by_hand(kind, epochs=3))


def test_device_reads(kind):
    """As many as the loop by hand: LBFGS reads the loss to decide, SAM nothing."""
    with device_reads() as reads:
        by_hand(kind, epochs=1)
    expected = len(reads)
    run = piped(kind, epochs=1)
    run.cursor  # noqa: B018 (builds it)

    with device_reads() as reads:
        run.to_end()

    assert len(reads) == expected + 1  # the means at the end of the pass


def test_what_does_not_go_with_it(model, sgd, batches):
    """Named where it is typed; a validation phase and a hand-made state, where they come."""
    lbfgs = torch.optim.LBFGS(model.parameters())
    for name, value in [
        ("accumulate", 4),
        ("scaler", torch.amp.GradScaler("cpu")),
        ("across_epochs", True),
        ("weigh", "samples"),
    ]:
        with pytest.raises(ValueError, match=f"optimize: {name} does not go with LBFGS"):
            lt.optimize(lbfgs, **{name: value})
    with pytest.raises(TypeError, match=r"Write lt.optimize\(lbfgs\), or lt.update_by_closure\(lbfgs\)"):
        lt.update(lbfgs)
    with pytest.raises(ValueError, match="update_by_closure: max_norm must be positive, got 0"):
        lt.update_by_closure(sgd, max_norm=0)
    with pytest.raises(RuntimeError, match="update_by_closure: the state of iteration 0 of train came through no forw"):
        next(lt.pipe([lt.State(phase="train", loss=model.w * 1)], lt.update_by_closure(sgd)))
    with pytest.raises(RuntimeError, match="update_by_closure: the loss of iteration 0 of train has no graph"):
        next(iter(lt.train(model, batches, lambda model, batch: model(batch).detach()) | lt.optimize(lbfgs)))


def test_one_next_is_one_iteration_and_stopping_early_closes_it(model, batches):
    """It fetches no second batch, however often the loss is computed; `close` ends the generator."""
    fetched = []

    class Watched(list):
        def __iter__(self):
            for batch in super().__iter__():
                fetched.append(len(fetched))
                yield batch

    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=4)
    run = iter(lt.train(model, Watched(batches), lambda model, batch: (model(batch) - 1).pow(2)) | lt.optimize(lbfgs))
    next(run)

    assert fetched == [0]
    run.close()
    assert all(slot.stream is None for slot in run.cursor.slots)


@pytest.mark.parametrize("recipe", [lt.optimize, lt.update])
def test_an_optimizer_that_asks_for_a_closure_is_told_where_to_go(recipe):
    """Its signature says so where it is typed, not the first iteration."""
    _, sam, _ = make("sam")

    with pytest.raises(TypeError, match="update: the step of Sam asks for a closure.*gradients_first=True"):
        recipe(sam)


def test_the_order_of_the_norm_is_passed_on():
    """The largest of the gradients 3 and 4, not 5."""
    weights = torch.nn.Parameter(torch.zeros(2))
    step = lambda model, batch: (weights * batch).sum()  # noqa: E731
    part = lt.optimize(torch.optim.LBFGS([weights], max_iter=1), max_norm=9.0, norm_type=float("inf"))
    run = iter(lt.train(nn.ParameterList([weights]), [torch.tensor([3.0, 4.0])], step) | part)

    assert next(run).grad_norm == 4.0
