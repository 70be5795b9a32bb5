"""What is saved, and what is refused."""

from __future__ import annotations

import attrs
import pytest
import torch
from loops import Case, assert_same, piped
from torch import nn

import looptools as lt


def names(folder):
    return sorted(path.name for path in folder.glob("*.pt"))


def scores(values, folder, **options):
    """A run whose validation gives *values*, one a round."""
    left = iter(values)
    val = lt.validate(None, lambda: [next(left)], lambda model, batch: {"score": batch})
    return lt.workflow([(val, 1)], max_rounds=len(values)) | lt.checkpoint(folder, **options)


def test_another_pipe_is_refused_with_the_list_of_differences(tmp_path):
    """Everything that differs is listed, and nothing is changed."""
    (piped(Case()) | lt.checkpoint(tmp_path)).to_end()
    run = piped(Case(max_norm=1.0)) | lt.checkpoint(tmp_path)
    run.model[0] = nn.Linear(3, 8, bias=False)

    with pytest.raises(ValueError, match="moves 2 parameters that no model of the run holds"):
        run.resume()
    run = piped(Case(max_norm=1.0)) | lt.checkpoint(tmp_path)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"Nothing was changed. They differ in:\n- the pipe: here only .*clip"):
        run.resume()
    assert_same(run.model.state_dict(), before)


def test_what_cannot_be_loaded_again_is_an_error_at_the_save(tmp_path):
    """The error names part and field; files that were written stay."""

    @attrs.define(eq=False)
    class keeps:
        seen: object = attrs.field(default=None, init=False)

        def __call__(self, states):
            for state in states:
                self.seen = tmp_path if state.batch == 2.0 else 1
                yield state

    run = scores([1.0, 2.0], tmp_path) | keeps()
    next(run)

    with pytest.raises(TypeError, match="checkpoint/parts/run/keeps/seen is a pathlib.PosixPath|WindowsPath"):
        next(run)
    assert len(names(tmp_path)) == 1
    assert not list(tmp_path.glob(".*"))


def test_a_parameter_that_no_model_holds_is_refused_at_build():
    """It could not be saved; the cure is in the error."""
    stray = nn.Parameter(torch.ones(2))
    phase = lt.train(nn.Linear(1, 1), [1], lambda model, batch: stray.sum()) | lt.optimize(
        torch.optim.SGD([stray], lr=1)
    )

    with pytest.raises(
        ValueError, match=r"moves 1 parameters that no model of the run holds, the first of shape \(2,\)"
    ):
        next(lt.workflow([(phase, 1)], max_epochs=1))


def named(*entries):
    """The names under which a checkpoint would hold the models of this workflow."""
    from looptools.checkpoints import inventory

    return inventory(lt.workflow(entries, max_rounds=1).cursor).modules


@attrs.define(eq=False)
class holds:
    """A part with modules among its options."""

    teacher: object = None
    critics: object = ()

    def __call__(self, states):
        yield from states


def test_models_are_called_model_those_of_training_phases_first():
    """Each once, however many phases share it."""
    trained, judged = nn.Linear(1, 1), nn.Linear(1, 1)
    step = lambda model, batch: {"x": 1.0}  # noqa: E731
    val, train = lt.validate(judged, [1.0], step), lt.train(trained, [1.0], step)

    found = named((val, 1), (train, 1), (lt.validate(trained, [1.0], step), 1))

    assert list(found) == ["model", "model#2"]
    assert (found["model"], found["model#2"]) == (trained, judged)


def test_modules_among_a_parts_options_are_called_by_the_option():
    """Also where a phase validates one of them: it is not another model of the run's own."""
    trained, teacher, critics = nn.Linear(1, 1), nn.Linear(1, 1), [nn.Linear(1, 1), nn.Linear(1, 1)]
    step = lambda model, batch: {"x": 1.0}  # noqa: E731
    train = lt.train(trained, [1.0], step) | holds(teacher, critics) | lt.chain(holds(nn.Linear(1, 1)), name="D")

    found = named((train, 1), (lt.validate(teacher, [1.0], step), 1))

    assert list(found) == ["model", "teacher", "critics", "critics#2", "D.teacher"]
    assert found["teacher"] is teacher


def test_the_metrics_of_measure_are_no_models():
    """What they have taken in is the part's memory."""
    metrics = {"m": nn.Identity(), "n": nn.Linear(1, 1)}
    val = lt.validate(nn.Linear(1, 1), [1.0], lambda model, batch: {"x": 1.0})

    assert list(named((val | lt.measure(metrics, lambda state: state.batch), 1))) == ["model"]
