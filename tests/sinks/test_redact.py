"""Hyperparameters without secrets."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from looptools.sinks.redact import REDACTED, flat, is_secret, plain, scrub

SECRETS = ["password", "DB_PASSWORD", "passwd", "client_secret", "token", "hf_token", "HFToken", "api_key", "apikey"]
SECRETS += ["API-KEY", "apiKey", "credentials", "auth", "Authorization", "private_key", "aws_access_key_id", "pwd"]
SECRETS += ["wandb.api_key", "--api-key", "oauth_token", "github-token", "SSH_KEY", "bearer", "OPENAI_API_KEY"]
SECRETS += ["db_pass", "pass", "pw", "passcode", "pin", "openai_key", "wandb_key", "aws_key", "license_key"]
SECRETS += ["client_key", "service_key", "deploy_key", "github_pat", "X-Api-Key"]
HARMLESS = ["tokenizer", "author", "lr", "monkey", "key", "keys", "tokenize", "keyboard", "n_heads"]
HARMLESS += ["authority", "passes", "access", "private", "bypass", "compass", "path", "pinned", "key_name", "opinion"]
HARMLESS += ["image_key", "label-key", "sortKey"]


@pytest.mark.parametrize("key", SECRETS)
def test_what_sounds_like_a_secret_is_redacted(key):
    """In any spelling and case, at any depth."""
    values = plain({"a": {"list": [{key: "hunter2"}]}, key: {"user": "hunter2"}})

    assert values == {"a": {"list": [{key: REDACTED}]}, key: REDACTED}


@pytest.mark.parametrize("key", HARMLESS)
def test_what_only_looks_similar_stays(key):
    """A whole word counts, not its letters."""
    assert plain({key: "value"}) == {key: "value"}


def test_counts_of_tokens_are_no_secrets():
    """Language models have many options with the word in them; a text under one is hidden to be safe."""
    values = {"max_tokens": 512, "pad_token_id": 0, "tokens_per_batch": 2e5, "add_bos_token": True, "token": None}
    values |= {"key_dim": 64, "num_key_value_heads": 8, "pin_memory": True, "passes": 3, "pass": 2, "sort_key": 1}

    assert plain(values) == values
    assert plain({"token": 12345, "eos_token": "x"}) == {"token": REDACTED, "eos_token": REDACTED}
    assert plain({"password": 12345, "pin": 1234}) == {"password": REDACTED, "pin": REDACTED}
    assert plain({"api_token": 12345}) == {"api_token": REDACTED}
    assert scrub("--max-tokens 512 max_tokens=512 --token 5") == "--max-tokens 512 max_tokens=512 --token <redacted>"


def test_secrets_within_texts():
    """Addresses, headers, and command lines that were handed over."""
    assert scrub("postgres://me:hunter2@host/db") == "postgres://<redacted>@host/db"
    assert scrub("Authorization: Bearer hunter2hunter2") == "Authorization: <redacted>"
    assert scrub('curl -H "authorization: Token abc" -v') == 'curl -H "authorization: <redacted>" -v'
    assert scrub("train --password hunter2 --lr 1 --verbose") == "train --password <redacted> --lr 1 --verbose"
    assert scrub("train --password 'hunter 2' --lr 1") == "train --password <redacted> --lr 1"
    assert scrub("https://a.b/c?se=2&sig=ab%2Fc&x=1") == "https://a.b/c?se=2&sig=<redacted>&x=1"
    assert scrub("https://a.b/c?X-Amz-Signature=abc") == "https://a.b/c?X-Amz-Signature=<redacted>"
    assert scrub("{'api_key': 'hunter 2', 'lr': 0.1}") == "{'api_key': <redacted>, 'lr': 0.1}"
    assert plain({"argv": ["train.py", "--token", "hunter2", "--password=hunter2", "--lr", "1"]}) == {
        "argv": ["train.py", "--token", REDACTED, f"--password={REDACTED}", "--lr", "1"]
    }


def test_pairs_and_named_values():
    """Headers, environment variables and the like; a list of two names is no pair."""
    values = {"headers": [("X-Api-Key", "hunter2"), ("Accept", "text")], "fields": ["token", "label"]}
    values |= {"env": [{"name": "password", "value": "hunter2"}, {"Key": "lr", "Value": "1"}]}

    shown = plain(values)

    assert shown["headers"] == [["X-Api-Key", REDACTED], ["Accept", "text"]]
    assert shown["fields"] == ["token", "label"]
    assert shown["env"] == [{"name": "password", "value": REDACTED}, {"Key": "lr", "Value": "1"}]


def test_objects_of_named_values_are_opened():
    """Their repr would show what is in them."""

    @dataclass
    class Hub:
        name: str
        token: str

    values = plain({"hub": Hub("a", "hunter2"), "args": argparse.Namespace(secret="hunter2", lr=1.0)})

    assert values == {"hub": {"name": "a", "token": REDACTED}, "args": {"secret": REDACTED, "lr": 1.0}}


def test_what_is_not_plain_is_shown_by_its_repr():
    """Bounded in length, without addresses in memory, and without reading a device."""
    values = {"path": Path("data"), "dtype": torch.bfloat16, "f": torch.relu_, "t": torch.ones(2, 3), "b": b"hunter2"}
    values |= {"kind": torch.nn.Linear, "long": "x" * 9999, "set": {1}, "tuple": (1, "a")}

    shown = plain(values)

    assert shown["path"], shown["dtype"] == ("data", "torch.bfloat16")
    assert (shown["t"], shown["b"], shown["set"], shown["tuple"]) == ("<tensor (2, 3)>", "<7 bytes>", [1], [1, "a"])
    assert shown["kind"] == "torch.nn.modules.linear.Linear"
    assert (len(shown["long"]), shown["long"][-3:]) == (500, "...")
    assert "0x" not in shown["f"]


def test_redacting_twice_changes_nothing():
    """A run makes its parts anew from their options."""
    once = plain({"a": {"token": "x"}, "url": "ftp://a:b@c", "argv": ["--key", "1", "password=3"], "n": [1, None]})

    assert plain(once) == once


def test_nested_mappings_become_flat():
    """For sinks that know no others."""
    assert flat({"a": {"b": {"c": 1}}, "d": None, "e": {}}) == {"a.b.c": 1, "d": "None", "e": "{}"}


def test_true_and_none_are_no_secrets():
    """`use_auth_token=True` says nothing."""
    assert not is_secret("use_auth_token", True)
    assert not is_secret("password", None)


def test_long_texts_take_no_time():
    """A pattern that begins anew at each letter would take minutes."""
    assert scrub("x" * 10**6) == "x" * 10**6
    assert len(scrub("a.b " * 10**5)) == 4 * 10**5
