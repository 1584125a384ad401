"""What ``fleet export`` and ``merge`` write does in PEFT what it ought to, logit for logit.

Adapters are made and run by PEFT; what a merge ought to do comes from the weights that PEFT
itself merges into the base. On SmolLM2 and the zoo: ``test_fleet_seeds`` and
``tests/fleet/merge/test_merge``, marked slow.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorasmith as ls
from tests.io.support import llama, logits

peft = pytest.importorskip("peft")
from tests.fleet.of_peft import in_peft, made  # noqa: E402

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora_alpha": 5},
    "rslora": {"use_rslora": True, "r": 5, "lora_alpha": 7},
    "dora": {"use_dora": True, "lora_alpha": 4},
    "bf16": {"dtype": torch.bfloat16, "r": 2, "lora_alpha": 3},
    "dora-bf16": {"use_dora": True, "dtype": torch.bfloat16},
    "patterns": {"rank_pattern": {"up_proj": 5}, "alpha_pattern": {"q_proj": 2}},
}


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, Path]:
    return {
        kind: made(tmp_path / "team" / kind, seed=seed, **options)
        for seed, (kind, options) in enumerate(KINDS.items())
    }


def merged_weights(path: Path) -> dict[str, Tensor]:
    """Change of every weight that PEFT's own merge makes, float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(llama().double(), path)
        model = model.double().merge_and_unload()
    before = llama().double().state_dict()
    after = model.state_dict()
    return {n: after[n] - w for n, w in before.items() if not torch.equal(after[n], w)}


@pytest.mark.parametrize("basis", ["joint", "share"])
@pytest.mark.parametrize("rank", ["original", "exact"])
def test_exports(
    call: Any, adapters: dict[str, Path], tmp_path: Path, basis: str, rank: str
) -> None:
    fleet = tmp_path / "fleet"
    first = [p for k, p in adapters.items() if k != "patterns"]
    call("fleet", "compress", *first, "-o", fleet, "--basis", basis, "--error", "0")
    # One that came in later, too.
    call("fleet", "add", fleet, adapters["patterns"], "--absorb", "--error", "0")
    plain = logits(llama())
    for kind, path in adapters.items():
        out = tmp_path / "out" / kind
        assert call("fleet", "export", fleet, kind, "-o", out, "--rank", rank).code == 0
        wanted = in_peft(path)
        effect = float((wanted - plain).norm())
        assert effect > 0.02 * float(plain.norm())
        # Of bf16 the rounding of another factorisation remains.
        least = 0.02 if "bf16" in kind else 1e-3
        assert float((in_peft(out) - wanted).norm()) < least * effect, kind
        stored = ls.read_adapter(out)
        assert stored.variant.name == ("dora" if "dora" in kind else "lora")
        assert stored.dtype == ls.read_adapter(path).dtype


@pytest.mark.parametrize("method", ["linear", "svd", "task_arithmetic"])
def test_merges(call: Any, adapters: dict[str, Path], tmp_path: Path, method: str) -> None:
    """PEFT's own ``add_weighted_adapter`` is 28 % off for rsLoRA and 42 % for DoRA."""
    llama().save_pretrained(tmp_path / "base")
    weights = {"lora": 0.5, "rslora": 0.8, "dora": 0.6, "bf16": -0.4, "patterns": 0.3}
    paths = [adapters[k] for k in weights]
    options = ["--weights", ",".join(map(str, weights.values())), "--rank", "exact"]
    out = tmp_path / "merged"
    base = ["--model", tmp_path / "base"]
    called = call("merge", *paths, "-o", out, "--method", method, *options, *base, "--json")
    assert called.code == 0, called.out
    assert called.json["discarded_energy"] < 1e-9
    dense = llama()
    with torch.no_grad():
        values = dense.state_dict()
        for kind, weight in weights.items():
            for name, change in merged_weights(adapters[kind]).items():
                values[name] += (weight * change).float()
    wanted, plain = logits(dense), logits(llama())
    effect = float((wanted - plain).norm())
    assert float((in_peft(out) - wanted).norm()) < 1e-3 * effect
