"""`python -m looptools inspect`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from looptools.__main__ import main


@pytest.fixture
def weights(tmp_path):
    torch.save({"weight": torch.zeros(2, 3), "größe": torch.zeros(1)}, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def test_a_sound_file_is_shown(weights, capsys):
    """With what it holds; the exit status is 0."""
    assert main(["inspect", str(weights)]) == 0

    out, errors = capsys.readouterr()
    assert out.startswith(f"{weights}: sound, ")
    assert "weight float32 (2, 3)" in out
    assert not errors


def test_a_damaged_file_has_its_own_exit_status(weights, capsys):
    """1, for scripts; the report says what is wrong."""
    weights.write_bytes(weights.read_bytes()[:-50])

    assert main(["inspect", str(weights.parent)]) == 1

    assert "weights.pt  DAMAGED  " in capsys.readouterr().out


def test_a_wrong_path_is_one_line(tmp_path, capsys):
    """On stderr, with the exit status of a wrong use."""
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2

    out, errors = capsys.readouterr()
    assert not out
    assert errors == f"python -m looptools inspect: error: there is no file or folder {tmp_path / 'nowhere'}.\n"


def test_a_path_is_needed(capsys):
    """Its lack is a wrong use too."""
    with pytest.raises(SystemExit, match="2"):
        main(["inspect"])
    assert "the following arguments are required: PATH" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_letters_that_the_terminal_lacks_are_replaced(weights, encoding):
    """Rather than ending in an error."""
    done = subprocess.run(
        [sys.executable, "-m", "looptools", "inspect", str(weights)],
        env={"PYTHONIOENCODING": encoding, "PYTHONPATH": ":".join(path for path in sys.path if path)},
        capture_output=True,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    assert ("gr??e" if encoding == "ascii" else "größe") in done.stdout.decode(encoding)
