"""Two gloo processes under DDP make the run of one with the whole batch: in a plain loop, in
Transformers' Trainer, and with clipping while each task has an adapter of its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import lorasmith as ls
from lorasmith.dynamics.callback import DynamicsCallback
from lorasmith.dynamics.gauge import gauge_residual
from lorasmith.dynamics.protocol import Dynamic
from tests.models import llama
from tests.training.tiny import make_model, make_tokenizer

pytestmark = pytest.mark.integration

ROWS, LENGTH = 8, 7


def _rules() -> list[Dynamic]:
    penalty = ls.OrthogonalityPenalty(weight=5.0, max_ratio=0.5)
    return [
        ls.GaugeProjection(mu=1.0),
        ls.EntropyGovernor(penalty),
        ls.RotationBudget(max_deg=1.0, per="projection"),
    ]


def _factors(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, one in ls.factors(model).items():
        found[f"{name}.A"], found[f"{name}.B"] = one.A.detach().clone(), one.B.detach().clone()
    return found


# -- one process or two --------------------------------------------------------------------


def _worker(rank: int, port: int, folder: str, jobs: dict[str, Any]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {name: work(rank, 2, **options) for name, (work, options) in jobs.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both processes found, by job; all jobs in one start, which takes most of the time."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (port, str(folder), JOBS), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))
    return first, second


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def _close(two: dict[str, Tensor], one: dict[str, Tensor]) -> None:
    assert two.keys() == one.keys()
    for key, value in one.items():
        assert float((two[key] - value).norm() / value.norm()) < 1e-4, key


# -- a plain loop --------------------------------------------------------------------------


def _batches(rank: int, world: int, steps: int, accumulate: int) -> list[list[dict[str, Tensor]]]:
    """Of each step its micro-batches, each the share of this process."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(steps):
        ids = torch.randint(0, 32, (accumulate, ROWS, LENGTH), generator=generator)
        parts = [micro[rank * ROWS // world : (rank + 1) * ROWS // world] for micro in ids]
        found.append([{"input_ids": part, "labels": part} for part in parts])
    return found


def _loop(rank: int, world: int, *, accumulate: int = 1, peft: bool = False) -> dict[str, Any]:
    model: Any = llama().train()
    torch.manual_seed(1)
    if peft:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    else:
        ls.attach(model, ls.LoRAConfig(r=2))
    outer = DistributedDataParallel(model) if world > 1 else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0, momentum=0.9)
    rules = _rules()
    angles = []
    with ls.Dynamics(outer, rules, optimizer) as driver:
        for step in _batches(rank, world, 3, accumulate):
            for i, batch in enumerate(step):
                last = i == len(step) - 1
                with outer.no_sync() if world > 1 and not last else contextlib.nullcontext():
                    (outer(**batch).loss / accumulate).backward()
            torch.nn.utils.clip_grad_norm_(trained, 0.5)
            optimizer.step()
            optimizer.zero_grad()
            angles.append(driver.metrics()["budget/max_deg"])
        metrics = driver.metrics()
    return {"factors": _factors(model), "metrics": metrics, "angles": angles}


@pytest.mark.slow
@pytest.mark.parametrize("job", ["loop", "loop, accumulated", "loop, peft"])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_plain_loop(two: Any, job: str) -> None:
    first, second = (found[job] for found in two)
    one = _loop(0, 1, **JOBS[job][1])
    assert _same(first["factors"], second["factors"])
    _close(first["factors"], one["factors"])
    assert first["metrics"]["entropy/entropy"] == pytest.approx(
        one["metrics"]["entropy/entropy"], rel=1e-5
    )
    assert max(one["angles"]) == pytest.approx(1.0, rel=1e-3)  # the budget had something to do
    for name in (key.removesuffix(".A") for key in first["factors"] if key.endswith(".A")):
        A, B = (first["factors"][f"{name}.{x}"] for x in "AB")
        assert float(gauge_residual(A, B, directions="common")) < 1e-5


# -- Transformers' Trainer -----------------------------------------------------------------


def _trainer(rank: int, world: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (24, 12), generator=generator).tolist()
    model = make_model(make_tokenizer())
    torch.manual_seed(1)
    ls.attach(model, ls.LoRAConfig(r=4, targets=("q_proj", "v_proj")))
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is saved
        per_device_train_batch_size=8 // world,
        max_steps=3,
        learning_rate=1.0,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if world > 1 else None,
        seed=3,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        callbacks=[DynamicsCallback(_rules())],
    )
    assert arguments.world_size == world
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"factors": _factors(model), "logs": logs}


@pytest.mark.slow
def test_transformers_trainer(two: Any) -> None:
    first, second = (found["trainer"] for found in two)
    one = _trainer(0, 1)
    assert _same(first["factors"], second["factors"])
    _close(first["factors"], one["factors"])
    assert len(one["logs"]) == len(first["logs"]) == 3
    for mine, theirs in zip(one["logs"], first["logs"], strict=True):
        for key in ("loss", "grad_norm", "entropy/entropy", "entropy/lambda", "budget/max_deg"):
            assert theirs[key] == pytest.approx(mine[key], rel=1e-3), key
    assert one["logs"][-1]["budget/max_deg"] == pytest.approx(1.0, rel=1e-3)


# -- task adapters and what comes before the step ------------------------------------------


def _tasks(rank: int, world: int, *, accumulate: int = 1, scaled: bool = False) -> dict[str, Any]:
    """Multi from the first step on; the processes have other tasks, in half of the steps."""
    model = llama().train()
    torch.manual_seed(1)
    ls.attach(model, ls.LoRAConfig(r=2))
    for part in ls.attached(model)["default"].layers().values():
        part["B"].data.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    outer = DistributedDataParallel(model, find_unused_parameters=True) if world > 1 else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=scaled)
    stress = ls.StressController(every=1)
    norms = []
    with ls.Dynamics(outer, stress, optimizer, tasks=("a", "b")):
        for number, step in enumerate(_batches(rank, world, 4, accumulate)):
            for i, batch in enumerate(step):
                # Rows of the whole batch: a a a a b b b b, or all of one task.
                names = ["ab"[number % 4 // 2]] * ROWS if number % 2 else ["a"] * 4 + ["b"] * 4
                mine = names[rank * ROWS // world : (rank + 1) * ROWS // world]
                last = i == len(step) - 1
                with outer.no_sync() if world > 1 and not last else contextlib.nullcontext():
                    scaler.scale(outer(**batch, task=mine).loss / accumulate).backward()
            scaler.unscale_(optimizer)
            live = [p for g in optimizer.param_groups for p in g["params"]]
            norms.append(float(torch.nn.utils.clip_grad_norm_(live, 0.05)))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if number == 0:
                with torch.no_grad():
                    stress._enter_multi()
        assert stress.mode == "multi"
        state = {
            f"{task}/{name}": parameter.detach().clone()
            for task, adapter in stress.task_adapter_names.items()
            for name, parameter in ls.attached(model)[adapter].named_parameters()
        }
    return {"factors": state, "norms": norms}


@pytest.mark.slow
@pytest.mark.parametrize("job", ["tasks", "tasks, accumulated", "tasks, scaled"])
def test_gradients_of_task_adapters_are_averaged_before_they_are_clipped(
    two: Any, job: str
) -> None:
    """Each process clips by the norm of the average, as it does for what DDP knows."""
    first, second = (found[job] for found in two)
    one = _tasks(0, 1, **JOBS[job][1])
    assert first["norms"] == pytest.approx(second["norms"], rel=1e-6)
    assert first["norms"] == pytest.approx(one["norms"], rel=1e-4)
    assert min(one["norms"]) > 0.05  # all of them clipped
    assert _same(first["factors"], second["factors"])
    _close(first["factors"], one["factors"])


JOBS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "loop": (_loop, {}),
    "loop, accumulated": (_loop, {"accumulate": 2}),
    "loop, peft": (_loop, {"peft": True}),
    "tasks": (_tasks, {}),
    "tasks, accumulated": (_tasks, {"accumulate": 2}),
    "tasks, scaled": (_tasks, {"scaled": True}),
    "trainer": (_trainer, {}),
}
