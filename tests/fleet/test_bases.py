"""One base model: what ties adapters together, and the warning where nothing does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import lorasmith as ls
from lorasmith.errors import AdapterFileError, BaseMismatchError
from lorasmith.fleet import open_members
from lorasmith.fleet.streaming import Stream
from tests.fleet.fleets import SIZES, adapter
from tests.io.support import edit_json, edit_tensors, foreign, llama, saved

Q, UP, Q1 = SIZES
NOTHING = "Nothing tells whether"


def part(*modules: str, seed: int = 0) -> ls.AdapterWeights:
    """An adapter of these layers that knows nothing of its base model."""
    return adapter(2, seed=seed, modules=modules)


def quiet(call: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


def test_without_anything_in_common_there_is_a_warning() -> None:
    strangers = {"a": part(Q), "b": part(UP)}
    for call in (
        lambda **o: open_members(strangers, **o),
        lambda **o: ls.merge(strangers, **o),
        lambda **o: ls.similarity(strangers, **o),
        lambda **o: ls.SharedSubspace.from_adapters(strangers, error=0.0, **o),
        lambda **o: ls.SharedSubspace.from_stream(strangers, error=0.0, **o),
        lambda **o: ls.SharedSubspace.from_stream(
            iter(strangers.values()), error=0.0, basis="share", **o
        ),
    ):
        with pytest.warns(UserWarning, match=rf"{NOTHING} the adapters '.*' and '.*'"):
            call()
        quiet(lambda call=call: call(allow_base_mismatch=True))


def test_layers_tie_directly_and_by_way_of_others() -> None:
    quiet(lambda: open_members({"a": part(Q), "b": part(Q, UP)}))
    quiet(lambda: open_members({"a": part(Q), "b": part(UP), "c": part(Q1), "d": part(Q, UP, Q1)}))
    quiet(lambda: open_members({"a": part(Q)}))
    with pytest.warns(UserWarning, match="'a' and 'c'"):
        open_members({"a": part(Q), "b": part(Q), "c": part(UP), "d": part(UP)})


def test_names_and_fingerprints_tie(tmp_path: Path) -> None:
    q, up = ls.LoRAConfig(r=2, targets=("q_proj",)), ls.LoRAConfig(r=2, targets=("up_proj",))
    one, two = saved(tmp_path / "one", q), saved(tmp_path / "two", up)
    quiet(lambda: open_members([one, two]))  # by their fingerprints
    for path in (one, two):
        edit_json(foreign(path) / "adapter_config.json", base_model_name_or_path=None)
    with pytest.warns(UserWarning, match="'one' and 'two'"):
        open_members([one, two])
    for path in (one, two):
        edit_json(path / "adapter_config.json", base_model_name_or_path="owner/base")
    quiet(lambda: open_members([one, two]))


@pytest.mark.parametrize("basis", ["joint", "share"])
def test_one_more_is_compared_with_the_fleet(basis: Any) -> None:
    def fleet() -> ls.SharedSubspace:
        return ls.SharedSubspace.from_adapters({"a": part(Q), "b": part(Q, seed=1)}, basis=basis)

    for call in (
        lambda f, **o: f.add(part(UP), "c", **o),
        lambda f, **o: f.absorb({"c": part(UP)}, **o),
    ):
        with pytest.warns(UserWarning, match=rf"{NOTHING} the adapter 'c' and those of the fleet"):
            call(fleet(), error=0.0)
        quiet(lambda call=call: call(fleet(), error=0.0, allow_base_mismatch=True))
        quiet(lambda: fleet().add(part(Q, UP), "c", error=0.0))


def test_a_stream_compares_all_with_all(tmp_path: Path) -> None:
    """Only the first one was compared with: two that differ came in behind one without a name."""
    paths = [foreign(saved(tmp_path / n)) for n in ("none", "one", "two")]
    for path, name in zip(paths, (None, "owner/base", "owner/other"), strict=True):
        edit_json(path / "adapter_config.json", base_model_name_or_path=name)
    for sources in (paths, iter(paths)):
        with pytest.raises(BaseMismatchError, match=r"'one' and 'two'.*by their names"):
            ls.SharedSubspace.from_stream(sources)
    stream = Stream(paths[:2], None, False)
    assert len(list(stream)) == 2
    assert stream.base.name == "owner/base"  # it was that of the first one, unknown
    made = ls.SharedSubspace.from_stream(iter(paths[:2]), error=0.0)
    assert made.base.name == "owner/base"


@pytest.mark.parametrize("basis", ["joint", "share"])
@pytest.mark.parametrize("call", ["add", "absorb"])
def test_what_cannot_be_read_leaves_the_fleet_as_it_was(
    basis: Any, call: str, tmp_path: Path
) -> None:
    """Absorbing left empty layers of the adapter that failed, which no model has to have."""
    first = saved(tmp_path / "a", ls.LoRAConfig(r=2, targets=("q_proj",)))
    second = foreign(saved(tmp_path / "b", ls.LoRAConfig(r=2, targets=("q_proj", "up_proj"))))

    def spoil(tensors: dict[str, Any]) -> None:
        last = [k for k in tensors if "up_proj" in k and "lora_B" in k][-1]
        tensors[last][0, 0] = float("nan")

    edit_tensors(second / "adapter_model.safetensors", spoil)
    held = ls.SharedSubspace.from_adapters([first], basis=basis, bits=8)
    modules, errors = held.modules, held.errors
    before = held.reconstruct("a").tensors
    with pytest.raises(AdapterFileError, match="not finite"):
        held.add(second) if call == "add" else held.absorb([second])
    assert (held.ids, held.modules, held.errors) == (("a",), modules, errors)
    assert held.validate() == []
    after = held.reconstruct("a").tensors
    assert all(torch.equal(before[k], after[k]) for k in before)
    held.save(tmp_path / "fleet")


def test_what_is_refused_leaves_no_trace_for_those_after_it(tmp_path: Path) -> None:
    """``validate`` goes on after one that does not belong."""
    from lorasmith.fleet.members import BaseCheck

    other = llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.05)
    paths = [saved(tmp_path / "one"), saved(tmp_path / "odd", model=other), saved(tmp_path / "two")]
    check = BaseCheck()
    one, odd, two = open_members(paths, allow_base_mismatch=True)
    check.add(one)
    with pytest.raises(BaseMismatchError):
        check.add(odd)
    check.add(two)
    quiet(check.warn)
    assert check.base.fingerprint == one.weights.base.fingerprint
