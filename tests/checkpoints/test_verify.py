"""What is said of files and folders, sound and damaged."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hostile import CORPUS, made, sealed, text
from loops import Case, piped

import looptools as lt
from looptools.archives.files import write


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two epochs with a checkpoint every 5 iterations, the last one within a pass, and the best one."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    part = lt.checkpoint(folder, every=5, best=lt.highest("val/accuracy"), at_end=False)
    (piped(Case(optimizer="AdamW")) | part).to_end()
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy, to do harm to."""
    return shutil.copytree(trained, tmp_path / "run")


FIRST, SECOND = "epoch_0000-iteration_000005.pt", "epoch_0001-iteration_000010.pt"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def bytes_of(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_sound_folder_is_listed(folder):
    """Checkpoints newest first, then the best; the one that a resumption takes is marked."""
    report = lt.verify(folder)

    assert report.sound
    assert [file.name for file in report.files] == [SECOND, FIRST, "best.pt"]
    assert [file.newest for file in report.files] == [True, False, False]
    assert [file.bytes for file in report.files] == [(folder / file.name).stat().st_size for file in report.files]
    assert "epoch 1, iteration 10, round 1, within train, 3 batches done" in report.files[0].what
    assert report.files[2].what.startswith("best val/accuracy: 0.")
    assert repr(report).startswith(f"{folder}: sound\n* {SECOND}")
    assert not report.problems
    assert not report.leftovers


def test_a_damaged_file_is_named_and_the_one_before_is_the_newest(folder):
    """As run.resume() would have it."""
    flip(folder / SECOND)

    report = lt.verify(folder)

    assert not report.sound
    assert [file.name for file in report.files if not file.sound] == [SECOND]
    assert report.files[0].problem == "its checksum is wrong"
    assert [file.name for file in report.files if file.newest] == [FIRST]
    assert f"{SECOND}  DAMAGED  its checksum is wrong (checkpoint 2: epoch 1, iteration 10)" in repr(report)
    assert "1 of 3 files damaged" in report._repr_html_()


def test_a_missing_file_is_damage(folder):
    """It is in the list."""
    (folder / SECOND).unlink()

    assert lt.verify(folder).files[0].problem == "it is missing"
    assert not lt.verify(folder).sound


def test_what_nobody_needs_is_named(folder):
    """Files of killed and of damaged saves, and those that the run does not know; that is no damage."""
    for name in (f".{SECOND}.tmp", ".checkpoints.json.tmp", "epoch_0000-iteration_000001.pt.damaged-2", "notes.txt"):
        (folder / name).touch()
    torch.save(torch.nn.Linear(2, 2).state_dict(), folder / "mine.pt")

    report = lt.verify(folder)

    assert report.sound
    assert report.files[-1].what == "weights: 2 tensors of 24 bytes"
    assert report.leftovers == [
        ".checkpoints.json.tmp is left from a save that was not finished",
        f".{SECOND}.tmp is left from a save that was not finished",
        "epoch_0000-iteration_000001.pt.damaged-2 was set aside, since it was damaged",
        "mine.pt is not in checkpoints.json",
    ]


@pytest.mark.parametrize("text", [None, "x", "{}", '{"format": 1, "checkpoints": [{"number": 1}]}'])
def test_a_lost_list_is_a_problem_and_the_files_are_found(folder, text):
    """They say themselves what they are; nothing is written."""
    (folder / "checkpoints.json").unlink()
    if text is not None:
        (folder / "checkpoints.json").write_text(text)

    report = lt.verify(folder)

    assert not report.sound
    assert report.problems[0].startswith(f"checkpoints.json is {'damaged' if text else 'missing'}")
    assert [file.name for file in report.files if file.newest] == [SECOND]
    assert all(file.sound for file in report.files)


def test_a_list_of_a_later_version_is_left_alone(folder):
    """It is said."""
    content = json.loads((folder / "checkpoints.json").read_text())
    (folder / "checkpoints.json").write_text(json.dumps({**content, "format": 1, "checkpoints": [], "best": []}))
    assert lt.verify(folder).sound
    (folder / "checkpoints.json").write_text('{"format": 99, "crc32": 0}')

    assert not lt.verify(folder).sound


def test_a_name_that_leads_out_of_the_folder_is_not_followed(folder):
    """The list may have come from anywhere."""
    content = json.loads((folder / "checkpoints.json").read_text())
    entries = [{**entry, "file": "../run/" + entry["file"]} for entry in content["checkpoints"]]
    (folder / "checkpoints.json").write_text(json.dumps({"format": 1, "checkpoints": entries}))

    report = lt.verify(folder)
    assert not report.sound
    assert "which is no checkpoint in its folder" in repr(report)


def test_nothing_on_the_disk_is_changed(folder):
    """Whatever is damaged."""
    flip(folder / SECOND)
    (folder / "checkpoints.json").write_text("x")
    (folder / ".x.pt.tmp").touch()
    before = bytes_of(folder)

    lt.verify(folder)

    assert bytes_of(folder) == before


def test_no_tensor_is_loaded(folder, monkeypatch):
    """So it is quick, and harmless."""
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("it was loaded"))

    assert lt.verify(folder).sound
    assert lt.verify(folder / SECOND).sound


def test_of_a_single_file_all_is_said(folder):
    """How far the run was, what it holds, and with what it was saved."""
    said = repr(lt.verify(folder / SECOND))

    assert said.startswith(f"{folder / SECOND}: sound, ")
    for line in (
        "done                 epoch 1, iteration 10, round 1, within train, 3 batches done",
        "updates              optimizer 10",
        f"written by           torch {torch.__version__}, format 2",
        "pipe                  1 train/forward(step=classify)",
        "data of train        batches 7, samples 26, batch size 4",
        "generators           python, torch",
        "model model          9 tensors, 83 elements, 336 bytes",
        "                     0.weight float32 (8, 3)",
        "                     and 1 more",
        "optimizer optimizer  18 tensors, 138 elements, 552 bytes",
        "weights              9 tensors, 83 elements, 336 bytes",
    ):
        assert f"\n  {line}" in said


def test_weights_of_others_are_described(tmp_path):
    """A plain state dict, one within a dictionary, and safetensors."""
    model = torch.nn.Linear(2, 3)
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "within.pt")
    lt.save_weights(model, tmp_path / "other.safetensors")

    assert "  weight float32 (3, 2)" in repr(lt.verify(tmp_path / "plain.pt"))
    assert "epoch       3\n" in repr(lt.verify(tmp_path / "within.pt"))
    assert "  weight float32 (3, 2)" in repr(lt.verify(tmp_path / "other.safetensors"))
    flip(tmp_path / "other.safetensors")
    report = lt.verify(tmp_path)
    assert [(file.name, file.sound) for file in report.files] == [
        ("other.safetensors", False),
        ("plain.pt", True),
        ("within.pt", True),
    ]


@pytest.mark.parametrize("name", ["os.system", "stride 0", "legacy format", "billion laughs"])
def test_hostile_files_are_unsound(name, tmp_path):
    """With the reason."""
    (tmp_path / "file.pt").write_bytes(CORPUS[name][0]())

    report = lt.verify(tmp_path / "file.pt")

    assert not report.sound
    assert "file.pt  DAMAGED" in repr(report)


@pytest.mark.parametrize("value", [None, 5, [], {}, "x", {"x": []}, {1: {2: 3}}, [[1, 2]], [None] * 200, -1.5])
def test_a_checkpoint_that_is_not_as_it_should_be_is_described_all_the_same(value, tmp_path):
    """Every field may be anything."""
    keys = ["run", "progress", "pass", "pipe", "options", "description", "fingerprint", "results", "best", "generators"]
    keys += ["models", "optimizers", "parts", "weights", "torch", "stopping", "format"]
    for key in keys:
        tree = {"format": 2, "run": {}, "progress": {}, key: value}
        write(tmp_path / "file.pt", tree)

        report = lt.verify(tmp_path / "file.pt")

        assert report.sound, (key, report)
        assert "written by" in repr(report)


def test_a_description_beside_the_pipe_is_shown(tmp_path):
    """Pairs of name and options."""
    tree = {"format": 2, "run": {}, "progress": {}, "pipe": ["a", "b"], "description": [["a", "x=1"], ["b", ""]]}
    write(tmp_path / "file.pt", tree)

    assert ("pipe", " 1 a(x=1)") in lt.verify(tmp_path / "file.pt").files[0].rows


def test_text_in_a_file_cannot_steer_the_terminal_or_the_page(tmp_path):
    """It is shown as text, on its line."""
    (tmp_path / "file.pt").write_bytes(sealed(made(b"}" + text("\x1b[2J<script>\n\u202e") + b"Ns")))

    report = lt.verify(tmp_path / "file.pt")

    assert "?[2J<script>??  None" in repr(report)
    assert "<script>" not in report._repr_html_()


def test_an_empty_folder_holds_nothing(tmp_path):
    """That is no damage."""
    assert repr(lt.verify(tmp_path)) == f"{tmp_path}: no checkpoints and no weights"


def test_what_is_not_there_is_an_error(tmp_path):
    """Python's own, which begins with the name that was typed."""
    with pytest.raises(FileNotFoundError, match=r"^verify: there is no file or folder .*nowhere"):
        lt.verify(tmp_path / "nowhere")
