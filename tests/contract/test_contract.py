"""What every variant must hold, with every initialisation it has, on every kind of model."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.core import lowrank
from lorasmith.core.state import SLOT
from lorasmith.core.variant import BaseLayer, NewTensors
from tests.contract.configurations import CONFIGURATIONS
from tests.models import FAMILIES, Family, llama, main_output, mlp, randomise, run


def _configurations() -> Iterator[Any]:
    """Every registered variant as ``configurations.py`` says it is to be tried."""
    for name in ls.variants():
        assert name in CONFIGURATIONS, f"tests/contract/configurations.py says nothing of {name}"
        for config_id, config in CONFIGURATIONS[name].items():
            yield pytest.param(config, id=f"{name}-{config_id}")


CONFIGS = list(_configurations())
assert len(CONFIGS) >= 10
#: Initialisations that give the same kind of tensors as another need not be tried everywhere.
_ALIKE = ("gaussian", "orthogonal", "pissa_niter_4", "olora", "eva", "eva ranks", "corda", "loftq")
FORMS = [c for c in CONFIGS if not str(c.id).endswith(tuple(f"-{name}" for name in _ALIKE))]
every_config = pytest.mark.parametrize("config", CONFIGS)
each_config = pytest.mark.parametrize("config", FORMS)
#: The classifier is a DistilBERT too.
each_family = pytest.mark.parametrize(
    "family", [f for f in FAMILIES.values() if f.name != "distilbert"], ids=lambda f: f.name
)
#: One model with plain layers and one real architecture where running all would teach nothing.
two_families = pytest.mark.parametrize(
    "family", [FAMILIES["mlp"], FAMILIES["gpt2"]], ids=lambda f: f.name
)


@pytest.fixture(autouse=True)
def _functions_on_tiny_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors would take the plain operations and leave the fast path untested."""
    monkeypatch.setattr(lowrank, "SMALL", 0)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All of a model that attaching could change, hooks and plain attributes included."""
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "order": list(model.state_dict()),
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "ids": {n: id(p) for n, p in model.named_parameters()},
        "modules": [(n, id(m), m.training) for n, m in model.named_modules()],
        "hooks": [
            (n, k, dict(v))
            for n, m in model.named_modules()
            for k, v in m.__dict__.items()
            if "hook" in k and isinstance(v, dict)
        ],
        "attributes": [(n, sorted(m.__dict__)) for n, m in model.named_modules()],
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    state = before["state"]
    assert after["order"] == before["order"]
    for key, value in after["state"].items():
        assert torch.equal(value, state[key]), key
    for part in ("flags", "ids", "modules", "hooks", "attributes"):
        assert after[part] == before[part], part


def attach(model: nn.Module, config: Any, **arguments: Any) -> ls.Adapter:
    """``ls.attach``, with calibration data for the model where the configuration needs any."""
    if ls.variants()[config.variant].statistics(config):
        family = FAMILIES["llama" if hasattr(model, "config") else "mlp"]
        dtype = next(model.parameters()).dtype
        batches = [
            {k: v.to(dtype) if v.is_floating_point() else v for k, v in family.batch(seed).items()}
            for seed in range(3)
        ]
        if family.name == "mlp":  # whatever the first layer calls its input
            batches = [tuple(b.values()) for b in batches]  # type: ignore[misc]
        arguments = {
            "calibration": batches,
            "calibration_loss": lambda output: main_output(output).float().pow(2).mean(),
            **arguments,
        }
    return ls.attach(model, config, **arguments)


def attached(family: Family, config: Any, *, act: bool = True) -> tuple[nn.Module, ls.Adapter]:
    model = family.build()
    adapter = attach(model, config)
    if act:
        randomise(adapter.parameters())
    return model, adapter


@each_family
@every_config
def test_identity_at_the_start(family: Family, config: Any) -> None:
    model, batch = family.build(), family.batch()
    expected = run(model, batch)
    attach(model, config)
    torch.testing.assert_close(run(model, batch), expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(run(model, batch), expected, atol=1e-5, rtol=0)


@each_family
@each_config
def test_only_the_adapter_trains_and_all_of_it(family: Family, config: Any) -> None:
    model, batch = family.build(), family.batch()
    base = dict(model.named_parameters())
    before = {n: p.detach().clone() for n, p in base.items()}
    adapter = attach(model, config)
    assert not any(p.requires_grad for p in base.values())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in adapter.parameters())
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.05)
    weights = torch.randn(run(model, batch).shape)
    seen: set[str] = set()
    for _ in range(2):
        optimizer.zero_grad()
        (run(model, batch) * weights).sum().backward()
        for name, parameter in adapter.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            if parameter.grad.abs().max() > 0:
                seen.add(name)
        optimizer.step()
    assert seen == {n for n, _ in adapter.named_parameters()}
    for name, parameter in base.items():
        assert parameter.grad is None, name
        assert torch.equal(parameter, before[name]), name


@each_family
@every_config
def test_fused_equals_hooked_and_unfuse_is_exact(family: Family, config: Any) -> None:
    model, batch = family.build(), family.batch()
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    bare = run(model, batch)
    adapter = attach(model, config)
    randomise(adapter.parameters())
    hooked = run(model, batch)
    assert (hooked - bare).abs().max() > 1e-2, "the adapter does nothing: the test is void"
    report = ls.fuse(model)
    torch.testing.assert_close(run(model, batch), hooked, atol=1e-5, rtol=1e-5)
    assert {layer.name for layer in report.layers} == set(adapter.targets)
    ls.unfuse(model)
    current = dict(model.named_parameters())
    assert all(torch.equal(current[n], value) for n, value in base.items())
    torch.testing.assert_close(run(model, batch), hooked, atol=1e-5, rtol=1e-5)


@each_family
@each_config
def test_detach_restores_everything(family: Family, config: Any) -> None:
    model, batch = family.build(), family.batch()
    # Mixed flags and modes must come back as they were, not as a rule would have them.
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != 0)
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    before = snapshot(model)
    adapter = attach(model, config)
    randomise(adapter.parameters())
    run(model, batch).sum().backward()
    ls.fuse(model)
    ls.detach(model)
    for parameter in model.parameters():
        parameter.grad = None
    assert_same(model, before)


@two_families
@each_config
def test_bf16_base_keeps_a_float32_adapter(family: Family, config: Any) -> None:
    model = family.build().to(torch.bfloat16)
    adapter = attach(model, config)
    batch = {
        k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in family.batch().items()
    }
    assert all(t.dtype == torch.float32 for t in adapter.state_dict().values())
    output = run(model, batch)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


@each_config
def test_casting_the_model_leaves_the_adapter(config: Any) -> None:
    model, adapter = attached(FAMILIES["mlp"], config)
    before = {n: t.clone() for n, t in adapter.state_dict().items()}
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model.to(dtype)
        assert next(model.parameters()).dtype == dtype
        for name, value in adapter.state_dict().items():
            assert value.dtype == torch.float32, (name, dtype)
            assert torch.equal(value, before[name]), (name, dtype)
        x = torch.randn(2, 6, dtype=dtype)
        assert model(x).dtype == dtype
    assert model.double()(torch.randn(2, 6).double()).dtype == torch.float64


@each_config
def test_attaching_to_a_float64_base(config: Any) -> None:
    model, batch = mlp().double(), {"input": torch.randn(2, 6, dtype=torch.float64)}
    expected = run(model, batch)
    adapter = attach(model, config)
    torch.testing.assert_close(run(model, batch), expected, atol=1e-5, rtol=0)
    randomise(adapter.parameters())
    hooked = run(model, batch)
    ls.fuse(model)
    torch.testing.assert_close(run(model, batch), hooked, atol=1e-5, rtol=1e-5)


@each_config
def test_device_follows_the_layer(config: Any) -> None:
    with torch.device("meta"):
        model = mlp()
    adapter = attach(model, config)
    real = attach(mlp(), config)
    assert all(p.is_meta for p in adapter.parameters())
    assert adapter.num_parameters() == real.num_parameters() > 0
    ls.detach(model)
    moved, adapter = attached(FAMILIES["mlp"], config)
    moved.to("meta")
    assert all(t.is_meta and t.dtype == torch.float32 for t in adapter.state_dict().values())


@each_config
def test_failure_leaves_the_model_untouched(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    before = snapshot(model)
    variant = ls.variants()[config.variant]
    calls = 0
    original = type(variant).new_tensors

    def failing(self: Any, base: Any, config: Any) -> NewTensors:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("no luck on the third layer")
        return original(self, base, config)

    monkeypatch.setattr(type(variant), "new_tensors", failing)
    with pytest.raises(RuntimeError, match="third layer"):
        attach(model, config)
    assert_same(model, before)


@each_config
@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
def test_failure_while_putting_leaves_the_model_untouched(
    config: Any, second: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorasmith.core import attach as attaching
    from lorasmith.core.state import AdapterSlot

    model, batch = llama(), FAMILIES["llama"].batch()
    if second:
        randomise(attach(model, ls.LoRAConfig(targets="q_proj"), name="old").parameters())
    before, expected = snapshot(model), run(model, batch)
    assert attaching.put is not None
    original, calls = AdapterSlot.put, 0

    def failing(self: AdapterSlot, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("no luck half-way")
        original(self, *arguments)

    monkeypatch.setattr(AdapterSlot, "put", failing)
    with pytest.raises(RuntimeError, match="half-way"):
        attach(model, config, name="new")
    assert_same(model, before)
    assert torch.equal(run(model, batch), expected)


@two_families
@each_config
def test_deepcopy_is_independent(family: Family, config: Any) -> None:
    model, _ = attached(family, config)
    batch = family.batch()
    expected = run(model, batch)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, batch), expected)
    copied = ls.attached(twin)["default"]
    randomise(copied.parameters())
    assert torch.equal(run(model, batch), expected)
    assert not torch.equal(run(twin, batch), expected)
    ls.detach(twin)
    assert torch.equal(run(model, batch), expected)
    assert not any(SLOT in m._modules for m in twin.modules())


@two_families
@each_config
def test_pickle_round_trip(family: Family, config: Any) -> None:
    model, _ = attached(family, config)
    batch = family.batch()
    expected = run(model, batch)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (
        pickle.loads(pickle.dumps(model)),  # noqa: S301
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(run(again, batch), expected)
        ls.detach(again)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in again.modules())


@each_config
def test_calls_by_keyword(config: Any) -> None:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(8, 6)  # d_out, d_in
    nn.init.normal_(conv.bias)
    for layer, key in ((nn.Linear(6, 8), "input"), (conv, "x")):
        model = nn.Sequential(layer)
        attach(model, config)
        randomise(ls.attached(model)["default"].parameters())
        x = torch.randn(2, 3, 6)
        expected = model[0](x)
        torch.testing.assert_close(model[0](**{key: x}), expected)
        with torch.no_grad():
            torch.testing.assert_close(model[0](**{key: x}), expected)


def _gradients(adapter: ls.Adapter, x: Tensor) -> list[Tensor]:
    found = [p.grad for p in adapter.parameters()] + [x.grad]
    assert all(g is not None for g in found)
    result = [g.clone() for g in found if g is not None]
    for p in adapter.parameters():
        p.grad = None
    x.grad = None
    return result


def _with_dropout(config: Any) -> Any:
    fields = {f.name for f in dataclasses.fields(config)}
    return dataclasses.replace(config, dropout=0.3) if "dropout" in fields else config


@each_config
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-tensor hooks", "reentrant"])
def test_gradient_checkpointing(config: Any, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model = mlp().train()
    adapter = attach(model, _with_dropout(config))
    randomise(adapter.parameters())
    x = torch.randn(4, 6, requires_grad=True)
    torch.manual_seed(3)
    expected = model(x)
    expected.pow(2).sum().backward()
    wanted = _gradients(adapter, x)
    torch.manual_seed(3)
    output = checkpoint(model, x, use_reentrant=reentrant)
    torch.testing.assert_close(output, expected)
    output.pow(2).sum().backward()
    torch.testing.assert_close(_gradients(adapter, x), wanted)


@each_config
def test_compile_has_no_graph_break(config: Any) -> None:
    torch._dynamo.reset()
    # Patterns are matched when the adapter is made, never inside the graph.
    patterns = {"rank_pattern": {"0": 3}, "alpha_pattern": {"2": 1.5}}
    fields = {f.name for f in dataclasses.fields(config)}
    config = dataclasses.replace(config, **{n: p for n, p in patterns.items() if n in fields})
    model = mlp().train()
    adapter = attach(model, config)
    randomise(adapter.parameters())
    x = torch.randn(4, 6, requires_grad=True)
    expected = model(x)
    expected.pow(2).sum().backward()
    wanted = _gradients(adapter, x)
    explained = torch._dynamo.explain(model)(x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(x)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    output.pow(2).sum().backward()
    torch.testing.assert_close(_gradients(adapter, x), wanted, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected.detach(), atol=1e-5, rtol=1e-5)


@two_families
@each_config
def test_autocast(family: Family, config: Any) -> None:
    model, adapter = attached(family, config)
    batch = family.batch()
    weights = torch.randn(run(model, batch).shape)

    def gradients() -> list[Tensor]:
        (run(model, batch).float() * weights).sum().backward()
        result = [p.grad for p in adapter.parameters() if p.grad is not None]
        for p in adapter.parameters():
            p.grad = None
        return result

    expected, wanted = run(model, batch), gradients()
    with torch.autocast("cpu", torch.bfloat16):
        output = run(model, batch)
        got = gradients()
    assert output.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in got)

    def similarity(a: Tensor, b: Tensor) -> float:
        a, b = a.detach().flatten().double(), b.detach().flatten().double()
        return float(a @ b / (a.norm() * b.norm()))

    assert similarity(output.float(), expected) > 0.999
    assert (
        similarity(torch.cat([g.flatten() for g in got]), torch.cat([g.flatten() for g in wanted]))
        > 0.99
    )


@each_config
def test_without_gradients(config: Any) -> None:
    model, adapter = attached(FAMILIES["mlp"], config)
    x = torch.randn(2, 3, 6)
    expected = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
        adapter.parameters().__next__().add_(0.1)
        changed = model(x)
    torch.testing.assert_close(model(x).detach(), changed)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), changed)
        torch.testing.assert_close(model(x), changed)
    model(x).sum().backward()


@each_config
def test_a_frozen_adapter_lets_gradients_through(config: Any) -> None:
    model, adapter = attached(FAMILIES["mlp"], config)
    x = torch.randn(2, 3, 6, requires_grad=True)
    model(x).pow(2).sum().backward()
    wanted = x.grad
    x.grad = None
    for p in adapter.parameters():
        p.grad = None
    adapter.requires_grad_(False)
    model(x).pow(2).sum().backward()
    torch.testing.assert_close(x.grad, wanted)
    assert all(p.grad is None for p in adapter.parameters())
    # ... and a layer without any gradient at all.
    assert not model(x.detach()).requires_grad


@each_config
def test_two_threads(config: Any) -> None:
    model, _ = attached(FAMILIES["mlp"], config)
    inputs = [torch.randn(3, 6) for _ in range(4)]
    expected = [model(x).detach() for x in inputs]
    wrong: list[str] = []

    def work(i: int) -> None:
        for repeat in range(25):
            with torch.set_grad_enabled(repeat % 2 == 0):
                if not torch.allclose(model(inputs[i]), expected[i], atol=1e-5):
                    wrong.append(f"thread {i}, call {repeat}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class _Moody(nn.Linear):
    """A linear layer that can be told to fail."""

    failing = False

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if self.failing:
            raise ValueError("not today")
        return super().forward(input)


@each_config
def test_an_exception_in_the_layer_leaves_no_state(config: Any) -> None:
    layer = _Moody(6, 8)
    model = nn.Sequential(layer, nn.Linear(8, 5))
    randomise(attach(model, config).parameters())
    x, other = torch.randn(2, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    expected = model(other)
    layer.failing = True
    with pytest.raises(ValueError, match="not today"):
        model(x)
    layer.failing = False
    assert torch.equal(model(other), expected)
    assert set(x.__dict__) == set()


@each_config
@pytest.mark.parametrize("watched", [False, True], ids=["alone", "with a hook of the user"])
def test_relu_in_place_behind_the_layer(config: Any, watched: bool) -> None:
    plain, inplace = (
        nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(inplace=flag), nn.Linear(8, 5), nn.ReLU(inplace=flag)
        )
        for flag in (False, True)
    )
    inplace.load_state_dict(plain.state_dict())
    gradients = []
    for model in (plain, inplace):
        torch.manual_seed(0)
        adapter = attach(model, config)
        if watched:
            for layer in (model[0], model[2]):
                layer.register_forward_hook(lambda *_: None)
        randomise(adapter.parameters())
        x = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model(x).pow(2).sum().backward()
        gradients.append(_gradients(adapter, x))
    torch.testing.assert_close(gradients[0], gradients[1])


_HOOKS: dict[str, Callable[[nn.Module, list[Tensor]], Any]] = {
    "forward": lambda m, seen: m.register_forward_hook(lambda mod, a, y: seen.append(y)),
    "forward, replacing": lambda m, seen: m.register_forward_hook(lambda mod, a, y: y * 1),
    "pre": lambda m, seen: m.register_forward_pre_hook(lambda mod, a: seen.append(a[0])),
    "pre, replacing": lambda m, seen: m.register_forward_pre_hook(lambda mod, a: (a[0] * 1,)),
    "full backward": lambda m, seen: m.register_full_backward_hook(
        lambda mod, gi, go: seen.extend(g for g in (*gi, *go) if g is not None)
    ),
    "backward pre": lambda m, seen: m.register_full_backward_pre_hook(
        lambda mod, go: seen.extend(g for g in go if g is not None)
    ),
}


@each_config
@pytest.mark.parametrize("kind", _HOOKS)
@pytest.mark.parametrize("early", [True, False], ids=["before attach", "after attach"])
def test_hooks_of_the_user(config: Any, kind: str, early: bool) -> None:
    """They neither lose the adapter's contribution nor see tensors change afterwards."""
    model = mlp()
    adapter = attach(model, config)
    randomise(adapter.parameters())
    values = adapter.state_dict()
    x = torch.randn(3, 6, requires_grad=True)
    expected = model(x)
    expected.pow(2).sum().backward()
    wanted = _gradients(adapter, x)

    model, seen = mlp(), []
    if early:
        _HOOKS[kind](model[2], seen)  # type: ignore[index]
    adapter = attach(model, config)
    adapter.load_state_dict(values)
    if not early:
        _HOOKS[kind](model[2], seen)  # type: ignore[index]
    output = model(x)
    kept = [(t, t.detach().clone()) for t in seen]
    torch.testing.assert_close(output, expected)
    output.pow(2).sum().backward()
    torch.testing.assert_close(_gradients(adapter, x), wanted)
    assert all(torch.equal(t, value) for t, value in kept)


@each_config
@pytest.mark.parametrize("early", [True, False], ids=["before attach", "after attach"])
def test_an_input_shared_by_a_learnable_offset(config: Any, early: bool) -> None:
    """A gradient that autograd hands to two readers must not be written on."""
    gradients, values = [], {}
    for reference in (True, False):
        model = mlp()
        leaf = torch.full((3, 8), 0.3, requires_grad=True)
        offset = leaf * 1.0

        def add(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            return (args[0] + offset,)  # noqa: B023

        first, middle, last = model  # type: ignore[misc]
        if early and not reference:
            last.register_forward_pre_hook(add)
        torch.manual_seed(0)
        adapter = attach(model, config)
        randomise(adapter.parameters())
        # Calibration has seen the hook, or not.
        values = adapter.state_dict() if reference else values
        adapter.load_state_dict(values)
        if not (early or reference):
            last.register_forward_pre_hook(add)
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
        if not reference:
            y = model(x)
        elif early or not ls.variants()[config.variant].transforms_input:
            y = last(middle(first(x)) + offset)
        else:  # a hook that comes later sees what the layer is given, so it adds to that
            part = adapter.layers()["2"]
            given, _ = part.variant.before(part, torch.eye(8), BaseLayer(last, part.info))
            y = last(middle(first(x)) + offset @ torch.linalg.inv(given.detach()))
        y.pow(2).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


class _Twice(nn.Module):
    """One layer under two names and called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


@each_config
def test_shared_modules(config: Any) -> None:
    model = _Twice()
    before = snapshot(model)
    adapter = attach(model, config)
    assert adapter.targets == ("a",)
    randomise(adapter.parameters())
    x = torch.randn(3, 6)
    expected = model(x)
    expected.sum().backward()
    ls.fuse(model)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    ls.unfuse(model)
    assert torch.equal(model(x), expected)
    ls.detach(model)
    model.zero_grad()
    assert_same(model, before)


@each_config
def test_odd_shapes(config: Any) -> None:
    model, adapter = attached(FAMILIES["mlp"], config)
    row = torch.randn(6)
    torch.testing.assert_close(model(row), model(row[None])[0])
    for shape in ((0, 6), (2, 0, 6), (1, 2, 3, 6)):
        x = torch.randn(*shape, requires_grad=True)
        y = model(x)
        assert y.shape == (*shape[:-1], 5)
        y.sum().backward()
        with torch.no_grad():
            assert torch.equal(model(x), y) or torch.allclose(model(x), y, atol=1e-6)
    strided = torch.randn(6, 3).T
    torch.testing.assert_close(model(strided), model(strided.contiguous()))
    assert adapter.num_parameters() > 0


@each_config
def test_training_mode_reaches_the_adapter(config: Any) -> None:
    model = mlp()
    adapter = attach(model, config)
    for mode in (True, False, True):
        model.train(mode)
        assert all(part.training is mode for part in adapter.layers().values())


@each_config
def test_state_dict_round_trip(config: Any) -> None:
    model, adapter = attached(FAMILIES["mlp"], config)
    x = torch.randn(2, 6)
    expected = model(x)
    values = {n: t.clone() for n, t in adapter.state_dict().items()}
    randomise(adapter.parameters(), seed=9)
    assert not torch.equal(model(x), expected)
    adapter.load_state_dict(values)
    assert torch.equal(model(x), expected)
    incomplete = dict(values)
    incomplete.pop(next(iter(incomplete)))
    with pytest.raises(ls.LorasmithError, match="missing"):
        adapter.load_state_dict(incomplete)
    wrong = {n: torch.zeros(*t.shape, 2) for n, t in values.items()}
    with pytest.raises(ls.LorasmithError, match="shape"):
        adapter.load_state_dict(wrong)
    assert torch.equal(model(x), expected)


@each_config
def test_bf16_training_moves_every_value(config: Any) -> None:
    """A step of 1e-4 on a gain of 1.0 rounds to nothing in bfloat16."""
    model = mlp().to(torch.bfloat16)
    adapter = attach(model, config)
    randomise(adapter.parameters(), scale=0.05)
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4, weight_decay=0.0)
    x, target = torch.randn(16, 6).to(torch.bfloat16), torch.randn(16, 5).to(torch.bfloat16)
    for _ in range(100):
        optimizer.zero_grad()
        (model(x) - target).pow(2).mean().backward()
        optimizer.step()
    for name, parameter in adapter.named_parameters():
        moved = (parameter != before[name]).double().mean()
        assert moved == 1.0, (name, moved)


@each_config
def test_attached_in_inference_mode_it_can_still_be_trained(config: Any) -> None:
    model = mlp()
    with torch.inference_mode():
        adapter = attach(model, config)
    model(torch.randn(2, 6)).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


@each_config
def test_parameters_written_through_data_take_effect(config: Any) -> None:
    """Averaging tools write ``.data``, which no version counter shows."""
    model, adapter = attached(FAMILIES["mlp"], config)
    x = torch.randn(2, 6)
    with torch.no_grad():
        model(x)
    for parameter in adapter.parameters():
        parameter.data.mul_(1.5)
    with torch.no_grad():
        got = model(x)
    torch.testing.assert_close(got, model(x).detach())


@each_config
def test_functional_transforms(config: Any) -> None:
    """Per-sample gradients by ``torch.func`` equal those of one sample at a time."""
    model, adapter = attached(FAMILIES["mlp"], config)
    keys = {n: p for n, p in model.named_parameters() if SLOT in n.split(".")}
    x = torch.randn(3, 6)

    def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (row,)).pow(2).sum()

    values = {n: p.detach() for n, p in keys.items()}
    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
    for i in range(3):
        model.zero_grad()
        model(x[i]).pow(2).sum().backward()
        for name, parameter in keys.items():
            torch.testing.assert_close(got[name][i], parameter.grad, atol=1e-5, rtol=1e-4)
    assert adapter.name == "default"


@each_config
def test_plain_and_fast_path_agree(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for small in (0, 10**9):
        monkeypatch.setattr(lowrank, "SMALL", small)
        model = mlp().train()
        torch.manual_seed(0)
        adapter = attach(model, _with_dropout(config))
        randomise(adapter.parameters())
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
        torch.manual_seed(5)
        y = model(x)
        y.pow(2).sum().backward()
        results.append([y.detach(), *_gradients(adapter, x)])
    torch.testing.assert_close(results[0], results[1])
