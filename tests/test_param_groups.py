"""Param groups made from rules about names."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import looptools as lt

OPTIMIZERS = [
    cls
    for _, cls in sorted(vars(torch.optim).items())
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
]
DECAYING = [cls for cls in OPTIMIZERS if "weight_decay" in inspect.signature(cls.__init__).parameters]


class Tied(nn.Module):
    """The embedding's weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embed.weight


def small(**options):
    """A backbone with norms, and a head."""
    return nn.ModuleDict(
        {
            "backbone": nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)),
            "head": nn.Linear(2, 2, **options),
        }
    )


ZOO = [
    lambda: small(),
    lambda: nn.Sequential(nn.Embedding(3, 2), nn.Bilinear(2, 2, 1)),
    lambda: nn.TransformerEncoderLayer(4, 2, 8),
    lambda: nn.LSTM(2, 3),
    lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    lambda: nn.Sequential(*[nn.Linear(2, 2)] * 2),
    lambda: nn.ParameterDict({"a": nn.Parameter(torch.ones(1)), "norm": nn.Parameter(torch.ones(1))}),
    lambda: nn.Sequential(nn.RMSNorm(2), nn.GroupNorm(1, 2), nn.PReLU()),
]


def names(model, groups):
    """What is in each group, by name."""
    of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: [of[id(parameter)] for parameter in group["params"]] for group in groups}


def test_biases_and_norms_do_not_decay():
    """By the parameter's name or its owner's class; BatchNorm's weight has no "norm" in its name here."""
    model = small()

    groups = lt.param_groups(model)

    assert names(model, groups) == {
        "default": ["backbone.0.weight", "backbone.2.weight", "head.weight"],
        "no_decay": ["backbone.0.bias", "backbone.1.weight", "backbone.1.bias", "backbone.2.bias", "head.bias"],
    }
    assert [{key: value for key, value in g.items() if key != "params"} for g in groups] == [
        {"name": "default"},
        {"name": "no_decay", "weight_decay": 0.0},
    ]


def test_multipliers_by_name():
    """lr and weight decay are the given ones times the factor; groups without a factor come first."""
    model = small()

    groups = lt.param_groups(
        model, lr=0.5, weight_decay=0.25, lr_multipliers={"backbone": 0.5}, decay_multipliers={"head.weight": 2}
    )

    assert [(g["name"], g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        ("decay*2", 0.5, 0.5, 1),
        ("no_decay", 0.5, 0.0, 1),
        ("backbone", 0.25, 0.25, 2),
        ("backbone no_decay", 0.25, 0.0, 4),
    ]


def test_the_longest_key_wins_and_of_equals_the_first_in_the_alphabet():
    """As mmcv's custom_keys, whatever the order in which they are given."""
    model = nn.ModuleDict({"ab": nn.Linear(1, 1, bias=False), "ba": nn.Linear(1, 1, bias=False)})
    factors = {"weight": 2.0, "ab": 3.0, "ba": 4.0, "ab.weight": 5.0}

    for order in (factors, dict(reversed(factors.items()))):
        groups = lt.param_groups(model, lr=1.0, lr_multipliers=order)
        assert names(model, groups) == {"ab.weight": ["ab.weight"], "weight": ["ba.weight"]}
    pair = nn.ModuleDict({"y": nn.ModuleDict({"x": nn.Linear(1, 1, bias=False)})})
    assert lt.param_groups(pair, lr=1.0, lr_multipliers={"y": 2.0, "x": 3.0})[0]["lr"] == 3.0


def test_a_key_is_whole_pieces_of_a_name():
    """Layer 2 is not layer 12, wherever it stands; a dot at the end says the same."""
    model = nn.ModuleDict({"module": nn.ModuleDict({key: nn.Linear(1, 1, bias=False) for key in ("2", "12", "2x")})})

    for key in ("2", "2.", "module.2"):
        groups = lt.param_groups(model, lr=1.0, lr_multipliers={key: 0.5})
        assert names(model, groups) == {
            "default": ["module.12.weight", "module.2x.weight"],
            key: ["module.2.weight"],
        }
    with pytest.raises(ValueError, match="no parameter is found by 'modul', in whole pieces between dots"):
        lt.param_groups(model, lr=1.0, lr_multipliers={"modul": 0.5})


def test_a_module_that_is_registered_twice_counts_with_both_names():
    """Its parameters appear once; rules that tell the names apart are refused."""
    model = nn.Sequential(*[nn.Linear(1, 1, bias=False)] * 2)

    assert names(model, lt.param_groups(model)) == {"default": ["0.weight"]}
    with pytest.raises(ValueError, match="0.weight and 1.weight are one shared parameter"):
        lt.param_groups(model, lr=1.0, lr_multipliers={"1": 0.1})


def test_keys_with_the_same_factor_share_a_group():
    """One group for each set of options; a factor of 1 is none."""
    model = nn.ModuleDict({key: nn.Linear(1, 1, bias=False) for key in "abcd"})

    groups = lt.param_groups(model, lr=1.0, lr_multipliers={"a": 0.1, "b": 0.1, "c": 1.0})

    assert names(model, groups) == {"default": ["c.weight", "d.weight"], "a+b": ["a.weight", "b.weight"]}


def test_a_decay_multiplier_wins_over_no_decay():
    """What was asked for by name decays, though it is a bias."""
    model = nn.Linear(1, 1)

    groups = lt.param_groups(model, weight_decay=0.1, decay_multipliers={"bias": 1})

    assert [(group["name"], group["weight_decay"]) for group in groups] == [("default", 0.1)]


def test_one_word_may_be_given_by_itself():
    """`no_decay_on="bias"` is not six letters; upper or lower case does not count."""
    assert names(model := small(), lt.param_groups(model, no_decay_on="BatchNorm"))["no_decay"] == [
        "backbone.1.weight",
        "backbone.1.bias",
    ]
    assert [group["name"] for group in lt.param_groups(small(), no_decay_on=())] == ["default"]


def test_a_shared_parameter_appears_once():
    """Under its first name; torch would refuse it twice."""
    model = Tied()

    assert names(model, lt.param_groups(model)) == {"default": ["embed.weight"], "no_decay": ["head.bias"]}


def test_a_shared_parameter_whose_names_ask_for_different_things_is_refused():
    """Both names are in the error; rules that agree are taken."""
    with pytest.raises(
        ValueError, match=r"embed.weight and head.weight are one shared parameter.*lr times 0.1, weight"
    ):
        lt.param_groups(Tied(), lr=1.0, lr_multipliers={"embed": 0.1})
    with pytest.raises(ValueError, match="embed.weight and head.weight are one shared parameter"):
        lt.param_groups(Tied(), no_decay_on=("embedding",))

    model = Tied()
    groups = lt.param_groups(model, lr=1.0, lr_multipliers={"embed": 0.1, "head.weight": 0.1})
    assert names(model, groups)["embed"] == ["embed.weight"]


def test_frozen_parameters():
    """In by default, so that they train when they are thawed; out if asked."""
    model = small()
    model["backbone"].requires_grad_(False)

    assert sum(len(group["params"]) for group in lt.param_groups(model)) == 8
    assert sum(len(group["params"]) for group in lt.param_groups(model, frozen=False)) == 2
    with pytest.raises(ValueError, match="nothing to optimize in Linear: all of them are frozen"):
        lt.param_groups(nn.Linear(1, 1).requires_grad_(False), frozen=False)


def test_an_lr_that_is_a_tensor():
    """For capturable optimizers; each group has a tensor of its own."""
    lr = torch.tensor(0.5)

    groups = lt.param_groups(small(), lr=lr, lr_multipliers={"head": 0.5})

    assert [float(group["lr"]) for group in groups] == [0.5, 0.5, 0.25, 0.25]
    assert len({id(group["lr"]) for group in groups}) == 4


@pytest.mark.parametrize("cls", DECAYING, ids=lambda cls: cls.__name__)
def test_every_optimizer_that_decays_takes_them(cls):
    """It moves everything once, each group with its own options, the same as groups written by hand."""

    def make():
        torch.manual_seed(0)
        layers = (nn.Linear(2, 2, bias=False) for _ in range(2)) if cls.__name__ == "Muon" else (
            nn.Linear(2, 2), nn.LayerNorm(2))  # fmt: skip
        return nn.Sequential(*layers)

    def train(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(4, 2)).pow(2).sum().backward()
            optimizer.step()
        return list(model.parameters())

    model = make()
    optimizer = cls(lt.param_groups(model, lr=0.1, weight_decay=0.1, lr_multipliers={"0.": 0.5}))
    by_hand = make()
    groups = [
        {"params": [p], "lr": 0.1 * (0.5 if name[0] == "0" else 1), "weight_decay": 0.0 if p.ndim == 1 else 0.1}
        for name, p in by_hand.named_parameters()
    ]

    for ours, theirs in zip(train(model, optimizer), train(by_hand, cls(groups)), strict=True):
        assert torch.equal(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(
    make=st.sampled_from(ZOO),
    words=st.lists(st.sampled_from(["bias", "norm"]), unique=True),
    factors=st.dictionaries(
        st.sampled_from(["backbone", "2", "2.weight", "head", "weight", "bias"]), st.sampled_from([0.0, 0.1, 1.0, 2.0])
    ),
    decayed=st.dictionaries(st.sampled_from(["bias", "2"]), st.sampled_from([0.0, 1.0, 3.0])),
)
def test_each_parameter_appears_exactly_once(make, words, factors, decayed):
    """Whatever the rules; and no two groups have the same options or the same name."""
    model = make()
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    there = [f".{name}." for name in names]
    factors, decayed = ({k: f[k] for k in f if any(f".{k}." in n for n in there)} for f in (factors, decayed))
    groups = lt.param_groups(
        model, lr=0.1, weight_decay=0.1, no_decay_on=words, lr_multipliers=factors, decay_multipliers=decayed
    )

    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in model.parameters())
    assert len({(group["lr"], group["weight_decay"]) for group in groups}) == len(groups)
    assert len({group["name"] for group in groups}) == len(groups)
    torch.optim.SGD(groups, lr=1.0)


def test_the_options_are_in_force_in_a_run(model, batches):
    """`state.lr` is the plain one; every group is scheduled from its own base."""
    both = nn.ModuleDict({"backbone": nn.Linear(1, 1, bias=False), "head": nn.Linear(1, 1, bias=False)})
    sgd = torch.optim.SGD(lt.param_groups(both, lr=0.5, lr_multipliers={"backbone": 0.5}), lr=9.0)
    train = lt.train(both, batches, lambda model, batch: sum(part(batch).mean() for part in model.values()))

    run = lt.workflow([(train | lt.schedule_lr(sgd, lt.schedules.poly()) | lt.optimize(sgd), 1)], max_epochs=1)
    seen = [[state.lr, *(group["lr"] for group in sgd.param_groups)] for state in run]

    assert seen[0] == [0.5, 0.5, 0.25]
    assert seen[1] == pytest.approx([1 / 3, 1 / 3, 1 / 6])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr_multipliers": {"backbone": 0.1}}, ValueError, "lr_multipliers has nothing to multiply. Give lr="),
        (
            {"decay_multipliers": {"head": 0}},
            ValueError,
            "decay_multipliers has nothing to multiply. Give weight_decay=",
        ),
        (
            {"lr": 1.0, "lr_multipliers": {"backbon.": 0.1}},
            ValueError,
            r"lr_multipliers: no parameter is found by 'backbon.', in whole pieces between dots. The children of "
            r"ModuleDict are backbone, head; its "
            r"parameters backbone.0.weight, .* and 2 more",
        ),
        ({"no_decay_on": ("embedding",)}, ValueError, "no_decay_on: no parameter is found by 'embedding'"),
        ({"lr": 1.0, "lr_multipliers": {"head": -1}}, ValueError, r"lr_multipliers\['head'\] must not be negative"),
        (
            {"lr": 1.0, "lr_multipliers": {"head": "a"}},
            TypeError,
            r"lr_multipliers\['head'\] must be a number, got 'a'",
        ),
        ({"lr": 1.0, "lr_multipliers": [("head", 1)]}, TypeError, "lr_multipliers must be a dictionary"),
        ({"no_decay_on": (nn.LayerNorm,)}, TypeError, "no_decay_on must be words"),
    ],
)
def test_bad_options(options, error, message):
    """What is wrong, what there is, what to do."""
    with pytest.raises(error, match=f"^param_groups: {message}"):
        lt.param_groups(small(), **options)


def test_what_has_no_names_is_refused():
    """Parameters alone, a list of modules, a module without any."""
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module.*got generator.*ModuleList\(\[a, b\]\)"):
        lt.param_groups(small().parameters())
    with pytest.raises(ValueError, match="nothing to optimize in ReLU: it has no parameters"):
        lt.param_groups(nn.ReLU())
    assert len(lt.param_groups(nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)]))) == 2
