"""Adapters without a model."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorasmith as ls
from lorasmith.core.factors import factors_of
from lorasmith.errors import AdapterFileError, UnknownNameError
from lorasmith.io import BaseModel, fingerprint, tensors
from tests.io import support

LAYER = "model.layers.1.self_attn.q_proj"


def test_factors_are_those_of_the_model(tmp_path: Path) -> None:
    model = support.llama()
    support.attached(model, ls.LoRAConfig(r=4, rank_pattern={"q_proj": 2}, init="pissa"))
    ls.save(model, tmp_path / "a")
    live = factors_of(model)
    for source in (
        ls.factors(model),
        ls.factors(tmp_path / "a"),
        ls.factors(str(tmp_path / "a")),
        ls.factors(ls.read_adapter(tmp_path / "a")),
        ls.AdapterWeights.from_model(model).factors,
    ):
        assert source.keys() == live.keys()
        for name, mine in live.items():
            read = source[name]
            assert read.scaling == mine.scaling
            assert mine.A0 is not None
            assert mine.B0 is not None
            for a, b in (
                (read.A, mine.A),
                (read.B, mine.B),
                (read.A0, mine.A0),
                (read.B0, mine.B0),
            ):
                assert a is not None
                assert torch.equal(a, b)
    with pytest.raises(UnknownNameError):
        ls.factors(model, "other")


@pytest.mark.parametrize("variant", support.PLAIN)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_delta_is_what_fusing_adds(variant: str, architecture: str, tmp_path: Path) -> None:
    model = support.MODELS[architecture]()
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    support.attached(model, ls.variants()[variant].config_class())
    ls.save(model, tmp_path / "a")
    ls.fuse(model)
    weights = ls.read_adapter(tmp_path / "a")
    exact = variant in ("lora", "vera")
    for name in weights.modules:
        before, after = base[f"{name}.weight"], model.get_submodule(name).weight.detach()
        if architecture == "gpt2":
            before, after = before.T, after.T
        assert torch.allclose(weights.delta(name, before), after - before, atol=1e-5)
        if exact:
            assert torch.allclose(weights.delta(name), after - before, atol=1e-5)
            assert weights.delta(name, dtype=torch.float64).dtype == torch.float64
        else:
            with pytest.raises(AdapterFileError, match="depends on the base weight"):
                weights.delta(name)
    if not exact:
        with pytest.raises(AdapterFileError, match="another shape"):
            weights.delta(weights.modules[0], torch.ones(3, 3))
    with pytest.raises(UnknownNameError, match="does not adapt"):
        weights.delta("nowhere")


def test_what_there_is_beside_the_factors(tmp_path: Path) -> None:
    model = support.distilbert()
    adapter = support.attached(
        model, ls.DoRAConfig(r=2, targets="q_lin", modules_to_save=("classifier", "pre_classifier"))
    )
    ls.save(model, tmp_path / "a")
    weights = ls.read_adapter(tmp_path / "a")
    layers = [f"distilbert.transformer.layer.{i}.attention.q_lin" for i in range(2)]
    assert weights.modules == tuple(layers)
    assert set(weights.extras) == {
        *(f"{n}.lora_magnitude_vector" for n in layers),
        "classifier.weight",
        "classifier.bias",
        "pre_classifier.weight",
        "pre_classifier.bias",
    }
    head = adapter.saved_modules()["classifier"].state_dict()
    assert torch.equal(weights.extras["classifier.weight"], head["weight"])
    assert weights.saved_modules == {
        "classifier": ("bias", "weight"),
        "pre_classifier": ("bias", "weight"),
    }
    assert weights.num_parameters == adapter.num_parameters()
    assert not weights.factors[layers[0]].exact
    state = weights.state(layers[0])
    assert torch.equal(state["magnitude"], adapter.layers()[layers[0]]["magnitude"])
    assert weights.layers[layers[0]].d_in == 32
    assert "nothing" not in weights.extras
    with pytest.raises(KeyError):
        weights.extras["nothing"]
    assert repr(weights).startswith("AdapterWeights(dora, 2 layers")


def test_gains_have_no_factors(tmp_path: Path) -> None:
    path = support.saved(tmp_path / "a", ls.IA3Config(targets="mlp"))
    weights = ls.read_adapter(path)
    assert len(weights.factors) == 0
    assert all(key.endswith(".ia3_l") for key in weights.extras)
    assert len(weights.extras) == len(weights.modules) == 6
    assert ls.factors(path) == {}


def test_a_snapshot_does_not_follow_the_model() -> None:
    model = support.llama()
    adapter = support.attached(model)
    taken = ls.AdapterWeights.from_model(model)
    before = {k: t.clone() for k, t in taken.tensors.items()}
    support.stir(adapter.parameters())
    assert all(torch.equal(taken.tensors[k], t) for k, t in before.items())
    assert taken.base.fingerprint == fingerprint(model)


def test_reading_is_lazy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = support.saved(tmp_path / "a", ls.DoRAConfig(r=4))
    read: list[str] = []
    original = tensors.FileTensors.__getitem__

    def watched(self: tensors.FileTensors, key: str) -> Tensor:
        read.append(key)
        return original(self, key)

    monkeypatch.setattr(tensors.FileTensors, "__getitem__", watched)
    weights = ls.read_adapter(path)
    assert weights.num_parameters > 0
    assert (len(weights.factors), len(weights.extras)) == (14, 14)
    assert LAYER in weights.factors
    assert weights.dtype == torch.float32
    repr(weights.factors)
    assert read == []
    weights.factors[LAYER]
    assert len(read) == 3
    assert all(LAYER in key for key in read)


def test_a_large_adapter_takes_little_memory(tmp_path: Path) -> None:
    config = ls.LoRAConfig(r=64, targets="q")
    values = {f"{i}.q": {"A": torch.ones(64, 2048), "B": torch.ones(2048, 64)} for i in range(32)}
    ls.AdapterWeights.from_tensors(config, values).save(tmp_path / "a")
    del values
    weights = ls.read_adapter(tmp_path / "a")
    total, sizes = 0.0, []
    for factors in weights.factors.values():
        total += float(factors.A.sum() + factors.B.sum())
        sizes.append(_resident())
    assert total == 32 * 2 * 64 * 2048
    assert (tmp_path / "a" / "adapter_model.safetensors").stat().st_size > 32e6
    # One layer has 1 MB; what is above that is slack of the allocator.
    assert max(sizes) - sizes[0] < 8e6


def _resident() -> int:
    """Bytes of anonymous memory: pages of the mapped file belong to the system's cache."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc here")
    line = next(x for x in status.read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_it_can_be_copied_and_sent_to_another_process(tmp_path: Path) -> None:
    path = support.saved(tmp_path / "a")
    weights = ls.read_adapter(path)
    for twin in (
        pickle.loads(pickle.dumps(weights)),  # noqa: S301
        copy.deepcopy(weights),
    ):
        assert torch.equal(twin.factors[LAYER].A, weights.factors[LAYER].A)
        assert twin.config == weights.config
    data = pickle.dumps(weights)
    a = weights.factors[LAYER].A
    support.saved(path, ls.LoRAConfig(r=3))
    # The generation that was read stays readable; a new process would find another one.
    assert torch.equal(weights.factors[LAYER].A, a)
    with pytest.raises(AdapterFileError, match="replaced"):
        pickle.loads(data)  # noqa: S301
    weights.save(path)
    assert torch.equal(ls.read_adapter(path).factors[LAYER].A, a)


def test_a_file_that_is_written_into_is_not_read_on(tmp_path: Path) -> None:
    path = support.saved(tmp_path / "a")
    weights = ls.read_adapter(path)
    file = path / "adapter_model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(AdapterFileError, match="replaced"):
        weights.factors[LAYER]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_saving_keeps_the_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    config = ls.DoRAConfig(r=2, targets="q", scaling="rslora", alpha=3)
    values = {
        "A": torch.randn(2, 5, dtype=dtype),
        "B": torch.randn(4, 2, dtype=dtype),
        "magnitude": torch.rand(4, dtype=dtype),
    }
    weights = ls.AdapterWeights.from_tensors(config, {"net.q": values})
    weights.save(tmp_path / "a")
    again = ls.read_adapter(tmp_path / "a")
    assert again.config == config
    assert again.dtype == dtype
    for key, value in weights.tensors.items():
        assert torch.equal(again.tensors[key], value)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert again.factors["net.q"].A.dtype == wide
    assert torch.equal(again.factors["net.q"].A, values["A"].to(wide))


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    config = ls.LoRAConfig(r=2, targets="q")
    big = torch.randn(100, 5)
    one, other = torch.randn(4, 2), big[3:5]
    ls.AdapterWeights.from_tensors(
        config, {"0.q": {"A": other, "B": one}, "1.q": {"A": other, "B": one}}
    ).save(tmp_path / "a")
    factors = ls.factors(tmp_path / "a")
    assert torch.equal(factors["1.q"].A, other)
    assert (tmp_path / "a" / "adapter_model.safetensors").stat().st_size < 1000


def test_made_of_tensors_like_another(tmp_path: Path) -> None:
    model = support.gpt2()
    config = ls.LoRAConfig(r=4, targets="c_attn", init="pissa")
    support.attached(model, config)
    origin = ls.AdapterWeights.from_model(model)
    values = {name: dict(origin.state(name).values) for name in origin.modules}
    twin = ls.AdapterWeights.from_tensors(config, values, like=origin)
    assert twin.peft == origin.peft
    assert twin.frozen == ("A0", "B0")
    assert set(twin.tensors) == set(origin.tensors)
    twin.save(tmp_path / "a")
    again = support.gpt2()
    ls.load(again, tmp_path / "a")
    assert torch.equal(support.logits(again), support.logits(model))
    # Another configuration over the same layers: rank 2 instead of 4.
    halved = {n: {"A": v["A"][:2], "B": v["B"][:, :2]} for n, v in values.items()}
    small = ls.AdapterWeights.from_tensors(
        ls.LoRAConfig(r=2, targets="c_attn"), halved, like=origin
    )
    assert small.peft["target_modules"] == origin.peft["target_modules"] == ["c_attn"]
    assert small.peft["fan_in_fan_out"] is True
    assert small.base == origin.base
    small.save(tmp_path / "b")
    ls.load(support.gpt2(), tmp_path / "b")


def test_modules_to_save_without_a_model(tmp_path: Path) -> None:
    config = ls.LoRAConfig(r=2, targets="q_lin", modules_to_save=("classifier", "pre_classifier"))
    model = support.distilbert()
    support.attached(model, config)
    origin = ls.AdapterWeights.from_model(model)
    extras = {k: origin.extras[k] * 2 for k in origin.extras if "classifier" in k}
    values = {name: dict(origin.state(name).values) for name in origin.modules}
    twin = ls.AdapterWeights.from_tensors(config, values, extras=extras, like=origin)
    assert set(twin.saved_modules) == {"classifier", "pre_classifier"}
    assert twin.unexpected == ()
    twin.save(tmp_path / "a")
    adapter = ls.load(support.distilbert(), tmp_path / "a")
    saved = adapter.saved_modules()["classifier"].state_dict()
    assert torch.equal(saved["bias"], extras["classifier.bias"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"A": torch.ones(2, 5)}, "missing"),
        ({"A": torch.ones(3, 5), "B": torch.ones(4, 2)}, "another shape"),
        ({"A": torch.ones(2, 5), "B": torch.ones(4, 3)}, "another shape"),
        ({"A": torch.ones(2), "B": torch.ones(4, 2)}, "another shape"),
        ({"A": torch.ones(2, 5).int(), "B": torch.ones(4, 2)}, "floating-point"),
    ],
)
def test_tensors_must_fit_the_configuration(values: dict[str, Tensor], message: str) -> None:
    with pytest.raises(AdapterFileError, match=message):
        ls.AdapterWeights.from_tensors(ls.LoRAConfig(r=2), {"q": values})
    with pytest.raises(AdapterFileError, match="at least one layer"):
        ls.AdapterWeights.from_tensors(ls.LoRAConfig(r=2), {})


SEGMENT = st.text(
    st.characters(codec="utf-8", exclude_characters=".\x00"),
    min_size=1,
    max_size=6,
)
NAME = st.lists(SEGMENT | st.sampled_from(["lora_A", "weight", "0", "base_model"]), min_size=1)


@given(st.lists(NAME.map(".".join), min_size=1, max_size=4, unique=True), st.integers(1, 3))
def test_any_module_name_survives_the_file(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], rank: int
) -> None:
    folder = tmp_path_factory.mktemp("names")
    config = ls.LoRAConfig(r=rank, targets=tuple(names))
    values = {
        name: {"A": torch.full((rank, 2), float(i)), "B": torch.full((3, rank), -float(i))}
        for i, name in enumerate(names)
    }
    ls.AdapterWeights.from_tensors(config, values, base=BaseModel("some/base")).save(folder / "a")
    again = ls.read_adapter(folder / "a")
    assert set(again.modules) == set(names)
    assert again.config == config
    assert again.base.name == "some/base"
    for name in names:
        assert torch.equal(again.factors[name].A, values[name]["A"])
    # As a stranger would read it: the names in target_modules are exactly the modules.
    plain = ls.read_adapter(support.foreign(folder / "a"))
    assert set(plain.modules) == set(names)


def test_what_was_right_for_one_file_is_not_taken_for_another(tmp_path: Path) -> None:
    """Layouts that were checked are remembered; each thing they depend on is compared."""
    model = support.llama()
    support.attached(model, ls.LoRAConfig(r=4, alpha=8))
    ls.save(model, tmp_path / "a")
    (tmp_path / "a" / "lorasmith.json").unlink()
    read = [ls.read_adapter(tmp_path / "a") for _ in range(2)]
    assert read[0].factors[LAYER].scaling == read[1].factors[LAYER].scaling == 2.0
    config = tmp_path / "a" / "adapter_config.json"
    text = config.read_text()

    def changed(**fields: object) -> ls.AdapterWeights:
        config.write_text(json.dumps(json.loads(text) | fields))
        return ls.read_adapter(tmp_path / "a")

    assert changed(lora_alpha=2).factors[LAYER].scaling == 0.5
    assert changed(fan_in_fan_out=True).layers[LAYER].kind == "conv1d"
    with pytest.raises(AdapterFileError, match="shape"):
        changed(r=8)
    config.write_text(text)
    weights = tmp_path / "a" / "adapter_model.safetensors"
    stored = load_file(weights)
    key = f"base_model.model.{LAYER}.lora_A.weight"
    for wrong in (stored[key][:3], stored[key].to(torch.int32)):
        save_file({**stored, key: wrong.contiguous()}, weights, {"format": "pt"})
        with pytest.raises(AdapterFileError, match=r"shape|floating"):
            ls.read_adapter(tmp_path / "a")
    save_file({k: v for k, v in stored.items() if k != key}, weights, {"format": "pt"})
    with pytest.raises(AdapterFileError, match="missing"):
        ls.read_adapter(tmp_path / "a")
