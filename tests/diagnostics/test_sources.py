"""Where weights are read from: checkpoints, models, adapters, names."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lorasmith as ls
from lorasmith.core.layers import describe, read_weight
from lorasmith.errors import (
    AdapterFileError,
    ConfigError,
    FuseError,
    LorasmithError,
    ModelError,
)
from lorasmith.io.sources import CheckpointWeights, ModelWeights, align
from tests.models import distilbert, distilbert_classifier, gpt2, llama, randomise


def dense(model: nn.Module) -> dict[str, torch.Tensor]:
    infos = ((n, m, describe(m, n)) for n, m in model.named_modules())
    return {n: read_weight(m, i) for n, m, i in infos if i is not None}


@pytest.mark.parametrize("build", [llama, gpt2, distilbert, distilbert_classifier])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_gives_the_model_s_weights(
    build: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = build().to(dtype)
    model.save_pretrained(tmp_path)
    found, wanted = CheckpointWeights(tmp_path, "it"), dense(model)
    assert list(found.layers) == list(wanted)
    assert found.problems == {}
    for name, matrix in found.layers.items():
        assert torch.equal(matrix.read(), wanted[name])
        assert (matrix.d_out, matrix.d_in) == tuple(wanted[name].shape)
        assert matrix.dtype == dtype
        stored = torch.cat([block.clone() for block in matrix.blocks(3)])
        assert torch.equal(stored.T if matrix.transposed else stored, wanted[name])
    in_memory = ModelWeights(model)
    assert list(in_memory.layers) == list(found.layers)
    assert in_memory.layouts == found.layouts
    assert in_memory.heads == found.heads


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=False)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    base.save_pretrained(tmp_path / "whole")
    tuned.save_pretrained(tmp_path / "tuned")
    tuned.save_pretrained(tmp_path / "shards", max_shard_size="2KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    one = ls.diagnose(tmp_path / "whole", tmp_path / "tuned")
    two = ls.diagnose(tmp_path / "whole", tmp_path / "shards")
    assert one.units == two.units
    assert "lm_head" in {u.name for u in one.units}
    (tmp_path / "shards" / "model-00002-of-00005.safetensors").unlink(missing_ok=True)
    next(iter((tmp_path / "shards").glob("*.safetensors"))).unlink()
    with pytest.raises(ModelError, match="shard"):
        ls.diagnose(tmp_path / "whole", tmp_path / "shards")


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    found = CheckpointWeights(tmp_path, "it")
    assert found.heads == {"lm_head"}
    assert torch.equal(found.layers["lm_head"].read(), model.model.embed_tokens.weight)
    # As a layer that did not change it is no news.
    assert ls.diagnose(tmp_path, model).unchanged == 14


@pytest.mark.parametrize("build", [llama, gpt2])
def test_with_and_without_the_head(build: Any, tmp_path: Path) -> None:
    model = build()
    tuned = copy.deepcopy(model)
    for name, weight in dense(tuned).items():
        if name != "lm_head":
            with torch.no_grad():
                weight.add_(0.1 * torch.randn_like(weight))
    inner = tuned.base_model
    inner.save_pretrained(tmp_path / "inner")
    one = ls.diagnose(model, tuned)
    for other in (tmp_path / "inner", inner):
        two = ls.diagnose(model, other)
        assert two.units == one.units
        assert [(s.name, s.reason) for s in two.skipped] == [("lm_head", "missing")]
    # The other way round, and where the file has no prefix for a class that has one.
    assert ls.diagnose(inner, model).units
    config = json.loads((tmp_path / "inner" / "config.json").read_text())
    config["architectures"] = [type(model).__name__]
    (tmp_path / "inner" / "config.json").write_text(json.dumps(config))
    assert ls.diagnose(model, tmp_path / "inner").units[: len(one.units)] == one.units


def test_names_meet_over_one_prefix() -> None:
    ours = [f"model.layers.{i}.q" for i in range(3)] + ["lm_head"]
    theirs = [f"language_model.model.layers.{i}.q" for i in range(3)] + ["vision.q"]
    assert align(ours, theirs) == {o: f"language_model.{o}" for o in ours[:3]}
    assert align(theirs, ours) == {f"language_model.{o}": o for o in ours[:3]}
    assert align(ours, ours) == {o: o for o in ours}
    assert align(["a.b"], ["c.d"]) == {}


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickle").mkdir()
    for name in ("pickle", "cut", "quantised"):
        llama().save_pretrained(tmp_path / name)
    weights = tmp_path / "pickle" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    cut = tmp_path / "cut" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    config = tmp_path / "quantised" / "config.json"
    fields = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    config.write_text(json.dumps(fields))
    for name, words in (
        ("empty", "does not hold a model"),
        ("pickle", "pickle"),
        ("cut", "cannot be read"),
        ("quantised", "quantised"),
        ("nowhere", "no model at that path"),
    ):
        with pytest.raises(ModelError, match=words):
            ls.diagnose(model, tmp_path / name)
    with pytest.raises(LorasmithError, match="not cached"):
        ls.diagnose(model, "nobody/nothing")


def test_a_checkpoint_that_changes_meanwhile_is_an_error(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    found = CheckpointWeights(tmp_path, "it")
    llama(seed=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="replaced"):
        next(iter(found.layers.values())).read()


def test_an_adapter_alone_is_compared_with_the_base_that_it_names(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    randomise(ls.attach(model, ls.LoRAConfig(r=2)).parameters())
    ls.save(model, tmp_path / "one")
    ls.detach(model, "default")
    randomise(ls.attach(model, ls.LoRAConfig(r=2)).parameters(), seed=7)
    ls.save(model, tmp_path / "two")
    assert ls.diagnose(tmp_path / "two").units == ls.diagnose(model).units
    # Two adapters of one base: from what one made to what the other made.
    between = ls.diagnose(tmp_path / "one", tmp_path / "two")
    name = between.units[0].name
    weights = [
        ls.read_adapter(tmp_path / n).delta(name, dtype=torch.float64) for n in ("one", "two")
    ]
    base = dense(llama())[name].double()
    one, two = base + weights[0], base + weights[1]
    whole = between.by_module[name]
    assert whole.relative_change == pytest.approx(float((two - one).norm() / one.norm()), rel=1e-9)
    fields = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(tmp_path / "base")


def test_several_adapters_need_a_name() -> None:
    model = llama()
    randomise(ls.attach(model, ls.LoRAConfig(r=2), name="a").parameters())
    randomise(ls.attach(model, ls.LoRAConfig(r=2), name="b").parameters(), scale=0.5)
    one, two = (ls.diagnose(model, adapter=n) for n in "ab")
    assert two.theta_bar_deg > one.theta_bar_deg
    with pytest.raises(LorasmithError, match="'c'"):
        ls.diagnose(model, adapter="c")


def test_meta_weights_are_refused_with_a_reason(tmp_path: Path) -> None:
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(llama().config)
    with pytest.raises(ModelError, match="no values"):
        ls.diagnose(empty, llama())


def test_what_lorasmith_cannot_fuse_or_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterFileError):
        ls.diagnose(llama(), tmp_path)
    model = llama()
    with pytest.raises(ConfigError, match="nothing to compare"):
        ls.diagnose(model, None)


@pytest.mark.parametrize("kind", ["checkpoint", "adapter"])
def test_memory_stays_below_twice_the_largest_tensor(kind: str, tmp_path: Path) -> None:
    # In a process of its own: 56 weights, the largest of 8 MB, of which two may be there at a time.
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc/self/clear_refs on this system")
    largest = 2048 * 1024 * 4
    base = llama(hidden_size=1024, intermediate_size=2048, layers=8, vocab_size=64)
    base.save_pretrained(tmp_path / "base")
    allowed = 2 * largest
    if kind == "adapter":
        handle = ls.attach(base, ls.LoRAConfig(r=2))
        randomise(handle.parameters())
        ls.save(base, tmp_path / "tuned")
        allowed += sum(4 * p.numel() for p in handle.parameters())
    else:
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(0.001 * torch.randn_like(parameter))
        base.save_pretrained(tmp_path / "tuned")
    code = f"""
        import lorasmith as ls
        def rss(key):
            text = open("/proc/self/status").read()
            return int(text.split(key)[1].split()[0]) * 1024
        pair = {str(tmp_path / "base")!r}, {str(tmp_path / "tuned")!r}
        ls.diagnose(*pair, layers=0)  # imports, caches of allocators
        open("/proc/self/clear_refs", "w").write("5")
        before = rss("VmRSS:")
        report = ls.diagnose(*pair)
        assert len(report.by_module) >= 8 * 7, len(report.by_module)
        print(rss("VmHWM:") - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < allowed


def test_adapters_without_a_weight_of_their_own_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    handle = ls.attach(model, ls.LoRAConfig(r=2))
    randomise(handle.parameters())
    weights = ls.read_adapter(ls.save(model, tmp_path / "adapter"))
    monkeypatch.setattr(type(weights.variant), "fusable", False)
    with pytest.raises(FuseError, match="adapted layer, so that no angle can be given") as caught:
        ls.diagnose(tmp_path / "base", weights)
    assert "retention" in str(caught.value.fix)
    # What only PEFT knows comes first.
    weights.unsupported = "It is something else."
    with pytest.raises(AdapterFileError, match="something else") as refused:
        ls.diagnose(tmp_path / "base", weights)
    assert "compare the two checkpoints" in str(refused.value.fix)
