"""lorasmith merge: what it writes, scores, searches and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lorasmith as ls
from lorasmith.cli import main
from lorasmith.training.data import load_rows
from lorasmith.training.evaluate import evaluate
from lorasmith.training.models import load_model
from tests.training.tiny import write_rows


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of the tiny model, of different ranks and scalings."""
    folder, paths = tmp_path_factory.mktemp("adapters"), []
    for i, config in enumerate((ls.LoRAConfig(r=2), ls.LoRAConfig(r=4, scaling="rslora"))):
        torch.manual_seed(i)
        model, _ = load_model(str(base), dtype="float32", device="cpu")
        adapter = ls.attach(model, config)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        paths.append(ls.save(model, folder / f"task{i}"))
    return paths


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str | Path) -> tuple[int, Any, str]:
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return code, json.loads(out) if "--json" in arguments else out, err

    return run


def test_it_writes_what_the_function_gives(call: Any, adapters: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "m"
    arguments = ["merge", *adapters, "-o", out, "--method", "ties", "--weights", "0.7,0.3"]
    code, text, _ = call(*arguments, "--density", "0.5", "--rank", "3", "--option", "scale=0.8")
    assert code == 0
    assert "discarded" in text
    wanted = ls.merge(adapters, "ties", weights=[0.7, 0.3], density=0.5, scale=0.8, rank=3)
    found = ls.read_adapter(out)
    for name in found.modules:
        assert torch.equal(found.delta(name), wanted.weights.delta(name))
    code, told, _ = call(*arguments, "--json", "--overwrite", "--density", "0.5", "--rank", "exact")
    assert code == 0
    assert told["method"] == "ties"
    assert told["weights"] == [0.7, 0.3]
    assert told["options"] == {"density": 0.5, "scale": 1.0}
    assert told["ids"] == ["task0", "task1"]
    assert told["discarded_energy"] < 1e-9
    assert len(told["layers"]) == len(found.modules)


def test_a_directory_of_adapters_is_all_of_them(
    call: Any, adapters: list[Path], tmp_path: Path
) -> None:
    code, told, _ = call("merge", adapters[0].parent, "-o", tmp_path / "m", "--json")
    assert code == 0
    assert told["ids"] == ["task0", "task1"]
    assert told["weights"] == [0.5, 0.5]


@pytest.mark.integration
def test_candidates_are_scored_and_the_best_is_written(
    call: Any, base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    data, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "m"
    code, told, _ = call(
        "merge", *adapters, "-o", out, "--method", "linear,ties", "--method", "slerp",
        "--density", "0.5", "--model", base, "--eval", f"x={data}", "--dtype", "float32", "--json",
    )  # fmt: skip
    assert code == 0
    found = {c["name"]: c for c in told["candidates"]}
    assert list(found) == ["base model", "task0", "task1", "linear", "ties", "slerp"]
    merges = {n: found[n]["score"] for n in ("linear", "ties", "slerp")}
    assert told["method"] == min(merges, key=lambda n: merges[n])
    best = min(found[n]["data"]["x"]["loss"] for n in ("task0", "task1"))
    for candidate in found.values():
        assert candidate["score"] == pytest.approx(candidate["data"]["x"]["loss"] / best)
    # The figures are evaluate's.
    model, tokenizer = load_model(str(base), dtype="float32", device="cpu")
    ls.load(model, out)
    wanted = evaluate(model, tokenizer, load_rows(str(data), split="train"))
    got = found[told["method"]]["data"]["x"]
    assert got["loss"] == pytest.approx(wanted.loss, rel=1e-6)
    assert got["exact_match"] == wanted.exact_match
    code, text, _ = call(
        "merge", *adapters, "-o", out, "--overwrite", "--model", base, "--eval", data,
        "--no-exact-match",
    )  # fmt: skip
    assert code == 0
    assert "linear (written)" in text


@pytest.mark.integration
def test_weights_are_searched_on_other_rows_than_they_are_scored_on(
    call: Any, base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    count = len(load_rows(str(data), split="train"))
    arguments = [
        "merge", *adapters, "--model", base, "--eval", f"x={data}", "--search", "--trials", "6",
        "--seed", "3", "--no-exact-match", "--json", "-o",
    ]  # fmt: skip
    code, told, _ = call(*arguments, tmp_path / "m")
    assert code == 0
    trials = told["search"]["linear"]
    assert len(trials) == 6
    assert [t["score"] for t in trials] == sorted(t["score"] for t in trials)
    assert told["weights"] == trials[0]["weights"]
    assert told["candidates"][0]["data"]["x"]["rows"] == count - count // 2
    _, again, _ = call(*arguments, tmp_path / "n")
    assert again["search"] == told["search"]


def test_what_cannot_be_is_said(
    call: Any, base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "m"
    for more, word in (
        (["--method", "tiess"], "did you mean 'ties'"),
        (["--density", "0.5"], "no option 'density'"),
        (["--method", "ties", "--density", "1.5"], "not a share"),
        (["--weights", "1,x"], "no numbers"),
        (["--weights", "1"], "as many weights"),
        (["--rank", "many"], "rank"),
        (["--option", "inner"], "no value"),
        (["--method", "ties,linear"], "--eval"),
        (["--search"], "--eval"),
        (["--eval", "rows.jsonl"], "--model"),
    ):
        code, told, _ = call("merge", *adapters, "-o", out, "--json", *more)
        assert code == 2, more
        assert word in json.dumps(told, ensure_ascii=False), (more, told)
        assert not out.exists()
    code, told, _ = call("merge", *adapters, "-o", adapters[0], "--json", "--overwrite")
    assert code == 2
    assert "take the place" in told["error"]["message"]
    code, told, _ = call("merge", "-o", out, "--json")
    assert code == 2
