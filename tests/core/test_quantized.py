"""Adapters on quantised layers, against the same adapter on the dequantised dense layers."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.core import quantized
from lorasmith.core.calibration import collect
from lorasmith.core.layers import describe, read_weight, weight_version, write_weight
from lorasmith.errors import AttachError, ConfigError, FuseError
from lorasmith.io.fingerprint import fingerprint
from tests.models import randomise

D, H = 64, 96  # multiples of 32, the smallest group


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


needs_bnb = pytest.mark.skipif(not has("bitsandbytes"), reason="bitsandbytes is not installed")
needs_torchao = pytest.mark.skipif(not has("torchao"), reason="torchao is not installed")
pytestmark = [
    # torchao and bitsandbytes, each where it comes from.
    pytest.mark.filterwarnings("ignore:.*MatMul8bitLt:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torchao"),
    pytest.mark.filterwarnings("ignore:.*register_constant.*:UserWarning"),
]


def dense(hidden: int = H) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, hidden), nn.Tanh(), nn.Linear(hidden, D, bias=False))


def with_bnb(make: Callable[[nn.Linear], nn.Module], hidden: int = H) -> nn.Sequential:
    model = dense(hidden)
    for i in (0, 2):
        layer = make(model[i])
        layer.bias = model[i].bias
        model[i] = layer.to("cpu")
    return model


def four(kind: str, nested: bool, hidden: int = H) -> nn.Sequential:
    from bitsandbytes.nn import Linear4bit, Params4bit

    def make(old: nn.Linear) -> nn.Module:
        new = Linear4bit(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            compute_dtype=torch.float32,
            quant_type=kind,
            compress_statistics=nested,
        )
        new.weight = Params4bit(
            old.weight.data, quant_type=kind, compress_statistics=nested, module=new
        )
        return new

    return with_bnb(make, hidden)


def eight() -> nn.Sequential:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    def make(old: nn.Linear) -> nn.Module:
        new = Linear8bitLt(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            has_fp16_weights=False,
            threshold=6.0,
        )
        new.weight = Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
        return new

    return with_bnb(make)


def ao(config: str, **settings: Any) -> nn.Sequential:
    import torchao.quantization as library
    from torchao.quantization.granularity import PerGroup

    if "group" in settings:
        settings["granularity"] = PerGroup(settings.pop("group"))
    model = dense()
    library.quantize_(model, getattr(library, config)(**settings))
    return model


def int4() -> nn.Sequential:
    return ao("IntxWeightOnlyConfig", weight_dtype=torch.int4, group=32)


BASES: dict[str, Any] = {
    "nf4": pytest.param(lambda: four("nf4", True), marks=needs_bnb),
    "nf4-single": pytest.param(lambda: four("nf4", False), marks=needs_bnb),
    "fp4": pytest.param(lambda: four("fp4", True), marks=needs_bnb),
    "int8": pytest.param(eight, marks=needs_bnb),
    "ao-int8": pytest.param(lambda: ao("Int8WeightOnlyConfig"), marks=needs_torchao),
    "ao-int4": pytest.param(int4, marks=needs_torchao),
    "ao-float8": pytest.param(lambda: ao("Float8WeightOnlyConfig"), marks=needs_torchao),
}
bases = pytest.mark.parametrize("make", BASES.values(), ids=BASES.keys())
writable = pytest.mark.parametrize(
    "make",
    [v for k, v in BASES.items() if k != "ao-float8"],
    ids=[k for k in BASES if k != "ao-float8"],
)


def twin(model: Any) -> nn.Sequential:
    """The dense model with the same weights, as the libraries themselves unpack them."""
    plain = dense()
    for i in (0, 2):
        with torch.no_grad():
            plain[i].weight.copy_(unpack(model[i]))
    return plain


def unpack(layer: Any) -> Any:
    """W by the library's own function, or by the format's definition."""
    if type(layer).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if type(layer).__name__ == "Linear8bitLt":
        codes = layer.weight.CB if layer.weight.CB is not None else layer.state.CB
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return (codes.double() * scales.double()[:, None] / 127).float()
    return layer.weight.dequantize()


VARIANTS: dict[str, Callable[[], Any]] = {
    "lora": lambda: ls.LoRAConfig(r=4),
    "rslora": lambda: ls.LoRAConfig(r=4, scaling="rslora", init="gaussian"),
    "lora-orthogonal": lambda: ls.LoRAConfig(r=4, init="orthogonal"),
    "ia3": ls.IA3Config,
    "delora": lambda: ls.DeLoRAConfig(r=4),
    "hra": lambda: ls.HRAConfig(r=4),
    "road": lambda: ls.RoAdConfig(group_size=32),
    "loha": lambda: ls.LoHaConfig(r=4),
    "lokr": lambda: ls.LoKrConfig(r=4),
    "oft": ls.OFTConfig,
    "vera": lambda: ls.VeRAConfig(r=4),
    "miss": lambda: ls.MiSSConfig(r=4),
}
READERS: dict[str, Callable[[], Any]] = {
    "pissa": lambda: ls.LoRAConfig(r=4, init="pissa"),
    "dora": lambda: ls.DoRAConfig(r=4),
    "antipasto": lambda: ls.AntiPaSTOConfig(r=4),
    "lora_xs": lambda: ls.LoRAXSConfig(r=4),
}


def make_config(table: dict[str, Callable[[], Any]], name: str) -> Any:
    return table[name]()


def same_adapter(model: nn.Module, other: nn.Module, config: Any, **kwargs: Any) -> tuple[Any, Any]:
    a = ls.attach(model, config, **kwargs)
    b = ls.attach(other, config)
    randomise(a.parameters())
    b.load_state_dict(a.state_dict())
    return a, b


def compare(
    model: nn.Module, other: nn.Module, a: Any, b: Any, rows: int, tolerance: float
) -> None:
    """Outputs, and gradients of the adapter and of the input."""
    torch.manual_seed(1)
    x = torch.randn(rows, D)
    target = torch.randn(rows, D)
    found = []
    for m in (model, other):
        m.train()
        for adapter in (a, b):
            for p in adapter.parameters():
                p.grad = None
        inp = x.clone().requires_grad_(True)
        y = m(inp)
        ((y - target) ** 2).mean().backward()
        adapter = a if m is model else b
        grads = {n: p.grad for n, p in adapter.named_parameters()}
        assert all(g is not None for g in grads.values())
        found.append((y.detach(), inp.grad, grads))
    (y1, x1, g1), (y2, x2, g2) = found
    for one, two in ((y1, y2), (x1, x2), *((g1[n], g2[n]) for n in g2)):
        assert float((one - two).norm()) <= tolerance * float(two.norm()) + 1e-7


# -- reading -----------------------------------------------------------------------------------


@bases
def test_what_a_layer_is_and_its_weight(make: Callable[[], nn.Sequential]) -> None:
    model, plain = make(), dense()
    for i, sizes in ((0, (D, H)), (2, (H, D))):
        info = describe(model[i], str(i))
        assert info is not None
        assert (info.kind, info.d_in, info.d_out, info.fresh_output) == ("opaque", *sizes, False)
        weight = read_weight(model[i], info)
        assert weight.shape == (sizes[1], sizes[0])
        torch.testing.assert_close(weight, unpack(model[i]), atol=1e-6, rtol=1e-6)
        before = plain[i].weight.detach()
        error = float((weight - before).norm() / before.norm())
        assert 0 < error < 0.2, error
        # A copy: to write on it must not reach the layer.
        before = weight.clone()
        weight.zero_()
        assert torch.equal(read_weight(model[i], info), before)
    assert quantized.numel(model) == sum(p.numel() for p in plain.parameters())


@needs_bnb
def test_the_8_bit_layer_keeps_its_scales_elsewhere_after_a_forward() -> None:
    model = eight()
    info = describe(model[0], "0")
    assert info is not None
    before = read_weight(model[0], info)
    model.train()(torch.randn(2, D))
    assert model[0].weight.CB is None
    assert torch.equal(read_weight(model[0], info), before)


def test_a_layer_of_no_known_kind_and_one_without_values() -> None:
    class Odd(nn.Module):
        in_features, out_features = 4, 3

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.zeros(3, 4, dtype=torch.int8))

    info = describe(Odd(), "odd")
    assert info is not None
    with pytest.raises(AttachError, match="cannot be read as a plain matrix"):
        read_weight(Odd(), info)
    with pytest.raises(FuseError, match="own settings"):
        write_weight(Odd(), info, torch.zeros(3, 4))
    if has("bitsandbytes"):
        from bitsandbytes.nn import Linear4bit

        layer = Linear4bit(64, 64, device="meta")
        info = describe(layer, "m")
        assert info is not None
        with pytest.raises(AttachError, match="no values"):
            read_weight(layer, info)


def test_a_layer_that_dequantises_itself() -> None:
    class HQQLinear(nn.Module):
        in_features, out_features = 6, 5

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("W_q", torch.randint(0, 16, (5, 6), dtype=torch.uint8))

        def dequantize(self) -> Tensor:
            value: Tensor = (self.W_q.float() - 8) / 10
            return value

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.dequantize().T

    model = nn.Sequential(HQQLinear())
    ls.attach(model, ls.DoRAConfig(r=2), dequantize=True)
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), model[0].forward(x))
    with pytest.raises(FuseError, match="own settings"):
        ls.fuse(model)
    torch.testing.assert_close(model(x), model[0].forward(x))


# -- GPTQ and AWQ, packed by hand after their published layouts ----------------------------------


def pack(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Codes → 32-bit words, the first code in the lowest bits, written as a plain loop."""
    codes = codes.to(torch.int64).movedim(dim, 0)
    per = 32 // bits
    words = torch.zeros(codes.shape[0] // per, *codes.shape[1:], dtype=torch.int64)
    for i in range(codes.shape[0]):
        words[i // per] |= codes[i] << (bits * (i % per))
    words = torch.where(words >= 2**31, words - 2**32, words)
    return words.movedim(0, dim).to(torch.int32)


class _Packed(nn.Module):
    def __init__(self, bits: int, d_in: int, d_out: int, **buffers: Tensor) -> None:
        super().__init__()
        self.bits = bits
        self.in_features, self.out_features = d_in, d_out
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self.wanted: Tensor = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.wanted.T


class TorchQuantLinear(_Packed):
    """As GPTQModel names it."""

    version = 1

    def qzero_format(self) -> int:
        return self.version


class MarlinQuantLinear(_Packed):
    pass


class WQLinear_GEMM(_Packed):  # noqa: N801
    """As AutoAWQ names it."""


def gptq(kind: Any, bits: int, version: int, act_order: bool) -> _Packed:
    generator = torch.Generator().manual_seed(bits)
    d_in, d_out, group = 32, 32, 8
    top = 2**bits
    codes = torch.randint(0, top, (d_in, d_out), generator=generator)
    zeros = torch.randint(0, top, (d_in // group, d_out), generator=generator)
    scales = (torch.rand(d_in // group, d_out, generator=generator) + 0.5) / top
    index = torch.arange(d_in) // group
    if act_order:
        index = index[torch.randperm(d_in, generator=generator)]
    stored = (zeros - 1) % top if version == 1 else zeros
    layer = kind(
        bits,
        d_in,
        d_out,
        qweight=pack(codes, bits, 0),
        qzeros=pack(stored, bits, 1),
        scales=scales.half(),
        g_idx=index.to(torch.int32),
    )
    layer.version = version
    wide = scales.half().double()
    wanted = torch.stack([wide[g] * (codes[i] - zeros[g]) for i, g in enumerate(index.tolist())])
    layer.wanted = wanted.T.float()
    return layer


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(bits: int, version: int, act_order: bool) -> None:
    layer = gptq(TorchQuantLinear, bits, version, act_order)
    info = describe(layer, "l")
    assert info is not None
    assert info.kind == "opaque"
    torch.testing.assert_close(read_weight(layer, info), layer.wanted, atol=1e-6, rtol=1e-6)
    with pytest.raises(FuseError, match="own settings"):
        write_weight(layer, info, layer.wanted)


def test_a_gptq_kernel_with_an_order_of_its_own_is_refused() -> None:
    model = nn.Sequential(gptq(MarlinQuantLinear, 4, 1, False))
    with pytest.raises(AttachError, match="an order of its own"):
        ls.attach(model, ls.LoRAConfig(r=2, init="pissa"), dequantize=True)
    adapter = ls.attach(model, ls.LoRAConfig(r=2))
    model(torch.randn(2, 32)).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    ls.detach(model)
    model[0].SUPPORTS_TRAINING = False
    with pytest.raises(ConfigError, match="no gradient"):
        ls.attach(model, ls.LoRAConfig(r=2))


def test_awq() -> None:
    generator = torch.Generator().manual_seed(0)
    d_in, d_out, group = 32, 16, 8
    codes = torch.randint(0, 16, (d_in, d_out), generator=generator)
    zeros = torch.randint(0, 16, (d_in // group, d_out), generator=generator)
    scales = torch.rand(d_in // group, d_out, generator=generator).half()
    # AutoAWQ packs the columns 0, 2, 4, 6, 1, 3, 5, 7 of every eight, in this order.
    order = torch.arange(d_out).view(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
    layer = WQLinear_GEMM(
        4,
        d_in,
        d_out,
        qweight=pack(codes[:, order], 4, 1),
        qzeros=pack(zeros[:, order], 4, 1),
        scales=scales,
    )
    rows = torch.arange(d_in) // group
    wanted = ((codes - zeros[rows]).double() * scales.double()[rows]).T.float()
    info = describe(layer, "l")
    assert info is not None
    torch.testing.assert_close(read_weight(layer, info), wanted, atol=1e-6, rtol=1e-6)


def test_gguf_blocks() -> None:
    """Q8_0 by its definition: blocks of 32 values, a float16 scale before 32 signed bytes."""
    utils = pytest.importorskip("transformers.integrations.gguf.utils")
    gguf = pytest.importorskip("gguf")
    d_in, d_out = 64, 5
    scales = (torch.rand(d_out, d_in // 32) + 0.1).half()
    codes = torch.randint(-127, 128, (d_out, d_in // 32, 32), dtype=torch.int8)
    blocks = torch.cat([scales.view(torch.uint8).view(d_out, -1, 2), codes.view(torch.uint8)], 2)
    layer = utils.GgufLinear(d_in, d_out, int(gguf.GGMLQuantizationType.Q8_0))
    layer.weight.data = blocks.reshape(d_out, -1).contiguous()
    wanted = (scales.float()[..., None] * codes.float()).reshape(d_out, d_in)
    info = describe(layer, "l")
    assert info is not None
    torch.testing.assert_close(read_weight(layer, info), wanted)
    order = torch.randperm(d_in)
    layer.input_permutation = order
    x = torch.randn(3, d_in)
    torch.testing.assert_close(x @ read_weight(layer, info).T, x[:, order] @ wanted.T)
    with pytest.raises(ConfigError, match="no gradient"):
        ls.attach(nn.Sequential(layer), ls.LoRAConfig(r=2))


# -- training ----------------------------------------------------------------------------------


@bases
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", [3, 1100], ids=["plain", "fast"])
def test_trains_like_on_the_dequantised_model(
    make: Callable[[], nn.Sequential], variant: str, rows: int
) -> None:
    model = make()
    other = twin(model)
    a, b = same_adapter(model, other, make_config(VARIANTS, variant))
    compare(model, other, a, b, rows, tolerance=2e-5)


@bases
@pytest.mark.parametrize("variant", READERS)
def test_what_reads_the_weight_does_so_on_request(
    make: Callable[[], nn.Sequential], variant: str
) -> None:
    model, config = make(), make_config(READERS, variant)
    with pytest.raises(ConfigError, match=r"must read the weight[\s\S]*dequantize=True"):
        ls.attach(model, config)
    assert not ls.attached(model)
    other = twin(model)
    x = torch.randn(5, D)
    before = model.train()(x)
    a, b = same_adapter_as_made(model, other, config)
    torch.testing.assert_close(model(x), before, atol=2e-5, rtol=2e-5)
    compare(model, other, a, b, 5, tolerance=3e-5)


def same_adapter_as_made(model: nn.Module, other: nn.Module, config: Any) -> tuple[Any, Any]:
    torch.manual_seed(3)
    a = ls.attach(model, config, dequantize=True)
    torch.manual_seed(3)
    b = ls.attach(other, config)
    b.load_state_dict(a.state_dict())
    return a, b


@bases
def test_dora_keeps_the_norms_by_the_stored_weight(make: Callable[[], nn.Sequential]) -> None:
    """Dequantised copies come and go in the same memory: their address says nothing."""
    model = make()
    other = twin(model)
    a, b = same_adapter(model, other, ls.DoRAConfig(r=4), dequantize=True)
    x = torch.randn(4, D)
    with torch.no_grad():
        torch.testing.assert_close(model.train()(x), other(x), atol=1e-5, rtol=1e-5)
        # Swap the two layers' adapters' weights under their caches, twice over.
        for seed in (5, 6):
            torch.manual_seed(seed)
            for m in (model, other):
                for adapter in (a, b):
                    if adapter.model is m:
                        torch.manual_seed(seed)
                        randomise(adapter.parameters())
            torch.testing.assert_close(model(x), other(x), atol=1e-5, rtol=1e-5)
    info = describe(model[0], "0")
    assert info is not None
    assert weight_version(model[0], info) == weight_version(model[0], info)


@needs_bnb
def test_bfloat16_inputs_and_autocast() -> None:
    model = four("nf4", True)
    other = twin(model)
    same_adapter(model, other, ls.LoRAConfig(r=4))
    x = torch.randn(7, D)
    y = model.train()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), other(x), atol=0.05, rtol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), other(x).float(), atol=0.05, rtol=0.05)


@needs_torchao
def test_a_base_that_keeps_the_gradient_is_refused_for_training(tmp_path: Path) -> None:
    """torchao's dynamic activations give the input no gradient, and say nothing."""
    model = ao("Int8DynamicActivationInt8WeightConfig")
    x = torch.randn(2, D, requires_grad=True)
    model[0](x).sum().backward()
    assert x.grad is None
    with pytest.raises(ConfigError, match="no gradient"):
        ls.attach(model, ls.LoRAConfig(r=2))
    plain = dense()
    adapter = ls.attach(plain, ls.LoRAConfig(r=2))
    randomise(adapter.parameters())
    ls.save(plain, tmp_path / "a")
    with pytest.raises(ConfigError, match="no gradient"):
        ls.load(model, tmp_path / "a", trainable=True)
    ls.load(model, tmp_path / "a")
    torch.testing.assert_close(model(x), plain(x), atol=0.05, rtol=0.05)


@needs_bnb
@pytest.mark.parametrize("nested", [True, False])
def test_a_weight_repacked_for_inference_can_be_trained(nested: bool) -> None:
    """On CPUs with AVX512-BF16 an evaluation would end the gradient for good."""
    # Widths that its kernel takes; on other CPUs nothing is repacked and this is plain.
    model = four("nf4", nested, 128)
    with torch.no_grad():
        before = model.eval()(torch.randn(3, D))
    assert before.shape == (3, D)
    weights = [read_weight(model[i], describe(model[i], str(i))) for i in (0, 2)]
    flags = [model[i].support_avx512bf16_for_cpu for i in (0, 2)]
    adapter = ls.attach(model, ls.LoRAConfig(r=4))
    for i, weight in zip((0, 2), weights, strict=True):
        found = read_weight(model[i], describe(model[i], str(i)))
        torch.testing.assert_close(found, weight, atol=1e-6, rtol=1e-6)
    randomise(adapter.parameters())
    x = torch.randn(3, D)
    with torch.no_grad():
        evaluated = model.eval()(x)
    x.requires_grad_(True)
    trained = model.train()(x)
    torch.testing.assert_close(trained, evaluated, atol=1e-5, rtol=1e-5)
    trained.sum().backward()
    assert x.grad is not None
    assert float(x.grad.norm()) > 0
    ls.detach(model)
    assert [model[i].support_avx512bf16_for_cpu for i in (0, 2)] == flags
    assert not [k for k in model.__dict__ if "lorasmith" in k]


@needs_bnb
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "repacked"])
def test_a_gradient_for_the_start_comes_through_a_repacked_weight(used: bool) -> None:
    """Calibration runs in eval mode, in which bitsandbytes would repack on such CPUs."""
    model, x = four("nf4", False, 128), torch.randn(9, D)
    if used:
        with torch.no_grad():
            model.eval()(x)
    plain = dense(128)
    for i in (0, 2):
        with torch.no_grad():
            plain[i].weight.copy_(read_weight(model[i], describe(model[i], str(i))))  # type: ignore[arg-type]
    flags = [model[i].support_avx512bf16_for_cpu for i in (0, 2)]
    infos = [describe(model[i], str(i)) for i in (0, 2)]

    def loss(output: Tensor) -> Tensor:
        return output.square().sum()

    found = collect(model, infos, [x], {"gradient"}, loss=loss)  # type: ignore[arg-type]
    assert [model[i].support_avx512bf16_for_cpu for i in (0, 2)] == flags
    loss(plain(x)).backward()
    for i in (0, 2):
        wanted = plain[i].weight.grad
        scale = float(wanted.abs().max())
        torch.testing.assert_close(found[str(i)]["gradient"], wanted, atol=1e-3 * scale, rtol=1e-3)


@needs_bnb
def test_what_fails_while_a_base_is_prepared_leaves_it_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = four("nf4", False, 128)
    for i in (0, 2):
        model[i].support_avx512bf16_for_cpu = True

    def fails(state: Any) -> bool:
        raise RuntimeError("no such layout")

    monkeypatch.setattr(quantized, "_packed_for_cpu", fails)
    with pytest.raises(RuntimeError, match="layout"):
        ls.attach(model, ls.LoRAConfig(r=4))
    assert all(model[i].support_avx512bf16_for_cpu for i in (0, 2))
    assert not [k for k in model.__dict__ if "lorasmith" in k]
    assert not [m for m in model.modules() if m._forward_hooks]


# -- fusing ------------------------------------------------------------------------------------


def bits(model: Any) -> list[Tensor]:
    return [t.detach().clone() for i in (0, 2) for t in quantized.storage(model[i])]


@writable
def test_fuse_and_unfuse(make: Callable[[], nn.Sequential]) -> None:
    model = make()
    other = twin(model)
    a, b = same_adapter(model, other, ls.LoRAConfig(r=4))
    with torch.no_grad():
        for p in (*a.parameters(), *b.parameters()):
            p.mul_(3)
    x = torch.randn(4, D)
    wanted = model.train()(x)
    stored, objects = bits(model), [model[i].weight for i in (0, 2)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = ls.fuse(model)
    deltas = {n: p.constants["scaling"] * p["B"] @ p["A"] for n, p in b.layers().items()}
    for layer in report.layers:
        i = int(layer.name)
        change = unpack(model[i]) - other[i].weight
        delta = deltas[layer.name].detach()
        assert layer.delta_norm == pytest.approx(float(delta.norm()), rel=1e-4)
        error = float((change - delta).norm() / delta.norm())
        assert layer.rounding_error == pytest.approx(error, rel=1e-2)
    large = [x for x in report.layers if x.rounding_error > 0.1]
    said = [w for w in caught if "distorted" in str(w.message)]
    assert len(said) == bool(large)
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(model)(x), atol=1e-4, rtol=1e-4)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lorasmith" not in n)
    ls.unfuse(model)
    assert all(torch.equal(p, q) for p, q in zip(bits(model), stored, strict=True))
    assert [model[i].weight for i in (0, 2)] == objects or all(
        model[i].weight is o for i, o in zip((0, 2), objects, strict=True)
    )
    torch.testing.assert_close(model(x), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ls.fuse(model)
    ls.detach(model)
    assert all(torch.equal(p, q) for p, q in zip(bits(model), stored, strict=True))


@needs_bnb
def test_a_small_change_is_lost_and_the_warning_says_how_much() -> None:
    model = four("nf4", True)
    adapter = ls.attach(model, ls.LoRAConfig(r=2))
    randomise(adapter.parameters())
    with torch.no_grad():
        for p in adapter.parameters():
            p.mul_(0.02)
    with pytest.warns(UserWarning, match=r"distorted the adapter's change in 2 of 2 .* by \d+%"):
        report = ls.fuse(model)
    assert report.dtype == "nf4"
    assert report.max_rounding_error > 0.5


@needs_torchao
def test_a_format_that_cannot_be_written_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(int4()[0], nn.Tanh(), ao("Float8WeightOnlyConfig")[2])
    randomise(ls.attach(model, ls.LoRAConfig(r=4)).parameters())
    x = torch.randn(3, D)
    wanted, before = model(x), bits(model)
    with pytest.raises(FuseError, match="own settings"):
        ls.fuse(model)
    assert all(torch.equal(p, q) for p, q in zip(bits(model), before, strict=True))
    assert torch.equal(model(x), wanted)


@needs_torchao
def test_weights_of_torchao_are_not_taken_for_tied() -> None:
    """They all have address 0."""
    model = int4()
    assert model[0].weight.data_ptr() == model[2].weight.data_ptr() == 0
    assert quantized.pointers(model[0].weight) != quantized.pointers(model[2].weight)


@writable
def test_quantising_what_was_dequantised_changes_next_to_nothing(
    make: Callable[[], nn.Sequential],
) -> None:
    model = make()
    info = describe(model[0], "0")
    assert info is not None
    weight = read_weight(model[0], info)
    write_weight(model[0], info, weight)
    again = read_weight(model[0], info)
    assert float((again - weight).norm()) <= 0.01 * float(weight.norm())
    x = torch.randn(3, D)
    torch.testing.assert_close(
        model[0].train()(x), x @ again.T + model[0].bias, atol=1e-5, rtol=1e-5
    )


# -- copies, files, fingerprints -----------------------------------------------------------------


@bases
def test_deepcopy(make: Callable[[], nn.Sequential]) -> None:
    model = make().train()
    randomise(ls.attach(model, ls.LoRAConfig(r=4)).parameters())
    x = torch.randn(3, D)
    twin_model = copy.deepcopy(model)
    torch.testing.assert_close(twin_model(x), model(x))
    ls.detach(model)
    twin_model(x).sum().backward()
    assert ls.attached(twin_model)


class Model(nn.Module):
    """A base with what stays unquantised: an embedding and a norm."""

    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(11, D)
        self.norm = nn.LayerNorm(D)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.norm(self.embed(x)))


@bases
@pytest.mark.parametrize("trained_on", ["quantised", "dense"])
def test_an_adapter_loads_on_the_base_in_either_form(
    make: Callable[[], nn.Sequential], trained_on: str, tmp_path: Path
) -> None:
    model, plain = Model(make()), Model(dense())
    first = model if trained_on == "quantised" else plain
    adapter = ls.attach(first, ls.LoRAConfig(r=4))
    randomise(adapter.parameters())
    ls.save(first, tmp_path / "a")
    ls.detach(first)
    for target in (model, plain):
        loaded = ls.load(target, tmp_path / "a")
        for name, value in loaded.state_dict().items():
            assert torch.isfinite(value).all(), name
        ls.detach(target)
    other = Model(make())
    with torch.no_grad():
        other.norm.weight.add_(0.1)
    if trained_on == "quantised":
        with pytest.raises(ls.LorasmithError, match="another base"):
            ls.load(other, tmp_path / "a")
    else:
        with torch.no_grad():
            other.embed.weight.add_(0.1)
        with pytest.raises(ls.LorasmithError, match="another base"):
            ls.load(other, tmp_path / "a")


@bases
def test_the_fingerprint_of_a_quantised_base(make: Callable[[], nn.Sequential]) -> None:
    model, plain = Model(make()), Model(dense())
    mine, theirs = fingerprint(model), fingerprint(plain)
    assert mine.structure == theirs.structure
    assert sorted(mine.sketch) == ["embed.weight", "norm.bias", "norm.weight"]
    assert all(v.ndim == 1 for v in mine.sketch.values())
    assert sorted(theirs.sketch) == ["body.0.weight", "body.2.weight", "embed.weight"]
    assert mine.compare(fingerprint(plain, names=list(mine.sketch))).same
    assert theirs.compare(fingerprint(model, names=list(theirs.sketch))).same


@needs_bnb
def test_dora_files_need_the_weight_on_a_quantised_base(tmp_path: Path) -> None:
    model = Model(four("nf4", True))
    adapter = ls.attach(model, ls.DoRAConfig(r=2), dequantize=True)
    randomise(adapter.parameters())
    x = torch.randint(0, 11, (2, 3))
    wanted = model.train()(x)
    ls.save(model, tmp_path / "a")
    ls.detach(model)
    with pytest.raises(ConfigError, match="whenever it runs"):
        ls.load(model, tmp_path / "a")
    ls.load(model, tmp_path / "a", dequantize=True)
    torch.testing.assert_close(model(x), wanted)


@needs_bnb
def test_a_quantised_layer_is_not_trained_as_a_whole() -> None:
    model = four("nf4", True)
    with pytest.raises(ConfigError, match="trained as a whole"):
        ls.attach(model, ls.LoRAConfig(r=2, targets=["0"], modules_to_save=["2"]))
    assert not ls.attached(model)


# -- Trainer's mark --------------------------------------------------------------------------------


class Quantizer:
    """What Transformers hangs on a quantised model, as far as Trainer asks it."""

    is_trainable = False

    def __init__(self) -> None:
        self.settings = {"bits": 4}

    @property
    def is_qat_trainable(self) -> bool:
        return False


@needs_bnb
def test_the_mark_for_trainer_comes_and_goes() -> None:
    model = four("nf4", True)
    model.hf_quantizer = Quantizer()
    ls.attach(model, ls.LoRAConfig(r=2), name="one")
    ls.attach(model, ls.LoRAConfig(r=2), name="two")
    marked = model.hf_quantizer
    assert isinstance(marked, Quantizer)
    assert marked.is_qat_trainable
    assert marked.is_trainable
    for again in (copy.deepcopy(model).hf_quantizer, pickle.loads(pickle.dumps(marked))):  # noqa: S301
        assert again.is_qat_trainable
        assert again.settings == {"bits": 4}
    ls.detach(model, "one")
    assert marked.is_qat_trainable
    ls.detach(model)
    left: Any = model.hf_quantizer
    assert type(left) is Quantizer
    assert not left.is_qat_trainable
    with pytest.raises(ls.LorasmithError):
        ls.attach(model, ls.LoRAConfig(r=2, targets="nothing"))
    assert type(left) is Quantizer


@needs_bnb
def test_a_state_dict_of_the_whole_model() -> None:
    model = four("nf4", True)
    ls.attach(model, ls.LoRAConfig(r=2))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert buffer.tell() > 0
