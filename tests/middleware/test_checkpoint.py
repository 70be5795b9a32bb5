"""Saving at the boundary, keeping the last and the best."""

from __future__ import annotations

import importlib
import json
import math
import os
import stat
import zlib
from pathlib import Path

import attrs
import pytest
import torch
from loops import Case, assert_same, by_hand, classify, loader, network, piped
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import looptools as lt
from looptools.checkpoints import save


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


@pytest.mark.parametrize(
    ("every", "count"), [(3, 5), (lt.epochs(1), 2), (lt.epochs(3), 1), (lambda state: state.index == 2, 4)]
)
def test_how_often(tmp_path, every, count):
    """By training iterations, by epochs, or by a predicate of the state; what counts saves the end, too."""
    (piped(Case()) | lt.checkpoint(tmp_path, every=every, keep=None)).to_end()

    assert len(names(tmp_path)) == count


def test_checkpoints_in_the_middle_of_a_pass_can_be_gone_on_from(tmp_path):
    """Like any other; to the same bits."""
    list((piped(Case()) | lt.checkpoint(tmp_path, every=3)).take(4))

    run = piped(Case()) | lt.checkpoint(tmp_path)
    assert run.resume().name == "epoch_0000-iteration_000003.pt"
    run.to_end()
    assert_same(run.model.state_dict(), by_hand(Case()))


@pytest.mark.parametrize(
    ("every", "at_end", "last"),
    [
        (5, None, 14),
        (5, False, 10),
        (lambda state: state.trains and state.index == 1, None, 9),
        (lambda state: state.first, True, 14),
    ],
)
def test_the_end_of_the_run_is_saved(tmp_path, every, at_end, last):
    """Unless every is a function of the state, or somebody says otherwise."""
    (piped(Case()) | lt.checkpoint(tmp_path, every=every, at_end=at_end)).to_end()

    manifest = json.loads((tmp_path / "checkpoints.json").read_text())["checkpoints"]
    assert manifest[-1]["iteration"] == last


def test_a_damaged_best_file_is_said_and_replaced(tmp_path):
    """The next result is the best again: a file that nobody can load is no use to anybody."""
    list(scores([3.0, 2.0, 1.0], tmp_path, best=lt.highest("val/score")).take(2))
    (tmp_path / "best.pt").write_bytes((tmp_path / "best.pt").read_bytes()[:-1])
    run = scores([1.0], tmp_path, best=lt.highest("val/score"))
    run = lt.workflow([(run.cursor.passes.agenda.phases[0], 1)], max_rounds=3) | lt.checkpoint(
        tmp_path, best=lt.highest("val/score")
    )

    with pytest.warns(
        UserWarning, match=r"best.pt, the best of val/score, is damaged: .* The next result takes its place"
    ):
        run.resume()
    run.to_end()

    assert run.best["val/score"]["value"] == 1.0
    assert lt.verify(tmp_path).sound


def test_a_run_that_is_resumed_at_its_end_saves_nothing_more(tmp_path):
    """It is left alone."""
    make = lambda: piped(Case()) | lt.checkpoint(tmp_path, every=5)  # noqa: E731
    make().to_end()
    before = names(tmp_path)
    run = make()
    run.resume()
    run.to_end()

    assert names(tmp_path) == before
    assert run.ended == "finished: 2 epochs, 14 iterations"


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


def test_retention_counts_checkpoints_within_a_pass_like_any_other(tmp_path):
    """All of them can be gone on from."""
    every = lambda state: state.round_last or (state.trains and state.index % 2 == 0)  # noqa: E731
    run = piped(Case(epochs=3)) | lt.checkpoint(tmp_path, every=every, keep=2)
    list(run.take(2 * 14 + 6))
    run.close()

    assert names(tmp_path) == ["epoch_0002-iteration_000017.pt", "epoch_0002-iteration_000019.pt"]
    again = piped(Case(epochs=3)) | lt.checkpoint(tmp_path)
    assert again.resume().name.startswith("epoch_0002-iteration_000019")


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

    with pytest.raises(LookupError, match='no part writes "val/los"; known are train/loss, train/accuracy'):
        run.to_end()
    assert run.progress.epoch == 1


def two(values, folder, **options):
    """A run whose validation gives pairs of values, one a round."""
    left = iter(values)
    val = lt.validate(None, lambda: [next(left)], lambda model, batch: {"up": batch[0], "down": batch[1]})
    return lt.workflow([(val, 1)], max_rounds=len(values)) | lt.checkpoint(folder, **options)


def results_in(folder, name):
    return torch.load(folder / name, weights_only=True)["results"]


def best_names(folder):
    return [name for name in names(folder) if name.startswith("best")]


def test_several_bests_have_a_file_each(tmp_path):
    """Named after their metrics; each is written when its own metric is the best."""
    run = two([(1.0, 5.0), (3.0, 4.0), (2.0, 3.0)], tmp_path, best=[lt.highest("val/up"), lt.lowest("val/down")])
    run.to_end()

    assert best_names(tmp_path) == ["best-val-down.pt", "best-val-up.pt"]
    assert results_in(tmp_path, "best-val-up.pt") == {"val/up": 3.0, "val/down": 4.0}
    assert results_in(tmp_path, "best-val-down.pt") == {"val/up": 2.0, "val/down": 3.0}
    assert {metric: (best["value"], best["file"]) for metric, best in run.best.items()} == {
        "val/up": (3.0, "best-val-up.pt"),
        "val/down": (3.0, "best-val-down.pt"),
    }


@pytest.mark.parametrize("best", [lt.highest, lt.lowest])
@pytest.mark.parametrize("every", [lt.rounds(1), lt.rounds(100)], ids=["each", "best-only"])
def test_the_k_best_are_kept_and_ranked(tmp_path, best, every):
    """As sorting would have it, ties keeping the older one, over many sequences of values."""
    for seed in range(12):
        folder = tmp_path / str(seed)
        drawn = torch.randint(0, 6, (9,), generator=torch.Generator().manual_seed(seed))
        values = [math.nan if n == 5 else float(n) for n in drawn]
        run = scores(values, folder, every=every, best=best("val/score", top=3))
        run.to_end()

        finite = [(value, number) for number, value in enumerate(values) if math.isfinite(value)]
        expected = [value for value, _ in sorted(finite, key=lambda pair: (-best.sign * pair[0], pair[1]))][:3]
        top = run.best["val/score"]["top"]
        assert [entry["value"] for entry in top] == expected
        assert [results_in(folder, entry["file"])["val/score"] for entry in top] == expected
        assert results_in(folder, "best.pt")["val/score"] == expected[0]
        assert best_names(folder) == sorted(["best.pt", *(entry["file"] for entry in top)])


def test_a_result_that_ties_or_is_worse_is_not_written(tmp_path):
    """Neither over the older one nor beside it."""
    run = scores([3.0, 2.0, 2.0, 1.0], tmp_path, best=lt.highest("val/score", top=2))
    list(run.take(2))
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in best_names(tmp_path)}
    run.to_end()

    assert {name: (tmp_path / name).stat().st_mtime_ns for name in best_names(tmp_path)} == before


def test_a_pass_is_ranked_once(tmp_path):
    """Not again when another phase's pass ends, or a checkpoint is due in between."""
    val = lt.validate(None, [1.0, 2.0], lambda model, batch: {"score": batch})
    test = lt.validate(None, [1.0, 2.0], lambda model, batch: {"score": batch}, name="test")
    run = lt.workflow([(val, 1), (test, 1)], max_rounds=1)
    run = run | lt.checkpoint(tmp_path, every=lambda state: True, best=lt.highest("val/score", top=5))
    run.to_end()

    assert len(run.best["val/score"]["top"]) == 1


def test_ranked_files_are_named_after_epoch_and_iteration(tmp_path):
    """And the manifest lists them with value, rank and checksum."""
    run = piped(Case(epochs=3)) | lt.checkpoint(tmp_path, best=lt.lowest("train/loss", top=2))
    run.to_end()

    rows = sorted((row for row in run.history if row["phase"] == "train"), key=lambda row: row["loss"])[:2]
    expected = [f"best-epoch_{row['epoch'] + 1:04d}-iteration_{row['trained']:06d}.pt" for row in rows]
    assert [entry["file"] for entry in run.best["train/loss"]["top"]] == expected
    listed = json.loads((tmp_path / "checkpoints.json").read_text())["best"]
    assert [(entry["rank"], entry["file"]) for entry in listed] == [(1, "best.pt"), (1, expected[0]), (2, expected[1])]
    assert [entry["value"] for entry in listed] == [rows[0]["loss"], rows[0]["loss"], rows[1]["loss"]]
    for entry in listed:
        data = (tmp_path / entry["file"]).read_bytes()
        assert (entry["metric"], entry["bytes"], entry["crc32"]) == ("train/loss", len(data), zlib.crc32(data))


@pytest.mark.parametrize("name", ["best-val-accuracy.pt", "ranked"])
def test_a_best_file_is_gone_on_from_and_its_damage_is_found(tmp_path, name):
    """By the manifest's checksum, as for any other file."""
    best = [lt.highest("val/accuracy", top=2), lt.lowest("val/loss")]
    run = piped(Case(epochs=3)) | lt.checkpoint(tmp_path, best=best)
    run.to_end()
    name = run.best["val/accuracy"]["top"][-1]["file"] if name == "ranked" else name

    again = piped(Case(epochs=3)) | lt.checkpoint(tmp_path, best=best)
    again.resume(tmp_path / name)
    again.to_end()
    assert_same(again.model.state_dict(), run.model.state_dict())
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RuntimeError, match=f"{name} is damaged: its checksum is wrong"):
        (piped(Case(epochs=3)) | lt.checkpoint(tmp_path, best=best)).resume(tmp_path / name)


@pytest.mark.parametrize("cut", [2, 3, 4])
def test_a_resumed_run_ranks_like_an_uninterrupted_one(tmp_path, cut):
    """Also what it had displaced after the checkpoint it goes on from is written again."""
    values = [3.0, 1.0, 4.0, 2.0, 5.0]
    options = {"every": lt.rounds(2), "best": lt.highest("val/score", top=2)}
    list(scores(values, tmp_path, **options).take(cut))
    run = scores(values[cut - cut % 2 :], tmp_path, **options)
    run.resume()
    run.extend(max_rounds=5)
    run.to_end()

    kept = [entry["file"] for entry in run.best["val/score"]["top"]]
    assert [results_in(tmp_path, name)["val/score"] for name in kept] == [5.0, 4.0]
    assert best_names(tmp_path) == sorted(["best.pt", *kept])


def test_a_ranked_file_that_is_gone_is_ranked_no_more(tmp_path):
    """Deleted by hand, or displaced after the checkpoint that a run was resumed from: the next best closes the gap."""
    run = scores([1.0, 3.0, 2.0], tmp_path, best=lt.highest("val/score", top=2))
    list(run.take(2))
    (tmp_path / run.best["val/score"]["top"][0]["file"]).unlink()
    run.to_end()

    assert [entry["value"] for entry in run.best["val/score"]["top"]] == [2.0, 1.0]
    assert run.best["val/score"]["value"] == 3.0


def test_files_displaced_by_a_change_of_names_go_with_the_next_best(tmp_path):
    """From one criterion to two, and a shorter ranking: what is not listed any more is removed, the rest stays."""
    first = two([(1.0, 3.0), (2.0, 2.0)], tmp_path, best=lt.highest("val/up", top=2))
    first.to_end()
    assert len(best_names(tmp_path)) == 3
    run = two([(3.0, 9.0), (1.0, 9.0)], tmp_path, best=[lt.highest("val/up"), lt.lowest("val/down")])
    run.resume()
    run.extend(max_rounds=4)
    run.to_end()

    assert best_names(tmp_path) == ["best-val-down.pt", "best-val-up.pt"]
    assert results_in(tmp_path, "best-val-up.pt")["val/up"] == 3.0


def test_a_manifest_of_the_time_when_there_was_one_best_is_read(tmp_path):
    """`best` was a dictionary then."""
    scores([1.0, 2.0], tmp_path, best=lt.highest("val/score")).to_end()
    path = tmp_path / "checkpoints.json"
    content = json.loads(path.read_text()) | {"format": 1}
    content["best"] = {key: content["best"][0][key] for key in ("file", "bytes", "crc32")}
    del content["crc32"]
    path.write_text(json.dumps(content))

    run = scores([3.0], tmp_path, best=lt.highest("val/score"))
    run.resume(tmp_path / "best.pt")
    run.extend(max_rounds=3)
    run.to_end()

    assert [(e["file"], e["value"]) for e in json.loads(path.read_text())["best"]] == [("best.pt", 3.0)]


def test_a_best_that_cannot_be_written_is_tried_again(tmp_path, monkeypatch):
    """What was there stays, and the ranking too; next(run) goes on there."""
    save = importlib.import_module("looptools.checkpoints.save")
    real, full = save.copy, [True]

    def copy(source, path):
        if path.name.startswith("best-") and full:
            raise OSError("planted: no space left")
        return real(source, path)

    monkeypatch.setattr(save, "copy", copy)
    run = scores([1.0, 2.0], tmp_path, best=lt.highest("val/score", top=1))
    next(run)
    run.replace("checkpoint", lt.checkpoint(tmp_path, best=lt.highest("val/score", top=2)))
    with pytest.raises(OSError, match="planted"):
        next(run)
    assert run.best["val/score"]["value"] == 1.0
    full.clear()
    next(run)

    assert [entry["value"] for entry in run.best["val/score"]["top"]] == [2.0]
    assert results_in(tmp_path, "best.pt")["val/score"] == 2.0


@pytest.mark.parametrize("killed", [False, True])
def test_a_manifest_that_cannot_be_written_loses_no_best(tmp_path, monkeypatch, killed):
    """The file is sound, whatever the old manifest says; next(run), or a resumed run, lists it."""
    save = importlib.import_module("looptools.checkpoints.save")
    real, full = save.write_manifest, []

    def write_manifest(folder, manifest):
        if full:
            raise OSError("planted: no space left")
        real(folder, manifest)

    monkeypatch.setattr(save, "write_manifest", write_manifest)
    run = scores([1.0, 2.0], tmp_path, best=lt.highest("val/score"))
    next(run)
    full.append(True)
    with pytest.raises(OSError, match="planted"):
        next(run)
    assert run.best["val/score"]["value"] == 1.0
    scores([0.0], tmp_path).resume(tmp_path / "best.pt")
    full.clear()
    if killed:  # the resumed one is worse where the lost one was best
        run = scores([0.0], tmp_path, best=lt.highest("val/score"))
        run.resume()
        assert (run.best["val/score"]["value"], run.progress.round) == (2.0, 1)
        run.extend(max_rounds=2)
    run.to_end()

    assert run.best["val/score"]["value"] == results_in(tmp_path, "best.pt")["val/score"] == 2.0
    if not killed:
        [listed] = json.loads((tmp_path / "checkpoints.json").read_text())["best"]
        assert (listed["value"], listed["crc32"]) == (2.0, zlib.crc32((tmp_path / "best.pt").read_bytes()))


def test_the_file_and_its_folder_are_safe_before_it_is_listed(tmp_path, monkeypatch):
    """Data on the disk, then the name, then the folder: after a power cut nothing that is listed is empty."""
    files, done = importlib.import_module("looptools.archives.files"), []
    fsync, replace = os.fsync, os.replace

    def recorded(name, real):
        def call(*args):
            kind = "folder" if name == "sync" and stat.S_ISDIR(os.fstat(args[0]).st_mode) else "file"
            done.append(f"{name} {kind if name == 'sync' else Path(args[1]).name}")
            return real(*args)

        return call

    monkeypatch.setattr(files.os, "fsync", recorded("sync", fsync))
    monkeypatch.setattr(files.os, "replace", recorded("replace", replace))
    scores([1.0], tmp_path).to_end()

    each = lambda name: ["sync file", f"replace {name}", "sync folder"]  # noqa: E731
    assert done == each("epoch_0000-iteration_000000.pt") + each("checkpoints.json")


def test_of_equals_the_older_one_stays_ranked(tmp_path):
    """By the iteration at which it was measured."""
    left = iter([1.0, 2.0, 2.0, 2.0])
    train = lt.train(None, [0.0], lambda model, batch: {"x": batch})
    val = lt.validate(None, lambda: [next(left)], lambda model, batch: {"score": batch})
    run = lt.workflow([(train, 1), (val, 1)], max_epochs=4)
    run = run | lt.checkpoint(tmp_path, best=lt.highest("val/score", top=2))
    run.to_end()

    assert [entry["iteration"] for entry in run.best["val/score"]["top"]] == [2, 3]
    assert run.best["val/score"]["iteration"] == 2


def test_nothing_is_saved_where_an_iteration_is_only_replayed(tmp_path):
    """A state that is computed again to get back somewhere was saved already."""

    def replays(states):
        for state in states:
            state.replayed = state.plan.round == 0
            yield state

    values = iter([1.0, 2.0])
    val = lt.validate(None, lambda: [next(values)], lambda model, batch: {"score": batch})
    run = lt.workflow([(val | replays, 1)], max_rounds=2)
    (run | lt.checkpoint(tmp_path, best=lt.highest("val/score", top=2))).to_end()

    assert [entry["round"] for entry in json.loads((tmp_path / "checkpoints.json").read_text())["checkpoints"]] == [2]
    assert len(best_names(tmp_path)) == 2


@pytest.mark.parametrize("folder", ["new/folder", Path("new/folder")])
def test_saving_by_hand_between_two_iterations(tmp_path, monkeypatch, folder):
    """Into a folder that is made; within an iteration it is refused, and into another run's folder."""
    monkeypatch.chdir(tmp_path)
    run = piped(Case())
    list(run.take(7 + 3))
    run.save(folder)
    assert names(tmp_path / folder) == ["epoch_0001-iteration_000007.pt"]
    run.after("forward")
    with pytest.raises(RuntimeError, match=r"save: an iteration is open. Finish it first: next\(run\)."):
        run.save(folder)
    list(run.take(7))
    path = save(run, folder)

    assert path == Path(folder) / "epoch_0001-iteration_000010.pt"
    with pytest.raises(FileExistsError, match="save: .* holds the checkpoints of another run"):
        piped(Case()).save(folder)


def test_what_is_saved_by_hand_at_the_end_of_a_pass_can_be_gone_on_from(tmp_path):
    """As what the checkpoint part saves there."""
    run = piped(Case())
    list(run.take(14))
    run.save(tmp_path)
    run.to_end()
    again = piped(Case())
    again.resume(tmp_path)
    again.to_end()

    assert_same(again.model.state_dict(), run.model.state_dict())


def test_every_file_holds_plain_weights_that_load_into_a_model(tmp_path):
    """Under "weights", sharing storage with "models", so that they cost nothing."""
    run = piped(Case()) | lt.checkpoint(tmp_path, best=lt.lowest("val/loss"))
    run.to_end()

    for name in names(tmp_path):
        file = torch.load(tmp_path / name, weights_only=True)
        assert_same(file["weights"], file["models"]["model"])
        assert all(file["weights"][k].data_ptr() == v.data_ptr() for k, v in file["models"]["model"].items())
        network().load_state_dict(file["weights"])


class Doubled(nn.Module):
    """As `torch.compile` wraps a model, without compiling it."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model

    def forward(self, x):
        return self._orig_mod(x)


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, Doubled, lambda m: AveragedModel(Doubled(m))])
def test_wrappers_are_taken_off_the_weights(tmp_path, wrap):
    """Also one within another."""
    model = network()
    val = lt.validate(wrap(model), loader(), classify)
    (lt.workflow([(val, 1)], max_rounds=1) | lt.checkpoint(tmp_path, best=lt.lowest("val/loss"))).to_end()

    assert_same(torch.load(tmp_path / "best.pt", weights_only=True)["weights"], model.state_dict())


def test_the_best_file_holds_the_weights_that_were_measured(tmp_path):
    """The averaged ones, if they are what is validated; by its own name in the file, which goes on with both."""
    model, optimizer, train, val = Case(epochs=3).make()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    phase = lt.train(model, train, classify) | lt.optimize(optimizer) | lt.ema(averaged)
    run = lt.workflow([(phase, 1), (lt.validate(averaged, val, classify), 1)], max_epochs=3)
    run = run | lt.checkpoint(tmp_path, keep=None, best=lt.lowest("val/loss"))
    judged = {}
    for state in run:
        if state.round_last:
            weights = {key: value.clone() for key, value in averaged.module.state_dict().items()}
            judged[run.progress.epoch] = (run.results["val/loss"], weights)

    file = torch.load(tmp_path / "best.pt", weights_only=True)
    assert_same(file["weights"], min(judged.values(), key=lambda pair: pair[0])[1])
    assert list(file["models"]) == ["model", "averaged"]
    last = torch.load(tmp_path / names(tmp_path)[-1], weights_only=True)
    assert_same(last["weights"], model.state_dict())
    assert not torch.equal(last["weights"]["0.weight"], judged[3][1]["0.weight"])


@pytest.mark.parametrize(
    ("best", "error", "words"),
    [
        ("val/loss", TypeError, r"best must be lt.highest\(\"val/accuracy\"\) or lt.lowest"),
        ([lt.lowest("val/loss"), 3], TypeError, "best must be"),
        ([lt.lowest("val/loss"), lt.highest("val/loss")], ValueError, 'best has "val/loss" twice.* give top='),
    ],
)
def test_bad_criteria_are_refused_where_they_are_typed(best, error, words):
    """Before there is a run."""
    with pytest.raises(error, match=f"^checkpoint: {words}"):
        lt.checkpoint("folder", best=best)


def test_a_target_can_say_when_to_save(tmp_path):
    """At the end of each pass that reaches it."""
    run = scores([1.0, 3.0, 2.0, 4.0], tmp_path, every=lt.target("val/score", at_least=2.5), keep=None)
    run.to_end()

    assert len(names(tmp_path)) == 2
