"""A run that shows itself."""

from __future__ import annotations

import re

import pytest

import looptools as lt


@pytest.fixture
def run(model, sgd, batches):
    step = lambda model, batch: model(batch)  # noqa: E731
    train = lt.train(model, batches, step) | lt.optimize(sgd, max_norm=0.5)
    return lt.workflow([(train, 1), (lt.validate(model, batches[:1], step), 1)], max_epochs=2) | lt.log(line=None)


def test_only_a_training_phase_is_told_that_nothing_moves_its_weights(run, model, batches, capsys):
    """A validation has nobody to move them."""
    run.explain()
    assert "no part here moves the weights" not in capsys.readouterr().out

    iter(lt.train(model, batches, lambda model, batch: model(batch))).explain()
    assert capsys.readouterr().out.count("no part here moves the weights: lt.optimize(optimizer) would") == 1


TRAIN = ["batches", "forward", "backward", "clip_grad_norm", "update", "average"]


def test_explain_prints_the_resolved_pipe(run, capsys):
    """Scopes, order, names and options, one line a part; nothing of it moves the run."""
    run.explain()

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "workflow: train x 1, val x 1, until 2 epochs (6 iterations)"
    assert [line.split()[1] for line in lines[2:8]] == TRAIN
    assert "max_norm=0.5" in lines[5]
    assert run.progress.iteration == 0


def sharing(states):
    for state in states:
        state.metrics["share"] = state.metrics["loss"] / state.grad_norm
        yield state


def test_each_part_shows_what_it_reads_and_writes(run, capsys):
    """Beside its options where these are short, in 100 columns; parts of one's own alike."""
    (run | sharing | lt.checkpoint("never made", every=7)).explain()

    shown = capsys.readouterr().out
    assert re.search(r"1 batches +list, 3 batches +-> batch\n", shown)
    assert re.search(r"3 backward +optimizer=SGD +loss -> updates, windows\n", shown)
    assert re.search(r"4 clip_grad_norm +params=<1 tensors>, max_norm=0.5 +updates, windows -> grad_norm\n", shown)
    assert re.search(r"2 sharing +metrics\[loss\], grad_norm -> metrics\[share\]\n", shown)
    assert max(map(len, shown.splitlines())) <= 100
    assert not any(line.strip() == "->" for line in shown.splitlines())


def test_what_a_part_does_goes_below_options_that_are_long(model, sgd, batches, capsys):
    """These go on in their column, and say of a schedule only what was given."""
    schedule = lt.schedule_lr(sgd, lt.schedules.step(5), warmup=2)
    iter(lt.train(model, batches, step) | schedule | lt.optimize(sgd)).explain()

    lines = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(lines) if "schedule_lr" in line)
    assert lines[at].endswith("optimizer=SGD, schedule=step(every=5), warmup=warmup(count=2)")
    assert lines[at + 1].strip() == "-> lr"


def test_options_that_are_longer_than_a_line_go_on_below(model, sgd, batches, capsys):
    """In their column, in 100 columns altogether."""
    schedule = lt.schedule_lr(sgd, lt.schedules.multistep(list(range(1, 40))), warmup=2)
    iter(lt.train(model, batches, step) | schedule | lt.optimize(sgd)).explain()

    lines = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(lines) if "schedule_lr" in line)
    column = lines[at].index("optimizer=SGD")
    assert max(map(len, lines)) <= 100
    assert lines[at + 1][: column + 2].strip() == ""
    assert lines[at + 1][column + 2] != " "
    assert lines[at + 2].endswith("warmup=warmup(count=2)")
    assert lines[at + 3].strip() == "-> lr"


def step(model, batch):
    return {"loss": model(batch), "accuracy": 1.0}


def test_the_keys_of_a_literal_step_are_shown(model, batches, capsys):
    """Which of them are scalars cannot be seen, so `metrics` stands without."""
    iter(lt.validate(model, batches, step)).explain()

    said = " ".join(capsys.readouterr().out.split())
    assert "step=step batch -> outputs[loss, accuracy], loss, num_samples, metrics" in said


def test_muted_parts_and_changes_are_shown(run, capsys):
    """What states pass by does nothing; what was done to the pipe stands below."""
    next(run)
    run.mute("clip_grad_norm")
    run.explain()

    shown = capsys.readouterr().out
    assert "4 clip_grad_norm  muted: params=<1 tensors>, max_norm=0.5\n" in shown
    assert "\nchanges\n  - iteration 1 (train, epoch 0): mute train/clip_grad_norm" in shown


def test_only_the_newest_changes_are_shown(run, capsys):
    """Of many, ten."""
    for n in range(6):
        run.mute("clip_grad_norm")
        run.mute("clip_grad_norm", False)
    run.explain()

    changed = capsys.readouterr().out.partition("\nchanges\n")[2]
    assert changed.startswith("  - 2 before these: run.changes\n")
    assert changed.count("clip_grad_norm: ") == 10


def test_doubts_are_said_with_their_cure(model, sgd, batches, capsys):
    """Those of the order, which were warned of when it was built, and those of what parts read."""
    phase = lt.train(model, batches, step) | sharing | lt.optimize(sgd)
    run = lt.workflow([(phase, 1)], max_epochs=1) | lt.log(line=None) | lt.timer()
    with pytest.warns(UserWarning, match="timer: run/timer stands behind run/log"):
        run.explain()

    said = capsys.readouterr().out.partition("\ndoubts\n")[2]
    assert said.startswith("  - timer: run/timer stands behind run/log, whose rows do not show it. Pipe it on before")
    assert "  - train/sharing: it reads state.grad_norm, which no part of train sets." in said


def test_a_sound_pipe_has_nothing_but_its_table(run, capsys):
    """No empty headings."""
    run.explain()

    shown = capsys.readouterr().out
    assert "doubts" not in shown
    assert "changes" not in shown


def test_repr_says_where_the_run_is(run):
    """One line says the workflow and the counters, or what failed; another one the pipe."""
    assert repr(run).startswith("<Run: train x 1, val x 1; not begun\n train: forward | backward | clip_grad_norm | ")

    list(run.take(5))

    assert repr(run).startswith(
        "<Run: train x 1, val x 1; 1/2 epochs, 4/6 iterations done; in train: 1/3 batches done\n"
    )


def test_a_muted_update_is_said_to_stop_training(model, sgd, batches, capsys):
    """So is a muted backward."""
    run = lt.workflow(
        [(lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd), 1)], max_epochs=1
    )
    run.mute("backward")
    run.explain()

    assert "while backward is muted, the weights stand still" in capsys.readouterr().out
