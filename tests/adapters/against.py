"""What the variants are compared with: dense formulas in float64, and HF PEFT's own layers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lorasmith as ls
from tests.models import FAMILIES, llama, randomise, run

__all__ = [
    "LLAMA",
    "dense_weight",
    "equals_formula",
    "files_both_ways",
    "on_qwen",
    "one_layer",
    "same_as_peft",
    "same_dropout_as_peft",
    "saved_by",
    "second_derivatives",
    "theirs",
]

LLAMA = ["q_proj", "v_proj", "up_proj", "down_proj"]
#: Shapes of the seven linear layers of a block of Qwen3-0.6B, (d_in, d_out); 28 blocks.
QWEN = {
    "q_proj": (1024, 2048),
    "k_proj": (1024, 1024),
    "v_proj": (1024, 1024),
    "o_proj": (2048, 1024),
    "gate_proj": (1024, 3072),
    "up_proj": (1024, 3072),
    "down_proj": (3072, 1024),
}


def dense_weight(layer: nn.Module) -> Tensor:
    """W [d_out, d_in], whichever way round the layer stores it."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator, union-attr, assignment]
    return weight.T if type(layer).__name__ == "Conv1D" else weight


def one_layer(kind: str, d_in: int, d_out: int) -> nn.Module:
    """A random ``"linear"`` or ``"conv1d"`` layer with a bias, in float64."""
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Linear(d_in, d_out).double()
    from transformers.pytorch_utils import Conv1D

    made = Conv1D(d_out, d_in)
    nn.init.normal_(made.bias)
    return made.double()


def equals_formula(
    config: Any,
    formula: Callable[[Tensor, Mapping[str, Tensor]], Tensor],
    *,
    kind: str,
    d_in: int,
    d_out: int,
    dense_input: bool = True,
) -> None:
    """Output, gradients, fused weight and first derivatives against ``formula``.

    Args:
        config: The configuration.
        formula: (W [d_out, d_in], tensors) → the adapted weight, in float64.
        kind: ``"linear"`` or ``"conv1d"``.
        d_in: Size of the layer's input.
        d_out: Size of its output.
        dense_input: Whether x needs a gradient.
    """
    base = one_layer(kind, d_in, d_out)
    model = nn.Sequential(base)
    weight, bias = dense_weight(base).clone(), base.bias.detach().clone()  # type: ignore[operator, union-attr]
    adapter = ls.attach(model, config)
    randomise(adapter.parameters(), scale=0.4)
    x = torch.randn(2, 5, d_in, dtype=torch.float64, requires_grad=dense_input)
    weights = torch.randn(2, 5, d_out, dtype=torch.float64)
    y = model(x)
    (y * weights).sum().backward()
    tensors = {
        n.removeprefix("0."): t.double().requires_grad_() for n, t in adapter.state_dict().items()
    }
    z = x.detach().clone().requires_grad_()
    wanted = z @ formula(weight, tensors).T + bias
    (wanted * weights).sum().backward()
    torch.testing.assert_close(y, wanted, atol=1e-6, rtol=1e-6)
    assert (wanted - (z @ weight.T + bias)).abs().max() > 0.05, "the adapter does nothing"
    for name, parameter in adapter.named_parameters():
        want = tensors[name.removeprefix("0.")].grad
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), want, atol=1e-5, rtol=1e-5)
    if dense_input:
        torch.testing.assert_close(x.grad, z.grad, atol=1e-6, rtol=1e-6)
    ls.fuse(model)
    torch.testing.assert_close(
        dense_weight(base), formula(weight, tensors).detach(), atol=1e-6, rtol=1e-6
    )


def second_derivatives(config: Any, d_in: int, d_out: int) -> None:
    """Gradients of gradients by the functions equal those of plain operations' formulas."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d_in, d_out)).double()
    adapter = ls.attach(model, config)
    randomise(adapter.parameters(), scale=0.4)
    for part in adapter.layers().values():
        for name, value in list(part.named_parameters()):
            part._parameters[name] = nn.Parameter(value.detach().double())
    names = [n for n, _ in model.named_parameters() if "lorasmith" in n]
    values = [dict(model.named_parameters())[n].detach().requires_grad_() for n in names]
    x = torch.randn(3, d_in, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, *given: Tensor) -> Tensor:
        for name, value in zip(names, given, strict=True):
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = value  # type: ignore[assignment]
        out: Tensor = model(x)
        return out

    assert torch.autograd.gradcheck(f, (x, *values))
    assert torch.autograd.gradgradcheck(f, (x, *values))


def saved_by(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What one forward keeps for the backward pass, the model's own tensors left out."""
    known = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(x)
    return [t for t in seen if t.data_ptr() not in known]


def theirs(base: nn.Module, config: Any) -> Any:
    """A copy of the model with PEFT's layers."""
    import peft

    with warnings.catch_warnings():  # PEFT uses what Transformers has renamed, and adjusts
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).eval()


def _pairs(
    peft_model: nn.Module, adapter: ls.Adapter, keys: Mapping[str, str]
) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Name → (PEFT's parameter, ours)."""
    mine = dict(adapter.named_parameters())
    found = {}
    for name, parameter in peft_model.named_parameters():
        for ending, part in keys.items():
            if name.endswith(f".{ending}"):
                module = name.removeprefix("base_model.model.").removesuffix(f".{ending}")
                found[f"{module}.{part}"] = (parameter, mine.pop(f"{module}.{part}"))
    assert not mine
    return found


def same_as_peft(
    config: Any, peft_config: Any, keys: Mapping[str, str], *, family: str = "llama"
) -> None:
    """Shapes, logits, gradients and merged weights are those of PEFT.

    Args:
        config: Ours.
        peft_config: The same in PEFT's words.
        keys: End of a name of PEFT's → our tensor.
        family: The model.
    """
    base, batch = FAMILIES[family].build(), FAMILIES[family].batch()
    other = theirs(base, peft_config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # adjusted block sizes
        adapter = ls.attach(base, config)
    pairs = _pairs(other, adapter, keys)
    randomise(p for p, _ in pairs.values())
    with torch.no_grad():
        for their, mine in pairs.values():
            assert their.shape == mine.shape
            mine.copy_(their)
    wanted, got = run(other, batch), run(base, batch)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    weights = torch.randn(wanted.shape)
    (wanted * weights).sum().backward()
    (got * weights).sum().backward()
    for name, (their, mine) in pairs.items():
        assert their.grad is not None
        assert mine.grad is not None
        scale = float(their.grad.abs().max()) + 1e-6
        assert float((mine.grad - their.grad).abs().max()) < 1e-4 * scale, name
    merged = other.merge_and_unload()
    ls.fuse(base)
    torch.testing.assert_close(run(base, batch), run(merged, batch), atol=1e-5, rtol=1e-5)


def same_dropout_as_peft(config: Any, peft_config: Any, keys: Mapping[str, str]) -> None:
    """In training, the same state of the generator drops the same as in PEFT."""
    base = llama()
    other = theirs(base, peft_config)
    pairs = _pairs(other, ls.attach(base, config), keys)
    randomise(p for p, _ in pairs.values())
    with torch.no_grad():
        for their, mine in pairs.values():
            mine.copy_(their)
    batch = FAMILIES["llama"].batch()
    bare = run(base.eval(), batch)
    torch.manual_seed(4)
    wanted = run(other.train(), batch)
    torch.manual_seed(4)
    got = run(base.train(), batch)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert (got - bare).abs().max() > 1e-3, "nothing was dropped"


def files_both_ways(config: Any, peft_config: Any, folder: Path) -> None:
    """PEFT loads what we save and we load what PEFT saves, with the same logits."""
    import peft

    batch = FAMILIES["llama"].batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = llama()
        adapter = ls.attach(model, config)
        randomise(adapter.parameters())
        wanted = run(model, batch)
        ls.save(model, folder / "ours")
        other = peft.PeftModel.from_pretrained(llama(), folder / "ours").eval()
        torch.testing.assert_close(run(other, batch), wanted, atol=1e-5, rtol=1e-5)

        other = theirs(llama(), peft_config)
        randomise(p for p in other.parameters() if p.requires_grad)
        wanted = run(other, batch)
        other.save_pretrained(folder / "theirs")
    again = llama()
    loaded = ls.load(again, folder / "theirs")
    torch.testing.assert_close(run(again, batch), wanted, atol=1e-5, rtol=1e-5)
    # Read back, ours is ours bit for bit, and PEFT's means what we were told.
    mine = llama()
    read = ls.load(mine, folder / "ours")
    assert read.config == config
    for name, value in read.state_dict().items():
        assert torch.equal(value, adapter.state_dict()[name]), name
    assert _own_fields(loaded.config) == _own_fields(config)
    for path in ("ours", "theirs"):
        weights = ls.read_adapter(folder / path)
        for module in weights.modules:
            layer = llama().get_submodule(module)
            change = weights.delta(module, dense_weight(layer), dtype=torch.float64)
            assert change.shape == dense_weight(layer).shape
            assert torch.isfinite(change).all()


def _own_fields(config: Any) -> dict[str, Any]:
    common = ("targets", "exclude", "layers", "modules_to_save", "variant")
    return {k: v for k, v in config.to_dict().items() if k not in common}


def on_qwen(config: Any) -> int:
    """Trainable parameters on the linear layers of one block of Qwen3-0.6B, on meta."""
    with torch.device("meta"):
        block = nn.ModuleDict({n: nn.Linear(*s, bias=False) for n, s in QWEN.items()})
    return ls.attach(block, config).num_parameters()
