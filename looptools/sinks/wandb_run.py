"""Weights & Biases."""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from ..checks import one_of
from ..state import State
from .redact import plain
from .rows import FACTS, Row, tag_of, trained

# W&B would also take down the command line, the machine, the installed packages, the code and what is printed.
NOTHING_MORE: dict[str, Any] = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "save_code": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
    "host": "-",
    "program": "-",
    "program_abspath": "-",
    "program_relpath": "-",
}
OURS = {"config": "log(hparams={...})", "dir": "folder=...", "settings": "environment variables of wandb"}
OURS |= {key: f"{key}=..." for key in ("project", "name", "mode")}


def _not_ours(part: WandB, field: Any, options: Mapping[str, Any]) -> None:
    for key in options:
        if key in ("id", "resume", "resume_from", "reinit"):
            raise ValueError(f"WandB: {key} is set by log, so that a resumed run goes on in the same W&B run.")
        if key in OURS:
            raise ValueError(f"WandB: options cannot hold {key!r}. Give it as {OURS[key]}.")


@attrs.define(eq=False)
class WandB:
    """A run on Weights & Biases (extra: ``wandb``); a resumed run goes on in the same one.

    Values are ``train/loss`` and ``val/accuracy``, means over a whole training pass ``train/pass/loss``. Steps are
    training iterations done; W&B drops what comes for a step that is behind it, so the iterations that a resumed run
    repeats stand there once. Command line, environment, code, installed packages and printed text are not recorded.

    Args:
        project: Where the run is filed.
        name: What it is called; W&B makes up a name without one.
        folder: Where files go, in a subfolder ``wandb``; by default the current one.
        mode: ``"online"``, ``"offline"`` (``wandb sync`` sends it later) or ``"disabled"``; by default what
            ``WANDB_MODE`` says.
        options: Further arguments of ``wandb.init``, such as ``{"entity": "team", "tags": ["a"]}``.

    Attributes:
        run: What ``wandb.init`` returned; None while nothing is open.

    Raises:
        ModuleNotFoundError: If wandb is missing.

    Example:
        >>> lt.log("runs/digits", to=[WandB("digits", mode="offline")]).to
        (WandB(project='digits', name=None, folder=None, mode='offline', options={}),)
    """

    project: str | None = None
    name: str | None = attrs.field(default=None, kw_only=True)
    folder: Path | None = attrs.field(default=None, kw_only=True, converter=attrs.converters.optional(Path))
    mode: Literal["online", "offline", "disabled"] | None = attrs.field(
        default=None, kw_only=True, validator=attrs.validators.optional(one_of("online", "offline", "disabled"))
    )
    options: Mapping[str, Any] = attrs.field(
        factory=dict, kw_only=True, validator=_not_ours, repr=lambda options: repr(plain(options))
    )
    run: Any = attrs.field(default=None, init=False, repr=False)
    _id: str | None = attrs.field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ModuleNotFoundError('WandB needs wandb. Install it: pip install "torch-looptools[wandb]".')

    def fresh(self) -> WandB:
        return attrs.evolve(self)

    def write(self, row: Row, state: State) -> None:
        self._log({tag_of(row, key, state): value for key, value in row.items() if key not in FACTS}, row["trained"])

    def image(self, tag: str, image: Any, state: State) -> None:
        import wandb

        self._show(tag, wandb.Image(image), state)

    def histogram(self, tag: str, values: Any, state: State) -> None:
        import numpy
        import wandb

        self._show(tag, wandb.Histogram(np_histogram=numpy.histogram(values, bins=64)), state)

    def text(self, tag: str, text: str, state: State) -> None:
        import wandb

        self._show(tag, wandb.Html(f"<pre>{html.escape(text)}</pre>", data_is_not_path=True), state)

    def hparams(self, values: Mapping[str, Any]) -> None:
        self._opened().config.update(dict(values), allow_val_change=True)

    def mark(self) -> str | None:
        """The id of the W&B run."""
        return self._id

    def rewind(self, mark: str | None) -> None:
        self.close()
        self._id = mark

    def close(self) -> None:
        if self.run is not None:
            run, self.run = self.run, None
            run.finish()

    def _show(self, tag: str, value: Any, state: State) -> None:
        self._log({f"{state.phase}/{tag}": value}, trained(state))

    def _log(self, values: dict[str, Any], step: int) -> None:
        self._opened().log(values, step=step)

    def _opened(self) -> Any:
        if self.run is None:
            import wandb

            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)  # wandb would go elsewhere
            self.run = wandb.init(
                project=self.project,
                name=self.name,
                dir=None if self.folder is None else str(self.folder),
                mode=self.mode,
                id=self._id,
                resume="allow" if self._id else None,
                reinit="create_new",  # leaves alone a W&B run that the user has open
                settings=wandb.Settings(**NOTHING_MORE, silent=self.mode == "offline"),
                **self.options,
            )
            self._id = self.run.id
        return self.run
