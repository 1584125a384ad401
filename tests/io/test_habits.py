"""Adapter directories as axolotl, LLaMA-Factory and mergekit-extract-lora leave them.

Built after what the tools are known to write: PEFT's files, plus what else lies about. What is
loaded is compared with (α / r) B A of the tensors in float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lorasmith as ls
from lorasmith.errors import AdapterFileError
from lorasmith.fleet import open_members
from tests.io.support import llama

#: PEFT's fields with the nulls and empty ones that configurations of the tools have.
FIELDS: dict[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "./models/base/",
    "bias": "none",
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": None,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 16,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["v_proj", "q_proj"],
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}
PREFIX = "base_model.model."
#: A pickle that fails the test if anybody reads it.
BOMB = b"cbuiltins\nexec\n(S'raise SystemExit(9)'\ntR."


def tensors(
    modules: tuple[str, ...] = ("q_proj", "v_proj"),
    ranks: dict[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    head: bool = False,
) -> dict[str, Tensor]:
    """LoRA tensors for the Llama of the tests, named as PEFT does."""
    made, found = torch.Generator().manual_seed(3), {}
    names = [n for n, _ in llama().named_modules() if n.rpartition(".")[2] in modules]
    for name in [*names, *(["lm_head"] if head else [])]:
        weight = llama().get_submodule(name).weight
        r = (ranks or {}).get(name, 4)
        for side, shape in (("A", (r, weight.shape[1])), ("B", (weight.shape[0], r))):
            value = torch.randn(shape, generator=made) * 0.1
            found[f"{PREFIX}{name}.lora_{side}.weight"] = value.to(dtype)
    return found


def write(folder: Path, values: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**FIELDS, **changes}, indent=2))
    save_file(values, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def check(folder: Path | str, values: dict[str, Tensor], scaling: dict[str, float] | float) -> None:
    """Reads and loads it, and compares every layer's weight with the dense formula."""
    read = ls.read_adapter(folder)
    assert read.unsupported is None
    model, base = llama(), llama()
    ls.load(model, folder)
    ls.fuse(model)
    changed = set()
    for key, value in values.items():
        name, sign, _ = key.removeprefix(PREFIX).partition(".lora_A")
        if sign:
            A, B = value.double(), values[key.replace("lora_A", "lora_B")].double()
            s = scaling if isinstance(scaling, float) else scaling[name]
            want = base.get_submodule(name).weight.double() + s * (B @ A)
            weight = model.get_submodule(name).weight.double()
            assert torch.allclose(weight, want, atol=1e-6), name
            changed.add(name)
    assert changed == set(read.modules)


def test_axolotl(tmp_path: Path) -> None:
    run, values = tmp_path / "out", tensors(("q_proj", "k_proj", "v_proj"))
    targets = ["v_proj", "k_proj", "q_proj"]
    for folder in (run, run / "checkpoint-20", run / "checkpoint-40"):
        write(folder, values, target_modules=targets, lora_alpha=32)
        (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# out\n")
        (folder / "tokenizer.json").write_text("{}")
        (folder / "tokenizer_config.json").write_text("{}")
        (folder / "special_tokens_map.json").write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (run / "checkpoint-40" / name).write_bytes(BOMB)
    (run / "config.json").write_text('{"model_type": "llama"}')
    (run / "merged").mkdir()
    (run / "runs").mkdir()
    check(run, values, 8.0)
    check(run / "checkpoint-40", values, 8.0)
    # A run that was stopped has its checkpoints alone.
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (run / name).unlink()
    with pytest.raises(AdapterFileError, match="several adapters") as caught:
        ls.read_adapter(run)
    assert "checkpoint-20" in str(caught.value)
    assert [m.id for m in open_members(run)] == ["checkpoint-20", "checkpoint-40"]


def test_weights_as_a_pickle_are_never_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "old", tensors())
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(BOMB)
    with pytest.raises(AdapterFileError, match="pickle") as caught:
        ls.read_adapter(folder)
    assert "save it again as safetensors" in str(caught.value)


def test_llama_factory(tmp_path: Path) -> None:
    values = tensors(dtype=torch.bfloat16)
    run = write(tmp_path / "saves", values, peft_version="0.17.1", target_parameters=None)
    for name in ("all_results.json", "train_results.json", "trainer_state.json"):
        (run / name).write_text('{"epoch": 1.0, "train_loss": NaN}')
    (run / "trainer_log.jsonl").write_text("{}\n")
    (run / "training_loss.png").write_bytes(b"\x89PNG")
    (run / "chat_template.jinja").write_text("{{ messages }}")
    (run / "training_args.bin").write_bytes(BOMB)
    check(run, values, 4.0)
    pytest.importorskip("fsspec")
    sent = ls.push(run, (tmp_path / "there").as_uri())
    assert set(sent.left_out) == {"training_args.bin"}
    check(tmp_path / "there", values, 4.0)


def test_llama_factory_with_a_trained_head(tmp_path: Path) -> None:
    # additional_target: modules_to_save of the whole embedding and the head.
    values = tensors()
    base = llama()
    whole = {
        f"{PREFIX}{name}.weight": base.get_submodule(name).weight.detach() + 0.5
        for name in ("model.embed_tokens", "lm_head")
    }
    run = write(tmp_path / "run", {**values, **whole}, modules_to_save=["embed_tokens", "lm_head"])
    read = ls.read_adapter(run)
    assert set(read.saved_modules) == {"model.embed_tokens", "lm_head"}
    model = llama()
    ls.load(model, run)
    tokens = torch.arange(6).reshape(2, 3)
    dense = llama()
    with torch.no_grad():
        for key, value in whole.items():
            dense.get_parameter(key.removeprefix(PREFIX)).copy_(value)
        for key in values:
            name, sign, _ = key.removeprefix(PREFIX).partition(".lora_A")
            if sign:
                B = values[key.replace("lora_A", "lora_B")]
                dense.get_submodule(name).weight.add_(4.0 * (B @ values[key]))
        assert torch.allclose(model(tokens).logits, dense(tokens).logits, atol=1e-4)


def test_mergekit_extract_lora(tmp_path: Path) -> None:
    # An extraction: bfloat16, the rank of each layer its own, alpha equal to it, the head, too.
    names = sorted({k.removeprefix(PREFIX).partition(".lora_")[0] for k in tensors(head=True)})
    ranks = {name: 2 + i % 3 for i, name in enumerate(names)}
    values = tensors(ranks=ranks, dtype=torch.bfloat16, head=True)
    folder = write(
        tmp_path / "extracted",
        values,
        r=4,
        lora_alpha=4,
        target_modules=["lm_head", "q_proj", "v_proj"],
        rank_pattern={n: r for n, r in ranks.items() if r != 4},
        alpha_pattern={n: r for n, r in ranks.items() if r != 4},
    )
    check(folder, values, 1.0)
    read = ls.read_adapter(folder)
    assert {m: read.config.rank_of(m) for m in read.modules} == ranks


def test_mergekit_an_extracted_embedding_is_refused_with_the_reason(tmp_path: Path) -> None:
    made = torch.Generator().manual_seed(5)
    embedding = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.randn(4, 48, generator=made),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": torch.randn(32, 4, generator=made),
    }
    folder = write(
        tmp_path / "extracted",
        {**tensors(), **embedding},
        target_modules=["embed_tokens", "q_proj", "v_proj"],
    )
    read = ls.read_adapter(folder)
    assert set(read.unexpected) == {k.removeprefix(PREFIX) for k in embedding}
    model = llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(AdapterFileError, match="LoRA on an embedding"):
        ls.load(model, folder)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_qalora": True}, "use_qalora"),
    ],
)
def test_what_changes_the_layers_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    folder = write(tmp_path / "a", tensors(), **changes)
    with pytest.raises(AdapterFileError, match=key):
        ls.load(llama(), folder)


def test_full_weights_beside_a_configuration_are_no_adapter(tmp_path: Path) -> None:
    # A merged model saved over the adapter's directory, which trainers do on request.
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(FIELDS))
    save_file({"model.norm.weight": torch.ones(32)}, folder / "model.safetensors")
    with pytest.raises(AdapterFileError, match="no weights"):
        ls.read_adapter(folder)
