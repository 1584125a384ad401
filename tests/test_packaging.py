"""What the package promises as a package: its names, its types, its speed to import, its docs."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

import lorasmith

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "lorasmith"
HEAVY = ("torch", "transformers", "datasets", "numpy", "matplotlib", "jinja2", "peft")
HELP = """
import contextlib, sys
import lorasmith.cli
sys.argv = ["lorasmith", "--help"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(sys.stderr):
    lorasmith.cli.main()
"""


def _python(*arguments: str, folder: Path | None = None) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
        check=False,  # the assertion below shows the output
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "statement",
    [
        "import lorasmith",
        "import lorasmith; lorasmith.__version__; dir(lorasmith)",
        "import lorasmith.errors",
        "import lorasmith.cli",
        "import lorasmith.web",
        # `lorasmith --help` as the console script runs it.
        HELP,
    ],
)
def test_importing_is_light(statement: str) -> None:
    show = f"print([name for name in {HEAVY!r} if name in sys.modules])"
    assert _python("-c", f"{statement}\nimport sys\n{show}").strip() == "[]"


def test_exported_names_are_the_whole_public_api() -> None:
    # Names that are modules (submodules appear once imported) are not part of the list unless
    # exported on purpose.
    assert lorasmith.__all__ == sorted(lorasmith.__all__, key=lambda name: (name[0] != "_", name))
    assert len(set(lorasmith.__all__)) == len(lorasmith.__all__)
    for name in lorasmith.__all__:
        assert getattr(lorasmith, name) is not None, name
    assert set(lorasmith.__all__) <= set(dir(lorasmith))


def test_the_names_seen_by_type_checkers_are_those_that_exist_at_run_time() -> None:
    source = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    block = source.split("if TYPE_CHECKING:", 1)[1].split("\n__all__", 1)[0]
    typed = set(re.findall(r"import (\w+) as \1\b", block))
    assert typed == set(lorasmith.__all__) - {"__version__"}


def test_exported_objects_come_from_the_module_they_say() -> None:
    code = (
        "import lorasmith\n"
        "for name in lorasmith.__all__:\n"
        "    if name != '__version__':\n"
        "        module = __import__(lorasmith._EXPORTS[name], fromlist=[name])\n"
        "        assert getattr(lorasmith, name) is getattr(module, name) "
        "or name == 'adapters', name\n"
    )
    _python("-c", code)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        lorasmith.no_such_name  # noqa: B018


def test_typed_and_templates_are_beside_the_code() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert {path.name for path in (PACKAGE / "web" / "templates").iterdir()} == {
        "report.css",
        "report.html",
        "report.js",
    }


@pytest.mark.integration
def test_the_wheel_holds_all_that_the_package_needs(tmp_path: Path) -> None:
    import zipfile

    pytest.importorskip("hatchling", reason="hatchling builds the wheel")
    _python("-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path), folder=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        path.relative_to(ROOT / "src").as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources <= names
    info = f"lorasmith-{lorasmith.__version__}.dist-info"
    assert f"{info}/licenses/LICENSE" in names
    assert f"{info}/licenses/NOTICE" in names
    assert not [name for name in names if not name.startswith(("lorasmith/", f"{info}/"))]


def test_the_version_is_the_same_everywhere() -> None:
    declared = re.search(
        r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert declared is not None
    assert declared[1] == lorasmith.__version__ == metadata.version("lorasmith")


def test_the_lock_pins_every_direct_requirement_inside_its_range() -> None:
    from packaging.requirements import Requirement

    lock = (ROOT / "requirements" / "dev.lock").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lock if line and not line.startswith("#"))
    wanted = [Requirement(text) for text in metadata.requires("lorasmith") or ()]
    development = [
        one
        for one in wanted
        if one.name != "lorasmith"
        and (
            one.marker is None
            or any(one.marker.evaluate({"extra": extra}) for extra in ("train", "plots", "dev"))
        )
    ]
    assert len(development) > 20
    for one in development:
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        assert name in pins, f"{name} is not in requirements/dev.lock"
        assert one.specifier.contains(pins[name]), f"{name}=={pins[name]} is not {one.specifier}"


# Documentation ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Code:
    """A fenced block of Python in a Markdown file."""

    file: str
    line: int
    text: str
    runnable: bool


def _blocks(path: Path) -> list[Code]:
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [
        Code(
            path.name,
            text[: found.start()].count("\n") + 1,
            textwrap.dedent(found["code"]),
            "runnable" in found["info"].split(),
        )
        for found in re.finditer(
            r"^(?P<indent> *)```python(?P<info>[^\n]*)\n(?P<code>.*?)^(?P=indent)```",
            text,
            re.DOTALL | re.MULTILINE,
        )
    ]


BLOCKS = [
    block
    for name in ("README.md", "CONTRIBUTING.md", "docs/*.md")
    for path in sorted(ROOT.glob(name))
    for block in _blocks(path)
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.file}:{block.line}")
def test_code_in_the_documentation_is_python(block: Code) -> None:
    compile(block.text, f"{block.file}:{block.line}", "exec")


@pytest.mark.integration
@pytest.mark.parametrize(
    "block",
    [block for block in BLOCKS if block.runnable],
    ids=lambda block: f"{block.file}:{block.line}",
)
def test_code_marked_runnable_runs(block: Code, tmp_path: Path) -> None:
    _python("-W", "error", "-c", block.text, folder=tmp_path)


@pytest.mark.integration
def test_the_variant_shown_to_contributors_works(tmp_path: Path) -> None:
    (block,) = [one for one in _blocks(ROOT / "CONTRIBUTING.md") if one.runnable]
    check = """
import lorasmith as ls
from torch import nn
ls.register(Gain())
model, x = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), torch.randn(4, 5)
base = model(x)
adapter = ls.attach(model, GainConfig())
assert torch.equal(model(x), base)
assert adapter.num_parameters() == 7 + 3
with torch.no_grad():
    for parameter in adapter.parameters():
        parameter.mul_(2)
hidden = (2 * model[0].weight @ x.T + 2 * model[0].bias[:, None]).relu()
expected = (2 * model[2].weight @ hidden + 2 * model[2].bias[:, None]).T
torch.testing.assert_close(model(x), expected)
ls.save(model, "gain")
ls.detach(model)
assert torch.equal(model(x), base)
ls.load(model, "gain")
torch.testing.assert_close(model(x), expected)
ls.fuse(model)
torch.testing.assert_close(model(x), expected)
ls.unfuse(model)
ls.detach(model)
assert torch.equal(model(x), base)
"""
    _python("-c", block.text + check, folder=tmp_path)
