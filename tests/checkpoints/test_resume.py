"""Going on from the end of a round, to the same bits."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from loops import Case, assert_same, by_hand, piped

import looptools as lt

HARD = Case(optimizer="AdamW", max_norm=0.5, accumulate=3, cosine=True, epochs=4)


def names(folder):
    return sorted(path.name for path in folder.glob("*.pt"))


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


def test_a_loader_with_its_own_generator_goes_on_with_its_order(tmp_path):
    """`DataLoader(generator=)` draws from a generator of its own, which is saved with the loader's place."""

    def make():
        generator = torch.Generator().manual_seed(7)
        loader = torch.utils.data.DataLoader(torch.arange(9.0), 2, shuffle=True, generator=generator)
        return lt.workflow([(lt.train(None, loader, lambda model, batch: {"x": batch.mean()}), 1)], max_epochs=4)

    order = [state.batch.tolist() for state in make()]
    first = make() | lt.checkpoint(tmp_path)
    list(first.take(12))
    run = make() | lt.checkpoint(tmp_path)
    run.resume()

    assert [state.batch.tolist() for state in run] == order[10:]


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


@pytest.mark.parametrize("rolling_first", [True, False])
def test_two_folders_of_one_run_are_gone_on_from(tmp_path, rolling_first):
    """A rolling one and an archive: from the newest of both, and on in both."""

    def make(epochs):
        parts = [
            lt.checkpoint(tmp_path / "rolling", keep=1),
            lt.checkpoint(tmp_path / "archive", every=lt.epochs(3), keep=None, at_end=False),
        ]
        first, second = parts if rolling_first else parts[::-1]
        return piped(Case(epochs=epochs)) | first | second

    make(4).to_end()
    run = make(6)
    path = run.resume()
    run.to_end()

    assert path == tmp_path / "rolling/epoch_0004-iteration_000028.pt"
    assert names(tmp_path / "rolling") == ["epoch_0006-iteration_000042.pt"]
    assert [name[:10] for name in names(tmp_path / "archive")] == ["epoch_0003", "epoch_0006"]
    other = piped(Case(epochs=6)) | lt.checkpoint(tmp_path / "new") | lt.checkpoint(tmp_path / "archive")
    with pytest.raises(FileExistsError, match="archive holds the checkpoints of another run"):
        next(other)


def test_a_folder_of_the_time_before_runs_had_ids(tmp_path):
    """It is gone on from as ever; a second one of its kind is another run's."""

    def make(epochs):
        return piped(Case(epochs=epochs)) | lt.checkpoint(tmp_path / "a") | lt.checkpoint(tmp_path / "b")

    make(1).to_end()
    for name in ("a", "b"):
        path = tmp_path / name / "checkpoints.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps({"format": 1, "checkpoints": content["checkpoints"], "best": content["best"]}))

    run = make(2)
    run.resume()
    with pytest.raises(FileExistsError, match="b holds the checkpoints of another run"):
        next(run)
    shutil.rmtree(tmp_path / "b")
    run.to_end()
    assert len(names(tmp_path / "a")) == 2


def test_a_runs_id_costs_no_random_number(tmp_path):
    """Neither torch's nor Python's generator moves for it."""
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    run = lt.workflow([(lt.validate(None, [1.0], lambda model, batch: {"x": batch}), 1)], max_rounds=1)
    (run | lt.checkpoint(tmp_path)).to_end()

    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert len(json.loads((tmp_path / "checkpoints.json").read_text())["run"]) == 32


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
    with pytest.warns(UserWarning, match=r"epoch_0003-.*pt is (damaged: .*|missing\.) Trying the one before"):
        path = run.resume()
    assert path.name == "epoch_0002-iteration_000014.pt"
    aside = [file.name for file in tmp_path.glob("*.damaged")]
    assert aside == ([] if harm == "remove" else ["epoch_0003-iteration_000021.pt.damaged"])
    run.to_end()
    assert_same(run.model.state_dict(), by_hand(Case(epochs=3)))
    assert lt.verify(tmp_path).sound


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


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"checkpoints": [{"file": "a"}]}', None])
def test_a_manifest_that_cannot_be_read_is_made_anew(tmp_path, content):
    """Not a fresh start: the files say what they are, and the newest is gone on from."""
    (piped(Case()) | lt.checkpoint(tmp_path)).to_end()
    (tmp_path / "checkpoints.json").unlink() if content is None else (tmp_path / "checkpoints.json").write_text(content)

    run = piped(Case()) | lt.checkpoint(tmp_path)
    with pytest.warns(UserWarning, match=r"checkpoints.json is (missing|damaged).* It is made anew from 2 checkpoints"):
        path = run.resume()
    assert (path.name, run.progress.epoch) == ("epoch_0002-iteration_000014.pt", 2)


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "file-alone"])
@pytest.mark.parametrize("name", ["best.pt", "epoch_0002-iteration_000014.pt"])
def test_a_flipped_bit_in_a_file_that_is_given_is_found(tmp_path, name, manifest):
    """By the manifest's checksum, else by those within the file, which torch.load itself does not look at."""
    (piped(Case()) | lt.checkpoint(tmp_path, best=lt.highest("val/accuracy"))).to_end()
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)
    if not manifest:
        (tmp_path / "checkpoints.json").unlink()

    with pytest.raises(RuntimeError, match=f"{name} is damaged: (its|the) checksum"):
        piped(Case()).resume(tmp_path / name)


@pytest.mark.parametrize(
    "content", [{"weight": torch.ones(2)}, [1, 2], None, b""], ids=["weights", "list", "none", "empty"]
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    """Weights alone, other data, an empty file."""
    path = tmp_path / "other.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)

    with pytest.raises(RuntimeError, match=r"other.pt is (not a checkpoint of a run|empty)"):
        piped(Case()).resume(path)


def test_the_end_of_a_training_pass_can_be_gone_on_from_too(tmp_path):
    """`every=lt.epochs(1)` saves before the validation: the resumed run begins with it."""
    first = piped(HARD) | lt.checkpoint(tmp_path, every=lt.epochs(1))
    list(first.take(14 + 9))
    run = piped(HARD) | lt.checkpoint(tmp_path, every=lt.epochs(1))
    run.resume()

    assert next(run).phase == "val"
    run.to_end()
    assert_same(run.model.state_dict(), by_hand(HARD))


def test_a_run_that_was_stopped_stays_stopped_when_it_is_resumed(tmp_path):
    """Until it is extended."""
    first = piped(HARD) | lt.checkpoint(tmp_path) | stops_after_two_rounds
    first.to_end()
    run = piped(HARD) | lt.checkpoint(tmp_path) | stops_after_two_rounds
    run.resume()

    assert list(run) == []
    assert run.ended == "enough"
    run.extend(max_epochs=4)
    assert next(run).epoch == 2


def stops_after_two_rounds(states):
    for state in states:
        if state.round_last and state.plan.round == 1:
            state.stop("enough")
        yield state
