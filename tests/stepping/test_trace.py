"""One iteration, part by part: what each did, how long it took, and what it cost."""

from __future__ import annotations

import pytest
import torch
from loops import Case, assert_same, by_hand, classify, loader, network, piped
from torch import nn

import looptools as lt
from looptools.stepping.tracing.changed import changes, look
from looptools.stepping.tracing.norms import norms
from looptools.stepping.tracing.reads import PATCHES


def step(model, batch):
    return {"loss": model(batch), "mean": batch.mean()}


@pytest.fixture
def run(model, sgd, batches):
    train = lt.train(model, batches, step) | lt.optimize(sgd, max_norm=0.5)
    return lt.workflow([(train, 1), (lt.validate(model, batches[:1], step), 1)], max_epochs=2)


def row_of(trace, part):
    return next(row for row in trace.rows if row.part == part)


def test_a_row_for_each_part_batches_first(run):
    """Behind the last part comes the boundary: what the run itself does."""
    parts = [row.part for row in run.trace().rows]

    names = ["batches", "forward", "backward", "clip_grad_norm", "update", "average"]
    assert parts == [*(f"train/{name}" for name in names), "boundary"]


def test_the_run_stands_as_after_next(run):
    """The iteration is complete, and the next one follows."""
    run.trace()

    assert (run.state.iteration, run.progress.iteration, next(run).iteration) == (0, 1, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_iteration_traced_gives_the_same_bits(workers):
    """Dropout, BatchNorm, AdamW, accumulation: as in the loop by hand."""
    case = Case(optimizer="AdamW", max_norm=1.0, accumulate=2, workers=workers, length_known=False)
    run = piped(case)
    traced = 0

    while not run.ended:
        try:
            run.trace()
        except LookupError:
            break
        traced += 1

    assert traced == 28
    assert_same(run.model.state_dict(), by_hand(case))


def test_what_each_part_changed_on_the_state(run):
    """Fields that were set, keys of the metrics, and at the end of a pass the run's results."""
    trace = run.trace()
    list(run.take(1))
    last = run.trace()

    assert row_of(trace, "train/batches").changed == ("batch",)
    assert row_of(trace, "train/forward").changed == ("outputs", "loss", "num_samples", "metrics[loss, mean]")
    assert "updates" in row_of(trace, "train/backward").changed
    assert row_of(trace, "train/clip_grad_norm").changed == ("grad_norm",)
    assert row_of(last, "train/average").changed == ("results[train/loss, train/mean]",)


def test_norms_before_and_after(run):
    """The one weight is at 3; its gradient is 1, clipped to 0.5, and the update goes down by it."""
    trace = run.trace()

    assert row_of(trace, "train/backward").gradients == (None, 1.0)
    assert row_of(trace, "train/clip_grad_norm").gradients == pytest.approx((1.0, 0.5), rel=1e-5)
    assert row_of(trace, "train/update").weights == pytest.approx((3.0, 2.5), rel=1e-5)
    assert row_of(trace, "train/forward").weights == (3.0, 3.0)


def test_norms_are_shown_where_they_change(run):
    """Nowhere else, and a column in which nothing stands is left out."""
    text = str(run.trace())
    for _ in range(2):
        run.trace()
    validation = str(run.trace())

    assert "3 -> 2.5" in text
    assert "none -> 1" in text
    assert "3 -> 3" not in text
    assert "val/forward" in validation
    assert "norm" not in validation


def test_reads_are_blamed_on_part_and_line(model, batches):
    """The part that asked, the line in which it did, and what stands there."""

    def looks(states):
        for state in states:
            state.metrics["rounded"] = round(state.loss.item())  # planted
            yield state

    trace = lt.workflow([(lt.train(model, batches, step) | looks, 1)], max_epochs=1).trace()

    (read,) = row_of(trace, "train/looks").reads
    assert (read.how, read.file, read.line) == ("item", __file__, looks.__code__.co_firstlineno + 2)
    assert read.code.endswith("# planted")
    assert [row.part for row in trace.rows if row.reads] == ["train/looks"]
    assert f"test_trace.py:{read.line}  state.metrics" in str(trace)


def test_the_trace_itself_reads_nothing_that_counts(run):
    """Its norms are read between the parts."""
    assert not any(row.reads for row in run.trace().rows)


def test_the_rest_of_an_open_iteration(run, model):
    """From where it was left; what was done by hand since counts for no part."""
    run.after("backward")
    model.w.grad.fill_(0.25)

    trace = run.trace()

    assert [row.part for row in trace.rows][:2] == ["train/clip_grad_norm", "train/update"]
    assert row_of(trace, "train/clip_grad_norm").gradients == (0.25, 0.25)
    assert model.w.item() == 2.75


def test_a_failure_leaves_as_from_next_with_the_table_so_far(run):
    """The exception's notes have it, and `next(run)` goes on."""
    boom = [True]

    def fails(states):
        for state in states:
            if boom and boom.pop():
                raise ValueError("planted")
            yield state

    run.replace("clip_grad_norm", fails)

    with pytest.raises(ValueError, match="planted") as caught:
        run.trace()

    table = caught.value.__notes__[-1]
    assert table.startswith("run.trace() up to there:\niteration 0 of train")
    assert "train/backward" in table
    assert "failed: ValueError" in table
    assert "train/update" not in table
    assert run.failed.part == "train/clip_grad_norm"
    assert next(run).iteration == 0


def test_methods_are_put_back_after_a_failure(run):
    """Whatever it raises."""
    before = dict(vars(torch.Tensor))

    def fails(states):
        for _ in states:
            raise KeyboardInterrupt
        yield

    run.replace("clip_grad_norm", fails)
    with pytest.raises(KeyboardInterrupt):
        run.trace()

    assert dict(vars(torch.Tensor)) == before
    assert not any(vars(patch.owner).get(patch.name) is patch.ours for patch in PATCHES if patch.ours is not None)


def test_at_the_end_there_is_nothing_to_trace(run):
    """It says why; `next(run)` has the same to say."""
    run.to_end()

    with pytest.raises(LookupError, match=r"trace: there is no iteration left \(finished: 2 epochs"):
        run.trace()


def test_behind_a_ctrl_c_the_next_iteration_is_traced(run):
    """The finished one was seen at the prompt, in `run.state`."""
    state = next(run)
    run.cursor.unseen = state

    trace = run.trace()

    assert "iteration 1" in trace.where
    assert next(run).iteration == 2


def test_a_part_that_drops_its_state(model, sgd, batches):
    """The next one takes its place, and the row says so."""

    def drop_first(states):
        for state in states:
            if state.index:
                yield state

    phase = lt.train(model, batches, step) | drop_first | lt.optimize(sgd)
    trace = lt.workflow([(phase, 1)], max_epochs=1).trace()

    assert [row.part for row in trace.rows][:4] == [
        f"train/{n}" for n in ("batches", "forward", "drop_first", "backward")
    ]
    assert row_of(trace, "train/drop_first").changed[0] == "dropped iteration 0 of train"
    assert "iteration 1 of train" in str(trace)


def test_it_fetches_no_batch_ahead(model, sgd, batches):
    """Where the length is unknown, asking for `last` would."""
    asked = []

    def source():
        for batch in batches:
            asked.append(batch)
            yield batch

    def ahead(states):
        for state in states:
            state.metrics["asked"] = len(asked)
            yield state

    run = lt.workflow([(lt.train(model, source, step) | ahead, 1)], max_epochs=1)
    run.trace()

    assert run.state.metrics["asked"] == 1


@pytest.mark.parametrize("model", [None, nn.Identity(), nn.LazyLinear(1)], ids=["no module", "no parameters", "lazy"])
def test_models_without_norms(model, batches):
    """No model, one without parameters, one whose parameters are made by its first forward."""
    phase = lt.validate(model, batches, lambda model, batch: {"mean": (model or abs)(batch).mean()})
    trace = lt.workflow([(phase, 1)], max_rounds=1).trace()

    before, after = row_of(trace, "val/forward").weights
    assert before is None
    assert (after is None) is not isinstance(model, nn.Linear)


def test_norms_of_sparse_half_and_complex_gradients():
    """Sparse ones summed first, half precision without overflow; the other kinds too."""
    embedding = nn.Embedding(4, 1, sparse=True)
    embedding(torch.tensor([1, 1, 2])).sum().backward()
    half = nn.Linear(2, 1, bias=False, dtype=torch.float16)
    nn.init.constant_(half.weight, 60000.0)
    waves = nn.ParameterList([torch.tensor([3 + 4j])])

    assert norms(embedding)[1] == pytest.approx(5**0.5)
    assert norms(half)[0] == pytest.approx(60000 * 2**0.5)
    assert norms(waves) == (5.0, None)


def test_what_is_written_in_place_is_a_change():
    """A part that scales the batch itself, or one of the metrics."""
    state = lt.State(phase="train", batch=(torch.ones(2), "name"), metrics={"loss": torch.ones(()), "old": 1})
    before = look(state, {})
    state.batch[0].mul_(2)
    state.metrics["loss"].add_(1)
    del state.metrics["old"]

    assert changes(before, look(state, {})) == ("batch (in place)", "metrics[loss (in place), old (taken away)]")


def test_looking_asks_for_nothing():
    """A field that is not known yet stays unknown."""
    state = lt.State(phase="train")
    del state.last

    assert "last" not in look(state, {})


def test_the_tables_fit_and_show_in_a_notebook(run):
    """At most 100 columns, however long the names; the notebook's table has the same rows."""

    def a_part_with_a_name_that_is_longer_than_any_table_would_like_it_to_be(states):
        for state in states:
            state.metrics |= {f"metric_number_{n}": float(state.loss.detach()) for n in range(30)}
            yield state

    phase = lt.train(run.model, [torch.ones(2, 1)], step)
    phase = phase | a_part_with_a_name_that_is_longer_than_any_table_would_like_it_to_be
    run = lt.workflow([(phase, 1)], max_epochs=1)
    trace = run.trace()

    assert max(map(len, str(trace).splitlines())) <= 100
    assert "metric_number_29" in str(trace)
    assert trace._repr_html_().count("<tr") == (1 + len(trace.rows) + 1) + (1 + 2)
    assert repr(trace) == str(trace)


def test_times_are_of_the_part(run):
    """A part that sleeps has the largest share, and the total is the sum."""
    import time

    def sleeps(states):
        for state in states:
            time.sleep(0.05)
            yield state

    run.replace("clip_grad_norm", sleeps)
    trace = run.trace()

    assert row_of(trace, "train/clip_grad_norm").milliseconds >= 50
    assert trace.milliseconds == pytest.approx(sum(row.milliseconds for row in trace.rows))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device_what_really_waits_is_counted():
    """Batches that are copied without `non_blocking` wait, and so does `x[mask]`."""

    def masked(model, batch):
        out = classify(model, batch)
        out["few"] = batch[0][batch[0] > 0].sum()
        return out

    phase = lt.train(network().cuda(), loader(), masked, device="model")
    trace = lt.workflow([(phase, 1)], max_epochs=1).trace()

    assert [read.how for read in row_of(trace, "train/batches").reads] == ["to", "to"]
    assert [read.how for read in row_of(trace, "train/forward").reads] == ["__getitem__"]
