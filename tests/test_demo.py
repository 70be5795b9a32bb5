import functools
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import looptools as lt
from looptools.__main__ import main
from looptools.demo import network


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "digits"
    assert main(["demo", "--out", str(folder), "--epochs", "2"]) == 0
    return folder


@pytest.fixture
def out(two_epochs, tmp_path):
    """A copy of what two epochs left, to go on from."""
    return shutil.copytree(two_epochs, tmp_path / "digits")


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def passes(folder):
    return [(row["epoch"], row["phase"]) for row in rows(folder) if row["kind"] == "pass"]


def test_demo_leaves_plot_log_and_tensorboard(two_epochs):
    """One command is enough to have curves to look at, numbers to read and TensorBoard files."""
    row = rows(two_epochs)[-1]

    assert row["phase"] == "val"
    assert row["iteration"] == 2 * 45 - 1
    assert row["accuracy"] > 0.9
    assert passes(two_epochs) == [(0, "train"), (0, "val"), (1, "train"), (1, "val")]
    assert (two_epochs / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(two_epochs.glob("tensorboard/*/events.out.tfevents.*"))) == 2


def test_best_checkpoint_loads_as_the_demo_says(two_epochs):
    """The weights in best.pt go into the demo's network, with no code run on the way."""
    best = torch.load(two_epochs / "best.pt", weights_only=True)
    model = network()
    model.load_state_dict(best["weights"])

    accuracies = [row["accuracy"] for row in rows(two_epochs) if row["phase"] == "val"]
    assert best["best"]["val/accuracy"]["value"] == max(accuracies)


@pytest.mark.parametrize("epochs", ["2", "1"])
def test_same_folder_again_is_done_already(out, capsys, epochs):
    """Nothing is trained twice: the second call says so, shows the results and leaves the log as it is."""
    before = rows(out)

    assert main(["demo", "--out", str(out), "--epochs", epochs]) == 0

    text = capsys.readouterr().out
    assert text.startswith(f"Done already: 2 epochs, in {out}.")
    assert "Best accuracy: 0.9" in text
    assert rows(out) == before


def test_more_epochs_go_on_where_it_stood(out, capsys):
    """With a larger --epochs the same folder is continued: no epoch twice, none left out."""
    assert main(["demo", "--out", str(out), "--epochs", "3"]) == 0

    assert capsys.readouterr().out.startswith(f"Going on from {out / 'epoch_0002-iteration_000090.pt'}.")
    assert passes(out) == [(epoch, phase) for epoch in range(3) for phase in ("train", "val")]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send SIGINT to one process alone")
def test_ctrl_c_says_how_to_go_on(tmp_path):
    """Ctrl-C ends the demo with one hint and status 130, and the hint's command loses and repeats no epoch."""
    words = [sys.executable, "-u", "-m", "looptools", "demo", "--out", str(tmp_path), "--epochs", "100"]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # in a background job it is ignored
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed) as process:
        while not process.stdout.readline().startswith("val "):
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]

    assert process.returncode == 130
    assert errors.endswith(f"-m looptools demo --out {tmp_path} --epochs 100\n")
    assert "Traceback" not in errors
    done = json.loads((tmp_path / "checkpoints.json").read_text())["checkpoints"][-1]["epoch"]
    assert main(["demo", "--out", str(tmp_path), "--epochs", str(done + 1)]) == 0
    assert passes(tmp_path) == [(epoch, phase) for epoch in range(done + 1) for phase in ("train", "val")]


@pytest.mark.parametrize("epochs", ["0", "-1", "abc", "1.5", "²"])
def test_epochs_must_be_a_whole_number_from_1(capsys, epochs):
    """A bad --epochs is refused before anything is imported or written, with what was given."""
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--epochs", epochs])

    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"python -m looptools demo: error: argument --epochs: must be a whole number from 1, got {epochs!r}"


def test_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    """An --out that is a file is refused with its name and the cure, not with a traceback."""
    file = tmp_path / "file"
    file.touch()

    assert main(["demo", "--out", str(file)]) == 1

    error = capsys.readouterr().err
    assert error.startswith(f"python -m looptools demo: error: cannot write to {file}: ")
    assert error.endswith("Give another folder: --out DIR\n")
    assert error.count("\n") == 1


def test_missing_extra_is_named(monkeypatch, capsys):
    """Without the demo's packages, one line says which is missing and how to install it."""
    monkeypatch.setitem(sys.modules, "sklearn", None)

    assert main(["demo"]) == 1

    assert capsys.readouterr().err == (
        "python -m looptools demo: error: scikit-learn not found. "
        'Install the extra: pip install "torch-looptools[demo]"\n'
    )


def test_without_a_command_it_prints_help(capsys):
    """`python -m looptools` shows what there is, --version which one it is; an unknown word is an error."""
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out

    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"looptools {lt.__version__}\n"

    with pytest.raises(SystemExit, match="2"):
        main(["train"])
    assert "invalid choice: 'train'" in capsys.readouterr().err
