"""Where two runs that should do the same first do not."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from loops import Case, assert_same, classify, loader, network, piped
from torch import nn
from torch.utils.data import DataLoader

import looptools as lt
from looptools.stepping.comparing.apart import Tolerance


class Net(nn.Module):
    """A network in a module of the user's own: torch compiles no Sequential in place."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def make(change=lambda model: None, *, lr=0.05, step=classify, data=None, wrap=None, more=None, epochs=2):
    """A run on a network with dropout and BatchNorm, changed before its optimizer is made."""
    torch.manual_seed(0)
    model = network()
    change(model)
    model = wrap(model) if wrap else model
    sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    train = lt.train(model, data or loader(), step) | lt.backward(sgd) | lt.clip_grad_norm(model.parameters(), 1.0)
    train = (train | more if more else train) | lt.update(sgd)
    return lt.workflow([(train, 1), (lt.validate(model, loader(), step), 1)], max_epochs=epochs)


def found(a, b, **options):
    divergence = lt.first_divergence(a, b, **options)
    return divergence and (divergence.iteration, divergence.part, divergence.what)


def test_two_alike_do_not_differ():
    """With dropout, shuffling and a validation: each ends as it would have ended alone."""
    straight, a, b = piped(Case()), piped(Case()), piped(Case())
    torch.manual_seed(1)
    straight.to_end()
    torch.manual_seed(1)

    assert lt.first_divergence(a, b) is None
    assert a.ended == b.ended == straight.ended
    for run in (a, b):
        assert_same(run.model.state_dict(), straight.model.state_dict())
        assert run.results == straight.results


def test_at_most_so_many_iterations():
    """Both have done three then."""
    a, b = make(), make()

    assert lt.first_divergence(a, b, iterations=3) is None
    assert a.progress.iteration == b.progress.iteration == 3


def test_two_forks_and_their_run():
    """Which have generators of their own, or the process's."""
    run = make()
    list(run.take(3))
    a, b = run.fork(2)
    (c,) = run.fork(lr=[0.01])
    (d,) = run.fork(1)

    assert lt.first_divergence(a, b, iterations=3) is None
    torch.rand(3)
    assert found(d, c) == (3, "train/update", "lr")
    assert lt.first_divergence(run.fork(1)[0], run) is None


# Blame


class Twice(nn.Module):
    """Gives the double of what the layer gives from its *late* call on."""

    def __init__(self, inner, late=0):
        super().__init__()
        self.inner, self.late, self.calls = inner, late, 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x) * (2 if self.calls > self.late else 1)


def test_a_module_that_gives_something_else():
    """At the iteration where it first does, and not what comes behind it."""

    def change(model):
        model[2] = Twice(model[2], late=3)

    def alike(model):
        model[2] = Twice(model[2], late=99)

    divergence = lt.first_divergence(make(alike), make(change))

    assert (divergence.iteration, divergence.epoch, divergence.phase) == (3, 0, "train")
    assert (divergence.part, divergence.what) == ("train/forward", "module 2 output")
    assert divergence.difference > 0
    assert "differs by up to" in repr(divergence)
    a, b = divergence.runs
    assert a.state.index == b.state.index == 3
    assert next(a) is a.state  # it stands in the middle of the iteration, and goes on
    a.to_end()
    b.to_end()


def test_modules_that_write_over_what_they_are_given():
    """What the layer before gave is known from before that."""

    def change(slope):
        def put(model):
            model[2] = nn.LeakyReLU(slope, inplace=True)

        return put

    assert found(make(change(0.1)), make(change(0.2))) == (0, "train/forward", "module 2 output")
    assert lt.first_divergence(make(change(0.1)), make(change(0.1)), iterations=2) is None


class Scaling(nn.Module):
    """What it does itself between two layers."""

    def __init__(self, factor):
        super().__init__()
        self.first, self.second, self.factor = nn.Linear(3, 3), nn.Linear(3, 2), factor

    def forward(self, x):
        return self.second(self.first(x) * self.factor)


def test_what_happens_between_two_modules_shows_in_the_input_of_the_second():
    """The first one's output agrees."""

    def scaling(factor):
        torch.manual_seed(0)
        model = Scaling(factor)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        return lt.train(model, loader(), classify) | lt.optimize(sgd)

    assert found(scaling(1.0), scaling(2.0)) == (0, "train/forward", "module second input")


def smoothed(model, batch):
    logits = model(batch[0])
    loss = nn.functional.cross_entropy(logits, batch[1], label_smoothing=0.1)
    return {"loss": loss, "accuracy": (logits.argmax(1) == batch[1]).float().mean()}


def test_the_loss():
    """Another one of the same logits."""
    assert found(make(), make(step=smoothed)) == (0, "train/forward", "loss")


def test_a_metric():
    """The loss agrees."""

    def step(model, batch):
        return {**classify(model, batch), "accuracy": torch.zeros(())}

    divergence = lt.first_divergence(make(), make(step=step))

    assert (divergence.what, divergence.b) == ("metric accuracy", "0")


def test_the_gradient_that_backward_comes_to_first():
    """A wrong derivative in the middle: the layer behind it agrees, all before it are wrong."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 1.5

    class Layer(nn.Linear):
        def forward(self, x):
            return super().forward(Wrong.apply(x) if self.wrong else x)

    def deep(wrong):
        torch.manual_seed(0)
        model = nn.Sequential(*(Layer(3, 3) for _ in range(4)))
        for number, layer in enumerate(model):
            layer.wrong = wrong and number == 2
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        return lt.train(model, loader(), classify) | lt.optimize(sgd)

    iteration, part, what = found(deep(False), deep(True))

    assert (iteration, part) == (0, "train/backward")
    assert what.startswith("gradient of 1.")


def test_what_a_part_between_does():
    """Only one of the two has it; the next part that both have shows it."""

    def halve(states):
        for state in states:
            for parameter in state.model.parameters():
                parameter.grad.mul_(0.5)
            yield state

    divergence = lt.first_divergence(make(), make(more=halve))

    assert divergence.part == "train/update"
    assert divergence.what.startswith("gradient of")


def test_lr_comes_before_the_weights():
    """It is the cause."""
    divergence = lt.first_divergence(make(), make(lr=0.1))

    assert (divergence.part, divergence.what, divergence.a, divergence.b) == ("train/update", "lr", "0.05", "0.1")
    assert divergence.difference == pytest.approx(0.05)


def test_parameters_of_two_optimizers():
    """All that both show agrees up to the update."""

    def run(momentum):
        torch.manual_seed(0)
        model = network()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        return lt.train(model, loader(), classify) | lt.optimize(sgd)

    assert found(run(0.9), run(0.5)) == (1, "train/update", "parameter 0.weight")


def test_a_buffer():
    """BatchNorm's statistics move at another pace."""

    def change(model):
        model[1].momentum = 0.2

    assert found(make(), make(change)) == (0, "train/forward", "buffer 1.running_mean")


def test_the_batch():
    """Data in another order."""
    divergence = lt.first_divergence(make(data=loader(shuffle=False)), make(data=loader(shuffle=True)))

    assert (divergence.iteration, divergence.part, divergence.what) == (0, "train/batches", "batch[0]")


def test_weights_that_are_not_the_same_to_begin_with():
    """Nothing has been run then."""

    def change(model):
        nn.init.zeros_(model[4].bias)

    divergence = lt.first_divergence(make(), make(change))

    assert (divergence.part, divergence.what, divergence.phase) == ("", "parameter 4.bias", "")
    assert "before the first iteration" in repr(divergence)
    assert [run.begun for run in divergence.runs] == [False, False]


def test_one_that_ends_before_the_other():
    """Its last iteration was the same."""
    divergence = lt.first_divergence(make(epochs=1), make(epochs=2))

    assert (divergence.what, divergence.b) == ("the end of the run", "goes on")
    assert divergence.a.startswith("finished: 1 epoch")


def test_a_difference_within_validation():
    """The phase and its own part are named."""

    class Dropping(nn.Dropout):
        def forward(self, x):
            return x * 2 if not self.training else super().forward(x)

    def change(model):
        model[3] = Dropping(0.3)

    divergence = lt.first_divergence(make(), make(change))

    assert (divergence.iteration, divergence.phase, divergence.part) == (6, "val", "val/forward")
    assert divergence.what == "module 3 output"


def test_who_has_nan():
    """It is told apart from another number; where both have it, they agree."""

    def change(model):
        model[2] = Broken()

    class Broken(nn.ReLU):
        def forward(self, x):
            return torch.where(x > 1, math.nan, super().forward(x))

    divergence = lt.first_divergence(make(), make(change))

    assert (divergence.what, divergence.nan, divergence.difference) == ("module 2 output", "b", math.inf)
    assert "nan in b only" in repr(divergence)
    assert lt.first_divergence(make(change), make(change), iterations=2) is None


# Compiled, refactored


def compiled(backend):
    return lambda model: torch.compile(model, backend=backend)


def compiled_in_place(backend):
    def wrap(model):
        net = Net(model)
        net.compile(backend=backend)
        return net

    return wrap


@pytest.mark.parametrize("wrap", [compiled("aot_eager"), compiled_in_place("eager")], ids=["", "in-place"])
def test_eager_against_compiled(wrap):
    """Names are those of the modules behind."""
    eager = make(wrap=Net if wrap(nn.Linear(1, 1)).__class__ is Net else None)

    assert lt.first_divergence(eager, make(wrap=wrap), rtol=1e-4, atol=1e-5, iterations=8) is None


def test_a_compiler_that_is_wrong():
    """Within compiled code no module is heard, but what the whole gives is."""

    def backend(graph, inputs):
        return lambda *given: [output * 1.01 for output in graph(*given)]

    assert found(make(), make(wrap=compiled(backend))) == (0, "train/forward", "model output")
    assert found(make(wrap=Net), make(wrap=compiled_in_place(backend))) == (0, "train/forward", "model output")
    assert found(make(), make(wrap=compiled(backend)), rtol=0.5, atol=0.1, iterations=1) is None


def test_modules_of_other_names():
    """After a refactoring: the same weights in the same order."""

    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            old = network()
            self.inner, self.head = old[:4], old[4]

        def forward(self, x):
            return self.head(self.inner(x))

    def renamed(factor):
        torch.manual_seed(0)
        model = Renamed()
        with torch.no_grad():
            model.head.weight.mul_(factor)
        sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        train = lt.train(model, loader(), classify) | lt.backward(sgd) | lt.clip_grad_norm(model.parameters(), 1.0)
        return lt.workflow([(train | lt.update(sgd), 1), (lt.validate(model, loader(), classify), 1)], max_epochs=2)

    assert lt.first_divergence(make(), renamed(1.0)) is None
    assert found(make(), renamed(2.0)) == (0, "", "parameter 4.weight")


def test_a_step_that_is_compiled():
    """Hooks are not compiled into it."""
    step = torch.compile(classify, backend="eager")

    assert lt.first_divergence(make(), make(step=step), iterations=3) is None


def test_tolerance():
    """A difference within it is none."""

    def change(model):
        model[2] = Slightly()

    class Slightly(nn.ReLU):
        def forward(self, x):
            return super().forward(x) + 1e-7

    assert found(make(), make(change))[2] == "module 2 output"
    assert lt.first_divergence(make(), make(change), atol=1e-3, iterations=3) is None


# Shared things, and what is refused


def test_shared_generators_are_set_back():
    """One loader with a generator serves both, and one step that draws from a global one."""
    noise = torch.Generator().manual_seed(3)
    data = DataLoader(loader().dataset, 4, shuffle=True, generator=torch.Generator().manual_seed(5))

    def step(model, batch):
        images, labels = batch
        return classify(model, (images + torch.rand(1, generator=noise), labels))

    assert lt.first_divergence(make(data=data, step=step), make(data=data, step=step)) is None


def test_the_same_model_is_refused(model, sgd, batches):
    """The second would train what the first has trained."""
    phase = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)

    with pytest.raises(RuntimeError, match="both train the same model.*deepcopy"):
        lt.first_divergence(phase, phase)


def test_a_source_for_one_is_refused(batches):
    """They would take batches from each other."""
    source = iter([(batch, batch) for batch in batches])

    with pytest.raises(RuntimeError, match="both take batches from the same source of train, a list_iterator"):
        lt.first_divergence(make(data=source, epochs=1), make(data=source, epochs=1))


def test_other_places_are_refused():
    """Both begin at the same one."""
    a, b = make(), make()
    next(a)
    with pytest.raises(ValueError, match="at epoch 0, iteration 1, batch 1 and epoch 0, iteration 0, batch 0"):
        lt.first_divergence(a, b)
    b.after("forward")

    with pytest.raises(RuntimeError, match="an iteration is open"):
        lt.first_divergence(a, b)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rtol": -1.0}, ValueError, "rtol must be a number from 0 on, got -1.0"),
        ({"atol": "x"}, ValueError, "atol must be"),
        ({"iterations": 0}, ValueError, "iterations must be"),
    ],
)
def test_bad_options(options, error, message):
    """Refused where they are typed."""
    with pytest.raises(error, match=message):
        lt.first_divergence(make(), make(), **options)


def test_what_is_no_run():
    """A model, for example."""
    with pytest.raises(TypeError, match="give two runs or phases"):
        lt.first_divergence(make(), nn.Linear(1, 1))


def test_an_error_says_whose_it_was():
    """Both runs are left standing, and can go on."""

    def step(model, batch, state):
        if state.iteration == 2:
            raise ValueError("broken")
        return classify(model, batch)

    a, b = make(), make(step=step)
    with pytest.raises(ValueError, match="broken") as caught:
        lt.first_divergence(a, b)

    assert "first_divergence: this was the second of the two runs." in caught.value.__notes__
    assert b.failed.part == "train/forward"
    assert not any(module._forward_hooks for run in (a, b) for module in run.model.modules())


def test_hooks_are_gone_and_the_copy_of_a_model_stays_one():
    """Nothing is left of the comparison."""
    a = make()
    b = copy.deepcopy(a.model)
    lt.first_divergence(a, make(), iterations=2)

    assert not any(module._forward_hooks or module._forward_pre_hooks for module in a.model.modules())
    assert not any(module._forward_hooks for module in b.modules())


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        (torch.tensor([1, 2]), torch.tensor([1, 4]), 2.0),
        (torch.tensor([True, False]), torch.tensor([True, True]), 1.0),
        (torch.ones(2, dtype=torch.bfloat16), torch.ones(2), None),
        (torch.tensor(1 + 2j), torch.tensor(1 + 1j), 1.0),
        (torch.eye(2).to_sparse(), torch.eye(2) * 3, 2.0),
        (torch.tensor([2**62 + 1]), torch.tensor([2**62]), 0.0),
        (torch.tensor([math.inf, 1.0]), torch.tensor([math.inf, 1.0]), None),
        (torch.tensor([math.inf, 1.0]), torch.tensor([0.0, 1.0]), math.inf),
        (torch.zeros(0), torch.zeros(0), None),
        (0.5, torch.tensor(0.5), None),
        (True, False, math.nan),
        ("a", "b", math.nan),
        (None, torch.ones(1), math.nan),
        (torch.ones(1), torch.ones(2), math.nan),
    ],
)
def test_values_of_all_kinds(a, b, difference):
    """The largest difference; none of values that agree."""
    gap = Tolerance().gap(a, b)

    assert (gap and gap.difference) == pytest.approx(difference, nan_ok=True)


def test_random_numbers_of_forks_are_no_difference_either():
    """Each fork has generators of its own: they are set alike before each part."""

    def draws_more(model, batch):
        result = classify(model, batch)
        torch.rand(3)
        return result

    torch.manual_seed(0)
    model = network()
    train = lt.train(model, loader(), classify) | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1))
    a, b = lt.workflow([(train, 1)], max_epochs=1).fork(2)
    b.replace("classify", draws_more)

    assert lt.first_divergence(a, b) is None
