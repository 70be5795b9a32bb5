"""The sizes of weights and gradients."""

from __future__ import annotations

import pytest
import torch
from loops import Case, assert_same, by_hand, classify, device_reads, loader, network

import looptools as lt


def run_of(model, sgd, batches, *middle, accumulate=1, epochs=1):
    phase = lt.train(model, batches, lambda model, batch: model(batch)) | lt.backward(sgd, accumulate=accumulate)
    for part in middle:
        phase = phase | part
    return lt.workflow([(phase | lt.update(sgd), 1)], max_epochs=epochs)


def test_norms_are_those_by_hand():
    """Each parameter's and each gradient's, before the update, as tensors of the same bits."""
    torch.manual_seed(0)
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    phase = lt.train(model, loader(shuffle=False), classify) | lt.backward(sgd) | lt.watch(model, every=2)
    run = iter(phase | lt.update(sgd))
    next(run)
    run.before("update")
    expected = {}
    for name, parameter in model.named_parameters():
        expected[f"weight_norm/{name}"] = parameter.detach().norm()
        expected[f"grad_norm/{name}"] = parameter.grad.norm()

    metrics = next(run).metrics

    assert_same({key: value for key, value in metrics.items() if "/" in key}, expected)


def test_only_states_that_are_due_have_them(model, sgd, batches):
    """Every second one; the pass's mean is that of these."""
    run = run_of(model, sgd, batches, lt.watch(model, every=2))

    assert ["grad_norm/w" in state.metrics for state in run] == [False, True, False]
    assert (run.results["train/grad_norm/w"], run.results["train/weight_norm/w"]) == (2.0, 2.0)


def test_in_an_accumulation_window_the_iteration_that_closes_it_is_taken(model, sgd, batches):
    """Due at the first of two: measured at the second, when the gradient is whole."""
    run = run_of(model, sgd, batches, lt.watch(model, every=lambda state: state.index == 0), accumulate=2)

    assert [state.metrics.get("grad_norm/w") for state in run] == [None, 1.5, None]


def test_a_look_that_waits_is_remembered(model, sgd, batches):
    """A part that takes its place within the window takes it up; a checkpoint would hold it too."""
    from looptools.checkpoints.memory import memory

    run = run_of(model, sgd, batches, lt.watch(model, every=lambda state: state.index == 0), accumulate=2)
    next(run)

    assert memory(run["train/watch"]) == {"waits": True}
    run.replace("watch", lt.watch(model, every=100))
    assert "grad_norm/w" in next(run).metrics


def test_behind_a_clip_gradients_are_those_that_are_applied(model, sgd, batches):
    """It measures where it stands."""
    clip = lt.clip_grad_norm(model.parameters(), 0.5)
    run = run_of(model, sgd, batches[1:], lt.watch(model, every=1), clip, lt.watch(model, every=1, weights=False))
    seen = [(name, float(state.metrics["grad_norm/w"])) for name, state in run.stages() if "grad" in str(state.metrics)]

    assert [(name, round(norm, 4)) for name, norm in seen[:3]] == [
        ("train/watch", 2.0),
        ("train/clip_grad_norm", 2.0),
        ("train/watch#2", 0.5),
    ]


def test_either_may_be_left_out(model, sgd, batches):
    """Weights alone need no gradients, and may stand anywhere."""
    for options, keys in [({"gradients": False}, ["weight_norm/w"]), ({"weights": False}, ["grad_norm/w"])]:
        state = next(run_of(model, sgd, batches, lt.watch(model, every=1, **options)))
        assert [key for key in state.metrics if "/" in key] == keys
    phase = lt.validate(model, batches, lambda model, batch: model(batch))
    assert "weight_norm/w" in next(iter(phase | lt.watch(model, every=lambda state: True))).metrics


def test_parameters_without_a_gradient_have_none():
    """A frozen one keeps its weight's norm."""
    model = torch.nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    phase = lt.train(model, [torch.ones(1, 1)], lambda model, batch: model(batch).mean()) | lt.backward(sgd)

    metrics = next(iter(phase | lt.watch(model, every=1) | lt.update(sgd))).metrics

    assert [key for key in metrics if "/" in key] == ["weight_norm/weight", "grad_norm/weight", "weight_norm/bias"]


def test_half_precision_and_sparse_gradients():
    """A norm above fp16's largest number is not inf; a sparse gradient's repeated rows are added up."""
    half = torch.nn.Parameter(torch.tensor([36000.0, 48000.0, 60000.0], dtype=torch.float16))
    table = torch.nn.Embedding(3, 1, sparse=True)
    table(torch.tensor([1, 1])).sum().backward()
    model = torch.nn.ParameterDict({"fp16": half, "table": table.weight})
    state = lt.State(phase="train", updates=True)

    next(lt.watch(model, every=1)([state]))

    assert state.metrics["weight_norm/fp16"] == pytest.approx(60000 * 2**0.5, rel=1e-3)
    assert state.metrics["grad_norm/table"] == 2.0


class collector:
    """A part of the run that takes histograms."""

    def __init__(self):
        self.taken = []

    def histogram(self, tag, values):
        self.taken.append((tag, values.tolist()))

    def __call__(self, states):
        yield from states


def test_histograms_go_to_the_parts_that_take_them(model, sgd, batches):
    """All values, of weights before the update."""
    part = collector()
    run = run_of(model, sgd, batches, lt.watch(model, every=2, histograms=True)) | part
    run.to_end()

    assert part.taken == [("weights/w", 2.0), ("gradients/w", 2.0)]


def test_same_as_by_hand_without_a_read():
    """It changes no bit, and reads the device no more often than without it, though it looks at every iteration."""
    case, reads = Case("AdamW"), {}
    for every in (None, 1):
        model, optimizer, data, val = case.make()
        phase = lt.train(model, data, classify) | lt.backward(optimizer)
        phase = phase if every is None else phase | lt.watch(model, every=every)
        validation = lt.validate(model, val, classify)
        run = lt.workflow([(phase | lt.update(optimizer), 1), (validation, 1)], max_epochs=2)
        with device_reads() as reads[every]:
            run.to_end()
        assert_same(model.state_dict(), by_hand(case))

    assert reads[1] == reads[None]


def test_one_next_is_one_iteration_and_closing_leaves_nothing(model, sgd, batches):
    """No second batch is fetched; no generator stays."""
    fetched = []
    source = lambda: (fetched.append(1) or batch for batch in batches)  # noqa: E731
    phase = lt.train(model, source, lambda m, b: m(b)) | lt.backward(sgd) | lt.watch(model, every=1) | lt.update(sgd)
    run = lt.workflow([(phase, lt.iterations(3))], max_epochs=1)
    next(run)
    run.close()

    assert len(fetched) == 1
    assert all(slot.stream is None for slot in run.cursor.slots)


def test_it_is_not_saved_with_the_run(model, sgd, batches):
    """A part of a model that is watched is no second model in the checkpoint."""
    from looptools.checkpoints.inventory import inventory

    outer = torch.nn.Sequential(model)
    run = run_of(outer, sgd, batches, lt.watch(outer[0], every=1))

    assert list(inventory(run.cursor).modules) == ["model"]


def test_a_wrong_place_is_refused(model, sgd, batches):
    """Before backward, and histograms that nobody takes."""
    phase = lt.train(model, batches, lambda model, batch: model(batch)) | lt.watch(model) | lt.optimize(sgd)
    with pytest.raises(ValueError, match="watch: it stands before backward"):
        next(iter(phase))
    with pytest.raises(ValueError, match="watch: histograms=True, but no part of the run takes them"):
        next(run_of(model, sgd, batches, lt.watch(model, histograms=True)))


def test_bad_options(model):
    """Refused where they are typed."""
    with pytest.raises(TypeError, match=r"watch: model must be a torch.nn.Module, got \["):
        lt.watch([model])
    with pytest.raises(ValueError, match="watch: there is nothing to watch"):
        lt.watch(model, weights=False, gradients=False)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_tensors_without_a_finite_value_have_no_histogram(tmp_path, value):
    """Nor have empty ones; the run goes on, with one read for all of them."""
    model = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.ones(2)), "none": torch.nn.Parameter(torch.ones(0))})
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    step = lambda model, batch: (model["w"] * batch).sum() + model["none"].sum()  # noqa: E731
    phase = lt.train(model, [torch.ones(2), torch.full((2,), value)], step) | lt.backward(sgd)
    part = collector()
    run = lt.workflow([(phase | lt.watch(model, every=1, histograms=True) | lt.update(sgd), 1)], max_epochs=1) | part
    run.to_end()

    tags = [tag for tag, _ in part.taken]
    assert tags == ["weights/w", "gradients/w", "weights/w"]


def test_a_histogram_that_failed_does_not_bring_the_others_again(model, sgd, batches):
    """next(run) goes on with the one that could not be written."""

    class fails_once(collector):
        def histogram(self, tag, values):
            if tag == "gradients/w" and ("failed", None) not in self.taken:
                self.taken.append(("failed", None))
                raise OSError
            super().histogram(tag, values)

    part = fails_once()
    run = run_of(model, sgd, batches[:1], lt.watch(model, every=1, histograms=True)) | part
    with pytest.raises(OSError):
        next(run)
    state = next(run)

    assert part.taken == [("weights/w", 3.0), ("failed", None), ("gradients/w", 1.0)]
    assert state.metrics["weight_norm/w"] == 3.0
