"""Lines, JSON lines and the CSV table by themselves."""

from __future__ import annotations

import csv
import io
import json

import pytest

import looptools as lt
from looptools.sinks.files import GrowingFile
from looptools.sinks.rows import readable

STATE = lt.State(phase="train")


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_failed_line_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A full disk leaves no half line that would stand before the second try."""
    file = GrowingFile(tmp_path / "a.txt")
    file.append("one\n")

    class Full(io.BytesIO):
        def write(self, data):
            with (tmp_path / "a.txt").open("ab") as real:
                real.write(data[:2])
            raise OSError("no space left")

    whole, file._file = file._file, Full()
    with pytest.raises(OSError, match="no space left"):
        file.append("two\n")
    whole.close()
    file.append("two\n")
    file.close()

    assert (tmp_path / "a.txt").read_text() == "one\ntwo\n"


def test_json_lines_are_json(tmp_path):
    """What is not finite is a text; JSON has no NaN."""
    sink = lt.sinks.JsonLines(tmp_path / "log.jsonl")
    sink.write({"loss": float("inf"), "n": 1}, STATE)
    sink.hparams({"a": [float("nan"), 1], "b": {"c": None}})
    sink.close()

    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"loss": "inf", "n": 1},
        {"kind": "hparams", "hparams": {"a": ["nan", 1], "b": {"c": None}}},
    ]


def test_a_new_value_adds_a_column(tmp_path):
    """Rows before have it empty; the file is one table at any time."""
    sink = lt.sinks.CSV(tmp_path / "log.csv")
    sink.write({"kind": "iterations", "loss": 0.1}, STATE)
    sink.write({"kind": "pass", "loss": float("nan"), "a,b": 3}, STATE)
    sink.write({"kind": "pass", "loss": 1e-30}, STATE)
    sink.close()

    assert table(tmp_path / "log.csv") == [
        {"kind": "iterations", "loss": "0.1", "a,b": ""},
        {"kind": "pass", "loss": "nan", "a,b": "3"},
        {"kind": "pass", "loss": "1e-30", "a,b": ""},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_a_table_is_rewound_to_its_mark_though_it_has_grown_wider(tmp_path):
    """The mark counts rows; bytes have moved."""
    sink = lt.sinks.CSV(tmp_path / "log.csv")
    sink.write({"loss": 1}, STATE)
    mark = sink.mark()
    sink.write({"loss": 2, "more": 2}, STATE)
    sink.write({"loss": 3}, STATE)
    sink.close()
    with (tmp_path / "log.csv").open("a") as file:
        file.write("4")  # the process was killed here

    again = sink.fresh()
    again.rewind(mark)
    again.write({"loss": 2, "other": 5}, STATE)
    again.close()

    assert table(tmp_path / "log.csv") == [
        {"loss": "1", "more": "", "other": ""},
        {"loss": "2", "more": "", "other": "5"},
    ]
    assert again.mark() == 2


@pytest.mark.parametrize("mark", [0, 1, 2, 3])
def test_a_table_is_cut_to_so_many_rows(tmp_path, mark):
    """One more or less would be a row twice, or none."""
    sink = lt.sinks.CSV(tmp_path / "log.csv")
    for loss in (1, 2, 3):
        sink.write({"loss": loss}, STATE)
    sink.rewind(mark)
    sink.close()

    assert [row["loss"] for row in table(tmp_path / "log.csv")] == ["1", "2", "3"][:mark]


def test_another_runs_table_is_set_aside(tmp_path):
    """As log.jsonl is."""
    for loss in (1, 2):
        sink = lt.sinks.CSV(tmp_path / "log.csv")
        sink.rewind(None)
        sink.write({"loss": loss}, STATE)
        sink.close()

    assert table(tmp_path / "log.1.csv") == [{"loss": "1"}]
    assert table(tmp_path / "log.csv") == [{"loss": "2"}]


def test_time_left_is_readable():
    """Hours, minutes and seconds."""
    assert [readable("eta", seconds) for seconds in (0.4, 59.6, 3725, 90000)] == [
        "0:00:00",
        "0:01:00",
        "1:02:05",
        "25:00:00",
    ]
    assert readable("eta", float("nan")) == "nan"


def test_values_of_single_layers_are_left_out_of_lines():
    """There may be hundreds of them."""
    lines = []
    row = {
        "kind": "pass",
        "phase": "val",
        "epoch": 0,
        "seconds": 0,
        "loss": 1.0,
        "eta": 61.0,
        "grad_norm/fc.weight": 2.0,
    }
    lt.sinks.Lines(lines.append).write(row, STATE)

    assert lines == ["val    epoch 1  loss 1  eta 0:01:01  0.0 s"]
