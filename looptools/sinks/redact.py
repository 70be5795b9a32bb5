"""Hyperparameters in plain values, without what nobody should read in a log."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from os import PathLike
from typing import Any

import attrs
import torch
from torch import Tensor

REDACTED = "<redacted>"
LONGEST = 500  # characters of a value; MLflow took no more for long
# Looked for in a key without its punctuation: `API-Key`, `apiKey` and `api_key` are one.
PARTS: tuple[str, ...] = (
    "password",
    "passwd",
    "passphrase",
    "secret",
    "credential",
    "apikey",
    "accesskey",
    "privatekey",
    "authkey",
)
PARTS += ("signingkey", "encryptionkey", "sshkey", "authtoken", "accesstoken", "connectionstring")
WORDS = {"pwd", "auth", "oauth", "oauth2", "authorization", "bearer", "jwt", "cookie", "cookies"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_FLAG = re.compile(r"--?[\w.-]+")
_ASSIGNED = re.compile(
    r"""(?<![\w.-])(?P<key>[\w.-]++)(?P<is>["']?\s*[=:]\s*)(?P<value>"[^"]*"|'[^']*'|[^\s,;&)}\]]+)"""
)
_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+\S{6,}")


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """*values* as nested dictionaries and lists of plain values; secrets are replaced by ``<redacted>``.

    What a key names as a secret (password, token, api_key, credentials, auth and the like) is replaced whole, and so
    are passwords in addresses and in texts such as ``"--token=..."``. Numbers under a key such as ``max_tokens``
    stay. What is not plain is shown by its ``repr``, in at most 500 characters.

    Example:
        >>> plain({"lr": 0.1, "hub": {"api_key": "abc"}, "url": "https://me:abc@host/data", "max_tokens": 512})
        {'lr': 0.1, 'hub': {'api_key': '<redacted>'}, 'url': 'https://<redacted>@host/data', 'max_tokens': 512}
    """
    result = {}
    for key, value in values.items():
        secret = is_secret(str(key), value)
        result[str(key)] = REDACTED if secret else _plain(value)
    return result


def is_secret(key: str, value: Any = "") -> bool:
    """Whether *key* sounds like the name of a secret, and *value* may be one: None, True and False never are.

    Example:
        >>> is_secret("HF_TOKEN"), is_secret("apiKey"), is_secret("tokenizer"), is_secret("author")
        (True, True, False, False)
    """
    if value is None or isinstance(value, bool):
        return False
    words = [word.lower() for word in _WORD.findall(key)]
    joined = "".join(words)
    if any(part in joined for part in PARTS) or WORDS.intersection(words):
        return True
    tokens = any(word.endswith(("token", "tokens")) for word in words)
    counts = isinstance(value, int | float) and len(words) > 1  # pad_token_id, max_tokens
    return tokens and not counts


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with keys such as ``model.width``; lists as texts.

    Example:
        >>> flat({"model": {"width": 8, "kernel": [3, 3]}})
        {'model.width': 8, 'model.kernel': '[3, 3]'}
    """
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value if isinstance(value, str | int | float) else _bounded(str(value))
    return result


def _plain(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, Mapping):
        return plain(value)
    if (fields := _fields(value)) is not None:
        return plain(fields)
    if isinstance(value, Sequence | Set) and not isinstance(value, str | bytes | bytearray):
        return _list(list(value))
    return _bounded(scrub(_text(value)))


def _list(values: list[Any]) -> list[Any]:
    """A list of plain values; what follows a flag such as ``--token`` is a secret."""
    before = ["", *values][: len(values)]
    return [
        REDACTED if isinstance(flag, str) and _FLAG.fullmatch(flag) and is_secret(flag) else _plain(value)
        for flag, value in zip(before, values, strict=True)
    ]


def _fields(value: Any) -> Mapping[str, Any] | None:
    """What an object made of named values holds: a dataclass, attrs class or ``argparse.Namespace``."""
    if isinstance(value, type):
        return None
    if attrs.has(type(value)):
        return {field.name: getattr(value, field.name) for field in attrs.fields(type(value))}
    if hasattr(value, "__dataclass_fields__") or type(value).__name__ in ("Namespace", "SimpleNamespace"):
        return dict(vars(value)) if hasattr(value, "__dict__") else {k: getattr(value, k) for k in value.__slots__}
    return None


def _text(value: Any) -> str:
    if isinstance(value, str | PathLike | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, bytes | bytearray):
        return f"<{len(value)} bytes>"
    if isinstance(value, Tensor):  # its repr would wait for the device
        return f"<tensor {tuple(value.shape)}>"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"  # its repr has an address in memory
    return repr(value)


def scrub(text: str) -> str:
    """*text* without the passwords of addresses, and without values assigned to a name that sounds like a secret.

    Example:
        >>> scrub("train --hub-token=abc --lr=0.1")
        'train --hub-token=<redacted> --lr=0.1'
    """
    text = _IN_URL.sub(f"{REDACTED}@", text)
    text = _BEARER.sub(lambda found: f"{found[1]} {REDACTED}", text)
    return _ASSIGNED.sub(
        lambda found: f"{found['key']}{found['is']}{REDACTED}" if is_secret(found["key"]) else found[0], text
    )


def _bounded(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
