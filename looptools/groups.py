"""Param groups for an optimizer, from rules about names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs
from torch import Tensor
from torch.nn import Module, Parameter

USUAL = ("bias", "norm")


@attrs.frozen
class _Options:
    """What sets one group apart; None where no rule speaks."""

    lr: float | None
    decay: float | None

    @property
    def plain(self) -> tuple[bool, bool]:
        """Sorts what no multiplier changes to the front."""
        return self.lr is not None, self.decay is not None


def param_groups(
    model: Module,
    *,
    lr: float | Tensor | None = None,
    weight_decay: float | None = None,
    no_decay_on: Iterable[str] = USUAL,
    lr_multipliers: Mapping[str, float] | None = None,
    decay_multipliers: Mapping[str, float] | None = None,
    frozen: bool = True,
) -> list[dict[str, Any]]:
    """Sort a model's parameters into groups for any ``torch.optim`` class.

    One group for each different set of options. Groups without a multiplier come first, then those that decay, then
    in the order of the model; so ``state.lr`` is the plain learning rate. Each has a readable ``"name"`` made of the
    keys that chose it, as in ``"default"``, ``"no_decay"``, ``"backbone"``, ``"backbone no_decay"``. *lr* and
    *weight_decay*, where given, stand in every group, so that the optimizer's own values cannot contradict them; else
    only ``weight_decay=0.0`` is written, where nothing is to decay.

    A shared (tied) parameter appears once. Frozen ones are in the groups too: an optimizer leaves alone what has no
    gradient, and they train once they are thawed.

    Args:
        model: The parameters' owner. Of several make one: ``torch.nn.ModuleList([a, b])``.
        lr: What *lr_multipliers* multiply.
        weight_decay: What *decay_multipliers* multiply.
        no_decay_on: Words; no weight decay where one stands in the parameter's full name, or in the class name of the
            module that holds it, upper or lower case: "norm" finds LayerNorm, BatchNorm2d and RMSNorm.
        lr_multipliers: Factors by whole pieces of the parameter's full name, as in ``{"backbone": 0.1}``: it finds
            "backbone.0.weight" and "module.backbone.0.weight", not "backbone2.weight". So "layers.1" does not find
            "layers.12". The longest key wins; of equally long ones the first in the alphabet.
        decay_multipliers: The same for weight decay; they win over *no_decay_on*.
        frozen: Whether parameters that do not require gradients are included.

    Raises:
        ValueError: If a key finds no parameter (the usual words excepted), a multiplier has nothing to multiply, or
            the names of a shared parameter ask for different options.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 1))
        >>> groups = lt.param_groups(model, lr=0.1, weight_decay=0.01, lr_multipliers={"2": 10})
        >>> for group in groups:
        ...     print(group["name"], len(group["params"]), group["lr"], group["weight_decay"])
        default 1 0.1 0.01
        no_decay 3 0.1 0.0
        2 1 1.0 0.01
        2 no_decay 1 1.0 0.0
        >>> optimizer = torch.optim.AdamW(groups)
    """
    if not isinstance(model, Module):
        raise TypeError(
            f"param_groups: model must be a torch.nn.Module, whose parameters have names, got {type(model).__name__}. "
            "Of several modules make one: torch.nn.ModuleList([a, b])."
        )
    words = _words(no_decay_on)
    lr_factors = _factors("lr_multipliers", lr_multipliers or {}, "lr", lr)
    decay_factors = _factors("decay_multipliers", decay_multipliers or {}, "weight_decay", weight_decay)
    found = list(_named(model))
    _require_matches(model, found, words, {"lr_multipliers": lr_factors, "decay_multipliers": decay_factors})
    first: dict[int, tuple[str, _Options]] = {}
    groups: dict[_Options, list[Parameter]] = {}
    keys: dict[_Options, list[str]] = {}
    for name, holder, parameter in found:
        lr_key, decay_key = _longest(lr_factors, name), _longest(decay_factors, name)
        decay = 0.0 if any(word in text for word in words for text in (name.lower(), holder.lower())) else None
        if decay_key:
            decay = decay_factors[decay_key]
        factor = lr_factors.get(lr_key, 1.0)
        options = _Options(None if factor == 1 else factor, None if decay == 1 else decay)
        if id(parameter) in first:
            _require_same(name, options, *first[id(parameter)])
            continue
        first[id(parameter)] = name, options
        if frozen or parameter.requires_grad:
            groups.setdefault(options, []).append(parameter)
            if options.lr is not None and lr_key not in keys.setdefault(options, []):
                keys[options].append(lr_key)
    if not groups:
        why = "all of them are frozen, and frozen=False leaves these out" if first else "it has no parameters"
        raise ValueError(f"param_groups: there is nothing to optimize in {type(model).__name__}: {why}.")
    in_order = sorted(groups, key=lambda options: options.plain)
    return [_group(groups[options], options, keys.get(options, []), lr, weight_decay) for options in in_order]


def _group(
    params: list[Parameter], options: _Options, keys: list[str], lr: Any, weight_decay: float | None
) -> dict[str, Any]:
    decay = {None: "", 0.0: "no_decay"}.get(options.decay, f"decay*{options.decay}")
    name = " ".join(word for word in ("+".join(keys), decay) if word)
    group: dict[str, Any] = {"params": params, "name": name or "default"}
    if lr is not None:
        group["lr"] = lr * (1 if options.lr is None else options.lr)
    if weight_decay is not None:
        group["weight_decay"] = weight_decay * (1 if options.decay is None else options.decay)
    elif options.decay is not None:
        group["weight_decay"] = 0.0
    return group


def _named(model: Module) -> Iterator[tuple[str, str, Parameter]]:
    """Every name of every parameter, with the class name of the module that holds it there."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield f"{prefix}.{name}" if prefix else name, type(module).__name__, parameter


def _longest(keys: Iterable[str], name: str) -> str:
    """The longest of *keys* that stands in *name*, the first in the alphabet of equals; empty if none does."""
    return min((key for key in keys if _finds(key, name)), key=lambda key: (-len(key), key), default="")


def _finds(key: str, name: str) -> bool:
    """Whether *key* stands in *name*, from dot to dot; dots at its own ends say nothing more."""
    return f".{key.strip('.')}." in f".{name}."


def _words(no_decay_on: Iterable[str]) -> list[str]:
    words = [no_decay_on] if isinstance(no_decay_on, str) else list(no_decay_on)
    if not all(isinstance(word, str) and word for word in words):
        raise TypeError(f'param_groups: no_decay_on must be words such as ("bias", "norm"), got {no_decay_on!r}.')
    return [word.lower() for word in words]


def _factors(option: str, factors: Mapping[str, float], base: str, value: object) -> dict[str, float]:
    if not isinstance(factors, Mapping) or not all(isinstance(key, str) and key for key in factors):
        raise TypeError(f'param_groups: {option} must be a dictionary such as {{"backbone": 0.1}}, got {factors!r}.')
    for key, factor in factors.items():
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            raise TypeError(f"param_groups: {option}[{key!r}] must be a number, got {factor!r}.")
        if not factor >= 0:
            raise ValueError(f"param_groups: {option}[{key!r}] must not be negative, got {factor!r}.")
    if factors and value is None:
        raise ValueError(f"param_groups: {option} has nothing to multiply. Give {base}= here too.")
    return dict(factors)


def _require_matches(
    model: Module, found: list[tuple[str, str, Parameter]], words: list[str], factors: Mapping[str, Iterable[str]]
) -> None:
    names = [name for name, _, _ in found]
    lost = [(option, key) for option, keys in factors.items() for key in keys if not any(_finds(key, n) for n in names)]
    texts = [text.lower() for name, holder, _ in found for text in (name, holder)]
    lost += [("no_decay_on", w) for w in words if w not in USUAL and not any(w in text for text in texts)]
    if lost:
        option, key = lost[0]
        children = ", ".join(name for name, _ in model.named_children()) or "none"
        whole = "" if option == "no_decay_on" else ", in whole pieces between dots"
        some = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        raise ValueError(
            f"param_groups: {option}: no parameter is found by {key!r}{whole}. The children of {type(model).__name__} "
            f"are {children}; its parameters {some}."
        )


def _require_same(name: str, options: _Options, other: str, others: _Options) -> None:
    if options != others:
        raise ValueError(
            f"param_groups: {other} and {name} are one shared parameter, but the rules differ: {_show(others)} for the "
            f"one, {_show(options)} for the other. Write rules that treat both names alike."
        )


def _show(options: _Options) -> str:
    lr, decay = options.lr, options.decay
    return f"lr times {1 if lr is None else lr}, weight decay times {1 if decay is None else decay}"
