"""Dynamics in ``train``: what they do, what is reported, how a run goes on and ends."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lorasmith as ls
from lorasmith.errors import ConfigError, NonFiniteLossError, TrainingError, UnknownNameError
from lorasmith.training import loss, trainer
from lorasmith.training.anchor import RowsAnchor
from lorasmith.training.config import AdapterOptions, TrainConfig
from lorasmith.training.data import load_rows
from lorasmith.training.evaluate import evaluate
from lorasmith.training.models import load_model
from lorasmith.training.records import TrainResult
from lorasmith.training.run import train
from tests.training.processes import train_in_two
from tests.training.tiny import MULTI, ROWS, load_no_model, make_config, make_tokenizer, write_rows

TASKS = [{**row, "task": "long" if i % 2 == 0 else "short"} for i, row in enumerate(ROWS)]


#: Enters Multi at once and stays there: no threshold can be missed.
@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", TASKS)


Run = Callable[..., TrainResult]


@pytest.fixture
def config(base: Path, rows: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(output: str = "out", **changes: Any) -> TrainConfig:
        return make_config(base, rows, tmp_path / output, **{"steps": 8, **changes})

    return make


@pytest.fixture
def run(config: Callable[..., TrainConfig]) -> Run:
    return lambda *args, **kwargs: train(config(*args, **kwargs), progress=False)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in ls.read_adapter(folder).tensors.items()}


def _equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# -- what they do ------------------------------------------------------------------------------


def test_the_rules_act_and_report(run: Run, tmp_path: Path) -> None:
    result = run(
        dynamics=("gauge", "entropy", "budget"),
        dynamics_options={"gauge": {"mu": 2.0}, "budget": {"max_deg": 0.5, "per": "projection"}},
        steps=12,
        eval_split=0.2,
        eval_steps=6,
    )
    weights = ls.read_adapter(tmp_path / "out")
    model, _ = load_model(result.config["model"], device="cpu")
    largest = 0.0
    for name, factors in weights.factors.items():
        A, B = factors.A.double(), factors.B.double()
        W = model.get_submodule(name).weight.detach().double()
        whole = W + factors.scaling * B @ A
        cosine = float((W * whole).sum() / W.norm() / whole.norm())
        largest = max(largest, math.degrees(math.acos(min(1.0, cosine))))
    assert largest == pytest.approx(0.5, rel=1e-3)
    assert result.losses[-1].loss < result.losses[0].loss
    for point in result.losses:
        assert {key.partition("/")[0] for key in point.dynamics} == {"gauge", "entropy", "budget"}
        assert all(math.isfinite(value) for value in point.dynamics.values())
    assert result.losses[-1].dynamics["entropy/entropy"] > 0
    written = json.loads((tmp_path / "out" / "training.json").read_text())
    assert written["losses"][-1]["dynamics"] == result.losses[-1].dynamics
    assert written["config"]["dynamics"] == ["gauge", "entropy", "budget"]


def test_the_gauge_holds_at_the_end(run: Run, tmp_path: Path) -> None:
    run(dynamics=("gauge",), dynamics_options={"gauge": {"mu": 2.0}}, adapter=AdapterOptions(r=2))
    for factors in ls.read_adapter(tmp_path / "out").factors.values():
        A, B = factors.A.double(), factors.B.double()
        left, right = A @ A.mT, 2.0 * B.mT @ B
        assert float((left - right).norm() / left.norm()) < 1e-4


def test_reported_losses_never_contain_a_penalty(run: Run, base: Path, tmp_path: Path) -> None:
    """A penalty a million times the loss moves no reported loss, while it does act."""
    heavy = {"weight": 1e6, "max_ratio": None}
    data = {"eval_split": 0.25, "eval_steps": 2, "seed": 3}
    plain = run("plain", steps=4, **data)
    loud = run(
        "loud",
        steps=4,
        dynamics=("orthogonality",),
        dynamics_options={"orthogonality": heavy},
        **data,
    )
    # The first loss is of the same start; what follows shows that the penalty acts.
    assert loud.losses[0].loss == plain.losses[0].loss
    assert loud.losses[-1].loss != plain.losses[-1].loss
    # The last evaluation is that of the adapter that was saved, computed without any rule.
    model, tokenizer = load_model(base, device="cpu")
    ls.load(model, tmp_path / "loud")
    from lorasmith.training.data import split_rows

    held = split_rows(load_rows(plain.config["data"], seed=3), fraction=0.25, seed=3, by="task")[1]
    found = evaluate(model, tokenizer, held, exact_match=False)
    assert loud.eval_loss == pytest.approx(found.loss, rel=1e-5)
    assert loud.evaluations[-1].tasks == pytest.approx(
        {task: report.loss for task, report in found.tasks.items()}, rel=1e-5
    )


def test_no_hook_stays_after_a_run_or_a_failure(
    config: Callable[..., TrainConfig], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_model(base, device="cpu")
    rules = {"dynamics": ("gauge", "entropy", "budget", "stress"), "steps": 2}
    plain, _ = load_model(base, device="cpu")
    train(config("plain", steps=2), model=plain, tokenizer=tokenizer, progress=False)
    train(config("a", **rules), model=model, tokenizer=tokenizer, progress=False)
    assert len(model._forward_hooks) == len(plain._forward_hooks)
    assert len(model._forward_pre_hooks) == len(plain._forward_pre_hooks)
    broken, _ = load_model(base, device="cpu")
    original = loss.model_loss_output
    calls = {"n": 0}

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == 3:
            raise RuntimeError("no power")
        return original(*args, **kwargs)

    monkeypatch.setattr(trainer, "model_loss_output", fail)
    with pytest.raises(RuntimeError, match="no power"):
        train(
            config("b", dynamics=("gauge", "stress"), steps=4),
            model=broken,
            tokenizer=tokenizer,
            progress=False,
        )
    assert not ls.attached(broken)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in broken.modules())


# -- resuming ----------------------------------------------------------------------------------

_ALL: dict[str, Any] = {
    "dynamics": ("gauge", "entropy", "budget"),
    "dynamics_options": {
        "entropy": {"penalty": {"orthogonality": {"kind": "shadow", "refresh_every": 2}}},
        "budget": {"max_deg": 1.0, "kind": "projection"},
    },
    "adapter": AdapterOptions(r=4, dropout=0.2),
}
_STRESS: dict[str, Any] = {
    "dynamics": ("gauge", "entropy", "budget", "stress"),
    "dynamics_options": {"stress": MULTI},
}


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("settings", [_ALL, _STRESS], ids=["all", "stress"])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(
    run: Run, tmp_path: Path, packing: Any, settings: dict[str, Any]
) -> None:
    given = {**settings, "packing": packing, "steps": 11, "eval_split": 0.2, "eval_steps": 4}
    whole = run("whole", **given, save_steps=7)
    run("part", **given, save_steps=7)
    for path in (tmp_path / "part").glob("*.safetensors"):
        path.unlink()
    resumed = run("part", **given, save_steps=7, resume="last")
    assert len(resumed.losses) == 11
    for one, two in zip(resumed.losses, whole.losses, strict=True):
        assert one == two
    for one_eval, two_eval in zip(resumed.evaluations, whole.evaluations, strict=True):
        assert replace(one_eval, seconds=0.0) == replace(two_eval, seconds=0.0)
    assert _equal(_tensors(tmp_path / "whole"), _tensors(tmp_path / "part"))
    if "stress" in settings["dynamics"]:
        histories = [
            json.loads((tmp_path / name / "stress.json").read_text()) for name in ("whole", "part")
        ]
        assert histories[0] == histories[1]
        assert "multi" in {record["mode"] for record in histories[0][:7]}


@pytest.mark.parametrize(
    "changes",
    [
        {"dynamics": ("gauge",)},
        {"dynamics": ()},
        {"dynamics": ("gauge", "budget"), "dynamics_options": {"budget": {"max_deg": 2.0}}},
    ],
)
def test_other_dynamics_cannot_be_resumed(run: Run, changes: dict[str, Any]) -> None:
    run(dynamics=("gauge", "budget"), steps=2, save_steps=2)
    with pytest.raises(TrainingError, match="other dynamics") as caught:
        run(**{"dynamics": ("gauge", "budget"), **changes}, steps=2, resume="last")
    assert caught.value.key in ("dynamics", "dynamics_options")


def test_the_same_dynamics_in_another_form_can(run: Run) -> None:
    run(dynamics=("budget",), dynamics_options={"budget": {"max_deg": 2.0}}, steps=2, save_steps=2)
    resumed = run(dynamics={"budget": {"max_deg": "2.0"}}, steps=2, resume="last")
    assert resumed.steps == 2


# -- stress ------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_left_to_the_stress_controller(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loss.model_loss_output
    calls = {"n": 0}

    def poisoned(*args: Any, **kwargs: Any) -> loss.LossOutput:
        calls["n"] += 1
        output = original(*args, **kwargs)
        if calls["n"] != 3:
            return output
        return replace(output, loss=output.loss * math.nan, summed=output.loss.detach() * math.nan)

    monkeypatch.setattr(trainer, "model_loss_output", poisoned)
    with pytest.raises(NonFiniteLossError):
        run("raised", steps=5)
    calls["n"] = 0
    result = run("skipped", steps=5, dynamics=("stress", "gauge"))
    assert result.status == "finished"
    assert [math.isfinite(p.loss) for p in result.losses] == [True, True, False, True, True]
    records = json.loads((tmp_path / "skipped" / "stress.json").read_text())
    assert len(records) == 5
    assert "skip" in records[2]["event"]
    assert all(t.isfinite().all() for t in _tensors(tmp_path / "skipped").values())


def test_task_adapters_become_one_that_is_measured(run: Run, base: Path, tmp_path: Path) -> None:
    result = run(
        dynamics=("stress",),
        dynamics_options={"stress": MULTI},
        steps=8,
        eval_data=str(_rows_file(tmp_path)),
        eval_steps=4,
    )
    records = json.loads((tmp_path / "out" / "stress.json").read_text())
    assert records[-1]["mode"] == "multi"
    assert "leave multi" in records[-1]["event"]
    # The last evaluation is of what was saved; the one before it of the task adapters.
    assert [e.step for e in result.evaluations] == [4, 8, 8]
    model, tokenizer = load_model(base, device="cpu")
    ls.load(model, tmp_path / "out")
    found = evaluate(model, tokenizer, TASKS, exact_match=False)
    assert result.eval_loss == pytest.approx(found.loss, rel=1e-5)
    assert result.task_adapters == {}
    assert not list((tmp_path / "out").glob("task-*"))


def _rows_file(folder: Path) -> Path:
    return write_rows(folder / "held.jsonl", TASKS)


def test_task_adapters_can_be_kept(
    config: Callable[..., TrainConfig], base: Path, tmp_path: Path
) -> None:
    model, tokenizer = load_model(base, device="cpu")
    options = {"stress": {**MULTI, "keep_tasks": True}}
    rules = {"dynamics": ("stress",), "dynamics_options": options}
    held = {"eval_data": str(_rows_file(tmp_path)), "eval_steps": 4}
    result = train(config(**rules, **held), model=model, tokenizer=tokenizer, progress=False)
    assert result.task_adapters == {
        task: str(tmp_path / "out" / f"task-{task}") for task in ("long", "short")
    }
    # Each is what was evaluated on its task before they were merged.
    separate = result.evaluations[-2]
    for task, folder in result.task_adapters.items():
        fresh, _ = load_model(base, device="cpu")
        ls.load(fresh, folder)
        rows = [row for row in TASKS if row["task"] == task]
        found = evaluate(fresh, tokenizer, rows, exact_match=False)
        assert found.loss == pytest.approx(separate.tasks[task], rel=1e-5)
    plain = train(config(overwrite=True, steps=2), progress=False)
    assert plain.task_adapters == {}
    assert not list((tmp_path / "out").glob("task-*"))


@pytest.mark.parametrize("resume", [False, True])
def test_the_best_adapters_of_the_tasks_come_back(
    run: Run,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    resume: bool,
) -> None:
    """Early stopping with the best evaluation in Multi: its task adapters are what is merged."""
    course = {4: 1.0, 6: 2.0, 8: 3.0, 10: 4.0}
    original = trainer.AdapterTrainer.consider
    expected: dict[str, torch.Tensor] = {}

    def consider(self: Any, _: float) -> bool:
        if self.state.global_step == 4 and not expected:
            twin = {name: a.state_dict() for name, a in ls.attached(self.base).items()}
            assert len(twin) == 3
            names = [n for n in twin if n != "default"]
            keys = {k.rpartition(".")[0] for k in twin["default"] if k.endswith((".A", ".B"))}
            for key in keys:
                deltas = [
                    twin[n][f"{key}.B"].double() @ twin[n][f"{key}.A"].double() for n in names
                ]
                mean = sum(deltas[1:], deltas[0]) / len(deltas)
                u, s, vh = torch.linalg.svd(mean)
                expected[key] = (u[:, :4] * s[:4]) @ vh[:4]
        return original(self, course.get(self.state.global_step, 5.0))

    monkeypatch.setattr(trainer.AdapterTrainer, "consider", consider)
    given: dict[str, Any] = {
        "dynamics": ("stress",),
        "dynamics_options": {"stress": MULTI},
        "steps": 20,
        "eval_data": str(_rows_file(tmp_path)),
        "eval_steps": 2,
        "early_stopping": 3,
        "save_steps": 7,
    }
    course[2] = 9.0
    result = run(**given)
    if resume:
        (tmp_path / "out" / "adapter_model.safetensors").unlink()
        result = run(**given, resume="last")
    assert (result.status, result.steps, result.best_step) == ("stopped early", 10, 4)
    assert expected
    found = ls.read_adapter(tmp_path / "out").factors
    matched = 0
    for key, delta in expected.items():
        for name, factors in found.items():
            if key.endswith(name) or name in key:
                product = factors.B.double() @ factors.A.double()
                torch.testing.assert_close(product, delta, rtol=1e-4, atol=1e-6)
                matched += 1
    assert matched == len(found)
    model, tokenizer = load_model(base, device="cpu")
    ls.load(model, tmp_path / "out")
    measured = evaluate(model, tokenizer, TASKS, exact_match=False)
    assert result.eval_loss == pytest.approx(measured.loss, rel=1e-5)


@pytest.mark.parametrize("packing", ["off", "auto"])
def test_an_anchor_of_rows(
    config: Callable[..., TrainConfig], monkeypatch: Any, tmp_path: Path, packing: str
) -> None:
    """S follows the loss on rows that the run names; ``evaluate`` measures it beside."""
    kept = str(write_rows(tmp_path / "kept.jsonl", ROWS[::-1]))
    first = load_rows(kept, limit=3, seed=0)
    options = {"stress": {"anchor": {"data": kept, "rows": 3}, "anchor_every": 2}}
    made = config(dynamics=("stress",), dynamics_options=options, packing=packing, lr=0.3)
    (rule,) = made.make_dynamics()
    assert rule.weights == (0.5, 1.0, 1.0)  # as with any anchor
    with pytest.raises(ConfigError, match="have not been loaded"):
        rule.anchor()
    losses: list[float] = []
    original = RowsAnchor.__call__
    tokenizer = make_tokenizer()

    def beside(self: Any) -> Any:
        found = original(self)
        measured = evaluate(self._model, tokenizer, first, exact_match=False).loss
        losses.append(measured)
        assert float(found) == pytest.approx(measured, rel=1e-5)
        return found

    monkeypatch.setattr(RowsAnchor, "__call__", beside)
    train(made, progress=False)
    assert len(losses) == 4
    memory = [r["memory"] for r in json.loads((tmp_path / "out" / "stress.json").read_text())]
    lowest = [min(losses[: i + 1]) for i in range(4)]
    rises = [(loss - low) / abs(low) for loss, low in zip(losses, lowest, strict=True)]
    assert (max(memory) > 0) == (max(rises) > 0)
    assert [m > 0 for m in memory[::2]] == [rise > 0 for rise in rises]
    assert memory[1::2] == memory[::2]


@pytest.mark.parametrize(
    "anchor", [3, {"rows": 3}, {"data": "x", "lines": 3}, {"data": "x", "rows": 0}, ["x"]]
)
def test_an_anchor_that_is_none(config: Callable[..., TrainConfig], anchor: Any) -> None:
    made = config(dynamics=("stress",), dynamics_options={"stress": {"anchor": anchor}})
    with pytest.raises(ConfigError, match="not an anchor"):
        made.make_dynamics()


# -- several processes -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("stress", [False, True])
def test_two_processes_make_the_run_of_one(
    run: Run, base: Path, rows: Path, tmp_path: Path, stress: bool
) -> None:
    """With all dynamics on: both processes end alike, and as one with twice the batch does."""
    names = "gauge,entropy,budget" + (",stress" if stress else "")
    options: dict[str, Any] = {"budget": {"max_deg": 1.0}}
    if stress:
        options["stress"] = MULTI
    script = tmp_path / "both.py"
    script.write_text(_BOTH)
    result = train_in_two(
        *(base, rows, "-o", tmp_path / "two", "--debug"),
        *("--steps", "6", "--lr", "1e-2", "--device", "cpu", "--adapter.r", "4"),
        *("--batch-size", "3", "--packing", "off", "--eval-split", "0.25", "--log-steps", "1"),
        *("--dynamics", names, "--dynamics-options", json.dumps(options)),
        *("--max-grad-norm", "0.05"),
        script=(script, tmp_path),
    )
    states = [torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in range(2)]
    assert _equal(*states)
    one = run(
        *("one",),
        steps=6,
        batch_size=6,
        packing="off",
        eval_split=0.25,
        dynamics=tuple(names.split(",")),
        dynamics_options=options,
        max_grad_norm=0.05,
    )
    if stress:
        histories = [
            json.loads((tmp_path / name / "stress.json").read_text()) for name in ("one", "two")
        ]
        modes, others = ([record["mode"] for record in history] for history in histories)
        assert modes == others
        assert modes[-3:] == ["multi"] * 3
    for mine, theirs in zip(one.losses, result["losses"], strict=True):
        assert theirs["loss"] == pytest.approx(mine.loss, rel=1e-4)
        assert theirs["tasks"] == pytest.approx(mine.tasks, rel=1e-4)
        assert len(mine.tasks) == 1  # the same task on both
        for key, value in mine.dynamics.items():
            if key.startswith("entropy/"):
                assert theirs["dynamics"][key] == pytest.approx(value, rel=1e-3)
    assert result["eval_loss"] == pytest.approx(one.eval_loss, rel=1e-4)
    two, single = _tensors(tmp_path / "two"), _tensors(tmp_path / "one")
    for key, value in single.items():
        # AdamW's first steps are signs: single entries near zero go either way.
        assert float((two[key] - value).norm() / value.norm()) < 2e-2, key


_BOTH = """
import os, sys
import torch
from lorasmith.training import trainer

folder = sys.argv.pop(1)
original = trainer.AdapterTrainer.run

def run(self, *args):
    result = original(self, *args)
    state = {k: v.clone() for k, v in self.adapter.state_dict().items()}
    torch.save(state, os.path.join(folder, f"rank{os.environ['RANK']}.pt"))
    return result

trainer.AdapterTrainer.run = run
from lorasmith.cli import main

sys.exit(main())
"""


# -- options -----------------------------------------------------------------------------------


def test_names_and_options_in_all_forms(config: Callable[..., TrainConfig]) -> None:
    as_text = config(dynamics="gauge, budget", dynamics_options={"gauge": {"mu": "1e-3"}})
    as_names = config(dynamics=["gauge", "budget"], dynamics_options={"gauge": {"mu": 0.001}})
    as_mapping = config(dynamics={"gauge": {"mu": 0.001}, "budget": None})
    assert as_text == as_names == as_mapping
    assert TrainConfig.from_dict(as_text.to_dict()) == as_text
    json.dumps(as_text.to_dict())
    first, second = as_text.make_dynamics()
    assert (first.name, getattr(first, "mu", None)) == ("gauge", 0.001)
    assert second.name == "budget"
    assert config(dynamics="none").dynamics == ()
    assert config().make_dynamics() == ()


@pytest.mark.parametrize(
    ("given", "kind", "message", "fix"),
    [
        ({"dynamics": ("guage",)}, UnknownNameError, "no dynamic named", "did you mean 'gauge'?"),
        (
            {"dynamics": ("gauge",), "dynamics_options": {"gauge": {"moment": "keep"}}},
            ConfigError,
            "no option 'moment'",
            "did you mean 'moments'?",
        ),
        (
            {"dynamics": ("gauge",), "dynamics_options": {"budget": {"max_deg": 1}}},
            ConfigError,
            "not switched on",
            "add budget to dynamics",
        ),
        ({"dynamics": ("gauge", "gauge")}, ConfigError, "twice", None),
        (
            {"dynamics": ("budget",), "dynamics_options": {"budget": {"max_deg": -1}}},
            ConfigError,
            "max_deg",
            None,
        ),
    ],
)
def test_mistakes_show_before_the_model_is_loaded(
    run: Run,
    given: dict[str, Any],
    kind: type[Exception],
    message: str,
    fix: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load_no_model(monkeypatch)
    with pytest.raises(kind, match=message) as caught:
        run(**given)
    if fix is not None:
        assert getattr(caught.value, "fix", None) == fix


def test_rules_need_two_trained_factors(run: Run) -> None:
    with pytest.raises(UnknownNameError, match="No low-rank factors"):
        run(dynamics=("gauge",), adapter=AdapterOptions(variant="ia3"))
