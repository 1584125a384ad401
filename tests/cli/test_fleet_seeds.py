"""Fleets on the command line: defects that are known of vLoRA, and real adapters in PEFT.

Against dense products of the tensors in the files, and PEFT.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorasmith as ls
from lorasmith.errors import ModelError
from lorasmith.training.models import load_model

hf_peft = pytest.importorskip("peft")
from tests.fleet.of_peft import dense, distance  # noqa: E402
from tests.fleet.of_peft import made as made_by_peft  # noqa: E402

BOTH = pytest.mark.parametrize("basis", ["joint", "share"])


@BOTH
@pytest.mark.filterwarnings("ignore::lorasmith.fleet.records.BudgetWarning")
@pytest.mark.parametrize("bits", [None, "4"])
def test_info_tells_what_was_really_lost(
    call: Any,
    basis: str,
    bits: str | None,
    tmp_path: Path,
) -> None:
    """vLoRA's info always prints 100 % of the variance."""
    paths = [made_by_peft(tmp_path / f"{i}", seed=i, lora_alpha=2 + 9 * i) for i in range(4)]
    more = [] if bits is None else ["--quantize", bits]
    fleet = tmp_path / "fleet"
    options = ["-o", fleet, "--basis", basis, "--components", "2", *more]
    assert call("fleet", "compress", *paths, *options).code == 0
    told = call("fleet", "info", fleet, "--json").json["errors"]
    for path in paths:
        out = tmp_path / "out" / path.name
        assert call("fleet", "export", fleet, path.name, "-o", out, "--rank", "exact").code == 0
        true = distance(dense(out), dense(path))
        assert true > 0.05
        assert told[path.name] == pytest.approx(true, rel=1e-3)


@BOTH
def test_absorbing_on_the_command_line_keeps_the_others(
    call: Any,
    basis: str,
    tmp_path: Path,
) -> None:
    """vLoRA 0.2.0: the basis is put into another order and the loadings are not."""
    paths = [
        made_by_peft(tmp_path / f"{i}", seed=i, lora_alpha=2 + 40 * (i == 5)) for i in range(6)
    ]
    fleet = tmp_path / "fleet"
    assert (
        call("fleet", "compress", *paths[:4], "-o", fleet, "--basis", basis, "--error", "0").code
        == 0
    )
    for path in paths[4:]:  # the last one is by far the largest
        called = call("fleet", "add", fleet, path, "--absorb", "--error", "0", "--json")
        assert called.code == 0
        assert max(called.json["moved"].values()) < 1e-8
    for path in paths:
        out = tmp_path / "out" / path.name
        assert call("fleet", "export", fleet, path.name, "-o", out).code == 0
        assert distance(dense(out), dense(path)) < 1e-6


def test_coverage_on_the_command_line(call: Any, tmp_path: Path) -> None:
    """Of a stranger it is what a dense projection gives, and far from all."""
    paths = [made_by_peft(tmp_path / f"{i}", seed=i) for i in range(3)]
    stranger = made_by_peft(tmp_path / "stranger", seed=9)
    made = ls.SharedSubspace.from_adapters(paths, error=0.0)
    made.save(tmp_path / "fleet")
    found = call(
        "fleet", "analyze", *paths, stranger, "--subspace", tmp_path / "fleet", "--json"
    ).json["coverage"]
    for path in (*paths, stranger):
        inside = whole = 0.0
        for module, delta in dense(path).items():
            U, V = made.up(module).double(), made.down(module).double()
            projected = U @ torch.linalg.pinv(U) @ delta @ torch.linalg.pinv(V) @ V
            inside += float(projected.square().sum())
            whole += float(delta.square().sum())
        assert found[path.name] == pytest.approx(inside / whole, abs=1e-5)
    assert found["0"] > 0.999
    assert found["stranger"] < 0.6


def test_every_mistake_is_one_json_object(call: Any, tmp_path: Path) -> None:
    """vLoRA's analyze --json prints no JSON. Here stdout has one object, whatever happens."""
    one = made_by_peft(tmp_path / "one")
    other = made_by_peft(tmp_path / "other", target_modules=["q_proj"])
    ls.SharedSubspace.from_adapters([one]).save(tmp_path / "fleet")
    (tmp_path / "broken").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        data = (one / name).read_bytes()
        (tmp_path / "broken" / name).write_bytes(data if name.endswith("n") else data[:-9])
    (tmp_path / "empty").mkdir()
    out, fleet, nowhere = tmp_path / "out", tmp_path / "fleet", tmp_path / "nowhere"
    calls: list[tuple[list[Any], str]] = [
        (["fleet", "info", nowhere], "no such adapter"),
        (["fleet", "info", tmp_path / "empty"], "no adapter"),
        (["fleet", "analyze", tmp_path / "broken"], "cannot be read"),
        (["fleet", "diff", one, tmp_path], "several adapters"),
        (["fleet", "compress", one, other, "-o", tmp_path], "something other"),
        (["fleet", "compress", one, "-o", out, "--error", "2"], "share"),
        (["fleet", "compress", "-o", out], "PATHS"),
        (["fleet", "add", nowhere, one], "no shared subspace"),
        (["fleet", "add", fleet, one], "already"),
        (["fleet", "add", fleet, one, "--id", "a\nb"], "cannot be the id"),
        (["fleet", "remove", fleet, "../one"], "no adapter of that id"),
        (["fleet", "export", fleet, "../one", "-o", out], "no adapter of that id"),
        (["fleet", "benchmark", nowhere], "no such adapter"),
        (["fleet", "route", fleet, "--model", "smollm2"], "no router"),
        (["merge", one, other, "-o", out, "--weights", "1,2,3"], "as many weights"),
        (["merge", one, other, "-o", out, "--method", "ties", "--density", "2"], "share"),
        (["merge", one, other, "-o", tmp_path], "no adapter"),
        (["merge", one, other, "-o", "s3://bucket/x"], "That is a URL"),
        (["fleet", "compress", one, "-o", "s3://bucket/x"], "That is a URL"),
    ]
    for arguments, said in calls:
        called = call(*arguments, "--json")
        assert called.code == 2, arguments
        assert said in called.json["error"]["message"], (arguments, called.out)
        shown = call(*arguments)
        assert shown.code == 2
        assert shown.out == ""
        assert said in " ".join(shown.err.replace("│", " ").split())
    assert not out.exists()
    called = call("fleet", "validate", tmp_path / "broken", "--json")
    assert (called.code, called.json["problems"]) == (1, 1)
    # An id that climbs is a name like another one, and climbs nowhere.
    assert (
        call("fleet", "add", fleet, other, "--id", "../x", "--json").json["added"]["id"] == "../x"
    )
    assert call("fleet", "export", fleet, "../x", "-o", out, "--json").code == 0
    assert not (tmp_path / "x").exists()
    assert distance(dense(out), dense(other)) < 0.051


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_real_adapters_come_out_the_same_to_peft(call: Any, zoo: Path, tmp_path: Path) -> None:
    """SmolLM2's logits: bf16, mixed ranks and alphas, rsLoRA, DoRA, patterns; and at a budget."""
    try:
        model, _ = load_model("smollm2", dtype="float32", device="cpu")
    except ModelError as error:
        pytest.skip(str(error))
    tokens = torch.arange(300, 320)[None]

    def ran(path: Path) -> Tensor:
        theirs = hf_peft.PeftModel.from_pretrained(model, path).eval()
        with torch.no_grad():
            found = theirs(tokens).logits.double()
        theirs.unload()
        return found

    names = ["dates-en-r4", "e2e-dora", "mrpc-rankpattern", "numbers-en-rslora-r16", "gsm8k-s0"]
    assert {ls.read_adapter(zoo / n).dtype for n in names} == {torch.bfloat16, torch.float32}
    with torch.no_grad():
        plain = model(tokens).logits.double()
    paths = [zoo / n for n in names]
    fleet = tmp_path / "fleet"
    assert call("fleet", "compress", *paths, "-o", fleet, "--error", "0").code == 0
    for name in names:
        out = tmp_path / name
        assert call("fleet", "export", fleet, name, "-o", out).code == 0
        wanted = ran(zoo / name)
        effect = float((wanted - plain).norm())
        # Of factors in bf16 the rounding of another factorisation remains.
        least = 0.02 if ls.read_adapter(out).dtype == torch.bfloat16 else 2e-3
        assert float((ran(out) - wanted).norm()) < least * effect, name
