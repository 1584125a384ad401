"""VeRA against its equation in float64 and against PEFT 0.21.2, there and back."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.core import lowrank
from lorasmith.core.state import SharedTensors
from lorasmith.errors import AdapterFileError, ConfigError
from tests.models import FAMILIES, llama, mlp, randomise, run

_LLAMA = ["q_proj", "v_proj", "down_proj"]
_GPT2 = ["c_attn", "c_fc", "c_proj"]
_CASES = {"llama": ("llama", _LLAMA), "gpt2": ("gpt2", _GPT2)}


def dense(base: nn.Module, adapter: ls.Adapter) -> nn.Module:
    """The same model with W + Λ_b B Λ_d A in float64, by the paper's equation 2."""
    model = copy.deepcopy(base).double()
    ls.detach(model)
    state = {n: t.double() for n, t in adapter.state_dict().items()}
    A, B = state["shared.A"], state["shared.B"]
    for name in adapter.targets:
        layer: Any = model.get_submodule(name)
        b, d = torch.diag(state[f"{name}.lambda_b"]), torch.diag(state[f"{name}.lambda_d"])
        with torch.no_grad():
            conv = type(layer).__name__ == "Conv1D"
            d_out, d_in = layer.weight.T.shape if conv else layer.weight.shape
            delta = b @ B[:d_out] @ d @ A[:, :d_in]
            layer.weight += delta.T if conv else delta
    return model


@pytest.mark.parametrize("small", [0, 10**9], ids=["fast", "plain"])
@pytest.mark.parametrize("case", _CASES)
def test_the_equation_in_float64(case: str, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", small)
    family, targets = _CASES[case]
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch()
    adapter = ls.attach(model, ls.VeRAConfig(r=9, targets=targets))
    randomise(adapter.parameters())
    wanted = run(dense(model, adapter), batch).float()
    torch.testing.assert_close(run(model, batch), wanted, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(run(model, batch), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("small", [0, 10**9], ids=["fast", "plain"])
def test_gradients_in_float64(small: int, through: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", small)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8)).double()
    W, c = model[0].weight.detach(), model[0].bias.detach()  # type: ignore[union-attr, operator]
    adapter = ls.attach(model, ls.VeRAConfig(r=3))
    randomise(adapter.parameters())
    part = adapter.layers()["0"]
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=through)
    g = torch.randn(5, 8, dtype=torch.float64)
    (model(x) * g).sum().backward()
    b, d = (part[n].detach().double().requires_grad_() for n in ("lambda_b", "lambda_d"))
    A, B = part["A"].double(), part["B"].double()
    z = x.detach().requires_grad_()
    y = z @ (W + torch.diag(b) @ B @ torch.diag(d) @ A).T + c
    (y * g).sum().backward()
    for mine, want in ((part["lambda_b"].grad, b.grad), (part["lambda_d"].grad, d.grad)):
        assert mine is not None
        assert want is not None
        torch.testing.assert_close(mine.double(), want, atol=1e-6, rtol=1e-5)
    if through:
        torch.testing.assert_close(x.grad, z.grad, atol=1e-6, rtol=1e-5)


def test_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", 0)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    adapter = ls.attach(model, ls.VeRAConfig(r=2))
    randomise(adapter.parameters())
    part = adapter.layers()["0"]
    found = []
    x = torch.randn(5, 4, dtype=torch.float64)
    for own in (True, False):
        z = x.clone().requires_grad_()
        b, d = part["lambda_b"], part["lambda_d"]
        if own:
            y = model(z)
        else:
            W, c = model[0].weight, model[0].bias  # type: ignore[union-attr]
            delta = torch.diag(b) @ part["B"] @ torch.diag(d) @ part["A"]
            y = z @ (W + delta.double()).T + c  # type: ignore[operator]
        grads = torch.autograd.grad(y.pow(3).sum(), (b, d, z), create_graph=True)
        total = sum(g.double().pow(2).sum() for g in grads)
        found.append(torch.autograd.grad(total, (b, d, z)))  # type: ignore[arg-type]
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


def test_neighbours_share_one_product_with_a(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", 0)
    calls: list[int] = []
    original = lowrank._Down.forward

    def counting(ctx: Any, x: Tensor, dropout: float, *more: Any) -> Any:
        calls.append(sum(0 if t is None else t.shape[0] for t in more[2:]))
        return original(ctx, x, dropout, *more)

    results = []
    for shared in (True, False):
        model, batch = llama(layers=1), FAMILIES["llama"].batch()
        adapter = ls.attach(model, ls.VeRAConfig(r=5, targets=("q_proj", "k_proj", "v_proj")))
        randomise(adapter.parameters())
        if not shared:
            for part in adapter.layers().values():
                part.siblings = None
        monkeypatch.setattr(lowrank._Down, "forward", staticmethod(counting))
        calls.clear()
        y = run(model, batch)
        assert calls == ([5] if shared else [5, 5, 5])
        y.pow(2).sum().backward()
        results.append([y.detach(), *(p.grad for p in adapter.parameters())])
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def test_x_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", 0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
    ls.attach(model, ls.VeRAConfig(r=3))
    tokens, kept = 11, []

    def pack(t: Tensor) -> Tensor:
        kept.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(torch.randn(tokens, 6))
    assert {s for s in kept if tokens in s} == {(tokens, 3)}


# -- shared tensors ----------------------------------------------------------------------


def _shared(model: nn.Module) -> list[SharedTensors]:
    return [m for m in model.modules() if isinstance(m, SharedTensors)]


def test_they_are_there_once_whatever_happens(tmp_path: Path) -> None:
    model, batch = llama(), FAMILIES["llama"].batch()
    adapter = ls.attach(model, ls.VeRAConfig(r=5))
    randomise(adapter.parameters())
    expected = run(model, batch)
    ls.save(model, tmp_path / "a")
    loaded = llama()
    ls.load(loaded, tmp_path / "a")
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):  # noqa: S301
        (shared,) = _shared(each)
        parts = ls.attached(each)["default"].layers().values()
        assert {id(part["A"]) for part in parts} == {id(shared["A"])}
        assert tuple(shared["A"].shape) == (5, 24)
        assert tuple(shared["B"].shape) == (24, 5)
        assert sum("shared_default" in n for n in each.state_dict()) == 2
        torch.testing.assert_close(run(each, batch), expected, atol=0, rtol=0)
        each.to(torch.bfloat16).to(torch.float32)
        assert shared["A"].dtype == torch.float32
        assert {id(part["A"]) for part in parts} == {id(shared["A"])}
        ls.detach(each)
        assert not _shared(each)
    ls.attach(model, ls.VeRAConfig(r=5), name="one")
    ls.attach(model, ls.VeRAConfig(r=6), name="two")
    assert len(_shared(model)) == 2
    ls.detach(model, "one")
    (left,) = _shared(model)
    assert left["A"].shape[0] == 6
    run(model, batch)
    ls.detach(model)
    gc.collect()
    assert not _shared(model)


def test_state_dict_holds_them(tmp_path: Path) -> None:
    model, batch = llama(), FAMILIES["llama"].batch()
    adapter = ls.attach(model, ls.VeRAConfig(r=5, projection_prng_key=1))
    randomise(adapter.parameters())
    other = llama()
    twin = ls.attach(other, ls.VeRAConfig(r=5))
    assert not torch.equal(adapter.state_dict()["shared.A"], twin.state_dict()["shared.A"])
    twin.load_state_dict(adapter.state_dict())
    assert torch.equal(run(other, batch), run(model, batch))
    # Its files would draw other numbers than these.
    third = llama()
    odd = ls.attach(third, ls.VeRAConfig(r=5, save_projection=False))
    odd.load_state_dict(adapter.state_dict())
    with pytest.raises(AdapterFileError, match="could not be made again"):
        ls.save(third, tmp_path / "a")


# -- files -------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "drawn"])
def test_files_without_a_model(saved: bool, tmp_path: Path) -> None:
    model = llama()
    adapter = ls.attach(model, ls.VeRAConfig(r=5, save_projection=saved, projection_prng_key=3))
    randomise(adapter.parameters())
    folder = ls.save(model, tmp_path / "a")
    weights = ls.read_adapter(folder)
    assert ("base_model.vera_A" in weights.tensors) is saved
    assert len(weights.factors) == len(weights.modules) == 14
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    ls.fuse(model)
    for name, factors in weights.factors.items():
        fused = model.get_submodule(name).weight.detach() - base[f"{name}.weight"]
        torch.testing.assert_close(factors.delta(), fused, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(weights.delta(name), fused, atol=1e-5, rtol=1e-4)
    assert len({id(weights.state(m)["A"]) for m in weights.modules}) == 1
    # PEFT's files alone do not tell d_in: there the base weight must.
    (folder / "lorasmith.json").unlink()
    foreign = ls.read_adapter(folder)
    assert len(foreign.factors) == 0
    name = "model.layers.1.mlp.down_proj"
    if saved:
        got = foreign.delta(name, base[f"{name}.weight"])
        torch.testing.assert_close(got, weights.delta(name), atol=1e-6, rtol=1e-5)
    else:
        with pytest.raises(AdapterFileError, match="does not hold what the layers share"):
            foreign.state(name)


def test_what_is_wrong_with_shared_tensors_is_seen(tmp_path: Path) -> None:
    from tests.io.support import edit_tensors, foreign, snapshot

    model = llama()
    ls.attach(model, ls.VeRAConfig(r=5))
    ls.detach(model)
    unchanged = snapshot(model)

    def fresh(config: ls.VeRAConfig) -> Path:
        other = llama()
        ls.attach(other, config)
        return foreign(ls.save(other, tmp_path / "a"))

    def wider(values: dict[str, Tensor]) -> None:
        values["base_model.vera_A"] = torch.zeros(5, 30)

    for change, wrong in (
        (lambda v: v.pop("base_model.vera_B"), "missing"),
        (lambda v: v.update({"base_model.vera_A": torch.zeros(5, 23)}), "another shape"),
        (wider, "another shape"),
        (lambda v: v.update({"base_model.vera_A": torch.zeros(4, 24)}), "another shape"),
        (lambda v: v["base_model.vera_A"].fill_(float("inf")), "not finite"),
        (lambda v: v.update({"base_model.vera_C": torch.zeros(1)}), "does not use"),
    ):
        folder = fresh(ls.VeRAConfig(r=5))
        edit_tensors(folder / "adapter_model.safetensors", change)
        with pytest.raises(AdapterFileError, match=wrong) as caught:
            ls.load(model, folder)
        assert caught.value.key is not None
        assert caught.value.key.startswith("base_model.vera_")
        unchanged()
    # A configuration that says they are not there, of a file that holds them.
    folder = fresh(ls.VeRAConfig(r=5))
    fields = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**fields, "save_projection": False}))
    with pytest.raises(AdapterFileError, match="does not use"):
        ls.load(model, folder)
    unchanged()


def test_configuration() -> None:
    for wrong in (
        {"r": 0},
        {"r": 2.0},
        {"d_initial": 0},
        {"d_initial": float("nan")},
        {"dropout": 1.0},
        {"projection_prng_key": -1},
        {"projection_prng_key": True},
        {"save_projection": 1},
    ):
        with pytest.raises(ConfigError) as caught:
            ls.VeRAConfig(**wrong)  # type: ignore[arg-type]
        assert caught.value.key == next(iter(wrong))


def test_parameters_of_qwen3() -> None:
    """Σ (d_out + r) of all linear layers of Qwen3-0.6B: 28 blocks."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=151936,
                hidden_size=1024,
                intermediate_size=3072,
                num_hidden_layers=28,
                num_attention_heads=16,
                num_key_value_heads=8,
                head_dim=128,
            )
        )
    adapter = ls.attach(model, ls.VeRAConfig())
    outputs = 2048 + 1024 + 1024 + 1024 + 3072 + 3072 + 1024
    assert adapter.num_parameters() == 28 * (outputs + 7 * 256) == 394_240
    shared = adapter.state_dict()
    assert tuple(shared["shared.A"].shape) == (256, 3072)
    assert tuple(shared["shared.B"].shape) == (3072, 256)


# -- PEFT --------------------------------------------------------------------------------


def _theirs(base: nn.Module, targets: list[str], **more: Any) -> Any:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.VeraConfig(r=6, target_modules=targets, **more)
        return peft.get_peft_model(copy.deepcopy(base), config).eval()


@pytest.mark.parametrize("key", [0, 17])
@pytest.mark.parametrize("case", _CASES)
def test_peft_draws_the_same_numbers(case: str, key: int) -> None:
    family, targets = _CASES[case]
    base = FAMILIES[family].build()
    theirs = _theirs(base, targets, projection_prng_key=key)
    values = ls.attach(base, ls.VeRAConfig(r=6, targets=targets, projection_prng_key=key))
    mine = values.state_dict()
    assert torch.equal(mine["shared.A"], theirs.base_model.vera_A["default"])
    assert torch.equal(mine["shared.B"], theirs.base_model.vera_B["default"])


@pytest.mark.parametrize("small", [0, 10**9], ids=["fast", "plain"])
@pytest.mark.parametrize("case", _CASES)
def test_logits_and_gradients_are_those_of_peft(
    case: str, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowrank, "SMALL", small)
    family, targets = _CASES[case]
    base, batch = FAMILIES[family].build(), FAMILIES[family].batch()
    theirs = _theirs(base, targets)
    adapter = ls.attach(base, ls.VeRAConfig(r=6, targets=targets))
    parts = adapter.layers()
    their_parts = {
        (m.removeprefix("base_model.model."), n): getattr(layer, f"vera_{n}")["default"]
        for m, layer in theirs.named_modules()
        if hasattr(layer, "vera_lambda_b")
        for n in ("lambda_b", "lambda_d")
    }
    assert {m for m, _ in their_parts} == set(parts)
    randomise(their_parts.values())
    with torch.no_grad():
        for (module, name), value in their_parts.items():
            parts[module][name].copy_(value)
    wanted, got = run(theirs, batch), run(base, batch)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    weights = torch.randn(wanted.shape)
    (wanted * weights).sum().backward()
    (got * weights).sum().backward()
    for (module, name), value in their_parts.items():
        mine = parts[module][name].grad
        assert mine is not None
        assert float((mine - value.grad).abs().max()) < 1e-4 * float(value.grad.abs().max() + 1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("saved", [True, False], ids=["saved", "drawn"])
@pytest.mark.parametrize("case", _CASES)
def test_files_go_both_ways(case: str, saved: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    family, targets = _CASES[case]
    base, batch = FAMILIES[family].build(), FAMILIES[family].batch()
    theirs = _theirs(base, targets, save_projection=saved, projection_prng_key=5, d_initial=0.3)
    randomise(p for n, p in theirs.named_parameters() if "vera_lambda" in n)
    wanted = run(theirs, batch).detach()
    theirs.save_pretrained(tmp_path / "theirs")
    model = copy.deepcopy(base)
    adapter = ls.load(model, tmp_path / "theirs")
    assert adapter.config == ls.VeRAConfig(
        r=6,
        targets=tuple(sorted(targets)),
        save_projection=saved,
        projection_prng_key=5,
        d_initial=0.3,
    )
    torch.testing.assert_close(run(model, batch).detach(), wanted, atol=1e-5, rtol=1e-5)
    ls.save(model, tmp_path / "ours")
    mine, other = (
        load_file(tmp_path / whose / "adapter_model.safetensors") for whose in ("ours", "theirs")
    )
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[k], other[k]) for k in mine)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(run(back, batch).detach(), wanted, atol=1e-5, rtol=1e-5)


def test_a_small_model_learns() -> None:
    torch.manual_seed(0)
    model, teacher = mlp(), mlp()
    with torch.no_grad():
        teacher[2].weight[0] += 1.0  # type: ignore[union-attr, operator, index]
    adapter = ls.attach(model, ls.VeRAConfig(r=16))
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.05)
    x = torch.randn(64, 6)
    losses = []
    for _ in range(200):
        loss = (model(x) - teacher(x)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_what_is_kept_in_16_bits_follows_the_shared_matrices() -> None:
    model = mlp().to(torch.bfloat16)
    adapter = ls.attach(model, ls.VeRAConfig(r=4))
    randomise(adapter.parameters())
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    with torch.inference_mode():
        first = model(x)
    shared = next(iter(adapter.layers().values())).shared
    assert shared is not None
    kept = {key[0]: cast for key, (_, _, cast) in shared._casts.items()}
    assert {n: t.dtype for n, t in kept.items()} == dict.fromkeys("AB", torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model(x), first)
        assert all(shared._casts[k][2] is kept[k[0]] for k in shared._casts)
        twin = copy.deepcopy(model)
        adapter.load_state_dict(
            {n: t * 2 if n == "shared.A" else t for n, t in adapter.state_dict().items()}
        )
        assert not torch.equal(model(x), first)
        assert torch.equal(twin(x), first)
    x.requires_grad_(True)
    model(x).sum().backward()  # what inference has kept serves training
    assert x.grad is not None
