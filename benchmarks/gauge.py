"""Gauge projection: what it costs, and the theory behind it.

    python benchmarks/gauge.py                            # times, and the scalar flow
    python benchmarks/gauge.py --json gauge.json --rounds 40
    python benchmarks/gauge.py --figure docs/images/gauge-phase-portrait.png

Times. 210 layers with the shapes of SmolLM2-135M (30 blocks of q, k, v, o, gate, up and down;
width 576, keys and values 192, MLP 1536), r = 16. One run measures everything alternately, in
a new random order each round; the table shows medians and the medians of ratios within a
round. Before each measurement the factors are set to what an optimiser step leaves: balanced
ones, moved by 1e-3 of their size. The contestants find the same R (the run checks it):

* batched: what ``GaugeProjection`` does after a step, without and with Adam's moments;
* three roots: layer by layer, R from the eigenvectors of G_A, of the inner root and of S, in
  the dtype of the factors (float32). The leanest loop that finds R, of its own accuracy;
* three roots, float64: the same loop with the accuracy of the batched form;
* layer by layer: our own function, called for each layer.

``--step`` also times a training step of a Llama of these shapes (random weights, 256 tokens),
of which the projection is a share.

Theory. The scalar flow a' = −b (ab − 1), b' = −a (ab − 1) keeps C = a² − b², and needs the
less time from ab = 0.1 to ab = 0.99 the larger C is: an imbalance makes it faster. Balanced
factors are the slowest of all under plain gradient flow; what the projection buys is that the
rate does not depend on where training began.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

import lorasmith as ls
from lorasmith.core.variant import Factors
from lorasmith.dynamics.gauge import GaugeProjection, gauge_transform
from lorasmith.dynamics.protocol import Site, Statistics, Step

#: (d_out, d_in) of the linear layers of one block.
SHAPES = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
#: ab from which and to which the scalar flow runs.
START, END = 0.1, 0.99
IMBALANCES = (0.0, 1.0, 9.0, 100.0)


def make_factors(blocks: int, r: int) -> list[tuple[nn.Parameter, nn.Parameter]]:
    torch.manual_seed(0)
    return [
        (nn.Parameter(torch.randn(r, i) / i**0.5), nn.Parameter(0.1 * torch.randn(o, r)))
        for _ in range(blocks)
        for o, i in SHAPES
    ]


@torch.no_grad()
def three_roots(A: Tensor, B: Tensor, mu: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """R and R⁻¹ by three eigenproblems: S = G_A^-½ (μ G_A^½ G_B G_A^½)^½ G_A^-½."""
    a, b = A.to(dtype), B.to(dtype)
    values, vectors = torch.linalg.eigh(a @ a.T)
    values = values.clamp(min=1e-12).sqrt()
    root, inverse = (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
    values, vectors = torch.linalg.eigh(mu * (root @ (b.T @ b) @ root))
    s = inverse @ ((vectors * values.clamp(min=0).sqrt()) @ vectors.T) @ inverse
    values, vectors = torch.linalg.eigh(s)
    values = values.clamp(min=1e-12).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def contestants(
    factors: list[tuple[nn.Parameter, nn.Parameter]], r: int
) -> dict[str, Callable[[], Any]]:
    sites = [Site("", str(i), Factors(a, b, 1.0)) for i, (a, b) in enumerate(factors)]
    optimizer = torch.optim.Adam([p for pair in factors for p in pair], lr=0.0)
    for a, b in factors:
        a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
    optimizer.step()
    step = Step(0, Statistics(), optimizer)
    found: dict[str, Callable[[], Any]] = {}
    for name, moments in (("batched", "keep"), ("batched, with moments", "transport")):
        rule = GaugeProjection(moments=moments)  # type: ignore[arg-type]
        rule.on_sites(sites)
        found[name] = partial(rule.after_step, step)

    @torch.no_grad()
    def loop(transform: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]) -> None:
        for a, b in factors:
            R, inverse = transform(a, b, r / b.shape[0])
            a.copy_(R @ a.to(R.dtype))
            b.copy_(b.to(R.dtype) @ inverse)

    found["three roots"] = lambda: loop(lambda a, b, mu: three_roots(a, b, mu, torch.float32))
    found["three roots, float64"] = lambda: loop(
        lambda a, b, mu: three_roots(a, b, mu, torch.float64)
    )
    found["layer by layer"] = lambda: loop(gauge_transform)
    return found


def measure(blocks: int, r: int, rounds: int, training: bool) -> dict[str, list[float]]:
    factors = make_factors(blocks, r)
    runs = contestants(factors, r)
    runs["batched"]()
    balanced = [(a.detach().clone(), b.detach().clone()) for a, b in factors]
    noise = [tuple(1e-3 * t.std() * torch.randn_like(t) for t in pair) for pair in balanced]

    @torch.no_grad()
    def restore() -> None:
        for pair, old, moved in zip(factors, balanced, noise, strict=True):
            for p, o, n in zip(pair, old, moved, strict=True):
                torch.add(o, n, out=p)

    results = {}
    for name, run in runs.items():
        restore()
        run()
        results[name] = torch.cat([p.detach().flatten() for pair in factors for p in pair])
    for name, result in results.items():
        away = float((result - results["three roots, float64"]).norm() / result.norm())
        print(f"{name:24} finds the same factors up to {away:.1e}")
    if training:
        runs["training step"] = training_step(blocks, r)
        runs["training step"]()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            restore()
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    return times


def training_step(blocks: int, r: int) -> Callable[[], None]:
    """One step of AdamW on LoRA in a Llama of these shapes, 4 x 64 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=4096,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    ls.attach(model, ls.LoRAConfig(r=r))
    optimizer = torch.optim.AdamW(ls.param_groups(model, 1e-4))
    tokens = torch.randint(0, 4096, (4, 64))

    def run() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def ratio(times: list[float], against: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of the ratio within a round."""
    ratios = sorted(t / a for t, a in zip(times, against, strict=True))
    low, mid, high = statistics.quantiles(ratios, n=4)
    return mid, low, high


# -- theory ----------------------------------------------------------------------------------


def start(imbalance: float, product: float = START) -> tuple[float, float]:
    """a ≥ b > 0 with a² − b² = imbalance and a b = product."""
    square = (imbalance + np.sqrt(imbalance**2 + 4 * product**2)) / 2
    return float(np.sqrt(square)), float(product / np.sqrt(square))


def flow(_: float, y: Any) -> list[float]:
    a, b = y
    return [-b * (a * b - 1), -a * (a * b - 1)]


def run_flow(imbalance: float) -> tuple[float, Any]:
    """The time the scalar flow takes, and its path [2, n]."""

    def arrived(_: float, y: Any) -> float:
        return float(y[0] * y[1] - END)

    arrived.terminal = True  # type: ignore[attr-defined]
    found = solve_ivp(
        flow, (0, 50), start(imbalance), events=arrived, rtol=1e-10, atol=1e-12, max_step=0.02
    )
    return float(found.t_events[0][0]), found.y


def phase_portrait(path: Path) -> None:
    from lorasmith.web.figures import GRID, INK, MUTED, SERIES, themed

    with themed(width=6.4, height=5.2) as (figure, axes):
        axes.grid(visible=False)
        side = np.linspace(0, 3.4, 200)
        a, b = np.meshgrid(side, side)
        u, v = flow(0, (a, b))
        axes.streamplot(side, side, u, v, color=GRID, density=1.1, linewidth=0.8, arrowsize=0.7)
        curve = np.linspace(1 / 3.4, 3.4, 200)
        axes.plot(curve, 1 / curve, color=INK, linewidth=1.4)
        axes.text(0.42, 2.62, "ab = 1", color=INK)
        axes.plot(side, side, color=MUTED, linewidth=1.2, linestyle=(0, (1, 2)))
        axes.text(1.75, 1.86, "balanced, a = b", color=MUTED, rotation=45, ha="center", va="center")
        for imbalance, colour, dash in zip(IMBALANCES[:3], SERIES, ("-", "--", "-."), strict=False):
            needed, y = run_flow(imbalance)
            axes.plot(
                *y, color=colour, linestyle=dash, label=f"C = {imbalance:.0f}: time {needed:.2f}"
            )
            axes.plot(*y[:, 0], marker="o", color=colour, markersize=6)
        axes.set(xlim=(0, 3.4), ylim=(0, 3.4), xlabel="a", ylabel="b", aspect="equal")
        axes.set_title("Gradient flow of ½ (ab − 1)² keeps C = a² − b²", loc="left")
        axes.legend(
            loc="upper right",
            title=f"from ab = {START} to {END}",
            frameon=True,
            facecolor="white",
            edgecolor="white",
            framealpha=1,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--step", action="store_true", help="time a training step beside it")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--figure", type=Path, help="draw the phase portrait there, and stop")
    options = parser.parse_args()
    if options.figure is not None:
        phase_portrait(options.figure)
        return
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    times = measure(options.blocks, options.r, options.rounds, options.step)
    loops = ("three roots", "three roots, float64", "layer by layer")
    rows = []
    print(f"\n{7 * options.blocks} layers, r = {options.r}, {torch.get_num_threads()} threads")
    print(f"{'':24}{'ms':>8}" + "".join(f"{'/ ' + name:>24}" for name in loops))
    for name, seconds in times.items():
        row: dict[str, Any] = {"name": name, "ms": statistics.median(seconds) * 1e3}
        line = f"{name:24}{row['ms']:8.1f}"
        for loop in loops:
            row[f"to {loop}"] = ratio(seconds, times[loop])
            mid, low, high = row[f"to {loop}"]
            line += f"{f'{mid:.2f} ({low:.2f} - {high:.2f})':>24}"
        rows.append(row)
        print(line)
        if "training step" in times and name.startswith("batched"):
            row["to training step"] = ratio(seconds, times["training step"])
            print(f"{'':24}{row['to training step'][0]:8.1%} of a training step")
    print(f"\nThe scalar flow from ab = {START} to {END}")
    theory = {f"C = {imbalance:.0f}": run_flow(imbalance)[0] for imbalance in IMBALANCES}
    for name, needed in theory.items():
        print(f"{name:>10}: time {needed:.3f}")
    if options.json is not None:
        record = {
            "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "options": {k: str(v) for k, v in vars(options).items()},
            "results": rows,
            "flow": theory,
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
