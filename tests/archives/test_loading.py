"""Only what is whole and harmless is loaded, and nothing can talk it into more."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hostile import CORPUS, SENTINEL, SetsState, archive, pickled, records, saved, sealed, tensor

from looptools.archives.contents import Refused
from looptools.archives.files import Damaged, write
from looptools.archives.loading import load

CAMPAIGN = Path(__file__).parent.parent / "campaigns" / "fuzz_loading.py"
TREE = {"format": 2, "run": {"id": "abc", "number": 1}, "progress": {"epoch": 3}, "weight": torch.arange(4.0)}


@pytest.fixture
def checkpoint(tmp_path):
    """What a run would have written."""
    write(tmp_path / "file.pt", TREE)
    return tmp_path / "file.pt"


def test_a_checkpoint_comes_back(checkpoint):
    """As it was written."""
    tree = load(checkpoint)

    assert {**tree, "weight": 0} == {**TREE, "weight": 0}
    assert torch.equal(tree["weight"], TREE["weight"])


def test_weights_of_others_come_back(tmp_path):
    """They have no trailer; the checksums of their archive are looked at."""
    model = torch.nn.Linear(2, 3)
    torch.save(model.state_dict(), tmp_path / "file.pt")

    assert torch.equal(load(str(tmp_path / "file.pt"))["weight"], model.weight)


@pytest.mark.parametrize("whole", [True, False], ids=["sealed", "bare"])
@pytest.mark.parametrize("name", CORPUS)
def test_hostile_files_are_not_loaded(name, whole, tmp_path, monkeypatch):
    """Also those with right checksums, and where the environment asks torch.load for the unsafe way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("it was loaded"))
    data = CORPUS[name][0]()
    Path("file.pt").write_bytes(sealed(data) if whole else data)

    began = time.process_time()
    with pytest.raises((Refused, Damaged), match=r"^resume: file.pt "):
        load("file.pt")

    assert time.process_time() - began < 1
    assert not Path(SENTINEL).exists()


def test_torch_is_asked_for_weights_only_and_nothing_else(checkpoint, monkeypatch):
    """Explicitly: the environment could otherwise ask for the unsafe way."""
    monkeypatch.setattr(torch, "load", lambda *args, **options: (args, options))

    assert load(checkpoint) == ((checkpoint,), {"map_location": "cpu", "weights_only": True})


def test_a_class_that_the_user_trusts_is_refused_all_the_same(tmp_path, monkeypatch):
    """torch.load would give the file's data to its __setstate__."""
    monkeypatch.chdir(tmp_path)
    Path("file.pt").write_bytes(saved({"x": SetsState()}))

    with torch.serialization.safe_globals([SetsState]), pytest.raises(Refused, match=r"calls for hostile\.SetsState"):
        load("file.pt")
    assert not Path(SENTINEL).exists()


def test_the_environment_cannot_ask_for_the_unsafe_way(tmp_path, monkeypatch):
    """What is refused here is refused by torch.load too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setattr("looptools.archives.loading.examine", lambda *args: None)
    Path("file.pt").write_bytes(saved({"x": SetsState()}))

    with pytest.raises(Refused, match="cannot be read: Weights only load failed"):
        load("file.pt")
    assert not Path(SENTINEL).exists()


def test_a_checkpoint_without_its_trailer_is_damaged(tmp_path):
    """Nothing would be left to find a flipped bit with."""
    torch.save(TREE, tmp_path / "file.pt")

    with pytest.raises(Damaged, match="the checksum that a checkpoint ends with is gone"):
        load(tmp_path / "file.pt")
    torch.save({**TREE, "format": 1}, tmp_path / "file.pt")  # these never had one
    assert load(tmp_path / "file.pt")["format"] == 1


@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_a_flipped_bit_is_damage(checkpoint, place):
    """Anywhere, and named so."""
    data = bytearray(checkpoint.read_bytes())
    data[int(place * len(data))] ^= 1
    checkpoint.write_bytes(data)

    with pytest.raises(Damaged, match=f"verify: {checkpoint} is damaged: its checksum is wrong"):
        load(checkpoint, "verify")


def test_what_torch_does_not_load_is_refused_in_a_line(checkpoint, monkeypatch):
    """Without the page of advice that torch adds, which would have the user load it unsafely."""

    def fail(*args, **options):
        raise ValueError("Not this one.\nSet weights_only=False.")

    monkeypatch.setattr(torch, "load", fail)

    with pytest.raises(Refused, match=r"^resume: .*file.pt cannot be read: Not this one\.$"):
        load(checkpoint)


def test_another_byte_order_is_loaded(tmp_path):
    """Torch turns the bytes around."""
    data = archive(records(pickled(tensor()), **{"byteorder": b"big", "data/0": b"\x3f\x80\0\0" * 4}))
    (tmp_path / "file.pt").write_bytes(data)

    assert torch.equal(load(tmp_path / "file.pt"), torch.ones(4))


def test_a_missing_file_is_just_that(tmp_path):
    """No other error than Python's own."""
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "file.pt")


def test_files_that_are_changed_at_random_do_no_harm(tmp_path):
    """1,500 of them: a clean load or a typed error, no code, no crash, each in time. The campaign makes 100,000."""
    words = [sys.executable, str(CAMPAIGN), "--files", "1500", "--seed", "1", "--workers", "1"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "1,500 files" in done.stdout


def test_the_campaign_can_fail(tmp_path):
    """A loader that lets things through is found out."""
    words = [sys.executable, str(CAMPAIGN), "--files", "100", "--seed", "1", "--workers", "1", "--unsafe"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    assert done.returncode == 1
    assert "code has run" in done.stdout
