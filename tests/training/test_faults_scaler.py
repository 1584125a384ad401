"""States that a CPU run does not have: of a gradient scaler, and a device's random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from lorasmith.errors import TrainingError
from lorasmith.training import checkpointing
from lorasmith.training.config import AdapterOptions, TrainConfig
from lorasmith.training.run import train
from lorasmith.training.states import load_state, random_state, save_state, set_random_state
from tests.training.tiny import make_model, make_tokenizer, write_rows


@pytest.fixture
def scalers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every run scales its loss; the scale doubles after each step. The scalers of the runs."""
    made: list[Any] = []
    plain = Accelerator.__init__

    def scaled(self: Any, *arguments: Any, **options: Any) -> None:
        plain(self, *arguments, **options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
        made.append(self.scaler)

    monkeypatch.setattr(Accelerator, "__init__", scaled)
    return made


def _run(folder: Path, **changes: Any) -> Any:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    rows = folder / "rows.jsonl"
    if not rows.exists():
        write_rows(rows)
    settings: dict[str, Any] = {
        "output": folder / "out",
        "adapter": AdapterOptions(r=2),
        "steps": 4,
        "save_steps": 3,
        "batch_size": 2,
        "device": "cpu",
        "max_grad_norm": 0.0,  # clipping would see the scaled gradients
    }
    config = TrainConfig("tiny", str(rows), **{**settings, **changes})
    return train(config, model=model, tokenizer=tokenizer, progress=False)


def test_a_gradient_scaler_goes_on_where_it_was(
    scalers: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _run(tmp_path)
    assert scalers[-1].get_scale() == 4.0 * 2**4
    file = tmp_path / "out" / "checkpoint-3" / checkpointing.SCALER
    state = load_state(file)
    assert state["scale"] == 4.0 * 2**3
    assert state["growth_interval"] == 1

    given: list[dict[str, Any]] = []
    load = torch.amp.GradScaler.load_state_dict

    def noted(self: Any, values: dict[str, Any]) -> None:
        given.append(dict(values))
        load(self, values)

    monkeypatch.setattr(torch.amp.GradScaler, "load_state_dict", noted)
    resumed = _run(tmp_path, resume=str(file.parent))
    assert given == [state]
    assert scalers[-1].get_scale() == 4.0 * 2**4  # one step more, not four from the beginning
    assert resumed.losses == whole.losses


def test_a_scaler_s_state_that_is_another_s(scalers: list[Any], tmp_path: Path) -> None:
    """A file that was exchanged for another whole one."""
    from lorasmith.training import checkpoints

    _run(tmp_path)
    checkpoint = tmp_path / "out" / "checkpoint-3"
    file = checkpoint / checkpointing.SCALER
    save_state({"something": 1}, file)
    (checkpoint / checkpoints.MANIFEST).unlink()
    checkpoints.publish(checkpoint.rename(tmp_path / "partial"), checkpoint)
    with pytest.raises(TrainingError, match="not of this run") as caught:
        _run(tmp_path, resume=str(checkpoint))
    assert caught.value.file == str(file)
    assert caught.value.key == checkpointing.SCALER


def test_random_numbers_of_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a generator of the CPU in the place of the device's."""
    device = torch.Generator().manual_seed(3)
    monkeypatch.setattr(torch.xpu, "get_rng_state", device.get_state)
    monkeypatch.setattr(torch.xpu, "set_rng_state", device.set_state)
    where = torch.device("xpu", 0)
    torch.manual_seed(1)
    torch.rand(3)
    torch.rand(3, generator=device)
    save_state(random_state(where), tmp_path / "rng")
    wanted = torch.rand(4), torch.rand(4, generator=device)
    torch.manual_seed(2)
    device.manual_seed(9)
    state = load_state(tmp_path / "rng")
    set_random_state(state, where)
    assert torch.equal(torch.rand(4), wanted[0])
    assert torch.equal(torch.rand(4, generator=device), wanted[1])

    # Begun on a CPU: the device's numbers stay what they are.
    del state["xpu"]
    before = device.get_state()
    set_random_state(state, where)
    assert torch.equal(device.get_state(), before)
    assert torch.equal(torch.rand(4), wanted[0])
    assert "xpu" not in random_state(torch.device("cpu"))
