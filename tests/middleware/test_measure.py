"""Metrics over whole passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loops import Case, device_reads
from torch import nn

import looptools as lt

CLASSES = 3


def data(batches=4, seed=0):
    """Batches of 5 samples, the last of 2."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [5] * (batches - 1) + [2]
    return [
        (torch.randn(n, 4, generator=generator), torch.randint(0, CLASSES, (n,), generator=generator)) for n in sizes
    ]


def step(model, batch):
    logits = model(batch[0])
    return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits}


def predictions(state):
    return state.outputs["logits"], state.batch[1]


def net():
    torch.manual_seed(0)
    return nn.Linear(4, CLASSES)


def whole(model, batches):
    with torch.no_grad():
        return torch.cat([model(x) for x, _ in batches]), torch.cat([y for _, y in batches])


def total(values):
    return values.sum()


class Sums:
    """Made like a metric of torchmetrics, without anything of it."""

    def __init__(self, log=None):
        self.sum, self.log = 0.0, [] if log is None else log

    def update(self, x):
        self.log.append(float(x.sum()))
        self.sum = self.sum + x.sum()

    def compute(self):
        return self.sum

    def reset(self):
        self.sum = 0.0

    def state_dict(self):
        return {"sum": self.sum}

    def load_state_dict(self, state):
        self.sum = state["sum"]


def batch_of(state):
    return state.batch


def numbers(*values):
    return [torch.tensor([float(value)]) for value in values]


def sums(source, metrics, **options):
    """A validation that measures its batches."""
    return lt.validate(None, source, lambda model, batch: {"x": batch.sum()}) | lt.measure(metrics, batch_of, **options)


def test_torchmetrics_are_as_by_hand():
    """A metric, and a collection by its own names; not averaged over batches, which would be another number."""
    tm = pytest.importorskip("torchmetrics.classification")
    from torchmetrics import MetricCollection

    model, batches = net(), data()

    def make():
        return {
            "auroc": tm.MulticlassAUROC(CLASSES),
            "all": MetricCollection([tm.MulticlassF1Score(CLASSES), tm.MulticlassAccuracy(CLASSES)]),
        }

    results = (lt.validate(model, batches, step) | lt.measure(make(), predictions)).to_end()

    auroc, both = make().values()
    with torch.no_grad():
        for x, y in batches:
            auroc.update(model(x), y)
            both.update(model(x), y)
    by_hand = {"auroc": auroc.compute(), **both.compute()}
    assert {f"val/{key}": float(value) for key, value in by_hand.items()}.items() <= results.items()
    assert {f"val/{key}" for key in by_hand} | {"val/loss"} == set(results)


def test_a_collection_can_be_given_as_it_is():
    """It brings its names, prefix included."""
    tm = pytest.importorskip("torchmetrics.classification")
    from torchmetrics import MetricCollection

    metrics = MetricCollection({"acc": tm.MulticlassAccuracy(CLASSES)}, prefix="my_")
    phase = lt.validate(net(), data(), step) | lt.measure(metrics, predictions)

    assert set(phase.to_end()) == {"val/loss", "val/my_acc"}


def test_functions_get_the_whole_pass_and_equal_scikit_learn():
    """F1 and ROC AUC over all samples, pass after pass."""
    metrics = pytest.importorskip("sklearn.metrics")
    model, batches = net(), data()

    def f1(logits, labels):
        return metrics.f1_score(labels, logits.argmax(1), average="macro")

    def auc(logits, labels):
        return metrics.roc_auc_score(labels, logits.softmax(1), multi_class="ovr")

    val = lt.validate(model, batches, step) | lt.measure({"f1": f1, "auc": auc}, predictions)
    run = lt.workflow([(val, 1)], max_rounds=2)
    run.to_end()

    logits, labels = whole(model, batches)
    for row in run.history:
        assert row["f1"] == metrics.f1_score(labels, logits.argmax(1), average="macro")
        assert row["auc"] == metrics.roc_auc_score(labels, logits.softmax(1), multi_class="ovr")


def test_the_result_is_there_on_the_last_state_only():
    """In state.gauges; each pass begins afresh, also where the source does not know its length."""
    run = lt.workflow([(sums(lambda: iter(numbers(1, 2, 4)), {"total": total}), 1)], max_rounds=2)

    assert [{k: float(v) for k, v in state.gauges.items()} for state in run] == [{}, {}, {"total": 7.0}] * 2
    assert [row["total"] for row in run.history] == [7.0, 7.0]


def test_order_and_one_batch_a_next():
    """A metric sees each batch when it comes, and no second one is fetched for it."""
    log = []

    def source():
        for value in numbers(1, 2):
            log.append(f"fetch {float(value)}")
            yield value

    metric = Sums(log)
    phase = lt.validate(None, source, lambda model, batch: log.append("step") or {"x": batch.sum()}).limit(5)
    first = lt.measure({"total": metric}, batch_of)(state for state in [lt.State(phase="val", batch=torch.ones(2))])
    next(first)
    assert metric.log == []  # a run works on copies
    own = lt.measure({"total": metric}, lambda state: log.append("inputs") or state.batch)
    run = iter(phase | own)
    run["measure"].own["total"].log = log
    next(run)

    assert log == ["fetch 1.0", "step", "fetch 2.0", "inputs", 1.0]  # of unknown length: one ahead, after the step


def test_what_is_piped_is_options():
    """Two runs share no memory, and the metrics that were typed stay as they were."""
    metric = Sums()
    phase = sums(numbers(1, 2, 4), {"total": metric})
    first, second = iter(phase), iter(phase)
    next(first)

    assert second.to_end()["val/total"] == first.to_end()["val/total"] == 7.0
    assert metric.sum == 0.0


def test_stopping_early_and_hand_made_states():
    """Outside a run a pass begins with the state that says first."""
    states = [lt.State(phase="val", batch=b, first=first, last=last) for b, first, last in zip(
        numbers(1, 2, 3, 4), [True, True, False, False], [False, False, False, True], strict=True)]  # fmt: skip
    stream = lt.measure({"total": total, "sums": Sums()}, batch_of)(states)
    for _ in stream:
        pass

    assert {key: float(value) for key, value in states[3].gauges.items()} == {"sums": 9.0, "total": 9.0}
    stream = lt.measure({"total": total}, batch_of)(states)
    next(stream)
    stream.close()
    assert next(stream, None) is None


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_dropped_states_are_not_counted(dropped):
    """By a part before; also the pass's last one."""

    def drops(states):
        for state in states:
            if state.index != dropped:
                yield state

    phase = lt.validate(None, numbers(1, 2, 4), lambda model, batch: {"x": batch.sum()}) | drops
    results = (phase | lt.measure({"total": total, "sums": Sums()}, batch_of)).to_end()

    assert results["val/total"] == results["val/sums"] == 7.0 - 2**dropped


def test_a_pass_without_a_state_measures_nothing():
    """No result, and no warning of torchmetrics."""
    tm = pytest.importorskip("torchmetrics")

    def drops(states):
        for state in states:
            if state.run is None:
                yield state

    phase = lt.validate(None, numbers(1), lambda model, batch: {"x": batch.sum()}) | drops
    phase = phase | lt.measure({"mean": tm.MeanMetric(), "total": total}, batch_of)
    with pytest.warns(UserWarning, match="val: every state of this pass was dropped") as said:
        results = phase.to_end()
    assert (dict(results), len(said)) == ({}, 1)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_state_that_comes_again_counts_once(at):
    """Its second metric fails; so does the part behind, from which the iteration is redone from its forward."""
    failed = []

    class Fails(Sums):
        def update(self, x):
            if len(self.log) == at and not failed:
                failed.append("metric")
                raise ValueError("planted")
            super().update(x)

    def trips(states):
        for state in states:
            if state.index == at and failed == ["metric"]:
                failed.append("part")
                raise ValueError("planted")
            yield state

    run = iter(sums(numbers(1, 2, 4), {"first": Sums(), "second": Fails(), "total": total}) | trips)
    for _ in range(2):
        with pytest.raises(ValueError, match="planted"):
            run.to_end()
    with pytest.raises(RuntimeError, match="cannot be redone: measure has counted it"):
        run.retry()

    assert run.to_end() == {"val/x": 7 / 3, "val/first": 7.0, "val/second": 7.0, "val/total": 7.0}


def test_an_iteration_redone_from_forward_counts_once():
    """Where backward fails behind it, in training."""
    model, batches, failed = net(), data(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def fails(model, batch):
        result = step(model, batch)
        if len(failed) == 0 and batch is batches[1]:
            failed.append(True)
            result["loss"].register_hook(lambda grad: 1 / 0)
        return result

    phase = lt.train(model, batches, fails) | lt.measure({"n": lambda logits, labels: len(labels)}, predictions)
    run = iter(phase | lt.optimize(optimizer))
    with pytest.raises(ZeroDivisionError):
        run.to_end()

    assert run.to_end()["train/n"] == 17.0


def test_nothing_is_read_and_no_graph_is_kept():
    """Between the first iteration and the last; inputs are detached."""
    model, batches = net(), data(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metrics = {"n": lambda logits, labels: len(labels), "nll": lambda logits, labels: F.cross_entropy(logits, labels)}
    run = iter(lt.train(model, batches, step) | lt.optimize(optimizer) | lt.measure(metrics, predictions))
    next(run)

    with device_reads() as reads:
        list(run.take(6))
        assert reads == []
        assert not any(tensor.requires_grad for given in run["measure"].kept for tensor in given)
        assert len(run["measure"].kept) == 7
        reads.clear()
        run.to_end()
        assert reads == ["tolist"]
    assert run["measure"].kept == []
    assert not run.state.gauges["nll"].requires_grad


def test_inputs_may_be_keywords_lists_or_scalars():
    """A mapping goes by keywords, lists are joined, scalars stacked."""
    seen = {}

    def look(**given):
        seen.update(given)
        return 0

    inputs = lambda state: {"names": ["a"] * len(state.batch), "level": state.batch.sum(), "x": state.batch}  # noqa: E731
    source = [torch.ones(2), torch.ones(1)]
    phase = lt.validate(None, source, lambda model, batch: {"x": 1}) | lt.measure({"m": look}, inputs, keep_on="cpu")
    phase.to_end()

    assert seen["names"] == ["a", "a", "a"]
    assert torch.equal(seen["level"], torch.tensor([2.0, 1.0]))
    assert torch.equal(seen["x"], torch.ones(3))


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_its_memory_outlives_a_checkpoint_within_a_pass(tmp_path, cut):
    """Taken between two states, saved as plain values, put into another run's part: the results are the same."""
    tm = pytest.importorskip("torchmetrics.classification")
    from torchmetrics import MeanMetric, MetricCollection
    from torchmetrics.wrappers import ClasswiseWrapper

    model, batches = net(), data()

    def make():
        metrics = {
            "auroc": tm.MulticlassAUROC(CLASSES),
            "both": MetricCollection([tm.MulticlassF1Score(CLASSES), tm.MulticlassPrecision(CLASSES)]),
            "each": ClasswiseWrapper(tm.MulticlassRecall(CLASSES, average=None)),
            "n": lambda logits, labels: len(labels),
        }
        phase = lt.validate(model, batches, step) | lt.measure(metrics, predictions)
        return iter(phase | lt.measure({"mean": MeanMetric(), "own": Sums()}, lambda state: state.outputs["logits"]))

    first = make()
    list(first.take(cut))
    for number, name in enumerate(("measure", "val/measure#2")):
        torch.save(first["val/measure" if not number else name].state_dict(), tmp_path / f"{number}.pt")
    straight = first.to_end()
    second = make()
    list(second.take(cut))
    for number, name in enumerate(("val/measure", "val/measure#2")):
        part = second[name]
        part._restart()
        part.load_state_dict(torch.load(tmp_path / f"{number}.pt", weights_only=True))

    assert second.to_end() == straight
    assert straight["val/n"] == 17.0
    assert {"val/multiclassrecall_0", "val/mean", "val/own"} <= set(straight)


def test_a_resumed_run_measures_the_same(tmp_path):
    """From the end of a round; the metrics are no models of the run."""
    tm = pytest.importorskip("torchmetrics.classification")

    def make(folder):
        model, optimizer, train, val = Case(epochs=3).make()

        def both(model, batch):
            logits = model(batch[0])
            return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits}

        metrics = {"f1": tm.MulticlassF1Score(2), "n": lambda logits, labels: len(labels)}
        entries = [(lt.train(model, train, both) | lt.optimize(optimizer), 1),
                   (lt.validate(model, val, both) | lt.measure(metrics, predictions), 1)]  # fmt: skip
        return lt.workflow(entries, max_epochs=3) | lt.checkpoint(folder)

    straight = make(tmp_path / "straight")
    straight.to_end()
    list(make(tmp_path / "cut").take(17))
    torch.manual_seed(99)
    run = make(tmp_path / "cut")
    assert run.resume().name == "epoch_0001-iteration_000007.pt"
    run.to_end()

    assert [row.get("f1") for row in run.history] == [row.get("f1") for row in straight.history]
    assert list(torch.load(tmp_path / "cut" / "epoch_0001-iteration_000007.pt")["models"]) == ["model"]


def test_a_part_that_is_replaced_within_a_pass_goes_on():
    """Metrics of the same name keep what they have; a new function gets the whole pass."""
    run = iter(sums(numbers(1, 2, 4), {"total": total, "own": Sums()}))
    next(run)

    run.replace("measure", lt.measure({"own": Sums(), "highest": lambda x: x.max(), "total": total}, batch_of))

    assert run.to_end() == {"val/x": 7 / 3, "val/own": 7.0, "val/highest": 4.0, "val/total": 7.0}


def test_a_failed_compute_can_be_mended():
    """The pass is not lost: another function gets the same inputs."""
    run = iter(sums(numbers(1, 2, 4), {"total": lambda x: x.undefined}))
    with pytest.raises(AttributeError, match="undefined"):
        run.to_end()

    run.replace("measure", lt.measure({"total": total}, batch_of))

    assert run.to_end()["val/total"] == 7.0


@pytest.mark.parametrize(
    ("metrics", "error", "words"),
    [
        ({}, ValueError, "there is nothing to measure"),
        ([total], TypeError, "metrics must have names"),
        (Sums(), TypeError, "metrics must have names"),
        ({"sums": Sums}, TypeError, r"sums is the class Sums. Make a metric of it: Sums\(...\)"),
        ({"f1": 3}, TypeError, "f1 must be a torchmetrics metric, or a function"),
        ({1: total}, TypeError, "a metric's name must be a string, got 1"),
    ],
)
def test_bad_metrics_are_refused_where_they_are_typed(metrics, error, words):
    """The error says what to give."""
    with pytest.raises(error, match=f"^measure: {words}"):
        lt.measure(metrics, batch_of)


def test_bad_inputs_are_refused():
    """Where they are typed; and when the state has not what they want."""
    with pytest.raises(TypeError, match="^measure: inputs must be a function of the state"):
        lt.measure({"total": total}, ["logits"])
    with pytest.raises(RuntimeError, match="device"):
        lt.measure({"total": total}, batch_of, keep_on="nowhere")
    with pytest.raises(KeyError, match="logits") as caught:
        (sums(numbers(1), {"total": total}) | lt.measure({"f1": total}, lambda s: s.outputs["logits"])).to_end()
    assert "measure: its inputs could not be had from the state. The step returned x." in caught.value.__notes__
    with pytest.raises(TypeError, match="a whole pass of int cannot be joined for a function"):
        (sums(numbers(1), {"total": total}) | lt.measure({"f1": total}, lambda state: 3)).to_end()
    with pytest.raises(RuntimeError) as caught:
        sums([torch.ones(1, 2), torch.ones(1, 3)], {"total": total}).to_end()
    assert "measure: functions get the inputs of the whole pass, joined along the first" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (torch.zeros(2, 2), r"'m' must be one number for the whole pass, but is of shape \(2, 2\)"),
        ({"a": 1.0, "map": torch.ones(3)}, r"'map' must be one number .* shape \(3,\)"),
        ("good", "'m' must be one number for the whole pass, but is a str"),
    ],
)
def test_results_that_are_no_numbers_are_refused(result, words):
    """With the key, and the cure."""
    with pytest.raises(TypeError, match=f'^measure: {words}.* average="macro"'):
        sums(numbers(1), {"m": lambda x: result}).to_end()


def test_names_that_are_taken_are_refused():
    """By the step's scalars, by another part, by another metric."""
    with pytest.raises(ValueError, match="measure: 'x' is among what val logs already"):
        next(iter(sums(numbers(1, 2), {"x": total})))
    with pytest.raises(ValueError, match="measure: 'x' is among what val logs already"):
        sums(numbers(1), {"m": lambda x: {"x": 1.0}}).to_end()
    with pytest.raises(ValueError, match="measure: 'm' is among what val logs already"):
        (sums(numbers(1), {"m": total}) | lt.measure({"m": Sums()}, batch_of)).to_end()
    with pytest.raises(ValueError, match="measure: there are two results called 'a'"):
        sums(numbers(1), {"m": lambda x: {"a": 1.0}, "a": total}).to_end()


def test_it_belongs_onto_a_phase():
    """Onto the run it would come behind `average`."""
    phase = lt.validate(None, numbers(1), lambda model, batch: {"x": batch.sum()})

    with pytest.raises(TypeError, match="measure: pipe it onto the phase whose passes it measures"):
        next(lt.workflow([(phase, 1)], max_rounds=1) | lt.measure({"total": total}, batch_of))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    """Metrics move to the inputs' device; what is kept for functions stays there, or where it is asked to."""
    tm = pytest.importorskip("torchmetrics.classification")
    batches = [(x.cuda(), y.cuda()) for x, y in data()]
    on_gpu = {"f1": tm.MulticlassF1Score(CLASSES), "there": lambda logits, labels: logits.is_cuda}
    on_cpu = {"here": lambda logits, labels: not logits.is_cuda}
    phase = lt.validate(net().cuda(), batches, step) | lt.measure(on_gpu, predictions)
    results = (phase | lt.measure(on_cpu, predictions, keep_on="cpu")).to_end()

    by_hand = (lt.validate(net(), data(), step) | lt.measure({"f1": on_gpu["f1"]}, predictions)).to_end()
    assert (results["val/there"], results["val/here"]) == (1.0, 1.0)
    assert results["val/f1"] == pytest.approx(by_hand["val/f1"])


@pytest.mark.parametrize(
    ("value", "kind"), [(None, "NoneType"), (np.ones(2), "ndarray"), ({"a": 1}, "int"), (0.5, "float")]
)
def test_inputs_that_cannot_be_joined_are_refused_at_the_first_batch(value, kind):
    """Not when the whole pass is over; and before anything is counted."""
    run = iter(sums(numbers(1, 2), {"total": total}) | lt.measure({"f": total, "own": Sums()}, lambda state: value))

    with pytest.raises(TypeError, match=rf"^measure: a whole pass of {kind} cannot be joined .* torch.as_tensor\("):
        next(run)
    assert run.state.index == 0
    run.replace("val/measure#2", lt.measure({"f": total, "own": Sums()}, batch_of))
    assert run.to_end()["val/f"] == 3.0


def test_metrics_follow_inputs_that_are_nested():
    """The first tensor counts, wherever it lies: detection gives lists of dictionaries."""
    moved = []

    class Moves(Sums):
        def to(self, device):
            moved.append(device)

        def update(self, found, names):
            self.sum = self.sum + len(found)

    inputs = lambda state: ([{"boxes": torch.ones(2, 4, device="meta")}], ["cat"])  # noqa: E731
    val = lt.validate(None, numbers(1, 2), lambda model, batch: {"x": 1.0}) | lt.measure({"n": Moves()}, inputs)

    assert val.to_end()["val/n"] == 2
    assert moved == [torch.device("meta")]


def test_metrics_are_moved_anew_after_they_were_loaded():
    """What came from a checkpoint may lie elsewhere."""
    moved = []

    class Moves(Sums):
        def to(self, device):
            moved.append(device)

    run = iter(sums(numbers(1, 2, 4), {"total": Moves()}))
    list(run.take(2))
    assert len(moved) == 1
    run["measure"].load_state_dict(run["measure"].state_dict())
    run.to_end()

    assert len(moved) == 2


def test_a_metric_may_give_a_tensor_that_it_uses_again():
    """Each pass's result stays what it was."""

    class Reuses(Sums):
        def __init__(self):
            super().__init__()
            self.sum = torch.zeros(())

        def update(self, x):
            self.sum += x.sum()

        def reset(self):
            self.sum.zero_()

    run = lt.workflow([(sums(numbers(1, 2, 4), {"total": Reuses()}), 1)], max_rounds=2)
    states = list(run)

    assert [float(state.gauges["total"]) for state in states if state.last] == [7.0, 7.0]
    assert [row["total"] for row in run.history] == [7.0, 7.0]


class Largest:
    """A metric of the user's own, without a state_dict."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.most = 0.0

    def update(self, value):
        self.most = max(self.most, float(value))

    def compute(self):
        return self.most


@pytest.mark.parametrize("kind", ["own", "minmax", "running"])
def test_metrics_that_keep_values_beside_their_states_go_on_within_a_pass(tmp_path, kind):
    """The result of the pass is that of the uninterrupted one."""
    from torchmetrics import MeanMetric, MinMaxMetric
    from torchmetrics.wrappers import Running

    makes = {"own": Largest, "minmax": lambda: MinMaxMetric(MeanMetric()), "running": lambda: Running(MeanMetric(), 3)}
    data = [5.0, 1.0, 4.0, 2.0, 3.0]

    def make():
        step = lambda model, batch, state: {"x": torch.tensor(batch * (3 - state.plan.round))}  # noqa: E731
        phase = lt.validate(None, data, step) | lt.measure({"m": makes[kind]()}, lambda state: state.outputs["x"])
        return lt.workflow([(phase, 1)], max_rounds=3)

    measured = lambda run: [{k: v for k, v in row.items() if k[0] == "m"} for row in run.history]  # noqa: E731
    straight = make()
    straight.to_end()
    for at in (2, 4, 7, 12):
        run = make()
        list(run.take(at))
        run.save(tmp_path / str(at))
        run = make()
        run.resume(tmp_path / str(at))
        run.to_end()
        assert measured(run) == measured(straight), at
