"""Inner products of ΔW against dense float64, and that no gauge changes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lorasmith as ls
from lorasmith.core.layers import read_weight
from lorasmith.errors import ConfigError, UnknownNameError, UnsupportedFeatureError
from lorasmith.fleet import open_members
from lorasmith.fleet.similarity import SimilarityMatrix, factor_gram, similarity
from tests.fleet.fleets import SIZES, adapter, dense
from tests.io.support import attached, llama, saved


def _dense_gram(vectors: list[Tensor]) -> Any:
    stacked = torch.stack(vectors)
    return (stacked @ stacked.T).numpy()


def _mixed() -> list[Any]:
    return [
        adapter(3, seed=1),
        adapter(1, seed=2, alpha=5),
        adapter(5, seed=3, rslora=True),
        adapter(4, seed=4, modules=tuple(SIZES)[:2]),
        adapter(2, seed=5, modules=tuple(SIZES)[2:], dtype=torch.bfloat16),
        adapter(9, seed=6),  # more than d_in d_out / (d_in + d_out): multiplied out
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory", [2**30, 1])
def test_it_is_the_dense_inner_product(dtype: torch.dtype, memory: int) -> None:
    adapters = _mixed()
    want = _dense_gram([dense(a) for a in adapters])
    calls: list[tuple[str, int, int]] = []
    found = similarity(
        adapters, dtype=dtype, memory=memory, per_layer=True, progress=lambda *a: calls.append(a)
    )
    # The scaling is folded into B in float32 either way.
    tolerance = 2e-6 if dtype == torch.float32 else 1e-7
    np.testing.assert_allclose(found.gram, want, atol=tolerance * np.abs(want).max())
    norms = np.sqrt(np.diag(want))
    np.testing.assert_allclose(found.norms, norms, rtol=1e-5)
    np.testing.assert_allclose(found.cosine, want / np.outer(norms, norms), atol=2e-6)
    vectors = [dense(a) for a in adapters]
    distances = np.array([[float((a - b).norm()) for a in vectors] for b in vectors])
    np.testing.assert_allclose(found.distances, distances, rtol=1e-5, atol=1e-9)
    largest = np.maximum(norms[:, None], norms[None, :])
    np.testing.assert_allclose(found.relative_distances, distances / largest, rtol=1e-5, atol=1e-9)
    assert np.array_equal(found.gram, found.gram.T)
    np.testing.assert_allclose(sum(layer.gram for layer in found.layers), found.gram, rtol=1e-12)
    assert found.layers[2].present == (True, True, True, False, True, True)
    assert calls[-1] == ("similarity", 3, 3)


def test_many_rows_go_in_blocks_of_products() -> None:
    """More stacked rows than one product takes, of one rank and of several."""
    made = torch.Generator().manual_seed(0)
    for ranks in ([40] * 30, [3 + 7 * (i % 9) for i in range(40)]):
        factors = [
            (torch.randn(r, 9, generator=made), torch.randn(7, r, generator=made)) for r in ranks
        ]
        deltas = torch.stack([(B.double() @ A.double()).flatten() for A, B in factors])
        want = deltas @ deltas.T
        torch.testing.assert_close(
            factor_gram(factors), want, atol=1e-5 * float(want.max()), rtol=1e-5
        )
        torch.testing.assert_close(factor_gram(factors, dtype=torch.float64), want)


@given(
    seed=st.integers(0, 10_000),
    r=st.integers(1, 6),
    other=st.integers(1, 6),
)
def test_no_gauge_changes_it(seed: int, r: int, other: int) -> None:
    """(B R⁻¹, R A) is the same adapter, for any invertible R; so is (−B, −A)."""
    made = torch.Generator().manual_seed(seed)
    A, B = torch.randn(r, 11, generator=made), torch.randn(9, r, generator=made)
    C, D = torch.randn(other, 11, generator=made), torch.randn(9, other, generator=made)
    R = torch.linalg.qr(torch.randn(r, r, generator=made))[0] * (
        0.2 + torch.rand(r, 1, generator=made)
    )
    gauged = (R @ A, B @ torch.linalg.inv(R))
    found = factor_gram([(A, B), gauged, (-A, -B), (C, D)])
    scale = float(found.diagonal().max())
    torch.testing.assert_close(found[0], found[1], atol=2e-5 * scale, rtol=0)
    torch.testing.assert_close(found[0], found[2], atol=1e-6 * scale, rtol=0)


def test_a_gauge_copy_is_the_same_adapter() -> None:
    """Averages of factors call (A, B) and (−A, −B) opposites; their cosine here is 1."""
    one = adapter(4, seed=1)
    flipped = {m: (-one.factors[m].A, -one.factors[m].B) for m in one.modules}
    turned = {}
    for module in one.modules:
        found = one.factors[module]
        Q = torch.linalg.qr(torch.randn(4, 4))[0]
        turned[module] = (Q @ found.A, found.B @ Q.T)
    copies = [one, adapter(4, factors=flipped), adapter(4, factors=turned), adapter(4, seed=2)]
    found = similarity(copies, ids=["one", "flipped", "turned", "other"])
    np.testing.assert_allclose(found.cosine[:3, :3], 1.0, atol=1e-6)
    assert abs(found.cosine[0, 3]) < 0.5
    assert found.nearest("other")[0][1] == pytest.approx(found.cosine[3, :3].max())
    assert {n for n, _ in found.nearest("one")[:2]} == {"flipped", "turned"}


def test_an_adapter_that_does_nothing() -> None:
    zero = {m: (torch.ones(2, i), torch.zeros(o, 2)) for m, (i, o) in SIZES.items()}
    found = similarity([adapter(2, factors=zero), adapter(2, seed=1)])
    assert found.cosine.tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert found.relative_distances[0, 1] == pytest.approx(1)
    assert found.norms[0] == 0


@pytest.mark.parametrize("config", [ls.DoRAConfig(r=3), ls.IA3Config(), ls.LoRAConfig(r=2)])
def test_effective_changes_with_the_model(config: Any, tmp_path: Path) -> None:
    """DoRA and IA3 as the fused weights of the model say, beside a LoRA."""
    first = saved(tmp_path / "one", ls.LoRAConfig(r=4))
    model = llama()
    before = {n: t.double().clone() for n, t in model.state_dict().items()}
    attached(model, config)
    ls.save(model, tmp_path / "two")
    ls.fuse(model)
    member = open_members([first])[0]
    vectors: list[list[Tensor]] = [[], []]
    for name, info in ls.read_adapter(first).layers.items():
        wide = member.factors(name).delta(torch.float64)
        vectors[0].append(wide.flatten())
        fused = read_weight(model.get_submodule(name), info).double()
        vectors[1].append((fused - before[f"{name}.weight"]).flatten())
    found = similarity([first, tmp_path / "two"], model=llama(), dtype=torch.float64)
    want = _dense_gram([torch.cat(v) for v in vectors])
    np.testing.assert_allclose(found.gram, want, atol=1e-5 * want.max())
    assert found.notes == ()
    if isinstance(config, ls.IA3Config):
        with pytest.raises(UnsupportedFeatureError):
            similarity([first, tmp_path / "two"])
    if isinstance(config, ls.DoRAConfig):
        low_rank = similarity([first, tmp_path / "two"])
        assert "two: DoRA is compared by its low-rank part" in low_rank.notes[0]


def test_what_is_not_compared_is_said(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", ls.LoRAConfig(r=2, modules_to_save=["lm_head"]))
    assert "modules_to_save are not compared" in similarity([path]).notes[0]


def test_which_layers() -> None:
    adapters = _mixed()
    found = similarity(adapters, modules=lambda m: m.endswith("q_proj"), per_layer=True)
    assert found.modules == ("layers.0.q_proj", "layers.1.q_proj")
    assert found.layer_cosine("layers.0.q_proj").shape == (6, 6)
    with pytest.raises(UnknownNameError):
        found.layer_cosine("layers.0.up_proj")
    with pytest.raises(UnknownNameError):
        found.index("nobody")
    with pytest.raises(ConfigError, match="no layer"):
        similarity(adapters, modules=lambda m: False)


def test_the_zoo_by_task(zoo: Path) -> None:
    """Against flattened ΔW of the files; and adapters of one task are nearest to each other."""
    found = similarity(zoo)
    names = ["dates-en-r4", "e2e-dora", "mrpc-rankpattern", "numbers-en-rslora-r16"]
    vectors = []
    for name in names:
        weights = ls.read_adapter(zoo / name)
        vectors.append(
            torch.cat(
                [
                    (f.scaling * f.B.double() @ f.A.double()).flatten()
                    for f in (weights.factors[m] for m in weights.modules)
                ]
            )
        )
    want = _dense_gram(vectors)
    rows = [found.index(n) for n in names]
    np.testing.assert_allclose(found.gram[np.ix_(rows, rows)], want, atol=1e-5 * want.max())
    assert found.nearest("e2e-dora")[0][0].startswith("e2e")
    assert found.nearest("mrpc-rankpattern")[0][0] == "mrpc-s0"
    assert found.nearest("dates-en-r4")[0][0].startswith("dates-en")
    assert found.notes


def test_the_record_is_json() -> None:
    import json

    found = similarity(_mixed(), per_layer=True)
    values = json.loads(json.dumps(found.to_dict()))
    assert values["cosine"] == found.cosine.tolist()
    assert isinstance(copy.deepcopy(found), SimilarityMatrix)
