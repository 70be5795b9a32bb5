"""What a file says that it holds is read without loading it, and what is not harmless is refused."""

from __future__ import annotations

import json
import struct
import time
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
from hostile import CORPUS, SENTINEL, archive, in_large_form, made, pickled, records, sealed, tensor, text

from looptools.archives.contents import Contents, Outline, Refused, read_contents, read_header, shown


def contents_of(value, folder) -> Contents:
    torch.save(value, folder / "file.pt")
    return read_contents(folder / "file.pt")


@pytest.mark.parametrize("name", CORPUS)
def test_hostile_files_are_refused(name, tmp_path, monkeypatch):
    """Each by one typed error that names the file and says why, in no time, and none of its code runs."""
    monkeypatch.chdir(tmp_path)
    make, why = CORPUS[name]
    Path("file.pt").write_bytes(make())

    began = time.process_time()
    with pytest.raises(Refused, match=why) as caught:
        read_contents("file.pt")

    assert str(caught.value).startswith("verify: file.pt ")
    assert str(caught.value).isprintable()
    assert time.process_time() - began < 1
    assert not Path(SENTINEL).exists()


def test_the_pieces_they_are_made_of_are_sound(tmp_path):
    """Put together as they should be, they are read and loaded: what is refused above is refused for its reason."""
    file = tmp_path / "file.pt"
    file.write_bytes(sealed(made(tensor((2, 2), (2, 1)))))

    assert read_contents(file).tree == Outline(torch.float32, (2, 2), 16, "0")
    assert torch.equal(torch.load(file, weights_only=True), torch.zeros(2, 2))


PLAIN = {
    "text": "täxt",
    "numbers": [0, -1, 300, 70_000, 2**31, -(2**70), 1.5, float("inf"), True, None],
    "containers": [(), (1, (2, 3)), {1, 2, "x"}, Counter("abca"), OrderedDict(a=1), [], {}, set()],
    "of torch": [torch.Size([1, 2]), torch.float32, torch.bfloat16, torch.device("cpu"), torch.device("cuda", 1)],
    1: {(1, "a"): 2, 1.5: 3, True: 4, None: 5},
}


def test_plain_values_are_as_torch_loads_them(tmp_path):
    """All that a checkpoint may hold."""
    assert contents_of(PLAIN, tmp_path).tree == PLAIN == torch.load(tmp_path / "file.pt", weights_only=True)


DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32"]
DTYPES += ["uint64", "bool", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_every_kind_are_described(dtype, tmp_path):
    """By dtype, shape and bytes."""
    kind = getattr(torch, dtype)
    outline = contents_of(torch.zeros(2, 3).to(kind), tmp_path).tree

    assert outline == Outline(kind, (2, 3), 6 * kind.itemsize, "0")


def test_views_parameters_and_lazy_tensors_are_described(tmp_path):
    """As a state dict may hold them."""
    base, complex_ = torch.arange(10.0), torch.ones(2, dtype=torch.complex64)
    tree = {
        "view": base[2:6],
        "same": base.view(2, 5).t(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "grad": torch.ones(2, requires_grad=True),
        "empty": torch.empty(0, 3),
        "expanded": torch.ones(1).expand(5),
        "conj": complex_.conj(),
        "neg": torch.ones(2, dtype=torch.complex64).conj().imag,
        "scalar": torch.tensor(1),
    }

    contents = contents_of(tree, tmp_path)

    assert {key: outline.shape for key, outline in contents.tree.items()} == {k: v.shape for k, v in tree.items()}
    assert contents.tree["view"].storage == contents.tree["same"].storage
    assert contents.tensors == 9
    assert contents.stored == 40 + 8 + 8 + 4 + 16 + 16 + 8


def test_a_state_dict_with_its_versions_is_read(tmp_path):
    """Torch keeps them in an attribute of the dictionary."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))

    tree = contents_of(model.state_dict(), tmp_path).tree

    assert tree["0.weight"].shape == (3, 2)
    assert tree.metadata["1"] == {"version": 2}


def test_expanded_tensors_are_let_through_while_they_are_small(tmp_path):
    """64 MiB may come of little; a byte more is refused."""
    one = torch.zeros(1, dtype=torch.uint8)

    assert contents_of(one.expand(64 << 20), tmp_path).tree.bytes == 64 << 20
    with pytest.raises(Refused, match="declares tensors of 67108865 bytes"):
        contents_of(one.expand((64 << 20) + 1), tmp_path)


def test_a_file_of_another_writer_is_read(tmp_path):
    """Rezipped without compression it is still harmless."""
    file = tmp_path / "file.pt"
    file.write_bytes(archive(records(pickled(text("hello"))), folder="other/"))

    assert read_contents(file).tree == "hello"


def test_large_archives_are_read(tmp_path):
    """Beyond 4 GB a directory has another form."""
    file = tmp_path / "file.pt"
    file.write_bytes(in_large_form(made(tensor((2, 2), (2, 1)))))

    assert read_contents(file).tree.shape == (2, 2)
    assert torch.equal(torch.load(file, weights_only=True), torch.zeros(2, 2))


def test_every_cut_is_refused(tmp_path):
    """At no length does the rest look like a file."""
    data, file = made(tensor()), tmp_path / "file.pt"

    for length in range(len(data)):
        file.write_bytes(data[:length])
        with pytest.raises(Refused):
            read_contents(file)


def test_time_grows_with_the_size_alone(tmp_path):
    """Ten thousand tensors take a fraction of a second, and twice as many twice that."""
    torch.save([torch.ones(1) for _ in range(10_000)], tmp_path / "file.pt")

    began = time.process_time()
    assert read_contents(tmp_path / "file.pt").tensors == 10_000
    assert time.process_time() - began < 3


def test_text_of_a_file_cannot_steer_a_terminal():
    """Control characters, line ends and what turns the direction of writing are shown as question marks."""
    assert shown("a\x1b[2J\n\u202eb\ud800") == "a?[2J??b?"
    assert shown("x" * 70) == "x" * 57 + "..."


# safetensors


def safetensors(header, data=bytes(24)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


WEIGHT = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def test_safetensors_are_described_by_their_header(tmp_path):
    """Without the package."""
    file = tmp_path / "file.safetensors"
    file.write_bytes(safetensors({"__metadata__": {"format": "pt"}, "weight": WEIGHT}))

    contents = read_header(file)

    assert contents.tree == {"weight": Outline(torch.float32, (2, 3), 24, "weight")}
    assert (contents.tensors, contents.stored) == (1, 24)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is cut off"),
        (struct.pack("<Q", 2**63) + bytes(100), "is cut off"),
        (safetensors(b"[" * 100_000), "no JSON"),
        (safetensors(b"[1, 2]"), "no JSON object"),
        (safetensors(b'{"a": 1, "a": 2}'), "a name comes twice"),
        (safetensors({"weight": WEIGHT}, bytes(23)), "take 24 bytes, 23 are there"),
        (safetensors({"weight": WEIGHT}, bytes(25)), "take 24 bytes, 25 are there"),
        (safetensors({"weight": {**WEIGHT, "shape": [2, 4]}}), "not that of its shape"),
        (safetensors({"weight": {**WEIGHT, "shape": [-2, -3]}}), "a size that cannot be"),
        (safetensors({"weight": {**WEIGHT, "shape": [True, 6]}}), "a size that cannot be"),
        (safetensors({"weight": {**WEIGHT, "dtype": "F31"}}), "header on weight"),
        (safetensors({"weight": {**WEIGHT, "dtype": []}}), "header on weight"),
        (safetensors({"weight": "x"}), "header on weight"),
        (safetensors({"weight": WEIGHT, "twice": WEIGHT}), "overlap"),
        (safetensors(b'{"a": ' + b"9" * 5000 + b"}"), "no JSON"),
    ],
)
def test_unsound_safetensors_are_refused(data, why, tmp_path):
    """Each with its reason."""
    (tmp_path / "file.safetensors").write_bytes(data)

    with pytest.raises(Refused, match=why):
        read_header(tmp_path / "file.safetensors")
