"""Random generators: those of the process, seeded, saved and set together, and those that hang on a loader."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import random
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

_MOST_OBJECTS, _MOST_ITEMS = 2000, 256  # looked at in all, and in one container
_LEAVES = (str, bytes, int, float, complex, type(None), type, types.ModuleType, torch.Tensor, random.SystemRandom)


def seed_everything(seed: int, *, deterministic: bool = False) -> int:
    """Seed the generators of Python, NumPy (if it is installed) and torch, on the CPU and all devices.

    Call it before the model is made. The same seed gives the same numbers on the same machine and versions; on a GPU
    the same bits only with *deterministic*. A loader's workers draw their seeds from torch's generator, and so follow.
    It cannot set what Python has read when it started: for the order of sets of strings, start it with
    ``PYTHONHASHSEED=0``. Generators of your own (``torch.Generator``, ``numpy.random.default_rng``) keep their seeds.

    Args:
        seed: A whole number from 0 to 2**32 - 1, as NumPy takes them.
        deterministic: Have torch use algorithms that give the same bits each time, which may be slower, and raise where
            there is none. Sets ``CUBLAS_WORKSPACE_CONFIG`` unless it is set, which CUDA reads at its first use.

    Returns:
        The seed, to be logged.

    Raises:
        ValueError: If *seed* is out of this range.
        TypeError: If it is not a whole number.

    Example:
        >>> seed_everything(7)
        7
        >>> first = torch.rand(1)
        >>> bool(first == torch.rand(1)), bool(first == torch.rand(1, generator=torch.Generator().manual_seed(7)))
        (False, True)
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed_everything: seed must be a whole number, got {seed!r}.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed_everything: seed must be from 0 to 2**32 - 1, got {seed}. For any number n: n % 2**32.")
    random.seed(seed)
    if importlib.util.find_spec("numpy") is not None:
        import numpy

        numpy.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    return seed


def get_generators() -> dict[str, Any]:
    """State of Python's, NumPy's (if it is in use), torch's and each CUDA device's generator, in plain values.

    Example:
        >>> state = get_generators()
        >>> first = torch.rand(1)
        >>> set_generators(state)
        >>> bool(torch.rand(1) == first)
        True
    """
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(numbers), gauss], "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        kind, keys, position, has_gauss, cached = sys.modules["numpy"].random.get_state()
        state["numpy"] = [kind, keys.tolist(), int(position), int(has_gauss), float(cached)]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_generators(state: dict[str, Any]) -> None:
    """Put back what `get_generators` gave."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        import numpy

        numpy.random.set_state(tuple(state["numpy"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def generators_within(thing: Any) -> dict[str, Any]:
    """Generators that hang on *thing*, its attributes, theirs and so on, each once, by where they are.

    Those of torch, NumPy and Python; the process's own are left out. It goes into lists and dictionaries of up to 256
    items, into what a function holds on to, and looks at 2000 objects at most.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.zeros(4))
        >>> data.noise = random.Random(1)
        >>> generators_within(torch.utils.data.Subset(data, [0, 1])).keys()
        dict_keys(['dataset.noise'])
    """
    found: dict[str, Any] = {}
    kinds, excepted = _kinds()
    waiting, seen = [("", thing)], {id(thing), *map(id, excepted)}
    for path, value in waiting:  # it grows meanwhile: breadth first, so that a path is a short one
        if isinstance(value, kinds):
            found[path] = value
            continue
        for name, inner in _held_by(value):
            if not isinstance(inner, _LEAVES) and id(inner) not in seen and len(seen) < _MOST_OBJECTS:
                seen.add(id(inner))
                waiting.append((f"{path}.{name}" if path else name, inner))
    return found


def _kinds() -> tuple[tuple[type, ...], list[Any]]:
    """What is a generator, and which ones are the process's own or have no state."""
    kinds, excepted = [torch.Generator, random.Random], [torch.default_generator, getattr(random, "_inst", None)]
    if (numpy := sys.modules.get("numpy.random")) is not None:
        kinds += [numpy.Generator, numpy.RandomState]
        excepted.append(numpy.mtrand._rand)
    return tuple(kinds), excepted


def _held_by(value: Any) -> Iterable[tuple[Any, Any]]:
    """What *value* holds, by name."""
    kind: Any = type(value)
    for base in (dict, list, tuple):  # by their own methods: those of a class of the user's own may do something
        if issubclass(kind, base):
            if base.__len__(value) > _MOST_ITEMS:
                return ()
            return list(dict.items(value)) if base is dict else list(enumerate(base.__iter__(value)))
    if kind is types.FunctionType:
        return _in_closure(value) if value.__closure__ else ()
    if kind is types.MethodType:
        return (("self", value.__self__),)
    if kind is functools.partial:
        return ("func", value.func), ("args", value.args), ("keywords", value.keywords)
    slots = []
    for name in _slots(kind):
        with contextlib.suppress(AttributeError):  # not by getattr: a state would look whether it is the last one
            slots.append((name, object.__getattribute__(value, name)))
    held = getattr(value, "__dict__", None) or {}
    if "_iterator" in held:  # a loader's: queues and processes
        held = {name: inner for name, inner in held.items() if name != "_iterator"}
    return [*slots, *held.items()]


def _in_closure(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue


@functools.lru_cache(512)
def _slots(kind: type) -> tuple[str, ...]:
    """Names of the attributes that are not in the instance's dictionary."""
    named = (base.__dict__.get("__slots__", ()) for base in kind.__mro__)
    names = (name for slots in named for name in ((slots,) if isinstance(slots, str) else slots))
    return tuple(name for name in names if not name.startswith("__"))


def get_generator(generator: Any) -> Any:
    """State of one generator, in plain values.

    Example:
        >>> generator = random.Random(0)
        >>> state, first = get_generator(generator), generator.random()
        >>> set_generator(generator, state)
        >>> generator.random() == first
        True
    """
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        version, numbers, gauss = generator.getstate()
        return [version, list(numbers), gauss]
    if hasattr(generator, "bit_generator"):
        return _plain(generator.bit_generator.state)
    return _plain(generator.get_state(legacy=False))


def set_generator(generator: Any, state: Any) -> None:
    """Put back what `get_generator` gave."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        version, numbers, gauss = state
        generator.setstate((version, tuple(numbers), gauss))
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = _from_plain(state)
    else:
        generator.set_state(_from_plain(state))


def _plain(state: Any) -> Any:
    """NumPy's state of a generator, with its arrays as lists."""
    if isinstance(state, Mapping):
        return {key: _plain(value) for key, value in state.items()}
    if hasattr(state, "dtype"):
        return {"dtype": str(state.dtype), "values": state.tolist()} if state.shape else state.tolist()
    return state


def _from_plain(state: Any) -> Any:
    if not isinstance(state, Mapping):
        return state
    if state.keys() == {"dtype", "values"}:
        import numpy

        return numpy.array(state["values"], dtype=state["dtype"])
    return {key: _from_plain(value) for key, value in state.items()}


def same_states(left: Any, right: Any) -> bool:
    """Whether two plain states of generators are equal.

    Example:
        >>> before = get_generators()
        >>> same_states(before, get_generators()), same_states(before, torch.rand(1) and get_generators())
        (True, False)
    """
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(same_states(left[key], right[key]) for key in left)
    if isinstance(left, list) and left and isinstance(left[0], torch.Tensor):  # one for each CUDA device
        return len(left) == len(right) and all(map(same_states, left, right))
    return bool(left == right)


def number_from(*facts: Any) -> int:
    """A number of 128 bits that follows from *facts*, and looks random.

    Example:
        >>> number_from(1, 2) == number_from(1, 2), number_from(1, 2) == number_from(12)
        (True, False)
    """
    return int.from_bytes(hashlib.blake2b(repr(facts).encode(), digest_size=16).digest(), "little")


def _words(number: int) -> list[int]:
    """As NumPy takes a large seed."""
    return [number >> shift & 0xFFFFFFFF for shift in (0, 32, 64, 96)]


def seed_generator(generator: Any, number: int) -> None:
    """Have one generator begin at a *number* of up to 128 bits."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(number & (2**63 - 1))
    elif isinstance(generator, random.Random):
        generator.seed(number)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = type(generator.bit_generator)(number).state
    else:
        generator.seed(_words(number))


@contextmanager
def drawn_from(*facts: Any, own: Mapping[str, Any], put_back: bool = True) -> Iterator[None]:
    """Within the ``with``, what is drawn on the CPU follows from *facts* alone; then all stands as it stood.

    Python's, NumPy's (if it is in use) and torch's generators are seeded, and each of *own*. Those of CUDA are not.

    Args:
        facts: What the numbers follow from.
        own: Other generators, by name.
        put_back: False where nobody draws afterwards: it takes 20 µs rather than 0.1 to 0.2 ms, most of it NumPy's.

    Example:
        >>> with drawn_from("seed", 0, own={}):
        ...     first = torch.rand(1)
        >>> with drawn_from("seed", 0, own={}):
        ...     bool(torch.rand(1) == first)
        True
    """
    numpy, process = sys.modules.get("numpy"), torch.default_generator
    if put_back:
        python, cpu = random.getstate(), process.get_state()
        array = numpy.random.get_state(legacy=False) if numpy is not None else None
        before = [(generator, get_generator(generator)) for generator in own.values()]
    number = number_from(*facts)
    random.seed(number)
    process.manual_seed(number & (2**63 - 1))
    if numpy is not None:
        numpy.random.seed(_words(number_from(number, "numpy")))  # its algorithm is Python's, and must not draw the same
    for name, generator in own.items():
        seed_generator(generator, number_from(number, name))
    try:
        yield
    finally:
        if put_back:
            random.setstate(python)
            process.set_state(cpu)
            if numpy is not None:
                numpy.random.set_state(array)
            for generator, state in before:
                set_generator(generator, state)
