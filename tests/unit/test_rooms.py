"""The order of the package's rooms. Every import counts, even inside functions and for types."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "pytest_sway"

ORDER = {
    "": (
        "errors system",
        "protocols",
        "spec dlm_sway",
        "backends",
        "cache comparison",
        "report scores",
        "run",
        "plugin",
    ),
    "backends": (
        "questions",
        "checkpoints",
        "libraries",
        "text",
        "contract view",
        "local",
        "hf mlx api dummy custom",
        "registry",
    ),
    "backends.hf": (
        "sharing",
        "hygiene",
        "loading",
        "sampling",
        "scoring",
        "generation",
        "model",
        "adapters",
        "check",
        "view",
        "heads",
        "backend",
        "builder",
    ),
    "backends.mlx": ("model", "adapters", "scores", "view", "backend", "builder"),
}
"""For a room, its modules and rooms from the lowest up: an arrow may point down only, and never to a neighbour."""

ONLY_IN = {
    ("torch", "peft", "accelerate"): ("backends.hf",),
    ("transformers",): ("backends.hf", "backends.mlx", "backends.libraries"),  # mlx-lm takes its tokenizers from there
    ("mlx", "mlx_lm"): ("backends.mlx",),
    ("httpx",): ("backends.api",),
    ("scipy",): ("comparison",),
    ("jinja2", "markupsafe"): ("report",),
}

NEVER_IN = dict.fromkeys(("cache", "backends", "comparison"), ("pytest", "_pytest", "xdist"))


@dataclass(frozen=True, order=True)
class Arrow:
    """An import of one module by another; the package's modules have names such as ``cache.ledger``."""

    source: str
    target: str
    own: bool = True

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


def arrows(package: Path) -> set[Arrow]:
    modules = {_name(path, package): path for path in package.rglob("*.py")}
    found = set()
    for name, path in modules.items():
        for imported in _imports(ast.parse(path.read_text("utf-8"))):
            target = _of_package(imported, package.name, modules)
            if target is None:
                found.add(Arrow(name, imported.partition(".")[0], own=False))
            elif target != name:
                found.add(Arrow(name, target))
    return found


def _name(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree: ast.Module) -> Iterator[str]:
    """Yield the full path of each import; the last part may be a name in a module."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(str(module), names):
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.Call(
                ast.Name("import_module") | ast.Attribute(attr="import_module"), [ast.Constant(str(name)), *_]
            ):
                yield name


def _of_package(imported: str, package: str, modules: dict[str, Path]) -> str | None:
    parts = imported.split(".")
    if parts[0] != package:
        return None
    inside = parts[1:]
    while ".".join(inside) not in modules:
        inside.pop()
    return ".".join(inside)


def circles(pairs: set[tuple[str, str]]) -> list[set[str]]:
    """Return groups of modules that all reach each other."""
    after: dict[str, set[str]] = {}
    for source, target in pairs:
        after.setdefault(source, set()).add(target)
    reached = {name: _reached(name, after) for name in after}
    groups = {frozenset(other for other in reached[name] if name in reached.get(other, ())) for name in after}
    return [set(group) for group in groups if group]


def _reached(start: str, after: dict[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    pending = [start]
    while pending:
        new = after.get(pending.pop(), set()) - reached
        reached |= new
        pending += new
    return reached


def room_of(module: str) -> str:
    return module.rpartition(".")[0]


def against_the_order(found: set[Arrow]) -> list[str]:
    return sorted(str(arrow) for arrow in found if arrow.own and not _points_down(arrow))


def _points_down(arrow: Arrow) -> bool:
    if not arrow.source:
        return True  # the package itself exports the public names
    if not arrow.target:
        return arrow.source == "plugin"  # which needs the package's finder at each start
    source, target = arrow.source.split("."), arrow.target.split(".")
    shared = 0
    while shared < min(len(source), len(target)) and source[shared] == target[shared]:
        shared += 1
    room = ".".join(source[:shared])
    if room not in ORDER:
        return True
    if shared in (len(source), len(target)):
        return False  # a room's __init__ only states its purpose, so nothing may import it, nor may it import
    heights = {name: height for height, names in enumerate(ORDER[room]) for name in names.split()}
    return heights.get(target[shared], len(heights)) < heights.get(source[shared], -1)


def strangers(found: set[Arrow]) -> list[str]:
    """Return imports of libraries in rooms that may not import them."""
    wrong = []
    for arrow in found:
        if arrow.own:
            continue
        homes = next((homes for libraries, homes in ONLY_IN.items() if arrow.target in libraries), ("",))
        banned = any(arrow.target in libraries and _is_in(arrow.source, room) for room, libraries in NEVER_IN.items())
        if banned or not any(_is_in(arrow.source, home) for home in homes):
            wrong.append(str(arrow))
    return sorted(wrong)


def _is_in(module: str, room: str) -> bool:
    return not room or f"{module}.".startswith(f"{room}.")


@pytest.fixture(scope="module")
def found() -> set[Arrow]:
    return arrows(PACKAGE)


def test_there_is_no_circle_of_modules(found: set[Arrow]) -> None:
    assert circles({(arrow.source, arrow.target) for arrow in found if arrow.own}) == []


def test_every_arrow_points_down(found: set[Arrow]) -> None:
    assert against_the_order(found) == []


def test_a_library_is_imported_in_its_own_room_alone(found: set[Arrow]) -> None:
    assert strangers(found) == []


@pytest.mark.parametrize(
    "room",
    [
        *ORDER,
        "cache",
        "comparison",
        "run",
        "run.serving",
        "spec",
        "system",
        "backends.hf.scoring",
        "backends.hf.generation",
        "backends.text",
    ],
)
def test_a_room_says_its_purpose_and_hands_nothing_on(room: str) -> None:
    tree = ast.parse((PACKAGE.joinpath(*room.split(".")) / "__init__.py").read_text("utf-8"))
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1 or not room  # the package itself exports the public names


def test_a_room_is_no_larger_than_a_reader_remembers() -> None:
    rooms = [path.parent for path in PACKAGE.rglob("__init__.py")]
    modules = {room: len(list(room.glob("[!_]*.py"))) for room in rooms}
    entries = {room: count + len([other for other in rooms if other.parent == room]) for room, count in modules.items()}
    assert {room.name: count for room, count in modules.items() if count > 11} == {}
    assert {room.name: count for room, count in entries.items() if count > 13} == {}


# --- the checks themselves, shown a made-up package -------------------------------------------------------------------


class Made:
    """A package that a test writes; its modules have names as in `Arrow`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, module: str, source: str = "") -> None:
        path = self.folder.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        for room in path.parents:
            if room.is_relative_to(self.folder):
                (room / "__init__.py").touch()
        path.write_text(source)

    def arrows(self) -> set[Arrow]:
        return arrows(self.folder)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    package = Made(tmp_path / "pytest_sway")
    package.write("errors")
    return package


IN_A_FUNCTION = "def later():\n    from pytest_sway.{} import x"
FOR_TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pytest_sway.{} import X"
AT_THE_TOP = "from pytest_sway.{} import x"
BY_NAME = "from importlib import import_module\nx = import_module('pytest_sway.{}')"


@pytest.mark.parametrize("back", [AT_THE_TOP, IN_A_FUNCTION, FOR_TYPES, BY_NAME])
def test_a_circle_is_found_by_whatever_import_closes_it(made: Made, back: str) -> None:
    made.write("cache.ledger", AT_THE_TOP.format("cache.entries"))
    made.write("cache.entries", AT_THE_TOP.format("cache.states"))
    made.write("cache.states", back.format("cache.ledger"))
    made.write("cache.stats", AT_THE_TOP.format("cache.ledger"))
    pairs = {(arrow.source, arrow.target) for arrow in made.arrows() if arrow.own}
    assert circles(pairs) == [{"cache.ledger", "cache.entries", "cache.states"}]


@pytest.mark.parametrize("words", [AT_THE_TOP, IN_A_FUNCTION, FOR_TYPES, BY_NAME])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("backends.mlx.view", "backends.hf.view"),
        ("spec.identity", "backends.registry"),
        ("cache.builds", "run.settings"),
        ("backends.local.pool", "backends.mlx.builder"),
        ("backends.hf.scoring.forward", "backends.hf.model.base"),
        ("system.machine", "errors"),
        ("spec.paths", "somewhere_new.helpers"),
    ],
)
def test_an_arrow_that_points_up_or_aside_is_named(made: Made, source: str, target: str, words: str) -> None:
    made.write(target)
    made.write(source, words.format(target))
    assert against_the_order(made.arrows()) == [f"{source} -> {target}"]


def test_an_arrow_that_points_down_is_allowed(made: Made) -> None:
    made.write("backends.hf.view", AT_THE_TOP.format("errors"))
    made.write("run.session", AT_THE_TOP.format("backends.hf.view"))
    assert against_the_order(made.arrows()) == []


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("backends.mlx.view", "def later():\n    import torch.nn"),
        ("backends.text.chat", "from torch import Tensor"),
        ("backends.checkpoints.sizes", "import transformers"),
        ("run.session", "from importlib import import_module\nimport_module('peft.tuners')"),
        ("cache.ledger", "import pytest"),
        ("backends.hf.view", "from _pytest.config import Config"),
    ],
)
def test_a_library_in_a_room_that_is_not_its_own_is_named(made: Made, source: str, line: str) -> None:
    made.write(source, line)
    assert [arrow.partition(" -> ")[0] for arrow in strangers(made.arrows())] == [source]


def test_a_library_in_its_own_room_is_allowed(made: Made) -> None:
    made.write("backends.hf.loading.model", "def load():\n    import torch, transformers")
    made.write("run.session", "import pytest")
    assert strangers(made.arrows()) == []
