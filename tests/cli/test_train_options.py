"""Options of ``lorasmith train`` beyond the plain run: LoRA+, calibration, quantised bases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

import lorasmith as ls
from lorasmith.cli import main
from lorasmith.errors import ConfigError
from lorasmith.training import models, trainer
from lorasmith.training.config import Quantization, TrainConfig
from tests.training.tiny import ROWS, write_rows


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str | Path) -> tuple[int, Any, str]:
        capfd.readouterr()
        code = main([str(a) for a in (*arguments, "--json")])
        out, err = capfd.readouterr()
        return code, json.loads(out), err

    return run


@pytest.fixture
def train(call: Any, base: Path, rows: Path, tmp_path: Path) -> Any:
    def run(*options: str | Path) -> tuple[int, Any, str]:
        given = ("train", base, rows, "-o", tmp_path / "o", "--steps", "2", "--device", "cpu")
        return call(*given, *options)  # type: ignore[no-any-return]

    return run


def test_lora_plus(train: Any, tmp_path: Path) -> None:
    code, found, err = train("--lora-plus-ratio", "16", "--lr", "1e-3")
    assert code == 0, err
    assert found["config"]["lora_plus_ratio"] == 16
    code, found, _ = train("--lora-plus-ratio", "16", "--adapter.variant", "ia3", "--overwrite")
    assert (code, found["error"]["key"]) == (2, "lora_plus_ratio")
    code, found, _ = train("--lora-plus-ratio", "0")
    assert (code, found["error"]["key"]) == (2, "lora_plus_ratio")


# -- calibration -------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The batches that ``attach`` was given."""
    found: list[Any] = []
    attach = ls.attach

    def noting(*arguments: Any, calibration: Any = None, **named: Any) -> Any:
        found.append(calibration)
        return attach(*arguments, calibration=calibration, **named)

    monkeypatch.setattr(ls, "attach", noting)
    return found


def test_an_adapter_that_needs_data_takes_the_first_rows(train: Any, seen: list[Any]) -> None:
    code, found, err = train("--adapter.init", "corda", "--calibration-rows", "6")
    assert code == 0, err
    assert found["adapter"]["init"] == "corda"
    assert "calibrated on the first 6 training rows" in err
    (batches,) = seen
    assert sum(len(b["input_ids"]) for b in batches) == 6
    assert {"input_ids", "attention_mask", "labels"} <= set(batches[0])


def test_calibration_data_of_its_own(
    train: Any, seen: list[Any], tmp_path: Path, rows: Path
) -> None:
    other = write_rows(tmp_path / "other.jsonl", ROWS[:3])
    code, _, err = train("--adapter.init", "eva", "--calibration", other)
    assert code == 0, err
    assert "calibrated on 3 rows" in err
    assert sum(len(b["input_ids"]) for b in seen[0]) == 3
    # Options of an initialisation, and what is built in.
    code, found, err = train(
        *("--adapter.init", "corda", "--adapter.init-options", '{"mode": "kpm"}', "--overwrite"),
        *("--calibration", "builtin:dates-en", "--calibration-rows", "4"),
    )
    assert code == 0, err
    assert found["adapter"]["init_options"] == {"mode": "kpm"}
    assert sum(len(b["input_ids"]) for b in seen[1]) == 4


def test_a_variant_that_needs_data(train: Any, seen: list[Any]) -> None:
    code, found, err = train("--adapter.variant", "antipasto-corda", "--calibration-rows", "8")
    assert code == 0, err
    assert found["adapter"]["variant"] == "antipasto_corda"
    assert seen[0] is not None


def test_one_that_needs_none_refuses_it(train: Any, seen: list[Any], rows: Path) -> None:
    assert train()[0] == 0
    assert seen == [None]
    code, found, _ = train("--calibration", rows, "--overwrite")
    assert (code, found["error"]["key"]) == (2, "calibration")
    code, found, _ = train("--calibration-rows", "3", "--overwrite")
    assert (code, found["error"]["key"]) == (2, "calibration_rows")


def test_a_calibrated_run_resumes(train: Any, tmp_path: Path) -> None:
    options = ("--adapter.init", "eva", "--calibration-rows", "8", "--save-steps", "1")
    code, _, err = train(*options)
    assert code == 0, err
    whole = {k: v.clone() for k, v in ls.read_adapter(tmp_path / "o").tensors.items()}
    (tmp_path / "o" / "adapter_model.safetensors").unlink()
    code, _, err = train(*options, "--resume", str(tmp_path / "o" / "checkpoint-1"))
    assert code == 0, err
    again = ls.read_adapter(tmp_path / "o").tensors
    assert all((whole[k] == again[k]).all() for k in whole)


# -- quantised bases ---------------------------------------------------------------------------


def test_the_names_of_quantisations_are_those_that_there_are() -> None:
    assert set(get_args(Quantization)) == set(models.QUANTIZATIONS)
    with pytest.raises(ConfigError, match="quantize"):
        TrainConfig("m", "d", output=Path("o"), quantize="nf5")  # type: ignore[arg-type]


@pytest.mark.parametrize("quantize", ["nf4", "int4"])
def test_training_and_using_a_quantised_base(
    call: Any, train: Any, base: Path, rows: Path, tmp_path: Path, quantize: str
) -> None:
    pytest.importorskip(models.QUANTIZATIONS[quantize][1])
    code, found, err = train("--quantize", quantize, "--eval-split", "0.2")
    assert code == 0, err
    assert found["config"]["quantize"] == quantize
    common = ("--device", "cpu", "--quantize", quantize, "-a", tmp_path / "o")
    code, measured, err = call("eval", base, rows, "--no-exact-match", *common)
    assert code == 0, err
    assert measured["loss"] > 0
    code, written, err = call("generate", base, "Count", "--max-new-tokens", "2", *common)
    assert code == 0, err
    assert written["adapter"] == str(tmp_path / "o")


def test_using_an_adapter_that_must_read_quantised_weights(
    call: Any, base: Path, rows: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    model, _ = models.load_model(base, device="cpu")
    ls.attach(model, ls.DoRAConfig(r=2))
    adapter = ls.save(model, tmp_path / "d")
    common = ("--device", "cpu", "--quantize", "nf4", "-a", adapter)
    code, found, _ = call("eval", base, rows, "--no-exact-match", *common)
    assert (code, found["error"]["key"]) == (2, "dequantize")
    code, found, err = call("eval", base, rows, "--no-exact-match", "--dequantize", *common)
    assert code == 0, err
    assert found["loss"] > 0


@pytest.mark.parametrize("files", [True, False])
def test_loftq_finds_what_was_quantised(
    train: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: bool
) -> None:
    pytest.importorskip("bitsandbytes")
    given: list[Any] = []
    attach = ls.attach

    def keep(*arguments: Any, **options: Any) -> Any:
        given.append(options["originals"])
        return attach(*arguments, **options)

    monkeypatch.setattr(ls, "attach", keep)
    if not files:  # a model of the hub, or a GGUF file
        monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    code, _, err = train("--quantize", "nf4", "--adapter.init", "loftq", "--adapter.r", "4")
    assert code == 0, err
    assert isinstance(given[0], str) is files
    assert "starts from the base's weights" in err
    code, _, err = train("--adapter.r", "4", "--overwrite")
    assert (code, given[1]) == (0, None), err


def test_what_must_read_the_weights_says_how(train: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    code, found, _ = train("--quantize", "nf4", "--adapter.init", "pissa")
    assert code == 2
    assert "dequantize" in found["error"]["fix"]
    assert not (tmp_path / "o").exists()
    code, _, err = train("--quantize", "nf4", "--adapter.init", "pissa", "--dequantize")
    assert code == 0, err
    assert "starts from the base's weights" in err
    assert "examples" not in err  # a progress bar of datasets


# -- what a failed run leaves ------------------------------------------------------------------


def test_a_run_that_fails_before_it_trains_leaves_nothing(
    call: Any, base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "deep" / "er" / "o"
    arguments = ("train", base, rows, "-o", output, "--device", "cpu")
    for wrong in (("--adapter.targets", "qproj"), ("--adapter.init", "corda", "--limit", "x")):
        assert call(*arguments, *wrong)[0] == 2
        assert not (tmp_path / "deep").exists()
    assert call("train", tmp_path / "no", rows, "-o", output)[0] == 2
    assert call("train", base, tmp_path / "no.jsonl", "-o", output)[0] == 2
    assert list(tmp_path.iterdir()) == []
    # What was there before stays, and so does what a run has written.
    output.mkdir(parents=True)
    assert call(*arguments, "--adapter.targets", "qproj")[0] == 2
    assert output.is_dir()

    def fail(*_: Any, **__: Any) -> Any:
        (output / "something").write_text("x")
        raise ZeroDivisionError

    monkeypatch.setattr(trainer, "model_loss_output", fail)
    output.rmdir()
    assert call(*arguments)[0] == 1
    assert (output / "something").is_file()
