"""Several adapters on one model, and copies of whole modules."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

import lorasmith as ls
from lorasmith.core.factors import factors_of
from lorasmith.errors import AttachError, ConfigError, TargetError, UnknownNameError
from tests.models import FAMILIES, distilbert_classifier, mlp, randomise, run

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
CONFIGS = {
    "a": ls.LoRAConfig(r=2),
    "b": ls.DoRAConfig(r=3, targets="0"),
    "c": ls.IA3Config(targets="2", modules_to_save=("0",)),
}


def three() -> tuple[torch.nn.Module, dict[str | None, Tensor]]:
    """A model with adapters a, b and c, and what it says with each of them and with none."""
    model = mlp()
    outputs: dict[str | None, Tensor] = {None: model(X).detach()}
    for i, (name, config) in enumerate(CONFIGS.items()):
        randomise(ls.attach(model, config, name=name).parameters(), seed=i)
        outputs[name] = model(X).detach()
    return model, outputs


def test_each_acts_alone() -> None:
    model, outputs = three()
    assert list(ls.attached(model)) == ["a", "b", "c"]
    for name in ("a", None, "c", "b", "a"):
        ls.use(model, name)
        assert torch.equal(model(X), outputs[name])
    assert len({float(y.sum()) for y in outputs.values()}) == 4


def test_a_second_adapter_does_not_freeze_the_first() -> None:
    model, _ = three()
    assert all(p.requires_grad for a in ls.attached(model).values() for p in a.parameters())
    base = [p for n, p in model.named_parameters() if "lorasmith" not in n]
    assert not any(p.requires_grad for p in base)
    ls.use(model, "a")
    model(X).sum().backward()
    assert all(p.grad is not None for p in ls.attached(model)["a"].parameters())
    assert all(p.grad is None for p in ls.attached(model)["b"].parameters())


@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
def test_detaching_in_any_order_restores(order: tuple[str, ...]) -> None:
    reference = mlp()
    reference[0].bias.requires_grad_(False)  # type: ignore[index]
    model = mlp()
    model[0].bias.requires_grad_(False)  # type: ignore[index]
    outputs = {}
    for i, (name, config) in enumerate(CONFIGS.items()):
        randomise(ls.attach(model, config, name=name).parameters(), seed=i)
        outputs[name] = model(X).detach()
    left = list(order)
    while left:
        gone = left.pop(0)
        ls.detach(model, gone)
        for name in left:
            ls.use(model, name)
            assert torch.equal(model(X), outputs[name])
    assert torch.equal(model(X), reference(X))
    assert list(model.state_dict()) == list(reference.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    assert flags == [p.requires_grad for p in reference.parameters()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "_lorasmith" not in model.__dict__


def test_use_as_a_block() -> None:
    model, outputs = three()
    ls.use(model, "a")
    with ls.use(model, None):
        assert torch.equal(model(X), outputs[None])
        with ls.use(model, "b"):
            assert torch.equal(model(X), outputs["b"])
        assert torch.equal(model(X), outputs[None])
    assert torch.equal(model(X), outputs["a"])
    with pytest.raises(ZeroDivisionError), ls.use(model, "c"):
        raise ZeroDivisionError
    assert torch.equal(model(X), outputs["a"])
    with ls.use(model, "c"):
        ls.detach(model, "a")
    assert torch.equal(model(X), outputs["c"])


def test_switching_after_compiling() -> None:
    torch._dynamo.reset()
    model, outputs = three()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for name in ("a", "b", None, "c", "a"):
        ls.use(compiled, name)
        torch.testing.assert_close(compiled(X), outputs[name], atol=1e-5, rtol=1e-5)


def test_names() -> None:
    model, _ = three()
    for wrong in ("", "a b", "a/b", "../x", ".hidden", "-x", "x" * 200, None, 3, "a.b"):
        with pytest.raises(ConfigError):
            ls.attach(model, ls.LoRAConfig(), name=wrong)  # type: ignore[arg-type]
    with pytest.raises(AttachError, match="already has"):
        ls.attach(model, ls.LoRAConfig(), name="a")
    with pytest.raises(UnknownNameError, match="zz"):
        ls.use(model, "zz")
    with pytest.raises(UnknownNameError):
        ls.detach(model, "zz")
    # Names that collide with attributes of nn.Module are fine.
    for fine in ("train", "type", "forward", "weight", "0"):
        ls.attach(model, ls.LoRAConfig(), name=fine)
        ls.use(model, fine)
        model(X)


def test_factors() -> None:
    model, _ = three()
    a = factors_of(model, "a")
    assert set(a) == {"0", "2"}
    part = ls.attached(model)["a"].layers()["0"]
    assert a["0"].A is part["A"]
    assert (a["0"].rank, a["0"].exact, a["0"].scaling) == (2, True, 8.0)
    torch.testing.assert_close(a["0"].delta(), 8.0 * part["B"] @ part["A"])
    assert not factors_of(model, "b")["0"].exact
    with pytest.raises(UnknownNameError, match="No low-rank factors"):
        factors_of(model, "c")
    with pytest.raises(UnknownNameError):
        factors_of(mlp())
    taken = mlp()
    ls.attach(taken, ls.LoRAConfig(r=2, init="pissa"))
    for factors in factors_of(taken).values():
        assert float(factors.delta().abs().max().detach()) < 1e-6
        assert factors.stacked()[0].shape[0] == 4


def test_modules_to_save() -> None:
    model = distilbert_classifier()
    batch = FAMILIES["classifier"].batch()
    expected = run(model, batch)
    config = ls.LoRAConfig(r=2, targets="q_lin", modules_to_save=("pre_classifier", "classifier"))
    adapter = ls.attach(model, config)
    torch.testing.assert_close(run(model, batch), expected)
    assert set(adapter.saved_modules()) == {"pre_classifier", "classifier"}
    before = model.classifier.weight.detach().clone()  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    run(model, batch).pow(2).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    optimizer.step()
    changed = run(model, batch)
    assert not torch.allclose(changed, expected)
    assert torch.equal(model.classifier.weight, before)  # type: ignore[union-attr, arg-type]
    with ls.use(model, None):
        assert torch.equal(run(model, batch), expected)
    ls.fuse(model)
    torch.testing.assert_close(run(model, batch), changed, atol=1e-5, rtol=1e-5)
    ls.detach(model)
    assert torch.equal(run(model, batch), expected)


def test_fusing_one_adapter_while_another_acts_takes_its_own_copies() -> None:
    model = mlp()
    outputs = {}
    for i, name in enumerate("ab"):
        config = ls.LoRAConfig(r=2, targets="0", modules_to_save=("2",))
        randomise(ls.attach(model, config, name=name).parameters(), seed=i)
        outputs[name] = model(X).detach()
    ls.use(model, "a")
    ls.fuse(model, "b")
    torch.testing.assert_close(model(X), outputs["b"], atol=1e-5, rtol=1e-5)
    ls.unfuse(model)
    torch.testing.assert_close(model(X), outputs["b"], atol=1e-5, rtol=1e-5)


def test_modules_to_save_over_a_bf16_base() -> None:
    model = distilbert_classifier().to(torch.bfloat16)
    adapter = ls.attach(model, ls.LoRAConfig(r=2, targets="q_lin", modules_to_save=("classifier",)))
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert run(model, FAMILIES["classifier"].batch()).dtype == torch.bfloat16


def test_modules_to_save_that_do_not_exist() -> None:
    with pytest.raises(TargetError, match="clasifier") as caught:
        ls.attach(distilbert_classifier(), ls.LoRAConfig(modules_to_save=("clasifier",)))
    assert caught.value.fix is not None
    assert "classifier" in caught.value.fix


def test_a_hook_registered_after_unpickling_does_not_replace_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch counts hooks by process: in a new one, ours could be overwritten."""
    model, outputs = three()
    ls.use(model, "a")
    stored, used = pickle.dumps(model), RemovableHandle.next_id
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    again = pickle.loads(stored)  # noqa: S301
    for _ in range(used + 1):
        again[0].register_forward_hook(lambda module, args, output: None)
        again[0].register_forward_pre_hook(lambda module, args: None)
    torch.testing.assert_close(again(X), outputs["a"])


def test_calibration_is_refused_where_nothing_would_look_at_it() -> None:
    with pytest.raises(ConfigError, match="calibration"):
        ls.attach(mlp(), ls.LoRAConfig(), calibration=[X])


def test_a_peft_model_is_refused() -> None:
    model = mlp()
    model.peft_config = {}  # type: ignore[assignment]
    with pytest.raises(AttachError, match="PEFT"):
        ls.attach(model, ls.LoRAConfig())


def test_a_handle_that_outlives_its_adapter_says_so() -> None:
    model = mlp()
    adapter = ls.attach(model, ls.LoRAConfig())
    assert "16" not in repr(adapter) or "parameters" in repr(adapter)
    ls.detach(model)
    assert "detached" in repr(adapter)
    with pytest.raises(AttachError, match="no longer"):
        adapter.num_parameters()
