"""The AntiPaSTO family against dense float64 computations of its formulas."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.adapters.antipasto import gains, triplets
from lorasmith.adapters.antipasto_ablate import strengths
from lorasmith.adapters.antipasto_rot import turns
from lorasmith.errors import AttachError, ConfigError
from tests.models import llama, mlp, randomise, run

D_IN, D_OUT, R = 12, 10, 6

CONFIGS: dict[str, Any] = {
    "antipasto": ls.AntiPaSTOConfig(r=R, coeff=-0.7),
    "suppress": ls.AntiPaSTOConfig(r=R, coeff=1.3, suppress_only=True),
    "active": ls.AntiPaSTOConfig(r=R, directions="active"),
    "corda": ls.AntiPaSTOCorDAConfig(r=R, coeff=1.2),
    "rot V": ls.AntiPaSTORotConfig(r=R),
    "rot U": ls.AntiPaSTORotConfig(r=R, rotate="U", max_angle=1.1),
    "rot both": ls.AntiPaSTORotConfig(r=R, rotate="both", block=3),
    "ablate": ls.AntiPaSTOAblateConfig(r=R),
    "ablate 3": ls.AntiPaSTOAblateConfig(r=R, k=3, coeff=1.7),
    "arrow": ls.AntiPaSTOArrowConfig(r=R, block=2, coeff=0.8),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))


def layer(*, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(D_IN, D_OUT, bias=bias))


def batches(width: int = D_IN, *, count: int = 3) -> list[Tensor]:
    """Inputs of very uneven directions, so that the choice of directions depends on them."""
    g = torch.Generator().manual_seed(6)
    scale = torch.logspace(-1.5, 1.5, width)
    mix = torch.linalg.qr(torch.randn(width, width, generator=g)).Q
    return [(torch.randn(2, 9, width, generator=g) * scale) @ mix for _ in range(count)]


def attach(model: nn.Module, config: Any, data: list[Tensor] | None = None) -> ls.Adapter:
    wants = ls.variants()[config.variant].statistics(config)
    calibration = (batches() if data is None else data) if wants else None
    return ls.attach(model, config, calibration=calibration)


# -- the formulas --------------------------------------------------------------------------


def elu(z: Tensor) -> Tensor:
    return torch.where(z > 0, z, z.exp() - 1)


def rotation(theta: Tensor, r: int, block: int, max_angle: float) -> Tensor:
    """R as a dense matrix, by a loop over blocks and the textbook form of Cayley's map."""
    dense = torch.eye(r, dtype=torch.float64)
    at = 0
    for start in range(0, r, block):
        size = min(block, r - start)
        skew = torch.zeros(size, size, dtype=torch.float64)
        for i in range(size):
            for j in range(i):
                unit = torch.zeros(size, size, dtype=torch.float64)
                unit[i, j], unit[j, i] = 1, -1
                skew = skew + theta[at] * unit
                at += 1
        length = skew.square().sum() / 2  # squared
        skew = skew * math.tan(max_angle / 2) / (1 + length).sqrt()
        one = torch.eye(size, dtype=torch.float64)
        turned = torch.linalg.inv(one - skew) @ (one + skew)
        dense[start : start + size, start : start + size] = turned
    assert at == len(theta)
    return dense


def dense(config: Any, weight: Tensor, values: dict[str, Tensor]) -> Tensor:
    """The adapted weight W_res + U core V, from W and the trainable tensors alone."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    if config.variant == "antipasto_corda" or getattr(config, "directions", "") == "active":
        rows = torch.cat([b.reshape(-1, D_IN) for b in batches()]).double()
        covariance = rows.T @ rows / len(rows)
    if config.variant == "antipasto_corda":
        lam, q = torch.linalg.eigh(covariance)
        half = q @ torch.diag((lam + 1e-3).sqrt()) @ q.T
        u, s, v = torch.linalg.svd(weight @ half, full_matrices=False)
        v = v @ torch.linalg.inv(half)
    elif getattr(config, "directions", "") == "active":
        rms = torch.stack([(row @ covariance @ row).sqrt() for row in v])
        order = (s * rms).argsort(descending=True)[:R].sort().values
        assert order.tolist() != list(range(R)), "the choice does not depend on the data"
        u, s, v = u[:, order], s[order], v[order]
    u, s, v = u[:, :R], s[:R], v[:R]
    # Singular vectors are known up to a sign, which the gains do not see and the rest does.
    signs = (v * values["V"]).sum(dim=1).sign()
    u, v = u * signs, v * signs[:, None]
    residual = weight - u @ torch.diag(s) @ v
    if config.variant in ("antipasto", "antipasto_corda"):
        z = config.coeff * values["gain"]
        core = torch.diag(s * (1 + elu(-z.abs() if config.suppress_only else z)))
    elif config.variant == "antipasto_rot":
        core = torch.diag(s + values["shift"])
        form = (R, config.block, config.max_angle)
        if "rotation_U" in values:
            core = rotation(values["rotation_U"], *form) @ core
        if "rotation_V" in values:
            core = core @ rotation(values["rotation_V"], *form)
    elif config.variant == "antipasto_ablate":
        c = torch.linalg.qr(values["direction"]).Q
        a = values["strength"].abs().clamp(0, 1)
        core = torch.eye(R, dtype=torch.float64) - config.coeff * c @ torch.diag(a) @ c.T
        core = core @ torch.diag(s)
    else:
        b = config.block
        core = torch.diag(s * (1 + elu(torch.cat((torch.zeros(b), config.coeff * values["gain"])))))
        core[:b, :b] += config.coeff * values["mixing"] @ torch.diag(s[:b])
    return residual + u @ core @ v


def adapted(config: Any, scale: float = 0.4) -> tuple[nn.Sequential, ls.Adapter]:
    model = layer()
    adapter = attach(model, config)
    randomise(adapter.parameters(), scale=scale)
    return model, adapter


def values_of(adapter: ls.Adapter) -> dict[str, Tensor]:
    (part,) = adapter.layers().values()
    return {n: t.detach().double() for n, t in part.tensors()}


@every_config
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
def test_output_and_gradients_are_those_of_the_dense_formula(
    config: Any, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasmith.core.lowrank.SMALL", 0 if fast else 10**9)
    model, adapter = adapted(config)
    linear = model[0]
    assert isinstance(linear, nn.Linear)
    values = {n: t.requires_grad_(n not in ("U", "S", "V")) for n, t in values_of(adapter).items()}
    x = torch.randn(4, 7, D_IN, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    effective = dense(config, linear.weight.detach().double(), values)
    expected = wide @ effective.T + linear.bias.detach().double()
    y = model(x)
    assert (y - linear.bias - x @ linear.weight.T).abs().max() > 1e-2
    torch.testing.assert_close(y.double(), expected, atol=2e-5, rtol=1e-5)
    weights = torch.randn(4, 7, D_OUT)
    (y * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    assert x.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(x.grad.double(), wide.grad, atol=5e-5, rtol=1e-4)
    for name, parameter in adapter.named_parameters():
        want = values[name.rpartition(".")[2]].grad
        assert want is not None
        assert parameter.grad is not None
        assert want.abs().max() > 0
        torch.testing.assert_close(parameter.grad.double(), want, atol=1e-3, rtol=1e-4)


@every_config
def test_second_derivatives(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasmith.core.lowrank.SMALL", 0)
    model, adapter = adapted(config)
    model.double()
    part = adapter.layers()["0"]
    for name, parameter in list(part.named_parameters()):
        part._parameters[name] = nn.Parameter(parameter.detach().double())
    x = torch.randn(2, D_IN, dtype=torch.float64, requires_grad=True)
    names = [n for n, _ in part.named_parameters()]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        given = {f"0.lorasmith.adapter_default.{n}": v for n, v in zip(names, values, strict=True)}
        out: Tensor = torch.func.functional_call(model, given, (x,)).square()
        return out

    inputs = (x, *part.parameters())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@every_config
def test_factors_are_the_whole_change(config: Any, tmp_path: Path) -> None:
    model, adapter = adapted(config)
    linear = model[0]
    assert isinstance(linear, nn.Linear)
    weight = linear.weight.detach().double()
    change = dense(config, weight, values_of(adapter)) - weight
    found = ls.factors(model)["0"]
    assert found.exact
    rank = config.k if config.variant == "antipasto_ablate" else R
    assert found.A.shape == (rank, D_IN)
    assert found.B.shape == (D_OUT, rank)
    torch.testing.assert_close(found.delta(torch.float64), change, atol=2e-6, rtol=1e-5)
    ls.save(model, tmp_path / "a")
    read = ls.read_adapter(tmp_path / "a")
    torch.testing.assert_close(read.delta("0", dtype=torch.float64), change, atol=2e-6, rtol=1e-5)
    assert read.num_parameters == adapter.num_parameters()
    found.A.sum().add(found.B.sum()).backward()
    assert all(p.grad is not None for p in adapter.parameters())


# -- properties of the formulas ------------------------------------------------------------


def test_suppress_only_never_amplifies_and_never_dies() -> None:
    for seed in range(5):
        model = layer()
        adapter = ls.attach(model, ls.AntiPaSTOConfig(suppress_only=True, coeff=(-1.0) ** seed))
        randomise(adapter.parameters(), scale=3.0, seed=seed)
        linear = model[0]
        assert isinstance(linear, nn.Linear)
        before = linear.weight.detach().double().clone()
        ls.fuse(model)
        after = linear.weight.detach().double()
        # ‖W' x‖ ≤ ‖W x‖ for every x.
        least = torch.linalg.eigvalsh(before.T @ before - after.T @ after).min()
        assert least > -1e-6
    g = torch.tensor([-4.0, -0.1, 0.0, 0.1, 4.0], requires_grad=True)
    got = gains(g, 1.0, suppress_only=True)
    torch.testing.assert_close(got, torch.exp(-g.abs()) - 1)
    got.sum().backward()
    assert g.grad is not None
    assert torch.equal(g.grad.sign(), torch.tensor([1.0, 1, 1, -1, -1]))


def test_gains_keep_the_sign_of_every_direction() -> None:
    g = torch.linspace(-30, 30, 101)
    assert (gains(g, 1.0, False) >= -1).all()
    assert (gains(g[g > -15], 1.0, False) > -1).all()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("coeff", [0.3, 1.0, 2.0])
def test_ablation_is_contractive_for_any_parameters(k: int, coeff: float) -> None:
    for seed, scale in enumerate((0.1, 1.0, 30.0, 1e-4)):
        model = layer(bias=False)
        adapter = ls.attach(model, ls.AntiPaSTOAblateConfig(r=R, k=k, coeff=coeff))
        randomise(adapter.parameters(), scale=scale, seed=seed)
        part = adapter.layers()["0"]
        if k == 3 and seed == 2:  # columns that hardly differ, the worst case for Ĉ
            with torch.no_grad():
                part["direction"].copy_(
                    part["direction"][:, :1] * torch.tensor([1.0, 1.0 + 1e-6, -2.0])
                )
        linear = model[0]
        assert isinstance(linear, nn.Linear)
        x = torch.randn(50, D_IN)
        bare = x @ linear.weight.T
        assert (model(x).norm(dim=1) <= bare.norm(dim=1) * (1 + 1e-5) + 1e-6).all()
        before = linear.weight.detach().double().clone()
        ls.fuse(model)
        after = linear.weight.detach().double()
        assert torch.linalg.eigvalsh(before.T @ before - after.T @ after).min() > -1e-6


def test_a_full_ablation_takes_the_direction_out() -> None:
    model = layer(bias=False)
    adapter = ls.attach(model, ls.AntiPaSTOAblateConfig(r=R))
    part = adapter.layers()["0"]
    with torch.no_grad():
        part["strength"].fill_(1.7)
    out = part["U"] @ part["direction"]
    assert (model(torch.randn(20, D_IN)) @ out).abs().max() < 1e-5


def test_strengths_turn_back_from_zero() -> None:
    alpha = torch.tensor([-2.0, -0.3, 0.0, 0.3, 2.0], requires_grad=True)
    got = strengths(alpha)
    torch.testing.assert_close(got, torch.tensor([1.0, 0.3, 0.0, 0.3, 1.0]))
    got.sum().backward()
    assert alpha.grad is not None
    assert alpha.grad.tolist() == [0, -1, 1, 1, 0]


@pytest.mark.parametrize("block", [2, 3, 4, 5])
@pytest.mark.parametrize("max_angle", [0.5, 2.0])
def test_rotations_are_orthogonal_and_capped(block: int, max_angle: float) -> None:
    pairs = block * (block - 1) // 2
    for scale in (1e-3, 1.0, 100.0, 1e6):
        theta = scale * torch.randn(7 * pairs, dtype=torch.float64)
        one = torch.eye(block, dtype=torch.float64)
        rotations = turns(theta, 7, block, max_angle) + one
        torch.testing.assert_close(rotations @ rotations.mT, one.expand(7, -1, -1))
        torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(7, dtype=torch.float64))
        angles = torch.linalg.eigvals(rotations).angle().abs().max(dim=1).values
        assert (angles <= max_angle + 1e-9).all()
        if scale >= 100.0:
            # Most of what is allowed can be reached: all of it where λ stands alone.
            assert (angles > max_angle / 2).all()
    reached = turns(torch.tensor([1e6] + [0.0] * (pairs - 1)), 1, block, max_angle)
    cosine = reached[0, 0, 0] + 1
    assert abs(math.acos(float(cosine)) - max_angle) < 1e-3
    assert torch.equal(turns(torch.zeros(pairs), 1, block, max_angle), torch.zeros(1, block, block))


def test_rotated_weights_keep_their_singular_values() -> None:
    for rotate in ("V", "U", "both"):
        model = layer()
        adapter = ls.attach(model, ls.AntiPaSTORotConfig(rotate=rotate))
        randomise([p for n, p in adapter.named_parameters() if "rotation" in n], scale=2.0, seed=4)
        linear = model[0]
        assert isinstance(linear, nn.Linear)
        before = torch.linalg.svdvals(linear.weight.detach().double())
        ls.fuse(model)
        after = torch.linalg.svdvals(linear.weight.detach().double())
        torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-6)


def test_mixing_sends_one_direction_out_along_another() -> None:
    model = layer(bias=False)
    adapter = ls.attach(model, ls.AntiPaSTOArrowConfig(r=R, block=3))
    part = adapter.layers()["0"]
    with torch.no_grad():
        part["mixing"][2, 0] = 0.5
    linear = model[0]
    assert isinstance(linear, nn.Linear)
    x = part["V"][0]
    change = model(x) - x @ linear.weight.T
    torch.testing.assert_close(change, 0.5 * part["S"][0] * part["U"][:, 2], atol=1e-6, rtol=1e-5)


# -- the basis -----------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 3, 8])
def test_triplets_are_orthonormal_whatever_the_rank(rank: int) -> None:
    g = torch.Generator().manual_seed(rank)
    weight = torch.randn(8, rank, generator=g) @ torch.randn(rank, 11, generator=g)
    u, s, v = triplets(weight, 8)
    one = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, one, atol=1e-9, rtol=0)
    torch.testing.assert_close(v @ v.T, one, atol=1e-9, rtol=0)
    torch.testing.assert_close(u @ torch.diag(s) @ v, weight.double(), atol=1e-6, rtol=0)
    assert (s[:-1] >= s[1:] - 1e-9).all()


@pytest.mark.parametrize("least", [1e-3, 1e-4, 1e-5, 2e-6, 1e-7])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20)], ids=str)
def test_triplets_are_orthonormal_however_small_the_last_values(
    shape: tuple[int, int], least: float
) -> None:
    """Better than the float32 in which they are stored."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 12, dtype=torch.float64)).Q for n in shape)
    values = torch.logspace(0, math.log10(least), 12, dtype=torch.float64)
    u, s, v = triplets(left @ torch.diag(values) @ right.T, 12)
    one = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, one, atol=1e-8, rtol=0)
    torch.testing.assert_close(v @ v.T, one, atol=1e-8, rtol=0)
    torch.testing.assert_close(s, values, atol=0, rtol=1e-6)


def test_corda_projects_inputs_to_unit_covariance() -> None:
    model = layer()
    adapter = attach(model, ls.AntiPaSTOCorDAConfig(r=R))
    rows = torch.cat([b.reshape(-1, D_IN) for b in batches()])
    seen = rows @ adapter.layers()["0"]["V"].T
    covariance = seen.T @ seen / len(rows)
    # 1e-3 on the eigenvalues is felt by the weakest inputs alone.
    torch.testing.assert_close(covariance, torch.eye(R), atol=0.3, rtol=0)
    assert covariance.diagonal().max() <= 1 + 1e-4


# -- sizes ---------------------------------------------------------------------------------


def qwen3() -> nn.Module:
    """q and v of Qwen3-0.6B: 28 layers of width 1024, 16 heads and 8 key-value heads of 128."""
    with torch.device("meta"):
        return nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(1024, 2048), "v_proj": nn.Linear(1024, 1024)})
            for _ in range(28)
        )


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (ls.AntiPaSTOConfig(), 14_336),
        (ls.AntiPaSTOConfig(directions="active"), 14_336),
        (ls.AntiPaSTOCorDAConfig(), 14_336),
        (ls.AntiPaSTORotConfig(), 35_840),
        (ls.AntiPaSTORotConfig(rotate="U"), 35_840),
        (ls.AntiPaSTORotConfig(rotate="both"), 57_344),
        (ls.AntiPaSTOAblateConfig(), 14_392),
        (ls.AntiPaSTOArrowConfig(), 17_472),
    ],
    ids=lambda v: v.variant if hasattr(v, "variant") else str(v),
)
def test_parameter_counts_on_qwen3_shapes(config: Any, count: int) -> None:
    model = qwen3()
    adapter = attach(model, config, data=[])
    assert adapter.num_parameters() == count
    frozen = [t for part in adapter.layers().values() for t in part.buffers()]
    assert all(t.is_meta for t in frozen)
    assert sum(t.numel() for t in frozen) == 28 * 256 * (2048 + 1024 + 1 + 1024 + 1024 + 1)


@pytest.mark.parametrize("name", [n for n in sorted(ls.variants()) if n.startswith("antipasto")])
def test_r_is_capped_at_each_layer(name: str, tmp_path: Path) -> None:
    config = ls.config_from_dict({"variant": name})
    model, x = mlp(), torch.randn(3, 6)
    want = model(x)
    data = [torch.randn(4, 6)]
    adapter = attach(model, config, data)
    assert [part["S"].numel() for part in adapter.layers().values()] == [6, 5]
    torch.testing.assert_close(model(x), want)
    randomise(adapter.parameters())
    ls.save(model, tmp_path / "a")
    again = mlp()
    ls.load(again, tmp_path / "a")
    assert torch.equal(again(x), model(x))
    narrow = nn.Sequential(nn.Linear(3, 1))
    adapter = attach(narrow, config, [torch.randn(4, 3)])
    randomise(adapter.parameters())
    assert torch.isfinite(narrow(torch.randn(2, 3))).all()
    ls.fuse(narrow)
    ls.detach(narrow)


# -- what went wrong elsewhere -------------------------------------------------------------


@every_config
def test_save_detach_load_is_exact_and_needs_no_data(config: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(config, targets="attention")
    model = llama()
    tokens = {"input_ids": torch.arange(14).reshape(2, 7)}
    bare, weights = run(model, tokens), {k: v.clone() for k, v in model.state_dict().items()}
    wants = ls.variants()[config.variant].statistics(config)
    adapter = ls.attach(model, config, calibration=[tokens] if wants else None)
    torch.testing.assert_close(run(model, tokens), bare, atol=1e-5, rtol=0)
    randomise(adapter.parameters())
    want = run(model, tokens)
    assert (want - bare).abs().max() > 1e-3
    ls.save(model, tmp_path / "a")
    ls.detach(model)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(run(model, tokens), bare)
    loaded = ls.load(model, tmp_path / "a", trainable=True)
    assert torch.equal(run(model, tokens), want)
    assert loaded.config == config
    ls.detach(model)
    # As PEFT's files alone, too.
    (tmp_path / "a" / "lorasmith.json").unlink()
    loaded = ls.load(model, tmp_path / "a")
    assert torch.equal(run(model, tokens), want)
    assert dataclasses.replace(loaded.config, targets="attention") == config


def test_calibration_sees_the_undamaged_base() -> None:
    """Inputs of a late layer are those of the bare model, although all layers are adapted."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    data = [torch.randn(5, 8) for _ in range(3)]
    seen: list[Tensor] = []
    handle = model[3].register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    with torch.no_grad():
        for batch in data:
            model(batch)
    handle.remove()
    rows = torch.cat(seen).double()
    randomise(ls.attach(model, ls.LoRAConfig(r=2), name="other").parameters(), scale=2.0)
    adapter = ls.attach(model, ls.AntiPaSTOCorDAConfig(r=8), calibration=data)
    lam, q = torch.linalg.eigh(rows.T @ rows / len(rows))
    half = q @ torch.diag((lam + 1e-3).sqrt()) @ q.T
    last = model[3]
    assert isinstance(last, nn.Linear)
    want = torch.linalg.svdvals(last.weight.detach().double() @ half)
    torch.testing.assert_close(adapter.layers()["3"]["S"].double(), want, atol=1e-5, rtol=1e-4)


def test_calibration_is_asked_for_where_it_is_needed() -> None:
    for config in (ls.AntiPaSTOCorDAConfig(), ls.AntiPaSTOConfig(directions="active")):
        with pytest.raises(ConfigError, match="starts from data"):
            ls.attach(layer(), config)
    with pytest.raises(ConfigError, match="takes no calibration"):
        ls.attach(layer(), ls.AntiPaSTOConfig(), calibration=batches())


def test_what_is_saved_for_the_backward_pass_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasmith.core.lowrank.SMALL", 0)
    tokens, wide_in, wide_out, r = 64, 96, 80, 8
    for name in sorted(n for n in ls.variants() if n.startswith("antipasto")):
        config = ls.config_from_dict({"variant": name, "r": r})
        model = nn.Sequential(nn.Linear(wide_in, wide_out)).train()
        adapter = attach(model, config, [torch.randn(5, wide_in)])
        randomise(adapter.parameters())
        saved: list[Tensor] = []
        known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        keep = torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t) or t,  # type: ignore[func-returns-value]  # noqa: B023
            lambda t: t,
        )
        with keep:
            model(torch.randn(tokens, wide_in, requires_grad=True))
        kept = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in saved
            if t.untyped_storage().data_ptr() not in known
        }
        # x for the one that is a LoRA of rank 1, V x for the others.
        width = wide_in + 1 if name == "antipasto_ablate" else r + 2
        assert sum(kept.values()) <= 4 * tokens * width + 8192, name


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("antipasto", {"r": 0}),
        ("antipasto", {"r": 2.0}),
        ("antipasto", {"coeff": 0}),
        ("antipasto", {"coeff": math.nan}),
        ("antipasto", {"coeff": True}),
        ("antipasto", {"suppress_only": 1}),
        ("antipasto", {"directions": "largest"}),
        ("antipasto_rot", {"rotate": "none"}),
        ("antipasto_rot", {"block": 0}),
        ("antipasto_rot", {"max_angle": 3.2}),
        ("antipasto_ablate", {"coeff": -1.0}),
        ("antipasto_ablate", {"coeff": 2.1}),
        ("antipasto_ablate", {"k": 0}),
        ("antipasto_arrow", {"block": True}),
    ],
)
def test_impossible_configurations(name: str, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        ls.config_from_dict({"variant": name, **values})
    assert error.value.key == next(iter(values))


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan  # type: ignore[index]
    with pytest.raises(AttachError, match="2 is not finite"):
        ls.attach(model, ls.AntiPaSTOConfig())
    assert not ls.attached(model)


def test_corda_takes_the_covariance_of_one_input_apart_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lorasmith.adapters import antipasto_corda as module

    torch.manual_seed(0)
    covariance = torch.cov(torch.randn(12, 40))
    first = module._roots(covariance)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    assert module._roots(covariance) is first
    root, axes = first
    wanted = covariance.double() + 1e-3 * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close((axes * root.square()) @ axes.T, wanted, atol=1e-10, rtol=1e-9)
