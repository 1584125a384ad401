"""Diagnoses of planted changes, and of every adapter, against dense float64."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.core.heads import head_layout
from lorasmith.core.layers import describe, read_weight
from lorasmith.core.rotation import noise_floor
from lorasmith.core.variant import Factors
from lorasmith.diagnostics.records import RotationReport, UnitRotation
from lorasmith.diagnostics.rotation import pair_sums
from lorasmith.errors import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    FuseError,
    ModelError,
)
from lorasmith.io.sources import MemoryMatrix
from tests.contract.configurations import CONFIGURATIONS
from tests.models import gpt2, llama, mlp, randomise

F64 = torch.float64


# Helpers ----------------------------------------------------------------------------------------


def state_hash(model: nn.Module) -> str:
    """Of every tensor, every gradient flag and the training flag."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{parameter.requires_grad}{parameter.grad is None}".encode())
    for name, module in model.named_modules():
        digest.update(f"{name}{module.training}{len(module._forward_hooks)}".encode())
    return digest.hexdigest()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Layer → W [d_out, d_in] in float64."""
    found = {}
    for name, module in model.named_modules():
        info = describe(module, name)
        if info is not None:
            found[name] = read_weight(module, info).double().clone()
    return found


def fused_weights(model: nn.Module) -> dict[str, Tensor]:
    """What the layers amount to with the adapter: by fusing a float64 copy."""
    made = copy.deepcopy(model).double()
    ls.fuse(made)
    return {n: w for n, w in weights_of(made).items() if "lorasmith" not in n}


def pieces(layout: Any, weight: Tensor) -> dict[tuple[str, int], Tensor]:
    """(role, head) → its part of W."""
    blocks = torch.split(weight, layout.head_dim, dim=0 if layout.axis == "out" else 1)
    return dict(zip(layout.heads, blocks, strict=True))


def angle(one: Tensor, other: Tensor) -> float:
    """The angle of two vectors by the half-angle formula: another way than the package's."""
    u, v = one.flatten().double(), other.flatten().double()
    u, v = u / u.norm(), v / v.norm()
    return math.degrees(2 * math.atan2(float((u - v).norm()), float((u + v).norm())))


def check(report: RotationReport, model: nn.Module, after: Mapping[str, Tensor]) -> None:
    """Every unit of a report against the dense weights before and after."""
    before, layouts = weights_of(model), head_layout(model)
    changed = {n for n, w in before.items() if not torch.equal(w, after[n])}
    assert {u.name for u in report.units} <= changed
    seen: set[tuple[str, Any, Any]] = set()
    for unit in report.units:
        w, t = before[unit.name], after[unit.name]
        if unit.head is not None:
            key = (unit.role, unit.head)
            w, t = (pieces(layouts[unit.name], x)[key] for x in (w, t))  # type: ignore[index]
        assert unit.parameters == w.numel()
        assert unit.theta_deg == pytest.approx(angle(w, t), rel=1e-6, abs=2e-6)
        assert unit.norm_ratio == pytest.approx(float(t.norm() / w.norm()), rel=1e-7)
        assert unit.kept == pytest.approx(float((w * t).sum() / (w * w).sum()), rel=1e-7)
        distance = float((t - w).norm() / w.norm())
        assert unit.relative_change == pytest.approx(distance, rel=1e-6, abs=1e-9)
        seen.add((unit.name, unit.role, unit.head))
    assert len(seen) == len(report.units)


def falcon(new: bool) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=new,
        multi_query=False,
        initializer_range=0.2,
    )
    return transformers.FalconForCausalLM(config).eval()


def falcon_multi_query() -> nn.Module:
    """The first generation (7B): all query heads, then one key head and one value head."""
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        new_decoder_architecture=False,
        multi_query=True,
        initializer_range=0.2,
    )
    return transformers.FalconForCausalLM(config).eval()


def phi3() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return transformers.Phi3ForCausalLM(config).eval()


def phi() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.PhiConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return transformers.PhiForCausalLM(config).eval()


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: llama(hidden_size=32),
    "gpt2": gpt2,
    "falcon-grouped": lambda: falcon(True),
    "falcon-interleaved": lambda: falcon(False),
    "falcon-multi-query": falcon_multi_query,
    "phi": phi,
    "phi3": phi3,
}


def turn(part: Tensor, degrees: float) -> Tensor:
    """A matrix turned as one vector, its norm kept."""
    part = part.double()
    other = torch.randn(part.shape, dtype=F64)
    other -= (other * part).sum() / part.square().sum() * part
    other *= part.norm() / other.norm()
    return math.cos(math.radians(degrees)) * part + math.sin(math.radians(degrees)) * other


def write(model: nn.Module, name: str, weight: Tensor) -> None:
    layer = model.get_submodule(name)
    info = describe(layer, name)
    assert info is not None
    with torch.no_grad():
        read_weight(layer, info).copy_(weight)


def turn_head(model: nn.Module, name: str, role: str, head: int, degrees: float) -> None:
    layer = model.get_submodule(name)
    info = describe(layer, name)
    assert info is not None
    weight = read_weight(layer, info)
    part = pieces(head_layout(model)[name], weight)[role, head]  # type: ignore[index]
    with torch.no_grad():
        part.copy_(turn(part, degrees))


# Planted changes, from checkpoint to checkpoint -------------------------------------------------


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_planted_changes_are_recovered_per_head(
    kind: str, storage: torch.dtype, tmp_path: Path
) -> None:
    model = BUILDERS[kind]().double()
    layouts = head_layout(model)
    names = [n for n in layouts if any(r == "q" for r, _ in layouts[n].heads)]
    keys = [n for n in layouts if any(r == "k" for r, _ in layouts[n].heads)]
    mlps = [n for n in weights_of(model) if "mlp" in n]
    model.to(storage).save_pretrained(tmp_path / "base")
    tuned = copy.deepcopy(model).double()
    turn_head(tuned, names[0], "q", 1, 90.0)
    last = max(h for r, h in layouts[keys[-1]].heads if r == "k")
    turn_head(tuned, keys[-1], "k", last, 10.0)
    write(tuned, mlps[0], 0.85 * weights_of(tuned)[mlps[0]])
    w = weights_of(tuned)[mlps[-1]]
    extra = torch.outer(torch.randn(w.shape[0], dtype=F64), torch.randn(w.shape[1], dtype=F64))
    extra -= (extra * w).sum() / w.square().sum() * w
    write(tuned, mlps[-1], w + 1.5 * w.norm() / extra.norm() * extra)
    tuned.to(storage).save_pretrained(tmp_path / "tuned")

    report = ls.diagnose(tmp_path / "base", tmp_path / "tuned")

    check(report, model, weights_of(tuned))
    assert report.skipped == ()
    assert {u.name for u in report.units} == {names[0], keys[-1], mlps[0], mlps[-1]}
    found = {(u.name, u.role, u.head): u for u in report.units}
    exact = 1e-5 if storage == torch.float32 else 0.2
    one, two = found[names[0], "q", 1], found[keys[-1], "k", last]
    assert one.theta_deg == pytest.approx(90.0, abs=exact)
    assert (one.mode, one.change) == ("substitutive", "replaced")
    assert two.theta_deg == pytest.approx(10.0, abs=exact)
    assert (two.mode, two.change) == ("substitutive", "turned")
    scaled, grown = found[mlps[0], "mlp", None], found[mlps[-1], "mlp", None]
    assert (scaled.mode, scaled.change) == ("damaged", "scaled")
    assert scaled.norm_ratio == pytest.approx(0.85, abs=1e-3)
    assert grown.change == "extended"
    assert grown.theta_deg == pytest.approx(math.degrees(math.atan(1.5)), abs=exact)
    # No other head of these projections moved.
    rest = [u for key, u in found.items() if u not in (one, two, scaled, grown)]
    assert len(rest) == len(report.units) - 4 > 0
    assert all((u.theta_deg, u.change) == (0.0, "unchanged") for u in rest)
    assert all(u.floor_deg == pytest.approx(math.degrees(noise_floor(storage))) for u in rest)


def test_a_head_at_90_degrees_is_not_lost_in_its_projection() -> None:
    # EgoRA's "per head" is the projection: it gives 41.9° for one of two heads.
    base = BUILDERS["llama"]()
    tuned = copy.deepcopy(base)
    turn_head(tuned, "model.layers.0.self_attn.q_proj", "q", 0, 90.0)
    by_head = ls.diagnose(base, tuned)
    whole = ls.diagnose(base, tuned, per="projection")
    assert by_head.max_theta_deg == pytest.approx(90.0, abs=1e-4)
    assert [u.head for u in by_head.units] == [0, 1, 2, 3]
    assert len(whole.units) == 1
    assert whole.units[0].head is None
    assert whole.units[0].role == "q"
    assert whole.max_theta_deg < 60
    (together,) = by_head.by_module.values()
    assert together.whole_theta_deg == pytest.approx(whole.max_theta_deg, rel=1e-9)


def test_acts_that_egora_s_four_modes_mistake() -> None:
    # Random weights, 0.85 W, and an addition of rank 1, each on one whole layer.
    base = llama(hidden_size=64, intermediate_size=96)
    tuned: Any = copy.deepcopy(base)
    before = weights_of(base)
    random, scaled, added = (f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down"))
    fresh = torch.randn(before[random].shape, dtype=F64)
    write(tuned, random, fresh * (before[random].norm() / fresh.norm()))
    write(tuned, scaled, 0.85 * before[scaled])
    w = before[added]
    extra = torch.outer(torch.randn(w.shape[0], dtype=F64), torch.randn(w.shape[1], dtype=F64))
    write(tuned, added, w + w.norm() / extra.norm() * extra)
    report = ls.diagnose(base, tuned, spectrum=True, intruders=True)
    found = {u.name: u for u in report.units}
    modes = {n: (u.mode, u.change) for n, u in found.items()}
    assert modes == {
        random: ("substitutive", "replaced"),
        scaled: ("damaged", "scaled"),
        added: ("substitutive", "extended"),
    }
    assert found[random].theta_deg == pytest.approx(90, abs=5)
    assert found[scaled].theta_deg < 1e-4
    spectra = {s.name: s for s in report.spectra}
    assert (spectra[added].rank, spectra[scaled].rank) == (1, 64)
    assert (spectra[added].intruders, spectra[scaled].intruders) == (1, 0)
    assert spectra[scaled].energy_in_top is not None


def test_fused_projections_have_three_parts() -> None:
    base = gpt2()
    tuned = copy.deepcopy(base)
    turn_head(tuned, "transformer.h.1.attn.c_attn", "k", 0, 20.0)
    report = ls.diagnose(base, tuned, per="projection")
    assert [(u.role, u.head) for u in report.units] == [("q", None), ("k", None), ("v", None)]
    assert [u.theta_deg > 0 for u in report.units] == [False, True, False]
    assert list(report.by_projection) == ["c_attn.q", "c_attn.k", "c_attn.v"]


@pytest.mark.parametrize("degrees", [5e-4, 0.01, 1.0, 45.0, 89.999])
def test_angles_are_right_to_a_millionth(degrees: float, tmp_path: Path) -> None:
    torch.manual_seed(3)
    layer = nn.Sequential(nn.Linear(400, 300, bias=False)).double()
    tuned = copy.deepcopy(layer)
    with torch.no_grad():
        tuned[0].weight.copy_(turn(layer[0].weight.detach(), degrees))
    (unit,) = ls.diagnose(layer, tuned).units
    assert unit.theta_deg == pytest.approx(degrees, rel=1e-6)
    # Also where the norm changed a lot besides.
    with torch.no_grad():
        tuned[0].weight.mul_(0.7)
    (unit,) = ls.diagnose(layer, tuned).units
    assert unit.theta_deg == pytest.approx(degrees, rel=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_blocks_that_are_nearly_only_scaled(axis: str, transposed: bool) -> None:
    # Each block scaled by its own factor, and turned by its own small angle.
    base = torch.randn(600, 800, dtype=F64)
    tuned = base.clone()
    parts = torch.split(tuned, 150 if axis == "out" else 200, dim=0 if axis == "out" else 1)
    for i, part in enumerate(parts):
        part.copy_((0.6 + 0.2 * i) * turn(part, 1e-3 * (i + 1)))
    pair = [MemoryMatrix("x", w, transposed) for w in (base, tuned)]
    sums = pair_sums(pair[0], pair[1], 4, axis)
    for i in range(4):
        n2, inner, _, across = sums.total([i])
        theta = math.degrees(math.atan2(math.sqrt(across), math.sqrt(n2) + inner / math.sqrt(n2)))
        assert theta == pytest.approx(1e-3 * (i + 1), rel=1e-6)
    n2, inner, delta, across = sums.total([0, 1, 2, 3])
    theta = math.degrees(math.atan2(math.sqrt(across), math.sqrt(n2) + inner / math.sqrt(n2)))
    assert theta == pytest.approx(angle(base, tuned), rel=1e-6)
    assert delta == pytest.approx(float((tuned - base).square().sum()), rel=1e-12)


def test_true_head_size_under_grouped_queries(tmp_path: Path) -> None:
    # 4 heads of 6 on a hidden size of 16: 16 / 4 = 4 would be wrong.
    base = llama(head_dim=6)
    tuned = copy.deepcopy(base)
    turn_head(tuned, "model.layers.0.self_attn.k_proj", "k", 1, 30.0)
    base.save_pretrained(tmp_path / "a")
    tuned.save_pretrained(tmp_path / "b")
    report = ls.diagnose(tmp_path / "a", tmp_path / "b")
    assert report.head_dim == 6
    assert report.theta_crit_deg == pytest.approx(math.degrees(math.asin(1 / math.sqrt(6))))
    assert [u.head for u in report.units] == [0, 1]  # two key heads, not four
    assert report.units[1].theta_deg == pytest.approx(30.0, abs=1e-4)


# Adapters ---------------------------------------------------------------------------------------


def _batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 32, (4, 7), generator=generator)} for _ in range(4)]


def _attach(model: nn.Module, config: Any) -> ls.Adapter:
    return ls.attach(
        model,
        config,
        calibration=_batches(),
        calibration_loss=lambda output: output.logits.float().pow(2).mean(),
    )


def _one_each() -> list[Any]:
    found = []
    for name, cases in CONFIGURATIONS.items():
        if not ls.variants()[name].fusable:
            continue
        for case, config in cases.items():
            if case not in ("loftq", "eva", "eva ranks", "lora_ga", "gaussian", "orthogonal"):
                found.append(pytest.param(config, id=f"{name}-{case}"))
    return found


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("config", _one_each())
def test_every_adapter_in_memory_and_on_disk(
    config: Any, build: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, bare = build(), build()
    try:
        adapter = _attach(model, config)
    except (ConfigError, TypeError) as error:
        if "calibration" not in str(error):
            raise
        adapter = ls.attach(model, config)
    randomise(adapter.parameters(), scale=0.1)
    after = fused_weights(model)
    ls.save(model, tmp_path / "adapter")
    bare.save_pretrained(tmp_path / "base")
    hashes = state_hash(model), state_hash(bare)

    reports = [
        ls.diagnose(model),
        ls.diagnose(bare, adapter),
        ls.diagnose(bare, tmp_path / "adapter"),
        ls.diagnose(tmp_path / "base", tmp_path / "adapter"),
        ls.diagnose(tmp_path / "base", model),
    ]

    assert (state_hash(model), state_hash(bare)) == hashes
    for report in reports:
        check(report, bare, after)
        assert {u.name for u in report.units} == set(adapter.targets)
        assert report.skipped == ()


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_exact_factors_never_form_the_sum(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    kind = {"lora": ls.LoRAConfig, "dora": ls.DoRAConfig}[variant]
    adapter = ls.attach(model, kind(r=2))
    randomise(adapter.parameters())

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("a whole ΔW was formed")

    monkeypatch.setattr(Factors, "delta", refuse)
    monkeypatch.setattr(type(ls.variants()[variant]), "effective_weight", refuse)
    assert ls.diagnose(model).units


def test_no_second_model_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tuned")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    check(ls.diagnose(tmp_path / "base", tmp_path / "tuned"), llama(), weights_of(model))


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    import json

    model = llama()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    config["architectures"] = ["Evil"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    tuned = copy.deepcopy(model)
    turn_head(tuned, "model.layers.1.self_attn.q_proj", "q", 2, 15.0)
    with pytest.warns(UserWarning, match="'evil' is not known"):
        report = ls.diagnose(tmp_path, tuned)
    assert not (tmp_path / "ran").exists()
    check(report, model, weights_of(tuned))
    assert report.max_theta_deg == pytest.approx(15.0, abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT's own
def test_peft_models_and_their_directories(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    configs = [
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]),
        peft.LoraConfig(r=3, use_rslora=True, target_modules=["o_proj", "k_proj"]),
        peft.LoraConfig(r=3, use_dora=True, target_modules=["v_proj", "o_proj"]),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LoHaConfig(r=2, alpha=4, target_modules=["q_proj", "up_proj"]),
    ]
    for i, config in enumerate(configs):
        bare, wrapped = llama(), peft.get_peft_model(llama(), config)
        randomise([p for p in wrapped.parameters() if p.requires_grad], scale=0.1)
        wrapped.save_pretrained(tmp_path / str(i))
        before = state_hash(wrapped)
        merged = copy.deepcopy(wrapped).double().merge_and_unload()
        for report in (
            ls.diagnose(wrapped),
            ls.diagnose(bare, wrapped),
            ls.diagnose(bare, tmp_path / str(i)),
        ):
            check(report, bare, weights_of(merged))
            assert report.units
        assert state_hash(wrapped) == before
    wrapped.merge_adapter()
    with pytest.raises(FuseError, match="merged"):
        ls.diagnose(wrapped)


def test_a_saved_head_counts_as_changed(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=False)
    adapter = ls.attach(model, ls.LoRAConfig(r=2, modules_to_save=("lm_head",)))
    bare = llama(tie_word_embeddings=False)
    assert ls.diagnose(bare, model).units == ()
    randomise(adapter.parameters())
    (head,) = adapter.saved_modules().values()
    ls.save(model, tmp_path)
    for report in (ls.diagnose(model), ls.diagnose(bare, tmp_path)):
        (unit,) = [u for u in report.units if u.name == "lm_head"]
        expected = angle(bare.lm_head.weight.detach(), head.weight.detach())
        assert unit.theta_deg == pytest.approx(expected, rel=1e-6)


def test_a_fused_adapter_is_seen_through_its_originals() -> None:
    model = llama()
    adapter = ls.attach(model, ls.LoRAConfig(r=2))
    randomise(adapter.parameters())
    before = ls.diagnose(model)
    ls.fuse(model)
    after = ls.diagnose(model)
    assert [u.theta_deg for u in after.units] == [u.theta_deg for u in before.units]
    ls.unfuse(model)
    ls.fuse(model, keep_original=False)
    with pytest.raises(FuseError):
        ls.diagnose(model)


def test_fused_checkpoint_and_adapter_agree(tmp_path: Path) -> None:
    base, model = llama(), llama()
    model.config._name_or_path = str(tmp_path / "base")
    adapter = ls.attach(model, ls.LoRAConfig(r=2, targets=("q_proj", "v_proj")))
    randomise(adapter.parameters())
    ls.save(model, tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base")
    merged = copy.deepcopy(base)
    for name, weight in fused_weights(model).items():
        write(merged, name, weight)
    merged.save_pretrained(tmp_path / "merged")
    one = ls.diagnose(tmp_path / "base", tmp_path / "adapter")
    two = ls.diagnose(tmp_path / "base", tmp_path / "merged")
    assert [(u.name, u.head) for u in one.units] == [(u.name, u.head) for u in two.units]
    for a, b in zip(one.units, two.units, strict=True):
        assert a.theta_deg == pytest.approx(b.theta_deg, rel=1e-5)
    assert (one.unchanged, one.unchanged_units) == (two.unchanged, two.unchanged_units)
    # The adapter as the base, and the merged weights as what came of it: nothing but rounding.
    third = ls.diagnose(ls.read_adapter(tmp_path / "adapter"), tmp_path / "merged")
    assert third.max_theta_deg < 1e-4


# Arguments, and what does not fit ---------------------------------------------------------------


def test_layers_and_targets_narrow_it_down() -> None:
    base = llama()
    tuned = copy.deepcopy(base)
    for name in weights_of(base):
        write(tuned, name, turn(weights_of(base)[name], 3.0))

    def names(**options: Any) -> set[str]:
        return {u.name for u in ls.diagnose(base, tuned, **options).units}

    assert all(".1." in n for n in names(layers=1))
    assert names(layers=[0], targets="q_proj") == {"model.layers.0.self_attn.q_proj"}
    assert all("mlp" in n for n in names(targets="mlp"))
    assert all("self_attn" in n for n in names(targets="attention"))
    assert len(names(targets=["re:.*(up|down)_proj"])) == 4
    with pytest.raises(ConfigError, match="No layer is left"):
        names(targets="nothing")


def test_progress_is_told() -> None:
    base = llama()
    calls: list[tuple[str, int, int]] = []
    ls.diagnose(base, copy.deepcopy(base), progress=lambda *c: calls.append(c))
    assert calls[-1][1] == calls[-1][2] == len(calls) > 10


def test_equal_models_have_no_units() -> None:
    report = ls.diagnose(llama(), llama())
    assert report.units == ()
    assert report.verdict == "SAFE"
    assert report.unchanged == 14
    assert report.unchanged_units == 2 * (4 + 2 + 2 + 4 + 3)


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    base = llama()
    with pytest.raises(ModelError, match="different architectures"):
        ls.diagnose(base, gpt2())
    with pytest.raises(ModelError, match="different architectures"):
        ls.diagnose(base, llama(hidden_size=32))
    with pytest.raises(ConfigError, match="nothing to compare"):
        ls.diagnose(base)
    with pytest.raises(ConfigError, match="same model"):
        ls.diagnose(base, base)
    with pytest.raises(ConfigError, match="per"):
        ls.diagnose(base, llama(), per="row")  # type: ignore[arg-type]
    other: Any = llama()
    other.model.layers[1].mlp.up_proj = nn.Linear(16, 40)
    del other.model.layers[0].mlp.up_proj
    other.model.layers[0].self_attn.q_proj.weight.data[0, 0] = math.nan
    report = ls.diagnose(base, other)
    found = {one.name: one for one in report.skipped}
    assert {name: one.reason for name, one in found.items()} == {
        "model.layers.1.mlp.up_proj": "shape",
        "model.layers.0.mlp.up_proj": "missing",
        "model.layers.0.self_attn.q_proj": "not_finite",
    }
    assert "shapes differ" in found["model.layers.1.mlp.up_proj"].message
    backwards = ls.diagnose(other, base)
    assert {s.name: s.reason for s in backwards.skipped}["model.layers.0.mlp.up_proj"] == "extra"


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    model = llama(layers=3)
    randomise(ls.attach(model, ls.LoRAConfig(r=2)).parameters())
    ls.save(model, tmp_path / "deep")
    llama().save_pretrained(tmp_path / "base")
    llama(seed=5).save_pretrained(tmp_path / "other")
    for base in (llama(), tmp_path / "base"):
        with pytest.raises(BaseMismatchError):
            ls.diagnose(base, tmp_path / "deep")
        # Forced, it still does not fit silently.
        with pytest.raises(AdapterFileError, match="does not have"):
            ls.diagnose(base, tmp_path / "deep", allow_base_mismatch=True)
    shallow = llama()
    randomise(ls.attach(shallow, ls.LoRAConfig(r=2)).parameters())
    ls.save(shallow, tmp_path / "shallow")
    assert ls.diagnose(tmp_path / "base", tmp_path / "shallow").units
    with pytest.raises(BaseMismatchError, match="weights differ"):
        ls.diagnose(tmp_path / "other", tmp_path / "shallow")
    assert ls.diagnose(tmp_path / "other", tmp_path / "shallow", allow_base_mismatch=True).units


def test_zero_weights_have_no_direction() -> None:
    base: Any = mlp(bias=False)
    tuned: Any = mlp(bias=False)
    with torch.no_grad():
        base[0].weight.zero_()
        tuned[2].weight.zero_()
    report = ls.diagnose(base, tuned)
    found = {u.name: u for u in report.units}
    assert (found["0"].theta_deg, found["0"].change) == (0.0, "extended")
    assert math.isinf(found["0"].norm_ratio)
    assert (found["2"].norm_ratio, found["2"].change, found["2"].mode) == (0, "replaced", "damaged")
    assert RotationReport.from_dict(report.to_dict()).units[1] == found["2"]


def test_spectra_and_diversity_come_with_it(tmp_path: Path) -> None:
    model = llama()
    randomise(ls.attach(model, ls.LoRAConfig(r=2, targets=("q_proj", "up_proj"))).parameters())
    report = ls.diagnose(model, spectrum=True, diversity=True, top=3, intruders=True)
    assert [s.rank for s in report.spectra] == [2] * 4
    assert {d.role for d in report.diversity} == {"q"}
    assert all(s.intruders is not None for s in report.spectra)
    path = report.save(tmp_path / "r.json")
    assert RotationReport.load(path) == report


def test_records_are_frozen() -> None:
    base = llama()
    tuned = copy.deepcopy(base)
    turn_head(tuned, "model.layers.0.self_attn.q_proj", "q", 0, 3.0)
    unit: UnitRotation = ls.diagnose(base, tuned).units[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        unit.theta_deg = 0.0  # type: ignore[misc]


@pytest.mark.parametrize(
    "name", ["e2e-s0", "e2e-dora", "numbers-en-rslora-r16", "mrpc-rankpattern"]
)
def test_real_adapters_on_random_weights_of_their_shapes(name: str, zoo: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=8,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    layer, weights = 2, ls.read_adapter(zoo / name)
    # Two layers have values; the rest stays without, and is not asked for.
    for leaf in ("q_proj", "v_proj"):
        module = model.get_submodule(f"model.layers.{layer}.self_attn.{leaf}")
        module.weight = nn.Parameter(0.03 * torch.randn(module.weight.shape))
    report = ls.diagnose(model, zoo / name, layers=layer, targets=["q_proj", "v_proj"])
    assert len(report.units) == 9 + 3
    for unit in report.units:
        w = model.get_submodule(unit.name).weight.detach().double()
        t = w + weights.delta(unit.name, w, dtype=F64)
        assert unit.head is not None
        rows = slice(64 * unit.head, 64 * (unit.head + 1))
        assert unit.theta_deg == pytest.approx(angle(w[rows], t[rows]), rel=1e-6)
