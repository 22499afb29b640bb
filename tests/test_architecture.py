"""The shape of the house, read from the imports: one-way directions, and no torch where it must not be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES = 350
# Places that exist on one machine only. In classes of one letter, so that this file passes its own test.
FORBIDDEN = re.compile(r"/[w]ork/|/[r]oot/|/[h]ome/(?!gorgon)\w|pypi[.]org|pythonhosted[.]org")

# What each package may import of ours, besides itself.
ALLOWED = {
    "cli": {"server", "training", "evaluation", "bench", "engine", "heads", "trees"},
    "server": {"engine", "heads", "trees"},
    "training": {"engine", "heads", "trees"},
    "evaluation": {"bench", "engine", "heads", "trees"},
    "bench": {"engine", "heads", "trees"},
    "engine": {"heads", "trees"},
    "heads": set(),
    "trees": set(),
}
# What each room of the engine may import of its other rooms, from top to bottom. PLAIN_DATA stands below all
# rooms, and every other module of the engine's own folder, such as engine.py and build.py, above them.
ROOMS = {
    "runner": {"drafting", "speculation", "constraints", "batch", "backends", "model"},
    "scheduling": {"drafting", "speculation", "constraints", "batch"},
    "drafting": {"batch", "backends", "model"},
    "speculation": {"batch"},
    "constraints": {"batch", "text"},
    "batch": set(),
    "backends": {"model"},
    "model": {"text", "files"},
    "text": {"files"},
    "files": set(),
}
PLAIN_DATA = {"config", "costs", "errors", "host", "messages"}
SOURCES = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]
WITHOUT_TORCH = (
    "server/",
    "engine/scheduling/",
    "engine/speculation/",
    "engine/text/",
    "engine/files/",
    "heads/registry/",
    "engine/batch",
    "engine/costs",
    "engine/messages",
    "engine/client",
    "engine/child",
    "engine/host",
    "engine/watchdog",
    "trees/family",
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Modules that a file imports, by full name. Blocks under `if TYPE_CHECKING` do not run and do not count
    where only the top level is asked for."""
    tree = ast.parse(path.read_text())
    nodes: list[ast.stmt] | Iterator[ast.AST] = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"{'.' * node.level}{node.module or ''}"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def dependencies() -> dict[str, set[str]]:
    """Our modules, and which others each imports anywhere, in functions and for type checkers too."""
    modules = {module_of(path): path for path in SOURCES if path.name != "__init__.py"}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = set(imports(path))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        found[module] = names & modules.keys()
    return found


def room_of(module: str) -> str | None:
    """The room of a module of the engine; None for modules that stand above the rooms."""
    package, name, *_ = *module.split("."), ""
    return name if package == "engine" and name in ROOMS.keys() | PLAIN_DATA else None


def top_packages(modules: Iterator[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    for module in imports(path):
        top = module.split(".")[0]
        assert not module.startswith("."), f"relative import of {module}"
        assert top != "tests"
        if top in ALLOWED and top != package:
            assert top in ALLOWED[package], f"{package} must not import {module}"


def test_rooms_of_the_engine_import_one_way() -> None:
    folders = {path.parent.name for path in (ROOT / "engine").glob("*/__init__.py")}
    assert folders <= ROOMS.keys(), "a room that the table does not know"
    shortcuts = set()
    for module, others in dependencies().items():
        room = room_of(module)
        if room is not None:
            allowed = {room, *ROOMS.get(room, ()), *PLAIN_DATA}
            shortcuts |= {
                (module, o) for o in others if o.startswith("engine.") and room_of(o) not in allowed
            }
    assert not shortcuts


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = dependencies()
    assert not [module for module in graph if module in reachable(graph, module)]


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = [*graph[start]]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += graph[module]
    return found


def test_nobody_knows_the_inside_of_a_backend() -> None:
    """But the table of all backends, and those that build on another one."""
    inside = re.compile(r"engine[.]backends[.](torch|native|triton)[.]")
    for module, others in dependencies().items():
        if module != "engine.backends.choose" and not inside.match(module):
            assert not [other for other in others if inside.match(other)], module


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_tests_import_absolutely(path: Path) -> None:
    assert not [module for module in imports(path) if module.startswith(".")]


@pytest.mark.parametrize("path", [p for p in SOURCES if name_of(p).startswith(WITHOUT_TORCH)], ids=name_of)
def test_no_torch_beside_the_device(path: Path) -> None:
    assert "torch" not in top_packages(imports(path))
    # Old formats of tokenizers are converted by transformers, which is imported when one is found.
    converts = name_of(path) == "engine/text/tokenizer.py"
    assert "transformers" not in top_packages(imports(path, top_level_only=converts))


@pytest.mark.parametrize("path", [p for p in SOURCES if name_of(p).startswith("cli/")], ids=name_of)
def test_commands_import_nothing_heavy_at_the_top(path: Path) -> None:
    light = {
        "cli",
        "engine.errors",
        "heads.defaults",
        "heads.errors",
        "trees.family",
        *sys.stdlib_module_names,
    }
    for module in imports(path, top_level_only=True):
        assert module in light or module.split(".")[0] in light, f"{module} belongs into the handler"


@pytest.mark.parametrize(
    "package",
    ["server", "engine.scheduling", "engine.speculation", "engine.text", "engine.files", "heads.registry"],
)
def test_no_torch_gets_in_through_others(package: str) -> None:
    folder = ROOT / package.replace(".", "/")
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted(folder.rglob("*.py"))
        if path.name != "__init__.py"
    ]
    code = f"""
import importlib, sys
for module in {modules!r}:
    importlib.import_module(module)
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or f"importing {package} imports torch"


@pytest.mark.parametrize("path", [p for p in [*SOURCES, *TESTS] if p.name == "__init__.py"], ids=name_of)
def test_package_files_are_empty(path: Path) -> None:
    assert path.read_text() == ""


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "__init__.py"], ids=name_of)
def test_every_module_says_why_it_exists(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=name_of)
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_packages_are_listed_and_tests_are_not_shipped() -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(document["tool"]["setuptools"]["packages"])
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in SOURCES if p.name == "__init__.py"}
    assert listed == found
    assert set(document["tool"]["mypy"]["files"]) == set(ALLOWED)


def tracked_files() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name.decode() for name in done.stdout.split(b"\0") if name]


def test_no_machine_paths_or_index_hosts_in_tracked_files() -> None:
    for path in tracked_files():
        if path.suffix in (".safetensors",) or not path.is_file():
            continue
        match = FORBIDDEN.search(path.read_text(encoding="utf-8"))
        assert match is None, f"{name_of(path)} names {match and match[0]}"
