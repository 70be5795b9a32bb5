"""What an exception says besides its own message: where it was, what to do, how to go on."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import looptools as lt
from looptools.failures import ADVICE, Failed, advise, contents


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
