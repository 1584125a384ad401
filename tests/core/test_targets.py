"""Which layers a configuration names, and what it says when it names none."""

from __future__ import annotations

import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.errors import ConfigError, TargetError
from tests.models import distilbert, distilbert_classifier, gpt2, llama, mlp


def chosen(model: nn.Module, targets: Any, **more: Any) -> list[str]:
    names = ls.attach(model, ls.LoRAConfig(r=1, targets=targets, **more)).targets
    ls.detach(model)
    return list(names)


def leaves(names: list[str]) -> set[str]:
    return {n.rpartition(".")[2] for n in names}


def test_all_linear_leaves_out_the_head() -> None:
    assert leaves(chosen(llama(), "all-linear")) == set(
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    )
    assert leaves(chosen(gpt2(), "all-linear")) == {"c_attn", "c_proj", "c_fc"}
    assert leaves(chosen(distilbert_classifier(), "all-linear")) == set(
        "q_lin k_lin v_lin out_lin lin1 lin2".split()
    )
    assert chosen(mlp(), "all-linear") == ["0", "2"]
    assert chosen(llama(), ["lm_head"]) == ["lm_head"]


@pytest.mark.parametrize(
    ("build", "role", "wanted"),
    [
        (llama, "attention", "q_proj k_proj v_proj o_proj"),
        (llama, "mlp", "gate_proj up_proj down_proj"),
        (llama, "reader", "q_proj k_proj v_proj gate_proj up_proj"),
        (llama, "writer", "o_proj down_proj"),
        (distilbert, "attention", "q_lin k_lin v_lin out_lin"),
        (distilbert, "writer", "out_lin lin2"),
        (gpt2, "reader", "c_attn c_fc"),
        (gpt2, "writer", "c_proj"),
    ],
)
def test_roles(build: Any, role: str, wanted: str) -> None:
    assert leaves(chosen(build(), role)) == set(wanted.split())


def test_names_globs_and_expressions() -> None:
    model = llama()
    q = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert chosen(model, "q_proj") == q
    assert chosen(model, q[1]) == q[1:]
    assert chosen(model, "layers.1.self_attn.q_proj") == q[1:]
    assert chosen(model, "*.self_attn.q*") == q
    assert chosen(model, r"re:.*\.1\..*q_proj") == q[1:]
    assert len(chosen(model, ["q_proj", "*.v_proj"])) == 4
    assert chosen(model, ["q_proj", "q_proj"]) == q
    assert chosen(model, "attention", exclude=["k_proj", "re:.*[vo]_proj"]) == q
    for near_miss in ("proj", "q_pro", "_proj", "re:q_proj", "Q_PROJ"):
        with pytest.raises(TargetError):
            chosen(model, near_miss)


def test_layers() -> None:
    model = llama(layers=3)
    for layers, wanted in (([0], [0]), ([-1], [2]), ([0, -1, 0], [0, 2]), ([-3], [0])):
        names = chosen(model, "q_proj", layers=layers)
        assert names == [f"model.layers.{i}.self_attn.q_proj" for i in wanted]
    for wrong in (3, -4):
        with pytest.raises(TargetError, match="does not have") as caught:
            chosen(model, "q_proj", layers=[wrong])
        assert caught.value.expected == "indices from -3 to 2"


def test_one_wrong_name_among_several_is_an_error() -> None:
    model = llama()
    before = list(model.state_dict())
    with pytest.raises(TargetError, match="q_porj") as caught:
        chosen(model, ["v_proj", "q_porj"])
    assert caught.value.fix is not None
    assert "q_proj" in caught.value.fix
    assert list(model.state_dict()) == before
    with pytest.raises(TargetError) as caught:
        chosen(model, "input_layernorm")
    assert caught.value.got == "a module that is not linear-like"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("exclude", ("q_porj",), "'q_proj'"),
        ("exclude", ("self_attn",), "not by its parent"),
        ("rank_pattern", {"q_prj": 2}, "'q_proj'"),
        ("alpha_pattern", {"layers.7.mlp.up_proj": 2.0}, "does nothing"),
    ],
)
def test_what_excludes_or_changes_nothing_is_named(field: str, value: Any, said: str) -> None:
    with pytest.warns(UserWarning, match=f"{field} names .*{said}"):
        ls.attach(llama(), ls.LoRAConfig(r=1, **{field: value}))


def test_what_excludes_or_changes_something_is_not() -> None:
    ls.attach(
        llama(),
        ls.LoRAConfig(
            r=1,
            targets="attention",
            exclude=("lm_head", "k_proj"),
            rank_pattern={"up_proj": 2, r"layers\.\d+\.self_attn\.q_proj": 3},
            alpha_pattern={"v_proj": 2.0},
        ),
    )


def test_experts_without_adapter_are_not_passed_over_in_silence() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
        )
    )
    with pytest.warns(UserWarning, match="down_proj, gate_up_proj.* get no adapter"):
        names = chosen(model, "all-linear")
    assert leaves(names) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert chosen(model, "attention") == names


def test_nothing_left_and_nothing_there() -> None:
    with pytest.raises(TargetError, match="No layer is left"):
        chosen(llama(), "q_proj", exclude="q_proj")
    with pytest.raises(TargetError, match="no linear-like layer"):
        chosen(nn.Sequential(nn.LayerNorm(3)), "all-linear")


def test_catastrophic_expressions_stop_quickly() -> None:
    model = nn.ModuleDict({"a" * 40: nn.Linear(2, 2)})
    start = time.perf_counter()
    with pytest.raises(ConfigError, match="took over"):
        chosen(model, r"re:(a|a)+(a|a|a)*$(?<=b)")
    with pytest.raises(ConfigError, match="took over"):
        ls.attach(model, ls.LoRAConfig(rank_pattern={r"(a|a|a)+b": 2}))
    assert time.perf_counter() - start < 5
    assert not ls.attached(model)


def test_broken_expressions_name_the_field() -> None:
    with pytest.raises(ConfigError, match="not a valid regular expression") as caught:
        chosen(mlp(), "re:(")
    assert caught.value.key == "targets"


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.after = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.attention(x, x, x, need_weights=False)[0])


def test_a_bypassed_layer_is_never_adapted_in_silence() -> None:
    """nn.MultiheadAttention reads out_proj.weight without calling the module."""
    assert chosen(Attending(), "all-linear") == ["after"]
    with pytest.raises(TargetError):
        chosen(Attending(), "out_proj")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fast_path_of_pytorchs_encoder_does_not_skip_adapters() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    adapter = ls.attach(model, ls.LoRAConfig(r=2))
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.3)
    x = torch.randn(2, 4, 8)
    padding = torch.tensor([[False] * 4, [False] * 3 + [True]])
    for mask in (None, padding):
        model.use_nested_tensor = False  # PyTorch has no nested attention with gradients
        expected = model(x, src_key_padding_mask=mask).detach()
        model.use_nested_tensor = True
        with torch.no_grad():
            got = model(x, src_key_padding_mask=mask)
        keep = slice(None) if mask is None else ~mask
        torch.testing.assert_close(got[keep], expected[keep], atol=1e-5, rtol=1e-5)


def test_lazy_layers_are_refused_by_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ls.LorasmithError, match="lazy"):
        ls.attach(model, ls.LoRAConfig())
