"""Two opposite tasks, then a shock: the stress controller at work on a tiny model.

python examples/stress_demo.py [FIGURE]

One task counts upwards, the other downwards, so that they want opposite answers for the same
tokens: the controller gives each its own adapter. Later the labels of one run are shuffled
for 60 steps: it protects what was learned, and goes back to the state before.
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorasmith as ls
from lorasmith.web.stress_figure import stress_figure

STEPS, SHOCK = 420, range(260, 320)


def batch(step: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(step)
    task = "up" if step % 2 else "down"
    start = torch.randint(0, 32, (8, 1), generator=generator)
    ids = (start + (1 if task == "up" else -1) * torch.arange(12)) % 32
    labels = ids.clone()
    if step in SHOCK:
        labels = torch.randint(0, 32, ids.shape, generator=generator)
    return {"input_ids": ids, "labels": labels, "task": task}


def main(figure: str = "stress.png") -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).train()
    adapter = ls.attach(model, ls.LoRAConfig(r=4, alpha=8))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=5e-3)
    # Rests that fit a run of 400 steps; the defaults are made for thousands.
    controller = ls.StressController(cooldown=40, patience=20, every=2)
    with ls.Dynamics(model, controller, optimizer, tasks=["up", "down"]):
        for step in range(STEPS):
            model(**batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for record in controller.history:
            if record.event:
                print(f"step {record.step:3}  φ {record.phi:.2f}  {record.event}")
        stress_figure(controller.history, figure)
    print(f"{controller.history[-1].event}; {figure} shows the run")


if __name__ == "__main__":
    main(*sys.argv[1:])
