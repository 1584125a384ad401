"""A new task inside a fleet's basis (``SubspaceTrainer``) beside LoRA of the same task.

    python benchmarks/fleet_adapters.py --count 64 --output fleet-adapters  # hours, resumable
    python benchmarks/subspace_training.py --adapters fleet-adapters \
        --report docs/subspace-training.md                                  # a quarter of an hour

From the adapters in the folder, without those of the tasks that are trained here, two fleets are
built: joint with 32 directions on either side of every layer, and Share with 15 components. In
them, and with LoRA as ``fleet_adapters.py`` trains it (r = 8, alpha = 16, q_proj and v_proj), new
tasks are trained:

* ``loadings``: Share, the loadings only;
* ``core``: joint, the R x R core only;
* ``core + 2``: joint, the core and two new directions on either side;
* ``LoRA``.

All of them see the same rows in the same order, 40 steps of four, with AdamW and a rate that
falls linearly to 0. The rate of each arm is the best of a few, by the held-out loss of a task of
its own (``TUNED_ON``) after ``TRIAL`` steps, which is not reported. The others are judged by

    gain kept = (base loss − loss) / (base loss − loss of LoRA)

on held-out rows. Bytes are those of float32, as the trained numbers are stored: in the fleet,
new directions included, and of the LoRA's file. Times are medians of steps; arms take turns,
task by task. Every run's figures go to ``benchmarks/results/subspace_training.json`` when it
ends; what is there is not run again.

Limits: one model, related tasks, one seed; 40 steps are few, and a rate that is best for one
task need not be for another.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments import markdown, prepare, write_report
from fleet_adapters import ROWS, STEPS, batches, mean_loss

#: Tasks that are reported; none of the fleet's adapters was trained on one of them.
HELD_OUT = ("numbers-es", "numbers-fi", "dates-sv")
#: The task by which rates are chosen, likewise.
TUNED_ON = "numbers-de"
DIRECTIONS, COMPONENTS, EXTRA = 32, 15, 2
#: Arm → (basis, new directions, rates to choose from).
ARMS: dict[str, tuple[str | None, int, tuple[float, ...]]] = {
    "loadings": ("share", 0, (3e-2, 1e-1, 3e-1, 1.0)),
    "core": ("joint", 0, (3e-3, 1e-2, 3e-2)),
    "core + 2": ("joint", EXTRA, (1e-3, 3e-3, 1e-2, 3e-2)),
    "LoRA": (None, 0, (3e-4, 1e-3, 3e-3, 1e-2)),
}
#: Steps by which rates are chosen.
TRIAL = 12
TEST_ROWS = 32


class Found:
    """The figures of the runs, in one file.

    Args:
        path: The file.
        setting: What the figures depend on beside arm, task and rate.
    """

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        self.path = path
        known = json.loads(path.read_text()) if path.exists() else {}
        self.all: dict[str, Any] = known if known.get("setting") == setting else {"runs": {}}
        self.all["setting"] = setting

    def put(self, **values: Any) -> None:
        """Keeps it; a reader sees all of the file or none."""
        self.all |= values
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.all, indent=1))
        os.replace(part, self.path)

    def run(self, arm: str, task: str, rate: float) -> Any:
        """What that run has measured, or ``None``."""
        return self.all["runs"].get(f"{arm} {task} {rate:g}")

    def add(self, arm: str, task: str, rate: float, values: dict[str, Any]) -> None:
        """Keeps what a run has measured."""
        self.put(runs=self.all["runs"] | {f"{arm} {task} {rate:g}": values})


class Trials:
    """Model, rows and fleets, to train one arm on one task."""

    def __init__(self, places: dict[str, Path], model: Any, tokenizer: Any) -> None:
        from lorasmith.training.collate import choose_collator

        self.places = places
        self.model, self.tokenizer = model, tokenizer
        self.base_losses: dict[str, float] = {}
        self.collate, _ = choose_collator(model, tokenizer.pad_token_id)

    def rows(self, task: str) -> tuple[list[Any], list[Any]]:
        """(batches to train on, held-out ones), as in ``fleet_adapters.py``."""
        from lorasmith.training.data import load_rows

        rows = [dict(r) for r in load_rows(f"builtin:{task}", limit=2000)]
        random.Random(0).shuffle(rows)
        test = [dict(r) for r in load_rows(f"builtin:{task}", split="test", limit=TEST_ROWS)]
        return (
            batches(rows[: STEPS * ROWS], self.tokenizer, self.collate, ROWS),
            batches(test, self.tokenizer, self.collate, 16),
        )

    def train(self, arm: str, task: str, rate: float) -> dict[str, Any]:
        """Trains it, and gives losses, sizes and times."""
        steps = TRIAL if task == TUNED_ON else STEPS
        import torch

        import lorasmith as ls
        from lorasmith.training.loss import model_loss_output

        basis, extra, _ = ARMS[arm]
        rows, held_out = self.rows(task)
        if task not in self.base_losses:
            self.base_losses[task] = mean_loss(self.model, held_out)
        torch.manual_seed(0)
        trainer = fleet = None
        if basis is None:
            config = ls.LoRAConfig(r=8, alpha=16.0, targets=("q_proj", "v_proj"))
            adapter = ls.attach(self.model, config)
        else:
            fleet = ls.SharedSubspace.load(self.places[basis])
            trainer = ls.SubspaceTrainer(self.model, fleet, task, extra=extra)
            adapter = trainer.adapter
        optimizer = torch.optim.AdamW(ls.param_groups(self.model, rate), weight_decay=0.0)
        self.model.train()
        seconds = []
        for step, batch in enumerate(rows[:steps]):
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / steps)
            optimizer.zero_grad(set_to_none=True)
            model_loss_output(self.model, batch).loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            seconds.append(time.perf_counter() - start)
        after = mean_loss(self.model, held_out)
        parameters = adapter.num_parameters()
        nbytes = 4 * parameters
        if trainer is not None and fleet is not None:
            old = fleet.stats().basis
            trainer.finish()
            stats = fleet.stats()
            nbytes = stats.basis - old + stats.per_adapter[task]
        ls.detach(self.model)
        return {
            "base_loss": self.base_losses[task],
            "loss": after,
            "parameters": parameters,
            "bytes": nbytes,
            "seconds": statistics.median(seconds),
        }


def build(folder: Path, places: dict[str, Path]) -> dict[str, Any]:
    """Builds both fleets, and what of the held-out tasks' own LoRAs lies in their bases."""
    import lorasmith as ls

    held_out = {*HELD_OUT, TUNED_ON}
    recorded = json.loads((folder / "evaluations.json").read_text())
    members = [folder / name for name, r in recorded.items() if r["task"] not in held_out]
    own = {r["task"]: folder / n for n, r in recorded.items() if r["task"] in held_out}
    bases: dict[str, Any] = {}
    for basis, count in (("joint", DIRECTIONS), ("share", COMPONENTS)):
        with warnings.catch_warnings():  # numbers of directions are given, not an error
            warnings.simplefilter("ignore", UserWarning)
            fleet = ls.SharedSubspace.from_adapters(members, basis=basis, components=count)  # type: ignore[arg-type]
            spanned = {t: 1 - fleet.project(p).error for t, p in own.items() if t in HELD_OUT}
        fleet.save(places[basis])
        bases[basis] = {"bytes": fleet.stats().total, "spanned": spanned}
    return {"adapters": len(members), "bases": bases}


def chosen(found: Found, arm: str) -> float | None:
    """The rate with the least loss on the task for it, if all have been tried."""
    tried = {rate: found.run(arm, TUNED_ON, rate) for rate in ARMS[arm][2]}
    if any(values is None for values in tried.values()):
        return None
    return min(tried, key=lambda rate: float(tried[rate]["loss"]))


def report(found: Found) -> str:
    """Tables and what they say."""
    built, lora = found.all["built"], "LoRA"
    rates = {arm: chosen(found, arm) for arm in ARMS}
    head = ("", "trained", "bytes", "rate", "step", *HELD_OUT, "mean")
    rows = []
    for arm in ARMS:
        rate = rates[arm]
        assert rate is not None
        runs = {task: found.run(arm, task, rate) for task in HELD_OUT}
        kept = {}
        for task, run in runs.items():
            base = run["base_loss"]
            whole = base - found.run(lora, task, rates[lora] or 0.0)["loss"]
            kept[task] = (base - run["loss"]) / whole
        first = runs[HELD_OUT[0]]
        edge = " (edge)" if rate in (ARMS[arm][2][0], ARMS[arm][2][-1]) else ""
        rows.append(
            (
                arm,
                f"{first['parameters']:,}",
                f"{first['bytes'] / 1000:,.0f} kB",
                f"{rate:g}{edge}",
                f"{statistics.median(r['seconds'] for r in runs.values()):.2f} s",
                *(f"{kept[t]:.0%} ({r['loss']:.2f})" for t, r in runs.items()),
                f"{statistics.mean(kept.values()):.0%}",
            )
        )
    bases = [found.run(lora, t, rates[lora] or 0.0)["base_loss"] for t in HELD_OUT]
    rows.append(("no adapter", "0", "0", "", "", *(f"0% ({b:.2f})" for b in bases), "0%"))
    spanned = [
        f"{basis} {', '.join(f'{s:.0%}' for s in one['spanned'].values())}"
        for basis, one in built["bases"].items()
    ]
    grids = "; ".join(f"{arm} {', '.join(f'{r:g}' for r in ARMS[arm][2])}" for arm in ARMS)
    first = (
        f"SmolLM2-135M, fleets of {built['adapters']} adapters: share of LoRA's gain on held-out "
        f"rows that each arm has (the loss, nats a token), after {STEPS} steps of {ROWS} rows; "
        f"one seed, {found.all['setting']['threads']} thread."
    )
    sizes = " and ".join(f"{o['bytes'] / 1e6:.1f} MB ({b})" for b, o in built["bases"].items())
    last = (
        f"Rates: the best after {TRIAL} steps on {TUNED_ON}, which is not in the fleets either, "
        f"of {grids}; "
        '"edge" where a larger or smaller one might have been better. What of ‖ΔW‖² of the '
        f"tasks' own LoRAs lies in the basis ({', '.join(HELD_OUT)}): {'; '.join(spanned)}. "
        f"Bytes in float32; the fleets themselves take {sizes}, once for all their tasks."
    )
    return "\n\n".join((first, markdown(head, rows), last))


def todo(found: Found) -> Iterable[tuple[str, str, float]]:
    """(arm, task, rate) of the runs, those that choose the rates first."""
    for place in range(max(len(rates) for _, _, rates in ARMS.values())):
        for arm, (_, _, rates) in ARMS.items():
            for rate in rates[place : place + 1]:
                yield arm, TUNED_ON, rate
    for task in HELD_OUT:
        for arm in ARMS:
            best = chosen(found, arm)
            assert best is not None
            yield arm, task, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--report", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    prepare(options.threads)
    recorded = json.loads((options.adapters / "evaluations.json").read_text())
    setting = {
        "adapters": sorted(recorded),
        "directions": DIRECTIONS,
        "components": COMPONENTS,
        "steps": [STEPS, TRIAL],
        "rows": ROWS,
        "threads": options.threads,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    found = Found(options.results / "subspace_training.json", copy.deepcopy(setting))

    from lorasmith.training.models import load_model

    with tempfile.TemporaryDirectory() as scratch:
        places = {basis: Path(scratch) / basis for basis in ("joint", "share")}
        found.put(built=build(options.adapters, places))
        trials: Trials | None = None
        for arm, task, rate in todo(found):
            if found.run(arm, task, rate) is not None:
                continue
            if trials is None:
                model, tokenizer = load_model("smollm2", dtype="float32", device="cpu")
                trials = Trials(places, model, tokenizer)
            values = trials.train(arm, task, rate)
            found.add(arm, task, rate, values)
            print(
                f"{arm}, {task}, {rate:g}: {values['base_loss']:.3f} → {values['loss']:.3f}, "
                f"{values['parameters']:,} numbers, {values['seconds']:.2f} s a step",
                flush=True,
            )
    text = report(found)
    print(text)
    if options.report is not None:
        write_report(options.report, "training", text)


if __name__ == "__main__":
    main()
