"""Imports go one way: from training down to core, and never back.

Read from the source, so that an import inside a function counts like any other, and so does
a name of a module in a string (what is loaded on first use).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "lorasmith"

#: Package → level; a package may import from lower levels, and from itself.
LEVELS = {
    "errors": 0,
    "core": 1,
    "init": 2,
    "adapters": 3,
    "io": 4,
    "dynamics": 5,
    "diagnostics": 5,
    # Above the diagnostics for the style of their figures alone.
    "fleet": 6,
    "export": 6,
    "training": 7,
    "cli": 8,
    "web": 8,
}
#: Modules at the top that depend on nothing above them and may be used by all.
FREE = {"progress", "redaction", "theme", "__version__"}
#: File → packages of its own level or above that it may name.
EXCEPTIONS = {
    # Registries know the built-in classes by the names of their modules, and load them on use.
    "core/registry.py": {"adapters"},
    # report.save("x.html"): whoever asks for a page gets what draws it, loaded on use.
    "diagnostics/records.py": {"web"},
    # Calls attach, save and the like as a user would.
    "training/run.py": {""},
}


def package_of(module: str) -> str:
    """``lorasmith.core.layers`` → ``core``; ``""`` for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def is_module(name: str) -> bool:
    """Whether there is a module of that name: other strings look like one."""
    path = SOURCE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and module of everything of lorasmith that a file imports, or names in a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            if node.module == "lorasmith":
                for alias in node.names:
                    yield node.lineno, f"lorasmith.{alias.name}"
            elif node.module is not None:
                yield node.lineno, node.module
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"lorasmith(\.[a-z_]+)+", node.value)
            and is_module(node.value)
        ):
            yield node.lineno, node.value


def upward(file: Path) -> list[str]:
    """Imports of a file that go up, or sideways."""
    place = file.relative_to(SOURCE)
    own = place.parts[0] if len(place.parts) > 1 else place.stem
    found = []
    for line, module in imports(ast.parse(file.read_text(encoding="utf-8"))):
        if module.split(".")[0] != "lorasmith":
            continue
        other = package_of(module)
        if other in FREE or other == own or other in EXCEPTIONS.get(place.as_posix(), ()):
            continue
        if other == "" or other not in LEVELS or LEVELS[other] >= LEVELS[own]:
            found.append(f"{place}:{line} imports {module}")
    return found


def modules(package: str) -> list[Path]:
    folder = SOURCE / package
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [SOURCE / f"{package}.py"]


@pytest.mark.parametrize("package", [p for p in LEVELS if p not in ("cli", "web")])
def test_no_import_goes_up(package: str) -> None:
    if package == "fleet" and not (SOURCE / package).exists():
        pytest.skip("there is no fleet yet")
    assert [line for file in modules(package) for line in upward(file)] == []


def test_every_exception_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(EXCEPTIONS):
        allowed = EXCEPTIONS[name]
        for one in allowed:
            monkeypatch.setitem(EXCEPTIONS, name, allowed - {one})
            assert upward(SOURCE / name), f"{name} no longer names {one!r}"
            monkeypatch.setitem(EXCEPTIONS, name, allowed)


def test_every_package_has_a_level() -> None:
    found = {f.name for f in SOURCE.iterdir() if f.is_dir() and f.name != "__pycache__"}
    assert found <= set(LEVELS)


def test_an_import_that_goes_up_is_seen() -> None:
    for code in (
        "def f():\n    from lorasmith.training.models import load_model\n",
        "import lorasmith.cli.app\n",
        "import_module('lorasmith.web.report')\n",
        "from lorasmith import load\n",
    ):
        ((_, module),) = imports(ast.parse(code))
        assert module.startswith("lorasmith.")
        assert LEVELS.get(package_of(module), 99) > LEVELS["diagnostics"]
