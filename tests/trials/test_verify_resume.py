"""Resumption in fresh processes, compared bit for bit, and faults planted to be found."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import builds
import pytest

import looptools as lt
from looptools.trials import fresh
from looptools.trials import verify_resume as module
from looptools.trials.fresh import Named
from looptools.trials.trial import tell

quietly = functools.partial(lt.verify_resume, line=None)


@pytest.fixture
def in_process(monkeypatch):
    """The jobs are done here: quick, but blind to what classes and modules remember."""

    def do(trials, groups, at_once=1):
        for job in (job for jobs in groups for job in jobs):
            with warnings.catch_warnings(record=True):
                record = tell(Named(**trials.build).find(), trials.states, job)
            yield {**json.loads(json.dumps(record)), "output": ""}, 0.0

    monkeypatch.setattr(module._Trials, "do", do)


@pytest.mark.parametrize("name", ["good", "noisy"])
def test_from_every_hostile_place(in_process, monkeypatch, tmp_path, name):
    """Each kind of place is there, and from each the bits are the same."""
    monkeypatch.setenv("PIPES_FOLDER", str(tmp_path / "runs"))

    report = quietly(f"builds:{name}")

    assert report.exact, report
    kinds = " ".join(row.what for row in report.rows)
    for kind in ("first", "epoch", "later epoch", "window", "before the last", "end of a pass", "begun", "validation"):
        assert kind in kinds
    assert report.rows[-1].what == "at the very end"
    assert report.rows[-1].position == report.states == 28


def test_the_memory_of_a_class_is_found_by_a_fresh_process():
    """And named."""
    report = quietly(builds.class_attribute, at=[5])

    assert not report.exact
    assert report.rows[0].difference.startswith("loss of iteration 5: ")
    assert "of_all (of the class CallsOfAll) (5 without interruption, nothing here)" in "".join(report.rows[0].hints)


@pytest.mark.parametrize(
    ("name", "difference", "hint"),
    [
        ("counting_data", "batch of iteration 5 differs: the data's order or its transforms", "dataset.seen (20 "),
        ("plain_attribute", "loss of iteration 5: ", "train: model._calls (5 without interruption, 0 here)"),
        ("drawing_elsewhere", "batch of iteration 6 differs", "HIDDEN (a global)"),
    ],
)
def test_a_planted_fault_is_found_and_named(in_process, name, difference, hint):
    """The first thing that differs, and what was not saved."""
    report = quietly(f"builds:{name}", at=[5 if name != "drawing_elsewhere" else 13])

    assert not report.exact
    assert report.rows[0].difference.startswith(difference), report
    assert hint in "".join(report.rows[0].hints), report


def test_local_variables_of_a_generator_are_named(in_process):
    """As resume itself says."""
    report = quietly("builds:in_locals", at=[5])

    assert report.rows[0].difference.startswith("running of iteration 5: ")
    assert "train/damped (running) begins anew" in report.rows[0].hints[0]


def test_random_transforms_in_workers_want_seeded(in_process):
    """Their numbers depend on what the workers drew before."""
    report = quietly("builds:noisy_in_workers", at=[3])

    assert report.rows[0].difference == "batch of iteration 3 differs: the data's order or its transforms"
    assert "lt.seeded(loader, seed) makes them exact" in report.rows[0].hints[0]
    assert quietly("builds:seeded_in_workers", at=[3]).exact


def test_a_training_that_is_not_the_same_twice_is_not_blamed_on_resumption(in_process):
    """Two uninterrupted runs differ."""
    report = quietly("builds:not_the_same_twice")

    assert not report.exact
    assert report.rows == ()
    assert "two uninterrupted runs differ" in report.problem
    assert "lt.seed_everything(0)" in report.problem


def test_a_part_that_saving_changes_is_found(in_process):
    """Two runs that do not save are the same."""
    report = quietly("builds:changed_by_saving", at=[3])

    assert report.problem.startswith("saving changes the run")


def test_clocks_are_left_out(in_process):
    """What differs between two uninterrupted runs, though they train the same, is said."""
    report = quietly("builds:speedy", every=11)

    assert report.exact, report
    assert report.left_out == ("clock",)
    assert "Not compared, since two uninterrupted runs differ in it: clock." in repr(report)
    assert [row.position for row in report.rows] == [11, 22]


def test_a_long_run_is_cut(in_process):
    """To two rounds, and if need be to few batches a pass; and the report says so."""
    assert quietly("builds:long", at=[3]).cut == "2 rounds"
    report = quietly("builds:long", at=[3], states=16)

    assert (report.cut, report.states, report.exact) == ("2 rounds of 4 batches a pass", 16, True)
    with pytest.raises(ValueError, match=r"nothing to save at \[17\], the run has 16 states, cut to 2 rounds"):
        quietly("builds:long", at=[17], states=16)


def test_a_process_that_hangs_is_killed():
    """After timeout seconds."""
    with pytest.raises(RuntimeError, match="still at work after 0.5 seconds"):
        quietly(builds.hangs, timeout=0.5)


def test_an_error_in_build_is_shown(in_process):
    """That of the user's own code."""
    with pytest.raises(RuntimeError, match="without interruption the run fails in a fresh process: .*planted in build"):
        quietly("builds:fails")


def test_what_cannot_be_imported_is_refused():
    """Before any process is started."""

    def nested():
        return builds.good()

    with pytest.raises(ValueError, match="a lambda, so a fresh process cannot import it"):
        quietly(lambda: builds.good())
    with pytest.raises(ValueError, match="nested is defined within another function"):
        quietly(nested)
    with pytest.raises(TypeError, match="got a Run. A run can't be built anew"):
        quietly(builds.good())
    with pytest.raises(ImportError, match="there is no bad in builds"):
        quietly("builds:bad")
    with pytest.raises(ValueError, match='write "module:function"'):
        quietly("builds")


def test_a_function_typed_at_a_prompt_is_refused(monkeypatch):
    """It is in no file."""
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__spec__", None)
    monkeypatch.delattr(main, "__file__", raising=False)
    build = type(builds.good)(builds.good.__code__, main.__dict__, "build")
    build.__module__, build.__qualname__ = "__main__", "build"
    monkeypatch.setattr(main, "build", build, raising=False)

    with pytest.raises(ValueError, match="typed in a notebook or at a prompt.*%%writefile"):
        quietly(build)


def test_a_good_pipe_in_a_script(tmp_path):
    """Exact from fresh processes, which find a function of the script; the run's own folder is not touched."""
    file = tmp_path / "script.py"
    text = """
        import builds, looptools as lt
        def build():
            return builds.good()
        if __name__ == "__main__":
            print(lt.verify_resume(build, at=[5, 11], line=None).exact)
    """
    file.write_text(textwrap.dedent(text))
    here = Path(builds.__file__).parent
    path = os.pathsep.join(map(str, (here, here.parent, Path(lt.__file__).parent.parent)))
    environment = {**os.environ, "PYTHONPATH": path, "PIPES_FOLDER": str(tmp_path / "runs")}

    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, env=environment, timeout=300)

    assert done.stdout == "True\n", done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_script_without_a_guard_is_told(monkeypatch):
    """Each fresh process would begin once more."""
    monkeypatch.setattr(fresh, "_within", True)

    with pytest.raises(RuntimeError, match='Put the call behind if __name__ == "__main__":'):
        quietly(builds.good)
