"""The notebooks run from top to bottom, and the outputs that are committed are what they give.

``python tests/test_notebooks.py`` executes them and writes their outputs anew, with nothing of the machine in them.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TIMEOUT_S = 120
MAX_BYTES = 150_000

INSTALLED_IN = re.compile(r"(?:~|[A-Za-z]:)?(?:[/\\][\w.@+ -]+)*[/\\](?=looptools[/\\][\w/\\]+\.py\b)")
OF_A_MACHINE = re.compile(r"/(?:work|tmp|home|root|usr|opt|mnt|var|private|Users)\b|~[/\\]|\b[A-Za-z]:\\|ipykernel_\d")
NUMBER = re.compile(r"-?\d[\d.]*(?:e[-+]?\d+)?")

# pyzmq, on Windows: its sockets need a selector thread beside the event loop, which it starts by itself.
pytestmark = pytest.mark.filterwarnings("ignore:Proactor event loop does not implement add_reader:RuntimeWarning")


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Run the cells of a copy in a fresh kernel of this interpreter, which works in *folder* and knows no settings."""
    for name in ("kernels/python3", "work"):
        (folder / name).mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Python 3 (ipykernel)", "language": "python"}
    (folder / "kernels/python3/kernel.json").write_text(json.dumps(spec))
    folders = ("JUPYTER_PATH", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    environment = dict.fromkeys(folders, str(folder))
    environment["JUPYTER_PLATFORM_DIRS"] = "1"  # else jupyter_core warns that its folders will move
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

    notebook = nbformat.from_dict(notebook)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(folder / "work")}}
    with mock.patch.dict(os.environ, environment):
        os.environ.pop("MPLBACKEND", None)  # the kernel draws into the notebook only if nobody says otherwise
        NotebookClient(
            notebook,
            kernel_name="python3",
            resources=resources,
            timeout=TIMEOUT_S,
            record_timing=False,
            coalesce_streams=True,
        ).execute()
    return scrubbed(notebook)


def scrubbed(notebook: NotebookNode) -> NotebookNode:
    """Without the version of the interpreter, and with looptools' own files named as if they were installed nowhere."""
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in code_cells(notebook):
        cell.metadata = {"tags": tags} if (tags := cell.metadata.get("tags")) else {}
        for output in cell.outputs:
            if output.output_type == "error":
                output.traceback = [INSTALLED_IN.sub("", line) for line in output.traceback]
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def raises(cell: NotebookNode) -> bool:
    return "raises-exception" in cell.metadata.get("tags", [])


def shown(cell: NotebookNode) -> list[tuple[str, str]]:
    """Kind and text of each output of *cell*, numbers aside: they may differ in the last digit on another machine."""
    found = []
    for output in cell.outputs:
        if output.output_type == "error":  # its traceback holds lines of looptools, which may change
            kind, text = "error", f"{output.ename}: {output.evalue}"
        elif output.output_type == "stream":
            kind, text = output.name, output.text
        else:
            kind, text = ", ".join(sorted(output.data)), output.data.get("text/plain", "")
        found.append((kind, " ".join(NUMBER.sub("#", text).split())))
    return found


def texts(node: Any) -> Iterator[str]:
    """All that can be read in a notebook or a piece of one, images aside."""
    if isinstance(node, dict):
        for key, value in node.items():
            if not key.startswith("image/"):
                yield from texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from texts(value)
    elif isinstance(node, str):
        yield node


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(scope="module")
def committed(path: Path) -> NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


@pytest.fixture(scope="module")
def executed(committed: NotebookNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NotebookNode]:
    began = time.perf_counter()
    yield execute(committed, tmp_path_factory.mktemp("notebook"))
    assert time.perf_counter() - began < TIMEOUT_S


def test_runs_from_top_to_bottom(executed):
    """No cell raises, but those tagged ``raises-exception``, and those do."""
    for cell in code_cells(executed):
        failed = any(output.output_type == "error" for output in cell.outputs)
        assert failed == raises(cell), cell.source


def test_committed_outputs_are_what_the_cells_give(committed, executed):
    """Cells and outputs are those of one run from top to bottom: the same texts, numbers aside, and the same plots."""
    cells = code_cells(committed)

    assert [cell.source for cell in cells] == [cell.source for cell in code_cells(executed)]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [shown(cell) for cell in cells] == [shown(cell) for cell in code_cells(executed)]


def test_plots_and_tracebacks_are_there_to_be_read(committed):
    """A reader sees the plots, and what the exceptions say, without running anything."""
    cells = code_cells(committed)
    images = [
        output.data["image/png"] for cell in cells for output in cell.outputs if "image/png" in output.get("data", ())
    ]

    assert images
    assert all(image.startswith("iVBOR") for image in images)
    for cell in filter(raises, cells):
        assert "looptools: " in "".join(cell.outputs[-1].traceback)


def test_equal_to_the_bit(committed, executed):
    """Wherever a notebook ends a cell with ``torch.equal``, the answer is True, here as in what is committed."""
    for notebook in (committed, executed):
        claims = [cell for cell in code_cells(notebook) if cell.source.splitlines()[-1].startswith("torch.equal(")]

        assert claims
        for cell in claims:
            assert [output.data["text/plain"] for output in cell.outputs if "data" in output][-1] == "True", cell.source


def test_nothing_of_the_machine_is_committed(path, committed):
    """No path (and so no user's name), no time stamp, no version of an interpreter; and a small file."""
    assert [text for text in texts(committed) if OF_A_MACHINE.search(text)] == []
    assert committed.metadata.keys() == {"kernelspec", "language_info"}
    assert committed.metadata.language_info == {"name": "python"}
    assert all(cell.metadata.keys() <= {"tags"} for cell in committed.cells)
    assert path.stat().st_size < MAX_BYTES


@pytest.mark.parametrize(
    ("line", "clean"),
    [
        (
            "File \x1b[92m/home/me/my venv/lib/python3.11/looptools/run.py:126\x1b[39m",
            "File \x1b[92mlooptools/run.py:126\x1b[39m",
        ),
        ("File ~/x/looptools/stepping/stages.py:3, in f", "File looptools/stepping/stages.py:3, in f"),
        (r"File C:\Users\me\looptools\run.py:1", r"File looptools\run.py:1"),
        ("File looptools/run.py:1, and 3 / looptools", "File looptools/run.py:1, and 3 / looptools"),
    ],
)
def test_scrubbing_leaves_only_the_name_of_a_file(line, clean):
    """In a traceback the folder of looptools is left out, whatever it is, and nothing else."""
    assert INSTALLED_IN.sub("", line) == clean
    assert not OF_A_MACHINE.search(clean)


@pytest.mark.parametrize(
    "text",
    ["/work/x", '"/tmp/x"', "(/home/me", "/root/", "~/x", r"C:\Users\me", "/tmp/ipykernel_12/3.py", "/Users/x"],
)
def test_what_tells_of_a_machine_is_found(text):
    """The rule above can fail."""
    assert OF_A_MACHINE.search(text)


def main() -> None:
    """Execute all notebooks, and write their outputs."""
    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            notebook = execute(nbformat.read(path, as_version=4), Path(folder))
            nbformat.write(notebook, path)
            print(f"{path.name}: {time.perf_counter() - began:.1f} s, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
