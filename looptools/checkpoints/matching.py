"""Which weights of a file go where in a model, what does not fit, and what might make it fit."""

from __future__ import annotations

import re
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn import DataParallel, Module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

Rename = Callable[[str], str | None] | Mapping[str, str | None] | Iterable[tuple[str, str | None]]
Keys = dict[str, str]  # what a key is called now: what it is called in the file
WRAPPED, COMPILED, EXTRA = "module.", "_orig_mod.", "_extra_state"


def unwrapped(model: Any) -> Any:
    """The model without what is wrapped around it: averages, data parallel wrappers, ``torch.compile``."""
    while isinstance(model, DataParallel | DistributedDataParallel | AveragedModel) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def plain_key(key: str) -> str:
    """A key as it is without ``torch.compile``, which also leaves its mark on submodules.

    Example:
        >>> plain_key("backbone._orig_mod.conv.weight")
        'backbone.conv.weight'
    """
    if COMPILED not in key:
        return key
    return ".".join(word for word in key.split(".") if word != COMPILED[:-1])


def renaming(rename: Any, prefix: str | None, who: str) -> Callable[[str], str | None]:
    """The function that gives a file's key its new name, None to leave it out.

    Raises:
        TypeError: If *rename* is none of what it may be.
        ValueError: If a pattern is no regular expression.
    """
    steps = [_taking(prefix)] if prefix else []
    if callable(rename):
        steps.append(_checked(rename, who))
    elif rename is not None:
        pairs = rename.items() if isinstance(rename, Mapping) else rename
        steps += [_replacing(pair, who) for pair in _pairs(pairs, who)]

    def renamed(key: str) -> str | None:
        new: str | None = key
        for step in steps:
            new = step(new) if new is not None else None
        return new

    return renamed


def _taking(prefix: str) -> Callable[[str], str | None]:
    start = prefix.removesuffix(".") + "."
    return lambda key: key.removeprefix(start) if key.startswith(start) else None


def _checked(rename: Callable[[str], str | None], who: str) -> Callable[[str], str | None]:
    def renamed(key: str) -> str | None:
        new = rename(key)
        if new is not None and not isinstance(new, str):
            raise TypeError(
                f"{who}: rename must return a key, or None to leave it out; for {key!r} it returned {new!r}."
            )
        return new

    return renamed


def _pairs(pairs: Any, who: str) -> list[tuple[str, str | None]]:
    wrong = f"{who}: rename must be a function, {{pattern: replacement}} or [(pattern, replacement)], got {pairs!r}."
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise TypeError(wrong)
    listed = list(pairs)
    for pair in listed:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(wrong)
        if pair[1] is not None and not isinstance(pair[1], str):
            raise TypeError(wrong)
    return [(pattern, replacement) for pattern, replacement in listed]


def _replacing(pair: tuple[str, str | None], who: str) -> Callable[[str], str | None]:
    pattern, replacement = pair
    try:
        found = re.compile(pattern)
        if replacement is not None:
            found.sub(replacement, "")  # a group that is not there is seen now
    except (re.error, IndexError) as error:
        raise ValueError(f"{who}: rename: {pattern!r} -> {replacement!r} is no regular expression: {error}.") from error
    if replacement is None:
        return lambda key: None if found.search(key) else key
    return lambda key: found.sub(replacement, key)


def match(saved: Iterable[str], here: Iterable[str], renamed: Callable[[str], str | None], who: str) -> Keys:
    """Read a file's keys as they fit *here* best: as they are, or without the wrappers' prefixes.

    Raises:
        ValueError: If two keys get one name.
    """
    wanted = set(here)
    raw = {key: key for key in saved}
    readings = [_apply(renamed, level, who) for level in _levels(raw)] + list(_levels(_apply(renamed, raw, who)))
    return max(readings, key=lambda keys: sum(key in wanted for key in keys))  # the first of equals


def _apply(renamed: Callable[[str], str | None], keys: Keys, who: str) -> Keys:
    found: Keys = {}
    for key, old in keys.items():
        new = renamed(key)
        if new in found:
            raise ValueError(f"{who}: rename: {found[new]!r} and {old!r} both become {new!r}.")
        if new is not None:
            found[new] = old
    return found


def _levels(keys: Keys) -> Iterator[Keys]:
    """The keys as they are, then with one wrapper after another taken off."""
    yield keys
    plain = {plain_key(key): old for key, old in keys.items()}
    if len(plain) == len(keys):
        keys = plain
        yield keys
    while inner := {key[len(WRAPPED) :]: old for key, old in keys.items() if key.startswith(WRAPPED)}:
        if keys.keys() - {WRAPPED + key for key in inner} - {"n_averaged"}:
            return
        keys = inner
        yield keys


@attrs.define
class Fit:
    """What of a file does not go into a model: keys of the model, but for *unexpected*."""

    missing: list[str]
    unexpected: list[str]
    misshapen: dict[str, str]  # in words

    @property
    def whole(self) -> bool:
        """Whether everything fits."""
        return not (self.missing or self.unexpected or self.misshapen)


def compare(module: Module, here: Mapping[str, Any], saved: OrderedDict[str, Any]) -> Fit:
    """What of *saved* does not go into *module*; torch is asked where modules have a say in it. Changes nothing.

    Args:
        module: The model, unwrapped.
        here: Its ``state_dict(keep_vars=True)``.
        saved: The state dict to load.
    """
    misshapen = {key: words for key in here if key in saved and (words := _misfit(saved[key], here[key]))}
    fit = Fit([key for key in here if key not in saved], [key for key in saved if key not in here], misshapen)
    if not fit.whole and any(map(_has_a_say, module.modules())):
        fit = _ask_torch(module, here, saved, fit)
    got = {id(here[key]) for key in here if key not in fit.missing and key not in fit.misshapen}
    fit.missing = [key for key in fit.missing if id(here.get(key)) not in got]  # tied to one that is there
    return fit


def _misfit(saved: Any, here: Any) -> str:
    """Why *saved* cannot be copied into *here*; empty if it can."""
    if not isinstance(here, Tensor) or is_lazy(here):  # a module's own state, or a shape that is yet to come
        return ""
    if not isinstance(saved, Tensor):
        return f"a {type(saved).__name__} in the file, {tuple(here.shape)} here"
    if saved.shape != here.shape and (saved.shape, here.shape) != ((1,), ()):  # as torch takes those of its first days
        return f"{tuple(saved.shape)} in the file, {tuple(here.shape)} here"
    if here.dtype != torch.bool and not torch.can_cast(saved.dtype, here.dtype):
        kinds = [str(one.dtype).removeprefix("torch.") for one in (saved, here)]
        return f"{kinds[0]} in the file, {kinds[1]} here, which would lose a part of it"
    return ""


def _has_a_say(module: Module) -> bool:
    """Whether a module has its own way of loading: BatchNorm fills in a counter, others know older names."""
    return bool(module._load_state_dict_pre_hooks) or type(module)._load_from_state_dict is not _PLAIN


_PLAIN = Module._load_from_state_dict


class _Dry(Module):
    """Loads into a module whose tensors are other ones for the time being."""

    def __init__(self, module: Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, saved: OrderedDict[str, Any]) -> Any:
        return self.inner.load_state_dict(saved, strict=False)


def _ask_torch(module: Module, here: Mapping[str, Any], saved: OrderedDict[str, Any], fit: Fit) -> Fit:
    """What torch finds missing and unexpected, by loading tensors without memory into others of that kind."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    if any(is_lazy(tensor) for _, tensor in tensors):
        return fit
    standing = {f"inner.{name}": torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    empty = with_versions(((key, _without_memory(value)) for key, value in saved.items()), saved)
    lossy = [key for key in fit.misshapen if isinstance(saved[key], Tensor) and saved[key].shape == here[key].shape]
    for left_out in (lossy, list(fit.misshapen)):
        for key in left_out:
            empty[key] = _without_memory(here[key])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they come again when it is done in earnest
                found = torch.func.functional_call(_Dry(module), standing, (empty,), tie_weights=False)
        except Exception:  # shapes that differ, or a hook that must see values
            continue
        return Fit(list(found.missing_keys), list(found.unexpected_keys), {key: fit.misshapen[key] for key in left_out})
    return fit


def _without_memory(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value


def with_versions(
    items: Iterable[tuple[str, Any]], other: Any, renamed: Callable[[str], str] = str
) -> OrderedDict[str, Any]:
    """A state dict, with what an *other* one says of the versions of its modules, if it does."""
    ordered = OrderedDict(items)
    versions = getattr(other, "_metadata", None)
    if isinstance(versions, Mapping):
        ordered._metadata = {renamed(name): value for name, value in versions.items()}  # type: ignore[attr-defined]
    return ordered


def hint(fit: Fit, keys: Keys, here: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    """What to write so that more of it fits; empty if nothing comes to mind."""
    missing, unexpected = set(fit.missing), list(fit.unexpected)
    swaps: list[tuple[str, str]] = []
    while len(swaps) < 3 and (counted := _swaps(unexpected, missing, here, saved)):
        before, after = counted.most_common(1)[0][0]
        swaps.append((before, after))
        missing -= {after + key.removeprefix(before) for key in unexpected if key.startswith(before)}
        unexpected = [key for key in unexpected if not key.startswith(before)]
    patterns = {f"^{before}".replace(".", r"\."): after for before, after in swaps}
    renamed = renaming(patterns, None, "")
    gained = sum(key in here for key in {renamed(key) for key in keys}) - sum(key in here for key in keys)
    if gained <= 0:
        return ""
    before, after = swaps[0]
    if len(swaps) == 1 and before and not after:
        if all(key.startswith(before) for key in keys):
            return f"Every key in the file begins with {before!r}: {_spelt(patterns)}."
        if not missing:
            return f"All that is missing is there behind {before!r}: prefix={before[:-1]!r} takes that alone."
    return f"{gained} more would fit with {_spelt(patterns)}."


def _spelt(patterns: Mapping[str, str]) -> str:
    return "rename={" + ", ".join(f'r"{pattern}": "{new}"' for pattern, new in patterns.items()) + "}"


def _swaps(
    unexpected: Iterable[str], missing: set[str], here: Mapping[str, Any], saved: Mapping[str, Any]
) -> Counter[tuple[str, str]]:
    """How many keys would fit if one beginning were swapped for another; what ends alike and has one shape counts."""
    endings: dict[str, list[str]] = {}
    for key in missing:
        for ending in _endings(key):
            endings.setdefault(ending, []).append(key)
    counted: Counter[tuple[str, str]] = Counter()
    for key in unexpected:
        for ending in _endings(key):  # the longest first
            alike = endings.get(ending, ())
            if len(alike) > 9:
                break
            if like := [other for other in alike if not _misfit(saved.get(key), here.get(other))]:
                if len(like) == 1:
                    counted[key.removesuffix(ending), like[0].removesuffix(ending)] += 1
                break
    return counted


def _endings(key: str) -> list[str]:
    """What a key ends with, in whole words.

    Example:
        >>> _endings("head.fc.weight")
        ['head.fc.weight', 'fc.weight', 'weight']
    """
    words = key.split(".", 30)
    return [".".join(words[number:]) for number in range(len(words))]
