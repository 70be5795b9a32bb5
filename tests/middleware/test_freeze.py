"""Parts of a model that stand still for a while."""

from __future__ import annotations

import gc

import pytest
import torch
from loops import Case, assert_same, classify, device_reads
from torch import nn

import looptools as lt
from looptools.middleware.freeze import see_who_froze

CASES = [
    Case(optimizer="AdamW", epochs=4),
    Case(optimizer="SGD", max_norm=0.3, epochs=4),
    Case(optimizer="AdamW", max_norm=0.3, accumulate=3, epochs=4, cosine=True),
]
IDS = ["adamw", "momentum and clipping", "accumulation"]


def freeze_by_hand(model, until, iteration):
    """What a loop by hand does before each iteration; *until*: iterations by the layer's name."""
    model.train()
    for name, first in until.items():
        model.get_submodule(name).requires_grad_(iteration >= first)
        if iteration < first:
            model.get_submodule(name).eval()


def by_hand(case, until):
    """The plain loop, with layers frozen for the first iterations."""
    model, optimizer, train, val = case.make()
    iteration, losses = 0, []
    updates, total, base = 0, case.epochs * -(-len(train) // case.accumulate), optimizer.param_groups[0]["lr"]
    for _ in range(case.epochs):
        for index, batch in enumerate(train):
            freeze_by_hand(model, until, iteration)
            if case.cosine:
                optimizer.param_groups[0]["lr"] = lt.schedules.cosine()(updates, total, base)
            if index % case.accumulate == 0:
                optimizer.zero_grad()
            window = min(case.accumulate, len(train) - index // case.accumulate * case.accumulate)
            loss = classify(model, batch)["loss"]
            (loss / window if window > 1 else loss).backward()
            if (index + 1) % case.accumulate == 0 or index + 1 == len(train):
                if case.max_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), case.max_norm)
                optimizer.step()
                updates += 1
            losses.append(loss.detach())
            iteration += 1
        model.eval()
        with torch.no_grad():
            for batch in val:
                classify(model, batch)
    return model.state_dict(), losses


def piped(case, *freezes, grouped=False):
    model, optimizer, train_loader, val_loader = case.make()
    if grouped:
        options = {key: value for key, value in optimizer.defaults.items() if key in ("lr", "weight_decay", "momentum")}
        optimizer = type(optimizer)(lt.param_groups(model, no_decay_on=()), **options)
    train = lt.train(model, train_loader, classify)
    for part in freezes:
        train = train | part
    if case.cosine:
        train = train | lt.schedule_lr(optimizer, lt.schedules.cosine())
    train = train | lt.optimize(optimizer, max_norm=case.max_norm, accumulate=case.accumulate)
    return lt.workflow([(train, 1), (lt.validate(model, val_loader, classify), 1)], max_epochs=case.epochs)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize(("until", "iterations"), [(lt.epochs(2), 14), (10, 10), (lt.rounds(1), 7), (None, 99)])
def test_same_as_by_hand(case, until, iterations):
    """A linear layer and BatchNorm, with validations between: weights, statistics and losses to the bit."""
    run = piped(case, lt.freeze("0", "1", until=until))
    losses = [state.loss.detach() for state in run if state.trains]

    weights, expected = by_hand(case, {"0": iterations, "1": iterations})
    assert_same(run.model.state_dict(), weights)
    assert all(map(torch.equal, losses, expected))


@pytest.mark.parametrize("case", CASES[:2], ids=IDS[:2])
def test_two_in_one_phase(case):
    """The first layer for 17 iterations, BatchNorm for one epoch; the same with groups by `param_groups`."""
    expected, _ = by_hand(case, {"0": 17, "1": 7})

    for grouped in (False, True):
        run = piped(case, lt.freeze("0", until=17), lt.freeze("1", until=lt.epochs(1)), grouped=grouped)
        run.to_end()
        assert_same(run.model.state_dict(), expected)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_resumed_run_goes_on_to_the_same_bits(tmp_path, rounds):
    """Saved while frozen, at the thaw, or after it."""
    freezes = [lt.freeze("1", until=lt.epochs(2)), lt.freeze("0", until=10)]
    first = piped(CASES[0], *freezes) | lt.checkpoint(tmp_path)
    list(first.take(14 * rounds))
    torch.manual_seed(99)
    run = piped(CASES[0], *freezes) | lt.checkpoint(tmp_path)
    run.resume()
    assert (run["train/freeze"].thawed, run["train/freeze#2"].thawed) == (rounds >= 2, rounds >= 2)
    run.to_end()

    assert_same(run.model.state_dict(), by_hand(CASES[0], {"0": 10, "1": 14})[0])


def layers():
    """Two layers and a norm, whose loss is the mean of what comes out."""
    return nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.Linear(1, 1))


def flags(model):
    """Of each layer: whether its weight requires gradients, and whether it is in train mode."""
    return [(layer.weight.requires_grad, layer.training) for layer in model]


FROZEN, THAWED = (False, False), (True, True)
BATCHES = [torch.ones(2, 1), torch.zeros(2, 1)]


def train_of(model, *parts, batches=BATCHES, name="train", optimizer=torch.optim.SGD):
    phase = lt.train(model, batches, lambda model, batch: model(batch).mean(), name=name)
    for part in parts:
        phase = phase | part
    return phase | lt.optimize(optimizer(model.parameters(), lr=0.1))


def run_of(model, *parts, epochs=2, **options):
    val = lt.validate(model, BATCHES[:1], lambda model, batch: {"mean": model(batch).mean()})
    return lt.workflow([(train_of(model, *parts, **options), 1), (val, 1)], max_epochs=epochs)


def test_when_it_is_thawed():
    """At the boundary of the iteration at which `until` is due, before its state is handed out."""
    for until, first in [(lt.epochs(1), 1), (1, 0), (3, 2), (lambda state: state.iteration == 2, 2)]:
        model = layers()
        seen = [flags(model)[0] for state in run_of(model, lt.freeze("0", until=until)) if state.trains]
        assert seen == [FROZEN] * first + [THAWED] * (4 - first)


def test_in_force_from_the_next_forward_on():
    """The iteration at which it is due makes no gradient, wherever freeze stands."""
    model = layers()
    run = run_of(model, lt.freeze("0", until=1))

    run.after("update")
    assert model[0].weight.grad is None
    assert flags(model)[0] == FROZEN
    next(run)
    assert flags(model)[0] == THAWED
    next(run)
    assert model[0].weight.grad is not None


def test_it_acts_before_the_first_forward():
    """BatchNorm's statistics stand still from the first batch on; in validation the model is in eval mode."""
    model = layers()
    run = run_of(model, lt.freeze("1"), epochs=3)

    for state in run:
        assert model[1].running_mean == 0.0
        assert [layer.training for layer in model] == [state.trains, False, state.trains]
        assert model.training is state.trains
    assert model[1].num_batches_tracked == 0


def test_without_keep_eval_statistics_move():
    """Only gradients are off."""
    model = layers()
    run = run_of(model, lt.freeze("1", keep_eval=False), epochs=1)

    assert next(run) is not None
    assert flags(model)[1] == (False, True)
    assert model[1].num_batches_tracked == 1


def test_single_parameters():
    """A name may go down to one."""
    model = layers()
    run = run_of(model, lt.freeze("0.bias", "2.weight"))

    next(run)

    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "0.bias",
        "2.weight",
    ]
    assert all(layer.training for layer in model)


def test_what_the_user_froze_stays_frozen():
    """Parameters and modules alike, after the thaw and after the run."""
    model = layers()
    model[0].weight.requires_grad_(False)
    model[1].eval()

    run_of(model, lt.freeze("0", "1", until=1)).to_end()

    model.train(model.training)
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad
    model = layers()
    model[1].eval()
    for state in run_of(model, lt.freeze("0", "1", until=1)):
        assert not model[1].training
    assert state.epoch == 1


def test_the_longer_of_two_that_overlap_holds():
    """The whole for one epoch, one parameter in it for two: while one of them says so, it is frozen."""
    for parts in ([("0", 1), ("0.bias", 2)], [("0.bias", 2), ("0", 1)]):
        model = layers()
        run = run_of(model, *(lt.freeze(name, until=lt.epochs(n)) for name, n in parts), epochs=3)
        seen = [(model[0].weight.requires_grad, model[0].bias.requires_grad) for state in run if state.trains]
        assert seen == [(False, False), (True, False), (True, False), (True, True), (True, True), (True, True)]


def test_it_is_about_its_own_phase():
    """A warm-up that trains the head alone, and then everything; and two phases by turns."""
    model = layers()
    warm, train = train_of(model, lt.freeze("0"), name="warm"), train_of(model)

    seen = [(state.phase, flags(model)[0]) for state in lt.workflow([(warm, 1), (train, 1)], max_epochs=4)]

    assert seen == [("warm", FROZEN)] * 2 + [("train", THAWED)] * 2 + [("warm", FROZEN)] * 2 + [("train", THAWED)] * 2
    a, b = train_of(model, lt.freeze("0"), name="a"), train_of(model, lt.freeze("2"), name="b")
    seen = [(flags(model)[0], flags(model)[2]) for _ in lt.workflow([(a, 1), (b, 1)], max_epochs=2)]
    assert seen == [(FROZEN, THAWED)] * 2 + [(THAWED, FROZEN)] * 2


def test_flags_are_given_back_at_the_end():
    """Finished, closed, or stopped within a pass."""
    for end in (lambda run: run.to_end(), lambda run: run.close(), lambda run: (run.stop("enough"), run.to_end())):
        model = layers()
        run = run_of(model, lt.freeze("0", "1"))
        next(run)
        assert flags(model)[:2] == [FROZEN, FROZEN]
        end(run)
        assert all(parameter.requires_grad for parameter in model.parameters())
        model.eval()
        model.train()
        assert flags(model) == [THAWED] * 3


def test_a_validation_on_demand_within_a_pass():
    """`run.validate` switches to eval mode and back; what is frozen stays so."""
    model = layers()
    run = run_of(model, lt.freeze("0", "1", until=2))
    next(run)

    run.validate(lt.validate(model, BATCHES, lambda model, batch: {"mean": model(batch).mean()}, name="now"))

    assert flags(model) == [FROZEN, FROZEN, THAWED]
    next(run)
    assert flags(model) == [THAWED] * 3


def test_closed_after_a_validation_on_demand_the_model_stays_in_eval_mode():
    """And the next training finds nothing frozen."""
    model = layers()
    run = run_of(model, lt.freeze("1"))
    next(run)
    from looptools.modes import settle

    settle(model, False)
    run.close()

    assert not model.training
    settle(model, True)
    assert flags(model) == [THAWED] * 3


def test_a_run_that_sleeps_within_a_pass_wakes_frozen():
    """`with run:` closes the parts; the next forward is still without the frozen ones."""
    model = layers()
    with run_of(model, lt.freeze("0", "1")) as run:
        next(run)
    before = model[1].running_mean.clone()
    next(run)

    assert flags(model)[:2] == [FROZEN, FROZEN]
    assert model[0].weight.grad is None
    assert torch.equal(model[1].running_mean, before)


@pytest.mark.parametrize("leave", ["break", "reset"])
def test_another_run_over_the_same_model_knows_whose_flags_they_are(leave):
    """A cell that is run again: what the first run froze is thawed by the second."""
    model = layers()
    old = run_of(model, lt.freeze("0", "1", until=lt.epochs(1)))
    next(old)
    if leave == "reset":
        old.reset()
    new = old if leave == "reset" else run_of(model, lt.freeze("0", "1", until=lt.epochs(1)))

    seen = [flags(model)[:2] for state in new if state.trains]

    assert seen == [[FROZEN, FROZEN]] + [[THAWED, THAWED]] * 3


def test_a_run_that_is_closed_gives_back_only_what_it_still_owns():
    """Another one is in the middle of its frozen pass."""
    model = layers()
    first, second = (run_of(model, lt.freeze("0", "1")) for _ in range(2))
    next(first), next(second)

    first.close()
    assert flags(model)[:2] == [FROZEN, FROZEN]
    next(second)
    assert model[0].weight.grad is None
    second.close()
    assert flags(model) == [THAWED] * 3


@pytest.mark.parametrize("gone", [True, False])
def test_another_run_without_a_freeze_is_told(gone):
    """What a run left frozen in the middle of its pass: given back if that run is gone, else said."""
    model = layers()
    old = run_of(model, lt.freeze("0", "1"))
    next(old)
    new = run_of(model)
    if gone:
        del old
        see_who_froze(new.cursor)
        assert flags(model) == [THAWED] * 3
        return
    with pytest.warns(UserWarning, match=r"train: freeze\('0', '1'\) of another run, .* Call close\(\) on that run"):
        see_who_froze(new.cursor)
    old.close()
    see_who_froze(new.cursor)
    assert flags(model) == [THAWED] * 3


def test_another_run_with_a_freeze_of_its_own_is_told_nothing():
    """It takes over, also where it freezes in an earlier phase than the one that trains all; a part is told."""
    model = layers()
    old = run_of(model, lt.freeze("0", "1"))
    next(old)

    see_who_froze(run_of(model, lt.freeze("0", "1")).cursor)
    warm, train = train_of(model, lt.freeze("0", "1"), name="warm"), train_of(model)
    see_who_froze(lt.workflow([(warm, 1), (train, 1)], max_epochs=2).cursor)
    part = run_of(model, lt.freeze("0"))
    with pytest.warns(UserWarning, match="keeps a part of the model frozen"):
        see_who_froze(part.cursor)
    assert flags(model)[:2] == [FROZEN, FROZEN]


def test_what_was_thawed_by_hand_is_no_concern_of_another_run():
    """Nothing stands still, whatever the marks say."""
    model = layers()
    old = run_of(model, lt.freeze("0", "1"))
    next(old)
    model.requires_grad_(True)
    model.train()

    see_who_froze(run_of(model).cursor)
    assert flags(model) == [THAWED] * 3


def test_what_you_freeze_after_a_run_stays_frozen():
    """Its marks went with its end."""
    model = layers()
    run_of(model, lt.freeze("0", "1", until=1)).to_end()
    model[0].requires_grad_(False)

    run_of(model, lt.freeze("0", "1", until=1)).to_end()

    assert not model[0].weight.requires_grad


def test_a_predicate_is_not_asked_about_a_dropped_state():
    """The pass's last batch is skipped; the next state thaws."""
    model, asked = layers(), []
    run = run_of(model, lt.freeze("0", until=lambda state: asked.append(state.iteration) or state.iteration >= 1))
    next(run)
    run.before("freeze")
    run.skip()

    next(run), next(run)
    assert asked == [0, 2]
    assert flags(model)[0] == THAWED


def test_a_skipped_iteration_does_not_keep_it_frozen():
    """The one at which `until` is due never comes here; the next pass, or the next state, makes up for it."""
    model = layers()
    run = run_of(model, lt.freeze("0", until=lt.epochs(1)))
    next(run)
    run.before("freeze")
    run.skip()
    assert next(run).phase == "val"
    assert model[0].weight.requires_grad
    next(run)
    assert flags(model)[0] == THAWED
    model = layers()
    run = run_of(model, lt.freeze("0", until=1))
    run.before("freeze")
    run.skip()
    next(run)
    assert flags(model)[0] == THAWED


@pytest.mark.filterwarnings("ignore:warm. every state of this pass was dropped")
def test_a_pass_that_is_skipped_altogether_gives_back_too():
    """Its only batch never came here alive."""
    model = layers()
    warm, train = train_of(model, lt.freeze("0"), name="warm", batches=BATCHES[:1]), train_of(model)
    run = lt.workflow([(warm, 1), (train, 1)], max_epochs=2)
    run.before("forward")
    assert flags(model)[0] == FROZEN
    run.skip()

    assert next(run).phase == "train"
    assert flags(model)[0] == THAWED


def test_replaced_within_a_pass():
    """The new one's names count from the next pass on; its memory is the old one's."""
    model = layers()
    run = run_of(model, lt.freeze("0"), epochs=3)
    next(run)
    run.replace("freeze", lt.freeze("2", until=lt.epochs(2)))

    seen = [(flags(model)[0], flags(model)[2]) for state in run if state.trains]

    assert seen == [(FROZEN, THAWED), (THAWED, FROZEN), (THAWED, THAWED), (THAWED, THAWED), (THAWED, THAWED)]


def test_a_rehearsal_in_between_changes_nothing():
    """It freezes and thaws on its own; the run stands as it stood."""
    model = layers()
    run = run_of(model, lt.freeze("0", "1", until=lt.epochs(1)))
    run.rehearse(1)
    assert flags(model) == [THAWED] * 3
    next(run)
    run.rehearse(1)
    assert flags(model)[:2] == [FROZEN, FROZEN]

    seen = [flags(model)[:2] for state in run if state.trains]

    assert seen == [[THAWED, THAWED]] * 3


def test_a_model_that_is_validated_in_parts():
    """`validate(model[0])` switches a part of the model by itself; frozen modules come back frozen."""
    model = nn.Sequential(layers(), nn.Linear(1, 1))
    train = lt.train(model, BATCHES, lambda model, batch: model(batch).mean()) | lt.freeze("0.1", until=lt.epochs(2))
    train = train | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1))
    val = lt.validate(model[0], BATCHES, lambda model, batch: {"mean": model(batch).mean()})

    seen = [flags(model[0]) for state in lt.workflow([(train, 1), (val, 1)], max_epochs=3) if state.trains]

    assert seen == [[THAWED, FROZEN, THAWED]] * 3 + [[THAWED] * 3] * 3


class Wrapper(nn.Module):
    """As DistributedDataParallel: the model behind one more name."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch):
        return self.module(batch)


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("name", ["1", "module.1"])
@pytest.mark.parametrize(
    "wrap", [Wrapper, compiled, lambda model: Wrapper(compiled(model)), nn.DataParallel, lambda model: model]
)
def test_names_are_found_behind_wrappers(wrap, name):
    """With the wrapper's own name or without."""
    model = layers()
    wrapped = wrap(model)
    train = lt.train(wrapped, BATCHES, lambda _, batch: model(batch).mean()) | lt.freeze(name)
    run = iter(train | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1)))

    if name == "module.1" and not hasattr(wrapped, "module"):
        with pytest.raises(LookupError, match=r"freeze: there is no 'module.1' in the model. Sequential has 0, 1, 2"):
            next(run)
        return
    next(run)
    assert flags(model) == [THAWED, FROZEN, THAWED]


def test_names_are_found_behind_wrappers_within_the_model():
    """A backbone that was compiled by itself."""
    inner = layers()
    model = nn.ModuleDict({"backbone": compiled(inner)})
    phase = lt.train(model, BATCHES, lambda _, batch: inner(batch).mean()) | lt.freeze(
        "backbone.0", "backbone.1.weight"
    )
    run = iter(phase | lt.optimize(torch.optim.SGD(model.parameters(), lr=0.1)))

    next(run)

    assert flags(inner) == [FROZEN, (False, True), THAWED]


def test_names_that_are_not_there():
    """The deepest that is there says what it has."""
    model = nn.ModuleDict({"backbone": layers(), "head": nn.Linear(1, 1)})

    for name, known in [
        ("backbon", r"there is no 'backbon' in the model. ModuleDict has backbone, head"),
        ("backbone.3.weight", r"backbone has 0, 1, 2"),
        ("head.wait", r"head has weight, bias"),
        ("backbone.0.weight.x", r"there is no 'backbone.0.weight.x' in the model. weight is a parameter"),
    ]:
        with pytest.raises(LookupError, match=known):
            iter(lt.train(model, [1], lambda model, batch: None) | lt.freeze(name)).explain()


def test_bad_options():
    """Refused where they are typed, or when the run is built."""
    step = lambda model, batch: model(batch).mean()  # noqa: E731
    with pytest.raises(ValueError, match=r'freeze: give names of submodules or parameters, as in freeze\("backbone"\)'):
        lt.freeze()
    with pytest.raises(TypeError, match='freeze: a name must be a string such as "backbone" or "head.bias", got a Li'):
        lt.freeze(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="freeze: until must be lt.epochs"):
        lt.freeze("0", until="epoch")
    with pytest.raises(ValueError, match="iterations: n must be at least 1, got 0"):
        lt.freeze("0", until=0)
    with pytest.raises(TypeError, match="keep_eval"):
        lt.freeze("0", keep_eval=1)
    with pytest.raises(ValueError, match="freeze: val trains nothing. Pipe it onto a training phase"):
        iter(lt.validate(layers(), BATCHES, step) | lt.freeze("0")).explain()
    with pytest.raises(TypeError, match="freeze: the model of train is a dict, not a torch.nn.Module"):
        iter(lt.train({}, BATCHES, step) | lt.freeze("0")).explain()
    run = lt.workflow([(lt.train(layers(), BATCHES, step), 1)], max_epochs=1) | lt.freeze("0")
    with pytest.raises(TypeError, match="freeze: pipe it onto the phase whose model it is about, not onto the run"):
        run.explain()
    with pytest.raises(RuntimeError, match="freeze: these states belong to no run"):
        next(lt.pipe([lt.State(phase="train")], lt.freeze("0")))


def test_what_is_piped_is_options(capsys):
    """A fresh part has the same options, and `explain` shows them."""
    run = run_of(layers(), lt.freeze("0", "2.bias", until=lt.epochs(2), keep_eval=False))
    run.explain()

    assert "names=('0', '2.bias'), until=epochs(n=2), keep_eval=False" in capsys.readouterr().out
    assert lt.freeze("0", names=["1"]).names == ("0", "1")


def test_one_next_is_one_iteration():
    """No device is read, and no batch fetched ahead; the marks die with the model."""
    from looptools.middleware.freeze import _ours

    taken = []

    def source():
        for batch in BATCHES:
            taken.append(batch)
            yield batch

    gc.collect()
    before = len(_ours)
    model = layers()
    run = run_of(model, lt.freeze("0", until=lt.epochs(1)), batches=source)
    run.before("freeze")
    with device_reads() as reads:
        run.after("freeze")
    assert (reads, len(taken)) == ([], 1)
    run.reset()
    del run, model
    gc.collect()
    assert len(_ours) <= before
