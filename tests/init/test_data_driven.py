"""Initialisations against the formulas of their papers in float64, and against PEFT 0.21.2."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.core.layers import describe, read_weight
from lorasmith.errors import AttachError, ConfigError
from lorasmith.init import INITIALISATIONS, get_initialisation
from lorasmith.init.loftq import alternate, nf4
from lorasmith.init.types import Shape
from tests.init.test_calibration import inputs_of
from tests.models import gpt2, llama, randomise, run

R, ALPHA = 3, 6.0
S = ALPHA / R
MOVES = ("pissa", "olora", "corda", "lora_ga", "loftq")


def data(model: nn.Module | None = None, rows: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 32, (rows, 11), generator=generator)
    return [{"input_ids": ids[:3], "labels": ids[:3]}, {"input_ids": ids[3:], "labels": ids[3:]}]


def attach(model: nn.Module, init: str, variant: str = "lora", **fields: Any) -> ls.Adapter:
    kind = {"lora": ls.LoRAConfig, "dora": ls.DoRAConfig}[variant]
    config = kind(**{"r": R, "alpha": ALPHA, "init": init, **fields})
    needs = ls.variants()[variant].statistics(config)
    return ls.attach(model, config, calibration=data() if needs else None)


def weights(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, module in model.named_modules():
        info = describe(module, name)
        if info is not None:
            found[name] = read_weight(module, info).double().clone()
    return found


def gradients(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    reference = copy.deepcopy(model).double().requires_grad_(True)
    for batch in batches:
        (reference(**batch).loss / len(batches)).backward()
    found = {}
    for name, module in reference.named_modules():
        info = describe(module, name)
        if info is not None and module.weight.grad is not None:
            found[name] = module.weight.grad.T if info.kind == "conv1d" else module.weight.grad
    return found


def up_to_sign(got: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    """Rows agree, or their negatives do."""
    got, wanted = got.double(), wanted.double()
    sign = (got * wanted).sum(dim=1, keepdim=True).sign()
    scale = float(wanted.abs().max())
    torch.testing.assert_close(got * sign, wanted, atol=tolerance * scale, rtol=0)


def test_orthogonal_starts_with_a_zero_product_and_nonzero_factors() -> None:
    shape = Shape(200, 300, torch.device("cpu"))
    for rank in (1, 2, 7, 16):
        torch.manual_seed(0)
        start = get_initialisation("orthogonal")(lambda: torch.empty(0), shape, rank, 2.0)
        assert (start.A.shape, start.B.shape) == ((rank, 300), (200, rank))
        assert float((start.B @ start.A).abs().max()) < 1e-6
        assert rank == 1 or float(start.B.std()) > 0.03
        # The half of an orthonormal basis, times N(0, 1) / 10.
        expected = 0.1 * (((rank + 1) // 2) / rank) ** 0.5
        assert float(start.A.std()) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_olora(build: Any) -> None:
    model = build()
    base = weights(model)
    for name, part in attach(model, "olora").layers().items():
        q, r = torch.linalg.qr(base[name])
        up_to_sign(part["A0"], r[:R])
        up_to_sign(part["B0"].T, q[:, :R].T)
        product = part["B0"].double() @ part["A0"].double()
        torch.testing.assert_close(product, q[:, :R] @ r[:R], atol=1e-6, rtol=0)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("whiten", [True, False])
def test_eva(centered: bool, whiten: bool) -> None:
    model = llama()
    inputs = inputs_of(model, data())
    options = {"rho": 1, "centered": centered, "whiten": whiten}
    for name, part in attach(model, "eva", init_options=options).layers().items():
        x = inputs[name] - inputs[name].mean(dim=0) if centered else inputs[name]
        _, sigma, vt = torch.linalg.svd(x, full_matrices=False)
        wanted = vt[:R] / sigma[:R, None].sqrt() if whiten else vt[:R]
        up_to_sign(part["A"], wanted, 1e-3)
        assert not part["B"].any()
        assert "A0" not in part


def test_ranks_of_eva_follow_the_variance() -> None:
    model = llama()
    inputs = inputs_of(model, data())
    adapter = attach(model, "eva", init_options={"rho": 2.0})
    shares = {}
    for name, x in inputs.items():
        sigma = torch.linalg.svdvals(x - x.mean(dim=0)).square()
        shares[name] = (sigma / sigma.sum())[: 2 * R].tolist()
    ranked = sorted(((v, n) for n, vs in shares.items() for v in vs[1:]), reverse=True)
    wanted = dict.fromkeys(shares, 1)
    for _, name in ranked[: (R - 1) * len(shares)]:
        wanted[name] += 1
    got = {name: part["A"].shape[0] for name, part in adapter.layers().items()}
    assert got == wanted
    assert len(set(got.values())) > 1, "all ranks are the same: the test is void"
    assert sum(got.values()) == R * len(got)
    assert all(part.constants["scaling"] == S for part in adapter.layers().values())
    assert adapter.config.rank_of(adapter.targets[0]) == got[adapter.targets[0]]
    fixed = attach(llama(), "eva", init_options={"rho": 2.0, "adjust_scaling": False})
    for name, part in fixed.layers().items():
        assert part.constants["scaling"] == pytest.approx(ALPHA / got[name])


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_corda(build: Any, mode: str) -> None:
    model = build()
    base, inputs = weights(model), inputs_of(model, data())
    adapter = attach(model, "corda", init_options={"mode": mode})
    for name, part in adapter.layers().items():
        c = inputs[name].T @ inputs[name] / len(inputs[name])
        c = c / c.diagonal().mean() + 0.01 * torch.eye(len(c))
        u, sigma, vt = torch.linalg.svd(base[name] @ c, full_matrices=False)
        chosen = slice(0, R) if mode == "ipm" else slice(len(sigma) - R, None)
        v = vt[chosen] @ torch.linalg.inv(c)
        wanted = u[:, chosen] * sigma[chosen] @ v
        got = S * part["B0"].double() @ part["A0"].double()
        torch.testing.assert_close(got, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)
        up_to_sign(part["B0"].T, (u[:, chosen] * (sigma[chosen] / S).sqrt()).T, 1e-3)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga(direction: str, scale: str) -> None:
    model = llama()
    base, grads = weights(model), gradients(model, data())
    options = {"direction": direction, "scale": scale, "stable_gamma": 9}
    torch.manual_seed(0)
    adapter = attach(model, "lora_ga", init_options=options)
    for name, part in adapter.layers().items():
        u, _, vt = torch.linalg.svd(grads[name])
        factor = {
            "stable": len(u) ** 0.25 / 3,
            "weight_svd": float((torch.linalg.svdvals(base[name])[:R] / S).sqrt().mean()),
            "gd_scale": 1 / S,
            "unit": 1.0,
        }[scale]
        if direction == "random":
            inner = part["A0"].double() @ vt[: 2 * R].T / factor  # which of the first 2 r
            chosen = inner.abs().argmax(dim=1)
            inner = part["B0"].double().T @ u[:, : 2 * R] / factor
            for_a, for_b = chosen, inner.abs().argmax(dim=1)
            # As in the authors' code: no direction of the gradient is taken twice.
            assert sorted([*for_a.tolist(), *for_b.tolist()]) == list(range(2 * R))
        else:
            for_a, for_b = {
                "ArB2r": (range(R), range(R, 2 * R)),
                "A2rBr": (range(R, 2 * R), range(R)),
                "ArBr": (range(1, 2 * R, 2), range(0, 2 * R, 2)),
            }[direction]
            for_a, for_b = torch.tensor(list(for_a)), torch.tensor(list(for_b))
        up_to_sign(part["A0"], vt[for_a] * factor, 2e-3)
        up_to_sign(part["B0"].T, u[:, for_b].T * factor, 2e-3)


def test_the_first_step_of_lora_ga_goes_where_full_fine_tuning_goes() -> None:
    """What the paper is about: ΔW after a step of SGD points along −∂loss/∂W."""
    angles = {}
    for init in ("kaiming", "lora_ga"):
        model = llama()
        grads = gradients(model, data())
        adapter = attach(model, init)
        before = {n: p.variant.factors(p).delta(torch.float64) for n, p in adapter.layers().items()}
        for batch in data():
            (model(**batch).loss / 2).backward()
        with torch.no_grad():
            for parameter in adapter.parameters():
                assert parameter.grad is not None
                parameter.sub_(1e-3 * parameter.grad)
        cosines = []
        for name, part in adapter.layers().items():
            moved = part.variant.factors(part).delta(torch.float64) - before[name]
            cosines.append(float(-(moved * grads[name]).sum() / moved.norm() / grads[name].norm()))
        angles[init] = sum(cosines) / len(cosines)
    assert angles["lora_ga"] > 0.75 > angles["kaiming"]


def test_sketched_gradients_come_close() -> None:
    whole = attach(llama(), "lora_ga", init_options={"direction": "A2rBr"})
    sketched = attach(llama(), "lora_ga", init_options={"direction": "A2rBr", "sketch": True})
    for name, part in sketched.layers().items():
        strongest = part["B0"][:, 0], whole.layers()[name]["B0"][:, 0]
        assert float(torch.cosine_similarity(*strongest, dim=0).abs()) > 0.98, name


def test_nf4_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    for shape in ((64, 128), (7, 64), (5, 33)):
        w = torch.randn(*shape)
        packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
        wanted = functional.dequantize_4bit(packed, state).view(shape)
        got = nf4(w)
        # A value halfway between two levels may go either way.
        assert float((got - wanted).abs().gt(1e-5).double().mean()) < 1e-3


def test_loftq_in_full_precision_takes_over_the_best_correction() -> None:
    model = llama()
    base = weights(model)
    for name, part in attach(model, "loftq").layers().items():
        error = base[name] - nf4(base[name]).double()
        u, sigma, vt = torch.linalg.svd(error, full_matrices=False)
        got = S * part["B0"].double() @ part["A0"].double()
        torch.testing.assert_close(got, u[:, :R] * sigma[:R] @ vt[:R], atol=1e-5, rtol=0)


def test_alternating_brings_the_error_down() -> None:
    torch.manual_seed(0)
    w = torch.randn(64, 64)
    errors = []
    for iterations in (1, 2, 5):
        q, left, right = alternate(w, 16, iterations)
        assert torch.equal(q, nf4(q)), "Q is not a quantised matrix"
        errors.append(float((w - q - left @ right).norm()))
    assert errors[2] < errors[1] < errors[0] < float((w - nf4(w)).norm())


def quantised(model: nn.Module) -> nn.Module:
    """All linear layers but the head in 4 bits of bitsandbytes, on CPU."""
    bnb = pytest.importorskip("bitsandbytes")
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name == "lm_head":
            continue
        made = bnb.nn.Linear4bit(
            module.in_features, module.out_features, bias=False, quant_type="nf4"
        )
        made.weight = bnb.nn.Params4bit(
            module.weight.data.clone(), quant_type="nf4", compress_statistics=False
        )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made.to("cpu"))
    return model.eval()


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_loftq_on_a_quantised_model(tmp_path: Path, variant: str) -> None:
    from safetensors.torch import save_file

    original = llama(hidden_size=64, intermediate_size=128)
    batch = data()[0]
    want = run(original, batch).detach()
    model = quantised(copy.deepcopy(original))
    plain = float((run(model, batch).detach() - want).norm())
    kind = {"lora": ls.LoRAConfig, "dora": ls.DoRAConfig}[variant]
    config = kind(r=24, alpha=12, init="loftq")
    tensors = {k: v.clone() for k, v in original.state_dict().items() if k != "lm_head.weight"}
    save_file(tensors, tmp_path / "model.safetensors")
    # Without the prefix of the base model, as some checkpoints are.
    short = {k.removeprefix("model."): v for k, v in tensors.items()}
    with pytest.raises(ConfigError, match="original weights"):
        ls.attach(model, config)
    with pytest.raises(AttachError, match="not that"):
        ls.attach(model, config, originals=llama(seed=3, hidden_size=64, intermediate_size=128))
    with pytest.raises(AttachError, match="no original weights at that place"):
        ls.attach(model, config, originals=tmp_path / "elsewhere")
    results = []
    for source in (tmp_path, str(tmp_path / "model.safetensors"), original, short):
        adapter = ls.attach(model, config, originals=source)
        results.append(run(model, batch).detach())
        assert set(next(iter(adapter.layers().values())).state_dict()) >= {"A", "B"}
        for name, part in adapter.layers().items():
            assert "A0" not in part
            w = original.get_submodule(name).weight.double()
            error = w - nf4(w).double()
            u, sigma, vt = torch.linalg.svd(error, full_matrices=False)
            got = 0.5 * part["B"].double() @ part["A"].double()
            torch.testing.assert_close(got, u[:, :24] * sigma[:24] @ vt[:24], atol=1e-4, rtol=0)
        ls.detach(model)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    assert float((results[0] - want).norm()) < 0.6 * plain


def test_originals_that_nothing_needs_are_refused() -> None:
    model = llama()
    with pytest.raises(ConfigError, match="nothing needs them"):
        ls.attach(model, ls.LoRAConfig(r=2, init="loftq"), originals=llama())
    with pytest.raises(ConfigError, match="takes no original weights"):
        ls.attach(model, ls.LoRAConfig(r=2), originals=llama())


@pytest.mark.parametrize("init", ["lora_ga", "eva"])
def test_data_driven_starts_on_a_quantised_model(init: str) -> None:
    """Neither needs W, so both work as they are; W is not dequantised for them."""
    model = quantised(llama(hidden_size=64, intermediate_size=128))
    batch = data()[0]
    before = run(model, batch)
    adapter = attach(model, init)
    torch.testing.assert_close(run(model, batch), before, atol=1e-4, rtol=0)
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())


# -- options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("init", "options", "match"),
    [
        ("eva", {"rho": 0.5}, "rho"),
        ("eva", {"whiten": 1}, "whiten"),
        ("eva", {"tau": 0.9}, "no option 'tau'"),
        ("corda", {"mode": "both"}, "mode"),
        ("lora_ga", {"direction": "up"}, "direction"),
        ("lora_ga", {"stable_gamma": 0}, "stable_gamma"),
        ("loftq", {"iterations": 0}, "iterations"),
        ("pissa", {"iterations": 1.5}, "iterations"),
        ("pissa_niter_4", {"iterations": 3}, "in the name already"),
        ("kaiming", {"a": 5}, "no option 'a'"),
        ("eva", ["rho"], "not a mapping"),
    ],
)
def test_options_are_checked(init: str, options: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ls.LoRAConfig(init=init, init_options=options)


def test_options_survive_as_a_dictionary() -> None:
    config = ls.LoRAConfig(r=2, init="corda", init_options={"mode": "kpm"}, train_A=False)
    again = ls.config_from_dict(config.to_dict())
    assert again == config
    assert again.initialisation == get_initialisation("corda", {"mode": "kpm"})
    assert hash(again) == hash(config)


@pytest.mark.parametrize("init", ["olora", "eva", "corda", "lora_ga", "loftq"])
def test_too_large_a_rank_is_refused_before_the_model_is_touched(init: str) -> None:
    model = llama()
    keys = list(model.state_dict())
    with pytest.raises(ConfigError, match="there are fewer") as caught:
        attach(model, init, r=25)  # the largest layer has 24 inputs
    assert ("more calibration data" in str(caught.value)) == (init == "eva")
    assert list(model.state_dict()) == keys


def test_a_users_own_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorasmith.init import Initialisation, Start

    @dataclasses.dataclass(frozen=True)
    class Ones(Initialisation):
        name = "ones"
        value: float = 1.0

        def __call__(
            self, weight: Any, shape: Shape, rank: int, scaling: float, statistics: Any = ()
        ) -> Start:
            return Start(torch.full((rank, shape.d_in), self.value), torch.zeros(shape.d_out, rank))

    monkeypatch.setitem(INITIALISATIONS, "ones", Ones)
    adapter = ls.attach(llama(), ls.LoRAConfig(init="ones", init_options={"value": 2.0}))
    assert all(bool((part["A"] == 2).all()) for part in adapter.layers().values())


# -- LoRA-FA --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_frozen_a(variant: str, init: str, tmp_path: Path) -> None:
    """The gradient of B is that of LoRA, A stays, and the file is the same."""
    torch.manual_seed(0)
    model = llama()
    adapter = attach(model, init, variant, train_A=False)
    twin = llama()
    other = attach(twin, init, variant)
    values = adapter.state_dict()
    other.load_state_dict(values)
    assert not [n for n, _ in adapter.named_parameters() if n.endswith(".A")]
    randomise(adapter.parameters())
    other.load_state_dict(adapter.state_dict())
    batch = data()[0]
    for each in (model, twin):
        each(**batch).loss.backward()
    theirs = dict(other.named_parameters())
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad)
    want = run(model, batch).detach()
    ls.save(model, tmp_path / "a")
    again = llama()
    loaded = ls.load(again, tmp_path / "a", trainable=True)
    assert loaded.config == adapter.config
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in adapter.named_parameters()]
    assert torch.equal(run(again, batch), want)


def test_frozen_a_keeps_no_input_for_the_backward_pass() -> None:
    saved: dict[bool, int] = {}
    for train in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
        ls.attach(model, ls.LoRAConfig(r=2, train_A=train))
        x = torch.randn(1024, 512)
        seen: dict[int, int] = {}

        def pack(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(x).sum().backward()
        saved[train] = sum(n for n in seen.values() if n >= x.numel())
    assert saved[False] == 0
    assert saved[True] == 2 * 1024 * 512


# -- PEFT ------------------------------------------------------------------------------------

peft = pytest.importorskip("peft")

_TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
quiet = pytest.mark.filterwarnings("ignore")


def theirs(init: str, **fields: Any) -> Any:
    return peft.LoraConfig(
        r=R, lora_alpha=ALPHA, init_lora_weights=init, target_modules=_TARGETS, **fields
    )


def layers_of(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name.removeprefix("base_model.model."): (
            module.lora_A["default"].weight.detach(),
            module.lora_B["default"].weight.detach(),
        )
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


@quiet
def test_olora_is_pefts() -> None:
    reference = layers_of(peft.get_peft_model(llama(), theirs("olora")))
    for name, part in attach(llama(), "olora", targets=_TARGETS).layers().items():
        up_to_sign(part["A0"], reference[name][0])
        up_to_sign(part["B0"].T, reference[name][1].T)


@quiet
@pytest.mark.parametrize("rho", [1.0, 1.5])
def test_eva_is_pefts(rho: float) -> None:
    batch = {"input_ids": torch.cat([b["input_ids"] for b in data()])}
    model = peft.get_peft_model(llama(), theirs("eva", eva_config=peft.EvaConfig(rho=rho)))
    peft.initialize_lora_eva_weights(model, [batch], show_progress_bar=False)
    reference = layers_of(model)
    config = ls.LoRAConfig(
        r=R, alpha=ALPHA, init="eva", targets=_TARGETS, init_options={"rho": rho}
    )
    adapter = ls.attach(llama(), config, calibration=[batch])
    assert set(adapter.layers()) == set(reference)
    for name, part in adapter.layers().items():
        assert part["A"].shape == reference[name][0].shape, name
        # Theirs is a randomised SVD, cut to the rank between passes over the data.
        alike = torch.cosine_similarity(part["A"].detach(), reference[name][0]).abs()
        assert float(alike.min()) > (0.99 if rho == 1 else 0.999), name


@quiet
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_is_pefts_but_for_the_balance(mode: str) -> None:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    ids = data()[0]["input_ids"].reshape(1, -1)[:, :30]
    model = llama()
    config = theirs("corda", corda_config=CordaConfig(corda_method=mode))
    preprocess_corda(model, config, run_model=lambda: model(input_ids=ids))
    reference = layers_of(peft.get_peft_model(model, config))
    mine = ls.LoRAConfig(
        r=R, alpha=ALPHA, init="corda", targets=_TARGETS, init_options={"mode": mode}
    )
    adapter = ls.attach(llama(), mine, calibration=[{"input_ids": ids}])
    for name, part in adapter.layers().items():
        a, b = (t.double() for t in reference[name])
        ratio = part["B0"].double().norm() / b.norm()
        up_to_sign(part["B0"].T, (b * ratio).T, 0.02)
        up_to_sign(part["A0"], a / ratio, 0.02)


@quiet
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga_has_pefts_directions(direction: str) -> None:
    from peft import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    torch.manual_seed(0)
    model = llama()
    settings = LoraGAConfig(direction=direction, scale="unit")
    config = theirs("lora_ga", lora_ga_config=settings)
    preprocess_loraga(model, config, lambda: [model(**b).loss.backward() for b in data()])
    reference = layers_of(peft.get_peft_model(model, config))
    options = {"direction": direction, "scale": "unit"}
    adapter = attach(llama(), "lora_ga", targets=_TARGETS, init_options=options)
    for name, part in adapter.layers().items():
        a, b = reference[name]
        up_to_sign(part["A0"], a, 0.02)
        up_to_sign(part["B0"].T, (b / b.norm(dim=0)).T, 0.02)  # they multiply by S


@quiet
@pytest.mark.parametrize("init", [*MOVES, "orthogonal", "eva"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_peft_reads_what_we_write(init: str, build: Any, tmp_path: Path) -> None:
    model = build()
    base = run(model, data()[0])
    adapter = attach(model, init)
    randomise(adapter.parameters(), scale=0.1)
    want = run(model, data()[0]).detach()
    assert float((want - base).abs().max()) > 1e-2
    ls.save(model, tmp_path / "a")
    read = peft.PeftModel.from_pretrained(build(), tmp_path / "a").eval()
    torch.testing.assert_close(run(read, data()[0]).detach(), want, atol=1e-5, rtol=1e-5)
    rank = read.peft_config["default"].r
    assert rank == (2 * R if init in MOVES else R)
    again = build()
    loaded = ls.load(again, tmp_path / "a")  # without any data
    assert loaded.config == adapter.config
    assert torch.equal(run(again, data()[0]), want)


def test_a_layer_that_is_named_like_the_end_of_another_gets_its_own_rank() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(8, 8)
            self.inner = nn.ModuleDict({"a": nn.Linear(8, 8)})

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["a"](self.a(x) * torch.tensor([9.0] + 7 * [0.01]))

    adapter = ls.attach(Model(), ls.LoRAConfig(r=2, init="eva"), calibration=[torch.randn(40, 8)])
    got = {n: p["A"].shape[0] for n, p in adapter.layers().items()}
    assert got == {"a": 3, "inner.a": 1}
