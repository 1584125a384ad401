"""The training run: what it learns, how it resumes, how it stops."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lorasmith as ls
from lorasmith.errors import (
    ConfigError,
    LorasmithError,
    MissingDependencyError,
    NonFiniteLossError,
    TrainingError,
)
from lorasmith.training import checkpoints, loss, trainer
from lorasmith.training.config import AdapterOptions, TrainConfig
from lorasmith.training.data import load_rows, tokenise
from lorasmith.training.models import load_model
from lorasmith.training.records import TrainResult
from lorasmith.training.run import train
from tests.training.processes import environment, train_in_two
from tests.training.tiny import ROWS, load_no_model, make_config, write_rows


class Run:
    """Makes runs on the tiny model that differ in what a test says."""

    def __init__(self, base: Path, rows: Path, folder: Path) -> None:
        self.base, self.rows, self.folder = base, rows, folder

    def config(self, output: str = "out", **changes: Any) -> TrainConfig:
        return make_config(self.base, self.rows, self.folder / output, **changes)

    def __call__(self, output: str = "out", **changes: Any) -> TrainResult:
        return train(self.config(output, **changes), progress=False)

    def adapter(self, output: str = "out") -> dict[str, torch.Tensor]:
        weights = ls.read_adapter(self.folder / output)
        return {k: v.clone() for k, v in weights.tensors.items()}


@pytest.fixture
def run(base: Path, rows: Path, tmp_path: Path) -> Run:
    return Run(base, rows, tmp_path)


def _losses(result: TrainResult) -> list[float]:
    return [point.loss for point in result.losses]


# -- what it learns ----------------------------------------------------------------------------


def test_a_run_learns_and_leaves_an_adapter(run: Run, base: Path) -> None:
    result = run(steps=12, eval_split=0.2, eval_steps=6)
    assert result.status == "finished"
    assert result.losses[-1].loss < 0.8 * result.losses[0].loss
    assert [e.step for e in result.evaluations] == [6, 12]
    assert result.eval_loss == result.evaluations[-1].loss
    assert result.steps == 12
    assert result.tokens > 0
    assert result.tokens_per_second > 0
    assert result.peak_memory_bytes > 1 << 20
    assert sorted(p.name for p in run.folder.joinpath("out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "lorasmith.json",
        "training.json",
    ]
    written = json.loads((run.folder / "out" / "training.json").read_text())
    assert written == result.to_dict()
    assert written["config"]["lr"] == 1e-2
    assert written["adapter"]["r"] == 4
    model, _ = load_model(base, device="cpu")
    adapter = ls.load(model, run.folder / "out")
    assert adapter.num_parameters() == result.trainable_parameters


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(24, 1), (6, 4), (5, 5)])
def test_the_loss_is_the_mean_over_all_supervised_tokens_of_the_step(
    run: Run, base: Path, rows: Path, packing: Any, batch_size: int, accumulation: int
) -> None:
    model, tokenizer = load_model(base, device="cpu")
    each: list[torch.Tensor] = []
    for row in tokenise(load_rows(str(rows)), tokenizer):
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        one = F.cross_entropy(logits, labels, reduction="none")
        each.append(one[labels != -100].detach())
    expected = float(torch.cat(each).mean())
    result = run(
        steps=1, batch_size=batch_size, gradient_accumulation=accumulation, packing=packing
    )
    assert len(ROWS) == 24
    assert result.losses[0].loss == pytest.approx(expected, rel=1e-5)


def test_accumulated_batches_make_the_step_of_one_large_batch(run: Run) -> None:
    run("one", steps=3, batch_size=24)
    run("many", steps=3, batch_size=5, gradient_accumulation=5)
    one, many = run.adapter("one"), run.adapter("many")
    for key, value in one.items():
        torch.testing.assert_close(many[key], value, atol=2e-4, rtol=1e-2)


def test_packed_and_padded_rows_teach_the_same(run: Run) -> None:
    packed = run("packed", packing="on", batch_size=24)
    padded = run("padded", packing="off", batch_size=24)
    assert packed.packing.startswith("packed")
    assert padded.packing.startswith("padded")
    assert _losses(packed) == pytest.approx(_losses(padded), rel=1e-3)


def test_runs_are_repeatable_and_depend_on_the_seed(run: Run) -> None:
    first, again, other = run("a", seed=1), run("b", seed=1), run("c", seed=2)
    assert _losses(first) == _losses(again)
    assert _losses(first) != _losses(other)


def test_evaluation_changes_nothing(run: Run) -> None:
    adapter = AdapterOptions(r=4, dropout=0.3)
    without = run("a", adapter=adapter)
    with_it = run("b", adapter=adapter, eval_data=str(run.rows), eval_steps=2)
    assert _losses(without) == _losses(with_it)


@pytest.mark.parametrize("variant", ["lora", "dora", "ia3", "ia3_ff"])
def test_every_variant_trains(run: Run, variant: str) -> None:
    adapter = AdapterOptions(variant=variant)
    # The same rows in each step, so that the losses can be compared.
    result = run(variant, adapter=adapter, steps=4, batch_size=24, lr=5e-2)
    assert result.losses[-1].loss < result.losses[0].loss
    assert ls.read_adapter(run.folder / variant).config.variant == variant


def test_gradient_checkpointing_gives_the_same_run(run: Run) -> None:
    assert _losses(run("a")) == pytest.approx(_losses(run("b", gradient_checkpointing=True)))


def test_weight_decay_is_for_matrices(run: Run) -> None:
    """DoRA's magnitudes and IA3's gains belong near one, not near zero."""
    config = run.config(adapter=AdapterOptions(variant="dora", r=2), weight_decay=0.1)
    model, tokenizer = load_model(run.base, device="cpu")
    names: list[str] = []

    original = trainer.AdapterTrainer.get_decay_parameter_names

    def spy(self: Any, model: Any) -> list[str]:
        found = original(self, model)
        names.extend(found)
        return found

    trainer.AdapterTrainer.get_decay_parameter_names = spy  # type: ignore[method-assign]
    try:
        train(config, model=model, tokenizer=tokenizer, progress=False)
    finally:
        trainer.AdapterTrainer.get_decay_parameter_names = original  # type: ignore[method-assign]
    parameters = dict(model.named_parameters())
    assert names
    assert all(parameters[n].dim() == 2 and parameters[n].requires_grad for n in names)


# -- a model of the caller's -------------------------------------------------------------------


def test_a_model_in_memory_keeps_the_adapter(run: Run) -> None:
    model, tokenizer = load_model(run.base, device="cpu")
    use_cache = model.config.use_cache
    train(run.config(steps=2), model=model, tokenizer=tokenizer, progress=False)
    assert list(ls.attached(model)) == ["default"]
    assert not model.training
    assert model.config.use_cache == use_cache
    saved = ls.read_adapter(run.folder / "out").factors
    for name, factors in ls.factors(model).items():
        torch.testing.assert_close(saved[name].A, factors.A.detach(), rtol=0, atol=0)


def test_after_a_failure_the_callers_model_is_as_it_was(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_model(run.base, device="cpu")
    flags = {n: p.requires_grad for n, p in model.named_parameters()}

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no power")

    monkeypatch.setattr(trainer, "model_loss_output", fail)
    with pytest.raises(RuntimeError, match="no power"):
        train(run.config(), model=model, tokenizer=tokenizer, progress=False)
    assert not ls.attached(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_model_and_tokenizer_come_together(run: Run) -> None:
    with pytest.raises(ConfigError, match="comes with its tokenizer"):
        train(run.config(), model=object())


# -- resuming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["on", "off"])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(run: Run, packing: Any) -> None:
    """Bit for bit, in the second epoch, with dropout, evaluation and a warm-up."""
    settings: dict[str, Any] = {
        "adapter": AdapterOptions(variant="dora", r=4, dropout=0.2),
        "packing": packing,
        "steps": 11,
        "eval_split": 0.2,
        "eval_steps": 4,
        "warmup": 2.0,
    }
    whole = run("whole", **settings, save_steps=7)
    assert whole.epochs > 2
    out = run.folder / "part"
    part = run("part", **settings, save_steps=7)
    # As if it had been killed: what came after the checkpoint is gone.
    (out / "adapter_model.safetensors").unlink()
    assert part.checkpoint == str(out / "checkpoint-7")
    resumed = run("part", **settings, save_steps=7, resume="last")
    assert _losses(resumed) == _losses(whole)
    assert [e.loss for e in resumed.evaluations] == [e.loss for e in whole.evaluations]
    assert resumed.tokens == whole.tokens
    first, second = run.adapter("whole"), run.adapter("part")
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_pissa_resumes_too(run: Run) -> None:
    adapter = AdapterOptions(r=4, init="pissa")
    whole = run("whole", adapter=adapter)
    run("part", adapter=adapter, save_steps=3)
    resumed = run(
        "part", adapter=adapter, save_steps=3, resume=str(run.folder / "part" / "checkpoint-3")
    )
    assert _losses(resumed) == _losses(whole)


def test_checkpoints_hold_the_adapter_only(run: Run, base: Path) -> None:
    run(steps=6, save_steps=2, save_total_limit=2)
    found = checkpoints.list_checkpoints(run.folder / "out")
    assert [p.name for p in found] == ["checkpoint-6", "checkpoint-4"]
    from safetensors import safe_open

    for path in found[0].glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert all(
                "embed_tokens" not in key and "base_layer" not in key for key in set(file.keys())
            )
    assert ls.read_adapter(found[0]).config.to_dict()["r"] == 4
    assert checkpoints.defect(found[0]) is None


def test_a_damaged_checkpoint_is_skipped_with_a_message(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run("whole", steps=6)
    run("out", steps=6, save_steps=2)
    output = run.folder / "out"
    newest, older = checkpoints.list_checkpoints(output)
    assert (newest.name, older.name) == ("checkpoint-6", "checkpoint-4")
    kept = shutil.copytree(newest, run.folder / "kept")
    for damage in (*_MISSING, "flip", "truncate"):
        shutil.rmtree(newest)
        shutil.copytree(kept, newest)
        assert checkpoints.choose_checkpoint("last", output) == newest.resolve()
        _damage(newest, damage)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lorasmith"):
            assert checkpoints.choose_checkpoint("last", output) == older.resolve()
        assert "Skipping" in caplog.text, damage
        assert "checkpoint-6" in caplog.text
    resumed = run("out", steps=6, save_steps=2, resume="last")
    assert _losses(resumed) == _losses(whole)


_MISSING = {
    "no-manifest": "manifest.json",
    "no-optimizer": "optimizer.safetensors",
    "no-scheduler": "scheduler.safetensors",
    "no-rng": "rng_state.safetensors",
    "no-adapter": "adapter_model.safetensors",
}


def _damage(path: Path, how: str) -> None:
    state = path / "adapter_state.safetensors"
    content = state.read_bytes()
    if how == "truncate":
        state.write_bytes(content[:-8])
    elif how == "flip":
        state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        (path / _MISSING[how]).unlink()


def test_no_silent_restart(run: Run) -> None:
    with pytest.raises(TrainingError, match="no checkpoint to resume from"):
        run("out", resume="last")
    run("out", steps=4, save_steps=4)
    path = run.folder / "out" / "checkpoint-4"
    (path / "optimizer.safetensors").unlink()
    for resume in ("last", "auto", str(path)):
        with pytest.raises(TrainingError, match=r"optimizer\.safetensors is missing"):
            run("out", steps=4, resume=resume)


def test_auto_begins_where_there_is_nothing(run: Run) -> None:
    assert run("out", resume="auto").steps == 6


def test_what_a_killed_writer_left_is_removed(run: Run) -> None:
    left = run.folder / "out" / ".checkpoint-3.partial"
    left.mkdir(parents=True)
    run("out")
    assert not left.exists()


def test_another_adapter_cannot_be_resumed(run: Run) -> None:
    run("out", save_steps=3)
    with pytest.raises(TrainingError, match="another adapter"):
        run("out", adapter=AdapterOptions(r=2), resume="last")


def test_other_rows_cannot_be_resumed(run: Run, tmp_path: Path) -> None:
    run("out", save_steps=3)
    run.rows = write_rows(tmp_path / "other.jsonl", ROWS[1:])
    with pytest.raises(TrainingError, match="rows are not those"):
        run("out", resume="last")


def test_other_options_are_told(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run("out", save_steps=3, steps=3)
    with caplog.at_level(logging.WARNING, "lorasmith"):
        run("out", save_steps=3, steps=5, resume="last", changed="accept")
    assert "steps 3 → 5" in caplog.text


# -- the output --------------------------------------------------------------------------------


def test_an_earlier_run_is_not_overwritten_unasked(run: Run) -> None:
    run("out", save_steps=3)
    with pytest.raises(TrainingError, match="holds an earlier run"):
        run("out")
    result = run("out", overwrite=True, steps=2)
    assert result.checkpoint is None
    assert not checkpoints.list_checkpoints(run.folder / "out")


def test_the_output_may_not_be_a_file(run: Run) -> None:
    (run.folder / "out").write_text("")
    with pytest.raises(ConfigError, match="output is a file"):
        run("out")


def test_mistakes_show_before_the_model_is_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_no_model(monkeypatch)
    with pytest.raises(LorasmithError):
        run(adapter=AdapterOptions(variant="ia3", r=3))
    with pytest.raises(LorasmithError):
        run(device="cuda:99")


def test_a_tracker_that_is_not_installed(run: Run) -> None:
    import importlib.util

    missing = [n for n in ("wandb", "tensorboard", "mlflow") if not importlib.util.find_spec(n)]
    if not missing:
        pytest.skip("every tracker is installed")
    with pytest.raises(MissingDependencyError) as caught:
        run(report_to=(missing[0],))
    assert caught.value.key == "report_to"


# -- early stopping ----------------------------------------------------------------------------


def test_early_stopping_keeps_the_best(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    states: dict[int, dict[str, torch.Tensor]] = {}
    course = iter([3.0, 2.0, 2.5, 2.1, 1.0])
    original = trainer.AdapterTrainer.consider

    def consider(self: Any, _: float) -> bool:
        states[self.state.global_step] = {
            k: v.clone() for k, v in self.adapter.state_dict().items()
        }
        return original(self, next(course))

    monkeypatch.setattr(trainer.AdapterTrainer, "consider", consider)
    model, tokenizer = load_model(run.base, device="cpu")
    config = run.config(steps=20, eval_data=str(run.rows), eval_steps=2, early_stopping=2)
    result = train(config, model=model, tokenizer=tokenizer, progress=False)
    assert (result.status, result.steps, result.best_step) == ("stopped early", 8, 4)
    assert result.eval_loss == 2.0
    kept = ls.attached(model)["default"].state_dict()
    assert all(torch.equal(kept[k], states[4][k]) for k in kept)


# -- what must not happen ----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(
    run: Run, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = run("good", steps=2, schedule="constant", warmup=0.0)
    original = loss.model_loss_output
    calls = {"n": 0}

    def poisoned(*args: Any, **kwargs: Any) -> loss.LossOutput:
        calls["n"] += 1
        output = original(*args, **kwargs)
        return replace(output, loss=output.loss * bad) if calls["n"] == 3 else output

    monkeypatch.setattr(trainer, "model_loss_output", poisoned)
    with pytest.raises(NonFiniteLossError, match="step 3") as caught:
        run("out", schedule="constant", warmup=0.0)
    last = run.folder / "out" / "last-finite"
    assert caught.value.file == str(last)
    assert not (run.folder / "out" / "adapter_config.json").exists()
    assert good.steps == 2
    kept, expected = run.adapter("out/last-finite"), run.adapter("good")
    assert all(torch.equal(kept[k], expected[k]) for k in expected)


def test_a_gradient_that_is_not_finite_stops_the_run(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loss.model_loss_output

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g * float("nan")

    def poisoned(*args: Any, **kwargs: Any) -> loss.LossOutput:
        output = original(*args, **kwargs)
        return replace(output, loss=Poison.apply(output.loss))

    monkeypatch.setattr(trainer, "model_loss_output", poisoned)
    with pytest.raises(NonFiniteLossError, match="gradient is not finite at step 1"):
        run()


# -- signals and processes ---------------------------------------------------------------------

CLI = "import sys; from lorasmith.cli import main; sys.exit(main())"


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_checkpoint_to_resume_from(
    run: Run, number: signal.Signals, code: int
) -> None:
    arguments = [
        *("train", str(run.base), str(run.rows), "-o", str(run.folder / "out")),
        *("--lr", "1e-3", "--batch-size", "4", "--device", "cpu", "--json"),
        *("--schedule", "constant", "--log-steps", "1", "--adapter.r", "4"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", CLI, *arguments, "--steps", "20000", "--save-steps", "5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    deadline = time.monotonic() + 240
    while not checkpoints.list_checkpoints(run.folder / "out"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    result = json.loads(out)
    assert result["status"] == "interrupted"
    path = Path(result["checkpoint"])
    assert path.name == f"checkpoint-{result['steps']}"
    assert checkpoints.defect(path) is None
    resumed = run(
        "out",
        lr=1e-3,
        schedule="constant",
        steps=result["steps"] + 2,
        resume="last",
        changed="accept",
    )
    assert resumed.steps == result["steps"] + 2
    assert _losses(resumed)[: result["steps"]] == [p["loss"] for p in result["losses"]]


@pytest.mark.slow
@pytest.mark.integration
def test_two_processes_make_the_run_of_one(run: Run) -> None:
    """DDP over two CPU processes equals one process with twice the batch."""
    settings = ("--steps", "3", "--lr", "1e-2", "--device", "cpu", "--adapter.r", "4")
    output = run.folder / "two"
    result = train_in_two(
        *(run.base, run.rows, "-o", output, *settings),
        *("--batch-size", "3", "--packing", "off", "--eval-split", "0.2"),
    )
    one = run("one", steps=3, batch_size=6, packing="off", eval_split=0.2)
    assert result["final_loss"] == pytest.approx(one.final_loss, rel=1e-4)
    assert result["eval_loss"] == pytest.approx(one.eval_loss, rel=1e-4)
    assert result["tokens"] == one.tokens
    two, single = run.adapter("two"), run.adapter("one")
    for key, value in single.items():
        torch.testing.assert_close(two[key], value, atol=2e-4, rtol=1e-2)


def test_results_are_frozen_records(run: Run) -> None:
    result = run(steps=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.steps = 5  # type: ignore[misc]
    json.dumps(result.to_dict(), allow_nan=False)
