"""Weights alone, from nearly any file and into one."""

from __future__ import annotations

import errno
import os
import re
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import looptools as lt
from tests.loops import assert_same, network

DTYPES = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
NUMBERS = sorted(
    (d for d in DTYPES if re.fullmatch(r"(torch\.)(b?float\d+|float8_.*fnu?z?|float8_e5m2|u?int\d\d?|bool)", str(d))),
    key=str,
)
NUMBERS = [dtype for dtype in NUMBERS if dtype.itemsize * 8 == int((re.findall(r"\d\d?", str(dtype)) or ["8"])[0])]


class Backboned(nn.Module):
    """A backbone of two layers and a head."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
        self.head = nn.Linear(4, classes)


class Tied(nn.Module):
    """One parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.out = nn.Linear(2, 3, bias=False)
        self.out.weight = self.embed.weight


def values(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def refused(model: nn.Module, *args, **options) -> str:
    """The text of the one error; nothing was changed."""
    before = values(model)
    with pytest.raises(RuntimeError) as caught:
        lt.load_weights(model, *args, **options)
    assert_same(before, values(model))
    return str(caught.value)


@pytest.fixture
def trained(tmp_path, model, sgd, batches):
    """A run of two epochs with an average, its best and its newest checkpoint, in a folder."""
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    train = lt.train(model, batches, lambda model, batch: model(batch)) | lt.optimize(sgd) | lt.ema(averaged)
    val = lt.validate(averaged, batches, lambda model, batch: model(batch))
    best = lt.highest("val/loss")  # that of the first epoch
    run = lt.workflow([(train, 1), (val, 1)], max_epochs=2) | lt.checkpoint(tmp_path / "run", best=best)
    run.to_end()
    return tmp_path / "run", run, model, averaged


# What it reads.


def test_a_checkpoint_gives_its_plain_weights(trained):
    """The newest file of a run holds the weights of the model as they were at the end."""
    folder, _, model, _ = trained
    fresh = type(model)()

    report = lt.load_weights(fresh, max(folder.glob("epoch_*.pt")))

    assert torch.equal(fresh.w, model.w)
    assert report.entry == "weights"
    assert report.loaded == ("w",)
    assert repr(report) == "Loaded(1 loaded)"


def test_a_best_file_gives_the_weights_that_were_judged(trained):
    """The metric was measured on the average, so its weights are the best."""
    folder, run, model, averaged = trained
    fresh = type(model)()

    lt.load_weights(fresh, folder / "best.pt")

    assert fresh.w != model.w
    assert fresh.w != averaged.module.w
    assert float(fresh.w.detach()) * 2 == pytest.approx(run.best["val/loss"]["value"])  # the batches' mean is 2


def test_a_folder_gives_its_newest_checkpoint(trained):
    """As `run.resume` takes it, and the report says which."""
    folder, _, model, _ = trained
    fresh = type(model)()

    report = lt.load_weights(fresh, str(folder))

    assert torch.equal(fresh.w, model.w)
    assert report.source == max(folder.glob("epoch_*.pt"))


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(trained):
    """The one before is used, and it is said."""
    folder, _, model, _ = trained
    newest = max(folder.glob("epoch_*.pt"))
    newest.write_bytes(newest.read_bytes()[:-100])

    with pytest.warns(UserWarning, match="load_weights: .*damaged.* Trying the one before"):
        report = lt.load_weights(type(model)(), folder)

    assert report.source == min(folder.glob("epoch_*.pt"))


def test_a_folder_whose_checkpoints_are_all_damaged_is_an_error(trained):
    """Nothing is loaded from what is not what was written."""
    folder, _, model, _ = trained
    for file in folder.glob("epoch_*.pt"):
        file.write_bytes(b"")

    with (
        pytest.warns(UserWarning, match="Trying the one before"),
        pytest.raises(RuntimeError, match="none of the 2 checkpoints in .* is sound"),
    ):
        lt.load_weights(type(model)(), folder)


def test_a_damaged_file_is_an_error(tmp_path, model):
    """One flipped bit is enough; nothing is changed."""
    file = lt.save_weights(network(), tmp_path / "w.pt")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)

    assert "damaged" in refused(network(), file)


def test_of_takes_another_model_of_the_file(trained):
    """The average by its name in the checkpoint, without AveragedModel around it."""
    folder, _, model, averaged = trained
    fresh = type(model)()

    report = lt.load_weights(fresh, folder, of="averaged")

    assert torch.equal(fresh.w, averaged.module.w)
    assert report.entry == "averaged"


def test_an_unknown_model_lists_those_that_are_there(trained):
    """The error names them, and what may have been meant."""
    folder, _, model, _ = trained

    with pytest.raises(LookupError, match="known are weights, model, averaged. Did you mean 'averaged'"):
        lt.load_weights(model, folder, of="average")


@pytest.mark.parametrize("entry", ["", "state_dict", "model", "weights", "model_state_dict"])
@pytest.mark.parametrize("as_file", [True, False])
def test_files_of_others_are_looked_into(tmp_path, entry, as_file):
    """A plain state dict, or one where mmcv, Lightning and most scripts keep it."""
    model, fresh = network(), network()
    tree = {entry: model.state_dict(), "epoch": 3, "optimizer": {"state": {}}} if entry else model.state_dict()
    torch.save(tree, tmp_path / "w.ckpt")

    report = lt.load_weights(fresh, tmp_path / "w.ckpt" if as_file else tree)

    assert_same(fresh.state_dict(), model.state_dict())
    assert report.entry == entry
    assert (report.source == tmp_path / "w.ckpt") is as_file


def test_two_state_dicts_in_one_file_are_asked_about(tmp_path):
    """Nothing is guessed; the names are listed."""
    model, other = network(), network()
    tree = {"model": other.state_dict(), "state_dict": model.state_dict(), "ema": model.state_dict()}

    with pytest.raises(LookupError, match="several state dicts; known are model, state_dict, ema. Say which: of="):
        lt.load_weights(other, tree)
    lt.load_weights(other, tree, of="ema")

    assert_same(other.state_dict(), model.state_dict())


def test_safetensors_are_read(tmp_path):
    """Also those that have no checksum, since others wrote them."""
    import safetensors.torch

    model, fresh = network(), network()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")

    lt.load_weights(fresh, tmp_path / "w.safetensors")

    assert_same(fresh.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        ("none.pt", FileNotFoundError, "load_weights: there is no none.pt"),
        ("https://example.org/w.pt", ValueError, "load_state_dict_from_url"),
        (3, TypeError, "a file, a folder of checkpoints or a state dict, got a int"),
        ({"a": {"b": 3}}, LookupError, "no state dict where one is looked for; it holds none"),
        ({"net": {"w": torch.ones(())}}, LookupError, "known are net. Say which: of="),
    ],
)
def test_what_holds_no_weights_is_refused(model, source, error, match):
    """With what is there instead, and what to do."""
    with pytest.raises(error, match=match):
        lt.load_weights(model, source)


def test_a_folder_without_checkpoints_names_its_files(tmp_path, model):
    """One of them may have been meant."""
    lt.save_weights(model, tmp_path / "w.pt")

    with pytest.raises(LookupError, match="lists no checkpoints of a run. Give one of its files: w.pt"):
        lt.load_weights(model, tmp_path)


def test_a_file_with_code_is_refused_with_the_way_out(tmp_path, model):
    """Nothing in it runs; how to take the weights out of it where it is trusted is said."""
    torch.save({"state_dict": model.state_dict(), "meta": Path("a")}, tmp_path / "w.pth")

    with pytest.raises(RuntimeError, match=r"load_weights: .*w.pth") as caught:
        lt.load_weights(model, tmp_path / "w.pth")

    assert 'weights_only=False)["state_dict"], "weights.pt")' in caught.value.__notes__[0]


def test_swapped_arguments_are_told_apart(model):
    """And a run is not a model."""
    run = lt.workflow([(lt.validate(model, [], lambda model, batch: model(batch)), 1)], max_rounds=1)

    with pytest.raises(TypeError, match="the model comes first"):
        lt.load_weights("w.pt", model)
    with pytest.raises(TypeError, match=r"got a Run. Give its model: lt.load_weights\(run.model"):
        lt.load_weights(run, "w.pt")
    with pytest.raises(TypeError, match="what is saved comes first"):
        lt.save_weights("w.pt", model)


# What fits.


@given(st.data())
def test_one_error_lists_all_that_does_not_fit(data):
    """Whatever is missing, unexpected or misshapen; and not one value was changed."""
    model, saved = network(), dict(network().state_dict())
    keys = list(saved)
    gone = set(data.draw(st.lists(st.sampled_from(keys), unique=True, max_size=3), "gone"))
    bent = set(data.draw(st.lists(st.sampled_from(keys), unique=True, max_size=3), "bent")) - gone
    new = set(data.draw(st.lists(st.text("xyz.", min_size=1, max_size=5), unique=True, max_size=3), "new"))
    saved = {key: torch.ones(9) if key in bent else value for key, value in saved.items() if key not in gone}
    saved |= {key: torch.ones(7) for key in new}
    gone -= {key for key in gone if key.endswith("num_batches_tracked")}  # torch fills it in

    if gone or bent or new:
        text = refused(model, saved)
        for words, those in (
            ("missing in the file", gone),
            ("not in the model", new),
            ("of another shape or type", bent),
        ):
            assert (f"{words} ({len(those)})" in text) is bool(those)
            assert all(key in text for key in those)
    else:
        assert set(lt.load_weights(model, saved).loaded) == saved.keys()


def test_both_shapes_are_said(model):
    """Of the file, and of the model."""
    assert "- of another shape or type (1): w: (2,) in the file, () here" in refused(model, {"w": torch.ones(2)})


def test_long_lists_are_cut_with_their_count():
    """An error stays readable."""
    many = nn.ModuleList(nn.Linear(1, 1) for _ in range(30))

    text = refused(many, {"0.weight": many[0].weight.detach()})

    assert "missing in the file (59): 0.bias, 1.weight" in text
    assert text.count(",") < 45
    assert "and 19 more" in text


def test_keys_out_of_a_file_are_made_fit_for_a_terminal(model):
    """A file that nobody trusts must not write into the window, nor fill it."""
    text = refused(model, {"loss\x1b[2J" + "x" * 10_000: torch.ones(2)})

    assert "loss?[2Jxxx" in text
    assert len(text) < 1000


def test_not_strict_loads_what_fits_and_says_the_rest_once():
    """Shapes that do not fit are left out whole; the report has all keys."""
    model, saved = Backboned(2), {**Backboned(5).state_dict(), "neck.weight": torch.ones(1)}
    head = model.head.weight.clone()

    with pytest.warns(UserWarning, match="load_weights") as caught:
        report = lt.load_weights(model, saved, strict=False)

    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "What fits was loaded.\n- not in the model (1): neck.weight" in str(caught[0].message)
    assert torch.equal(model.backbone[0].weight, saved["backbone.0.weight"])
    assert torch.equal(model.head.weight, head)
    assert report.unexpected == ("neck.weight",)
    assert len(report.loaded) == 4
    assert report.misshapen["head.weight"] == "(5, 4) in the file, (2, 4) here"


def test_not_strict_is_an_error_if_nothing_fits(model):
    """A model that keeps all its initial weights was not loaded."""
    assert "None of it does" in refused(model, {"v": torch.ones(2)}, strict=False)


def test_parameters_stay_the_same_objects_and_are_cast(model, sgd):
    """An optimizer made before moves the loaded weights; a cast is in the report."""
    before = model.w

    report = lt.load_weights(model, {"w": torch.tensor(5.0, dtype=torch.float64)})

    assert model.w is before is sgd.param_groups[0]["params"][0]
    assert model.w == 5
    assert model.w.dtype == torch.float32
    assert report.cast == ("w",)
    assert repr(report) == "Loaded(1 loaded, 1 cast)"


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32])
def test_a_cast_that_would_lose_a_part_is_refused(dtype):
    """An imaginary part, or what is behind the point, is not dropped in silence."""
    module = nn.Module()
    module.register_buffer("b", torch.ones(2, dtype=torch.float32 if dtype.is_complex else torch.long))

    text = refused(module, {"b": torch.ones(2, dtype=dtype)})

    assert re.search(r"b: (complex64|float32) in the file, (float32|int64) here, which would lose a part", text)
    with pytest.raises(RuntimeError):
        lt.load_weights(module, {"b": torch.ones(2, dtype=dtype)}, strict=False)


def test_nan_is_loaded_and_said(model):
    """The file is what it is, but nobody finds out three days later."""
    with pytest.warns(UserWarning, match="1 of what was loaded from the mapping holds NaN or Inf: w"):
        report = lt.load_weights(model, {"w": torch.tensor(float("nan"))})

    assert model.w.isnan()
    assert report.non_finite == ("w",)


def test_an_infinite_mask_is_nothing_to_warn_of():
    """Attention masks are buffers with -inf."""
    module = nn.Module()
    module.register_buffer("mask", torch.zeros(2))

    assert not lt.load_weights(module, {"mask": torch.tensor([0, -torch.inf])}).non_finite


def test_of_tied_weights_one_name_is_enough():
    """Files of others leave out the second."""
    model, weight = Tied(), torch.arange(6.0).view(3, 2)

    lt.load_weights(model, {"out.weight": weight})

    assert torch.equal(model.embed.weight, weight)
    assert model.out.weight is model.embed.weight
    assert "missing in the file (2)" in refused(model, {"x": weight})


def test_what_is_not_in_a_state_dict_is_not_missing():
    """Non-persistent buffers are made by the model itself."""
    module = nn.Linear(1, 1)
    module.register_buffer("cache", torch.ones(3), persistent=False)

    assert lt.load_weights(module, nn.Linear(1, 1).state_dict()).loaded == ("weight", "bias")


def test_a_counter_that_older_files_lack_is_filled_in():
    """BatchNorm sees to it when torch loads, so it does here."""
    model, saved = network(), dict(network().state_dict())
    del saved["1.num_batches_tracked"]

    lt.load_weights(model, saved)

    assert torch.equal(model[0].weight, saved["0.weight"])


def test_keys_that_a_module_renames_itself_fit():
    """A hook that knows an older name is asked before anything is refused, without its tensors being touched."""

    class Renamed(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            if f"{prefix}w" in state_dict:
                state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}w")
            super()._load_from_state_dict(state_dict, prefix, *args)

    model = nn.Sequential(Renamed(1, 1, bias=False))

    lt.load_weights(model, {"0.w": torch.full((1, 1), 4.0)})

    assert model[0].weight == 4
    assert "not in the model (1): 0.v" in refused(model, {"0.v": torch.ones(1, 1)})


def test_a_lazy_module_takes_its_shape_from_the_file():
    """As with torch."""
    model = nn.Sequential(nn.LazyLinear(2))

    lt.load_weights(model, {"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2)})

    assert model[0].weight.shape == (2, 3)


def test_a_model_without_memory_needs_assign():
    """The error says so; with it, weights are there and what was tied still is."""
    with torch.device("meta"):
        model = Tied()
    saved = {"embed.weight": torch.ones(3, 2)}

    with pytest.raises(RuntimeError, match="1 of the model's tensors|2 of the model's tensors .* Give assign=True"):
        lt.load_weights(model, saved)
    lt.load_weights(model, saved, assign=True)

    assert model.out.weight is model.embed.weight
    assert torch.equal(model.out.weight, saved["embed.weight"])
    assert model.out.weight.data_ptr() != saved["embed.weight"].data_ptr()


def test_what_stays_without_memory_is_said():
    """A buffer that no state dict holds cannot come from a file."""
    with torch.device("meta"):
        model = nn.Linear(1, 1)
        model.register_buffer("cache", torch.ones(3), persistent=False)

    with pytest.warns(UserWarning, match="1 tensors are still on the meta device: cache"):
        lt.load_weights(model, nn.Linear(1, 1).state_dict(), assign=True)


# Names.

RENAMES = [
    lambda key: "0." + key.removeprefix("body.") if key.startswith("body.") else None,
    {r"^body\.": "0.", r"^head\.": None},
    [(r"^body\.", "neck."), (r"^neck\.", "0."), ("head", None)],
    iter([(r"^(body)\.(\w+)", r"0.\2"), (r"^head", None)]),
]


@pytest.mark.parametrize("rename", RENAMES)
def test_keys_are_renamed_or_left_out(rename):
    """By a function, by patterns in a mapping, or by pairs one after the other."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False))

    report = lt.load_weights(model, {"body.weight": torch.ones(1, 1), "head.weight": torch.ones(3)}, rename=rename)

    assert model[0].weight == 1
    assert report.loaded == ("0.weight",)


@pytest.mark.parametrize(
    ("rename", "error", "match"),
    [
        ({"(": ""}, ValueError, r"load_weights: rename: '\(' -> '' is no regular expression"),
        ({"w": r"\3"}, ValueError, "invalid group reference"),
        ("w", TypeError, "rename must be a function"),
        ([("w", 3)], TypeError, "rename must be a function"),
        (["ab"], TypeError, "rename must be a function"),
        (lambda key: 3, TypeError, "it returned 3"),
        (lambda key: "a", ValueError, "'w' and 'v' both become 'a'"),
    ],
)
def test_a_wrong_rename_is_refused(model, rename, error, match):
    """Before anything is loaded."""
    with pytest.raises(error, match=match):
        lt.load_weights(model, {"w": torch.ones(()), "v": torch.ones(())}, rename=rename)


@pytest.mark.parametrize("prefix", ["backbone", "backbone."])
def test_a_part_of_a_model_takes_its_part_of_a_file(prefix):
    """The other keys of the file are no concern of its."""
    model, part = Backboned(), Backboned().backbone

    lt.load_weights(part, model.state_dict(), prefix=prefix)

    assert_same(part.state_dict(), model.backbone.state_dict())
    with pytest.raises(LookupError, match="no key in the mapping begins with 'back'; there are backbone, head"):
        lt.load_weights(part, model.state_dict(), prefix="back")


@pytest.mark.parametrize(
    ("make", "saved", "advice"),
    [
        (
            lambda: Backboned().backbone,
            {f"backbone.{key}": value for key, value in Backboned().backbone.state_dict().items()},
            'Every key in the file begins with \'backbone.\': rename={r"^backbone\\.": ""}.',
        ),
        (lambda: Backboned().backbone, Backboned().state_dict(), "prefix='backbone' takes that alone"),
        (lambda: nn.ModuleDict({"net": network()}), network().state_dict(), 'rename={r"^": "net."}'),
        (
            Backboned,
            {key.replace("backbone", "trunk.body"): value for key, value in Backboned().state_dict().items()},
            '4 more would fit with rename={r"^trunk\\.body\\.": "backbone."}',
        ),
        (
            Backboned,
            {key.replace("backbone", "body").replace("head", "fc"): v for key, v in Backboned().state_dict().items()},
            '6 more would fit with rename={r"^body\\.": "backbone.", r"^fc\\.": "head."}',
        ),
    ],
)
def test_advice_is_given_and_works(make, saved, advice):
    """What the error proposes, typed as it stands, loads the file."""
    model = make()
    text = refused(model, saved)
    assert advice in text

    typed = re.search(r"(rename|prefix)=({.*?}|'.*?')", text)
    assert typed is not None
    report = lt.load_weights(model, saved, **{typed[1]: eval(typed[2])})  # noqa: S307

    assert not report.missing
    assert len(report.loaded) == len(model.state_dict())


def wrapped(model: nn.Module) -> list[nn.Module]:
    return [
        nn.DataParallel(model),
        AveragedModel(model),
        torch.compile(model, backend="eager"),
        AveragedModel(nn.DataParallel(model)),
    ]


@pytest.mark.parametrize("kind", range(4))
def test_wrappers_count_for_nothing_on_either_side(kind):
    """A plain file goes into a wrapped model, and a wrapped model's file into a plain one."""
    plain, wrapper = network(), wrapped(network())[kind]

    lt.load_weights(plain, wrapper.state_dict())
    lt.load_weights(wrapper, network().state_dict())
    lt.load_weights(wrapper, plain.state_dict())
    lt.load_weights(wrapper, wrapped(network())[kind].state_dict(), strict=True)

    assert len(lt.load_weights(plain, wrapper.state_dict()).loaded) == 9


def test_a_compiled_part_counts_for_nothing_either():
    """Its mark stands in the middle of the key."""
    plain, compiled = Backboned(), Backboned()
    compiled.backbone = torch.compile(compiled.backbone, backend="eager")

    lt.load_weights(compiled, plain.state_dict())
    assert_same(compiled.backbone._orig_mod.state_dict(), plain.backbone.state_dict())
    assert len(lt.load_weights(Backboned(), compiled.state_dict()).loaded) == 6


def test_a_model_with_a_child_called_module_is_not_a_wrapper():
    """What fits as it is stays as it is; and renaming goes with the wrapper taken off."""
    model = nn.ModuleDict({"module": nn.Linear(1, 1)})

    lt.load_weights(model, model.state_dict())
    lt.load_weights(model, nn.DataParallel(model).state_dict())
    saved = {f"module.backbone.{key}": value for key, value in nn.Linear(1, 1).state_dict().items()}
    for pattern in (r"^backbone\.", r"^module\.backbone\."):
        assert lt.load_weights(nn.Linear(1, 1), saved, rename={pattern: ""}).loaded == ("weight", "bias")


def test_versions_of_modules_follow_their_names():
    """Torch asks for them when a module knows how to read what an older version wrote."""
    seen = []

    class Versioned(nn.Linear):
        _version = 2

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
            seen.append(local_metadata.get("version"))
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    model = nn.Sequential(Versioned(1, 1))
    saved = OrderedDict((f"net.{key}", value) for key, value in model.state_dict().items())
    saved._metadata = {f"net.{key}" if key else "net": value for key, value in model.state_dict()._metadata.items()}

    lt.load_weights(model, saved, rename={r"^net\.": ""})

    assert seen == [2]


# What it writes.


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_every_dtype_comes_back_to_the_bit(tmp_path, suffix, dtype):
    """Also NaN, since bits are compared."""
    bits = torch.randint(0, 2 if dtype == torch.bool else 255, (6 * dtype.itemsize,), dtype=torch.uint8)
    saved = {"a": bits.view(dtype).view(2, 3), "empty": torch.empty(0, 3, dtype=dtype), "scalar": bits.view(dtype)[0]}

    file = lt.save_weights(saved, tmp_path / f"deep/er/w{suffix}")
    module = nn.Module()
    for key, value in saved.items():
        module.register_buffer(key, torch.zeros_like(value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # NaN
        lt.load_weights(module, file)

    for key, value in saved.items():
        got = module.state_dict()[key]
        assert got.dtype == dtype
        assert got.shape == value.shape
        assert torch.equal(got.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_models_come_back_without_their_wrappers(tmp_path, suffix):
    """Others read the file with torch alone, or with safetensors alone."""
    import safetensors.torch

    model = network()
    wrapper = AveragedModel(nn.DataParallel(model))

    file = lt.save_weights(wrapper, str(tmp_path / f"w{suffix}"))

    plain = network()
    read = torch.load(file, weights_only=True) if suffix == ".pt" else safetensors.torch.load_file(file)
    plain.load_state_dict(read)
    assert_same(plain.state_dict(), model.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == [f"w{suffix}"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_shared_sliced_and_turned_tensors_are_written(tmp_path, suffix):
    """Each under every name it has, and without the memory around a slice."""
    big = torch.arange(100_000.0)
    saved = {**Tied().state_dict(), "slice": big[:6], "over": big[3:9], "turned": torch.ones(2, 3).t(), "one": big[4]}

    file = lt.save_weights(saved, tmp_path / f"w{suffix}")

    assert file.stat().st_size < 10_000
    module = nn.Module()
    module.embed, module.out = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
    for key in ("slice", "over", "turned", "one"):
        module.register_buffer(key, torch.zeros(saved[key].shape))
    lt.load_weights(module, file)
    assert_same(module.state_dict(), saved)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_an_empty_model_is_a_file_too(tmp_path, suffix):
    """Nothing in, nothing out."""
    file = lt.save_weights(nn.ReLU(), tmp_path / f"w{suffix}")

    assert lt.load_weights(nn.ReLU(), file).loaded == ()


def test_a_run_and_a_checkpoint_are_exported(tmp_path, trained):
    """A run by its model; a file or folder without building the model, by name if asked."""
    folder, run, model, averaged = trained

    files = [
        lt.save_weights(run, tmp_path / "run.safetensors"),
        lt.save_weights(folder, tmp_path / "newest.safetensors"),
        lt.save_weights(folder, tmp_path / "averaged.safetensors", of="averaged"),
    ]

    loaded = [type(model)() for _ in files]
    for fresh, file in zip(loaded, files, strict=True):
        lt.load_weights(fresh, file)
    assert [fresh.w.detach() for fresh in loaded] == [model.w, model.w, averaged.module.w]


def test_every_byte_and_every_length_of_an_export_is_guarded(tmp_path):
    """A safetensors file has no checksum of its own; ours has one in its metadata."""
    file = lt.save_weights({"w": torch.arange(3.0)}, tmp_path / "w.safetensors")
    data, module = file.read_bytes(), nn.Module()
    module.register_buffer("w", torch.zeros(3))
    broken = [data[:length] for length in range(len(data))]
    broken += [data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] for at in range(len(data)) for bit in range(8)]

    for one in broken:
        file.write_bytes(one)
        with pytest.raises((RuntimeError, LookupError), match=r"load_weights: .*(damaged|cannot be read|does not fit)"):
            lt.load_weights(module, file)

    assert torch.equal(module.w, torch.zeros(3))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, model, suffix, call):
    """The disk's error comes through, and no temporary file stays."""
    file = lt.save_weights(model, tmp_path / f"w{suffix}")
    before = file.read_bytes()

    def fail(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with mock.patch(f"os.{call}", fail), pytest.raises(OSError) as caught:
        lt.save_weights({"w": torch.ones(())}, file)

    assert caught.value.errno == errno.ENOSPC
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_is_an_oserror_with_its_number(tmp_path):
    """Safetensors tells it in words only."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="w.safetensors") as caught:
            lt.save_weights({"w": torch.ones(10_000)}, tmp_path / "w.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "umask"), reason="no file modes")
def test_an_export_can_be_read_by_those_who_may(tmp_path, model):
    """The mode is that of any new file."""
    (tmp_path / "other").touch()

    file = lt.save_weights(model, tmp_path / "w.safetensors")

    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize(
    ("saved", "suffix", "error", "match"),
    [
        ({"w": torch.ones(1)}, ".bin", ValueError, r"w.bin must end in .pt, .pth or .safetensors"),
        ({"w": torch.ones(1), "m._extra_state": [3]}, ".safetensors", TypeError, "m._extra_state is a list"),
        ({"w": torch.ones(1), "x": object()}, ".pt", TypeError, "save_weights: x is a builtins.object"),
        ({"w": torch.ones(1, dtype=torch.complex128)}, ".safetensors", TypeError, "w has dtype torch.complex128"),
        ({"w": torch.ones(1).to_sparse()}, ".safetensors", TypeError, "w is a torch.sparse_coo"),
        ({"w": torch.ones(1, device="meta")}, ".pt", TypeError, "w is on the meta device"),
        (nn.LazyLinear(1), ".pt", TypeError, "weight has no shape yet"),
        (nn.Linear(1, 1), "", ValueError, "must end in"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path, saved, suffix, error, match):
    """Before a file is made."""
    with pytest.raises(error, match=match):
        lt.save_weights(saved, tmp_path / f"w{suffix}")

    assert list(tmp_path.iterdir()) == []


def test_without_safetensors_the_extra_is_named(tmp_path, model):
    """For reading and for writing."""
    (tmp_path / "w.safetensors").touch()
    with mock.patch.dict(sys.modules, {"safetensors": None, "safetensors.torch": None}):
        for use in (lt.load_weights, lt.save_weights):
            with pytest.raises(ModuleNotFoundError, match=rf"{use.__name__}: .*torch-looptools\[safetensors\]"):
                use(model, tmp_path / "w.safetensors")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_on_a_gpu_come_back(tmp_path, suffix):
    """The file can be read without one, and loads onto one; what is tied stays one."""
    model, fresh = Tied().cuda(), Tied().cuda()

    file = lt.save_weights(model, tmp_path / f"w{suffix}")
    lt.load_weights(fresh, file)

    assert torch.equal(fresh.out.weight, model.out.weight)
    assert fresh.out.weight.is_cuda
    lt.load_weights(Tied(), file)
    if suffix == ".pt":
        tensors = torch.load(file, weights_only=True)
        assert len({value.data_ptr() for value in tensors.values()}) == 1
        assert not tensors["out.weight"].is_cuda


def test_a_safetensors_file_is_not_written_on_by_its_reader(tmp_path):
    """With assign=True the file is not the model's memory."""
    model = nn.Linear(2, 2)
    file = lt.save_weights(model, tmp_path / "w.safetensors")
    data = file.read_bytes()

    lt.load_weights(model, file, assign=True)
    with torch.no_grad():
        model.weight.fill_(7)

    assert Path(file).read_bytes() == data


def test_a_tensor_that_cannot_be_written_to_is_found_before_anything_is_changed():
    """A buffer whose elements share memory; torch itself finds out half-way."""
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_buffer("mask", torch.zeros(1).expand(3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    saved = {key: torch.ones_like(value) for key, value in before.items()}

    with pytest.raises(RuntimeError, match=r"1 of the model's tensors cannot be copied into: mask: .*expand"):
        lt.load_weights(model, saved)
    assert_same(model.state_dict(), before)
