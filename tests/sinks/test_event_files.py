"""TensorBoard's files, read back with its own reader."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from loops import Case, classify, loader, piped
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

import looptools as lt


def events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def steps(folder, tag="loss"):
    return [event.step for event in events(folder).Scalars(tag)]


def test_train_and_val_overlay(tmp_path):
    """The same tag in a subfolder a phase: TensorBoard draws both into one chart."""
    run = piped(Case()) | lt.log(tmp_path, every=7, line=None)
    run.to_end()

    assert steps(tmp_path / "tensorboard/train") == [7, 14]
    assert (
        steps(tmp_path / "tensorboard/train", "pass/loss")
        == steps(tmp_path / "tensorboard/val", "pass/loss")
        == [7, 14]
    )
    last = events(tmp_path / "tensorboard/val").Scalars("pass/loss")[-1].value
    assert last == pytest.approx(run.results["val/loss"])


def test_texts_images_and_histograms_on_demand(tmp_path):
    """At the iteration where the run stands, in the folder of its phase."""
    run = piped(Case()) | lt.log(tmp_path, line=None)
    log = run["log"]
    log.text("note", "before")
    list(run.take(3))
    log.text("note", "hello")
    log.image("noise", torch.rand(3, 4, 6))
    log.histogram("weights", torch.arange(10.0))
    run.close()

    train = events(tmp_path / "tensorboard/train")
    [image], [histogram], [text] = (
        train.Images("noise"),
        train.Histograms("weights"),
        train.Tensors("note/text_summary"),
    )
    assert (image.step, image.height, image.width) == (3, 4, 6)
    assert (histogram.step, histogram.histogram_value.num, histogram.histogram_value.max) == (3, 10, 9)
    assert (text.step, text.tensor_proto.string_val) == (3, [b"hello"])
    assert events(tmp_path / "tensorboard/run").Tensors("note/text_summary")[0].step == 0


def test_figures_are_images(tmp_path):
    """Drawn, and left open."""
    from matplotlib.figure import Figure

    run = piped(Case()) | lt.log(tmp_path, line=None)
    next(run)
    run["log"].figure("curve", Figure(figsize=(2, 1), dpi=50))
    run.close()

    [image] = events(tmp_path / "tensorboard/train").Images("curve")
    assert (image.width, image.height) == (100, 50)


def test_hparams_with_final_results(tmp_path):
    """One session, flat and without secrets; the newest results stand in it when the log closes."""
    run = piped(Case()) | lt.log(tmp_path, line=None, hparams={"lr": 0.05, "hub": {"token": "hunter2"}, "none": None})
    list(run.take(7))
    assert "final/val/loss" not in events(tmp_path / "tensorboard/hparams").Tags()["scalars"]
    run.to_end()

    found = events(tmp_path / "tensorboard/hparams")
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = metadata.parse_session_start_info_plugin_data(content).hparams
    assert (values["lr"].number_value, values["hub.token"].string_value) == (0.05, "<redacted>")
    [final] = found.Scalars("final/val/accuracy")
    assert (final.step, final.value) == (14, pytest.approx(run.results["val/accuracy"]))
    assert len(list((tmp_path / "tensorboard/hparams").iterdir())) == 1


def test_a_fresh_run_sets_another_runs_folder_aside(tmp_path):
    """Curves of two runs in one folder cannot be told apart."""
    for epochs in (2, 1):
        (piped(Case(epochs=epochs)) | lt.log(tmp_path, every=7, line=None)).to_end()

    assert steps(tmp_path / "tensorboard.1/train") == [7, 14]
    assert steps(tmp_path / "tensorboard/train") == [7]


def test_sleeping_hides_nothing(tmp_path):
    """Files are closed and opened again; what was shown at the same iteration stays."""
    run = piped(Case()) | lt.log(tmp_path, every=1, line=None)
    with run:
        next(run)
        run["log"].image("noise", torch.rand(4, 4))
    run["log"].image("more", torch.rand(4, 4))
    list(run.take(2))
    run.close()

    train = events(tmp_path / "tensorboard/train")
    assert [event.step for event in train.Scalars("loss")] == [1, 2, 3]
    assert [train.Images(tag)[0].step for tag in ("noise", "more")] == [1, 1]


def test_resuming_at_once_hides_what_lies_behind_the_checkpoint(tmp_path, monkeypatch):
    """Files of the same second are numbered, and the tenth comes before the ninth for who sorts by name."""
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))

    def make():
        run = piped(Case()) | lt.log(tmp_path, every=2, line=None) | lt.checkpoint(tmp_path)
        run.resume()
        return run

    first = make()
    list(first.take(14 + 3))
    first.close()
    make().to_end()

    assert steps(tmp_path / "tensorboard/train") == [2, 4, 6, 8, 10, 12, 14]


def test_resuming_hides_it_though_the_clock_was_set_back(tmp_path, monkeypatch):
    """Nor does it wait for the clock."""

    def make():
        run = piped(Case()) | lt.log(tmp_path, every=2, line=None) | lt.checkpoint(tmp_path)
        run.resume()
        return run

    first = make()
    list(first.take(14 + 3))
    first.close()
    for path in (tmp_path / "tensorboard/train").iterdir():  # made tomorrow
        path.replace(path.with_name(path.name.replace(path.name.split(".")[3], f"{int(time.time()) + 86400}")))
    second = make()
    list(second.take(2))
    second.close()
    make().to_end()

    assert steps(tmp_path / "tensorboard/train") == [2, 4, 6, 8, 10, 12, 14]


def test_a_validation_before_training_is_at_step_0(tmp_path):
    """Its own iteration is 0, as that of the first one after it."""
    run = piped(Case(epochs=1)) | lt.log(tmp_path, line=None)
    val = lt.validate(run.model, loader(shuffle=False), classify)
    run.validate(val)
    run["log"].text("note", "at 0")
    next(run)
    run.validate(val)
    run.close()

    assert steps(tmp_path / "tensorboard/val-2", "pass/loss") == [0, 1]
    assert events(tmp_path / "tensorboard/run").Tensors("note/text_summary")[0].step == 0


KILLED = """if True:
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import torch
    from loops import Case, classify, loader, piped
    import looptools as lt

    folder = Path({folder!r})
    run = piped(Case(epochs=3)) | lt.log(folder, every=2, line=None, csv=True)
    run = run | lt.checkpoint(folder, every=lt.epochs(1))
    run.resume()
    for state in run:
        if state.trains and state.index == 1:
            run["log"].image("noise", torch.zeros(2, 2))
        if state.trains and state.iteration == {kill_at}:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_and_resumed_run_has_each_step_once(tmp_path):
    """The checkpoint at step 7 is from before the validation; training and validation behind it come again."""
    tests = str(Path(__file__).parent.parent)
    for kill_at in (11, 99):
        code = KILLED.format(tests=tests, folder=str(tmp_path), kill_at=kill_at)
        done = subprocess.run([sys.executable, "-W", "error", "-c", code], env={**os.environ, "PYTHONHASHSEED": "0"})
        assert done.returncode == (0 if kill_at == 99 else -signal.SIGKILL)

    board = tmp_path / "tensorboard"
    assert steps(board / "train") == list(range(2, 22, 2))
    assert steps(board / "train", "pass/loss") == steps(board / "val", "pass/loss") == [7, 14, 21]
    assert [event.step for event in events(board / "train").Images("noise")] == [2, 9, 16]
    whole = piped(Case(epochs=3))
    expected = {row["trained"]: row["loss"] for row in (whole.to_end(), whole.history)[1] if row["phase"] == "val"}
    got = {event.step: event.value for event in events(board / "val").Scalars("pass/loss")}
    assert got == pytest.approx(expected)
