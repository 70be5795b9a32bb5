"""Take a model's weights alone from a file, and write them to one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.parameter import is_lazy

from ..archives.files import require_folder, write
from ..archives.pickled import shown
from ..plain import require_plain
from ..warn import warn
from .matching import Fit, Rename, compare, hint, match, plain_key, renaming, unwrapped, with_versions
from .weight_files import SUFFIX, Found, Source, read, write_safetensors

if TYPE_CHECKING:
    from ..run import Run

COUNTER = "num_batches_tracked"  # of BatchNorm, which makes one where a file has none
SHOWN = 40  # keys of a list in an error


@attrs.frozen(eq=False, repr=False)
class Loaded:
    """What `load_weights` did. Keys are the model's, but for *unexpected*.

    Args:
        source: The file; None for a state dict that was given directly.
        entry: Which one of the file's state dicts; empty if the file is nothing else.
        loaded: What was loaded.
        missing: What the file lacks; the model keeps its own.
        unexpected: What the file has besides, as renamed.
        misshapen: What has another shape, or a dtype that would lose a part, in words; the model keeps its own.
        cast: What was loaded into another dtype than it has in the file.
        non_finite: Parameters with NaN or Inf, and buffers with NaN, which were loaded.
    """

    source: Path | None
    entry: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: Mapping[str, str]
    cast: tuple[str, ...]
    non_finite: tuple[str, ...]

    def __repr__(self) -> str:
        kinds = [name for name in ("missing", "unexpected", "misshapen", "cast", "non_finite") if getattr(self, name)]
        return f"Loaded({', '.join(f'{len(getattr(self, name))} {name}' for name in ('loaded', *kinds))})"


def load_weights(
    model: Module,
    path: Source,
    *,
    rename: Rename | None = None,
    prefix: str | None = None,
    strict: bool = True,
    of: str | None = None,
    assign: bool = False,
) -> Loaded:
    r"""Load a model's weights and buffers, and nothing else, from nearly any file.

    Parameters stay the same objects, so an optimizer made before goes on with them. Values are cast to the model's
    dtypes and devices. Wrappers count for nothing on either side: of *model* what is within `AveragedModel`,
    `DataParallel`, `DistributedDataParallel` or ``torch.compile`` is loaded, and ``module.`` in front of every key of
    the file or ``_orig_mod.`` anywhere in one is taken off where that makes more of them fit. Of tied weights the file
    need hold one. No code in the file can run. NaN and Inf are loaded, and warned of. (An `AveragedModel` that has not
    averaged yet still begins with a copy of the model that is trained, whatever is loaded into it.)

    Args:
        model: The model, or a part of one.
        path: A checkpoint of a run: its ``"weights"``; any other file: its ``"state_dict"``, ``"model"``, ``"weights"``
            or ``"model_state_dict"``, or the state dict that it is; a ``.safetensors`` file; a run's folder: the newest
            sound checkpoint, as ``run.resume`` takes it (give ``folder / "best.pt"`` for the best); or a mapping.
        rename: How keys of the file become the model's: a function, which returns None to leave a key out, or regular
            expressions with their replacements, as a mapping or as pairs, applied in order (None leaves out what
            matches).
        prefix: Take only the keys in front of which it stands, without it; before *rename*. For a part of a model:
            ``load_weights(model.backbone, file, prefix="backbone")``.
        strict: Refuse if any key is missing, unexpected or misshapen. False: load what fits, and warn once of the rest.
        of: Which of the file's models, by name: ``"averaged"`` for an average, ``"model#2"``; in other files the entry,
            as in ``"model_ema"``.
        assign: Put the file's tensors in the place of the model's, with the file's dtypes and on the CPU: for a model
            on the meta device. Parameters are new objects then; make the optimizer afterwards. Ties are kept.

    Returns:
        What was loaded and what was not.

    Raises:
        LookupError: If no state dict is found in the file, or several.
        OSError: If the file is not there or cannot be read.
        RuntimeError: If the file is damaged, or does not fit: one error with all keys. Nothing was changed then.

    Example:
        >>> saved = {"backbone.weight": torch.ones(1, 2), "backbone.bias": torch.zeros(1)}
        >>> model = torch.nn.Linear(2, 1)
        >>> lt.load_weights(model, saved, rename={r"^backbone\.": ""})
        Loaded(2 loaded)
        >>> model.weight
        Parameter containing:
        tensor([[1., 1.]], requires_grad=True)
    """
    who = "load_weights"
    _require_model(model, path)
    if prefix is not None and not isinstance(prefix, str):
        raise TypeError(f"{who}: prefix must be the beginning of keys, got {prefix!r}.")
    renamed = renaming(rename, prefix, who)
    found = read(path, of, who)
    module = unwrapped(model)
    here: dict[str, Any] = dict(module.state_dict(keep_vars=True))
    names = {plain_key(key): key for key in here}
    keys = match(found.weights, names, renamed, who)
    if prefix and not keys:
        starts = dict.fromkeys(key.partition(".")[0] for key in found.weights)
        raise LookupError(f"{who}: no key in {found} begins with {prefix!r}; there are {_short(starts, 9)}.")
    saved = with_versions(((names.get(key, key), found.weights[old]) for key, old in keys.items()), None)
    _note_versions(saved, keys, found.weights)
    fit = compare(module, here, saved)
    if not fit.whole:
        keys = {names.get(key, key): old for key, old in keys.items()}
        advice = hint(fit, keys, here, saved)
        _judge(fit, found, module, here, keys, strict, advice + (" (after this rename)" if advice and rename else ""))
    if not assign:
        _require_memory(here, saved, fit)
    cast = [key for key in here if _differ(saved.get(key), here[key])] if not assign else []
    left_out = {*fit.missing, *fit.misshapen}
    loaded = tuple(k for k in here if k not in left_out and (k in saved or not k.endswith(COUNTER)))
    non_finite = tuple(key for key in loaded if _is_non_finite(saved.get(key), isinstance(here[key], Parameter)))
    _put(module, here, saved, fit, assign)
    if non_finite:
        warn(f"{who}: {len(non_finite)} of what was loaded from {found} holds NaN or Inf: {_short(non_finite, 9)}.")
    left = (tuple(fit.missing), tuple(fit.unexpected), fit.misshapen)
    return Loaded(found.path, found.entry, loaded, *left, tuple(key for key in cast if key in loaded), non_finite)


def _require_model(model: Any, path: Any) -> None:
    if isinstance(model, Module):
        return
    if isinstance(path, Module):
        raise TypeError("load_weights: the model comes first, then the file: lt.load_weights(model, path).")
    cure = "Give its model: lt.load_weights(run.model, path)." if _is_run(model) else "Give the model first."
    raise TypeError(f"load_weights: model must be a torch.nn.Module, got a {type(model).__name__}. {cure}")


def _note_versions(saved: Any, keys: Mapping[str, str], original: Any) -> None:
    """Let *saved* have the file's versions of modules, which torch asks for, by the modules' new names."""
    versions = getattr(original, "_metadata", None)
    if not isinstance(versions, Mapping):
        return
    renamed = {"": versions.get("", {})}
    for key, old in keys.items():
        new_words, old_words = key.split(".", 30)[:-1], old.split(".", 30)[:-1]
        while new_words and old_words:
            name = ".".join(new_words)
            if name in renamed:
                break
            renamed[name] = versions.get(".".join(old_words), {})
            if new_words.pop() != old_words.pop():
                break
    saved._metadata = renamed


def _judge(
    fit: Fit, found: Found, module: Module, here: Any, keys: Mapping[str, str], strict: bool, advice: str
) -> None:
    """Refuse what does not fit, or warn of it.

    Raises:
        RuntimeError: With all keys.
    """
    left = {*fit.missing, *fit.misshapen}
    nothing = len(here) > 0 and all(key in left or key.endswith(COUNTER) for key in here)
    words = [f"load_weights: {found} does not fit {type(module).__name__}."]
    if strict or nothing:
        words.append("None of it does. Nothing was changed." if nothing else "Nothing was changed.")
    else:
        words.append("What fits was loaded.")
    most = SHOWN if strict else 9
    came = {key: key if old.endswith(key) else f"{key} (in the file {old})" for key, old in keys.items()}
    lines = [
        ("missing in the file", fit.missing),
        ("not in the model", [came.get(key, key) for key in fit.unexpected]),
        ("of another shape or type", [f"{key}: {why}" for key, why in fit.misshapen.items()]),
    ]
    text = " ".join(words) + "".join(f"\n- {what} ({len(k)}): {_short(k, most)}" for what, k in lines if k)
    if strict and not nothing and not advice:
        advice += " To load what fits all the same: strict=False."
    text += f"\n{advice.strip()}" if advice else ""
    if strict or nothing:
        raise RuntimeError(text)
    warn(text)


def _short(keys: Iterable[str], most: int) -> str:
    """The first keys, made fit for a terminal, and how many more there are."""
    listed = list(keys)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(shown(key, 150) for key in listed[:most]) + more


def _require_memory(here: Mapping[str, Any], saved: Mapping[str, Any], fit: Fit) -> None:
    """See that there is something to copy into; torch would find out half-way."""
    left = {*fit.missing, *fit.misshapen}
    empty = [key for key, value in here.items() if isinstance(value, Tensor) and value.is_meta and key not in left]
    if empty:
        raise RuntimeError(
            f"load_weights: {len(empty)} of the model's tensors are on the meta device, which has no memory: "
            f'{_short(empty, 9)}. Give assign=True, or first call model.to_empty(device="cpu").'
        )
    fixed = {key: why for key, value in here.items() if key not in left and (why := _unwritable(value, saved.get(key)))}
    if fixed:
        listed = _short((f"{key}: {why}" for key, why in fixed.items()), 9)
        raise RuntimeError(
            f"load_weights: {len(fixed)} of the model's tensors cannot be copied into: {listed}. Nothing was changed."
        )


def _unwritable(here: Any, saved: Any) -> str:
    """Why torch would refuse to copy into a tensor; empty if it would not."""
    if not isinstance(here, Tensor) or not isinstance(saved, Tensor) or is_lazy(here):
        return ""
    if here.layout != saved.layout:
        return f"{saved.layout} in the file, {here.layout} here"
    if here.layout == torch.strided and any(
        n > 1 and not step for n, step in zip(here.shape, here.stride(), strict=True)
    ):
        return "its elements share memory here (expand); register it with .contiguous()"
    return "made in inference mode" if here.is_inference() and not torch.is_inference_mode_enabled() else ""


def _differ(saved: Any, here: Any) -> bool:
    return isinstance(saved, Tensor) and isinstance(here, Tensor) and not is_lazy(here) and saved.dtype != here.dtype


def _is_non_finite(value: Any, is_parameter: bool) -> bool:
    """Whether it holds NaN or Inf. A buffer may hold Inf, as masks do."""
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()) or value.is_meta:
        return False
    value = value.float() if value.itemsize == 1 else value  # torch looks into few of the small ones
    return not bool(value.isfinite().all()) if is_parameter else bool(value.isnan().any())


def _put(module: Module, here: Mapping[str, Any], saved: Any, fit: Fit, assign: bool) -> None:
    for key in fit.misshapen:
        del saved[key]
    if not assign:
        module.load_state_dict(saved, strict=False)
        return
    for key, value in saved.items():
        if isinstance(value, Tensor):  # the file's own memory may be mapped, and another's mapping is another's
            saved[key] = value.detach().clone()
    module.load_state_dict(saved, strict=False, assign=True)
    _tie(module, here, saved)
    still = [n for n, t in [*module.named_parameters(), *module.named_buffers()] if t.is_meta]
    if still:
        warn(f"load_weights: {len(still)} tensors are still on the meta device: {_short(still, 9)}.")


def _tie(module: Module, here: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Have names that were one parameter before be one again."""
    first: dict[int, str] = {}
    for key in sorted(here, key=lambda key: key not in saved):
        if isinstance(here[key], Parameter):
            name = first.setdefault(id(here[key]), key)
            if name != key:
                owner, _, field = key.rpartition(".")
                setattr(module.get_submodule(owner), field, module.get_parameter(name))


def save_weights(source: Module | Run | Source, path: str | Path, *, of: str | None = None) -> Path:
    """Write a model's plain weights and buffers to a file of their own.

    Wrappers (`AveragedModel`, `DataParallel`, `DistributedDataParallel`, ``torch.compile``) are taken off. The file is
    written whole or not at all: an older one stays until the new one has been read back.

    Args:
        source: The model; a run, for its `model`; or what `load_weights` reads: a checkpoint, a folder, a state dict.
        path: Where to; its folder is made if missing. ``.safetensors`` (needs the extra ``safetensors``) holds dense
            tensors only, and tied weights once for each name, so that every reader finds all keys; the file's metadata
            has a checksum. ``.pt`` holds anything in a state dict that ``torch.load(weights_only=True)`` takes.
        of: Which of a checkpoint's models, as for `load_weights`.

    Returns:
        *path*.

    Raises:
        ModuleNotFoundError: Without safetensors.
        OSError: If it cannot be written; what was there stays.
        TypeError: If something in the state dict cannot be saved, by name.
        ValueError: If *path* ends otherwise.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> file = lt.save_weights(model, folder / "linear.safetensors")
        >>> lt.load_weights(torch.nn.Linear(2, 1), file)
        Loaded(2 loaded)
    """
    who = "save_weights"
    if isinstance(path, Module) or not isinstance(path, str | Path):
        raise TypeError(f"{who}: what is saved comes first, then the file, got a {type(path).__name__} as path.")
    path = Path(path)
    if path.suffix not in (".pt", ".pth", SUFFIX):
        raise ValueError(f"{who}: {path.name} must end in .pt, .pth or {SUFFIX}, which say what is written.")
    weights = _weights_of(source, of, who)
    safetensors = path.suffix == SUFFIX
    ready = _ready(weights, safetensors, who)
    require_folder(path.parent, who)
    if safetensors:
        write_safetensors(path, ready, who)
    else:
        write(path, ready)
    return path


def _weights_of(source: Any, of: str | None, who: str) -> Mapping[str, Any]:
    """The plain state dict that *source* is or has."""
    if _is_run(source):
        source = source.model
        if not isinstance(source, Module):
            raise TypeError(f"{who}: the run's model is a {type(source).__name__}. Give a torch.nn.Module.")
    if not isinstance(source, Module):
        return read(source, of, who).weights
    if of is not None:
        raise TypeError(f'{who}: of="{of}" chooses a model in a file. Give the model itself.')
    weights = unwrapped(source).state_dict()
    return with_versions(((plain_key(key), value) for key, value in weights.items()), weights, plain_key)


def _is_run(thing: Any) -> bool:
    return hasattr(type(thing), "at_boundary")


def _ready(weights: Mapping[str, Any], safetensors: bool, who: str) -> Any:
    """The tensors on the CPU, in a form that the file takes, and nothing of the memory around them."""
    ready = with_versions((), weights)
    moved: dict[Any, Tensor] = {}  # what is tied stays one in a .pt file
    for key, value in weights.items():
        if isinstance(value, Tensor):
            _require_values(key, value, safetensors, who)
            place = _place(key, value)
            tensor = moved[place] if place in moved else _packed(value)
            if safetensors:
                tensor = tensor.clone() if place in moved else tensor.resolve_conj().resolve_neg().contiguous()
            moved[place] = ready[key] = tensor
        elif safetensors:
            raise TypeError(f"{who}: {key} is a {type(value).__name__}; {SUFFIX} holds tensors only. Write a .pt file.")
        else:
            require_plain(value, f"{who}: {key}")
            ready[key] = value
    return ready


def _place(key: str, value: Tensor) -> Any:
    """What tells a tensor's place in memory from others'."""
    if value.layout != torch.strided or not value.numel():
        return key
    return value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride()


def _packed(value: Tensor) -> Tensor:
    """On the CPU, in memory of its own size."""
    tensor = value.detach().cpu()
    if tensor.layout == torch.strided and tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
        return tensor.clone()
    return tensor


def _require_values(key: str, value: Tensor, safetensors: bool, who: str) -> None:
    """Refuse a tensor that has no values yet, or is of a kind that could not be loaded again."""
    if is_lazy(value):
        raise TypeError(f"{who}: {key} has no shape yet. Send a batch through the model first.")
    if value.is_meta:
        raise TypeError(f"{who}: {key} is on the meta device and holds no values.")
    if type(value) not in (Tensor, Parameter) or (safetensors and value.layout != torch.strided):
        kind = type(value).__name__ if value.layout == torch.strided else str(value.layout)
        raise TypeError(f"{who}: {key} is a {kind}, which {SUFFIX if safetensors else 'a .pt file'} does not hold.")
    if safetensors and value.dtype in (torch.complex32, torch.complex128):
        raise TypeError(f"{who}: {key} has dtype {value.dtype}, which {SUFFIX} does not hold. Write a .pt file.")
