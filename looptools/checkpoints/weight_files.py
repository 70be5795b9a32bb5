"""Files that hold a model's weights: those of runs, of others, and safetensors."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from ..archives.archive import Refused
from ..archives.files import Damaged
from ..archives.loading import load
from ..archives.pickled import shown
from ..archives.whole import sync_folder
from ..checks import known
from ..warn import warn
from .manifest import read_manifest
from .matching import WRAPPED, with_versions

ENTRIES = ("state_dict", "model", "weights", "model_state_dict")  # where others keep a model's weights
SUFFIX = ".safetensors"
MOST_HEADER = 100_000_000  # bytes of a safetensors header: the package's own bound
CHECKSUM = "looptools.crc32"  # in a safetensors file's metadata: of all its bytes, these eight digits taken as zeros
_BLANK = "0" * 8
_METADATA = {"format": "pt", "written_by": "looptools", CHECKSUM: _BLANK}

Source = str | Path | Mapping[str, Any]


@attrs.frozen(eq=False)
class Found:
    """A state dict, and where it was found."""

    weights: Mapping[str, Any]
    path: Path | None  # None if the mapping itself was given
    entry: str  # within the file; empty if the file is nothing else

    def __str__(self) -> str:
        where = str(self.path) if self.path else "the mapping"
        return f'"{self.entry}" of {where}' if self.entry else where


def read(source: Source, of: str | None, who: str) -> Found:
    """The state dict that *source* is or holds, on the CPU if it comes from a file.

    Args:
        source: A file, a folder of checkpoints or a mapping.
        of: Which one it is to be, by name.
        who: The public name in errors.

    Raises:
        Damaged: If it is not what was written.
        LookupError: If there is none, or several.
        OSError: If there is no such file.
        Refused: If it holds more than tensors and plain values.
    """
    if isinstance(source, Mapping):
        return _pick(source, None, of, who)
    if not isinstance(source, str | Path):
        raise TypeError(f"{who}: give a file, a folder of checkpoints or a state dict, got a {type(source).__name__}.")
    if "://" in str(source):
        raise ValueError(
            f"{who}: {source} is an address, and nothing is fetched here. Give what "
            "torch.hub.load_state_dict_from_url(url, weights_only=True) returns."
        )
    path = Path(source)
    if path.is_dir():
        path, tree = _newest(path, who)
    elif not path.exists():
        raise FileNotFoundError(f"{who}: there is no {path}.")
    else:
        tree = _load(path, who)
    return _pick(tree, path, of, who)


def _load(path: Path, who: str) -> Any:
    if path.suffix == SUFFIX:
        return read_safetensors(path, who)
    try:
        return load(path, who)
    except Refused as error:
        error.add_note(
            "Where you trust the file, take its weights out of it once: "
            'torch.save(torch.load(file, weights_only=False)["state_dict"], "weights.pt").'
        )
        raise


def _newest(folder: Path, who: str) -> tuple[Path, Any]:
    """The newest sound checkpoint of a folder, wherever in a pass it was saved."""
    entries = read_manifest(folder).checkpoints
    for entry in reversed(entries):
        path = folder / entry["file"]
        try:
            return path, _load(path, who)
        except (RuntimeError, OSError) as error:
            warn(f"{error} Trying the one before.")
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".pt", ".pth", ".ckpt", SUFFIX))
    if entries:
        raise RuntimeError(f"{who}: none of the {len(entries)} checkpoints in {folder} is sound.")
    cure = f"Give one of its files: {', '.join(others)}." if others else "Give a file."
    raise LookupError(f"{who}: {folder} lists no checkpoints of a run. {cure}")


def is_checkpoint(tree: Mapping[str, Any]) -> bool:
    """Whether it is what `tree.capture` gives."""
    return isinstance(tree.get("format"), int) and isinstance(tree.get("models"), Mapping) and "pipe" in tree


def is_state_dict(value: Any) -> bool:
    """Whether it maps names to tensors; modules may have states of their own beside them."""
    return isinstance(value, Mapping) and (
        not value or (all(isinstance(key, str) for key in value) and any(isinstance(v, Tensor) for v in value.values()))
    )


def _pick(tree: Any, path: Path | None, of: str | None, who: str) -> Found:
    """The state dict in what a file holds."""
    where = path or "the mapping"
    if not isinstance(tree, Mapping):
        raise LookupError(f"{who}: {where} holds a {type(tree).__name__}, no state dict.")
    named, usual = _entries(tree)
    if of is not None:
        if of not in named:
            raise LookupError(f'{who}: {where} holds no weights called "{of}"; {_known(of, named)}')
        return Found(named[of], path, of)
    if len(usual) == 1:
        return Found(named[usual[0]], path, usual[0])
    if not usual and is_state_dict(tree):
        return Found(tree, path, "")
    what = "several state dicts" if usual else "no state dict where one is looked for"
    raise LookupError(f"{who}: {where} holds {what}; {_known('', named)} Say which: of=...")


def _known(wanted: str, named: Mapping[str, Any]) -> str:
    return known(wanted, [shown(name, 150) for name in named][:99]) if named else "it holds none at all."


def _entries(tree: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """All state dicts in a file by name, and which of them are taken unless one is asked for."""
    found = {str(key): value for key, value in tree.items() if is_state_dict(value) and len(value)}
    if not is_checkpoint(tree):
        return found, [name for name in ENTRIES if name in found]
    models = {str(name): _inner(value) for name, value in tree["models"].items() if is_state_dict(value)}
    plain = tree.get("weights")
    if not is_state_dict(plain):
        return models, list(models)
    return {"weights": plain, **models}, ["weights"]


def _inner(weights: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict of what an `AveragedModel` averages; another one as it is."""
    keys = [key for key in weights if key != "n_averaged"]
    if len(keys) == len(weights) or not all(key.startswith(WRAPPED) for key in keys):
        return weights
    inner = ((key.removeprefix(WRAPPED), weights[key]) for key in keys)
    return with_versions(inner, weights, lambda name: name.removeprefix(WRAPPED))


def read_safetensors(path: Path, who: str) -> dict[str, Tensor]:
    """Read a safetensors file; the package sees to its bounds, and the checksum is looked at where there is one.

    Raises:
        Damaged: If it is not what was written.
        ModuleNotFoundError: Without safetensors.
        Refused: If it is no safetensors file.
    """
    load_file = _safetensors(who).load_file
    try:
        wrong = damage_of_safetensors(path)
        tensors: dict[str, Tensor] = {} if wrong else load_file(path)
    except OSError:
        raise
    except Exception as error:  # SafetensorError is an Exception; so is what a dtype that torch lacks raises
        raise Refused(f"{who}: {path} cannot be read: {error}") from error
    if wrong:
        raise Damaged(f"{who}: {path} is damaged: {wrong}.")
    return tensors


def damage_of_safetensors(path: Path) -> str:
    """What the checksum in a file that `save_weights` wrote says; empty if it is right, or there is none."""
    with path.open("rb") as file:
        place, digits = _checksum_place(file)
        sound = place is None or (place > 0 and _checksum(file, place) == digits)
        return "" if sound else "its checksum is wrong"


def _checksum_place(file: Any) -> tuple[int | None, str]:
    """Where in a file its checksum stands, and what it is; None if others wrote the file, 0 if it should be there."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    header = file.read(length) if length <= min(size - 8, MOST_HEADER) else b""
    found = re.search(rb'"%s":"([^"]{8})"' % re.escape(CHECKSUM.encode()), header)
    if found:
        return 8 + found.start(1), found[1].decode("latin-1")
    return (0 if b'"written_by":"looptools"' in header else None), ""


def _checksum(file: Any, place: int) -> str:
    """crc32 of a file, with zeros in *place* of the checksum itself."""
    file.seek(0)
    sum_ = zlib.crc32(_BLANK.encode(), zlib.crc32(file.read(place)))
    file.seek(place + len(_BLANK))
    while chunk := file.read(1 << 20):
        sum_ = zlib.crc32(chunk, sum_)
    return f"{sum_:08x}"


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], who: str) -> None:
    """Write a safetensors file whole or not at all, and read it back before it takes the place of an older one.

    Args:
        path: The file, in a folder that is there.
        tensors: Dense, contiguous, on the CPU, none sharing memory with another.
        who: The public name in errors.

    Raises:
        ModuleNotFoundError: Without safetensors.
        OSError: If it cannot be written; what was there stays.
    """
    package = _safetensors(who)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()  # left by a process that was killed; opening it would follow a link
        with temporary.open("xb") as file:  # for the mode of the file: the package's own would be for the owner alone
            mode = os.fstat(file.fileno()).st_mode & 0o777
        _serialize(package, tensors, temporary, who)
        temporary.chmod(mode)
        with temporary.open("r+b") as file:
            place = _checksum_place(file)[0] or 0
            digits = _checksum(file, place)
            file.seek(place)
            file.write(digits.encode())
            file.flush()
            os.fsync(file.fileno())
        if damage_of_safetensors(temporary) or not _same(package.load_file(temporary), tensors):
            raise OSError(errno.EIO, "what was read back is not what was written")
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise
    sync_folder(path.parent)


def _serialize(package: Any, tensors: Mapping[str, Tensor], temporary: Path, who: str) -> None:
    try:
        package.save_file(dict(tensors), temporary, metadata=_METADATA)
    except Exception as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:  # a dtype that an older version of it does not know
            raise TypeError(f"{who}: safetensors cannot hold this: {error}.") from error
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether they are equal to the bit."""
    return left.keys() == right.keys() and all(
        one.dtype == right[key].dtype and one.shape == right[key].shape and torch.equal(_bits(one), _bits(right[key]))
        for key, one in left.items()
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _safetensors(who: str) -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{who}: {SUFFIX} files need safetensors. Install it: pip install "torch-looptools[safetensors]".'
        ) from error
    return safetensors.torch
