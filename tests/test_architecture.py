"""The house rules: which file may import which, what stands alone, what never appears."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cliptteacher"
FILES = sorted(PACKAGE.rglob("*.py"))
PROGRAMS = sorted((PACKAGE.parent / "examples").glob("*.py"))
IDS = [str(path.relative_to(PACKAGE)) for path in FILES]

# A room may import those of lower levels, and of its own level what is named beside it.
LEVELS = {
    **dict.fromkeys(
        ("kmeans", "fusion", "losses", "metrics", "vla", "logits", "sliding", "palette"), 0
    ),
    **dict.fromkeys(
        ("files", "download", "options", "distributed", "command_line", "tensors", "checkpoint"), 0
    ),
    **dict.fromkeys(
        ("clip", "segmenters", "data", "glm", "plm", "drawing", "synonyms", "pages"), 1
    ),
    **dict.fromkeys(("framework", "transductive", "inference", "visualize"), 2),
    **dict.fromkeys(("evaluation", "export", "training"), 3),
    **dict.fromkeys(("report", "__main__"), 4),
}
BESIDE = {
    "download": {"files"},
    "tensors": {"files"},
    "checkpoint": {"files", "logits", "tensors"},
    "command_line": {"files"},
    "framework": {"transductive"},
}
ROOT = {
    "IGNORE_INDEX",
    "PADDING_INDEX",
    "__version__",
}  # what the rooms take from the package itself
LEAVES = ("kmeans", "fusion", "losses", "metrics", "logits", "sliding")
PACKAGES = {"torch", "torchvision", "ftfy", "regex", "numpy", "PIL"}
ALONE = (*LEAVES, "vla", "distributed", "clip/model")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """Top-level packages that a file imports, and the rooms of this package."""
    packages: set[str] = set()
    rooms: set[str] = set()
    here = path.relative_to(PACKAGE.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            whole = [*base, *(node.module.split(".") if node.module else ())]
            if whole == ["cliptteacher"]:  # from . import room
                found = [f"cliptteacher.{alias.name}" for alias in node.names]
            else:
                found = [".".join(whole)]
        for name in found:
            first, *rest = name.split(".")
            if first == "cliptteacher":
                rooms.add(rest[0] if rest else "")
            else:
                packages.add(first)
    return packages, rooms


def attributes(path: Path) -> set[str]:
    """Every dotted name that a file uses, such as ``torch.load``."""
    return {
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def test_every_room_has_a_level() -> None:
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert rooms == set(LEVELS)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_point_down(path: Path) -> None:
    _, rooms = imports_of(path)
    own = room_of(path)
    for room in rooms - {own} - ROOT:
        lower = own == "__init__" or LEVELS[room] < LEVELS[own]
        assert lower or room in BESIDE.get(own, ()), f"{own} may not import {room}"


def test_training_and_prediction_do_not_know_each_other() -> None:
    reached = {room: rooms_reached_from(room) for room in LEVELS}
    for room in ("training", "framework", "glm", "plm", "checkpoint"):
        assert not {"inference", "evaluation"} & reached[room], room
    for room in ("inference", "evaluation", "visualize"):
        assert not {"training", "framework", "glm", "plm"} & reached[room], room


def rooms_reached_from(room: str) -> set[str]:
    """Every room that a room imports, directly or through others."""
    found: set[str] = set()
    waiting = [room]
    while waiting:
        own = waiting.pop()
        for path in FILES:
            if room_of(path) == own:
                new = imports_of(path)[1] - found - ROOT - {own}
                found |= new
                waiting += new
    return found


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_only_the_runtime_packages_are_imported(path: Path) -> None:
    packages, _ = imports_of(path)
    assert packages <= PACKAGES | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_programs_stand_above_everything_and_alone(path: Path) -> None:
    """They know the package and its runtime packages; no program imports another."""
    packages, _ = imports_of(path)
    extra = {"plot.py": {"matplotlib"}, "export.py": {"onnx", "onnxruntime"}}.get(path.name, set())
    assert packages <= PACKAGES | set(sys.stdlib_module_names) | extra


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_import_torch_alone(leaf: str) -> None:
    packages, rooms = imports_of(PACKAGE / f"{leaf}.py")
    assert not rooms
    assert packages <= {"torch"} | set(sys.stdlib_module_names)


def test_leaves_run_alone() -> None:
    """Each is executed from its path in one fresh interpreter that cannot find the package."""
    program = """
import importlib.util, sys
sys.modules["cliptteacher"] = None  # importing it fails, installed or not
for path in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location("leaf_" + path.rsplit("/", 1)[1][:-3], path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    print(module.__name__, len([name for name in vars(module) if not name.startswith("_")]))
assert [name for name in sys.modules if name.startswith("cliptteacher")] == ["cliptteacher"]
"""
    paths = [str(PACKAGE / f"{name}.py") for name in ALONE]
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, *paths], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(ALONE)


def test_importing_the_package_loads_no_torch_and_costs_nothing() -> None:
    program = (
        "import time; start = time.perf_counter(); import cliptteacher, sys; "
        "print(time.perf_counter() - start, *{'torch', 'numpy', 'PIL'} & set(sys.modules))"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True, text=True, check=True, cwd=PACKAGE.parent,
        )  # fmt: skip
        spent, *loaded = done.stdout.split()
        assert not loaded
        seconds.append(float(spent))
    assert min(seconds) < 0.2


def test_every_public_name_resolves() -> None:
    import cliptteacher

    for name in cliptteacher.__all__:
        assert getattr(cliptteacher, name) is not None
        assert name in dir(cliptteacher)
    with pytest.raises(AttributeError, match="has no attribute 'CLIPTeacherr'"):
        cliptteacher.CLIPTeacherr  # noqa: B018
    assert cliptteacher.training.optimizer.parameter_groups is not None
    with pytest.raises(AttributeError, match="has no attribute 'optimiser'"):
        cliptteacher.training.optimiser  # noqa: B018


def test_every_public_name_has_a_type() -> None:
    """Editors see what the block for type checkers imports, each name from its room."""
    import cliptteacher

    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    typed = {
        alias.asname: f"{node.module or ''}.{alias.name}".strip(".")
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    homes = {name: f"{room}.{name}" for name, room in cliptteacher._HOME.items()}
    assert typed == {**homes, **{room: room for room in cliptteacher._ROOMS}}
    assert {*typed, "IGNORE_INDEX", "PADDING_INDEX"} == set(cliptteacher.__all__)


LOADED = [
    # import this                   and none of these is loaded with it
    ("cliptteacher.framework", ("segmenters", "inference", "evaluation", "training", "visualize")),
    ("cliptteacher.inference", ("framework", "glm", "plm", "losses", "training", "evaluation")),
    ("cliptteacher.training.run", ("segmenters", "inference", "evaluation", "framework")),
]


@pytest.mark.parametrize(
    ("module", "absent"), LOADED, ids=lambda item: str(item).rpartition(".")[2]
)
def test_importing_a_room_loads_no_room_that_it_does_not_need(
    module: str, absent: tuple[str, ...]
) -> None:
    program = f"import {module}, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, check=True, cwd=PACKAGE.parent,
    )  # fmt: skip
    loaded = set(done.stdout.split())
    assert module in loaded
    forbidden = [f"cliptteacher.{room}" for room in absent]
    found = [n for n in loaded for f in forbidden if n == f or n.startswith(f"{f}.")]
    assert not found
    if module == "cliptteacher.framework":
        assert not {name for name in loaded if name.startswith("torchvision.models")}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_nothing_forbidden(path: Path) -> None:
    names = attributes(path)
    assert not {name for name in names if name.startswith("torch.jit")}
    assert not {name for name in names if name.endswith(".cuda")} - {
        *("torch.cuda", "torch.version.cuda")
    }
    for call in calls(path):
        function = ast.unparse(call.func)
        assert function not in ("eval", "exec", "pickle.load", "pickle.loads"), function
        assert function != "print" or path == PACKAGE / "training" / "run.py"
        if function == "torch.load":
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert keywords.get("weights_only") == "True", f"line {call.lineno}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_short_files_and_functions(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) else None
            described = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
            assert node.end_lineno - node.lineno + 1 - described <= 60, node.name


def test_the_package_is_typed_and_declared() -> None:
    import tomllib

    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    assert (PACKAGE / "py.typed").exists()
    folders = {path.parent.relative_to(PACKAGE.parent) for path in FILES}
    assert {".".join(f.parts) for f in folders} == set(project["tool"]["setuptools"]["packages"])
    declared = {line.split(">")[0].strip() for line in project["project"]["dependencies"]}
    assert declared == {"torch", "torchvision", "ftfy", "regex", "numpy", "pillow"}
