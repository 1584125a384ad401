"""Defects that are known of vLoRA and PEFT and that no other test holds, from Python.

Against dense products of the stored tensors, and PEFT.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lorasmith as ls
from lorasmith.fleet import diff
from tests.io.support import llama, logits

pytest.importorskip("peft")
from tests.fleet.of_peft import dense, distance, in_peft
from tests.fleet.of_peft import made as made_by_peft

BOTH = pytest.mark.parametrize("basis", ["joint", "share"])


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapters_in_half_precision(basis: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """vLoRA: bf16 and fp16 crash the SVD."""
    paths = [
        made_by_peft(tmp_path / f"{i}", seed=i, dtype=dtype, lora_alpha=4 + i) for i in range(4)
    ]
    assert {ls.read_adapter(p).dtype for p in paths} == {dtype}
    made = ls.SharedSubspace.from_adapters(paths, basis=basis, error=0.0)
    similar = ls.similarity(paths)
    for number, path in enumerate(paths):
        back = made.reconstruct(path.name)
        assert back.dtype == dtype
        out = back.save(tmp_path / "out" / path.name)
        # Another factorisation, rounded once more: eight bits of mantissa, eleven of float16.
        assert distance(dense(out), dense(path)) < (3 * torch.finfo(dtype).eps) ** 2
        norm = sum(float(W.square().sum()) for W in dense(path).values()) ** 0.5
        assert similar.norms[number] == pytest.approx(norm, rel=1e-5)
    merged = ls.merge(paths, "svd", rank="exact").weights.save(tmp_path / "merged")
    mean = {m: sum(dense(p)[m] for p in paths) / 4 for m in dense(paths[0])}
    assert distance(dense(merged), mean) < (3 * torch.finfo(dtype).eps) ** 2  # type: ignore[arg-type]


@BOTH
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_lora_of_an_embedding_is_carried(basis: Any, tmp_path: Path) -> None:
    """vLoRA drops it: 0.90 of the effect is gone."""
    names = ["q_proj", "embed_tokens"]
    first = made_by_peft(tmp_path / "first", seed=1, target_modules=names)
    second = made_by_peft(tmp_path / "second", seed=2, target_modules=names, lora_alpha=5)
    made = ls.SharedSubspace.from_adapters([first, second], basis=basis, error=0.0)
    made.save(tmp_path / "fleet")
    again = ls.SharedSubspace.load(tmp_path / "fleet")
    plain = logits(llama())
    for path in (first, second):
        out = again.reconstruct(path.name).save(tmp_path / "out" / path.name)
        wanted = in_peft(path)
        assert float((in_peft(out) - wanted).norm()) < 1e-3 * float((wanted - plain).norm())
        # It is the embedding that makes the difference here, not a rounding.
        alone = again.reconstruct(path.name).tensors
        assert sum("lora_embedding" in k for k in alone) == 2


def test_nothing_moves_the_global_random_state(tmp_path: Path) -> None:
    """vLoRA's DARE seeds everybody's generators."""
    paths = [made_by_peft(tmp_path / f"{i}", seed=i) for i in range(4)]
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 - the global state it is about
    random.seed(5)

    def states() -> tuple[Any, ...]:
        return (
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),  # type: ignore[index,union-attr]  # noqa: NPY002
            random.getstate(),
        )

    before = states()
    for basis in ("joint", "share"):
        made = ls.SharedSubspace.from_adapters(paths[:2], basis=basis, error=0.01)
        made.add(paths[2])
        made.absorb([paths[3]])
        made.quantize("nf4")
        made.reconstruct(paths[3].name)
    ls.similarity(paths)
    diff(paths[0], paths[1])
    for method in ("ties", "dare", "dare_ties", "della", "knots", "karcher"):
        options = {} if method == "karcher" else {"density": 0.5}
        ls.merge(paths[:3], method, **options)  # type: ignore[arg-type]
    assert states() == before
