"""Dynamics in Transformers' own Trainer: nothing subclassed, our adapters and PEFT's."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import lorasmith as ls
from lorasmith.dynamics.callback import DynamicsCallback
from lorasmith.dynamics.driver import STATE_KEY
from lorasmith.dynamics.entropy import EntropyGovernor
from lorasmith.dynamics.gauge import GaugeProjection
from lorasmith.dynamics.orthogonality import OrthogonalityPenalty
from lorasmith.dynamics.protocol import Dynamic, Step
from lorasmith.dynamics.rotation_budget import RotationBudget
from lorasmith.dynamics.stress import StressController
from tests.training.tiny import make_model, make_tokenizer

#: PEFT asks Transformers for something by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LENGTH = 12


def _rows(count: int = 16) -> Dataset:
    """Rows of one length, so that a mean of batch means is the mean over all tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (count, LENGTH), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def _ours() -> Any:
    model = make_model(make_tokenizer())
    torch.manual_seed(1)
    ls.attach(model, ls.LoRAConfig(r=4, targets=("q_proj", "v_proj")))
    return model


def _peft(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    model = make_model(make_tokenizer()).to(dtype)
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **options)
    return get_peft_model(model, config)


def _all() -> list[Dynamic]:
    return [
        GaugeProjection(mu=2.0),
        EntropyGovernor(OrthogonalityPenalty("shadow", refresh_every=2)),
        RotationBudget(max_deg=1.0, per="projection"),
        StressController(),
    ]


def _arguments(folder: Path, **changes: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(**{**given, **changes})


def _train(
    model: Any, rules: list[Dynamic], folder: Path, *, resume: str | None = None, **changes: Any
) -> Trainer:
    callbacks = [DynamicsCallback(rules)] if rules else []
    trainer = Trainer(
        model,
        _arguments(folder, **changes),
        train_dataset=_rows(),
        eval_dataset=_rows(4),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def _factors(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {
        name: (f.A.detach().clone(), f.B.detach().clone()) for name, f in ls.factors(model).items()
    }


def _angle(model: Any) -> float:
    """The largest angle between a weight and the adapted weight, in degrees, dense."""
    largest = 0.0
    for found in ls.factors(model).values():
        assert found.base is not None
        W = found.base.weight.detach().double()
        whole = W + found.scaling * found.B.detach().double() @ found.A.detach().double()
        cosine = float((W * whole).sum() / W.norm() / whole.norm())
        largest = max(largest, math.degrees(math.acos(min(1.0, cosine))))
    return largest


@pytest.mark.parametrize(
    "make",
    [
        _ours,
        _peft,
        lambda: _peft(use_rslora=True),
        lambda: _peft(use_dora=True),
    ],
    ids=["ours", "peft", "peft-rslora", "peft-dora"],
)
def test_rules_act_in_a_plain_trainer(make: Callable[[], Any], tmp_path: Path) -> None:
    rules: list[Dynamic] = [GaugeProjection(mu=2.0), EntropyGovernor()]
    model = make()
    trainer = _train(model, rules, tmp_path, per_device_train_batch_size=16)
    for A, B in _factors(model).values():
        left, right = A.double() @ A.double().mT, 2.0 * B.double().mT @ B.double()
        assert float((left - right).norm() / left.norm()) < 1e-4
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 6
    assert all("gauge/residual" in entry and entry["entropy/entropy"] > 0 for entry in logs)
    assert logs[-1]["loss"] < logs[0]["loss"]
    # Nothing stays behind.
    assert not model._forward_hooks
    assert not trainer.optimizer.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("make", [_ours, _peft], ids=["ours", "peft"])
def test_the_budget_holds(make: Callable[[], Any], tmp_path: Path) -> None:
    free = make()
    _train(free, [], tmp_path / "free")
    assert _angle(free) > 1.0
    bound = make()
    _train(bound, [RotationBudget(max_deg=0.5, per="projection")], tmp_path / "bound")
    assert _angle(bound) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("make", [_ours, _peft], ids=["ours", "peft"])
def test_accumulated_batches_make_the_step_of_one(make: Callable[[], Any], tmp_path: Path) -> None:
    """2 × 4 rows equal 1 × 8, with all dynamics on: none acts, or counts, a micro-batch."""
    one, two = make(), make()
    kept = [_all(), _all()]
    first = _train(one, kept[0], tmp_path / "a", per_device_train_batch_size=8)
    second = _train(two, kept[1], tmp_path / "b", gradient_accumulation_steps=2)
    for a, b in zip(first.state.log_history, second.state.log_history, strict=True):
        for key in a.keys() & b.keys():
            if key in ("loss", "entropy/entropy", "entropy/lambda", "stress/phi"):
                assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-5), key
    mine, theirs = _factors(one), _factors(two)
    for name, (A, B) in mine.items():
        torch.testing.assert_close(theirs[name][1] @ theirs[name][0], B @ A, rtol=2e-2, atol=2e-4)
    stress = kept[1][-1]
    assert isinstance(stress, StressController)
    assert [record.step for record in stress.history] == list(range(6))


class _Push(Dynamic):
    """Adds a known gradient, and notes the norm that it found."""

    name = "push"

    def __init__(self) -> None:
        self.found: list[float] = []

    def before_step(self, step: Step) -> None:
        gradients = [p.grad for g in step.optimizer.param_groups for p in g["params"]]
        self.found.append(
            float(torch.nn.utils.get_total_norm([g for g in gradients if g is not None]))
        )
        for site in self.context.sites:
            step.add_gradient(site.B, torch.full_like(site.B, 100.0))


def test_clipping_bounds_the_gradient_of_the_task_alone(tmp_path: Path) -> None:
    rule = _Push()
    trainer = _train(_ours(), [rule], tmp_path, max_grad_norm=0.1, optim="sgd", learning_rate=1e-6)
    assert rule.found == pytest.approx([0.1] * 6, rel=1e-3)
    # The log shows the norm before clipping, and nothing of the push.
    assert all(0.1 < e["grad_norm"] < 50 for e in trainer.state.log_history if "grad_norm" in e)


class _Code:
    """A pickle that makes a directory where it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_trainers_own_checkpoint_with_code_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer writes pickles; on a resume it reads them with ``weights_only``, and runs nothing."""
    options: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3}
    _train(_ours(), [GaugeProjection()], tmp_path / "run", **options)
    folder = tmp_path / "run" / "checkpoint-3"
    seen: list[str] = []
    opened: list[tuple[str, Any]] = []
    on = True
    load = torch.load

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if on and event in ("os.mkdir", "os.system", "subprocess.Popen", "pickle.find_class"):
            seen.append(f"{event} {arguments[0]}")

    def noted(file: Any, *arguments: Any, **given: Any) -> Any:
        opened.append((Path(file).name, given.get("weights_only")))
        return load(file, *arguments, **given)

    sys.addaudithook(hook)
    try:
        monkeypatch.setattr(torch, "load", noted)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            kept = (folder / name).read_bytes()
            torch.save({"state": _Code(tmp_path / "RAN")}, folder / name)
            with pytest.raises(pickle.UnpicklingError, match=r"weights_only|Weights only"):
                _train(
                    *(_ours(), [GaugeProjection()], tmp_path / "run"),
                    resume=str(folder),
                    **options,
                )
            (folder / name).write_bytes(kept)
    finally:
        on = False
    # Only what the models' and Trainer's own files may be.
    assert not [s for s in seen if "RAN" in s or not s.startswith("os.mkdir")]
    assert not (tmp_path / "RAN").exists()
    assert {name for name, _ in opened} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert all(only is True for _, only in opened)


@pytest.mark.parametrize("make", [_ours, _peft], ids=["ours", "peft"])
def test_resuming_from_trainers_own_checkpoint_is_bit_exact(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps"}
    options |= {"eval_steps": 2}
    whole = make()
    full = _train(whole, _all(), tmp_path / "run", **options)
    saved = torch.load(tmp_path / "run" / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert STATE_KEY in saved["param_groups"][0]
    again = make()
    resumed = _train(
        again, _all(), tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-3"), **options
    )
    mine, theirs = _factors(whole), _factors(again)
    for name, pair in mine.items():
        assert all(torch.equal(x, y) for x, y in zip(pair, theirs[name], strict=True))
    skip = {"epoch", "step"}
    one = [e for e in full.state.log_history if "loss" in e and e["step"] > 3]
    two = [e for e in resumed.state.log_history if "loss" in e and e["step"] > 3]
    assert [{k: v for k, v in e.items() if k not in skip} for e in one] == [
        {k: v for k, v in e.items() if k not in skip} for e in two
    ]


def test_a_checkpoint_without_dynamics_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    _train(_peft(), [], tmp_path, **options)
    with caplog.at_level("WARNING", "lorasmith"):
        _train(
            _peft(), [GaugeProjection()], tmp_path, resume=str(tmp_path / "checkpoint-3"), **options
        )
    assert "holds no state of the dynamics" in caplog.text


def test_other_dynamics_do_not_resume(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    _train(_peft(), [GaugeProjection()], tmp_path, **options)
    with pytest.raises(ls.LorasmithError, match="other dynamics"):
        _train(
            _peft(), [RotationBudget()], tmp_path, resume=str(tmp_path / "checkpoint-3"), **options
        )


def test_evaluations_reach_the_rules(tmp_path: Path) -> None:
    governor = EntropyGovernor()
    trainer = _train(_peft(), [governor], tmp_path, eval_strategy="steps", eval_steps=2)
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert len(governor.history) == len(losses) == 3


def test_autocast_in_bfloat16(tmp_path: Path) -> None:
    model = _peft()
    options: dict[str, Any] = {"bf16": True, "per_device_train_batch_size": 16}
    trainer = _train(model, [GaugeProjection(mu=2.0), EntropyGovernor()], tmp_path, **options)
    for A, B in _factors(model).values():
        assert A.dtype == torch.float32
        left, right = A.double() @ A.double().mT, 2.0 * B.double().mT @ B.double()
        assert float((left - right).norm() / left.norm()) < 1e-4
    logs = [e for e in trainer.state.log_history if "loss" in e]
    assert logs[-1]["loss"] < logs[0]["loss"]


def test_a_step_that_the_gradient_scaler_drops_is_no_step() -> None:
    """GradScaler unscales, finds an infinity, and calls no optimiser: no rule may see a step."""
    model = _ours()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    rows = torch.tensor(_rows()["input_ids"])
    rule = _Push()
    with ls.Dynamics(model, [rule, GaugeProjection(mu=2.0)], optimizer) as driver:
        model.train()
        for step in range(4):
            loss = model(input_ids=rows, labels=rows).loss
            scaler.scale(loss).backward()
            if step == 1:
                parameters[0].grad[0, 0] = math.inf  # type: ignore[index]
            before = [p.detach().clone() for p in parameters]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            moved = not all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
            assert moved == (step != 1)
        assert driver.steps == 3
        assert len(rule.found) == 3
    # What the rules see is unscaled: the norm of the task's gradient itself.
    fresh = _ours()
    fresh.train()
    fresh(input_ids=rows, labels=rows).loss.backward()
    gradients = [p.grad for p in fresh.parameters() if p.grad is not None]
    assert rule.found[0] == pytest.approx(float(torch.nn.utils.get_total_norm(gradients)), rel=1e-4)


def test_tasks_reach_the_rules_through_the_batch(tmp_path: Path) -> None:
    stress = StressController(weights=(0.0, 1.0, 1.0), multi=(0.0, 1e-6), cooldown=2, every=1)
    rows = _rows().add_column("task", ["a", "b"] * 8)

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        tensors: dict[str, Any] = {
            key: torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels")
        }
        return {**tensors, "task": [row["task"] for row in batch]}

    trainer = Trainer(
        _ours(),
        _arguments(tmp_path, remove_unused_columns=False),
        train_dataset=rows,
        data_collator=collate,
        callbacks=[DynamicsCallback(stress, tasks=("a", "b"))],
    )
    trainer.train()
    assert "multi" in {record.mode for record in stress.history}
    assert list(ls.attached(trainer.model)) == ["default"]


def test_a_failed_run_does_not_spoil_the_next(tmp_path: Path) -> None:
    callback = DynamicsCallback([GaugeProjection()])
    model = _peft()

    def explode(_: Any) -> Any:
        raise RuntimeError("no data")

    arguments = _arguments(tmp_path)
    broken = Trainer(
        model, arguments, train_dataset=_rows(), data_collator=explode, callbacks=[callback]
    )
    with pytest.raises(RuntimeError, match="no data"):
        broken.train()
    good = Trainer(model, arguments, train_dataset=_rows(), callbacks=[callback])
    good.train()
    assert callback.driver is None
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.filterwarnings("ignore")  # TRL's own, of Transformers' new names
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_trl(tmp_path: Path) -> None:
    trl = importlib.import_module("trl")
    rule = GaugeProjection(mu=2.0)
    model = _peft()
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
        ),
        train_dataset=Dataset.from_dict({"text": ["Count to three please"] * 8}),
        processing_class=make_tokenizer(),
        callbacks=[DynamicsCallback([rule, EntropyGovernor()])],
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "entropy/entropy" in entry]
    assert logs
    for entry in logs:  # TRL logs the entropy of its own
        assert entry["entropy/entropy"] == pytest.approx(entry["entropy"], rel=1e-3)
    for A, B in _factors(model).values():
        left, right = A.double() @ A.double().mT, 2.0 * B.double().mT @ B.double()
        assert float((left - right).norm() / left.norm()) < 1e-4


class _Note(Dynamic):
    """Keeps the factors as they are after certain steps."""

    name = "note"

    def __init__(self, *steps: int) -> None:
        self.wanted = steps
        self.found: dict[int, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}

    def after_step(self, step: Step) -> None:
        if step.number + 1 in self.wanted:
            self.found[step.number + 1] = {
                site.key: (site.A.detach().double(), site.B.detach().double())
                for site in self.context.sites
            }


def test_past_the_refresh_of_the_shadow(tmp_path: Path) -> None:
    """EgoRA's wrapper crashes at step 100. The shadow is the dense one, and small on disk."""
    note, penalty = _Note(100), OrthogonalityPenalty("shadow", weight=0.01)
    options: dict[str, Any] = {"max_steps": 203, "save_strategy": "steps", "save_steps": 203}
    options |= {"learning_rate": 1e-3, "logging_steps": 50, "lr_scheduler_type": "constant"}
    note_2 = _Note(200)
    note_2.name = "note 2"  # type: ignore[misc]
    trainer = _train(_ours(), [penalty, note, note_2], tmp_path / "with", **options)
    assert penalty.refresh_every == 100
    logs = {e["step"]: e for e in trainer.state.log_history if "loss" in e}
    assert [logs[n]["orthogonality/penalty"] > 0 for n in (50, 100, 150, 200)] == [
        *(False, True, True, True)
    ]
    folder = tmp_path / "with" / "checkpoint-203"
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    rule = saved["param_groups"][0][STATE_KEY]["dynamics"]["rules"]["orthogonality"]
    assert rule["shadows"].keys() == note.found[100].keys()
    for key, shadow in rule["shadows"].items():
        first, second = (
            torch.linalg.pinv(B @ A, rtol=1e-6).mT
            for A, B in (note.found[100][key], note_2.found[200][key])
        )
        m = 0.9 * (1 - 0.9) / (1 - 0.9**2)  # corrected for the start at zero
        dense = m * first + (1 - m) * second
        got = shadow["U"].double() @ shadow["V"].double().mT
        assert float((got - dense).norm() / dense.norm()) < 1e-4
    # Twice the adapter in the checkpoint, not d / r times; nothing of a batch rides along.
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    adapter = sum(p.numel() * p.itemsize for p in trained)
    tensors = [t for one in rule["shadows"].values() for t in one.values()]
    assert sum(t.numel() * t.itemsize for t in tensors) <= 2 * adapter + 16 * len(rule["shadows"])
    assert all(t.untyped_storage().nbytes() == t.numel() * t.itemsize for t in tensors)
    _train(
        _ours(), [_Note(1)], tmp_path / "without", **{**options, "max_steps": 1, "save_steps": 1}
    )
    sizes = [
        (tmp_path / name / f"checkpoint-{n}" / "optimizer.pt").stat().st_size
        for name, n in (("with", 203), ("without", 1))
    ]
    assert sizes[0] - sizes[1] < 2 * adapter + 1024 * (4 + len(tensors))


def test_changed_options_do_not_resume_unless_accepted(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 4}
    _train(_ours(), [GaugeProjection(mu=2.0), RotationBudget()], tmp_path, **options)
    checkpoint = str(tmp_path / "checkpoint-3")
    with pytest.raises(ls.LorasmithError, match=r"gauge\.mu 2\.0"):
        _train(_ours(), [GaugeProjection(mu=1.0), RotationBudget()], tmp_path, resume=checkpoint)
    with pytest.raises(ls.LorasmithError, match="order gauge, budget"):
        _train(_ours(), [RotationBudget(), GaugeProjection(mu=2.0)], tmp_path, resume=checkpoint)
    model = _ours()
    callback = DynamicsCallback([RotationBudget(), GaugeProjection(mu=1.0)], changed="accept")
    trainer = Trainer(
        model, _arguments(tmp_path, max_steps=4), train_dataset=_rows(), callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    for A, B in _factors(model).values():
        left, right = A.double() @ A.double().mT, B.double().mT @ B.double()
        assert float((left - right).norm() / left.norm()) < 1e-4
    with pytest.raises(ls.LorasmithError, match="refuse or accept"):
        DynamicsCallback(GaugeProjection(), changed="no")  # type: ignore[arg-type]
