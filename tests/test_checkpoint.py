"""Saving at the boundary, keeping the last and the best, and going on from the end of a round."""

from __future__ import annotations

import json
import math

import attrs
import pytest
import torch
from loops import Case, assert_same, by_hand, piped
from torch import nn

import looptools as lt

HARD = Case(optimizer="AdamW", max_norm=0.5, accumulate=3, cosine=True, epochs=4)


def names(folder):
    return sorted(path.name for path in folder.glob("*.pt"))


def scores(values, folder, **options):
    """A run whose validation gives *values*, one a round."""
    left = iter(values)
    val = lt.validate(None, lambda: [next(left)], lambda model, batch: {"score": batch})
    return lt.workflow([(val, 1)], max_rounds=len(values)) | lt.checkpoint(folder, **options)


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("case", [HARD, Case(workers=2, epochs=4)], ids=["hard", "workers"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, case, rounds):
    """Stopped after any round and resumed by new objects: weights, history and results are the uninterrupted ones."""
    first = piped(case) | lt.checkpoint(tmp_path)
    for state in first:
        if state.round_last and state.plan.round + 1 == rounds:
            break
    first.close()
    torch.manual_seed(99)

    run = piped(case) | lt.checkpoint(tmp_path)
    path = run.resume()
    run.to_end()

    assert path.name == f"epoch_{rounds:04d}-iteration_{7 * rounds:06d}.pt"
    assert_same(run.model.state_dict(), by_hand(case))
    straight = piped(case)
    straight.to_end()
    assert run.results == straight.results
    strip = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]  # noqa: E731
    assert strip(run.history) == strip(straight.history)


def test_a_killed_run_goes_on_from_the_last_whole_round(tmp_path):
    """What was done after the checkpoint is done again, to the same bits."""
    first = piped(HARD) | lt.checkpoint(tmp_path)
    list(first.take(14 + 5))

    run = piped(HARD) | lt.checkpoint(tmp_path)
    run.resume()

    assert (run.progress.epoch, run.progress.iteration) == (1, 7)
    run.to_end()
    assert_same(run.model.state_dict(), by_hand(HARD))


def test_a_training_source_that_stands_in_mid_walk_is_found_again(tmp_path):
    """With entries of lt.iterations(5) a round ends within the loader's walk; the same order goes on."""

    def make():
        model, optimizer, train, val = Case(cosine=True).make()
        from loops import classify

        phase = (
            lt.train(model, train, classify) | lt.schedule_lr(optimizer, lt.schedules.poly()) | lt.optimize(optimizer)
        )
        entries = [(phase, lt.iterations(5)), (lt.validate(model, val, classify), 1)]
        return lt.workflow(entries, max_iterations=20)

    straight = make()
    straight.to_end()
    first = make() | lt.checkpoint(tmp_path)
    list(first.take(2 * (5 + 7)))
    torch.manual_seed(99)
    run = make() | lt.checkpoint(tmp_path)
    run.resume()

    assert len(list(run)) == 2 * (5 + 7)
    assert_same(run.model.state_dict(), straight.model.state_dict())


def test_torchs_own_scheduler_and_a_scaler_are_resumed(tmp_path):
    """Their state is in the file like everything else; nobody lists it."""

    def make():
        model, optimizer, train, _ = Case(optimizer="AdamW").make()
        from loops import classify

        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=30)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
        phase = lt.train(model, train, classify) | lt.schedule_lr(optimizer, scheduler)
        return lt.workflow([(phase | lt.optimize(optimizer, max_norm=1.0, scaler=scaler), 1)], max_epochs=4)

    straight = make()
    straight.to_end()
    first = make() | lt.checkpoint(tmp_path)
    list(first.take(14))
    run = make() | lt.checkpoint(tmp_path)
    run.resume()
    run.to_end()

    assert_same(run.model.state_dict(), straight.model.state_dict())
    saved = torch.load(tmp_path / names(tmp_path)[-1], weights_only=True)
    assert set(saved["models"]) == {"model"}
    assert saved["scalers"]["scaler"]["scale"] == 64.0 * 2 ** (28 // 3)
    assert saved["schedulers"]["scheduler"]["last_epoch"] == 27  # stepped as the next iteration begins


def test_an_empty_folder_is_a_fresh_start(tmp_path):
    """`resume` returns None."""
    run = piped(Case()) | lt.checkpoint(tmp_path / "new")

    assert run.resume() is None
    assert len(list(run)) == 28


def test_a_finished_run_is_left_alone(tmp_path):
    """Resumed at its end, it has ended; with more epochs it goes on."""
    (piped(Case()) | lt.checkpoint(tmp_path)).to_end()

    run = piped(Case()) | lt.checkpoint(tmp_path)
    run.resume()
    assert list(run) == []
    assert run.ended == "finished: 2 epochs, 14 iterations"

    run = piped(Case(epochs=4)) | lt.checkpoint(tmp_path)
    run.resume()
    run.to_end()
    assert_same(run.model.state_dict(), by_hand(Case(epochs=4)))


def test_saving_comes_after_all_parts_of_the_iteration(tmp_path):
    """A part behind the checkpoint is saved as it is after the iteration, not before."""

    @attrs.define(eq=False)
    class counts:
        seen: int = attrs.field(default=0, init=False)

        def __call__(self, states):
            for state in states:
                self.seen += 1
                yield state

    run = scores([1.0, 2.0], tmp_path, keep=None) | counts()
    run.to_end()

    saved = [torch.load(tmp_path / name, weights_only=True)["parts"]["run/counts"] for name in names(tmp_path)]
    assert sorted(entry["seen"] for entry in saved) == [1, 2]


def test_the_last_k_stay(tmp_path):
    """Older ones go once the new one is safe."""
    (piped(Case(epochs=4)) | lt.checkpoint(tmp_path, keep=2)).to_end()

    assert names(tmp_path) == ["epoch_0003-iteration_000021.pt", "epoch_0004-iteration_000028.pt"]
    manifest = json.loads((tmp_path / "checkpoints.json").read_text())["checkpoints"]
    assert [(entry["number"], entry["epoch"]) for entry in manifest] == [(3, 3), (4, 4)]


@pytest.mark.parametrize(
    ("values", "best", "expected"),
    [
        ([3.0, 1.0, 2.0], lt.lowest, 1.0),
        ([3.0, 1.0, 2.0], lt.highest, 3.0),
        ([1.0, 0.0, 2.0], lt.lowest, 0.0),  # a perfect score of 0 counts
        ([math.nan, 2.0, math.inf, 1.0], lt.highest, 2.0),  # what is not finite never is best
    ],
)
def test_the_best_is_kept(tmp_path, values, best, expected):
    """`best.pt` is the checkpoint of the best round; `run.best` says what it was."""
    run = scores(values, tmp_path, keep=1, best=best("val/score"))
    run.to_end()

    assert run.best["val/score"]["value"] == expected
    assert torch.load(tmp_path / "best.pt", weights_only=True)["results"] == {"val/score": expected}
    assert len(names(tmp_path)) == 2


def test_a_metric_that_nobody_writes_is_an_error_after_the_first_round(tmp_path):
    """The known ones are listed, and nothing is lost: the part can be replaced, and the run goes on."""
    run = scores([1.0, 2.0], tmp_path, best=lt.highest("val/acc"))

    with pytest.raises(LookupError, match='best: no part writes "val/acc"; known are val/score'):
        run.to_end()
    run.skip()
    run.replace("checkpoint", lt.checkpoint(tmp_path, best=lt.highest("val/score")))
    run.to_end()

    assert run.best["val/score"]["value"] == 2.0


@pytest.mark.parametrize(("every", "count"), [(3, 4), (lt.epochs(1), 2), (lambda state: state.index == 2, 4)])
def test_how_often(tmp_path, every, count):
    """By training iterations, by epochs, or by a predicate of the state; and resuming says what it needs."""
    (piped(Case()) | lt.checkpoint(tmp_path, every=every, keep=None)).to_end()

    assert len(names(tmp_path)) == count
    with pytest.raises(RuntimeError, match=r"saved within a round; .* Save at lt.rounds\(1\)"):
        (piped(Case()) | lt.checkpoint(tmp_path)).resume()


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_a_damaged_file_is_said_and_the_one_before_is_used(tmp_path, harm):
    """By length and checksum; all damaged is an error."""
    (piped(Case(epochs=3)) | lt.checkpoint(tmp_path)).to_end()

    def spoil(path):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        {
            "truncate": lambda: path.write_bytes(data[:-1]),
            "flip": lambda: path.write_bytes(data),
            "remove": path.unlink,
        }[harm]()

    spoil(tmp_path / names(tmp_path)[-1])
    run = piped(Case(epochs=3)) | lt.checkpoint(tmp_path)
    with pytest.warns(UserWarning, match=r"epoch_0003-iteration_000021.pt is damaged: .* Trying the one before"):
        path = run.resume()
    assert path.name == "epoch_0002-iteration_000014.pt"
    run.to_end()
    assert_same(run.model.state_dict(), by_hand(Case(epochs=3)))


def test_a_used_folder_is_refused_before_the_first_iteration(tmp_path):
    """A run that did not resume from it would mix its files with another's."""
    (piped(Case()) | lt.checkpoint(tmp_path)).to_end()
    run = piped(Case()) | lt.checkpoint(tmp_path)

    with pytest.raises(FileExistsError, match=r"holds the checkpoints of another run.* Call run.resume\(\) first"):
        next(run)
    assert run.progress.iteration == 0
    run.resume()
    assert next(run, None) is None


def test_a_folder_that_cannot_be_made_is_refused_before_the_first_iteration(tmp_path):
    """The error is the system's own, with the part's name in a note."""
    (tmp_path / "file").write_text("")
    for part in (lt.checkpoint(tmp_path / "file" / "a"), lt.log(tmp_path / "file" / "a")):
        with pytest.raises(OSError, match="file") as caught:
            next(piped(Case()) | part)
        assert "cannot write to" in caught.value.__notes__[0]


def test_another_pipe_is_refused_with_the_list_of_differences(tmp_path):
    """Everything that differs is listed, and nothing is changed."""
    (piped(Case()) | lt.checkpoint(tmp_path)).to_end()
    run = piped(Case(max_norm=1.0)) | lt.checkpoint(tmp_path)
    run.model[0] = nn.Linear(3, 8, bias=False)

    with pytest.raises(ValueError, match="moves 2 parameters that no model of the run holds"):
        run.resume()
    run = piped(Case(max_norm=1.0)) | lt.checkpoint(tmp_path)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"Nothing was changed. It differs in:\n- the pipe: saved .*; here .*clip"):
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


def test_resume_comes_first(tmp_path):
    """In the middle of a run it is refused; a path that is not there, too."""
    run = piped(Case()) | lt.checkpoint(tmp_path)
    next(run)

    with pytest.raises(RuntimeError, match="the run has begun already"):
        run.resume()
    with pytest.raises(FileNotFoundError, match="there is no"):
        piped(Case()).resume(tmp_path / "nowhere")
    with pytest.raises(RuntimeError, match="the run has no checkpoint part"):
        piped(Case()).resume()
