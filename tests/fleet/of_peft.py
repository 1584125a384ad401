"""Adapters that PEFT made, what they do to the weights, and what a model does with them.

Nothing here goes through lorasmith: files are read with safetensors, models run by PEFT.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.io.support import llama, logits, stir


def made(path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """An adapter that PEFT made and wrote, all of it stirred."""
    given: dict[str, Any] = {"r": 3, "target_modules": ["q_proj", "up_proj"], **options}
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(task_type="CAUSAL_LM", **given)
        model = peft.get_peft_model(llama(), config)
        stir((p for p in model.parameters() if p.requires_grad), 0.1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        model.save_pretrained(path)
    return path


def in_peft(path: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(peft.PeftModel.from_pretrained(llama(), path).eval())


def dense(path: Path) -> dict[str, Tensor]:
    """ΔW of each layer in float64, from PEFT's file and configuration alone."""
    tensors = load_file(path / "adapter_model.safetensors")
    config = json.loads((path / "adapter_config.json").read_text())
    found = {}
    for key, A in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        B = tensors[key.replace("lora_A", "lora_B")].double()
        r, alpha = config["r"], config["lora_alpha"]
        for pattern, value in config["rank_pattern"].items():
            r = value if name.endswith(pattern) else r
        for pattern, value in config["alpha_pattern"].items():
            alpha = value if name.endswith(pattern) else alpha
        assert A.shape[0] == r
        scaling = alpha / r**0.5 if config["use_rslora"] else alpha / r
        found[name] = scaling * B @ A.double()
    return found


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """‖ΔW₁ − ΔW₂‖² / ‖ΔW₂‖² over all layers."""
    assert one.keys() == other.keys()
    gone = sum(float((one[m] - other[m]).square().sum()) for m in one)
    return gone / sum(float(W.square().sum()) for W in other.values())
