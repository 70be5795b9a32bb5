"""Saving at the boundary, keeping the last and the best."""

from __future__ import annotations

import json
import math

import attrs
import pytest
import torch
from loops import Case, assert_same, piped

import looptools as lt


def names(folder):
    return sorted(path.name for path in folder.glob("*.pt"))


def scores(values, folder, **options):
    """A run whose validation gives *values*, one a round."""
    left = iter(values)
    val = lt.validate(None, lambda: [next(left)], lambda model, batch: {"score": batch})
    return lt.workflow([(val, 1)], max_rounds=len(values)) | lt.checkpoint(folder, **options)


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
    """By training iterations, by epochs, or by a predicate of the state."""
    (piped(Case()) | lt.checkpoint(tmp_path, every=every, keep=None)).to_end()

    assert len(names(tmp_path)) == count


def test_checkpoints_in_the_middle_of_a_pass_cannot_be_gone_on_from_yet(tmp_path):
    """Resuming says so, and what to do."""
    (piped(Case()) | lt.checkpoint(tmp_path, every=3)).to_end()

    with pytest.raises(RuntimeError, match=r"saved within a pass; .* Save at lt.rounds\(1\) or lt.epochs\(1\)"):
        (piped(Case()) | lt.checkpoint(tmp_path)).resume()


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


def test_retention_keeps_the_newest_that_can_be_gone_on_from(tmp_path):
    """Checkpoints within a round do not push the last one at a round's end out."""
    every = lambda state: state.round_last or (state.trains and state.index % 2 == 0)  # noqa: E731
    run = piped(Case(epochs=3)) | lt.checkpoint(tmp_path, every=every, keep=2)
    list(run.take(2 * 14 + 6))
    run.close()

    assert len(names(tmp_path)) == 3
    again = piped(Case(epochs=3)) | lt.checkpoint(tmp_path)
    assert again.resume().name.startswith("epoch_0002-iteration_000014")


def test_the_best_is_saved_with_the_weights_that_were_measured(tmp_path):
    """Looked at after every validation, whatever `every` says; between two of them nothing is the best."""
    case = Case(epochs=3)
    every = lambda state: state.trains and state.index == 3  # noqa: E731
    run = piped(case) | lt.checkpoint(tmp_path, every=every, best=lt.highest("val/accuracy"))
    judged = {}
    for state in run:
        if state.round_last:
            weights = {key: value.clone() for key, value in run.model.state_dict().items()}
            judged[run.progress.iteration] = (run.results["val/accuracy"], weights)

    best = max(value for value, _ in judged.values())
    iteration = min(n for n, (value, _) in judged.items() if value == best)
    assert (run.best["val/accuracy"]["value"], run.best["val/accuracy"]["iteration"]) == (best, iteration)
    assert_same(torch.load(tmp_path / "best.pt", weights_only=True)["models"]["model"], judged[iteration][1])


def test_a_misspelt_metric_is_found_after_the_first_round_whatever_every_says(tmp_path):
    """Also where no checkpoint is due there."""
    run = piped(Case()) | lt.checkpoint(tmp_path, every=3, best=lt.lowest("val/los"))

    with pytest.raises(LookupError, match='no part writes "val/los"; known are train/accuracy, train/loss'):
        run.to_end()
    assert run.progress.epoch == 1
