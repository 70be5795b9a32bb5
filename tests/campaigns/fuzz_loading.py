"""Change files at random and load them: a clean load or a typed error, no code, no crash, each within a second.

    python tests/campaigns/fuzz_loading.py [--files 100000] [--seed 0] [--workers 2]

Most changes are made behind the checksums, which are made right again, so that they do not hide everything else. Each
file depends on the seed and its own number alone: `--only NUMBER` makes one once more, and leaves it in the folder.
What loads is compared with what `read_contents` said of it. Exit status 0 if nothing was found.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import os
import pickletools
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import torch  # noqa: E402
from hostile import CORPUS, SENTINEL, TOUCH, archive, in_large_form, name, number, saved, sealed, text, unpacked  # noqa: E402

from looptools.archives import contents, loading  # noqa: E402
from looptools.archives.archive import read_archive  # noqa: E402
from looptools.archives.contents import Outline, Refused  # noqa: E402
from looptools.archives.files import Damaged  # noqa: E402
from looptools.checkpoints.verify import verify  # noqa: E402

SECONDS, HANGS = 1.0, 20.0  # a file's share of the processor; seconds on the clock after which it counts as hanging
MEMORY = 6 << 30  # of a worker, the address space that torch itself takes included
CHUNK = 2500  # files a worker makes before it is started anew
ALARMS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pickle.find_class",
    "socket.connect",
)


def originals() -> dict[str, bytes]:
    """What is changed: sound files of several kinds, and hostile ones."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    run = {
        "format": 2,
        "torch": str(torch.__version__),
        "run": {"id": "0123456789abcdef", "number": 3},
        "border": False,
        "pass": {"phase": "train", "index": 3},
        "pipe": ["train/forward", "train/backward", "train/update"],
        "options": {"train/update": "optimizer=AdamW"},
        "fingerprint": {"sources": {"train": {"batches": 7, "samples": 26}}, "world_size": 1, "seed": 0},
        "progress": {
            "epoch": 2,
            "iteration": 14,
            "round": 2,
            "samples": 52,
            "seconds": 1.5,
            "updates": {"optimizer": 14},
        },
        "history": [{"phase": "train", "epoch": epoch, "loss": 1 / (1 + epoch)} for epoch in range(3)],
        "best": {"val/accuracy": {"value": 0.9, "epoch": 1, "file": "best.pt"}},
        "generators": {"python": [3, list(range(20)), None], "torch": torch.get_rng_state()[:64].clone()},
        "parts": {"run/log": {"means": torch.ones(3)}},
        "models": {"model": model.state_dict()},
        "optimizers": {"optimizer": optimizer.state_dict()},
        "weights": model.state_dict(),
    }
    variety = {
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "device": [torch.device("cpu"), torch.device("cuda", 0)],
        "counter": collections.Counter("abca"),
        "set": {1, 2, "x"},
        "tuple": (1, (2, 3), ()),
        "numbers": [1, -1, 300, 70_000, 2**40, 1.5, None, True],
        "small": torch.ones(2).to(torch.float8_e4m3fn),
        "unsigned": torch.ones(2).to(torch.uint16),
        "view": torch.arange(10)[2:6],
        "expanded": torch.ones(1).expand(5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "conj": torch.ones(2, dtype=torch.complex64).conj(),
        "empty": torch.empty(0),
        (1, "a"): 3,
    }
    sound = {"run": saved(run), "weights": saved(model.state_dict()), "variety": saved(variety)}
    sound["large"] = in_large_form(archive(unpacked(sound["variety"])[1]))
    hostile = {key: make() for key, (make, _) in CORPUS.items() if key != "large pickle"}
    return {**sound, **{key: data for key, data in hostile.items() if len(data) < 100_000}}


# Changes


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    new = rng.choice(
        (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", bytes([rng.randrange(256)]), rng.randbytes(8))
    )
    return data[:at] + new + data[at + len(new) :]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def splice(data: bytes, rng: random.Random) -> bytes:
    """A piece of it once more at another place, or left out."""
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice((1, 4, 16, 64, 300)))
    at = rng.randrange(len(data) + 1)
    return rng.choice((data[:start] + data[end:], data[:at] + data[start:end] + data[at:]))


BYTES = (flip, overwrite, cut, splice)
DANGEROUS = [
    name("posix", "system") + b"(" + text(TOUCH) + b"tR",
    name("builtins", "eval"),
    name("torch._utils", "_rebuild_sparse_tensor"),
    name("torch", "Tensor") + b"(" + number(10**12) + b"tR",
    name("collections", "OrderedDict"),
    name("collections", "Counter"),
    name("torch", "Size"),
    b"\x85R",
    b"r\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\x7f",
    b"X\xff\xff\xff\xff",
    number(2**48),
    number(-1),
    number(2**61 - 1),
    b"\x81",
    b"b",
    b"Q",
    b"\x93",
    b"0",
    b"2",
    b"]",
    b"}",
    b")",
    b"(",
    b"t",
    b"e",
    b"u",
    b"\x85",
    b"\x86",
    b"N",
    b"\x88",
    b"h\0",
    b"h\1",
]


def instructions(data: bytes) -> list[bytes]:
    """The steps of a pickle, as far as it can be read."""
    places = []
    try:
        places.extend(place for _, _, place in pickletools.genops(data))
    except Exception:  # it has been changed already
        pass
    return [data[start:end] for start, end in zip(places, [*places[1:], len(data)], strict=True)]


def steps(data: bytes, rng: random.Random) -> bytes:
    """Change whole instructions rather than bytes."""
    found = instructions(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        if len(found) < 2:
            break
        at = rng.randrange(1, len(found))
        way = rng.randrange(6)
        if way == 0:
            del found[at]
        elif way == 1:
            found.insert(at, rng.choice(found[1:]))
        elif way == 2:
            found.insert(at, rng.choice(DANGEROUS))
        elif way == 3:
            other = rng.randrange(1, len(found))
            found[at], found[other] = found[other], found[at]
        elif way == 4:
            end = rng.randrange(at, min(len(found), at + 30))
            found[at:at] = found[at:end]
        else:
            whole = [n for n, step in enumerate(found) if step[:1] in b"KMJ\x8a"]
            if whole:
                found[rng.choice(whole)] = number(
                    rng.choice((0, 1, -1, 2, 5, 2**31, 2**47, 2**63, 2**64, 10**12, 2**1000))
                )
    if rng.random() < 0.7:  # values numbered in order again, or hardly anything gets past the first check
        found = list(renumbered(found))
    return b"".join(found)


def renumbered(found: list[bytes]) -> Iterator[bytes]:
    places, count = {}, 0
    for step in found:
        if step[:1] in b"qr" and len(step) in (2, 5):
            places[int.from_bytes(step[1:], "little")] = count
            yield b"r" + count.to_bytes(4, "little")
            count += 1
        elif step[:1] in b"hj" and len(step) in (2, 5):
            yield b"j" + places.get(int.from_bytes(step[1:], "little"), 0).to_bytes(4, "little")
        else:
            yield step


def inside(data: bytes, rng: random.Random) -> bytes:
    """Change the records of an archive, and pack them anew with right checksums."""
    folder, found = unpacked(data)
    if "data.pkl" in found and rng.random() < 0.85:
        found["data.pkl"] = rng.choice((steps, steps, steps, *BYTES))(found["data.pkl"], rng)
    else:
        key = rng.choice(sorted(found))
        way = rng.randrange(5)
        if way == 0:
            del found[key]
        elif way == 1:
            found[key] = rng.choice(BYTES)(found[key], rng)
        elif way == 2:
            found[rng.choice((key.upper(), key + "x", "data/99", "constants.pkl", "../" + key))] = found[key]
        elif way == 3:
            found[key] = rng.choice((b"", b"big", b"little", bytes(1000), b"9" * 5000))
        else:
            folder = rng.choice(("", "/", "x/y/", "ä/", "\0/"))
    return archive(found, folder or "x/", zipfile.ZIP_DEFLATED if rng.random() < 0.03 else zipfile.ZIP_STORED)


def structure(data: bytes, rng: random.Random) -> bytes:
    """Change the archive's own words: headers, directory, end."""
    places = [at for mark in (b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7") for at in _all(data, mark)]
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not places:
            break
        at = rng.choice(places) + rng.randrange(60)
        new = rng.choice((b"\xff", b"\0", b"\xff\xff\xff\xff", b"\0\0\0\0", rng.randbytes(1), rng.randbytes(4), b"\1"))
        changed[at : at + len(new)] = new
    return bytes(changed)


def _all(data: bytes, mark: bytes) -> Iterator[int]:
    at = data.find(mark)
    while at >= 0:
        yield at
        at = data.find(mark, at + 1)


def changed(files: dict[str, bytes], seed: int, count: int) -> tuple[str, bytes]:
    """The file of a number: what was done, and its bytes."""
    rng = random.Random(f"{seed}/{count}")
    origin = rng.choice(("run", "weights", "variety", "large", *rng.sample(sorted(files), 1)))
    data, done = files[origin], [origin]
    for _ in range(rng.choice((1, 1, 1, 2))):
        way = rng.choice((inside, inside, inside, structure, *BYTES[:2], rng.choice(BYTES)))
        try:
            data = way(data, rng)
            done.append(way.__name__)
        except Exception as error:  # no archive any more
            data = rng.choice(BYTES)(data, rng)
            done.append(f"bytes, since {type(error).__name__}")
    if rng.random() < 0.5:
        data = sealed(data)
        done.append("sealed")
    return ", ".join(done), data


# Looking at each


class Trouble(Exception):
    """What should not have happened."""


def same(loaded: Any, said: Any) -> None:
    """See that what was loaded is what the file said that it holds."""
    if isinstance(said, Outline):
        if (loaded.dtype, tuple(loaded.shape)) != (said.dtype, said.shape) or type(loaded) not in (
            torch.Tensor,
            torch.nn.Parameter,
        ):
            raise Trouble(f"a tensor {loaded.dtype} {tuple(loaded.shape)} was loaded where {said} was said")
        return
    kinds = {"Ordered": "OrderedDict"}
    if type(loaded).__name__ != kinds.get(type(said).__name__, type(said).__name__):
        raise Trouble(f"a {type(loaded).__name__} was loaded where a {type(said).__name__} was said")
    if isinstance(said, dict):
        if list(map(repr, loaded)) != list(map(repr, said)):
            raise Trouble("other keys were loaded than were said")
        for one, other in zip(loaded.values(), said.values(), strict=True):
            same(one, other)
    elif isinstance(said, list | tuple) and not isinstance(said, torch.Size):
        if len(loaded) != len(said):
            raise Trouble("other lengths were loaded than were said")
        for one, other in zip(loaded, said, strict=True):
            same(one, other)
    elif repr(loaded) != repr(said):
        raise Trouble(f"{loaded!r} was loaded where {said!r} was said")


def require_one_meaning(path: Path) -> None:
    """See that torch's reader finds the same bytes in an archive as ours, if both take it."""
    try:
        with path.open("rb") as file:
            ours = read_archive(file, path)
            read = {key: ours.read(file, key) for key in ours.records}
        reader = torch._C.PyTorchFileReader(str(path))
    except (Refused, RuntimeError, ValueError, UnicodeDecodeError, IndexError):
        return
    if "version" in read and sorted(reader.get_all_records()) != sorted(read):
        raise Trouble(f"torch finds the records {reader.get_all_records()}, not {sorted(read)}")
    for key, data in read.items():
        if reader.get_record(key) != data:
            raise Trouble(f"torch finds something else in the record {key}")


def look(path: Path, unsafe: bool) -> str:
    """Load a file; what came of it in a word."""
    if unsafe:  # for a test that the campaign can fail
        try:
            torch.load(path, weights_only=False)
            return "loaded"
        except Exception:
            return "refused"
    require_one_meaning(path)
    report = repr(verify(path))
    if not report.replace("\n", " ").isprintable():
        raise Trouble("the report holds control characters")
    try:
        tree = loading.load(path)
    except Damaged:
        return "damaged"
    except Refused as error:
        return "refused by torch" if "cannot be read" in str(error) else "refused"
    same(tree, contents.read_contents(path).tree)
    return "loaded"


def work(options: argparse.Namespace) -> None:
    """Make and load the files of one chunk; print what came of it."""
    faulthandler.enable()
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except ImportError:  # Windows
        pass
    alarms: list[str] = []
    sys.addaudithook(lambda event, args: alarms.append(event) if event.startswith(ALARMS) else None)
    torch.set_num_threads(1)
    files, path = originals(), Path("file.pt")
    came: collections.Counter[str] = collections.Counter()
    troubles, slowest = [], (0.0, 0, "")
    for count in range(options.first, options.first + options.count):
        done, data = changed(files, options.seed, count)
        path.write_bytes(data)
        print(count, file=sys.stderr, flush=True)  # the last word of one that crashes
        faulthandler.dump_traceback_later(HANGS, exit=True)
        began = time.process_time()
        try:
            came[look(path, options.unsafe)] += 1
        except BaseException as error:  # whatever it is, it is no typed error
            troubles.append((count, done, f"{type(error).__name__}: {error}"[:300]))
        taken = time.process_time() - began
        faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, (taken, count, done))
        if taken > SECONDS:
            troubles.append((count, done, f"took {taken:.2f} s"))
        if alarms or Path(SENTINEL).exists():
            troubles.append((count, done, f"code has run: {', '.join(alarms) or SENTINEL}"))
            alarms.clear()
            Path(SENTINEL).unlink(missing_ok=True)
    print(json.dumps({"came": came, "troubles": troubles, "slowest": slowest}))


# All of them


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int, help="number of one file to be made and loaded once more")
    parser.add_argument("--unsafe", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=CHUNK, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        options.first, options.count = options.only, 1
    if options.first is not None:
        work(options)
        return 0
    began = time.monotonic()
    came: collections.Counter[str] = collections.Counter()
    troubles: list[list[Any]] = []
    slowest: list[Any] = [0.0, 0, ""]
    for result in chunks(options):
        came.update(result["came"])
        troubles += result["troubles"]
        slowest = max(slowest, result["slowest"])
    print(f"{options.files:,} files, seed {options.seed}, in {time.monotonic() - began:.0f} s")
    print("; ".join(f"{word} {count:,}" for word, count in came.most_common()))
    print(f"the slowest took {slowest[0]:.3f} s of processor time: file {slowest[1]} ({slowest[2]})")
    for count, done, what in troubles[:50]:
        print(f"TROUBLE file {count} ({done}): {what}")
    print(f"{len(troubles)} troubles")
    return 1 if troubles else 0


def chunks(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Have workers do chunk after chunk, so many at a time."""
    starts = list(range(0, options.files, CHUNK))
    running: list[tuple[Any, Path, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        while starts or running:
            while starts and len(running) < options.workers:
                first = starts.pop(0)
                place = Path(folder) / str(first)
                place.mkdir()
                words = [sys.executable, __file__, "--seed", str(options.seed), "--first", str(first)]
                words += ["--count", str(min(CHUNK, options.files - first)), *(["--unsafe"] * options.unsafe)]
                out, errors = (place / "out").open("w"), (place / "errors").open("w")
                running.append((subprocess.Popen(words, cwd=place, stdout=out, stderr=errors), place, first))
            process, place, first = running.pop(0)
            status = process.wait()
            if status:
                numbers = (place / "errors").read_text().splitlines()
                last = next((int(line) for line in reversed(numbers) if line.isdigit()), first)
                why = "; ".join(line for line in numbers if not line.isdigit())[:500]
                yield {
                    "came": {},
                    "troubles": [[last, "crash or hang", f"status {status}: {why}"]],
                    "slowest": [0, 0, ""],
                }
                continue
            yield json.loads((place / "out").read_text().splitlines()[-1])


if __name__ == "__main__":
    os.environ.pop("PYTHONWARNINGS", None)
    sys.exit(main())
