"""A checkpoint with adapters fused into it: against the attached adapter, PEFT, dense formulas."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.core.config import AdapterConfig
from lorasmith.errors import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    FuseError,
    LorasmithError,
    ModelError,
)
from lorasmith.export import fused as module
from lorasmith.export.fuse_changes import Changes
from lorasmith.export.fuse_matrix import FusedMatrix
from lorasmith.export.parity import compare
from lorasmith.export.shards import parse_size
from tests.contract.configurations import CONFIGURATIONS
from tests.contract.test_contract import attach
from tests.io.ggufs import write_gguf
from tests.models import gpt2, llama, randomise
from tests.training.tiny import save_tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:Rounding to:UserWarning"),
    # PEFT's, about Transformers.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

IDS = torch.arange(14).reshape(2, 7) % 32
BUILD = {"llama": llama, "gpt2": gpt2}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return cast(Tensor, model(input_ids=IDS).logits)


def loaded(path: Path, dtype: torch.dtype | None = None) -> Any:
    """With Transformers alone, all of it and nothing else."""
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    model, report = load(path, dtype=dtype or "auto", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def left_in(folder: Path) -> list[str]:
    """What a failed call has left: the lock stays, as those of adapters do."""
    return sorted(e.name for e in folder.iterdir() if not e.name.endswith(".lock"))


def made(
    folder: Path, model: nn.Module, config: AdapterConfig, scale: float = 0.2
) -> tuple[Path, Path, nn.Module]:
    """(base, adapter, model with the adapter on it)."""
    model.save_pretrained(folder / "base")
    handle = attach(model, config)
    randomise(handle.parameters(), scale)
    ls.save(model, folder / "adapter")
    return folder / "base", folder / "adapter", model


EVERY = [
    pytest.param(config, id=f"{name}-{case}")
    for name, cases in CONFIGURATIONS.items()
    for case, config in cases.items()
]


@pytest.mark.parametrize("family", BUILD)
@pytest.mark.parametrize("config", EVERY)
def test_every_variant_acts_as_it_did_attached(config: Any, family: str, tmp_path: Path) -> None:
    assert set(CONFIGURATIONS) == set(ls.variants())
    # Some variants (HRA, RoAd, OFT) act on all of W: tied heads are not their targets here.
    base, adapter, model = made(tmp_path, BUILD[family](), config)
    before = tensors(base)
    report = ls.fuse_checkpoint(base, adapter, tmp_path / "out", max_shard_size="4KB", verify=False)
    fused = loaded(tmp_path / "out")
    torch.testing.assert_close(logits(fused), logits(model), atol=2e-5, rtol=2e-5)
    after = tensors(tmp_path / "out")
    assert report.shards > 3
    assert {layer.name for layer in report.layers} == set(ls.attached(model)["default"].targets)
    touched = {f"{layer.name}.{leaf}" for layer in report.layers for leaf in ("weight", "bias")}
    if not report.untied:
        assert set(after) == set(before)
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        if name not in touched:
            assert torch.equal(after[name], value), name


@pytest.mark.parametrize("family", BUILD)
@pytest.mark.parametrize(
    "config",
    [
        ls.LoRAConfig(r=4, alpha=6.0, scaling="rslora", rank_pattern={"0.*": 2}),
        ls.DoRAConfig(r=3, alpha=5.0),
    ],
    ids=["lora", "dora"],
)
def test_float32_is_the_float64_formula(config: Any, family: str, tmp_path: Path) -> None:
    base, adapter, model = made(tmp_path, BUILD[family](), config)
    report = ls.fuse_checkpoint(base, adapter, tmp_path / "out", verify=False)
    before, after = tensors(base), tensors(tmp_path / "out")
    stored = load_file(adapter / "adapter_model.safetensors")
    checked = 0
    for name in ls.attached(model)["default"].targets:
        own = {k.split(f"{name}.")[1]: v for k, v in stored.items() if f".{name}." in k}
        A, B = own["lora_A.weight"].double(), own["lora_B.weight"].double()
        rank = A.shape[0]
        alpha = config.alpha_of(name)
        s = alpha / math.sqrt(rank) if config.scaling == "rslora" else alpha / rank
        weight = before[f"{name}.weight"].double()
        weight = weight.T if family == "gpt2" else weight
        wanted = weight + s * B @ A
        if config.variant == "dora":
            m = own["lora_magnitude_vector"].double()
            wanted = wanted * (m / wanted.norm(dim=1))[:, None]
        got = after[f"{name}.weight"].double()
        got = got.T if family == "gpt2" else got
        assert float((got - wanted).norm() / wanted.norm()) < 1e-7
        assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-7
        layer = next(x for x in report.layers if x.name == name)
        assert layer.delta_norm == pytest.approx(float((wanted - weight).norm()), rel=1e-6)
        assert layer.weight_norm == pytest.approx(float(weight.norm()), rel=1e-6)
        lost = float((got - wanted).norm() / (wanted - weight).norm())
        assert layer.rounding_error == pytest.approx(lost, rel=0.05)
        checked += 1
    assert checked >= 8


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_rounding_costs_is_measured(dtype: str, tmp_path: Path) -> None:
    base, adapter, model = made(tmp_path, llama(), ls.LoRAConfig(r=4), scale=0.02)
    kind = getattr(torch, dtype)
    report = ls.fuse_checkpoint(base, adapter, tmp_path / "out", dtype=dtype, verify=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == report.dtype == dtype
    before, after = tensors(base), tensors(tmp_path / "out")
    assert {v.dtype for v in after.values()} == {kind}
    factors = ls.factors(model)
    for layer in report.layers:
        weight = before[f"{layer.name}.weight"].double()
        delta = factors[layer.name].delta(torch.float64)
        wanted = weight + delta
        got = after[f"{layer.name}.weight"]
        assert torch.equal(got, wanted.to(kind))  # rounded once
        lost = (got.double() - wanted).norm() / delta.norm()
        assert layer.rounding_error == pytest.approx(float(lost), rel=1e-6)
        stuck = (got == weight.to(kind)).double().mean()
        assert layer.unmoved == pytest.approx(float(stuck), abs=1e-12)
    assert report.rounding_error > 1e-3
    untouched = before["model.norm.weight"]
    assert torch.equal(after["model.norm.weight"], untouched.to(kind))


def test_a_change_below_the_steps_of_the_dtype_is_said(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    base, adapter, _ = made(tmp_path, model, ls.LoRAConfig(r=2), scale=1e-4)
    with pytest.warns(UserWarning, match="Rounding to bfloat16 has moved"):
        report = ls.fuse_checkpoint(base, adapter, tmp_path / "out", verify=False)
    assert max(layer.unmoved for layer in report.layers) > 0.5
    report = ls.fuse_checkpoint(base, adapter, tmp_path / "wide", dtype="float32", verify=False)
    assert report.rounding_error < 0.05


def test_a_number_too_large_for_float16_is_an_error(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        cast(Any, model).model.norm.weight.fill_(1e5)
    base, adapter, _ = made(tmp_path, model, ls.LoRAConfig(r=2))
    with pytest.raises(FuseError, match="float16"):
        ls.fuse_checkpoint(base, adapter, tmp_path / "out", dtype="float16", verify=False)
    assert left_in(tmp_path) == ["adapter", "base"]


# PEFT -------------------------------------------------------------------------------------------


def peft_adapter(
    folder: Path, model: nn.Module, config: Any, *, save: dict[str, Any] | None = None
) -> tuple[Path, Path, Any]:
    """(base, adapter, what PEFT's merge gives)."""
    from peft import get_peft_model

    if not (folder / "base").exists():
        model.save_pretrained(folder / "base")
    wrapped = get_peft_model(copy.deepcopy(model), config)
    randomise([p for p in wrapped.parameters() if p.requires_grad])
    wrapped.eval()
    wrapped.save_pretrained(folder / "adapter", **(save or {}))
    return folder / "base", folder / "adapter", wrapped


def peft_configs() -> list[Any]:
    import peft

    linear = ["q_proj", "v_proj", "down_proj"]
    return [
        pytest.param(c, id=i)
        for i, c in {
            "lora": peft.LoraConfig(r=4, target_modules=linear, use_rslora=True),
            "lora-patterns": peft.LoraConfig(
                r=4, target_modules=linear, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}
            ),
            "dora": peft.LoraConfig(r=4, target_modules=linear, use_dora=True),
            "ia3": peft.IA3Config(target_modules=linear, feedforward_modules=["down_proj"]),
            "vera": peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
            "loha": peft.LoHaConfig(r=2, target_modules=linear),
            "lokr": peft.LoKrConfig(r=2, target_modules=linear),
            "oft": peft.OFTConfig(oft_block_size=4, target_modules=linear),
            "hra": peft.HRAConfig(r=4, target_modules=linear),
            "saved": peft.LoraConfig(r=2, target_modules=linear, modules_to_save=["lm_head"]),
            "embedding": peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
            "both ends": peft.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"]),
        }.items()
    ]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("config", peft_configs())
def test_it_is_what_peft_merges(config: Any, tied: bool, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=tied)
    base, adapter, wrapped = peft_adapter(tmp_path, model, config)
    attached = logits(wrapped)
    report = ls.fuse_checkpoint(base, adapter, tmp_path / "out", max_shard_size="2KB")
    assert report.parity is not None
    assert report.parity.drift.max < 1e-4
    ours = loaded(tmp_path / "out")
    torch.testing.assert_close(logits(ours), attached, atol=2e-5, rtol=2e-5)
    ends = {"embed_tokens", "lm_head"} & {
        *config.target_modules,
        *(getattr(config, "modules_to_save", None) or ()),
    }
    assert report.untied == (tied and bool(ends))
    assert ours.config.tie_word_embeddings == (tied and not ends)
    if tied and ends:
        return  # PEFT merges into what is shared, which is another model than it served
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(ours), logits(merged), atol=2e-5, rtol=2e-5)
    theirs = dict(merged.state_dict())
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gpt2_as_peft_merges_it(tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    base, adapter, wrapped = peft_adapter(tmp_path, gpt2(), config)
    ls.fuse_checkpoint(base, adapter, tmp_path / "out")
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out")), logits(merged), atol=2e-5, rtol=2e-5
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rows", [40, 28])
def test_a_resized_vocabulary(tied: bool, rows: int, tmp_path: Path) -> None:
    from peft import LoraConfig

    model = cast(Any, llama(tie_word_embeddings=tied))
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[:].normal_(std=0.2)
    config = LoraConfig(r=2, target_modules=["q_proj"])
    save = {"save_embedding_layers": True}
    base, adapter, wrapped = peft_adapter(tmp_path, model, config, save=save)
    report = ls.fuse_checkpoint(base, adapter, tmp_path / "out")
    ours = loaded(tmp_path / "out")
    assert report.vocabulary == (32, rows)
    assert ours.config.vocab_size == rows
    assert ours.config.tie_word_embeddings == tied
    assert not report.untied
    ids = IDS % 28
    with torch.no_grad():
        wanted = wrapped(input_ids=ids).logits
        got = ours(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)
    assert report.parity is not None
    assert report.parity.drift.max < 1e-4


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_vocabulary_resized_at_one_end_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = cast(Any, llama(tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(40, mean_resizing=False)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    save = {"save_embedding_layers": False}
    base, adapter, _ = peft_adapter(tmp_path, model, config, save=save)
    with pytest.raises(FuseError, match="resized in one end"):
        ls.fuse_checkpoint(base, adapter, tmp_path / "out")
    assert left_in(tmp_path) == ["adapter", "base"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "changes",
    [
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"trainable_token_indices": [1, 2]},
        {"ensure_weight_tying": True, "target_modules": ["embed_tokens"]},
    ],
    ids=lambda c: next(iter(c)),
)
def test_what_cannot_be_fused_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **changes})
    base, adapter, _ = peft_adapter(tmp_path, llama(), config)
    with pytest.raises(LorasmithError):
        ls.fuse_checkpoint(base, adapter, tmp_path / "out")
    assert left_in(tmp_path) == ["adapter", "base"]


# Tied embeddings --------------------------------------------------------------------------------


def test_a_lora_on_a_tied_head_unties_it(tmp_path: Path) -> None:
    config = ls.LoRAConfig(r=2, targets=("lm_head", "q_proj"))
    base, adapter, model = made(tmp_path, llama(), config)
    report = ls.fuse_checkpoint(base, adapter, tmp_path / "out")
    ours = loaded(tmp_path / "out")
    assert report.untied
    torch.testing.assert_close(logits(ours), logits(model), atol=2e-5, rtol=2e-5)
    before, after = tensors(base), tensors(tmp_path / "out")
    assert "lm_head.weight" not in before
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_names_without_a_prefix_get_one_beside_a_new_head(tmp_path: Path) -> None:
    # As the hub has GPT-2: saved without its head.
    model = cast(Any, gpt2())
    model.transformer.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    handle = ls.attach(model, ls.LoRAConfig(r=2, targets=("lm_head", "c_attn")))
    randomise(handle.parameters())
    ls.save(model, tmp_path / "adapter")
    ls.fuse_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out")), logits(model), atol=2e-5, rtol=2e-5
    )


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_saved_end_of_a_tied_model(name: str, tmp_path: Path) -> None:
    config = ls.LoRAConfig(r=2, targets=("q_proj",), modules_to_save=(name,))
    base, adapter, model = made(tmp_path, llama(), config)
    report = ls.fuse_checkpoint(base, adapter, tmp_path / "out")
    assert report.untied
    assert len(report.replaced) == 1
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out")), logits(model), atol=2e-5, rtol=2e-5
    )


def test_an_untouched_copy_keeps_the_tie(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    handle = ls.attach(model, ls.LoRAConfig(r=2, targets=("q_proj",), modules_to_save=("lm_head",)))
    randomise(p for n, p in handle.named_parameters() if "q_proj" in n)
    ls.save(model, tmp_path / "adapter")
    report = ls.fuse_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not report.untied
    assert report.replaced == ()
    assert set(tensors(tmp_path / "out")) == set(tensors(tmp_path / "base"))


def test_ties_that_no_configuration_can_undo_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ls.LoRAConfig(r=2, targets=("lm_head",))
    base, adapter, _ = made(tmp_path, llama(), config)
    monkeypatch.setattr(Changes, "embeddings", lambda self: [])
    with pytest.raises(FuseError, match="share"):
        ls.fuse_checkpoint(base, adapter, tmp_path / "out")
    assert left_in(tmp_path) == ["adapter", "base"]


# Several ----------------------------------------------------------------------------------------


def test_several_with_weights_are_a_mix(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    for i, config in enumerate(
        (ls.LoRAConfig(r=2), ls.DoRAConfig(r=3, targets=("q_proj", "v_proj")))
    ):
        handle = ls.attach(model, config, name=f"a{i}")
        randomise(handle.parameters(), seed=i)
        ls.save(model, tmp_path / f"a{i}", name=f"a{i}")
    weights = {"a0": 0.7, "a1": -0.3}
    ls.use(model, weights)
    report = ls.fuse_checkpoint(
        tmp_path / "base",
        {os.fspath(tmp_path / n): w for n, w in weights.items()},
        tmp_path / "out",
    )
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out")), logits(model), atol=2e-5, rtol=2e-5
    )
    assert report.parity is not None
    assert report.parity.drift.max < 1e-4
    assert [w for _, w in report.adapters] == [0.7, -0.3]


@pytest.mark.parametrize("saved", [(), ("lm_head",)])
def test_weight_0_is_the_base_bit_for_bit(saved: tuple[str, ...], tmp_path: Path) -> None:
    config = ls.DoRAConfig(r=2, modules_to_save=saved)
    base, adapter, _ = made(tmp_path, llama(), config)
    report = ls.fuse_checkpoint(base, {os.fspath(adapter): 0.0}, tmp_path / "out")
    before, after = tensors(base), tensors(tmp_path / "out")
    assert set(before) == set(after)
    assert all(torch.equal(after[n], v) for n, v in before.items())
    assert report.layers == ()
    assert report.parity is not None
    assert report.parity.drift.max == 0.0


def test_whole_modules_are_not_mixed(tmp_path: Path) -> None:
    config = ls.LoRAConfig(r=2, modules_to_save=("lm_head",))
    base, adapter, _ = made(tmp_path, llama(), config)
    with pytest.raises(FuseError, match="not mixed"):
        ls.fuse_checkpoint(base, {os.fspath(adapter): 0.5}, tmp_path / "out")
    for weight in (math.nan, "1", True):
        with pytest.raises(ConfigError):
            ls.fuse_checkpoint(base, cast(Any, {os.fspath(adapter): weight}), tmp_path / "out")


# Files ------------------------------------------------------------------------------------------


def test_shards_and_index(tmp_path: Path) -> None:
    base, adapter, _ = made(tmp_path, llama(layers=4), ls.LoRAConfig(r=2))
    limit = 4000
    report = ls.fuse_checkpoint(base, adapter, tmp_path / "out", max_shard_size=limit, verify=False)
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(names) == report.shards > 3
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    total, seen = 0, {}
    for name in names:
        with safe_open(out / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            sizes = [file.get_tensor(k).numel() * 4 for k in file.keys()]  # noqa: SIM118
            assert sum(sizes) <= limit or len(sizes) == 1
            total += sum(sizes)
            seen |= dict.fromkeys(file.keys(), name)
    assert index["weight_map"] == seen
    assert index["metadata"]["total_size"] == total == report.nbytes
    assert sorted(report.files) == sorted(e.name for e in out.iterdir())
    assert json.loads((out / "fuse_report.json").read_text()) == json.loads(
        json.dumps(report.to_dict())
    )


def test_numbers_of_several_widths_stay_what_they_are(tmp_path: Path) -> None:
    base, adapter, _ = made(tmp_path, llama(), ls.LoRAConfig(r=2, targets=("q_proj",)))
    values = load_file(base / "model.safetensors")
    values["model.norm.weight"] = values["model.norm.weight"].to(torch.bfloat16)
    values["odd"] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    values["scalar"] = torch.tensor(3, dtype=torch.int64)
    values["empty"] = torch.empty(0, 4)
    values["eight"] = torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn)
    save_file(values, base / "model.safetensors", metadata={"format": "pt"})
    ls.fuse_checkpoint(base, adapter, tmp_path / "out", verify=False)
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in values.items():
        assert after[name].dtype == value.dtype
        if "q_proj" not in name:
            assert torch.equal(
                after[name].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)
            )


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("300", 300), (7, 7)]
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5 apples", "-1", "0", 0, True, "iB"])
def test_no_sizes(text: Any) -> None:
    with pytest.raises(ConfigError):
        parse_size(text)


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    (base / "generation_config.json").write_text('{"max_new_tokens": 5}')
    (base / "secret.bin").write_bytes(b"x")
    model = cast(Any, loaded(base))
    handle = ls.attach(model, ls.LoRAConfig(r=2))
    randomise(handle.parameters(), 0.05)
    ls.save(model, tmp_path / "adapter")
    report = ls.fuse_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert not (tmp_path / "out" / "secret.bin").exists()
    assert report.tokenizer == "base"
    assert report.parity is not None
    assert report.parity.source == "built-in"
    given = ls.fuse_checkpoint(
        base, tmp_path / "adapter", tmp_path / "two", prompts=["Count to 5."], dtype="bfloat16"
    )
    assert given.parity is not None
    assert (given.parity.source, given.parity.prompts) == ("given", 1)
    assert given.parity.attached_error.max > 0
    # The adapter's own tokenizer was trained with; one with more tokens than rows is refused.
    for file in base.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "adapter")
    report = ls.fuse_checkpoint(base, tmp_path / "adapter", tmp_path / "three", verify=False)
    assert report.tokenizer == "adapter"
    fields = json.loads((tmp_path / "adapter" / "tokenizer.json").read_text())
    fields["added_tokens"].append({**fields["added_tokens"][-1], "id": 9999, "content": "<new>"})
    (tmp_path / "adapter" / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(FuseError, match="no embedding"):
        ls.fuse_checkpoint(base, tmp_path / "adapter", tmp_path / "four", verify=False)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@pytest.mark.filterwarnings("ignore:The GGUF file gives no tokenizer:UserWarning")
def test_a_gguf_file(kind: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    model = llama(**sizes)
    file = write_gguf(model, tmp_path / "m.gguf", "llama", kind=kind)
    model.config._name_or_path = os.fspath(file)  # type: ignore[union-attr]
    handle = ls.attach(model, ls.LoRAConfig(r=2))
    randomise(handle.parameters(), 0.05)
    ls.save(model, tmp_path / "adapter")
    report = ls.fuse_checkpoint(
        file, tmp_path / "adapter", tmp_path / "out", dtype="float32", allow_base_mismatch=True
    )
    assert report.parity is not None
    assert report.parity.drift.max < 1e-4
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out")),
        logits(model),
        atol={"F32": 1e-4, "F16": 0.02, "Q8_0": 0.3}[kind],
        rtol=1e-4,
    )
    auto = ls.fuse_checkpoint(
        file, tmp_path / "adapter", tmp_path / "auto", verify=False, allow_base_mismatch=True
    )
    assert auto.dtype == {"F32": "float32", "F16": "float16", "Q8_0": "bfloat16"}[kind]


@pytest.mark.parametrize("architecture", ["gemma2", "nemotron", "qwen2", "gpt2"])
def test_vectors_of_gguf_files_are_what_transformers_reads(architecture: str) -> None:
    # The table of architectures whose norms are stored as 1 + w is Transformers' own.
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS

    from lorasmith.io.gguf import _ONE_MORE

    processor: Any = TENSOR_PROCESSORS.get(architecture)
    import numpy as np

    name, value = "blk.0.attn_norm.weight", np.ones(4, dtype=np.float32)
    got = (
        value
        if processor is None
        else processor(config={})
        .process(value, name, tensor_key_mapping={}, parsed_parameters={"tensors": {}})
        .weights
    )
    assert bool((got == 0).all()) == (architecture in _ONE_MORE)


# Refusals ---------------------------------------------------------------------------------------


def test_nothing_is_overwritten_unless_told(tmp_path: Path) -> None:
    base, adapter, _ = made(tmp_path, llama(), ls.LoRAConfig(r=2))
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="no earlier fusing"):
            ls.fuse_checkpoint(base, adapter, out, verify=False, overwrite=overwrite)
    assert left_in(out) == ["mine.txt"]
    for place in (base, adapter):
        with pytest.raises(ConfigError, match="take the place"):
            ls.fuse_checkpoint(base, adapter, place, verify=False, overwrite=True)
    with pytest.raises(ConfigError, match="a file under that path"):
        ls.fuse_checkpoint(base, adapter, base / "config.json", verify=False)
    (out / "mine.txt").unlink()
    ls.fuse_checkpoint(base, adapter, out, verify=False, max_shard_size="2KB")
    (out / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="overwrite"):
        ls.fuse_checkpoint(base, adapter, out, verify=False)
    report = ls.fuse_checkpoint(base, adapter, out, verify=False, overwrite=True)
    # The shards of the earlier one are gone, what is not ours is there.
    assert left_in(out) == sorted([*report.files, "mine.txt"])
    assert report.shards == 1


def test_failures_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter, _ = made(tmp_path, llama(), ls.LoRAConfig(r=2))

    def fails(error: type[LorasmithError], words: str, **arguments: Any) -> None:
        with pytest.raises(error, match=words):
            ls.fuse_checkpoint(
                base, arguments.pop("adapter", adapter), tmp_path / "out", **arguments
            )
        assert left_in(tmp_path) == sorted({"adapter", "base", *extra})

    extra: list[str] = []
    fails(ConfigError, "dtype", dtype="int8")
    fails(ConfigError, "size", max_shard_size="big")
    # A disk that is full before, and one that fills up while writing.
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))  # type: ignore[attr-defined]
        fails(FuseError, "not enough room")
    written = module.write_shards

    def full(folder: Path, *rest: Any) -> None:
        written(folder, *rest)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shards", full)
        fails(FuseError, "could not be written", verify=False)
    with monkeypatch.context() as patch:
        patch.setattr(module, "measure", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ls.fuse_checkpoint(base, adapter, tmp_path / "out")
        assert left_in(tmp_path) == ["adapter", "base"]
    # An adapter of another base, one with a number that is none, one that is too large.
    wrong = llama(seed=1)
    handle = ls.attach(wrong, ls.LoRAConfig(r=2))
    randomise(handle.parameters())
    ls.save(wrong, tmp_path / "wrong")
    extra.append("wrong")
    fails(BaseMismatchError, "another base", adapter=tmp_path / "wrong")
    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    (broken / "lorasmith.json").unlink()
    values = load_file(broken / "adapter_model.safetensors")
    key = sorted(values)[-1]
    values[key][0, 0] = math.nan
    save_file(values, broken / "adapter_model.safetensors")
    extra.append("broken")
    fails(AdapterFileError, "finite", adapter=broken)
    values[key] = torch.full_like(values[key], 3e38)
    save_file(values, broken / "adapter_model.safetensors")
    fails(FuseError, "not finite", adapter=broken)
    values[key] = values[key][:, :-1].contiguous()
    save_file(values, broken / "adapter_model.safetensors")
    fails(AdapterFileError, "shape", adapter=broken)


def test_input_dependent_variants_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, _ = made(tmp_path, llama(), ls.LoRAConfig(r=2))
    monkeypatch.setattr(type(ls.variants()["lora"]), "fusable", False)
    with pytest.raises(FuseError, match="depends on the input"):
        ls.fuse_checkpoint(base, adapter, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:The adapter names:UserWarning")
def test_a_quantised_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    save_tiny(tmp_path / "plain")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=config, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "base")
    handle = ls.attach(model, ls.LoRAConfig(r=2, targets=("q_proj", "v_proj", "down_proj")))
    randomise(handle.parameters(), 0.05)
    ls.save(model, tmp_path / "adapter")
    with pytest.raises(ModelError, match="quantised"):
        ls.fuse_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    # Onto the checkpoint that it was quantised from, and onto itself, unpacked.
    ls.fuse_checkpoint(tmp_path / "plain", tmp_path / "adapter", tmp_path / "one")
    report = ls.fuse_checkpoint(
        tmp_path / "base",
        tmp_path / "adapter",
        tmp_path / "out",
        dtype="float32",
        dequantize=True,
    )
    ours = loaded(tmp_path / "out")
    assert not hasattr(ours.config, "quantization_config")
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-3, rtol=1e-3)
    assert report.parity is not None


def test_an_unknown_class_is_fused_by_names(tmp_path: Path) -> None:
    base, adapter, model = made(tmp_path, llama(tie_word_embeddings=False), ls.LoRAConfig(r=2))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({**config, "model_type": "mine", "architectures": ["M"]})
    )
    with (
        pytest.warns(UserWarning, match="not known"),
        pytest.raises(ConfigError, match="no-verify"),
    ):
        ls.fuse_checkpoint(base, adapter, tmp_path / "out", allow_base_mismatch=True)
    with pytest.warns(UserWarning, match="not known"):
        ls.fuse_checkpoint(base, adapter, tmp_path / "out", allow_base_mismatch=True, verify=False)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out")), logits(model), atol=2e-5, rtol=2e-5
    )


# Figures ----------------------------------------------------------------------------------------


def test_drift_is_what_its_words_say() -> None:
    one = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    two = torch.tensor([[0.0, 1.0, 2.5], [0.0, 3.0, 0.0]])
    found = compare([one], [two])
    assert found.max == 3.0
    assert found.mean == pytest.approx((0.5 + 3 + 3) / 6)
    p, q = torch.softmax(one.double(), -1), torch.softmax(two.double(), -1)
    kl = (p * (p / q).log()).sum(-1)
    assert found.kl == pytest.approx(float(kl.mean()))
    assert found.max_kl == pytest.approx(float(kl.max()))
    assert found.agreement == 0.5
    with pytest.raises(FuseError, match="finite"):
        compare([one], [two / 0])


def test_a_model_that_is_not_what_it_should_be_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, _ = made(tmp_path, llama(), ls.LoRAConfig(r=2))
    real = FusedMatrix._low_rank

    def wrong(self: Any) -> Any:
        found = real(self)
        assert found is not None
        return found[0] * 1.1, found[1]

    monkeypatch.setattr(FusedMatrix, "_low_rank", wrong)
    with pytest.warns(UserWarning, match="further from base"):
        report = ls.fuse_checkpoint(base, adapter, tmp_path / "out")
    assert report.parity is not None
    assert not report.parity.within


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_stays_below_twice_a_shard(dtype: str, tmp_path: Path) -> None:
    # In a process of its own: 300 MB (150 MB) in files of 60 MB (30 MB).
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc/self/clear_refs on this system")
    shard = {"float32": 60, "bfloat16": 30}[dtype] * 10**6
    base = llama(hidden_size=1024, intermediate_size=2816, layers=6, vocab_size=64)
    base.to(getattr(torch, dtype)).save_pretrained(tmp_path / "base", max_shard_size=shard)
    handle = ls.attach(base, ls.LoRAConfig(r=4))
    randomise(handle.parameters(), 0.01)
    ls.save(base, tmp_path / "adapter")
    llama().save_pretrained(tmp_path / "small")
    small = llama()
    ls.attach(small, ls.LoRAConfig(r=2))
    ls.save(small, tmp_path / "small-adapter")
    code = f"""
        import lorasmith as ls
        def rss(key):
            text = open("/proc/self/status").read()
            return int(text.split(key)[1].split()[0]) * 1024
        def run(one, two, out):
            return ls.fuse_checkpoint(one, two, out, max_shard_size={shard}, verify=False)
        where = {os.fspath(tmp_path)!r}
        run(where + "/small", where + "/small-adapter", where + "/o1")  # imports
        open("/proc/self/clear_refs", "w").write("5")
        before = rss("VmRSS:")
        report = run(where + "/base", where + "/adapter", where + "/o2")
        assert report.shards >= 5 and report.nbytes > 4 * {shard}, report
        print(rss("VmHWM:") - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 * shard
