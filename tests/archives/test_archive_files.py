"""Files are written whole or not at all, and prove themselves."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from looptools.archives import files, trailer, whole
from looptools.archives.files import copy, damage, has_trailer, require_folder, set_aside, write

CAMPAIGNS = Path(__file__).parent.parent / "campaigns"
TREE = {"w": torch.arange(6.0), "epoch": 3}


def left(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def small_steps(monkeypatch):
    """Files of some kilobytes take the way of those of gigabytes."""
    monkeypatch.setattr(whole, "LARGE", 1000)
    monkeypatch.setattr(whole, "STEP", 4000)


def large():
    """Records of all sizes, several of them large, one of which is saved twice over."""
    sizes = [1, 300, 249, 250, 251, 5000, 5000, 20_000]
    return {"all": [torch.randn(size) for size in sizes], "bytes": torch.zeros(1000, dtype=torch.uint8)}


def test_what_is_written_is_read_by_everybody(tmp_path):
    """By torch.load, also mapped into memory, and by zip readers, which find the checksums within right."""
    sums = write(tmp_path / "a.pt", TREE)

    data = (tmp_path / "a.pt").read_bytes()
    assert sums == {"bytes": len(data), "crc32": zlib.crc32(data)}
    for mmap in (False, True):
        assert torch.equal(torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)["w"], TREE["w"])
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"looptools: ")
    assert damage(tmp_path / "a.pt") == ""
    assert left(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("torch_sums", [True, False])
def test_large_files_have_the_same_checksum_and_contents(tmp_path, small_steps, torch_sums):
    """Whether torch computes checksums of its own, which are used then, or was told not to."""
    tree, path = large(), tmp_path / "a.pt"
    torch.serialization.set_crc32_options(torch_sums)
    try:
        sums = write(path, tree)
    finally:
        torch.serialization.set_crc32_options(True)

    assert sums == {"bytes": path.stat().st_size, "crc32": zlib.crc32(path.read_bytes())}
    assert damage(path) == ""
    loaded = torch.load(path, weights_only=True)
    assert all(torch.equal(one, other) for one, other in zip(loaded["all"], tree["all"], strict=True))


def test_large_records_are_not_summed_up_a_second_time(tmp_path, monkeypatch, small_steps):
    """Torch has done it: what goes through looptools' hands before the file is read back is small."""
    summed, real = [], zlib.crc32

    def crc32(data, crc=0):
        summed.append(len(data))
        return real(data, crc)

    monkeypatch.setattr(whole.Behind, "finish", lambda self, size: os.fsync(self._file.fileno()))
    monkeypatch.setattr(whole.Behind, "follow", lambda self, size: None)
    monkeypatch.setattr(whole.zlib, "crc32", crc32)
    with pytest.raises(OSError, match="not what was written"):
        write(tmp_path / "a.pt", {"w": torch.zeros(100_000)})

    assert sum(summed) < 3000


def test_a_torch_that_writes_otherwise_costs_time_not_truth(tmp_path, small_steps):
    """A large record without the checksum behind it is read back for it."""
    with whole.replacing(tmp_path / "a") as stream:
        for piece in (b"a" * 5000, b"no descriptor", b"PK\x07\x08" + b"b" * 12, b"c" * 5000, b"d" * 6000):
            stream.write(piece)

    assert stream.crc == zlib.crc32((tmp_path / "a").read_bytes())
    assert files.write_bytes(tmp_path / "b", b"e" * 5000) == {"bytes": 5000, "crc32": zlib.crc32(b"e" * 5000)}


@pytest.mark.parametrize("lengths", [(0, 0), (5, 0), (0, 5), (1, 1), (3, 1000), (1000, 3), (7, 1 << 20)])
def test_the_checksum_of_two_pieces(lengths):
    """From those of each."""
    first, second = (os.urandom(length) for length in lengths)

    assert trailer.join(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


FAILING = ["open", "write", "flush to disk", "read back", "read back other bytes", "rename"]


def failing(monkeypatch, where, number=errno.ENOSPC):
    """Have the system fail *where*."""
    real = whole.FileIO

    def fail(*args, **options):
        raise OSError(number, os.strerror(number))

    class Failing(real):
        def write(self, data):
            if where == "write" and len(data) > 100:
                real.write(self, data[:50])  # as of a disk that is full now
                fail()
            return super().write(data)

        def readinto(self, buffer):
            if where == "read back":
                fail()
            count = super().readinto(buffer)
            if where == "read back other bytes" and count:
                buffer[0] ^= 1
            return count

    if where == "open":
        monkeypatch.setattr(whole, "FileIO", fail)
    elif where == "flush to disk":
        monkeypatch.setattr(whole.os, "fsync", fail)
    elif where == "rename":
        monkeypatch.setattr(whole.os, "replace", fail)
    else:
        monkeypatch.setattr(whole, "FileIO", Failing)


@pytest.mark.parametrize("where", FAILING)
@pytest.mark.parametrize("how", ["write", "write large", "copy"])
def test_whatever_fails_the_file_that_was_there_stays(tmp_path, monkeypatch, where, how):
    """An OSError with errno and path, although torch turns what its file raises into RuntimeErrors."""
    write(tmp_path / "a.pt", TREE)
    write(tmp_path / "b.pt", {"other": 1})
    before = (tmp_path / "a.pt").read_bytes()
    with monkeypatch.context() as patch:
        if how == "write large":
            patch.setattr(whole, "LARGE", 1000)
            patch.setattr(whole, "STEP", 4000)
        failing(patch, where)
        with pytest.raises(OSError, match=r"\[Errno \d+\] .*: '.*a.pt'$") as caught:
            copy(tmp_path / "b.pt", tmp_path / "a.pt") if how == "copy" else write(tmp_path / "a.pt", large())

    assert caught.value.errno == (errno.EIO if where == "read back other bytes" else errno.ENOSPC)
    assert caught.value.filename == str(tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == before
    assert left(tmp_path) == ["a.pt", "b.pt"]


@pytest.mark.parametrize("call", ["fdatasync", "submit"])
def test_what_the_threads_behind_a_large_file_raise_is_raised(tmp_path, monkeypatch, small_steps, call):
    """A disk that fails while it is written to; an interpreter that goes down, and starts no more threads."""

    def fail(*args, **options):
        raise OSError(errno.EIO, "planted") if call == "fdatasync" else RuntimeError("planted")

    if call == "fdatasync":
        monkeypatch.setattr(whole.os, "fdatasync", fail, raising=False)
        with pytest.raises(OSError, match="planted.*a.pt"):
            write(tmp_path / "a.pt", large())
        assert left(tmp_path) == []
    else:
        monkeypatch.setattr(ThreadPoolExecutor, "submit", fail)
        write(tmp_path / "a.pt", large())
        assert damage(tmp_path / "a.pt") == ""


def in_process(code, *arguments):
    """Run *code* in a fresh process; returns what it prints."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of this kind")
def test_a_disk_that_is_really_full(tmp_path):
    """The system itself refuses to let the file grow, soon or late: the one that was there stays."""
    write(tmp_path / "a.pt", TREE)
    said = in_process(
        """
        import resource, sys, torch
        from pathlib import Path
        from looptools.archives.files import write
        for size in (100, 2000, 100_000, 3_999_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            try:
                write(Path(sys.argv[1]), {"w": torch.zeros(1_000_000)})
            except OSError as error:
                print(type(error).__name__, error.errno, error.filename)
        """,
        tmp_path / "a.pt",
    )

    assert said.split() == ["OSError", str(errno.EFBIG), str(tmp_path / "a.pt")] * 4
    assert left(tmp_path) == ["a.pt"]
    assert damage(tmp_path / "a.pt") == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_device_that_is_always_full():
    """The exception comes out of torch.save as a RuntimeError, and is kept."""
    with open("/dev/full", "wb", buffering=0) as file, open("/dev/null", "rb", buffering=0) as reader:
        stream = whole.Stream(file, whole.Behind(file, reader))
        with pytest.raises((RuntimeError, OSError)):
            torch.save({"w": torch.zeros(1_000_000)}, stream)
        stream.behind.stop()

    assert stream.failure.errno == errno.ENOSPC


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_comes_through_torch(tmp_path, monkeypatch, error):
    """The second Ctrl-C may come while torch writes."""

    def put(self, data):
        raise error

    monkeypatch.setattr(whole.Stream, "_put", put)
    with pytest.raises(error):
        write(tmp_path / "a.pt", {"w": torch.zeros(1_000_000)})

    assert left(tmp_path) == []


def test_what_cannot_be_pickled_leaves_nothing(tmp_path):
    """Torch's own error, as it is."""
    with pytest.raises(Exception, match=r"(?i)pickle"):
        write(tmp_path / "a.pt", {"f": lambda: None})

    assert left(tmp_path) == []


def test_what_a_link_in_the_way_leads_to_is_not_written_over(tmp_path):
    """A temporary file of that name is made anew."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".a.pt.tmp").symlink_to(tmp_path / "precious")
    write(tmp_path / "a.pt", TREE)

    assert (tmp_path / "precious").read_text() == "mine"
    assert left(tmp_path) == ["a.pt", "precious"]


@pytest.mark.parametrize("missing", ["O_DIRECTORY", "fdatasync"])
def test_where_the_system_lacks_something(tmp_path, monkeypatch, small_steps, missing):
    """Windows cannot sync a folder, and neither it nor macOS has fdatasync."""
    monkeypatch.delattr(os, missing)
    write(tmp_path / "a.pt", large())

    assert damage(tmp_path / "a.pt") == ""


def test_a_copy_is_the_same_and_its_own(tmp_path, small_steps):
    """No hard link, which damage would hit as well."""
    sums = write(tmp_path / "a.pt", large())

    assert copy(tmp_path / "a.pt", tmp_path / "b.pt") == sums
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert (tmp_path / "a.pt").stat().st_ino != (tmp_path / "b.pt").stat().st_ino


@pytest.mark.parametrize("harm", ["flip", "cut", "no trailer"])
def test_a_damaged_file_is_not_copied(tmp_path, harm):
    """The checksum that it carries is what the copy must have."""
    write(tmp_path / "a.pt", large())
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[len(data) // 2] ^= harm == "flip"
    (tmp_path / "a.pt").write_bytes(
        data[: -trailer.LENGTH] if harm == "no trailer" else data[:-1] if harm == "cut" else data
    )

    with pytest.raises(OSError, match=r"\[Errno 5\].*b.pt"):
        copy(tmp_path / "a.pt", tmp_path / "b.pt")
    assert left(tmp_path) == ["a.pt"]


def test_every_flipped_bit_of_a_small_checkpoint_is_found(tmp_path):
    """Wherever it is, also in the trailer, and with no manifest to ask."""
    write(tmp_path / "a.pt", {"w": torch.ones(1)})
    data = bytearray((tmp_path / "a.pt").read_bytes())
    passed = []
    with (tmp_path / "a.pt").open("r+b", buffering=0) as file:
        for place in range(len(data)):
            for bit in range(8):
                file.seek(place)
                file.write(bytes([data[place] ^ 1 << bit]))
                passed += [(place, bit)] if damage(tmp_path / "a.pt") == "" else []
            file.seek(place)
            file.write(data[place : place + 1])

    assert passed == []
    assert damage(tmp_path / "a.pt") == ""


@pytest.mark.parametrize("save", [write, lambda path, tree: torch.save(tree, path)], ids=["looptools", "torch"])
def test_every_length_to_which_a_checkpoint_is_cut_is_found(tmp_path, save):
    """Also that at which just the trailer is gone, and of files that never had one."""
    save(tmp_path / "a.pt", {"w": torch.ones(1)})
    passed = []
    for length in range((tmp_path / "a.pt").stat().st_size - 1, -1, -1):
        os.truncate(tmp_path / "a.pt", length)
        passed += [length] if damage(tmp_path / "a.pt") == "" else []

    assert passed == []


def test_a_file_that_torch_itself_has_saved(tmp_path):
    """It has no trailer: the checksums of the zip archive are looked at, or those of the manifest."""
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(1000)}, path)
    entry = {"number": 1, **files.sums(path)}
    assert not has_trailer(path)
    assert damage(path) == damage(path, entry) == ""

    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert damage(path) == "the checksum of a/data/0 is wrong"
    assert damage(path, entry) == "its checksum is wrong"
    assert damage(path, {**entry, "bytes": 7}) == f"it has {len(data)} bytes, 7 were written"


def test_the_trailer_has_the_last_word(tmp_path):
    """A best file that was written when the process was killed is another one than the list says, and sound."""
    entry = {"number": 1, **write(tmp_path / "a.pt", {"w": 1})}
    write(tmp_path / "a.pt", {"w": torch.ones(100)})

    assert has_trailer(tmp_path / "a.pt")
    assert damage(tmp_path / "a.pt", entry) == ""
    assert "were written" in files.differs(tmp_path / "a.pt", entry)


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06" + bytes(18), b"no archive at all", b"looptools:" * 9])
def test_other_files_are_no_sound_checkpoints(tmp_path, content):
    """Nor is a folder, or a file that is not there."""
    (tmp_path / "a.pt").write_bytes(content)
    (tmp_path / "folder").mkdir()

    if content[:2] != b"PK":  # which is an archive, of nothing
        assert damage(tmp_path / "a.pt")
    assert damage(tmp_path / "folder")
    assert damage(tmp_path / "missing.pt") == f"[Errno 2] No such file or directory: '{tmp_path / 'missing.pt'}'"


def test_an_archive_that_would_unpack_to_more_than_it_is(tmp_path):
    """Its checksums are not computed: that could take as long as its author likes."""
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100_000))

    assert damage(tmp_path / "a.pt") == "it holds compressed data, which torch.save never writes"


def test_damaged_files_are_set_aside_under_names_of_their_own(tmp_path, monkeypatch):
    """Numbered; None where they cannot be renamed."""
    for name in ("a.pt.damaged", "a.pt.damaged-2"):
        (tmp_path / "a.pt").touch()
        assert set_aside(tmp_path / "a.pt") == tmp_path / name

    assert set_aside(tmp_path / "a.pt") is None


def test_leftovers_of_killed_processes_go(tmp_path):
    """Nothing else does."""
    for name in (".a.pt.tmp", ".checkpoints.json.tmp", ".hidden", "a.pt", "b.tmp", ".notes.tmp"):
        (tmp_path / name).touch()
    whole.remove_leftovers(tmp_path)

    assert left(tmp_path) == [".hidden", ".notes.tmp", "a.pt", "b.tmp"]


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="Windows has other permissions")
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    """Read-only, or below a file; also to the superuser, who steps down for it."""
    (tmp_path / "shut").mkdir(mode=0o555)
    (tmp_path / "file").touch()
    tmp_path.chmod(0o755)
    said = in_process(
        """
        import os, sys
        from pathlib import Path
        from looptools.archives.files import require_folder
        os.chdir(sys.argv[1])
        if not os.getuid():
            os.setgroups([])
            os.setuid(65534)
        for folder in ("shut", "shut/new", "file/new"):
            try:
                require_folder(Path(folder), "checkpoint")
            except OSError as error:
                print(type(error).__name__, error.__notes__[0].partition(". ")[0])
        """,
        tmp_path,
    )

    assert said.splitlines() == [
        "PermissionError checkpoint: cannot write to shut",
        "PermissionError checkpoint: cannot write to shut/new",
        "NotADirectoryError checkpoint: cannot write to file/new",
    ]


def test_a_missing_folder_is_made(tmp_path):
    """With those above it."""
    require_folder(tmp_path / "a/b", "checkpoint")

    assert left(tmp_path / "a/b") == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the campaign forks")
@pytest.mark.parametrize("campaign", ["save_faults.py", "bit_flips.py"])
def test_the_campaigns_short_versions(campaign):
    """A fault at every call of a save; every bit and length of a run's checkpoint, some of them."""
    done = subprocess.run(
        [sys.executable, CAMPAIGNS / campaign, "--short"], capture_output=True, text=True, check=False, timeout=600
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 " in done.stdout.splitlines()[-1]
