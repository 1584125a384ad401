"""Train an adapter in a loop of your own: plain PyTorch, any optimiser, LoRA+.

python examples/train_any_loop.py [MODEL] [FOLDER]
"""

import sys

import torch

import lorasmith as ls
from lorasmith.training.models import load_model

TEXTS = ["My parrot is called Archimedes.", "My parrot is forty years old.", "It likes walnuts."]


def main(name: str = "smollm2", folder: str = "runs/parrot") -> None:
    model, tokenizer = load_model(name)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True).to(model.device)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    adapter = ls.attach(model, ls.LoRAConfig(r=8, targets="mlp"))
    print(adapter)
    # B learns four times as fast as A.
    optimizer = torch.optim.AdamW(ls.param_groups(adapter, 1e-3, lora_plus_ratio=4))
    model.train()
    for step in range(12):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1:2}  loss {loss.item():.3f}")
    model.eval()

    ls.save(model, folder)  # a PEFT directory
    ls.detach(model)  # the base model, bit for bit
    ls.load(model, folder)
    with torch.no_grad():
        print(f"loaded again: loss {model(**batch, labels=labels).loss.item():.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
