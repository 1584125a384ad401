"""NaN and infinity: noticed within a step, never logged as 0, never written."""

from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.errors import NonFiniteLossError
from lorasmith.training import checkpoints, trainer
from lorasmith.training.config import TrainConfig
from lorasmith.training.loss import LossOutput, model_loss_output
from lorasmith.training.run import train
from lorasmith.training.states import TREE
from tests.training.tiny import make_config


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What was logged, in order."""
    found: list[dict[str, float]] = []
    original = trainer.AdapterTrainer.log

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        found.append(dict(logs))
        original(self, logs, start_time)

    monkeypatch.setattr(trainer.AdapterTrainer, "log", log)
    return found


def _config(base: Path, rows: Path, output: Path, **changes: Any) -> TrainConfig:
    """At a constant rate, and with checkpoints."""
    settings: dict[str, Any] = {"warmup": 0.0, "schedule": "constant", "save_steps": 2}
    return make_config(base, rows, output, **{**settings, **changes})


def numbers_on_disk(folder: Path) -> int:
    """How many numbers there are in all files; each of them must be finite."""
    from safetensors.torch import load_file

    count = 0
    for path in folder.rglob("*"):
        assert path.suffix not in (".pt", ".pth", ".bin"), path
        if path.suffix == ".safetensors":
            tensors = load_file(str(path))
            # How a state says of a number that it is not finite.
            tree = tensors.get(TREE, torch.zeros(0, dtype=torch.uint8)).numpy().tobytes()
            assert b'{"float":' not in tree, path
            values: list[Any] = list(tensors.values())
        elif path.suffix == ".json":
            found: list[str] = []
            json.loads(path.read_text(encoding="utf-8"), parse_constant=found.append)
            assert not found, path
            continue
        else:
            continue
        while values:
            value = values.pop()
            if isinstance(value, torch.Tensor):
                if value.is_floating_point():
                    assert value.isfinite().all(), path
                    count += value.numel()
            elif isinstance(value, dict):
                values += value.values()
            elif isinstance(value, list | tuple):
                values += value
    return count


class Poison(torch.autograd.Function):
    """Finite forwards, NaN backwards."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> torch.Tensor:
        return grads[0] * float("nan")


def _poison(monkeypatch: pytest.MonkeyPatch, call: int, what: str) -> None:
    calls = {"n": 0}

    def poisoned(*arguments: Any, **options: Any) -> LossOutput:
        output = model_loss_output(*arguments, **options)
        calls["n"] += 1
        if calls["n"] != call:
            return output
        bad: Any = Poison.apply(output.loss) if what == "gradient" else output.loss * float(what)
        return replace(output, loss=bad)

    monkeypatch.setattr(trainer, "model_loss_output", poisoned)


@pytest.mark.parametrize("what", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_noticed_in_the_step_itself(
    base: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    logged: list[dict[str, float]],
    what: str,
    accumulation: int,
) -> None:
    _poison(monkeypatch, 4 * accumulation, what)  # the last batch of step 4
    made = _config(base, rows, tmp_path / "out", gradient_accumulation=accumulation)
    with pytest.raises(NonFiniteLossError, match="not finite at step 4") as caught:
        train(made, progress=False)
    assert "learning rate" in str(caught.value.fix)
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    assert len(losses) == 3
    assert min(losses) > 0
    output = tmp_path / "out"
    assert caught.value.file == str(output / "last-finite")
    assert [p.name for p in checkpoints.list_checkpoints(output)] == ["checkpoint-2"]
    assert numbers_on_disk(output) > 0
    assert not (output / "adapter_model.safetensors").exists()


def test_a_learning_rate_that_blows_up(
    base: Path, rows: Path, tmp_path: Path, logged: list[dict[str, float]]
) -> None:
    """Nothing is poisoned: one step takes the adapter so far that the next loss is not finite."""
    with pytest.raises(NonFiniteLossError, match="at step 2"):
        train(_config(base, rows, tmp_path / "out", lr=1e30, save_steps=1), progress=False)
    assert len([entry for entry in logged if "loss" in entry]) == 1
    assert numbers_on_disk(tmp_path / "out") > 0


@pytest.mark.parametrize("where", ["adapter", "optimiser's state"])
@pytest.mark.parametrize(("steps", "save_steps"), [(6, 2), (4, None)])
def test_what_is_not_finite_is_not_written(
    base: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    steps: int,
    save_steps: int | None,
) -> None:
    """The step's own loss was finite, and the next one comes after the checkpoint, or never."""
    original = trainer.Watch.on_step_end

    def spoil(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 4:
            parameter = next(iter(self.trainer.adapter.parameters()))
            moment = self.trainer.optimizer.state[parameter]["exp_avg"]
            with torch.no_grad():
                (parameter if where == "adapter" else moment).view(-1)[-1] = float("nan")
        original(self, args, state, control, **rest)

    monkeypatch.setattr(trainer.Watch, "on_step_end", spoil)
    with pytest.raises(NonFiniteLossError, match="not finite after step 4") as caught:
        train(
            _config(base, rows, tmp_path / "out", steps=steps, save_steps=save_steps),
            progress=False,
        )
    assert caught.value.key == where
    output = tmp_path / "out"
    found = checkpoints.list_checkpoints(output)
    assert [p.name for p in found] == ([] if save_steps is None else ["checkpoint-2"])
    assert caught.value.file == (str(found[0]) if found else None)
    assert not (output / "adapter_model.safetensors").exists()
    if output.exists():
        numbers_on_disk(output)


def test_an_evaluation_that_is_not_finite_is_said(
    base: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The weights are finite, so that training goes on; the record has no number then, not 0."""
    calls = {"n": 0}

    def poisoned(model: Any, inputs: Any, **options: Any) -> LossOutput:
        output = model_loss_output(model, inputs, **options)
        calls["n"] += not options
        bad = not options and calls["n"] == 1  # evaluation gives no options
        return replace(output, loss=output.loss * float("inf")) if bad else output

    monkeypatch.setattr(trainer, "model_loss_output", poisoned)
    with caplog.at_level(logging.WARNING, "lorasmith"):
        result = train(
            _config(
                base, rows, tmp_path / "out", steps=2, save_steps=1, eval_split=0.2, eval_steps=1
            ),
            progress=False,
        )
    assert "evaluation loss is not finite at step 1: inf" in caplog.text
    assert result.evaluations[0].loss == float("inf")
    written = json.loads((tmp_path / "out" / "training.json").read_text())
    assert written["evaluations"][0]["loss"] is None
    assert written["evaluations"][1]["loss"] > 0
    numbers_on_disk(tmp_path / "out")
    # A run that goes on from there knows that there was an evaluation, of no number.
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    again = train(
        _config(
            *(base, rows, tmp_path / "out"),
            steps=2,
            save_steps=1,
            eval_split=0.2,
            eval_steps=1,
            resume="last",
        ),
        progress=False,
    )
    assert math.isnan(again.evaluations[0].loss)
    assert again.evaluations[1].loss == result.evaluations[1].loss
