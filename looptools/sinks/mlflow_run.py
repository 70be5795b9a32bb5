"""MLflow."""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from ..state import State
from .redact import flat, plain, scrub
from .rows import FACTS, Row, tag_of, trained

AT_ONCE = 100  # parameters that MLflow takes in one call; of metrics it takes 1000


def _uri(uri: Any) -> str | None:
    return uri.resolve().as_uri() if isinstance(uri, Path) else uri


@attrs.define(eq=False)
class MLflow:
    """A run in an MLflow experiment (extra: ``mlflow``); a resumed run goes on in the same one.

    Values are ``train/loss`` and ``val/accuracy``, means over a whole training pass ``train/pass/loss``; steps are
    training iterations done. Of the iterations that a resumed run repeats, what is there already stays. The client
    alone is used, so neither the command line nor user, code or environment is recorded.

    Args:
        experiment: Name of the experiment, made if missing.
        uri: Address of the tracking server or database, or the ``Path`` of a folder; by default what
            ``MLFLOW_TRACKING_URI`` says. (MLflow takes a folder only if ``MLFLOW_ALLOW_FILE_STORE`` is set.)
        name: What the run is called; MLflow makes up a name without one.
        tags: Tags of the run; secrets among them are redacted.

    Raises:
        ModuleNotFoundError: If mlflow is missing.

    Example:
        >>> lt.log("runs/digits", to=[MLflow("digits", uri="sqlite:///runs/mlflow.db")]).to
        (MLflow(experiment='digits', uri='sqlite:///runs/mlflow.db', name=None, tags={}),)
    """

    experiment: str = attrs.field(default="Default", validator=attrs.validators.instance_of(str))
    uri: str | None = attrs.field(default=None, kw_only=True, converter=_uri, repr=lambda uri: repr(uri and scrub(uri)))
    name: str | None = attrs.field(default=None, kw_only=True)
    tags: Mapping[str, Any] = attrs.field(factory=dict, kw_only=True, converter=plain)
    _client: Any = attrs.field(default=None, init=False, repr=False)
    _id: str | None = attrs.field(default=None, init=False, repr=False)
    _open: bool = attrs.field(default=False, init=False, repr=False)
    _reached: dict[str, int] = attrs.field(factory=dict, init=False, repr=False)  # steps written before a resumption

    def __attrs_post_init__(self) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise ModuleNotFoundError('MLflow needs mlflow. Install it: pip install "torch-looptools[mlflow]".')

    def fresh(self) -> MLflow:
        return attrs.evolve(self)

    def write(self, row: Row, state: State) -> None:
        from mlflow.entities import Metric

        client, run = self._opened()
        step, now = row["trained"], int(time.time() * 1000)
        values = {_name(tag_of(row, key.replace("/", "."), state)): row[key] for key in row if key not in FACTS}
        metrics = [Metric(k, v, now, step) for k, v in values.items() if step > self._reached.get(k, -1)]
        for begin in range(0, len(metrics), 10 * AT_ONCE):
            client.log_batch(run, metrics=metrics[begin : begin + 10 * AT_ONCE])

    def image(self, tag: str, image: Any, state: State) -> None:
        client, run = self._opened()
        client.log_image(run, image, artifact_file=f"{_path('images', tag, state)}.png")

    def text(self, tag: str, text: str, state: State) -> None:
        client, run = self._opened()
        client.log_text(run, text, f"{_path('text', tag, state)}.txt")

    def hparams(self, values: Mapping[str, Any]) -> None:
        """Write parameters; MLflow keeps the first value of each, so what a resumed run has changed becomes a tag."""
        from mlflow.entities import Param, RunTag

        client, run = self._opened()
        there = client.get_run(run).data.params
        texts = {_name(key): str(value) for key, value in flat(values).items()}
        new = [Param(key, text) for key, text in texts.items() if key not in there]
        changed = [RunTag(f"resumed.{key}", text) for key, text in texts.items() if there.get(key, text) != text]
        for begin in range(0, len(new), AT_ONCE):
            client.log_batch(run, params=new[begin : begin + AT_ONCE])
        for begin in range(0, len(changed), AT_ONCE):
            client.log_batch(run, tags=changed[begin : begin + AT_ONCE])

    def mark(self) -> str | None:
        """The id of the MLflow run."""
        return self._id

    def rewind(self, mark: str | None) -> None:
        self.close()
        self._id, self._reached = mark, {}
        if mark is not None:
            client, run = self._opened()
            for key in client.get_run(run).data.metrics:
                self._reached[key] = max(metric.step for metric in client.get_metric_history(run, key))

    def close(self) -> None:
        if self._open:
            self._open = False
            self._client.set_terminated(self._id)

    def _opened(self) -> tuple[Any, str]:
        if self._client is None:
            from mlflow.tracking import MlflowClient

            self._client = MlflowClient(tracking_uri=self.uri)
        client = self._client
        if self._id is None:
            found = client.get_experiment_by_name(self.experiment)
            home = client.create_experiment(self.experiment) if found is None else found.experiment_id
            tags = {key: str(value) for key, value in self.tags.items()}
            self._id = client.create_run(home, run_name=self.name, tags=tags).info.run_id
        elif not self._open:
            client.update_run(self._id, status="RUNNING")
        self._open = True
        assert self._id is not None
        return client, self._id


def _name(key: str) -> str:
    """*key* without the characters that MLflow refuses."""
    return re.sub(r"[^\w\-. /]", "_", key)


def _path(kind: str, tag: str, state: State) -> str:
    return _name(f"{kind}/{state.phase}/{tag}/{trained(state):08}")
