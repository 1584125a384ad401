"""The command line: options, YAML, errors, and every command on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cyclopts import App

import lorasmith as ls
from lorasmith.cli import main
from tests.training.tiny import ROWS

CLI = "import sys; from lorasmith.cli import main; sys.exit(main())"


@pytest.fixture(scope="session")
def adapter(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "a"
    arguments = ["train", str(base), str(rows), "-o", str(output), "--steps", "3", "-q"]
    assert main([*arguments, "--device", "cpu", "--adapter.r", "3", "--json"]) == 0
    return output


# -- help and versions -------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    heavy = ("torch", "transformers", "datasets", "numpy", "pandas", "matplotlib")
    code = (
        "import sys; from lorasmith.cli import main\n"
        f"code = main({arguments!r})\n"
        f"print([m for m in {heavy!r} if m in sys.modules], code, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(ls.__file__).parents[1])},
    )
    assert done.stderr.strip() == "[] 0"
    assert "lorasmith" in done.stdout or ls.__version__ in done.stdout


def test_every_command_is_listed(call: Any) -> None:
    out = call("--help").out
    assert all(f" {n} " in out for n in ("train", "eval", "generate", "info", "demo", "version"))


def test_version(call: Any) -> None:
    found = call("version", "--json").json
    assert found["lorasmith"] == ls.__version__
    assert found["torch"]
    assert "lorasmith" in call("version").out


# -- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], 'Did you mean "train"'),
        (["train", "m", "d", "-o", "o", "--stps", "3"], "Did you mean --steps"),
        (["train", "m", "d", "-o", "o", "--adapter.rank", "3"], "--adapter.rank"),
        (["train", "m", "d", "-o", "o", "--steps", "x"], "unable to convert"),
        (["train", "m", "d"], "--output"),
        (["train", "m", "d", "-o", "o", "--packing", "maybe"], "auto"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_mistake_in_the_options(
    call: Any, arguments: list[str], said: str, as_json: bool
) -> None:
    called = call(*arguments, *(["--json"] if as_json else []))
    assert called.code == 2
    if as_json:
        assert said in called.json["error"]["message"]
        assert called.err == ""
    else:
        assert said in called.err
        assert called.out == ""
    assert "Traceback" not in called.err


def test_an_error_of_ours_names_its_parts(call: Any) -> None:
    arguments = ("train", "m", "d", "-o", "o", "--lr", "-1")
    called = call(*arguments)
    assert called.code == 2
    assert "lr cannot be -1.0" in called.err
    assert "expected" in called.err
    error = call(*arguments, "--json").json["error"]
    assert (error["type"], error["key"]) == ("ConfigError", "lr")


def test_the_traceback_comes_on_demand(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" in call("train", "m", "d", "-o", "o", "--lr", "-1", "--debug").err
    monkeypatch.setenv("LORASMITH_DEBUG", "1")
    assert "Traceback" in call("info", "./nowhere").err


def test_a_failure_is_not_a_mistake(
    call: Any, base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorasmith.training import trainer

    monkeypatch.setattr(
        trainer,
        "model_loss_output",
        lambda *_, **__: (_ for _ in ()).throw(ZeroDivisionError("odd")),
    )
    called = call("train", base, rows, "-o", tmp_path / "o", "--device", "cpu", "-q")
    assert called.code == 1
    assert "ZeroDivisionError: odd" in called.err
    assert "--debug" in called.err


def test_ctrl_c_gives_130(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorasmith.training import models

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "resolve_model", interrupt)
    assert call("info", "x").code == 130


# -- YAML --------------------------------------------------------------------------------------


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configurations with which training was called, in place of training."""
    from lorasmith.errors import TrainingError
    from lorasmith.training import run

    seen: list[Any] = []

    def note(config: Any, **_: Any) -> None:
        seen.append(config)
        raise TrainingError("that is all")

    monkeypatch.setattr(run, "train", note)
    return seen


def test_the_command_line_wins_over_the_file(
    call: Any, captured: list[Any], tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "steps: 5\nlr: 0.5\nbatch_size: 3\ngradient-accumulation: 2\n"
        "report_to: [tensorboard, wandb]\neval_split: 0.25\n"
        "adapter:\n  variant: lora\n  r: 4\n  targets: [q_proj, v_proj]\n  layers: [0, -1]\n"
        "  rank_pattern: {layers.0.self_attn.q_proj: 2}\n"
    )
    called = call(
        *("train", "smollm2", "builtin:dates-en", "-o", "runs/a", "--adapter.variant", "dora"),
        *("--adapter.r", "16", "--steps", "60", "--lr", "1e-3", "--config", file),
    )
    assert called.code == 1
    (config,) = captured
    assert (config.model, config.data, config.output) == (
        "smollm2",
        "builtin:dates-en",
        Path("runs/a"),
    )
    assert (config.steps, config.lr, config.batch_size) == (60, 1e-3, 3)
    assert (config.gradient_accumulation, config.eval_split) == (2, 0.25)
    assert config.report_to == ("tensorboard", "wandb")
    assert (config.adapter.variant, config.adapter.r) == ("dora", 16)
    assert config.adapter.to_config() == ls.DoRAConfig(
        r=16,
        targets=("q_proj", "v_proj"),
        layers=(0, -1),
        rank_pattern={"layers.0.self_attn.q_proj": 2},
    )


def test_everything_can_stand_in_the_file(call: Any, captured: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\noutput: o\n")
    call("train", "--config", file)
    assert captured[0].model == "m"
    assert captured[0].output == Path("o")


def test_a_variants_own_fields_and_lists(call: Any, captured: list[Any]) -> None:
    call(
        *("train", "m", "d", "-o", "o", "--adapter.options.gate", "4"),
        *("--adapter.targets", "q_proj", "v_proj", "--adapter.rank-pattern", '{"a.b": 3}'),
    )
    assert captured[0].adapter.options == {"gate": "4"}
    assert captured[0].adapter.targets == ("q_proj", "v_proj")
    assert captured[0].adapter.rank_pattern == {"a.b": 3}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("grad_acumulation: 3", "Did you mean --gradient-accumulation"),
        ("adapter: {rnk: 3}", "[adapter][rnk]"),
        ("- a\n- b", "does not hold options"),
        ("steps: [1", "is not YAML"),
        ("steps: 1\nsteps: 2", "stands twice"),
        ("steps: many", "unable to convert"),
        ("lr: -1", "lr cannot be -1.0"),
    ],
)
def test_a_mistake_in_the_file(call: Any, tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    called = call("train", "m", "d", "-o", "o", "--config", file, "--json")
    assert called.code == 2
    error = called.json["error"]
    assert said in f"{error['message']} {error.get('got')}"


def test_a_file_that_is_not_there(call: Any) -> None:
    called = call("train", "m", "d", "-o", "o", "--config", "nowhere.yaml", "--json")
    assert called.code == 2
    assert called.json["error"]["file"] == "nowhere.yaml"


# -- the commands ------------------------------------------------------------------------------


def test_train_prints_one_json_object(call: Any, base: Path, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "o"
    called = call(
        *("train", base, rows, "-o", output, "--steps", "3", "--device", "cpu", "--json"),
        *("--adapter.variant", "dora", "--adapter.r", "2", "--eval-split", "0.2"),
    )
    assert called.code == 0, called.err
    assert called.json == json.loads((output / "training.json").read_text())
    assert called.json["adapter"]["variant"] == "dora"
    assert "step 3 of 3" in called.err


def test_train_shows_a_table(call: Any, base: Path, rows: Path, tmp_path: Path) -> None:
    called = call(
        *("train", base, rows, "-o", tmp_path / "o", "--steps", "2", "--device", "cpu", "-q"),
    )
    assert called.code == 0
    assert "learning rate" in called.out
    assert "finished" in called.out
    assert called.err == ""


def test_eval(call: Any, base: Path, rows: Path, adapter: Path) -> None:
    arguments = ("eval", base, rows, "--max-new-tokens", "3", "--device", "cpu")
    plain = call(*arguments, "--json").json
    adapted = call(*arguments, "--adapter", adapter, "--json", "--show", "2").json
    assert plain["rows"] == adapted["rows"] == len(ROWS)
    assert adapted["loss"] < plain["loss"]
    assert len(adapted["examples"]) == 2
    shown = call(*arguments, "--no-exact-match")
    assert "perplexity" in shown.out
    assert "exact match" not in shown.out


def test_generate(call: Any, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    arguments = ("generate", base, "Count to 3.", "--max-new-tokens", "8", "--device", "cpu")
    plain = call(*arguments, "--json").json
    assert call(*arguments).out.strip() == plain["text"]
    assert call(*arguments, "-a", adapter, "--json").json["adapter"] == str(adapter)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Count to 3."))
    same = call(*("generate", base, "-", "--max-new-tokens", "8", "--device", "cpu", "--json"))
    assert same.json["text"] == plain["text"]


def test_info_of_a_model(call: Any, base: Path) -> None:
    found = call("info", base, "--json").json
    assert found["kind"] == "model"
    assert (found["layers"], found["heads"], found["kv_heads"], found["head_dim"]) == (2, 4, 2, 8)
    assert (found["hidden"], found["dtype"]) == (32, "float32")
    from lorasmith.training.models import load_model

    model, _ = load_model(base, device="cpu")
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert "kv heads" in call("info", base).out


def test_info_of_an_adapter(call: Any, adapter: Path, base: Path) -> None:
    found = call("info", adapter, "--json").json
    assert (found["kind"], found["variant"], found["peft_type"]) == ("adapter", "lora", "LORA")
    assert found["config"]["r"] == 3
    assert found["ranks"] == {"3": 14}
    assert found["base"] == str(base)
    assert found["base_known_by_fingerprint"] is True
    assert found["modules"]["q_proj"] == 2
    training = json.loads((adapter / "training.json").read_text())
    assert found["parameters"] == training["trainable_parameters"]
    assert "q_proj" in call("info", adapter).out


def test_info_of_a_directory_with_adapters_in_it(call: Any, adapter: Path, tmp_path: Path) -> None:
    # PEFT keeps adapters that are not named "default" in subdirectories.
    shutil.copytree(adapter, tmp_path / "mine")
    found = call("info", tmp_path, "--json").json
    assert (found["kind"], found["path"]) == ("adapter", str(tmp_path / "mine"))
    assert found["bytes"] > 0
    shutil.copytree(adapter, tmp_path / "other")
    assert str(tmp_path / "mine") in call("info", tmp_path, "--json").json["error"]["fix"]


def test_an_adapter_of_the_hub(
    call: Any, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[str] = []

    def download(repository: str, **_: Any) -> str:
        asked.append(repository)
        return str(adapter)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    arguments = ("generate", base, "hello", "--device", "cpu", "--max-new-tokens", "2", "--json")
    assert call(*arguments, "-a", "someone/adapter").json["adapter"] == "someone/adapter"
    assert asked == ["someone/adapter"]


@pytest.mark.parametrize("command", ["info", "generate", "eval"])
def test_a_model_that_is_not_there(call: Any, rows: Path, command: str) -> None:
    more = {"info": (), "generate": ("hello",), "eval": (rows,)}[command]
    called = call(command, "./nowhere", *more, "--json")
    assert called.code == 2
    assert called.json["error"]["type"] == "ModelError"


def test_an_adapter_as_model_says_what_to_do(call: Any, adapter: Path) -> None:
    called = call("generate", adapter, "hello", "--json")
    assert "--adapter" in called.json["error"]["fix"]


def test_demo(call: Any, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "demo"
    arguments = (
        *("demo", "-o", output, "--model", base, "--steps", "2", "--batch-size", "2", "--r", "2"),
        *("--rows", "3", "--general-characters", "2000"),
    )
    called = call(*arguments, "--json")
    assert called.code == 0, called.err
    found = called.json
    assert set(found["before"]) == set(found["after"])
    assert found["before"]["generated"] == 3
    assert found["after"]["loss"] < found["before"]["loss"]
    page = (output / "report.html").read_text()
    assert "Exact match" in page
    assert "<svg" in page
    # The rotation of every head and MLP projection, and what is still known.
    assert found["diagnosis"]["units"] == 2 * (4 + 2 + 2 + 4 + 3)
    assert 0 < found["diagnosis"]["theta_bar_deg"] < 90
    assert found["retention"]["kl"] >= 0
    assert found["after"]["general_perplexity"] == found["retention"]["perplexity_after"]
    for title in ("Rotation by layer and projection", "θ̄", "preserved", "Perplexity on held-out"):
        assert title in page, title
    assert (output / "adapter_model.safetensors").is_file()
    # Again in the same place, with another variant, and for people.
    again = call(*arguments, "--variant", "ia3")
    assert again.code == 0, again.err
    assert "Before and after" in again.out


def test_the_list_of_commands_says_what_each_says_of_itself() -> None:
    """The list is written down apart, so that it can be shown without importing them."""
    from importlib import import_module

    from lorasmith.cli.app import COMMANDS

    for name, (function, summary) in COMMANDS.items():
        module, _, attribute = function.partition(":")
        found = getattr(import_module(module), attribute)
        says = found.help if isinstance(found, App) else found.__doc__  # an App has commands
        assert says.strip().splitlines()[0] == summary, name


def test_the_commands_on_fleets_say_what_they_do() -> None:
    from lorasmith.cli.fleet import app

    names = [name for name in app if not name.startswith("-")]
    assert {"analyze", "compress", "add", "remove", "export", "route", "validate"} <= set(names)
    for name in names:
        command = app[name]
        function = command.default_command
        assert function is not None, name
        said, shown = (t.strip().splitlines()[0] for t in (function.__doc__ or "", command.help))
        assert said == shown, name
