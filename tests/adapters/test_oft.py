"""OFT against its formula and against PEFT."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.adapters.oft import rotations
from lorasmith.core import lowrank
from tests.adapters.against import (
    LLAMA,
    QWEN,
    dense_weight,
    equals_formula,
    files_both_ways,
    on_qwen,
    same_as_peft,
    saved_by,
    second_derivatives,
    theirs,
)
from tests.models import llama, randomise, run

peft = pytest.importorskip("peft")

KEYS = {"oft_R.default.weight": "Q"}


@pytest.fixture(params=[0, 10**9], ids=["fast", "plain"])
def both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", request.param)


def _skew(row: Tensor, size: int) -> Tensor:
    q = torch.zeros(size, size, dtype=row.dtype)
    place = 0
    entries: list[tuple[int, int]] = []
    for i in range(size):
        for j in range(i + 1, size):
            entries.append((i, j))
            place += 1
    rows, columns = zip(*entries, strict=True)
    q = q.index_put((torch.tensor(rows), torch.tensor(columns)), row)
    return q - q.T


def _block_diagonal(t: Any, size: int, blocks: int, make: Any) -> Tensor:
    rows = [t["Q"][0]] * blocks if t["Q"].shape[0] == 1 else list(t["Q"])
    return torch.block_diag(*(make(_skew(row, size)) for row in rows))


def _exact(q: Tensor) -> Tensor:
    identity = torch.eye(q.shape[0], dtype=q.dtype)
    return (identity - q) @ torch.linalg.inv(identity + q)


def _series(q: Tensor, powers: int) -> Tensor:
    result = torch.eye(q.shape[0], dtype=q.dtype)
    for p in range(1, powers + 1):
        result = result + (1 if p == powers else 2) * torch.linalg.matrix_power(q, p)
    return result


_FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "exact": ({"cayley": "exact"}, _exact),
    "5 terms": ({}, lambda q: _series(q, 4)),
    "7 terms": ({"neumann_terms": 7}, lambda q: _series(q, 6)),
    "3 terms": ({"neumann_terms": 3}, lambda q: _series(q, 3)),
    "2 terms": ({"neumann_terms": 2}, lambda q: torch.eye(len(q), dtype=q.dtype) + 2 * q),
    "shared": ({"block_share": True, "cayley": "exact"}, _exact),
}


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dense_input", [True, False], ids=["x needs grad", "x needs none"])
@pytest.mark.parametrize("form", _FORMS)
def test_formula(form: str, kind: str, dense_input: bool) -> None:
    options, make = _FORMS[form]

    def formula(weight: Tensor, t: Any) -> Tensor:
        return weight @ _block_diagonal(t, 4, 3, make).T  # (x R) Wᵀ

    config = ls.OFTConfig(block_size=4, **options)
    equals_formula(config, formula, kind=kind, d_in=12, d_out=7, dense_input=dense_input)


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize("shared", [True, False])
def test_coft(shared: bool) -> None:
    """Some blocks are shortened to the bound, others are inside it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 7)).double()
    adapter = ls.attach(
        model, ls.OFTConfig(block_size=4, coft=True, eps=0.9, block_share=shared, cayley="exact")
    )
    part = adapter.layers()["0"]
    randomise(adapter.parameters(), scale=0.3)
    with torch.no_grad():
        part["Q"][0] *= 10
        part["Q"][1:] *= 0.1
    count = part["Q"].shape[0]
    bound = 0.9 / math.sqrt(count)
    blocks, norms = [], []
    for row in part["Q"].detach().double():
        q = _skew(row, 4)
        norms.append(float(torch.linalg.matrix_norm(q)))
        blocks.append(_exact(q * min(1.0, bound / norms[-1])))
    assert max(norms) > bound
    weight = model[0].weight.detach() @ torch.block_diag(*(blocks * (3 // count))).T
    x = torch.randn(5, 12, dtype=torch.float64)
    before = part["Q"].detach().clone()
    torch.testing.assert_close(model(x), x @ weight.T + model[0].bias, atol=1e-6, rtol=1e-6)
    assert torch.equal(part["Q"], before), "the forward must not write parameters"


def test_rotations_are_orthogonal_and_inverse_to_each_other() -> None:
    torch.manual_seed(0)
    q = 0.02 * torch.randn(5, 28, dtype=torch.float64)
    exact = rotations(q, 8, None)
    identity = torch.eye(8, dtype=torch.float64).expand(5, 8, 8)
    torch.testing.assert_close(exact @ exact.mT, identity)
    series = rotations(q, 8, 12)
    torch.testing.assert_close(series @ exact, identity)  # PEFT's two forms are inverses


@pytest.mark.parametrize("form", ["exact", "5 terms", "shared"])
def test_second_derivatives(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", 0)
    second_derivatives(ls.OFTConfig(block_size=3, **_FORMS[form][0]), 6, 4)


def _cases() -> dict[str, tuple[Any, Any]]:
    def pair(size: int = 0, blocks: int = 0, neumann: bool = True, **options: Any) -> Any:
        terms = options.pop("terms", 5)
        return (
            ls.OFTConfig(
                block_size=size or None,
                blocks=blocks or None,
                cayley="neumann" if neumann else "exact",
                neumann_terms=terms,
                targets=LLAMA,
                **options,
            ),
            peft.OFTConfig(
                oft_block_size=size,
                r=blocks,
                use_cayley_neumann=neumann,
                num_cayley_neumann_terms=terms,
                target_modules=LLAMA,
                **options,
            ),
        )

    return {
        "series": pair(4),
        "7 terms": pair(4, terms=7),
        "3 terms": pair(4, terms=3),
        "exact": pair(4, neumann=False),
        "blocks": pair(blocks=2),
        "shared": pair(4, block_share=True),
        "one block": pair(64, neumann=False),
        "adjusted": pair(5),  # d_in 16 and 24: 4 and 6
        "adjusted, shared": pair(5, block_share=True),
        "adjusted blocks": pair(blocks=3),
        # Inside the bound: beyond it PEFT changes the parameters in the forward.
        "coft": pair(4, coft=True, eps=50.0),
    }


CASES = _cases()


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_of_peft(case: str) -> None:
    same_as_peft(*CASES[case], KEYS)


@pytest.mark.filterwarnings("ignore:The block size asked for")
@pytest.mark.parametrize("case", CASES)
def test_files_of_peft(case: str, tmp_path: Path) -> None:
    config, peft_config = CASES[case]
    files_both_ways(config, peft_config, tmp_path)


def test_coft_beyond_the_bound_acts_as_in_peft(tmp_path: Path) -> None:
    options = {"coft": True, "eps": 0.5}
    model = llama()
    adapter = ls.attach(model, ls.OFTConfig(block_size=4, targets=LLAMA, **options))
    randomise(adapter.parameters(), scale=0.3)
    ls.save(model, tmp_path)
    batch = {"input_ids": torch.randint(0, 32, (2, 7))}
    wanted = run(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(run(other, batch), wanted, atol=1e-5, rtol=1e-5)


def test_peft_does_not_warn_of_our_series(tmp_path: Path) -> None:
    model = llama()
    ls.attach(model, ls.OFTConfig(block_size=4, targets=LLAMA))
    ls.save(model, tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert not any("neumann" in str(w.message) for w in caught)


def test_nothing_wide_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside x, nothing is kept for the backward pass."""
    monkeypatch.setattr(lowrank, "SMALL", 0)
    model = nn.Sequential(nn.Linear(64, 48))
    ls.attach(model, ls.OFTConfig(block_size=8))
    x = torch.randn(5, 64, requires_grad=True)
    assert {t.data_ptr() for t in saved_by(model, x)} == {x.data_ptr()}


def test_parameters_on_qwen() -> None:
    expected = sum(d_in // 32 * (32 * 31 // 2) for d_in, _ in QWEN.values())
    assert on_qwen(ls.OFTConfig()) == expected
    assert expected * 28 == 28 * 496 * (1024 * 5 + 2048 + 3072) // 32 == 4_444_160
    assert on_qwen(ls.OFTConfig(block_share=True)) == 7 * 496


def test_sizes_that_do_not_divide() -> None:
    """As PEFT: the nearest divisor; PEFT's, for every size and wish."""
    from peft.tuners.oft.layer import OFTLayer

    for size in range(2, 120):
        for wanted in range(1, 130):
            fits = wanted <= size and size % wanted == 0
            nearest = wanted if fits else OFTLayer.adjust_oft_parameters(None, size, wanted)
            assert ls.OFTConfig(block_size=wanted).size_for(size) == nearest
            assert ls.OFTConfig(blocks=wanted).size_for(size) == size // nearest
    with pytest.warns(UserWarning, match=r"1 of them, e.g. 0 \(3\)"):
        ls.attach(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)), ls.OFTConfig(block_size=4))


def test_a_layer_without_a_divisor_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(8, 7), nn.Linear(7, 2))
    with pytest.raises(ls.LorasmithError, match="blocks of 1"):
        ls.attach(model, ls.OFTConfig(block_size=2))
    assert not ls.attached(model)
    assert all(p.requires_grad for p in model.parameters())


def test_module_dropout() -> None:
    """In training, the given share of blocks passes x on as it is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(16))
    adapter = ls.attach(model, ls.OFTConfig(block_size=2, module_dropout=0.4))
    randomise(adapter.parameters(), scale=0.5)
    x = torch.randn(16, dtype=torch.float64)

    def still() -> int:
        return int(((model(x) - x).view(8, 2).abs().amax(1) < 1e-12).sum())

    assert {still() for _ in range(10)} == {3}  # ⌊0.4 · 8⌋
    model.eval()
    assert still() == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"block_size": 0},
        {"blocks": 0},
        {"block_size": 4, "blocks": 4},
        {"cayley": "householder"},
        {"neumann_terms": 1},
        {"eps": 0.0},
        {"module_dropout": 1.0},
    ],
)
def test_refused_values(wrong: dict[str, Any]) -> None:
    with pytest.raises(ls.LorasmithError):
        ls.OFTConfig(**wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "all"}, "bias"),
        ({"oft_block_size": None}, "before 0.14"),
        ({"peft_version": "0.17.1"}, "another Cayley-Neumann series"),
        ({"peft_version": None}, "another Cayley-Neumann series"),
    ],
)
def test_refused_files(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    import json

    other = theirs(llama(), peft.OFTConfig(oft_block_size=4, target_modules=LLAMA))
    other.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    fields = {**json.loads(file.read_text()), **change}
    file.write_text(json.dumps({k: v for k, v in fields.items() if k == "bias" or v is not None}))
    with pytest.raises(ls.LorasmithError, match=message):
        ls.load(llama(), tmp_path)


def test_fused_weight_is_a_rotation_of_the_rows() -> None:
    model = nn.Sequential(nn.Linear(12, 7)).double()
    norms = dense_weight(model[0]).norm(dim=1)
    adapter = ls.attach(model, ls.OFTConfig(block_size=4, cayley="exact"))
    randomise(adapter.parameters(), scale=0.5)
    ls.fuse(model)
    torch.testing.assert_close(dense_weight(model[0]).norm(dim=1), norms)
