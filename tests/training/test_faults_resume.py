"""Runs that are killed, stopped or damaged, and what they go on from."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import TrainingError
from lorasmith.training import checkpoints
from lorasmith.training.checkpoints import REQUIRED, choose_checkpoint, publish
from lorasmith.training.run import train
from tests.training.killing import ACCUMULATION, STEPS, Killed, Watched, config, differences
from tests.training.tiny import (
    ROWS,
    load_no_model,
    make_model,
    make_tokenizer,
    save_tiny,
    write_rows,
)


@pytest.fixture(scope="module")
def whole(
    base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """The run that nothing happened to, and its batches."""
    output = tmp_path_factory.mktemp("whole") / "out"
    watched = Watched()
    watched.train(config(base, rows, output))
    assert len(watched.batches) == STEPS * ACCUMULATION
    return output, watched.batches


# -- killed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", range(3))
def test_a_killed_run_comes_to_the_same_end(
    base: Path, rows: Path, whole: tuple[Path, list[str]], tmp_path: Path, point: int
) -> None:
    """Bit for bit: weights, optimiser, dynamics, scheduler, random numbers, order of rows."""
    # One point in each third of the run, whichever it is.
    third = STEPS * ACCUMULATION // 3
    kill = random.Random(f"kill {point}").randrange(point * third, (point + 1) * third)
    made = config(base, rows, tmp_path / "out")
    with pytest.raises(Killed):
        Watched(kill).train(made)
    found = checkpoints.list_checkpoints(made.output)
    step = checkpoints.step_of(found[0]) if found else 0
    assert step == kill // ACCUMULATION // 2 * 2
    resumed = Watched()
    resumed.train(made)
    assert resumed.batches == whole[1][step * ACCUMULATION :]
    assert differences(whole[0], made.output) == []


def test_the_comparison_sees_differences(
    base: Path, rows: Path, whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Of a run with another seed, everything but the schedule is another."""
    Watched().train(config(base, rows, tmp_path / "out", seed=1))
    found = " ".join(differences(whole[0], tmp_path / "out"))
    for part in ("adapter_state", "optimizer.", "rng_state.", "trainer_state", "adapter."):
        assert part in found
    assert "scheduler." not in found


# -- damaged -----------------------------------------------------------------------------------

FILES = (*REQUIRED, "rng_state.safetensors")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Two checkpoints as far as their files go."""
    output = tmp_path / "out"
    for step in (2, 4):
        partial = checkpoints.partial_path(output, step)
        partial.mkdir(parents=True)
        for name in FILES:
            (partial / name).write_bytes(f"{step} {name} ".encode() * 100)
        publish(partial, output / f"checkpoint-{step}")
    return output


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])  # a newline alone is no loss to JSON


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "cut": _cut,
    "flipped": _flip,
    "empty": _empty,
    "directory": _directory,
}


@pytest.mark.parametrize("name", [*FILES, checkpoints.MANIFEST])
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    output: Path, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest, older = checkpoints.list_checkpoints(output)
    assert choose_checkpoint("last", output) == newest.resolve()
    DAMAGE[how](newest / name)
    began = time.process_time()
    with caplog.at_level(logging.WARNING, "lorasmith"):
        assert choose_checkpoint("auto", output) == older.resolve()
    assert time.process_time() - began < 2.0
    assert "Skipping" in caplog.text
    assert "checkpoint-4" in caplog.text
    with pytest.raises(TrainingError, match="checkpoint-4") as caught:
        choose_checkpoint(str(newest), output)
    assert caught.value.file == str(newest)
    shutil.rmtree(older)
    with pytest.raises(TrainingError):
        choose_checkpoint("auto", output)


@pytest.mark.parametrize("name", FILES)
def test_a_manifest_must_list_what_is_needed(output: Path, name: str) -> None:
    """Otherwise nobody would notice a change of the file."""
    newest, _ = checkpoints.list_checkpoints(output)
    manifest = newest / checkpoints.MANIFEST
    listing = json.loads(manifest.read_text())
    del listing["files"][name]
    manifest.write_text(json.dumps(listing))
    assert checkpoints.defect(newest) == f"manifest.json does not list {name}"


def test_a_run_goes_on_from_the_checkpoint_before(
    base: Path,
    rows: Path,
    whole: tuple[Path, list[str]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = tmp_path / "out"
    shutil.copytree(whole[0], output)
    _flip(output / f"checkpoint-{STEPS}" / "optimizer.safetensors")
    watched = Watched()
    with caplog.at_level(logging.WARNING, "lorasmith"):
        watched.train(config(base, rows, output, resume="last"))
    assert f"checkpoint-{STEPS}: the content of optimizer.safetensors has changed" in caplog.text
    assert watched.batches == whole[1][(STEPS - 2) * ACCUMULATION :]
    assert differences(whole[0], output) == []


def test_a_run_that_was_killed_after_its_last_step_makes_no_other(
    base: Path, rows: Path, whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Between the last checkpoint and the adapter."""
    output = tmp_path / "out"
    shutil.copytree(whole[0], output)
    for name in ("adapter_model.safetensors", "adapter_config.json", "training.json"):
        (output / name).unlink()
    watched = Watched()
    result = watched.train(config(base, rows, output))
    assert (result.status, result.steps) == ("finished", STEPS)
    assert watched.batches == []
    assert differences(whole[0], output) == []


def test_a_run_that_had_stopped_early_does_so_again(base: Path, rows: Path, tmp_path: Path) -> None:
    """Every evaluation after the first is worse; it was killed before it could save the best."""
    made = config(
        base,
        rows,
        tmp_path / "out",
        eval_data=str(rows),
        eval_steps=1,
        save_steps=1,
        early_stopping=1,
        lr=50.0,
        warmup=0.0,
        dynamics=(),
    )
    first = Watched().train(made)
    assert first.status == "stopped early"
    assert first.steps < STEPS
    adapter = (made.output / "adapter_model.safetensors").read_bytes()
    (made.output / "adapter_model.safetensors").unlink()
    second = Watched().train(made)
    assert (second.status, second.steps, second.best_step) == (
        "stopped early",
        first.steps,
        first.best_step,
    )
    assert (made.output / "adapter_model.safetensors").read_bytes() == adapter


# -- other data, base, options -----------------------------------------------------------------


@pytest.fixture
def half(whole: tuple[Path, list[str]], tmp_path: Path) -> Path:
    """A run of which the last two steps are missing."""
    output = tmp_path / "out"
    shutil.copytree(whole[0], output)
    shutil.rmtree(output / f"checkpoint-{STEPS}")
    return output


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 1e-3),
        ("steps", STEPS + 2),
        ("batch_size", 2),
        ("gradient_accumulation", 1),
        ("schedule", "linear"),
        ("warmup", 1.0),
        ("weight_decay", 0.1),
        ("max_grad_norm", 2.0),
        ("seed", 3),
        ("max_length", 512),
        ("packing", "off"),
        ("lora_plus_ratio", 4.0),
        ("dtype", "bfloat16"),
    ],
)
def test_other_options_are_refused_unless_told(
    base: Path,
    rows: Path,
    half: Path,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    value: Any,
) -> None:
    load_no_model(monkeypatch)
    before = _state(half)
    with pytest.raises(TrainingError, match="other options") as caught:
        train(config(base, rows, half, **{key: value}), progress=False)
    assert caught.value.key == key
    assert repr(value) in str(caught.value.got)
    assert "--changed accept" in str(caught.value.fix)
    assert _state(half) == before


def _state(output: Path) -> dict[str, str]:
    return {
        p.relative_to(output).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in output.rglob("*")
        if p.is_file()
    }


def test_options_that_change_nothing_may_change(base: Path, rows: Path, half: Path) -> None:
    made = config(base, rows, half, log_steps=2, save_total_limit=5, save_steps=7)
    assert train(made, progress=False).status == "finished"


def test_told_to_a_run_goes_on_with_other_options(
    base: Path, rows: Path, half: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "lorasmith"):
        result = train(config(base, rows, half, weight_decay=0.1, changed="accept"), progress=False)
    assert "weight_decay 0.0 → 0.1" in caplog.text
    assert result.steps == STEPS


def test_other_rows(
    base: Path, half: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = write_rows(tmp_path / "other.jsonl", [*ROWS[1:], ROWS[0]])
    with pytest.raises(TrainingError, match="rows are not those") as caught:
        train(config(base, other, half), progress=False)
    assert caught.value.key == "data"
    with caplog.at_level(logging.WARNING, "lorasmith"):
        result = train(config(base, other, half, changed="accept"), progress=False)
    assert "other rows" in caplog.text
    assert result.steps == STEPS


def test_the_same_rows_and_base_elsewhere(
    base: Path, rows: Path, half: Path, tmp_path: Path, whole: tuple[Path, list[str]]
) -> None:
    """What is compared is what they hold."""
    moved = shutil.copytree(base, tmp_path / "moved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(config(moved, shutil.copy(rows, tmp_path / "r.jsonl"), half), progress=False)
    names = {d.partition(":")[0] for d in differences(whole[0], half)}
    named = ("config.model", "config.data", "base.name")
    # lorasmith.json has the hash of adapter_config.json, which names the base.
    assert all(n.endswith(named) or ".manifest." in n for n in names), names


def test_another_base(base: Path, rows: Path, half: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(TrainingError, match="another base model") as caught:
        train(config(other, rows, half), progress=False)
    assert caught.value.file == str(half / f"checkpoint-{STEPS - 2}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = train(config(other, rows, half, changed="accept"), progress=False)
    assert result.steps == STEPS


def test_another_tokenizer(base: Path, rows: Path, half: Path) -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    tokenizer.add_tokens(["<never used>"])
    tokenizer.pad_token = tokenizer.eos_token
    model.name_or_path = str(base.resolve())
    with pytest.raises(TrainingError, match="another tokenizer") as caught:
        train(config(base, rows, half), model=model, tokenizer=tokenizer, progress=False)
    assert caught.value.key == "base.tokenizer"
