"""Weights & Biases, offline, for real: what lies in its files."""

from __future__ import annotations

import importlib
import json
import struct
import sys

import pytest
import torch
from loops import Case, piped

import looptools as lt

pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """Whatever the machine's environment says."""
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))


def records(file):
    """What a .wandb file holds: behind 7 bytes, records cut up into blocks of 32 KiB, as in LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little room for a header
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def history(folder):
    """Rows by file, in the order in which the files were made: step and values."""
    import wandb

    wandb.teardown()  # waits until everything is written
    result = {}
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime_ns):
        for record in records(file):
            if record.HasField("history"):
                items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                result.setdefault(file, []).append((record.history.step.num, items))
    return result


def test_values_are_in_the_offline_file(tmp_path):
    """Steps are iterations done; a pass's means have the name that they have in run.results."""
    run = piped(Case()) | lt.log(every=7, line=None, to=[lt.sinks.WandB("digits", mode="offline", folder=tmp_path)])

    run.to_end()

    [rows] = history(tmp_path).values()
    assert [step for step, _ in rows] == [7, 14]
    assert rows[-1][1]["val/accuracy"] == run.results["val/accuracy"]
    assert rows[-1][1]["train/pass/loss"] == run.results["train/loss"]
    assert rows[-1][1]["train/lr"] == 0.05


def test_what_is_shown_on_demand_is_there(tmp_path):
    """Images, histograms and texts are files beside it."""
    run = piped(Case()) | lt.log(line=None, to=[lt.sinks.WandB(mode="offline", folder=tmp_path)])
    next(run)
    run["log"].image("noise", torch.rand(3, 4, 4))
    run["log"].histogram("weights", torch.arange(9.0))
    run["log"].text("note", "a < b")
    run.close()

    [[(step, values)]] = history(tmp_path).values()
    assert (step, values["train/noise/_type"], values["train/weights/_type"]) == (1, "image-file", "histogram")
    [page] = tmp_path.glob("wandb/offline-run-*/files/media/html/train/note*.html")
    assert "a &lt; b" in page.read_text()


def test_a_resumed_run_goes_on_in_the_same_one(tmp_path):
    """Its id is in the checkpoint; each process makes a file, and wandb puts them together by the id."""

    def make(out=tmp_path / "out"):
        to = [lt.sinks.WandB(mode="offline", folder=tmp_path)]
        return piped(Case(epochs=3)) | lt.log(every=7, line=None, to=to) | lt.checkpoint(out)

    first = make()
    list(first.take(14 + 3))
    first.close()
    second = make()
    second.resume()
    second.to_end()
    other = make(tmp_path / "other")
    next(other)
    other["log"].text("a", "b")
    other.close()

    ids = [file.stem for file in history(tmp_path)]
    assert len(ids) == 3
    assert ids[0] == ids[1] != ids[2]
    assert [step for rows in list(history(tmp_path).values())[:2] for step, _ in rows] == [7, 14, 21]


def test_neither_environment_nor_command_line_is_written(tmp_path, monkeypatch, capfd):
    """Nor what is printed, nor a redacted value: no byte of it is in any file, of this or any other sink."""
    monkeypatch.setenv("A_VARIABLE", "sentinel-environment")
    monkeypatch.setenv("WANDB_API_KEY", "sentinelkey" + "0" * 40)
    monkeypatch.setattr(sys, "argv", ["sentinel-program.py", "--option=sentinel-argument"])
    to = [lt.sinks.WandB(mode="offline", folder=tmp_path)]
    hparams = {"lr": 0.05, "hub": {"api_key": "sentinel-secret"}, "url": "https://me:sentinel-password@host"}
    run = piped(Case()) | lt.log(tmp_path / "out", every=3, csv=True, to=to, hparams=hparams)
    print("sentinel-output")

    run.to_end()
    assert history(tmp_path)

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"log.jsonl", "log.csv"} < {path.name for path in files}
    assert [path.name for path in files if b"sentinel" in path.read_bytes()] == []
    names = {path.name for path in files}
    assert not names & {"wandb-metadata.json", "requirements.txt", "output.log", "code"}
    [file] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"api_key" in file.read_bytes()  # it is the value that is not there


def test_options_that_log_sets_are_refused():
    """Where they are typed."""
    with pytest.raises(ValueError, match=r"WandB: options cannot hold 'config'. Give it as log\(hparams=\{...\}\)"):
        lt.sinks.WandB(options={"config": {}})
    with pytest.raises(ValueError, match="WandB: resume is set by log"):
        lt.sinks.WandB(options={"resume": "must"})
    with pytest.raises(ValueError, match="WandB: mode must be one of 'online', 'offline', 'disabled', got 'of'"):
        lt.sinks.WandB(mode="of")


def test_a_missing_package_is_named(monkeypatch):
    """With the extra that brings it, where the sink is typed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(
        ModuleNotFoundError, match=r'WandB needs wandb. Install it: pip install "torch-looptools\[wandb\]"'
    ):
        lt.sinks.WandB()
