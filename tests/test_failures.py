"""What an exception says besides its own message: where it was, what to do, how to go on."""

from __future__ import annotations

import dataclasses
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import looptools as lt
from looptools.failures import ADVICE, Failed, add_notes, advise, contents


def notes_of(step, batch, model=None, part="forward"):
    """The notes on what *step* raises, in a run over one batch."""
    run = lt.workflow([(lt.train(model or nn.Linear(3, 2), [batch], step), 1)], max_epochs=1)
    with pytest.raises(Exception) as caught:  # noqa: PT011 (each case raises its own)
        next(run)
    assert run.failed.part == f"train/{part}"
    return "\n".join(caught.value.__notes__)


def raising(error):
    def step(model, batch):
        raise error

    return step


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
IMAGES, LABELS = torch.ones(4, 3), torch.zeros(4).long()


def shared(model, batch):
    """A step over one more layer, that calls backward twice."""
    loss = model(batch).pow(2).sum()
    loss.backward()
    loss.backward()


def written_over(model, batch):
    hidden = torch.sigmoid(model(batch))
    hidden += 1
    hidden.sum().backward()


@pytest.mark.parametrize(
    ("step", "batch", "advice"),
    [
        (lambda m, b: m(b.to("meta")), IMAGES, 'The model: Linear, float32 on cpu.* lt.train(..., device="model")'),
        (lambda m, b: m(b) + torch.ones(2, device="meta"), IMAGES, "what the step makes itself needs device="),
        (
            lambda m, b: m(b),
            IMAGES.double(),
            "The batch: (4, 3) float64 on cpu.* NumPy's numbers become float64: x.float()",
        ),
        (lambda m, b: m(b), IMAGES.byte(), "The batch: (4, 3) uint8 on cpu"),
        (lambda m, b: F.cross_entropy(m(b), LABELS.float()), IMAGES, "Labels of classes must be int64: y.long()"),
        (
            lambda m, b: F.binary_cross_entropy_with_logits(m(b), torch.ones(4, 2).long()),
            IMAGES,
            "targets of mse_loss and.* float: y.float()",
        ),
        (lambda m, b: m(b).detach().sum().backward(), IMAGES, "The loss was cut off from the weights: by .detach()"),
        (shared, IMAGES, "Does the step call backward itself?.* lt.forward(step).* hidden.detach()"),
        (written_over, IMAGES, "or in the step (x += 1, .*torch.autograd.set_detect_anomaly(True) shows where"),
        (lambda m, b: F.cross_entropy(m(b), LABELS + 2), IMAGES, "Class labels must be 0 ... classes - 1"),
        (lambda m, b: F.embedding(LABELS + 9, m.weight), IMAGES, "token numbers 0 ... size of the vocabulary - 1"),
        (lambda m, b: nn.BatchNorm1d(3)(b), IMAGES[:1], "BatchNorm cannot train on one sample.* drop_last=True"),
        (lambda m, b: m(b), torch.ones(4, 5), "The batch: (4, 5) float32 on cpu."),
        (lambda m, b: m(b), (IMAGES, LABELS), "The batch: tuple of (4, 3) float32 on cpu, (4,) int64 on cpu."),
        (lambda m, b: b["y"], {"x": IMAGES}, "The batch: dict of x: (4, 3) float32 on cpu."),
        (
            lambda m, b: m(b[0], *b[1]),
            (IMAGES, [1, "a"]),
            "The batch: tuple of (4, 3) float32 on cpu, list of int, str.",
        ),
    ],
)
def test_the_commonest_errors_of_torch_say_what_to_do(step, batch, advice):
    """Raised for real; the note behind the place."""
    notes = notes_of(step, batch)

    for piece in advice.split(".*"):
        assert piece in notes


@pytest.mark.parametrize(
    ("message", "piece"),
    [
        ("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!", "device="),
        ("Input type (torch.FloatTensor) and weight type (torch.cuda.FloatTensor) should be the same", "device="),
        ("Input type (torch.cuda.FloatTensor) and weight type (torch.FloatTensor) should be the same", "device="),
        (
            "Input type (torch.cuda.DoubleTensor) and weight type (torch.cuda.FloatTensor) should be the same",
            "x.float()",
        ),
        ("CUDA error: device-side assert triggered", "CUDA_LAUNCH_BLOCKING=1.* run.resume() goes on"),
        ("MPS backend out of memory (MPS allocated: 17 GB)", "smaller batches with lt.optimize(..., accumulate=n)"),
    ],
)
def test_errors_of_devices_that_are_not_here(message, piece):
    """Recognised by the message that torch gives there."""
    notes = notes_of(raising(RuntimeError(message)), IMAGES)

    assert all(p in notes for p in piece.split(".*"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError("Unable to allocate")])
def test_out_of_memory(error):
    """The batch's size, what needs less, and that retry works."""
    notes = notes_of(raising(error), (IMAGES, LABELS))

    assert "The batch: tuple of (4, 3) float32 on cpu, (4,) int64 on cpu. To need less: smaller batches" in notes
    for piece in ("autocast=torch.bfloat16", "torch.utils.checkpoint", "foreach=False", "run.retry() works"):
        assert piece in notes


def test_out_of_memory_on_the_cpu_for_real():
    """Torch's allocator says it with a RuntimeError."""
    assert "smaller batches" in notes_of(lambda model, batch: torch.empty(10**15), IMAGES)


def test_out_of_memory_lets_go_of_what_the_step_had_made(model, sgd, batches):
    """The traceback would keep it, and the retry run out of memory again; other errors keep it for a debugger."""
    made, errors = [], [torch.OutOfMemoryError("planted"), ValueError("planted")]

    def step(model, batch):
        activation = torch.ones(3)
        made.append(weakref.ref(activation))
        if errors:
            raise errors.pop(0)
        return model(batch)

    run = lt.workflow([(lt.train(model, batches, step) | lt.optimize(sgd), 1)], max_epochs=1)

    with pytest.raises(torch.OutOfMemoryError):
        next(run)
    assert made[0]() is None
    with pytest.raises(ValueError, match="planted"):
        run.retry()
    assert made[1]() is not None

    assert run.retry().iteration == 0
    assert model.w.item() == 2.0


def test_notes_come_in_order_where_what_how_to_go_on():
    """The place first, the verbs last."""
    notes = notes_of(lambda model, batch: model(batch), torch.ones(4, 5)).splitlines()

    assert notes == [
        "looptools: train/forward (iteration 0, epoch 0, part 2 of 3).",
        "The batch: (4, 5) float32 on cpu.",
        "run.replace(...) mends it, next(run) goes on there, run.retry() redoes the iteration, run.skip() drops it.",
    ]


def test_what_looptools_itself_refuses_needs_no_advice():
    """It says what to do."""
    assert "The batch" not in notes_of(lambda model, batch: None, IMAGES)


def test_parts_of_the_users_own_get_advice_on_torch_only(batches):
    """A KeyError of theirs has nothing to do with the batch."""

    def part(states):
        for state in states:
            state.metrics["missing"]
            yield state

    run = lt.workflow([(lt.train(None, batches, lambda m, b: {"x": b.mean()}) | part, 1)], max_epochs=1)
    with pytest.raises(KeyError) as caught:
        next(run)

    assert not any("The batch" in note for note in caught.value.__notes__)


def test_without_a_state_there_is_still_advice():
    """Memory may run out while a batch is fetched."""

    def source():
        raise MemoryError("Unable to allocate")
        yield

    run = lt.workflow([(lt.train(None, source, lambda m, b: b), 1)], max_epochs=1)

    with pytest.raises(MemoryError, match="(?s)train/batches.*The batch: not there yet. To need less"):
        next(run)


def test_every_row_of_the_table_can_be_filled_in():
    """No text names a fact that there is not."""
    for advice in ADVICE:
        assert advice.text.format_map({"batch": "", "model": "", "memory": ""})


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (None, "NoneType"),
        (torch.ones(()), "() float32 on cpu"),
        (np.ones((2, 3)), "ndarray (2, 3) float64"),
        ([torch.ones(1)] * 7, "list of " + "(1,) float32 on cpu, " * 5 + "..."),
        ([], "list of nothing"),
        ({"a": {"b": [[1]]}}, "dict of a: dict of b: list of list"),
    ],
)
def test_contents_of_a_batch_in_few_words(batch, words):
    """Deep and long ones are cut short."""
    assert contents(batch) == words


@pytest.mark.gpu
@needs_cuda
def test_out_of_memory_on_a_gpu():
    """The peak is told, and what the step had made is free again."""
    model = nn.Linear(3, 2, device="cuda")

    def step(model, batch):
        half = torch.empty(torch.cuda.mem_get_info()[0] // 2, dtype=torch.uint8, device="cuda")
        return half, torch.empty(2 * half.numel(), dtype=torch.uint8, device="cuda")

    notes = notes_of(step, IMAGES, model)

    assert "GiB on cuda:0 were in use" in notes
    assert torch.cuda.memory_allocated() < 2**20


@pytest.mark.gpu
@needs_cuda
def test_devices_on_a_gpu():
    """Where the model is, where the batch is."""
    notes = notes_of(lambda model, batch: model(batch), IMAGES, nn.Linear(3, 2, device="cuda"))

    assert "The model: Linear, float32 on cuda:0. The batch: (4, 3) float32 on cpu." in notes


def test_failed_says_where():
    """Its repr is what a notebook shows."""
    failed = Failed("train/forward", lt.State(phase="train", iteration=3), ValueError("no"))

    assert repr(failed) == "Failed(part='train/forward', iteration=3, epoch=0, exception=ValueError('no'))"
    assert advise(failed) == "The batch: NoneType."


class Odd:
    """A batch that raises whatever is asked of it."""

    dtype = torch.float32

    @property
    def shape(self):
        raise RuntimeError("lost")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        Odd,
        lambda: {"x": Odd()},
        lambda: dict.fromkeys(range(300), 0),
    ],
    ids=["nested", "odd", "within", "large"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_batch_that_cannot_be_described_never_hides_the_error(model, make):
    """The user's own exception comes out, with a short note or none."""

    def step(model, batch):
        raise KeyError("user")

    with pytest.raises(KeyError, match="user") as caught:
        next(iter(lt.train(model, [make()], step)))

    assert any("looptools: train/forward" in note for note in caught.value.__notes__)
    assert max(map(len, caught.value.__notes__)) < 400


@pytest.mark.parametrize(
    ("fail", "said", "unsaid"),
    [
        ("batches", "next(run) asks the source again", "retry"),
        ("workflow", "next(run) calls it again", "retry"),
        ("forward", "run.retry() redoes the iteration", "asks the source"),
        ("committed", "next(run) goes on there, run.skip() drops it", "retry"),
    ],
)
def test_the_last_note_names_the_verbs_that_help_there(model, sgd, batches, fail, said, unsaid):
    """None that would be refused."""

    def raises(*_):
        raise ValueError("planted")

    def late(states):
        for state in states:
            raise ValueError("planted")
            yield state

    source = (raises(batch) for batch in batches) if fail == "batches" else batches
    step = raises if fail == "forward" else lambda model, batch: model(batch)
    phase = lt.train(model, source, step) | lt.optimize(sgd)
    phase = phase | late if fail == "committed" else phase
    entries = [(raises, 1), (phase, 1)] if fail == "workflow" else [(phase, 1)]

    with pytest.raises(ValueError, match="planted") as caught:
        next(lt.workflow(entries, max_epochs=1))

    assert said in caught.value.__notes__[-1]
    assert unsaid not in caught.value.__notes__[-1]


# What cannot be undone


def planted(*_, **__):
    raise ValueError("planted")


def raises_in_backward(loss):
    """A loss whose graph fails half way."""
    loss = loss * 1
    loss.register_hook(planted)
    return loss


class Own:
    """A user's part."""

    def __call__(self, states):
        for state in states:
            planted()
            yield state


def own(states):
    for state in states:
        planted()
        yield state


def half_done(name, monkeypatch):
    """A run over a model with or without BatchNorm, that has failed in the middle of the part called *name*."""
    norm = [nn.BatchNorm1d(2)] if "norm" in name else []
    model = nn.Sequential(nn.Linear(3, 2), *norm)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    averaged, batch_at = torch.optim.swa_utils.AveragedModel(model), []
    scheduler = torch.optim.lr_scheduler.ConstantLR(sgd)

    def step(model, batch):
        loss = model(batch).pow(2).mean()
        batch_at.append(batch)
        if "forward" in name:
            planted()
        in_window = "window" not in name or len(batch_at) > 1
        return raises_in_backward(loss) if "backward" in name and in_window else loss

    optimize = lt.optimize(sgd, max_norm=1.0, accumulate=2 if "window" in name else 1)
    parts = {
        "ema": lt.ema(averaged),
        "swa": lt.swa(averaged, start=1, every=1),
        "class": Own(),
        "generator": own,
    }
    phase = lt.train(model, [torch.randn(4, 3)] * 2, step)
    if "schedule" in name:
        phase = phase | lt.schedule_lr(sgd, scheduler, by="iteration")
        scheduler.step = planted
    if "closure" in name:
        phase = phase | lt.update_by_closure(sgd, gradients_first="first" in name)
    elif "before" in name:
        phase = phase | own | optimize
    else:
        phase = phase | optimize
    for part in [part for kind, part in parts.items() if kind in name.split()]:
        phase = phase | part
    if "update" in name or "closure" in name:
        sgd.step = lambda closure=None: planted()
    if "clip" in name:
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", planted)
    monkeypatch.setattr(averaged, "update_parameters", planted)
    run = lt.workflow([(phase, 1)], max_epochs=2)
    if "average" in name:
        monkeypatch.setattr(run, "record", planted)
    with pytest.raises(ValueError, match="planted") as caught:
        run.to_end()
    return run, "\n".join(caught.value.__notes__)


TWICE = "the model's buffers (BatchNorm statistics) then take this batch in twice"
UNDONE = "What it did before it failed cannot be undone: "


@pytest.mark.parametrize(
    ("name", "part", "said", "unsaid"),
    [
        ("forward", "forward", "", UNDONE),
        ("forward norm", "forward", f"{UNDONE}the model's buffers (BatchNorm statistics) may have taken", TWICE),
        ("backward", "backward", "", UNDONE),
        ("backward norm", "backward", f"next(run) and run.retry() call the step again: {TWICE}", UNDONE),
        ("backward window", "backward", f"{UNDONE}part of this batch's gradients may be in the open window", TWICE),
        ("clip", "clip_grad_norm", f"{UNDONE}some of the gradients may be smaller already", TWICE),
        ("clip norm", "clip_grad_norm", f"run.retry() calls the step again: {TWICE}", "next(run) and"),
        ("update", "update", f"{UNDONE}some of the weights may have moved already", TWICE),
        ("update norm", "update", f"{UNDONE}some of the weights may have moved already", TWICE),
        ("closure", "update_by_closure", f"{UNDONE}the optimizer's own memory may have moved", "buffers"),
        (
            "closure norm",
            "update_by_closure",
            f"{UNDONE}the model's buffers (BatchNorm statistics) may have",
            "rolled back",
        ),
        ("ema", "ema", f"{UNDONE}some of the averaged weights may have moved", TWICE),
        ("swa", "swa", f"{UNDONE}some of the averaged weights may have moved", TWICE),
        ("schedule", "schedule_lr", f"{UNDONE}torch's scheduler may have counted this step already", TWICE),
        ("average", "average", f"{UNDONE}this batch may be in the means of the pass already", TWICE),
        ("class", "Own", "train/Own is your own: what it had changed before it failed stays changed", UNDONE),
        ("generator", "own", "train/own is your own: what it had changed before it failed stays changed", UNDONE),
        ("before norm", "own", f"run.retry() calls the step again: {TWICE}", "next(run) and"),
    ],
)
def test_without_snapshots_a_note_says_what_cannot_be_undone(name, part, said, unsaid, monkeypatch):
    """Each part that changes something in the middle, and what a second forward would do; of your own: that it is."""
    run, notes = half_done(name, monkeypatch)

    assert run.failed.part == f"train/{part}"
    assert said in notes
    assert unsaid not in notes


@pytest.mark.parametrize("name", ["forward norm", "update", "class"])
def test_with_a_snapshot_it_is_said_to_be_undone(name, monkeypatch):
    """Nothing is left behind then."""
    run, _ = half_done(name, monkeypatch)
    slot, error = run.cursor.line[run.cursor.at], RuntimeError()

    add_notes(Failed(slot.name, run.failed.state, error), [], run.progress, slot, rolled_back=True)

    assert error.__notes__[1:] == ["It was rolled back to where the iteration had only its batch."]


def test_an_exception_that_takes_no_notes_is_raised_all_the_same(model):
    """A frozen data class cannot be changed, but it is what the user raised."""

    @dataclasses.dataclass(frozen=True)
    class Frozen(Exception):
        code: int

    def step(model, batch):
        raise Frozen(3)

    run = iter(lt.train(model, [torch.ones(1)], step))
    with pytest.raises(Frozen):
        next(run)

    assert run.failed.exception.code == 3
