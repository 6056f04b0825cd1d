"""The house keeps its shape: who imports whom, how long a file is, and what no file may call."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "bondlm"
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
BESIDE = ("tests", "benchmarks", "examples", "tools")
ALL_FILES = FILES + sorted(path for folder in BESIDE for path in (ROOT / folder).rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 80

HOMES = {"BONDConfig": "config", "BONDTrainer": "trainer"}  # names of the package itself
FLAT = {"__init__", "__main__", "errors", "trainer"}  # the modules that lie beside the packages


def table_of_imports() -> dict[str, set[str]]:
    """Room -> the rooms that it may import, from the table in CONTRIBUTING.md; the order of its rows is the order of
    the house.
    """
    rooms: dict[str, set[str]] = {}
    for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines():
        cells = [re.findall(r"`(\w+)`", cell) for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and len(cells[0]) == 1:
            rooms[cells[0][0]] = set(cells[2])
    return rooms


IMPORTS = table_of_imports()


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.Module, path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of bondlm, at the top or in a function body."""
    for node in ast.walk(tree):
        for name in imported_names(node, path):
            parts = name.split(".")
            if parts[0] == "bondlm" and len(parts) > 1:
                yield getattr(node, "lineno", 0), HOMES.get(parts[1], parts[1])


def imported_names(node: ast.AST, path: Path) -> list[str]:
    """Full names that a statement or a call of `import_module` imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{path}:{node.lineno}: a relative import"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        return [str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant)]
    return []


def test_rooms_import_exactly_what_the_table_says() -> None:
    """No room imports another than its row names, and no row names one that is not imported any more."""
    seen: dict[str, set[str]] = {room_of(path): set() for path in FILES}
    for path in FILES:
        seen[room_of(path)] |= {room for _, room in imported_rooms(TREES[path], path)} - {room_of(path), "__version__"}
    del seen["__init__"]  # the package itself: it imports on first use
    assert seen == IMPORTS


def test_imports_run_one_way() -> None:
    """Each row of the table names rows above it alone, so that no two rooms can need each other."""
    order = list(IMPORTS)
    for room, others in IMPORTS.items():
        assert {other for other in others if order.index(other) >= order.index(room)} == set(), room


def test_few_modules_lie_flat_and_every_package_says_what_lives_there() -> None:
    assert {path.stem for path in SOURCE.glob("*.py")} == FLAT
    for path in SOURCE.rglob("__init__.py"):
        assert len(ast.get_docstring(TREES[path]) or "") > 40, path


def test_every_package_has_its_folder_of_tests() -> None:
    for path in SOURCE.rglob("__init__.py"):
        folder = ROOT / "tests" / path.parent.relative_to(SOURCE)
        assert list(folder.glob("test_*.py")), folder


def test_the_check_of_dependencies_sees_every_kind_of_import() -> None:
    code = (
        "import bondlm.cli\n"
        "from bondlm.trainer import BONDTrainer\n"
        "from bondlm import BONDConfig, evaluation\n"
        "def f():\n    from bondlm.rollout.samples import draw\n    import_module('bondlm.report')\n"
    )
    rooms = [room for _, room in imported_rooms(ast.parse(code), Path("x"))]
    assert sorted(rooms) == ["cli", "config", "evaluation", "report", "rollout", "trainer"]


POSIX_ONLY = {"fcntl", "resource", "pwd", "grp", "termios", "pty"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_imported_that_windows_lacks(path: Path) -> None:
    names = {name.split(".")[0] for node in TREES[path].body for name in imported_names(node, path)}
    assert not names & POSIX_ONLY


def attributes_of_self(node: ast.AST) -> Iterator[ast.Attribute]:
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute) and isinstance(child.value, ast.Name) and child.value.id == "self":
            yield child


def test_no_private_attribute_of_transformers_trainer_is_used() -> None:
    (owner,) = [
        node
        for node in ast.walk(TREES[SOURCE / "trainer.py"])
        if isinstance(node, ast.ClassDef) and node.name == "BONDTrainer"
    ]
    private = {a.attr for a in attributes_of_self(owner) if a.attr.startswith("_") and not a.attr.startswith("__")}
    stored = {a.attr for a in attributes_of_self(owner) if isinstance(a.ctx, ast.Store)}
    methods = {node.name for node in owner.body if isinstance(node, ast.FunctionDef)}
    assert private - stored - methods == set()
    # Nor is one replaced: our names are no names of theirs.
    theirs = set(re.findall(r"self\.(_\w+)", inspect.getsource(transformers.Trainer))) | set(dir(transformers.Trainer))
    ours = {name for name in stored | methods if name.startswith("_") and not name.startswith("__")}
    assert ours & theirs == set()
    assert len(ours) > 5  # the check sees something
    for call in ast.walk(owner):
        if isinstance(call, ast.Attribute) and isinstance(call.value, ast.Call):
            assert getattr(call.value.func, "id", "") != "super" or not re.match(r"_[^_]", call.attr), call.attr


def test_nobody_else_uses_a_private_attribute_of_a_trainer() -> None:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr):
                holder = ast.unparse(node.value)
                assert not holder.endswith("trainer"), f"{path}:{node.lineno}: {holder}.{node.attr}"


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(TREES.get(path) or ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno + 1 <= MAX_FUNCTION_LINES, f"{path}:{node.lineno}: {node.name}"


def problems(tree: ast.Module, *, may_print: bool = False) -> list[str]:
    """Calls that the house forbids, with their lines."""
    found = []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name == "print" and not may_print:
                found.append(f"{line}: print")
            runs_code = not any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            if name in ("pickle.load", "pickle.loads", "eval", "exec") or (name == "torch.load" and runs_code):
                found.append(f"{line}: {name}")
            for keyword in node.keywords:
                value = keyword.value
                if keyword.arg == "trust_remote_code" and not (isinstance(value, ast.Constant) and not value.value):
                    found.append(f"{line}: trust_remote_code")
        elif isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            if caught in ("", "Exception", "BaseException") and not any(
                isinstance(child, ast.Raise) for child in ast.walk(node)
            ):
                found.append(f"{line}: except {caught}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_forbidden_call(path: Path) -> None:
    assert problems(TREES[path], may_print=room_of(path) == "cli") == []


@pytest.mark.parametrize(
    "code",
    [
        "print(1)",
        "torch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.load('x', weights_only=flag)",
        "pickle.loads(b'')",
        "load(trust_remote_code=True)",
        "load(trust_remote_code=flag)",
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept:\n    pass",
    ],
)
def test_the_check_of_forbidden_calls_sees_them(code: str) -> None:
    assert len(problems(ast.parse(code))) == 1
