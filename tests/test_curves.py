"""Curves from runs and log folders."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest

import looptools as lt
from looptools import trainings


def step(model, batch):
    loss = model(batch)
    return {"loss": loss, "accuracy": loss.detach() / 4}


def training(model, sgd, batches, folder=None, epochs=3):
    train = lt.train(model, batches, step) | lt.optimize(sgd)
    run = lt.workflow([(train, 1), (lt.validate(model, batches[:1], step), 1)], max_epochs=epochs)
    return run if folder is None else run | lt.log(folder, every=1, line=None, tensorboard=False)


@pytest.fixture
def run(model, sgd, batches):
    return training(model, sgd, batches)


@pytest.fixture
def folder(model, sgd, batches, tmp_path):
    """What three epochs of three iterations leave."""
    training(model, sgd, batches, tmp_path / "logged").to_end()
    return tmp_path / "logged"


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def lines(figure, panel=0):
    """The curves of a panel, as lists of points; epochs' dashed lines aside."""
    found = [[tuple(point) for point in line.get_xydata()] for line in figure.axes[panel].get_lines()]
    return [points for points in found if points and not (len(points) == 2 and points[0][0] == points[1][0])]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def write(folder, *rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row(kind="pass", phase="train", epoch=0, iteration=2, index=2, seconds=1.0, **values):
    facts = {"kind": kind, "phase": phase, "epoch": epoch, "iteration": iteration, "index": index, "seconds": seconds}
    return {**facts, **values}


def test_run_shows_the_means_of_its_passes(run):
    """A point a pass, at the iterations done by then; train and val in one panel, the loss first."""
    run.to_end()

    figure = lt.plot(run)

    assert titles(figure) == ["loss", "accuracy"]
    train, val = lines(figure)
    means = [entry["loss"] for entry in run.history if entry["phase"] == "train"]
    assert train == list(zip([3, 6, 9], means, strict=True))
    assert [x for x, _ in val] == [3, 6, 9]
    assert legend(figure) == ["train", "val"]


def test_folder_shows_rows_within_a_pass_as_a_line(folder):
    """Those of the log between passes; the means over passes are points beside it."""
    figure = lt.plot(folder)

    within, train, val = lines(figure)
    assert [x for x, _ in within] == list(range(1, 10))
    assert [x for x, _ in train] == [x for x, _ in val] == [3, 6, 9]
    assert lines(lt.plot(folder / "log.jsonl")) == lines(figure)
    assert lines(lt.plot(str(folder))) == lines(figure)


def test_run_that_logs_shows_both(model, sgd, batches, tmp_path):
    """The history, and the rows of its own log; not those that another run left there."""
    training(model, sgd, batches, tmp_path).to_end()
    other = training(model, sgd, batches, tmp_path, epochs=1)
    next(iter(other.take(1)))

    with other:
        other.to_end()

    figure = lt.plot(other)
    assert [[x for x, _ in points] for points in lines(figure)] == [[1, 2, 3], [3], [3]]


def test_a_run_is_drawn_while_an_epoch_is_under_way(model, sgd, batches, tmp_path):
    """From the rows of its log, also over epochs."""
    run = training(model, sgd, batches, tmp_path)
    list(run.take(2))

    assert [x for x, _ in lines(lt.plot(run))[0]] == [1, 2]
    assert [x for x, _ in lines(lt.plot(run, x="epoch"))[0]] == pytest.approx([1 / 3, 2 / 3])
    run.close()


def test_epochs_and_seconds_on_the_x_axis(tmp_path):
    """Epochs done, with their fractions; seconds of the passes, one after another."""
    rows = [row("iterations", iteration=n, index=n % 4, epoch=n // 4, seconds=n % 4 + 1, loss=1.0) for n in range(8)]
    both = [
        row(phase=phase, epoch=e, iteration=4 * e + 3, index=3, seconds=4.0, loss=1.0)
        for e in (0, 1)
        for phase in ("train", "val")
    ]
    write(tmp_path, *rows[:4], *both[:2], *rows[4:], *both[2:])

    by_epoch, by_second = (lines(lt.plot(tmp_path, x=x)) for x in ("epoch", "seconds"))

    assert [[x for x, _ in points] for points in by_epoch] == [[n / 4 for n in range(1, 9)], [1, 2], [1, 2]]
    assert [[x for x, _ in points] for points in by_second] == [[1, 2, 3, 4, 9, 10, 11, 12], [4, 12], [8, 16]]


def test_a_validation_before_training_does_not_count_as_an_epoch(model, sgd, batches, tmp_path):
    """Its counters stand at 0."""
    val = lt.validate(model, batches[:2], step)
    train = lt.train(model, batches, step) | lt.optimize(sgd)
    run = lt.workflow([(val, 1), (train, 1)], max_rounds=2) | lt.log(tmp_path, line=None, tensorboard=False)
    run.to_end()

    train_points, val_points = lines(lt.plot(run, x="epoch"))
    assert [x for x, _ in train_points] == [1, 2]
    assert [x for x, _ in val_points] == [0, 1]


def test_several_runs_have_colours_and_names(folder, run, tmp_path):
    """A list, a mapping or labels; equal names are numbered."""
    run.to_end()

    assert legend(lt.plot([folder, run])) == ["logged", "run", "train", "val"]
    assert legend(lt.plot([run, run])) == ["run", "run#2", "train", "val"]
    assert legend(lt.plot({"a": run, "b": folder})) == ["a", "b", "train", "val"]
    assert legend(lt.plot([run, folder], labels=["x", "y"])) == ["x", "y", "train", "val"]
    colors = {line.get_color() for line in lt.plot([run, folder]).axes[0].get_lines()}
    assert len(colors) == 2
    assert legend(lt.plot([folder] * 12))[:2] == ["logged", "logged#2"]


def test_values_that_are_not_finite_leave_gaps(tmp_path):
    """log.jsonl writes them as strings; a red cross says where."""
    values = [1.0, "nan", 0.5, "inf", 0.25, 0.2]
    figure = lt.plot(write(tmp_path, *[row(epoch=n, iteration=3 * n + 2, loss=v) for n, v in enumerate(values)]))

    curve, lost = lines(figure)
    assert [y == y for _, y in curve] == [True, False, True, False, True, True]
    assert [x for x, _ in lost] == [6, 12]
    assert legend(figure) == ["train", "not finite"]
    assert figure.axes[0].get_yscale() == "linear"


def test_a_point_alone_is_seen(tmp_path):
    """One row makes no line, so it gets a dot."""
    figure = lt.plot(write(tmp_path, row("iterations", loss=1.0)))

    (line,) = figure.axes[0].get_lines()
    assert (line.get_marker(), list(line.get_markevery())) == (".", [0])


def test_smoothing_follows_what_came_before(tmp_path):
    """The raw line stays; means over passes are left as they are."""
    rows = [row("iterations", iteration=n, index=n, loss=v) for n, v in enumerate([1.0, 3.0, 2.0])]
    raw, smoothed, passes = lines(lt.plot(write(tmp_path, *rows, row(loss=5.0)), smooth=0.5))

    assert [y for _, y in raw] == [1, 3, 2]
    assert [y for _, y in smoothed] == pytest.approx([1, (1 / 2 + 3) / 1.5, (1 / 4 + 3 / 2 + 2) / 1.75])
    assert passes == [(3, 5)]


def test_losses_that_fall_far_are_logarithmic(tmp_path):
    """By a factor of 10 or more, if all are above 0; or as it is asked for."""
    values = {0: 2.0, 1: 0.1}
    write(tmp_path, *[row(epoch=e, iteration=3 * e + 2, loss=v, other=v) for e, v in values.items()])

    def scales(**options):
        return [axes.get_yscale() for axes in lt.plot(tmp_path, **options).axes]

    assert scales() == ["log", "linear"]
    assert scales(log_scale=False) == ["linear", "linear"]
    assert scales(log_scale=True) == ["log", "log"]


def test_metrics_of_both_phases_by_default_others_on_demand(tmp_path):
    """A learning rate, a norm, and what stands for single layers would fill the picture."""
    train = row(loss=1.0, accuracy=0.5, only_train=1.0, **{"grad_norm/a": 1.0})
    within = row("iterations", loss=1.0, lr=0.1, grad_norm=2.0)
    write(tmp_path, within, train, row(phase="val", loss=1.0, accuracy=0.5, **{"grad_norm/a": 1.0}))

    assert titles(lt.plot(tmp_path)) == ["loss", "accuracy"]
    assert titles(lt.plot(tmp_path, ["lr", "grad_norm/a"])) == ["lr", "grad_norm/a"]
    assert titles(lt.plot(tmp_path, "only_train")) == ["only_train"]
    with pytest.raises(LookupError, match="plot: nobody has written 'f1'; known are loss, lr, grad_norm, accuracy"):
        lt.plot(tmp_path, "f1")


@pytest.mark.parametrize(("metrics", "shape"), [(1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (5, (2, 3)), (8, (2, 4))])
def test_panels_fill_rows(tmp_path, metrics, shape):
    """As many as there are metrics; the empty places of the last row are left out."""
    write(tmp_path, row(**{f"metric_{n}": 1.0 for n in range(metrics)}))

    figure = lt.plot(tmp_path)

    assert len(figure.axes) == metrics
    grid = figure.axes[0].get_subplotspec().get_gridspec()
    assert (grid.nrows, grid.ncols) == shape


def test_phases_that_train_are_tinted_where_there_are_several(model, sgd, batches):
    """Warm-up and the rest, each with its colour."""
    warm = lt.train(model, batches[:1], step, name="warm") | lt.optimize(sgd)
    rest = lt.train(model, batches, step) | lt.optimize(sgd)
    run = lt.workflow([(warm, 2), (rest, 1)], max_rounds=1)
    run.to_end()

    figure = lt.plot(run)

    assert legend(figure) == ["warm", "train"]
    assert [patch.get_x() for patch in figure.axes[0].patches] == [0, 1, 2]


def test_ten_thousand_rows(tmp_path):
    """They are one line, drawn in a moment."""
    rows = [row("iterations", iteration=n, index=n, loss=1 / (n + 1)) for n in range(10_000)]

    assert len(lines(lt.plot(write(tmp_path, *rows), path=tmp_path / "new" / "curves.png"))[0]) == 10_000
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_notebook_shows_it_and_pyplot_stays_out(tmp_path):
    """The figure brings its own picture, and nobody's backend is changed."""
    write(tmp_path, row(loss=1.0))
    program = (
        "import sys, looptools as lt\n"
        "figure = lt.plot(sys.argv[1])\n"
        "assert figure._repr_png_().startswith(b'\\x89PNG')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )

    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


def test_nothing_to_draw_says_what_there_is(run, model, tmp_path):
    """A run that has not begun, one without a mean, a folder of something else, a file of something else."""
    with pytest.raises(ValueError, match=r"plot: run has not begun. Iterate it first."):
        lt.plot(run)
    next(run)
    with pytest.raises(ValueError, match=r"plot: run has no mean yet. Complete a pass, or pipe lt.log\(folder\) onto"):
        lt.plot(run)
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "best.pt").touch()
    with pytest.raises(FileNotFoundError, match=r"no log.jsonl: .* has best.pt, tensorboard/. lt.log\(folder\) writes"):
        lt.plot(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        lt.plot(tmp_path / "nowhere")
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(ValueError, match="has no row yet"):
        lt.plot(tmp_path)
    (tmp_path / "log.jsonl").write_text("no json}\n")
    with pytest.raises(ValueError, match="Expecting value") as caught:
        lt.plot(tmp_path)
    assert "is not what lt.log(folder) writes" in caught.value.__notes__[0]
    with pytest.raises(TypeError, match="plot: give a run or a folder that log has written to, or several, got Weight"):
        lt.plot(model)
    with pytest.raises(ValueError, match="plot: there is nothing in the list"):
        lt.plot([])
    write(tmp_path, row("iterations", loss=1.0))
    with pytest.raises(ValueError, match=r"has not completed an epoch yet. Use x='iteration'."):
        lt.plot(tmp_path, x="epoch")


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    """A folder can be drawn while its run is at work elsewhere."""
    write(tmp_path, row(loss=1.0))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "pass", "phase": "tr')

    assert lines(lt.plot(tmp_path)) == [[(3, 1)]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": "time"}, "x must be 'iteration', 'epoch' or 'seconds', got 'time'"),
        ({"smooth": 1.0}, "smooth must be from 0"),
        ({"labels": ["a", "b"]}, "labels must be 1 names, one a run, got"),
    ],
)
def test_bad_options_are_refused(run, options, message):
    """With what was given."""
    run.to_end()

    with pytest.raises(ValueError, match=f"^plot: {message}"):
        lt.plot(run, **options)


def test_a_metric_of_one_phase(run):
    """Its name is that in run.results; a metric with a slash of its own is drawn as it is."""
    results = run.to_end()

    figure = lt.plot(run, ["val/accuracy", "accuracy"])

    assert titles(figure) == ["val/accuracy", "accuracy"]
    (val,) = lines(figure)
    assert val[-1] == (9, results["val/accuracy"])
    assert len(lines(figure, 1)) == 2
    with pytest.raises(LookupError, match=r"plot: nobody has written 'test/accuracy'; known are"):
        lt.plot(run, "test/accuracy")


def test_an_empty_list_of_metrics(run):
    """It is no way to ask for all."""
    run.to_end()

    with pytest.raises(ValueError, match="plot: metrics is an empty list. Leave it out"):
        lt.plot(run, [])


def test_a_figure_can_be_pickled(run):
    """Its class is found again by name; also with a logarithmic axis."""
    run.to_end()

    figure = pickle.loads(pickle.dumps(lt.plot(run, log_scale=True)))

    assert (type(figure).__name__, titles(figure)) == ("Figure", ["loss", "accuracy"])
    assert figure._repr_png_()[1:4] == b"PNG"


def test_without_matplotlib_the_extra_is_named(run, monkeypatch):
    """It is optional."""
    run.to_end()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(
        ModuleNotFoundError, match=r'plot needs matplotlib. Install it: pip install "torch-looptools\[pl'
    ):
        lt.plot(run)


def test_epochs_go_on_behind_the_last_that_is_known():
    """At the length of the one before."""
    ends = [(0.0, 0.0), (10.0, 1.0), (30.0, 2.0)]

    assert [trainings._epoch(done, ends) for done in (0, 5, 10, 20, 40)] == [0, 0.5, 1, 1.5, 2.5]


def test_a_validation_before_training_stands_at_0_in_a_folder_too(tmp_path):
    """Where the rows say how much was trained by then; its own iteration is that of the first one to come."""
    rows = [row(phase="val", iteration=0, index=0, trained=0, loss=2.0), row(index=2, trained=3, loss=1.0)]
    rows.append(row(phase="val", iteration=2, index=0, trained=3, loss=0.5))
    write(tmp_path, *rows)

    train, val = lines(lt.plot(tmp_path))
    assert ([x for x, _ in train], [x for x, _ in val]) == ([3], [0, 3])
    assert [x for x, _ in lines(lt.plot(tmp_path, x="epoch"))[1]] == [0, 1]
    assert titles(lt.plot(tmp_path)) == ["loss"]


def test_a_row_that_log_has_not_written_is_named(tmp_path):
    """What is missing, and what the row is."""
    (tmp_path / "log.jsonl").write_text('{"kind": "pass", "phase": "val", "loss": 1.0}\n')

    with pytest.raises(ValueError, match=r"plot: a row of .*log.jsonl has no 'epoch', which lt.log"):
        lt.plot(tmp_path)


def test_rows_behind_a_runs_own_are_not_drawn_as_its(model, sgd, batches, tmp_path):
    """The file may hold what another process wrote since; a run shows as much as it has written."""
    phase = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd)
    run = lt.workflow([(phase, 1)], max_epochs=1) | lt.log(tmp_path, every=1, line=None, tensorboard=False)
    run.to_end()
    rows = (tmp_path / "log.jsonl").read_text()
    stray = rows.splitlines()[0].replace('"iteration": 0', '"iteration": 90').replace('"trained": 1', '"trained": 91')
    (tmp_path / "log.jsonl").write_text(rows + stray + "\n")

    assert max(x for line in lt.plot(run).axes[0].lines for x in line.get_xdata()) < 90
