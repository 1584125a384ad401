"""Adapters of different families side by side: one at a time, one for each row, and a mix.

python examples/several_adapters.py [MODEL]
"""

import sys

import torch

import lorasmith as ls
from lorasmith.training.models import load_model

TEXTS = {"parrot": "My parrot is called Archimedes.", "tortoise": "My tortoise is called Zeno."}
CONFIGS = {"parrot": ls.LoRAConfig(r=8), "tortoise": ls.IA3Config()}


def main(name: str = "smollm2") -> None:
    model, tokenizer = load_model(name)
    batch = tokenizer(list(TEXTS.values()), return_tensors="pt", padding=True).to(model.device)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    # Each learns its own row.
    for row, (animal, config) in enumerate(CONFIGS.items()):
        adapter = ls.attach(model, config, name=animal)  # becomes the active one
        optimizer = torch.optim.AdamW(ls.param_groups(adapter, 1e-2))
        for _ in range(12):
            inputs = {key: value[row : row + 1] for key, value in batch.items()}
            model(**inputs, labels=labels[row : row + 1]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        adapter.requires_grad_(False)

    def losses() -> str:
        with torch.no_grad():
            logits = model(**batch).logits
        each = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none"
        ).sum(1) / (labels[:, 1:] != -100).sum(1)
        return "  ".join(f"{animal} {loss:6.3f}" for animal, loss in zip(TEXTS, each, strict=True))

    animals = list(CONFIGS)
    for what in (None, *animals, animals, {"parrot": 0.5, "tortoise": 0.5}):
        with ls.use(model, what):
            print(f"{what!s:44}", losses())
    print(ls.fuse(model, {"parrot": 0.5, "tortoise": 0.5}))
    print(f"{'fused':44}", losses())


if __name__ == "__main__":
    main(*sys.argv[1:])
