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
PARTS: tuple[str, ...] = ("password", "passwd", "passphrase", "passcode", "secret", "credential", "connectionstring")
PARTS += ("apikey", "accesskey", "privatekey", "authkey", "signingkey", "encryptionkey", "sshkey")
PARTS += ("authtoken", "accesstoken", "apitoken", "bottoken", "hubtoken")
WORDS = {"pwd", "auth", "oauth", "oauth2", "authorization", "bearer", "jwt", "cookie", "cookies"}
LAST = {"pw", "pin"}  # words that say so at the end of a key
LAST_OF_TEXTS = {"pass"}  # and where the value is a text: `pass=2` may count passes
FIELDS = {"image", "input", "output", "label", "target", "data", "text", "sort", "primary", "column"}  # of a data set
LAST_OF_SEVERAL = {"key", "pat"}  # `wandb_key`, `github_pat`; a key by itself may be anything
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_NUMBER = re.compile(r"[+-]?\d[\d_.]*(e[+-]?\d+)?", re.IGNORECASE)
_FLAG = re.compile(r"--?[\w.-]+")
_VALUE = r"""(?!<redacted>)(?P<value>"[^"]*"|'[^']*'|[^\s,;&)}\]]+)"""
_ASSIGNED = re.compile(rf"""(?<![\w.-])(?P<key>[\w.-]++)(?P<is>["']?\s*[=:]\s*){_VALUE}""")
_FLAGGED = re.compile(rf"(?<!\S)(?P<key>--?[\w.-]++)(?P<is>\s+)(?!-){_VALUE}")
_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")
_SIGNED = re.compile(r"(?i)(?<=[?&])((?:[\w.-]*sig(?:nature)?|key|code)=)[^&#\s\"']+")
_HEADER = re.compile(r"""(?i)\b(authorization["']?\s*[=:]\s*["']?)(?:\w+\s+)?[^\s"',;]+""")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+\S{6,}")


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """*values* as nested dictionaries and lists of plain values; secrets are replaced by ``<redacted>``.

    What a key names as a secret (password, token, api_key, credentials, auth and the like) is replaced whole, and so
    are passwords in addresses and in texts such as ``"--token=..."``, the second of a pair ``("X-Api-Key", ...)``, and
    the value of ``{"name": "password", "value": ...}``. Numbers under a key such as ``max_tokens`` stay. What is not
    plain is shown by its ``repr``, in at most 500 characters.

    Example:
        >>> plain({"lr": 0.1, "hub": {"api_key": "abc"}, "url": "https://me:abc@host/data", "max_tokens": 512})
        {'lr': 0.1, 'hub': {'api_key': '<redacted>'}, 'url': 'https://<redacted>@host/data', 'max_tokens': 512}
    """
    name = next((value for key, value in values.items() if str(key).lower() in ("name", "key")), None)
    result = {}
    for key, value in values.items():
        says = name if str(key).lower() == "value" and isinstance(name, str) else str(key)
        result[str(key)] = REDACTED if is_secret(says, value) else _plain(value)
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
    if not words:
        return False
    joined, last = "".join(words), words[-1]
    if any(part in joined for part in PARTS) or WORDS.intersection(words) or last in LAST:
        return True
    number, several = isinstance(value, int | float), len(words) > 1
    if not number and (last in LAST_OF_TEXTS or (several and last in LAST_OF_SEVERAL and words[-2] not in FIELDS)):
        return True
    tokens = any(word.endswith(("token", "tokens")) for word in words)
    return tokens and not (number and several)  # pad_token_id, max_tokens


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
        return _list(list(value), pair=isinstance(value, tuple))
    return _bounded(scrub(_text(value)))


def _list(values: list[Any], pair: bool) -> list[Any]:
    """A list of plain values; what follows a flag such as ``--token``, or a name in a *pair*, is a secret."""
    before = ["", *values][: len(values)]
    pair = pair and len(values) == 2
    return [
        REDACTED
        if isinstance(key, str) and (pair or _FLAG.fullmatch(key)) and is_secret(key, _read(value))
        else _plain(value)
        for key, value in zip(before, values, strict=True)
    ]


def _read(value: Any) -> Any:
    """A number that is written as a text."""
    return 0 if isinstance(value, str) and _NUMBER.fullmatch(value) else value


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
    text = _SIGNED.sub(rf"\1{REDACTED}", text)
    text = _HEADER.sub(rf"\1{REDACTED}", text)
    text = _BEARER.sub(rf"\1 {REDACTED}", text)
    return _FLAGGED.sub(_without_value, _ASSIGNED.sub(_without_value, text))


def _without_value(found: re.Match[str]) -> str:
    secret = is_secret(found["key"], _read(found["value"].strip("\"'")))
    return f"{found['key']}{found['is']}{REDACTED}" if secret else found[0]


def _bounded(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
