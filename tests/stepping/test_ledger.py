"""Who waits for the device, over a whole run."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from loops import Case, assert_same, by_hand, device_reads, loader, piped
from torch import Tensor, nn

import looptools as lt
from looptools.stepping.tracing import blame, reads
from looptools.stepping.tracing.reads import PATCHES, Tally, counted


def step(model, batch):
    loss = model(batch)
    return {"loss": loss, "rounded": round(loss.item(), 2)}  # planted


PLANTED = step.__code__.co_firstlineno + 2


def plain(model, batch):
    return model(batch)


def standing():
    """What stands in the place of everything that may be exchanged."""
    return [vars(patch.owner).get(patch.name) for patch in PATCHES]


ORIGINALS = standing()


def are_back():
    return all(now is before for now, before in zip(standing(), ORIGINALS, strict=True))


@pytest.fixture
def run(model, sgd, batches):
    train = lt.train(model, batches, step) | lt.optimize(sgd)
    return lt.workflow([(train, 1), (lt.validate(model, batches[:2], step), 1)], max_epochs=2)


def counts(ledger):
    return {row.part: row.reads for row in ledger.rows}


def test_an_item_in_the_step_is_blamed_on_its_line_and_part(run):
    """File, line, part, and how often; the means of each pass are read once."""
    ledger = run.ledger
    run.to_end()

    assert counts(ledger) == {"train/forward": 6, "val/forward": 4, "train/average": 2, "val/average": 2}
    ((read, n),) = ledger.rows[0].lines
    assert (n, read.how, read.file, read.line) == (6, "item", __file__, PLANTED)
    assert read.where.endswith(f"test_ledger.py:{PLANTED}")
    assert read.code.endswith("# planted")


def test_reads_in_an_iteration(run):
    """Those of a phase by its own iterations."""
    ledger = run.ledger
    run.to_end()

    assert dict(ledger.iterations) == {"train": 6, "val": 4}
    assert {row.part: row.per_iteration for row in ledger.rows} == pytest.approx(
        {"train/forward": 1, "val/forward": 1, "train/average": 1 / 3, "val/average": 1 / 2}
    )


def test_a_row_of_the_log_is_one_read(model, sgd, batches):
    """Blamed on the log's own line, not on the place where tensors become numbers."""
    phase = lt.train(model, batches, plain) | lt.optimize(sgd)
    run = lt.workflow([(phase, 1)], max_epochs=2) | lt.log(every=1, line=None)
    ledger = run.ledger
    list(run.take(4))

    (row,) = [row for row in ledger.rows if row.part == "run/log"]
    assert (row.reads, row.per_iteration) == (4, 1)
    assert all(Path(read.file).name == "log.py" and read.how == "tolist" for read, _ in row.lines)


def test_it_counts_from_when_it_is_first_asked_for(run):
    """And an iteration that was open then has its rest counted."""
    next(run)
    run.before("forward")
    ledger = run.ledger

    assert (run.ledger is ledger, ledger.rows) == (True, [])
    next(run)
    assert counts(ledger) == {"train/forward": 1}
    assert ledger.iterations.total() == 1


def test_stop_start_and_reset(run):
    """Stopped, nothing is exchanged any more; what was counted stays until it is reset."""
    ledger = run.ledger
    next(run)
    ledger.stop()
    next(run)
    assert (counts(ledger), ledger.counts) == ({"train/forward": 1}, False)
    assert "work" not in vars(run.cursor)

    ledger.start()
    ledger.start()
    ledger.reset()
    next(run)
    assert (counts(ledger), ledger.counts) == ({"train/forward": 1, "train/average": 1}, True)
    ledger.stop()
    ledger.stop()


@pytest.mark.parametrize("case", [Case(optimizer="AdamW", max_norm=1.0, accumulate=2), Case(cosine=True, workers=2)])
def test_the_same_bits_with_it_on(case):
    """As in the loop by hand."""
    run = piped(case)
    ledger = run.ledger
    run.to_end()

    assert_same(run.model.state_dict(), by_hand(case))
    assert ledger.iterations.total() == 28


@pytest.mark.parametrize("end", ["to_end", "close", "reset"])
def test_the_methods_are_the_originals_whenever_the_run_is_not_at_work(run, end):
    """Between two iterations, and after the run, whichever way it ends."""
    ledger = run.ledger
    for _ in run.take(2):
        assert are_back()
    getattr(run, end)()

    assert are_back()
    assert counts(ledger)["train/forward"] >= 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, StopIteration, GeneratorExit])
def test_the_methods_are_the_originals_after_a_failure(run, error):
    """Whatever was raised; what was asked before that counts."""
    inside = []

    def fails(model, batch):
        inside.append(are_back())
        model(batch).item()
        raise error

    run.replace("step", fails)
    ledger = run.ledger
    with pytest.raises(BaseException):  # noqa: B017
        next(run)

    assert inside == [False]
    assert are_back()
    assert counts(ledger) == {"train/forward": 1}


def test_nothing_is_exchanged_where_nobody_asked(model, batches):
    """Neither methods nor the run's own."""
    seen = []
    phase = lt.validate(model, batches, lambda model, batch: seen.append(are_back()) or {"mean": batch.mean()})
    run = lt.workflow([(phase, 1)], max_rounds=1)
    run.to_end()

    assert seen == [True] * 3
    assert "work" not in vars(run.cursor)


def test_two_runs_in_turns(model, batches):
    """Each counts its own, also one that is run inside a part of the other; the outer one counts the inner's too."""
    inner = lt.workflow([(lt.validate(model, batches, step), 1)], max_rounds=9)
    inner_ledger = inner.ledger

    def within(states):
        for state in states:
            next(inner)
            yield state

    outer = lt.workflow([(lt.train(model, batches, plain) | within, 1)], max_epochs=2)
    outer_ledger = outer.ledger
    next(outer)
    next(inner)
    next(outer)

    assert counts(inner_ledger) == {"val/forward": 3, "val/average": 1}
    assert counts(outer_ledger) == {"train/within": 3}
    assert are_back()


def test_threads_do_not_count_each_others(run):
    """What another thread reads meanwhile is not the run's."""
    ledger = run.ledger

    def busy(model, batch):
        thread = threading.Thread(target=lambda: [torch.ones(()).item() for _ in range(50)])
        thread.start()
        thread.join()
        return model(batch)

    run.replace("step", busy)
    next(run)

    assert counts(ledger) == {}


def test_two_runs_in_two_threads(batches):
    """Both count, and the methods are put back when the last one is through."""
    meet = threading.Barrier(2, timeout=20)

    class Weight(nn.Linear):
        def forward(self, batch):
            meet.wait()
            return super().forward(batch).mean()

    def make():
        phase = lt.validate(Weight(1, 1), batches, step)
        return lt.workflow([(phase, 1)], max_rounds=5)

    runs = [make(), make()]
    ledgers = [run.ledger for run in runs]
    threads = [threading.Thread(target=run.to_end) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [counts(ledger) for ledger in ledgers] == [{"val/forward": 15, "val/average": 5}] * 2
    assert are_back()


def test_autograds_own_threads_count_for_who_waits_for_them(run):
    """On a device, backward runs in threads that Python has not made; here, one that it does not know."""
    import _thread

    ledger = run.ledger

    def other(model, batch):
        done = threading.Lock()
        done.acquire()
        _thread.start_new_thread(lambda: (torch.ones(()).item(), done.release()), ())
        done.acquire()
        return model(batch)

    run.replace("step", other)
    next(run)

    assert counts(ledger) == {"train/forward": 1}


def test_your_loop_counts_inside_with(run):
    """Its body is outside of the run's work; parts are counted once all the same."""
    with run.ledger as ledger:
        for state in run.take(2):
            float(state.loss.detach())
    float(state.loss.detach())

    assert counts(ledger) == {"train/forward": 2, "your loop": 2}
    assert are_back()


def test_what_torch_asks_itself_is_blamed_on_the_part_with_both_lines(model, batches):
    """GradScaler.step and AdamW on the CPU: the library's line, and the nearest of one's own or of looptools."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    phase = lt.train(model, batches, plain) | lt.optimize(optimizer, scaler=torch.amp.GradScaler("cpu"))
    run = lt.workflow([(phase, 1)], max_epochs=1)
    ledger = run.ledger
    next(run)

    (row,) = ledger.rows
    vias = {read.via.partition(":")[0] for read, _ in row.lines}
    assert row.part == "train/update"
    assert vias == {"torch/amp/grad_scaler.py", "torch/optim/optimizer.py"}
    assert all(read.where.startswith("looptools/") for read, _ in row.lines)


def test_a_library_called_by_the_step_shows_the_steps_line(model, batches):
    """``error_if_nonfinite`` asks in torch; the line that wanted it is in the step."""

    def clips(model, batch):
        model.w.grad = torch.ones(())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        return model(batch)

    run = lt.workflow([(lt.train(model, batches, clips), 1)], max_epochs=1)
    ledger = run.ledger
    next(run)

    ((read, _),) = ledger.rows[0].lines
    assert (read.file, read.line) == (__file__, clips.__code__.co_firstlineno + 2)
    assert read.via.startswith("torch/nn/utils/clip_grad.py:")


def test_the_boundary_the_source_and_functions_of_the_workflow_have_names(model, batches):
    """What a part asked to have done there is its own; a source and a function of the workflow have names, too."""

    class Asks:
        def ask(self, run):
            torch.ones(()).item()

        def __call__(self, states):
            for state in states:
                state.run.at_boundary(self.ask)
                yield state

    def source():
        for batch in batches:
            batch.sum().item()
            yield batch

    def between(run):
        torch.ones(()).item()

    phase = lt.validate(model, source, plain)
    run = lt.workflow([(phase, 1), (between, 1)], max_rounds=1) | Asks()
    ledger = run.ledger
    run.to_end()

    found = counts(ledger)
    assert {part: found.get(part) for part in ("run/Asks", "val/batches", "workflow/between")} == {
        "run/Asks": 3,
        "val/batches": 3,
        "workflow/between": 1,
    }


def test_a_loader_on_the_host_is_not_blamed(model):
    """Its sampler and data set read tensors that are on the host with a GPU, too."""

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.full((1,), torch.tensor(index).item())

    data = torch.utils.data.DataLoader(Data(), 2, shuffle=True)
    run = lt.workflow(
        [(lt.validate(model, data, lambda model, batch: {"mean": batch.float().mean()}), 1)], max_rounds=1
    )
    ledger = run.ledger
    run.to_end()

    assert counts(ledger) == {"val/average": 1}


def test_parts_that_come_and_go_are_counted(run):
    """Replaced ones, those of a phase's next pass, and under `leak_guard`."""

    def looks(states):
        for state in states:
            if state.loss > 1e9:
                raise ValueError
            yield state

    guarded = lt.workflow([(lt.train(run.model, [torch.ones(1)] * 2, plain) | looks, 1)], max_epochs=2)
    guarded = guarded | lt.leak_guard()
    ledger = guarded.ledger
    list(guarded.take(3))
    guarded.replace("looks", looks)
    guarded.to_end()

    assert counts(ledger)["train/looks"] == 4


READS = {
    "item": lambda x: x.item(),
    "tolist": lambda x: x.tolist(),
    "__bool__": lambda x: bool(x),
    "__float__": lambda x: float(x),
    "__int__": lambda x: int(x),
    "__complex__": lambda x: complex(x),
    "__index__": lambda x: range(3)[x.long()],
    "__format__": lambda x: f"{x:.2f}",
    "__repr__": lambda x: repr(x),
    "cpu": lambda x: x.cpu().tolist(),
    "nonzero": lambda x: torch.nonzero(x),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: x.allclose(x),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "__getitem__": lambda x: x[x > 0],
    "__setitem__": lambda x: fill(),
    "__contains__": lambda x: 1 in x[None],
}


def fill():
    several = torch.ones(3)
    several[several > 0] = torch.zeros(3)


@pytest.mark.parametrize("how", READS)
def test_each_way_to_wait_is_one_read(how):
    """Those that it makes in turn do not count."""
    found = []
    counted(lambda: READS[how](torch.tensor(1.0)), Tally(found.append))

    assert [read.how for read in found] == [{"__contains__": "item"}.get(how, how)]
    assert found[0].file == __file__
    assert are_back()


@pytest.mark.parametrize(
    "harmless",
    [
        lambda x: x.to(torch.float64).to("cpu"),
        lambda x: x.sum() + x[0] + x[1:].mean(),
        lambda x: x.numpy(),
        lambda x: x.clone().copy_(x),
        lambda x: x.__setitem__(x > 5, 1.0),
        lambda x: x.shape[0] + x.numel() + len(x),
        lambda x: x.to("meta"),
    ],
)
def test_what_does_not_wait_does_not_count(harmless):
    """Nothing becomes a number there."""
    found = []
    counted(lambda: harmless(torch.arange(3.0)), Tally(found.append))

    assert found == []


def test_who_exchanges_a_method_meanwhile_keeps_it():
    """It is theirs; ours passes on what comes to it later, and is not found twice."""
    found = []
    with device_reads() as outer:
        counted(lambda: torch.ones(()).item(), Tally(found.append))
        torch.ones(()).item()

    context = device_reads()
    names = counted(lambda: context.__enter__(), Tally(found.append))  # left open behind it
    counted(lambda: torch.ones(()).item(), Tally(found.append))
    context.__exit__(None, None, None)
    torch.ones(()).item()
    counted(lambda: None, Tally(found.append))

    assert (len(outer), names, [read.how for read in found]) == (2, ["item"], ["item"] * 2)
    assert are_back()


def test_what_fails_is_not_a_read():
    """Eight numbers are no number."""
    found = []
    with pytest.raises(RuntimeError):
        counted(lambda: torch.ones(8).item(), Tally(found.append))

    assert found == []


def test_a_forked_worker_counts_nothing(run):
    """Its tensors have their own methods, though it was born while the run was at work."""

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.tensor(float(not are_back()))

    data = torch.utils.data.DataLoader(Data(), 2, num_workers=1)
    run = lt.workflow([(lt.validate(run.model, data, lambda model, batch: {"changed": batch.mean()}), 1)], max_rounds=1)
    assert run.ledger.counts
    run.to_end()

    assert run.results["val/changed"] == 0.0


def test_a_compiled_step_is_not_compiled_again(batches):
    """Its guards do not see that methods are exchanged."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    inner = torch.compile(lambda w, batch: (w * batch.to(torch.float64)[:1]).mean(), backend=backend)
    model = nn.Linear(1, 1)
    run = lt.workflow([(lt.train(model, batches, lambda model, batch: inner(model.weight, batch)), 1)], max_epochs=2)
    next(run)
    before = len(compiled)
    with run.ledger:
        list(run.take(2))

    assert (before, len(compiled)) == (1, 1)


def test_an_interrupt_at_any_opcode_leaves_the_methods_as_they_were(model, batches):
    """In `counted` and all that it calls; the second look cleans up what the first one left."""
    files = {reads.__file__}
    hits = 0
    for patch in PATCHES:
        patch.ours = patch.found = None  # as in a process in which nobody has counted yet
    for n in range(1, 10_000):
        count = 0

        def trace(frame, event, arg, n=n):
            nonlocal count
            if frame.f_code.co_filename not in files:
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            if event == "opcode":
                count += 1
                if count == n:
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            counted(lambda: torch.ones(()).item(), Tally(lambda read: None))
        except KeyboardInterrupt:
            hits += 1
        finally:
            sys.settrace(before)
        assert are_back(), n
        assert not reads._tallies, n
        assert not reads._here.inside, n
        if count < n:
            break
    assert hits == n - 1 > 100


def test_a_run_that_nobody_holds_is_let_go(model, batches):
    """Counting keeps neither run nor model; the figures stay."""
    run = lt.workflow([(lt.validate(model, batches, step), 1)], max_rounds=1)
    ledger = run.ledger
    next(run)
    cursor = weakref.ref(run.cursor)
    del run
    gc.collect()

    assert cursor() is None
    assert counts(ledger) == {"val/forward": 1}


def test_a_new_ledger_after_reset(run):
    """The run starts afresh, and so does the count."""
    old = run.ledger
    next(run)
    run.reset()

    assert run.ledger is not old
    assert run.ledger.rows == []


def test_tensors_on_the_host_count_if_asked(run):
    """By default where all models are there."""
    ledger = run.ledger
    ledger.cpu_too = False
    next(run)
    assert ledger.rows == []
    ledger.cpu_too = True
    next(run)
    assert counts(ledger) == {"train/forward": 1}


def test_it_shows_as_a_table(run):
    """Parts, reads, reads an iteration, and the lines."""
    ledger = run.ledger
    assert repr(ledger) == "0 device reads in 0 iterations"
    list(run.take(2))
    text = repr(ledger)

    assert text.startswith("2 device reads in 2 iterations (2 of train)\n")
    assert f"test_ledger.py:{PLANTED}  return" in text
    assert max(map(len, text.splitlines())) <= 100
    assert ledger._repr_html_().count("<tr") == 2
    ledger.stop()
    assert repr(ledger).splitlines()[0].endswith("; not counting")


def test_files_are_said_short(monkeypatch):
    """A package's from the package on; a cell by its number."""
    site = Path(torch.__file__).parent.parent
    assert blame.short(str(site / "somewhere" / "deep.py")) == "somewhere/deep.py"
    assert blame.short("<stdin>") == "<stdin>"

    class Compile:
        @staticmethod
        def format_code_name(file):
            return ("Cell", "In[3]") if file == "/tmp/cell.py" else None

    class Shell:
        compile = Compile

    module = type(sys)("IPython")
    module.get_ipython = Shell
    monkeypatch.setitem(sys.modules, "IPython", module)
    assert blame.short("/tmp/cell.py") == "Cell In[3]"
    assert blame.short("/tmp/x/other.py") == "x/other.py"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device_only_its_tensors_count():
    """And what copies to it without `non_blocking`."""
    run = lt.workflow([(lt.train(nn.Linear(3, 2).cuda(), loader(), gpu_step, device="model"), 1)], max_epochs=1)
    ledger = run.ledger
    next(run)

    assert counts(ledger) == {"train/batches": 2, "train/forward": 1}


def gpu_step(model, batch):
    torch.ones(()).item()
    loss = model(batch[0]).mean()
    loss.item()
    return loss


def test_every_method_is_the_original_at_the_end():
    """No test has left one of ours behind, and none is missing."""
    assert are_back()
    assert all(callable(getattr(patch.owner, patch.name)) for patch in PATCHES)
    assert "item" not in vars(Tensor)
