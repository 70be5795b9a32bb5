"""What the README shows works when it is pasted."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_examples_run_in_order_and_train(tmp_path, monkeypatch):
    """Pasted one after another into an empty folder; the first reaches 90 %, and resumes when it is pasted again."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    out = io.StringIO()

    with contextlib.redirect_stdout(out):
        for block in BLOCKS:
            exec(block, names)

    accuracies = [float(value) for value in re.findall(r"^epoch \d: (0\.\d+)$", out.getvalue(), re.MULTILINE)]
    assert len(accuracies) == 5
    assert accuracies[-1] > 0.9
    assert "train/clip_grad_norm" in out.getvalue()
    with contextlib.redirect_stdout(io.StringIO()):
        exec(BLOCKS[0], names)
    assert names["run"].ended == "finished: 5 epochs, 225 iterations"


def test_the_plain_loop_of_the_readme_gives_the_same_weights(tmp_path, monkeypatch):
    """The comparison is honest: the twin's weights equal those of the first example bit for bit."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(BLOCKS[0], names)
        piped = {key: value.clone() for key, value in names["model"].state_dict().items()}
        again: dict[str, object] = {}
        exec(BLOCKS[0].partition("\ntrain = (")[0], again)
        plain = next(block for block in BLOCKS if "def plain(" in block)
        exec(plain, again)
        again["plain"](again["model"], again["optimizer"], again["train_loader"])

    assert all(torch.equal(value, piped[key]) for key, value in again["model"].state_dict().items())


def test_it_is_short_and_its_links_lead_somewhere():
    """Under 200 lines; every relative link is a file of the repository."""
    assert len(README.splitlines()) < 200
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_table_names_every_middleware():
    """A row for each file in looptools/middleware."""
    table = README.partition("## The parts")[2].partition("## Write")[0]
    files = [path.stem for path in (ROOT / "looptools" / "middleware").glob("*.py") if path.stem != "__init__"]

    assert [name for name in files if f"`{name}" not in table] == []


def test_the_recipes_run(tmp_path, monkeypatch):
    """Pasted one after another into an empty folder."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}

    with contextlib.redirect_stdout(io.StringIO()):
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(block, names)

    assert names["run"].results
    assert "never written" not in (tmp_path / "runs/own/log.jsonl").read_text()


def test_the_page_on_checkpoints_runs(tmp_path, monkeypatch):
    """Pasted one after another into an empty folder; the run that was left at 50 iterations goes on from 40."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}

    with contextlib.redirect_stdout(io.StringIO()) as out:
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(block, names)

    assert names["file"].name == "epoch_0000-iteration_000040.pt"
    assert names["run"].ended == "finished: 2 epochs, 90 iterations"
    assert "best.pt" in out.getvalue()


def test_the_page_on_stepping_runs(tmp_path, monkeypatch):
    """Pasted one after another into an empty folder; going back changes no bit, and the crash comes again."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "stepping.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}

    with contextlib.redirect_stdout(io.StringIO()) as out:
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(block, names)

    assert "\nTrue\n" in out.getvalue()
    assert "\nNone\n" in out.getvalue()
    assert "<Divergence at iteration 0" in out.getvalue()
    assert names["state"].iteration == 40
