"""Lines, JSON lines, TensorBoard and the bar."""

from __future__ import annotations

import json

import pytest
from loops import Case, classify, device_reads, loader, piped

import looptools as lt


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_rows_hold_the_means_since_the_one_before(tmp_path, model, sgd, batches):
    """Weighted means of the window, the learning rate now, and the state's own counters from 0."""
    phase = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd, max_norm=10.0)
    run = lt.workflow([(phase, 1)], max_epochs=2) | lt.log(tmp_path, every=2, line=None, tensorboard=False)

    run.to_end()

    got = rows(tmp_path)
    assert [(row["kind"], row["epoch"], row["iteration"]) for row in got] == [
        ("iterations", 0, 1),
        ("pass", 0, 2),
        ("iterations", 1, 3),
        ("iterations", 1, 5),
        ("pass", 1, 5),
    ]
    assert (got[0]["loss"], got[0]["grad_norm"], got[0]["lr"]) == ((3 * 1 + 2 * 2) / 2, 1.5, 1.0)
    assert got[1]["loss"] == run.history[0]["loss"]
    assert got[2]["loss"] == (0 * 3 - 3 * 1) / 2  # the window crosses the epochs


def test_lines_are_readable():
    """Epochs and iterations are counted from 1 for people."""
    lines = []
    run = piped(Case()) | lt.log(every=5, line=lines.append)

    run.to_end()

    assert lines[0].startswith("train  epoch 1/2  iteration 5/14  loss 0.")
    assert [line.split()[0] for line in lines] == ["train", "train", "val", "train", "train", "val"]
    assert "lr 0.05" in lines[0]


def test_one_device_read_a_row():
    """Everything on a row is read at once, whatever the number of metrics; between rows nothing is."""
    model, optimizer, *_ = Case().make()
    batches = list(loader(shuffle=False))  # a shuffling loader reads its own permutation
    phase = lt.train(model, batches, classify) | lt.optimize(optimizer, max_norm=1.0)
    run = lt.workflow([(phase, 1)], max_epochs=1) | lt.log(every=3, line=lambda line: reads.append("row"))
    next(run)
    with device_reads() as reads:
        list(run.take(6))

    assert reads == ["tolist", "row"] * 2 + ["tolist", "row"]  # iterations 3 and 6, and the pass that ends with 7


def test_a_resumed_run_continues_the_file_without_overlap(tmp_path):
    """Rows that were written after the checkpoint are cut off, and written again."""

    def make():
        return piped(Case(epochs=3)) | lt.log(tmp_path, every=2, line=None) | lt.checkpoint(tmp_path)

    first = make()
    list(first.take(14 + 6))
    first.close()
    assert rows(tmp_path)[-1]["iteration"] == 11
    run = make()
    run.resume()
    run.to_end()

    seen = [(row["kind"], row["phase"], row["iteration"]) for row in rows(tmp_path)]
    assert len(seen) == len(set(seen))
    assert [iteration for kind, _, iteration in seen if kind == "iterations"] == list(range(1, 21, 2))


def test_a_fresh_run_sets_another_runs_file_aside(tmp_path):
    """The old rows are in log.1.jsonl."""
    for _ in range(3):
        (piped(Case(epochs=1)) | lt.log(tmp_path, every=3, line=None, tensorboard=False)).to_end()

    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.1.jsonl", "log.2.jsonl", "log.jsonl"]
    assert len(rows(tmp_path)) == 4


def test_tensorboard_overlays_train_and_val(tmp_path):
    """A folder a phase, the same tags in both; a resumed run's values stand once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = piped(Case()) | lt.log(tmp_path, every=7, line=None)
    run.to_end()

    def scalars(phase, tag):
        events = EventAccumulator(str(tmp_path / "tensorboard" / phase))
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars(tag)]

    assert [step for step, _ in scalars("train", "loss")] == [7, 14]
    assert [step for step, _ in scalars("val", "pass/loss")] == [7, 14]
    assert scalars("val", "pass/loss")[-1][1] == pytest.approx(run.results["val/loss"])


def test_the_bar_is_moved_by_hand(capsys):
    """One bar a pass, a line above it at its end; nothing iterates over tqdm."""
    run = piped(Case()) | lt.log(every=2, bar=True)

    run.to_end()

    text = capsys.readouterr()
    assert "train 1/2:" in text.err
    assert text.out.count("val    epoch") == 2


def test_the_bar_names_the_extra_it_needs(monkeypatch):
    """Where it is typed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(ModuleNotFoundError, match=r'pip install "torch-looptools\[demo\]"'):
        lt.log(bar=True)
