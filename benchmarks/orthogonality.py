"""Orthogonality penalties against EgoRA's dense form: penalty with gradient, and refresh.

Everything is measured alternately: each round times one call of ours (repeated until it
takes long enough to be timed) and one of the dense form, and the table shows medians of the
ratios within a round.

    python benchmarks/orthogonality.py                         # 2048 x 2048, r = 16
    python benchmarks/orthogonality.py --size 1024 --rounds 3 --json orthogonality.json

The dense form is √(‖(B A) Sᵀ − I‖² + 1e-8) with S [d, d] and its gradient through autograd,
and S ← m S + (1 − m) pinv(B A)ᵀ. Both are checked against each other before they are timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasmith.dynamics.entropy import token_statistics
from lorasmith.dynamics.orthogonality import (
    refresh_shadow,
    shadow_penalty_gradient,
    spectral_penalty_gradient,
)

GOALS = {"penalty": 1 / 200, "refresh": 1 / 2000, "spectral": None, "entropy": None}


def dense_penalty(A: Tensor, B: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b = A.detach().requires_grad_(), B.detach().requires_grad_()
    P: Tensor = (b @ a) @ S.T
    value = torch.sqrt((P - torch.eye(P.shape[0])).square().sum() + 1e-8)
    g_A, g_B = torch.autograd.grad(value, (a, b))
    return value.detach(), g_A, g_B


def dense_refresh(A: Tensor, B: Tensor, S: Tensor, momentum: float) -> Tensor:
    inverse: Tensor = torch.linalg.pinv(B @ A)
    return momentum * S + (1 - momentum) * inverse.T


def dense_entropy(logits: Tensor) -> Tensor:
    log_p = logits.float().log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def seconds(function: Callable[[], Any], clock: Callable[[], float], fill: float = 0.1) -> float:
    """Seconds a call, over as many calls as fill the time."""
    start, calls = clock(), 0
    while (taken := clock() - start) < fill or calls == 0:
        function()
        calls += 1
    return taken / calls


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the process's own time, on a machine that others use too; one thread",
    )
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.cpu_time else options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.manual_seed(0)
    d, r, m = options.size, options.r, 0.9
    A, B = torch.randn(r, d) / d**0.5, torch.randn(d, r)
    U, V = torch.zeros(d, 2 * r), torch.zeros(d, 2 * r)
    U, V, _ = refresh_shadow(U, V, torch.randn_like(A), torch.randn_like(B), 0.0, 2 * r, 1e-6)
    U, V, _ = refresh_shadow(U, V, A, B, m, 2 * r, 1e-6)
    S = U @ V.T
    A, B = A * 1.1, B + 0.1 * torch.randn_like(B)

    def refresh() -> tuple[Tensor, Tensor, Tensor]:
        return refresh_shadow(U, V, A, B, m, 2 * r, 1e-6)

    logits, labels = torch.randn(4, 128, 49152), torch.randint(0, 49152, (4, 128))
    new_U, new_V, dropped = refresh()
    wanted_S = dense_refresh(A.double(), B.double(), S.double(), m)
    ours, theirs = (
        shadow_penalty_gradient(A, B, U, V),
        dense_penalty(A.double(), B.double(), S.double()),
    )
    errors = {
        "penalty": relative(ours[0], theirs[0]),
        "gradient": max(relative(g, h) for g, h in zip(ours[1:], theirs[1:], strict=True)),
        "shadow": float((new_U.double() @ new_V.double().T - wanted_S).norm()),
        "shadow_bound": float(dropped),
        "shadow_norm": float(wanted_S.norm()),
    }
    memory = {
        "shadow_to_adapter": (U.nbytes + V.nbytes) / (A.nbytes + B.nbytes),
        "dense_shadow_to_adapter": S.nbytes / (A.nbytes + B.nbytes),
    }
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "penalty": (lambda: shadow_penalty_gradient(A, B, U, V), lambda: dense_penalty(A, B, S)),
        "spectral": (lambda: spectral_penalty_gradient(A, B), lambda: dense_penalty(A, B, S)),
        "refresh": (refresh, lambda: dense_refresh(A, B, S, m)),
        "entropy": (lambda: token_statistics(logits, labels), lambda: dense_entropy(logits)),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    for _ in range(options.rounds):
        for name, (mine, peer) in pairs.items():
            mine()
            times[name].append((seconds(mine, clock), seconds(peer, clock, 0.0)))
    record: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "options": {k: str(v) for k, v in vars(options).items()},
        "errors": errors,
        "memory": memory,
        "results": {},
    }
    print(f"{d} x {d}, r = {r}, float32, {torch.get_num_threads()} threads")
    print(f"{'':12}{'ours ms':>10}{'dense ms':>11}{'dense / ours':>14}{'goal':>8}")
    for name, rounds in times.items():
        ratio = statistics.median(y / x for x, y in rounds)
        mine, peer = (statistics.median(column) * 1e3 for column in zip(*rounds, strict=True))
        record["results"][name] = {"ms": mine, "dense_ms": peer, "dense_to_ours": ratio}
        goal = GOALS[name]
        shown = f"{1 / goal:8.0f}" if goal else ""
        print(f"{name:12}{mine:10.3f}{peer:11.1f}{ratio:14.1f}{shown}")
    for name, value in (errors | memory).items():
        print(f"{name:24}{value:12.3g}")
    if options.json:
        options.json.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
