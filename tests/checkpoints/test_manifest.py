"""The list of checkpoints proves itself, and is made anew from the files where it is lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil

import pytest
import torch

import looptools as lt
from looptools.archives.files import write
from looptools.checkpoints import manifest as manifests
from looptools.checkpoints.lock import hold, let_go
from looptools.checkpoints.manifest import Manifest, read_manifest, readable_manifest, rebuilt, write_manifest

ENTRY = {"number": 1, "file": "epoch_0001-iteration_000002.pt", "epoch": 1, "iteration": 2, "bytes": 5, "crc32": 7}


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def scores(values, folder, **options):
    """A run whose validation gives *values*, one a round."""
    values = iter(values)
    train = lt.train(None, [0.0], lambda model, batch: {"x": batch})
    val = lt.validate(None, lambda: [next(values)], lambda model, batch: {"score": batch})
    return lt.workflow([(train, 1), (val, 1)], max_epochs=4) | lt.checkpoint(folder, **options)


@pytest.fixture
def folder(tmp_path):
    """Four checkpoints, and the second as the best, of which the list knows."""
    run = scores([1.0, 3.0, 2.0, 2.5], tmp_path / "run", keep=4, best=lt.highest("val/score", top=2))
    run.to_end()
    return tmp_path / "run"


def same(one, other):
    """All that the other says of the same files."""
    for mine, its in zip(one.checkpoints + one.best, other.checkpoints + other.best, strict=True):
        assert {key: its[key] for key in mine} == mine
    assert one.run == other.run
    return True


def test_a_list_is_read_as_it_was_written(tmp_path):
    """With what it holds in the order of the numbers."""
    later = {**ENTRY, "number": 2}
    write_manifest(tmp_path, Manifest("id", [later, ENTRY], [{"metric": "m"}]))

    assert read_manifest(tmp_path) == Manifest("id", [ENTRY, later], [{"metric": "m"}])
    assert json.loads((tmp_path / "checkpoints.json").read_text())["format"] == 2
    assert left(tmp_path) == ["checkpoints.json"]


def test_a_new_folder_has_none(tmp_path):
    """Nor has one with files of others, or one that is not there."""
    torch.save({}, tmp_path / "weights.pt")

    assert read_manifest(tmp_path) == read_manifest(tmp_path / "missing") == Manifest()


def test_every_flipped_bit_of_a_list_is_found(tmp_path):
    """Digits and names too; only a bit that changes nothing of what it says may pass."""
    path, before = tmp_path / "checkpoints.json", Manifest("id", [ENTRY], [])
    write_manifest(tmp_path, before)
    data = bytearray(path.read_bytes())
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        data[bit // 8] ^= 1 << bit % 8
        try:
            assert manifests.read_list(path) == before, bit
        except manifests.Broken:
            pass


@pytest.mark.parametrize("best", [[{"file": "best.pt"}], {"file": "best.pt"}, None])
def test_lists_of_older_versions_are_read(tmp_path, best):
    """They have no checksum, some no id, and once there was one best only."""
    content = {"format": 1, "checkpoints": [ENTRY], "best": best}
    (tmp_path / "checkpoints.json").write_text(json.dumps(content))

    assert read_manifest(tmp_path) == Manifest("", [ENTRY], [{"file": "best.pt"}] if best else [])


def test_a_list_of_a_later_version_is_refused(tmp_path):
    """It is sound, so it must not be made anew."""
    content = {"format": 3, "checkpoints": "elsewhere"}
    content["crc32"] = manifests._checksum(content)
    (tmp_path / "checkpoints.json").write_text(json.dumps(content))

    with pytest.raises(RuntimeError, match=r"^checkpoint: .*checkpoints.json has format 3; .* needs a newer looptools"):
        read_manifest(tmp_path)
    assert readable_manifest(tmp_path) == Manifest()


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b"\xff", b"[" * 100_000, "flipped"])
def test_a_lost_list_is_made_anew_from_the_files(folder, content):
    """This is said once; the damaged one is set aside, and the run goes on with all that it knew."""
    path, before = folder / "checkpoints.json", read_manifest(folder)
    if content is None:
        path.unlink()
    else:
        flipped = path.read_bytes().replace(b'"number": 4', b'"number": 5')
        path.write_bytes(flipped if content == "flipped" else content)

    with pytest.warns(UserWarning, match=r"checkpoints.json is (missing|damaged: .*)\. It is made anew from 4") as said:
        after = read_manifest(folder)
    assert len(said) == 1
    assert same(after, before)
    assert read_manifest(folder) == after
    assert ("checkpoints.json.damaged" in left(folder)) == (content is not None)
    assert "checkpoints.lock" not in left(folder)
    run = scores([], folder)
    assert run.resume() == folder / before.checkpoints[-1]["file"]


def test_the_newest_is_the_one_with_the_largest_number(folder):
    """Not by the clock, which may have been set back, and not in a folder that was copied."""
    before = read_manifest(folder)
    for age, entry in enumerate(before.checkpoints):
        os.utime(folder / entry["file"], (1e9 - age, 1e9 - age))
    copied = folder.with_name("copied")
    shutil.copytree(folder, copied, copy_function=shutil.copyfile)

    for place in (folder, copied):
        assert scores([], place).resume() == place / before.checkpoints[-1]["file"]
        (place / "checkpoints.json").unlink()
        with pytest.warns(UserWarning, match=r"is missing. .* the newest epoch_0004"):
            assert same(read_manifest(place), before)


def test_damaged_files_and_those_of_other_runs_are_left_out(folder, tmp_path):
    """They are named."""
    other = scores([1.0], tmp_path / "other")
    list(other.take(2))
    other.close()
    shutil.copyfile(tmp_path / "other/epoch_0001-iteration_000001.pt", folder / "epoch_0009-iteration_000009.pt")
    os.truncate(folder / "epoch_0003-iteration_000003.pt", 1000)
    (folder / "checkpoints.json").unlink()

    with pytest.warns(UserWarning, match=r"from 3 .* Damaged, or of another run, are epoch_0003-\S*pt, epoch_0009-"):
        listed = read_manifest(folder)
    assert [entry["number"] for entry in listed.checkpoints] == [1, 2, 4]


def test_where_all_is_damaged_nothing_is_begun_anew(folder):
    """That would be a fresh start that nobody asked for."""
    for path in folder.glob("epoch*.pt"):
        os.truncate(path, 1000)
    (folder / "checkpoints.json").unlink()

    with pytest.raises(RuntimeError, match=r"checkpoints.json is missing, and no checkpoint beside it is sound"):
        scores([], folder).resume()
    with pytest.raises(RuntimeError, match=r"no checkpoint beside it is sound"):
        next(scores([1.0], folder))


def test_files_that_the_user_has_named_are_not_put_on_the_list(folder):
    """What is on it is retired one day."""
    shutil.copyfile(folder / "best.pt", folder / "precious.pt")
    (folder / "checkpoints.json").unlink()
    with pytest.warns(UserWarning, match="from 4 checkpoints"):
        listed = read_manifest(folder)

    assert "precious.pt" not in [entry["file"] for entry in listed.checkpoints + listed.best]


def test_a_checkpoint_that_has_lost_its_trailer_is_not_trusted(folder):
    """Its format promises one."""
    newest = folder / read_manifest(folder).checkpoints[-1]["file"]
    torch.save(torch.load(newest, weights_only=True), newest)
    (folder / "checkpoints.json").unlink()

    assert [entry["number"] for entry in rebuilt(folder).checkpoints] == [1, 2, 3]


def test_checkpoints_of_older_versions_are_numbered(tmp_path):
    """They had no id and no number: what is further on is newer."""
    for epoch in (2, 1, 3):
        progress = {"epoch": epoch, "iteration": 7 * epoch, "round": epoch, "seconds": epoch / 2}
        tree = {"format": 1, "progress": progress, "border": True, "best": {}}
        torch.save(tree, tmp_path / f"epoch_{4 - epoch:04d}-iteration_000001.pt")

    found = rebuilt(tmp_path)
    assert [(entry["number"], entry["epoch"]) for entry in found.checkpoints] == [(1, 1), (2, 2), (3, 3)]
    assert found.run == ""


@pytest.mark.parametrize(
    "tree",
    [
        [1],
        {},
        {"progress": 1},
        {"progress": {"epoch": "x", "iteration": 1, "round": 1, "seconds": 1.0}},
        {"progress": {"epoch": 1, "iteration": 1, "round": 1, "seconds": "x"}},
        {"progress": {"epoch": 1, "iteration": 1, "round": 1, "seconds": 1.0}, "run": 3},
        {"progress": {"epoch": 1, "iteration": 1, "round": 1, "seconds": 1.0}, "run": {"id": 1, "number": "x"}},
        {"progress": {"epoch": 1, "iteration": 1, "round": 1, "seconds": 1.0}, "best": {"m": {}}},
        {"progress": {"epoch": 1, "iteration": 1, "round": 1, "seconds": 1.0}, "best": {"m": []}},
    ],
)
def test_files_that_only_look_like_checkpoints_are_passed_over(folder, tree):
    """Whatever is in them."""
    if isinstance(tree, dict) and "best" in tree:
        tree = {"run": {"id": rebuilt(folder).run, "number": 9}, **tree}
    if isinstance(tree, dict):
        tree = {"format": 2, "border": True, "best": {}, **tree}
    write(folder / "epoch_0001-iteration_000009.pt", tree)

    assert [entry["number"] for entry in rebuilt(folder).checkpoints] == [1, 2, 3, 4]


def test_while_another_process_writes_nothing_is_changed(folder, monkeypatch):
    """The list is made anew for oneself alone; so it is where nothing can be written."""
    (folder / "checkpoints.json").unlink()
    monkeypatch.setattr(manifests, "alone", lambda folder: contextlib.nullcontext(False))
    with pytest.warns(UserWarning, match="made anew from 4"):
        assert len(read_manifest(folder).checkpoints) == 4

    assert "checkpoints.json" not in left(folder)


def test_the_run_that_has_the_lock_mends_the_list(folder):
    """Its own lock is no obstacle."""
    run = scores([], folder)
    hold(run.cursor, folder)
    (folder / "checkpoints.json").write_text("{")
    with pytest.warns(UserWarning, match="made anew from 4"):
        read_manifest(folder)
    let_go(run.cursor)

    assert "checkpoints.json.damaged" in left(folder)
    assert len(read_manifest(folder).checkpoints) == 4
