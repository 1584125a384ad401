"""``lorasmith doctor``: the installation, and every kind of artefact, whole and damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import lorasmith as ls
from lorasmith.cli import health
from tests.fleet import fleets
from tests.io import support


def _errors(called: Any) -> list[str]:
    found = [f for f in called.json["findings"] if f["level"] == "error"]
    assert called.code == (1 if found else 0)
    assert called.json["ok"] is not bool(found)
    return [f"{f['subject']}: {f['text']}" for f in found]


def _texts(called: Any, level: str) -> str:
    return " ".join(f["text"] for f in called.json["findings"] if f["level"] == level)


# The installation ---------------------------------------------------------------------------------


def test_this_installation(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    called = call("doctor", "--json")
    assert _errors(called) == []
    found = {f["subject"]: f for f in called.json["findings"]}
    assert found["torch"]["text"] == torch.__version__
    assert found["HF_TOKEN"]["text"] == "present"
    assert "xxxx" not in called.out + called.err
    assert "offline" in found["hub"]["text"]
    assert "the same" in found["self test"]["text"]
    assert "nothing wrong" in call("doctor").out


def test_versions_are_held_against_what_the_package_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from importlib import metadata

    wanted = ["torch>=99", "absent-package>=2", 'jinja2<1; extra == "plots"', "rich>=13"]
    wanted += ['nowhere>=1; extra == "web"', 'ruff<0; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda _: wanted)
    found = {f.subject: f for f in health._packages()}
    assert (found["torch"].level, found["absent-package"].level) == ("error", "error")
    assert found["absent-package"].fix == 'pip install "absent-package>=2"'
    assert (found["jinja2"].level, found["rich"].level) == ("warning", "ok")
    assert found["extra web"].fix == 'pip install "lorasmith[web]"'
    assert "ruff" not in found


def test_a_saved_adapter_that_differs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    load = ls.load

    def damaged(model: Any, path: Any) -> Any:
        adapter = load(model, path)
        with torch.no_grad():
            next(iter(adapter.parameters())).add_(1.0)
        return adapter

    monkeypatch.setattr(ls, "load", damaged)
    assert health._self_test().level == "error"


def test_a_cache_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = health._writable("cache", tmp_path / "file" / "below", "move it")
    assert (found.level, found.fix) == ("warning", "move it")
    assert health._writable("cache", tmp_path / "new" / "below", "").level == "ok"
    assert not (tmp_path / "new").exists()


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from lorasmith.cli import main; main(['doctor', '--help']); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout


def test_a_model_needs_an_adapter(call: Any) -> None:
    assert call("doctor", "--model", "x").code == 2


# Adapters -----------------------------------------------------------------------------------------


def test_a_sound_adapter(call: Any, tmp_path: Path) -> None:
    called = call("doctor", support.saved(tmp_path / "a"), "--json")
    assert _errors(called) == []
    assert called.json["kind"] == "adapter"
    assert "--max-lora-rank 8" in _texts(called, "ok")


def test_damaged_adapters(call: Any, tmp_path: Path) -> None:
    folder = support.saved(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (said,) = _errors(call("doctor", folder, "--json"))
    assert "different generations" in said
    weights.write_bytes(whole[:-40])
    assert _errors(call("doctor", folder, "--json"))
    weights.unlink()
    (said,) = _errors(call("doctor", folder, "--json"))
    assert "no weights" in said
    assert "to fix" in call("doctor", folder).out


def test_values_that_are_not_finite(call: Any, tmp_path: Path) -> None:
    folder = support.foreign(support.saved(tmp_path / "a"))
    assert "without lorasmith.json" in _texts(call("doctor", folder, "--json"), "note")

    def spoil(values: dict[str, torch.Tensor]) -> None:
        next(iter(values.values()))[0, 0] = float("nan")

    support.edit_tensors(folder / "adapter_model.safetensors", spoil)
    (said,) = _errors(call("doctor", folder, "--json"))
    assert "finite" in said


def test_an_adapter_of_another_base(call: Any, tmp_path: Path) -> None:
    model = support.llama()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    other = support.saved(tmp_path / "other", model=model)
    own = support.saved(tmp_path / "own")
    assert _errors(call("doctor", own, "--model", tmp_path / "base", "--json")) == []
    (said,) = _errors(call("doctor", other, "--model", tmp_path / "base", "--json"))
    assert said.startswith("base:")


def test_hints_for_other_programs(call: Any, tmp_path: Path) -> None:
    called = call("doctor", support.saved(tmp_path / "dora", ls.DoRAConfig(r=2)), "--json")
    assert "this is dora" in _texts(called, "note")
    config = ls.LoRAConfig(r=2, init="pissa")
    called = call("doctor", support.saved(tmp_path / "pissa", config), "--json")
    assert _errors(called) == []
    assert "moved a part of W" in _texts(called, "note")
    ls.attach(model := support.llama(), ls.LoRAConfig(r=2))
    ls.save(model, tmp_path / "new")
    assert "B are zero" in _texts(call("doctor", tmp_path / "new", "--json"), "warning")


def test_writers_that_died(call: Any, tmp_path: Path) -> None:
    folder = support.saved(tmp_path / "a")
    (tmp_path / ".a.0123abcd.new").mkdir()
    called = call("doctor", folder, "--json")
    assert _errors(called) == []
    assert ".a.0123abcd.new" in _texts(called, "warning")
    folder.rename(tmp_path / ".a.0123abce.old")
    called = call("doctor", folder, "--json")
    (said,) = _errors(called)
    assert "between its two renames" in said
    assert (tmp_path / ".a.0123abce.old").is_dir()  # nothing is changed
    assert called.json["kind"] == "interrupted"


# Other artefacts ----------------------------------------------------------------------------------


def test_fleets(call: Any, tmp_path: Path) -> None:
    fleet = ls.SharedSubspace.from_adapters({"a": fleets.adapter(), "b": fleets.adapter(seed=1)})
    folder = fleet.save(tmp_path / "fleet")
    called = call("doctor", folder, "--json")
    assert (called.json["kind"], _errors(called)) == ("fleet", [])
    assert "2 adapters on 3 layers" in _texts(called, "ok")
    codes = folder / "codes.safetensors"
    codes.write_bytes(codes.read_bytes()[:-1] + b"?")
    (said,) = _errors(call("doctor", folder, "--json"))
    assert "codes.safetensors" in said


def test_directories_of_adapters(call: Any, tmp_path: Path) -> None:
    support.saved(tmp_path / "good")
    (support.saved(tmp_path / "bad") / "adapter_config.json").write_text("{")
    (said,) = _errors(call("doctor", tmp_path, "--json"))
    assert said.startswith("bad:")


def test_runs_and_checkpoints(call: Any, tmp_path: Path) -> None:
    from transformers import TrainerState

    from lorasmith.training import checkpoints
    from lorasmith.training.states import save_state

    run = tmp_path / "run"
    for step in (5, 10):
        partial = support.saved(run / f".checkpoint-{step}.partial")
        for name in (*checkpoints.REQUIRED, "rng_state.safetensors"):
            if name == "adapter_state.safetensors":
                partial.joinpath(name).write_bytes(
                    (partial / "adapter_model.safetensors").read_bytes()
                )
            elif name == "trainer_state.json":
                state = TrainerState(global_step=step, max_steps=10, train_batch_size=4)
                (partial / name).write_text(json.dumps(asdict(state)))
            elif name.endswith(".safetensors") and not (partial / name).exists():
                save_state({"step": step}, partial / name)
            elif not (partial / name).exists():
                (partial / name).write_text("{}")
        checkpoints.publish(partial, run / f"checkpoint-{step}")
    called = call("doctor", run, "--json")
    assert (called.json["kind"], _errors(called)) == ("run", [])
    assert "not come to its end" in _texts(called, "note")
    (run / "checkpoint-10" / "optimizer.safetensors").write_text("other")
    (run / ".checkpoint-15.partial").mkdir()
    called = call("doctor", run, "--json")
    (said,) = _errors(called)
    assert said.startswith("checkpoint-10: optimizer.safetensors")
    assert ".checkpoint-15.partial" in _texts(called, "warning")
    assert _errors(call("doctor", run / "checkpoint-10", "--json")) == [said]
    assert _errors(call("doctor", run / "checkpoint-5", "--json")) == []
    # What the manifest vouches for must be a state, too.
    partial = run / ".checkpoint-15.partial"
    shutil.copytree(run / "checkpoint-5", partial, dirs_exist_ok=True)
    (partial / "scheduler.safetensors").write_bytes(b"\x80\x04cos\nsystem\n")
    checkpoints.publish(partial, run / "checkpoint-15")
    (said,) = _errors(call("doctor", run / "checkpoint-15", "--json"))
    assert "scheduler.safetensors" in said


def test_models(call: Any, tmp_path: Path) -> None:
    support.llama().save_pretrained(tmp_path / "m", max_shard_size="10KB")
    called = call("doctor", tmp_path / "m", "--json")
    assert (called.json["kind"], _errors(called)) == ("model", [])
    first, second = sorted((tmp_path / "m").glob("*.safetensors"))[:2]
    support.edit_tensors(second, lambda values: next(iter(values.values())).fill_(float("inf")))
    first.unlink()
    said = _errors(call("doctor", tmp_path / "m", "--json"))
    assert len(said) == 2
    assert "missing, and the index names it" in said[0]
    assert "finite" in said[1]


def test_nothing_and_something_else(call: Any, tmp_path: Path) -> None:
    (said,) = _errors(call("doctor", tmp_path / "nowhere", "--json"))
    assert "nothing under that path" in said
    (tmp_path / "notes.txt").touch()
    (said,) = _errors(call("doctor", tmp_path, "--json"))
    assert "notes.txt" in said


def test_gguf_files(call: Any, tmp_path: Path) -> None:
    from tests.io.ggufs import write_gguf

    file = write_gguf(support.llama(), tmp_path / "a.gguf", "llama")
    assert _errors(call("doctor", file, "--json")) == []
    os.truncate(file, 5000)
    assert _errors(call("doctor", file, "--json"))


def test_real_adapters(call: Any, zoo: Path) -> None:
    folder = next(e.parent for e in sorted(zoo.glob("*/adapter_config.json")))
    assert _errors(call("doctor", folder, "--json")) == []
