"""What is written when, and to whom. What each sink makes of it is in tests/sinks."""

from __future__ import annotations

import argparse
import csv
import json

import pytest
import torch
from loops import Case, assert_same, classify, device_reads, loader, piped

import looptools as lt


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


class Collect:
    """A sink of one's own."""

    def __init__(self, fails_at=()):
        self.rows, self.shown, self.closed, self.fails_at, self.calls = [], [], 0, fails_at, 0

    def write(self, row, state):
        self.calls += 1
        if self.calls in self.fails_at:
            raise OSError("the service is away")
        self.rows.append((row["kind"], row["phase"], row["iteration"]))

    def close(self):
        self.closed += 1


class Shows(Collect):
    """One that shows things as well."""

    def image(self, tag, image, state):
        self.shown.append((tag, image.shape, state.phase, state.iteration))

    def text(self, tag, text, state):
        self.shown.append((tag, text, state.phase, state.iteration))


def keys(folder):
    return [(row["kind"], row["phase"], row["iteration"]) for row in rows(folder)]


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


def test_logging_changes_no_bit(tmp_path):
    """Weights and buffers are those of the run without it."""
    plain = piped(Case())
    plain.to_end()
    logged = piped(Case()) | lt.log(tmp_path, every=1, line=None, csv=True)
    logged.to_end()

    assert_same(plain.model.state_dict(), logged.model.state_dict())


def test_a_sink_of_your_own(model, sgd, batches):
    """Any object with write and close; it is closed when the run ends."""
    sink = Collect()
    phase = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)
    run = lt.workflow([(phase, 1)], max_epochs=1) | lt.log(every=2, line=None, to=[sink])

    assert next(run).iteration == 0
    assert sink.rows == []
    run.to_end()

    assert sink.rows == [("iterations", "train", 1), ("pass", "train", 2)]
    assert sink.closed == 1


def test_stopping_early_closes_every_sink():
    """Though one of them fails at it."""

    class Broken(Collect):
        def close(self):
            raise OSError("cannot close")

    sink = Collect()
    run = piped(Case()) | lt.log(every=1, line=None, to=[Broken(), sink])
    next(run)

    with pytest.raises(OSError, match="cannot close"):
        run.close()
    assert sink.closed == 1


def test_a_sink_that_fails_costs_nothing(tmp_path):
    """Its exception surfaces; the others have the row once, it gets the row again, and the training is the same."""
    sink = Collect(fails_at=(2, 3))
    run = piped(Case()) | lt.log(tmp_path, every=2, line=None, tensorboard=False, csv=True, to=[sink])
    states = []
    for _ in range(2):
        with pytest.raises(OSError, match="away") as raised:
            states.extend(state.iteration for state in run if state.trains)
        assert "log: while Collect was written to." in raised.value.__notes__
        assert run.failed.part == "run/log"
    states.extend(state.iteration for state in run if state.trains)

    assert states == list(range(14))
    assert keys(tmp_path) == sink.rows
    assert len(sink.rows) == len(set(sink.rows)) == 7 + 4
    whole = piped(Case()) | lt.log(tmp_path / "whole", every=2, line=None, tensorboard=False)
    whole.to_end()
    for left, right in zip(rows(tmp_path), rows(tmp_path / "whole"), strict=True):
        assert {**left, "seconds": 0} == {**right, "seconds": 0}
    assert_same(run.model.state_dict(), whole.model.state_dict())


def test_a_sink_that_goes_on_failing_can_be_taken_out(tmp_path):
    """The new log goes on where the old one stood, and writes nothing twice."""
    sink = Collect(fails_at=range(2, 99))
    run = piped(Case(epochs=1)) | lt.log(tmp_path, every=2, line=None, to=[sink])
    with pytest.raises(OSError, match="away"):
        run.to_end()
    with pytest.raises(OSError, match="away"):
        next(run)

    run.replace("log", lt.log(tmp_path, every=2, line=None))
    run.to_end()

    assert keys(tmp_path) == [("iterations", "train", n) for n in (1, 3, 5)] + [
        ("pass", p, 6) for p in ("train", "val")
    ]


def test_a_skipped_iteration_takes_its_row_along(tmp_path):
    """run.skip() is the other way out."""
    sink = Collect(fails_at=(1,))
    run = piped(Case(epochs=1)) | lt.log(tmp_path, every=2, line=None, to=[sink])
    with pytest.raises(OSError, match="away"):
        run.to_end()

    run.skip()
    run.to_end()

    assert sink.rows == keys(tmp_path)[1:]


@pytest.mark.parametrize("fails_at", [1, 7])
def test_a_skipped_iteration_leaves_the_pass_its_row(tmp_path, fails_at):
    """Who failed does without both; the others have them, also where the run ends there."""
    sink = Collect(fails_at=(fails_at,))
    run = piped(Case(epochs=2)) | lt.log(tmp_path, every=lambda state: state.last, line=None, to=[sink])
    with pytest.raises(OSError, match="away"):
        run.to_end()
    run.skip()
    run.to_end()

    both = [(kind, phase) for phase in ("train", "val") * 2 for kind in ("iterations", "pass")]
    assert [row[:2] for row in keys(tmp_path)] == both
    del both[fails_at - 1 : fails_at + 1]
    assert [row[:2] for row in sink.rows] == both


def test_gauges_stand_for_themselves(tmp_path, model, batches):
    """A training row has the newest since the row before, a pass those of its last state."""

    def gauge(states):
        for state in states:
            state.gauges["rate"] = torch.tensor(10.0 * state.iteration)
            if state.iteration == 0:
                state.gauges["once"] = 7
            yield state

    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    phase = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd) | gauge
    run = lt.workflow([(phase, 1)], max_epochs=2) | lt.log(tmp_path, every=2, line=None)
    run.to_end()

    got = rows(tmp_path)
    assert [(row["kind"][0], row["rate"], row.get("once")) for row in got] == [
        ("i", 10.0, 7.0),
        ("p", 20.0, None),
        ("i", 30.0, None),
        ("i", 50.0, None),
        ("p", 50.0, None),
    ]
    assert list(got[0])[-3:] == ["lr", "rate", "once"]


def test_gauges_between_two_rows_are_resumed(tmp_path):
    """What was measured before the checkpoint stands in the row behind it."""

    def gauge(states):
        for state in states:
            if state.iteration in (0, 6):
                state.gauges["peak"] = torch.tensor(float(state.iteration))
            yield state

    def make(folder):
        return (piped(Case()) | gauge) | lt.log(tmp_path / "log", every=5, line=None) | lt.checkpoint(folder)

    first = make(tmp_path / "a")
    list(first.take(14))
    first.close()
    second = make(tmp_path / "a")
    second.resume()
    second.to_end()

    peaks = {row["iteration"]: row.get("peak") for row in rows(tmp_path / "log") if row["kind"] == "iterations"}
    assert peaks == {4: 0.0, 9: 6.0}


def test_csv_has_the_same_rows(tmp_path):
    """One table for all phases."""
    run = piped(Case()) | lt.log(tmp_path, every=5, line=None, tensorboard=False, csv=True)
    run.to_end()

    table = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [(row["kind"], row["phase"], int(row["iteration"])) for row in table] == keys(tmp_path)
    assert [float(row["loss"]) for row in table] == [row["loss"] for row in rows(tmp_path)]


def test_a_resumed_run_continues_the_table(tmp_path):
    """As it does log.jsonl."""

    def make():
        return piped(Case(epochs=3)) | lt.log(tmp_path, every=2, line=None, csv=True) | lt.checkpoint(tmp_path)

    first = make()
    list(first.take(14 + 6))
    first.close()
    run = make()
    run.resume()
    run.to_end()

    table = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [(row["kind"], row["phase"], int(row["iteration"])) for row in table] == keys(tmp_path)
    assert len(table) == 10 + 6


def test_hparams_are_a_row_without_secrets(tmp_path):
    """In front of all others; they are plain values from the moment they are given."""
    logged = lt.log(tmp_path, line=None, hparams={"lr": 0.1, "hub": {"token": "hunter2"}, "model": torch.nn.Linear})
    run = piped(Case(epochs=1)) | logged
    run.to_end()

    expected = {"lr": 0.1, "hub": {"token": "<redacted>"}, "model": "torch.nn.modules.linear.Linear"}
    assert rows(tmp_path)[0] == {"kind": "hparams", "hparams": expected}
    assert "hunter2" not in repr(logged)


def test_shown_on_demand(model, batches):
    """At once, at the iteration where the run stands, to whom can show it; from a part or from the loop's body."""

    def note(states):
        for state in states:
            if state.iteration == 1:
                state.run["log"].text("part", "x")
            yield state

    shows, collects = Shows(), Collect()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    phase = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd) | note
    run = lt.workflow([(phase, 1)], max_epochs=1) | lt.log(line=None, to=[collects, shows])
    run["log"].text("before", 1)
    next(run)
    run["log"].image("body", torch.rand(1, 2, 2))
    next(run)

    assert shows.shown == [
        ("before", "1", "run", -1),
        ("body", (2, 2, 3), "train", 0),
        ("part", "x", "train", 1),
    ]
    assert collects.rows == []


def test_nothing_is_shown_twice(tmp_path):
    """An iteration that is computed again only to get back somewhere writes nothing."""
    shows = Shows()
    run = piped(Case()) | lt.log(line=None, to=[shows])
    state = next(run)
    state.replayed = True
    run["log"].text("note", "x")

    assert shows.shown == []


def test_an_iteration_that_is_replayed_has_no_rows(tmp_path):
    """What it did stands there already."""

    def replays(states):
        for state in states:
            state.replayed = state.plan.round == 0
            yield state

    run = piped(Case())
    parts = [phase | replays for phase in run._agenda.phases]
    run = lt.workflow([(part, 1) for part in parts], max_epochs=2) | lt.log(tmp_path, every=2, line=None)
    run.to_end()

    assert keys(tmp_path) == [("iterations", "train", n) for n in (7, 9, 11, 13)] + [
        ("pass", phase, 13) for phase in ("train", "val")
    ]


def test_what_is_shown_before_the_run_is_resumed_harms_nothing(tmp_path):
    """It waits for the first iteration: neither another's log nor the run's own is set aside for it."""

    def make():
        return piped(Case(epochs=3)) | lt.log(tmp_path, every=2, line=None) | lt.checkpoint(tmp_path)

    first = make()
    list(first.take(14 + 6))
    first.close()
    run = make()
    run["log"].text("note", "again")
    assert keys(tmp_path)[-1] == ("iterations", "train", 11)
    run.resume()
    run.to_end()

    assert not list(tmp_path.glob("*.1*"))
    assert [n for kind, _, n in keys(tmp_path) if kind == "iterations"] == list(range(1, 21, 2))
    assert (tmp_path / "tensorboard/run").is_dir()


def test_a_sink_that_cannot_begin_keeps_no_other_from_its_rows(tmp_path):
    """Each takes up where it stood by itself, and is tried again by itself."""

    class Refuses(Collect):
        tries = 0

        def rewind(self, mark):
            self.tries += 1
            if self.tries == 1:
                raise OSError("the service is away")

    sink = Refuses()
    run = piped(Case(epochs=1)) | lt.log(tmp_path, every=7, line=None, to=[sink])
    with pytest.raises(OSError, match="away"):
        run.to_end()
    assert keys(tmp_path) == [("iterations", "train", 6)]
    run.to_end()

    assert sink.rows == keys(tmp_path)
    assert sink.tries == 2


def test_rows_say_how_much_is_trained_by_then(tmp_path, model, sgd, batches):
    """A validation before any training has 0, where its own iteration is 0 as after the first one."""
    train = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)
    val = lt.validate(model, batches, lambda model, batch: model(batch))
    run = lt.workflow([(val, 1), (train, lt.iterations(1))], max_iterations=2)
    run = run | lt.log(tmp_path, every=1, line=None)
    run.to_end()

    got = [(row["phase"], row["iteration"], row["trained"]) for row in rows(tmp_path) if row["kind"] == "pass"]
    assert got == [("val", 0, 0), ("train", 0, 1), ("val", 0, 1), ("train", 1, 2)]
    assert [row["trained"] for row in rows(tmp_path) if row["kind"] == "iterations"] == [1, 2]


@pytest.mark.parametrize("name", lt.sinks.FACTS)
def test_a_metric_with_the_name_of_a_fact_is_refused_once(tmp_path, model, batches, name):
    """Rows keep the fact; next(run) goes on without the metric."""
    val = lt.validate(model, batches, lambda model, batch: {name: batch.mean() + 90, "x": 1.0})
    run = lt.workflow([(val, 1)], max_rounds=3) | lt.log(tmp_path, line=None)

    with pytest.raises(ValueError, match=f'log: a metric cannot be called "{name}".* Rename it in the step'):
        run.to_end()
    run.to_end()

    assert [row["x"] for row in rows(tmp_path)] == [1.0] * 3
    assert [row["kind"] for row in rows(tmp_path)] == ["pass"] * 3
    assert all(row[name] not in (91, 92, 93) for row in rows(tmp_path))


def test_a_rehearsal_calls_no_service():
    """It is a try, of which a tracking service need not hear."""
    sink = Shows()
    run = piped(Case()) | lt.log(line=None, every=1, to=[sink])

    run.rehearse(2)

    assert (sink.calls, sink.shown, sink.closed) == (0, [], 0)


def test_explain_shows_no_secret(capsys):
    """Addresses and options of services may hold one."""
    to = [
        lt.sinks.MLflow("a", uri="https://me:hunter2@host/"),
        lt.sinks.WandB(options={"api_key": "hunter2", "entity": "team"}),
    ]
    (piped(Case()) | lt.log(line=None, to=to)).explain()

    shown = capsys.readouterr().out
    assert "hunter2" not in shown
    assert "https://<redacted>@host/" in shown
    assert "'entity': 'team'" in shown


def test_hparams_are_written_again_only_where_they_differ(tmp_path):
    """A resumed run need not repeat them."""

    def go_on(epochs, lr):
        run = piped(Case(epochs=epochs)) | lt.log(tmp_path, line=None, hparams={"lr": lr})
        run = run | lt.checkpoint(tmp_path)
        run.resume()
        run.to_end()

    for epochs, lr in [(1, 1), (2, 1), (3, 2), (4, 2)]:
        go_on(epochs, lr)

    assert [row["hparams"] for row in rows(tmp_path) if row["kind"] == "hparams"] == [{"lr": 1}, {"lr": 2}]


def test_showing_without_a_sink_for_it_says_who_would():
    """And so does a log that is only an option."""
    run = piped(Case()) | lt.log(line=None, to=[Collect()])
    with pytest.raises(
        RuntimeError, match=r"log.image: no sink of this log takes it. TensorBoard does, in lt.log\(folder\)"
    ):
        run["log"].image("a", torch.rand(2, 2))
    with pytest.raises(RuntimeError, match=r'log.text: this log belongs to no run.* Use run\["log"\].text'):
        lt.log(line=None, to=[Shows()]).text("a", "b")


def test_figures_go_to_who_shows_images():
    """Drawn; a sink with a method of its own gets the figure itself."""
    from matplotlib.figure import Figure

    class Figures(Collect):
        def figure(self, tag, figure, state):
            self.shown.append((tag, figure))

    figure, shows, figures = Figure(figsize=(2, 1), dpi=50), Shows(), Figures()
    run = piped(Case()) | lt.log(line=None, to=[shows, figures])
    next(run)
    run["log"].figure("curve", figure)

    assert shows.shown == [("curve", (50, 100, 4), "train", 0)]
    assert figures.shown == [("curve", figure)]


def test_validation_on_demand_has_a_row(tmp_path):
    """run.validate tells the log, though its states do not come through here."""
    run = piped(Case(epochs=1)) | lt.log(tmp_path, line=None)
    val = lt.validate(run.model, loader(shuffle=False), classify, name="test")
    list(run.take(3))
    run.validate(val)
    run.close()

    assert keys(tmp_path) == [("pass", "test", 2)]
    assert rows(tmp_path)[0]["accuracy"] == run.results["test/accuracy"]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"to": [print]}, TypeError, r"in to= is no sink: it needs the methods write\(row, state\) and close\(\)"),
        ({"to": [lt.sinks.CSV]}, TypeError, r"log: CSV in to= is a class. Make a sink of it: CSV\(...\)"),
        ({"to": Collect()}, TypeError, r"log: to must be a list of sinks, got .*Collect"),
        ({"hparams": argparse.Namespace(token="hunter2")}, TypeError, r"such as vars\(args\), got a Namespace\.$"),
        ({"csv": True}, ValueError, r"log: csv=True needs a folder: lt.log\(folder, csv=True\)"),
    ],
)
def test_bad_options_are_refused_where_they_are_typed(options, kind, message):
    """With what to write instead."""
    with pytest.raises(kind, match=message):
        lt.log(**options)
