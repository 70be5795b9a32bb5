"""The house rules, read off the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent / "looptools"
FILES = sorted(path for path in HOUSE.rglob("*.py"))
TREES = {path.relative_to(HOUSE).as_posix(): ast.parse(path.read_text()) for path in FILES}

MODES = {"no_grad", "enable_grad", "inference_mode", "set_grad_enabled", "autocast", "device", "set_default_device"}
MODES |= {"detect_anomaly", "set_detect_anomaly", "use_deterministic_algorithms", "FakeTensorMode", "TorchDispatchMode"}
READERS = {
    "means.py": "the one place where tensors become numbers",
    "generators.py": "NumPy's generator state, never on a device",
}
OPTIONAL = {"tensorboard", "tqdm", "matplotlib", "sklearn", "numpy", "IPython", "safetensors", "torchmetrics"}
OPTIONAL |= {"wandb", "mlflow", "psutil"}

# An arrow may go from a room to itself or to one further down; one room a line, the first match counts.
ROOMS = [
    ("__main__.py", "demo.py", "mmcv/"),
    ("__init__.py",),
    ("run.py",),
    ("curves.py", "trainings.py"),
    ("trials/", "stepping/", "checkpoints/", "order.py", "spent_sources.py", "training_doubt.py"),
    ("cursor.py", "failures.py", "redefined.py", "passes.py", "agenda.py"),
    ("phases.py",),
    ("middleware/",),
    ("links.py",),
    ("pipeline.py", "intervals.py", "schedules/", "sinks/", "groups.py", "data/", "archives/"),
    ("scaling.py", "weighing.py"),
    ("gradients.py",),
    ("figures.py", "options.py", "plain.py", "modes.py", "devices.py", "generators.py", "interrupts.py", "checks.py"),
    ("warn.py", "tracebacks.py"),
    ("state.py", "html.py", "means.py"),
]
UPWARD = {("phases.py", "run.py"): "a phase that is iterated alone is a run of one pass"}


def room(file: str) -> int:
    return next(
        number
        for number, names in enumerate(ROOMS)
        if any(file == n or (n[-1] == "/" and file.startswith(n)) for n in names)
    )


def name_of(node: ast.expr) -> str:
    """The last name of a call's function: ``no_grad`` of ``torch.no_grad()``."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def own_nodes(function: ast.AST):
    """Nodes of a function, without those of functions inside it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            yield child
            yield from own_nodes(child)


def generators(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any(isinstance(n, ast.Yield | ast.YieldFrom) for n in own_nodes(node)):
            yield node


def yields_within_modes(tree: ast.AST) -> list[int]:
    return [
        inner.lineno
        for function in generators(tree)
        for node in own_nodes(function)
        if isinstance(node, ast.With) and any(name_of(item.context_expr) in MODES for item in node.items)
        for inner in own_nodes(node)
        if isinstance(inner, ast.Yield | ast.YieldFrom)
    ]


def bare_nexts(tree: ast.AST) -> list[int]:
    """Calls of next() with one argument in a generator, outside a try that handles StopIteration."""
    found = []
    for function in generators(tree):
        guarded = {
            id(inner)
            for node in own_nodes(function)
            if isinstance(node, ast.Try) and any("StopIteration" in ast.dump(h.type) for h in node.handlers if h.type)
            for statement in node.body
            for inner in ast.walk(statement)
        }
        for node in own_nodes(function):
            is_next = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "next"
            if is_next and len(node.args) == 1 and id(node) not in guarded:
                found.append(node.lineno)
    return found


def reads(tree: ast.AST) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("item", "tolist")
    ]


def type_checking(tree: ast.AST) -> set[int]:
    """Nodes under ``if TYPE_CHECKING``."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    return {id(inner) for block in blocks for statement in block.body for inner in ast.walk(statement)}


def imports(file: str, tree: ast.AST) -> list[tuple[int, str]]:
    """(line, file imported) of every import of looptools itself that counts, also those inside functions."""
    skipped, found = type_checking(tree), []
    folder = file.rpartition("/")[0]
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder.split("/") if folder else []
            base = base[: len(base) - (node.level - 1)]
            path = [*base, *(node.module or "").split(".")] if node.module else base
            for alias in node.names:
                found.append((node.lineno, resolve([p for p in path if p], alias.name)))
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            found += [(node.lineno, "__init__.py") for name in names if name.partition(".")[0] == "looptools"]
    return found


def resolve(path: list[str], name: str) -> str:
    """The file that ``from path import name`` reaches."""
    for candidate in ([*path, name], path):
        stem = "/".join(candidate)
        if f"{stem}.py" in TREES:
            return f"{stem}.py"
        if f"{stem}/__init__.py" in TREES:
            return f"{stem}/__init__.py"
    return "__init__.py"


def optional_imports(tree: ast.Module) -> list[int]:
    """Imports of optional packages that run when the module is imported."""
    found = []
    for node in own_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in type_checking(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [node.lineno for name in names if name.partition(".")[0] in OPTIONAL or "tensorboard" in name]
    return found


@pytest.mark.parametrize("file", TREES)
def test_no_yield_inside_a_mode(file):
    """`with torch.no_grad(): yield` would switch gradients off in the caller's cell."""
    assert yields_within_modes(TREES[file]) == []


@pytest.mark.parametrize("file", TREES)
def test_no_bare_next_in_a_generator(file):
    """PEP 479 turns its StopIteration into a RuntimeError far from its cause."""
    assert bare_nexts(TREES[file]) == []


@pytest.mark.parametrize("file", [file for file in TREES if file not in READERS])
def test_tensors_become_numbers_in_one_place(file):
    """`.item()` and `.tolist()` wait for the device."""
    assert reads(TREES[file]) == []


@pytest.mark.parametrize("file", TREES)
def test_optional_packages_are_imported_when_used(file):
    """`import looptools` must work and be quick without them."""
    assert optional_imports(TREES[file]) == []


@pytest.mark.parametrize("file", TREES)
def test_arrows_between_rooms_go_one_way(file):
    """A file imports from its own room or from one further along."""
    wrong = [
        (line, target)
        for line, target in imports(file, TREES[file])
        if room(target) < room(file) and (file, target) not in UPWARD
    ]

    assert wrong == []


def test_every_exception_to_the_arrows_is_used():
    """What is allowed upward is really there, once, inside a function."""
    for (file, target), why in UPWARD.items():
        assert [t for _, t in imports(file, TREES[file])].count(target) == 1, why


@pytest.mark.parametrize(
    ("check", "source"),
    [
        (yields_within_modes, "def f(s):\n with torch.no_grad():\n  for x in s:\n   yield x"),
        (yields_within_modes, "def f(s):\n with open(p), torch.autocast('cpu'):\n  yield from s"),
        (bare_nexts, "def f(s):\n x = next(s)\n yield x"),
        (bare_nexts, "def f(s):\n try:\n  yield next(s)\n except ValueError:\n  pass"),
        (reads, "x.item()"),
        (reads, "x.detach().tolist()"),
        (optional_imports, "import tqdm"),
        (optional_imports, "try:\n from torch.utils.tensorboard import SummaryWriter\nexcept ImportError:\n pass"),
    ],
)
def test_each_rule_finds_what_breaks_it(check, source):
    """The rules above can fail."""
    assert check(ast.parse(source))


@pytest.mark.parametrize(
    ("check", "source"),
    [
        (yields_within_modes, "def f(s):\n for x in s:\n  with torch.no_grad():\n   g(x)\n  yield x"),
        (yields_within_modes, "def f():\n with torch.no_grad():\n  def g():\n   yield 1\n  return g\n yield"),
        (bare_nexts, "def f(s):\n try:\n  x = next(s)\n except StopIteration:\n  return\n yield x"),
        (bare_nexts, "def f(s):\n yield next(s, None)"),
        (bare_nexts, "def f(s):\n return next(s)"),
        (optional_imports, "def f():\n import tqdm"),
    ],
)
def test_no_rule_finds_what_keeps_it(check, source):
    """And they find nothing where nothing is."""
    assert not check(ast.parse(source))


def test_the_core_can_be_read_in_one_sitting():
    """state, pipeline, phases and cursor stay near 600 lines together, docstrings and blank lines aside."""

    def code_lines(file):
        text, tree = (HOUSE / file).read_text().splitlines(), TREES[file]
        documented = {ast.Module, ast.ClassDef, ast.FunctionDef}
        docs = {
            line
            for node in ast.walk(tree)
            if type(node) in documented and ast.get_docstring(node) is not None
            for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)
        }
        return sum(
            bool(line.strip()) and not line.strip().startswith("#") and n not in docs for n, line in enumerate(text, 1)
        )

    core = ["state.py", "pipeline.py", "phases.py", "cursor.py"]
    assert sum(map(code_lines, core)) < 600
    assert sum(map(code_lines, [*core, "links.py", "passes.py"])) < 800  # what was split off the cursor
    assert max(map(code_lines, TREES)) < 300


def test_all_is_sorted_and_true():
    """`__all__` lists what is public, sorted."""
    import looptools

    assert looptools.__all__ == sorted(looptools.__all__)
    assert all(hasattr(looptools, name) for name in looptools.__all__)
    public = {n for n, value in vars(looptools).items() if getattr(value, "__module__", "").startswith("looptools.")}
    assert {name for name in public if name[0] != "_"} <= set(looptools.__all__)
