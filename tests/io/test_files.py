"""Saving and loading: what must hold, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.errors import (
    AdapterFileError,
    AttachError,
    BaseMismatchError,
    ConfigError,
    LorasmithError,
    UnknownNameError,
)
from lorasmith.io import weights
from tests.io import support
from tests.io.writer import save_often

CONFIG, WEIGHTS, OWN = "adapter_config.json", "adapter_model.safetensors", "lorasmith.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


# -- what must hold ----------------------------------------------------------------------


@pytest.mark.parametrize("variant", support.PLAIN)
def test_every_variant_comes_back_bit_for_bit(variant: str, tmp_path: Path) -> None:
    model = support.llama()
    config = ls.variants()[variant].config_class()
    adapter = support.attached(model, config)
    want = support.logits(model)
    assert ls.save(model, tmp_path / "a") == tmp_path / "a"
    again = support.llama()
    loaded = ls.load(again, tmp_path / "a", trainable=True)
    assert loaded.config == config
    mine, theirs = adapter.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert torch.equal(theirs[key], value)
        assert theirs[key].dtype == value.dtype
    assert torch.equal(support.logits(again), want)
    assert all(p.requires_grad for p in loaded.parameters())
    assert sum(p.requires_grad for p in again.parameters()) == len(list(loaded.parameters()))
    # The same, without a model in between.
    ls.read_adapter(tmp_path / "a").save(tmp_path / "b")
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == (tmp_path / "a" / WEIGHTS).read_bytes()
    third = support.llama()
    ls.load(third, tmp_path / "b")
    assert torch.equal(support.logits(third), want)


@pytest.mark.parametrize("path", ["a\0b", "a\ud800b", "x" * 300, 5, b"a"])
def test_what_cannot_be_a_path(path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = support.llama()
    support.attached(model)
    for call in (
        lambda: ls.save(model, path),
        lambda: ls.read_adapter(path),
        lambda: ls.load(model, path),
        lambda: ls.factors(path),
    ):
        with pytest.raises(AdapterFileError):
            call()
    assert not list(tmp_path.glob("[!.]*"))


def test_special_values_survive(tmp_path: Path) -> None:
    model = support.llama()
    adapter = ls.attach(model, ls.LoRAConfig(r=2, init="pissa", targets="q_proj"))
    part = next(iter(adapter.layers().values()))
    with torch.no_grad():
        part["A"][0, :4] = torch.tensor([-0.0, 1e-45, 3.4e38, -1e-40])
        part["B0"][0, :2] = torch.tensor([-0.0, 0.0])
    ls.save(model, tmp_path / "a")
    loaded = ls.load(support.llama(), tmp_path / "a")
    for key, value in adapter.state_dict().items():
        bits = loaded.state_dict()[key].view(torch.int32)
        assert torch.equal(bits, value.view(torch.int32)), key


def test_the_files_of_an_adapter(tmp_path: Path) -> None:
    path = support.saved(tmp_path / "deep" / "a")
    assert sorted(e.name for e in path.iterdir()) == [CONFIG, WEIGHTS, OWN]
    assert sorted(e.name for e in path.parent.iterdir()) == [".a.lock", "a"]
    from safetensors import safe_open

    with safe_open(path / WEIGHTS, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    record = json.loads((path / OWN).read_text())
    assert record["config"] == ls.LoRAConfig(r=4).to_dict()
    assert record["version"] == ls.__version__
    # safetensors makes files that only their owner can read.
    modes = {file.stat().st_mode for file in path.iterdir()}
    assert len(modes) == 1


def test_one_of_several_adapters_is_saved(tmp_path: Path) -> None:
    model = support.llama()
    support.attached(model, ls.LoRAConfig(r=2), "first")
    support.attached(model, ls.IA3Config(), "second")
    ls.save(model, tmp_path / "active")
    ls.save(model, tmp_path / "named", name="first")
    assert ls.read_adapter(tmp_path / "active").config == ls.IA3Config()
    assert ls.read_adapter(tmp_path / "named").config == ls.LoRAConfig(r=2)
    with pytest.raises(UnknownNameError):
        ls.save(model, tmp_path / "none", name="third")
    with pytest.raises(UnknownNameError):
        ls.save(support.llama(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_fused_adapter_is_saved_as_it_was(tmp_path: Path) -> None:
    model = support.llama()
    support.attached(model)
    want = support.logits(model)
    ls.fuse(model)
    ls.save(model, tmp_path / "a")
    again = support.llama()
    ls.load(again, tmp_path / "a")
    assert torch.equal(support.logits(again), want)
    with pytest.raises(AttachError, match="fused"):
        ls.load(model, tmp_path / "a", name="again")


def test_modules_to_save_come_back_as_copies(tmp_path: Path) -> None:
    model = support.distilbert()
    config = ls.LoRAConfig(r=2, modules_to_save=("classifier", "pre_classifier"))
    support.attached(model, config)
    want = support.logits(model)
    ls.save(model, tmp_path / "a")
    # Another head is what one gets by loading the base anew; it is replaced anyway.
    other = support.distilbert()
    with torch.no_grad():
        other.classifier.weight.normal_()
        other.pre_classifier.bias.normal_()
    loaded = ls.load(other, tmp_path / "a", trainable=True)
    assert torch.equal(support.logits(other), want)
    copies = loaded.saved_modules()
    assert set(copies) == {"classifier", "pre_classifier"}
    assert all(p.requires_grad for c in copies.values() for p in c.parameters())
    with ls.use(other, None):
        assert not torch.equal(support.logits(other), want)


def test_a_bfloat16_base(tmp_path: Path) -> None:
    model = support.llama().to(torch.bfloat16)
    adapter = support.attached(model)
    want = support.logits(model)
    ls.save(model, tmp_path / "a")
    assert ls.read_adapter(tmp_path / "a").dtype == torch.float32
    again = support.llama().to(torch.bfloat16)
    loaded = ls.load(again, tmp_path / "a")
    assert torch.equal(support.logits(again), want)
    full = support.llama()  # a cast of the base is the same base
    ls.load(full, tmp_path / "a")
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert adapter.num_parameters() == loaded.num_parameters()


def test_names_of_loaded_adapters(tmp_path: Path) -> None:
    path = support.saved(tmp_path / "-my adapter v1.2")
    model = support.llama()
    assert ls.load(model, path).name == "default"
    assert ls.load(model, path).name == "my_adapter_v1_2"
    assert ls.load(model, path, name="third").name == "third"
    assert model._lorasmith.active == "third"
    check = support.snapshot(model)
    with pytest.raises(AttachError, match="already"):
        ls.load(model, path)
    for name in ("/etc/passwd", "../up", "a.b", ""):
        with pytest.raises(ConfigError):
            ls.load(model, path, name=name)
    check()
    assert list(ls.attached(model)) == ["default", "my_adapter_v1_2", "third"]


def test_training_goes_on_after_loading(tmp_path: Path) -> None:
    path = support.saved(tmp_path / "a")
    model = support.llama()
    adapter = ls.load(model, path, trainable=True)
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(support.TOKENS, labels=support.TOKENS).loss.backward()
    optimiser.step()
    assert all(not torch.equal(before[k], v) for k, v in adapter.state_dict().items())


def test_loading_onto_the_meta_device(tmp_path: Path) -> None:
    path = support.saved(tmp_path / "a")
    adapter = ls.load(support.llama().to("meta"), path)
    assert all(p.device.type == "cpu" for p in adapter.parameters())
    model = support.llama()
    support.attached(model)
    model.to("meta")
    with pytest.raises(AdapterFileError, match="meta device"):
        ls.save(model, tmp_path / "b")


def test_loading_leaves_random_numbers_alone(tmp_path: Path) -> None:
    path = support.saved(tmp_path / "a", ls.LoRAConfig(r=4, init="pissa"))
    model = support.llama()
    state = torch.random.get_rng_state()
    ls.load(model, path)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = support.llama()
    support.attached(model)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert ls.save(model, tmp_path / "a") == tmp_path / "a"
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    ls.save(model, tmp_path / "a")
    assert (tmp_path / "a" / CONFIG).exists()


# -- saving what or where one must not ---------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_saved(value: float, tmp_path: Path) -> None:
    path = support.saved(tmp_path / "a")
    before = {e.name: e.read_bytes() for e in path.iterdir()}
    model = support.llama()
    adapter = support.attached(model)
    with torch.no_grad():
        adapter.state_dict()["model.layers.1.mlp.up_proj.B"][3, 2] = value
    with pytest.raises(AdapterFileError, match="not finite") as caught:
        ls.save(model, path)
    assert caught.value.key == "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    assert {e.name: e.read_bytes() for e in path.iterdir()} == before


def test_partitioned_tensors_are_not_saved(tmp_path: Path) -> None:
    model = support.llama()
    adapter = support.attached(model)
    next(iter(adapter.parameters())).data = torch.empty(0)
    with pytest.raises(LorasmithError):
        ls.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_other_things_are_not_overwritten(tmp_path: Path) -> None:
    model = support.llama()
    support.attached(model)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, message in (
        ("file", "there is a file"),
        ("folder", "but no adapter"),
        ("dangling", "there is a file"),
    ):
        with pytest.raises(AdapterFileError, match=message):
            ls.save(model, tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert [e.name for e in (tmp_path / "folder").iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    ls.save(model, tmp_path / "empty")
    (tmp_path / "empty" / "README.md").write_text("mine")
    (tmp_path / "empty" / "adapter_model.bin").write_text("of an older generation")
    ls.save(model, tmp_path / "empty")
    assert sorted(e.name for e in (tmp_path / "empty").iterdir()) == [
        "README.md",
        CONFIG,
        WEIGHTS,
        OWN,
    ]


def test_a_full_disk_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = support.saved(tmp_path / "a")
    model = support.llama()
    support.attached(model, ls.LoRAConfig(r=2))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AdapterFileError, match="No space left"):
        ls.save(model, path)
    monkeypatch.undo()
    assert ls.read_adapter(path).config == ls.LoRAConfig(r=4)


# -- files that are wrong ----------------------------------------------------------------


def _drop(key: str) -> Callable[[Path], object]:
    return lambda path: support.edit_tensors(path / WEIGHTS, lambda t: t.pop(key))


def _put(key: str, value: Tensor) -> Callable[[Path], object]:
    return lambda path: support.edit_tensors(path / WEIGHTS, lambda t: t.update({key: value}))


def _map(change: Callable[[Tensor], Tensor], part: str = "lora_A") -> Callable[[Path], object]:
    return lambda path: support.edit_tensors(
        path / WEIGHTS,
        lambda tensors: tensors.update(
            {k: change(t).contiguous() for k, t in tensors.items() if part in k}
        ),
    )


def _both(*steps: Callable[[Path], object]) -> Callable[[Path], object]:
    def run(path: Path) -> None:
        for step in steps:
            step(path)

    return run


def _fields(**changes: Any) -> Callable[[Path], object]:
    return lambda path: support.edit_json(path / CONFIG, **changes)


def _truncate(share: float) -> Callable[[Path], object]:
    def cut(path: Path) -> None:
        data = (path / WEIGHTS).read_bytes()
        (path / WEIGHTS).write_bytes(data[: int(len(data) * share)])

    return cut


def _text(old: str, new: str) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        text = (path / CONFIG).read_text()
        assert old in text
        (path / CONFIG).write_text(text.replace(old, new, 1))

    return edit


def _pickle(path: Path) -> None:
    (path / WEIGHTS).rename(path / "adapter_model.bin")


def _nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[0, 0] = float("nan")
    return tensor


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (_truncate(0.7), "cannot be read"),
    "cut off in the header": (_truncate(0.01), "cannot be read"),
    "empty": (_truncate(0), "cannot be read"),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), "no weights"),
    "no configuration": (lambda p: (p / CONFIG).unlink(), "no adapter"),
    "pickle": (_pickle, "pickle"),
    "a layer without B": (_drop(f"{Q0}.lora_B.weight"), "missing"),
    "a layer less": (
        _both(_drop(f"{Q0}.lora_B.weight"), _drop(f"{Q0}.lora_A.weight")),
        "no tensors for a layer",
    ),
    "more": (_put("base_model.model.extra.weight", torch.ones(2)), "does not use"),
    "base weight": (
        _put("base_model.model.model.embed_tokens.weight", torch.ones(48, 32)),
        "weight of the base model",
    ),
    "adapter name left": (
        _put(f"{Q0}.lora_A.default.weight", torch.ones(4, 32)),
        "adapter's name",
    ),
    "no prefix": (_put("model.x.lora_A.weight", torch.ones(4, 32)), "does not use"),
    "unknown layer": (
        _both(
            _put("base_model.model.model.layers.7.mlp.up_proj.lora_A.weight", torch.ones(4, 32)),
            _put("base_model.model.model.layers.7.mlp.up_proj.lora_B.weight", torch.ones(40, 4)),
        ),
        "does not have",
    ),
    "a layer that cannot be adapted": (
        _both(
            _put("base_model.model.model.norm.lora_A.weight", torch.ones(4, 32)),
            _put("base_model.model.model.norm.lora_B.weight", torch.ones(32, 4)),
        ),
        "cannot adapt",
    ),
    "a magnitude": (_put(f"{Q0}.lora_magnitude_vector", torch.ones(32)), "DoRA"),
    "another rank": (_map(lambda t: t[:3]), "another shape"),
    "another width": (_map(lambda t: t[:, :-1]), "another shape"),
    "three dimensions": (_map(lambda t: t[None]), "shape"),
    "no dimension": (_map(lambda t: t[0, 0]), "shape"),
    "NaN": (_map(_nan), "not finite"),
    "infinite": (_map(lambda t: t * float("inf"), "lora_B"), "not finite"),
    "int8": (_map(lambda t: t.to(torch.int8)), "floating-point"),
    "bool": (_map(lambda t: t.to(torch.bool)), "floating-point"),
    "float8": (_map(lambda t: t.to(torch.float8_e4m3fn)), "data type"),
    "config: rank": (_fields(r=5), "another shape"),
    "config: rank 0": (_fields(r=0), "usable rank"),
    "config: rank as text": (_fields(r="4"), "usable rank"),
    "config: alpha x 1000": (_fields(lora_alpha=16000), "not plausible"),
    "config: alpha as text": (_fields(lora_alpha="16"), "finite number"),
    "config: alpha infinite": (_text('"lora_alpha": 16', '"lora_alpha": Infinity'), "not finite"),
    "config: alpha pattern": (_fields(alpha_pattern={"q_proj": 1e9}), "not plausible"),
    "config: rank pattern": (_fields(rank_pattern={"q_proj": 2}), "another shape"),
    "config: rank pattern of a wrong type": (_fields(rank_pattern=["q_proj"]), "not a mapping"),
    "config: modules to save of a wrong type": (_fields(modules_to_save=7), "impossible type"),
    "config: a bad expression": (_fields(rank_pattern={"(": 2}), "regular expression"),
    "config: dropout": (_fields(lora_dropout=1.5), "probability"),
    "config: fewer targets": (_fields(target_modules=["q_proj"]), "does not name"),
    "config: more targets": (
        _fields(target_modules=["lm_head", *"qkvo", *(f"{c}_proj" for c in "qkvo")]),
        "no tensors for a layer",
    ),
    "config: embeddings": (
        lambda p: support.edit_json(
            p / CONFIG,
            target_modules=[
                *json.loads((p / CONFIG).read_text())["target_modules"],
                "embed_tokens",
            ],
        ),
        "no tensors for a layer",
    ),
    "config: DoRA": (_fields(use_dora=True), "missing"),
    "config: no type": (_fields(peft_type=None), "what kind"),
    "config: unknown type": (_fields(peft_type="HRA2"), "not known"),
    "config: layer replication": (_fields(layer_replication=[[0, 1]]), "layer_replication"),
    "config: a key twice": (_text('"r": 4', '"r": 4, "r": 4'), "twice"),
    "config: a list": (lambda p: (p / CONFIG).write_text("[]"), "JSON object"),
    "config: cut off": (lambda p: (p / CONFIG).write_text('{"r": '), "not valid JSON"),
    "config: binary": (lambda p: (p / CONFIG).write_bytes(b"\x80\x02"), "UTF-8"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_and_the_model_untouched(case: str, tmp_path: Path) -> None:
    path = support.foreign(support.saved(tmp_path / "a"))
    spoil, message = WRONG[case]
    spoil(path)
    model = support.llama()
    support.attached(model, ls.LoRAConfig(r=2), "other")
    model.train()
    want = dict(ls.attached(model))
    check = support.snapshot(model)
    with pytest.raises(AdapterFileError, match=message) as caught:
        ls.load(model, path)
    assert caught.value.file is not None
    assert str(tmp_path) in caught.value.file
    check()
    assert ls.attached(model).keys() == want.keys()
    assert model._lorasmith.active == "other"


@pytest.mark.parametrize("case", [c for c in WRONG if c not in ("no weights", "no configuration")])
def test_one_changed_file_is_of_another_generation(case: str, tmp_path: Path) -> None:
    path = support.saved(tmp_path / "a")
    WRONG[case][0](path)
    with pytest.raises(AdapterFileError):
        ls.load(support.llama(), path)


def test_a_mixture_of_generations_is_refused(tmp_path: Path) -> None:
    old = support.saved(tmp_path / "old", ls.LoRAConfig(r=4, alpha=1))
    new = support.saved(tmp_path / "new", ls.LoRAConfig(r=4, alpha=2, targets="q_proj"))
    for name, other in ((CONFIG, WEIGHTS), (WEIGHTS, CONFIG)):
        mixed = tmp_path / f"mixed-{name}"
        mixed.mkdir()
        for file, source in ((name, new), (other, old), (OWN, old)):
            (mixed / file).write_bytes((source / file).read_bytes())
        with pytest.raises(AdapterFileError, match="different generations") as caught:
            ls.read_adapter(mixed)
        assert caught.value.file == str(mixed / name)


def test_files_replaced_by_another_program_are_read_as_they_are(tmp_path: Path) -> None:
    ours = support.saved(tmp_path / "ours", ls.LoRAConfig(r=4, init="pissa"))
    theirs = support.saved(tmp_path / "theirs", ls.LoRAConfig(r=2))
    for name in (CONFIG, WEIGHTS):
        (ours / name).write_bytes((theirs / name).read_bytes())
    with pytest.warns(UserWarning, match="describes other files"):
        weights = ls.read_adapter(ours)
    assert isinstance(weights.config, ls.LoRAConfig)
    assert (weights.config.r, weights.config.init, weights.frozen) == (2, "kaiming", ())
    assert weights.base.fingerprint is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "format that this version"),
        ({"config": {"variant": "from-the-future"}}, "no variant named"),
        ({"config": {"variant": "lora", "colour": "red"}}, "no field 'colour'"),
        ({"config": [1]}, "malformed"),
        ({"config": ls.LoRAConfig(r=4, alpha=9).to_dict()}, "different adapters"),
        ({"config": ls.DoRAConfig(r=4).to_dict()}, "different adapters"),
        ({"frozen": "A0"}, "malformed"),
        ({"padding": ["classifier.weight"]}, "missing"),
        ({"base": {"fingerprint": {"structure": 1}}}, "cannot be read"),
    ],
)
def test_a_wrong_record_of_ours_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = support.saved(tmp_path / "a")
    support.edit_json(path / OWN, **changes)
    with pytest.raises(AdapterFileError, match=message) as caught:
        ls.read_adapter(path)
    assert caught.value.file is not None


SAVED_WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (_drop("base_model.model.classifier.bias"), "missing"),
    "more": (_put("base_model.model.classifier.scale", torch.ones(1)), "not one of the module's"),
    "shape": (_put("base_model.model.classifier.weight", torch.ones(4, 32)), "does not fit"),
    "dtype": (
        _put("base_model.model.classifier.weight", torch.ones(3, 32, dtype=torch.int64)),
        "does not fit",
    ),
    "NaN": (
        _put("base_model.model.classifier.weight", torch.full((3, 32), float("nan"))),
        "not finite",
    ),
    "no such module": (
        _both(
            _fields(modules_to_save=["classifier", "nowhere"]),
            _put("base_model.model.nowhere.weight", torch.ones(1)),
        ),
        "does not have",
    ),
}


@pytest.mark.parametrize("case", SAVED_WRONG)
def test_wrong_modules_to_save_are_refused(case: str, tmp_path: Path) -> None:
    config = ls.LoRAConfig(r=2, modules_to_save=("classifier",))
    path = support.foreign(support.saved(tmp_path / "a", config, support.distilbert()))
    spoil, message = SAVED_WRONG[case]
    spoil(path)
    model = support.distilbert()
    check = support.snapshot(model)
    with pytest.raises(AdapterFileError, match=message):
        ls.load(model, path)
    check()


# -- the base model ----------------------------------------------------------------------


def test_another_base_is_refused_unless_allowed(tmp_path: Path) -> None:
    path = support.saved(tmp_path / "a")
    model = support.llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.03)
    check = support.snapshot(model)
    with pytest.raises(BaseMismatchError, match=r"weights differ by 3\.0%"):
        ls.load(model, path)
    check()
    ls.load(model, path, allow_base_mismatch=True)
    # An adapter without a fingerprint loads when every tensor fits.
    other = support.llama()
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    ls.load(other, support.foreign(path))


def test_another_depth_is_refused_even_if_allowed(tmp_path: Path) -> None:
    import copy

    path = support.saved(tmp_path / "a")
    deeper = support.llama()
    deeper.model.layers.append(copy.deepcopy(deeper.model.layers[0]))
    check = support.snapshot(deeper)
    with pytest.raises(BaseMismatchError, match="parameters in"):
        ls.load(deeper, path)
    with pytest.raises(AdapterFileError, match="no tensors for a layer"):
        ls.load(deeper, path, allow_base_mismatch=True)
    with pytest.raises(AdapterFileError, match="no tensors for a layer"):
        ls.load(deeper, support.foreign(path))
    check()


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = support.foreign(support.saved(tmp_path / "a"))
    with pytest.raises(AdapterFileError, match="does not have") as caught:
        ls.load(support.gpt2(), path)
    assert caught.value.key == "model.layers.0.mlp.down_proj"


def test_another_name_is_only_a_warning(tmp_path: Path) -> None:
    model = support.llama()
    model.name_or_path = model.config._name_or_path = "someone/base"
    path = support.saved(tmp_path / "a", model=model)
    assert ls.read_adapter(path).base.name == "someone/base"
    other = support.llama()
    other.config._name_or_path = "/home/me/base"
    with pytest.warns(UserWarning, match="'someone/base'.*'/home/me/base'.*Their weights agree"):
        ls.load(other, path)
    with pytest.warns(UserWarning, match="was not checked"):
        ls.load(other, support.foreign(path), name="again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ls.load(support.llama(), path)  # a model that does not know its name


# -- where adapters are ------------------------------------------------------------------


def test_a_path_without_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "missing", "no such adapter"),
        (str(tmp_path / "missing"), "no such adapter"),
        (tmp_path / "empty", "no adapter"),
    ):
        with pytest.raises(AdapterFileError, match=message):
            ls.read_adapter(path)
    path = support.saved(tmp_path / "a")
    with pytest.raises(AdapterFileError, match="is a file") as caught:
        ls.read_adapter(path / WEIGHTS)
    assert caught.value.fix is not None
    assert repr(str(path)) in caught.value.fix


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    path = support.saved(tmp_path / "a")
    asked: list[tuple[str, list[str]]] = []

    def download(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = support.llama()
    ls.load(model, path)
    assert ls.load(model, "someone/nice-adapter").name == "nice-adapter"
    assert asked[0][0] == "someone/nice-adapter"
    assert CONFIG in asked[0][1]
    assert not any("bin" in pattern or pattern == "*" for pattern in asked[0][1])
    assert not [p for p in asked[0][1] if p.endswith(".py")]


def test_an_unreachable_hub_id_says_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterFileError, match="neither a directory nor") as caught:
        ls.read_adapter("runs/adaptr")
    assert "HF_HUB_OFFLINE" in str(caught.value.fix)


def test_an_interrupted_writer_does_not_hide_the_old_generation(tmp_path: Path) -> None:
    path = support.saved(tmp_path / "a")
    path.rename(tmp_path / ".a.0badcafe.old")
    assert ls.read_adapter(path).config == ls.LoRAConfig(r=4)
    assert path.is_dir()


# -- readers and writers at once ---------------------------------------------------------


def test_two_writers_and_a_reader(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_often(path, 1.0, 1)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=save_often, args=(path, a, 40)) for a in (2.0, 3.0)]
    for worker in workers:
        worker.start()
    read = 0
    while any(worker.is_alive() for worker in workers):
        found = ls.read_adapter(path)
        assert isinstance(found.config, ls.LoRAConfig)
        # The configuration that PEFT reads is of the same generation.
        assert found.peft["lora_alpha"] == found.config.alpha
        for factors in found.factors.values():
            assert torch.equal(factors.A, torch.full((2, 6), found.config.alpha))
        read += 1
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert read
    assert sorted(e.name for e in tmp_path.iterdir()) == [".a.lock", "a"]


def test_a_reader_waits_for_a_consistent_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copying program writes file after file; what is read meanwhile is read again."""
    path = support.saved(tmp_path / "a", ls.LoRAConfig(r=4, alpha=1))
    new = support.saved(tmp_path / "b", ls.LoRAConfig(r=4, alpha=2))
    (path / CONFIG).write_bytes((new / CONFIG).read_bytes())
    pauses = []

    def finish(seconds: float) -> None:
        pauses.append(seconds)
        for name in (WEIGHTS, OWN):
            (path / name).write_bytes((new / name).read_bytes())

    monkeypatch.setattr(time, "sleep", finish)
    found = ls.read_adapter(path)
    assert isinstance(found.config, ls.LoRAConfig)
    assert found.config.alpha == 2
    assert pauses


# -- any model ---------------------------------------------------------------------------


class Odd(nn.Module):
    """Numbers, dots and unusual names."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 5)))
        self.lora_A = nn.Linear(5, 5, bias=False)
        self.weight = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.weight(self.lora_A(self.net(x)))
        return out


@pytest.mark.parametrize("variant", support.PLAIN)
def test_models_that_are_not_transformers(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = Odd()
    fresh = Odd()
    fresh.load_state_dict(model.state_dict())
    config_class = ls.variants()[variant].config_class
    options: dict[str, Any] = {"r": 2} if hasattr(config_class, "r") else {}
    support.attached(model, config_class(targets=("0", "lora_A", "weight"), **options))
    x = torch.randn(4, 5)
    ls.save(model, tmp_path / "a")
    loaded = ls.load(fresh, tmp_path / "a")
    assert torch.equal(fresh(x), model(x))
    assert set(loaded.targets) == {"net.0", "net.2.0", "lora_A", "weight"}
    again = Odd()
    again.load_state_dict({k: v for k, v in model.state_dict().items() if "lorasmith" not in k})
    ls.load(again, support.foreign(tmp_path / "a"))
    assert torch.allclose(again(x), model(x), atol=1e-6)


def test_messages_do_not_hide_what_is_wrong(tmp_path: Path) -> None:
    path = support.foreign(support.saved(tmp_path / "a"))
    _fields(r=5)(path)
    with pytest.raises(AdapterFileError) as caught:
        ls.load(support.llama(), path)
    text = str(caught.value)
    for part in (WEIGHTS, "lora_A.weight", r"\[5, ", r"\[4, ", "to fix"):
        assert re.search(part, text), part
    assert weights.MAX_SCALING == 1000


def test_a_smaller_file_that_comes_while_one_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors reads the header, then maps the path again: another file by then."""
    large, small = (
        support.saved(tmp_path / name, ls.LoRAConfig(r=r)) for name, r in (("a", 8), ("b", 2))
    )
    mapped = torch.UntypedStorage.from_file
    waiting = [True]

    def replaced(*arguments: Any, **options: Any) -> Any:
        if waiting.pop() if waiting else False:
            for name in (CONFIG, WEIGHTS, OWN):
                os.replace(small / name, large / name)
        return mapped(*arguments, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", replaced)
    read = ls.read_adapter(large)
    assert not waiting
    assert isinstance(read.config, ls.LoRAConfig)
    assert read.config.r == 2
    assert {f.A.shape[0] for f in read.factors.values()} == {2}
