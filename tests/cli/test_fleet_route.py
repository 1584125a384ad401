"""``lorasmith fleet route``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lorasmith as ls
from lorasmith.cli import main
from lorasmith.fleet.router import TaskRouter
from lorasmith.fleet.subspace import SharedSubspace
from lorasmith.training.models import load_model
from tests.models import randomise
from tests.training.tiny import make_model, make_tokenizer, save_tiny

pytest.importorskip("sklearn")
pytest.importorskip("datasets")


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, str]:
    """A base model, a fleet of two tasks, and rows of both."""
    save_tiny(tmp_path / "base")
    for seed, task in enumerate(("sums", "letters")):
        model = make_model(make_tokenizer())
        randomise(ls.attach(model, ls.LoRAConfig(r=2)).parameters(), seed=seed)
        ls.save(model, tmp_path / task)
    fleet = SharedSubspace.from_adapters(
        [tmp_path / "sums", tmp_path / "letters"], allow_base_mismatch=True
    )
    fleet.save(tmp_path / "fleet")
    rows = {
        "sums": [f"{i} + {i * 7 % 10} = {i * 3 % 10}" for i in range(16)],
        "letters": [w * 2 for w in "ab bc cd de ef fg gh hi ij jk kl lm mn no op pq".split()],
    }
    for task, prompts in rows.items():
        lines = [json.dumps({"prompt": p, "completion": "x"}) for p in prompts]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return {
        n: str(tmp_path / n) for n in ("base", "fleet", "sums.jsonl", "letters.jsonl", "router")
    }


def _json(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    capfd.readouterr()
    code = main([*arguments, "--json"])
    return code, json.loads(capfd.readouterr().out)


def test_trains_measures_keeps_and_routes(
    parts: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    common = ("fleet", "route", parts["fleet"], "--model", parts["base"], "--device", "cpu")
    prompts = ("--prompt", "3 + 4 = 7", "--prompt", "uvuv")
    code, trained = _json(
        capfd,
        *common,
        "--examples",
        f"sums={parts['sums.jsonl']}",
        "--examples",
        f"letters={parts['letters.jsonl']}",
        "-o",
        parts["router"],
        *prompts,
    )
    assert code == 0, trained
    assert trained["trained"] is True
    report = trained["report"]
    assert (report["trained"], report["held_out"]) == (24, 8)
    assert [t["task"] for t in report["tasks"]] == ["sums", "letters"]
    assert sum(map(sum, report["confusion"])) == 8

    code, asked = _json(capfd, *common, "--router", parts["router"], *prompts, "--most", "2")
    assert code == 0, asked
    assert asked["report"] == report
    assert [p["task"] for p in asked["prompts"]] == [p["task"] for p in trained["prompts"]]
    # The same as from Python.
    model, tokenizer = load_model(parts["base"], device="cpu")
    router = TaskRouter.load(parts["router"], model, tokenizer)
    for got, expected in zip(
        asked["prompts"], router.route(["3 + 4 = 7", "uvuv"], most=2), strict=True
    ):
        assert got["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)
        assert got["weights"] == pytest.approx(expected.weights, abs=1e-6)

    assert main([*common, "--router", parts["router"], *prompts]) == 0
    assert "uvuv" in capfd.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--examples", "nobody=rows.jsonl"),
        ("--examples", "sums"),
        ("--router", "somewhere"),
        ("--router", "somewhere", "-o", "elsewhere", "--prompt", "a"),
    ],
)
def test_what_makes_no_sense_is_an_error(
    parts: dict[str, str], capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    code, payload = _json(
        capfd, "fleet", "route", parts["fleet"], "--model", parts["base"], *arguments
    )
    assert code != 0
    assert payload["error"]
