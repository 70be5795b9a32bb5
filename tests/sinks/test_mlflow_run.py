"""MLflow with a store in a folder, for real."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from loops import Case, piped

import looptools as lt

pytest.importorskip("mlflow")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """MLflow sends nothing about its use, and takes a folder as a store."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def client(tmp_path):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=(tmp_path / "store").as_uri())


def runs(client, experiment):
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id])


def steps(client, run, key):
    return [metric.step for metric in client.get_metric_history(run.info.run_id, key)]


def test_values_parameters_texts_and_images(tmp_path, client):
    """One run, finished, with everything in it."""
    to = [lt.sinks.MLflow("digits", uri=tmp_path / "store", name="first", tags={"team": "a", "token": "hunter2"})]
    logged = lt.log(every=7, line=None, to=to, hparams={"model": {"width": 8}, "api_key": "hunter2", "long": "x" * 999})
    run = piped(Case()) | logged
    next(run)
    run["log"].text("note", "hello")
    run["log"].image("noise", torch.rand(3, 4, 4))
    run.to_end()

    [found] = runs(client, "digits")
    assert (found.info.run_name, found.info.status, found.info.user_id) == ("first", "FINISHED", "unknown")
    assert {"team": "a", "token": "<redacted>"}.items() <= found.data.tags.items()
    assert found.data.params == {"model.width": "8", "api_key": "<redacted>", "long": "x" * 497 + "..."}
    assert found.data.metrics["val/accuracy"] == run.results["val/accuracy"]
    assert steps(client, found, "train/loss") == steps(client, found, "train/pass/loss") == [7, 14]
    names = sorted(p.relative_to(tmp_path).parts[-4:] for p in tmp_path.rglob("artifacts/**/*.*"))
    assert names == [("images", "train", "noise", "00000001.png"), ("text", "train", "note", "00000001.txt")]


def test_a_resumed_run_goes_on_in_the_same_one(tmp_path, client):
    """Each step stands there once; a parameter that has changed becomes a tag."""

    def make(lr):
        to = [lt.sinks.MLflow(uri=tmp_path / "store")]
        run = piped(Case(epochs=3)) | lt.log(every=2, line=None, to=to, hparams={"lr": lr, "n": 1})
        return run | lt.checkpoint(tmp_path / "out")

    first = make(1)
    list(first.take(14 + 4))
    first.close()
    [found] = runs(client, "Default")
    assert steps(client, found, "train/loss") == [2, 4, 6, 8, 10]
    second = make(2)
    second.resume()
    second.to_end()

    [found] = runs(client, "Default")
    assert steps(client, found, "train/loss") == list(range(2, 22, 2))
    assert steps(client, found, "val/loss") == [7, 14, 21]
    assert (found.data.params, found.data.tags["resumed.lr"]) == ({"lr": "1", "n": "1"}, "2")


def test_a_resumed_run_is_running_again(tmp_path, client):
    """Until it is closed."""

    def make():
        to = [lt.sinks.MLflow(uri=tmp_path / "store")]
        return piped(Case()) | lt.log(every=1, line=None, to=to) | lt.checkpoint(tmp_path / "out")

    first = make()
    list(first.take(14))
    first.close()
    [found] = runs(client, "Default")
    assert found.info.status == "FINISHED"
    second = make()
    second.resume()
    next(second)
    assert client.get_run(found.info.run_id).info.status == "RUNNING"
    second.close()

    assert client.get_run(found.info.run_id).info.status == "FINISHED"


def test_names_that_mlflow_refuses(tmp_path, client, batches, model):
    """Are changed rather than lost; a value and those of single layers do not get in each other's way."""

    def step(model, batch):
        loss = model(batch)
        return {"loss": loss, "grad_norm": loss, "grad_norm/fc.weight": loss, "top@5": loss}

    run = lt.workflow([(lt.validate(model, batches, step), 1)], max_rounds=1)
    (run | lt.log(line=None, to=[lt.sinks.MLflow("a", uri=tmp_path / "store")])).to_end()

    [found] = runs(client, "a")
    assert sorted(found.data.metrics) == ["val/grad_norm", "val/grad_norm.fc.weight", "val/loss", "val/top_5"]


def test_neither_environment_nor_command_line_is_written(tmp_path, monkeypatch):
    """Only the client is used; `mlflow.start_run` would record user, program and commit."""
    monkeypatch.setenv("A_VARIABLE", "sentinel-environment")
    monkeypatch.setenv("LOGNAME", "sentinel-user")
    monkeypatch.setattr(sys, "argv", ["sentinel-program.py", "--option=sentinel-argument"])
    run = piped(Case()) | lt.log(line=None, to=[lt.sinks.MLflow(uri=tmp_path / "store")], hparams={"token": "sentinel"})

    run.to_end()

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path.name for path in files if b"sentinel" in path.read_bytes()] == []


def test_a_missing_package_is_named(monkeypatch):
    """With the extra that brings it, where the sink is typed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(
        ModuleNotFoundError, match=r'MLflow needs mlflow. Install it: pip install "torch-looptools\[mlflow\]"'
    ):
        lt.sinks.MLflow()
