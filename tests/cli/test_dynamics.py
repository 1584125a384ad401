"""``lorasmith dynamics``, ``train --dynamics`` and tasks, as people type them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorasmith.cli import main
from tests.training.tiny import ROWS, write_rows

TASKS = [{**row, "task": "odd" if i % 2 else "even"} for i, row in enumerate(ROWS)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", TASKS)


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str | Path, as_json: bool = True) -> tuple[int, Any, str]:
        capfd.readouterr()
        code = main([str(a) for a in (*arguments, *(["--json"] if as_json else []))])
        out, err = capfd.readouterr()
        return code, json.loads(out) if as_json else out, err

    return run


@pytest.fixture
def train(call: Any, base: Path, rows: Path, tmp_path: Path) -> Any:
    def run(*options: str | Path, as_json: bool = True) -> tuple[int, Any, str]:
        given = ("train", base, rows, "-o", tmp_path / "o", "--steps", "3", "--device", "cpu")
        return call(*given, *options, as_json=as_json)  # type: ignore[no-any-return]

    return run


def test_the_list_of_rules(call: Any) -> None:
    code, found, err = call("dynamics")
    assert code == 0, err
    rules = {one["name"]: one for one in found["dynamics"]}
    assert list(rules) == ["gauge", "entropy", "orthogonality", "budget", "stress"]
    options = {option["name"]: option for option in rules["budget"]["options"]}
    assert options["max_deg"]["default"] == "5"
    assert options["max_deg"]["type"] == "float"
    assert "degrees" in options["max_deg"]["help"]
    assert "'head', 'projection'" in options["per"]["type"]
    assert all(one["summary"] for one in rules.values())
    assert all(option["help"] for one in rules.values() for option in one["options"])
    code, text, _ = call("dynamics", as_json=False)
    assert code == 0
    assert "GaugeProjection" in text
    assert "--dynamics-options" in text


def test_rules_on_the_command_line(train: Any) -> None:
    code, found, err = train(
        *("--dynamics", "gauge,budget", "--dynamics-options.budget.max-deg", "1e1"),
        *("--dynamics-options.gauge.moments", "keep"),
    )
    assert code == 0, err
    assert found["config"]["dynamics"] == ["gauge", "budget"]
    assert found["config"]["dynamics_options"]["gauge"] == {"moments": "keep"}
    assert found["config"]["dynamics_options"]["budget"] == {"max_deg": 10.0}
    assert any(key.startswith("budget/") for key in found["losses"][-1]["dynamics"])


def test_rules_in_yaml(call: Any, base: Path, rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""
model: {base}
data: {{a: {rows}, b: {rows}}}
output: {tmp_path / "o"}
steps: 2
device: cpu
dynamics:
  gauge:
    mu: 1e-1
  entropy:
    penalty: {{orthogonality: {{kind: shadow, refresh_every: 1}}}}
  stress:
    multi: [0.3, 0.4]
"""
    )
    code, found, _ = call("train", "--config", path)
    assert code == 0, found
    assert found["config"]["dynamics"] == ["gauge", "entropy", "stress"]
    assert found["config"]["dynamics_options"]["gauge"] == {"mu": 0.1}
    assert {name for point in found["losses"] for name in point["tasks"]} == {"a", "b"}
    # The command line wins, option by option.
    options = ("--dynamics-options.stress.keep-tasks", "true", "--dynamics-options.gauge.mu", "2")
    code, found, _ = call("train", "--config", path, "--overwrite", *options)
    assert code == 0, found
    assert found["config"]["dynamics_options"] == {
        "gauge": {"mu": 2},
        "entropy": {"penalty": {"orthogonality": {"kind": "shadow", "refresh_every": 1}}},
        "stress": {"multi": [0.3, 0.4], "keep_tasks": True},
    }
    options = ("--dynamics-options.stress.anchor", rows)  # data that must not be forgotten
    code, found, _ = call("train", "--config", path, "--overwrite", *options)
    assert code == 0, found
    assert found["config"]["dynamics_options"]["stress"]["anchor"] == str(rows)
    code, found, _ = call("train", "--config", path, "--dynamics", "gauge", "--overwrite")
    assert code == 2
    assert found["error"]["key"].startswith("dynamics_options")


def test_mistakes(train: Any) -> None:
    code, found, _ = train("--dynamics", "guage")
    assert (code, found["error"]["key"]) == (2, "dynamics")
    assert "gauge" in found["error"]["fix"]
    code, found, _ = train("--dynamics", "budget", "--dynamics-options.budget.max-dge", "2")
    assert (code, found["error"]["fix"]) == (2, "did you mean 'max_deg'?")


def test_what_train_shows(train: Any) -> None:
    code, text, err = train("--dynamics", "gauge", "--eval-split", "0.2", as_json=False)
    assert code == 0, err
    assert "gauge: residual" in text
    assert "Last loss of each task" in text
    assert "even" in text
    assert "odd" in text


def test_a_rule_of_ones_own(train: Any, call: Any, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        '''
import torch
import lorasmith.dynamics.registry as registry
from lorasmith.dynamics import Dynamic


class Shrink(Dynamic):
    """Shrinks B after every step.

    Args:
        factor: By how much.
    """

    name = "shrink"

    def __init__(self, factor: float = 0.5) -> None:
        self.factor = factor

    @torch.no_grad()
    def after_step(self, step):
        for site in self.context.sites:
            site.B.mul_(self.factor)

    def metrics(self):
        return {"norm": max(float(site.B.detach().norm()) for site in self.context.sites)}


registry.register_dynamic(Shrink)
'''
    )
    from lorasmith.dynamics import registry

    try:
        code, found, _ = train(
            *("--dynamics", "shrink", "--plugin", plugin, "--dynamics-options.shrink.factor", "0")
        )
        assert code == 0, found
        assert all(point["dynamics"] == {"shrink/norm": 0.0} for point in found["losses"])
        code, found, _ = call("dynamics", "--plugin", plugin)
        assert found["dynamics"][-1]["options"][0]["help"] == "By how much."
    finally:
        registry._registered.pop("shrink", None)


def test_eval_shows_each_task(call: Any, base: Path, rows: Path) -> None:
    given = ("eval", base, rows, "--device", "cpu", "--max-new-tokens", "2")
    code, found, err = call(*given)
    assert code == 0, err
    assert {name: task["rows"] for name, task in found["tasks"].items()} == {"even": 12, "odd": 12}
    assert found["tasks"]["odd"]["exact_match"] == 0
    code, text, _ = call(*given, as_json=False)
    assert code == 0
    assert "even" in text
    code, found, _ = call(*given, "--task-column", "none", "--no-exact-match")
    assert found["tasks"] == {}
    code, found, err = call(
        "eval", base, f"x={rows},y={rows}", "--device", "cpu", "--no-exact-match", "--limit", "3"
    )
    assert code == 0, err
    assert {name: task["rows"] for name, task in found["tasks"].items()} == {"x": 3, "y": 3}
