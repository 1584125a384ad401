"""Every variant through its files: there and back bit for bit, and no slip goes unnoticed."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.errors import AdapterFileError
from tests.contract.configurations import CONFIGURATIONS
from tests.io.support import edit_tensors, foreign, snapshot
from tests.models import FAMILIES, Family, main_output, randomise, run

# A configuration may exclude what only the plain model has.
pytestmark = pytest.mark.filterwarnings("ignore:.*matches no layer of this model:UserWarning")

WEIGHTS, OWN = "adapter_model.safetensors", "lorasmith.json"


def _cases() -> Iterator[Any]:
    for variant, configs in CONFIGURATIONS.items():
        for case, config in configs.items():
            # Of the initialisations of LoRA only some make other tensors.
            if variant in ("lora", "dora") and case not in ("kaiming", "pissa", "eva ranks"):
                continue
            yield pytest.param(config, id=f"{variant}-{case}")


every_config = pytest.mark.parametrize("config", list(_cases()))
each_variant = pytest.mark.parametrize(
    "config", [pytest.param(next(iter(c.values())), id=v) for v, c in CONFIGURATIONS.items()]
)
families = pytest.mark.parametrize(
    "family", [FAMILIES[n] for n in ("mlp", "llama", "gpt2")], ids=lambda f: f.name
)


def exact(config: Any) -> bool:
    """Whether files hold the very tensors; HRA's orthogonal form is written as PEFT's other one."""
    return not getattr(config, "gram_schmidt", False)


def adapted(family: Family, config: Any) -> tuple[nn.Module, ls.Adapter]:
    """A model with an adapter that acts; with data to start from where it needs some."""
    model = family.build()
    more: dict[str, Any] = {}
    if ls.variants()[config.variant].statistics(config):
        more["calibration"] = [family.batch() for _ in range(2)]
        more["calibration_loss"] = lambda output: main_output(output).pow(2).mean()
    adapter = ls.attach(model, config, **more)
    randomise(adapter.parameters())
    return model, adapter


def outputs(model: nn.Module, family: Family) -> Tensor:
    with torch.no_grad():
        return run(model, family.batch()).clone()


@families
@every_config
def test_there_and_back(family: Family, config: Any, tmp_path: Path) -> None:
    model, adapter = adapted(family, config)
    want = outputs(model, family)
    first = ls.save(model, tmp_path / "a")
    again = family.build()
    loaded = ls.load(again, first, trainable=True)
    assert loaded.config == adapter.config
    if not exact(config):
        torch.testing.assert_close(outputs(again, family), want, atol=1e-5, rtol=1e-5)
        return
    mine, theirs = adapter.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert torch.equal(theirs[key], value), key
        assert theirs[key].dtype == value.dtype, key
    assert torch.equal(outputs(again, family), want)
    assert loaded.num_parameters() == adapter.num_parameters()
    assert all(p.requires_grad for p in loaded.parameters())
    # From there on they are the same adapter: the same files, with a model or without one.
    ls.save(again, tmp_path / "b")
    weights = ls.read_adapter(first)
    weights.save(tmp_path / "c")
    ls.AdapterWeights.from_model(again).save(tmp_path / "d")
    for other in "bcd":
        assert (tmp_path / other / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()
    assert weights.num_parameters == adapter.num_parameters()
    assert weights.modules == tuple(sorted(adapter.targets, key=weights.modules.index))
    third = family.build()
    ls.load(third, tmp_path / "c")
    assert torch.equal(outputs(third, family), want)


@every_config
def test_by_the_fields_of_peft_alone(config: Any, tmp_path: Path) -> None:
    if ls.variants()[config.variant].peft_type == "IA3" and config.variant != "ia3":
        pytest.skip("for PEFT it is another variant")
    family = FAMILIES["llama"]
    model, adapter = adapted(family, config)
    want = outputs(model, family)
    ls.save(model, tmp_path / "a")
    again = family.build()
    loaded = ls.load(again, foreign(tmp_path / "a"))
    # What an initialisation took over is part of B A there.
    torch.testing.assert_close(outputs(again, family), want, atol=1e-5, rtol=1e-5)
    assert loaded.targets == adapter.targets


@each_variant
def test_made_of_tensors(config: Any, tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    model, _ = adapted(family, config)
    want = outputs(model, family)
    ls.save(model, tmp_path / "a")
    weights = ls.read_adapter(tmp_path / "a")
    tensors = {m: weights.state(m).values for m in weights.modules}
    for like in (weights, None):
        made = ls.AdapterWeights.from_tensors(weights.config, tensors, like=like, base=weights.base)
        made.save(tmp_path / "b")
        again = family.build()
        ls.load(again, tmp_path / "b")
        torch.testing.assert_close(outputs(again, family), want, atol=1e-6, rtol=1e-6)


@each_variant
def test_the_change_of_a_weight(config: Any, tmp_path: Path) -> None:
    """What the files say of W is what fusing does to it, for W as GPT-2 stores it, too."""
    for family in (FAMILIES["llama"], FAMILIES["gpt2"]):
        model, _ = adapted(family, config)
        base = {n: p.detach().clone() for n, p in model.named_parameters()}
        weights = ls.read_adapter(ls.save(model, tmp_path / family.name))
        if not weights.variant.fusable:
            with pytest.raises(ls.LorasmithError):
                weights.delta(weights.modules[0], base[f"{weights.modules[0]}.weight"])
            continue
        ls.fuse(model)
        for module in weights.modules:
            before, after = base[f"{module}.weight"], model.get_submodule(module).weight.detach()
            if family.name == "gpt2":
                before, after = before.T, after.T
            got = weights.delta(module, before)
            torch.testing.assert_close(got, after - before, atol=1e-5, rtol=1e-5)


def _rebound(folder: Path) -> None:
    """Lets our own file vouch for the files as they are now: only the reader can object."""
    own = folder / OWN
    record = json.loads(own.read_text())
    for name in record["manifest"]:
        data = (folder / name).read_bytes()
        record["manifest"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    own.write_text(json.dumps(record))


def _nan(value: Tensor) -> Tensor:
    value.flatten()[-1] = float("nan")
    return value


_FAULTS: dict[str, Callable[..., object]] = {
    "missing": lambda values, key: values.pop(key),
    "NaN": lambda values, key: values.update({key: _nan(values[key])}),
    "longer": lambda values, key: values.update({key: torch.cat((values[key], values[key][:1]))}),
    "another rank": lambda values, key: values.update({key: values[key][None]}),
    "integers": lambda values, key: values.update({key: values[key].to(torch.int32)}),
    "unexpected": lambda values, key: values.update({f"{key}.extra": values[key].clone()}),
}


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "foreign"])
@every_config
def test_each_fault_in_each_tensor(
    config: Any, ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor of each kind in turn; the model is as it was."""
    # Nobody is writing: a refusal need not wait to see whether somebody is.
    monkeypatch.setattr("lorasmith.io.files._PAUSE", 0.0)
    if not ours and ls.variants()[config.variant].peft_type == "IA3" and config.variant != "ia3":
        pytest.skip("for PEFT it is another variant")
    family = FAMILIES["mlp"]
    model, _ = adapted(family, config)
    folder = ls.save(model, tmp_path / "a")
    file = folder / WEIGHTS
    whole = file.read_bytes()
    if not ours:
        foreign(folder)
    names = list(ls.read_adapter(folder).tensors)
    kinds = {n.rpartition(".2.")[2]: n for n in names}  # those of the last layer
    assert kinds
    fresh = family.build()
    unchanged = snapshot(fresh)
    for fault, change in _FAULTS.items():
        for key in kinds.values():
            file.write_bytes(whole)
            edit_tensors(file, functools.partial(change, key=key))
            if ours:
                _rebound(folder)
            with pytest.raises(AdapterFileError) as caught:
                ls.load(fresh, folder)
            assert caught.value.key is not None or len(names) == 1, (fault, caught.value)
            assert caught.value.file is not None, (fault, caught.value)
    unchanged()


@each_variant
def test_onto_a_model_of_other_sizes(config: Any, tmp_path: Path) -> None:
    family = FAMILIES["mlp"]
    model, _ = adapted(family, config)
    folder = ls.save(model, tmp_path / "a")
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 10))
    unchanged = snapshot(other)
    with pytest.raises(AdapterFileError):
        ls.load(other, folder, allow_base_mismatch=True)
    unchanged()
