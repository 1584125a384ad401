from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import lorasmith as ls
from lorasmith.errors import AdapterFileError
from lorasmith.io import Fingerprint, fingerprint
from tests.io import support


def test_it_survives_json() -> None:
    mine = fingerprint(support.llama())
    again = Fingerprint.from_dict(json.loads(json.dumps(mine.to_dict())))
    assert again == mine
    difference = mine.compare(again)
    assert difference.same
    assert difference.values == 0
    assert len(json.dumps(mine.to_dict())) < 20_000
    with pytest.raises(AdapterFileError, match="cannot be read"):
        Fingerprint.from_dict({"structure": "x", "tensors": 1, "parameters": 1, "sketch": {"a": 7}})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("architecture", support.MODELS)
def test_a_cast_makes_no_other_base(architecture: str, dtype: torch.dtype) -> None:
    mine = fingerprint(support.MODELS[architecture]())
    cast = fingerprint(support.MODELS[architecture]().to(dtype))
    assert mine.compare(cast).same
    assert cast.compare(mine).same


def test_neither_do_bf16_and_fp16_of_the_same_weights() -> None:
    bf16 = fingerprint(support.llama().to(torch.bfloat16))
    assert bf16.compare(fingerprint(support.llama().to(torch.float16))).same


@pytest.mark.parametrize("architecture", support.MODELS)
def test_it_ignores_what_adapters_add(architecture: str) -> None:
    model = support.MODELS[architecture]()
    before = fingerprint(model)
    saved = ("classifier",) if architecture == "distilbert" else ()
    support.attached(model, ls.LoRAConfig(r=4, modules_to_save=saved))
    _same(before, fingerprint(model))
    ls.fuse(model)
    assert not torch.equal(*_weights(model, support.MODELS[architecture]()))
    _same(before, fingerprint(model))
    ls.unfuse(model)
    model.requires_grad_(False)
    _same(before, fingerprint(model))


def _same(a: Fingerprint, b: Fingerprint) -> None:
    assert a == b
    assert a.sketch.keys() == b.sketch.keys()
    assert a.compare(b).values == 0


def _weights(*models: nn.Module) -> list[torch.Tensor]:
    name = next(
        n for n, m in models[1].named_modules() if n.endswith(("q_proj", "c_attn", "q_lin"))
    )
    return [m.get_submodule(name).weight for m in models]  # type: ignore[misc]


def test_weights_fused_for_good_are_left_out() -> None:
    model = support.llama()
    before = fingerprint(model)
    support.attached(model, ls.LoRAConfig(r=4, targets="q_proj"))
    from lorasmith.core.fusing import fuse

    fuse(model, keep_original=False)
    after = fingerprint(model)
    gone = {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert before.sketch.keys() - after.sketch.keys() == gone
    assert before.compare(after).same


def test_other_weights_are_another_base() -> None:
    model = support.llama()
    mine = fingerprint(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.05)
    difference = mine.compare(fingerprint(model))
    assert not difference.same
    assert difference.worst is not None
    name, share = difference.worst
    assert name == "model.layers.1.mlp.up_proj.weight"
    assert share == pytest.approx(0.05, rel=1e-3)
    assert "weights differ by" in str(difference)
    assert "5.0%" in str(difference)
    # A small step of training, on the other hand, is beyond what rounding does.
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.012 / 1.05)
    assert not mine.compare(fingerprint(model)).same


def test_not_a_number_differs() -> None:
    model = support.llama()
    mine = fingerprint(model)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    assert not mine.compare(fingerprint(model)).same


def test_another_structure_is_another_base() -> None:
    mine = fingerprint(support.llama())
    deeper = support.llama()
    deeper.model.layers.append(copy.deepcopy(deeper.model.layers[0]))
    difference = mine.compare(fingerprint(deeper))
    assert not difference.same
    assert "parameters in" in str(difference)
    renamed = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    other = nn.Sequential(nn.ReLU(), nn.Linear(3, 4))
    assert "other names" in str(fingerprint(renamed).compare(fingerprint(other)))


def test_without_values_only_the_structure_counts() -> None:
    mine = fingerprint(support.llama())
    meta = fingerprint(support.llama().to("meta"))
    assert meta.sketch == {}
    assert mine.compare(meta).same
    assert meta.compare(mine).same


class Quantised(nn.Module):
    """A layer with packed integers in place of a weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(
            torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False
        )
        self.bias = None


def test_a_quantised_base_has_the_structure_of_the_full_one() -> None:
    model = support.llama()
    mine = fingerprint(model)
    for layer in model.model.layers:
        layer.mlp.up_proj = Quantised(layer.mlp.up_proj)
    quantised = fingerprint(model)
    assert quantised.structure == mine.structure
    assert not any("up_proj" in name for name in quantised.sketch)
    assert mine.compare(quantised).same


def test_ties_and_wrappers_do_not_matter() -> None:
    tied = support.llama()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    untied = copy.deepcopy(tied)
    untied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    _same(fingerprint(tied), fingerprint(untied))
    compiled = torch.compile(tied, backend="eager")
    _same(fingerprint(tied), fingerprint(compiled))  # type: ignore[arg-type]
    inside = copy.deepcopy(tied)
    inside.model.layers[0] = torch.compile(inside.model.layers[0], backend="eager")
    _same(fingerprint(tied), fingerprint(inside))


def test_only_some_matrices_of_a_deep_model_are_kept() -> None:
    deep = nn.Sequential(*(nn.Linear(8, 8) for _ in range(200)))
    kept = fingerprint(deep).sketch
    assert len(kept) == 64
    assert all(values.shape == (16,) for values in kept.values())
    asked = fingerprint(deep, names=["7.weight", "nowhere"])
    assert list(asked.sketch) == ["7.weight"]
    flat = deep.state_dict()["7.weight"].flatten()
    assert asked.sketch["7.weight"][0] == flat[0]
    assert asked.sketch["7.weight"][-1] == flat[-1]
