"""A variant of the user's own, with --plugin: the example, from training to generating."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lorasmith as ls
from lorasmith.cli import main, plugins
from lorasmith.core import registry
from lorasmith.errors import ConfigError

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "own_variant"
FILE = FOLDER / "my_variant.py"


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers and imports is gone afterwards, as in a new process."""
    ls.variants()
    monkeypatch.setattr(registry, "_VARIANTS", dict(registry._VARIANTS))
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("lorasmith_plugin_"):
            del sys.modules[name]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str | Path) -> Any:
        capfd.readouterr()
        code = main([str(a) for a in (*arguments, "--json")])
        out, err = capfd.readouterr()
        found = json.loads(out)
        assert (code == 0) == ("error" not in found), err
        return found

    return run


def test_the_example_from_training_to_generating(
    call: Any, base: Path, rows: Path, tmp_path: Path
) -> None:
    plugin, run = ("--plugin", FILE), tmp_path / "run"
    cpu = ("--device", "cpu")
    listed = {v["name"]: v for v in call("variants", "--model", base, *plugin)["variants"]}
    mine = listed["two_gains"]
    assert (mine["family"], mine["fuses"], mine["quantized_base"]) == ("gain", True, "yes")
    # A tiny Llama of hidden size 32 with 48 inside, 4 heads, 2 of them for keys, two blocks.
    wanted = 2 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 48) * 2 + (48 + 32))
    assert mine["parameters"] == wanted
    trained = call(
        *("train", base, rows, "-o", run, "--steps", "8", "--lr", "5e-2", *cpu, *plugin),
        *("--adapter.variant", "two-gains", "--adapter.options.start", "1.0"),
    )
    assert trained["adapter"]["variant"] == "two_gains"
    assert trained["trainable_parameters"] == wanted
    info = call("info", run, *plugin)
    assert (info["variant"], info["parameters"]) == ("two_gains", wanted)
    before = call("eval", base, rows, "--no-exact-match", *cpu)
    after = call("eval", base, rows, "--no-exact-match", "-a", run, *cpu, *plugin)
    assert after["loss"] < before["loss"]
    assert after["loss"] == pytest.approx(trained["losses"][-1]["loss"], rel=0.5)
    words = call("generate", base, "Count to 3.", "-a", run, *cpu, *plugin, "--max-new-tokens", "4")
    assert words["adapter"] == str(run)
    lora = call("convert", run, "-o", tmp_path / "lora", "--r", "48", "--model", base, *plugin)
    assert lora["max_relative_error"] < 1e-6
    same = call("eval", base, rows, "--no-exact-match", "-a", tmp_path / "lora", *cpu)
    assert same["loss"] == pytest.approx(after["loss"], rel=1e-4)


def test_without_the_plugin_the_files_run_nothing(base: Path, tmp_path: Path) -> None:
    """The folder names no code, and in a new process nobody knows the variant."""
    plugins.load_plugins([str(FILE)])
    from lorasmith.training.models import load_model

    model, _ = load_model(base, device="cpu")
    config = ls.config_from_dict({"variant": "two_gains", "start": 2.0})
    ls.attach(model, config)
    ls.save(model, tmp_path / "a")
    command = [sys.executable, "-m", "lorasmith.cli", "info", str(tmp_path / "a"), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(ls.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2, done.stderr
    error = json.loads(done.stdout)["error"]
    assert "two_gains" in error["message"]
    assert "--plugin" in error["fix"]
    environment[plugins.VARIABLE] = str(FILE)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert json.loads(done.stdout)["config"]["start"] == 2.0


def test_the_entry_point_is_the_registered_variant() -> None:
    """What ``pip install`` would add: the registry loads the object that the file registers."""
    text = (FOLDER / "pyproject.toml").read_text()
    assert 'two_gains = "my_variant:VARIANT"' in text
    (module,) = plugins.load_plugins([str(FILE)])
    assert registry.register(module.VARIANT) is ls.variants()["two_gains"]


def test_it_is_a_variant_like_any_other() -> None:
    from tests.models import mlp, randomise

    plugins.load_plugins([str(FILE)])
    model: Any = mlp()
    x = torch.randn(4, 6)
    base = model(x)
    adapter = ls.attach(model, ls.config_from_dict({"variant": "two_gains"}))
    assert torch.equal(model(x), base)
    randomise(adapter.parameters())
    hidden = x
    for layer, part in zip((model[0], model[2]), adapter.layers().values(), strict=True):
        hidden = part["g"] * (layer.weight @ (part["h"] * hidden).T).T + part["g"] * layer.bias
        hidden = hidden if layer is model[2] else hidden.tanh()
    torch.testing.assert_close(model(x), hidden)
    ls.fuse(model)
    torch.testing.assert_close(model(x), hidden)


# -- --plugin itself ---------------------------------------------------------------------------


def test_a_plugin_is_imported_once_and_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "counted.py"
    file.write_text("import dataclasses\n@dataclasses.dataclass\nclass C:\n    x: int = 0\n")
    first = plugins.load_plugins([str(file)])
    assert plugins.load_plugins([str(file)])[0] is first[0]
    assert first[0].C().x == 0
    assert "counted" not in sys.modules
    monkeypatch.setenv(plugins.VARIABLE, os.pathsep.join([str(file), "json", ""]))
    assert plugins.load_plugins(["csv"]) == [first[0], json, __import__("csv")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be found"),
        ("raise RuntimeError('odd')", "RuntimeError: odd"),
        ("def", "SyntaxError"),
        ("import no_such_module_at_all", "no_such_module_at_all"),
        ("import lorasmith as ls\nls.register(ls.variants()['lora'].__class__())", "already"),
    ],
)
def test_a_plugin_that_fails(
    content: str | None, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "broken.py"
    if content is not None:
        file.write_text(content)
    for _ in range(2):  # the second time, too
        with pytest.raises(ConfigError, match=said):
            plugins.load_plugins([str(file)])
    assert main(["version", "--plugin", str(file), "--json"]) == 2
    error = json.loads(capfd.readouterr().out)["error"]
    assert error["type"] == "ConfigError"
    assert said in f"{error['message']} {error['got']}"


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="cannot be found") as caught:
        plugins.load_plugins(["no_such_module_at_all.inner"])
    assert caught.value.key == "--plugin"


def test_help_does_not_run_plugins(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "loud.py"
    file.write_text("raise SystemExit(7)")
    assert main(["version", "--help", "--plugin", str(file)]) == 0
