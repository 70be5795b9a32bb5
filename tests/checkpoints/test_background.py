"""Saving while training goes on: the same files, and nothing lost in silence."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter

import attrs
import pytest
import torch
from loops import Case, assert_same, by_hand, device_reads, network, piped
from torch import nn

import looptools as lt
from looptools.checkpoints.background import Background, Buffers
from looptools.checkpoints.tree import capture

save_module = importlib.import_module("looptools.checkpoints.save")
HARD = Case(optimizer="AdamW", max_norm=0.5, accumulate=3, cosine=True, epochs=4)


def names(folder):
    return sorted(path.name for path in folder.glob("*.pt"))


def scores(values, folder, **options):
    """A run whose validation gives *values*, one a round; saved in the background."""
    left = iter(values)
    val = lt.validate(None, lambda: [next(left)], lambda model, batch: {"score": batch})
    run = lt.workflow([(val, 1)], max_rounds=len(values))
    return run | lt.checkpoint(folder, background=True, **options)


def in_bytes(tree):
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()


class Gate:
    """Holds `write` back until it is opened, and has it fail as often as it is told to."""

    def __init__(self, monkeypatch):
        self.open, self.fails, self.began, self.written = threading.Event(), 0, threading.Event(), []
        self.open.set()
        self.real = save_module.write
        monkeypatch.setattr(save_module, "write", self.write)

    def write(self, path, tree):
        self.began.set()
        assert self.open.wait(60)
        if self.fails:
            self.fails -= 1
            raise OSError(errno.ENOSPC, "planted: no space left", str(path))
        self.written.append(path.name)
        return self.real(path, tree)


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


# The copy


def everything():
    """A tree of all kinds that a checkpoint may hold."""
    model, base = network(), torch.arange(12.0)
    adam = torch.optim.AdamW(model.parameters())
    model(torch.ones(4, 3)).sum().backward()
    adam.step()
    twice = [1, base]
    return {
        "model": model.state_dict(),
        "weights": dict(model.state_dict()),
        "adam": adam.state_dict(),
        "views": (base[3:7], base.view(3, 4).t(), base.expand(2, 12)),
        "empty": [torch.empty(0), torch.empty(0), torch.tensor(3)],
        "kinds": [torch.ones(3, dtype=kind) for kind in (torch.bfloat16, torch.int8, torch.bool, torch.complex64)],
        "twice": [twice, twice],
        "others": [Counter("aab"), {1, 2}, None, "text", torch.Size([2]), torch.float32],
        "parameter": [model[0].weight, nn.Parameter(base, requires_grad=False)],
    }


def test_a_file_of_the_copy_is_that_of_the_original_to_the_byte():
    """Views, shared storages, versions of layers: all as it was."""
    tree = everything()

    assert in_bytes(Buffers().copy(tree)) == in_bytes(tree)


def test_the_copy_stays_as_it_was():
    """Whatever happens to tensors and containers afterwards."""
    weight, inner = torch.ones(2), [1]
    copied = Buffers().copy({"weight": weight, "view": weight[1:], "inner": inner})
    weight.add_(1)
    inner.append(2)

    assert (copied["weight"].tolist(), copied["view"].tolist(), copied["inner"]) == ([1, 1], [1], [1])
    assert copied["view"].data_ptr() == copied["weight"].data_ptr() + 4


def test_the_memory_is_used_again():
    """For the same sizes, in whatever order; another size takes new memory, and the old one is let go."""
    buffers = Buffers()
    first = buffers.copy([torch.ones(2), torch.ones(300)])
    places = [tensor.data_ptr() for tensor in first]
    second = buffers.copy([torch.zeros(300, dtype=torch.int32), torch.zeros(2)])
    third = buffers.copy([torch.ones(2)])

    assert [tensor.data_ptr() for tensor in second] == places[::-1]
    assert third[0].data_ptr() == places[0]
    assert list(buffers._kept) == [(8, False)]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(2).to_sparse(),
        torch.tensor([1 + 2j]).conj(),
        torch.ones(2).as_subclass(type("Own", (torch.Tensor,), {})),
    ],
    ids=["sparse", "conjugate", "subclass"],
)
def test_tensors_that_are_no_plain_view_of_a_storage_are_cloned(tensor):
    """With equal values, and of their own kind."""
    copied = Buffers().copy(tensor)

    assert copied is not tensor
    assert type(copied) is type(tensor)
    assert torch.equal(
        copied.to_dense() if copied.is_sparse else copied, tensor.to_dense() if tensor.is_sparse else tensor
    )


def test_a_tensor_without_numbers_is_handed_on():
    """On the meta device, or of a lazy layer that has not seen a batch."""
    lazy, meta = nn.LazyLinear(1).weight, torch.empty(3, device="meta")

    assert Buffers().copy([lazy, meta]) == [lazy, meta]


def test_requires_grad_stays():
    """Of leaves and of what was computed; the copy is a leaf."""
    weight = torch.ones(2, requires_grad=True)
    copied = Buffers().copy([weight, weight * 2, torch.ones(2)])

    assert [tensor.requires_grad for tensor in copied] == [True, True, False]
    assert all(tensor.is_leaf for tensor in copied)


# The thread


def test_what_it_raises_is_told_once():
    """With a note; then it can be used again."""
    done, background = [], Background()
    background.start(lambda: 1 / 0, "checkpoint: it failed.")

    with pytest.raises(ZeroDivisionError) as caught:
        background.wait()
    assert caught.value.__notes__ == ["checkpoint: it failed."]
    background.wait()
    background.start(lambda: done.append(1), "")
    background.wait()
    assert done == [1]


# In a run


@pytest.mark.parametrize("case", [HARD, Case(workers=2)], ids=["hard", "workers"])
def test_a_run_goes_on_from_it_to_the_same_bits(tmp_path, case):
    """Saved every five iterations while training went on; DataLoader workers are forked meanwhile."""
    with piped(case) | lt.checkpoint(tmp_path, every=5, background=True) as first:
        list(first.take(14 + 6))
    run = piped(case) | lt.checkpoint(tmp_path, background=True)
    path = run.resume()
    run.to_end()

    assert path.name == "epoch_0001-iteration_000010.pt"
    assert_same(run.model.state_dict(), by_hand(case))


def test_what_is_saved_is_of_the_boundary_though_training_goes_on(tmp_path, gate):
    """The write is held back while the weights move on."""
    run = piped(attrs.evolve(HARD, accumulate=1)) | lt.checkpoint(tmp_path, every=3, background=True)
    list(run.take(2))
    gate.open.clear()
    next(run)
    tree = Buffers().copy(capture(run))
    assert gate.began.wait(60)
    list(run.take(2))
    moved = {key: value.clone() for key, value in run.model.state_dict().items()}
    gate.open.set()
    run.close()

    saved = torch.load(tmp_path / names(tmp_path)[0], weights_only=True)
    assert not torch.equal(saved["weights"]["0.weight"], moved["0.weight"])
    for part in ("models", "optimizers", "generators", "parts", "sources", "results"):
        assert in_bytes(saved[part]) == in_bytes(tree[part]), part


def test_the_files_are_those_of_a_run_that_waits(tmp_path):
    """Checkpoints, the best ones and the manifest, but for the id and the clock."""

    def files(folder, background):
        best = [lt.highest("val/accuracy", top=2), lt.lowest("train/loss")]
        part = lt.checkpoint(folder, every=2, keep=3, best=best, background=background)
        (piped(Case(epochs=3)) | part).to_end()
        listed = json.loads((folder / "checkpoints.json").read_text())
        own = {key: listed[key] for key in ("checkpoints", "best")}
        for entry in [*own["checkpoints"], *own["best"]]:
            del entry["crc32"], entry["bytes"]  # a clock may need more digits
        return own, {name: torch.load(folder / name, weights_only=True) for name in names(folder)}

    (waits, held), (goes_on, own) = files(tmp_path / "a", False), files(tmp_path / "b", True)

    assert goes_on == waits
    assert list(own) == list(held)
    for name in own:
        assert_same(own[name]["weights"], held[name]["weights"])
        assert in_bytes(own[name]["optimizers"]) == in_bytes(held[name]["optimizers"])
        assert own[name]["best"] == held[name]["best"]


def test_the_next_save_waits_for_the_one_before(tmp_path, gate):
    """One write at a time: so the copies are not overwritten while they are read."""
    run = scores([1.0, 2.0, 3.0], tmp_path)
    gate.open.clear()
    next(run)
    timer = threading.Timer(0.1, gate.open.set)
    timer.start()
    next(run)

    assert gate.open.is_set()
    assert gate.written[:1] == ["epoch_0000-iteration_000000.pt"]
    run.to_end()
    assert gate.written == [f"epoch_0000-iteration_000000{n}.pt" for n in ("", "-2", "-3")]


def test_an_error_is_raised_at_the_next_boundary_once(tmp_path, gate):
    """The original one, with a note; next(run) writes what could not be written, and the run goes on."""
    run = scores([1.0, 2.0, 3.0], tmp_path, every=lt.rounds(3), best=lt.highest("val/score"))
    gate.fails = 1
    next(run)
    assert run.best["val/score"]["value"] == 1.0
    run["checkpoint"]._saver.writer.join()

    with pytest.raises(OSError, match="planted") as caught:
        next(run)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.__notes__[0] == f"checkpoint: {tmp_path / 'best.pt'} could not be written in the background."
    assert "run/checkpoint" in caught.value.__notes__[1]
    assert run.best == {}
    assert names(tmp_path) == []
    next(run)
    assert run.best["val/score"]["value"] == 2.0
    run.to_end()
    assert gate.written == ["best.pt", "best.pt", "epoch_0000-iteration_000000.pt"]
    assert torch.load(tmp_path / "best.pt", weights_only=True)["results"] == {"val/score": 3.0}


def test_a_best_that_could_not_be_written_is_written_after_all(tmp_path, gate):
    """It comes from the copies, since the weights have moved on; a later and worse one does not take its place."""
    run = scores([3.0, 1.0, 2.0], tmp_path, every=lt.rounds(100), best=lt.highest("val/score"))
    gate.fails = 1
    next(run)
    with pytest.raises(OSError, match="planted"):
        run.to_end()
    run.to_end()

    assert run.best["val/score"]["value"] == 3.0
    assert torch.load(tmp_path / "best.pt", weights_only=True)["results"] == {"val/score": 3.0}


def test_what_was_skipped_is_written_with_the_next_one(tmp_path, gate):
    """run.skip() leaves it undone for now; it comes before the next one that is due."""
    run = scores([1.0, 2.0, 3.0, 4.0], tmp_path, every=lt.rounds(2), keep=None)
    list(run.take(1))
    gate.fails = 1
    next(run)
    run["checkpoint"]._saver.writer.join()
    with pytest.raises(OSError, match="planted"):
        next(run)
    run.skip()
    run.to_end()

    assert gate.written == ["epoch_0000-iteration_000000.pt", "epoch_0000-iteration_000000-2.pt"]
    results = [torch.load(tmp_path / name, weights_only=True)["results"]["val/score"] for name in gate.written]
    assert results == [2.0, 4.0]


def test_an_error_of_the_last_write_is_raised_when_the_run_ends(tmp_path, gate):
    """Not swallowed with the end of the loop; the earlier file stays, and the next try ends the run."""
    run = scores([1.0, 2.0], tmp_path)
    next(run)
    run["checkpoint"]._saver.writer.join()
    gate.fails = 1

    with pytest.raises(OSError, match="planted"):
        run.to_end()
    assert not run.ended
    assert names(tmp_path) == ["epoch_0000-iteration_000000.pt"]
    assert run.to_end() == {"val/score": 2.0}
    assert len(names(tmp_path)) == 2


def test_leaving_the_block_waits(tmp_path, gate):
    """Also with an exception of the loop's own, which is not hidden."""
    with pytest.raises(KeyError, match="own"), scores([1.0, 2.0, 3.0], tmp_path) as run:
        for _ in run:
            gate.open.clear()
            threading.Timer(0.1, gate.open.set).start()
            raise KeyError("own")

    assert gate.written == names(tmp_path) == ["epoch_0000-iteration_000000.pt"]
    run.to_end()
    assert len(names(tmp_path)) == 3


def test_a_replaced_part_finishes_first(tmp_path, gate):
    """The new one goes on in the same folder."""
    run = scores([1.0, 2.0], tmp_path)
    gate.open.clear()
    next(run)
    threading.Timer(0.1, gate.open.set).start()
    run.replace("checkpoint", lt.checkpoint(tmp_path, keep=1))

    assert len(names(tmp_path)) == 1
    run.to_end()
    assert names(tmp_path) == ["epoch_0000-iteration_000000-2.pt"]


def test_saving_by_hand_into_its_folder_waits(tmp_path, gate):
    """So that neither loses the other's entry in the manifest."""
    run = scores([1.0, 2.0], tmp_path)
    gate.open.clear()
    next(run)
    threading.Timer(0.1, gate.open.set).start()
    run.save(tmp_path)

    listed = json.loads((tmp_path / "checkpoints.json").read_text())["checkpoints"]
    assert [entry["number"] for entry in listed] == [1, 2]


def test_two_folders_are_written_beside_each_other(tmp_path, gate):
    """Neither waits for the other; both are there at the end."""
    run = scores([1.0, 2.0], tmp_path / "a") | lt.checkpoint(tmp_path / "b", background=True)
    gate.open.clear()
    next(run)
    gate.open.set()
    run.to_end()

    assert names(tmp_path / "a") == names(tmp_path / "b")
    numbers = [
        [entry["number"] for entry in json.loads((tmp_path / name / "checkpoints.json").read_text())["checkpoints"]]
        for name in "ab"
    ]
    assert numbers == [[1, 3], [2, 4]]


@pytest.mark.parametrize("background", [False, True])
def test_saving_now(tmp_path, gate, background):
    """What a signal asks for: the newest checkpoint if it is of this boundary, else a new one; on the disk."""
    run = piped(Case()) | lt.checkpoint(tmp_path, every=2, background=background)
    part = run["checkpoint"]
    list(run.take(2))
    assert part.save_now(run).name == "epoch_0000-iteration_000002.pt"
    next(run)
    assert part.save_now(run).name == "epoch_0000-iteration_000003.pt"
    assert part.save_now(run).name == "epoch_0000-iteration_000003.pt"

    assert gate.written == names(tmp_path) == [f"epoch_0000-iteration_00000{n}.pt" for n in (2, 3)]


def test_saving_now_tries_again_what_has_failed(tmp_path, gate):
    """With a word of warning, and once."""
    run = piped(Case()) | lt.checkpoint(tmp_path, every=2, background=True)
    gate.fails = 1
    list(run.take(2))
    with pytest.warns(UserWarning, match="planted: no space left.* in the background. Writing it again"):
        path = run["checkpoint"].save_now(run)

    assert gate.written == names(tmp_path) == [path.name] == ["epoch_0000-iteration_000002.pt"]
    list(run)


def test_it_reads_the_device_no_more_often(tmp_path):
    """Copying waits for the device once, and makes no numbers of tensors."""

    def reads(background):
        run = piped(HARD) | lt.checkpoint(tmp_path / str(background), every=2, background=background)
        list(run.take(3))
        with device_reads() as found:
            list(run.take(4))
        run.close()
        return sorted(found)

    assert reads(True) == reads(False)


# The process

SCRIPT = """
    import os, signal, sys, threading, time, torch
    sys.path.insert(0, {tests!r})
    import looptools as lt
    from loops import Case, piped
    import importlib
    save = importlib.import_module("looptools.checkpoints.save")
    real = save.write

    def write(path, tree):
        time.sleep(0.3)
        {then}
        return real(path, tree)

    torch.set_num_threads(1)
    run = piped(Case()) | lt.checkpoint({folder!r}, every=3, keep=None, background=True)
    list(run.take(3))
    run["checkpoint"]._saver.writer.join()
    save.write = write
    list(run.take(3))
    {last}
"""


def script(folder, then="pass", last="pass"):
    tests = os.path.dirname(importlib.import_module("loops").__file__)
    text = textwrap.dedent(SCRIPT).format(folder=str(folder), then=then, last=last, tests=tests)
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)


def test_the_interpreter_waits_for_it_at_exit(tmp_path):
    """Nobody has closed the run."""
    done = script(tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    assert names(tmp_path) == ["epoch_0000-iteration_000003.pt", "epoch_0000-iteration_000006.pt"]


def test_an_exception_that_ends_the_process_does_not_cut_it_off(tmp_path):
    """The traceback comes, and the checkpoint too."""
    done = script(tmp_path, last="raise KeyError('own')")

    assert done.returncode == 1
    assert "KeyError: 'own'" in done.stderr
    assert len(names(tmp_path)) == 2


def test_a_failure_that_nobody_asks_for_any_more_is_said_at_exit(tmp_path):
    """On stderr."""
    done = script(tmp_path, then="raise OSError('planted')")

    assert done.stderr.startswith("looptools: checkpoint: ")
    assert done.stderr.rstrip().endswith("06.pt could not be written in the background. OSError: planted")
    assert names(tmp_path) == ["epoch_0000-iteration_000003.pt"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_while_it_writes_harms_neither(tmp_path):
    """The child has no such thread, and says and writes nothing."""
    fork = "\nif os.fork() == 0:\n    sys.exit()\nos.wait()"
    done = script(tmp_path, last=fork)

    assert (done.returncode, done.stderr) == (0, "")
    assert len(names(tmp_path)) == 2


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_killed_while_it_writes(tmp_path):
    """The one before is gone on from."""
    done = script(tmp_path, then="os.kill(os.getpid(), signal.SIGKILL)", last="time.sleep(60)")
    assert done.returncode == -signal.SIGKILL

    run = piped(Case()) | lt.checkpoint(tmp_path)
    assert run.resume().name == "epoch_0000-iteration_000003.pt"
    run.to_end()
    assert_same(run.model.state_dict(), by_hand(Case()))


def test_a_word_that_is_no_yes_or_no_is_refused():
    """Where it is typed."""
    with pytest.raises(TypeError, match="background"):
        lt.checkpoint("folder", background="yes")
