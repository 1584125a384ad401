"""Conversion into plain LoRA: the nearest one, its errors, and that PEFT runs it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.core import truncation
from lorasmith.core.layers import read_weight
from lorasmith.errors import AdapterFileError, BaseMismatchError, ConfigError, FuseError
from tests.contract.configurations import CONFIGURATIONS
from tests.io.support import TOKENS, attached, distilbert, gpt2, llama, logits, stir
from tests.models import mlp, randomise

#: Changes of W that have full rank, of low rank, and with factors.
CONFIGS: dict[str, Callable[[], ls.AdapterConfig]] = {
    "lora": lambda: ls.LoRAConfig(r=3, alpha=5),
    "pissa": lambda: ls.LoRAConfig(r=3, init="pissa"),
    "dora": lambda: ls.DoRAConfig(r=3),
    "ia3": ls.IA3Config,
    "ia3_ff": ls.IA3FFConfig,
}


def _deltas(model: nn.Module, adapter: ls.Adapter) -> dict[str, Tensor]:
    """ΔW of each layer by fusing a copy: float64, another way than convert's."""
    import copy

    fused = copy.deepcopy(model).double()
    before = {
        n: read_weight(fused.get_submodule(n), part.info).clone()
        for n, part in adapter.layers().items()
    }
    ls.fuse(fused, adapter.name)
    return {
        n: read_weight(fused.get_submodule(n), part.info) - before[n]
        for n, part in adapter.layers().items()
    }


def _update(made: ls.Conversion, name: str) -> Tensor:
    return made.weights.factors[name].delta(torch.float64)


def _quietly(*arguments: Any, **named: Any) -> ls.Conversion:
    """Without the warning about biases, which has a test of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return ls.convert(*arguments, **named)


@pytest.mark.parametrize("build", [llama, gpt2, distilbert])
@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_it_is_the_truncated_svd_and_the_errors_are_true(
    case: str, rank: int, build: Callable[[], Any]
) -> None:
    model = build()
    adapter = attached(model, CONFIGS[case]())
    made = _quietly(adapter, ls.LoRAConfig(r=rank, alpha=3, scaling="rslora"))
    assert made.source == adapter.config.variant
    assert set(made.weights.modules) == set(adapter.targets)
    total = lost = 0.0
    for record in made.layers:
        delta = _deltas(model, adapter)[record.name]
        S = torch.linalg.svdvals(delta)
        best = float(S[rank:].square().sum())
        error = float((delta - _update(made, record.name)).square().sum())
        assert math.sqrt(error) <= math.sqrt(best) + 1e-6 * float(S[0])
        assert record.change == pytest.approx(float(delta.norm()), rel=1e-6)
        assert record.error == pytest.approx(math.sqrt(error) / record.change, abs=2e-7)
        assert record.rank == int((1e-9 * S[0] < S).sum())
        assert record.kept == min(rank, record.rank)
        weight = read_weight(model.get_submodule(record.name), adapter.layers()[record.name].info)
        norm = float(weight.double().norm())
        assert record.weight_error == pytest.approx(math.sqrt(error) / norm, abs=2e-7)
        total, lost = total + float(S.square().sum()), lost + error
    assert made.error == pytest.approx(math.sqrt(lost / total), abs=2e-7)
    assert made.max_error == max(layer.error for layer in made.layers)
    scaling = {f.scaling for f in made.weights.factors.values()}
    assert scaling == {3 / math.sqrt(rank)}


@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("case", [*CONFIGS, "low rank"])
def test_peft_runs_it_like_the_original(
    case: str, build: Callable[[], Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = build()
    targets = ["q_proj", "up_proj"] if build is llama else ["c_attn", "c_fc"]
    # Biases are what plain LoRA cannot carry: IA3 acts on inputs here.
    config = replace(CONFIGS["dora" if case == "low rank" else case](), targets=targets)
    if isinstance(config, ls.IA3Config):
        config = replace(config, feedforward=targets)
    adapter = attached(model, config)
    wanted = logits(model)
    rank = 2 if case == "low rank" else 32
    made = ls.convert(adapter, ls.LoRAConfig(r=rank))
    assert made.bias_error == 0
    assert made.error == pytest.approx(0, abs=1e-6) if rank == 32 else made.error > 0.01
    made.save(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "a").eval()
    fresh = build()
    ls.load(fresh, tmp_path / "a")
    torch.testing.assert_close(logits(theirs), logits(fresh), atol=1e-5, rtol=1e-5)
    if rank == 32:
        torch.testing.assert_close(logits(theirs), wanted, atol=1e-5, rtol=1e-5)
    else:
        # To the error that was reported: the nearest layers of rank 2, not others.
        ls.detach(model)
        with torch.no_grad():
            for name in made.weights.modules:
                layer = model.get_submodule(name)
                weight = layer.weight.T if build is gpt2 else layer.weight
                weight.add_(_update(made, name))
        torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [pytest.param(c, id=f"{v}-{n}") for v, some in CONFIGURATIONS.items() for n, c in some.items()],
)
def test_every_variant(config: Any, tmp_path: Path) -> None:
    """At full rank the LoRA acts like the adapter, from the handle and from the file."""
    model, x = mlp(), torch.randn(64, 6)
    variant = ls.variants()[config.variant]
    # Several inputs, so that their covariance has full rank.
    calibration = [{"input": x}] if variant.statistics(config) else None
    loss = (lambda y: y.square().mean()) if calibration else None
    adapter = ls.attach(model, config, calibration=calibration, calibration_loss=loss)
    randomise(adapter.parameters())
    to = ls.LoRAConfig(r=8)
    if not variant.fusable:
        with pytest.raises(FuseError, match="cannot be converted"):
            ls.convert(adapter, to)
        return
    made = _quietly(adapter, to)
    assert made.max_error < 2e-6
    ls.save(model, tmp_path / "a")
    again = _quietly(tmp_path / "a", to, model=mlp())
    for name in made.weights.modules:
        torch.testing.assert_close(_update(again, name), _update(made, name), atol=1e-5, rtol=1e-5)
    wanted = model(x)
    ls.detach(model)
    if made.bias_error:  # what LoRA cannot carry, put back by hand
        assert config.variant in ("ia3", "road")
        return
    made.save(tmp_path / "b")
    ls.load(model, tmp_path / "b")
    torch.testing.assert_close(model(x), wanted, atol=2e-5, rtol=1e-5)


def test_files_and_handles_give_the_same(tmp_path: Path) -> None:
    for case, config in CONFIGS.items():
        model = llama()
        adapter = attached(model, config())
        ls.save(model, tmp_path / case)
        base = llama()
        to = ls.LoRAConfig(r=2)
        from_handle = ls.convert(adapter, to)
        from_path = ls.convert(tmp_path / case, to, model=base)
        from_value = ls.convert(ls.read_adapter(tmp_path / case), to, model=base)
        for other in (from_path, from_value):
            assert other.to_dict() == from_handle.to_dict()
            for name in other.weights.modules:
                assert torch.equal(_update(other, name), _update(from_handle, name))
        assert from_path.weights.base.fingerprint == from_handle.weights.base.fingerprint
        # The base model is as it was.
        assert all(torch.equal(v, llama().state_dict()[k]) for k, v in base.state_dict().items())
        assert not ls.attached(base)


@pytest.mark.parametrize("case", ["lora", "pissa"])
def test_factors_need_no_model(case: str, tmp_path: Path) -> None:
    model = llama()
    attached(model, CONFIGS[case]())
    ls.save(model, tmp_path / "a")
    made = ls.convert(tmp_path / "a", ls.LoRAConfig(r=6))
    assert made.max_error < 1e-6
    assert made.layers[0].weight_error is None
    assert made.layers[0].rank == (3 if case == "lora" else 6)
    made.save(tmp_path / "b")
    again = llama()
    ls.load(again, tmp_path / "b")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="plain LoRA only"):
        ls.convert(tmp_path / "a", ls.DoRAConfig(r=6))  # type: ignore[arg-type]


def test_what_depends_on_the_base_needs_it(tmp_path: Path) -> None:
    model = llama()
    attached(model, ls.IA3Config())
    ls.save(model, tmp_path / "a")
    with pytest.raises(ConfigError) as caught:
        ls.convert(tmp_path / "a", ls.LoRAConfig(r=2))
    assert caught.value.key == "model"
    with pytest.raises(AdapterFileError):
        ls.convert(tmp_path / "a", ls.LoRAConfig(r=2), model=mlp(), allow_base_mismatch=True)
    other = llama()
    stir(other.parameters())
    with pytest.raises(BaseMismatchError):
        ls.convert(tmp_path / "a", ls.LoRAConfig(r=2), model=other)
    ls.convert(tmp_path / "a", ls.LoRAConfig(r=2), model=other, allow_base_mismatch=True)


def test_a_base_of_two_dtypes_is_read_as_it_is() -> None:
    model = llama().bfloat16()
    adapter = attached(model, ls.IA3Config())
    made = ls.convert(adapter, ls.LoRAConfig(r=32))
    for name, part in adapter.layers().items():
        W = read_weight(model.get_submodule(name), part.info).double()
        wanted = W * (part["gain"].detach().double()[:, None] - 1)
        torch.testing.assert_close(_update(made, name), wanted, atol=1e-6, rtol=1e-5)


def test_energy_chooses_the_ranks() -> None:
    model = llama()
    adapter = attached(model, ls.LoRAConfig(r=8))
    made = ls.convert(adapter, energy=0.9)
    kept = {layer.name: layer.kept for layer in made.layers}
    assert len(set(kept.values())) > 1
    for name, delta in _deltas(model, adapter).items():
        S = torch.linalg.svdvals(delta).square()
        share = S.cumsum(0) / S.sum()
        assert float(share[kept[name] - 1]) >= 0.9
        assert kept[name] == 1 or float(share[kept[name] - 2]) < 0.9
        assert made.weights.config.rank_of(name) == kept[name]  # type: ignore[attr-defined]
    assert made.error <= math.sqrt(0.1)
    capped = ls.convert(adapter, ls.LoRAConfig(r=2, alpha=7), energy=0.9)
    assert {layer.kept for layer in capped.layers} <= {1, 2}
    everything = ls.convert(adapter, energy=1.0)
    assert {layer.kept for layer in everything.layers} == {8}
    assert everything.max_error < 1e-6
    fresh = ls.convert(ls.attach(mlp(), ls.LoRAConfig(r=2)), energy=0.5)
    assert [(x.kept, x.rank, x.error) for x in fresh.layers] == [(0, 0, 0.0)] * 2
    assert {f.rank for f in fresh.weights.factors.values()} == {1}


def test_energy_survives_the_file(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    adapter = attached(model, ls.LoRAConfig(r=8))
    ls.convert(adapter, energy=0.9).save(tmp_path / "a")
    mine = llama()
    ls.load(mine, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "a").eval()
    torch.testing.assert_close(logits(theirs), logits(mine), atol=1e-5, rtol=1e-5)


def test_given_ranks_of_single_layers() -> None:
    model = llama()
    adapter = attached(model, ls.LoRAConfig(r=4))
    made = ls.convert(adapter, ls.LoRAConfig(r=2, alpha=-4, rank_pattern={"down_proj": 3}))
    for name, factors in made.weights.factors.items():
        assert factors.rank == (3 if name.endswith("down_proj") else 2)
        assert factors.scaling == -4 / factors.rank
        S = torch.linalg.svdvals(_deltas(model, adapter)[name])
        residual = _deltas(model, adapter)[name] - _update(made, name)
        assert float(residual.norm()) == pytest.approx(float(S[factors.rank :].norm()), rel=1e-4)


def test_a_changed_bias_is_measured_and_warned_about() -> None:
    model = gpt2()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    adapter = attached(model, ls.IA3Config(targets="c_attn"))
    with pytest.warns(UserWarning, match="biases of 2 layers"):
        made = ls.convert(adapter, ls.LoRAConfig(r=32))
    for record in made.layers:
        bias = model.get_submodule(record.name).bias.double()
        change = (adapter.layers()[record.name]["gain"].detach().double() - 1) * bias
        assert record.bias_error == pytest.approx(float(change.norm() / bias.norm()), rel=1e-6)
    assert made.bias_error == max(r.bias_error for r in made.layers) > 0.01
    assert "which is lost" in str(made)


@pytest.mark.parametrize("case", ["lora", "dora"])
def test_modules_to_save_come_along(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = distilbert()
    config = replace(CONFIGS[case](), targets=["q_lin", "lin1"], modules_to_save=["classifier"])
    adapter = attached(model, config)
    made = ls.convert(adapter, ls.LoRAConfig(r=32))
    made.save(tmp_path / "a")
    fresh = distilbert()
    loaded = ls.load(fresh, tmp_path / "a")
    assert set(loaded.saved_modules()) == set(adapter.saved_modules()) == {"classifier"}
    torch.testing.assert_close(logits(fresh), logits(model), atol=1e-5, rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(distilbert(), tmp_path / "a").eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)
    # From its own files, too.
    ls.save(model, tmp_path / "b")
    again = ls.convert(tmp_path / "b", ls.LoRAConfig(r=32), model=distilbert())
    assert set(again.weights.saved_modules) == {"classifier"}
    assert set(again.weights.tensors) == set(made.weights.tensors)
    assert again.weights.padding == made.weights.padding


def test_an_adapter_that_peft_wrote(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[1], use_dora=True
        )
        theirs = peft.get_peft_model(llama(), config).eval()
        stir(p for n, p in theirs.named_parameters() if "lora_" in n)
        theirs.save_pretrained(tmp_path / "a")
    made = ls.convert(tmp_path / "a", ls.LoRAConfig(r=32), model=llama())
    assert len(made.weights.modules) == 2
    made.save(tmp_path / "b")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(llama(), tmp_path / "b").eval()
    torch.testing.assert_close(logits(again), logits(theirs), atol=1e-5, rtol=1e-5)


def test_large_layers_go_by_subspace_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncation, "EXACT", 8)
    monkeypatch.setattr(truncation, "SMALL", 4)
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 60, dtype=torch.float64))[0] for n in (80, 120))
    S = 0.8 ** torch.arange(60, dtype=torch.float64)
    delta = U * S @ V.T
    for matrix in (delta, delta.T):
        leading, exact = truncation.leading_spectrum(matrix, 6), truncation.exact_spectrum(matrix)
        torch.testing.assert_close(exact.S[:60], S, atol=1e-8, rtol=1e-6)
        torch.testing.assert_close(leading.S[:6], S[:6], atol=1e-9, rtol=1e-4)
        for found in (leading, exact):
            tensors = found.factors(6, 2.0)
            product = 2.0 * tensors["B"].double() @ tensors["A"].double()
            error = float((matrix - product).norm() / S[6:].norm())
            assert error == pytest.approx(1, abs=1e-3)
        assert leading.rank is None
        assert exact.rank == 60
    low = truncation.leading_spectrum(U[:, :3] @ V[:, :3].T, 6)
    assert (low.rank, low.useful) == (3, 3)
    # And the whole of it.
    monkeypatch.setattr(truncation, "EXACT", 1)
    model = llama()
    adapter = attached(model, ls.IA3Config(targets="down_proj"))
    made = ls.convert(adapter, ls.LoRAConfig(r=2))
    for record in made.layers:
        tail = torch.linalg.svdvals(_deltas(model, adapter)[record.name])[2:].norm()
        assert record.error * record.change == pytest.approx(float(tail), rel=0.02)


def test_what_is_refused(tmp_path: Path) -> None:
    model = mlp()
    adapter = attached(model, ls.LoRAConfig(r=2))
    with pytest.raises(ConfigError, match="Neither to nor energy"):
        ls.convert(adapter)
    for energy in (0.0, 1.5, "much"):
        with pytest.raises(ConfigError, match="share"):
            ls.convert(adapter, energy=energy)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="another model"):
        ls.convert(adapter, ls.LoRAConfig(r=2), model=mlp())
    ls.fuse(model)
    with pytest.raises(FuseError, match="is fused"):
        ls.convert(adapter, ls.LoRAConfig(r=2))
    ls.unfuse(model)
    with torch.no_grad():
        next(adapter.parameters())[0] = math.nan
    with pytest.raises(AdapterFileError, match="not finite"):
        ls.convert(adapter, ls.LoRAConfig(r=2))


def test_what_depends_on_its_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorasmith.adapters.ia3 import IA3
    from lorasmith.core.variant import cannot_fuse

    adapter = attached(mlp(), ls.IA3Config())

    def refuse(*_: Any) -> Tensor:
        raise cannot_fuse("ia3", "it looks at its input")

    monkeypatch.setattr(IA3, "effective_weight", refuse)
    with pytest.raises(FuseError, match="it looks at its input"):
        ls.convert(adapter, ls.LoRAConfig(r=2))
    monkeypatch.setattr(IA3, "fusable", False)
    with pytest.raises(FuseError, match="depends on its input"):
        ls.convert(adapter, ls.LoRAConfig(r=2))


def test_the_record() -> None:
    adapter = attached(mlp(), ls.LoRAConfig(r=3))
    made = ls.convert(adapter, ls.LoRAConfig(r=2))
    assert str(made).startswith("lora → lora of rank 2 on 2 layers: relative error ")
    found = made.to_dict()
    assert found["config"] == made.weights.config.to_dict()
    assert found["layers"][0]["kept"] == 2
    assert found["parameters"] == made.weights.num_parameters == 2 * (6 + 8 + 8 + 5)
    assert found["relative_error"] == made.error > 0
    assert TOKENS.shape == (2, 7)


def test_a_quantised_base() -> None:
    pytest.importorskip("bitsandbytes")
    from lorasmith.training.models import quantize_in_place

    for config in (ls.LoRAConfig(r=2), ls.IA3Config()):
        model = llama()
        quantize_in_place(model, "nf4", torch.float32, "cpu")
        adapter = attached(model, config)
        wanted = logits(model)
        made = ls.convert(adapter, ls.LoRAConfig(r=32))
        assert made.max_error < 1e-6
        ls.detach(model)
        tensors = {n: (f.A, f.B, f.scaling) for n, f in made.weights.factors.items()}
        again = ls.attach(model, made.weights.config)
        with torch.no_grad():
            for name, part in again.layers().items():
                A, B, scaling = tensors[name]
                assert part.constants["scaling"] == scaling
                part["A"].copy_(A)
                part["B"].copy_(B)
        torch.testing.assert_close(logits(model), wanted, atol=2e-5, rtol=1e-4)


class Nested(nn.Module):
    """The name of one layer is the end of the other's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(12, 12)
        self.inner = nn.Module()
        self.inner.q = nn.Linear(12, 12)
        self.c = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.inner.q(self.q(x)))  # type: ignore[no-any-return, operator]


def test_a_rank_of_its_own_is_not_that_of_a_longer_name(tmp_path: Path) -> None:
    model, x = Nested(), torch.randn(3, 12)
    adapter = ls.attach(model, ls.LoRAConfig(r=4))
    randomise(adapter.parameters())
    with torch.no_grad():
        adapter.layers()["q"]["B"][:, 1:] = 0
    made = ls.convert(adapter, energy=1.0)
    assert {layer.name: layer.kept for layer in made.layers} == {"q": 1, "inner.q": 4, "c": 4}
    wanted = model(x)
    other = Nested()
    ls.load(other, made.save(tmp_path / "a"))
    torch.testing.assert_close(other(x), wanted, atol=1e-5, rtol=1e-5)


def test_a_scaling_of_zero_is_refused() -> None:
    model = mlp()
    randomise(ls.attach(model, ls.LoRAConfig(r=2)).parameters())
    with pytest.raises(ConfigError, match="alpha of 0"):
        ls.convert(ls.attached(model)["default"], ls.LoRAConfig(r=2, alpha_pattern={"0": 0.0}))
