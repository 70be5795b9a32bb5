"""Lines, JSON lines, TensorBoard and the bar."""

from __future__ import annotations

import json

import pytest
import torch
from loops import Case, classify, device_reads, loader, piped

import looptools as lt
from looptools.means import Means


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


@pytest.mark.parametrize("every", [0, 2.5, "often", lt.epochs])
def test_bad_intervals_are_refused(every):
    """Where they are typed."""
    with pytest.raises((TypeError, ValueError), match="must be"):
        lt.log(every=every)


@pytest.mark.parametrize(
    ("every", "fires"),
    [
        (3, [2, 5, 8, 11]),
        (lt.epochs(2), [7]),
        (lt.rounds(1), []),
        (lt.samples(5), [1, 3, 5, 7, 9, 11]),
        (lambda state: state.trains and state.index == 0, [0, 4, 8]),
    ],
)
def test_intervals(every, fires):
    """Which training iterations each kind picks: three epochs of four batches of 3, 3, 3 and 1; then a validation."""
    from looptools.intervals import interval

    every, seen = interval(every), []

    def watch(states):
        for state in states:
            if every(state):
                seen.append(state.iteration if state.trains else "val")
            yield state

    data = [torch.ones(n) for n in (3, 3, 3, 1)]
    step = lambda model, batch: {"x": batch.sum()}  # noqa: E731
    entries = [(lt.train(None, data, step), 1), (lt.validate(None, data, step), 1)]

    (lt.workflow(entries, max_epochs=3) | watch).to_end()

    assert seen == (["val"] * 3 if isinstance(every, lt.rounds) else fires)


def test_seconds_count_the_runs_own_work(monkeypatch):
    """Due on the first iteration that begins in the next n seconds of work."""
    clock = iter(range(10_000))
    monkeypatch.setattr("looptools.cursor.perf_counter", lambda: float(next(clock)))
    seen = []

    def watch(states):
        for state in states:
            if lt.seconds(6)(state):
                seen.append(state.run.began)
            yield state

    phase = lt.train(None, [1.0] * 12, lambda model, batch: {"x": batch})
    (lt.workflow([(phase, 1)], max_epochs=1) | watch).to_end()

    assert seen
    assert all(now // 6 > before // 6 for before, now in seen)


def test_means_fold_without_losing_digits():
    """Folded every 256 entries, a mean of 10,000 float64 values is the mean to 1e-12."""
    means, values = Means(), torch.rand(10_000, dtype=torch.float64)
    for number, value in enumerate(values):
        means.add({"x": value, "n": number}, weight=1 + number % 3)

    weights = 1 + torch.arange(10_000) % 3
    assert means.read()["x"] == pytest.approx(float((values * weights).sum() / weights.sum()), rel=1e-12)
    copy = Means()
    copy.load_state_dict(means.state_dict())
    assert copy.read() == means.read()
