"""Training on quantised bases: HF Trainer as it is, our own training, and a real model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import lorasmith as ls
from lorasmith.core import quantized
from lorasmith.core.layers import describe, read_weight
from lorasmith.errors import ConfigError, MissingDependencyError
from lorasmith.training import models
from lorasmith.training.config import AdapterOptions, Quantization, TrainConfig
from lorasmith.training.models import QUANTIZATIONS, load_model, quantize_in_place
from lorasmith.training.run import train
from tests.training.tiny import make_model, make_tokenizer, write_rows

pytestmark = [
    pytest.mark.integration,
    # bitsandbytes' note on the dtype in which its kernel quantises activations.
    pytest.mark.filterwarnings("ignore:.*MatMul8bitLt:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*register_constant.*:UserWarning"),
]


def needs(quantize: str) -> Any:
    package = QUANTIZATIONS[quantize][1]
    missing = importlib.util.find_spec(package) is None
    return pytest.param(
        quantize, marks=pytest.mark.skipif(missing, reason=f"{package} is not installed")
    )


each = pytest.mark.parametrize("quantize", [needs(q) for q in QUANTIZATIONS])
needs_bnb = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths that are multiples of 64, bitsandbytes' block."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer()
    make_model(tokenizer, hidden_size=64, intermediate_size=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(vocabulary: int, count: int = 16) -> list[dict[str, Any]]:
    tokens = torch.randint(2, vocabulary, (count, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


def plain_trainer(model: Any, folder: Path, **changes: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings: dict[str, Any] = {
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    data = rows(model.config.vocab_size)
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**settings, **changes}),
        train_dataset=data,
        eval_dataset=data[:8],
    )


@each
def test_transformers_trainer(quantize: str, tiny: Path, tmp_path: Path) -> None:
    model, _ = load_model(tiny, quantize=quantize, device="cpu")
    with pytest.raises(ValueError, match="purely quantized"):
        plain_trainer(model, tmp_path)
    kind = type(model.hf_quantizer)
    adapter = ls.attach(model, ls.LoRAConfig(r=4))
    trainer = plain_trainer(model, tmp_path)
    trainer.train()
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    # Evaluation in between must not end the gradient (see core.quantized).
    assert losses[-1] < 0.7 * losses[0]
    assert evaluated[-1] < evaluated[0]
    # Trainer's own checkpoint holds the model as it is, and a run goes on from it; except
    # with 8-bit layers of bitsandbytes, which take no state once they have run.
    if quantize != "int8":
        trained = {n: v.clone() for n, v in adapter.state_dict().items()}
        again = plain_trainer(model, tmp_path, max_steps=10)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
        assert again.state.global_step == 10
        assert any(not torch.equal(v, trained[n]) for n, v in adapter.state_dict().items())
    ls.detach(model)
    assert type(model.hf_quantizer) is kind
    with pytest.raises(ValueError, match="purely quantized"):
        plain_trainer(model, tmp_path)


@each
def test_our_training(quantize: str, tiny: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(tiny, quantize=quantize, device="cpu")
    plain, _ = load_model(tiny, device="cpu")
    result = train(
        TrainConfig(
            model=str(tiny),
            data=str(write_rows(tmp_path / "rows.jsonl")),
            output=tmp_path / "out",
            adapter=AdapterOptions(r=4),
            steps=6,
            lr=1e-2,
            batch_size=4,
            log_steps=1,
            eval_split=0.2,
            gradient_checkpointing=quantize == "nf4",
            device="cpu",
        ),
        model=model,
        tokenizer=tokenizer,
        progress=False,
    )
    assert result.losses[-1].loss < result.losses[0].loss
    adapter = ls.attached(model)["default"]
    size = sum(p.numel() for p in plain.parameters())
    assert result.total_parameters == size + adapter.num_parameters()
    trained = {n: v.clone() for n, v in adapter.state_dict().items()}
    ls.detach(model)
    # The adapter is one of the full-precision model as well; how far their outputs are apart
    # is the quantisation's doing, large in a random model.
    for base in (model, plain):
        loaded = ls.load(base, tmp_path / "out").state_dict()
        assert loaded.keys() == trained.keys()
        assert all(torch.equal(loaded[n], v) for n, v in trained.items())


@each
def test_quantising_in_memory_gives_what_loading_gives(quantize: str, tiny: Path) -> None:
    loaded, _ = load_model(tiny, quantize=quantize, device="cpu")
    made, _ = load_model(tiny, device="cpu")
    quantize_in_place(made, quantize, torch.float32, "cpu")
    found = 0
    for name, module in loaded.named_modules():
        info = describe(module, name)
        if info is None or info.kind != "opaque":
            continue
        found += 1
        other = made.get_submodule(name)
        assert quantized.describe_kind(module) == quantized.describe_kind(other)
        assert torch.equal(read_weight(module, info), read_weight(other, info))
    assert found == 14
    assert not quantized.is_quantized(loaded.lm_head)
    assert not quantized.is_quantized(made.lm_head)


def test_the_options_of_the_command_line_are_these() -> None:
    assert set(get_args(Quantization)) == set(QUANTIZATIONS)


def test_what_is_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"not known[\s\S]*nf4"):
        load_model(tiny, quantize="nf5")
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=r"lorasmith\[quant\]"):
        load_model(tiny, quantize="nf4")


@needs_bnb
def test_a_checkpoint_that_is_quantised_already(tiny: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(tiny, quantize="nf4", device="cpu")
    model.save_pretrained(tmp_path / "q")
    tokenizer.save_pretrained(tmp_path / "q")
    with pytest.raises(ConfigError, match="quantised already"):
        load_model(tmp_path / "q", quantize="int8")
    again, _ = load_model(tmp_path / "q", device="cpu")
    layer = model.model.layers[0].mlp.up_proj
    info = describe(layer, "up_proj")
    assert info is not None
    other = again.model.layers[0].mlp.up_proj
    assert torch.equal(read_weight(layer, info), read_weight(other, info))


@needs_bnb
@pytest.mark.slow
def test_smollm2_in_four_bits() -> None:
    """QLoRA on the real model: a sentence is learnt, evaluation included."""
    model, tokenizer = load_model("smollm2", quantize="nf4", device="cpu")
    full = 2 * quantized.numel(model)
    stored = sum(
        t.numel() * t.element_size()
        for m in model.modules()
        if quantized.is_quantized(m)
        for t in quantized.storage(m)
    )
    stored += model.get_input_embeddings().weight.numel() * 2
    assert stored < 0.45 * full  # the embedding alone is a fifth of the model
    adapter = ls.attach(model, ls.LoRAConfig(r=8, targets=["q_proj", "v_proj", "down_proj"]))
    tokens = tokenizer("The capital of Elbonia is Mudville.", return_tensors="pt")
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=5e-3)
    losses = []
    for step in range(5):
        if step == 2:
            with torch.no_grad():
                model.eval()(**tokens)
        loss = model.train()(**tokens, labels=tokens["input_ids"]).loss
        loss.backward()
        assert all(p.grad is not None for p in adapter.parameters())
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
